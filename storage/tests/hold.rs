//! A log that is held for a backup: nothing in it goes, and no batch says that more is dead, until it is released.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use pelton_core::{
    id::Lsn,
    limits::BATCH_BYTES_MAX,
    record::{ClockRecordV1, Record, Schema, read},
};
use pelton_storage::{
    log::{Log, LogEvent, Options},
    memory::MemoryDevice,
    recover::recover,
};

const OPTIONS: Options = Options {
    shard: 3,
    log_id: 42,
    segment_bytes: 4 << 20,
};

/// A log of numbered records of which only those of the last segment are still needed.
struct Rig {
    log: Log<MemoryDevice>,
    now_ns: u64,
    number: u64,
}

/// The numbers that a start finds, and the log.
fn start(device: MemoryDevice) -> (Log<MemoryDevice>, Vec<u64>) {
    let mut found = Vec::new();
    let (log, _) = recover(device, OPTIONS, &mut |_, schema, body| {
        match read(schema, body) {
            Ok(Record::Clock(clock)) => found.push(clock.next_seq.to_native()),
            Ok(_) | Err(_) => panic!("only such records are written"),
        }
        Ok(())
    })
    .unwrap();
    (log, found)
}

impl Rig {
    fn turn(&mut self) {
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
        let (_, mut space) = self.log.batch();
        while space.room() >= 512 && space.records < 20_000 {
            let record = ClockRecordV1 {
                logged_ms: 0,
                next_seq: self.number,
            };
            space.append(Schema::Clock, &record);
            self.number += 1;
        }
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        let durable = self.log.durable();
        self.log
            .retire_before(Lsn(durable.0 - durable.0 % OPTIONS.segment_bytes));
        if records > 0 && self.log.can_seal() {
            self.log.seal(false);
        }
    }

    fn turns_until(&mut self, done: impl Fn(&Log<MemoryDevice>) -> bool) {
        for _ in 0..10_000 {
            if done(&self.log) {
                return;
            }
            self.turn();
        }
        panic!("it never comes to that");
    }
}

#[test]
fn what_a_start_would_read_when_a_log_is_held_is_read_by_every_start_until_it_is_released() {
    let (log, found) = start(MemoryDevice::new(1, BATCH_BYTES_MAX));
    assert!(found.is_empty());
    let mut rig = Rig {
        log,
        now_ns: 1,
        number: 0,
    };
    rig.turns_until(|log| log.stats().recycled > 4 && log.stats().live_segments == 1);
    // A batch that says that more is dead may be in flight.
    let (_, before) = start(rig.log.device().copied());
    assert!(before[0] > 0, "the log's beginning is gone");
    rig.log.hold();
    assert!(rig.log.stats().held);
    let live = rig.log.stats().live_segments;
    let mut later = Vec::new();
    for more in 1..=12 {
        rig.turns_until(|log| log.stats().live_segments == live + more);
        later = start(rig.log.device().copied()).1;
        let first = later.iter().position(|number| *number == before[0]);
        let first = first.expect("the first record is still there");
        assert_eq!(later[first..][..before.len()], before, "and all behind it");
    }
    let retired = rig.log.retired();
    assert!(later.len() > 10 * before.len());
    rig.log.release();
    rig.turns_until(|log| log.stats().live_segments == 1);
    assert!(rig.log.retired() > retired);
    let recycled = rig.log.stats().recycled;
    rig.turns_until(|log| log.stats().recycled > recycled + 4);
    let (_, after) = start(rig.log.device().copied());
    assert!(after[0] > *later.last().unwrap());
}
