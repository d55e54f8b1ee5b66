//! Invoke: a task in memory meets a free slot, its lease is appended, and the order to execute waits for the flush.
//! Also the bookkeeping of slots: which executor has how many, and which task sits in which.

use crate::{
    event::{Cancel, Effects, Execute, Span, stow},
    id::{ConnectionId, FunctionId, Token},
    limits::STOP_GRACE_MS_DEFAULT,
    record::{BatchSpace, read_task},
    schedule::pool::Signal,
    shard::Shard,
    state::Event,
    table::task::*,
    times::Part,
};

impl Shard {
    /// Leases a dequeued task whose record is in memory; it goes back to its lane if its slot is gone.
    pub(crate) fn invoke(&mut self, slot: u32, space: &mut BatchSpace<'_>) {
        let task = self.tasks[slot];
        let Some(binding) = self.use_slot(task.function) else {
            self.put_back(slot);
            return;
        };
        self.meet(task.state(), Event::Lease);
        self.lanes[task.function.0 as usize].promised -= 1;
        let request = self.tasks.request(slot);
        let token = Token {
            attempt: task.attempt + 1,
            ..task.token()
        };
        self.append_lease(request, token, binding, space);
        self.open.appended.leased += 1;
        let fetched_us = self.now.mono_us() - task.at;
        self.times.note(Part::Fetched, fetched_us, 1);
        let timeout_ms = self.lanes[task.function.0 as usize].config.timeout_ms;
        let (connection, index) = self.executor_of(binding);
        let edge = self.open.edges.edge(connection.edge());
        let bytes = &mut edge.bytes;
        let record = read_task(self.blobs.get(task.holder))
            .expect("only records of tasks are kept in memory");
        let mut text = |text: &str| {
            if text.is_empty() {
                Span::default()
            } else {
                stow(bytes, text.as_bytes())
            }
        };
        let execute = Execute {
            connection,
            request,
            token,
            index,
            timeout_ms,
            task_id: text(&record.task_id),
            key: text(&record.key),
            content_type: text(&record.content_type),
            traceparent: text(&record.traceparent),
            payload: stow(bytes, &record.payload),
        };
        edge.executes.push(execute);
        self.drop_blob(slot);
        self.tasks[slot].set(FLAG_BUSY);
    }

    /// Takes a free slot of a function, in turn over its executors.
    pub(crate) fn use_slot(&mut self, function: FunctionId) -> Option<u32> {
        let lane = &mut self.lanes[function.0 as usize];
        while let Some(binding) = lane.bindings.pop_front() {
            let target = &mut self.bindings[binding as usize];
            target.queued = false;
            if target.free() == 0 {
                continue;
            }
            target.used += 1;
            lane.free_slots -= 1;
            if target.free() > 0 {
                target.queued = true;
                lane.bindings.push_back(binding);
            }
            return Some(binding);
        }
        None
    }

    /// Makes the lane's count of free slots right after a binding changed; `before` is what was free.
    pub(crate) fn recount(&mut self, index: u32, before: u32) {
        let binding = &mut self.bindings[index as usize];
        let (after, function) = (binding.free(), binding.function);
        let lane = &mut self.lanes[function.0 as usize];
        lane.free_slots = lane.free_slots - before + after;
        if after > 0 && !binding.queued {
            binding.queued = true;
            lane.bindings.push_back(index);
        }
        if after > before {
            self.wake_lane(function);
        }
    }

    /// The connection of a binding's executor, and its number for the function.
    pub(crate) fn executor_of(&self, binding: u32) -> (ConnectionId, u16) {
        let binding = &self.bindings[binding as usize];
        (self.sessions[&binding.executor].connection, binding.index)
    }

    /// Notes who runs a task whose lease is durable; nobody known means an orphan.
    pub(crate) fn hand_to(&mut self, slot: u32, binding: u32) {
        self.tasks[slot].holder = binding;
        let known = self
            .bindings
            .get(binding as usize)
            .and_then(|target| self.sessions.get(&target.executor));
        if known.is_none_or(|session| !session.bindings.contains(&binding)) {
            self.tasks[slot].holder = NIL;
            let mut orphans = self.orphans;
            self.tasks.push_back(&mut orphans, slot);
            self.orphans = orphans;
            self.orphans_end_ns = self
                .orphans_end_ns
                .max(self.now.mono_ns + self.options.lease_ms * 1_000_000);
            return;
        }
        let mut running = self.bindings[binding as usize].running;
        self.tasks.push_back(&mut running, slot);
        self.bindings[binding as usize].running = running;
        self.watch_binding(binding);
    }

    /// Takes a leased task from whoever runs it and frees the slot; its credit is given back by the caller's next step.
    pub(crate) fn leave_executor(&mut self, slot: u32) {
        let binding = core::mem::replace(&mut self.tasks[slot].holder, NIL);
        if binding == NIL {
            let mut orphans = self.orphans;
            self.tasks.unlink(&mut orphans, slot);
            self.orphans = orphans;
        } else {
            let mut running = self.bindings[binding as usize].running;
            self.tasks.unlink(&mut running, slot);
            let target = &mut self.bindings[binding as usize];
            target.running = running;
            let before = target.free();
            target.used -= 1;
            self.recount(binding, before);
        }
        self.give_credit(slot, Signal::Clean, false);
    }

    pub(crate) fn attempt_ends_ns(&self, slot: u32) -> u64 {
        let task = &self.tasks[slot];
        let timeout_ms = self.lanes[task.function.0 as usize].config.timeout_ms;
        (task.at + u64::from(timeout_ms) * 1_000) * 1_000
    }

    /// Sees to it that the first task of a binding is looked at when its time is over.
    pub(crate) fn watch_binding(&mut self, index: u32) {
        let binding = &self.bindings[index as usize];
        if binding.watched || binding.running.head == NIL {
            return;
        }
        let at = self.attempt_ends_ns(binding.running.head);
        self.bindings[index as usize].watched = true;
        self.watch.insert((at, index));
    }

    /// Tells the executor of a task to stop it; nothing where it is not connected, its session's return will tell.
    pub(crate) fn cancel(&mut self, slot: u32, effects: &mut Effects) {
        if let Some(cancel) = self.cancel_of(slot) {
            effects.edge(cancel.connection.edge()).cancels.push(cancel);
        }
    }

    pub(crate) fn cancel_after_flush(&mut self, slot: u32) {
        if let Some(cancel) = self.cancel_of(slot) {
            self.after_flush(cancel.connection).cancels.push(cancel);
        }
    }

    fn cancel_of(&self, slot: u32) -> Option<Cancel> {
        let task = &self.tasks[slot];
        let binding = self.bindings.get(task.holder as usize)?;
        let session = self
            .sessions
            .get(&binding.executor)
            .filter(|session| session.connected)?;
        Some(Cancel {
            connection: session.connection,
            request: self.tasks.request(slot),
            token: task.token(),
            grace_ms: self
                .stop_graces
                .get(&slot)
                .copied()
                .unwrap_or(STOP_GRACE_MS_DEFAULT),
        })
    }
}
