//! The deterministic simulation of Pelton: real shards over real logs, on disks that live in memory and lose their
//! power, with simulated edges, callers, executors and time. One seed decides everything, and an oracle reads every
//! byte that becomes durable and checks everything that leaves a shard against it.
//!
//! Reading order: `swarm` is what a seed draws; `world` the process, its faults and its clock; `host` one shard over
//! its log; `place` a start with other shards; `caller` and `worker` those outside; `history` keeps what has ended; `oracle` what must hold, `damage` what a
//! damaged disk must come to; `coverage` what was reached; `trace` what is compared and printed; `run`
//! one seed from its draw to its verdict; `report` what many did;
//! `shrink` a failing seed made smaller.

pub mod swarm;

pub mod world;

pub mod host;

mod place;

pub mod caller;

pub mod worker;

pub mod history;

pub mod oracle;

pub mod damage;

pub mod coverage;

pub mod trace;

pub mod run;

pub mod report;

pub mod shrink;
