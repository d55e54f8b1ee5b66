//! What earlier versions wrote stays readable, and this one writes the same: each kind of thing on the disk has files in
//! `storage/tests/golden/`, the bytes as `.bin` and what they say as `.txt`, and `INDEX.md` lists them. `docs/FORMAT.md`
//! has the rule how a format changes. A file here is never changed; a new schema or version brings new ones.
//!
//! `PELTON_GOLDEN=new cargo test -p pelton-storage --test golden` writes the files that are missing, and nothing else.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use pelton_core::{
    clock::Now,
    config::{Change, FunctionConfig, OnFailure, TenantConfig},
    event::{Effects, Inbox},
    id::{CellId, FunctionId, Lsn, RequestId, SlotIndex, TenantId},
    limits::BATCH_BYTES_MAX,
    record::*,
    shard::{Options as ShardOptions, Shard},
    snapshot::{PieceKind, Unloadable, packed_tasks, unpacked_tasks},
    state::State,
};
use pelton_storage::{
    device::{Device, DeviceOp, Output},
    format::{
        BATCH_HEADER_BYTES, BLOCK_BYTES, BadHeader, BatchHeader, FLAG_CARRY, FLAG_CLOSING,
        FLAG_OPENING, FORMAT_VERSION, SegmentHeader, record_holds, seal_records,
    },
    log::Options,
    memory::MemoryDevice,
    recover::{RecoverError, records},
    snapshot::{
        Begin, PIECE_HEADER_BYTES, Read, Reading, SNAPSHOT_VERSION, encode_begin, encode_piece,
        snapshot_name,
    },
};
use xxhash_rust::xxh3::xxh3_64;

/// Names of files, without `.bin` and `.txt`, and the bytes that this version writes for them.
type Samples = Vec<(&'static str, Vec<u8>)>;

/// A kind of thing on the disk.
struct Kind {
    samples: fn() -> Samples,
    /// What bytes of the kind say.
    read: fn(&[u8]) -> String,
    /// Makes them those of the version behind this one, and sees that they are refused by it.
    refused: fn(Vec<u8>),
}

const KINDS: [Kind; 4] = [
    Kind {
        samples: records_of_the_log,
        read: read_record,
        refused: refused_record,
    },
    Kind {
        samples: segment_headers,
        read: read_segment_header,
        refused: refused_segment_header,
    },
    Kind {
        samples: batches,
        read: read_batch,
        refused: refused_batch,
    },
    Kind {
        samples: snapshots,
        read: read_snapshot,
        refused: refused_snapshot,
    },
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// One line a field.
macro_rules! lines {
    ($($name:literal: $value:expr),* $(,)?) => {{
        let mut text = String::new();
        $(text += &format!("{} {:?}\n", $name, $value);)*
        text
    }};
}

/// Where the samples' records stand, and under which key.
const POSITION: Lsn = Lsn((5 << 26) + 8192);
const LOG_ID: u128 = 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10;
const KEY: u128 = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100;

fn batch_header(flags: u16, payload_bytes: u32, records: u32) -> BatchHeader {
    BatchHeader {
        crc: 0,
        flags,
        payload_bytes,
        records,
        shard: 258,
        segment: 5,
        lsn: POSITION,
        epoch: 0x0102_0304_0506_0708,
        durable: Lsn(POSITION.0 - 4096),
        retired: Lsn(4 << 26),
        prev_crc: 0xa1b2_c3d4,
    }
}

/// A whole batch with these records.
fn batch<T>(flags: u16, append: impl FnOnce(&mut BatchSpace<'_>) -> T) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    let mut space = BatchSpace {
        bytes: &mut bytes,
        len: BATCH_HEADER_BYTES,
        base: POSITION,
        records: 0,
    };
    append(&mut space);
    let (len, records) = (space.len, space.records);
    bytes.truncate(len);
    seal_records(&mut bytes, POSITION, records, KEY);
    let header = batch_header(flags, (len - BATCH_HEADER_BYTES) as u32, records);
    header.seal(&mut bytes, KEY);
    bytes
}

/// A record as it stands in a batch, its header with its checksum in front.
fn record(append: impl FnOnce(&mut BatchSpace<'_>) -> Placed) -> Vec<u8> {
    let batch = batch(0, append);
    let whole = pelton_storage::format::record_bytes(&batch[BATCH_HEADER_BYTES..]).unwrap();
    batch[BATCH_HEADER_BYTES..][..whole].to_vec()
}

fn request(seq: u64) -> RequestId {
    RequestId::new(CellId(0xabc), 0x0012_3456_789a, seq, SlotIndex(0x1122_3344))
}

fn task(full: bool) -> TaskRecordV1<'static> {
    let text = |text: &'static str| if full { text } else { "" };
    TaskRecordV1 {
        request: request(0x1122_3344).0,
        tenant: 0x0102_0304,
        function: 0x1112_1314,
        due_ms: if full { 0x2122_2324_2526_2728 } else { 0 },
        payload_hash: if full { 0x3132_3334_3536_3738 } else { 0 },
        max_age_s: if full { 0x4142_4344 } else { 0 },
        cost: 0x5152,
        priority: u8::from(full),
        durability: u8::from(full),
        task_id: text("order-42"),
        key: text("customer-7"),
        content_type: text("application/json"),
        traceparent: text("0123456789abcdef0123456789"),
        tags: text("\u{3}a=b\u{4}bare").as_bytes(),
        payload: if full { &[0, 1, 0xfe, 0xff] } else { &[] },
    }
}

fn outcome(full: bool) -> OutcomeRecordV1<'static> {
    OutcomeRecordV1 {
        request: request(2).0,
        at_ms: 0x0102_0304_0506_0708,
        due_ms: if full { 0x1112_1314_1516_1718 } else { 0 },
        generation: 0x2122,
        attempt: 0x3132,
        state: if full { 5 } else { 8 },
        retries: if full { 3 } else { 0 },
        code: if full { 0x4142 } else { 0 },
        holds_key: u8::from(full),
        error: if full { "no route to host" } else { "" },
        output: if full { b"last line\n" } else { b"" },
        result: if full { b"\x00result\xff" } else { b"" },
    }
}

fn tenant() -> Change {
    Change::Tenant {
        id: TenantId(0x0102_0304),
        name: "acme".into(),
        config: TenantConfig {
            weight: 0x1112,
            waiting_max: 0x2122_2324_2526_2728,
        },
    }
}

fn function() -> Change {
    Change::Function {
        id: FunctionId(0x0102_0304),
        tenant: TenantId(0x1112_1314),
        name: "digest".into(),
        config: FunctionConfig {
            concurrency: 0x2122_2324,
            retries: 8,
            backoff_ms_min: 0x3132_3334,
            backoff_ms_max: 0x4142_4344,
            max_age_s: 0x5152_5354,
            timeout_ms: 0x6162_6364,
            on_failure: OnFailure::Hold,
            paused: true,
        },
    }
}

fn config(version: u64, change: &Change) -> Vec<u8> {
    record(|space| space.append(Schema::Config, &ConfigRecordV1::new(version, change)))
}

fn records_of_the_log() -> Samples {
    let lease = LeaseRecordV1 {
        request: request(1).0,
        executor: 0x0102_0304_0506_0708,
        at_ms: 0x1112_1314_1516_1718,
        generation: 0x2122,
        attempt: 0x3132,
    };
    let moved = MoveRecordV1 {
        request: request(3).0,
        at_ms: 0x0102_0304_0506_0708,
        state: 11,
    };
    let removed = Change::FunctionRemoved {
        id: FunctionId(0x0102_0304),
    };
    let clock = ClockRecordV1 {
        logged_ms: 0x0102_0304_0506_0708,
        next_seq: 0x1112_1314_1516_1718,
    };
    let relocated_task = RelocatedTaskRecordV1 {
        task: task(true),
        from: 0x0102_0304_0506_0708,
        at_ms: 0x1112_1314_1516_1718,
        due_ms: 0x2122_2324_2526_2728,
        outcome: 0x3132_3334_3536_3738,
        outcome_bytes: 0x4142_4344,
        max_age_s: 0x5152_5354,
        generation: 0x6162,
        attempt: 0x7172,
        state: 9,
        retries: 2,
        holds_key: 1,
    };
    let relocated_outcome = RelocatedOutcomeRecordV1 {
        outcome: outcome(true),
        from: 0x0102_0304_0506_0708,
    };
    let relocated_name = RelocatedNameRecordV1 {
        request: request(4).0,
        payload_hash: 0x0102_0304_0506_0708,
        function: 0x1112_1314,
        key: "customer-7",
        task_id: "order-42",
    };
    vec![
        (
            "record-01-task",
            record(|space| space.append(Schema::Task, &task(true))),
        ),
        (
            "record-01-task-bare",
            record(|space| space.append(Schema::Task, &task(false))),
        ),
        (
            "record-02-lease",
            record(|space| space.append(Schema::Lease, &lease)),
        ),
        (
            "record-03-outcome",
            record(|space| space.append(Schema::Outcome, &outcome(true))),
        ),
        (
            "record-03-outcome-bare",
            record(|space| space.append(Schema::Outcome, &outcome(false))),
        ),
        (
            "record-04-move",
            record(|space| space.append(Schema::Move, &moved)),
        ),
        ("record-05-config-tenant", config(1, &tenant())),
        ("record-05-config-function", config(2, &function())),
        ("record-05-config-removed", config(u64::MAX, &removed)),
        (
            "record-06-clock",
            record(|space| space.append(Schema::Clock, &clock)),
        ),
        (
            "record-07-relocated-task",
            record(|space| space.append(Schema::RelocatedTask, &relocated_task)),
        ),
        (
            "record-08-relocated-outcome",
            record(|space| space.append(Schema::RelocatedOutcome, &relocated_outcome)),
        ),
        (
            "record-09-relocated-name",
            record(|space| space.append(Schema::RelocatedName, &relocated_name)),
        ),
    ]
}

fn read_record(bytes: &[u8]) -> String {
    let position = Lsn(POSITION.0 + BATCH_HEADER_BYTES as u64);
    assert!(record_holds(bytes, position, KEY), "its checksum holds");
    let schema = u16::from_le_bytes([bytes[4], bytes[5]]);
    let read = read_whole(bytes).unwrap();
    let fields = match &read {
        Record::Task(task) => task_lines(task),
        Record::Lease(lease) => lines! {
            "request": RequestId(lease.request.to_native()).to_string(),
            "executor": lease.executor.to_native(),
            "at_ms": lease.at_ms.to_native(),
            "generation": lease.generation.to_native(),
            "attempt": lease.attempt.to_native(),
        },
        Record::Outcome(outcome) => outcome_lines(outcome),
        Record::Move(moved) => lines! {
            "request": RequestId(moved.request.to_native()).to_string(),
            "at_ms": moved.at_ms.to_native(),
            "state": moved.state,
        },
        Record::Config(config) => lines! {
            "version": config.version.to_native(),
            "kind": config.kind,
            "tenant": config.tenant.to_native(),
            "function": config.function.to_native(),
            "weight": config.weight.to_native(),
            "waiting_max": config.waiting_max.to_native(),
            "concurrency": config.concurrency.to_native(),
            "retries": config.retries,
            "backoff_ms_min": config.backoff_ms_min.to_native(),
            "backoff_ms_max": config.backoff_ms_max.to_native(),
            "max_age_s": config.max_age_s.to_native(),
            "timeout_ms": config.timeout_ms.to_native(),
            "on_failure": config.on_failure,
            "paused": config.paused,
            "name": &*config.name,
        },
        Record::Clock(clock) => lines! {
            "logged_ms": clock.logged_ms.to_native(),
            "next_seq": clock.next_seq.to_native(),
        },
        Record::RelocatedTask(relocated) => {
            task_lines(&relocated.task)
                + &lines! {
                    "from": relocated.from.to_native(),
                    "at_ms": relocated.at_ms.to_native(),
                    "due_ms": relocated.due_ms.to_native(),
                    "outcome": relocated.outcome.to_native(),
                    "outcome_bytes": relocated.outcome_bytes.to_native(),
                    "max_age_s": relocated.max_age_s.to_native(),
                    "generation": relocated.generation.to_native(),
                    "attempt": relocated.attempt.to_native(),
                    "state": relocated.state,
                    "retries": relocated.retries,
                    "holds_key": relocated.holds_key,
                }
        }
        Record::RelocatedOutcome(relocated) => {
            outcome_lines(&relocated.outcome) + &lines! { "from": relocated.from.to_native() }
        }
        Record::RelocatedName(name) => lines! {
            "request": RequestId(name.request.to_native()).to_string(),
            "payload_hash": name.payload_hash.to_native(),
            "function": name.function.to_native(),
            "key": &*name.key,
            "task_id": &*name.task_id,
        },
    };
    format!("schema {schema}\n{fields}")
}

fn task_lines(task: &ArchivedTaskRecordV1<'_>) -> String {
    let tags: Vec<String> = tags(&task.tags)
        .map(|tag| tag.escape_ascii().to_string())
        .collect();
    lines! {
        "request": task.request().to_string(),
        "tenant": task.tenant.to_native(),
        "function": task.function.to_native(),
        "due_ms": task.due_ms.to_native(),
        "payload_hash": task.payload_hash.to_native(),
        "max_age_s": task.max_age_s.to_native(),
        "cost": task.cost.to_native(),
        "priority": task.priority,
        "durability": task.durability,
        "task_id": &*task.task_id,
        "key": &*task.key,
        "content_type": &*task.content_type,
        "traceparent": &*task.traceparent,
        "tags": tags,
        "payload": &*task.payload,
    }
}

fn outcome_lines(outcome: &ArchivedOutcomeRecordV1<'_>) -> String {
    lines! {
        "request": RequestId(outcome.request.to_native()).to_string(),
        "at_ms": outcome.at_ms.to_native(),
        "due_ms": outcome.due_ms.to_native(),
        "generation": outcome.generation.to_native(),
        "attempt": outcome.attempt.to_native(),
        "state": outcome.state,
        "retries": outcome.retries,
        "code": outcome.code.to_native(),
        "holds_key": outcome.holds_key,
        "error": &*outcome.error,
        "output": &*outcome.output,
        "result": &*outcome.result,
    }
}

fn refused_record(mut bytes: Vec<u8>) {
    let next = Schema::ALL.len() as u16 + 1;
    bytes[4..6].copy_from_slice(&next.to_le_bytes());
    let read = read_whole(&bytes).map(|_| ());
    assert_eq!(read, Err(Unreadable { schema: next }));
}

fn segment_headers() -> Samples {
    let header = SegmentHeader {
        shard: 258,
        log_id: LOG_ID,
        segment: 5,
        segment_bytes: 1 << 26,
        epoch: 0x1112_1314_1516_1718,
        key: KEY,
    };
    vec![("segment-header-v1", header.encode())]
}

fn read_segment_header(bytes: &[u8]) -> String {
    let header = SegmentHeader::decode(bytes).unwrap();
    lines! {
        "shard": header.shard,
        "log_id": header.log_id,
        "segment": header.segment,
        "segment_bytes": header.segment_bytes,
        "epoch": header.epoch,
        "key": header.key,
    }
}

fn refused_segment_header(mut bytes: Vec<u8>) {
    bytes[4..6].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
    bytes[8..12].fill(0);
    let crc = crc32c::crc32c(&bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    let read = SegmentHeader::decode(&bytes);
    assert_eq!(read, Err(BadHeader::Version(FORMAT_VERSION + 1)));
}

fn batches() -> Samples {
    let two = batch(0, |space| {
        space.append(Schema::Task, &task(true));
        space.append(Schema::Outcome, &outcome(false));
    });
    vec![
        ("batch-v1", two),
        ("batch-v1-opening", batch(FLAG_OPENING, |_| {})),
        ("batch-v1-carry", batch(FLAG_CARRY, |_| {})),
        ("batch-v1-closing", batch(FLAG_CLOSING, |_| {})),
    ]
}

fn read_batch(bytes: &[u8]) -> String {
    let header = BatchHeader::peek(bytes).unwrap();
    assert!(header.holds(bytes, KEY), "its checksum holds");
    let mut text = lines! {
        "crc": header.crc,
        "flags": header.flags,
        "payload_bytes": header.payload_bytes,
        "records": header.records,
        "shard": header.shard,
        "segment": header.segment,
        "lsn": header.lsn.0,
        "epoch": header.epoch,
        "durable": header.durable.0,
        "retired": header.retired.0,
        "prev_crc": header.prev_crc,
    };
    let whole = records(bytes, header.records, |at, schema, body| {
        assert!(read(schema, body).is_ok());
        text += &format!("record at {at}: schema {schema}, {} bytes\n", body.len());
        Some(())
    });
    assert_eq!(whole, Some(()), "the lengths add up");
    text
}

fn refused_batch(mut bytes: Vec<u8>) {
    bytes[4..6].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
    assert_eq!(BatchHeader::peek(&bytes), None);
}

const OPTIONS: Options = Options {
    shard: 258,
    log_id: LOG_ID,
    segment_bytes: 1 << 26,
};
const SECRET: u64 = 0x5152_5354_5556_5758;
const NUMBER: u64 = 7;
/// Logged time of the snapshot's tasks.
const NOW_MS: u64 = 0x018f_0000_0000;

/// What a log says that leads to every kind of entry in a snapshot.
fn records_of_a_snapshot() -> Vec<Vec<u8>> {
    let at = |slot: u32| {
        RequestId::new(
            CellId(0xabc),
            NOW_MS,
            100 + u64::from(slot),
            SlotIndex(slot),
        )
    };
    let accepted = |slot: u32, change: fn(&mut TaskRecordV1<'static>)| {
        let mut task = TaskRecordV1 {
            request: at(slot).0,
            tenant: 0,
            function: 0,
            max_age_s: 0x1_5180,
            ..task(false)
        };
        change(&mut task);
        record(|space| space.append(Schema::Task, &task))
    };
    let leased = |slot: u32| {
        let lease = LeaseRecordV1 {
            request: at(slot).0,
            executor: 9,
            at_ms: NOW_MS,
            generation: 0,
            attempt: 1,
        };
        record(|space| space.append(Schema::Lease, &lease))
    };
    let ended = |slot: u32, change: fn(&mut OutcomeRecordV1<'static>)| {
        let mut outcome = OutcomeRecordV1 {
            request: at(slot).0,
            at_ms: NOW_MS,
            generation: 0,
            attempt: 1,
            ..outcome(false)
        };
        change(&mut outcome);
        record(|space| space.append(Schema::Outcome, &outcome))
    };
    let moved = |slot: u32, state: State| {
        let moved = MoveRecordV1 {
            request: at(slot).0,
            at_ms: NOW_MS,
            state: state as u8,
        };
        record(|space| space.append(Schema::Move, &moved))
    };
    let of = |id: u32, name: &str, change: Change| match change {
        Change::Function { config, .. } => Change::Function {
            id: FunctionId(id),
            tenant: TenantId(0),
            name: name.into(),
            config,
        },
        Change::Tenant { config, .. } => Change::Tenant {
            id: TenantId(id),
            name: name.into(),
            config,
        },
        removed @ Change::FunctionRemoved { .. } => removed,
    };
    let clock = ClockRecordV1 {
        logged_ms: NOW_MS,
        next_seq: 0x1112_1314,
    };
    let removed = Change::FunctionRemoved { id: FunctionId(1) };
    vec![
        config(1, &of(0, "acme", tenant())),
        config(2, &of(0, "digest", function())),
        config(3, &of(1, "gone", function())),
        config(4, &removed),
        record(|space| space.append(Schema::Clock, &clock)),
        // Waiting: with a given name, delayed, behind a held key, in memory alone.
        accepted(0, |task| {
            task.task_id = "order-42";
            task.payload_hash = 0x3132_3334_3536_3738;
        }),
        accepted(1, |task| task.due_ms = NOW_MS + 0x1_0000),
        accepted(2, |task| task.key = "customer-7"),
        accepted(3, |task| task.durability = 1),
        // Running: delayed before, too old already, asked to stop. Slot 4 stays empty.
        accepted(5, |task| task.due_ms = NOW_MS - 1_000),
        leased(5),
        accepted(6, |task| {
            task.due_ms = NOW_MS - 1_000;
            task.max_age_s = 2;
        }),
        leased(6),
        accepted(7, |_| {}),
        leased(7),
        moved(7, State::Stopping),
        // To be tried again.
        accepted(8, |_| {}),
        leased(8),
        ended(8, |outcome| {
            outcome.state = State::Retrying as u8;
            outcome.retries = 3;
            outcome.due_ms = NOW_MS + 0x2_0000;
        }),
        // Ended, in each of the ways.
        accepted(9, |_| {}),
        leased(9),
        ended(9, |outcome| outcome.result = b"result"),
        accepted(10, |task| task.key = "customer-8"),
        leased(10),
        ended(10, |outcome| {
            outcome.state = State::Failed as u8;
            outcome.error = "no route to host";
            outcome.holds_key = 1;
        }),
        accepted(11, |_| {}),
        moved(11, State::Stopped),
        accepted(12, |_| {}),
        moved(12, State::Expired),
        accepted(13, |_| {}),
        moved(13, State::Invalid),
    ]
}

/// The shard that has read those records, and the position behind them.
fn shard_of_a_snapshot() -> (Shard, Lsn) {
    let mut shard = Shard::new(shard_options());
    let mut position = POSITION;
    for record in records_of_a_snapshot() {
        let schema = u16::from_le_bytes([record[4], record[5]]);
        let body = &record[RECORD_HEADER_BYTES..];
        shard.replay(position, schema, body).unwrap();
        position.0 += 4096;
    }
    shard.start(now(0), Lsn(0));
    (shard, position)
}

fn shard_options() -> ShardOptions {
    ShardOptions {
        seed: SECRET,
        segment_bytes: OPTIONS.segment_bytes,
        ..ShardOptions::default()
    }
}

fn now(after_ms: u64) -> Now {
    Now {
        mono_ns: 1 + after_ms * 1_000_000,
        logged_ms: NOW_MS + after_ms,
    }
}

fn snapshots() -> Samples {
    let (mut shard, position) = shard_of_a_snapshot();
    // A moment later one that runs is too old.
    let mut bytes = vec![0; BATCH_BYTES_MAX];
    let mut space = BatchSpace {
        bytes: &mut bytes,
        len: BATCH_HEADER_BYTES,
        base: position,
        records: 0,
    };
    let (mut inbox, mut effects) = (Inbox::default(), Effects::default());
    shard.step(now(1_500), None, &mut inbox, &mut space, &mut effects);

    let begin = Begin {
        start: POSITION,
        epoch: 0x0102_0304_0506_0708,
        prev_crc: 0xa1b2_c3d4,
        secret: shard.secret(),
    };
    let mut file = encode_begin(OPTIONS, NUMBER, begin);
    let mut cursor = shard.snapshot();
    for index in 1.. {
        let piece = shard.snapshot_piece(&mut cursor).unwrap();
        let kind = piece.kind as u16;
        file.extend(encode_piece(
            OPTIONS,
            NUMBER,
            index,
            kind,
            position,
            &piece.bytes,
        ));
        if piece.kind == PieceKind::End {
            break;
        }
    }
    vec![("snapshot-v3", file)]
}

/// The disk of a shard with this one snapshot.
fn disk(file: &[u8]) -> MemoryDevice {
    let mut device = MemoryDevice::new(1, BLOCK_BYTES);
    let create = DeviceOp::Create {
        name: snapshot_name(NUMBER),
        bytes: file.len() as u64,
    };
    let Ok(Output::File(id, _)) = device.perform(create) else {
        panic!("a creation brings a file");
    };
    let write = DeviceOp::Write {
        file: id,
        offset: 0,
        data: file.to_vec(),
    };
    device.perform(write).unwrap();
    device.perform(DeviceOp::Flush { file: id }).unwrap();
    device.perform(DeviceOp::Close { file: id }).unwrap();
    device
}

/// Hands on each piece of a snapshot; false if it is damaged.
fn read_pieces(
    device: &mut MemoryDevice,
    mut each: impl FnMut(&Begin, PieceKind, Lsn, &[u8]),
) -> bool {
    let Some((mut reading, begin)) = Reading::open(device, OPTIONS, NUMBER).unwrap() else {
        return false;
    };
    let mut whole = false;
    while let Read::Piece(kind, position, payload) = reading.next(device).unwrap() {
        each(&begin, kind, position, payload);
        if kind == PieceKind::End {
            whole = true;
            break;
        }
    }
    reading.close(device);
    whole
}

/// One line for what stands in front of the items of a piece, and one for each item, as `docs/FORMAT.md` has them.
fn read_snapshot(bytes: &[u8]) -> String {
    let mut text = String::new();
    let whole = read_pieces(&mut disk(bytes), |begin, kind, position, payload| {
        if text.is_empty() {
            text += &format!("{begin:?}\n");
        }
        text += &format!("{kind:?} at {}\n", position.0);
        let plain = match kind {
            PieceKind::Tasks => unpacked_tasks(payload).expect("it is sound"),
            _ => payload.to_vec(),
        };
        let mut rest = &plain[..];
        let items: &[(&str, usize)] = match kind {
            PieceKind::Config => {
                text += &config_lines(payload);
                return;
            }
            PieceKind::Tasks => {
                text += &item_line(&[("first", 4), ("behind", 4)], &mut rest);
                &TASK_FIELDS
            }
            PieceKind::Names => &[
                ("hash", 16),
                ("request", 16),
                ("payload", 8),
                ("segment", 4),
            ],
            PieceKind::Ages => &[("at", 8), ("slot", 4), ("seq", 4)],
            PieceKind::HeldKeys => &[("hash", 16), ("function", 4)],
            PieceKind::End => &[("next_seq", 8), ("logged_ms", 8)],
        };
        while !rest.is_empty() {
            text += &item_line(items, &mut rest);
        }
    });
    assert!(whole, "it is sound");
    text
}

const TASK_FIELDS: [(&str, usize); 16] = [
    ("slot", 4),
    ("function", 4),
    ("seq", 8),
    ("accepted_ms", 8),
    ("position", 8),
    ("at", 8),
    ("key", 16),
    ("max_age_s", 4),
    ("cell", 2),
    ("attempt", 2),
    ("record_units", 2),
    ("cost", 2),
    ("state", 1),
    ("retries", 1),
    ("flags", 1),
    ("zero", 1),
];

fn item_line(fields: &[(&str, usize)], rest: &mut &[u8]) -> String {
    let fields = fields.iter().map(|&(name, bytes)| {
        let (field, behind) = rest.split_at(bytes);
        *rest = behind;
        let mut wide = [0; 16];
        wide[..bytes].copy_from_slice(field);
        format!("{name} {}", u128::from_le_bytes(wide))
    });
    format!("- {}\n", fields.collect::<Vec<_>>().join(", "))
}

fn config_lines(payload: &[u8]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < payload.len() {
        let record = &payload[at..];
        let bytes = pelton_storage::format::record_bytes(record).unwrap();
        let Ok(Record::Config(config)) = read_whole(&record[..bytes]) else {
            panic!("configuration stands there");
        };
        let (version, change) = (config.version.to_native(), config.change().unwrap());
        text += &format!("- version {version}, {change:?}\n");
        at += bytes.next_multiple_of(RECORD_ALIGN);
    }
    text
}

fn refused_snapshot(mut bytes: Vec<u8>) {
    bytes[4..6].copy_from_slice(&(SNAPSHOT_VERSION + 1).to_le_bytes());
    let length = u32::from_le_bytes(*bytes[8..].first_chunk().unwrap()) as usize;
    let payload = xxh3_64(&bytes[PIECE_HEADER_BYTES..][..length]);
    let checksum = payload.rotate_left(1) ^ xxh3_64(&bytes[..56]);
    bytes[56..64].copy_from_slice(&checksum.to_le_bytes());
    assert!(!read_pieces(&mut disk(&bytes), |_, _, _, _| {}));
}

fn kept(name: &str) -> Vec<u8> {
    let path = folder().join(name).with_extension("bin");
    fs::read(path).unwrap_or_else(|error| panic!("{name}.bin: {error}"))
}

#[test]
fn what_was_written_is_read_and_what_is_written_is_the_same() {
    let new = env::var("PELTON_GOLDEN").is_ok_and(|wish| wish == "new");
    for kind in &KINDS {
        for (name, written) in (kind.samples)() {
            let place = folder().join(name);
            let (bin, txt) = (place.with_extension("bin"), place.with_extension("txt"));
            if new && !bin.exists() {
                fs::write(&bin, &written).unwrap();
                fs::write(&txt, (kind.read)(&written)).unwrap();
            }
            let kept = kept(name);
            let says =
                fs::read_to_string(&txt).unwrap_or_else(|error| panic!("{name}.txt: {error}"));
            assert_eq!((kind.read)(&kept), says, "{name}: it reads as it did");
            assert!(
                kept == written,
                "{name}: what is written now differs from what was written; a format does not change"
            );
        }
    }
}

#[test]
fn every_schema_has_a_file_and_the_index_lists_them_all() {
    let schemas: BTreeSet<u16> = records_of_the_log()
        .iter()
        .map(|(_, written)| u16::from_le_bytes([written[4], written[5]]))
        .collect();
    let known: BTreeSet<u16> = Schema::ALL.iter().map(|schema| *schema as u16).collect();
    assert_eq!(schemas, known, "each schema has a sample");

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_some_and(|kind| kind == "bin") {
            let bytes = fs::read(&path).unwrap();
            let sum = format!("{:016x}", xxh3_64(&bytes));
            files.insert(name, (bytes.len().to_string(), sum));
        }
    }
    let samples = KINDS.iter().flat_map(|kind| (kind.samples)());
    let names: BTreeSet<String> = samples.map(|(name, _)| format!("{name}.bin")).collect();
    assert_eq!(
        names,
        files.keys().cloned().collect(),
        "every file has its sample here"
    );
    let index = fs::read_to_string(folder().join("INDEX.md")).unwrap();
    let rows = index.lines().filter(|line| line.starts_with("| `"));
    let listed: BTreeMap<String, (String, String)> = rows
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let cell = |at: usize| cells[at].trim_matches('`').to_owned();
            (cell(0), (cell(1), cell(2)))
        })
        .collect();
    let wanted: Vec<String> = files
        .iter()
        .map(|(name, (bytes, sum))| format!("| `{name}` | {bytes} | `{sum}` |"))
        .collect();
    assert_eq!(
        listed,
        files,
        "INDEX.md has these rows:\n{}",
        wanted.join("\n")
    );
}

#[test]
fn what_another_version_writes_is_refused_by_its_number() {
    for kind in &KINDS {
        for (_, written) in (kind.samples)() {
            (kind.refused)(written);
        }
    }
    // An error of that kind keeps a program from serving at all.
    let version = RecoverError::Version {
        file: String::new(),
        version: FORMAT_VERSION + 1,
    };
    assert!(version.is_of_another_version());
}

#[test]
fn a_shard_that_loads_the_kept_snapshot_is_the_one_that_read_the_log() {
    let (whole, position) = shard_of_a_snapshot();
    let mut loaded = Shard::new(ShardOptions {
        seed: 0,
        ..shard_options()
    });
    let mut kinds = Vec::new();
    let sound = read_pieces(
        &mut disk(&kept("snapshot-v3")),
        |begin, kind, place, payload| {
            if kinds.is_empty() {
                loaded.load_begins(begin.secret, POSITION.0 / OPTIONS.segment_bytes);
            }
            assert_eq!(place, position);
            assert_eq!(loaded.load(kind, place, payload), Ok(()));
            kinds.push(kind as u16);
        },
    );
    assert!(sound);
    assert_eq!(kinds, [1, 2, 3, 4, 5, 6], "every kind of piece is in it");
    loaded.start(now(0), Lsn(0));
    loaded.audit();
    loaded.audit_against(&whole);
    whole.audit_against(&loaded);
    assert_eq!(loaded.last_logged_ms(), now(1_500).logged_ms);
}

#[test]
fn damage_in_the_kept_snapshot_is_refused_wherever_it_is() {
    let file = kept("snapshot-v3");
    let mut device = disk(&file);
    let name = snapshot_name(NUMBER);
    let mut piece = 0;
    while piece < file.len() {
        let length = u32::from_le_bytes(*file[piece + 8..].first_chunk().unwrap()) as usize;
        let bytes = PIECE_HEADER_BYTES + length;
        for at in piece..piece + bytes {
            device.rot(&name, at);
            assert!(!read_pieces(&mut device, |_, _, _, _| {}), "byte {at}");
            device.rot(&name, at);
        }
        let cut = &file[..piece + bytes - 1];
        assert!(
            !read_pieces(&mut disk(cut), |_, _, _, _| {}),
            "cut at {piece}"
        );
        piece += bytes.next_multiple_of(BLOCK_BYTES);
        // Without this piece, and with it twice.
        let (front, behind) = file.split_at(piece);
        let before = piece - bytes.next_multiple_of(BLOCK_BYTES);
        let without = [&file[..before], behind].concat();
        assert!(!read_pieces(&mut disk(&without), |_, _, _, _| {}));
        let twice = [front, &file[before..]].concat();
        let last = piece == file.len();
        assert_eq!(read_pieces(&mut disk(&twice), |_, _, _, _| {}), last);
    }
    assert!(
        read_pieces(&mut device, |_, _, _, _| {}),
        "every bit is back"
    );
}

/// Loads the kept snapshot with one of its pieces changed.
fn load_with(changed: PieceKind, change: impl Fn(&mut Vec<u8>)) -> Result<(), Unloadable> {
    let mut shard = Shard::new(shard_options());
    shard.load_begins(SECRET, POSITION.0 / OPTIONS.segment_bytes);
    let mut loaded = Ok(());
    read_pieces(
        &mut disk(&kept("snapshot-v3")),
        |_, kind, position, payload| {
            let mut payload = payload.to_vec();
            if kind == changed {
                change(&mut payload);
            }
            loaded = loaded.and_then(|()| shard.load(kind, position, &payload));
        },
    );
    loaded
}

/// Changes what a piece says, where tasks are packed.
fn in_plain(kind: PieceKind, payload: &mut Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) {
    if kind != PieceKind::Tasks {
        return change(payload);
    }
    let mut plain = unpacked_tasks(payload).expect("it is sound");
    change(&mut plain);
    *payload = packed_tasks(&plain).expect("the tasks are whole");
}

#[test]
fn a_piece_that_says_what_no_shard_writes_is_refused() {
    // In the tasks' piece: slots 0 (Enqueued), 1 (Scheduled), 5 and 6 (Running), 9 (Succeeded).
    let task = |index: usize, field: &str| {
        let before = TASK_FIELDS.iter().take_while(|(name, _)| *name != field);
        8 + index * 72 + before.map(|(_, bytes)| bytes).sum::<usize>()
    };
    let far = u64::MAX.to_le_bytes();
    let cases: [(PieceKind, usize, &[u8]); 20] = [
        (PieceKind::Tasks, 0, &[1]),
        (PieceKind::Tasks, 4, &[5]),
        (PieceKind::Tasks, task(1, "slot"), &[0]),
        (PieceKind::Tasks, task(0, "function"), &[2]),
        (PieceKind::Tasks, task(0, "seq"), &far),
        (PieceKind::Tasks, task(0, "accepted_ms"), &far),
        (PieceKind::Tasks, task(0, "position"), &far),
        (PieceKind::Tasks, task(0, "cell"), &[0xff, 0xff]),
        (PieceKind::Tasks, task(0, "attempt"), &[1]),
        (PieceKind::Tasks, task(0, "cost"), &[0, 0]),
        (PieceKind::Tasks, task(0, "state"), &[State::Dequeued as u8]),
        (PieceKind::Tasks, task(0, "state"), &[State::Paused as u8]),
        (PieceKind::Tasks, task(0, "state"), &[0]),
        (PieceKind::Tasks, task(0, "flags"), &[4]),
        (PieceKind::Tasks, task(4, "attempt"), &[0]),
        (PieceKind::Tasks, task(8, "at"), &far),
        (PieceKind::Names, 40, &[0xff]),
        (PieceKind::HeldKeys, 16, &[2]),
        (PieceKind::End, 0, &far),
        (PieceKind::End, 8, &far),
    ];
    for (kind, at, bytes) in cases {
        let loaded = load_with(kind, |payload| {
            in_plain(kind, payload, |plain| {
                assert_ne!(&plain[at..at + bytes.len()], bytes);
                plain[at..at + bytes.len()].copy_from_slice(bytes);
            });
        });
        assert_eq!(loaded, Err(Unloadable), "{kind:?} with {bytes:?} at {at}");
    }
    for kind in (1..=6).filter_map(PieceKind::from_number) {
        let loaded = load_with(kind, |payload| payload.push(1));
        assert_eq!(loaded, Err(Unloadable), "{kind:?} with a byte more");
        assert_eq!(load_with(kind, |_| {}), Ok(()));
    }
    // Two running tasks of one key, and configuration that comes twice.
    let one_key = load_with(PieceKind::Tasks, |payload| {
        in_plain(PieceKind::Tasks, payload, |plain| {
            plain[task(4, "key")] = 1;
            plain[task(5, "key")] = 1;
        });
    });
    for (at, number) in [(8, 8), (8, 10), (11, 0xff)] {
        let tasks = load_with(PieceKind::Tasks, |payload| {
            assert_ne!(payload[at], number);
            payload[at] = number;
        });
        assert_eq!(tasks, Err(Unloadable), "another number of tasks");
    }
    let twice = load_with(PieceKind::Config, |payload| payload.extend_from_within(..));
    assert_eq!((one_key, twice), (Err(Unloadable), Err(Unloadable)));
}
