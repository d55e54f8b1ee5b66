//! Snapshots beside the log: the newest sound one is loaded and the log replayed from its start; damage, missing space
//! and cut writes cost no more than the older one or the whole log.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use pelton_core::{
    id::Lsn,
    limits::{BATCH_BYTES_MAX, SNAPSHOT_PIECE_BYTES},
    record::{ClockRecordV1, Record, Schema, Unreadable, read},
    snapshot::{Piece, PieceKind, Unloadable},
};
use pelton_storage::{
    device::{Device, DeviceOp, Output},
    format::BLOCK_BYTES,
    log::{Log, LogEvent, Options},
    memory::MemoryDevice,
    recover::{Outcome, RecoverError, Replayer, Report, recover_with},
    snapshot::{judge_snapshots, parse_snapshot_name, snapshot_name},
};

const OPTIONS: Options = Options {
    shard: 3,
    log_id: 42,
    segment_bytes: 4 << 20,
};
const SECRET: u64 = 0x5ec7e7;
/// Pieces of each snapshot, the last one included.
const PIECES: usize = 6;

/// What a start was given.
#[derive(Default)]
struct Given {
    secret: Option<u64>,
    pieces: Vec<(PieceKind, Lsn, Vec<u8>)>,
    records: Vec<u64>,
}

impl Replayer for Given {
    fn load_begins(&mut self, secret: u64, _first_segment: u64) {
        *self = Given {
            secret: Some(secret),
            ..Given::default()
        };
    }

    fn load(&mut self, kind: PieceKind, position: Lsn, bytes: &[u8]) -> Result<(), Unloadable> {
        self.pieces.push((kind, position, bytes.to_vec()));
        Ok(())
    }

    fn load_failed(&mut self) {
        *self = Given::default();
    }

    fn replay(&mut self, _position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        let Record::Clock(clock) = read(schema, body)? else {
            panic!("only such records are written");
        };
        self.records.push(clock.next_seq.to_native());
        Ok(())
    }
}

/// A log of numbered records, and snapshots that say how many there are.
struct Rig {
    log: Log<MemoryDevice>,
    now_ns: u64,
    number: u64,
}

fn start(device: MemoryDevice) -> (Result<(Rig, Report), RecoverError>, Given) {
    let mut given = Given::default();
    let started = recover_with(device, OPTIONS, &mut given).map(|(log, report)| {
        let number = given.records.last().map_or(0, |last| last + 1);
        let rig = Rig {
            log,
            now_ns: 1,
            number,
        };
        (rig, report)
    });
    (started, given)
}

impl Rig {
    fn new(seed: u64) -> Rig {
        let (started, given) = start(MemoryDevice::new(seed, BATCH_BYTES_MAX));
        assert!(given.secret.is_none());
        started.unwrap().0
    }

    /// One turn of a shard that appends so many records and takes part in a snapshot.
    fn turn(&mut self, records: u64) {
        self.now_ns += 1_000_000;
        while self.log.device().run_one() {}
        while let Some(event) = self.log.poll(self.now_ns) {
            assert!(matches!(event, LogEvent::Durable), "{event:?}");
            let (durable, space) = self.log.batch();
            assert!(durable.is_some());
            let (len, records) = (space.len, space.records);
            self.log.filled(len, records);
        }
        self.log.tick(self.now_ns);
        let (durable, mut space) = self.log.batch();
        assert!(durable.is_none());
        for _ in 0..records {
            if space.room() < 512 {
                break;
            }
            let record = ClockRecordV1 {
                logged_ms: 0,
                next_seq: self.number,
            };
            space.append(Schema::Clock, &record);
            self.number += 1;
        }
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        if records > 0 && self.log.can_seal() {
            self.log.seal(false);
        }
    }

    /// Appends until a snapshot is due.
    fn grow(&mut self) {
        while !self.log.wants_snapshot(self.now_ns, 0) {
            self.turn(20_000);
            self.turn(0);
        }
    }

    /// Takes a snapshot from its first piece to the end of its verification, while records go on being written.
    fn take_snapshot(&mut self) {
        let before = self.log.stats();
        self.log.begin_snapshot(SECRET, 1 << 20);
        let mut piece = 0;
        for _ in 0..1_000 {
            let now = self.log.stats();
            if now.snapshots > before.snapshots || now.snapshot_failures > before.snapshot_failures
            {
                return;
            }
            if self.log.wants_piece() {
                piece += 1;
                let kind = if piece == PIECES {
                    PieceKind::End
                } else {
                    PieceKind::Tasks
                };
                let bytes = vec![piece as u8; SNAPSHOT_PIECE_BYTES / piece];
                self.log.put_piece(Some(&Piece { kind, bytes }));
            }
            self.turn(if piece > 0 && piece < PIECES { 3 } else { 0 });
        }
        panic!("the snapshot never ends");
    }

    fn stop(self) -> MemoryDevice {
        let mut device = self.log.into_device();
        while device.run_one() {}
        while device.completed().is_some() {}
        device
    }
}

fn snapshots(device: &MemoryDevice) -> Vec<u64> {
    let names = device.names();
    names
        .iter()
        .filter_map(|name| parse_snapshot_name(name))
        .collect()
}

#[test]
fn a_start_loads_the_newest_and_replays_what_is_behind_its_start_and_two_are_kept() {
    let mut rig = Rig::new(1);
    let mut begun = 0;
    for _ in 0..3 {
        rig.grow();
        begun = rig.number;
        rig.take_snapshot();
    }
    let stats = rig.log.stats();
    assert_eq!((stats.snapshots, stats.snapshot_failures), (3, 0));
    rig.turn(5);
    rig.turn(0);
    let number = rig.number;
    let device = rig.stop();
    assert_eq!(snapshots(&device), [2, 3]);
    let (started, given) = start(device);
    let (rig, report) = started.unwrap();
    assert_eq!(given.secret, Some(SECRET));
    let behind: Vec<u64> = (begun..number).collect();
    assert_eq!(
        given.records, behind,
        "all that was written since it began, and no more"
    );
    assert_eq!(given.pieces.len(), PIECES);
    for (index, (kind, position, bytes)) in given.pieces.iter().enumerate() {
        let last = index + 1 == PIECES;
        assert_eq!(*kind == PieceKind::End, last);
        assert_eq!(bytes.len(), SNAPSHOT_PIECE_BYTES / (index + 1));
        assert!(bytes.iter().all(|&byte| usize::from(byte) == index + 1));
        assert!(index == 0 || given.pieces[index - 1].1 <= *position);
    }
    assert!(
        given.pieces[0].1 < given.pieces[PIECES - 1].1,
        "the log went on meanwhile"
    );
    assert_eq!(
        (report.snapshots_passed_over, rig.log.stats().snapshot_bytes),
        (0, report.snapshot_bytes)
    );
    assert!(report.snapshot_bytes > 0);
}

#[test]
fn one_is_due_when_half_as_many_records_have_come_as_it_would_have_entries() {
    let mut rig = Rig::new(3);
    rig.grow();
    let records = rig.number;
    assert!(rig.log.wants_snapshot(rig.now_ns, records));
    assert!(!rig.log.wants_snapshot(rig.now_ns, 4 * records));
    while !rig.log.wants_snapshot(rig.now_ns, 4 * records) {
        rig.turn(20_000);
        rig.turn(0);
    }
    assert!(rig.number >= 2 * records);
    // What a start has replayed counts too.
    let number = rig.number;
    let (started, given) = start(rig.stop());
    let (rig, _) = started.unwrap();
    assert_eq!(given.records.len() as u64, number - given.records[0]);
    assert!(rig.log.wants_snapshot(rig.now_ns, number));
    assert!(!rig.log.wants_snapshot(rig.now_ns, 3 * number));
}

#[test]
fn a_damaged_one_is_passed_over_wherever_it_is_damaged_and_none_is_ever_needed() {
    let mut rig = Rig::new(2);
    for _ in 0..2 {
        rig.grow();
        rig.take_snapshot();
    }
    let number = rig.number;
    let device = rig.stop();
    let newest = snapshot_name(2);
    let blocks = device.contents(&newest).len() / BLOCK_BYTES;
    let mut passed_over = 0;
    for block in 0..blocks {
        let offset = [0, 9, 60, 64, 2_000][block % 5];
        let mut damaged = device.copied();
        damaged.rot(&newest, block * BLOCK_BYTES + offset);
        let judged = judge_snapshots(&mut damaged, OPTIONS).unwrap();
        assert!(judged[1].sound.is_some());
        let (started, given) = start(damaged);
        let (_, report) = started.unwrap();
        assert_eq!(report.snapshots_passed_over == 1, judged[0].sound.is_none());
        assert_eq!(given.pieces.len(), PIECES, "the other one serves");
        assert_eq!(given.records.last(), Some(&(number - 1)));
        passed_over += report.snapshots_passed_over;
    }
    // What rots in the reserved room behind the last piece harms nothing.
    assert!(passed_over > 20, "{passed_over} of {blocks}");

    let mut damaged = device.copied();
    for name in [newest, snapshot_name(1)] {
        damaged.rot(&name, 3 * BLOCK_BYTES);
    }
    let (started, given) = start(damaged);
    assert_eq!(started.unwrap().1.snapshots_passed_over, 2);
    assert!(given.pieces.is_empty() && given.secret.is_none());
    assert_eq!(given.records, Vec::from_iter(0..number), "the whole log");
}

#[test]
fn a_log_that_ends_before_what_a_snapshot_vouches_for_is_damaged() {
    let mut rig = Rig::new(3);
    rig.grow();
    rig.take_snapshot();
    let device = rig.stop();
    let judged = judge_snapshots(&mut device.copied(), OPTIONS).unwrap();
    let (_, end) = judged[0].sound.unwrap();
    // What stands behind the end of the last batch that the snapshot knows is gone, and that batch with it.
    let offset = end.0 % OPTIONS.segment_bytes - BLOCK_BYTES as u64;
    let mut damaged = device.copied();
    for name in damaged.names() {
        if !name.starts_with("segment-") {
            continue;
        }
        let holds = damaged.contents(&name)[8_192 + 24..8_192 + 32]
            == (end.0 / OPTIONS.segment_bytes).to_le_bytes();
        if holds {
            let opened = damaged.perform(DeviceOp::Open { name });
            let Ok(Output::File(file, bytes)) = opened else {
                panic!("opening brings a file");
            };
            let lost = DeviceOp::Zero {
                file,
                offset,
                bytes: (bytes - offset) as usize,
            };
            damaged.perform(lost).unwrap();
        }
    }
    let (started, _) = start(damaged);
    let Err(RecoverError::Corrupt {
        segment,
        offset: at,
        ..
    }) = started.map(|_| ())
    else {
        panic!("it is damaged");
    };
    assert_eq!((segment, at), (end.0 / OPTIONS.segment_bytes, offset));
}

#[test]
fn a_disk_without_room_costs_the_snapshot_alone_and_a_cut_leaves_nothing_behind() {
    let mut rig = Rig::new(4);
    rig.grow();
    rig.log.device().limit_space(0);
    rig.take_snapshot();
    let stats = rig.log.stats();
    assert_eq!((stats.snapshots, stats.snapshot_failures), (0, 1));
    rig.log.device().limit_space(usize::MAX);
    assert!(
        !rig.log.wants_snapshot(rig.now_ns, 0),
        "it waits before it tries again"
    );
    rig.now_ns += 11_000_000_000;
    assert!(rig.log.wants_snapshot(rig.now_ns, 0));

    // The power fails in the middle.
    rig.log.begin_snapshot(SECRET, 1 << 20);
    for _ in 0..8 {
        if rig.log.wants_piece() {
            let bytes = vec![1; 1_000];
            rig.log.put_piece(Some(&Piece {
                kind: PieceKind::Tasks,
                bytes,
            }));
        }
        rig.turn(1);
    }
    let number = rig.number - 1;
    let mut device = rig.log.into_device();
    assert!(device.names().iter().any(|name| name.ends_with(".tmp")));
    device.crash();
    while device.completed().is_some() {}
    let (started, given) = start(device);
    let (rig, report) = started.unwrap();
    assert!(matches!(
        report.outcome,
        Outcome::Clean | Outcome::TornTail { .. }
    ));
    assert!(
        given.records.len() as u64 >= number,
        "nothing accepted is lost"
    );
    let device = rig.log.into_device();
    let others = device
        .names()
        .into_iter()
        .filter(|name| name.starts_with("snapshot-"));
    assert_eq!(others.collect::<Vec<_>>(), Vec::<String>::new());
}
