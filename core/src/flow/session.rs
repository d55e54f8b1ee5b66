//! Executors come, lend slots, present leases after a reconnect, and go.

use alloc::{collections::BTreeMap, vec::Vec};

use crate::{
    error::Code,
    event::{Effects, Reply},
    id::{ConnectionId, FunctionId, RequestId, Token},
    record::{BatchSpace, record_bytes},
    shard::{Binding, Session, Shard},
    state::State,
    table::task::*,
};

/// Tasks that end at once when their executor comes back without them; more end with their timeout.
const STOPPED_AT_ONCE_MAX: usize = 1024;
const STOPPED_ERROR: &str = "the executor came back without the attempt that it was to stop";

impl Shard {
    pub(crate) fn session_opened(&mut self, executor: u64, connection: ConnectionId) {
        let session = self.sessions.entry(executor).or_insert_with(|| Session {
            connection,
            connected: true,
            bindings: Vec::new(),
            overdue: BTreeMap::new(),
            ends_ns: 0,
        });
        session.connection = connection;
        session.connected = true;
        session.ends_ns = 0;
        // Slots count from the edge's next word on; a new connection starts with none.
        for binding in session.bindings.clone() {
            self.lend(binding, 0);
        }
    }

    pub(crate) fn slots_lent(
        &mut self,
        executor: u64,
        function: FunctionId,
        index: u16,
        count: u32,
    ) {
        let known = self
            .lanes
            .get(function.0 as usize)
            .is_some_and(|lane| lane.live);
        if !known
            || !self
                .sessions
                .get(&executor)
                .is_some_and(|session| session.connected)
        {
            return;
        }
        let binding = self.binding_of(executor, function, index);
        self.bindings[binding as usize].index = index;
        self.lend(binding, count);
    }

    fn lend(&mut self, binding: u32, count: u32) {
        let target = &mut self.bindings[binding as usize];
        let before = target.free();
        target.lent = count;
        self.recount(binding, before);
    }

    fn binding_of(&mut self, executor: u64, function: FunctionId, index: u16) -> u32 {
        let session = &self.sessions[&executor];
        let known = session
            .bindings
            .iter()
            .copied()
            .find(|&binding| self.bindings[binding as usize].function == function);
        if let Some(binding) = known {
            return binding;
        }
        let new = Binding {
            executor,
            function,
            index,
            lent: 0,
            used: 0,
            running: List::default(),
            queued: false,
            watched: false,
        };
        let binding = match self.free_bindings.pop() {
            Some(binding) => {
                self.bindings[binding as usize] = new;
                binding
            }
            None => {
                self.bindings.push(new);
                self.bindings.len() as u32 - 1
            }
        };
        self.sessions
            .get_mut(&executor)
            .expect("looked up above")
            .bindings
            .push(binding);
        binding
    }

    /// Bytes that [`Shard::leases_presented`] may append: an end for each task that is being stopped.
    pub(crate) fn room_to_present(&self, executor: u64) -> usize {
        let stopping = self.running_at(executor).filter(|&slot| {
            let task = &self.tasks[slot];
            task.state() == State::Stopping && !task.has(FLAG_BUSY)
        });
        stopping.count().min(STOPPED_AT_ONCE_MAX) * record_bytes(STOPPED_ERROR.len())
    }

    /// The leased tasks of an executor.
    fn running_at(&self, executor: u64) -> impl Iterator<Item = u32> + '_ {
        let bindings = self
            .sessions
            .get(&executor)
            .map(|session| &session.bindings);
        bindings.into_iter().flatten().flat_map(|&binding| {
            let head = self.bindings[binding as usize].running.head;
            core::iter::successors((head != NIL).then_some(head), |&slot| {
                let next = self.tasks[slot].next;
                (next != NIL).then_some(next)
            })
        })
    }

    /// Keeps the leases that the executor holds and frees those that never reached it; a task that was being stopped
    /// and did not reach it has stopped. Where an outcome is on its way to the disk, the answer leaves behind it.
    pub(crate) fn leases_presented(
        &mut self,
        executor: u64,
        connection: ConnectionId,
        ticket: u64,
        leases: &[(RequestId, Token)],
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        if self
            .sessions
            .get(&executor)
            .is_none_or(|session| session.connection != connection)
        {
            return;
        }
        let (mut kept, mut known) = (Vec::new(), Vec::new());
        let mut settling = false;
        let undelivered: Vec<u32> = self.running_at(executor).collect();
        let mut presented: Vec<u32> = Vec::new();
        for &(request, token) in leases {
            let Some(slot) = self.tasks.find(request) else {
                continue;
            };
            let task = self.tasks[slot];
            if task.token() != token {
                continue;
            }
            let leased = matches!(task.state(), State::Running | State::Stopping);
            let ended = leased && task.holder == NIL && !self.is_orphan(slot);
            if ended || self.has_outcome(slot) {
                settling |= ended;
                known.push((request, token));
                continue;
            }
            if !leased {
                continue;
            }
            if task.holder == NIL {
                let mut orphans = self.orphans;
                self.tasks.unlink(&mut orphans, slot);
                self.orphans = orphans;
                let binding = self.binding_of(executor, task.function, u16::MAX);
                let before = self.bindings[binding as usize].free();
                self.bindings[binding as usize].used += 1;
                self.recount(binding, before);
                // Leases start again with a full term.
                self.tasks[slot].at = self.now.mono_us();
                self.hand_to(slot, binding);
            } else if self.bindings[task.holder as usize].executor != executor {
                continue;
            }
            presented.push(slot);
            kept.push((request, token));
            if task.state() == State::Stopping && !task.has(FLAG_BUSY) {
                self.cancel(slot, effects);
            }
        }
        // What timed out is dropped by the executor like everything else that it does not keep: its slots are free.
        let overdue = self
            .sessions
            .get_mut(&executor)
            .map(|session| core::mem::take(&mut session.overdue));
        for binding in overdue.into_iter().flatten().map(|(_, binding)| binding) {
            let before = self.bindings[binding as usize].free();
            self.bindings[binding as usize].used -= 1;
            self.recount(binding, before);
        }
        presented.sort_unstable();
        let mut stopped = 0;
        for slot in undelivered {
            let task = &self.tasks[slot];
            if presented.binary_search(&slot).is_ok() || task.has(FLAG_BUSY) {
                continue;
            }
            if task.state() == State::Running {
                self.release(slot);
            } else if stopped < STOPPED_AT_ONCE_MAX {
                stopped += 1;
                self.leave_executor(slot);
                self.fail_attempt(slot, Code::Unavailable, STOPPED_ERROR, space);
            }
        }
        let behind = match self.sealed.back_mut() {
            _ if !settling => effects,
            Some(last) if self.open.facts.is_empty() => &mut last.edges,
            Some(_) | None => &mut self.open.edges,
        };
        let reply = Reply::Leases { kept, known };
        behind
            .edge(connection.edge())
            .replies
            .push((connection, ticket, reply));
    }

    /// Says which of the leases that an executor names it has lost. What takes too long is being cancelled and not lost:
    /// its outcome is waited for, since it frees the slot. What is on its way to the disk is judged next time.
    pub(crate) fn leases_held(
        &self,
        executor: u64,
        connection: ConnectionId,
        ticket: u64,
        mut leases: Vec<(RequestId, Token)>,
        effects: &mut Effects,
    ) {
        let overdue = self.sessions.get(&executor).map(|session| &session.overdue);
        leases.retain(|lease| {
            let held = self.tasks.find(lease.0).is_some_and(|slot| {
                let task = &self.tasks[slot];
                let holder = self.bindings.get(task.holder as usize);
                matches!(task.state(), State::Running | State::Stopping)
                    && task.token() == lease.1
                    && holder.is_none_or(|holder| holder.executor == executor)
            });
            !held && overdue.is_none_or(|overdue| !overdue.contains_key(lease))
        });
        let reply = Reply::LeasesLost { lost: leases };
        effects
            .edge(connection.edge())
            .replies
            .push((connection, ticket, reply));
    }

    /// True for a leased task whose executor has not shown up since the start.
    fn is_orphan(&self, slot: u32) -> bool {
        let task = &self.tasks[slot];
        task.holder == NIL && (self.orphans.head == slot || task.prev != NIL)
    }

    /// True if the outcome of a task's last attempt is durable. One that was tried again and waits for its turn is in
    /// this not told apart from one that was given back unstarted.
    fn has_outcome(&self, slot: u32) -> bool {
        let task = &self.tasks[slot];
        task.state() == State::Retrying || task.state().terminal() && task.at != 0
    }

    /// The connection is gone; the leases live on for one term.
    pub(crate) fn session_lost(&mut self, executor: u64, connection: ConnectionId) {
        let ends_ns = self.now.mono_ns + self.options.lease_ms * 1_000_000;
        let Some(session) = self
            .sessions
            .get_mut(&executor)
            .filter(|session| session.connection == connection)
        else {
            return;
        };
        session.connected = false;
        session.ends_ns = ends_ns;
        self.graces.insert((ends_ns, executor));
        for binding in session.bindings.clone() {
            self.lend(binding, 0);
        }
    }

    /// The executor said goodbye: what it holds is free now.
    pub(crate) fn session_closed(&mut self, executor: u64, connection: ConnectionId) {
        self.session_lost(executor, connection);
        let Some(session) = self
            .sessions
            .get_mut(&executor)
            .filter(|session| !session.connected)
        else {
            return;
        };
        self.graces.remove(&(session.ends_ns, executor));
        session.ends_ns = self.now.mono_ns;
        self.graces.insert((session.ends_ns, executor));
    }

    /// Forgets an executor that runs nothing.
    pub(crate) fn drop_session(&mut self, executor: u64) {
        let Some(session) = self.sessions.remove(&executor) else {
            return;
        };
        for index in session.bindings {
            let binding = &mut self.bindings[index as usize];
            assert!(
                binding.running.count == 0,
                "its tasks were taken over first"
            );
            // Leases on their way to the disk still name it; they become orphans when they arrive.
            let in_use_later = binding.used
                > session
                    .overdue
                    .values()
                    .filter(|&&overdue| overdue == index)
                    .count() as u32;
            let lane = &mut self.lanes[binding.function.0 as usize];
            lane.bindings.retain(|&other| other != index);
            if binding.watched {
                self.watch.retain(|&(_, other)| other != index);
            }
            if !in_use_later {
                self.free_bindings.push(index);
            }
        }
    }
}
