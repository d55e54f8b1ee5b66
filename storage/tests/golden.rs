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
    config::{Change, FunctionConfig, OnFailure, TenantConfig},
    id::{CellId, FunctionId, Lsn, RequestId, SlotIndex, TenantId},
    record::*,
};
use pelton_storage::{
    format::{
        BATCH_HEADER_BYTES, BadHeader, BatchHeader, FLAG_CARRY, FLAG_CLOSING, FLAG_OPENING,
        FORMAT_VERSION, SegmentHeader, record_holds, seal_records,
    },
    recover::{RecoverError, records},
};
use xxhash_rust::xxh3::xxh3_64;

/// A thing on the disk: the bytes that this version writes for it, and what it reads out of bytes.
struct Golden {
    /// Its files are called so, with `.bin` and `.txt` behind.
    name: &'static str,
    written: Vec<u8>,
    read: fn(&[u8]) -> String,
}

/// The kinds of things. Each function lists its samples.
const KINDS: [fn() -> Vec<Golden>; 3] = [records_of_the_log, segment_headers, batches];

fn all() -> Vec<Golden> {
    KINDS.iter().flat_map(|kind| kind()).collect()
}

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
fn batch(flags: u16, append: impl FnOnce(&mut BatchSpace<'_>)) -> Vec<u8> {
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
fn record(append: impl FnOnce(&mut BatchSpace<'_>)) -> Vec<u8> {
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

fn records_of_the_log() -> Vec<Golden> {
    let golden = |name, written| Golden {
        name,
        written,
        read: read_record,
    };
    let config = |version, change: Change| {
        record(|space| {
            space.append(Schema::Config, &ConfigRecordV1::new(version, &change));
        })
    };
    let removed = Change::FunctionRemoved {
        id: FunctionId(0x0102_0304),
    };
    vec![
        golden(
            "record-01-task",
            record(|space| {
                space.append(Schema::Task, &task(true));
            }),
        ),
        golden(
            "record-01-task-bare",
            record(|space| {
                space.append(Schema::Task, &task(false));
            }),
        ),
        golden(
            "record-02-lease",
            record(|space| {
                let lease = LeaseRecordV1 {
                    request: request(1).0,
                    executor: 0x0102_0304_0506_0708,
                    at_ms: 0x1112_1314_1516_1718,
                    generation: 0x2122,
                    attempt: 0x3132,
                };
                space.append(Schema::Lease, &lease);
            }),
        ),
        golden(
            "record-03-outcome",
            record(|space| {
                space.append(Schema::Outcome, &outcome(true));
            }),
        ),
        golden(
            "record-03-outcome-bare",
            record(|space| {
                space.append(Schema::Outcome, &outcome(false));
            }),
        ),
        golden(
            "record-04-move",
            record(|space| {
                let moved = MoveRecordV1 {
                    request: request(3).0,
                    at_ms: 0x0102_0304_0506_0708,
                    state: 11,
                };
                space.append(Schema::Move, &moved);
            }),
        ),
        golden("record-05-config-tenant", config(1, tenant())),
        golden("record-05-config-function", config(2, function())),
        golden("record-05-config-removed", config(u64::MAX, removed)),
        golden(
            "record-06-clock",
            record(|space| {
                let clock = ClockRecordV1 {
                    logged_ms: 0x0102_0304_0506_0708,
                    next_seq: 0x1112_1314_1516_1718,
                };
                space.append(Schema::Clock, &clock);
            }),
        ),
        golden(
            "record-07-relocated-task",
            record(|space| {
                let relocated = RelocatedTaskRecordV1 {
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
                space.append(Schema::RelocatedTask, &relocated);
            }),
        ),
        golden(
            "record-08-relocated-outcome",
            record(|space| {
                let relocated = RelocatedOutcomeRecordV1 {
                    outcome: outcome(true),
                    from: 0x0102_0304_0506_0708,
                };
                space.append(Schema::RelocatedOutcome, &relocated);
            }),
        ),
        golden(
            "record-09-relocated-name",
            record(|space| {
                let name = RelocatedNameRecordV1 {
                    request: request(4).0,
                    payload_hash: 0x0102_0304_0506_0708,
                    function: 0x1112_1314,
                    key: "customer-7",
                    task_id: "order-42",
                };
                space.append(Schema::RelocatedName, &name);
            }),
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

fn segment_headers() -> Vec<Golden> {
    let header = SegmentHeader {
        shard: 258,
        log_id: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        segment: 5,
        segment_bytes: 1 << 26,
        epoch: 0x1112_1314_1516_1718,
        key: KEY,
    };
    vec![Golden {
        name: "segment-header-v1",
        written: header.encode(),
        read: |bytes| {
            let header = SegmentHeader::decode(bytes).unwrap();
            lines! {
                "shard": header.shard,
                "log_id": header.log_id,
                "segment": header.segment,
                "segment_bytes": header.segment_bytes,
                "epoch": header.epoch,
                "key": header.key,
            }
        },
    }]
}

fn batches() -> Vec<Golden> {
    let golden = |name, written| Golden {
        name,
        written,
        read: read_batch,
    };
    let two = batch(0, |space| {
        space.append(Schema::Task, &task(true));
        space.append(Schema::Outcome, &outcome(false));
    });
    vec![
        golden("batch-v1", two),
        golden("batch-v1-opening", batch(FLAG_OPENING, |_| {})),
        golden("batch-v1-carry", batch(FLAG_CARRY, |_| {})),
        golden("batch-v1-closing", batch(FLAG_CLOSING, |_| {})),
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

#[test]
fn what_was_written_is_read_and_what_is_written_is_the_same() {
    let new = env::var("PELTON_GOLDEN").is_ok_and(|wish| wish == "new");
    for golden in all() {
        let place = folder().join(golden.name);
        let (bin, txt) = (place.with_extension("bin"), place.with_extension("txt"));
        if new && !bin.exists() {
            fs::write(&bin, &golden.written).unwrap();
            fs::write(&txt, (golden.read)(&golden.written)).unwrap();
        }
        let name = golden.name;
        let kept = fs::read(&bin).unwrap_or_else(|error| panic!("{name}.bin: {error}"));
        let says = fs::read_to_string(&txt).unwrap_or_else(|error| panic!("{name}.txt: {error}"));
        assert_eq!((golden.read)(&kept), says, "{name}: it reads as it did");
        assert!(
            kept == golden.written,
            "{name}: what is written now differs from what was written; a format does not change"
        );
    }
}

#[test]
fn every_schema_has_a_file_and_the_index_lists_them_all() {
    let schemas: BTreeSet<u16> = all()
        .iter()
        .filter(|golden| golden.name.starts_with("record-"))
        .map(|golden| u16::from_le_bytes([golden.written[4], golden.written[5]]))
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
    let names: BTreeSet<String> = all().iter().map(|g| format!("{}.bin", g.name)).collect();
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
    for golden in all() {
        let mut bytes = golden.written.clone();
        if golden.name.starts_with("record-") {
            let next = Schema::ALL.len() as u16 + 1;
            bytes[4..6].copy_from_slice(&next.to_le_bytes());
            let Err(Unreadable { schema }) = read_whole(&bytes) else {
                panic!("{}: schema {next} is not known", golden.name);
            };
            assert_eq!(schema, next);
        } else if golden.name.starts_with("segment-") {
            bytes[4..6].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
            bytes[8..12].fill(0);
            let crc = crc32c::crc32c(&bytes);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            let read = SegmentHeader::decode(&bytes);
            assert_eq!(read, Err(BadHeader::Version(FORMAT_VERSION + 1)));
        } else {
            bytes[4..6].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
            assert_eq!(BatchHeader::peek(&bytes), None, "{}", golden.name);
        }
    }
    // An error of that kind keeps a program from serving at all.
    let version = RecoverError::Version {
        file: String::new(),
        version: FORMAT_VERSION + 1,
    };
    assert!(version.is_of_another_version());
}
