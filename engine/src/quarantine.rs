//! A shard whose log cannot be served: the others go on, and this one's thread answers whoever comes to it that it does
//! not. The log is neither read again nor changed; a start with its files restored serves everything.
//!
//! Edges and other shards speak to it like to any shard. It refuses tasks and questions, has outcomes kept and presented
//! again, says that it has logged changes of configuration, which the next start gives it, and says nothing of credits:
//! a function whose home it is starts nowhere while it has a concurrency limit, because nobody knows what runs.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::*},
    time::Duration,
};

use pelton_core::{
    event::{Control, Counters, Effects, Inbox, Reply},
    id::{EdgeId, ShardId},
    refuse,
};
use pelton_storage::recover::RecoverError;

use crate::{
    engine::Shared, inbox::ShardInbox, info::InfoReply, outgoing::Outgoing, stats::ShardStats,
};

/// The longest sleep while something waits for room elsewhere, and while nothing does.
const SLEEP_BUSY: Duration = Duration::from_millis(1);
const SLEEP: Duration = Duration::from_secs(10);

/// A shard that is not served, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quarantine {
    /// The shard.
    pub shard: ShardId,
    /// What its start came to; nothing on its disk was changed.
    pub error: RecoverError,
}

impl fmt::Display for Quarantine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard {}: {}", self.shard.0, self.error)
    }
}

/// Answers for a shard until the engine stops it.
pub(crate) fn stand_in(shared: &Arc<Shared>, me: ShardId) {
    let inbox = &shared.inboxes[usize::from(me.0)];
    let mut stats = ShardStats::new(me);
    stats.quarantined = shared.quarantined[usize::from(me.0)].get().cloned();
    let mut stand_in = StandIn {
        shared,
        stats,
        outgoing: Outgoing::new(Arc::clone(shared), me),
        to_shards: Vec::new(),
    };
    loop {
        let worked = stand_in.turn(me, inbox);
        if worked {
            continue;
        }
        if inbox.is_done() {
            return;
        }
        if inbox.park() {
            let waits = !stand_in.outgoing.is_empty() || !stand_in.to_shards.is_empty();
            inbox.bell.wait(if waits { SLEEP_BUSY } else { SLEEP });
            inbox.unpark();
        }
    }
}

struct StandIn<'s> {
    shared: &'s Arc<Shared>,
    stats: ShardStats,
    outgoing: Outgoing,
    /// What other shards had no room for yet.
    to_shards: Vec<(ShardId, Control)>,
}

impl StandIn<'_> {
    /// Answers what has come in; false if nothing had.
    fn turn(&mut self, me: ShardId, from: &ShardInbox) -> bool {
        let mut inbox = Inbox::default();
        from.gather(&mut inbox);
        let came = !inbox.control.is_empty() || !inbox.submits.is_empty();
        let mut effects = Effects::default();
        refuse::everything(
            me,
            refuse::QUARANTINED,
            &mut inbox,
            Counters::default,
            &mut effects,
        );
        for (index, mut batch) in std::mem::take(&mut effects.edges).into_iter().enumerate() {
            for (connection, ticket, reply) in std::mem::take(&mut batch.replies) {
                if let Reply::Stats { .. } = reply {
                    let stats = Box::new(self.stats.clone());
                    self.outgoing
                        .inform(connection, ticket, InfoReply::Stats(stats));
                } else {
                    batch.replies.push((connection, ticket, reply));
                }
            }
            if !batch.is_empty() {
                self.outgoing
                    .to(EdgeId(index as u16))
                    .batch
                    .absorb(&mut batch);
            }
        }
        self.outgoing.flush();
        if let Some(batch) = effects.history.take()
            && let Some(history) = self.shared.history.get()
        {
            history.take(me, batch);
        }
        self.to_shards.append(&mut effects.shards);
        self.tell_shards();
        came
    }

    fn tell_shards(&mut self) {
        let shared = self.shared;
        self.to_shards = std::mem::take(&mut self.to_shards)
            .into_iter()
            .filter_map(|(shard, control)| {
                let inbox = &shared.inboxes[usize::from(shard.0)];
                let kept = inbox.push_control(control).err();
                inbox.wake();
                kept.filter(|_| !inbox.gone.load(Relaxed))
                    .map(|control| (shard, control))
            })
            .collect();
    }
}
