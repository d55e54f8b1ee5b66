//! What the meeting of the threads stands on. The files that the model checker runs (`model/src/lib.rs`) name none of
//! it in another way; there, `model/src/sync.rs` has the same names over threads and memory that the checker controls.

pub(crate) use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, fence},
    thread::{Thread, park, park_timeout, sleep, yield_now},
    time::Instant,
};

pub(crate) use crossbeam::queue::ArrayQueue;
pub(crate) use pelton_storage::ring::RingDevice;
