//! Commit: the facts of a batch that is on disk take effect, and those who wait are told. This is the only place where
//! a running shard's facts change; `replay` finds them again after a restart.

use crate::{
    error::Code,
    event::{Control, Durable, Effects, Finished, Span, stow},
    id::{FunctionId, Lsn},
    planted::{Bug, planted},
    record::{Record, read_whole},
    schedule::pool::Signal,
    shard::{Accepted, Fact, Key, Name, Shard},
    state::State,
    table::task::*,
    times::Part,
};

impl Shard {
    pub(crate) fn commit(&mut self, durable: Durable<'_>, effects: &mut Effects) {
        let Some(mut pending) = self.sealed.pop_front() else {
            return;
        };
        for fact in pending.facts.drain(..) {
            self.apply(fact, durable, effects);
        }
        for name in pending.names.drain(..) {
            self.pending_names.remove(&name);
        }
        for appended in pending.steps.drain(..) {
            let took_us = self.now.mono_us() - appended.at_us;
            let at_once = u64::from(appended.leased_at_once);
            let times = &mut self.times;
            times.note(Part::Durable, took_us, u64::from(appended.accepted));
            times.note(Part::Queued, 0, at_once);
            times.note(Part::Fetched, 0, at_once);
            times.note(Part::Dispatched, 0, at_once);
            times.note(Part::Dispatched, took_us, u64::from(appended.leased));
            times.note(Part::Delivered, took_us, u64::from(appended.outcomes));
        }
        for (index, edge) in pending.edges.edges.iter_mut().enumerate() {
            effects.edge(crate::id::EdgeId(index as u16)).absorb(edge);
        }
        for (to, control) in pending.edges.shards.drain(..) {
            match control {
                Control::Credits { from, words } if to == self.options.shard => {
                    self.hear_credits(from, &words);
                }
                control => effects.shards.push((to, control)),
            }
        }
        self.spare.push(pending);
        self.after_commit();
    }

    fn apply(&mut self, fact: Fact, durable: Durable<'_>, effects: &mut Effects) {
        match fact {
            Fact::Accepted(accepted) => self.apply_accepted(accepted, durable),
            Fact::Leased {
                request,
                token,
                binding,
                connection,
            } => {
                let Some(slot) = self.tasks.find(request) else {
                    return;
                };
                let now_us = self.now.mono_us();
                let task = &mut self.tasks[slot];
                task.set_state(State::Running);
                task.attempt = token.attempt;
                task.at = now_us;
                task.clear(FLAG_BUSY | FLAG_RELEASED);
                self.counters.leased += 1;
                self.hand_to(slot, binding);
                let held = self.tasks[slot].holder != NIL;
                if held && self.executor_of(binding).0 != connection {
                    // Its executor connected again while the lease was on its way to the disk, and has presented what
                    // it holds without this one: the order goes to a connection that is gone.
                    self.release(slot);
                }
            }
            Fact::Ended {
                request,
                state,
                retries,
                due_ms,
                position,
                record_bytes,
                code,
            } => {
                let Some(slot) = self.tasks.find(request) else {
                    return;
                };
                let task = &mut self.tasks[slot];
                task.clear(FLAG_BUSY);
                task.set_retries(retries);
                if state == State::Retrying {
                    self.counters.retried += 1;
                    let task = &mut self.tasks[slot];
                    task.set_state(State::Retrying);
                    task.at = due_ms;
                    let key = task.key;
                    self.due.insert(due_ms, slot, &mut self.tasks);
                    self.own_age(slot);
                    if key != NIL && planted(Bug::OrderKeyBroken) {
                        self.tasks[slot].clear(FLAG_KEY_HEAD);
                        self.keys[key].head = NIL;
                        self.advance_key(key);
                    }
                } else {
                    let outcome = (position, record_bytes);
                    self.finish(slot, state, outcome, position, code, durable, effects);
                }
            }
            Fact::Moved {
                request,
                state,
                position,
            } => {
                let Some(slot) = self.tasks.find(request) else {
                    return;
                };
                self.tasks[slot].clear(FLAG_BUSY);
                if state == State::Stopping {
                    self.tasks[slot].set_state(State::Stopping);
                    self.cancel(slot, effects);
                } else if state.terminal() {
                    let function = self.tasks[slot].function;
                    self.detach(slot);
                    let outcome = (Lsn(0), 0);
                    self.finish(slot, state, outcome, position, Code::Ok, durable, effects);
                    self.arm_lane_age(function);
                    self.wake_lane(function);
                }
            }
            Fact::Config { version, change } => self.apply_change(version, *change),
            Fact::Clock { next_seq } => self.next_seq = self.next_seq.max(next_seq),
            Fact::ConfigComplete { segment } => self.config_segment = segment,
            Fact::Relocated {
                request,
                from,
                to,
                record_bytes,
                name,
            } => self.apply_relocated(request, from, to, record_bytes, name),
            Fact::OutcomeRelocated {
                request,
                from,
                to,
                record_bytes,
            } => self.apply_outcome_relocated(request, from, to, record_bytes),
            Fact::NameRelocated { request, name, to } => self.move_name(name, request, to),
        }
    }

    fn apply_accepted(&mut self, accepted: Accepted, durable: Durable<'_>) {
        let slot = self.tasks.place(accepted.request);
        let slot = slot.expect("a shard accepts into its own slots");
        let segment = self.segment_of(accepted.position);
        let mut task = Task::new(
            accepted.request,
            accepted.function,
            accepted.position,
            accepted.record_bytes,
        );
        task.at = self.now.mono_us();
        task.cost = accepted.cost;
        task.waiter = accepted.waiter;
        task.set(accepted.flags);
        task.set_max_age_s(accepted.max_age_s);
        self.live_bytes += u64::from(task.record_bytes());
        self.tasks.insert(slot, task);
        self.reference(segment);
        if accepted.name != 0 {
            let name = Name {
                request: accepted.request,
                payload_hash: accepted.payload_hash,
                segment: segment as u32,
            };
            self.enter_name(accepted.name, name);
        }
        if accepted.leased {
            return;
        }
        let lane = &mut self.lanes[accepted.function.0 as usize];
        lane.unsettled -= 1;
        let wanted = lane.free_slots > 0 || !lane.bindings.is_empty() || lane.in_flight > 0;
        let bytes = accepted.record_bytes as usize;
        if wanted
            && accepted.due_ms == 0
            && self.blobs.bytes() + bytes <= self.options.fetched_bytes_max
        {
            let offset = (accepted.position.0 % self.options.segment_bytes) as usize;
            let start = offset - durable.offset as usize;
            self.tasks[slot].holder = self.blobs.put(&durable.bytes[start..start + bytes]);
        }
        if accepted.key != 0 {
            self.join_key(slot, accepted.key);
        }
        if accepted.max_age_s > 0 && accepted.due_ms == 0 {
            self.own_age(slot);
        }
        if accepted.due_ms > 0 {
            let task = &mut self.tasks[slot];
            task.set_state(State::Scheduled);
            task.at = accepted.due_ms;
            self.due.insert(accepted.due_ms, slot, &mut self.tasks);
        } else {
            self.enqueue(slot, false);
        }
    }

    /// Makes a task a member of its key: the head if the key is free, a successor if not.
    fn join_key(&mut self, slot: u32, hash: u128) {
        let key = self.key_entry(self.tasks[slot].function, hash);
        self.tasks[slot].key = key;
        self.keys[key].members += 1;
    }

    /// The entry of an ordering key, made where it is missing.
    pub(crate) fn key_entry(&mut self, function: FunctionId, hash: u128) -> u32 {
        if let Some(&key) = self.keys_by_hash.get(hash) {
            return key;
        }
        let key = self.keys.insert(Key {
            hash,
            function,
            head: NIL,
            successors: List::default(),
            members: 0,
            held: false,
        });
        self.keys_by_hash.insert(hash, key);
        key
    }

    /// Puts a task that is in no list and may start into its lane, or behind its key.
    pub(crate) fn enqueue(&mut self, slot: u32, in_front: bool) {
        let now_us = self.now.mono_us();
        let task = &mut self.tasks[slot];
        if task.state() != State::Enqueued {
            // One that followed its key's head has been waiting since before.
            task.at = now_us;
        }
        task.set_state(State::Enqueued);
        if task.max_age_s() > 0 && !task.has(FLAG_OWN_AGE | FLAG_OVERDUE) {
            // It was leased as it was accepted, and comes back.
            self.own_age(slot);
        }
        let task = &self.tasks[slot];
        let (function, key, head) = (task.function, task.key, task.has(FLAG_KEY_HEAD));
        if key != NIL && !head {
            let entry = &mut self.keys[key];
            if entry.head != NIL || entry.held {
                let mut successors = entry.successors;
                self.tasks.push_back(&mut successors, slot);
                self.keys[key].successors = successors;
                self.lanes[function.0 as usize].behind_keys += 1;
                self.own_age(slot);
                return;
            }
            entry.head = slot;
            self.tasks[slot].set(FLAG_KEY_HEAD);
        }
        let lane = &mut self.lanes[function.0 as usize];
        let mut waiting = lane.waiting;
        if in_front {
            self.tasks.push_front(&mut waiting, slot);
        } else {
            self.tasks.push_back(&mut waiting, slot);
        }
        self.lanes[function.0 as usize].waiting = waiting;
        self.arm_lane_age(function);
        self.wake_lane(function);
        if !self.lanes[function.0 as usize].live && !self.replaying {
            self.doom(function);
        }
    }

    /// Takes a task out of wherever its state keeps it.
    pub(crate) fn detach(&mut self, slot: u32) {
        let task = self.tasks[slot];
        let function = task.function.0 as usize;
        match task.state() {
            State::Enqueued => {
                if task.key != NIL && !task.has(FLAG_KEY_HEAD) {
                    let mut successors = self.keys[task.key].successors;
                    self.tasks.unlink(&mut successors, slot);
                    self.keys[task.key].successors = successors;
                    self.lanes[function].behind_keys -= 1;
                } else {
                    let mut waiting = self.lanes[function].waiting;
                    self.tasks.unlink(&mut waiting, slot);
                    self.lanes[function].waiting = waiting;
                }
                self.leave_waiting(slot);
            }
            State::Dequeued => {
                self.lanes[function].promised -= 1;
                self.give_credit(slot, Signal::Clean, false);
            }
            State::Scheduled | State::Retrying => {
                self.due.remove(task.at, slot, &mut self.tasks);
                self.leave_waiting(slot);
            }
            State::Running | State::Stopping => self.leave_executor(slot),
            State::Paused
            | State::Succeeded
            | State::Failed
            | State::Stopped
            | State::Expired
            | State::Invalid => {}
        }
        self.drop_blob(slot);
    }

    fn leave_waiting(&mut self, slot: u32) {
        let tenant = self.tenant_of(slot);
        self.queues[tenant.0 as usize].waiting -= 1;
    }

    /// Forgets the bytes of a task that waits; a running task's `holder` is a binding and stays.
    pub(crate) fn drop_blob(&mut self, slot: u32) {
        let task = &mut self.tasks[slot];
        if task.holder != NIL && !matches!(task.state(), State::Running | State::Stopping) {
            let blob = core::mem::replace(&mut task.holder, NIL);
            self.blobs.remove(blob);
        }
    }

    /// Gives a task whose age is not its lane's an entry of its own.
    pub(crate) fn own_age(&mut self, slot: u32) {
        let task = &self.tasks[slot];
        if task.has(FLAG_OWN_AGE) {
            return;
        }
        let age = match task.max_age_s() {
            0 => self.lanes[task.function.0 as usize].config.max_age_s,
            own => own,
        };
        // A delayed task's age counts from when it was due.
        let from = if task.state() == State::Scheduled && !planted(Bug::ExpiredEarly) {
            task.at
        } else {
            task.accepted_ms()
        };
        let task = &mut self.tasks[slot];
        task.set_max_age_s(age);
        task.set(FLAG_OWN_AGE);
        let seq = task.seq() as u32;
        self.ages.insert((from + u64::from(age) * 1_000, slot, seq));
    }

    /// Ends a task that is in no list: tells its waiters, frees its key, keeps it for queries. `end` is where the record
    /// stands that ends it, be it an outcome's or another.
    #[expect(clippy::too_many_arguments, reason = "the parts of one end")]
    fn finish(
        &mut self,
        slot: u32,
        state: State,
        (position, record_bytes): (Lsn, u32),
        end: Lsn,
        code: Code,
        durable: Durable<'_>,
        effects: &mut Effects,
    ) {
        let counter = match state {
            State::Succeeded => &mut self.counters.succeeded,
            State::Stopped => &mut self.counters.stopped,
            State::Expired => &mut self.counters.expired,
            State::Invalid => &mut self.counters.invalid,
            State::Failed => &mut self.counters.failed,
            State::Scheduled
            | State::Enqueued
            | State::Dequeued
            | State::Running
            | State::Retrying
            | State::Paused
            | State::Stopping => unreachable!("only terminal states finish a task"),
        };
        *counter += 1;
        let total_ms = self.now.logged_ms - self.tasks[slot].accepted_ms();
        self.times.note(Part::Total, total_ms, 1);
        let task = &mut self.tasks[slot];
        task.set_state(state);
        task.at = position.0;
        task.set_outcome_bytes(record_bytes);
        task.holder = NIL;
        let own_age = task.has(FLAG_OWN_AGE);
        let key = task.key;
        if !self.stop_graces.is_empty() {
            self.stop_graces.remove(&slot);
        }
        if own_age {
            self.drop_own_age(slot);
        }
        if position.0 != 0 {
            self.live_bytes += u64::from(self.tasks[slot].outcome_bytes());
            self.reference(self.segment_of(position));
        }
        if self.tasks[slot].waiter != NIL {
            self.tell_waiters(slot, state, position, code, durable, effects);
        }
        if key != NIL {
            self.leave_key(slot, state);
        }
        self.tasks[slot].set_ended_ms(self.now.logged_ms);
        self.note_end(slot, end);
        self.keep_finished(slot);
    }

    /// Keeps a finished task for queries, and for history if that does not have it.
    pub(crate) fn keep_finished(&mut self, slot: u32) {
        let mut finished = self.finished;
        self.tasks.push_back(&mut finished, slot);
        self.finished = finished;
        let task = &self.tasks[slot];
        self.finished_bytes += u64::from(task.record_bytes() + task.outcome_bytes());
        if self.tasks[slot].has(FLAG_UNSAVED) {
            self.count_unsaved(slot);
        }
        self.trim_finished();
    }

    fn drop_own_age(&mut self, slot: u32) {
        let task = &mut self.tasks[slot];
        task.clear(FLAG_OWN_AGE);
        let age_ms = u64::from(task.max_age_s()) * 1_000;
        // The entry of a task that was delayed stands elsewhere and goes when it fires: see `timers`.
        let seq = task.seq() as u32;
        self.ages.remove(&(task.accepted_ms() + age_ms, slot, seq));
    }

    fn tell_waiters(
        &mut self,
        slot: u32,
        state: State,
        position: Lsn,
        code: Code,
        durable: Durable<'_>,
        effects: &mut Effects,
    ) {
        let request = self.tasks.request(slot);
        let attempts = self.tasks[slot].token().attempt;
        let mut at = core::mem::replace(&mut self.tasks[slot].waiter, NIL);
        while at != NIL {
            let waiter = self.waiters[at];
            self.waiters.remove(at);
            at = waiter.next;
            let edge = effects.edge(waiter.connection.edge());
            let (mut error, mut result) = (Span::default(), Span::default());
            if position.0 != 0 && (waiter.with_result || code != Code::Ok) {
                let start =
                    (position.0 % self.options.segment_bytes) as usize - durable.offset as usize;
                if let Ok(Record::Outcome(outcome)) = read_whole(&durable.bytes[start..]) {
                    error = stow(&mut edge.bytes, outcome.error.as_bytes());
                    if waiter.with_result {
                        result = stow(&mut edge.bytes, &outcome.result);
                    }
                }
            }
            edge.finished.push(Finished {
                connection: waiter.connection,
                ticket: waiter.ticket,
                index: waiter.index,
                request,
                state,
                code,
                attempts,
                with_result: waiter.with_result,
                error,
                result,
            });
        }
    }

    /// The next task of the key follows, or the key is held, or nobody is left and it goes.
    fn leave_key(&mut self, slot: u32, state: State) {
        let task = &mut self.tasks[slot];
        let index = core::mem::replace(&mut task.key, NIL);
        let was_head = task.has(FLAG_KEY_HEAD);
        task.clear(FLAG_KEY_HEAD);
        // What it was told to do then may have been changed while the outcome was on its way to the disk.
        let holds = task.has(FLAG_HOLDS_KEY) && self.lanes[task.function.0 as usize].holds_keys();
        let key = &mut self.keys[index];
        key.members -= 1;
        if was_head {
            key.head = NIL;
            key.held = state == State::Failed && holds;
        }
        if key.members == 0 && !key.held {
            self.keys_by_hash.remove(key.hash);
            self.keys.remove(index);
        } else if was_head && !key.held {
            self.advance_key(index);
        }
    }

    /// Makes the first successor the head of a key that has none.
    pub(crate) fn advance_key(&mut self, index: u32) {
        let key = &mut self.keys[index];
        let next = key.successors.head;
        if next == NIL {
            return;
        }
        let function = key.function;
        let mut successors = key.successors;
        self.tasks.unlink(&mut successors, next);
        self.keys[index].successors = successors;
        self.lanes[function.0 as usize].behind_keys -= 1;
        self.enqueue(next, false);
    }

    /// Drops a finished task from memory.
    pub(crate) fn forget(&mut self, slot: u32) {
        let mut finished = self.finished;
        self.tasks.unlink(&mut finished, slot);
        self.finished = finished;
        let task = self.tasks[slot];
        let bytes = u64::from(task.record_bytes() + task.outcome_bytes());
        self.finished_bytes -= bytes;
        self.live_bytes -= bytes;
        self.dereference(self.segment_of(task.position));
        if task.at != 0 {
            self.dereference(self.segment_of(Lsn(task.at)));
        }
        self.tasks.remove(slot);
    }

    /// The log has reached this segment.
    pub(crate) fn see_segment(&mut self, segment: u64) {
        if self.segments.is_empty() {
            self.first_segment = segment;
            self.config_segment = segment;
        }
        assert!(
            segment >= self.first_segment,
            "nothing new stands in a segment that is gone"
        );
        let index = (segment - self.first_segment) as usize;
        if self.segments.len() <= index {
            self.segments.resize(index + 1, 0);
        }
    }

    pub(crate) fn reference(&mut self, segment: u64) {
        self.see_segment(segment);
        self.segments[(segment - self.first_segment) as usize] += 1;
    }

    pub(crate) fn dereference(&mut self, segment: u64) {
        self.segments[(segment - self.first_segment) as usize] -= 1;
    }

    /// What follows when something is not needed any more: segments at the front that nothing refers to are dead.
    pub(crate) fn after_commit(&mut self) {
        while self.segments.len() > 1
            && self.segments[0] == 0
            && self.first_segment < self.config_segment
        {
            self.segments.pop_front();
            self.first_segment += 1;
        }
    }

    pub(crate) fn arm_lane_age(&mut self, function: FunctionId) {
        let lane = &mut self.lanes[function.0 as usize];
        if lane.age_armed || lane.waiting.head == NIL {
            return;
        }
        lane.age_armed = true;
        let due =
            self.tasks[lane.waiting.head].accepted_ms() + u64::from(lane.config.max_age_s) * 1_000;
        self.lane_ages.insert((due, function.0));
    }
}
