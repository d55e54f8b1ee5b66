//! The executor's side of a session: what it offers, what it is handed, how attempts ended, and what it still holds
//! after a reconnect.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    rc::Rc,
};

use bytes::BytesMut;
use pelton_core::{
    config::Wish,
    error::Code,
    event::{Control, Outcome, OutcomeBatch, Reply, Span, Verdict, stow},
    id::{FunctionId, RequestId, ShardId, Token},
};
use pelton_engine::slots::Lender;
use pelton_net::{
    error::ProtocolError,
    execute::{ExecuteTask, OutcomeStatus, Register, Registered, ResumedLease, TaskOutcome},
    frame::{Frame, FrameType, LEASES_PER_FRAME_MAX, REGISTER_FUNCTIONS_MAX},
    item::Items,
    session::{ErrorFrame, Lease},
};

use crate::edge::{
    hub::{Answered, Asked, Hub, write_items},
    session::Session,
};

/// Functions of one executor.
const FUNCTIONS_MAX: usize = 16 * REGISTER_FUNCTIONS_MAX;
/// Slots of one function of one executor.
const SLOTS_MAX: u32 = 1 << 20;
/// Bytes on their way to one executor beyond which it is lent no slots.
const WAITING_BYTES_MAX: usize = 4 << 20;

/// What an executor offers, and what it was handed.
#[derive(Default)]
pub(crate) struct Executing {
    functions: RefCell<Vec<Option<Offered>>>,
    /// Where the attempts that it runs came from; kept only where there are several shards.
    attempts: RefCell<HashMap<Lease, (u16, ShardId)>>,
    /// Tasks that came for a slot that had just been lent elsewhere.
    held: RefCell<VecDeque<(u16, BytesMut)>>,
    /// Leases of resume frames that were full, so that more follow: the frames' tags and what they hold.
    presented: RefCell<Vec<(u64, Leases)>>,
    /// Its connection cannot take what it is sent: no slots are lent until it has.
    pub(crate) choked: std::cell::Cell<bool>,
}

type Leases = Vec<(RequestId, Token)>;

struct Offered {
    function: FunctionId,
    lender: Lender,
    /// Tasks that the executor has.
    running: u32,
}

impl Session {
    /// Makes the functions known that are not, and lends the slots.
    pub(crate) async fn on_register(
        self: &Rc<Self>,
        hub: &Hub,
        frame: &Frame,
    ) -> Result<(), ProtocolError> {
        let register = Register::parse(frame)?;
        let Some(executor) = self.executor else {
            self.write(|out| {
                ErrorFrame::new(
                    Code::FailedPrecondition,
                    "only a session whose hello has an executor identity may register functions",
                )
                .encode(out, frame.tag);
            });
            return Ok(());
        };
        let first_index = self.executing.functions.borrow().len();
        let mut codes = Vec::new();
        for offer in &register.offers {
            let (code, offered) = self.offer(hub, offer.function, offer.slots).await;
            let index = {
                let mut functions = self.executing.functions.borrow_mut();
                if functions.len() >= FUNCTIONS_MAX {
                    codes.push(Code::ResourceExhausted);
                    continue;
                }
                functions.push(offered);
                functions.len() - 1
            };
            codes.push(code);
            self.lend(hub, executor, index).await;
        }
        self.write(|out| {
            Registered {
                first_index: first_index as u16,
                codes,
            }
            .encode(out, frame.tag);
        });
        Ok(())
    }

    async fn offer(&self, hub: &Hub, name: &str, slots: u32) -> (Code, Option<Offered>) {
        if slots == 0 || slots > SLOTS_MAX {
            return (Code::InvalidArgument, None);
        }
        let find = || {
            hub.edge.with_routes(|routes| {
                let tenant = routes.tenant(&self.tenant)?;
                Some(routes.function(tenant, name)?.0)
            })
        };
        let mut known = find();
        if known.is_none() {
            let wish = Wish::EnsureFunction {
                tenant: self.tenant.clone(),
                name: name.to_owned(),
            };
            match self.configure(hub, wish).await {
                Ok(()) => known = find(),
                Err((code, _)) => return (code, None),
            }
        }
        match known {
            Some(function) => (
                Code::Ok,
                Some(Offered {
                    function,
                    lender: Lender::new(slots, hub.edge.served()),
                    running: 0,
                }),
            ),
            // It was removed in the same moment.
            None => (Code::NotFound, None),
        }
    }

    /// Has shard 0 carry out a wish.
    pub(crate) async fn configure(
        &self,
        hub: &Hub,
        wish: Wish,
    ) -> Result<(), (Code, &'static str)> {
        let connection = self.id;
        let answered = hub
            .ask(ShardId(0), |ticket| Control::Configure {
                connection,
                ticket,
                wish,
            })
            .await;
        match answered {
            Some(Answered::Reply(Reply::Done { .. })) => Ok(()),
            Some(Answered::Reply(Reply::Refused { code, what })) => Err((code, what)),
            Some(_) | None => Err((
                Code::Unavailable,
                "shard 0 does not answer: configuration is read-only until a restart",
            )),
        }
    }

    /// Tells shards how many slots of a function they have.
    async fn lend(&self, hub: &Hub, executor: u64, index: usize) {
        let (function, changes) = {
            let mut functions = self.executing.functions.borrow_mut();
            let Some(offered) = &mut functions[index] else {
                return;
            };
            (offered.function, offered.lender.changes())
        };
        for (shard, count) in changes {
            let control = Control::SlotsLent {
                executor,
                function,
                index: index as u16,
                count,
            };
            hub.control(shard, control).await;
        }
    }

    /// Moves idle slots to busy shards; true if the executor is at work.
    pub(crate) async fn rebalance(&self, hub: &Hub) -> bool {
        let Some(executor) = self.executor else {
            return false;
        };
        let count = self.executing.functions.borrow().len();
        let mut busy = false;
        for index in 0..count {
            let changed = match &mut self.executing.functions.borrow_mut()[index] {
                Some(offered) => {
                    busy |= offered.lender.busy() > 0;
                    !self.takes_none() && offered.lender.rebalance()
                }
                None => false,
            };
            if changed {
                self.lend(hub, executor, index).await;
            }
        }
        busy
    }

    /// Stops lending while the executor's connection cannot take what it is sent, and lends again when it has.
    pub(crate) async fn lend_by_backlog(&self, hub: &Hub, waiting_bytes: usize) {
        let Some(executor) = self.executor.filter(|_| !self.is_leaving()) else {
            return;
        };
        let choked = self.executing.choked.get();
        let now = waiting_bytes > if choked { 0 } else { WAITING_BYTES_MAX };
        if now == choked || self.left.get() {
            return;
        }
        self.executing.choked.set(now);
        let count = self.executing.functions.borrow().len();
        for index in 0..count {
            if let Some(offered) = &mut self.executing.functions.borrow_mut()[index] {
                let slots = offered.lender.slots();
                if now {
                    offered.lender.hold();
                } else {
                    offered.lender.resize(slots);
                }
            }
            self.lend(hub, executor, index).await;
        }
    }

    /// Lends no slots any more: the executor is leaving.
    pub(crate) async fn lend_nothing(&self, hub: &Hub) {
        let Some(executor) = self.executor else {
            return;
        };
        let count = self.executing.functions.borrow().len();
        for index in 0..count {
            if let Some(offered) = &mut self.executing.functions.borrow_mut()[index] {
                offered.lender.hold();
            }
            self.lend(hub, executor, index).await;
        }
    }

    /// True while no slots are to be lent.
    fn takes_none(&self) -> bool {
        self.left.get() || self.executing.choked.get()
    }

    /// Sends tasks to the executor; their leases are durable.
    pub(crate) fn execute<'a>(&self, shard: ShardId, items: impl Iterator<Item = ExecuteTask<'a>>) {
        if !self.several_shards {
            self.write(|out| write_items(out, FrameType::Execute, 0, items));
            return;
        }
        let mut functions = self.executing.functions.borrow_mut();
        let mut attempts = self.executing.attempts.borrow_mut();
        let mut ready = Vec::new();
        for item in items {
            let lease = Lease {
                request_id: item.request_id,
                token: item.token,
            };
            attempts.insert(lease, (item.function, shard));
            let offered = functions.get_mut(usize::from(item.function));
            if let Some(Some(offered)) = offered {
                offered.lender.on_execute(shard);
                if offered.running >= offered.lender.slots() {
                    let mut frame = BytesMut::new();
                    write_items(&mut frame, FrameType::Execute, 0, [item].into_iter());
                    let mut held = self.executing.held.borrow_mut();
                    held.push_back((item.function, frame));
                    continue;
                }
                offered.running += 1;
            }
            ready.push(item);
        }
        if !ready.is_empty() {
            self.write(|out| write_items(out, FrameType::Execute, 0, ready.into_iter()));
        }
    }

    /// An attempt has ended: its slot is free for a held task, or for its shard.
    fn ended(&self, lease: &Lease) {
        let Some((index, shard)) = self.executing.attempts.borrow_mut().remove(lease) else {
            return;
        };
        let mut functions = self.executing.functions.borrow_mut();
        let Some(Some(offered)) = functions.get_mut(usize::from(index)) else {
            return;
        };
        offered.lender.on_outcome(shard);
        let mut held = self.executing.held.borrow_mut();
        match held.iter().position(|(function, _)| *function == index) {
            Some(place) => {
                if let Some((_, frame)) = held.remove(place) {
                    self.write(|out| out.extend_from_slice(&frame));
                }
            }
            None => offered.running = offered.running.saturating_sub(1),
        }
    }

    /// Hands outcomes to the shards of their tasks.
    pub(crate) async fn on_outcomes(
        self: &Rc<Self>,
        hub: &Hub,
        frame: Frame,
    ) -> Result<(), ProtocolError> {
        if !self.several_shards {
            let items = Items::<TaskOutcome<'_>>::parse(&frame)?;
            let base = frame.body.as_ptr() as usize;
            let span = |bytes: &[u8]| {
                if bytes.is_empty() {
                    return Span::default();
                }
                Span::new(bytes.as_ptr() as usize - base, bytes.len())
            };
            let outcomes = items
                .iter()
                .map(|item| {
                    let spans = (
                        span(item.error.as_bytes()),
                        span(item.output),
                        span(item.result),
                    );
                    outcome(&item, spans)
                })
                .collect();
            let batch = OutcomeBatch {
                connection: self.id,
                ticket: frame.tag,
                outcomes,
                bytes: Vec::from(frame.body),
                done: 0,
                refused: Vec::new(),
            };
            hub.control(ShardId(0), Control::Outcomes(batch)).await;
            return Ok(());
        }
        let mut batches: HashMap<ShardId, (OutcomeBatch, Vec<u16>)> = HashMap::new();
        {
            let items = Items::<TaskOutcome<'_>>::parse(&frame)?;
            for (place, item) in items.iter().enumerate() {
                let shard = hub
                    .edge
                    .with_routes(|routes| routes.shard_of(item.request_id.cell()));
                let (batch, places) = batches.entry(shard).or_insert_with(|| {
                    let batch = OutcomeBatch {
                        connection: self.id,
                        ticket: 0,
                        outcomes: Vec::new(),
                        bytes: Vec::new(),
                        done: 0,
                        refused: Vec::new(),
                    };
                    (batch, Vec::new())
                });
                let spans = (
                    stow(&mut batch.bytes, item.error.as_bytes()),
                    stow(&mut batch.bytes, item.output),
                    stow(&mut batch.bytes, item.result),
                );
                batch.outcomes.push(outcome(&item, spans));
                places.push(place as u16);
                self.ended(&Lease {
                    request_id: item.request_id,
                    token: item.token,
                });
            }
        }
        if batches.is_empty() {
            self.write(|out| {
                let none = std::iter::empty::<pelton_net::execute::RefusedOutcome>();
                write_items(out, FrameType::OutcomeAck, frame.tag, none);
            });
            return Ok(());
        }
        let places = batches
            .iter()
            .map(|(shard, (_, places))| (*shard, places.clone()))
            .collect();
        let ticket = hub.split_outcomes(self, frame.tag, places);
        for (shard, (mut batch, _)) in batches {
            batch.ticket = ticket;
            hub.control(shard, Control::Outcomes(batch)).await;
        }
        Ok(())
    }

    /// Has shards say which of the leases that an executor names are lost.
    pub(crate) async fn on_heartbeat(
        self: &Rc<Self>,
        hub: &Rc<Hub>,
        frame: &Frame,
    ) -> Result<(), ProtocolError> {
        let items = Items::<Lease>::parse(frame)?;
        let mut asked = Vec::new();
        if let Some(executor) = self.executor {
            // Asked before anything behind the heartbeat is read: no outcome overtakes it.
            let named = items.iter().map(|lease| (lease.request_id, lease.token));
            for (shard, leases) in by_shard(hub, named) {
                let connection = self.id;
                let put = hub.put(shard, |ticket| Control::LeasesHeld {
                    executor,
                    connection,
                    ticket,
                    leases,
                });
                asked.extend(put.await);
            }
        }
        let tag = frame.tag;
        if asked.is_empty() {
            self.acknowledge_heartbeat(tag, asked).await;
        } else if self.begin_question() {
            let session = Rc::clone(self);
            tokio::task::spawn_local(async move {
                session.acknowledge_heartbeat(tag, asked).await;
                session.end_question();
            });
        } else {
            // Nothing more is read until some answers are there.
            hub.wake_shards();
            self.acknowledge_heartbeat(tag, asked).await;
        }
        Ok(())
    }

    /// A shard that does not answer has not taken a lease away.
    async fn acknowledge_heartbeat(&self, tag: u64, asked: Vec<Asked>) {
        let mut lost = Vec::new();
        for asked in asked {
            if let Some(Answered::Reply(Reply::LeasesLost { lost: some })) = asked.answer().await {
                lost.extend(
                    some.into_iter()
                        .map(|(request_id, token)| Lease { request_id, token }),
                );
            }
        }
        for lease in &lost {
            // Its outcome will not come.
            self.ended(lease);
        }
        self.write(|out| write_items(out, FrameType::HeartbeatAck, tag, lost.into_iter()));
    }

    /// Presents the leases that an executor holds after a reconnect; must come before it registers.
    pub(crate) async fn on_resume(
        self: &Rc<Self>,
        hub: &Hub,
        frame: &Frame,
    ) -> Result<(), ProtocolError> {
        let items = Items::<Lease>::parse(frame)?;
        let (Some(executor), true) = (self.executor, self.executing.functions.borrow().is_empty())
        else {
            self.write(|out| {
                ErrorFrame::new(
                    Code::FailedPrecondition,
                    "leases are presented by an executor, after the hello and before it registers",
                )
                .encode(out, frame.tag);
            });
            return Ok(());
        };
        let leases = items.iter().map(|lease| (lease.request_id, lease.token));
        self.executing
            .presented
            .borrow_mut()
            .push((frame.tag, leases.collect()));
        if items.len() == LEASES_PER_FRAME_MAX {
            return Ok(());
        }
        let frames = self.executing.presented.take();
        let presented = frames.iter().flat_map(|(_, leases)| leases).copied();
        let mut presented = by_shard(hub, presented);
        let mut verdicts = HashMap::new();
        for shard in hub.edge.shards() {
            // One that holds none of them learns that what it has handed out was lost on the way.
            let leases = presented.remove(&shard).unwrap_or_default();
            let here = leases.clone();
            let connection = self.id;
            let answered = hub
                .ask(shard, |ticket| Control::LeasesPresented {
                    executor,
                    connection,
                    ticket,
                    leases,
                })
                .await;
            // A shard that does not answer has not taken a lease away.
            let (kept, known) = match answered {
                Some(Answered::Reply(Reply::Leases { kept, known })) => (kept, known),
                Some(_) | None => (here, Leases::new()),
            };
            verdicts.extend(kept.into_iter().map(|lease| (lease, ResumedLease::Kept)));
            verdicts.extend(known.into_iter().map(|lease| (lease, ResumedLease::Known)));
        }
        for (tag, leases) in frames {
            let said = leases.iter().map(|lease| {
                let verdict = verdicts.get(lease).copied();
                verdict.unwrap_or(ResumedLease::Refused)
            });
            self.write(|out| write_items(out, FrameType::Resumed, tag, said));
        }
        Ok(())
    }
}

/// Leases by the shard of their task.
fn by_shard(
    hub: &Hub,
    leases: impl Iterator<Item = (RequestId, Token)>,
) -> BTreeMap<ShardId, Leases> {
    let mut shards: BTreeMap<ShardId, Leases> = BTreeMap::new();
    hub.edge.with_routes(|routes| {
        for lease in leases {
            let shard = routes.shard_of(lease.0.cell());
            shards.entry(shard).or_default().push(lease);
        }
    });
    shards
}

fn outcome(item: &TaskOutcome<'_>, (error, output, result): (Span, Span, Span)) -> Outcome {
    Outcome {
        request: item.request_id,
        token: item.token,
        verdict: match item.status {
            OutcomeStatus::Succeeded => Verdict::Succeeded,
            OutcomeStatus::Failed => Verdict::Failed,
            OutcomeStatus::Throttled => Verdict::Throttled {
                retry_after_ms: item.retry_after_ms,
            },
            OutcomeStatus::Rejected => Verdict::Rejected,
            OutcomeStatus::Stopped => Verdict::Stopped,
        },
        code: Code::Ok,
        run_us: item.run_us,
        error,
        output,
        result,
    }
}
