//! What the engine's files name in `engine/src/sync.rs`, over threads and memory that the checker controls.

use std::{
    cell::{Cell, RefCell},
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use loom::sync::{Condvar, Mutex};
pub(crate) use loom::{
    sync::atomic::{AtomicU8, AtomicUsize},
    thread::yield_now,
};

use crate::planted::{Bug, planted};
pub(crate) use crate::{queue::ArrayQueue, ring::RingDevice};

/// Orders what the calling thread did before with what it does next.
pub(crate) fn fence(order: Ordering) {
    if !planted(Bug::LostWakeup) {
        loom::sync::atomic::fence(order);
    }
}

/// The checker's, whose stores are swaps. The checker lets a thread read what a swap wrote although a later store has
/// overwritten it (loom's issue 254), which no machine does, unless that store was a swap, too.
#[derive(Debug)]
pub(crate) struct AtomicBool(loom::sync::atomic::AtomicBool);

impl AtomicBool {
    pub(crate) fn new(value: bool) -> AtomicBool {
        AtomicBool(loom::sync::atomic::AtomicBool::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> bool {
        self.0.load(order)
    }

    pub(crate) fn store(&self, value: bool, order: Ordering) {
        self.0.swap(value, order);
    }

    pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
        self.0.swap(value, order)
    }
}

/// What is set once and waited for by one thread at a time: a thread's token, an answer.
#[derive(Default)]
pub(crate) struct Signal {
    given: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(crate) fn give(&self) {
        *self.given.lock().expect("no holder panics") = true;
        self.changed.notify_one();
    }

    /// Waits for it and takes it.
    pub(crate) fn take(&self) {
        let mut given = self.given.lock().expect("no holder panics");
        while !*given {
            given = self.changed.wait(given).expect("no holder panics");
        }
        *given = false;
    }
}

/// The handle of a thread, which has a token as those of the standard library have.
#[derive(Clone, Default)]
pub(crate) struct Thread(Arc<Signal>);

impl fmt::Debug for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Thread")
    }
}

loom::thread_local! {
    static ME: RefCell<Option<Thread>> = RefCell::new(None);
}

impl Thread {
    pub(crate) fn unpark(&self) {
        self.0.give();
    }

    /// The calling thread is the one of this handle from now on.
    pub(crate) fn enter(&self) {
        ME.with(|me| *me.borrow_mut() = Some(self.clone()));
    }
}

/// Waits for the calling thread's token.
pub(crate) fn park() {
    let me = ME.with(|me| me.borrow().clone());
    me.expect("whoever parks has a handle").0.take();
}

/// The same: nothing may depend on the end of the time.
pub(crate) fn park_timeout(_most: Duration) {
    park();
}

/// Lets the others go on, since time does not pass by itself.
pub(crate) fn sleep(_time: Duration) {
    yield_now();
}

/// What the clock moves with each look at it.
const TICK: Duration = Duration::from_micros(10);

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A clock by which looking takes time, so that who looks for a while stops.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Instant(Duration);

impl Instant {
    /// Sets the clock back, before an order of the threads is tried.
    pub(crate) fn restart() {
        NOW.set(Duration::ZERO);
    }

    pub(crate) fn now() -> Instant {
        NOW.set(NOW.get() + TICK);
        Instant(NOW.get())
    }

    pub(crate) fn elapsed(self) -> Duration {
        Instant::now().saturating_duration_since(self)
    }

    #[cfg(test)]
    pub(crate) fn checked_sub(self, time: Duration) -> Option<Instant> {
        self.0.checked_sub(time).map(Instant)
    }

    pub(crate) fn saturating_duration_since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, time: Duration) -> Instant {
        Instant(self.0 + time)
    }
}
