//! Progress: how far shards are with reading their snapshots and logs, for whoever waits for a start.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use pelton_core::{
    id::Lsn,
    record::Unreadable,
    shard::Shard,
    snapshot::{PieceKind, Unloadable},
};
use pelton_storage::recover::Replayer;

/// How far all shards are together. Figures, not facts: each is read by itself.
#[derive(Debug, Default)]
pub struct Progress {
    read: AtomicU64,
    of: AtomicU64,
    records: AtomicU64,
    /// Numbers of shards before and after, while tasks are placed on another number of them.
    placing: AtomicU64,
}

impl Progress {
    /// The numbers of shards from which and on which tasks are being placed; [`Progress::bytes`] counts what is gone
    /// through of the old logs meanwhile. `None` while logs are read to be served.
    pub fn placing(&self) -> Option<(u16, u16)> {
        let placing = self.placing.load(Relaxed);
        (placing > 0).then_some(((placing >> 16) as u16, placing as u16))
    }

    /// Tasks are being placed, or that is over.
    pub(crate) fn set_placing(&self, placing: Option<(u16, u16)>) {
        let (from, to) = placing.unwrap_or_default();
        self.placing
            .store(u64::from(from) << 16 | u64::from(to), Relaxed);
        self.set_bytes(0, 0);
        self.records.store(0, Relaxed);
    }

    pub(crate) fn set_bytes(&self, read: u64, of: u64) {
        self.read.store(read, Relaxed);
        self.of.store(of, Relaxed);
    }

    /// Bytes that were read, and about how many are to be read by the shards that have begun.
    pub fn bytes(&self) -> (u64, u64) {
        (self.read.load(Relaxed), self.of.load(Relaxed))
    }

    /// Records of the log that were replayed.
    pub fn records(&self) -> u64 {
        self.records.load(Relaxed)
    }
}

/// A shard that is filled, and tells how far that is.
pub(crate) struct Opening {
    shard: Shard,
    progress: Arc<Progress>,
    /// What of it has been told.
    read: u64,
    of: u64,
    records: u64,
}

impl Opening {
    pub(crate) fn new(shard: Shard, progress: Arc<Progress>) -> Opening {
        Opening {
            shard,
            progress,
            read: 0,
            of: 0,
            records: 0,
        }
    }

    pub(crate) fn into_shard(self) -> Shard {
        self.shard
    }
}

impl Replayer for Opening {
    fn load_begins(&mut self, secret: u64, first_segment: u64) {
        self.shard.load_begins(secret, first_segment);
    }

    fn load(&mut self, kind: PieceKind, position: Lsn, bytes: &[u8]) -> Result<(), Unloadable> {
        self.shard.load(kind, position, bytes)
    }

    fn load_failed(&mut self) {
        self.shard.load_failed();
    }

    fn replay(&mut self, position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        self.records += 1;
        self.shard.replay(position, schema, body)
    }

    fn progress(&mut self, read: u64, of: u64) {
        // The shards' parts add up; a snapshot that is given up takes its part back.
        self.progress
            .read
            .fetch_add(read.wrapping_sub(self.read), Relaxed);
        self.progress
            .of
            .fetch_add(of.wrapping_sub(self.of), Relaxed);
        self.progress.records.fetch_add(self.records, Relaxed);
        (self.read, self.of, self.records) = (read, of, 0);
    }
}
