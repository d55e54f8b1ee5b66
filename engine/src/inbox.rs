//! What lies between the threads: per shard two bounded lock-free inboxes and one bell, per edge one outbox and one
//! waker. Only batches cross, never single tasks.
//!
//! Sleeping: who waits sets `parked`, looks into the queues once more, and waits; who sends pushes, then takes `parked`
//! away and rings if it was set. The two fences order push before look and set before look, so that one of the two
//! sees the other: a batch is never left behind a sleeping reader.

use std::{io, sync::atomic::Ordering::*};

use pelton_core::{
    event::{Control, EdgeBatch, Inbox, SubmitBatch},
    id::ShardId,
    limits::{
        INBOX_CONTROL_MAX, INBOX_CONTROL_PER_TURN, INBOX_SUBMIT_BATCHES_MAX,
        INBOX_SUBMIT_BYTES_MAX, INBOX_SUBMITS_PER_TURN,
    },
};

use crate::{
    bell::Bell,
    info::Info,
    sync::{ArrayQueue, AtomicBool, AtomicUsize, fence},
};

/// A shard's side: what edges and other shards want of it.
#[derive(Debug)]
pub(crate) struct ShardInbox {
    control: ArrayQueue<Control>,
    submits: ArrayQueue<Box<SubmitBatch>>,
    submit_bytes: AtomicUsize,
    parked: AtomicBool,
    pub(crate) bell: Bell,
    /// Something beside the queues has changed that the shard is to look at.
    called: AtomicBool,
    /// The shard is to flush and end.
    pub(crate) stop: AtomicBool,
    /// The shard's thread is gone.
    pub(crate) gone: AtomicBool,
}

impl ShardInbox {
    pub(crate) fn new() -> io::Result<ShardInbox> {
        Ok(ShardInbox {
            control: ArrayQueue::new(INBOX_CONTROL_MAX),
            submits: ArrayQueue::new(INBOX_SUBMIT_BATCHES_MAX),
            submit_bytes: AtomicUsize::new(0),
            parked: AtomicBool::new(false),
            bell: Bell::new()?,
            called: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// Takes the batch, or gives it back if the inbox is full or nobody reads it any more. The one that crosses the
    /// bound of bytes is the last, whoever else hands in meanwhile: each is weighed before it is looked at.
    pub(crate) fn push_submit(&self, batch: Box<SubmitBatch>) -> Result<(), Box<SubmitBatch>> {
        if self.is_closed() {
            return Err(batch);
        }
        let bytes = batch.bytes.len();
        let before = self.submit_bytes.fetch_add(bytes, Relaxed);
        let pushed = if before > INBOX_SUBMIT_BYTES_MAX {
            Err(batch)
        } else {
            self.submits.push(batch)
        };
        pushed.inspect_err(|_| {
            self.submit_bytes.fetch_sub(bytes, Relaxed);
        })
    }

    /// Takes what a turn has room for, control first.
    pub(crate) fn gather(&self, turn: &mut Inbox) {
        while turn.control.len() < INBOX_CONTROL_PER_TURN
            && let Some(control) = self.control.pop()
        {
            turn.control.push_back(control);
        }
        while turn.submits.len() < INBOX_SUBMITS_PER_TURN
            && let Some(batch) = self.pop_submit()
        {
            turn.submits.push_back(batch);
        }
    }

    fn pop_submit(&self) -> Option<Box<SubmitBatch>> {
        let batch = self.submits.pop()?;
        self.submit_bytes.fetch_sub(batch.bytes.len(), Relaxed);
        Some(batch)
    }

    /// Takes the message, or gives it back.
    pub(crate) fn push_control(&self, control: Control) -> Result<(), Control> {
        if self.gone.load(Relaxed) {
            return Err(control);
        }
        self.control.push(control)
    }

    /// True if nothing waits to be read.
    pub(crate) fn is_empty(&self) -> bool {
        self.control.is_empty() && self.submits.is_empty()
    }

    /// True once the shard takes no submits any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.stop.load(Relaxed) || self.gone.load(Relaxed)
    }

    /// Has the shard flush what it has and end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.wake();
    }

    /// Has the shard look at what lies beside the queues.
    pub(crate) fn call(&self) {
        self.called.store(true, Release);
        self.wake();
    }

    /// True once after a call.
    pub(crate) fn is_called(&self) -> bool {
        self.called.load(Relaxed) && self.called.swap(false, Acquire)
    }

    /// True if the shard is to end and has read what was there when it was told to.
    pub(crate) fn is_done(&self) -> bool {
        self.stop.load(Acquire) && self.is_empty()
    }

    /// Wakes the shard if it sleeps. Called after pushing, once for any number of pushes.
    pub(crate) fn wake(&self) {
        fence(SeqCst);
        if self.parked.load(Relaxed) && self.parked.swap(false, AcqRel) {
            self.bell.ring();
        }
    }

    /// Announces that the shard is going to sleep; false if it must not, because something has come in.
    pub(crate) fn park(&self) -> bool {
        self.parked.store(true, Relaxed);
        fence(SeqCst);
        if self.is_empty() && !self.stop.load(Relaxed) && !self.called.load(Relaxed) {
            return true;
        }
        self.parked.store(false, Relaxed);
        false
    }

    pub(crate) fn unpark(&self) {
        self.parked.store(false, Relaxed);
    }
}

/// What a shard sends to an edge in one turn.
#[derive(Debug)]
pub struct Delivery {
    /// Who sends it.
    pub shard: ShardId,
    /// What the core had to say. Replies that name tasks or counters are not in it: they are in `infos`.
    pub batch: EdgeBatch,
    /// Answers to queries, with what stands in the log.
    pub infos: Vec<Info>,
}

/// An edge's side: what shards have to say.
pub(crate) struct Outbox {
    pub(crate) deliveries: ArrayQueue<Box<Delivery>>,
    /// Deliveries that the edge has read, empty and with their memory, for shards to fill again.
    pub(crate) spare: ArrayQueue<Box<Delivery>>,
    pub(crate) waker: Box<dyn Fn() + Send + Sync>,
    /// The edge sleeps, or is about to.
    pub(crate) parked: AtomicBool,
    /// The edge is gone: what is for it is dropped.
    pub(crate) closed: AtomicBool,
}

impl Outbox {
    /// Hands a delivery to the edge and wakes it if it sleeps; it comes back if there is no room. What is for an edge
    /// that is gone is dropped.
    pub(crate) fn deliver(&self, delivery: Box<Delivery>) -> Result<(), Box<Delivery>> {
        if self.closed.load(Relaxed) {
            return Ok(());
        }
        let pushed = self.deliveries.push(delivery);
        self.wake();
        pushed
    }

    fn wake(&self) {
        fence(SeqCst);
        if self.parked.load(Relaxed) && self.parked.swap(false, AcqRel) {
            (self.waker)();
        }
    }

    /// Announces that the edge is going to sleep; false if it must not, because something has come in.
    pub(crate) fn park(&self) -> bool {
        self.parked.store(true, Relaxed);
        fence(SeqCst);
        if self.deliveries.is_empty() {
            return true;
        }
        self.parked.store(false, Relaxed);
        false
    }
}
