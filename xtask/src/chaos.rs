//! `cargo xtask chaos`: builds the server and the kill loop, and hands on to the latter.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::cargo;

/// Acknowledges a submit when it is appended and lets its batch wait before it hands it to the device: a kill must lose
/// some of them. One that only does not wait for the flush would lose nothing, since a killed process takes no write back.
const PLANTED: &str = r#"--cfg pelton_planted="ack_before_device""#;
/// Cycles within which a loss must have been noticed.
pub const CONTROL_CYCLES: u64 = 20;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pace: Pace,
    /// Run 20 cycles of a server that acknowledges too early, and fail if no loss is noticed
    #[arg(long, conflicts_with = "cycles")]
    control: bool,
}

/// What every kind of cycle is told.
#[derive(clap::Args)]
pub struct Pace {
    /// Kill the server or cut its power N times under load; starts are killed or cut beside that
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub cycles: u64,
    /// What decides about submissions, moments and kills [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How long the server serves before it is killed, on average
    #[arg(long, value_name = "X")]
    seconds_per_cycle: Option<f64>,
    /// Submissions a second over all callers
    #[arg(long, value_name = "N")]
    rate: Option<u64>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

impl Pace {
    /// Hands on everything but the cycles.
    pub fn tell(&self, command: &mut Command) {
        for (flag, value) in [
            ("--seed", self.seed.map(|seed| seed.to_string())),
            ("--rate", self.rate.map(|rate| rate.to_string())),
            (
                "--seconds-per-cycle",
                self.seconds_per_cycle.map(|seconds| seconds.to_string()),
            ),
        ] {
            if let Some(value) = value {
                command.args([flag, &value]);
            }
        }
        if self.json {
            command.arg("--json");
        }
    }
}

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    if !cargo::cargo(&root, &BUILD).status()?.success() {
        return Ok(ExitCode::FAILURE);
    }
    let mut program = cargo::target(&root).join("release/pelton");
    let mut cycles = args.pace.cycles;
    if args.control {
        let Some(planted) = planted_server(&root)? else {
            return Ok(ExitCode::FAILURE);
        };
        program = planted;
        cycles = CONTROL_CYCLES;
    }
    let mut command = kill_loop(&root, &program, cycles);
    args.pace.tell(&mut command);
    if args.control {
        command.arg("--expect-loss");
    }
    cargo::hand_over(command)
}

/// Builds both programs as ones of the whole workspace: alone, their dependencies would have other cargo features than
/// the tests', and half of them would be built a second time.
pub const BUILD: [&str; 9] = [
    "build",
    "--release",
    "--locked",
    "--workspace",
    "--bin",
    "pelton",
    "--bin",
    "pelton-chaos",
    "--quiet",
];

/// The kill loop over this server, once both are built.
pub fn kill_loop(root: &Path, program: &PathBuf, cycles: u64) -> Command {
    let target = cargo::target(root);
    let mut command = Command::new(target.join("release/pelton-chaos"));
    command.current_dir(root).arg("run");
    command.args(["--cycles", &cycles.to_string()]);
    command.arg("--program").arg(program);
    command.arg("--folder").arg(target.join("chaos"));
    command
}

/// Builds a server that acknowledges too early, in a folder of its own: other flags would have cargo build everything
/// again, and again when they are gone. `None` if that fails.
pub fn planted_server(root: &Path) -> io::Result<Option<PathBuf>> {
    let target = cargo::target(root).join("planted-device");
    let what = ["build", "--release", "--locked", "--workspace", "--quiet"];
    let mut command = cargo::cargo(root, &what);
    command.args(["--bin", "pelton"]);
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{flags} {PLANTED}").trim_start());
    command.env("CARGO_TARGET_DIR", &target);
    let built = command.status()?.success();
    Ok(built.then(|| target.join("release/pelton")))
}
