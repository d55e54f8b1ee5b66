//! Append: a fact becomes a record in the open batch and waits there, as itself, for the flush.

use crate::{
    event::Urgency,
    id::{Lsn, RequestId, Token},
    limits::{BATCH_BYTES_SEAL, RECORD_BYTES_LARGE},
    record::{BatchSpace, ClockRecordV1, LeaseRecordV1, MoveRecordV1, Schema, record_bytes},
    shard::{Fact, Shard},
    state::{Event, State},
    table::task::FLAG_BUSY,
};

impl Shard {
    /// The first record of each segment says what time it is and which number comes next, so that both outlive the
    /// segments before.
    pub(crate) fn open_segment(&mut self, space: &mut BatchSpace<'_>) {
        let segment = self.segment_of(space.base);
        if self.clock_segment == Some(segment) || space.room() < record_bytes(0) {
            return;
        }
        self.clock_segment = Some(segment);
        self.see_segment(segment);
        let record = ClockRecordV1 {
            logged_ms: self.now.logged_ms,
            next_seq: self.next_seq,
        };
        space.append(Schema::Clock, &record);
        self.open.facts.push(Fact::Clock {
            next_seq: self.next_seq,
        });
        self.note(Urgency::Soon);
    }

    /// True if a record with this much variable data may go into the open batch now. Large records travel one to a
    /// batch and leave every second batch to the small ones.
    pub(crate) fn has_room(&self, variable: usize, space: &BatchSpace<'_>) -> bool {
        let large = variable > RECORD_BYTES_LARGE;
        if large && (self.large_in_batch || (self.large_in_last && !self.sealed.is_empty())) {
            return false;
        }
        // A batch at the seal mark keeps its last megabyte for a large record that is already on its way in.
        (space.len < BATCH_BYTES_SEAL || self.sealed.is_empty())
            && record_bytes(variable) <= space.room()
    }

    pub(crate) fn append_lease(
        &mut self,
        request: RequestId,
        token: Token,
        binding: u32,
        space: &mut BatchSpace<'_>,
    ) {
        let record = LeaseRecordV1 {
            request: request.0,
            executor: self.bindings[binding as usize].executor,
            at_ms: self.now.logged_ms,
            generation: token.generation,
            attempt: token.attempt,
        };
        space.append(Schema::Lease, &record);
        let connection = self.executor_of(binding).0;
        self.open.facts.push(Fact::Leased {
            request,
            token,
            binding,
            connection,
        });
        self.note(Urgency::Now);
    }

    /// Appends a change of state that ends no attempt. The task stays as it is, busy, until that is durable.
    pub(crate) fn append_move(
        &mut self,
        slot: u32,
        state: State,
        space: &mut BatchSpace<'_>,
    ) -> Lsn {
        let event = if state == State::Expired {
            Event::Expire
        } else if state == State::Invalid {
            Event::Remove
        } else {
            Event::Stop
        };
        self.meet(self.tasks[slot].state(), event);
        self.tasks[slot].set(FLAG_BUSY);
        let request = self.tasks.request(slot);
        let record = MoveRecordV1 {
            request: request.0,
            at_ms: self.now.logged_ms,
            state: state as u8,
        };
        let placed = space.append(Schema::Move, &record);
        self.open.facts.push(Fact::Moved {
            request,
            state,
            position: placed.lsn,
        });
        self.note(Urgency::Now);
        placed.lsn
    }
}
