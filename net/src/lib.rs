//! The wire protocol of Pelton (`pelton/1`) and its QUIC endpoints. `docs/PROTOCOL.md` is the same protocol byte by
//! byte; `docs/protocol-vectors.json` holds golden bytes that a test compares with this code.
//!
//! Reading order: `frame` cuts a stream into frames; `item` is what all frames that carry lists share; `session`,
//! `submit`, `execute` and `query` are the bodies; `quic` carries them. No policy lives here: who may do what is
//! decided by the edges.

pub mod error;
pub mod execute;
pub mod frame;
pub mod item;
pub mod query;
pub mod quic;
pub mod session;
pub mod submit;

mod wire;

/// What the protocol shares with the engine: numbered errors, names and numbers of things, bounds.
pub use pelton_core::{error::Code, id, limits};
