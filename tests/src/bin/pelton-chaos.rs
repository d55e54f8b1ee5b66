//! `pelton-chaos`: the kill loop. `run` conducts; callers and executors are this program too, started by it.
//! Exit codes: 0 everything held (or, with `--expect-loss`, something was lost), 1 otherwise.

use std::process::ExitCode;

use clap::Parser;
use pelton_tests::chaos::{caller, conductor, disk, power, worker};

/// Kills a real server again and again under load, and judges what is left.
#[derive(Parser, Debug)]
#[command(name = "pelton-chaos", disable_help_subcommand = true)]
enum Command {
    /// Run cycles and print what they came to
    Run(conductor::RunArgs),
    /// The same with power cuts instead of kills: the server's disk loses what was not flushed
    PowerCut(power::PowerArgs),
    /// Hand in tasks and write down what is answered; started by `run`
    Caller(caller::CallerArgs),
    /// Execute tasks and write that down; started by `run`
    Executor(worker::WorkerArgs),
    /// Be the disk whose power fails; started by `power-cut`
    Disk(disk::DiskArgs),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Run(args) => conductor::run(&args, None),
        Command::PowerCut(args) => power::run(&args),
        Command::Caller(args) => caller::run(&args).map(|()| true),
        Command::Executor(args) => worker::run(&args).map(|()| true),
        Command::Disk(args) => disk::run(&args).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("pelton-chaos: {error}");
            ExitCode::FAILURE
        }
    }
}
