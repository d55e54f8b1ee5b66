//! What lies between the threads: per shard two bounded lock-free inboxes and one bell, per edge one outbox and one
//! waker. Only batches cross, never single tasks.
//!
//! Sleeping: who waits sets `parked`, looks into the queues once more, and waits; who sends pushes, then takes `parked`
//! away and rings if it was set. The two fences order push before look and set before look, so that one of the two
//! sees the other: a batch is never left behind a sleeping reader.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::*, fence},
};

use crossbeam::queue::ArrayQueue;
use pelton_core::{
    event::{Control, EdgeBatch, SubmitBatch},
    id::ShardId,
    limits::{INBOX_CONTROL_MAX, INBOX_SUBMIT_BATCHES_MAX, INBOX_SUBMIT_BYTES_MAX},
};

use crate::info::Info;

/// An eventfd that wakes a shard out of its log's ring.
#[derive(Debug)]
pub(crate) struct Bell {
    fd: OwnedFd,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        // SAFETY: the call has no memory of ours to touch.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Bell { fd })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the eight bytes are there, and the descriptor is open. It fails only when the counter is full, and
        // then the reader is being woken already.
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// A shard's side: what edges and other shards want of it.
#[derive(Debug)]
pub(crate) struct ShardInbox {
    pub(crate) control: ArrayQueue<Control>,
    pub(crate) submits: ArrayQueue<Box<SubmitBatch>>,
    submit_bytes: AtomicUsize,
    parked: AtomicBool,
    pub(crate) bell: Bell,
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
            stop: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// Takes the batch, or gives it back if the inbox is full or nobody reads it any more.
    pub(crate) fn push_submit(&self, batch: Box<SubmitBatch>) -> Result<(), Box<SubmitBatch>> {
        let bytes = batch.bytes.len();
        if self.submit_bytes.load(Relaxed) > INBOX_SUBMIT_BYTES_MAX || self.is_closed() {
            return Err(batch);
        }
        self.submit_bytes.fetch_add(bytes, Relaxed);
        self.submits.push(batch).inspect_err(|_| {
            self.submit_bytes.fetch_sub(bytes, Relaxed);
        })
    }

    pub(crate) fn pop_submit(&self) -> Option<Box<SubmitBatch>> {
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
        if self.is_empty() && !self.stop.load(Relaxed) {
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
    /// Wakes the edge if it sleeps. Called after pushing.
    pub(crate) fn wake(&self) {
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

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use pelton_core::id::{ConnectionId, TenantId};

    use super::*;

    fn batch(bytes: usize) -> Box<SubmitBatch> {
        Box::new(SubmitBatch {
            connection: ConnectionId(0),
            ticket: 0,
            tenant: TenantId(0),
            notify: false,
            with_result: false,
            tasks: Vec::new(),
            bytes: vec![0; bytes],
            done: 0,
        })
    }

    #[test]
    fn an_inbox_refuses_beyond_its_count_and_beyond_its_bytes() {
        let inbox = ShardInbox::new().unwrap();
        for _ in 0..INBOX_SUBMIT_BATCHES_MAX {
            inbox.push_submit(batch(1)).unwrap();
        }
        assert!(inbox.push_submit(batch(1)).is_err());
        while inbox.pop_submit().is_some() {}
        let mut taken = 0;
        while inbox.push_submit(batch(8 << 20)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, 9, "the one that crosses the bound is the last");
        while inbox.pop_submit().is_some() {}
        inbox.push_submit(batch(1)).unwrap();
    }

    #[test]
    fn a_sleeping_reader_is_rung_for_every_batch_that_it_has_not_seen() {
        let inbox = Arc::new(ShardInbox::new().unwrap());
        let sender = Arc::clone(&inbox);
        const BATCHES: usize = 50_000;
        let thread = thread::spawn(move || {
            for _ in 0..BATCHES {
                while sender.push_submit(batch(0)).is_err() {
                    thread::yield_now();
                }
                sender.wake();
            }
        });
        let mut seen = 0;
        while seen < BATCHES {
            if inbox.pop_submit().is_some() {
                seen += 1;
                continue;
            }
            if inbox.park() {
                let mut poll = libc::pollfd {
                    fd: inbox.bell.fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one pollfd is there.
                let ready = unsafe { libc::poll(&mut poll, 1, 5_000) };
                assert_eq!(ready, 1, "a batch was left behind a sleeping reader");
                let mut count = [0u8; 8];
                // SAFETY: the eight bytes are there.
                unsafe { libc::read(inbox.bell.fd(), count.as_mut_ptr().cast(), 8) };
                inbox.unpark();
            }
        }
        thread.join().unwrap();
    }
}
