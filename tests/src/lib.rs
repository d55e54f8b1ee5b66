//! Whole-system tests: real processes, real sockets, a real disk.
//!
//! Reading order: `server` runs `pelton serve` as a child; `deadline` waits for what is to become true; `worker` runs
//! functions in this process and counts their attempts; `disk` is a file system to fill and break; `raw` speaks single frames. The tests are in `tests/`. `chaos` is
//! the kill loop, whose program is `pelton-chaos`.

pub mod deadline;

pub mod server;

pub mod worker;

pub mod disk;

pub mod raw;

pub mod chaos;

pub use deadline::{PATIENCE, eventually};
pub use disk::Disk;
pub use server::{Server, ServerOptions, binary, pelton};
pub use worker::Worker;
