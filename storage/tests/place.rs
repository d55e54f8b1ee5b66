//! What lives in old logs is written into new ones: all of it, in order, durable when it is said to be, and not a byte of
//! the old ones is changed, whatever the new disks do.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use std::collections::BTreeSet;

use pelton_core::{
    clock::Now,
    config::{Change, FunctionConfig, OnFailure, TenantConfig},
    id::{CellId, FunctionId, Lsn, RequestId, SlotIndex, TenantId, shard_of},
    limits::BATCH_BYTES_MAX,
    moved::Tally,
    record::{
        BatchSpace, ConfigRecordV1, LeaseRecordV1, MoveRecordV1, OutcomeRecordV1, Placed, Schema,
        TaskRecordV1, record_bytes,
    },
    shard::{Options as ShardOptions, Shard},
    state::State,
};
use pelton_storage::{
    device::Device,
    log::{Log, Options},
    manifest::Manifest,
    memory::MemoryDevice,
    place::{PlaceError, Source, Written, carry},
    recover::{inspect_records, inspect_with, recover},
};

const BEGUN_MS: u64 = 1_790_000_000_000;
const SEGMENT_BYTES: u64 = 4 << 20;
const TASKS: u64 = 905;
const NOW: Now = Now {
    mono_ns: 0,
    logged_ms: BEGUN_MS + 3_600_000,
};

fn manifest(shards: u16) -> Manifest {
    Manifest::new(42, shards, SEGMENT_BYTES)
}

fn shard_options(manifest: &Manifest, shard: u16) -> ShardOptions {
    ShardOptions {
        shard: pelton_core::id::ShardId(shard),
        shards: manifest.shards,
        segment_bytes: SEGMENT_BYTES,
        first_page: manifest.first_page,
        page_shift: manifest.page_shift,
        finished_max: 40,
        ..ShardOptions::default()
    }
}

/// A log that is written record by record.
struct Writer {
    log: Log<MemoryDevice>,
    now_ns: u64,
}

impl Writer {
    fn turn(&mut self) {
        self.now_ns += 1_000_000_000;
        self.log.tick(self.now_ns);
        self.log.device().await_one();
        while self.log.poll(self.now_ns).is_some() {}
        let (_, space) = self.log.batch();
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
    }

    fn put(&mut self, variable: usize, append: impl FnOnce(&mut BatchSpace<'_>) -> Placed) {
        while {
            let (_, space) = self.log.batch();
            space.room() < record_bytes(variable)
        } {
            self.seal();
        }
        let (_, mut space) = self.log.batch();
        append(&mut space);
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        if records >= 7 {
            self.seal();
        }
    }

    fn seal(&mut self) {
        if self.log.open_records() > 0 {
            self.log.seal(true);
        }
        while !self.log.is_quiet() {
            self.turn();
        }
        self.turn();
    }
}

/// The log of an old shard, with tasks of its cells in every state that a record tells. Every fifth one has a payload of
/// 100,000 bytes. The last five wait in slots of failures that are forgotten and hold their keys.
fn old_log(manifest: &Manifest, shard: u16) -> MemoryDevice {
    let device = MemoryDevice::new(u64::from(shard) + 7, BATCH_BYTES_MAX);
    let (log, _) = recover(device, manifest.log(shard), &mut |_, _, _| Err(())).unwrap();
    let mut writer = Writer { log, now_ns: 0 };
    let strict = FunctionConfig {
        on_failure: OnFailure::Hold,
        ..FunctionConfig::default()
    };
    let changes = [
        Change::Tenant {
            id: TenantId(0),
            name: "acme".into(),
            config: TenantConfig::default(),
        },
        Change::Function {
            id: FunctionId(0),
            tenant: TenantId(0),
            name: "f".into(),
            config: strict,
        },
    ];
    for (version, change) in (1..).zip(&changes) {
        let record = ConfigRecordV1::new(version, change);
        writer.put(record.name.len(), |space| {
            space.append(Schema::Config, &record)
        });
    }
    let cells: Vec<u16> = (0..4096)
        .filter(|cell| shard_of(CellId(*cell), manifest.shards).0 == shard)
        .collect();
    let big = vec![shard as u8; 100_000];
    for n in 0..TASKS {
        let cell = CellId(cells[n as usize * 37 % cells.len()]);
        // Pages go round the shards.
        let place = if n < 900 { n } else { 12 + 24 * (n - 900) };
        let slot = SlotIndex(u32::from(shard) * 1024 + place as u32);
        let at_ms = BEGUN_MS + n;
        let request = RequestId::new(cell, at_ms, n + 1, slot);
        let (task_id, key) = (format!("t{shard}-{n}"), format!("k{shard}-{n}"));
        let task = TaskRecordV1 {
            request: request.0,
            tenant: 0,
            function: 0,
            due_ms: if n % 8 == 1 { NOW.logged_ms + n } else { 0 },
            payload_hash: n,
            max_age_s: 0,
            cost: 1,
            priority: 0,
            durability: 0,
            task_id: if n % 2 == 0 { &task_id } else { "" },
            key: if n % 3 == 0 { &key } else { "" },
            content_type: "",
            traceparent: "",
            tags: b"",
            payload: if n % 5 == 0 { &big } else { b"small" },
        };
        writer.put(110_000, |space| space.append(Schema::Task, &task));
        if n % 8 < 2 || n >= 900 {
            continue;
        }
        if n % 8 == 7 {
            let moved = MoveRecordV1 {
                request: request.0,
                at_ms,
                state: State::Stopped as u8,
            };
            writer.put(0, |space| space.append(Schema::Move, &moved));
            continue;
        }
        let lease = LeaseRecordV1 {
            request: request.0,
            executor: 9,
            at_ms,
            generation: 0,
            attempt: 1,
        };
        writer.put(0, |space| space.append(Schema::Lease, &lease));
        let state = match n % 8 {
            2 => continue,
            3 => State::Retrying,
            4 => State::Failed,
            _ => State::Succeeded,
        };
        let outcome = OutcomeRecordV1 {
            request: request.0,
            at_ms: at_ms + 5,
            due_ms: NOW.logged_ms + 9_000,
            generation: 0,
            attempt: 1,
            state: state as u8,
            retries: u8::from(state == State::Retrying),
            code: 0,
            holds_key: u8::from(state == State::Failed && n % 3 == 0),
            error: "",
            output: b"printed",
            result: b"result",
        };
        writer.put(100, |space| space.append(Schema::Outcome, &outcome));
    }
    writer.seal();
    writer.log.into_device()
}

/// A shard that has read its log and started.
fn read(device: &mut MemoryDevice, manifest: &Manifest, shard: u16) -> (Shard, u64) {
    let mut known = Shard::new(shard_options(manifest, shard));
    known.keep_failures();
    let replay = &mut |position: Lsn, schema: u16, body: &[u8]| {
        known.replay(position, schema, body).map_err(|_| ())
    };
    let report = inspect_records(device, manifest.log(shard), replay).unwrap();
    known.start(NOW, Lsn(0));
    (known, report.segments)
}

struct Carried {
    result: Result<(Vec<MemoryDevice>, Written), PlaceError>,
    old: Tally,
    /// Failures that are carried for their keys alone.
    lost: BTreeSet<RequestId>,
    /// What has been said of how far it is.
    said: Vec<(u64, u64)>,
    new: Manifest,
}

/// Places the tasks of old logs on so many new ones, on disks that `prepare` makes ready.
fn place(
    old_count: u16,
    new_count: u16,
    mut prepare: impl FnMut(u16, &mut MemoryDevice),
) -> Carried {
    let old = manifest(old_count);
    let mut disks: Vec<_> = (0..old_count).map(|shard| old_log(&old, shard)).collect();
    let mut read: Vec<_> = (0..)
        .zip(&mut disks)
        .map(|(shard, disk)| read(disk, &old, shard))
        .collect();
    let mut tally = Tally::default();
    read.iter().for_each(|(shard, _)| tally.add(shard.tally()));
    let lost = read.iter().flat_map(|(shard, _)| shard.lost_failures());
    let lost = lost.collect();
    let pages = read.iter().map(|(shard, _)| shard.pages_end()).max();
    let new = old.next(new_count, pages.unwrap());
    let changes: Vec<u64> = disks.iter().map(MemoryDevice::changes).collect();
    let mut sources: Vec<_> = (0..)
        .zip(&mut disks)
        .zip(&mut read)
        .map(|((shard, device), (known, segments))| Source {
            device,
            options: old.log(shard),
            shard: known,
            segments: *segments,
        })
        .collect();
    let logs: Vec<(MemoryDevice, Options)> = (0..new_count)
        .map(|shard| {
            let mut device = MemoryDevice::new(u64::from(shard) + 99, BATCH_BYTES_MAX);
            prepare(shard, &mut device);
            (device, new.log(shard))
        })
        .collect();
    let mut said = Vec::new();
    let result = carry(&mut sources, logs, &mut |done, all| said.push((done, all)));
    drop(sources);
    let after: Vec<u64> = disks.iter().map(MemoryDevice::changes).collect();
    assert_eq!(changes, after, "the old logs are only read");
    Carried {
        result,
        old: tally,
        lost,
        said,
        new,
    }
}

#[test]
fn all_that_lives_is_in_the_new_logs_when_the_power_fails_right_behind_it() {
    for (old, new) in [(2, 3), (3, 2), (1, 4), (4, 1)] {
        let carried = place(old, new, |_, _| {});
        let (disks, written) = carried.result.unwrap();
        assert!(written.bytes > 4 << 20, "{written:?}");
        assert!(carried.old.held_keys > 0 && carried.old.names > 0);
        assert!(written.names > 0, "names outlive their tasks: {written:?}");
        assert!(
            carried.said.is_sorted() && carried.said.len() > 4,
            "{:?}",
            carried.said
        );
        let last = carried.said.last().unwrap();
        assert_eq!(last.0, last.1);
        let mut tally = Tally::default();
        for (shard, mut disk) in (0..).zip(disks) {
            disk.crash();
            let mut known = Shard::new(ShardOptions {
                finished_max: u32::MAX,
                ..shard_options(&carried.new, shard)
            });
            inspect_with(&mut disk, carried.new.log(shard), &mut known).unwrap();
            known.start(NOW, Lsn(0));
            assert_eq!(known.directory().version(), 2);
            assert_eq!(known.next_seq(), TASKS + 1);
            tally.add(known.tally_without(&carried.lost));
        }
        assert!(carried.lost.len() > 5);
        assert_eq!(tally, carried.old, "{old} shards on {new}");
    }
}

#[test]
fn a_new_disk_that_fails_or_is_full_is_named() {
    let prepares: [fn(&mut MemoryDevice); 3] = [
        |disk| disk.limit_space(5 << 20),
        MemoryDevice::fail_next_flush,
        MemoryDevice::fail_next_for_space,
    ];
    for prepare in prepares {
        let carried = place(2, 2, |shard, disk| {
            if shard == 1 {
                prepare(disk);
            }
        });
        match carried.result {
            Ok(_) => panic!("the disk has failed"),
            Err(PlaceError::Write { shard, .. } | PlaceError::Check { shard, .. }) => {
                assert_eq!(shard.0, 1);
            }
            Err(error) => panic!("{error}"),
        }
    }
}
