//! Answers to queries as an edge gets them: what the shard knows of a task together with what stands in the log.

use pelton_core::{
    error::Code,
    event::{Counters, TaskView},
    id::{ConnectionId, Lsn, RequestId},
    record::{ArchivedRelocatedOutcomeRecordV1, ArchivedRelocatedTaskRecordV1, Record, read_whole},
};

use pelton_history::Row;

use crate::stats::ShardStats;

/// A task with what its records say. Texts are empty where the task has none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TaskInfo {
    /// What the shard knows.
    pub view: TaskView,
    /// The given `task_id`.
    pub task_id: String,
    /// The ordering key.
    pub key: String,
    /// The payload's content type.
    pub content_type: String,
    /// W3C trace context.
    pub traceparent: String,
    /// Tags.
    pub tags: Vec<String>,
    /// The payload.
    pub payload: Vec<u8>,
    /// The code of the last error; `Ok` without one.
    pub code: Code,
    /// The last error.
    pub error: String,
    /// What the last attempt printed.
    pub output: Vec<u8>,
    /// The result.
    pub result: Vec<u8>,
    /// Logged time of the end, or of the last outcome of a task that has not ended; 0 without one.
    pub ended_ms: u64,
    /// A record that should be there could not be read.
    pub damaged: bool,
}

impl TaskInfo {
    pub(crate) fn new(view: TaskView) -> TaskInfo {
        TaskInfo {
            view,
            task_id: String::new(),
            key: String::new(),
            content_type: String::new(),
            traceparent: String::new(),
            tags: Vec::new(),
            payload: Vec::new(),
            code: Code::Ok,
            error: String::new(),
            output: Vec::new(),
            result: Vec::new(),
            ended_ms: view.ended_ms,
            damaged: false,
        }
    }

    /// A task of the history.
    pub(crate) fn of_row(row: &Row<'_>) -> TaskInfo {
        let text = |text: &str| text.to_owned();
        TaskInfo {
            view: TaskView {
                request: row.request,
                function: row.function,
                state: row.state,
                token: row.token,
                retries: row.retries,
                due_ms: 0,
                ended_ms: row.ended_ms,
                executor: 0,
                record: (Lsn(0), 0),
                outcome: Lsn(0),
            },
            task_id: text(row.task_id),
            key: text(row.key),
            content_type: text(row.content_type),
            traceparent: text(row.traceparent),
            tags: pelton_core::record::tags(row.tags)
                .map(|tag| String::from_utf8_lossy(tag).into_owned())
                .collect(),
            payload: row.payload.to_vec(),
            code: row.code,
            error: text(row.error),
            output: row.output.to_vec(),
            result: row.result.to_vec(),
            ended_ms: row.ended_ms,
            damaged: row.damaged,
        }
    }

    /// Takes what a record of this task says; false if it is not one of its records.
    pub(crate) fn read(&mut self, record: &[u8]) -> bool {
        match read_whole(record) {
            Ok(
                Record::Task(task)
                | Record::RelocatedTask(ArchivedRelocatedTaskRecordV1 { task, .. }),
            ) if task.request() == self.view.request => {
                self.task_id = String::from(&*task.task_id);
                self.key = String::from(&*task.key);
                self.content_type = String::from(&*task.content_type);
                self.traceparent = String::from(&*task.traceparent);
                self.tags = pelton_core::record::tags(&task.tags)
                    .map(|tag| String::from_utf8_lossy(tag).into_owned())
                    .collect();
                self.payload = task.payload.to_vec();
                true
            }
            Ok(
                Record::Outcome(outcome)
                | Record::RelocatedOutcome(ArchivedRelocatedOutcomeRecordV1 { outcome, .. }),
            ) if outcome.request.to_native() == self.view.request.0 => {
                self.code = Code::from_number(outcome.code.to_native()).unwrap_or(Code::Internal);
                self.error = String::from(&*outcome.error);
                self.output = outcome.output.to_vec();
                self.result = outcome.result.to_vec();
                self.ended_ms = outcome.at_ms.to_native();
                true
            }
            Ok(
                Record::Task(_)
                | Record::Outcome(_)
                | Record::Lease(_)
                | Record::Move(_)
                | Record::Config(_)
                | Record::Clock(_)
                | Record::RelocatedTask(_)
                | Record::RelocatedOutcome(_)
                | Record::RelocatedName(_),
            )
            | Err(_) => false,
        }
    }
}

/// What a query brought.
#[derive(Clone, Debug)]
pub enum InfoReply {
    /// A task.
    Task(Box<TaskInfo>),
    /// Tasks of a list, without their payloads, and the pages of the table that were not looked at.
    Page { tasks: Vec<TaskInfo>, pages: u32 },
    /// The task is not in memory. `request` is its identity, as far as that is known.
    NotHeld { request: Option<RequestId> },
    /// Counters and durations of the shard.
    Stats(Box<ShardStats>),
}

/// An answer to a query.
#[derive(Clone, Debug)]
pub struct Info {
    /// Who asked.
    pub connection: ConnectionId,
    /// The asker's number.
    pub ticket: u64,
    /// The answer.
    pub reply: InfoReply,
}

/// Counters of all shards together.
pub fn sum(counters: impl IntoIterator<Item = Counters>) -> Counters {
    counters
        .into_iter()
        .fold(Counters::default(), |a, b| Counters {
            accepted: a.accepted + b.accepted,
            duplicates: a.duplicates + b.duplicates,
            refused: a.refused + b.refused,
            leased: a.leased + b.leased,
            succeeded: a.succeeded + b.succeeded,
            failed: a.failed + b.failed,
            stopped: a.stopped + b.stopped,
            expired: a.expired + b.expired,
            invalid: a.invalid + b.invalid,
            retried: a.retried + b.retried,
            throttled: a.throttled + b.throttled,
            stale: a.stale + b.stale,
            recovered: a.recovered + b.recovered,
            taken_over: a.taken_over + b.taken_over,
            tasks: a.tasks + b.tasks,
            waiting: a.waiting + b.waiting,
            running: a.running + b.running,
            finished: a.finished + b.finished,
            unsaved: a.unsaved + b.unsaved,
            unsaved_bytes: a.unsaved_bytes + b.unsaved_bytes,
            names: a.names + b.names,
            fetched_bytes: a.fetched_bytes + b.fetched_bytes,
            table_bytes: a.table_bytes + b.table_bytes,
            live_bytes: a.live_bytes + b.live_bytes,
            relocated: a.relocated + b.relocated,
            relocated_bytes: a.relocated_bytes + b.relocated_bytes,
        })
}
