//! The kill loop: a real server that is killed again and again under load, clients that write down what they were told,
//! and a judge who compares that with what executors did.
//!
//! Reading order: `plan` says what every submission is; `history` is how callers and executors write things down;
//! `caller` and `worker` are their processes; `host` starts and kills processes and says in which phase a kill hit;
//! `disk` loses power, and `power` puts a server's directory on it; `conductor` runs the cycles; `judge` reads everything
//! afterwards.

pub mod plan;

pub mod history;

pub mod caller;

pub mod worker;

pub mod host;

pub mod disk;

pub mod power;

pub mod conductor;

pub mod judge;
