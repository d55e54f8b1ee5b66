//! What one seed is about: the size of the world, its options, and which faults it knows. Each seed enables a random
//! subset, because a fault that is always on hides what only happens without it.

use pelton_storage::memory::Random;

/// Bytes of a segment in every simulated log: far fewer than a server allows, so that segments roll, are cleaned and
/// are recycled.
pub const SEGMENT_BYTES: u64 = 1 << 20;

/// The kinds of faults, in the order of the table that the program prints.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// The power fails: every shard stops at once.
    Crash,
    /// The power fails within a turn: its effects are lost, its batch may be sealed.
    CrashInTurn,
    /// A read of one log fails with EIO or brings wrong bytes, or all reads do for a while.
    ReadError,
    /// A flush of one log fails, which poisons it.
    FlushError,
    /// A write to one log fails, which poisons it.
    WriteError,
    /// New segments find no space for a while.
    NoSpace,
    /// One disk is very slow for a while.
    SlowDisk,
    /// An executor process dies with all it holds and comes back empty.
    ExecutorDeath,
    /// An executor leaves without a word and never comes back; another takes its place.
    ExecutorGone,
    /// An executor says goodbye; another takes its place.
    ExecutorClosed,
    /// An executor's connection is lost; it comes back with its leases.
    ExecutorLost,
    /// A caller's connection is lost and with it the answers on their way.
    CallerLost,
    /// The wall clock jumps.
    WallJump,
    /// The power fails when a disk comes to one kind of operation.
    CrashAtDisk,
    /// The power fails, and again while the logs are being recovered.
    CrashInRecovery,
    /// A start finds that a read fails.
    ReadErrorAtStart,
    /// A disk reports a write done that it has lost.
    LostWrite,
    /// A disk reports a write done that stands elsewhere, where something else stood.
    MisdirectedWrite,
    /// A block that was written rots.
    Rot,
    /// The power fails, and the next start has another number of shards.
    OtherShards,
}

impl Fault {
    /// The kind with this name, as a report writes it.
    pub fn from_name(name: &str) -> Option<Fault> {
        Fault::ALL
            .into_iter()
            .find(|fault| format!("{fault:?}") == name)
    }

    /// Every kind.
    pub const ALL: [Fault; 20] = [
        Fault::Crash,
        Fault::CrashInTurn,
        Fault::ReadError,
        Fault::FlushError,
        Fault::WriteError,
        Fault::NoSpace,
        Fault::SlowDisk,
        Fault::ExecutorDeath,
        Fault::ExecutorGone,
        Fault::ExecutorClosed,
        Fault::ExecutorLost,
        Fault::CallerLost,
        Fault::WallJump,
        Fault::CrashAtDisk,
        Fault::CrashInRecovery,
        Fault::ReadErrorAtStart,
        Fault::LostWrite,
        Fault::MisdirectedWrite,
        Fault::Rot,
        Fault::OtherShards,
    ];
}

/// A seed's draw. Never changes during the run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Shards, 1 to 4.
    pub shards: u16,
    /// Edges.
    pub edges: u16,
    /// Callers besides the administrator.
    pub callers: usize,
    /// Executors.
    pub workers: usize,
    /// Tenants.
    pub tenants: usize,
    /// Functions of each tenant.
    pub functions: usize,
    /// Tasks that callers hand in before everything heals.
    pub tasks: usize,
    /// When which fault happens: after this many tasks were handed in.
    pub faults: Vec<(usize, Fault)>,
    /// Mean pause of a caller between two frames.
    pub pause_ns: u64,
    /// Tasks of a frame at most.
    pub frame_tasks: u64,
    /// Frames and questions that a caller may have unanswered.
    pub caller_window: usize,
    /// Outcome frames that an executor may have unconfirmed on one shard.
    pub worker_window: usize,
    /// Submit batches that wait at a shard at most.
    pub submits_max: usize,
    /// Time of one operation of a disk.
    pub disk_ns: u64,
    /// Mean run time of an attempt.
    pub run_ns: u64,
    /// Slots that an executor lends one shard for one function at most.
    pub slots: u64,
    /// One in this many attempts never ends by itself; 0 for none.
    pub hang_one_in: u64,
    /// One in this many payloads and results is large; 0 for none.
    pub large_one_in: u64,
    /// Functions and tasks may have an age of seconds.
    pub short_ages: bool,
    /// Attempts may take a day, so that nothing but the right frame frees a lease.
    pub long_timeouts: bool,
    /// Tasks may have ordering keys.
    pub keys: bool,
    /// Tasks may be delayed.
    pub delays: bool,
    /// Functions may be deleted and made again.
    pub deletions: bool,
    /// Tenants may have a bound of waiting tasks.
    pub waiting_bounds: bool,
    /// Bytes of waiting tasks held in memory.
    pub fetched_bytes_max: usize,
    /// Finished tasks kept.
    pub finished_max: u32,
    /// Bytes of their records.
    pub finished_bytes_max: u64,
    /// What has ended goes to history; how much of it shards may keep back, how often history acts, and how many rows it
    /// takes at once.
    pub history: bool,
    /// See `history`.
    pub history_lag_max: u64,
    /// See `history`.
    pub history_ns: u64,
    /// See `history`.
    pub history_rows: u64,
    /// Largest payload and result.
    pub payload_bytes_max: u32,
    /// Term of a lease without a connection.
    pub lease_ms: u64,
    /// The dedup window.
    pub dedup_window_ms: u64,
    /// How far the wall clock jumps at most.
    pub wall_jump_ms: u64,
    /// How far a delayed task is delayed at most.
    pub delay_ms: u64,
    /// Pages of tasks that are not packed.
    pub task_pages_max: u32,
}

impl Plan {
    /// True if this fault strikes.
    pub fn knows(&self, fault: Fault) -> bool {
        self.faults.iter().any(|&(_, known)| known == fault)
    }

    /// The same plan without a kind of fault.
    pub fn without(mut self, fault: Fault) -> Plan {
        self.faults.retain(|&(_, known)| known != fault);
        self
    }

    /// The same plan with fewer tasks, and with the faults that strike until then.
    pub fn shortened(mut self, tasks: usize) -> Plan {
        self.tasks = self.tasks.min(tasks);
        self.faults.retain(|&(after, _)| after <= self.tasks);
        self
    }

    /// Draws the plan of a seed.
    pub fn draw(seed: u64) -> Plan {
        let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x9e17);
        let r = &mut random;
        let tasks = 2_000 + r.below(2_500) as usize;
        let mut faults = Vec::new();
        for fault in Fault::ALL {
            let (enabled, count) = match fault {
                Fault::Crash => (!r.one_in(10), 2 + r.below(5)),
                Fault::CrashInTurn => (!r.one_in(3), 1 + r.below(4)),
                Fault::ReadError => (r.one_in(2), 1 + r.below(6)),
                Fault::FlushError | Fault::WriteError => (r.one_in(4), 1),
                Fault::NoSpace => (r.one_in(4), 1 + r.below(2)),
                Fault::SlowDisk => (r.one_in(3), 1 + r.below(3)),
                Fault::ExecutorDeath => (r.one_in(2), 1 + r.below(6)),
                Fault::ExecutorGone | Fault::ExecutorClosed => (r.one_in(3), 1 + r.below(3)),
                Fault::ExecutorLost => (r.one_in(2), 1 + r.below(20)),
                Fault::CallerLost => (r.one_in(2), 1 + r.below(20)),
                Fault::WallJump => (r.one_in(3), 1 + r.below(4)),
                Fault::CrashAtDisk => (r.one_in(2), 1 + r.below(3)),
                Fault::CrashInRecovery => (r.one_in(2), 1 + r.below(3)),
                Fault::ReadErrorAtStart => (r.one_in(4), 1),
                Fault::OtherShards => (r.one_in(3), 1 + r.below(3)),
                Fault::LostWrite | Fault::MisdirectedWrite | Fault::Rot => {
                    (r.one_in(4), 1 + r.below(3))
                }
            };
            if enabled {
                faults.extend((0..count).map(|_| (r.below(tasks as u64) as usize, fault)));
            }
        }
        faults.sort_unstable();
        let tight = r.one_in(4);
        Plan {
            seed,
            shards: 1 + r.below(4) as u16,
            edges: 1 + r.below(3) as u16,
            callers: 2 + r.below(4) as usize,
            workers: 1 + r.below(4) as usize,
            tenants: 1 + r.below(3) as usize,
            functions: 1 + r.below(4) as usize,
            tasks,
            faults,
            pause_ns: [300_000, 2_000_000, 10_000_000, 60_000_000][r.below(4) as usize],
            frame_tasks: [1, 8, 32][r.below(3) as usize],
            caller_window: if tight { 1 } else { 1 + r.below(8) as usize },
            worker_window: if tight { 1 } else { 1 + r.below(4) as usize },
            submits_max: if tight { 1 } else { 4 + r.below(60) as usize },
            disk_ns: [30_000, 100_000, 400_000][r.below(3) as usize],
            run_ns: [100_000, 2_000_000, 20_000_000][r.below(3) as usize],
            slots: [1, 4, 16][r.below(3) as usize],
            hang_one_in: if r.one_in(2) { 60 + r.below(200) } else { 0 },
            large_one_in: if r.one_in(3) { 40 + r.below(200) } else { 0 },
            short_ages: r.one_in(3),
            long_timeouts: r.one_in(3),
            keys: !r.one_in(4),
            delays: !r.one_in(4),
            deletions: r.one_in(3),
            waiting_bounds: r.one_in(5),
            fetched_bytes_max: if r.one_in(2) { 16 << 10 } else { 8 << 20 },
            finished_max: if r.one_in(2) { 150 } else { 1_000_000 },
            finished_bytes_max: if r.one_in(3) { 64 << 10 } else { 1 << 30 },
            history: !r.one_in(4),
            history_lag_max: if r.one_in(3) { 256 << 10 } else { 1 << 40 },
            history_ns: [1_000_000, 10_000_000, 200_000_000][r.below(3) as usize],
            history_rows: [4, 40, 2_000][r.below(3) as usize],
            payload_bytes_max: 128 << 10,
            lease_ms: [200, 2_000, 15_000][r.below(3) as usize],
            // Names hold segments: only where both are short is a segment ever dead.
            dedup_window_ms: if r.one_in(2) { 300 } else { 86_400_000 },
            wall_jump_ms: [100, 30_000, 7_200_000][r.below(3) as usize],
            delay_ms: [3_000, 3_000, 7_200_000][r.below(3) as usize],
            // With one page most of the time goes into packing.
            task_pages_max: match r.below(64) {
                0 => 1,
                1..=6 => 2,
                _ => 1_000,
            },
        }
    }
}
