//! What a shard measures of itself: histograms of its stages, counters and gauges. Recorded by the shard's thread
//! only, copied when somebody asks.

use hdrhistogram::Histogram;
use pelton_core::{event::Counters, id::ShardId};
use pelton_storage::log::LogStats;

/// The stages that have a histogram, and their units.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Stage {
    /// One turn of the loop that had something to do, microseconds.
    Turn,
    /// From sealing a batch to its flush, microseconds.
    Commit,
    /// Records of one batch.
    BatchRecords,
    /// Bytes of one batch.
    BatchBytes,
    /// From the acceptance of a task to its lease, milliseconds.
    Wait,
    /// From the acceptance of a task to its end being told, milliseconds.
    Total,
}

impl Stage {
    /// All of them, in the order of a task's way.
    pub const ALL: [Stage; 6] = [
        Stage::Turn,
        Stage::Commit,
        Stage::BatchRecords,
        Stage::BatchBytes,
        Stage::Wait,
        Stage::Total,
    ];

    /// The name in `pelton stats`, with its unit.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Turn => "turn_us",
            Stage::Commit => "commit_us",
            Stage::BatchRecords => "batch_records",
            Stage::BatchBytes => "batch_bytes",
            Stage::Wait => "wait_ms",
            Stage::Total => "total_ms",
        }
    }
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
            histograms: Stage::ALL.map(|_| histogram()).into(),
            turns: 0,
            parks: 0,
            registered: true,
            poisoned: None,
            disk_full: false,
            clock_held: false,
        }
    }

    /// The histogram of a stage.
    pub fn histogram(&self, stage: Stage) -> &Histogram<u64> {
        &self.histograms[stage as usize]
    }

    pub(crate) fn record(&mut self, stage: Stage, value: u64) {
        self.histograms[stage as usize].saturating_record(value);
    }
}
