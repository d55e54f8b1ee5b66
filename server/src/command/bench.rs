//! `pelton bench`, and the executor process that it starts.

use std::process::ExitCode;

use pelton_bench::{BenchArgs, worker};
use tokio::task::LocalSet;

/// Runs a scenario: exit code 1 if a count does not hold or a process fails.
pub fn run(args: BenchArgs) -> ExitCode {
    let done = local(pelton_bench::run(args));
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the executor of a scenario.
pub fn work(args: worker::WorkerArgs) -> ExitCode {
    match local(worker::run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a future to its end on this thread.
pub fn local<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    LocalSet::new().block_on(&runtime, future)
}
