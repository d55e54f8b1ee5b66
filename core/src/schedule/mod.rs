//! Whose task is next: fair round robin over queues and lanes, and the credit that a queue has.

pub mod pool;
pub mod robin;
