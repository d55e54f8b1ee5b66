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
    /// See it work on a folder of this machine, optionally through a crash.
    Demo(command::demo::DemoArgs),
    /// Look at the log of a data directory.
    Log(command::log::LogArgs),
    /// Measure a server on this machine.
    Bench(pelton_bench::BenchArgs),
    /// The executor of a benchmark.
    #[command(hide = true)]
    BenchWorker(pelton_bench::worker::WorkerArgs),
    /// The executor of the demonstration.
    #[command(hide = true)]
    DemoExecutor(command::demo::work::ExecutorArgs),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(args) => command::serve::run(&args),
        Command::Demo(args) => command::demo::run(args),
        Command::Log(args) => command::log::run(&args),
        Command::Bench(args) => command::bench::run(args),
        Command::BenchWorker(args) => command::bench::work(args),
        Command::DemoExecutor(args) => command::demo::work::run(args),
    }
}
