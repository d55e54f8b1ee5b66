//! `cargo xtask sim`: hands on to the binary of pelton-sim.

use std::{io, process::ExitCode};

use crate::cargo;

#[derive(clap::Args)]
pub struct Args {
    /// Run N seeds; 200 where nothing is said
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Run the seed N alone, as a failing run names it
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Show every event of the seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Leave a kind of fault out of the seed
    #[arg(long, value_name = "FAULT", requires = "seed")]
    without: Vec<String>,
    /// Hand in so many tasks at most
    #[arg(long, value_name = "N", requires = "seed")]
    tasks: Option<usize>,
}

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    let mut command = cargo::cargo(
        &root,
        &["run", "--release", "--quiet", "-p", "pelton-sim", "--"],
    );
    if let Some(count) = args.seeds {
        command.args(["--seeds", &count.to_string()]);
    }
    if let Some(seed) = args.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if args.trace {
        command.arg("--trace");
    }
    for fault in &args.without {
        command.args(["--without", fault]);
    }
    if let Some(tasks) = args.tasks {
        command.args(["--tasks", &tasks.to_string()]);
    }
    cargo::hand_over(command)
}
