//! The stages of a step, in the order in which a task meets them. Each is one file and one part of [`crate::shard::Shard`].

mod admit;
mod append;
mod commit;
mod timers;
mod receive;
mod invoke;
mod complete;
mod session;
mod query;
mod configure;
mod replay;
mod audit;
