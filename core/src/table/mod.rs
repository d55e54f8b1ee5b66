//! The tables of a shard. All grow by whole pages and never move what they hold: no step pays for growth.

pub mod task;
pub mod split;
pub mod paged;
pub mod blob;
