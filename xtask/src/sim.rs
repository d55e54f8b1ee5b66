//! `cargo xtask sim`: hands on to the binary of pelton-sim.

use std::{io, process::ExitCode};

use crate::cargo;

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub struct Args {
    /// Run N seeds
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Run the seed N alone, as a failing run names it
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
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
    cargo::hand_over(command)
}
