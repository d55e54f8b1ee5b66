//! The `pelton` binary: configuration, command line, and the edges wired to the engine.

use std::{io, path::PathBuf, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{
    command::{
        bench::local,
        exit::{Exit, Failure, end},
    },
    config::{Config, Layer},
};

mod backup;
mod command;
mod config;
mod edge;
mod keys;

#[cfg(not(target_os = "linux"))]
compile_error!("Pelton runs on Linux only: its log is written through io_uring.");

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Durable asynchronous tasks of many tenants, over QUIC.
///
/// Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 conflict, 5 throttled, 6 unreachable, 7 the awaited task
/// failed, 8 unfit environment, 9 the wait timed out.
#[derive(Parser)]
#[command(version, about, disable_help_subcommand = true)]
struct Arguments {
    /// Configuration file [default: pelton.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global")]
    config: Option<PathBuf>,
    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as pelton_engine=debug
    /// [default: warn]
    #[arg(long, global = true, value_name = "LEVEL", help_heading = "Global")]
    log: Option<String>,
    /// Log lines of JSON
    #[arg(long, global = true, help_heading = "Global")]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a server
    Serve(command::serve::ServeArgs),
    Task(command::task::TaskArgs),
    Function(command::function::FunctionArgs),
    Tenant(command::tenant::TenantArgs),
    Executor(command::executor::ExecutorArgs),
    Key(command::key::KeyArgs),
    Stats(command::stats::StatsArgs),
    Doctor(command::doctor::DoctorArgs),
    Config(command::config::ConfigArgs),
    /// See it work on a folder of this machine, also through a crash
    Demo(command::demo::DemoArgs),
    Backup(command::backup::BackupArgs),
    Restore(command::restore::RestoreArgs),
    /// Look at the log of a data directory
    Log(command::log::LogArgs),
    /// Measure a server on this machine
    Bench(pelton_bench::BenchArgs),
    /// The executor of a benchmark
    #[command(hide = true)]
    BenchWorker(pelton_bench::worker::WorkerArgs),
    /// The executor of the demonstration
    #[command(hide = true)]
    DemoExecutor(command::demo::work::ExecutorArgs),
    Completions(command::completions::CompletionsArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (mut flags, json) = match &arguments.command {
        Command::Serve(args) => (args.layer(), false),
        Command::Task(args) => (Layer::default(), args.json()),
        Command::Function(args) => (Layer::default(), args.json()),
        Command::Tenant(args) => (Layer::default(), args.json()),
        Command::Executor(args) => (Layer::default(), args.json()),
        Command::Key(args) => (Layer::default(), args.json()),
        Command::Stats(args) => (Layer::default(), args.json()),
        Command::Doctor(args) => (args.layer(), args.json()),
        Command::Config(args) => (Layer::default(), args.json()),
        Command::Backup(args) => (Layer::default(), args.json()),
        Command::Restore(args) => (Layer::default(), args.json()),
        Command::Demo(_)
        | Command::Log(_)
        | Command::Bench(_)
        | Command::BenchWorker(_)
        | Command::DemoExecutor(_)
        | Command::Completions(_) => (Layer::default(), false),
    };
    flags.server.log = arguments.log.clone();
    let config = Config::load(arguments.config.as_deref(), flags).map_err(Failure::usage);
    let config = match config.and_then(|config| {
        start_log(&config.log.value, arguments.log_json)?;
        Ok(config)
    }) {
        Ok(config) => config,
        Err(failure) => return end(Err(failure), json),
    };
    let result = match arguments.command {
        Command::Serve(_) => command::serve::run(&config),
        Command::Task(args) => local(command::task::run(&args, &config)),
        Command::Function(args) => local(command::function::run(&args, &config)),
        Command::Tenant(args) => local(command::tenant::run(&args, &config)),
        Command::Executor(args) => local(command::executor::run(&args, &config)),
        Command::Key(args) => local(command::key::run(&args, &config)),
        Command::Stats(args) => local(command::stats::run(&args, &config)),
        Command::Doctor(args) => local(command::doctor::run(&args, &config)),
        Command::Config(args) => command::config::run(&args, &config),
        Command::Backup(args) => local(command::backup::run(&args, &config)),
        Command::Restore(args) => command::restore::run(&args, &config),
        Command::Demo(args) => return command::demo::run(args),
        Command::Log(args) => return command::log::run(&args),
        Command::DemoExecutor(args) => return command::demo::work::run(args),
        Command::Bench(args) => return command::bench::run(args),
        Command::BenchWorker(args) => return command::bench::work(args),
        Command::Completions(args) => command::completions::run(&args, Arguments::command()),
    };
    end(result, json)
}

fn start_log(level: &str, json: bool) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(level)
        .map_err(|error| Failure::new(Exit::Usage, format!("--log {level}: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    if json {
        log.json().init();
    } else {
        log.with_ansi(false).init();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
