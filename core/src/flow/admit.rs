//! Admit: a submit is refused with a reason, answered from what is known, or accepted: a slot and a running number are
//! reserved, the record is appended, and where its lane is empty and a slot is free, the lease goes into the same batch.

use core::str;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{
    error::Code,
    event::{
        Answer, AnswerRun, Durability, Effects, Execute, Inbox, Span, Start, SubmitBatch,
        SubmitTask, Urgency, stow,
    },
    id::{FunctionId, RequestId, Token},
    limits::DELAY_MS_MAX,
    planted::{Bug, planted},
    record::{BatchSpace, Schema, TaskRecordV1},
    shard::{Accepted, Fact, Shard, Waiter},
    state::{Event, State},
    table::task::{FLAG_DELAYED, FLAG_MEMORY, FLAG_META, NIL},
};

/// The hash by which two payloads under one `task_id` are told apart: XXH3-64. It is part of the log's format.
fn payload_hash(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}

/// How long a caller should wait before it tries again what a full shard refused.
const RETRY_AFTER_MS: u32 = 100;

/// What is said while history is too far behind.
const HISTORY_LAGS: &str = "the history lacks history_lag_max bytes of ended tasks: wait until it has caught up; `pelton stats` shows how far it is behind";

struct Refusal {
    code: Code,
    what: &'static str,
}

impl Shard {
    pub(crate) fn submits(
        &mut self,
        inbox: &mut Inbox,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        while let Some(mut batch) = inbox.submits.pop_front() {
            self.admit(&mut batch, inbox.disk_has_room, space, effects);
            if batch.done < batch.tasks.len() {
                effects.full = true;
                inbox.submits.push_front(batch);
                return;
            }
        }
    }

    /// Takes tasks of a batch in order until all are dealt with or the open batch has no room.
    fn admit(
        &mut self,
        batch: &mut SubmitBatch,
        disk_has_room: bool,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        let edge = batch.connection.edge();
        let first_pending = self.open.edges.edge(edge).answers.len();
        let first_at_once = effects.edge(edge).answers.len();
        while let Some(task) = batch.tasks.get(batch.done) {
            let variable = variable_bytes(task);
            if !self.has_room(variable, space) {
                break;
            }
            let mut answer = Answer {
                index: task.index,
                code: Code::Ok,
                duplicate: false,
                durable: false,
                retry_after_ms: 0,
                request: RequestId::default(),
                what: "",
            };
            let name = self.name_hash(task, &batch.bytes);
            let mut at_once = true;
            if let Some(refusal) = self.refusal(batch, task, disk_has_room) {
                self.counters.refused += 1;
                (answer.code, answer.what) = (refusal.code, refusal.what);
                answer.retry_after_ms = if refusal.code.retryable() {
                    RETRY_AFTER_MS
                } else {
                    0
                };
            } else if let Some((request, hash, number)) = self.known_name(name) {
                self.counters.duplicates += 1;
                answer.request = request;
                if hash == payload_hash(&batch.bytes[task.payload.range()]) {
                    answer.duplicate = true;
                    answer.durable = true;
                } else {
                    answer.code = Code::IdReused;
                    answer.what =
                        "this task_id was given with another payload; choose another task_id";
                }
                // Where the first one is not durable yet, this answer leaves with it.
                let ahead = number.map_or(0, |number| (self.open_number - number) as usize);
                at_once = number.is_none();
                if ahead > 0 {
                    let at = self.sealed.len() - ahead;
                    let edge = self.sealed[at].edges.edge(edge);
                    let run = AnswerRun {
                        connection: batch.connection,
                        ticket: batch.ticket,
                        first: edge.answers.len() as u32,
                        count: 1,
                    };
                    edge.runs.push(run);
                    edge.answers.push(answer);
                    batch.done += 1;
                    continue;
                }
            } else {
                let Some(request) = self.accept(batch, batch.done, name, variable, space) else {
                    answer.code = Code::ResourceExhausted;
                    answer.what =
                        "the shard's task table is full; try again when tasks have finished";
                    effects.edge(edge).answers.push(answer);
                    batch.done += 1;
                    continue;
                };
                answer.request = request;
                answer.durable = task.durability == Durability::Disk;
                at_once = !answer.durable
                    || planted(Bug::AckBeforeFlush)
                    || cfg!(pelton_planted = "ack_before_device");
            }
            let target = if at_once {
                effects.edge(edge)
            } else {
                self.open.edges.edge(edge)
            };
            target.answers.push(answer);
            batch.done += 1;
        }
        let end = self.open.edges.edge(edge).answers.len();
        self.close_runs(batch, first_pending, end, first_at_once, effects);
    }

    fn close_runs(
        &mut self,
        batch: &SubmitBatch,
        first: usize,
        end: usize,
        first_at_once: usize,
        effects: &mut Effects,
    ) {
        let (connection, ticket) = (batch.connection, batch.ticket);
        let run = |first: usize, end: usize| AnswerRun {
            connection,
            ticket,
            first: first as u32,
            count: (end - first) as u32,
        };
        if end > first {
            self.open
                .edges
                .edge(connection.edge())
                .runs
                .push(run(first, end));
        }
        let edge = effects.edge(connection.edge());
        if edge.answers.len() > first_at_once {
            edge.runs.push(run(first_at_once, edge.answers.len()));
        }
    }

    fn refusal(
        &self,
        batch: &SubmitBatch,
        task: &SubmitTask,
        disk_has_room: bool,
    ) -> Option<Refusal> {
        let refuse = |code, what| Some(Refusal { code, what });
        let Some(lane) = self
            .lanes
            .get(task.function.0 as usize)
            .filter(|lane| lane.live && lane.tenant == batch.tenant)
        else {
            return refuse(
                Code::NotFound,
                "there is no such function; `pelton function set NAME` makes it",
            );
        };
        if task.payload.len > self.options.payload_bytes_max {
            return refuse(
                Code::PayloadTooLarge,
                "the payload exceeds payload_bytes_max; store it elsewhere and send a reference",
            );
        }
        let delay_ms = match task.start {
            Start::Now => 0,
            Start::DelayMs(delay) => delay,
            Start::AtMs(at) => at.saturating_sub(self.now.logged_ms),
        };
        if delay_ms > DELAY_MS_MAX {
            return refuse(
                Code::InvalidArgument,
                "a task can be delayed by 366 days at most",
            );
        }
        if task.max_age_s > crate::limits::MAX_AGE_S_MAX {
            return refuse(Code::InvalidArgument, "max_age_s must be 1 to 604800");
        }
        if task.cost > crate::limits::COST_MAX {
            return refuse(Code::InvalidArgument, "cost must be 1 to 1000");
        }
        if !disk_has_room {
            return refuse(
                Code::ResourceExhausted,
                "the disk is filled to its high-water mark; free space or wait until tasks have finished",
            );
        }
        if self.has_history() && self.unsaved.bytes > self.options.history_lag_max {
            return refuse(Code::ResourceExhausted, HISTORY_LAGS);
        }
        let queue = &self.queues[lane.tenant.0 as usize];
        if queue.waiting >= queue.waiting_max {
            return refuse(
                Code::ResourceExhausted,
                "the tenant's bound of waiting tasks is reached; wait until some have run",
            );
        }
        None
    }

    fn name_hash(&self, task: &SubmitTask, bytes: &[u8]) -> u128 {
        if task.task_id.is_empty() {
            return 0;
        }
        name_hash(
            self.options.seed,
            task.function,
            &bytes[task.key.range()],
            &bytes[task.task_id.range()],
        )
    }

    /// The task that has this name, the hash of its payload, and the batch that it waits in if it is not durable yet.
    fn known_name(&self, name: u128) -> Option<(RequestId, u64, Option<u64>)> {
        if name == 0 {
            return None;
        }
        if let Some(known) = self.names.get(name) {
            return Some((known.request, known.payload_hash, None));
        }
        self.pending_names
            .get(&name)
            .filter(|_| !planted(Bug::DuplicateForgotten))
            .map(|&(request, hash, number)| (request, hash, Some(number)))
    }

    /// Reserves and appends. `None` if the task table is full.
    fn accept(
        &mut self,
        batch: &SubmitBatch,
        at: usize,
        name: u128,
        variable: usize,
        space: &mut BatchSpace<'_>,
    ) -> Option<RequestId> {
        let task = &batch.tasks[at];
        let bytes = &batch.bytes;
        let slot = self.tasks.reserve()?;
        let request = RequestId::new(task.cell, self.now.logged_ms, self.next_seq, slot);
        self.next_seq += 1;
        let due_ms = match task.start {
            Start::Now => 0,
            Start::DelayMs(0) => 0,
            Start::DelayMs(delay) => self.now.logged_ms + delay,
            Start::AtMs(at) => {
                if at <= self.now.logged_ms {
                    0
                } else {
                    at
                }
            }
        };
        let payload = &bytes[task.payload.range()];
        let payload_hash = if name == 0 { 0 } else { payload_hash(payload) };
        let text = |span: Span| str::from_utf8(&bytes[span.range()]).unwrap_or("");
        let record = TaskRecordV1 {
            request: request.0,
            tenant: batch.tenant.0,
            function: task.function.0,
            due_ms,
            payload_hash,
            max_age_s: task.max_age_s,
            cost: task.cost,
            priority: task.priority,
            durability: task.durability as u8,
            task_id: text(task.task_id),
            key: text(task.key),
            content_type: text(task.content_type),
            traceparent: text(task.traceparent),
            tags: &bytes[task.tags.range()],
            payload,
        };
        let placed = space.append(Schema::Task, &record);
        self.large_in_batch |= variable > crate::limits::RECORD_BYTES_LARGE;
        let key = key_hash(self.options.seed, task.function, &bytes[task.key.range()]);
        let meta =
            task.task_id.len + task.key.len + task.content_type.len + task.traceparent.len > 0;
        let waiter = if batch.notify {
            let (connection, ticket) = (batch.connection, batch.ticket);
            self.add_waiter(
                NIL,
                Waiter {
                    connection,
                    ticket,
                    index: task.index,
                    with_result: batch.with_result,
                    next: NIL,
                },
            )
        } else {
            NIL
        };
        let binding = if due_ms == 0 && key == 0 {
            self.binding_at_once(task.function)
        } else {
            None
        };
        let lane = &mut self.lanes[task.function.0 as usize];
        lane.unsettled += u32::from(binding.is_none());
        self.queues[batch.tenant.0 as usize].waiting += u64::from(binding.is_none());
        if name != 0 {
            self.pending_names
                .insert(name, (request, payload_hash, self.open_number));
            self.open.names.push(name);
        }
        self.open.facts.push(Fact::Accepted(Accepted {
            request,
            tenant: batch.tenant,
            function: task.function,
            position: placed.lsn,
            record_bytes: placed.bytes,
            due_ms,
            max_age_s: task.max_age_s,
            cost: task.cost.max(1),
            flags: if meta { FLAG_META } else { 0 }
                | if due_ms > 0 { FLAG_DELAYED } else { 0 }
                | if task.durability == Durability::Memory {
                    FLAG_MEMORY
                } else {
                    0
                },
            name,
            key,
            payload_hash,
            leased: binding.is_some(),
            waiter,
        }));
        self.note(Urgency::Now);
        self.counters.accepted += 1;
        self.open.appended.accepted += 1;
        if let Some(binding) = binding {
            let token = Token {
                generation: 0,
                attempt: 1,
            };
            self.append_lease(request, token, binding, space);
            self.meet(State::Enqueued, Event::Lease);
            self.open.appended.leased_at_once += 1;
            let timeout_ms = self.lanes[task.function.0 as usize].config.timeout_ms;
            let (connection, index) = self.executor_of(binding);
            let edge = self.open.edges.edge(connection.edge());
            let execute = Execute {
                connection,
                request,
                token,
                index,
                timeout_ms,
                task_id: stow(&mut edge.bytes, &bytes[task.task_id.range()]),
                key: Span::default(),
                content_type: stow(&mut edge.bytes, &bytes[task.content_type.range()]),
                traceparent: stow(&mut edge.bytes, &bytes[task.traceparent.range()]),
                payload: stow(&mut edge.bytes, payload),
            };
            edge.executes.push(execute);
        }
        Some(request)
    }

    /// A slot and a credit for a task that would be alone in its lane, taken; `None` if it has to queue.
    fn binding_at_once(&mut self, function: FunctionId) -> Option<u32> {
        let lane = &self.lanes[function.0 as usize];
        if lane.waiting.count + lane.unsettled > 0 || !self.could_start(function) {
            return None;
        }
        if !self.has_share(function) {
            self.want_share(function);
            return None;
        }
        let queue = lane.tenant.0 as usize;
        if !self.queues[queue].pool.take() {
            return None;
        }
        let binding = self
            .use_slot(function)
            .expect("`could_start` has seen a free slot");
        self.take_share(function);
        Some(binding)
    }
}

fn variable_bytes(task: &SubmitTask) -> usize {
    let spans = [
        task.task_id,
        task.key,
        task.content_type,
        task.traceparent,
        task.tags,
        task.payload,
    ];
    // The lease that may follow at once is counted in.
    spans.iter().map(|span| span.len as usize).sum::<usize>() + 256
}

/// The secret hash under which a given name is known; never 0.
pub(crate) fn name_hash(seed: u64, function: FunctionId, key: &[u8], task_id: &[u8]) -> u128 {
    let mut hasher = Xxh3::with_seed(seed);
    hasher.update(&function.0.to_le_bytes());
    hasher.update(key);
    hasher.update(&[0]);
    hasher.update(task_id);
    hasher.digest128().max(1)
}

/// The secret hash under which an ordering key is known; 0 for no key.
pub(crate) fn key_hash(seed: u64, function: FunctionId, key: &[u8]) -> u128 {
    if key.is_empty() {
        return 0;
    }
    let mut hasher = Xxh3::with_seed(seed);
    hasher.update(&function.0.to_le_bytes());
    hasher.update(key);
    hasher.digest128().max(1)
}
