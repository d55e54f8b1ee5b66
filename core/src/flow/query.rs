//! Control: everything that is not a submit, in the order in which it came; and the questions that callers ask.

use alloc::{boxed::Box, vec::Vec};

use crate::{
    error::Code,
    event::{Control, Effects, Filter, Inbox, Query, Reply, Target, TaskView},
    flow::admit::name_hash,
    id::{ConnectionId, Lsn, TenantId},
    limits::{STOP_GRACE, STOP_GRACE_MS_DEFAULT, STOP_GRACE_MS_MAX},
    planted::{Bug, planted},
    record::{BatchSpace, record_bytes},
    refuse,
    shard::{Shard, Waiter},
    state::{Event, State},
    table::task::*,
};

/// Callers that may wait for one task.
const WAITERS_PER_TASK: usize = 64;
/// Rows of one page, and slots looked at for them in one step.
const PAGE_ROWS_MAX: u32 = 1_000;
const PAGE_SLOTS_MAX: u32 = 16_384;

impl Shard {
    pub(crate) fn control(
        &mut self,
        inbox: &mut Inbox,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        for _ in 0..self.deferred.len() {
            let Some(control) = self.deferred.pop_front() else {
                break;
            };
            if let Some(control) = self.take(control, space, effects) {
                self.deferred.push_back(control);
            }
        }
        while let Some(control) = inbox.control.pop_front() {
            if let Some(control) = self.take(control, space, effects) {
                effects.full = true;
                inbox.control.push_front(control);
                return;
            }
        }
    }

    /// Deals with one; what finds no room comes back.
    fn take(
        &mut self,
        control: Control,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) -> Option<Control> {
        match control {
            Control::Outcomes(mut batch) => {
                if !self.complete(&mut batch, space) {
                    return Some(Control::Outcomes(batch));
                }
            }
            Control::SessionOpened {
                executor,
                connection,
            } => self.session_opened(executor, connection),
            Control::SlotsLent {
                executor,
                function,
                index,
                count,
            } => self.slots_lent(executor, function, index, count),
            Control::LeasesPresented {
                executor,
                connection,
                ticket,
                leases,
            } => {
                if space.room() < self.room_to_present(executor) {
                    return Some(Control::LeasesPresented {
                        executor,
                        connection,
                        ticket,
                        leases,
                    });
                }
                self.leases_presented(executor, connection, ticket, &leases, space, effects);
            }
            Control::LeasesHeld {
                executor,
                connection,
                ticket,
                leases,
            } => self.leases_held(executor, connection, ticket, leases, effects),
            Control::SessionLost {
                executor,
                connection,
            } => self.session_lost(executor, connection),
            Control::SessionClosed {
                executor,
                connection,
            } => self.session_closed(executor, connection),
            Control::Query {
                connection,
                ticket,
                tenant,
                query,
            } => {
                if space.room() < record_bytes(0) {
                    return Some(Control::Query {
                        connection,
                        ticket,
                        tenant,
                        query,
                    });
                }
                self.query(connection, ticket, tenant, query, space, effects);
            }
            Control::Configure {
                connection,
                ticket,
                wish,
            } => self.wishes.push_back((connection, ticket, wish)),
            Control::Apply { version, change } => {
                return self.append_change(version, change, space);
            }
            Control::Applied { version, .. } => self.change_reported(version),
            Control::Credits { from, words } => self.hear_credits(from, &words),
        }
        None
    }

    fn query(
        &mut self,
        connection: ConnectionId,
        ticket: u64,
        tenant: TenantId,
        query: Query,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        let not_found = Reply::Refused {
            code: Code::NotFound,
            what: "there is no such task, or it is no longer kept",
        };
        let reply = match query {
            Query::Stats => Reply::Stats {
                counters: Box::new(self.counters()),
            },
            Query::List { filter } => self.list(tenant, &filter),
            Query::Get { target } => match self.locate(tenant, &target) {
                Some(slot) => Reply::Task {
                    view: self.view(slot),
                },
                None => not_found,
            },
            Query::Wait { target } => match self.locate(tenant, &target) {
                Some(slot) if self.tasks[slot].state().terminal() => Reply::Task {
                    view: self.view(slot),
                },
                Some(slot) => match self.wait(slot, connection, ticket) {
                    Some(refused) => refused,
                    None => return,
                },
                None => not_found,
            },
            Query::Stop { grace_ms, .. } if grace_ms > STOP_GRACE_MS_MAX => Reply::Refused {
                code: Code::InvalidArgument,
                what: STOP_GRACE,
            },
            Query::Stop { target, grace_ms } => match self.locate(tenant, &target) {
                Some(slot) if self.tasks[slot].has(FLAG_BUSY) => {
                    // What is on its way to the disk decides; asked again when it is there.
                    self.deferred.push_back(Control::Query {
                        connection,
                        ticket,
                        tenant,
                        query: Query::Stop { target, grace_ms },
                    });
                    return;
                }
                Some(slot) => match self.tasks[slot].state().on(Event::Stop) {
                    Some(state) => {
                        if state == State::Stopping && grace_ms != STOP_GRACE_MS_DEFAULT {
                            self.stop_graces.insert(slot, grace_ms);
                        }
                        self.append_move(slot, state, space);
                        self.after_flush(connection).replies.push((
                            connection,
                            ticket,
                            Reply::Done { state: Some(state) },
                        ));
                        return;
                    }
                    None => Reply::Refused {
                        code: Code::FailedPrecondition,
                        what: "the task has ended or is being stopped",
                    },
                },
                None => not_found,
            },
        };
        effects
            .edge(connection.edge())
            .replies
            .push((connection, ticket, reply));
    }

    fn wait(&mut self, slot: u32, connection: ConnectionId, ticket: u64) -> Option<Reply> {
        let mut count = 0;
        let mut at = self.tasks[slot].waiter;
        while at != NIL {
            count += 1;
            at = self.waiters[at].next;
        }
        if count >= WAITERS_PER_TASK {
            return Some(Reply::Refused {
                code: Code::ResourceExhausted,
                what: "64 callers wait for this task already",
            });
        }
        let first = self.tasks[slot].waiter;
        let waiter = Waiter {
            connection,
            ticket,
            index: u32::MAX,
            with_result: true,
            next: NIL,
        };
        self.tasks[slot].waiter = self.add_waiter(first, waiter);
        None
    }

    /// The task that a caller names, if it is the caller's.
    fn locate(&self, tenant: TenantId, target: &Target) -> Option<u32> {
        let request = match target {
            Target::Request(request) => *request,
            Target::Given {
                function,
                key,
                task_id,
            } => {
                self.names
                    .get(name_hash(
                        self.options.seed,
                        *function,
                        key.as_bytes(),
                        task_id.as_bytes(),
                    ))?
                    .request
            }
        };
        self.tasks
            .find(request)
            .filter(|&slot| self.tenant_of(slot) == tenant || planted(Bug::OtherTenantShown))
    }

    fn view(&self, slot: u32) -> TaskView {
        let task = &self.tasks[slot];
        let state = task.state();
        let binding = match state {
            State::Running | State::Stopping => self.bindings.get(task.holder as usize),
            State::Scheduled
            | State::Enqueued
            | State::Dequeued
            | State::Retrying
            | State::Paused
            | State::Succeeded
            | State::Failed
            | State::Stopped
            | State::Expired
            | State::Invalid => None,
        };
        TaskView {
            request: task.request(slot),
            function: task.function,
            state,
            token: task.token(),
            retries: task.retries(),
            due_ms: if matches!(state, State::Scheduled | State::Retrying) {
                task.at
            } else {
                0
            },
            executor: binding.map_or(0, |binding| binding.executor),
            record: (task.position, task.record_bytes()),
            outcome: if state.terminal() {
                Lsn(task.at)
            } else {
                Lsn(0)
            },
        }
    }

    fn list(&self, tenant: TenantId, filter: &Filter) -> Reply {
        let limit = filter.limit.clamp(1, PAGE_ROWS_MAX) as usize;
        let mut views = Vec::new();
        let mut slot = filter.cursor;
        let end = slot.saturating_add(PAGE_SLOTS_MAX).min(self.tasks.used());
        while slot < end && views.len() < limit {
            if let Some(task) = self.tasks.get(slot) {
                let wanted = self.tenant_of(slot) == tenant
                    && filter.state.is_none_or(|state| state == task.state())
                    && filter
                        .function
                        .is_none_or(|function| function == task.function);
                if wanted {
                    views.push(self.view(slot));
                }
            }
            slot += 1;
        }
        Reply::Page {
            views,
            cursor: if slot < self.tasks.used() { slot } else { 0 },
        }
    }

    /// The log has failed: questions and wishes that were taken and not answered are refused, waits included. A wish may
    /// be carried out nevertheless: its record may have reached the disk.
    pub(crate) fn refuse_who_waits(&mut self, effects: &mut Effects) {
        let mut deferred = Inbox {
            control: core::mem::take(&mut self.deferred),
            ..Inbox::default()
        };
        self.refuse_everything(&mut deferred, effects);
        let mut waiting: Vec<(ConnectionId, u64, &str)> = Vec::new();
        let carried = self.carried.take();
        let wish = refuse::FAILED.configuration;
        waiting.extend(carried.map(|carried| (carried.connection, carried.ticket, wish)));
        let wishes = self.wishes.drain(..);
        waiting.extend(wishes.map(|(connection, ticket, _)| (connection, ticket, wish)));
        for slot in 0..self.tasks.used() {
            let mut at = self.tasks.get(slot).map_or(NIL, |task| task.waiter);
            while at != NIL {
                let waiter = self.waiters[at];
                if waiter.index == u32::MAX {
                    waiting.push((waiter.connection, waiter.ticket, refuse::FAILED.tasks));
                }
                at = waiter.next;
            }
        }
        for (connection, ticket, what) in waiting {
            let reply = Reply::Refused {
                code: Code::Unavailable,
                what,
            };
            effects
                .edge(connection.edge())
                .replies
                .push((connection, ticket, reply));
        }
    }

    /// A shard whose log has failed answers everything with the reason.
    pub(crate) fn refuse_everything(&mut self, inbox: &mut Inbox, effects: &mut Effects) {
        let counters = || self.counters();
        refuse::everything(self.options.shard, refuse::FAILED, inbox, counters, effects);
    }
}
