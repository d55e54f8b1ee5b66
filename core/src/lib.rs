//! The pure state machine of Pelton. It is handed the time, what arrived and what became durable, and answers with
//! what is to be written and sent; it owns no clock, no file, no socket and no randomness.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod clock;
pub mod config;
pub mod error;
pub mod event;
mod flow;
pub use flow::{moved, snapshot};
pub mod id;
pub mod limits;
mod packing;
pub mod planted;
pub mod record;
pub mod refuse;
pub mod schedule;
pub mod shard;
pub mod state;
pub mod table;
pub mod times;
