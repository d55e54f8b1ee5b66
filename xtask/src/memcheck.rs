//! `cargo xtask memcheck`: the tests of what is unsafe, or stands on it, under AddressSanitizer, after it has been shown
//! that it reports what it is for.
//!
//! A stable toolchain brings the sanitizer's runtime, and lets a build use it where `RUSTC_BOOTSTRAP` says so. Where one
//! does not, nothing is checked, and that is said.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::cargo;

/// Named to cargo, so that build scripts and macros are built without the sanitizer.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// The sanitizer, and the checks of the standard library that a release leaves out.
const FLAGS: [&str; 2] = ["-Zsanitizer=address", "-Cdebug-assertions=on"];
/// A program that is wrong on purpose, and the ways in which it can be.
const WRONG: &str = "xtask/src/memcheck/wrong.rs";
const WAYS: [&str; 2] = ["heap-use-after-free", "heap-buffer-overflow"];

/// What is run: the crates with `unsafe` of their own (see the rule `unsafe` of `cargo xtask tidy`), and the core's
/// shards, whose records are read in place. Left out is what takes minutes and is safe code, or is tried by the others:
/// `engine/tests/churn.rs`, and thousands of power cuts on a disk in memory.
const TESTS: [&[&str]; 4] = [
    &[
        "-p",
        "pelton-storage",
        "--features",
        "pelton-storage/device",
        "--",
        "--skip",
        "a_power_cut_at_any_moment",
    ],
    &["-p", "pelton-engine", "--lib", "--test", "embedded"],
    &["-p", "pelton-net"],
    &["-p", "pelton-core", "--lib", "--test", "shard"],
];

pub fn run() -> io::Result<ExitCode> {
    let root = cargo::root();
    let target = cargo::target(&root).join("memcheck");
    fs::create_dir_all(&target)?;
    let wrong = match build_wrong(&root, &target)? {
        Ok(wrong) => wrong,
        Err(why) => {
            println!("skipped: this toolchain builds nothing with AddressSanitizer: {why}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    if !reports(&wrong)? {
        return Ok(ExitCode::FAILURE);
    }
    let mut sound = true;
    for tests in TESTS {
        println!("memcheck: {}", tests.join(" "));
        io::stdout().flush()?;
        sound &= checked(&root, &target, tests).status()?.success();
    }
    println!(
        "memcheck: {}",
        if sound {
            "nothing was found"
        } else {
            "something was found"
        }
    );
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Builds the program that is wrong; what the compiler says if it cannot.
fn build_wrong(root: &Path, target: &Path) -> io::Result<Result<PathBuf, String>> {
    let program = target.join("wrong");
    let mut rustc = Command::new("rustc");
    rustc
        .current_dir(root)
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["--edition=2024", "-O", "--target", PLATFORM])
        .args(FLAGS)
        .arg("-o")
        .arg(&program)
        .arg(WRONG);
    let built = rustc.output()?;
    if built.status.success() {
        return Ok(Ok(program));
    }
    let said = String::from_utf8_lossy(&built.stderr);
    let why = said.lines().find(|line| line.starts_with("error"));
    Ok(Err(why.unwrap_or("rustc failed").to_owned()))
}

/// True if the sanitizer reports each way of being wrong by its name, and nothing where nothing is wrong.
fn reports(wrong: &Path) -> io::Result<bool> {
    let quiet = Command::new(wrong).output()?;
    if !quiet.status.success() {
        let said = String::from_utf8_lossy(&quiet.stderr);
        println!("memcheck: reported where nothing is wrong:\n{said}");
        return Ok(false);
    }
    for way in WAYS {
        let output = Command::new(wrong).arg(way).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let named = said.contains(&format!("AddressSanitizer: {way}"));
        if output.status.success() || !named {
            println!("memcheck: a {way} was not reported:\n{said}");
            return Ok(false);
        }
    }
    println!("memcheck: planted and reported: {}", WAYS.join(", "));
    Ok(true)
}

/// Cargo, about to run these tests with the sanitizer. In a folder of its own: other flags would have everything built
/// again, and again when they are gone.
fn checked(root: &Path, target: &Path, tests: &[&str]) -> Command {
    let what = ["test", "--release", "--locked", "--no-fail-fast", "--quiet"];
    let mut command = cargo::cargo(root, &what);
    command.args(["--target", PLATFORM]).args(tests);
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    let flags = format!("{flags} {}", FLAGS.join(" "));
    command.env("RUSTFLAGS", flags.trim_start());
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_TARGET_DIR", target);
    command
}
