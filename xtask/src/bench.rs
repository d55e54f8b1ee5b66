//! `cargo xtask bench`: hands on to `pelton bench`, always in release, because a figure from a debug build misleads.

use std::{ffi::OsString, io, process::ExitCode};

use crate::cargo;

#[derive(clap::Args)]
pub struct Args {
    /// What `pelton bench` is given; its own help is at `cargo xtask bench -- --help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub fn run(args: &Args) -> io::Result<ExitCode> {
    let root = cargo::root();
    let mut command = cargo::cargo(
        &root,
        &[
            "run",
            "--release",
            "--quiet",
            "-p",
            "pelton-server",
            "--",
            "bench",
        ],
    );
    command.args(&args.args);
    cargo::hand_over(command)
}
