//! What lies between Pelton's threads, under a model checker: the engine's own files, on a stand-in for what they stand
//! on. Every scenario is run in every order that its threads may take, with every value that a read may see under the
//! memory model of C11, up to a bound of preemptions.
//!
//! The engine's files are taken by path and see the modules of this crate where they say `crate::`. What they name there
//! is either another file of the engine's, or one of these stand-ins: `sync` and `bell` (threads, atomics, the queue, the
//! clock, the ring and the eventfd), and `engine`, `routes`, `info` and `embedded` (what only passes through).
//! `docs/decisions/0008-model-checking.md` says why.

pub mod planted;

mod queue;

mod ring;

mod sync;

mod bell;

mod passing;

use passing::{embedded, engine, info, quarantine, routes};

#[path = "../../engine/src/inbox.rs"]
pub mod inbox;

#[path = "../../engine/src/linger.rs"]
pub mod linger;

#[path = "../../engine/src/sleep.rs"]
mod sleep;

#[path = "../../engine/src/edge.rs"]
pub mod edge;

#[path = "../../engine/src/calls.rs"]
mod calls;

pub mod scenario;
