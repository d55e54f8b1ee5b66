//! The bounded queue with the steps and the memory orders of the one that the engine uses (`ArrayQueue` of crossbeam,
//! 0.3.14), on the checker's atomics. It promises no more than that one: nothing here locks, so that nothing orders what
//! the engine's files do not order themselves.

use std::{
    fmt,
    sync::{Mutex, atomic::Ordering::*},
};

use loom::{
    sync::atomic::{AtomicUsize, fence},
    thread::yield_now,
};

use crate::planted::{Bug, planted};

/// A queue has room for this many here, so that a scenario gets it full.
pub(crate) const ROOM: usize = 2;
/// What tells a round through the slots from the next one.
const LAP: usize = (ROOM + 1).next_power_of_two();

struct Slot<T> {
    stamp: AtomicUsize,
    /// The stamp says whose it is: nobody ever waits for this lock.
    value: Mutex<Option<T>>,
}

pub(crate) struct ArrayQueue<T> {
    head: AtomicUsize,
    tail: AtomicUsize,
    slots: Vec<Slot<T>>,
}

impl<T> ArrayQueue<T> {
    pub(crate) fn new(capacity: usize) -> ArrayQueue<T> {
        assert!(capacity >= ROOM);
        let slot = |index| Slot {
            stamp: AtomicUsize::new(index),
            value: Mutex::new(None),
        };
        ArrayQueue {
            head: AtomicUsize::new(0),
            tail: AtomicUsize::new(0),
            slots: (0..ROOM).map(slot).collect(),
        }
    }

    pub(crate) fn push(&self, value: T) -> Result<(), T> {
        let mut tail = self.tail.load(Relaxed);
        loop {
            let slot = &self.slots[tail % LAP];
            let stamp = slot.stamp.load(Acquire);
            if stamp == tail {
                match self
                    .tail
                    .compare_exchange_weak(tail, next(tail), SeqCst, Relaxed)
                {
                    Ok(_) => {
                        slot.swap(Some(value));
                        slot.stamp.store(tail + 1, Release);
                        return Ok(());
                    }
                    Err(moved) => tail = moved,
                }
            } else if stamp + LAP == tail + 1 {
                fence(SeqCst);
                if self.head.load(Relaxed) + LAP == tail {
                    return Err(value);
                }
                yield_now();
                tail = self.tail.load(Relaxed);
            } else {
                yield_now();
                tail = self.tail.load(Relaxed);
            }
        }
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let mut head = self.head.load(Relaxed);
        loop {
            let slot = &self.slots[head % LAP];
            let stamp = slot.stamp.load(Acquire);
            if stamp == head + 1 {
                match self
                    .head
                    .compare_exchange_weak(head, next(head), SeqCst, Relaxed)
                {
                    Ok(_) => {
                        let value = slot.swap(None);
                        slot.stamp.store(head + LAP, Release);
                        return value;
                    }
                    Err(moved) => head = moved,
                }
            } else if stamp == head {
                fence(SeqCst);
                if self.tail.load(Relaxed) == head {
                    return None;
                }
                yield_now();
                head = self.head.load(Relaxed);
            } else {
                yield_now();
                head = self.head.load(Relaxed);
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        let head = self.head.load(SeqCst);
        let tail = self.tail.load(SeqCst);
        tail == head || planted(Bug::SleepsWithoutLooking)
    }
}

/// The place behind this one: its index in the low bits, its lap in the others.
fn next(place: usize) -> usize {
    if place % LAP + 1 < ROOM {
        place + 1
    } else {
        place - place % LAP + LAP
    }
}

impl<T> Slot<T> {
    fn swap(&self, value: Option<T>) -> Option<T> {
        let mut slot = self.value.try_lock().expect("the stamps keep others out");
        std::mem::replace(&mut slot, value)
    }
}

impl<T> fmt::Debug for ArrayQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ArrayQueue")
    }
}
