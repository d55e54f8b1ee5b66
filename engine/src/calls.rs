//! How the calls of an embedding program reach the embedding thread, how that thread sleeps, and how it ends.
//!
//! Sleeping: who calls pushes, then gives the thread its token; the thread looks into the queue once more, and waits
//! for the token. Ending: calls are refused first, then the thread takes what is there and ends, then what still came
//! in is dropped, with it the ways to answer, so that no caller waits for a thread that is gone.

use std::{sync::atomic::Ordering::*, time::Duration};

use crate::{
    edge::Edge,
    embedded::Command,
    sync::{ArrayQueue, AtomicU8, Thread, fence, park, park_timeout, sleep},
};

/// Calls that may wait for the embedding thread.
const COMMANDS_MAX: usize = 1 << 16;

/// Calls are taken.
const OPEN: u8 = 0;
/// Calls are refused; attempts that still run may end.
const CLOSING: u8 = 1;
/// Nothing runs any more: the thread takes what is there, and ends.
const ENDING: u8 = 2;
/// The thread has ended.
const ENDED: u8 = 3;

/// Why a call does not reach the thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unsent {
    /// The engine is closing.
    Closed,
    /// As many calls as may wait do.
    Full,
}

/// The queue to one embedding thread. Shared by that thread, its callers and its workers.
pub(crate) struct Calls {
    queue: ArrayQueue<Command>,
    /// Only raised, by whoever closes the engine.
    phase: AtomicU8,
    thread: Thread,
}

impl Calls {
    /// For this thread, which is about to take them.
    pub(crate) fn new(thread: Thread) -> Calls {
        Calls {
            queue: ArrayQueue::new(COMMANDS_MAX),
            phase: AtomicU8::new(OPEN),
            thread,
        }
    }

    /// Hands over a call. It is dropped unanswered if the thread ends before it takes it.
    pub(crate) fn send(&self, command: Command) -> Result<(), Unsent> {
        if self.phase.load(Relaxed) != OPEN {
            return Err(Unsent::Closed);
        }
        let pushed = self.queue.push(command);
        self.thread.unpark();
        pushed.map_err(|_| Unsent::Full)?;
        // Either this sees that the thread has ended, or whoever ended it sees the call.
        fence(SeqCst);
        if self.phase.load(Relaxed) == ENDED {
            self.drop_all();
        }
        Ok(())
    }

    /// Hands over how an attempt ended, waiting for room. Not after [`Calls::end`].
    pub(crate) fn finish(&self, command: Command) {
        let mut command = command;
        while let Err(back) = self.queue.push(command) {
            command = back;
            sleep(Duration::from_millis(1));
        }
        self.thread.unpark();
    }

    /// The oldest call.
    pub(crate) fn take(&self) -> Option<Command> {
        self.queue.pop()
    }

    /// True if no call waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// True once the thread is to end. Asked before calls are taken: what a worker handed over before is taken then.
    pub(crate) fn is_ending(&self) -> bool {
        self.phase.load(SeqCst) >= ENDING
    }

    /// Sleeps until a call or a delivery comes in, or `most` is over; not at all if one has come. Called by the thread.
    pub(crate) fn rest(&self, edge: &Edge, most: Option<Duration>) {
        if !self.is_empty() || !edge.park() {
            return;
        }
        match most {
            Some(most) => park_timeout(most),
            None => park(),
        }
        edge.unpark();
    }

    /// Refuses calls from now on.
    pub(crate) fn refuse(&self) {
        self.phase.fetch_max(CLOSING, SeqCst);
    }

    /// Has the thread end. Called when no worker is left.
    pub(crate) fn end(&self) {
        self.phase.fetch_max(ENDING, SeqCst);
        self.thread.unpark();
    }

    /// Drops what nobody takes any more. Called when the thread has ended.
    pub(crate) fn ended(&self) {
        self.phase.fetch_max(ENDED, SeqCst);
        fence(SeqCst);
        self.drop_all();
    }

    fn drop_all(&self) {
        while self.queue.pop().is_some() {}
    }
}
