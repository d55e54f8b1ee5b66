//! The history of Pelton: a row for each task that has ended, kept on the disk for a time and found again by identity,
//! name, state, tag and time.
//!
//! Rows are written in blocks of many, sorted, and the embedded store below sees only blocks: it costs a few microseconds
//! an entry, and a row may not (`docs/decisions/`). Reading order: `row` is the bytes of a row; `block` those of many;
//! `store` keeps them, `page` lists them.

pub mod row;

mod block;

mod page;

pub mod store;

pub use page::{Filter, Page};
pub use row::Row;
pub use store::{Batch, Limits, Stats, Store, StoreError, count_rows};
