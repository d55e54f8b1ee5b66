//! The stages of a step, in the order in which a task meets them. Each is one file and one part of [`crate::shard::Shard`].

mod admit;
mod append;
mod audit;
pub(crate) mod clean;
mod commit;
mod complete;
mod configure;
mod credits;
pub(crate) mod history;
mod invoke;
pub mod moved;
mod query;
mod rebuild;
mod receive;
pub(crate) mod replay;
mod session;
pub mod snapshot;
mod timers;
