//! The segment log of Pelton: makes bytes durable and finds them again. Sans I/O: a [`device::Device`] performs what a
//! [`log::Log`] asks for. `docs/FORMAT.md` describes the bytes.
//!
//! Reading order: `format` is the bytes; `device` the seam to the disk; `segment` the life of a file; `log` the live
//! log; `snapshot` what spares a start most of it; `read_ahead` reads its segments ahead for `recover`, which finds it
//! again; `memory` a disk for tests; `file` one that is only read; `manifest` what a data directory is, and `backup` what
//! a copy of one is; `place` writes what lives in logs into others; `count` counts what a log holds; `reader` reads records
//! from another thread, and `copy` whole logs.

pub mod format;

pub mod device;

pub mod segment;

pub mod log;

pub mod snapshot;

mod read_ahead;

pub mod recover;

pub mod memory;

pub mod file;

pub mod manifest;

pub mod place;

pub mod backup;

pub mod count;

#[cfg(feature = "device")]
pub mod reader;

#[cfg(feature = "device")]
pub mod copy;

#[cfg(feature = "device")]
pub mod ring;
