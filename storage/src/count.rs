//! Counting what a log holds, record by record, as a start would find it: which tasks it names, and which of them have not
//! ended. Two logs with the same figures hold the same, as far as figures can tell.

use std::collections::BTreeMap;

use pelton_core::{
    id::{Lsn, RequestId},
    record::{Record, Unreadable, read},
    state::State,
};

use crate::{format::BatchHeader, recover::records};

/// Slots of a page: neighbours are used together.
const PAGE_SLOTS: usize = 4096;
/// Beside the running number of a slot's task, which has 40 bits: the task has not ended.
const LIVE: u64 = 1 << 63;

/// What a stretch of a log holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Tasks that have not ended.
    pub live: u64,
    /// Tasks with a record, the ended ones too.
    pub tasks: u64,
    /// Records.
    pub records: u64,
    /// Batches.
    pub batches: u64,
}

/// Counts the records of one shard's log in their order. It keeps eight bytes for each slot of the shard's table.
#[derive(Debug, Default)]
pub struct Counter {
    counts: Counts,
    /// By slot, from pages: the running number of its last task plus one, and whether that is live.
    pages: BTreeMap<u32, Box<[u64]>>,
    /// Behind the last batch.
    end: Lsn,
    retired: Lsn,
}

/// Why a batch cannot be counted though its checksum holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Uncountable {
    /// A record of another version.
    Unreadable {
        /// The position of its header.
        at: Lsn,
        schema: u16,
    },
    /// The lengths of its records do not add up to the batch.
    Lengths,
}

impl Counter {
    /// Takes the next batch.
    pub fn take(&mut self, header: &BatchHeader, batch: &[u8]) -> Result<(), Uncountable> {
        let mut failed = None;
        let walked = records(batch, header.records, |at, schema, body| {
            self.record(schema, body)
                .map_err(|Unreadable { schema }| {
                    let at = Lsn(header.lsn.0 + at as u64);
                    failed = Some(Uncountable::Unreadable { at, schema });
                })
                .ok()
        });
        match (failed, walked) {
            (Some(failed), _) => return Err(failed),
            (None, None) => return Err(Uncountable::Lengths),
            (None, Some(())) => {}
        }
        self.counts.batches += 1;
        self.counts.records += u64::from(header.records);
        self.end = header.end();
        self.retired = self.retired.max(header.retired);
        Ok(())
    }

    fn record(&mut self, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        let state_of = |number| State::from_number(number).ok_or(Unreadable { schema });
        match read(schema, body)? {
            Record::Task(task) => self.found(task.request(), true),
            Record::Outcome(outcome) => {
                if state_of(outcome.state)?.terminal() {
                    self.ended(RequestId(outcome.request.to_native()));
                }
            }
            Record::Move(moved) => {
                if state_of(moved.state)?.terminal() {
                    self.ended(RequestId(moved.request.to_native()));
                }
            }
            Record::RelocatedTask(relocated) => {
                let request = relocated.task.request();
                let live = !state_of(relocated.state)?.terminal();
                // Of a task that is known, only the place is new.
                if *self.slot(request) & !LIVE != number(request) {
                    self.found(request, live);
                }
            }
            Record::Lease(_)
            | Record::Config(_)
            | Record::Clock(_)
            | Record::RelocatedOutcome(_)
            | Record::RelocatedName(_) => {}
        }
        Ok(())
    }

    fn found(&mut self, request: RequestId, live: bool) {
        let slot = self.slot(request);
        let before = *slot & LIVE != 0;
        *slot = number(request) | if live { LIVE } else { 0 };
        self.counts.tasks += 1;
        self.counts.live += u64::from(live);
        self.counts.live -= u64::from(before);
    }

    fn ended(&mut self, request: RequestId) {
        let slot = self.slot(request);
        if *slot == number(request) | LIVE {
            *slot &= !LIVE;
            self.counts.live -= 1;
        }
    }

    fn slot(&mut self, request: RequestId) -> &mut u64 {
        let slot = request.slot().0;
        let page = self.pages.entry(slot / PAGE_SLOTS as u32);
        let page = page.or_insert_with(|| vec![0; PAGE_SLOTS].into());
        &mut page[slot as usize % PAGE_SLOTS]
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The position behind the last batch; 0 without any.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Everything before this position is dead, says the last batch.
    pub fn retired(&self) -> Lsn {
        self.retired
    }
}

/// What a slot says of its task: never 0.
fn number(request: RequestId) -> u64 {
    request.seq() + 1
}

#[cfg(test)]
mod tests {
    use pelton_core::{
        id::{CellId, SlotIndex},
        record::{BatchSpace, MoveRecordV1, OutcomeRecordV1, Schema, TaskRecordV1},
    };

    use super::*;
    use crate::format::BATCH_HEADER_BYTES;

    fn request(seq: u64, slot: u32) -> RequestId {
        RequestId::new(CellId(1), 1_000, seq, SlotIndex(slot))
    }

    fn moved(request: RequestId, state: State) -> MoveRecordV1 {
        MoveRecordV1 {
            request: request.0,
            at_ms: 1,
            state: state as u8,
        }
    }

    /// A tally of one batch that `fill` writes.
    fn tally(
        tally: &mut Counter,
        fill: impl FnOnce(&mut BatchSpace<'_>),
    ) -> Result<(), Uncountable> {
        let mut bytes = vec![0; 64 << 10];
        let mut space = BatchSpace {
            bytes: &mut bytes,
            len: BATCH_HEADER_BYTES,
            base: Lsn(8192),
            records: 0,
        };
        fill(&mut space);
        let (len, records) = (space.len, space.records);
        let header = BatchHeader {
            crc: 0,
            flags: 0,
            payload_bytes: (len - BATCH_HEADER_BYTES) as u32,
            records,
            shard: 0,
            segment: 0,
            lsn: Lsn(8192),
            epoch: 1,
            durable: Lsn(8192),
            retired: Lsn(0),
            prev_crc: 0,
        };
        tally.take(&header, &bytes[..len])
    }

    #[test]
    fn an_end_counts_for_its_own_task_and_a_slot_that_is_used_again_for_the_next() {
        let mut counted = Counter::default();
        let task = |seq, slot| TaskRecordV1 {
            request: request(seq, slot).0,
            tenant: 1,
            function: 1,
            due_ms: 0,
            payload_hash: 0,
            max_age_s: 0,
            cost: 1,
            priority: 0,
            durability: 0,
            task_id: "",
            key: "",
            content_type: "",
            traceparent: "",
            tags: &[],
            payload: b"x",
        };
        let outcome = |seq, slot, state| OutcomeRecordV1 {
            request: request(seq, slot).0,
            at_ms: 1,
            due_ms: 0,
            generation: 1,
            attempt: 1,
            state: state as u8,
            retries: 0,
            code: 0,
            holds_key: 0,
            error: "",
            output: &[],
            result: &[],
        };
        tally(&mut counted, |space| {
            space.append(Schema::Task, &task(1, 0));
            space.append(Schema::Task, &task(2, 70_000));
            // Of a task whose record is gone.
            space.append(Schema::Move, &moved(request(0, 5), State::Stopped));
            space.append(Schema::Outcome, &outcome(1, 0, State::Retrying));
            space.append(Schema::Outcome, &outcome(2, 70_000, State::Succeeded));
            // Said twice, as after a crash.
            space.append(Schema::Outcome, &outcome(2, 70_000, State::Succeeded));
            space.append(Schema::Task, &task(3, 70_000));
            space.append(Schema::Move, &moved(request(2, 70_000), State::Stopped));
        })
        .unwrap();
        let expected = Counts {
            live: 2,
            tasks: 3,
            records: 8,
            batches: 1,
        };
        assert_eq!(counted.counts(), expected);
        let of_another_version = tally(&mut counted, |space| {
            space.append(
                Schema::Move,
                &MoveRecordV1 {
                    state: 99,
                    ..moved(request(3, 1), State::Stopped)
                },
            );
        });
        assert!(matches!(
            of_another_version,
            Err(Uncountable::Unreadable { schema: 4, .. })
        ));
    }
}
