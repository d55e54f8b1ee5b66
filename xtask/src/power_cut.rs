//! `cargo xtask power-cut`: builds the server and the kill loop, which cuts the power of a disk instead, and hands on to
//! the latter. Where the machine has no FUSE, no loop device or no right to mount, it says `skipped: why`.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use crate::{
    cargo,
    chaos::{self, Pace},
};

/// Programs that a run starts, and the Debian packages that have them.
const TOOLS: [(&str, &str); 4] = [
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("losetup", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
];

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pace: Pace,
    /// Run up to 20 cycles of something that loses tasks, and fail if that is not noticed
    #[arg(long, value_name = "WHAT", conflicts_with = "cycles")]
    control: Option<Control>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Control {
    /// The disk acknowledges flushes without making anything durable
    LyingFlush,
    /// The server acknowledges a submit before it hands the batch to the device
    AckBeforeDevice,
}

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    if !cargo::cargo(&root, &chaos::BUILD).status()?.success() {
        return Ok(ExitCode::FAILURE);
    }
    install();
    let mut program = cargo::target(&root).join("release/pelton");
    if let Some(Control::AckBeforeDevice) = args.control {
        let Some(planted) = chaos::planted_server(&root)? else {
            return Ok(ExitCode::FAILURE);
        };
        program = planted;
    }
    let cycles = match args.control {
        Some(_) => chaos::CONTROL_CYCLES,
        None => args.pace.cycles,
    };
    let mut command = cuts(&root, &program, cycles);
    args.pace.tell(&mut command);
    match args.control {
        Some(Control::LyingFlush) => drop(command.args(["--expect-loss", "--lying-flush"])),
        Some(Control::AckBeforeDevice) => drop(command.arg("--expect-loss")),
        None => {}
    }
    cargo::hand_over(command)
}

/// The cycles over this server, once both are built.
pub fn cuts(root: &Path, program: &PathBuf, cycles: u64) -> Command {
    let target = cargo::target(root);
    let mut command = Command::new(target.join("release/pelton-chaos"));
    command.current_dir(root).arg("power-cut");
    command.args(["--cycles", &cycles.to_string()]);
    command.arg("--program").arg(program);
    command.arg("--folder").arg(target.join("power-cut"));
    command
}

/// Installs what is missing where that is possible. If something is missing all the same, the run says so.
pub fn install() {
    let ran = |command: &mut Command| {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).status().is_ok()
    };
    let mut missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !ran(Command::new(tool).arg("-V")))
        .map(|(_, package)| *package)
        .collect();
    missing.dedup();
    if !missing.is_empty() {
        ran(Command::new("apt-get").arg("update"));
        let mut install = Command::new("apt-get");
        install.args(["install", "--yes", "--no-install-recommends"]);
        ran(install.args(missing));
    }
}
