//! What reaches a shard and what it answers: one closed set each way. Edges translate between these and the world.
//! Everything travels in batches; ranges point into the bytes that the batch carries.

use alloc::{boxed::Box, string::String, vec::Vec};
use core::ops::Range;

use crate::{
    config::{Change, Wish},
    error::Code,
    id::{CellId, ConnectionId, EdgeId, FunctionId, Lsn, RequestId, ShardId, TenantId, Token},
    state::State,
};

/// A range of a batch's bytes, in 8 instead of 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// First byte.
    pub start: u32,
    /// Bytes.
    pub len: u32,
}

impl Span {
    /// The span from `start` with `len` bytes; both fit 32 bits because a batch does.
    pub fn new(start: usize, len: usize) -> Span {
        Span {
            start: start as u32,
            len: len as u32,
        }
    }

    /// The same as a range.
    pub fn range(self) -> Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }

    /// True if it covers nothing.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// Copies `bytes` to the end of an arena and tells where.
pub fn stow(arena: &mut Vec<u8>, bytes: &[u8]) -> Span {
    let span = Span::new(arena.len(), bytes.len());
    arena.extend_from_slice(bytes);
    span
}

/// How long an acceptance lasts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Durability {
    /// Answered after the flush.
    #[default]
    Disk = 0,
    /// Answered once it is in memory; it reaches the disk with the next batch.
    Memory = 1,
}

/// When a task may start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Start {
    /// At once.
    #[default]
    Now,
    /// This long after its acceptance.
    DelayMs(u64),
    /// At this wall time.
    AtMs(u64),
}

/// One task of a submit batch. The edge has checked lengths and names; the shard checks everything that needs state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubmitTask {
    /// The function, resolved by the edge.
    pub function: FunctionId,
    /// The cell that the edge has chosen by the routing rule.
    pub cell: CellId,
    /// Position in the caller's frame; the answer carries it.
    pub index: u32,
    /// When it may start.
    pub start: Start,
    /// Own maximum age in seconds; 0 for the function's.
    pub max_age_s: u32,
    /// Cost in the round robin; 0 counts as 1.
    pub cost: u16,
    /// Priority class.
    pub priority: u8,
    /// What the acceptance promises.
    pub durability: Durability,
    /// The given `task_id`; empty to have one generated.
    pub task_id: Span,
    /// The ordering key; empty for none.
    pub key: Span,
    /// The content type; empty for none.
    pub content_type: Span,
    /// W3C trace context; empty for none.
    pub traceparent: Span,
    /// Tags, each behind a byte with its length.
    pub tags: Span,
    /// The payload.
    pub payload: Span,
}

/// Tasks of one tenant from one connection, all for one shard.
#[derive(Clone, Debug)]
pub struct SubmitBatch {
    /// Who is answered.
    pub connection: ConnectionId,
    /// The caller's number for the frame.
    pub ticket: u64,
    /// The tenant of the connection.
    pub tenant: TenantId,
    /// Tell the caller when each task is finished.
    pub notify: bool,
    /// Send the result along with that.
    pub with_result: bool,
    /// The tasks.
    pub tasks: Vec<SubmitTask>,
    /// What the spans point into.
    pub bytes: Vec<u8>,
    /// Tasks that the shard has dealt with already; a batch may be spread over several steps.
    pub done: usize,
}

/// What an executor says of one attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It succeeded; the result is in `result`.
    Succeeded,
    /// It failed; retry if any is left.
    Failed,
    /// The function asks for a pause before it takes more; the attempt does not count.
    Throttled {
        /// The wait asked for; 0 for one window.
        retry_after_ms: u32,
    },
    /// The executor gave it back unstarted.
    Rejected,
    /// It was cancelled on request.
    Stopped,
}

/// One attempt's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The task.
    pub request: RequestId,
    /// The lease under which it ran.
    pub token: Token,
    /// How it ended.
    pub verdict: Verdict,
    /// The error's code; `Ok` for a success.
    pub code: Code,
    /// How long it ran, by the executor's clock; the largest number means that or more, 0 that it is not known.
    pub run_us: u32,
    /// What the executor says of the error.
    pub error: Span,
    /// The tail of what the attempt printed.
    pub output: Span,
    /// The result.
    pub result: Span,
}

/// Outcomes from one executor; each frees the slot that its attempt held.
#[derive(Clone, Debug)]
pub struct OutcomeBatch {
    /// The executor's connection, which is told when they are durable.
    pub connection: ConnectionId,
    /// The executor's number for the frame.
    pub ticket: u64,
    /// The outcomes.
    pub outcomes: Vec<Outcome>,
    /// What the spans point into.
    pub bytes: Vec<u8>,
    /// Outcomes that the shard has dealt with already.
    pub done: usize,
    /// Outcomes that were refused so far: index and code.
    pub refused: Vec<(u32, Code)>,
}

/// How a caller names a task to a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// By request id.
    Request(RequestId),
    /// By function and given name.
    Given {
        /// The function.
        function: FunctionId,
        /// The ordering key; empty for none.
        key: String,
        /// The `task_id`.
        task_id: String,
    },
}

/// What a list asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Only this state.
    pub state: Option<State>,
    /// Only this function.
    pub function: Option<FunctionId>,
    /// Only tasks whose [`RequestId::order`] lies between these two, which are no part of it.
    pub before: u128,
    /// See `before`.
    pub after: u128,
    /// Pages of the shard's table to be looked at: all below this one.
    pub pages: u32,
    /// Rows at most: the last ones in order.
    pub limit: u32,
}

impl Default for Filter {
    fn default() -> Filter {
        Filter {
            state: None,
            function: None,
            before: u128::MAX,
            after: 0,
            pages: u32::MAX,
            limit: 0,
        }
    }
}

/// What a caller asks about tasks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Query {
    /// One task.
    Get { target: Target },
    /// One task, told again when it is finished.
    Wait { target: Target },
    /// Tasks of the tenant, a page at a time.
    List { filter: Filter },
    /// End a task; an attempt that runs gets so long to end by itself.
    Stop { target: Target, grace_ms: u32 },
    /// Counters of the shard.
    Stats,
}

/// Everything but submits. Drained first; its senders hold prepaid shares, so it cannot be full.
#[derive(Clone, Debug)]
pub enum Control {
    /// Attempts ended.
    Outcomes(OutcomeBatch),
    /// An executor connected, or connected again.
    SessionOpened {
        executor: u64,
        connection: ConnectionId,
    },
    /// An executor's edge lends this shard `count` slots of one function in all, busy ones included.
    SlotsLent {
        executor: u64,
        function: FunctionId,
        index: u16,
        count: u32,
    },
    /// The leases that an executor holds after it connected again; what it does not name was never delivered.
    LeasesPresented {
        executor: u64,
        connection: ConnectionId,
        ticket: u64,
        leases: Vec<(RequestId, Token)>,
    },
    /// The leases that an executor says it holds, in a heartbeat; it is told which of them it does not hold any more.
    LeasesHeld {
        executor: u64,
        connection: ConnectionId,
        ticket: u64,
        leases: Vec<(RequestId, Token)>,
    },
    /// The executor's connection is gone; its leases live on for one term.
    SessionLost {
        executor: u64,
        connection: ConnectionId,
    },
    /// The executor left for good and gives back what it holds.
    SessionClosed {
        executor: u64,
        connection: ConnectionId,
    },
    /// A caller asks about tasks.
    Query {
        connection: ConnectionId,
        ticket: u64,
        tenant: TenantId,
        query: Query,
    },
    /// A caller wants other configuration; only shard 0 gets this.
    Configure {
        connection: ConnectionId,
        ticket: u64,
        wish: Wish,
    },
    /// Shard 0 orders a change.
    Apply { version: u64, change: Change },
    /// A shard has logged a change; only shard 0 gets this.
    Applied { shard: ShardId, version: u64 },
    /// Whoever keeps ended tasks has `saved` of those that it was given on its disk and wants more: so many, and so many
    /// bytes of their records. `again`: with those that it was given and has not saved.
    History {
        saved: u32,
        again: bool,
        rows_max: u32,
        bytes_max: u64,
    },
    /// Shards share the concurrency limits of functions: what one has to say to another in one turn.
    Credits {
        from: ShardId,
        words: Vec<CreditWord>,
    },
}

/// One word between a function's home shard and another one about the function's concurrency limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CreditWord {
    /// The function.
    pub function: FunctionId,
    /// What is said.
    pub kind: CreditKind,
    /// The count that it belongs to; a word of another count is not heard.
    pub term: u64,
    /// The limit that the sender knows.
    pub limit: u32,
    /// Credits; 0 for a question of the home.
    pub count: u32,
}

/// What shards say about a concurrency limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CreditKind {
    /// The home counts: say what you hold.
    Count,
    /// A shard says what it holds.
    Holds,
    /// A shard wants credits.
    Ask,
    /// The home lends credits.
    Lend,
    /// The home wants credits back as they fall free.
    Recall,
    /// A shard gives credits back. What freed them is durable.
    Return,
}

/// A record that was read back from the log.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// The task's identity at the time of asking.
    pub request: RequestId,
    /// The record, header included; `None` if it could not be read.
    pub record: Option<Vec<u8>>,
}

/// A batch that became durable, as it still stands in the log's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Durable<'a> {
    /// The batch's buffer from its first byte.
    pub bytes: &'a [u8],
    /// The offset of that byte within its segment.
    pub offset: u64,
}

/// How one task of a submit batch fared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Position in the caller's frame.
    pub index: u32,
    /// `Ok` or why not.
    pub code: Code,
    /// The task was there already.
    pub duplicate: bool,
    /// The acceptance is on disk.
    pub durable: bool,
    /// When to try again, for `RESOURCE_EXHAUSTED`; 0 if unknown.
    pub retry_after_ms: u32,
    /// The task's identity; zero where it was refused.
    pub request: RequestId,
    /// What to do about a refusal.
    pub what: &'static str,
}

/// Answers to one frame of one caller: `count` entries of [`EdgeBatch::answers`] from `first`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AnswerRun {
    /// Who asked.
    pub connection: ConnectionId,
    /// The caller's number for the frame.
    pub ticket: u64,
    /// First answer.
    pub first: u32,
    /// Answers.
    pub count: u32,
}

/// A leased attempt, to be sent to its executor. Its lease is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Execute {
    /// The executor's connection.
    pub connection: ConnectionId,
    /// The task.
    pub request: RequestId,
    /// The lease.
    pub token: Token,
    /// The function as the executor numbered it.
    pub index: u16,
    /// Time for this attempt.
    pub timeout_ms: u32,
    /// The given `task_id`; empty for a generated one.
    pub task_id: Span,
    /// The ordering key; empty for none.
    pub key: Span,
    /// The content type; empty for none.
    pub content_type: Span,
    /// W3C trace context; empty for none.
    pub traceparent: Span,
    /// The payload.
    pub payload: Span,
}

/// A task has ended, told to a caller who waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Who waits.
    pub connection: ConnectionId,
    /// The caller's number for the frame or query.
    pub ticket: u64,
    /// Position in the caller's frame.
    pub index: u32,
    /// The task.
    pub request: RequestId,
    /// How it ended.
    pub state: State,
    /// The error's code; `Ok` for a success.
    pub code: Code,
    /// Attempts that were leased.
    pub attempts: u16,
    /// True if the result is in `result`.
    pub with_result: bool,
    /// What the executor said of the error.
    pub error: Span,
    /// The result, where it was asked for.
    pub result: Span,
}

/// An executor's outcomes are durable, or refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutcomeAck {
    /// The executor's connection.
    pub connection: ConnectionId,
    /// The executor's number for the frame.
    pub ticket: u64,
    /// Outcomes that were dealt with.
    pub count: u32,
    /// Index and code of those that were refused.
    pub refused: Vec<(u32, Code)>,
}

/// A running attempt is to be stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cancel {
    /// The executor's connection.
    pub connection: ConnectionId,
    /// The task.
    pub request: RequestId,
    /// The lease.
    pub token: Token,
    /// How long it gets to end by itself.
    pub grace_ms: u32,
}

/// A task as its shard knows it now. Names, payload and result stand in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskView {
    /// The task.
    pub request: RequestId,
    /// Its function.
    pub function: FunctionId,
    /// Its state.
    pub state: State,
    /// Its current lease.
    pub token: Token,
    /// Retries spent.
    pub retries: u8,
    /// When it is due, for `Scheduled` and `Retrying`; logged ms.
    pub due_ms: u64,
    /// Logged time of its end; 0 while it has none.
    pub ended_ms: u64,
    /// The executor that runs it.
    pub executor: u64,
    /// Where its record stands, and how long it is at most.
    pub record: (Lsn, u32),
    /// Where its outcome stands; 0 where it has none.
    pub outcome: Lsn,
}

/// A task that has ended, for history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Its tenant.
    pub tenant: TenantId,
    /// What the shard knows of it.
    pub view: TaskView,
    /// Bytes of its outcome's record at most; 0 where there is none.
    pub outcome_bytes: u32,
}

/// Ended tasks in the order of their ends, as history asked for them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndedBatch {
    /// The tasks.
    pub rows: Vec<Ended>,
    /// Once these and all that were handed out before are safe, every task that ended before this position is.
    pub through: Lsn,
    /// Some of them may be in history already: a start has found them in the log.
    pub may_be_saved: bool,
    /// Bytes of the records of all tasks that history lacks, these included.
    pub lag_bytes: u64,
}

/// The counters of a shard since its start, and its gauges.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Tasks accepted.
    pub accepted: u64,
    /// Submits answered with what was there already.
    pub duplicates: u64,
    /// Submits refused.
    pub refused: u64,
    /// Leases given.
    pub leased: u64,
    /// Tasks ended with success.
    pub succeeded: u64,
    /// Tasks ended with failure.
    pub failed: u64,
    /// Tasks stopped.
    pub stopped: u64,
    /// Tasks expired.
    pub expired: u64,
    /// Tasks whose function was deleted.
    pub invalid: u64,
    /// Attempts that are to be tried again.
    pub retried: u64,
    /// Attempts that were throttled.
    pub throttled: u64,
    /// Outcomes refused for a stale token.
    pub stale: u64,
    /// Tasks recovered at the start.
    pub recovered: u64,
    /// Leases taken from executors that went away.
    pub taken_over: u64,
    /// Tasks in memory, finished ones included.
    pub tasks: u64,
    /// Tasks waiting in lanes and behind keys.
    pub waiting: u64,
    /// Tasks leased now.
    pub running: u64,
    /// Finished tasks kept for queries.
    pub finished: u64,
    /// Of these, those that history does not have yet, and bytes of their records.
    pub unsaved: u64,
    /// See `unsaved`.
    pub unsaved_bytes: u64,
    /// Names in the dedup window.
    pub names: u64,
    /// Bytes of waiting tasks held in memory.
    pub fetched_bytes: u64,
    /// Bytes of memory that tasks take in their table, packed or not.
    pub table_bytes: u64,
    /// Bytes of the records in the log that are still needed.
    pub live_bytes: u64,
    /// Records that were moved forward so that their segment can go, and their bytes.
    pub relocated: u64,
    /// See `relocated`.
    pub relocated_bytes: u64,
}

/// The answer to a query or a wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// A task. `finished` tells that a `Wait` is over.
    Task { view: TaskView },
    /// Tasks in the order of a list, the last one first, and the pages of the table that were not looked at; 0 for none.
    Page { views: Vec<TaskView>, pages: u32 },
    /// The task is not in memory: if there is such a task, it has ended and history has it. `request` is its identity, as
    /// far as that is known.
    NotHeld { request: Option<RequestId> },
    /// The wish or the stop is carried out and durable.
    Done { state: Option<State> },
    /// Counters.
    Stats { counters: Box<Counters> },
    /// Of the leases that were presented, those that the executor keeps, and those whose outcome is durable; it drops
    /// all but the first.
    Leases {
        kept: Vec<(RequestId, Token)>,
        known: Vec<(RequestId, Token)>,
    },
    /// Of the leases that a heartbeat named, those that are not the executor's any more.
    LeasesLost { lost: Vec<(RequestId, Token)> },
    /// Refused.
    Refused { code: Code, what: &'static str },
}

/// One edge's part of a step's effects.
#[derive(Clone, Debug, Default)]
pub struct EdgeBatch {
    /// The answers, in runs.
    pub runs: Vec<AnswerRun>,
    /// What the runs count.
    pub answers: Vec<Answer>,
    /// Attempts to send to executors.
    pub executes: Vec<Execute>,
    /// Ends to tell to callers.
    pub finished: Vec<Finished>,
    /// Outcomes to confirm to executors.
    pub acks: Vec<OutcomeAck>,
    /// Attempts to cancel.
    pub cancels: Vec<Cancel>,
    /// Answers to queries and wishes.
    pub replies: Vec<(ConnectionId, u64, Reply)>,
    /// What the spans point into.
    pub bytes: Vec<u8>,
}

impl EdgeBatch {
    /// Appends all of `other` and leaves it empty, with its memory kept where that is possible.
    pub fn absorb(&mut self, other: &mut EdgeBatch) {
        if self.is_empty() && self.bytes.is_empty() {
            core::mem::swap(self, other);
            return;
        }
        let shift = self.bytes.len() as u32;
        let moved = |span: Span| Span {
            start: span.start + shift,
            len: span.len,
        };
        let first = self.answers.len() as u32;
        self.runs.extend(other.runs.drain(..).map(|run| AnswerRun {
            first: run.first + first,
            ..run
        }));
        self.answers.append(&mut other.answers);
        self.executes
            .extend(other.executes.drain(..).map(|execute| Execute {
                task_id: moved(execute.task_id),
                key: moved(execute.key),
                content_type: moved(execute.content_type),
                traceparent: moved(execute.traceparent),
                payload: moved(execute.payload),
                ..execute
            }));
        self.finished
            .extend(other.finished.drain(..).map(|finished| Finished {
                error: moved(finished.error),
                result: moved(finished.result),
                ..finished
            }));
        self.acks.append(&mut other.acks);
        self.cancels.append(&mut other.cancels);
        self.replies.append(&mut other.replies);
        self.bytes.append(&mut other.bytes);
    }

    /// True if there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
            && self.executes.is_empty()
            && self.finished.is_empty()
            && self.acks.is_empty()
            && self.cancels.is_empty()
            && self.replies.is_empty()
    }
}

/// A record to be read back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fetch {
    /// Whose record it is.
    pub request: RequestId,
    /// Where it stands.
    pub position: Lsn,
    /// Its length at most, header included.
    pub bytes: u32,
}

/// How soon the batch should be sealed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Urgency {
    /// It is empty.
    #[default]
    Nothing,
    /// Only outcomes: it may wait a little for company.
    Soon,
    /// Somebody waits for it.
    Now,
}

/// What a step wants done, performed in this order: seal, then everything else.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// What each edge is to send, by edge.
    pub edges: Vec<EdgeBatch>,
    /// What other shards are to be told.
    pub shards: Vec<(ShardId, Control)>,
    /// Records to be read back.
    pub fetches: Vec<Fetch>,
    /// The answer to [`Control::History`].
    pub history: Option<EndedBatch>,
    /// Batches to be read back from here on, for cleaning; at most one such request is under way.
    pub scan: Option<Lsn>,
    /// Changes of configuration that every shard has logged; edges may use them.
    pub published: Vec<(u64, Change)>,
    /// Whether the batch is to be sealed.
    pub urgency: Urgency,
    /// The batch has no room for the next record; a segment may have to end early.
    pub full: bool,
}

impl Effects {
    /// The part of an edge.
    pub fn edge(&mut self, edge: EdgeId) -> &mut EdgeBatch {
        let index = edge.0 as usize;
        if self.edges.len() <= index {
            self.edges.resize_with(index + 1, EdgeBatch::default);
        }
        &mut self.edges[index]
    }
}

/// What arrived since the last step. The shard takes from the front as much as the batch has room for.
#[derive(Clone, Debug, Default)]
pub struct Inbox {
    /// Taken first.
    pub control: alloc::collections::VecDeque<Control>,
    /// Taken while the batch may grow.
    pub submits: alloc::collections::VecDeque<Box<SubmitBatch>>,
    /// Records read back.
    pub fetched: Vec<Fetched>,
    /// What [`Effects::scan`] asked for.
    pub scanned: Option<Scanned>,
    /// False while the disk is beyond its high-water mark: submits are refused.
    pub disk_has_room: bool,
}

/// Neighbouring batches of the log, read back so that what lives in them can be moved.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Scanned {
    /// The position of the first byte.
    pub start: Lsn,
    /// Whole batches whose checksums hold.
    pub bytes: Vec<u8>,
    /// Where the header of each record stands in them.
    pub records: Vec<u32>,
    /// Where to go on; `None` at the segment's end, and where the rest of it cannot be read.
    pub next: Option<Lsn>,
}
