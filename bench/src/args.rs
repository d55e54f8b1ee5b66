//! The command line of `pelton bench`.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand, ValueEnum};

/// Measure a server on this machine: throughput, latency, what the machine could do at best.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub scenario: Scenario,
}

/// What is measured.
#[derive(Subcommand, Clone, Debug)]
pub enum Scenario {
    /// Tasks accepted and on disk per second; nobody executes them.
    Submit(Flags),
    /// Tasks submitted, executed by a no-op function in another process, and their outcome on disk, per second.
    E2e(Flags),
    /// Time from the intended submit to the start of the handler, at a fixed rate.
    Latency(Flags),
    /// What the machine can do at best: QUIC frames, log records, one flush.
    Limits(Flags),
    /// Memory of many waiting and delayed tasks, the time of a restart with them, and how exact timers are then.
    Backlog(Flags),
    /// How fast a log is read and replayed after the server was killed.
    Recovery(Flags),
    /// How fast ended tasks go into the history while tasks run, how far it falls behind, and how fast it catches up.
    History(Flags),
    /// Processor time of a server that has nothing to do.
    Idle(Flags),
}

impl Scenario {
    /// The name in the report.
    pub fn name(&self) -> &'static str {
        match self {
            Scenario::Submit(_) => "submit",
            Scenario::E2e(_) => "e2e",
            Scenario::Latency(_) => "latency",
            Scenario::Limits(_) => "limits",
            Scenario::Backlog(_) => "backlog",
            Scenario::Recovery(_) => "recovery",
            Scenario::History(_) => "history",
            Scenario::Idle(_) => "idle",
        }
    }

    /// Its flags.
    pub fn flags(&self) -> &Flags {
        match self {
            Scenario::Submit(flags)
            | Scenario::E2e(flags)
            | Scenario::Latency(flags)
            | Scenario::Limits(flags)
            | Scenario::Backlog(flags)
            | Scenario::Recovery(flags)
            | Scenario::History(flags)
            | Scenario::Idle(flags) => flags,
        }
    }
}

/// What an acceptance promises.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// On disk before the answer.
    Disk,
    /// In memory.
    Memory,
}

/// Flags of every scenario; one that makes no sense there is ignored.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    /// Client connections
    #[arg(long, default_value_t = 8)]
    pub connections: usize,
    /// Tasks per frame; 512 for submit, 256 for e2e where not given
    #[arg(long)]
    pub batch: Option<usize>,
    /// Frames of one connection that are unanswered at once; 1 where a batch is one task
    #[arg(long)]
    pub in_flight: Option<usize>,
    /// Bytes of a payload
    #[arg(long, default_value_t = 256)]
    pub payload: usize,
    /// Tenants that the connections belong to, in turn
    #[arg(long, default_value_t = 1)]
    pub tenants: usize,
    /// Functions of each tenant
    #[arg(long, default_value_t = 1)]
    pub functions: usize,
    /// Shards of the server; its default where not given
    #[arg(long)]
    pub shards: Option<u16>,
    /// Seconds that are measured
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Seconds before that
    #[arg(long, default_value_t = 2.0)]
    pub warmup: f64,
    /// What the server promises with its answer
    #[arg(long, value_enum, default_value_t = Durability::Disk)]
    pub durability: Durability,
    /// Executor slots
    #[arg(long)]
    pub slots: Option<u32>,
    /// Tasks per second, for latency, and beside the timers of backlog
    #[arg(long, default_value_t = 5_000)]
    pub rate: u64,
    /// Tasks in all, for backlog, recovery and history
    #[arg(long, default_value_t = 1_000_000)]
    pub tasks: u64,
    /// Tasks delayed by an hour to a year that come on top, for backlog
    #[arg(long, default_value_t = 0)]
    pub delayed: u64,
    /// A running server instead of one of its own; counts are not compared with it
    #[arg(long, value_name = "ADDR")]
    pub target: Option<SocketAddr>,
    /// The key for `--target`
    #[arg(long, env = "PELTON_KEY", hide_env_values = true)]
    pub key: Option<String>,
    /// How to know `--target`: a CA file or `sha256:FINGERPRINT`
    #[arg(long, env = "PELTON_CA")]
    pub ca: Option<String>,
    /// Where the data goes, on the disk to be measured; a folder under the current directory where not given
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Write the latency distribution to a file
    #[arg(long, value_name = "FILE")]
    pub hdr: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}
