//! The client against a fake server over real sockets.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stand outside the test functions"
)]

mod fake;

mod caller;

mod executor;
