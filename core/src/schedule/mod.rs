//! Whose task is next: fair round robin over queues and lanes, the credit that a queue has, and the credits that the
//! shards share of a function's limit.

pub mod ledger;
pub mod pool;
pub mod robin;
