//! The tables of a shard. All grow by whole pages and never move what they hold: no step pays for growth.

pub mod blob;
pub mod due;
pub mod numbering;
mod packed;
pub mod paged;
pub mod split;
pub mod task;
