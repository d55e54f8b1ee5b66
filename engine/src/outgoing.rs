//! What a shard has to say to edges and has not handed over yet.

use std::sync::{Arc, OnceLock};

use pelton_core::{
    event::EdgeBatch,
    id::{ConnectionId, EdgeId, ShardId},
};

use crate::{
    engine::Shared,
    inbox::Delivery,
    info::{Info, InfoReply},
};

/// One delivery an edge at most. Each holds what its edge asked for, so that what is kept here is bounded by what edges
/// have in flight.
pub(crate) struct Outgoing {
    shared: Arc<Shared>,
    me: ShardId,
    pending: Vec<Option<Box<Delivery>>>,
}

impl Outgoing {
    pub(crate) fn new(shared: Arc<Shared>, me: ShardId) -> Outgoing {
        Outgoing {
            shared,
            me,
            pending: Vec::new(),
        }
    }

    /// The delivery to an edge that may still be added to.
    pub(crate) fn to(&mut self, edge: EdgeId) -> &mut Delivery {
        let index = usize::from(edge.0);
        if self.pending.len() <= index {
            self.pending.resize_with(index + 1, || None);
        }
        let outbox = self.shared.edges.get(index).and_then(OnceLock::get);
        let me = self.me;
        self.pending[index].get_or_insert_with(|| {
            if let Some(mut spare) = outbox.and_then(|outbox| outbox.spare.pop()) {
                spare.shard = me;
                return spare;
            }
            Box::new(Delivery {
                shard: me,
                batch: EdgeBatch::default(),
                infos: Vec::new(),
            })
        })
    }

    /// Adds an answer to a query.
    pub(crate) fn inform(&mut self, connection: ConnectionId, ticket: u64, reply: InfoReply) {
        self.to(connection.edge()).infos.push(Info {
            connection,
            ticket,
            reply,
        });
    }

    /// Hands over what edges have room for.
    pub(crate) fn flush(&mut self) {
        for (index, slot) in self.pending.iter_mut().enumerate() {
            let Some(delivery) = slot.take() else {
                continue;
            };
            if let Some(outbox) = self.shared.edges.get(index).and_then(OnceLock::get) {
                *slot = outbox.deliver(delivery).err();
            }
        }
    }

    /// True if nothing is left to hand over.
    pub(crate) fn is_empty(&self) -> bool {
        self.pending.iter().all(Option::is_none)
    }
}
