//! The `pelton` binary: configuration, command line, and the edges wired to the engine.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod command;
mod edge;
mod keys;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Durable asynchronous tasks of many tenants, over QUIC.
#[derive(Parser)]
#[command(version, about, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a server.
    Serve(command::serve::ServeArgs),
    /// Measure a server on this machine.
    Bench(pelton_bench::BenchArgs),
    /// The executor of a benchmark.
    #[command(hide = true)]
    BenchWorker(pelton_bench::worker::WorkerArgs),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(args) => command::serve::run(&args),
        Command::Bench(args) => command::bench::run(args),
        Command::BenchWorker(args) => command::bench::work(args),
    }
}
