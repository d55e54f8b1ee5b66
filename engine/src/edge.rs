//! The handle of an edge: a thread that talks to the world, or a program that embeds the engine. It turns what it
//! hears into batches for shards and what shards send it into answers, and decides nothing.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::*},
};

use pelton_core::{
    event::{Control, SubmitBatch},
    id::{EdgeId, ShardId},
    limits::{OUTBOX_DELIVERIES_MAX, OUTBOX_SPARE_BYTES_MAX, OUTBOX_SPARE_MAX},
};

use crate::{
    engine::Shared,
    inbox::{Delivery, Outbox},
    quarantine::Quarantine,
    routes::Routes,
    sync::{ArrayQueue, AtomicBool},
};

/// One edge's way into the engine. Used by one thread at a time; dropping it ends its part, and what shards still
/// send it is dropped.
pub struct Edge {
    id: EdgeId,
    pub(crate) shared: Arc<Shared>,
    outbox: Arc<Outbox>,
    /// Shards that were given something since the last `wake`.
    given: std::cell::Cell<[u64; 4]>,
}

impl Edge {
    pub(crate) fn attach(shared: &Arc<Shared>, wake: Box<dyn Fn() + Send + Sync>) -> Option<Edge> {
        let outbox = Arc::new(Outbox {
            deliveries: ArrayQueue::new(OUTBOX_DELIVERIES_MAX),
            spare: ArrayQueue::new(OUTBOX_SPARE_MAX),
            waker: wake,
            parked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let index = shared
            .edges
            .iter()
            .position(|slot| slot.set(Arc::clone(&outbox)).is_ok())?;
        Some(Edge {
            id: EdgeId(index as u16),
            shared: Arc::clone(shared),
            outbox,
            given: Default::default(),
        })
    }

    /// Its number: the high half of the ids of its connections.
    pub fn id(&self) -> EdgeId {
        self.id
    }

    /// Shards of the engine.
    pub fn shard_count(&self) -> u16 {
        self.shared.inboxes.len() as u16
    }

    /// Every shard.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shard_count()).map(ShardId)
    }

    /// Why a shard is not served, if it is not. It answers like any other, and refuses everything.
    pub fn quarantined(&self, shard: ShardId) -> Option<&Quarantine> {
        self.shared.quarantined[usize::from(shard.0)].get()
    }

    /// By shard, whether it is served.
    pub fn served(&self) -> Vec<bool> {
        let quarantined = self.shared.quarantined.iter();
        quarantined.map(|shard| shard.get().is_none()).collect()
    }

    /// Reads the current routing table.
    pub fn with_routes<R>(&self, read: impl FnOnce(&Routes) -> R) -> R {
        self.shared.routes.with(read)
    }

    /// Hands a batch to a shard; it comes back if the shard's inbox is full or the engine is closing. Call
    /// [`Edge::wake`] after the last one.
    pub fn submit(&self, shard: ShardId, batch: Box<SubmitBatch>) -> Result<(), Box<SubmitBatch>> {
        self.note(shard);
        self.shared.inboxes[usize::from(shard.0)].push_submit(batch)
    }

    /// Hands a message to a shard; it comes back if the inbox is full, to be sent again after a moment, or for good
    /// if [`Edge::is_gone`].
    pub fn control(&self, shard: ShardId, control: Control) -> Result<(), Control> {
        self.note(shard);
        self.shared.inboxes[usize::from(shard.0)].push_control(control)
    }

    /// True if the shard's thread has ended.
    pub fn is_gone(&self, shard: ShardId) -> bool {
        self.shared.inboxes[usize::from(shard.0)].gone.load(Relaxed)
    }

    /// True once the engine takes no more submits.
    pub fn is_closing(&self) -> bool {
        self.shared.inboxes.iter().any(|inbox| inbox.is_closed())
    }

    /// Wakes the shards that were given something.
    pub fn wake(&self) {
        let given = self.given.take();
        for (word, mut bits) in given.into_iter().enumerate() {
            while bits != 0 {
                let shard = word * 64 + bits.trailing_zeros() as usize;
                self.shared.inboxes[shard].wake();
                bits &= bits - 1;
            }
        }
    }

    /// The oldest delivery.
    pub fn take(&self) -> Option<Box<Delivery>> {
        self.outbox.deliveries.pop()
    }

    /// Gives back a delivery that has been read, so that its memory is used again.
    pub fn recycle(&self, mut delivery: Box<Delivery>) {
        delivery.infos.clear();
        let batch = &mut delivery.batch;
        batch.runs.clear();
        batch.answers.clear();
        batch.executes.clear();
        batch.finished.clear();
        batch.acks.clear();
        batch.cancels.clear();
        batch.replies.clear();
        batch.bytes.clear();
        if batch.bytes.capacity() <= OUTBOX_SPARE_BYTES_MAX {
            // If enough are kept already, this one goes.
            let _ = self.outbox.spare.push(delivery);
        }
    }

    /// Announces that the edge is going to sleep, so that the next delivery wakes it; false if it must not, because a
    /// delivery waits. Between waking up and the next announcement nothing wakes it.
    pub fn park(&self) -> bool {
        self.outbox.park()
    }

    /// The edge is awake for another reason than a delivery.
    pub fn unpark(&self) {
        self.outbox.parked.store(false, Relaxed);
    }

    fn note(&self, shard: ShardId) {
        let mut given = self.given.get();
        given[usize::from(shard.0) / 64] |= 1 << (shard.0 % 64);
        self.given.set(given);
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.wake();
        self.outbox.closed.store(true, Relaxed);
        while self.outbox.deliveries.pop().is_some() {}
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edge").field("id", &self.id).finish()
    }
}
