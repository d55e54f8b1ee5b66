//! `pelton log verify` tells every kind of damage and names its place; `pelton log dump` shows every record.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use pelton_client::{Attempt, Operation, Task, TaskName};
use pelton_core::{id::Lsn, record::RECORD_HEADER_BYTES};
use pelton_storage::{
    file::FileDevice,
    format::*,
    log::Options,
    manifest::{DataDirectory, Manifest, shard_folder},
    recover::inspect,
    segment::parse_segment_name,
};
use pelton_tests::{PATIENCE, Server, ServerOptions, Worker, pelton};
use serde_json::{Value, json};

const SEGMENT_BYTES: u64 = 4 << 20;
const LOG_ID: u128 = 0x1234_5678;

/// A data directory of a server that was killed, with several segments, and what stands in it.
struct Rig {
    server: Server,
    options: Options,
    /// By segment: its file and its header.
    segments: BTreeMap<u64, (String, SegmentHeader)>,
    batches: Vec<BatchHeader>,
}

impl Rig {
    async fn new() -> Rig {
        let mut server = Server::prepared(ServerOptions::default());
        let mut directory = DataDirectory::open(&server.data()).unwrap();
        let manifest = Manifest::new(LOG_ID, 1, SEGMENT_BYTES);
        directory.write(manifest).unwrap();
        drop(directory);
        server.restart();
        let client = server.client().await;
        let make = r#"{"function": "f", "concurrency": 7}"#;
        client.query(Operation::FunctionSet, make).await.unwrap();
        let handler = async |_: Attempt| Ok(vec![9; 100]);
        let worker = Worker::of(server.options(), "f", 1, handler).await;
        for number in 0..14 {
            let name = format!("t{number}");
            let task = Task::new(vec![number; 900_000]).task_id(&name).key("k");
            client.submit("f", task).await.unwrap();
            let name = TaskName::parse(&format!("f/k/{name}")).unwrap();
            let done = client.wait(&name, PATIENCE).await.unwrap();
            assert!(done.succeeded());
        }
        worker.close().await.unwrap();
        let delayed = Task::new("d")
            .task_id("delayed")
            .delay(Duration::from_secs(900));
        let delayed = client.submit("f", delayed.tag("a=b")).await.unwrap();
        let delayed = TaskName::Request(delayed.request_id);
        client.stop(&delayed, Duration::ZERO).await.unwrap();
        server.kill9();

        let folder = shard_folder(&server.data(), 0);
        let mut segments = BTreeMap::new();
        for entry in fs::read_dir(&folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if parse_segment_name(&name).is_some() {
                let bytes = fs::read(folder.join(&name)).unwrap();
                let header = SegmentHeader::decode(&bytes[..BLOCK_BYTES]).unwrap();
                segments.insert(header.segment, (name, header));
            }
        }
        let options = Options {
            shard: 0,
            log_id: LOG_ID,
            segment_bytes: SEGMENT_BYTES,
        };
        let mut batches = Vec::new();
        let mut device = FileDevice::new(&folder);
        inspect(&mut device, options, &mut |header, _| {
            batches.push(*header);
            Ok(())
        })
        .unwrap();
        let last = batches.last().unwrap().segment;
        assert!(last > 3 && segments.len() as u64 > last, "segments ahead");
        Rig {
            server,
            options,
            segments,
            batches,
        }
    }

    /// Damages a copy and has it judged: exit code and what is said of the shard. The copy is as it was left.
    fn judge(&self, damage: impl FnOnce(&Path)) -> (i32, Value) {
        let copy = tempfile::tempdir_in(self.server.folder()).unwrap();
        let log = shard_folder(copy.path(), 0);
        fs::create_dir(&log).unwrap();
        for name in ["MANIFEST", "BEGUN"] {
            fs::copy(self.server.data().join(name), copy.path().join(name)).unwrap();
        }
        for (name, _) in self.segments.values() {
            let from = shard_folder(&self.server.data(), 0).join(name);
            fs::copy(from, log.join(name)).unwrap();
        }
        damage(&log);
        let before = files(&log);
        let (code, text, said) = pelton(&["log", "verify", "--json"], copy.path());
        let judged: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{said}"));
        assert_eq!(judged["sound"], code == 0);
        // The same for people.
        let (human, text, _) = pelton(&["log", "verify"], copy.path());
        assert_eq!(human, code);
        let shard = judged["shards"][0].clone();
        if let Some(file) = shard["file"].as_str() {
            assert!(text.contains(file), "{text}");
        }
        assert!(before == files(&log), "a look changes nothing");
        (code, shard)
    }

    /// The damage is found at this place.
    fn named(&self, what: &str, file: &str, at: Lsn, damage: impl FnOnce(&Path)) -> Value {
        let (code, shard) = self.judge(damage);
        assert_eq!(
            (code, &shard["outcome"]),
            (1, &json!("damaged")),
            "{what}: {shard}"
        );
        let found = (&shard["file"], &shard["segment"], &shard["offset"]);
        let (segment, offset) = (json!(at.0 / SEGMENT_BYTES), json!(at.0 % SEGMENT_BYTES));
        assert_eq!(found, (&json!(file), &segment, &offset), "{what}: {shard}");
        shard
    }

    fn file(&self, segment: u64) -> &str {
        &self.segments[&segment].0
    }

    /// A batch with records in the middle of this segment.
    fn middle(&self, segment: u64) -> BatchHeader {
        let batches = self.batches.iter().filter(|batch| batch.segment == segment);
        let mut behind = batches.skip(1).filter(|batch| batch.records > 0);
        *behind.next().unwrap()
    }

    /// Where the next batch would stand, and a header for it.
    fn tail(&self, payload: &[u8], records: u32) -> (BatchHeader, Vec<u8>) {
        let last = self.batches.last().unwrap();
        let header = BatchHeader {
            crc: 0,
            flags: 0,
            payload_bytes: payload.len() as u32,
            records,
            shard: 0,
            segment: last.segment,
            lsn: last.end(),
            epoch: last.epoch,
            durable: last.end(),
            retired: last.retired,
            prev_crc: last.crc,
        };
        let mut bytes = vec![0; BATCH_HEADER_BYTES];
        bytes.extend_from_slice(payload);
        (header, bytes)
    }
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.path(), fs::read(entry.path()).unwrap()))
        .collect()
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    write(path, at, &[byte[0] ^ 1]);
}

/// A record of this schema with a body of so many bytes, whose header says `told`.
fn record(schema: u16, body: usize, told: u32) -> Vec<u8> {
    let mut bytes = vec![0; (RECORD_HEADER_BYTES + body).next_multiple_of(16)];
    bytes[..4].copy_from_slice(&told.to_le_bytes());
    bytes[4..6].copy_from_slice(&schema.to_le_bytes());
    bytes
}

#[tokio::test]
async fn every_kind_of_damage_is_found_and_its_place_is_named() {
    let rig = Rig::new().await;
    let (code, sound) = rig.judge(|_| {});
    assert_eq!((code, &sound["outcome"]), (0, &json!("clean")), "{sound}");
    assert_eq!(
        (&sound["tasks"], &sound["outcomes"]),
        (&json!(15), &json!(14))
    );
    let last = rig.batches.last().unwrap();

    let batch = rig.middle(2);
    let place = batch.lsn.0 % SEGMENT_BYTES;
    for inside in [0, 9, 40, batch.bytes() as u64 - 1] {
        rig.named("a rotten batch", rig.file(2), batch.lsn, |log| {
            flip(&log.join(rig.file(2)), place + inside);
        });
    }
    for copy in [0, BLOCK_BYTES as u64] {
        let (code, shard) = rig.judge(|log| flip(&log.join(rig.file(2)), copy + 40));
        assert_eq!(
            (code, &shard["outcome"]),
            (0, &json!("clean")),
            "one copy serves"
        );
    }
    rig.named("both copies of a header", rig.file(2), Lsn(0), |log| {
        flip(&log.join(rig.file(2)), 40);
        flip(&log.join(rig.file(2)), BLOCK_BYTES as u64 + 40);
    });
    let start = |segment: u64| Lsn(segment * SEGMENT_BYTES + SEGMENT_DATA_OFFSET);
    // Also the last one that was begun, which only those that are prepared tell of.
    for segment in [1, 2, last.segment] {
        rig.named("a missing segment", "(no file)", start(segment), |log| {
            fs::remove_file(log.join(rig.file(segment))).unwrap();
        });
    }
    rig.named(
        "all live ones missing",
        "(no file)",
        start(last.segment),
        |log| {
            for segment in 1..=last.segment {
                fs::remove_file(log.join(rig.file(segment))).unwrap();
            }
        },
    );
    rig.named("no segment at all", "(no file)", Lsn(0), |log| {
        for (name, _) in rig.segments.values() {
            fs::remove_file(log.join(name)).unwrap();
        }
    });
    rig.named("a misdirected header", rig.file(2), start(2), |log| {
        write(&log.join(rig.file(2)), 0, &rig.segments[&3].1.encode());
    });
    rig.named("a truncated file", rig.file(2), batch.lsn, |log| {
        let file = fs::File::options().write(true).open(log.join(rig.file(2)));
        file.unwrap().set_len(place + 20).unwrap();
    });

    let of_another = |header: SegmentHeader, log: &Path| {
        let other = header.encode();
        for copy in [0, BLOCK_BYTES as u64] {
            write(&log.join(rig.file(2)), copy, &other);
        }
    };
    let header = rig.segments[&2].1;
    for foreign in [
        SegmentHeader {
            log_id: LOG_ID + 1,
            ..header
        },
        SegmentHeader { shard: 1, ..header },
        SegmentHeader {
            segment_bytes: 2 * SEGMENT_BYTES,
            ..header
        },
    ] {
        let (code, shard) = rig.judge(|log| of_another(foreign, log));
        assert_eq!((code, &shard["outcome"]), (1, &json!("not_readable")));
        assert_eq!(shard["file"], rig.file(2));
        let error = shard["error"].as_str().unwrap();
        assert!(
            error.contains("belongs to another data directory"),
            "{error}"
        );
    }
    let (code, shard) = rig.judge(|log| {
        let mut newer = header.encode();
        newer[4..6].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
        newer[8..12].fill(0);
        let crc = crc32c::crc32c(&newer);
        newer[8..12].copy_from_slice(&crc.to_le_bytes());
        write(&log.join(rig.file(2)), 0, &newer);
    });
    assert_eq!((code, &shard["file"]), (1, &json!(rig.file(2))), "{shard}");
    let error = shard["error"].as_str().unwrap();
    assert!(
        error.contains(&format!("log format {}", FORMAT_VERSION + 1)),
        "{error}"
    );

    // Behind the end: half a batch, and whole ones that this program would not have written.
    let key = rig.segments[&last.segment].1.key;
    let append = |payload: &[u8], records: u32, rotten: bool| {
        let (header, mut bytes) = rig.tail(payload, records);
        let place = header.lsn;
        move |log: &Path, file: &str| {
            header.seal(&mut bytes, key);
            let end = bytes.len() - 1;
            bytes[end] ^= u8::from(rotten);
            write(&log.join(file), place.0 % SEGMENT_BYTES, &bytes);
        }
    };
    let (file, end) = (rig.file(last.segment), last.end());
    let mut torn = append(&record(6, 16, 16), 1, true);
    let (code, shard) = rig.judge(|log| torn(log, file));
    assert_eq!(
        (code, &shard["outcome"]),
        (0, &json!("torn_tail")),
        "{shard}"
    );
    assert_eq!(shard["torn_at"], end.0);
    let first = Lsn(end.0 + BATCH_HEADER_BYTES as u64);
    for (payload, records) in [
        (record(6, 16, 17), 1),
        (record(6, 16, u32::MAX), 1),
        (record(6, 16, 0), 1),
        ([record(6, 16, 16), record(6, 16, 16)].concat(), 1),
        (record(6, 16, 16), 2),
    ] {
        let mut wrong = append(&payload, records, false);
        let (code, shard) = rig.judge(|log| wrong(log, file));
        assert_eq!((code, &shard["outcome"]), (1, &json!("damaged")), "{shard}");
        assert_eq!(
            (&shard["file"], &shard["segment"]),
            (&json!(file), &json!(last.segment))
        );
        let offset = shard["offset"].as_u64().unwrap() + last.segment * SEGMENT_BYTES;
        assert!((end.0..end.0 + 4096).contains(&offset), "{shard}");
    }
    let mut newer = append(&record(4_711, 16, 16), 1, false);
    let shard = rig.named("a schema of another version", file, first, |log| {
        newer(log, file)
    });
    assert!(
        shard["error"].as_str().unwrap().contains("schema 4711"),
        "{shard}"
    );
    assert_eq!(rig.options.shard, 0);
}

#[tokio::test]
async fn every_record_is_dumped_with_its_fields() {
    let rig = Rig::new().await;
    let (code, text, said) = pelton(&["log", "dump", "--json", "--payload"], &rig.server.data());
    assert_eq!(code, 0, "{said}");
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let records: u64 = rig.batches.iter().map(|b| u64::from(b.records)).sum();
    assert_eq!(rows.len() as u64, records);
    let kinds: BTreeSet<&str> = rows.iter().map(|r| r["record"].as_str().unwrap()).collect();
    for kind in ["task", "lease", "outcome", "move", "config", "clock"] {
        assert!(kinds.contains(kind), "{kinds:?}");
    }
    let find = |field: &str, value: &str| {
        let mut found = rows.iter().filter(|row| row[field] == value);
        found.next().unwrap_or_else(|| panic!("{field} {value}"))
    };
    let task = find("task_id", "t3");
    assert_eq!(task["key"], "k");
    assert_eq!(task["payload_bytes"], 900_000);
    assert_eq!(task["content"].as_str().unwrap().len(), 4 * 900_000);
    let delayed = find("task_id", "delayed");
    assert_eq!(
        (&delayed["tags"], &delayed["content"]),
        (&json!("a=b"), &json!("d"))
    );
    assert!(delayed["due_ms"].as_u64() > Some(0));
    let function = find("kind", "function");
    assert_eq!(
        (&function["name"], &function["concurrency"]),
        (&json!("f"), &json!(7))
    );
    let moved = find("record", "move");
    assert_eq!(moved["state"], "Stopped");
    let outcome = find("record", "outcome");
    assert_eq!(
        (&outcome["state"], &outcome["result_bytes"]),
        (&json!("Succeeded"), &json!(100))
    );
    // Positions are told so that a record is found again.
    let lsns: Vec<u64> = rows
        .iter()
        .map(|row| row["lsn"].as_u64().unwrap())
        .collect();
    assert!(lsns.is_sorted());
    // A dump of a damaged log shows what stands before the damage, and says where that is.
    let batch = rig.middle(2);
    let path = shard_folder(&rig.server.data(), 0).join(rig.file(2));
    flip(&path, batch.lsn.0 % SEGMENT_BYTES + 100);
    let (code, text, said) = pelton(&["log", "dump", "--json"], &rig.server.data());
    assert_eq!(code, 1);
    let before = lsns.iter().filter(|lsn| **lsn < batch.lsn.0).count();
    assert_eq!(text.lines().count(), before);
    assert!(said.contains(rig.file(2)), "{said}");
}
