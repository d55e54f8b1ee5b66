//! `cargo xtask ci`: the script that continuous integration runs, itself, so that the two cannot drift apart.

use std::{
    io,
    process::{Command, ExitCode},
};

use crate::cargo;

pub fn run() -> io::Result<ExitCode> {
    let root = cargo::root();
    let mut script = Command::new(root.join(".ci/run"));
    script.current_dir(&root);
    cargo::hand_over(script)
}
