//! `pelton backup`: has the running server write a backup, or takes one of a directory that nobody uses.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf, absolute},
    time::{Duration, Instant},
};

use clap::Args;
use pelton_client::{Client, Error, Operation};
use pelton_engine::{BackupError, backup::Copied, backup_offline};
use pelton_storage::manifest::DirectoryError;
use serde_json::{Value, json};

use crate::{
    backup::{describe, options},
    command::{
        bar::Bar,
        connect::{ConnectArgs, Local, read_answer},
        exit::{Exit, Failure, put, put_json},
        table::{Table, cell},
        time::show_ms,
    },
    config::Config,
};

/// How often the server is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Copy a data directory while its server serves
///
/// The server writes the backup, on its own machine. Where no server runs on the data directory, this command copies it
/// itself. `pelton restore` makes a data directory of it again. A backup has what is secret in the data directory: the
/// payloads of tasks, the key of the server's certificate and the hashes of bearer keys. Its files can be read by their
/// owner alone.
#[derive(Args, Clone, Debug)]
pub struct BackupArgs {
    /// The folder for it, new or empty; an absolute path where the server is named with --server
    #[arg(value_name = "DIR")]
    target: PathBuf,
    #[command(flatten)]
    connect: ConnectArgs,
}

impl BackupArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.connect.json
    }
}

/// Takes the backup and says what is in it.
pub async fn run(args: &BackupArgs, config: &Config) -> Result<Exit, Failure> {
    let connect = &args.connect;
    let bar = Bar::new("backup", connect.json);
    let result = match server(connect, config).await? {
        Some(client) => {
            let named = is_named(connect);
            let result = ask(&client, &args.target, named, &bar).await;
            client.close().await;
            result?
        }
        None => take(connect.data(config), &local(&args.target)?, &bar)?,
    };
    drop(bar);
    match connect.json {
        true => put_json(&result)?,
        false => put(render("backup", &result))?,
    }
    Ok(Exit::Ok)
}

fn is_named(connect: &ConnectArgs) -> bool {
    let server = connect.server.as_ref();
    server.is_some_and(|server| !server.is_empty())
}

/// The server that is to take the backup; `None` where none runs on the data directory.
async fn server(connect: &ConnectArgs, config: &Config) -> Result<Option<Client>, Failure> {
    let named = is_named(connect);
    if !named && Local::read(connect.data(config))?.is_none() {
        return Ok(None);
    }
    match Client::connect(connect.options(config)?).await {
        Ok(client) => Ok(Some(client)),
        // The file of a server that did not end in order.
        Err(Error::Unreachable(_)) if !named => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn local(target: &Path) -> Result<PathBuf, Failure> {
    absolute(target).map_err(|error| Failure::usage(format!("{}: {error}", target.display())))
}

async fn ask(client: &Client, target: &Path, named: bool, bar: &Bar) -> Result<Value, Failure> {
    let target = match named {
        true => target.to_owned(),
        false => local(target)?,
    };
    let path = target.to_str().ok_or_else(|| {
        Failure::usage(format!(
            "{}: a path for a server is UTF-8",
            target.display()
        ))
    })?;
    let begun = query(client, Operation::BackupStart, &json!({ "path": path })).await?;
    let backup = json!({ "backup": begun["backup"] });
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        let status = query(client, Operation::BackupStatus, &backup).await?;
        let bytes = |name: &str| status[name].as_u64().unwrap_or(0);
        bar.show(Copied {
            bytes: bytes("bytes"),
            bytes_total: bytes("bytes_total"),
        });
        if status["state"] == "done" {
            return Ok(status["result"].clone());
        }
        tokio::select! {
            () = tokio::time::sleep(ASK_EVERY) => {}
            _ = &mut interrupted => {
                query(client, Operation::BackupCancel, &backup).await?;
                return Err(Failure::new(Exit::Failure, "the backup was stopped: nothing is left of it"));
            }
        }
    }
}

async fn query(client: &Client, operation: Operation, body: &Value) -> Result<Value, Failure> {
    read_answer(&client.query(operation, &body.to_string()).await?)
}

/// Copies a directory that no server uses.
fn take(data: &Path, target: &Path, bar: &Bar) -> Result<Value, Failure> {
    let start = Instant::now();
    let taken = backup_offline(data, target, &options(), &mut |progress| {
        bar.show(progress);
        ControlFlow::Continue(())
    });
    let backup = taken.map_err(|error| {
        let exit = match &error {
            BackupError::Target { .. } => Exit::Usage,
            BackupError::NoData { .. } => Exit::NotFound,
            BackupError::Directory(DirectoryError::Locked { .. }) => Exit::Unreachable,
            BackupError::Room { .. } => Exit::Throttled,
            BackupError::Busy
            | BackupError::Closing
            | BackupError::Stopped
            | BackupError::Quarantined(_)
            | BackupError::Space { .. }
            | BackupError::Shard { .. }
            | BackupError::Directory(_)
            | BackupError::Copy { .. }
            | BackupError::History(_)
            | BackupError::HistoryFails => Exit::Failure,
        };
        Failure::new(exit, error.to_string())
    })?;
    Ok(describe(&backup, target, start.elapsed()))
}

/// What is in a backup, for people.
pub fn render(what: &str, result: &Value) -> String {
    let mut table = Table::new([
        "SHARD",
        ">SEGMENTS",
        ">BYTES",
        ">LIVE TASKS",
        ">TASKS",
        ">RECORDS",
    ]);
    let names = ["segments", "bytes", "live_tasks", "tasks", "records"];
    for shard in result["shards"].as_array().into_iter().flatten() {
        let figures = names.iter().map(|name| cell(&shard[*name]));
        table.row([cell(&shard["shard"])].into_iter().chain(figures));
    }
    let taken_ms = result["taken_ms"].as_u64().unwrap_or(0);
    format!(
        "{}\n{what} {}: {} live tasks, {} history rows, {} files, {} bytes in {} s; taken {} by version {}\n",
        table.render(),
        cell(&result["path"]),
        cell(&result["live_tasks"]),
        cell(&result["history_rows"]),
        cell(&result["files"]),
        cell(&result["bytes"]),
        cell(&result["seconds"]),
        show_ms(taken_ms),
        cell(&result["program"]),
    )
}
