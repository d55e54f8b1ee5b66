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
    flow::admit::{key_hash, name_hash},
    id::{FunctionId, Lsn, RequestId},
    limits::{
        BATCH_BYTES_SEAL, CLEAN_BYTES_STEP, CLEAN_EVERY_NS, CLEAN_SEGMENTS_MIN, CLEAN_WAITS_NS,
        RECORD_BYTES_LARGE,
    },
    planted::{Bug, planted},
    record::{
        ArchivedOutcomeRecordV1, ArchivedTaskRecordV1, BatchSpace, Placed, Record,
        RelocatedNameRecordV1, RelocatedOutcomeRecordV1, RelocatedTaskRecordV1, Schema, read_whole,
    },
    shard::{Fact, Name, Shard},
    state::State,
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

    /// Writes a record anew if something still lives there.
    fn look_at(&mut self, position: Lsn, record: &[u8], space: &mut BatchSpace<'_>) -> Looked {
        match read_whole(record) {
            Ok(Record::Task(task)) => self.look_at_task(position, task, space),
            Ok(Record::RelocatedTask(relocated)) => {
                self.look_at_task(position, &relocated.task, space)
            }
            Ok(Record::Outcome(outcome)) => self.look_at_outcome(position, outcome, space),
            Ok(Record::RelocatedOutcome(relocated)) => {
                self.look_at_outcome(position, &relocated.outcome, space)
            }
            Ok(Record::RelocatedName(name)) => {
                let function = FunctionId(name.function.to_native());
                let hash = self.hash_of(function, &name.key, &name.task_id);
                let request = RequestId(name.request.to_native());
                self.look_at_name(
                    position,
                    request,
                    hash,
                    function,
                    &name.key,
                    &name.task_id,
                    space,
                )
            }
            // Leases, moves and times are in what a moved task says; configuration is carried forward by itself. A
            // record that cannot be read keeps its segment by its references.
            Ok(Record::Lease(_) | Record::Move(_) | Record::Config(_) | Record::Clock(_))
            | Err(_) => Looked::Done,
        }
    }

    fn look_at_task(
        &mut self,
        position: Lsn,
        record: &ArchivedTaskRecordV1<'_>,
        space: &mut BatchSpace<'_>,
    ) -> Looked {
        let request = record.request();
        let function = FunctionId(record.function.to_native());
        let name = self.hash_of(function, &record.key, &record.task_id);
        let slot = self.tasks.find(request);
        let Some(slot) = slot.filter(|&slot| self.tasks[slot].position == position) else {
            return self.look_at_name(
                position,
                request,
                name,
                function,
                &record.key,
                &record.task_id,
                space,
            );
        };
        let task = self.tasks[slot];
        if task.has(FLAG_BUSY | FLAG_FETCHING) && !planted(Bug::MovedWhileSettling) {
            return Looked::Wait;
        }
        let variable = record.task_id.len()
            + record.key.len()
            + record.content_type.len()
            + record.traceparent.len()
            + record.tags.len()
            + record.payload.len();
        let token = task.token();
        let state = self.logged_state(&task);
        let due_ms = match (state, task.state()) {
            (State::Retrying, State::Retrying) => task.at,
            (State::Retrying, _) => self.now.logged_ms,
            (state, _) if state.terminal() => task.ended_ms(),
            _ => 0,
        };
        let holds_key = state == State::Failed && !record.key.is_empty() && {
            let key = key_hash(self.options.seed, function, record.key.as_bytes());
            let key = self.keys_by_hash.get(key);
            key.is_some_and(|&key| self.keys[key].held)
        };
        let relocated = RelocatedTaskRecordV1 {
            task: record.to_record(),
            from: position.0,
            at_ms: self.now.logged_ms,
            due_ms,
            outcome: if state.terminal() { task.at } else { 0 },
            outcome_bytes: task.outcome_bytes(),
            max_age_s: if task.has(FLAG_OWN_AGE) {
                task.max_age_s()
            } else {
                record.max_age_s.to_native()
            },
            generation: token.generation,
            attempt: token.attempt,
            state: state as u8,
            retries: task.retries(),
            holds_key: u8::from(holds_key),
        };
        let append = |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedTask, &relocated);
        let Some(placed) = self.append_moved(variable, space, append) else {
            return Looked::Full;
        };
        self.open.facts.push(Fact::Relocated {
            request,
            from: position,
            to: placed.lsn,
            record_bytes: placed.bytes,
            name,
        });
        Looked::Done
    }

    fn look_at_outcome(
        &mut self,
        position: Lsn,
        record: &ArchivedOutcomeRecordV1<'_>,
        space: &mut BatchSpace<'_>,
    ) -> Looked {
        let request = RequestId(record.request.to_native());
        let lives = |slot: &u32| {
            let task = &self.tasks[*slot];
            task.state().terminal() && task.at == position.0
        };
        let Some(slot) = self.tasks.find(request).filter(lives) else {
            return Looked::Done;
        };
        let variable = record.error.len() + record.output.len() + record.result.len();
        let relocated = RelocatedOutcomeRecordV1 {
            outcome: record.to_record(),
            from: position.0,
        };
        let append =
            |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedOutcome, &relocated);
        let Some(placed) = self.append_moved(variable, space, append) else {
            return Looked::Full;
        };
        self.open.facts.push(Fact::OutcomeRelocated {
            request,
            from: position,
            to: placed.lsn,
            record_bytes: placed.bytes,
        });
        // The task's own record may stand behind this one. Moved before this is durable, it would name the old place,
        // and a start that meets no earlier record of the task would look for the outcome there.
        self.tasks[slot].set(FLAG_BUSY);
        Looked::Done
    }

    /// A name outlives its task's entry in memory by what is left of its window.
    #[expect(clippy::too_many_arguments, reason = "the parts of one record")]
    fn look_at_name(
        &mut self,
        position: Lsn,
        request: RequestId,
        hash: u128,
        function: FunctionId,
        key: &str,
        task_id: &str,
        space: &mut BatchSpace<'_>,
    ) -> Looked {
        let known = if hash == 0 {
            None
        } else {
            self.names.get(hash)
        };
        let known = known.filter(|known| {
            known.request == request && u64::from(known.segment) == self.segment_of(position)
        });
        let Some(known) = known else {
            return Looked::Done;
        };
        let payload_hash = known.payload_hash;
        let record = RelocatedNameRecordV1 {
            request: request.0,
            payload_hash,
            function: function.0,
            key,
            task_id,
        };
        let append = |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedName, &record);
        let Some(placed) = self.append_moved(key.len() + task_id.len(), space, append) else {
            return Looked::Full;
        };
        self.open.facts.push(Fact::NameRelocated {
            request,
            name: hash,
            to: placed.lsn,
        });
        Looked::Done
    }

    /// Appends a moved record with this much variable data, if there is room for it now.
    fn append_moved(
        &mut self,
        variable: usize,
        space: &mut BatchSpace<'_>,
        append: impl FnOnce(&mut BatchSpace<'_>) -> Placed,
    ) -> Option<Placed> {
        if !self.has_room(variable, space) || space.len >= BATCH_BYTES_SEAL {
            self.note(Urgency::Soon);
            return None;
        }
        let placed = append(space);
        self.large_in_batch |= placed.bytes as usize > RECORD_BYTES_LARGE;
        self.counters.relocated += 1;
        self.counters.relocated_bytes += u64::from(placed.bytes);
        Some(placed)
    }

    /// The state of a task as the log knows it, which does not know what only memory does.
    pub(crate) fn logged_state(&self, task: &Task) -> State {
        match task.state() {
            State::Enqueued | State::Dequeued | State::Paused => match task.attempt {
                _ if task.has(FLAG_RELEASED) => State::Running,
                0 => State::Enqueued,
                _ => State::Retrying,
            },
            state => state,
        }
    }

    /// The hash of a given name; 0 for none.
    fn hash_of(&self, function: FunctionId, key: &str, task_id: &str) -> u128 {
        if task_id.is_empty() {
            return 0;
        }
        name_hash(
            self.options.seed,
            function,
            key.as_bytes(),
            task_id.as_bytes(),
        )
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
