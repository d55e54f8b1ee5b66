//! Timers: what is due by logged time (delays, backoffs, ages, names) and by monotonic time (parked lanes, attempts
//! that take too long, executors that went away). Each kind does a bounded amount of work a step.

use crate::{
    error::Code,
    flow::clean::NAME_LIVE_BYTES,
    id::FunctionId,
    planted::{Bug, planted},
    record::{BatchSpace, record_bytes},
    shard::Shard,
    state::{Event, State},
    table::task::*,
};

/// Timers of one kind that fire in one step.
const FIRED_MAX: usize = 256;

impl Shard {
    pub(crate) fn timers(&mut self, space: &mut BatchSpace<'_>) {
        self.due_tasks();
        self.aged_tasks(space);
        self.aged_lanes(space);
        self.forgotten_names();
        self.parked_lanes();
        self.overdue_attempts(space);
        self.lost_executors(space);
        self.lost_orphans(space);
        self.doomed_lanes(space);
        self.silent_shards();
        self.idle_shares();
    }

    fn due_tasks(&mut self) {
        self.due.look_ahead(self.now.logged_ms, &mut self.tasks);
        for _ in 0..FIRED_MAX {
            let Some((at, slot)) = self.due.first() else {
                return;
            };
            if at > self.now.logged_ms {
                return;
            }
            self.due.pop_first();
            self.own_age(slot);
            self.meet(self.tasks[slot].state(), Event::Due);
            let function = self.tasks[slot].function;
            self.enqueue(slot, false);
            if !self.lanes[function.0 as usize].live {
                self.doom(function);
            }
        }
    }

    fn aged_tasks(&mut self, space: &mut BatchSpace<'_>) {
        for _ in 0..FIRED_MAX {
            let Some(&(at, slot, seq)) = self.ages.first() else {
                return;
            };
            if at > self.now.logged_ms || space.room() < record_bytes(0) {
                return;
            }
            self.ages.remove(&(at, slot, seq));
            let Some(task) = self.tasks.get(slot) else {
                continue;
            };
            if !task.has(FLAG_OWN_AGE) || task.seq() as u32 != seq {
                continue; // The slot belongs to another task by now.
            }
            if task.has(FLAG_BUSY) || task.state().on(Event::Expire).is_none() {
                self.tasks[slot].set(FLAG_OVERDUE);
                self.tasks[slot].clear(FLAG_OWN_AGE);
                continue;
            }
            self.append_move(slot, State::Expired, space);
        }
    }

    /// The heads of lanes whose tasks share the function's maximum age.
    fn aged_lanes(&mut self, space: &mut BatchSpace<'_>) {
        for _ in 0..FIRED_MAX {
            let Some(&(at, function)) = self.lane_ages.first() else {
                return;
            };
            if at > self.now.logged_ms || space.room() < record_bytes(0) {
                return;
            }
            self.lane_ages.remove(&(at, function));
            let lane = &mut self.lanes[function as usize];
            lane.age_armed = false;
            let head = lane.waiting.head;
            if head == NIL {
                continue;
            }
            let task = self.tasks[head];
            let age_ms = u64::from(self.lanes[function as usize].config.max_age_s) * 1_000;
            if task.has(FLAG_OWN_AGE | FLAG_BUSY)
                || task.accepted_ms() + age_ms > self.now.logged_ms
            {
                // Looked at again when the head may have changed.
                let due = (task.accepted_ms() + age_ms).max(self.now.logged_ms + 100);
                self.lanes[function as usize].age_armed = true;
                self.lane_ages.insert((due, function));
                continue;
            }
            self.append_move(head, State::Expired, space);
            // Out of the lane already, so that the next head is seen; the move's commit finds it in no list.
            self.set_aside(head);
            self.arm_lane_age(FunctionId(function));
        }
    }

    /// Takes a task that waits out of its lane before its move is durable: it is as if paused.
    fn set_aside(&mut self, slot: u32) {
        self.detach(slot);
        self.tasks[slot].set_state(State::Paused);
    }

    fn forgotten_names(&mut self) {
        for _ in 0..FIRED_MAX {
            let Some(&(name, accepted_ms)) = self.name_ages.front() else {
                return;
            };
            if accepted_ms + self.options.dedup_window_ms > self.now.logged_ms {
                return;
            }
            self.name_ages.pop();
            // A name that was given again after a window, all of which one replay has seen, keeps its later entry.
            let current = self
                .names
                .get(name)
                .is_some_and(|known| known.request.accepted_ms() == accepted_ms);
            if current && let Some(known) = self.names.remove(name) {
                self.live_bytes -= NAME_LIVE_BYTES;
                self.dereference(u64::from(known.segment));
            }
        }
    }

    fn parked_lanes(&mut self) {
        while let Some(&(at, function)) = self.parks.first() {
            if at > self.now.mono_ns {
                return;
            }
            self.parks.remove(&(at, function));
            if !planted(Bug::LostWakeUp) {
                self.wake_lane(FunctionId(function));
            }
        }
    }

    /// Attempts that take longer than their function allows. A binding's tasks started in order, so its first one is
    /// the one to look at.
    fn overdue_attempts(&mut self, space: &mut BatchSpace<'_>) {
        for _ in 0..FIRED_MAX {
            let Some(&(at, binding)) = self.watch.first() else {
                return;
            };
            if at > self.now.mono_ns || space.room() < record_bytes(256) {
                return;
            }
            self.watch.remove(&(at, binding));
            self.bindings[binding as usize].watched = false;
            let slot = self.bindings[binding as usize].running.head;
            if slot == NIL {
                continue;
            }
            if self.tasks[slot].has(FLAG_BUSY) {
                self.bindings[binding as usize].watched = true;
                self.watch.insert((self.now.mono_ns + 1_000_000, binding));
                continue;
            }
            if self.attempt_ends_ns(slot) <= self.now.mono_ns {
                let task = self.tasks[slot];
                let (request, token) = (self.tasks.request(slot), task.token());
                let executor = self.bindings[binding as usize].executor;
                self.cancel_after_flush(slot);
                self.leave_executor(slot);
                // The slot stays taken until the executor says that it let go.
                if !planted(Bug::OverdueSlotReused) {
                    let before = self.bindings[binding as usize].free();
                    self.bindings[binding as usize].used += 1;
                    self.recount(binding, before);
                    if let Some(session) = self.sessions.get_mut(&executor) {
                        session.overdue.insert((request, token), binding);
                    }
                }
                self.fail_attempt(
                    slot,
                    Code::DeadlineExceeded,
                    "the attempt took longer than its function's timeout",
                    space,
                );
            }
            self.watch_binding(binding);
        }
    }

    fn lost_executors(&mut self, space: &mut BatchSpace<'_>) {
        for _ in 0..FIRED_MAX {
            let Some(&(at, executor)) = self.graces.first() else {
                return;
            };
            if at > self.now.mono_ns {
                return;
            }
            let Some(session) = self
                .sessions
                .get(&executor)
                .filter(|session| !session.connected && session.ends_ns == at)
            else {
                self.graces.remove(&(at, executor));
                continue;
            };
            let running = session
                .bindings
                .iter()
                .map(|&binding| self.bindings[binding as usize].running.head);
            let Some(slot) = running.clone().find(|&slot| slot != NIL) else {
                self.graces.remove(&(at, executor));
                self.drop_session(executor);
                continue;
            };
            if space.room() < record_bytes(256) || self.tasks[slot].has(FLAG_BUSY) {
                return;
            }
            self.leave_executor(slot);
            self.take_over(slot, space);
        }
    }

    fn lost_orphans(&mut self, space: &mut BatchSpace<'_>) {
        if self.now.mono_ns < self.orphans_end_ns {
            return;
        }
        for _ in 0..FIRED_MAX {
            let slot = self.orphans.head;
            if slot == NIL || space.room() < record_bytes(256) || self.tasks[slot].has(FLAG_BUSY) {
                return;
            }
            self.leave_executor(slot);
            self.take_over(slot, space);
        }
    }

    fn take_over(&mut self, slot: u32, space: &mut BatchSpace<'_>) {
        self.counters.taken_over += 1;
        self.fail_attempt(
            slot,
            Code::Unavailable,
            "the executor went away during the attempt",
            space,
        );
    }

    /// Tasks of deleted functions.
    fn doomed_lanes(&mut self, space: &mut BatchSpace<'_>) {
        for _ in 0..FIRED_MAX {
            let Some(&function) = self.doomed.last() else {
                return;
            };
            let head = self.lanes[function as usize].waiting.head;
            if head == NIL {
                self.doomed.pop();
                continue;
            }
            if space.room() < record_bytes(0) {
                return;
            }
            if !self.tasks[head].has(FLAG_BUSY) {
                self.append_move(head, State::Invalid, space);
            }
            self.set_aside(head);
        }
    }

    pub(crate) fn doom(&mut self, function: FunctionId) {
        if !self.doomed.contains(&function.0) {
            self.doomed.push(function.0);
        }
    }
}
