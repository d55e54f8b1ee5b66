//! How xtask starts cargo: from the repository's root and with the environment that the caller's own cargo sees.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// The repository's root. Taken when xtask runs and not when it is built, because worktrees may share a target folder.
pub fn root() -> PathBuf {
    let member = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    member.parent().map_or(member.clone(), Path::to_path_buf)
}

/// Where cargo puts what it builds.
pub fn target(root: &Path) -> PathBuf {
    root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into()))
}

/// Cargo at the root, with its first arguments.
///
/// `cargo run` describes xtask's own package in the environment. Build scripts that watch those variables (ring's does)
/// would be built again each time that cargo is called from inside and then from outside, so they are taken out.
pub fn cargo(root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root).args(args);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command on the caller's terminal and hands its exit code on.
pub fn hand_over(mut command: Command) -> io::Result<ExitCode> {
    let status = command.status()?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
