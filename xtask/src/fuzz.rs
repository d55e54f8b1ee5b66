//! `cargo xtask fuzz`: builds the targets of `fuzz/` for libFuzzer with what stable Rust has, and lets it look for inputs
//! that break one of them.

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::SystemTime,
};

use crate::cargo;

/// Where the list of targets stands.
const TARGETS: &str = "fuzz/src/lib.rs";
/// Named to cargo, so that the instrumentation is for the targets and not for build scripts and macros.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// Counters and comparisons for libFuzzer, and the checks that a release leaves out.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on";
/// One input may take this long, and the process that much memory.
const LIMITS: [&str; 2] = ["-timeout=10", "-rss_limit_mb=2048"];

#[derive(clap::Args)]
#[group(skip)]
pub struct Args {
    /// What to fuzz, as `--list` names it
    #[arg(required_unless_present = "list")]
    target: Option<String>,
    /// How long
    #[arg(required_unless_present_any = ["list", "input", "keep"])]
    seconds: Option<u64>,
    /// Stop after so many inputs, if the time is not over before
    #[arg(long, value_name = "N", conflicts_with_all = ["input", "keep"])]
    runs: Option<u64>,
    /// List the targets
    #[arg(long, exclusive = true)]
    list: bool,
    /// Run the target on the input in this file alone, as a failing run names it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["seconds", "keep"])]
    input: Option<PathBuf>,
    /// Put the smallest set of inputs that covers all that was reached into the kept ones
    #[arg(long, conflicts_with = "seconds")]
    keep: bool,
}

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    let names = names(&fs::read_to_string(root.join(TARGETS))?);
    let target = args.target.as_deref().unwrap_or_default();
    if args.list || !names.iter().any(|name| name == target) {
        if !args.list {
            eprintln!("there is no target {target:?}; the targets are:");
        }
        println!("{}", names.join("\n"));
        return Ok(if args.list {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }

    let fuzz = cargo::target(&root).join("fuzz");
    if !build(&root, &fuzz)? {
        return Ok(ExitCode::FAILURE);
    }
    let found = fuzz.join("corpus").join(target);
    let broken = fuzz.join("artifacts").join(target);
    let kept = root.join("fuzz/corpus").join(target);
    for folder in [&found, &broken, &kept] {
        fs::create_dir_all(folder)?;
    }
    let mut engine = Command::new(fuzz.join(PLATFORM).join("release/pelton-fuzz"));
    engine.env("PELTON_FUZZ_TARGET", target).args(LIMITS);
    let mut artifacts = broken.clone().into_os_string();
    artifacts.push("/");
    engine.arg({
        let mut prefix = std::ffi::OsString::from("-artifact_prefix=");
        prefix.push(artifacts);
        prefix
    });

    if let Some(input) = &args.input {
        engine.arg(input);
        return cargo::hand_over(engine);
    }
    if args.keep {
        engine.args(["-set_cover_merge=1", "-max_len=256"]);
        engine.arg(kept).arg(found);
        return cargo::hand_over(engine);
    }
    let seconds = args.seconds.unwrap_or_default();
    engine.arg(format!("-max_total_time={seconds}"));
    if let Some(runs) = args.runs {
        engine.arg(format!("-runs={runs}"));
    }
    engine.args(["-print_final_stats=1", "-use_value_profile=0"]);
    engine.arg(&found).arg(&kept);
    look(engine, target, &broken)
}

/// The names in the list of targets.
fn names(list: &str) -> Vec<String> {
    let lines = list.lines().filter_map(|line| {
        let name = line.trim().strip_prefix("name: \"")?;
        Some(name.strip_suffix("\",")?.to_owned())
    });
    lines.collect()
}

fn build(root: &Path, fuzz: &Path) -> io::Result<bool> {
    let what = [
        "build",
        "--release",
        "--locked",
        "--quiet",
        "-p",
        "pelton-fuzz",
    ];
    let mut build = cargo::cargo(root, &what);
    build.args(["--features", "libfuzzer", "--target", PLATFORM]);
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    build.env("RUSTFLAGS", format!("{flags} {FLAGS}").trim_start());
    build.env("CARGO_TARGET_DIR", fuzz);
    Ok(build.status()?.success())
}

/// Runs the engine and sums up what it did; what it printed is shown only if an input broke the target.
fn look(mut engine: Command, target: &str, broken: &Path) -> io::Result<ExitCode> {
    let begun = SystemTime::now();
    let mut child = engine
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let printed = child.stderr.take().expect("it was asked for");
    let mut lines = Vec::new();
    for line in BufReader::new(printed).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        // Each step of the search has a line with its number.
        if !line.starts_with('#') {
            lines.push(line);
        }
    }
    let succeeded = child.wait()?.success();
    let figure = |name: &str| {
        let line = lines.iter().rev().find_map(|line| {
            let rest = line.strip_prefix("stat::")?.strip_prefix(name)?;
            rest.strip_prefix(':')
        });
        line.map_or("?", str::trim)
    };
    println!(
        "{target}: {} executions, {} a second, {} new inputs, {} MiB at most",
        figure("number_of_executed_units"),
        figure("average_exec_per_sec"),
        figure("new_units_added"),
        figure("peak_rss_mb"),
    );
    if succeeded {
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", lines.join("\n"));
    match youngest(broken, begun)? {
        Some(path) => println!(
            "{target} broke on {path}\nagain: cargo xtask fuzz {target} --input {path}",
            path = path.display()
        ),
        None => println!("{target} broke and left no input"),
    }
    Ok(ExitCode::FAILURE)
}

/// The last file that was written into this folder since `begun`.
fn youngest(folder: &Path, begun: SystemTime) -> io::Result<Option<PathBuf>> {
    let mut youngest = None;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let written = entry.metadata()?.modified()?;
        if written >= begun {
            youngest = youngest.max(Some((written, entry.path())));
        }
    }
    Ok(youngest.map(|(_, path)| path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_targets_is_read() {
        let list = fs::read_to_string(cargo::root().join(TARGETS)).unwrap();
        let names = names(&list);
        assert!(names.len() >= 5 && names.contains(&"frames".to_owned()));
        for name in names {
            let file = format!("fuzz/src/{name}.rs");
            assert!(cargo::root().join(&file).exists(), "{file}");
        }
    }
}
