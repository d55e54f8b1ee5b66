//! Audit: everything that must be true of a shard between two steps, checked by going through all of it. Simulation
//! runs it after every step; it is far too slow for anything else.

use crate::{
    flow::clean::NAME_LIVE_BYTES,
    limits::RECORD_BYTES_MAX,
    shard::{Fact, Name, Shard},
    state::State,
    table::task::{FLAG_DELAYED, FLAG_KEY_HEAD, FLAG_MEMORY, FLAG_META, List, NIL, Task},
};

impl Shard {
    /// Panics with the broken rule if the shard contradicts itself.
    pub fn audit(&self) {
        if self.poisoned {
            return; // What was on its way to the disk was given up, and nothing is decided any more.
        }
        let mut in_lists = 0u32;
        let mut walk = |list: &List, what: &str, allowed: &[State]| {
            let (mut slot, mut prev, mut count) = (list.head, NIL, 0);
            while slot != NIL {
                let task = self
                    .tasks
                    .get(slot)
                    .unwrap_or_else(|| panic!("{what}: slot {slot} is empty"));
                assert_eq!(task.prev, prev, "{what}: links agree");
                assert!(
                    allowed.contains(&task.state()),
                    "{what}: {:?} in {:?}",
                    self.tasks.request(slot),
                    task.state()
                );
                (prev, slot, count) = (slot, task.next, count + 1);
            }
            assert_eq!(
                (prev, count),
                (list.tail, list.count),
                "{what}: tail and count"
            );
            in_lists += count;
        };
        walk(&self.finished, "finished", &State::ALL[7..]);
        walk(&self.orphans, "orphans", &[State::Running, State::Stopping]);
        for lane in &self.lanes {
            walk(&lane.waiting, "lane", &[State::Enqueued]);
        }
        for binding in &self.bindings {
            walk(
                &binding.running,
                "binding",
                &[State::Running, State::Stopping],
            );
            assert!(
                binding.used >= binding.running.count,
                "a running task holds a slot"
            );
        }
        for key in self.keys.iter().filter(|key| key.members > 0) {
            walk(&key.successors, "key", &[State::Enqueued]);
            if key.head != NIL {
                assert!(
                    self.tasks[key.head].has(FLAG_KEY_HEAD),
                    "a key's head knows that it is"
                );
            }
        }
        let (mut loose, mut outcomes) = (0, 0u64);
        let mut finished_bytes = 0;
        let mut live_bytes = self.names.len() as u64 * NAME_LIVE_BYTES;
        let mut beyond = alloc::vec![0u32; self.lanes.len()];
        let mut waiting = alloc::vec![0u64; self.queues.len()];
        let unsettled = self
            .sealed
            .iter()
            .chain([&self.open])
            .flat_map(|pending| &pending.facts);
        for fact in unsettled {
            match fact {
                Fact::Accepted(task) if !task.leased => waiting[task.tenant.0 as usize] += 1,
                Fact::Ended {
                    request,
                    state: State::Retrying,
                    ..
                } => {
                    let slot = self.tasks.find(*request).expect("a task that ends lives");
                    waiting[self.tenant_of(slot).0 as usize] += 1
                }
                Fact::Accepted(_)
                | Fact::Ended { .. }
                | Fact::Leased { .. }
                | Fact::Moved { .. }
                | Fact::Config { .. }
                | Fact::Clock { .. }
                | Fact::ConfigComplete { .. }
                | Fact::Relocated { .. }
                | Fact::OutcomeRelocated { .. }
                | Fact::NameRelocated { .. } => {}
            }
        }
        self.tasks.scan(0..self.tasks.used(), |slot, task| {
            match task.state() {
                State::Dequeued | State::Running | State::Stopping => {
                    beyond[task.function.0 as usize] += 1
                }
                State::Scheduled | State::Enqueued | State::Retrying => {
                    waiting[self.lanes[task.function.0 as usize].tenant.0 as usize] += 1
                }
                State::Paused
                | State::Succeeded
                | State::Failed
                | State::Stopped
                | State::Expired
                | State::Invalid => {}
            }
            let bytes = u64::from(task.record_bytes() + task.outcome_bytes());
            live_bytes += bytes;
            finished_bytes += if task.state().terminal() { bytes } else { 0 };
            loose += u32::from(task.prev == NIL && task.next == NIL);
            outcomes += u64::from(task.state().terminal() && task.at != 0);
            if matches!(task.state(), State::Scheduled | State::Retrying) {
                assert!(
                    self.due.contains(task.at, slot, &self.tasks),
                    "a delayed task has its timer"
                );
            }
        });
        assert!(
            in_lists <= self.tasks.live(),
            "no task is in two lists ({loose} in none)"
        );
        for (queue, held) in self.queues.iter().enumerate() {
            let lanes = self
                .lanes
                .iter()
                .filter(|lane| lane.tenant.0 as usize == queue);
            let in_flight: u32 = lanes.map(|lane| lane.in_flight).sum();
            assert_eq!(
                held.pool.in_use(),
                in_flight,
                "credits in use are the tasks beyond Enqueued"
            );
            assert_eq!(
                held.waiting, waiting[queue],
                "waiting tasks of tenant {queue}"
            );
        }
        for (index, lane) in self.lanes.iter().enumerate() {
            let free: u32 = self
                .bindings
                .iter()
                .filter(|binding| binding.function.0 as usize == index)
                .map(|binding| binding.free())
                .sum();
            assert_eq!(lane.free_slots, free, "free slots of function {index}");
            let settling = self
                .sealed
                .iter()
                .chain([&self.open])
                .flat_map(|pending| &pending.facts);
            let settling = settling.filter(|fact| matches!(fact, Fact::Accepted(task) if task.leased && task.function.0 as usize == index));
            assert!(
                lane.in_flight <= beyond[index] + settling.count() as u32,
                "in flight of function {index}"
            );
        }
        for &slot in self.stop_graces.keys() {
            let state = self.tasks[slot].state();
            assert!(
                matches!(state, State::Running | State::Stopping),
                "slot {slot} has a grace and is {state}"
            );
        }
        assert_eq!(self.live_bytes, live_bytes, "bytes that are needed");
        assert_eq!(
            self.finished_bytes, finished_bytes,
            "bytes of finished tasks"
        );
        let references: u64 = self.segments.iter().map(|&count| u64::from(count)).sum();
        let expected = u64::from(self.tasks.live()) + self.names.len() as u64 + outcomes;
        assert_eq!(
            references, expected,
            "segments are kept for what refers to them"
        );
        self.audit_history();
        self.audit_credits();
    }

    /// Panics unless nothing is held: no task waits or runs, and every slot, credit, read and byte has come back. For a
    /// shard whose tasks have all ended and whose executors have all answered.
    pub fn audit_rest(&self) {
        for (index, queue) in self.queues.iter().enumerate() {
            assert_eq!(
                (queue.pool.in_use(), queue.waiting),
                (0, 0),
                "credits and waiting tasks of tenant {index}"
            );
        }
        for (index, lane) in self.lanes.iter().enumerate() {
            assert_eq!(
                (
                    lane.in_flight,
                    lane.promised,
                    lane.unsettled,
                    lane.behind_keys,
                    lane.waiting.count
                ),
                (0, 0, 0, 0, 0),
                "function {index}: in flight, promised, unsettled, behind keys, waiting"
            );
        }
        for (executor, session) in &self.sessions {
            assert!(
                session.overdue.is_empty() || !session.connected,
                "overdue attempts of executor {executor} are answered"
            );
            for &index in &session.bindings {
                let binding = &self.bindings[index as usize];
                let overdue = session.overdue.values().filter(|&&other| other == index);
                assert_eq!(
                    (binding.used, binding.running.count),
                    (overdue.count() as u32, 0),
                    "slots of executor {executor} for function {}: used, running",
                    binding.function.0
                );
            }
        }
        assert_eq!(self.orphans.count, 0, "orphans");
        assert_eq!(self.blobs.bytes(), 0, "bytes of waiting tasks");
        assert!(self.due.is_empty(), "delayed tasks");
        assert!(
            self.pending_names.is_empty() && self.deferred.is_empty(),
            "pending names and deferred questions"
        );
        assert_eq!(self.waiters.live(), 0, "callers that wait");
        self.audit_credits_at_rest();
    }

    /// Panics unless this shard, which has just been started from a snapshot, knows what `whole` knows, which has been
    /// started from the whole log with the same secret and at the same time.
    pub fn audit_against(&self, whole: &Shard) {
        // What there was no room for any more has been forgotten, sooner on one side than on the other: the order of
        // the ends does not outlive moved records.
        let is_full = |shard: &Shard| {
            shard.finished.count >= self.options.finished_max
                || shard.finished_bytes + RECORD_BYTES_MAX as u64 > self.options.finished_bytes_max
        };
        for slot in 0..self.tasks.used().max(whole.tasks.used()) {
            let (here, there) = match (self.tasks.get(slot), whole.tasks.get(slot)) {
                (Some(here), Some(there)) => (here, there),
                (None, None) => continue,
                (here, there) => {
                    let lacking = if here.is_none() { self } else { whole };
                    let ended = here.or(there).is_some_and(|task| task.state().terminal());
                    let forgotten = ended && is_full(lacking);
                    assert!(
                        forgotten,
                        "slot {slot} holds {here:?} after the snapshot and {there:?} after the log"
                    );
                    continue;
                }
            };
            let facts = |task: &Task, shard: &Shard| {
                let key = match task.key {
                    NIL => 0,
                    key => shard.keys[key].hash,
                };
                let lasts = (task.attempt, task.retries(), task.cost, task.record_units);
                let kinds = [FLAG_META, FLAG_MEMORY, FLAG_DELAYED].map(|flag| task.has(flag));
                let place = (shard.tasks.request(slot), task.function, task.position);
                (place, lasts, kinds, key)
            };
            assert_eq!(facts(here, self), facts(there, whole), "slot {slot}");
            assert_eq!(here.state(), there.state(), "slot {slot}");
            if here.state() == State::Scheduled || here.state().terminal() {
                assert_eq!(
                    here.at, there.at,
                    "slot {slot} is due, or its outcome's place"
                );
            }
        }
        assert_eq!(self.directory, whole.directory, "configuration");
        assert_eq!(self.next_seq, whole.next_seq, "running number");
        for (known, other) in [(self, whole), (whole, self)] {
            for (hash, name) in known.names.iter() {
                let until_ms = name.request.accepted_ms() + self.options.dedup_window_ms;
                let facts = |name: Name| (name.request, name.payload_hash, name.segment);
                let there = other.names.get(hash).copied().map(facts);
                assert!(
                    there == Some(facts(name)) || until_ms <= self.now.logged_ms,
                    "the name of {:?} is that of {there:?}",
                    facts(name)
                );
            }
        }
        // A held key whose failure is gone from the log is known to the snapshot alone.
        for key in whole.keys.iter().filter(|key| key.held) {
            let here = self.keys_by_hash.get(key.hash);
            assert!(
                here.is_some_and(|&here| self.keys[here].held),
                "a failure holds the key {:x}",
                key.hash
            );
        }
    }
}
