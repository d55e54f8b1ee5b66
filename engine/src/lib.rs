//! The engine of Pelton: one thread per shard, the inboxes and the bell between them and their edges, and the API of
//! programs that embed it. No async runtime is asked of the caller; no global subscriber, allocator or signal handler
//! is installed; nothing calls `exit`.
//!
//! Reading order: `engine` opens and closes; `inbox` is what lies between the threads, on `sync` and `bell`; `routes`
//! where a task goes; `linger` how a thread waits; `sleep` how a shard sleeps; `outgoing` what a shard has to say;
//! `shard_loop` the loop of a shard, `progress` how far its start is, and `quarantine` what stands in for one that cannot
//! be served; `place` is a start with another number of shards; `history` takes what has ended from the shards to the
//! disk; `backup` copies all of it while shards serve, which `hold` their logs meanwhile, and `restore` makes a data
//! directory of a backup; `edge` is the handle of whoever talks to the world; `info` and `stats` what
//! queries bring, `listing` how a list is put together; `embedded` the API for embedding, and `calls` how its calls reach
//! its thread.

pub mod engine;

mod sync;

mod bell;

pub mod inbox;

pub mod routes;

pub mod linger;

mod sleep;

mod outgoing;

pub mod progress;

mod shard_loop;

pub mod history;

pub mod place;

pub mod quarantine;

mod hold;

pub mod backup;

pub mod restore;

pub mod listing;

pub mod edge;

pub mod slots;

pub mod info;

pub mod stats;

mod calls;

pub mod embedded;

pub use backup::{BackupError, BackupOptions, backup_offline};
pub use edge::Edge;
pub use engine::{Closed, Engine, OpenError, Options};
pub use place::{NotPlaced, Placed, PlacingError};
pub use progress::Progress;
pub use quarantine::Quarantine;
pub use restore::{RestoreError, restore, verify};

#[cfg(test)]
mod tests;
