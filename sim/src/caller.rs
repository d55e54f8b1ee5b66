//! Callers and the administrator: what they hand in, ask and wish, what they make of the answers, and how they go on
//! when an answer is lost.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pelton_core::{
    config::{FunctionConfig, OnFailure, TenantConfig, Wish},
    error::Code,
    event::{
        Answer, Control, Durability, Filter, Finished, Query, Reply, Start, SubmitBatch,
        SubmitTask, Target, stow,
    },
    id::{CellId, ConnectionId, RequestId, TenantId, place},
    state::State,
};
use pelton_storage::memory::Random;

use crate::{
    oracle::{Check, Intent, Oracle, broken},
    swarm::Plan,
    world::{Happening, World, first_wishes, function_name, healed, tenant_name, unbounded},
};

/// Rows that a caller asks for at once.
const PAGE_ROWS: u32 = 100;
/// Names that callers give again and again.
const POPULAR_NAMES: u64 = 40;

/// One caller of one tenant. Owned by the world.
#[derive(Debug)]
pub struct Caller {
    tenant: usize,
    connection: Option<ConnectionId>,
    ticket: u64,
    frames: BTreeMap<u64, Sent>,
    questions: BTreeSet<u64>,
    waits: BTreeSet<u64>,
    /// Named tasks whose fate is not known: handed in again.
    again: VecDeque<u32>,
    /// Requests that it was told of.
    known: Vec<RequestId>,
    /// Ends that it was promised to be told of.
    promised: BTreeSet<(u64, u32)>,
    told: BTreeSet<(u64, u32)>,
    stopped: bool,
}

impl Caller {
    /// A caller that has not connected.
    pub fn new(tenant: usize) -> Caller {
        Caller {
            tenant,
            connection: None,
            ticket: 0,
            frames: BTreeMap::new(),
            questions: BTreeSet::new(),
            waits: BTreeSet::new(),
            again: VecDeque::new(),
            known: Vec::new(),
            promised: BTreeSet::new(),
            told: BTreeSet::new(),
            stopped: false,
        }
    }

    /// True if it waits for nothing.
    pub fn idle(&self) -> bool {
        self.frames.is_empty()
            && self.questions.is_empty()
            && self.waits.is_empty()
            && self.again.is_empty()
            && self.promised.is_empty()
    }
}

/// A frame as its caller remembers it: its tasks, and which of them are not answered.
#[derive(Debug)]
struct Sent {
    intents: Vec<u32>,
    open: Vec<bool>,
}

/// Who changes configuration, one wish at a time.
#[derive(Debug, Default)]
pub struct Administrator {
    connection: Option<ConnectionId>,
    ticket: u64,
    wishes: VecDeque<Wish>,
    asking: Option<Wish>,
    due_ns: Option<u64>,
    /// Configurations that were confirmed and not wished otherwise since, by tenant and function.
    pub(crate) confirmed: BTreeMap<(String, String), FunctionConfig>,
}

impl Administrator {
    /// True if nothing is wished for.
    pub fn idle(&self) -> bool {
        self.wishes.is_empty() && self.asking.is_none()
    }
}

/// A frame as the edge that took it remembers it, until the last answer has left the shards.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) intents: Vec<u32>,
    /// Which shard has which task.
    pub(crate) shards: Vec<usize>,
    pub(crate) answered: Vec<bool>,
}

/// A question as its edge remembers it.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) tenant: TenantId,
    pub(crate) shard: usize,
    pub(crate) request: Option<RequestId>,
    pub(crate) wish: bool,
}

/// A function's configuration, drawn.
pub(crate) fn draw_config(plan: &Plan, random: &mut Random) -> FunctionConfig {
    // Often fewer than there are shards.
    let concurrency = if random.one_in(2) {
        1 + random.below(u64::from(plan.shards) * 2) as u32
    } else {
        0
    };
    let backoff_ms_min = 1 + random.below(40) as u32;
    FunctionConfig {
        concurrency,
        retries: random.below(5) as u8,
        backoff_ms_min,
        backoff_ms_max: backoff_ms_min * (1 + random.below(8) as u32),
        max_age_s: if plan.short_ages && random.one_in(2) {
            1 + random.below(8) as u32
        } else {
            86_400
        },
        timeout_ms: if plan.long_timeouts {
            86_400_000
        } else {
            1_000 + random.below(2_000) as u32
        },
        on_failure: if random.one_in(4) {
            OnFailure::Hold
        } else {
            OnFailure::Continue
        },
        paused: random.one_in(12),
    }
}

impl World {
    /// What the tenant is called, and its number.
    fn tenant_of(&self, caller: usize) -> Option<(String, TenantId)> {
        let name = tenant_name(self.callers[caller].tenant);
        let id = self.directory.tenant_id(&name)?;
        Some((name, id))
    }

    pub(crate) fn caller_acts(&mut self, caller: usize) {
        let delay = self.around(self.plan.pause_ns);
        if self.healing && self.callers[caller].again.is_empty() && self.callers[caller].stopped {
            return;
        }
        self.after(delay, Happening::CallerActs { caller });
        if !self.serving() || self.callers[caller].connection.is_none() {
            return;
        }
        let open = self.callers[caller].frames.len() + self.callers[caller].questions.len();
        if open >= self.plan.caller_window {
            return;
        }
        if self.healing {
            self.callers[caller].stopped = true;
            self.submit_again(caller);
            return;
        }
        match self.random.below(10) {
            0..7 => self.submit_new(caller),
            7 => self.submit_again(caller),
            _ => self.question(caller),
        }
    }

    fn submit_again(&mut self, caller: usize) {
        let mut intents = Vec::new();
        for _ in 0..self.plan.frame_tasks.min(8) {
            let Some(number) = self.callers[caller].again.pop_front() else {
                break;
            };
            intents.push(number);
        }
        self.submit(caller, intents);
    }

    fn submit_new(&mut self, caller: usize) {
        let Some((_, tenant)) = self.tenant_of(caller) else {
            return;
        };
        let mut intents = Vec::new();
        for _ in 0..1 + self.random.below(self.plan.frame_tasks) {
            let name = function_name(self.random.below(self.plan.functions as u64) as usize);
            let Some(function) = self.directory.function_id(tenant, &name) else {
                continue;
            };
            let count = self.oracle.intents.len() as u64;
            // Now and then something recent once more, as callers do that do not trust an answer.
            if count > 0 && self.random.one_in(12) {
                let number = count - 1 - self.random.below(count.min(60));
                let earlier = &self.oracle.intents[number as usize];
                if earlier.tenant == tenant
                    && !earlier.task_id.is_empty()
                    && !intents.contains(&(number as u32))
                {
                    intents.push(number as u32);
                    continue;
                }
            }
            let number = count as u32;
            let intent = self.draw_intent(number, tenant, function);
            self.oracle.intend(intent);
            intents.push(number);
        }
        self.handed_in += intents.len();
        self.submit(caller, intents);
        self.provoke();
    }

    fn draw_intent(
        &mut self,
        number: u32,
        tenant: TenantId,
        function: pelton_core::id::FunctionId,
    ) -> Intent {
        let wall_ms = self.wall_ms();
        let plan = &self.plan;
        let r = &mut self.random;
        let task_id = match r.below(10) {
            0..5 => String::new(),
            5..8 => format!("t{number}"),
            _ => format!("p{}", r.below(POPULAR_NAMES)),
        };
        let key = if plan.keys && r.one_in(3) {
            format!("k{}", r.below(6))
        } else {
            String::new()
        };
        let len = if plan.large_one_in > 0 && r.one_in(plan.large_one_in) {
            (60 << 10) + r.below(80 << 10) as usize
        } else {
            match r.below(10) {
                0 => r.below(8) as usize,
                1..8 => 8 + r.below(400) as usize,
                _ => 400 + r.below(4_000) as usize,
            }
        };
        let mut payload: Vec<u8> = number
            .to_le_bytes()
            .into_iter()
            .chain((0..).map(|at: u32| (at.wrapping_mul(number | 1) >> 3) as u8))
            .take(len)
            .collect();
        payload.truncate(len);
        let content_type = if len < 4 || r.one_in(6) {
            format!("n/{number}")
        } else {
            String::new()
        };
        let start = match r.below(if plan.delays { 12 } else { 1 }) {
            0..9 => Start::Now,
            9 => Start::DelayMs(r.below(3_000)),
            10 => Start::DelayMs(r.below(20)),
            _ => Start::AtMs((wall_ms + r.below(4_000)).saturating_sub(500)),
        };
        let tags = if r.one_in(8) {
            vec![3, b'a', b'=', b'b']
        } else {
            Vec::new()
        };
        Intent {
            number,
            tenant,
            function,
            task_id,
            key,
            content_type,
            payload,
            start,
            max_age_s: if plan.short_ages && r.one_in(6) {
                1 + r.below(6) as u32
            } else {
                0
            },
            cost: if r.one_in(5) { r.below(30) as u16 } else { 0 },
            priority: r.below(3) as u8,
            durability: if r.one_in(8) {
                Durability::Memory
            } else {
                Durability::Disk
            },
            tags,
            answered: None,
            unknown: false,
            refused: false,
            flying: 0,
        }
    }

    /// The cell that an edge chooses: a key places its tasks, else a name does; what has neither goes anywhere.
    fn cell_of(&mut self, intent: &Intent, tenant: &str) -> CellId {
        let function = &self.directory.functions()[intent.function.0 as usize].name;
        let by = if intent.key.is_empty() {
            &intent.task_id
        } else {
            &intent.key
        };
        if by.is_empty() {
            CellId(
                self.random
                    .below(u64::from(pelton_core::limits::CELL_COUNT)) as u16,
            )
        } else {
            place(tenant, function, by)
        }
    }

    fn submit(&mut self, caller: usize, intents: Vec<u32>) {
        let (Some((tenant_name, tenant)), Some(connection)) =
            (self.tenant_of(caller), self.callers[caller].connection)
        else {
            return;
        };
        if intents.is_empty() {
            return;
        }
        self.callers[caller].ticket += 1;
        let ticket = self.callers[caller].ticket;
        let notify = self.random.one_in(2);
        let with_result = self.random.one_in(2);
        let mut parts: BTreeMap<usize, Box<SubmitBatch>> = BTreeMap::new();
        let mut shards = Vec::new();
        for (index, &number) in intents.iter().enumerate() {
            let intent = self.oracle.intents[number as usize].clone();
            let cell = self.cell_of(&intent, &tenant_name);
            let shard = self.shard_of(cell);
            shards.push(shard);
            let part = parts.entry(shard).or_insert_with(|| {
                Box::new(SubmitBatch {
                    connection,
                    ticket,
                    tenant,
                    notify,
                    with_result,
                    tasks: Vec::new(),
                    bytes: Vec::new(),
                    done: 0,
                })
            });
            let bytes = &mut part.bytes;
            part.tasks.push(SubmitTask {
                function: intent.function,
                cell,
                index: index as u32,
                start: intent.start,
                max_age_s: intent.max_age_s,
                cost: intent.cost,
                priority: intent.priority,
                durability: intent.durability,
                task_id: stow(bytes, intent.task_id.as_bytes()),
                key: stow(bytes, intent.key.as_bytes()),
                content_type: stow(bytes, intent.content_type.as_bytes()),
                traceparent: stow(bytes, b""),
                tags: stow(bytes, &intent.tags),
                payload: stow(bytes, &intent.payload),
            });
            let intent = &mut self.oracle.intents[number as usize];
            intent.flying += 1;
            intent.refused = false;
        }
        self.trace.event(
            self.now_ns,
            &[20, caller as u64, intents.len() as u64],
            || format!("caller {caller} hands in {intents:?} as {connection:?} {ticket}"),
        );
        let answered = vec![false; intents.len()];
        let open = vec![true; intents.len()];
        self.frames.insert(
            (connection, ticket),
            Frame {
                intents: intents.clone(),
                shards,
                answered,
            },
        );
        self.callers[caller]
            .frames
            .insert(ticket, Sent { intents, open });
        if notify {
            self.notifying.insert((connection, ticket));
        }
        for (shard, part) in parts {
            self.hosts[shard].at_edges.push_back(part);
            self.wake(shard, 3_000);
        }
    }

    pub(crate) fn answers_leave(
        &mut self,
        shard: usize,
        connection: ConnectionId,
        ticket: u64,
        answers: &[Answer],
        poisoned: bool,
    ) -> Check {
        let Some(frame) = self.frames.get_mut(&(connection, ticket)) else {
            return broken(
                "answered_once",
                format!(
                    "shard {shard} answers frame {ticket} of {connection:?}, which has no more tasks"
                ),
            );
        };
        for answer in answers {
            let index = answer.index as usize;
            if std::mem::replace(&mut frame.answered[index], true) {
                return broken(
                    "answered_once",
                    format!("task {index} of frame {ticket} of {connection:?} is answered twice"),
                );
            }
            let number = frame.intents[index];
            self.trace.event(
                self.now_ns,
                &[
                    21,
                    u64::from(number),
                    answer.code as u64,
                    answer.request.0 as u64,
                ],
                || {
                    format!(
                        "shard {shard} answers intent {number}: {} {} duplicate {} durable {}",
                        answer.code, answer.request, answer.duplicate, answer.durable
                    )
                },
            );
            self.oracle.answer_leaves(number, answer, poisoned)?;
        }
        if frame.answered.iter().all(|&answered| answered) {
            self.frames.remove(&(connection, ticket));
        }
        let delay = self.around(100_000);
        self.after(
            delay,
            Happening::Answers {
                connection,
                ticket,
                answers: answers.to_vec(),
            },
        );
        Ok(())
    }

    /// A shard whose log has failed has answered all that it was given, waits included.
    pub(crate) fn check_poisoned(&self, shard: usize) -> Check {
        let host = &self.hosts[shard];
        if !host.at_edges.is_empty() || !host.inbox.control.is_empty() {
            return Ok(());
        }
        let question = self
            .questions
            .iter()
            .find(|(_, question)| question.shard == shard);
        let frame = self.frames.iter().find(|(_, frame)| {
            let mut tasks = frame.shards.iter().zip(&frame.answered);
            tasks.any(|(&of, &answered)| of == shard && !answered)
        });
        match question.map(|found| found.0).or(frame.map(|found| found.0)) {
            Some((connection, ticket)) => broken(
                "a_failed_log_is_told",
                format!(
                    "shard {shard} has failed and leaves {ticket} of {connection:?} without an answer"
                ),
            ),
            None => Ok(()),
        }
    }

    fn caller_of(&self, connection: ConnectionId) -> Option<usize> {
        self.callers
            .iter()
            .position(|caller| caller.connection == Some(connection))
    }

    pub(crate) fn answers_arrive(
        &mut self,
        connection: ConnectionId,
        ticket: u64,
        answers: &[Answer],
    ) -> Check {
        let Some(caller) = self.caller_of(connection) else {
            return Ok(());
        };
        let notify = self.notifying.contains(&(connection, ticket));
        for answer in answers {
            let Some(frame) = self.callers[caller].frames.get_mut(&ticket) else {
                return broken(
                    "answered_once",
                    format!("frame {ticket} is answered too often"),
                );
            };
            let number = frame.intents[answer.index as usize];
            frame.open[answer.index as usize] = false;
            let intent = &mut self.oracle.intents[number as usize];
            intent.flying -= 1;
            let named = !intent.task_id.is_empty();
            match answer.code {
                Code::Ok => {
                    if intent.task_id.is_empty() && !answer.duplicate {
                        intent.answered = Some(answer.request);
                    }
                    intent.unknown = false;
                    let spot = (ticket, answer.index);
                    let target = &mut self.callers[caller];
                    target.known.push(answer.request);
                    if notify && !answer.duplicate && answer.durable && !target.told.contains(&spot)
                    {
                        target.promised.insert(spot);
                    }
                }
                Code::Unavailable => {
                    intent.unknown = true;
                    if named {
                        self.callers[caller].again.push_back(number);
                    }
                }
                Code::ResourceExhausted if named && self.random.one_in(2) => {
                    self.callers[caller].again.push_back(number);
                }
                _ => {
                    let settled =
                        intent.flying == 0 && !intent.unknown && intent.answered.is_none();
                    // A given name may stand for a task that was accepted before.
                    intent.refused = settled && !named;
                }
            }
        }
        let target = &mut self.callers[caller];
        if target.frames[&ticket].open.iter().all(|&open| !open) {
            target.frames.remove(&ticket);
        }
        if self.healing && !target.again.is_empty() {
            self.after(1_000_000, Happening::CallerActs { caller });
        }
        Ok(())
    }

    pub(crate) fn finished_leaves(&mut self, finished: &Finished, bytes: &[u8]) -> Check {
        let connection = finished.connection;
        let Some(&tenant) = self.tenants_of.get(&connection) else {
            return broken(
                "told_to_whom_asked",
                format!("{} is told to {connection:?}", finished.request),
            );
        };
        self.trace.event(
            self.now_ns,
            &[22, finished.request.0 as u64, finished.state as u64],
            || format!("{} is told to be {}", finished.request, finished.state),
        );
        self.oracle.finished_leaves(tenant, finished, bytes)?;
        if finished.index == u32::MAX {
            self.questions.remove(&(connection, finished.ticket));
        }
        let delay = self.around(100_000);
        let finished = *finished;
        self.after(
            delay,
            Happening::Finished {
                connection,
                finished,
            },
        );
        Ok(())
    }

    pub(crate) fn finished_arrives(
        &mut self,
        connection: ConnectionId,
        finished: &Finished,
    ) -> Check {
        let Some(caller) = self.caller_of(connection) else {
            return Ok(());
        };
        let target = &mut self.callers[caller];
        let spot = (finished.ticket, finished.index);
        if !target.told.insert(spot) {
            return broken(
                "told_once",
                format!(
                    "the end of {} is told twice to {connection:?}",
                    finished.request
                ),
            );
        }
        target.promised.remove(&spot);
        if finished.index == u32::MAX {
            target.waits.remove(&finished.ticket);
        }
        Ok(())
    }

    /// Asks about one task or many.
    fn question(&mut self, caller: usize) {
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
                cursor: 0,
                limit: 1 + self.random.below(40) as u32,
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

    fn ask(
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
            if let Reply::Page { cursor, .. } = reply
                && cursor != 0
                && let Some((_, tenant)) = self.tenant_of(caller)
                && self.up
            {
                let filter = Filter {
                    cursor,
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

    pub(crate) fn caller_lost(&mut self, caller: usize) {
        let target = &mut self.callers[caller];
        if target.connection.take().is_none() {
            return;
        }
        target.questions.clear();
        target.waits.clear();
        target.promised.clear();
        target.told.clear();
        for (_, sent) in std::mem::take(&mut target.frames) {
            let open = sent.intents.into_iter().zip(sent.open);
            for number in open.filter(|&(_, open)| open).map(|(number, _)| number) {
                let intent = &mut self.oracle.intents[number as usize];
                intent.flying -= 1;
                intent.unknown = true;
                if !intent.task_id.is_empty() {
                    target.again.push_back(number);
                }
            }
        }
        if self.up {
            let delay = self.around(3_000_000);
            self.after(delay, Happening::CallerBack { caller });
        }
    }

    pub(crate) fn caller_back(&mut self, caller: usize) {
        if !self.up || self.callers[caller].connection.is_some() {
            return;
        }
        let Some((_, tenant)) = self.tenant_of(caller).filter(|_| self.serving()) else {
            self.after(500_000, Happening::CallerBack { caller });
            return;
        };
        let connection = self.connect();
        self.callers[caller].connection = Some(connection);
        self.tenants_of.insert(connection, tenant);
        self.callers[caller].stopped = false;
        if self.healing {
            self.after(1_000_000, Happening::CallerActs { caller });
        }
        // Whoever comes back looks at everything: what had ended is as it was.
        for shard in 0..self.hosts.len() {
            let filter = Filter {
                limit: PAGE_ROWS,
                ..Filter::default()
            };
            self.ask(caller, shard, tenant, None, Query::List { filter });
        }
    }

    /// The tenants and functions that everything else needs.
    pub(crate) fn set_up(&mut self) {
        self.administrator.wishes = first_wishes(&self.plan, &mut self.random);
        self.administer_in(1_000);
    }

    pub(crate) fn administer_in(&mut self, delay_ns: u64) {
        self.administrator.due_ns = Some(self.now_ns + delay_ns);
        self.after(delay_ns, Happening::Administers);
    }

    pub(crate) fn administers(&mut self) {
        if self.administrator.due_ns != Some(self.now_ns) {
            return;
        }
        self.administrator.due_ns = None;
        if !self.up || self.administrator.asking.is_some() {
            return;
        }
        if !self.serving() {
            self.administer_in(300_000);
            return;
        }
        let wish = match self.administrator.wishes.pop_front() {
            Some(wish) => wish,
            None if self.healing || self.handed_in == 0 => return,
            None => self.draw_wish(),
        };
        self.note_wish(&wish);
        let connection = match self.administrator.connection {
            Some(connection) => connection,
            None => {
                let connection = self.connect();
                self.administrator.connection = Some(connection);
                connection
            }
        };
        self.administrator.ticket += 1;
        let ticket = self.administrator.ticket;
        self.administrator.asking = Some(wish.clone());
        self.questions.insert(
            (connection, ticket),
            Question {
                tenant: TenantId(0),
                shard: 0,
                request: None,
                wish: true,
            },
        );
        self.trace.event(self.now_ns, &[25, ticket], || {
            format!("wish {ticket}: {wish:?}")
        });
        self.tell(
            0,
            Control::Configure {
                connection,
                ticket,
                wish,
            },
        );
    }

    fn draw_wish(&mut self) -> Wish {
        let tenant = tenant_name(self.random.below(self.plan.tenants as u64) as usize);
        let name = function_name(self.random.below(self.plan.functions as u64) as usize);
        match self.random.below(10) {
            0 if self.plan.deletions => Wish::RemoveFunction { tenant, name },
            1 | 2 => Wish::SetTenant {
                name: tenant,
                config: TenantConfig {
                    weight: 1 + self.random.below(5) as u16,
                    waiting_max: if self.plan.waiting_bounds && self.random.one_in(2) {
                        5 + self.random.below(100)
                    } else {
                        u64::from(u32::MAX)
                    },
                },
            },
            3 => Wish::EnsureFunction { tenant, name },
            _ => Wish::SetFunction {
                tenant,
                name,
                config: draw_config(&self.plan, &mut self.random),
            },
        }
    }

    fn note_wish(&mut self, wish: &Wish) {
        let (tenant, name, config) = match wish {
            Wish::SetFunction {
                tenant,
                name,
                config,
            } => (tenant, name, Some(*config)),
            Wish::EnsureFunction { tenant, name } => {
                (tenant, name, Some(FunctionConfig::default()))
            }
            Wish::RemoveFunction { tenant, name } => (tenant, name, None),
            Wish::SetTenant { .. } | Wish::EnsureTenant { .. } => return,
        };
        let key = (tenant.clone(), name.clone());
        let wished = self.oracle.wished.entry(key.clone()).or_default();
        match config {
            Some(config) => {
                wished.retries_max = wished.retries_max.max(config.retries);
                wished.max_age_s_min = wished.max_age_s_min.min(config.max_age_s);
            }
            None => wished.removed = true,
        }
        self.administrator.confirmed.remove(&key);
    }

    /// The confirmation of a wish leaves shard 0: every shard must have it by now, and what was confirmed before.
    fn wish_fulfilled(&mut self) -> Check {
        if let Some(Wish::SetFunction {
            tenant,
            name,
            config,
        }) = &self.administrator.asking
        {
            self.administrator
                .confirmed
                .insert((tenant.clone(), name.clone()), *config);
        }
        for (name, config) in &self.administrator.confirmed {
            for (index, host) in self
                .hosts
                .iter()
                .enumerate()
                .filter(|(_, host)| !host.poisoned)
            {
                let found = host.shard.directory();
                let id = found
                    .tenant_id(&name.0)
                    .and_then(|tenant| found.function_id(tenant, &name.1));
                let Some(id) = id else {
                    return broken(
                        "configuration_holds",
                        format!("shard {index}: {name:?} was confirmed and is not there"),
                    );
                };
                let found = found.function(id).map(|function| &function.config);
                Oracle::configuration(index, id, found, config)?;
            }
        }
        Ok(())
    }

    fn wish_answered(&mut self, reply: &Reply) {
        let Some(wish) = self.administrator.asking.take() else {
            return;
        };
        if let Reply::Refused {
            code: Code::Unavailable,
            ..
        } = reply
        {
            self.administrator.wishes.push_front(wish);
            self.administer_in(5_000_000);
            return;
        }
        let delay = if self.administrator.wishes.is_empty() && !self.healing {
            self.around(self.plan.pause_ns * 10)
        } else {
            self.around(100_000)
        };
        self.administer_in(delay);
    }

    pub(crate) fn administrator_lost(&mut self) {
        self.administrator.connection = None;
        if let Some(wish) = self.administrator.asking.take() {
            self.administrator.wishes.push_front(wish);
        }
    }

    pub(crate) fn heal_configuration(&mut self) {
        for tenant in 0..self.plan.tenants {
            self.administrator.wishes.push_back(Wish::SetTenant {
                name: tenant_name(tenant),
                config: unbounded(1),
            });
            for function in 0..self.plan.functions {
                let config = healed(&draw_config(&self.plan, &mut self.random));
                self.administrator.wishes.push_back(Wish::SetFunction {
                    tenant: tenant_name(tenant),
                    name: function_name(function),
                    config,
                });
            }
        }
        if self.administrator.asking.is_none() {
            self.administer_in(100_000);
        }
    }
}
