//! The benchmark: what a server does per second and per core, beside what the machine could do at best. Every scenario
//! starts its own server, and its own executor where it needs one, as separate processes on loopback, and removes
//! their data.
//!
//! Reading order: `args` is what can be asked for; `scenario` what is run; `load` the clients; `worker` the executor;
//! `host` the processes and what they cost; `limits` what the machine can do; `report` what is printed.

pub mod args;

mod scenario;

mod load;

pub mod worker;

mod host;

mod limits;

mod report;

pub use args::BenchArgs;
pub use scenario::run;
