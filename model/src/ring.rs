//! The ring of a log as a sleeper sees it (`storage/src/ring.rs`): a read of the bell that is armed with a wait and ends
//! once, flushes that somebody else ends, and completions that stay until they are taken. No timer ends a wait: what only
//! a timer would end is lost.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use loom::sync::{Condvar, Mutex};

/// What has ended.
enum Completion {
    Bell,
    Flush,
}

/// The side of the system: the bell's counter and what is under way.
#[derive(Default)]
pub(crate) struct Kernel {
    state: Mutex<State>,
    posted: Condvar,
}

#[derive(Default)]
struct State {
    /// Times that the bell was rung since it was read.
    rung: u64,
    /// A read waits for the bell.
    reading: bool,
    completions: VecDeque<Completion>,
}

impl Kernel {
    /// Somebody wrote to the eventfd.
    pub(crate) fn ring(&self) {
        let mut state = self.state.lock().expect("no holder panics");
        state.rung += 1;
        if state.reading {
            self.end_read(&mut state);
        }
    }

    /// A flush has ended.
    pub(crate) fn end_flush(&self) {
        let mut state = self.state.lock().expect("no holder panics");
        state.completions.push_back(Completion::Flush);
        self.posted.notify_one();
    }

    fn end_read(&self, state: &mut State) {
        state.rung = 0;
        state.reading = false;
        state.completions.push_back(Completion::Bell);
        self.posted.notify_one();
    }
}

pub(crate) struct RingDevice {
    kernel: Arc<Kernel>,
    bell_armed: bool,
    /// Flushes that have ended and were not told yet.
    finished: usize,
}

impl RingDevice {
    pub(crate) fn new(kernel: &Arc<Kernel>) -> RingDevice {
        RingDevice {
            kernel: Arc::clone(kernel),
            bell_armed: false,
            finished: 0,
        }
    }

    pub(crate) fn has_completed(&self) -> bool {
        self.finished > 0
    }

    /// True if a flush has ended that this has not told yet.
    pub(crate) fn completed(&mut self) -> bool {
        let has = self.finished > 0;
        self.finished -= usize::from(has);
        has
    }

    pub(crate) fn wait(&mut self, _timeout: Duration) {
        let kernel = Arc::clone(&self.kernel);
        let mut state = kernel.state.lock().expect("no holder panics");
        if !self.bell_armed {
            self.bell_armed = true;
            state.reading = true;
            if state.rung > 0 {
                kernel.end_read(&mut state);
            }
        }
        while state.completions.is_empty() {
            state = kernel.posted.wait(state).expect("no holder panics");
        }
        self.take(&mut state);
    }

    pub(crate) fn reap(&mut self) {
        let kernel = Arc::clone(&self.kernel);
        self.take(&mut kernel.state.lock().expect("no holder panics"));
    }

    fn take(&mut self, state: &mut State) {
        for completion in state.completions.drain(..) {
            match completion {
                Completion::Bell => self.bell_armed = false,
                Completion::Flush => self.finished += 1,
            }
        }
    }
}
