//! `pelton restore`: makes a data directory of a backup, or looks whether one is whole.

use std::{ops::ControlFlow, path::PathBuf, time::Instant};

use clap::Args;
use pelton_engine::{RestoreError, restore, verify};
use pelton_storage::backup::BadBackup;

use crate::{
    backup::describe,
    command::{
        backup::render,
        bar::Bar,
        exit::{Exit, Failure, put, put_json},
    },
    config::Config,
};

/// Make a data directory of a backup
///
/// Every file is compared with its checksum before and while it is copied; then the logs are read as a start reads them,
/// and their tasks counted. `pelton serve` starts on the directory only when all of that has been right. Stop the server
/// of which it is a backup, and its executors, before the restored one serves: both have the same identity.
#[derive(Args, Clone, Debug)]
pub struct RestoreArgs {
    /// The backup
    #[arg(value_name = "BACKUP")]
    backup: PathBuf,
    /// The new data directory, which is not there or empty [default: pelton-data]
    #[arg(long, value_name = "DIR", conflicts_with = "verify")]
    data: Option<PathBuf>,
    /// Only look whether the backup is whole
    #[arg(long)]
    verify: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl RestoreArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.json
    }
}

/// Restores, or verifies, and says what is in the backup.
pub fn run(args: &RestoreArgs, config: &Config) -> Result<Exit, Failure> {
    let start = Instant::now();
    let bar = Bar::new(if args.verify { "verify" } else { "restore" }, args.json);
    let mut progress = |progress| {
        bar.show(progress);
        ControlFlow::Continue(())
    };
    let data = args.data.as_ref().unwrap_or(&config.data.value);
    let done = match args.verify {
        true => verify(&args.backup, &mut progress),
        false => restore(&args.backup, data, &mut progress),
    };
    drop(bar);
    let backup = done.map_err(|error| {
        let exit = match &error {
            RestoreError::Bad(BadBackup::Missing { .. }) => Exit::NotFound,
            RestoreError::Target { .. } => Exit::Usage,
            RestoreError::Room { .. } => Exit::Throttled,
            RestoreError::Bad(_)
            | RestoreError::File { .. }
            | RestoreError::Log { .. }
            | RestoreError::History { .. }
            | RestoreError::Directory(_)
            | RestoreError::Copy(_)
            | RestoreError::Stopped => Exit::Failure,
        };
        Failure::new(exit, error.to_string())
    })?;
    let (what, place) = match args.verify {
        true => ("whole:", &args.backup),
        false => ("restored into", data),
    };
    let result = describe(&backup, place, start.elapsed());
    match args.json {
        true => put_json(&result)?,
        false => put(render(what, &result))?,
    }
    Ok(Exit::Ok)
}
