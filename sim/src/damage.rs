//! What a damaged disk may do to a start. The expectation comes from the disk as it would be without its damage: the
//! first damaged batch of the live log is to be named if a sound batch behind it says that it was durable. Nothing
//! else may keep a log from starting, and nothing on the disk may change meanwhile.
//!
//! A damaged last batch that nothing vouches for is taken for a torn one: a limit of the log that is known. Such damage
//! is repaired before the start, and counted.

use pelton_core::{id::Lsn, shard::Shard};
use pelton_storage::{
    format::{BLOCK_BYTES, BatchHeader},
    log::Options,
    memory::MemoryDevice,
    recover::{RecoverError, inspect, recover_with},
    segment::parse_segment_name,
    snapshot::judge_snapshots,
};

use crate::oracle::{Violation, broken};

/// What a start on a damaged disk must come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    /// Nothing that is needed is damaged.
    Sound,
    /// The damage is in the last batch, and nothing vouches for that.
    Unvouched,
    /// The start is refused and names one of these places.
    Named(Vec<Lsn>),
    /// A file lost both copies of its header, but nothing that is needed: refused or not.
    Either,
    /// The damage stands in front of the start of a snapshot that can be loaded: nobody looks at it before it is read.
    BehindSnapshot,
}

/// Looks at the disk and at what it should be.
pub fn expected(device: &MemoryDevice, options: Options) -> Result<Expected, Violation> {
    let damage = device.damage();
    if damage.is_empty() {
        return Ok(Expected::Sound);
    }
    let mut whole = device.repaired();
    let mut batches: Vec<BatchHeader> = Vec::new();
    let judged = inspect(&mut whole, options, &mut |header, _| {
        batches.push(*header);
        Ok(())
    });
    judged.map_err(|error| Violation {
        invariant: "a_crash_is_no_corruption",
        sentence: format!("without what the disk damaged: {error}"),
    })?;
    let headless = |name: &String| {
        if parse_segment_name(name).is_none() {
            return false;
        }
        let copies = [0, BLOCK_BYTES as u64];
        let lost = copies.map(|at| damage.contains(&(name.clone(), at)));
        // A header of another segment in the place of the first copy hides this one.
        lost == [true, true]
            || lost[0]
                && device.contents(name)[..4] == whole.contents(name)[..4]
                && device.contents(name)[8..64] != whole.contents(name)[8..64]
                && pelton_storage::format::SegmentHeader::decode(
                    &device.contents(name)[..BLOCK_BYTES],
                )
                .is_ok()
    };
    let names = whole.names();
    let segment_bytes = options.segment_bytes;
    let damaged = |batch: &BatchHeader| {
        let offset = batch.lsn.0 % segment_bytes;
        // The zeroes behind it are nobody's.
        let bytes = offset as usize..offset as usize + batch.bytes();
        let file = names.iter().find(|name| {
            let place = whole.contents(name).get(offset as usize..);
            place.and_then(BatchHeader::peek).as_ref() == Some(batch)
        });
        file.is_some_and(|file| {
            let found = device.contents(file).get(bytes.clone());
            headless(file) || found != whole.contents(file).get(bytes.clone())
        })
    };
    let Some(first) = batches.iter().position(damaged) else {
        return Ok(if names.iter().any(headless) {
            Expected::Either
        } else {
            Expected::Sound
        });
    };
    let place = batches[first].lsn;
    let live = batches[0].lsn;
    let snapshots = judge_snapshots(&mut device.copied(), options).map_err(|error| Violation {
        invariant: "a_crash_is_no_corruption",
        sentence: format!("the snapshots cannot be read: {error}"),
    })?;
    let loaded = snapshots.into_iter().filter_map(|snapshot| snapshot.sound);
    let loaded = loaded
        .map(|(begin, _)| begin.start)
        .find(|start| *start >= live);
    if loaded.is_some_and(|start| place < start) {
        return Ok(Expected::BehindSnapshot);
    }
    let vouched = batches[first + 1..]
        .iter()
        .any(|batch| batch.durable > place && !damaged(batch));
    if !vouched {
        return Ok(Expected::Unvouched);
    }
    let mut places = vec![place];
    places.extend(first.checked_sub(1).map(|before| batches[before].end()));
    if names.iter().any(headless) {
        // A file of which neither header can be read is named itself: nobody knows which segment it is.
        places.push(Lsn(0));
    }
    Ok(Expected::Named(places))
}

/// A start must be refused, naming one of these places, and change nothing.
pub fn is_named(
    device: &mut MemoryDevice,
    options: Options,
    mut shard: Shard,
    places: &[Lsn],
) -> Result<String, Violation> {
    let changes = device.changes();
    let damage = device.damage();
    let started = recover_with(&mut *device, options, &mut shard);
    let error = match started {
        Ok((_, report)) => {
            return broken(
                "damage_is_named",
                format!(
                    "shard {} starts with {report:?} although {damage:?} is damaged: {places:?}",
                    options.shard
                ),
            )
            .map(|()| String::new());
        }
        Err(error) => error,
    };
    let RecoverError::Corrupt {
        segment, offset, ..
    } = error
    else {
        return broken(
            "damage_is_named",
            format!("shard {}: {error}; the damage is {damage:?}", options.shard),
        )
        .map(|()| String::new());
    };
    let named = Lsn(segment * options.segment_bytes + offset);
    if !places.contains(&named) {
        return broken(
            "damage_is_named",
            format!(
                "shard {}: {error}; the damage is {damage:?} and stands at {places:?}, named is {named:?}",
                options.shard
            ),
        )
        .map(|()| String::new());
    }
    if device.changes() != changes {
        return broken(
            "a_refused_start_changes_nothing",
            format!("shard {}: {error}", options.shard),
        )
        .map(|()| String::new());
    }
    Ok(error.to_string())
}
