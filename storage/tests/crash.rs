//! The log over a disk whose power fails: nothing accepted is lost, what was not accepted is lost or kept whole, and
//! damage to what was accepted is named.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use pelton_core::{
    id::Lsn,
    limits::BATCH_BYTES_MAX,
    record::{ClockRecordV1, OutcomeRecordV1, Schema},
};
use pelton_storage::{
    device::{Device, DeviceOp, Output},
    format::{BLOCK_BYTES, SegmentHeader},
    log::{Log, LogEvent, Options, READ_TRIES},
    memory::{MemoryDevice, Random},
    recover::{Outcome, RecoverError, Report, recover},
    segment::parse_segment_name,
};

const OPTIONS: Options = Options {
    shard: 3,
    log_id: 42,
    segment_bytes: 4 << 20,
};

struct Rig {
    log: Option<Log<MemoryDevice>>,
    now_ns: u64,
    random: Random,
    /// Every record in the order of appending: its position and number.
    appended: Vec<(Lsn, u64)>,
    /// How many of them were reported durable.
    accepted: usize,
    open: usize,
    flying: usize,
    number: u64,
    retired: Lsn,
}

type Found = (Result<Report, RecoverError>, Vec<(Lsn, u64)>);

impl Rig {
    fn new(seed: u64) -> Rig {
        Rig::on(MemoryDevice::new(seed, BATCH_BYTES_MAX), seed)
    }

    fn on(device: MemoryDevice, seed: u64) -> Rig {
        let mut rig = Rig {
            log: None,
            now_ns: 1,
            random: Random(seed ^ 0x5eed),
            appended: Vec::new(),
            accepted: 0,
            open: 0,
            flying: 0,
            number: 0,
            retired: Lsn(0),
        };
        rig.start(device).0.unwrap();
        rig
    }

    fn start(&mut self, device: MemoryDevice) -> Found {
        let mut found = Vec::new();
        let result = recover(device, OPTIONS, &mut |lsn, schema, body| {
            assert_eq!(schema, Schema::Clock as u16);
            match pelton_core::record::read(schema, body) {
                Ok(pelton_core::record::Record::Clock(clock)) => {
                    found.push((lsn, clock.next_seq.to_native()));
                    Ok(())
                }
                _ => Err(()),
            }
        });
        let report = result.map(|(log, report)| {
            self.log = Some(log);
            report
        });
        (report, found)
    }

    /// Appends a batch of records, padded by their number, and seals it if that is possible.
    fn append(&mut self, count: u64) {
        let log = self.log.as_mut().unwrap();
        let (durable, mut space) = log.batch();
        if durable.is_some() {
            self.accepted += std::mem::take(&mut self.flying);
        }
        for _ in 0..count {
            if space.room() < 512 {
                break;
            }
            let record = ClockRecordV1 {
                logged_ms: 0,
                next_seq: self.number,
            };
            let placed = space.append(Schema::Clock, &record);
            self.appended.push((placed.lsn, self.number));
            self.number += 1;
            self.open += 1;
        }
        let (len, records) = (space.len, space.records);
        log.filled(len, records);
        if records > 0 && log.can_seal() {
            log.seal(false);
            self.flying = std::mem::take(&mut self.open);
        }
    }

    fn poll(&mut self) {
        let log = self.log.as_mut().unwrap();
        while let Some(event) = log.poll(self.now_ns) {
            match event {
                LogEvent::Durable => break,
                LogEvent::Read { .. } | LogEvent::Unreadable { .. } | LogEvent::Scanned(_) => {}
                LogEvent::Poisoned => panic!("the disk works"),
            }
        }
        log.tick(self.now_ns);
        if log.has_durable() {
            self.append(0);
        }
    }

    fn run(&mut self) {
        self.now_ns += 300_000;
        self.log.as_mut().unwrap().device().run_one();
        self.poll();
    }

    fn settle(&mut self) {
        for _ in 0..200 {
            self.run();
        }
        self.append(0);
        for _ in 0..200 {
            self.run();
        }
    }

    /// What was accepted is there, in order and from `retired` on, and nothing that was never appended.
    fn check(&mut self, found: &[(Lsn, u64)]) {
        let first = found.first().map_or(usize::MAX, |first| {
            self.appended
                .iter()
                .position(|record| record == first)
                .expect("only what was appended is found")
        });
        let retired = self
            .appended
            .iter()
            .take(self.accepted)
            .position(|record| record.0 >= self.retired);
        if let Some(retired) = retired {
            assert!(first <= retired, "accepted records at the front are lost");
            assert!(
                first + found.len() >= self.accepted,
                "lost {} of {}",
                self.accepted - first - found.len(),
                self.accepted
            );
        }
        if !found.is_empty() {
            assert_eq!(&self.appended[first..first + found.len()], found);
            self.appended.truncate(first + found.len());
        } else {
            self.appended.truncate(self.accepted);
        }
        self.accepted = self.appended.len();
        self.open = 0;
        self.flying = 0;
    }

    fn crash_and_restart(&mut self) -> Report {
        let mut device = self.log.take().unwrap().into_device();
        device.crash();
        let (report, found) = self.start(device);
        let report = report.expect("a power cut is no corruption");
        self.check(&found);
        report
    }
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_accepted_and_is_never_called_corruption() {
    let mut torn = 0;
    for seed in 0..300 {
        let mut rig = Rig::new(seed);
        for _ in 0..4 {
            for _ in 0..rig.random.below(120) {
                match rig.random.below(10) {
                    0..4 => {
                        let count = rig.random.below(2_000) * rig.random.below(4);
                        rig.append(count);
                    }
                    4..9 => rig.run(),
                    _ if rig.accepted > 10 => {
                        let keep = rig.random.below(rig.accepted as u64) as usize;
                        let position = rig.appended[keep].0;
                        rig.retired = rig.retired.max(position);
                        let retired = rig.retired;
                        rig.log.as_mut().unwrap().retire_before(Lsn(retired.0
                            / OPTIONS.segment_bytes
                            * OPTIONS.segment_bytes));
                    }
                    _ => {}
                }
            }
            let report = rig.crash_and_restart();
            torn += u32::from(matches!(report.outcome, Outcome::TornTail { .. }));
        }
    }
    assert!(torn > 50, "torn tails were tried: {torn}");
}

#[test]
fn many_segments_are_rolled_retired_and_recycled_and_old_records_never_come_back() {
    let mut rig = Rig::new(1);
    let mut recycled = 0;
    for round in 0..400 {
        rig.append(4_000);
        for _ in 0..40 {
            rig.run();
        }
        if rig.accepted > 20_000 {
            rig.retired = rig.appended[rig.accepted - 20_000].0;
            let retired = rig.retired;
            rig.log.as_mut().unwrap().retire_before(Lsn(
                retired.0 / OPTIONS.segment_bytes * OPTIONS.segment_bytes
            ));
        }
        if round % 50 == 49 {
            recycled += rig.log.as_ref().unwrap().stats().recycled;
            rig.crash_and_restart();
        }
    }
    assert!(recycled > 5, "{recycled}");
    let files = rig.log.as_mut().unwrap().device().names().len();
    assert!(files < 12, "{files} files for one live segment");
}

#[test]
fn rot_in_what_was_accepted_is_named_and_nothing_is_touched() {
    let mut named = 0;
    for seed in 0..60 {
        let mut rig = Rig::new(seed);
        for _ in 0..20 {
            rig.append(50);
            rig.settle();
        }
        assert_eq!(rig.accepted, rig.appended.len());
        let mut device = rig.log.take().unwrap().into_device();
        device.crash();
        let record = rig.appended[rig.random.below(rig.accepted as u64) as usize].0;
        let segment = record.0 / OPTIONS.segment_bytes;
        assert_eq!(segment, 1);
        let offset = (record.0 % OPTIONS.segment_bytes) as usize + 20;
        device.rot("segment-000001.plt", offset);
        let before = device.contents("segment-000001.plt").to_vec();
        let (result, _) = rig.start(device);
        match result {
            Err(RecoverError::Corrupt {
                file,
                segment,
                offset: at,
                ..
            }) => {
                assert_eq!((file.as_str(), segment), ("segment-000001.plt", 1));
                assert!(at as usize <= offset && offset - (at as usize) < 64 << 10);
                named += 1;
            }
            other => panic!("seed {seed}: {other:?}"),
        }
        assert_eq!(before.len(), OPTIONS.segment_bytes as usize);
    }
    assert_eq!(named, 60);
}

#[test]
fn a_read_that_fails_twice_at_a_start_is_made_a_third_time() {
    let mut rig = Rig::new(30);
    rig.append(50);
    rig.settle();
    let mut device = rig.log.take().unwrap().into_device();
    device.crash();
    for fails in 1..=READ_TRIES {
        device.fail_next_reads(fails);
        let changes = device.changes();
        let started = recover(&mut device, OPTIONS, &mut |_, _, _| Ok(())).map(|(_, r)| r);
        if fails < READ_TRIES {
            assert_eq!(started.unwrap().outcome, Outcome::Clean);
        } else {
            assert!(matches!(started, Err(RecoverError::Device(_))));
            assert_eq!(device.changes(), changes);
        }
    }
}

#[test]
fn a_segment_whose_header_another_one_was_written_over_is_not_taken_for_an_empty_one() {
    let mut rig = Rig::new(29);
    while rig.log.as_mut().unwrap().stats().live_segments < 2 {
        rig.append(20_000);
        rig.run();
    }
    // Batches in the second segment, and the empty one of an idle log.
    for _ in 0..4 {
        rig.append(10);
        rig.settle();
    }
    let accepted = rig.accepted;
    let mut device = rig.log.take().unwrap().into_device();
    let names = device.names();
    let segments: Vec<&String> = names
        .iter()
        .filter(|name| parse_segment_name(name).is_some())
        .collect();
    let first = device.contents(segments[0])[..BLOCK_BYTES].to_vec();
    let opened = device.perform(DeviceOp::Open {
        name: segments[1].clone(),
    });
    let Ok(Output::File(file, _)) = opened else {
        panic!("opening brings a file");
    };
    let misdirected = DeviceOp::Write {
        file,
        offset: 0,
        data: first,
    };
    device.perform(misdirected).unwrap();
    let (report, found) = rig.start(device);
    assert!(
        matches!(report, Err(RecoverError::Corrupt { .. })),
        "{report:?} with {} of {accepted}",
        found.len()
    );
}

#[test]
fn a_segment_with_both_headers_damaged_or_gone_is_named() {
    let mut rig = Rig::new(5);
    for _ in 0..60 {
        rig.append(4_000);
        rig.settle();
    }
    let mut device = rig.log.take().unwrap().into_device();
    assert!(
        device
            .names()
            .iter()
            .filter_map(|name| parse_segment_name(name))
            .count()
            > 3
    );
    device.rot("segment-000001.plt", 40);
    let (report, _) = rig.start(device);
    assert_eq!(
        report.expect("the second copy serves").outcome,
        Outcome::Clean
    );
    let mut device = rig.log.take().unwrap().into_device();
    device.rot("segment-000001.plt", BLOCK_BYTES + 40);
    let (report, _) = rig.start(device);
    assert!(
        matches!(report, Err(RecoverError::Corrupt { .. })),
        "{report:?}"
    );
}

#[test]
fn a_live_segment_behind_another_ones_header_is_named() {
    let mut rig = Rig::new(6);
    for _ in 0..60 {
        rig.append(4_000);
        rig.settle();
    }
    let last = rig.appended[rig.accepted - 1].0.0 / OPTIONS.segment_bytes;
    let mut device = rig.log.take().unwrap().into_device();
    let file_of = |device: &MemoryDevice, number: u64| {
        let names = device.names();
        let header = |name: &String| SegmentHeader::decode(&device.contents(name)[..BLOCK_BYTES]);
        let found = names
            .iter()
            .find(|name| header(name).is_ok_and(|header| header.segment == number));
        found.unwrap().clone()
    };
    let (hit, next) = (file_of(&device, last), file_of(&device, last + 1));
    let data = device.contents(&next)[..BLOCK_BYTES].to_vec();
    let Ok(Output::File(file, _)) = device.perform(DeviceOp::Open { name: hit.clone() }) else {
        panic!("the file is there");
    };
    let misdirected = DeviceOp::Write {
        file,
        offset: 0,
        data,
    };
    device.perform(misdirected).unwrap();
    let (result, _) = rig.start(device);
    match result {
        Err(RecoverError::Corrupt { file, segment, .. }) => {
            assert_eq!((file, segment), (hit, last));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_failed_flush_poisons_the_log_and_is_never_retried() {
    for flush in [false, true] {
        let mut rig = Rig::new(9);
        rig.append(10);
        rig.settle();
        rig.append(10);
        let log = rig.log.as_mut().unwrap();
        if flush {
            log.device().fail_next_flush();
        } else {
            log.device().fail_next_write();
        }
        while log.device().run_one() {}
        assert!(matches!(log.poll(rig.now_ns), Some(LogEvent::Poisoned)));
        assert!(!log.can_seal());
        let cause = log.poisoned().unwrap().clone();
        log.tick(u64::MAX / 2);
        assert_eq!(log.device().queued(), 0, "nothing is written any more");
        assert_eq!(log.poisoned(), Some(&cause));
        let accepted = rig.accepted;
        rig.crash_and_restart();
        assert!(rig.accepted >= accepted);
    }
}

#[test]
fn a_lying_flush_is_noticed_by_this_test() {
    let lost = (0..40).any(|seed| {
        let mut device = MemoryDevice::new(seed, BATCH_BYTES_MAX);
        device.let_flushes_lie();
        let outcome = std::panic::catch_unwind(|| {
            let mut rig = Rig::on(device, seed);
            for _ in 0..10 {
                rig.append(100);
                rig.settle();
            }
            rig.crash_and_restart();
        });
        outcome.is_err()
    });
    assert!(
        lost,
        "a disk that lies about flushes loses accepted records"
    );
}

#[test]
fn a_full_disk_stops_preparation_and_comes_back() {
    let mut rig = Rig::new(3);
    rig.settle();
    for _ in 0..600 {
        rig.run();
    }
    let log = rig.log.as_mut().unwrap();
    assert_eq!(log.stats().prepared_segments, 2);
    log.device().limit_space(0);
    for _ in 0..150 {
        rig.append(4_000);
        rig.settle();
    }
    let log = rig.log.as_mut().unwrap();
    assert!(log.out_of_space());
    assert_eq!(log.stats().prepared_segments, 0);
    let held = rig.accepted;
    let log = rig.log.as_mut().unwrap();
    log.device().limit_space(usize::MAX);
    rig.now_ns += 2_000_000_000;
    for _ in 0..1_000 {
        rig.run();
    }
    rig.append(100);
    rig.settle();
    assert!(rig.accepted > held);
    assert!(!rig.log.as_ref().unwrap().out_of_space());
    rig.crash_and_restart();
}

#[test]
fn a_record_is_read_back_and_one_that_cannot_be_is_reported_lost() {
    let mut rig = Rig::new(8);
    rig.append(100);
    rig.settle();
    let (position, number) = rig.appended[77];
    let log = rig.log.as_mut().unwrap();
    log.read(7, position, 64);
    log.start_reads();
    while log.device().run_one() {}
    let Some(LogEvent::Read {
        ticket: 7,
        record: Some(record),
    }) = log.poll(rig.now_ns)
    else {
        panic!("the record is read");
    };
    let body = u32::from_le_bytes(record[..4].try_into().unwrap()) as usize;
    let read = pelton_core::record::read(Schema::Clock as u16, &record[16..16 + body]).unwrap();
    let pelton_core::record::Record::Clock(clock) = read else {
        panic!("a clock");
    };
    assert_eq!(clock.next_seq.to_native(), number);
    log.read(8, position, 64);
    log.start_reads();
    for _ in 0..3 {
        log.device().fail_next_read();
        log.device().run_one();
        if let Some(event) = log.poll(rig.now_ns) {
            let LogEvent::Unreadable {
                segment: 1,
                offset,
                rotten: false,
            } = event
            else {
                panic!("{event:?}");
            };
            assert_eq!(offset, position.0 % OPTIONS.segment_bytes);
            let event = log.poll(rig.now_ns);
            assert!(matches!(
                event,
                Some(LogEvent::Read {
                    ticket: 8,
                    record: None
                })
            ));
            return;
        }
    }
    panic!("three tries are enough");
}

/// Reads the record here, of which the caller thinks that it has so many bytes. `damage` is done to the disk before
/// each of its reads.
fn read_back(
    rig: &mut Rig,
    position: Lsn,
    bytes: usize,
    mut damage: impl FnMut(&mut MemoryDevice, u32),
) -> (Option<Vec<u8>>, Vec<LogEvent>) {
    let log = rig.log.as_mut().unwrap();
    log.read(7, position, bytes);
    log.start_reads();
    let mut before = Vec::new();
    for reads in 0.. {
        damage(log.device(), reads);
        assert!(log.device().run_one(), "a read is under way");
        while let Some(event) = log.poll(rig.now_ns) {
            if let LogEvent::Read { ticket: 7, record } = event {
                return (record, before);
            }
            before.push(event);
        }
    }
    unreachable!("a read ends");
}

#[test]
fn a_record_that_rots_in_a_running_log_is_noticed_whichever_byte_it_is() {
    let mut rig = Rig::new(9);
    rig.append(100);
    rig.settle();
    let [position, next] = [77, 78].map(|record: usize| rig.appended[record].0);
    let offset = (position.0 % OPTIONS.segment_bytes) as usize;
    let (record, _) = read_back(&mut rig, position, 64, |_, _| {});
    let bytes = record.unwrap().len();
    for byte in (0..bytes).filter(|byte| !(12..16).contains(byte)) {
        let failures = rig.log.as_ref().unwrap().stats().read_failures;
        let device = rig.log.as_mut().unwrap().device();
        device.rot("segment-000001.plt", offset + byte);
        let (record, before) = read_back(&mut rig, position, 64, |_, _| {});
        assert_eq!(record, None, "byte {byte}");
        assert!(
            matches!(before[..], [LogEvent::Unreadable { segment: 1, offset: at, rotten: true }] if at == offset as u64),
            "{before:?}"
        );
        assert_eq!(
            rig.log.as_ref().unwrap().stats().read_failures,
            failures + 1
        );
        // Its neighbour is none the worse, although both are read in one piece.
        let log = rig.log.as_mut().unwrap();
        log.read(8, position, 64);
        let (record, _) = read_back(&mut rig, next, 64, |_, _| {});
        assert_eq!(record.unwrap().len(), bytes);
        rig.settle();
        let device = rig.log.as_mut().unwrap().device();
        device.rot("segment-000001.plt", offset + byte);
    }
    let (record, before) = read_back(&mut rig, position, 64, |_, _| {});
    assert!(record.is_some() && before.is_empty());
}

#[test]
fn a_record_that_is_read_wrong_once_is_read_again() {
    let mut rig = Rig::new(10);
    rig.append(100);
    rig.settle();
    let position = rig.appended[50].0;
    let offset = (position.0 % OPTIONS.segment_bytes) as usize + 20;
    let (record, before) = read_back(&mut rig, position, 64, |device, reads| {
        // Wrong for the first two reads and right for the third.
        if reads == 0 || reads == 2 {
            device.rot("segment-000001.plt", offset);
        }
    });
    assert!(record.is_some() && before.is_empty());
}

#[test]
fn a_record_is_read_whole_whatever_its_reader_thinks_of_its_length() {
    let mut rig = Rig::new(11);
    let payload = vec![5; 100_000];
    let log = rig.log.as_mut().unwrap();
    let (_, mut space) = log.batch();
    let placed = space.append(
        Schema::Outcome,
        &OutcomeRecordV1 {
            request: 1,
            at_ms: 2,
            due_ms: 3,
            generation: 4,
            attempt: 5,
            state: 6,
            retries: 7,
            code: 8,
            holds_key: 0,
            error: "",
            output: &[],
            result: &payload,
        },
    );
    let (len, records) = (space.len, space.records);
    log.filled(len, records);
    log.seal(false);
    rig.open = 0;
    rig.settle();
    for bytes in [1, 16, 1_000, 90_000, 200_000] {
        let (record, before) = read_back(&mut rig, placed.lsn, bytes, |_, _| {});
        assert_eq!(record.unwrap().len(), placed.bytes as usize);
        assert!(before.is_empty());
    }
}

#[test]
fn a_segment_whose_preparation_failed_half_way_does_not_hide_the_one_that_took_its_number() {
    let mut rig = Rig::new(12);
    while rig.log.as_ref().unwrap().stats().prepared_segments < 2 {
        rig.run();
    }
    let log = rig.log.as_mut().unwrap();
    // The next file is made, named and given its header; reading that back fails.
    log.device().fail_next_read();
    while rig.log.as_ref().unwrap().stats().prepare_failures == 0 {
        rig.append(4_000);
        rig.settle();
    }
    rig.append(10);
    rig.settle();
    // The first segment dies, and its file, with a smaller name, becomes the segment of the same number.
    let retired = rig.appended.last().unwrap().0.0 / OPTIONS.segment_bytes;
    rig.retired = Lsn(retired * OPTIONS.segment_bytes);
    rig.log.as_mut().unwrap().retire_before(rig.retired);
    rig.append(10);
    rig.settle();
    rig.now_ns += 2_000_000_000;
    while rig.appended.last().unwrap().0.0 / OPTIONS.segment_bytes < retired + 3 {
        rig.append(4_000);
        rig.settle();
    }
    assert!(rig.log.as_ref().unwrap().stats().recycled > 0);
    rig.crash_and_restart();
}
