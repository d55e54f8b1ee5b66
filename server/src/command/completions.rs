//! `pelton completions`: what a shell needs to complete a command line.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::command::exit::{Exit, Failure, put};

/// Print a completion script for a shell, such as `pelton completions bash > /etc/bash_completion.d/pelton`
#[derive(Args, Clone, Debug)]
pub struct CompletionsArgs {
    shell: Shell,
}

/// Prints the script.
pub fn run(args: &CompletionsArgs, mut command: Command) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "pelton", &mut script);
    put(script)?;
    Ok(Exit::Ok)
}
