//! `cargo xtask test`: every stage in one fixed order, quiet while things are fine, and one verdict line at the end.
//!
//! Everything is built in release: the tests then share the dependencies with `cargo run --release`, which are built
//! once. A stage that fails shows its output and the next one runs all the same, so that one run tells everything.

mod progress;
mod tally;

use std::{
    fs,
    io::{self, BufRead, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use crate::{cargo, chaos, planted, power_cut, tidy};
use progress::Progress;
use tally::Tally;

/// The requirements of the Python tests; without the file nothing of Python is installed. The tests find the
/// interpreter that has them through `PELTON_TEST_PYTHON`.
const REQUIREMENTS: &str = "tests/python/requirements.txt";

/// The simulation's binary; without it there is nothing to simulate.
const SIMULATION: &str = "sim/src/main.rs";

/// Bugs that are put in on purpose, and that the simulation must find; `cargo xtask planted` looks for all.
const PLANTED: [&str; 3] = [
    "ack_before_flush",
    "truncate_on_corruption",
    "stale_token_accepted",
];

/// The kill loop's binary, and how often it kills a server here.
const KILL_LOOP: &str = "tests/src/bin/pelton-chaos.rs";
const KILLS: u64 = 20;
/// How often its disk loses power here.
const CUTS: u64 = 5;

/// What a stage did. A stage that is no test counts as one.
struct Outcome {
    passed: u64,
    failed: u64,
    /// Shown if something failed.
    output: String,
}

#[derive(Default)]
struct Verdict {
    passed: u64,
    failed: u64,
}

pub fn run() -> io::Result<ExitCode> {
    let root = cargo::root();
    let python = cargo::target(&root).join("python");
    let mut verdict = Verdict::default();

    if root.join(REQUIREMENTS).exists() {
        verdict.stage("install", "what the Python tests import", |progress| {
            install(&root, &python, progress)
        });
    }
    verdict.stage("fmt", "the code is formatted", |progress| {
        let what = ["fmt", "--all", "--check", "--", "--color", "never"];
        alone(cargo::cargo(&root, &what), progress)
    });
    verdict.stage("tidy", "the rules of the house hold", |_| tidy(&root));
    verdict.stage("clippy", "no warning in any target", |progress| {
        let what = ["--release", "--workspace", "--all-targets", "--locked"];
        let mut command = cargo::cargo(&root, &["clippy"]);
        command.args(what).args(["--", "-D", "warnings"]);
        alone(command, progress)
    });
    verdict.stage("tests", "every test of the workspace", |progress| {
        let what = ["--release", "--workspace", "--locked", "--no-fail-fast"];
        let mut command = cargo::cargo(&root, &["test"]);
        command.args(what);
        if python.exists() {
            command.env("PELTON_TEST_PYTHON", python.join("bin/python"));
        }
        tests(command, progress)
    });
    if root.join(SIMULATION).exists() {
        verdict.stage("sim", "200 seeds in simulation", |progress| {
            simulate(&root, progress)
        });
        verdict.stage("planted", "simulation finds planted bugs", |progress| {
            let mut outcome = alone(planted::build(&root), progress)?;
            for bug in PLANTED {
                let found = alone(planted::find(&root, bug, 1000), progress)?;
                outcome.passed += found.passed;
                outcome.failed += found.failed;
                outcome.output.push_str(&found.output);
            }
            Ok(outcome)
        });
    }

    if root.join(KILL_LOOP).exists() {
        verdict.stage("chaos", "20 kills lose nothing", |progress| {
            let built = alone(cargo::cargo(&root, &chaos::BUILD), progress)?;
            if built.failed > 0 {
                return Ok(built);
            }
            let program = cargo::target(&root).join("release/pelton");
            alone(chaos::kill_loop(&root, &program, KILLS), progress)
        });
        verdict.stage("power", "5 power cuts lose nothing", |progress| {
            power_cut::install();
            let program = cargo::target(&root).join("release/pelton");
            let outcome = alone(power_cut::cuts(&root, &program, CUTS), progress)?;
            if let Some(why) = skipped(&outcome.output) {
                progress.remark(why);
            }
            Ok(outcome)
        });
    }

    let Verdict { passed, failed } = verdict;
    println!("{passed} passed, {failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Verdict {
    /// Runs one stage under its title. A stage that could not even start has failed.
    fn stage(
        &mut self,
        name: &'static str,
        title: &'static str,
        run: impl FnOnce(&mut Progress) -> io::Result<Outcome>,
    ) {
        let mut progress = Progress::start(name, title);
        let outcome =
            run(&mut progress).unwrap_or_else(|error| Outcome::one(false, error.to_string()));
        progress.finish(outcome.failed == 0);
        if outcome.failed > 0 {
            println!("\n{}\n", outcome.output.trim_end());
        }
        self.passed += outcome.passed;
        self.failed += outcome.failed;
    }
}

impl Outcome {
    fn one(passed: bool, output: String) -> Outcome {
        Outcome {
            passed: u64::from(passed),
            failed: u64::from(!passed),
            output,
        }
    }
}

/// Makes a virtual environment below the target folder. It is made again only when the requirements change, so that a
/// second run needs no network.
fn install(root: &Path, python: &Path, progress: &mut Progress) -> io::Result<Outcome> {
    let wanted = fs::read_to_string(root.join(REQUIREMENTS))?;
    let stamp = python.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(Outcome::one(true, String::new()));
    }
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv", "--clear"]).arg(python);
    let made = alone(venv, progress)?;
    if made.failed > 0 {
        return Ok(made);
    }
    let mut pip = Command::new(python.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
    ])
    .arg(root.join(REQUIREMENTS));
    let installed = alone(pip, progress)?;
    if installed.failed == 0 {
        fs::write(stamp, wanted)?;
    }
    Ok(installed)
}

fn tidy(root: &Path) -> io::Result<Outcome> {
    let report = tidy::check(root)?;
    Ok(Outcome::one(report.is_clean(), report.to_string()))
}

/// The line of a stage that this machine has no means for.
fn skipped(output: &str) -> Option<&str> {
    output.lines().find(|line| line.starts_with("skipped: "))
}

fn tests(command: Command, progress: &mut Progress) -> io::Result<Outcome> {
    let mut tally = Tally::default();
    let succeeded = watch(command, |line| {
        progress.working(line);
        if let Some(step) = tally.on_line(line) {
            progress.step(&step);
        }
    })?;
    let (passed, failed, output) = tally.finish(succeeded);
    progress.step(&format!("{passed} passed, {failed} failed"));
    Ok(Outcome {
        passed,
        failed,
        output,
    })
}

/// Builds the simulation as one of the whole workspace and starts it itself: alone (`-p`), its dependencies would have
/// other cargo features than the tests', and half of them would be built a second time.
fn simulate(root: &Path, progress: &mut Progress) -> io::Result<Outcome> {
    let what = ["build", "--release", "--locked", "--workspace"];
    let mut build = cargo::cargo(root, &what);
    build.args(["--bin", "pelton-sim"]);
    let built = alone(build, progress)?;
    if built.failed > 0 {
        return Ok(built);
    }
    let mut run = Command::new(cargo::target(root).join("release/pelton-sim"));
    run.current_dir(root).args(["--seeds", "200"]);
    alone(run, progress)
}

/// A stage that is one command: its exit code is the verdict.
fn alone(command: Command, progress: &mut Progress) -> io::Result<Outcome> {
    let mut output = String::new();
    let succeeded = watch(command, |line| {
        progress.working(line);
        if !tally::is_noise(line) {
            output.push_str(line);
            output.push('\n');
        }
    })?;
    Ok(Outcome::one(succeeded, output))
}

/// Runs a command and hands on each line of its two outputs, in the order in which they were written.
fn watch(mut command: Command, mut on_line: impl FnMut(&str)) -> io::Result<bool> {
    let (reader, writer) = io::pipe()?;
    command
        .env("CARGO_TERM_COLOR", "never")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn().map_err(|error| {
        let program = command.get_program().to_string_lossy();
        io::Error::new(error.kind(), format!("cannot start {program}: {error}"))
    })?;
    // The command holds the writing ends too: while it lives, the reader would wait for more.
    drop(command);
    for line in BufReader::new(reader).split(b'\n') {
        on_line(&String::from_utf8_lossy(&line?));
    }
    Ok(child.wait()?.success())
}
