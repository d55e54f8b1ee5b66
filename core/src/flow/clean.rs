//! Clean: the log's oldest segment is read back, and what still lives in it is written anew at the log's end, so that
//! the segment can go. Without it one task that is delayed by a month would keep a month of the log.
//!
//! A record that is moved says everything that the records since the task's acceptance have said of it, because those
//! may go too. Its position changes when the new record is durable, if it still is where it was read: until then, and
//! after a crash, the old one counts.
//!
//! Cleaning starts when more than half of the log is dead. It takes the oldest segment, so that the log stays one
//! stretch, and a bounded number of bytes a step.

use crate::{
    event::{Effects, Inbox, Scanned, Urgency},
    flow::moved::Moved,
    id::{Lsn, RequestId},
    limits::{
        BATCH_BYTES_SEAL, CLEAN_BYTES_STEP, CLEAN_EVERY_NS, CLEAN_SEGMENTS_MIN, CLEAN_WAITS_NS,
        RECORD_BYTES_LARGE,
    },
    record::{BatchSpace, Placed, read_whole},
    shard::{Fact, Name, Shard},
    table::task::*,
};

/// A segment whose rest could not be read is tried again after this long.
const AGAIN_NS: u64 = 10_000_000_000;
/// What a name without its task counts for among the live bytes.
pub(crate) const NAME_LIVE_BYTES: u64 = 192;

/// How far cleaning is. Volatile: a start begins anew.
#[derive(Debug, Default)]
pub(crate) struct Cleaning {
    /// Batches were asked for and have not come.
    asked: bool,
    /// Batches being gone through, and the index of the next record in them.
    held: Option<Scanned>,
    index: usize,
    /// The next record cannot be moved yet.
    waits: bool,
    /// The segment that was gone through last, and until when it is left alone.
    done: Option<(u64, u64)>,
    stopped: bool,
}

impl Cleaning {
    /// When to go on if nothing else wakes the shard; `None` if there is nothing to go on with.
    pub(crate) fn next_ns(&self, now_ns: u64) -> Option<u64> {
        let pause = if self.waits {
            CLEAN_WAITS_NS
        } else {
            CLEAN_EVERY_NS
        };
        self.held.as_ref().map(|_| now_ns + pause)
    }
}

/// What became of one record that was looked at.
enum Looked {
    Done,
    /// A fact about its task is on its way to the disk, or a read of it is under way: what a new record would say is
    /// not known yet.
    Wait,
    Full,
}

impl Shard {
    /// Moves nothing any more: the shard is about to end. What has been moved is flushed.
    pub fn stop_cleaning(&mut self) {
        if !self.cleaning.stopped {
            self.cleaning.stopped = true;
            self.cleaning.held = None;
            self.note(Urgency::Soon);
        }
    }

    pub(crate) fn clean(
        &mut self,
        inbox: &mut Inbox,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        if let Some(scanned) = inbox.scanned.take() {
            self.cleaning.asked = false;
            self.cleaning.index = 0;
            self.cleaning.held = Some(scanned).filter(|_| !self.cleaning.stopped);
        }
        let Some(held) = self.cleaning.held.take() else {
            self.start_cleaning(effects);
            return;
        };
        let mut budget = CLEAN_BYTES_STEP;
        self.cleaning.waits = false;
        while let Some(&at) = held.records.get(self.cleaning.index) {
            let position = Lsn(held.start.0 + u64::from(at));
            let record = &held.bytes[at as usize..];
            if budget == 0 {
                self.cleaning.held = Some(held);
                return;
            }
            match self.look_at(position, record, space) {
                Looked::Done => {
                    self.cleaning.index += 1;
                    let next = held.records.get(self.cleaning.index);
                    let bytes = next.map_or(0, |&next| (next - at) as usize);
                    budget = budget.saturating_sub(bytes);
                }
                looked @ (Looked::Wait | Looked::Full) => {
                    effects.full |= matches!(looked, Looked::Full);
                    if !self.open.facts.is_empty() {
                        // What it waits for may be among them, and nobody else in a hurry.
                        self.note(Urgency::Soon);
                    }
                    self.cleaning.waits = true;
                    self.cleaning.held = Some(held);
                    return;
                }
            }
        }
        if let Some(next) = held.next {
            self.cleaning.asked = true;
            effects.scan = Some(next);
        } else {
            let until_ns = self.now.mono_ns + AGAIN_NS;
            self.cleaning.done = Some((self.segment_of(held.start), until_ns));
            self.note(Urgency::Soon);
        }
    }

    /// Asks for the oldest segment if it is worth it.
    fn start_cleaning(&mut self, effects: &mut Effects) {
        let oldest = self.first_segment;
        let segment_bytes = self.options.segment_bytes;
        let closed = (self.segments.len() as u64).saturating_sub(1);
        let left_alone =
            |&(segment, until_ns): &(u64, u64)| segment == oldest && self.now.mono_ns < until_ns;
        if self.cleaning.asked
            || self.cleaning.stopped
            || closed < CLEAN_SEGMENTS_MIN
            || closed * segment_bytes <= 2 * self.live_bytes
            || self.segments[0] == 0
            || self.cleaning.done.as_ref().is_some_and(left_alone)
        {
            return;
        }
        self.cleaning.asked = true;
        effects.scan = Some(Lsn(oldest * segment_bytes));
    }

    /// Writes a record anew if something still lives there. A record that cannot be read keeps its segment by its
    /// references.
    fn look_at(&mut self, position: Lsn, record: &[u8], space: &mut BatchSpace<'_>) -> Looked {
        let Ok(record) = read_whole(record) else {
            return Looked::Done;
        };
        let Some(moved) = self.moved(position, &record) else {
            return Looked::Done;
        };
        if self.is_settling(&moved) {
            return Looked::Wait;
        }
        let Some(placed) = self.append_moved(&moved, space) else {
            return Looked::Full;
        };
        let request = moved.request();
        let (to, record_bytes) = (placed.lsn, placed.bytes);
        self.open.facts.push(match moved {
            Moved::Task { name, .. } => Fact::Relocated {
                request,
                from: position,
                to,
                record_bytes,
                name,
            },
            Moved::Outcome { .. } => {
                // The task's own record may stand behind this one. Moved before this is durable, it would name the old
                // place, and a start that meets no earlier record of the task would look for the outcome there.
                let slot = self.tasks.find(request).expect("its outcome lives");
                self.tasks[slot].set(FLAG_BUSY);
                Fact::OutcomeRelocated {
                    request,
                    from: position,
                    to,
                    record_bytes,
                }
            }
            Moved::Name { name, .. } => Fact::NameRelocated { request, name, to },
        });
        Looked::Done
    }

    /// Appends a moved record if there is room for it now.
    fn append_moved(&mut self, moved: &Moved<'_>, space: &mut BatchSpace<'_>) -> Option<Placed> {
        if !self.has_room(moved.variable(), space) || space.len >= BATCH_BYTES_SEAL {
            self.note(Urgency::Soon);
            return None;
        }
        let placed = moved.append(space);
        self.large_in_batch |= placed.bytes as usize > RECORD_BYTES_LARGE;
        self.counters.relocated += 1;
        self.counters.relocated_bytes += u64::from(placed.bytes);
        Some(placed)
    }

    /// A task's new record is durable.
    pub(crate) fn apply_relocated(
        &mut self,
        request: RequestId,
        from: Lsn,
        to: Lsn,
        record_bytes: u32,
        name: u128,
    ) {
        if let Some(slot) = self.tasks.find(request)
            && self.tasks[slot].position == from
        {
            let before = u64::from(self.tasks[slot].record_bytes());
            let task = &mut self.tasks[slot];
            task.position = to;
            task.set_record_bytes(record_bytes);
            self.recount_bytes(slot, before, u64::from(self.tasks[slot].record_bytes()));
            self.dereference(self.segment_of(from));
            self.reference(self.segment_of(to));
        }
        self.move_name(name, request, to);
    }

    /// The new record of an outcome is durable.
    pub(crate) fn apply_outcome_relocated(
        &mut self,
        request: RequestId,
        from: Lsn,
        to: Lsn,
        record_bytes: u32,
    ) {
        if let Some(slot) = self.tasks.find(request)
            && self.tasks[slot].state().terminal()
            && self.tasks[slot].at == from.0
        {
            let before = u64::from(self.tasks[slot].outcome_bytes());
            let task = &mut self.tasks[slot];
            task.clear(FLAG_BUSY);
            task.at = to.0;
            task.set_outcome_bytes(record_bytes);
            self.recount_bytes(slot, before, u64::from(self.tasks[slot].outcome_bytes()));
            self.dereference(self.segment_of(from));
            self.reference(self.segment_of(to));
        }
    }

    fn recount_bytes(&mut self, slot: u32, before: u64, after: u64) {
        self.live_bytes = self.live_bytes - before + after;
        if self.tasks[slot].state().terminal() {
            self.finished_bytes = self.finished_bytes - before + after;
        }
        if self.tasks[slot].has(FLAG_UNSAVED) {
            self.unsaved.bytes = self.unsaved.bytes - before + after;
        }
    }

    /// A name has a record here now.
    pub(crate) fn move_name(&mut self, hash: u128, request: RequestId, to: Lsn) {
        if hash == 0 {
            return;
        }
        let segment = self.segment_of(to) as u32;
        let known = self.names.get_mut(hash);
        if let Some(known) = known.filter(|known| known.request == request) {
            let before = core::mem::replace(&mut known.segment, segment);
            self.dereference(u64::from(before));
            self.reference(u64::from(segment));
        }
    }

    /// A name gets its entry.
    pub(crate) fn enter_name(&mut self, hash: u128, name: Name) {
        if let Some(before) = self.names.remove(hash) {
            // Its window was over before this one came: see `forgotten_names`.
            self.live_bytes -= NAME_LIVE_BYTES;
            self.dereference(u64::from(before.segment));
        }
        self.names.insert(hash, name);
        self.live_bytes += NAME_LIVE_BYTES;
        self.name_ages.push((hash, name.request.accepted_ms()));
        self.reference(u64::from(name.segment));
    }
}
