//! The records of the log: one frozen rkyv type per schema id, written straight into the batch's buffer and read in
//! place. A type here never changes; a new shape gets a new id.
//!
//! Archives are unaligned and little-endian with 32-bit relative pointers, so that a record may stand anywhere.

use alloc::{string::String, vec::Vec};
use core::mem::MaybeUninit;

use rkyv::{
    Archive, Serialize, access,
    api::low::{LowSerializer, to_bytes_in_with_alloc},
    rancor::Failure,
    ser::{allocator::SubAllocator, writer::Buffer},
    with::InlineAsBox,
};

use crate::{
    config::{Change, FunctionConfig, OnFailure, TenantConfig},
    id::{FunctionId, Lsn, RequestId, TenantId},
};

/// Bytes in front of each record's body: length `u32`, schema `u16`, two zero bytes, and a checksum `u64` that the log
/// writes when it seals the batch.
pub const RECORD_HEADER_BYTES: usize = 16;
/// Records start at multiples of this within a batch.
pub const RECORD_ALIGN: usize = 16;

/// The schema id of a record, as it stands in its header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Schema {
    /// [`TaskRecordV1`]: a task was accepted.
    Task = 1,
    /// [`LeaseRecordV1`]: an attempt was leased to an executor.
    Lease = 2,
    /// [`OutcomeRecordV1`]: an attempt ended.
    Outcome = 3,
    /// [`MoveRecordV1`]: a task went to another state for a reason other than an attempt.
    Move = 4,
    /// [`ConfigRecordV1`]: a tenant or a function changed.
    Config = 5,
    /// [`ClockRecordV1`]: logged time and the next running number, first in each segment.
    Clock = 6,
    /// [`RelocatedTaskRecordV1`]: a task's record, written anew, with what had become of the task.
    RelocatedTask = 7,
    /// [`RelocatedOutcomeRecordV1`]: the record of a finished task's outcome, written anew.
    RelocatedOutcome = 8,
    /// [`RelocatedNameRecordV1`]: a given name whose task is forgotten.
    RelocatedName = 9,
}

impl Schema {
    /// Every schema of this version.
    pub const ALL: [Schema; 9] = [
        Schema::Task,
        Schema::Lease,
        Schema::Outcome,
        Schema::Move,
        Schema::Config,
        Schema::Clock,
        Schema::RelocatedTask,
        Schema::RelocatedOutcome,
        Schema::RelocatedName,
    ];

    /// The schema with this id.
    pub fn from_number(number: u16) -> Option<Schema> {
        Schema::ALL
            .into_iter()
            .find(|schema| *schema as u16 == number)
    }
}

/// A task as it was accepted.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct TaskRecordV1<'a> {
    /// Cell, time, running number and slot.
    pub request: u128,
    /// The tenant's number.
    pub tenant: u32,
    /// The function's number.
    pub function: u32,
    /// Logged time before which the task must not run; 0 for at once.
    pub due_ms: u64,
    /// XXH3-64 of the payload; 0 for a task without a given name.
    pub payload_hash: u64,
    /// Own maximum age in seconds; 0 for the function's.
    pub max_age_s: u32,
    /// Cost in the round robin.
    pub cost: u16,
    /// Priority class.
    pub priority: u8,
    /// 0 disk, 1 memory.
    pub durability: u8,
    /// The given `task_id`; empty where it was generated.
    #[rkyv(with = InlineAsBox)]
    pub task_id: &'a str,
    /// The ordering key; empty for none.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a str,
    /// The payload's content type; empty for none.
    #[rkyv(with = InlineAsBox)]
    pub content_type: &'a str,
    /// W3C trace context; empty for none.
    #[rkyv(with = InlineAsBox)]
    pub traceparent: &'a str,
    /// Tags, each behind a byte with its length.
    #[rkyv(with = InlineAsBox)]
    pub tags: &'a [u8],
    /// The payload.
    #[rkyv(with = InlineAsBox)]
    pub payload: &'a [u8],
}

/// A lease as it was given.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct LeaseRecordV1 {
    /// The task.
    pub request: u128,
    /// The executor's identity.
    pub executor: u64,
    /// Logged time of the lease.
    pub at_ms: u64,
    /// First half of the fencing token.
    pub generation: u16,
    /// Second half of the fencing token.
    pub attempt: u16,
}

/// How an attempt ended.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct OutcomeRecordV1<'a> {
    /// The task.
    pub request: u128,
    /// Logged time of the end.
    pub at_ms: u64,
    /// Logged time of the next attempt, for `Retrying`.
    pub due_ms: u64,
    /// First half of the fencing token.
    pub generation: u16,
    /// Second half of the fencing token.
    pub attempt: u16,
    /// The state after it, as [`crate::state::State`] numbers it.
    pub state: u8,
    /// Retries spent by now.
    pub retries: u8,
    /// The error's code; 0 for a success.
    pub code: u16,
    /// 1: it is a failure that holds its task's ordering key.
    pub holds_key: u8,
    /// What the executor said of the error.
    #[rkyv(with = InlineAsBox)]
    pub error: &'a str,
    /// The tail of what the attempt printed.
    #[rkyv(with = InlineAsBox)]
    pub output: &'a [u8],
    /// The result.
    #[rkyv(with = InlineAsBox)]
    pub result: &'a [u8],
}

/// A change of state without an attempt's end: stop, expiry, deletion of the function, pause, resume.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct MoveRecordV1 {
    /// The task.
    pub request: u128,
    /// Logged time of the change.
    pub at_ms: u64,
    /// The state after it.
    pub state: u8,
}

/// A change of configuration, in one flat shape for all kinds.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct ConfigRecordV1<'a> {
    /// The change's number.
    pub version: u64,
    /// 1 tenant, 2 function, 3 function removed.
    pub kind: u8,
    /// The tenant's number.
    pub tenant: u32,
    /// The function's number.
    pub function: u32,
    /// The tenant's share.
    pub weight: u16,
    /// The tenant's bound of waiting tasks.
    pub waiting_max: u64,
    /// The function's concurrency.
    pub concurrency: u32,
    /// The function's retries.
    pub retries: u8,
    /// The first backoff.
    pub backoff_ms_min: u32,
    /// The longest backoff.
    pub backoff_ms_max: u32,
    /// The function's maximum age.
    pub max_age_s: u32,
    /// The function's timeout.
    pub timeout_ms: u32,
    /// What a failure does to its key.
    pub on_failure: u8,
    /// Whether the function is paused.
    pub paused: u8,
    /// The name of the tenant or function.
    #[rkyv(with = InlineAsBox)]
    pub name: &'a str,
}

/// Logged time and the next running number, so that both survive when every older segment is gone.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct ClockRecordV1 {
    /// Logged time.
    pub logged_ms: u64,
    /// The next accepted task's running number.
    pub next_seq: u64,
}

/// A task's record moved forward, so that the segment in which it stood can go. It says by itself what the records
/// between the task's acceptance and this one have said of it, since those may go too.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct RelocatedTaskRecordV1<'a> {
    /// The task as it was accepted.
    pub task: TaskRecordV1<'a>,
    /// Where its record stood.
    pub from: u64,
    /// Logged time of the move.
    pub at_ms: u64,
    /// Logged time of the next attempt, for `Retrying`, and of the end, for a finished task.
    pub due_ms: u64,
    /// Where the outcome of a finished task stands; 0 where there is none.
    pub outcome: u64,
    /// Bytes of that record.
    pub outcome_bytes: u32,
    /// Its maximum age in seconds, where it is not its function's; 0 where it is.
    pub max_age_s: u32,
    /// First half of the last lease's fencing token.
    pub generation: u16,
    /// Second half of the last lease's fencing token: leases so far.
    pub attempt: u16,
    /// Its state, as [`crate::state::State`] numbers it.
    pub state: u8,
    /// Retries spent.
    pub retries: u8,
    /// 1: its failure holds its ordering key.
    pub holds_key: u8,
}

/// The outcome of a finished task moved forward.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct RelocatedOutcomeRecordV1<'a> {
    /// The outcome as it was written.
    pub outcome: OutcomeRecordV1<'a>,
    /// Where its record stood.
    pub from: u64,
}

/// A given name moved forward without its task, which is forgotten.
#[derive(Archive, Serialize, Clone, Copy, Debug)]
pub struct RelocatedNameRecordV1<'a> {
    /// The task that the name names.
    pub request: u128,
    /// XXH3-64 of its payload.
    pub payload_hash: u64,
    /// The function's number.
    pub function: u32,
    /// The ordering key; empty for none.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a str,
    /// The given `task_id`.
    #[rkyv(with = InlineAsBox)]
    pub task_id: &'a str,
}

/// The room left in the batch that is being filled: the shard appends records to it, the log owns it.
///
/// Invariant: `len` is a multiple of [`RECORD_ALIGN`] from the batch's start, and `base` is the position of byte 0.
#[derive(Debug)]
pub struct BatchSpace<'a> {
    /// The whole buffer of the batch, its header included.
    pub bytes: &'a mut [u8],
    /// Bytes in use.
    pub len: usize,
    /// The log position of the buffer's first byte.
    pub base: Lsn,
    /// Records appended so far.
    pub records: u32,
}

/// Where a record stands: its position in the log and its range in the batch's buffer, header included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Placed {
    /// The log position of the record's header.
    pub lsn: Lsn,
    /// The offset of the header in the batch's buffer.
    pub offset: u32,
    /// Bytes of header and body.
    pub bytes: u32,
}

type Scratch<'a> = LowSerializer<Buffer<'a>, SubAllocator<'a>, Failure>;

impl BatchSpace<'_> {
    /// Bytes left.
    pub fn room(&self) -> usize {
        self.bytes.len() - self.len
    }

    /// Archives `record` at the end of the batch. The caller has made sure that it fits: see [`task_bytes`].
    pub fn append<R>(&mut self, schema: Schema, record: &R) -> Placed
    where
        R: for<'b> Serialize<Scratch<'b>>,
    {
        let start = self.len;
        let body = &mut self.bytes[start + RECORD_HEADER_BYTES..];
        let mut scratch = [MaybeUninit::uninit(); 64];
        let used = to_bytes_in_with_alloc::<_, _, Failure>(
            record,
            Buffer::from(body),
            SubAllocator::new(&mut scratch),
        )
        .expect("the caller checked that the record fits")
        .len();
        let header = &mut self.bytes[start..start + RECORD_HEADER_BYTES];
        header[..4].copy_from_slice(&(used as u32).to_le_bytes());
        header[4..6].copy_from_slice(&(schema as u16).to_le_bytes());
        header[6..].fill(0);
        let end = (start + RECORD_HEADER_BYTES + used).next_multiple_of(RECORD_ALIGN);
        self.bytes[start + RECORD_HEADER_BYTES + used..end].fill(0);
        self.len = end;
        self.records += 1;
        Placed {
            lsn: Lsn(self.base.0 + start as u64),
            offset: start as u32,
            bytes: (RECORD_HEADER_BYTES + used) as u32,
        }
    }
}

/// An upper bound of the bytes that a record with this much variable data takes in a batch.
pub const fn record_bytes(variable: usize) -> usize {
    RECORD_HEADER_BYTES + 192 + variable + RECORD_ALIGN
}

const _: () = assert!(size_of::<ArchivedRelocatedTaskRecordV1<'static>>() <= 192);

/// Why a record could not be read: its checksum held, so this is a bug or another version's record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unreadable {
    /// The schema id in the record's header.
    pub schema: u16,
}

/// A record read in place.
pub enum Record<'a> {
    /// A task was accepted.
    Task(&'a ArchivedTaskRecordV1<'a>),
    /// An attempt was leased.
    Lease(&'a ArchivedLeaseRecordV1),
    /// An attempt ended.
    Outcome(&'a ArchivedOutcomeRecordV1<'a>),
    /// A task changed its state.
    Move(&'a ArchivedMoveRecordV1),
    /// Configuration changed.
    Config(&'a ArchivedConfigRecordV1<'a>),
    /// Logged time.
    Clock(&'a ArchivedClockRecordV1),
    /// A task's record was moved forward.
    RelocatedTask(&'a ArchivedRelocatedTaskRecordV1<'a>),
    /// An outcome's record was moved forward.
    RelocatedOutcome(&'a ArchivedRelocatedOutcomeRecordV1<'a>),
    /// A name was moved forward.
    RelocatedName(&'a ArchivedRelocatedNameRecordV1<'a>),
}

/// Reads the body of a record, validating every byte.
pub fn read(schema: u16, body: &[u8]) -> Result<Record<'_>, Unreadable> {
    let unreadable = |_: Failure| Unreadable { schema };
    Ok(
        match Schema::from_number(schema).ok_or(Unreadable { schema })? {
            Schema::Task => {
                Record::Task(access::<ArchivedTaskRecordV1<'_>, Failure>(body).map_err(unreadable)?)
            }
            Schema::Lease => {
                Record::Lease(access::<ArchivedLeaseRecordV1, Failure>(body).map_err(unreadable)?)
            }
            Schema::Outcome => Record::Outcome(
                access::<ArchivedOutcomeRecordV1<'_>, Failure>(body).map_err(unreadable)?,
            ),
            Schema::Move => {
                Record::Move(access::<ArchivedMoveRecordV1, Failure>(body).map_err(unreadable)?)
            }
            Schema::Config => Record::Config(
                access::<ArchivedConfigRecordV1<'_>, Failure>(body).map_err(unreadable)?,
            ),
            Schema::Clock => {
                Record::Clock(access::<ArchivedClockRecordV1, Failure>(body).map_err(unreadable)?)
            }
            Schema::RelocatedTask => Record::RelocatedTask(
                access::<ArchivedRelocatedTaskRecordV1<'_>, Failure>(body).map_err(unreadable)?,
            ),
            Schema::RelocatedOutcome => Record::RelocatedOutcome(
                access::<ArchivedRelocatedOutcomeRecordV1<'_>, Failure>(body)
                    .map_err(unreadable)?,
            ),
            Schema::RelocatedName => Record::RelocatedName(
                access::<ArchivedRelocatedNameRecordV1<'_>, Failure>(body).map_err(unreadable)?,
            ),
        },
    )
}

/// Reads a whole record, header included, that must be a task's, where it was accepted or where it was moved to.
pub fn read_task(record: &[u8]) -> Result<&ArchivedTaskRecordV1<'_>, Unreadable> {
    match read_whole(record)? {
        Record::Task(task) => Ok(task),
        Record::RelocatedTask(relocated) => Ok(&relocated.task),
        Record::Lease(_)
        | Record::Outcome(_)
        | Record::Move(_)
        | Record::Config(_)
        | Record::Clock(_)
        | Record::RelocatedOutcome(_)
        | Record::RelocatedName(_) => Err(Unreadable {
            schema: u16::from_le_bytes([record[4], record[5]]),
        }),
    }
}

/// Reads a whole record, header included; bytes behind its end are ignored.
pub fn read_whole(record: &[u8]) -> Result<Record<'_>, Unreadable> {
    let Some((header, rest)) = record.split_at_checked(RECORD_HEADER_BYTES) else {
        return Err(Unreadable { schema: 0 });
    };
    let schema = u16::from_le_bytes([header[4], header[5]]);
    let bytes = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    read(schema, rest.get(..bytes).ok_or(Unreadable { schema })?)
}

/// The tags of a task from their length-prefixed bytes; stops at damage.
pub fn tags(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    core::iter::from_fn(move || {
        let (&len, rest) = bytes.split_first()?;
        let (tag, rest) = rest.split_at_checked(len as usize)?;
        bytes = rest;
        Some(tag)
    })
}

impl<'a> ConfigRecordV1<'a> {
    /// The flat shape of a change.
    pub fn new(version: u64, change: &'a Change) -> ConfigRecordV1<'a> {
        let mut record = ConfigRecordV1 {
            version,
            kind: 0,
            tenant: 0,
            function: 0,
            weight: 0,
            waiting_max: 0,
            concurrency: 0,
            retries: 0,
            backoff_ms_min: 0,
            backoff_ms_max: 0,
            max_age_s: 0,
            timeout_ms: 0,
            on_failure: 0,
            paused: 0,
            name: "",
        };
        match change {
            Change::Tenant { id, name, config } => {
                record.kind = 1;
                record.tenant = id.0;
                record.weight = config.weight;
                record.waiting_max = config.waiting_max;
                record.name = name;
            }
            Change::Function {
                id,
                tenant,
                name,
                config,
            } => {
                record.kind = 2;
                record.tenant = tenant.0;
                record.function = id.0;
                record.concurrency = config.concurrency;
                record.retries = config.retries;
                record.backoff_ms_min = config.backoff_ms_min;
                record.backoff_ms_max = config.backoff_ms_max;
                record.max_age_s = config.max_age_s;
                record.timeout_ms = config.timeout_ms;
                record.on_failure = config.on_failure as u8;
                record.paused = u8::from(config.paused);
                record.name = name;
            }
            Change::FunctionRemoved { id } => {
                record.kind = 3;
                record.function = id.0;
            }
        }
        record
    }
}

impl ArchivedConfigRecordV1<'_> {
    /// The change that the record holds; `None` for a kind of another version.
    pub fn change(&self) -> Option<Change> {
        let name = String::from(&*self.name);
        match self.kind {
            1 => Some(Change::Tenant {
                id: TenantId(self.tenant.to_native()),
                name,
                config: TenantConfig {
                    weight: self.weight.to_native(),
                    waiting_max: self.waiting_max.to_native(),
                },
            }),
            2 => Some(Change::Function {
                id: FunctionId(self.function.to_native()),
                tenant: TenantId(self.tenant.to_native()),
                name,
                config: FunctionConfig {
                    concurrency: self.concurrency.to_native(),
                    retries: self.retries,
                    backoff_ms_min: self.backoff_ms_min.to_native(),
                    backoff_ms_max: self.backoff_ms_max.to_native(),
                    max_age_s: self.max_age_s.to_native(),
                    timeout_ms: self.timeout_ms.to_native(),
                    on_failure: if self.on_failure == 1 {
                        OnFailure::Hold
                    } else {
                        OnFailure::Continue
                    },
                    paused: self.paused != 0,
                },
            }),
            3 => Some(Change::FunctionRemoved {
                id: FunctionId(self.function.to_native()),
            }),
            _ => None,
        }
    }
}

/// A finished task as the log holds it, copied out for a caller who asked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OutcomeCopy {
    /// The error's code; 0 for a success.
    pub code: u16,
    /// Logged time of the end.
    pub at_ms: u64,
    /// What the executor said of the error.
    pub error: String,
    /// The tail of what the attempt printed.
    pub output: Vec<u8>,
    /// The result.
    pub result: Vec<u8>,
}

impl From<&ArchivedOutcomeRecordV1<'_>> for OutcomeCopy {
    fn from(record: &ArchivedOutcomeRecordV1<'_>) -> OutcomeCopy {
        OutcomeCopy {
            code: record.code.to_native(),
            at_ms: record.at_ms.to_native(),
            error: String::from(&*record.error),
            output: record.output.to_vec(),
            result: record.result.to_vec(),
        }
    }
}

impl ArchivedTaskRecordV1<'_> {
    /// The task's identity.
    pub fn request(&self) -> RequestId {
        RequestId(self.request.to_native())
    }

    /// The record as it was written.
    pub fn to_record(&self) -> TaskRecordV1<'_> {
        TaskRecordV1 {
            request: self.request.to_native(),
            tenant: self.tenant.to_native(),
            function: self.function.to_native(),
            due_ms: self.due_ms.to_native(),
            payload_hash: self.payload_hash.to_native(),
            max_age_s: self.max_age_s.to_native(),
            cost: self.cost.to_native(),
            priority: self.priority,
            durability: self.durability,
            task_id: &self.task_id,
            key: &self.key,
            content_type: &self.content_type,
            traceparent: &self.traceparent,
            tags: &self.tags,
            payload: &self.payload,
        }
    }
}

impl ArchivedOutcomeRecordV1<'_> {
    /// The record as it was written.
    pub fn to_record(&self) -> OutcomeRecordV1<'_> {
        OutcomeRecordV1 {
            request: self.request.to_native(),
            at_ms: self.at_ms.to_native(),
            due_ms: self.due_ms.to_native(),
            generation: self.generation.to_native(),
            attempt: self.attempt.to_native(),
            state: self.state,
            retries: self.retries,
            code: self.code.to_native(),
            holds_key: self.holds_key,
            error: &self.error,
            output: &self.output,
            result: &self.result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{CellId, SlotIndex};
    use alloc::vec;

    #[test]
    fn a_task_record_is_read_in_place_as_it_was_written() {
        let mut buffer = vec![0xFFu8; 4096];
        let mut space = BatchSpace {
            bytes: &mut buffer,
            len: 128,
            base: Lsn(1 << 20),
            records: 0,
        };
        let request = RequestId::new(CellId(7), 8, 9, SlotIndex(10));
        let record = TaskRecordV1 {
            request: request.0,
            tenant: 1,
            function: 2,
            due_ms: 3,
            payload_hash: 4,
            max_age_s: 5,
            cost: 6,
            priority: 1,
            durability: 0,
            task_id: "order-1",
            key: "",
            content_type: "text/plain",
            traceparent: "",
            tags: b"\x03a=b\x01c",
            payload: b"hello",
        };
        let placed = space.append(Schema::Task, &record);
        assert_eq!((placed.lsn, placed.offset), (Lsn((1 << 20) + 128), 128));
        assert!(placed.bytes as usize <= record_bytes(7 + 10 + 6 + 5));
        assert_eq!(space.len % RECORD_ALIGN, 0);
        let end = placed.offset + placed.bytes;
        let bytes = buffer[placed.offset as usize..end as usize].to_vec();
        let read = read_task(&bytes).unwrap();
        assert_eq!(read.request(), request);
        assert_eq!(
            (&*read.task_id, &*read.key, &*read.payload),
            ("order-1", "", &b"hello"[..])
        );
        assert_eq!(tags(&read.tags).collect::<Vec<_>>(), [&b"a=b"[..], b"c"]);
        for cut in 0..bytes.len() {
            assert!(read_task(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = read_whole(&flipped);
        }
    }
}
