//! What a shard measures of itself: histograms of its stages, counters and gauges. Recorded by the shard's thread
//! only, copied when somebody asks.

use hdrhistogram::Histogram;
use pelton_core::{
    event::Counters,
    id::ShardId,
    times::{Part, Times},
};
use pelton_storage::log::LogStats;

use crate::quarantine::Quarantine;

/// The stages that have a histogram, and their units: the parts of a task's way, then what the loop and the log do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// A part of the way of tasks.
    Way(Part),
    /// One turn of the loop that had something to do, microseconds.
    Turn,
    /// From sealing a batch to its flush, microseconds.
    Commit,
    /// Records of one batch.
    BatchRecords,
    /// Bytes of one batch.
    BatchBytes,
}

impl Stage {
    /// All of them, the parts of the way in its order.
    pub const ALL: [Stage; 12] = [
        Stage::Way(Part::Durable),
        Stage::Way(Part::Queued),
        Stage::Way(Part::Fetched),
        Stage::Way(Part::Dispatched),
        Stage::Way(Part::Carried),
        Stage::Way(Part::Run),
        Stage::Way(Part::Delivered),
        Stage::Way(Part::Total),
        Stage::Turn,
        Stage::Commit,
        Stage::BatchRecords,
        Stage::BatchBytes,
    ];

    /// Its place in [`Stage::ALL`].
    fn index(self) -> usize {
        match self {
            Stage::Way(part) => part as usize,
            Stage::Turn => Part::ALL.len(),
            Stage::Commit => Part::ALL.len() + 1,
            Stage::BatchRecords => Part::ALL.len() + 2,
            Stage::BatchBytes => Part::ALL.len() + 3,
        }
    }

    /// The name in `pelton stats`, with its unit.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Turn => "turn_us",
            Stage::Commit => "commit_us",
            Stage::BatchRecords => "batch_records",
            Stage::BatchBytes => "batch_bytes",
            Stage::Way(Part::Durable) => "durable_us",
            Stage::Way(Part::Queued) => "queued_us",
            Stage::Way(Part::Fetched) => "fetched_us",
            Stage::Way(Part::Dispatched) => "dispatched_us",
            Stage::Way(Part::Carried) => "carried_us",
            Stage::Way(Part::Run) => "run_us",
            Stage::Way(Part::Delivered) => "delivered_us",
            Stage::Way(Part::Total) => "total_ms",
        }
    }
}

/// A shard's start.
#[derive(Clone, Copy, Default, Debug)]
pub struct Recovery {
    /// Batches of the log that were replayed.
    pub batches: u64,
    /// Their records.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the snapshot in front of them; 0 for none.
    pub snapshot_bytes: u64,
    /// Snapshots that could not be used.
    pub snapshots_passed_over: u64,
    /// How long it took to load the snapshot, and to read, judge and replay the log.
    pub took_us: u64,
}

/// Figures of one shard.
#[derive(Clone, Debug)]
pub struct ShardStats {
    /// The shard.
    pub shard: ShardId,
    /// What the core counts.
    pub counters: Counters,
    /// What the log counts.
    pub log: LogStats,
    /// What the start read of the log, and how long that took.
    pub recovery: Recovery,
    /// By [`Stage`].
    pub histograms: Vec<Histogram<u64>>,
    /// Turns of the loop that had something to do.
    pub turns: u64,
    /// Times that the shard slept.
    pub parks: u64,
    /// The log's buffers are registered with the kernel.
    pub registered: bool,
    /// Why the log takes nothing more.
    pub poisoned: Option<String>,
    /// The log was found damaged, and the shard is not served.
    pub quarantined: Option<Quarantine>,
    /// Submits are refused for want of disk space.
    pub disk_full: bool,
    /// The wall clock is more than a minute away from logged time and is not followed.
    pub clock_held: bool,
}

impl ShardStats {
    pub(crate) fn new(shard: ShardId) -> ShardStats {
        let histogram =
            || Histogram::new_with_bounds(1, 1 << 40, 2).expect("the bounds and digits are valid");
        ShardStats {
            shard,
            counters: Counters::default(),
            log: LogStats::default(),
            recovery: Recovery::default(),
            histograms: Stage::ALL.map(|_| histogram()).into(),
            turns: 0,
            parks: 0,
            registered: true,
            poisoned: None,
            quarantined: None,
            disk_full: false,
            clock_held: false,
        }
    }

    /// The histogram of a stage.
    pub fn histogram(&self, stage: Stage) -> &Histogram<u64> {
        &self.histograms[stage.index()]
    }

    pub(crate) fn record(&mut self, stage: Stage, value: u64) {
        self.histograms[stage.index()].saturating_record(value);
    }

    /// Adds what one step of the core has noted of the way of tasks.
    pub(crate) fn record_way(&mut self, times: &Times) {
        for part in Part::ALL {
            let histogram = &mut self.histograms[Stage::Way(part).index()];
            for run in times.of(part) {
                histogram.saturating_record_n(run.time, run.count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_a_histogram_of_its_own() {
        for (place, stage) in Stage::ALL.into_iter().enumerate() {
            assert_eq!(stage.index(), place, "{}", stage.name());
        }
    }
}
