//! `cargo xtask planted`: wakes each bug that the code was given on purpose and says which invariant falls, after how
//! many seeds of the simulation that `cargo xtask sim` runs. One build has all of them (`core/src/planted.rs`).

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::cargo;

#[derive(clap::Args)]
pub struct Args {
    /// Wake this bug alone
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Seeds within which a bug must be found
    #[arg(long, value_name = "N", default_value_t = 1000)]
    seeds: u64,
}

/// The flag under which the code has its bugs.
const FLAG: &str = "--cfg pelton_planted";

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    if !build(&root).status()?.success() {
        return Ok(ExitCode::FAILURE);
    }
    let names = match &args.only {
        Some(name) => vec![name.clone()],
        None => names(&root)?,
    };
    println!("{:<26}{:>6}  the invariant that fell", "bug", "seeds");
    let mut all = true;
    for name in names {
        all &= find(&root, &name, args.seeds).status()?.success();
    }
    Ok(if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Cargo, about to build the simulation with its bugs asleep. In a folder of its own: other flags would have everything
/// built again, and again when they are gone.
pub fn build(root: &Path) -> Command {
    let mut command = cargo::cargo(
        root,
        &[
            "build",
            "--release",
            "--quiet",
            "--locked",
            "-p",
            "pelton-sim",
        ],
    );
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{flags} {FLAG}").trim_start());
    command.env("CARGO_TARGET_DIR", folder(root));
    command
}

/// The simulation, about to look for one bug; it prints a row of the table and succeeds if a seed finds it.
pub fn find(root: &Path, name: &str, seeds: u64) -> Command {
    let mut command = Command::new(folder(root).join("release/pelton-sim"));
    command
        .current_dir(root)
        .args(["--planted", name, "--seeds", &seeds.to_string()])
        .stderr(std::process::Stdio::null());
    command
}

fn folder(root: &Path) -> PathBuf {
    cargo::target(root).join("planted")
}

/// The bugs that the build knows.
fn names(root: &Path) -> io::Result<Vec<String>> {
    let mut command = Command::new(folder(root).join("release/pelton-sim"));
    let listed = command.arg("--list-planted").output()?;
    Ok(String::from_utf8_lossy(&listed.stdout)
        .lines()
        .map(str::to_owned)
        .collect())
}
