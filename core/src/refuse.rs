//! What a shard says that serves nobody: its log has failed while it served, or is damaged and was never read.
//!
//! Everything that waits for a word gets one: tasks and questions are refused with `UNAVAILABLE`, outcomes are to be
//! kept and presented again, and shard 0 is not kept waiting for a change of configuration, which the next start gives
//! to every shard that lacks it.

use alloc::boxed::Box;

use crate::{
    error::Code,
    event::{
        Answer, AnswerRun, Control, Counters, Effects, EndedBatch, Inbox, OutcomeAck, OutcomeBatch,
        Query, Reply, SubmitBatch,
    },
    id::{RequestId, ShardId},
};

/// Why a shard serves nobody, as whoever asks is told.
#[derive(Clone, Copy, Debug)]
pub struct Reason {
    /// To those who hand in tasks or ask about some.
    pub tasks: &'static str,
    /// To those who want other configuration.
    pub configuration: &'static str,
}

/// A write or flush of the log has failed.
pub const FAILED: Reason = Reason {
    tasks: "the shard's log has failed; whether an unanswered task was accepted is unknown: send the same task_id again later",
    configuration: "the log of shard 0 has failed: configuration cannot be changed until the server is started again",
};

/// The start has found the log damaged or unreadable, and has left it as it is.
pub const QUARANTINED: Reason = Reason {
    tasks: "the shard's log is damaged and not served: `pelton stats` says where; when its files are restored, restart the server and send the same task_id again",
    configuration: "the log of shard 0 is damaged and not served: configuration cannot be changed until its files are restored and the server is started again",
};

/// Refuses all that has come in. `counters` is asked for where somebody wants figures.
pub fn everything(
    me: ShardId,
    reason: Reason,
    inbox: &mut Inbox,
    counters: impl Fn() -> Counters,
    effects: &mut Effects,
) {
    while let Some(batch) = inbox.submits.pop_front() {
        submit(&batch, reason, effects);
    }
    while let Some(control) = inbox.control.pop_front() {
        let (connection, ticket, reply) = match control {
            Control::Query {
                connection,
                ticket,
                query: Query::Stats,
                ..
            } => {
                let counters = Box::new(counters());
                (connection, ticket, Reply::Stats { counters })
            }
            Control::Query {
                connection, ticket, ..
            }
            | Control::LeasesPresented {
                connection, ticket, ..
            }
            | Control::LeasesHeld {
                connection, ticket, ..
            } => (connection, ticket, refused(reason.tasks)),
            Control::Configure {
                connection, ticket, ..
            } => (connection, ticket, refused(reason.configuration)),
            Control::Outcomes(batch) => {
                let ack = unheard(batch);
                effects.edge(ack.connection.edge()).acks.push(ack);
                continue;
            }
            Control::Apply { version, .. } => {
                let applied = Control::Applied { shard: me, version };
                effects.shards.push((ShardId(0), applied));
                continue;
            }
            Control::History { .. } => {
                effects.history = Some(EndedBatch::default());
                continue;
            }
            Control::SessionOpened { .. }
            | Control::SlotsLent { .. }
            | Control::SessionLost { .. }
            | Control::SessionClosed { .. }
            | Control::Applied { .. }
            | Control::Credits { .. } => continue,
        };
        let replies = &mut effects.edge(connection.edge()).replies;
        replies.push((connection, ticket, reply));
    }
}

/// An acknowledgement that was to leave when its batch is durable, which will not be: what is not refused already is to
/// be kept and presented again.
pub(crate) fn take_back(ack: &mut OutcomeAck) {
    for index in 0..ack.count {
        if ack.refused.iter().all(|&(known, _)| known != index) {
            ack.refused.push((index, Code::Unavailable));
        }
    }
}

fn unheard(batch: OutcomeBatch) -> OutcomeAck {
    let mut ack = OutcomeAck {
        connection: batch.connection,
        ticket: batch.ticket,
        count: batch.outcomes.len() as u32,
        refused: batch.refused,
    };
    take_back(&mut ack);
    ack
}

fn refused(what: &'static str) -> Reply {
    Reply::Refused {
        code: Code::Unavailable,
        what,
    }
}

fn submit(batch: &SubmitBatch, reason: Reason, effects: &mut Effects) {
    let edge = effects.edge(batch.connection.edge());
    let first = edge.answers.len() as u32;
    edge.answers
        .extend(batch.tasks[batch.done..].iter().map(|task| Answer {
            index: task.index,
            code: Code::Unavailable,
            duplicate: false,
            durable: false,
            retry_after_ms: 0,
            request: RequestId::default(),
            what: reason.tasks,
        }));
    let count = edge.answers.len() as u32 - first;
    edge.runs.push(AnswerRun {
        connection: batch.connection,
        ticket: batch.ticket,
        first,
        count,
    });
}
