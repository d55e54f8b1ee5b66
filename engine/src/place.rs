//! A start with another number of shards than the data directory has: everything that lives in its logs is written into
//! new logs, which the manifest then names instead of the old ones (`docs/decisions/0013-another-shard-count.md`).
//!
//! Until the manifest is replaced the old logs are all there is, and only read; from then on the new ones are. A crash leaves
//! folders of the other kind behind, which the next start removes once it has found all of its own logs sound.

use std::{
    collections::BTreeSet,
    fmt, thread,
    time::{Duration, Instant},
};

use pelton_core::{
    clock::Now,
    id::{Lsn, RequestId, ShardId, shard_of},
    limits::{RECORD_BYTES_MAX, SHARD_COUNT_MAX},
    moved::Tally,
    shard::{Options as CoreOptions, Shard},
};
use pelton_history::Store;
use pelton_storage::{
    file::FileDevice,
    manifest::{DataDirectory, Manifest, has_begun},
    place::{PlaceError, Source, Written, carry},
    recover::{RecoverError, expect_segments, inspect_records, inspect_with},
    ring::RingDevice,
};

use crate::{
    bell::Bell,
    engine::{OpenError, Options, core_options},
    quarantine::Quarantine,
    shard_loop::{free_bytes, wall_ms},
};

/// Pages of slots that may be in use before ids could run out of them: half of all.
const PAGES_MAX: u32 = 1 << 21;
/// What a segment may lose at its end.
const SEGMENT_END_BYTES: u64 = RECORD_BYTES_MAX as u64 + (256 << 10);

/// What was placed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// Shards before.
    pub from: u16,
    /// Shards after.
    pub to: u16,
    /// Tasks, those among them that have ended and are still in memory.
    pub tasks: u64,
    /// Given names of tasks that are not in memory any more.
    pub names: u64,
    /// Bytes of the new logs' batches.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// Why tasks were not placed. The directory is as it was.
#[derive(Debug)]
pub struct PlacingError {
    /// Shards that the directory has.
    pub from: u16,
    /// Shards that were asked for.
    pub to: u16,
    /// Why.
    pub why: NotPlaced,
}

/// See [`PlacingError`].
#[derive(Debug)]
pub enum NotPlaced {
    /// Logs that cannot be served.
    Damaged(Vec<Quarantine>),
    /// An earlier version made the directory, with several shards that use the same places in ids.
    SharedPlaces,
    /// Failures hold so many ordering keys and are themselves gone from the log.
    Holds {
        /// Keys.
        more: u64,
    },
    /// The places in ids are used up.
    UsedUp,
    /// The disk has too little room for a second set of logs.
    Space {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// A log could not be read or written.
    Carry(PlaceError),
}

impl fmt::Display for PlacingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (self.from, self.to);
        write!(
            f,
            "the tasks of {from} shards cannot be placed on {to}, and nothing was changed: "
        )?;
        match &self.why {
            NotPlaced::Damaged(shards) => {
                for quarantine in shards {
                    write!(f, "{quarantine}; ")?;
                }
                write!(
                    f,
                    "every shard is needed for this, {from} shards may be served without"
                )
            }
            NotPlaced::SharedPlaces => write!(
                f,
                "the directory was made by an earlier version, whose shards use the same places in task ids; keep its {from} \
                 shards, or let its tasks end and begin with a new directory"
            ),
            NotPlaced::Holds { more } => write!(
                f,
                "failures hold {more} ordering keys and are too old to be in the log; let the keys go first (`on_failure` of \
                 their functions), or keep {from} shards"
            ),
            NotPlaced::UsedUp => write!(
                f,
                "tasks from before earlier changes of the shards hold the last places in task ids; let them end first"
            ),
            NotPlaced::Space { needed, free } => write!(
                f,
                "the new logs need {} MiB beside the old ones and the disk has {} MiB free; make room, or keep {from} shards",
                needed.div_ceil(1 << 20),
                free >> 20
            ),
            NotPlaced::Carry(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for PlacingError {}

/// An old shard as it was found.
struct Found {
    /// By the whole log.
    shard: Shard,
    /// What a snapshot and the log behind it know of ordering keys that a failure holds, where there may be any.
    held_keys: u64,
    segments: u64,
}

/// Places the tasks of the directory that `old` describes on so many shards, and makes these the directory's.
pub(crate) fn place(
    directory: &mut DataDirectory,
    old: Manifest,
    options: &Options,
    to: u16,
) -> Result<Placed, OpenError> {
    options.progress.set_placing(Some((old.shards, to)));
    let placed = place_all(directory, old, options, to);
    options.progress.set_placing(None);
    placed
}

fn place_all(
    directory: &mut DataDirectory,
    old: Manifest,
    options: &Options,
    to: u16,
) -> Result<Placed, OpenError> {
    let begun = Instant::now();
    let from = old.shards;
    let refuse = |why| OpenError::Placing(Box::new(PlacingError { from, to, why }));
    if to == 0 || usize::from(to) > SHARD_COUNT_MAX {
        return Err(OpenError::Shards {
            asked: usize::from(to),
        });
    }
    if !old.places_are_apart() {
        return Err(refuse(NotPlaced::SharedPlaces));
    }
    let saved = saved(directory, &old, options)?;
    let mut found =
        read(directory, &old, options).map_err(|shards| refuse(NotPlaced::Damaged(shards)))?;
    let logged = found.iter().map(|found| found.shard.last_logged_ms()).max();
    let now = Now {
        mono_ns: 0,
        logged_ms: wall_ms().max(logged.unwrap_or(0)),
    };
    for (found, saved) in found.iter_mut().zip(saved) {
        found.shard.start(now, saved);
    }
    let tally = found.iter().fold(Tally::default(), |mut tally, found| {
        tally.add(found.shard.tally());
        tally
    });
    let held_keys: u64 = found.iter().map(|found| found.held_keys).sum();
    if held_keys > tally.held_keys {
        let more = held_keys - tally.held_keys;
        return Err(refuse(NotPlaced::Holds { more }));
    }
    let used_pages = found
        .iter()
        .map(|found| found.shard.pages_end())
        .max()
        .unwrap_or(0);
    if used_pages > PAGES_MAX {
        return Err(refuse(NotPlaced::UsedUp));
    }
    let new = old.next(to, used_pages);
    directory.remove_leftovers().map_err(OpenError::Directory)?;
    let (needed, free) = (needed_bytes(&found, &new), free_bytes(directory.path()));
    if let Some(free) = free.filter(|free| *free < needed) {
        return Err(refuse(NotPlaced::Space { needed, free }));
    }
    let written = write(directory, &old, &new, &mut found, options).and_then(|written| {
        let mut tally = Tally::default();
        let mut lost = BTreeSet::new();
        for found in &found {
            tally.add(found.shard.tally());
            lost.extend(found.shard.lost_failures());
        }
        drop(found);
        check(directory, &new, options, now, (tally, &lost))
            .map_err(|error| refuse(NotPlaced::Carry(error)))?;
        Ok(written)
    });
    let written = match written {
        Ok(written) => written,
        Err(error) => {
            // What is left of it goes with the next start if not now.
            let _ = directory.remove_leftovers();
            return Err(error);
        }
    };
    directory.write(new).map_err(OpenError::Directory)?;
    clear(directory);
    Ok(Placed {
        from,
        to,
        tasks: written.tasks,
        names: written.names,
        bytes: written.bytes,
        took: begun.elapsed(),
    })
}

/// Removes folders of shards that are not the directory's; what cannot be removed stays, and is tried again by the next
/// start.
pub(crate) fn clear(directory: &DataDirectory) {
    if let Err(error) = directory.remove_leftovers() {
        tracing::warn!(%error, "folders of earlier shards cannot be removed");
    }
}

/// By shard, up to where what has ended is in the history.
fn saved(
    directory: &DataDirectory,
    old: &Manifest,
    options: &Options,
) -> Result<Vec<Lsn>, OpenError> {
    if options.history_retention.is_zero() {
        return Ok(vec![Lsn(0); usize::from(old.shards)]);
    }
    let store = Store::open(&directory.path().join("history"), old.log_id);
    let store = store.map_err(OpenError::History)?;
    store.enter(old.generation).map_err(OpenError::History)?;
    let saved: Result<Vec<Lsn>, _> = (0..old.shards).map(|shard| store.saved(shard)).collect();
    saved.map_err(OpenError::History)
}

/// Reads every old log, each on a thread of its own.
fn read(
    directory: &DataDirectory,
    old: &Manifest,
    options: &Options,
) -> Result<Vec<Found>, Vec<Quarantine>> {
    let begun = has_begun(directory.path());
    let one = |number: u16| -> Result<Found, RecoverError> {
        let mut device = FileDevice::new(&directory.shard(number));
        if begun {
            expect_segments(&mut device)?;
        }
        let options = core_options(options, old, number);
        let log = old.log(number);
        let mut shard = Shard::new(options);
        shard.keep_failures();
        let report = inspect_records(&mut device, log, &mut |position, schema, body| {
            shard.replay(position, schema, body).map_err(|_| ())
        })?;
        // A hold whose failure is gone from the log is known to a snapshot alone.
        let mut held_keys = 0;
        if shard.may_hold_keys() {
            let mut known = Shard::new(options);
            inspect_with(&mut device, log, &mut known)?;
            let logged_ms = known.last_logged_ms();
            let mono_ns = 0;
            known.start(Now { mono_ns, logged_ms }, Lsn(0));
            held_keys = known.tally().held_keys;
        }
        Ok(Found {
            shard,
            held_keys,
            segments: report.segments,
        })
    };
    let one = &one;
    let read = thread::scope(|scope| {
        let threads: Vec<_> = (0..old.shards)
            .map(|shard| scope.spawn(move || one(shard)))
            .collect();
        let joined = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|cause| std::panic::resume_unwind(cause))
        });
        joined.collect::<Vec<_>>()
    });
    let (mut found, mut damaged) = (Vec::new(), Vec::new());
    for (number, read) in (0..).zip(read) {
        match read {
            Ok(shard) => found.push(shard),
            Err(error) => damaged.push(Quarantine {
                shard: ShardId(number),
                error,
            }),
        }
    }
    match damaged.is_empty() {
        true => Ok(found),
        false => Err(damaged),
    }
}

/// Bytes that the new logs take on the disk until they are served.
fn needed_bytes(found: &[Found], new: &Manifest) -> u64 {
    let mut bytes = vec![0; usize::from(new.shards)];
    for found in found {
        found.shard.weigh(|cell, weight| {
            bytes[usize::from(shard_of(cell, new.shards).0)] += weight;
        });
    }
    let holds = new.segment_bytes - SEGMENT_END_BYTES;
    let segments = bytes.iter().map(|bytes| bytes.div_ceil(holds) + 1);
    segments.sum::<u64>() * new.segment_bytes
}

/// Makes the new logs' folders and the logs.
fn write(
    directory: &DataDirectory,
    old: &Manifest,
    new: &Manifest,
    found: &mut [Found],
    options: &Options,
) -> Result<Written, OpenError> {
    let refuse = |why| {
        let (from, to) = (old.shards, new.shards);
        OpenError::Placing(Box::new(PlacingError { from, to, why }))
    };
    directory.make_folders(new).map_err(OpenError::Directory)?;
    let bell = Bell::new().map_err(|error| OpenError::Thread(error.to_string()))?;
    let mut logs = Vec::new();
    for shard in 0..new.shards {
        let folder = new.folder(directory.path(), shard);
        let device = RingDevice::open(&folder, bell.fd()).map_err(OpenError::Device)?;
        logs.push((device, new.log(shard)));
    }
    let mut sources: Vec<_> = (0..)
        .zip(found)
        .map(|(shard, found)| Source {
            device: FileDevice::new(&directory.shard(shard)),
            options: old.log(shard),
            shard: &mut found.shard,
            segments: found.segments,
        })
        .collect();
    let carried = carry(&mut sources, logs, &mut |done, all| {
        options.progress.set_bytes(done, all);
    });
    let (devices, written) = carried.map_err(|error| refuse(NotPlaced::Carry(error)))?;
    drop(devices);
    Ok(written)
}

/// Reads the new logs as a start does and compares what they hold with what the old ones held.
fn check(
    directory: &DataDirectory,
    new: &Manifest,
    options: &Options,
    now: Now,
    (old, lost): (Tally, &BTreeSet<RequestId>),
) -> Result<(), PlaceError> {
    let mut tally = Tally::default();
    for number in 0..new.shards {
        let mut shard = Shard::new(CoreOptions {
            finished_max: u32::MAX,
            finished_bytes_max: u64::MAX,
            ..core_options(options, new, number)
        });
        let mut device = FileDevice::new(&new.folder(directory.path(), number));
        inspect_with(&mut device, new.log(number), &mut shard).map_err(|error| {
            PlaceError::Check {
                shard: ShardId(number),
                error,
            }
        })?;
        shard.start(now, Lsn(0));
        tally.add(shard.tally_without(lost));
    }
    match tally == old {
        true => Ok(()),
        false => Err(PlaceError::Differs { old, new: tally }),
    }
}
