//! Replay: the log's records become facts again. Each record changes the entry that it names and nothing else, so that
//! records may come behind what they were in front of; what hangs together over several tasks is made once, at the
//! start, by `rebuild`.

use alloc::{collections::BTreeMap, vec::Vec};

use crate::{
    config::Change,
    error::Code,
    flow::admit::{key_hash, name_hash},
    id::{FunctionId, Lsn, RequestId, TenantId, Token},
    planted::{Bug, planted},
    record::{
        ArchivedOutcomeRecordV1, ArchivedRelocatedTaskRecordV1, ArchivedTaskRecordV1,
        RECORD_HEADER_BYTES, Record, Unreadable, read,
    },
    shard::{Accepted, Name, Shard},
    state::State,
    table::task::*,
};

/// What a replay keeps until the start.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    /// Tasks that have ended so far: the number of each stands in its `holder`.
    pub(crate) ended: u32,
    /// As of which places of the log the loaded pieces of the task table were taken.
    pub(crate) captured: Vec<Lsn>,
    /// Everything that was found stands before this place of the log.
    pub(crate) behind: Lsn,
    /// Names have come behind some that were accepted later.
    pub(crate) names_moved: bool,
    /// The last failure that held each ordering key, where that was asked for.
    pub(crate) failures: Option<BTreeMap<u32, Failure>>,
    /// Those of them that are not in memory.
    pub(crate) lost: BTreeMap<RequestId, Failure>,
}

/// A failed task that holds its ordering key, as the log tells it. Its entry in memory may go before the key is let go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) request: RequestId,
    pub(crate) function: FunctionId,
    pub(crate) outcome: Lsn,
    pub(crate) outcome_bytes: u32,
    pub(crate) ended_ms: u64,
    pub(crate) token: Token,
    pub(crate) retries: u8,
}

impl Shard {
    /// Has the replay remember which failures hold ordering keys, for [`Shard::lost_failure`].
    pub fn keep_failures(&mut self) {
        self.replayed.failures = Some(BTreeMap::new());
    }

    /// A task has failed for good and holds its key.
    fn note_failure(&mut self, key: u32, slot: u32) {
        let request = self.tasks.request(slot);
        let task = &self.tasks[slot];
        if let Some(failures) = &mut self.replayed.failures {
            let failure = Failure {
                request,
                function: task.function,
                outcome: Lsn(task.at),
                outcome_bytes: task.outcome_bytes(),
                ended_ms: task.ended_ms(),
                token: task.token(),
                retries: task.retries(),
            };
            failures.insert(key, failure);
        }
    }

    /// Takes one record of the log, in order. `position` is that of its header.
    pub fn replay(&mut self, position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        assert!(self.replaying, "the log is replayed before the start");
        let unreadable = Unreadable { schema };
        let record_bytes = (RECORD_HEADER_BYTES + body.len()) as u32;
        self.see_segment(self.segment_of(position));
        self.replayed.behind = Lsn(position.0 + 1);
        self.tasks.pack(1);
        let at_ms = match read(schema, body)? {
            Record::Task(task) => {
                let accepted = self.accepted_of(task, position, record_bytes);
                self.tasks.place(accepted.request).ok_or(unreadable)?;
                if !self.is_known(accepted.request, position) {
                    self.found_task(accepted);
                }
                accepted.request.accepted_ms()
            }
            Record::Lease(lease) => {
                let token = Token {
                    generation: lease.generation.to_native(),
                    attempt: lease.attempt.to_native(),
                };
                let request = RequestId(lease.request.to_native());
                if !self.is_known(request, position) {
                    self.found_lease(request, token);
                }
                lease.at_ms.to_native()
            }
            Record::Outcome(outcome) => {
                Code::from_number(outcome.code.to_native()).ok_or(unreadable)?;
                let state = State::from_number(outcome.state).ok_or(unreadable)?;
                let request = RequestId(outcome.request.to_native());
                if !self.is_known(request, position) {
                    self.found_outcome(outcome, state, (position, record_bytes));
                }
                outcome.at_ms.to_native()
            }
            Record::Move(moved) => {
                let state = State::from_number(moved.state).ok_or(unreadable)?;
                let request = RequestId(moved.request.to_native());
                if !self.is_known(request, position)
                    && let Some(slot) = self.tasks.find(request)
                {
                    if state.terminal() {
                        let ended_ms = moved.at_ms.to_native();
                        self.found_end(slot, state, (position, 0), ended_ms);
                    } else {
                        self.tasks[slot].set_state(state);
                    }
                }
                moved.at_ms.to_native()
            }
            Record::Config(config) => {
                let change = config.change().ok_or(unreadable)?;
                let known = match change {
                    Change::Function { id, .. } => self.directory.function(id).is_some(),
                    Change::Tenant { .. } | Change::FunctionRemoved { .. } => false,
                };
                if !(known && planted(Bug::ConfigNotReplayed)) {
                    self.apply_change(config.version.to_native(), change);
                }
                0
            }
            Record::RelocatedTask(relocated) => {
                let state = State::from_number(relocated.state).ok_or(unreadable)?;
                let accepted = self.accepted_of(&relocated.task, position, record_bytes);
                self.tasks.place(accepted.request).ok_or(unreadable)?;
                if !self.is_known(accepted.request, position) {
                    self.found_relocated(relocated, accepted, state);
                }
                relocated.at_ms.to_native()
            }
            Record::RelocatedOutcome(relocated) => {
                let request = RequestId(relocated.outcome.request.to_native());
                if !self.is_known(request, position)
                    && let Some(slot) = self.tasks.find(request)
                    && self.tasks[slot].state().terminal()
                    && self.tasks[slot].at == relocated.from.to_native()
                {
                    self.tasks[slot].at = position.0;
                    self.tasks[slot].set_outcome_bytes(record_bytes);
                }
                relocated.outcome.at_ms.to_native()
            }
            Record::RelocatedName(name) => {
                let function = FunctionId(name.function.to_native());
                let (key, task_id) = (name.key.as_bytes(), name.task_id.as_bytes());
                let hash = name_hash(self.options.seed, function, key, task_id);
                let name = Name {
                    request: RequestId(name.request.to_native()),
                    payload_hash: name.payload_hash.to_native(),
                    segment: self.segment_of(position) as u32,
                };
                self.found_name(hash, name);
                self.replayed.names_moved = true;
                0
            }
            Record::Clock(clock) => {
                self.clock_segment = Some(self.segment_of(position));
                self.next_seq = self.next_seq.max(clock.next_seq.to_native());
                clock.logged_ms.to_native()
            }
        };
        self.now.logged_ms = self.now.logged_ms.max(at_ms);
        Ok(())
    }

    /// True if a loaded piece knows what the record at this place says of this task.
    fn is_known(&self, request: RequestId, position: Lsn) -> bool {
        let slot = self.tasks.place(request);
        slot.is_some_and(|slot| self.replayed.is_known(slot, position))
    }

    fn accepted_of(
        &self,
        task: &ArchivedTaskRecordV1<'_>,
        position: Lsn,
        record_bytes: u32,
    ) -> Accepted {
        let function = FunctionId(task.function.to_native());
        let (task_id, key) = (task.task_id.as_bytes(), task.key.as_bytes());
        let seed = self.options.seed;
        let due_ms = task.due_ms.to_native();
        let meta = task_id.len() + key.len() + task.content_type.len() + task.traceparent.len() > 0;
        Accepted {
            request: task.request(),
            tenant: TenantId(task.tenant.to_native()),
            function,
            position,
            record_bytes,
            due_ms,
            max_age_s: task.max_age_s.to_native(),
            cost: task.cost.to_native().max(1),
            flags: if meta { FLAG_META } else { 0 }
                | if due_ms > 0 { FLAG_DELAYED } else { 0 }
                | if task.durability == 1 { FLAG_MEMORY } else { 0 },
            name: if task_id.is_empty() {
                0
            } else {
                name_hash(seed, function, key, task_id)
            },
            key: key_hash(seed, function, key),
            payload_hash: task.payload_hash.to_native(),
            leased: false,
            waiter: NIL,
        }
    }

    /// Enters a task as it was accepted. What is still in its slot has ended, and what pushed that out of memory is gone
    /// from the log.
    fn found_task(&mut self, accepted: Accepted) -> u32 {
        let request = accepted.request;
        let slot = self.tasks.place(request).expect("its record was looked at");
        self.next_seq = self.next_seq.max(request.seq() + 1);
        // Where the log's beginning is gone, tasks come before the record of their function.
        self.lane_mut(accepted.function, accepted.tenant).tenant = accepted.tenant;
        let (position, record_bytes) = (accepted.position, accepted.record_bytes);
        let mut task = Task::new(request, accepted.function, position, record_bytes);
        task.cost = accepted.cost;
        task.set(accepted.flags);
        task.set_max_age_s(accepted.max_age_s);
        if accepted.due_ms > 0 {
            task.set_state(State::Scheduled);
            task.at = accepted.due_ms;
        }
        if accepted.key != 0 {
            task.key = self.key_entry(accepted.function, accepted.key);
        }
        if let Some(before) = self.tasks.get(slot) {
            let ended = before.state().terminal();
            assert!(ended, "only a finished task's slot is used again");
            self.tasks.remove(slot);
        }
        self.tasks.insert(slot, task);
        if accepted.name != 0 {
            let name = Name {
                request,
                payload_hash: accepted.payload_hash,
                segment: self.segment_of(position) as u32,
            };
            self.found_name(accepted.name, name);
        }
        slot
    }

    /// A name, or a later place of its record.
    pub(crate) fn found_name(&mut self, hash: u128, name: Name) {
        match self.names.get(hash) {
            // It was given again when its window was over, before this record of its first task was moved.
            Some(known) if known.request.seq() > name.request.seq() => {}
            Some(known) if known.request == name.request => {
                self.names.insert(hash, name);
            }
            Some(_) | None => {
                self.names.insert(hash, name);
                self.name_ages.push((hash, name.request.accepted_ms()));
            }
        }
    }

    fn found_lease(&mut self, request: RequestId, token: Token) {
        let Some(slot) = self.tasks.find(request) else {
            return;
        };
        if self.tasks[slot].state() == State::Scheduled {
            // It was due before it was leased: its age counts from then.
            self.own_age(slot);
        }
        let task = &mut self.tasks[slot];
        task.set_state(State::Running);
        task.attempt = token.attempt;
        if task.key != NIL {
            // Whatever held it has let go.
            let key = task.key;
            self.keys[key].held = false;
        }
    }

    fn found_outcome(
        &mut self,
        outcome: &ArchivedOutcomeRecordV1<'_>,
        state: State,
        place: (Lsn, u32),
    ) {
        let Some(slot) = self.tasks.find(RequestId(outcome.request.to_native())) else {
            return;
        };
        self.tasks[slot].set_retries(outcome.retries);
        if state == State::Retrying {
            self.tasks[slot].set_state(state);
            self.tasks[slot].at = outcome.due_ms.to_native();
        } else {
            let key = self.tasks[slot].key;
            self.found_end(slot, state, place, outcome.at_ms.to_native());
            if key != NIL && outcome.holds_key == 1 {
                let lane = &self.lanes[self.tasks[slot].function.0 as usize];
                // A function whose record was moved forward is not known yet.
                self.keys[key].held = !lane.live || lane.holds_keys();
                self.note_failure(key, slot);
            }
        }
    }

    /// A task has ended by the record at `position`, which is that of an outcome if that has a length.
    fn found_end(
        &mut self,
        slot: u32,
        state: State,
        (position, record_bytes): (Lsn, u32),
        ended_ms: u64,
    ) {
        let task = &mut self.tasks[slot];
        task.set_state(state);
        task.at = position.0;
        task.set_outcome_bytes(record_bytes);
        task.clear(FLAG_OWN_AGE);
        self.replayed.ended += 1;
        task.holder = self.replayed.ended;
        task.key = NIL;
        task.set_ended_ms(ended_ms);
        task.set(FLAG_UNSAVED);
    }

    /// A moved record. Where the task's earlier records are in the log too, only its place is new; where they are gone,
    /// they are made up for by what this one says.
    fn found_relocated(
        &mut self,
        record: &ArchivedRelocatedTaskRecordV1<'_>,
        accepted: Accepted,
        state: State,
    ) {
        let request = accepted.request;
        if let Some(slot) = self.tasks.find(request) {
            let task = &mut self.tasks[slot];
            if task.position.0 == record.from.to_native() {
                task.position = accepted.position;
                task.set_record_bytes(accepted.record_bytes);
            }
            let segment = self.segment_of(accepted.position) as u32;
            let known = self.names.get_mut(accepted.name.max(1));
            if let Some(known) = known.filter(|known| known.request == request) {
                known.segment = segment;
            }
            return;
        }
        self.replayed.names_moved = true;
        let window_over =
            request.accepted_ms() + self.options.dedup_window_ms <= record.at_ms.to_native();
        let slot = self.found_task(Accepted {
            max_age_s: record.max_age_s.to_native(),
            name: if window_over || planted(Bug::NameLostInMove) {
                0
            } else {
                accepted.name
            },
            ..accepted
        });
        self.tasks[slot].set_retries(record.retries);
        let attempt = record.attempt.to_native();
        if state.terminal() {
            let task = &mut self.tasks[slot];
            task.attempt = attempt;
            let key = task.key;
            // One that was moved by a version that did not say has ended by then.
            let ended_ms = match record.due_ms.to_native() {
                0 => record.at_ms.to_native(),
                ended_ms => ended_ms,
            };
            let end = match Lsn(record.outcome.to_native()) {
                Lsn(0) => accepted.position,
                outcome => outcome,
            };
            self.found_end(
                slot,
                state,
                (end, record.outcome_bytes.to_native()),
                ended_ms,
            );
            if record.holds_key == 1 && key != NIL {
                self.keys[key].held = true;
                self.note_failure(key, slot);
            }
        } else if attempt > 0 {
            let generation = record.generation.to_native();
            self.found_lease(
                request,
                Token {
                    generation,
                    attempt,
                },
            );
            self.tasks[slot].set_state(state);
            if state == State::Retrying {
                self.tasks[slot].at = record.due_ms.to_native();
            }
        }
    }
}
