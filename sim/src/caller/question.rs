//! Questions: get, list, wait and stop. Each is answered once; what is shown is on the disk and of the asking tenant, a
//! stop is told when it is durable, and what is somebody else's is not found.

use pelton_core::{
    event::{Control, Filter, Query, Reply, Target},
    id::{ConnectionId, RequestId, TenantId},
    state::State,
};

use super::{PAGE_ROWS, Question};
use crate::{
    oracle::{Check, broken},
    world::{Happening, World},
};

impl World {
    /// Asks about one task or many.
    pub(crate) fn question(&mut self, caller: usize) {
        let Some((_, tenant)) = self.tenant_of(caller) else {
            return;
        };
        // Mostly one's own; now and then somebody else's, which must not be found.
        let of = if self.random.one_in(8) {
            self.random.below(self.callers.len() as u64) as usize
        } else {
            caller
        };
        let known = self.callers[of].known.len() as u64;
        let kind = self.random.below(10);
        if known == 0 || kind == 0 {
            let filter = Filter {
                state: (self.random.one_in(2)).then(|| State::ALL[self.random.below(12) as usize]),
                function: None,
                limit: 1 + self.random.below(40) as u32,
                ..Filter::default()
            };
            let shard = self.random.below(u64::from(self.plan.shards)) as usize;
            self.ask(caller, shard, tenant, None, Query::List { filter });
            return;
        }
        let recent = known - 1 - self.random.below(known.min(40));
        let request = self.callers[of].known[recent as usize];
        let mut target = Target::Request(request);
        if let Some(task) = self.oracle.tasks.get(&request)
            && self.random.one_in(3)
        {
            let intent = &self.oracle.intents[task.intent as usize];
            if !intent.task_id.is_empty() {
                target = Target::Given {
                    function: intent.function,
                    key: intent.key.clone(),
                    task_id: intent.task_id.clone(),
                };
            }
        }
        let asked = matches!(target, Target::Request(_)).then_some(request);
        let query = match kind {
            1..5 => Query::Get { target },
            5..8 => Query::Wait { target },
            _ => Query::Stop {
                target,
                grace_ms: 1_000 * (kind as u32 % 8),
            },
        };
        let shard = self.shard_of(request.cell());
        self.ask(caller, shard, tenant, asked, query);
    }

    pub(crate) fn ask(
        &mut self,
        caller: usize,
        shard: usize,
        tenant: TenantId,
        request: Option<RequestId>,
        query: Query,
    ) {
        let Some(connection) = self.callers[caller].connection else {
            return;
        };
        self.callers[caller].ticket += 1;
        let ticket = self.callers[caller].ticket;
        if matches!(query, Query::Wait { .. }) {
            self.callers[caller].waits.insert(ticket);
        } else {
            self.callers[caller].questions.insert(ticket);
        }
        let wish = false;
        self.questions.insert(
            (connection, ticket),
            Question {
                tenant,
                shard,
                request,
                wish,
            },
        );
        self.trace
            .event(self.now_ns, &[23, caller as u64, ticket], || {
                format!("caller {caller} asks {query:?} as {ticket}")
            });
        self.tell(
            shard,
            Control::Query {
                connection,
                ticket,
                tenant,
                query,
            },
        );
    }

    pub(crate) fn reply_leaves(
        &mut self,
        shard: usize,
        connection: ConnectionId,
        ticket: u64,
        reply: Reply,
        poisoned: bool,
    ) -> Check {
        self.trace.event(
            self.now_ns,
            &[24, shard as u64, connection.0, ticket],
            || format!("shard {shard} replies to {connection:?} {ticket}: {reply:?}"),
        );
        if let Some(question) = self.questions.remove(&(connection, ticket)) {
            self.oracle
                .reply_leaves(question.tenant, question.request, &reply, poisoned)?;
            if let Reply::NotHeld { request } = &reply {
                let owner = request.and_then(|request| self.oracle.tasks.get(&request));
                if owner.is_some_and(|known| known.tenant == question.tenant) {
                    self.check_not_held(shard, *request)?;
                }
            }
            if question.wish && matches!(reply, Reply::Done { .. }) {
                self.wish_fulfilled()?;
            }
        } else if !self.presentations.remove(&(connection, ticket, shard)) {
            return broken(
                "answered_once",
                format!("question {ticket} of {connection:?} is answered and was not asked"),
            );
        }
        let delay = self.around(100_000);
        self.after(
            delay,
            Happening::Reply {
                connection,
                ticket,
                shard,
                reply,
            },
        );
        Ok(())
    }

    pub(crate) fn reply_arrives(
        &mut self,
        connection: ConnectionId,
        ticket: u64,
        shard: usize,
        reply: Reply,
    ) -> Check {
        if self.administrator.connection == Some(connection) {
            self.wish_answered(&reply);
            return Ok(());
        }
        if let Some(caller) = self.caller_of(connection) {
            let target = &mut self.callers[caller];
            target.questions.remove(&ticket);
            target.waits.remove(&ticket);
            if let Reply::Page { pages, .. } = reply
                && pages != 0
                && let Some((_, tenant)) = self.tenant_of(caller)
                && self.up
            {
                let filter = Filter {
                    pages,
                    limit: PAGE_ROWS,
                    ..Filter::default()
                };
                self.ask(caller, shard, tenant, None, Query::List { filter });
            }
            return Ok(());
        }
        self.leases_answered(connection, shard, reply);
        Ok(())
    }
}
