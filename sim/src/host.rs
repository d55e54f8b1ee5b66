//! One shard over its log and its disk, driven as the engine drives it: poll, step, seal, then the effects.

use std::collections::VecDeque;

use pelton_core::{
    clock::Now,
    event::{Effects, Fetched, Inbox, SubmitBatch, Urgency},
    id::RequestId,
    shard::Shard,
    snapshot::Cursor,
};
use pelton_storage::{
    device::Device,
    log::{Log, LogEvent},
    memory::MemoryDevice,
};

use crate::oracle::{Oracle, Violation};

/// A batch of outcomes only may wait this long for company.
const SOON_NS: u64 = 150_000;
/// Tasks that are audited for each turn: a shard with as many is audited after every turn, one with twice as many after
/// every second.
const AUDITED_PER_TURN: u64 = 256;
/// A turn that could not take all it was given is tried again after this.
const AGAIN_NS: u64 = 100_000;

/// A shard, its log and what waits for it. Owned by the world; ends with a crash, which leaves the disk.
pub struct Host {
    /// The shard.
    pub shard: Shard,
    /// Its log.
    pub log: Log<MemoryDevice>,
    /// What it is given with the next step.
    pub inbox: Inbox,
    /// Submits for which the inbox has no room: they wait at their edges.
    pub at_edges: VecDeque<Box<SubmitBatch>>,
    /// When its next turn is due, if one is.
    pub turn_at_ns: Option<u64>,
    /// An operation of its disk is under way.
    pub disk_busy: bool,
    /// Until when its disk is slow.
    pub slow_until_ns: u64,
    /// Until when none of its records can be read.
    pub unreadable_until_ns: u64,
    /// Its log has failed.
    pub poisoned: bool,
    /// How far the snapshot is that is being taken.
    snapshot: Cursor,
    soon_since_ns: Option<u64>,
    /// Tasks that the next audit may look at.
    audit_budget: u64,
}

impl Host {
    /// A shard that has been started on its log.
    pub fn new(shard: Shard, log: Log<MemoryDevice>) -> Host {
        Host {
            snapshot: shard.snapshot(),
            shard,
            log,
            inbox: Inbox {
                disk_has_room: true,
                ..Inbox::default()
            },
            at_edges: VecDeque::new(),
            turn_at_ns: None,
            disk_busy: false,
            slow_until_ns: 0,
            unreadable_until_ns: 0,
            poisoned: false,
            soon_since_ns: None,
            audit_budget: 0,
        }
    }

    /// One turn of the shard's loop up to its effects, which the caller performs. `index` is the shard's number.
    pub fn turn(
        &mut self,
        index: usize,
        now: Now,
        submits_max: usize,
        oracle: &mut Oracle,
    ) -> Result<Effects, Violation> {
        let mut effects = Effects::default();
        while let Some(event) = self.log.poll(now.mono_ns) {
            match event {
                LogEvent::Durable | LogEvent::Unreadable { .. } => {}
                LogEvent::Read { ticket, record } => self.inbox.fetched.push(Fetched {
                    request: RequestId(ticket),
                    record,
                }),
                LogEvent::Scanned(scanned) => self.inbox.scanned = Some(scanned),
                LogEvent::Poisoned => {
                    self.poisoned = true;
                    self.shard.on_poisoned(&mut effects);
                }
            }
        }
        self.inbox.disk_has_room = !self.log.out_of_space();
        while self.inbox.submits.len() < submits_max
            && let Some(batch) = self.at_edges.pop_front()
        {
            self.inbox.submits.push_back(batch);
        }
        let asked = !self.inbox.control.is_empty()
            || !self.inbox.submits.is_empty()
            || !self.inbox.fetched.is_empty()
            || self.inbox.scanned.is_some();
        let (durable, mut space) = self.log.batch();
        let moved = asked || durable.is_some() || space.records > 0;
        if let Some(durable) = &durable {
            oracle.batch_durable(index, durable.bytes)?;
        }
        self.shard
            .step(now, durable, &mut self.inbox, &mut space, &mut effects);
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        // A step that was given nothing and appended nothing has changed nothing.
        if moved || records > 0 || effects.urgency != Urgency::Nothing {
            self.audit_budget += AUDITED_PER_TURN;
            if self.audit_budget >= u64::from(self.shard.slots()) {
                self.audit_budget = 0;
                self.shard.audit();
            }
        }
        if self
            .log
            .wants_snapshot(now.mono_ns, self.shard.snapshot_entries())
        {
            self.snapshot = self.shard.snapshot();
            let (secret, bytes) = (self.shard.secret(), self.shard.snapshot_bytes());
            self.log.begin_snapshot(secret, bytes);
        }
        if self.log.wants_piece() {
            let piece = self.shard.snapshot_piece(&mut self.snapshot);
            self.log.put_piece(piece.as_ref());
        }
        self.seal(now, &effects);
        for fetch in std::mem::take(&mut effects.fetches) {
            self.log
                .read(fetch.request.0, fetch.position, fetch.bytes as usize);
        }
        self.log.start_reads();
        if let Some(from) = effects.scan.take() {
            self.log.scan(from);
        }
        self.log.retire_before(self.shard.retire_before());
        self.log.tick(now.mono_ns);
        Ok(effects)
    }

    fn seal(&mut self, now: Now, effects: &Effects) {
        let ready = match effects.urgency {
            Urgency::Nothing => false,
            Urgency::Soon => {
                let since = *self.soon_since_ns.get_or_insert(now.mono_ns);
                now.mono_ns >= since + SOON_NS
            }
            Urgency::Now => true,
        };
        if ready && self.log.can_seal() {
            self.log.seal(false);
            self.shard.on_sealed();
            self.soon_since_ns = None;
        } else if effects.full && self.log.open_records() == 0 && self.log.can_seal() {
            self.log.end_segment();
        }
    }

    /// When this shard wants its next turn; `None` if only an arrival or its disk will wake it.
    pub fn wants_turn_ns(&self, now_ns: u64) -> Option<u64> {
        let sealed_empty = self.log.has_durable().then_some(now_ns);
        let again = (!self.inbox.control.is_empty()
            || !self.inbox.submits.is_empty()
            || (!self.inbox.fetched.is_empty() && !self.poisoned)
            || (self.inbox.scanned.is_some() && !self.poisoned)
            || !self.at_edges.is_empty())
        .then_some(now_ns + AGAIN_NS);
        let soon = self
            .soon_since_ns
            .filter(|_| self.log.can_seal())
            .map(|since| (since + SOON_NS).max(now_ns + 1_000));
        let timer = self.shard.next_wake_ns().map(|at| at.max(now_ns + 500_000));
        let log = self
            .log
            .next_wake_ns(now_ns)
            .map(|at| at.max(now_ns + 1_000));
        [sealed_empty, again, soon, timer, log]
            .into_iter()
            .flatten()
            .min()
    }

    /// Performs the oldest operation of the disk; false if there was none.
    pub fn run_disk(&mut self) -> bool {
        self.disk_busy = false;
        self.log.device().run_one()
    }

    /// True if the disk has something to do.
    pub fn disk_waits(&mut self) -> bool {
        self.log.device().queued() > 0
    }

    /// The power fails: what is left is the disk.
    pub fn crash(self) -> MemoryDevice {
        let mut device = self.log.into_device();
        device.crash();
        // Operations that the log had been told of and not taken note of are gone with it.
        while device.completed().is_some() {}
        device
    }
}
