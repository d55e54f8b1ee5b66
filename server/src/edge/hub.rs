//! What the sessions of one edge share: the way to the shards, the table of sessions, and the pump that hands out what
//! shards deliver. Single-threaded; no borrow is held over an `await`.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use pelton_core::{
    error::Code,
    event::{Control, EdgeBatch, OutcomeAck, Query, Reply},
    id::{ConnectionId, RequestId, ShardId, TenantId},
};
use pelton_engine::{
    Edge, Engine,
    inbox::Delivery,
    info::{Info, InfoReply},
    linger::Linger,
};
use pelton_net::{
    execute::{Cancel, ExecuteTask, RefusedOutcome},
    frame::FrameType,
    item::{Full, Item, ItemWriter},
    session::Lease,
    submit::{ANSWER_DUPLICATE, ANSWER_DURABLE, AnswerWriter, Finished, TaskAnswer, TaskStatus},
};
use tokio::sync::{Notify, oneshot};

use crate::{
    edge::{EdgeSettings, session::Session},
    keys::Keys,
};

/// How often idle slots move between shards while executors are busy, and while they are not.
const REBALANCE_BUSY: Duration = Duration::from_millis(10);
const REBALANCE_IDLE: Duration = Duration::from_millis(100);

/// What an asked shard answers.
#[derive(Debug)]
pub(crate) enum Answered {
    Reply(Reply),
    Info(InfoReply),
    /// A task that was waited for is terminal: status, code, attempts, error, result.
    Finished {
        request: RequestId,
        status: TaskStatus,
        code: Code,
        attempts: u16,
        error: String,
        result: Vec<u8>,
    },
}

/// Outcomes of one frame that went to several shards.
struct SplitOutcomes {
    session: Rc<Session>,
    tag: u64,
    waiting: usize,
    refused: Vec<RefusedOutcome>,
    /// Per shard the places in the frame.
    places: HashMap<ShardId, Vec<u16>>,
}

pub(crate) struct Hub {
    pub(crate) edge: Edge,
    pub(crate) keys: Arc<Keys>,
    pub(crate) settings: EdgeSettings,
    /// The engine's identity, told in the welcome.
    pub(crate) server: u64,
    pub(crate) lease_ms: u32,
    pub(crate) sessions: RefCell<HashMap<u64, Rc<Session>>>,
    next_session: Cell<u64>,
    next_ticket: Cell<u64>,
    asked: Questions,
    split: RefCell<HashMap<u64, SplitOutcomes>>,
    pub(crate) closing: Cell<bool>,
    given: Notify,
    /// Rung by shards that deliver and by sessions that read, while the pump sleeps.
    bell: Arc<Notify>,
    /// The pump sleeps.
    asleep: Cell<bool>,
    /// When there was work for this edge last.
    worked: Cell<Instant>,
}

impl Hub {
    pub(crate) fn new(
        edge: Edge,
        bell: Arc<Notify>,
        keys: Arc<Keys>,
        settings: EdgeSettings,
        engine: &Engine,
    ) -> Hub {
        Hub {
            edge,
            keys,
            settings,
            server: engine.identity(),
            lease_ms: engine.options().lease.as_millis() as u32,
            sessions: RefCell::default(),
            next_session: Cell::new(1),
            next_ticket: Cell::new(1),
            asked: Questions::default(),
            split: RefCell::default(),
            closing: Cell::new(false),
            given: Notify::new(),
            bell,
            asleep: Cell::new(false),
            worked: Cell::new(Instant::now()),
        }
    }

    /// A number for a session, never used again by this edge.
    pub(crate) fn next_connection(&self) -> ConnectionId {
        let number = self.next_session.get();
        self.next_session.set(number + 1);
        ConnectionId::new(self.edge.id(), number)
    }

    pub(crate) fn next_ticket(&self) -> u64 {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        ticket
    }

    fn session(&self, connection: ConnectionId) -> Option<Rc<Session>> {
        self.sessions.borrow().get(&connection.number()).cloned()
    }

    /// Hands a message to a shard, waiting while its inbox is full; false if the shard is gone.
    pub(crate) async fn control(&self, shard: ShardId, control: Control) -> bool {
        let mut control = control;
        loop {
            match self.edge.control(shard, control) {
                Ok(()) => {
                    self.wake_shards();
                    return true;
                }
                Err(_) if self.edge.is_gone(shard) => return false,
                Err(back) => control = back,
            }
            self.edge.wake();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Asks a shard and waits for its answer; `None` if the shard is gone.
    pub(crate) async fn ask(
        &self,
        shard: ShardId,
        question: impl FnOnce(u64) -> Control,
    ) -> Option<Answered> {
        self.put(shard, question).await?.answer().await
    }

    /// Asks a shard; its answer may be waited for later. `None` if the shard is gone.
    pub(crate) async fn put(
        &self,
        shard: ShardId,
        question: impl FnOnce(u64) -> Control,
    ) -> Option<Asked> {
        let ticket = self.next_ticket();
        let (sender, answer) = oneshot::channel();
        self.asked.borrow_mut().insert(ticket, sender);
        let asked = Asked {
            answer,
            forget: Forget {
                asked: Rc::clone(&self.asked),
                ticket,
            },
        };
        self.control(shard, question(ticket)).await.then_some(asked)
    }

    /// Asks about tasks.
    pub(crate) async fn query(
        &self,
        connection: ConnectionId,
        tenant: TenantId,
        shard: ShardId,
        query: Query,
    ) -> Option<Answered> {
        self.ask(shard, |ticket| Control::Query {
            connection,
            ticket,
            tenant,
            query,
        })
        .await
    }

    /// Remembers that the outcomes of a frame went to several shards; their acks come back as one.
    pub(crate) fn split_outcomes(
        &self,
        session: &Rc<Session>,
        tag: u64,
        places: HashMap<ShardId, Vec<u16>>,
    ) -> u64 {
        let ticket = self.next_ticket();
        let split = SplitOutcomes {
            session: Rc::clone(session),
            tag,
            waiting: places.len(),
            refused: Vec::new(),
            places,
        };
        self.split.borrow_mut().insert(ticket, split);
        ticket
    }

    /// Shards have been given something: they are woken once every session that has bytes now has had its turn, so that
    /// what arrived together goes into one batch of the log.
    pub(crate) fn wake_shards(&self) {
        self.given.notify_one();
    }

    /// Wakes shards. Whoever asks for it puts this task behind the sessions that are ready already.
    pub(crate) async fn ring(self: Rc<Self>) {
        loop {
            self.given.notified().await;
            self.edge.wake();
        }
    }

    /// A session has read something: the edge has work, and does not sleep yet.
    pub(crate) fn has_heard(&self) {
        self.worked.set(Instant::now());
        if self.asleep.get() {
            self.bell.notify_one();
        }
    }

    /// Hands out deliveries for as long as the edge lives, and keeps the edge awake while more is likely to come soon.
    pub(crate) async fn pump(self: Rc<Self>) {
        let mut linger = Linger::new(self.settings.linger);
        loop {
            while let Some(delivery) = self.edge.take() {
                self.on_delivery(&delivery);
                self.edge.recycle(delivery);
                self.worked.set(Instant::now());
            }
            if linger.goes_on(self.worked.get()) {
                Linger::yield_core();
                // Everything else of this edge has its turn, its socket too.
                tokio::task::yield_now().await;
            } else if self.edge.park() {
                let slept = Instant::now();
                self.asleep.set(true);
                self.bell.notified().await;
                self.asleep.set(false);
                self.edge.unpark();
                linger.slept(slept.elapsed());
            }
        }
    }

    fn on_delivery(&self, delivery: &Delivery) {
        let batch = &delivery.batch;
        self.on_answers(batch);
        self.on_executes(delivery.shard, batch);
        self.on_finished(batch);
        for ack in &batch.acks {
            self.on_ack(delivery.shard, ack);
        }
        for cancel in &batch.cancels {
            if let Some(session) = self.session(cancel.connection) {
                let item = Cancel {
                    lease: Lease {
                        request_id: cancel.request,
                        token: cancel.token,
                    },
                    grace_ms: cancel.grace_ms,
                };
                session.write(|out| write_items(out, FrameType::Cancel, 0, [item].into_iter()));
            }
        }
        for (_, ticket, reply) in &batch.replies {
            self.answer(*ticket, Answered::Reply(reply.clone()));
        }
        for Info { ticket, reply, .. } in &delivery.infos {
            self.answer(*ticket, Answered::Info(reply.clone()));
        }
    }

    fn answer(&self, ticket: u64, answered: Answered) {
        if let Some(sender) = self.asked.borrow_mut().remove(&ticket) {
            // Whoever asked may be gone.
            let _ = sender.send(answered);
        }
    }

    fn on_answers(&self, batch: &EdgeBatch) {
        for run in &batch.runs {
            let Some(session) = self.session(run.connection) else {
                continue;
            };
            let answers = &batch.answers[run.first as usize..][..run.count as usize];
            session.write(|out| {
                let mut writer = AnswerWriter::begin(out, run.ticket);
                for answer in answers {
                    writer.push(&TaskAnswer {
                        index: answer.index as u16,
                        code: answer.code,
                        flags: if answer.durable { ANSWER_DURABLE } else { 0 }
                            | if answer.duplicate {
                                ANSWER_DUPLICATE
                            } else {
                                0
                            },
                        retry_after_ms: answer.retry_after_ms,
                        request_id: answer.request,
                        text: answer.what,
                    });
                }
                writer.finish();
            });
            session.answered(run.count);
        }
    }

    fn on_executes(&self, shard: ShardId, batch: &EdgeBatch) {
        let text = |span: pelton_core::event::Span| {
            std::str::from_utf8(&batch.bytes[span.range()]).unwrap_or_default()
        };
        let given = |name| {
            if str::is_empty(name) {
                None
            } else {
                Some(name)
            }
        };
        let mut rest = &batch.executes[..];
        while let Some(first) = rest.first() {
            let count = rest
                .iter()
                .take_while(|execute| execute.connection == first.connection)
                .count();
            let (group, behind) = rest.split_at(count);
            rest = behind;
            let Some(session) = self.session(first.connection) else {
                // The executor's connection is gone; the lease outlives it and is told of, or runs out.
                continue;
            };
            let items = group.iter().map(|execute| ExecuteTask {
                request_id: execute.request,
                token: execute.token,
                function: execute.index,
                attempts_max: 0,
                timeout_ms: execute.timeout_ms,
                task_id: given(text(execute.task_id)),
                key: given(text(execute.key)),
                content_type: text(execute.content_type),
                traceparent: batch.bytes[execute.traceparent.range()].first_chunk(),
                payload: &batch.bytes[execute.payload.range()],
            });
            session.execute(shard, items);
        }
    }

    fn on_finished(&self, batch: &EdgeBatch) {
        let mut rest = &batch.finished[..];
        while let Some(first) = rest.first() {
            let count = rest
                .iter()
                .take_while(|finished| finished.connection == first.connection)
                .count();
            let (group, behind) = rest.split_at(count);
            rest = behind;
            let session = self.session(first.connection);
            let items = group.iter().filter_map(|finished| {
                let status = TaskStatus::from_number(finished.state as u8)?;
                let error = std::str::from_utf8(&batch.bytes[finished.error.range()]);
                let result = &batch.bytes[finished.result.range()];
                if finished.index == u32::MAX {
                    // Somebody asked for this one task.
                    let answered = Answered::Finished {
                        request: finished.request,
                        status,
                        code: finished.code,
                        attempts: finished.attempts,
                        error: error.unwrap_or_default().to_owned(),
                        result: result.to_vec(),
                    };
                    self.answer(finished.ticket, answered);
                    return None;
                }
                Some(Finished {
                    tag: finished.ticket,
                    index: finished.index,
                    request_id: finished.request,
                    status,
                    code: finished.code,
                    attempts: finished.attempts,
                    error: error.unwrap_or_default(),
                    result: finished.with_result.then_some(result),
                })
            });
            match session {
                Some(session) => {
                    session.write(|out| write_items(out, FrameType::Finished, 0, items));
                }
                None => items.for_each(drop),
            }
        }
    }

    fn on_ack(&self, shard: ShardId, ack: &OutcomeAck) {
        if self.edge.shard_count() == 1 {
            if let Some(session) = self.session(ack.connection) {
                let refused = ack.refused.iter().map(|&(index, code)| RefusedOutcome {
                    index: index as u16,
                    code,
                });
                session.write(|out| write_items(out, FrameType::OutcomeAck, ack.ticket, refused));
            }
            return;
        }
        let mut splits = self.split.borrow_mut();
        let Some(split) = splits.get_mut(&ack.ticket) else {
            return;
        };
        if let Some(places) = split.places.get(&shard) {
            let refused = ack.refused.iter().map(|&(index, code)| RefusedOutcome {
                index: places[index as usize],
                code,
            });
            split.refused.extend(refused);
        }
        split.waiting -= 1;
        if split.waiting == 0 {
            let split = splits.remove(&ack.ticket).expect("looked up above");
            split.session.write(|out| {
                write_items(
                    out,
                    FrameType::OutcomeAck,
                    split.tag,
                    split.refused.into_iter(),
                );
            });
        }
    }

    /// Moves idle slots between shards, and ends sessions of executors that have fallen silent.
    pub(crate) async fn mind(self: Rc<Self>) {
        let shards = self.edge.shard_count();
        let mut looked = Instant::now();
        let mut pause = REBALANCE_IDLE;
        loop {
            tokio::time::sleep(if shards > 1 {
                pause
            } else {
                Duration::from_secs(1)
            })
            .await;
            let sessions: Vec<_> = self.sessions.borrow().values().cloned().collect();
            pause = REBALANCE_IDLE;
            if shards > 1 {
                for session in sessions.iter().filter(|session| session.executor.is_some()) {
                    if session.rebalance(&self).await {
                        pause = REBALANCE_BUSY;
                    }
                }
            }
            if looked.elapsed() >= Duration::from_secs(1) {
                looked = Instant::now();
                for session in &sessions {
                    session.end_if_silent(Duration::from_millis(u64::from(self.lease_ms)));
                }
            }
        }
    }

    /// Takes no more, waits until what is in flight is answered or `grace` is over, and tells everybody.
    pub(crate) async fn say_goodbye(&self, grace: Duration) {
        self.closing.set(true);
        let end = Instant::now() + grace;
        let sessions: Vec<_> = self.sessions.borrow().values().cloned().collect();
        for session in &sessions {
            session.write(pelton_net::session::encode_goodbye);
        }
        while Instant::now() < end && sessions.iter().any(|session| session.has_work()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // What was written last leaves with the next turn of the writers.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Who waits for the answer to which question.
type Questions = Rc<RefCell<HashMap<u64, oneshot::Sender<Answered>>>>;

/// A question that a shard has been asked.
pub(crate) struct Asked {
    answer: oneshot::Receiver<Answered>,
    forget: Forget,
}

impl Asked {
    /// Waits for the answer; `None` if there will be none.
    pub(crate) async fn answer(self) -> Option<Answered> {
        let Asked { answer, forget } = self;
        let answered = answer.await.ok();
        drop(forget);
        answered
    }
}

/// Forgets a question when nobody waits for its answer any more.
struct Forget {
    asked: Questions,
    ticket: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.asked.borrow_mut().remove(&self.ticket);
    }
}

/// Writes items into as many frames as they need; a frame without items is written too, if there are none.
pub(crate) fn write_items<'a, T: Item<'a>>(
    out: &mut BytesMut,
    kind: FrameType,
    tag: u64,
    items: impl Iterator<Item = T>,
) {
    let mut items = items.peekable();
    if kind == FrameType::Finished && items.peek().is_none() {
        return;
    }
    loop {
        let mut writer = ItemWriter::begin(out, kind, tag);
        while let Some(item) = items.peek() {
            match writer.push(item) {
                Ok(()) => {
                    items.next();
                }
                Err(Full) => break,
            }
        }
        writer.finish();
        if items.peek().is_none() {
            return;
        }
    }
}
