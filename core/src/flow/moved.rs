//! Moved: what still lives where a record was read, as the record that says it in another place. Cleaning writes it at the
//! end of the same log, and placing a directory's tasks on another number of shards writes it to another one.

use alloc::collections::BTreeSet;

use crate::{
    flow::{
        admit::{key_hash, name_hash},
        clean::NAME_LIVE_BYTES,
    },
    id::{CellId, FunctionId, Lsn, RequestId},
    limits::RECORD_BYTES_MAX,
    planted::{Bug, planted},
    record::{
        ArchivedOutcomeRecordV1, ArchivedRelocatedOutcomeRecordV1, ArchivedTaskRecordV1,
        BatchSpace, Placed, Record, RelocatedNameRecordV1, RelocatedOutcomeRecordV1,
        RelocatedTaskRecordV1, Schema, record_bytes,
    },
    shard::{Lane, Shard},
    state::State,
    table::task::*,
};

/// What lives at a place of a log. It refers to the record that was read there.
#[derive(Clone, Copy, Debug)]
pub enum Moved<'r> {
    /// A task, with all that is known of it.
    Task {
        /// The new record.
        record: RelocatedTaskRecordV1<'r>,
        /// Hash of the task's given name; 0 for none.
        name: u128,
    },
    /// The outcome of a finished task.
    Outcome {
        /// The new record.
        record: RelocatedOutcomeRecordV1<'r>,
    },
    /// A given name whose task is forgotten.
    Name {
        /// The new record.
        record: RelocatedNameRecordV1<'r>,
        /// Its hash.
        name: u128,
    },
}

impl Moved<'_> {
    /// The task that it is about.
    pub fn request(&self) -> RequestId {
        RequestId(match self {
            Moved::Task { record, .. } => record.task.request,
            Moved::Outcome { record } => record.outcome.request,
            Moved::Name { record, .. } => record.request,
        })
    }

    /// The cell of that task.
    pub fn cell(&self) -> CellId {
        self.request().cell()
    }

    /// Bytes of variable data: see [`crate::record::record_bytes`].
    pub fn variable(&self) -> usize {
        match self {
            Moved::Task { record, .. } => {
                let task = &record.task;
                let names = task.task_id.len() + task.key.len();
                let about = task.content_type.len() + task.traceparent.len() + task.tags.len();
                names + about + task.payload.len()
            }
            Moved::Outcome { record } => {
                let outcome = &record.outcome;
                outcome.error.len() + outcome.output.len() + outcome.result.len()
            }
            Moved::Name { record, .. } => record.key.len() + record.task_id.len(),
        }
    }

    /// Appends the record. The caller has made sure that it fits.
    pub fn append(&self, space: &mut BatchSpace<'_>) -> Placed {
        match self {
            Moved::Task { record, .. } => space.append(Schema::RelocatedTask, record),
            Moved::Outcome { record } => space.append(Schema::RelocatedOutcome, record),
            Moved::Name { record, .. } => space.append(Schema::RelocatedName, record),
        }
    }
}

/// What a shard knows of its tasks, in a form that can be added up over shards: whoever writes all that lives into other
/// logs compares what they hold with what the old ones held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Tasks that have not ended, and those that have and are in memory.
    pub unfinished: u64,
    /// See `unfinished`.
    pub finished: u64,
    /// Given names within their window.
    pub names: u64,
    /// Ordering keys that a failure holds.
    pub held_keys: u64,
    /// The sum of the hashes of every task's facts and of every name's task.
    pub hashes: u64,
}

impl Tally {
    /// Adds what another shard knows.
    pub fn add(&mut self, other: Tally) {
        self.unfinished += other.unfinished;
        self.finished += other.finished;
        self.names += other.names;
        self.held_keys += other.held_keys;
        self.hashes = self.hashes.wrapping_add(other.hashes);
    }

    fn hash(&mut self, facts: &[u128]) {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for fact in facts {
            hasher.update(&fact.to_le_bytes());
        }
        self.hashes = self.hashes.wrapping_add(hasher.digest());
    }
}

impl Shard {
    /// Counts the tasks, names and held keys of a shard that has started and has not stepped.
    pub fn tally(&self) -> Tally {
        self.tally_without(&BTreeSet::new())
    }

    /// As [`Shard::tally`], but for these tasks, which are carried for the hold on their key alone: see
    /// [`Shard::lost_failures`].
    pub fn tally_without(&self, lost: &BTreeSet<RequestId>) -> Tally {
        let mut tally = Tally::default();
        self.tasks.scan(0..self.tasks.used(), |slot, task| {
            if !lost.is_empty() && lost.contains(&self.request_of(slot, task)) {
                return;
            }
            let state = task.state();
            let (due_ms, ended_ms, outcome) = match state {
                State::Scheduled | State::Retrying => (task.at, 0, false),
                state if state.terminal() => (0, task.ended_ms(), task.at != 0),
                _ => (0, 0, false),
            };
            let held = match task.key {
                NIL => 0,
                key => u128::from(self.keys[key].members),
            };
            *match state.terminal() {
                true => &mut tally.finished,
                false => &mut tally.unfinished,
            } += 1;
            tally.hash(&[
                self.request_of(slot, task).0,
                u128::from(task.function.0),
                state as u128,
                u128::from(task.attempt) << 8 | u128::from(task.retries()),
                u128::from(due_ms),
                u128::from(ended_ms),
                u128::from(outcome),
                held,
            ]);
        });
        for (_, name) in self.names.iter() {
            let until_ms = name.request.accepted_ms() + self.options.dedup_window_ms;
            if until_ms > self.now.logged_ms {
                tally.names += 1;
                tally.hash(&[name.request.0, u128::from(name.payload_hash)]);
            }
        }
        tally.held_keys = self.keys.iter().filter(|key| key.held).count() as u64;
        tally
    }

    /// True if a failure of some function holds its task's ordering key.
    pub fn may_hold_keys(&self) -> bool {
        self.lanes.iter().any(Lane::holds_keys)
    }

    /// About how many bytes of records each task and each name needs elsewhere, by its cell.
    pub fn weigh(&self, mut each: impl FnMut(CellId, u64)) {
        let bare = record_bytes(0) as u64;
        self.tasks.scan(0..self.tasks.used(), |_, task| {
            let bytes = u64::from(task.record_bytes() + task.outcome_bytes());
            each(task.cell(), bytes + 2 * bare);
        });
        for (request, failure) in &self.replayed.lost {
            // The length of its own record is not known here.
            let bytes = u64::from(failure.outcome_bytes) + RECORD_BYTES_MAX as u64;
            each(request.cell(), bytes + bare);
        }
        for (_, name) in self.names.iter() {
            each(name.request.cell(), NAME_LIVE_BYTES + bare);
        }
    }

    /// One past the highest page of slots in which a task of this shard lives, as ids number them.
    pub fn pages_end(&self) -> u32 {
        let mut end = 0;
        self.tasks.scan(0..self.tasks.used(), |slot, task| {
            let page = self.request_of(slot, task).slot().0 / TASKS_PER_PAGE as u32;
            end = end.max(page + 1);
        });
        end
    }

    /// The identity of a task, wherever its page is.
    fn request_of(&self, slot: u32, task: &Task) -> RequestId {
        let index = self.tasks.index(slot);
        let index = index.expect("a slot with a task has a number");
        RequestId::new(task.cell(), task.accepted_ms(), task.seq(), index)
    }

    /// Keeps the table of tasks as small as it is while the shard serves: to be called between two calls of
    /// [`Shard::moved`].
    pub fn keep_small(&mut self) {
        self.tasks.pack(1);
    }

    /// The running number of the next task.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// What still lives at the place of a record that was read there; `None` for nothing. Leases, moves and times are in
    /// what a moved task says; configuration is carried forward by itself.
    pub fn moved<'r>(&self, position: Lsn, record: &Record<'r>) -> Option<Moved<'r>> {
        match *record {
            Record::Task(task) => self.moved_task(position, task),
            Record::RelocatedTask(relocated) => self.moved_task(position, &relocated.task),
            Record::Outcome(outcome) => self.moved_outcome(position, outcome),
            Record::RelocatedOutcome(relocated) => self.moved_outcome(position, &relocated.outcome),
            Record::RelocatedName(name) => {
                let request = RequestId(name.request.to_native());
                let function = FunctionId(name.function.to_native());
                self.moved_name(position, request, function, &name.key, &name.task_id)
            }
            Record::Lease(_) | Record::Move(_) | Record::Config(_) | Record::Clock(_) => None,
        }
    }

    /// Failed tasks that are not in memory any more and hold their ordering keys. The slots of some belong to other tasks by
    /// now: their records must come in front of those of all others.
    pub fn lost_failures(&self) -> impl Iterator<Item = RequestId> {
        self.replayed.lost.keys().copied()
    }

    /// As [`Shard::moved`], for a failed task that is not in memory any more and still holds its ordering key: the hold is
    /// known by its records alone. Only after [`Shard::keep_failures`].
    pub fn lost_failure<'r>(&self, record: &Record<'r>) -> Option<Moved<'r>> {
        let lost = |request| self.replayed.lost.get(&request);
        let task = match *record {
            Record::Task(task) => task,
            Record::RelocatedTask(relocated) => &relocated.task,
            Record::Outcome(outcome)
            | Record::RelocatedOutcome(ArchivedRelocatedOutcomeRecordV1 { outcome, .. }) => {
                let failure = lost(RequestId(outcome.request.to_native()))?;
                let record = RelocatedOutcomeRecordV1 {
                    outcome: outcome.to_record(),
                    from: failure.outcome.0,
                };
                return (outcome.holds_key == 1).then_some(Moved::Outcome { record });
            }
            Record::Lease(_)
            | Record::Move(_)
            | Record::Config(_)
            | Record::Clock(_)
            | Record::RelocatedName(_) => return None,
        };
        let failure = lost(task.request())?;
        let record = RelocatedTaskRecordV1 {
            task: task.to_record(),
            from: 0,
            at_ms: self.now.logged_ms,
            due_ms: failure.ended_ms,
            outcome: failure.outcome.0,
            outcome_bytes: failure.outcome_bytes,
            max_age_s: task.max_age_s.to_native(),
            generation: failure.token.generation,
            attempt: failure.token.attempt,
            state: State::Failed as u8,
            retries: failure.retries,
            holds_key: 1,
        };
        let name = self.hash_of(failure.function, &task.key, &task.task_id);
        Some(Moved::Task { record, name })
    }

    fn moved_task<'r>(
        &self,
        position: Lsn,
        record: &'r ArchivedTaskRecordV1<'_>,
    ) -> Option<Moved<'r>> {
        let request = record.request();
        let function = FunctionId(record.function.to_native());
        let slot = self.tasks.find(request);
        let Some(slot) = slot.filter(|&slot| self.tasks[slot].position == position) else {
            return self.moved_name(position, request, function, &record.key, &record.task_id);
        };
        let task = self.tasks[slot];
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
        Some(Moved::Task {
            record: relocated,
            name: self.hash_of(function, &record.key, &record.task_id),
        })
    }

    fn moved_outcome<'r>(
        &self,
        position: Lsn,
        record: &'r ArchivedOutcomeRecordV1<'_>,
    ) -> Option<Moved<'r>> {
        let slot = self.tasks.find(RequestId(record.request.to_native()))?;
        let task = &self.tasks[slot];
        (task.state().terminal() && task.at == position.0).then(|| Moved::Outcome {
            record: RelocatedOutcomeRecordV1 {
                outcome: record.to_record(),
                from: position.0,
            },
        })
    }

    /// A name outlives its task's entry in memory by what is left of its window.
    fn moved_name<'r>(
        &self,
        position: Lsn,
        request: RequestId,
        function: FunctionId,
        key: &'r str,
        task_id: &'r str,
    ) -> Option<Moved<'r>> {
        let name = self.hash_of(function, key, task_id);
        if name == 0 {
            return None;
        }
        let known = self.names.get(name)?;
        let lives =
            known.request == request && u64::from(known.segment) == self.segment_of(position);
        lives.then_some(Moved::Name {
            record: RelocatedNameRecordV1 {
                request: request.0,
                payload_hash: known.payload_hash,
                function: function.0,
                key,
                task_id,
            },
            name,
        })
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
        let seed = self.options.seed;
        name_hash(seed, function, key.as_bytes(), task_id.as_bytes())
    }

    /// True while what a moved record would say of a task is not known: a fact about it is on its way to the disk, or a
    /// read of it is under way.
    pub(crate) fn is_settling(&self, moved: &Moved<'_>) -> bool {
        let slot = match moved {
            Moved::Task { record, .. } => self.tasks.find(RequestId(record.task.request)),
            Moved::Outcome { .. } | Moved::Name { .. } => None,
        };
        slot.is_some_and(|slot| self.tasks[slot].has(FLAG_BUSY | FLAG_FETCHING))
            && !planted(Bug::MovedWhileSettling)
    }
}
