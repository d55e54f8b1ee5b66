//! How long tasks take from one point of their way to the next, as their shard sees it: accepted, durable, enqueued,
//! dequeued, leased, dispatched, started, finished, delivered. A task that is not delayed is enqueued in the step that
//! finds it durable, so no time lies between those two.
//!
//! A step notes durations in runs: what arrived, was flushed or was started together took equally long, so that a batch
//! costs one entry and no clock is read for a single task.

use alloc::vec::Vec;

/// A stretch of a task's way. For a task that is neither delayed nor tried again, all but `Total` add up to `Total`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Part {
    /// From accepted to durable: the flush that its caller waits for. Microseconds, like all but the last.
    Durable,
    /// From enqueued to dequeued: until its turn came. None for a task that was leased as it was accepted.
    Queued,
    /// From dequeued to leased: the read of its record, where that was not in memory.
    Fetched,
    /// From leased to dispatched: the flush of its lease. None where that is the flush of its acceptance.
    Dispatched,
    /// From dispatched to started and from finished to heard: on its way to the executor, in there, and on its way back.
    Carried,
    /// From started to finished, by the executor's word.
    Run,
    /// From the outcome being heard to its being durable, which is when the end is told.
    Delivered,
    /// From accepted to ended, the end being durable. By logged time, in milliseconds.
    Total,
}

impl Part {
    /// All of them, in the order of the way.
    pub const ALL: [Part; 8] = [
        Part::Durable,
        Part::Queued,
        Part::Fetched,
        Part::Dispatched,
        Part::Carried,
        Part::Run,
        Part::Delivered,
        Part::Total,
    ];
}

/// Equal durations of one part, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// How long, in the part's unit.
    pub time: u64,
    /// For how many tasks.
    pub count: u64,
}

/// What one step noted. Owned by its shard, which empties it when the next step begins.
#[derive(Debug, Default)]
pub struct Times {
    runs: [Vec<Run>; Part::ALL.len()],
}

impl Times {
    pub(crate) fn note(&mut self, part: Part, time: u64, count: u64) {
        if count == 0 {
            return;
        }
        let runs = &mut self.runs[part as usize];
        match runs.last_mut() {
            Some(last) if last.time == time => last.count += count,
            Some(_) | None => runs.push(Run { time, count }),
        }
    }

    pub(crate) fn clear(&mut self) {
        for runs in &mut self.runs {
            runs.clear();
        }
    }

    /// What was noted of a part.
    pub fn of(&self, part: Part) -> &[Run] {
        &self.runs[part as usize]
    }
}

/// What one step appended to a batch that is not durable yet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Appended {
    pub(crate) at_us: u64,
    pub(crate) accepted: u32,
    /// Leases that went into the batch of their acceptance.
    pub(crate) leased_at_once: u32,
    /// All other leases.
    pub(crate) leased: u32,
    pub(crate) outcomes: u32,
}

impl Appended {
    pub(crate) fn is_empty(&self) -> bool {
        self.accepted == 0 && self.leased == 0 && self.outcomes == 0
    }
}
