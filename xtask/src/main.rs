//! The one entry to the project's chores: `cargo xtask COMMAND`. Each command has a file of its own.

mod bench;
mod cargo;
mod chaos;
mod ci;
mod fuzz;
mod memcheck;
mod planted;
mod power_cut;
mod sim;
mod test;
mod tidy;

use std::{io, process::ExitCode};

use clap::Parser;

/// The project's chores: check it, test it, simulate it, measure it.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
enum Command {
    /// Install what the tests need, run them all, and end in one verdict line
    ///
    /// The stages are formatting, tidy, clippy, every test of the workspace, the simulation, the planted bugs that the
    /// simulation must find, the kill loop, and power cuts. A failing stage shows its output and does not keep the next ones from running.
    Test,
    /// Run exactly what continuous integration runs: the script .ci/run
    Ci,
    /// Check the rules of the house that no compiler knows
    ///
    /// One line a violation, `path:line: rule: what to do`. The rules: edges (who may import whom), placement (which
    /// package belongs where), versions (all in the root manifest), headers (every file says its purpose), names,
    /// marks (nothing is left for later), paths (what documents name exists), features (docs/FEATURES.md tells the
    /// truth about its tests), unsafe (only where it is expected).
    Tidy,
    /// Run the simulation over many seeds, or again over one
    Sim(sim::Args),
    /// Kill the server again and again under load, and judge what is left
    Chaos(chaos::Args),
    /// Cut the power of the server's disk again and again under load, and judge what is left
    ///
    /// The disk is a file served over FUSE. It holds writes back until they are flushed; a cut drops, keeps or tears each
    /// of them. Needs root, FUSE and a loop device; without them it says `skipped: why`.
    PowerCut(power_cut::Args),
    /// Look for inputs that break what reads them: frames, records, a damaged log, settings, ids
    Fuzz(fuzz::Args),
    /// Run the tests of what is unsafe under AddressSanitizer, once it has reported what is planted for it
    Memcheck,
    /// Wake each planted bug and see which invariant falls
    Planted(planted::Args),
    /// Run `pelton bench` in release; everything behind `bench` is handed on
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Test => test::run(),
        Command::Ci => ci::run(),
        Command::Tidy => tidy::run(),
        Command::Sim(args) => sim::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::PowerCut(args) => power_cut::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Memcheck => memcheck::run(),
        Command::Planted(args) => planted::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    done.unwrap_or_else(|error: io::Error| {
        eprintln!("xtask: {error}");
        ExitCode::FAILURE
    })
}
