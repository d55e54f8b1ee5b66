//! Placing: what lives in the logs of one number of shards is written into new logs of another number, each task into that
//! of its cell's shard. It is cleaning that goes through whole logs at once: the records are the same
//! (`pelton_core::moved`), and a start reads them in the same way.
//!
//! An old log is gone through twice, tasks and names the first time and outcomes the second, since a start finds the task
//! of a moved outcome only behind the task. Before that come failures that are forgotten and hold their keys still: another
//! task may have their slot, and a start takes the one that comes last. Whatever is written is durable when [`carry`] returns, and the old logs are as
//! they were.

use std::fmt;

use pelton_core::{
    config::{Change, Directory},
    id::{ShardId, shard_of},
    limits::BATCH_BYTES_MAX,
    moved::{Moved, Tally},
    record::{
        BatchSpace, ClockRecordV1, ConfigRecordV1, Placed, RECORD_HEADER_BYTES, Schema,
        read as read_record, record_bytes,
    },
    shard::Shard,
};

use crate::{
    device::{Device, DeviceError, DeviceErrorKind},
    log::{Log, LogEvent, Options},
    recover::{Outcome, RecoverError, inspect_records, recover},
};

/// A batch with so many bytes is sealed; the rest of its room is for the largest record.
const SEAL_BYTES: usize = BATCH_BYTES_MAX / 2;
/// How often it is said how much has been gone through.
const SAY_BYTES: u64 = 1 << 20;
/// By how much time goes on between two turns of a log, so that nothing in it waits for time.
const TURN_NS: u64 = 1_000_000_000;

/// Why nothing was placed. The old logs are as they were.
#[derive(Clone, Debug)]
pub enum PlaceError {
    /// The log of an old shard.
    Read {
        /// Which.
        shard: ShardId,
        /// How it is damaged.
        error: RecoverError,
    },
    /// The log of a new shard could not be written.
    Write {
        /// Which.
        shard: ShardId,
        /// What the disk said.
        error: DeviceError,
    },
    /// A new log that was just written does not read back.
    Check {
        /// Which.
        shard: ShardId,
        /// What is wrong with it.
        error: RecoverError,
    },
    /// What the new logs hold is not what the old ones held.
    Differs {
        /// What the old ones held.
        old: Tally,
        /// What the new ones hold.
        new: Tally,
    },
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlaceError::Read { shard, error } => write!(f, "shard {}: {error}", shard.0),
            PlaceError::Write { shard, error } => {
                write!(
                    f,
                    "the new log of shard {} cannot be written: {error}",
                    shard.0
                )
            }
            PlaceError::Check { shard, error } => write!(
                f,
                "the new log of shard {} does not read back, and the old ones stay: {error}",
                shard.0
            ),
            PlaceError::Differs { old, new } => write!(
                f,
                "the new logs do not hold what the old ones do, which stay: {old:?} became {new:?}"
            ),
        }
    }
}

impl std::error::Error for PlaceError {}

/// An old shard: its log, and what it knows, started at a time that all of them share and not stepped.
#[derive(Debug)]
pub struct Source<'s, D> {
    /// The disk with the log.
    pub device: D,
    /// What identifies the log.
    pub options: Options,
    /// Its facts.
    pub shard: &'s mut Shard,
    /// Segments of the log.
    pub segments: u64,
}

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Tasks, ended ones among them.
    pub tasks: u64,
    /// Given names without their task.
    pub names: u64,
    /// Bytes of the batches.
    pub bytes: u64,
}

/// Writes everything that lives in the old logs into a new log on each of `new`, which must be empty. `said` hears how much
/// has been gone through, of how much. The devices come back.
pub fn carry<D: Device, N: Device>(
    old: &mut [Source<'_, D>],
    new: Vec<(N, Options)>,
    said: &mut dyn FnMut(u64, u64),
) -> Result<(Vec<N>, Written), PlaceError> {
    let count = new.len() as u16;
    let mut writers = Vec::with_capacity(new.len());
    for (device, options) in new {
        writers.push(Writer::begin(device, options)?);
    }
    let clock = ClockRecordV1 {
        logged_ms: old
            .iter()
            .map(|old| old.shard.last_logged_ms())
            .max()
            .unwrap_or(0),
        next_seq: old
            .iter()
            .map(|old| old.shard.next_seq())
            .max()
            .unwrap_or(1),
    };
    // Shard 0 orders configuration: the others know what it knows or less.
    let none = Directory::default();
    let config = old.first().map_or(&none, |first| first.shard.directory());
    for writer in &mut writers {
        writer.put(0, |space| space.append(Schema::Clock, &clock))?;
        for change in config.dump() {
            writer.put_change(config.version(), &change)?;
        }
    }
    let all = old
        .iter()
        .map(|old| old.segments * old.options.segment_bytes);
    let (mut gone_through, all) = (0, 2 * all.sum::<u64>());
    let mut written = Written::default();
    for pass in [Pass::Holds, Pass::Tasks, Pass::Outcomes] {
        for old in &mut *old {
            if pass == Pass::Holds && old.shard.lost_failures().next().is_none() {
                continue;
            }
            carry_log(old, pass, count, &mut writers, &mut written, &mut |bytes| {
                gone_through += bytes;
                said(gone_through.min(all), all);
            })?;
        }
    }
    said(all, all);
    let mut devices = Vec::with_capacity(writers.len());
    for writer in writers {
        let (device, bytes) = writer.end()?;
        written.bytes += bytes;
        devices.push(device);
    }
    Ok((devices, written))
}

/// What is written while an old log is gone through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Forgotten failures that hold their keys.
    Holds,
    /// Other tasks, and names.
    Tasks,
    Outcomes,
}

/// Goes through an old log once.
fn carry_log<D: Device, N: Device>(
    old: &mut Source<'_, D>,
    pass: Pass,
    count: u16,
    writers: &mut [Writer<N>],
    written: &mut Written,
    said: &mut dyn FnMut(u64),
) -> Result<(), PlaceError> {
    let shard = &mut *old.shard;
    let mut failed = None;
    let mut unsaid = 0;
    let read = inspect_records(
        &mut old.device,
        old.options,
        &mut |position, schema, body| {
            unsaid += (RECORD_HEADER_BYTES + body.len()) as u64;
            if unsaid >= SAY_BYTES {
                said(std::mem::take(&mut unsaid));
            }
            let record = read_record(schema, body).map_err(|_| ())?;
            shard.keep_small();
            let lost = shard.lost_failure(&record);
            let moved = match pass {
                Pass::Holds => lost,
                Pass::Tasks if lost.is_some() => None,
                Pass::Tasks => shard.moved(position, &record),
                Pass::Outcomes => lost.or_else(|| shard.moved(position, &record)),
            };
            let outcomes = pass == Pass::Outcomes;
            let Some(moved) = moved.filter(|m| matches!(m, Moved::Outcome { .. }) == outcomes)
            else {
                return Ok(());
            };
            match moved {
                Moved::Task { .. } => written.tasks += 1,
                Moved::Name { .. } => written.names += 1,
                Moved::Outcome { .. } => {}
            }
            let writer = &mut writers[usize::from(shard_of(moved.cell(), count).0)];
            let put = writer.put(moved.variable(), |space| moved.append(space));
            put.map_err(|error| failed = Some(error))
        },
    );
    let shard = ShardId(old.options.shard);
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(PlaceError::Read { shard, error }),
        (None, Ok(_)) => Ok(()),
    }
}

/// A new log that is written batch by batch.
struct Writer<D> {
    log: Log<D>,
    shard: ShardId,
    now_ns: u64,
}

impl<D: Device> Writer<D> {
    /// Makes the log.
    fn begin(device: D, options: Options) -> Result<Writer<D>, PlaceError> {
        let shard = ShardId(options.shard);
        let made = recover(device, options, &mut |_, _, _| Err(()));
        let (log, report) = made.map_err(|error| PlaceError::Check { shard, error })?;
        assert_eq!(report.outcome, Outcome::Empty, "the folder was just made");
        Ok(Writer {
            log,
            shard,
            now_ns: 0,
        })
    }

    fn put_change(&mut self, version: u64, change: &Change) -> Result<(), PlaceError> {
        let record = ConfigRecordV1::new(version, change);
        self.put(record.name.len(), |space| {
            space.append(Schema::Config, &record)
        })
    }

    /// Appends a record with this much variable data.
    fn put(
        &mut self,
        variable: usize,
        append: impl FnOnce(&mut BatchSpace<'_>) -> Placed,
    ) -> Result<(), PlaceError> {
        self.make_room(record_bytes(variable))
            .map_err(|error| self.failed(error))?;
        let (_, mut space) = self.log.batch();
        append(&mut space);
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        if len >= SEAL_BYTES {
            self.seal().map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    fn failed(&self, error: DeviceError) -> PlaceError {
        PlaceError::Write {
            shard: self.shard,
            error,
        }
    }

    /// Goes on until the open batch has so much room.
    fn make_room(&mut self, bytes: usize) -> Result<(), DeviceError> {
        loop {
            let (_, space) = self.log.batch();
            let (room, len, records) = (space.room(), space.len, space.records);
            self.log.filled(len, records);
            if bytes <= room {
                return Ok(());
            }
            if records > 0 {
                self.seal()?;
            } else if !self.log.end_segment() {
                self.prepare()?;
            }
        }
    }

    /// Writes and flushes the open batch, which has records.
    fn seal(&mut self) -> Result<(), DeviceError> {
        self.log.seal(true);
        self.finish()
    }

    /// Waits until nothing is in flight.
    fn finish(&mut self) -> Result<(), DeviceError> {
        loop {
            self.log.device().await_one();
            self.hear()?;
            let (_, space) = self.log.batch();
            let (len, records) = (space.len, space.records);
            self.log.filled(len, records);
            if self.log.is_quiet() {
                return Ok(());
            }
        }
    }

    /// Makes a segment ready.
    fn prepare(&mut self) -> Result<(), DeviceError> {
        self.now_ns += TURN_NS;
        self.log.tick(self.now_ns);
        self.log.device().await_one();
        self.hear()?;
        if self.log.stats().prepare_failures == 0 {
            return Ok(());
        }
        Err(DeviceError {
            kind: match self.log.out_of_space() {
                true => DeviceErrorKind::NoSpace,
                false => DeviceErrorKind::Io,
            },
            what: match self.log.out_of_space() {
                true => "a segment cannot be made: no space is left on the disk".to_owned(),
                false => "a segment cannot be made".to_owned(),
            },
        })
    }

    fn hear(&mut self) -> Result<(), DeviceError> {
        while let Some(event) = self.log.poll(self.now_ns) {
            match event {
                LogEvent::Durable => {}
                LogEvent::Poisoned => {
                    let cause = self.log.poisoned().cloned();
                    return Err(cause.expect("a poisoned log has a first cause"));
                }
                LogEvent::Read { .. } | LogEvent::Scanned(_) | LogEvent::Unreadable { .. } => {
                    unreachable!("nothing was asked for")
                }
            }
        }
        Ok(())
    }

    /// Writes what is open and the closing batch.
    fn end(mut self) -> Result<(D, u64), PlaceError> {
        let result = self.close();
        result.map_err(|error| self.failed(error))?;
        let bytes = self.log.stats().bytes;
        Ok((self.log.into_device(), bytes))
    }

    fn close(&mut self) -> Result<(), DeviceError> {
        if self.log.open_records() > 0 {
            self.seal()?;
        }
        self.finish()?;
        self.log.close();
        self.finish()
    }
}
