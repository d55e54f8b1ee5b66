//! `pelton key`: bearer keys, through the server when one runs, else in the data directory itself.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
};

use clap::{Args, Subcommand};
use pelton_client::{Client, Error, Operation};
use serde_json::{Value, json};

use crate::{
    command::{
        connect::{ConnectArgs, Local, read_answer},
        exit::{Exit, Failure, put, put_json, put_line},
        table::{Table, cell},
        time::show_ms,
    },
    config::Config,
    keys::{KeyError, Keys, Scopes, TenantSet},
};

/// Bearer keys: who may do what
///
/// While there is no key, only clients on the server's machine are served, and need none. With the first key every
/// client needs one.
#[derive(Args, Clone, Debug)]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum KeyCommand {
    /// Make a key; prints its secret, which is not shown again
    Create(CreateArgs),
    /// List the keys
    #[command(alias = "list")]
    Ls(AllArgs),
    /// End a key
    Revoke(RevokeArgs),
}

#[derive(Args, Clone, Debug)]
struct CreateArgs {
    /// What it may be used for; may be repeated
    #[arg(
        long,
        value_name = "SCOPE",
        value_delimiter = ',',
        value_parser = ["submit", "manage", "execute", "admin"],
        default_values = ["submit", "manage", "execute"]
    )]
    scope: Vec<String>,
    /// A tenant that it covers, where not all; may be repeated
    #[arg(long = "for", value_name = "TENANT", value_delimiter = ',')]
    tenants: Vec<String>,
    /// What its owner calls it
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct AllArgs {
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct RevokeArgs {
    /// The key's id, as `pelton key ls` prints it
    #[arg(value_name = "KEY_ID")]
    id: String,
    #[command(flatten)]
    connect: ConnectArgs,
}

impl KeyArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.connect().json
    }

    fn connect(&self) -> &ConnectArgs {
        match &self.command {
            KeyCommand::Create(args) => &args.connect,
            KeyCommand::Ls(args) => &args.connect,
            KeyCommand::Revoke(args) => &args.connect,
        }
    }
}

/// Where keys are changed.
enum Place {
    Server(Client),
    /// No server runs; the lock keeps it that way meanwhile.
    Directory {
        keys: Keys,
        _lock: File,
    },
}

/// Runs the command.
pub async fn run(args: &KeyArgs, config: &Config) -> Result<Exit, Failure> {
    let connect = args.connect();
    let create = matches!(args.command, KeyCommand::Create(_));
    let place = place(connect, config, create).await?;
    let result = match &args.command {
        KeyCommand::Create(args) => make(args, &place).await,
        KeyCommand::Ls(args) => list(args, &place).await,
        KeyCommand::Revoke(args) => revoke(args, &place).await,
    };
    if let Place::Server(client) = place {
        client.close().await;
    }
    result
}

async fn place(connect: &ConnectArgs, config: &Config, create: bool) -> Result<Place, Failure> {
    let data = connect.data(config);
    let named = connect
        .server
        .as_ref()
        .is_some_and(|server| !server.is_empty());
    if named || Local::read(data)?.is_some() {
        match Client::connect(connect.options(config)?).await {
            Ok(client) => return Ok(Place::Server(client)),
            // The file of a server that did not end in order.
            Err(Error::Unreachable(_)) if !named => {}
            Err(error) => return Err(error.into()),
        }
    }
    open_directory(data, create)
}

fn open_directory(data: &Path, create: bool) -> Result<Place, Failure> {
    let failed =
        |error: io::Error| Failure::new(Exit::Failure, format!("{}: {error}", data.display()));
    if create {
        fs::create_dir_all(data).map_err(failed)?;
    } else if !data.is_dir() {
        return Err(Failure::new(
            Exit::NotFound,
            format!(
                "there is no data directory {}: say where it is with --data",
                data.display()
            ),
        ));
    }
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(data.join("LOCK"))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Failure::new(
                Exit::Unreachable,
                format!(
                    "a server has {} open and does not answer: try again, or stop it first",
                    data.display()
                ),
            ));
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    Ok(Place::Directory {
        keys: Keys::open(data).map_err(broken)?,
        _lock: lock,
    })
}

fn broken(error: KeyError) -> Failure {
    Failure::new(Exit::Failure, error.to_string())
}

async fn ask(client: &Client, operation: Operation, body: Value) -> Result<Value, Failure> {
    read_answer(&client.query(operation, &body.to_string()).await?)
}

async fn make(args: &CreateArgs, place: &Place) -> Result<Exit, Failure> {
    let key = match place {
        Place::Server(client) => {
            let tenants = (!args.tenants.is_empty()).then_some(&args.tenants);
            let body = json!({ "tenants": tenants, "scopes": args.scope, "name": args.name });
            ask(client, Operation::KeyCreate, body).await?
        }
        Place::Directory { keys, .. } => {
            let names: Vec<&str> = args.tenants.iter().map(String::as_str).collect();
            let tenants = TenantSet::parse(&names).map_err(Failure::usage)?;
            let names: Vec<&str> = args.scope.iter().map(String::as_str).collect();
            let scopes = Scopes::parse(&names).map_err(Failure::usage)?;
            let key = keys
                .create(tenants, scopes, args.name.clone())
                .map_err(broken)?;
            json!({ "key": key.id, "secret": key.secret })
        }
    };
    if args.connect.json {
        put_json(&key)?;
        return Ok(Exit::Ok);
    }
    eprintln!(
        "key {} may {}; keep this secret, it is not shown again:",
        cell(&key["key"]),
        args.scope.join(", ")
    );
    put_line(&cell(&key["secret"]))?;
    Ok(Exit::Ok)
}

async fn list(args: &AllArgs, place: &Place) -> Result<Exit, Failure> {
    let answer = match place {
        Place::Server(client) => ask(client, Operation::KeyList, json!({})).await?,
        Place::Directory { keys, .. } => {
            let keys: Vec<Value> = keys.list().iter().map(|key| key.to_json()).collect();
            json!({ "keys": keys })
        }
    };
    if args.connect.json {
        put_json(&answer)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["KEY", "NAME", "TENANTS", "SCOPES", "CREATED"]);
    for key in answer["keys"].as_array().into_iter().flatten() {
        let tenants = match &key["tenants"] {
            Value::Null => "all".to_owned(),
            names => cell(names),
        };
        table.row([
            cell(&key["key"]),
            cell(&key["name"]),
            tenants,
            cell(&key["scopes"]),
            key["created_ms"].as_u64().map_or("-".into(), show_ms),
        ]);
    }
    if table.is_empty() {
        eprintln!("no keys: only clients on the server's machine are served, and need none");
    } else {
        put(table.render())?;
    }
    Ok(Exit::Ok)
}

async fn revoke(args: &RevokeArgs, place: &Place) -> Result<Exit, Failure> {
    let answer = match place {
        Place::Server(client) => {
            ask(client, Operation::KeyRevoke, json!({ "key": args.id })).await?
        }
        Place::Directory { keys, .. } => {
            if !keys.revoke(&args.id).map_err(broken)? {
                return Err(Failure::new(
                    Exit::NotFound,
                    "there is no such key; `pelton key ls` lists them",
                ));
            }
            json!({ "key": args.id, "revoked": true })
        }
    };
    if args.connect.json {
        put_json(&answer)?;
    } else {
        eprintln!("{} is revoked", args.id);
    }
    Ok(Exit::Ok)
}
