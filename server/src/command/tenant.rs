//! `pelton tenant`: who shares the server, and how.

use clap::{Args, Subcommand};
use pelton_client::Operation;
use serde_json::{Map, Value, json};

use crate::{
    command::{
        connect::ConnectArgs,
        exit::{Exit, Failure, put, put_json},
        table::{Table, cell},
    },
    config::Config,
};

/// Tenants, and how they share the server
#[derive(Args, Clone, Debug)]
pub struct TenantArgs {
    #[command(subcommand)]
    command: TenantCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum TenantCommand {
    /// List the tenants
    #[command(alias = "list")]
    Ls(AllArgs),
    /// Make a tenant, or change what is given here
    Set(SetArgs),
}

#[derive(Args, Clone, Debug)]
struct AllArgs {
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct SetArgs {
    /// The tenant's name
    name: String,
    /// Its share where tenants compete, 1 to 1000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    weight: Option<u16>,
    /// Tasks that may wait on one shard; a submit beyond that is refused
    #[arg(long, value_name = "N")]
    waiting_max: Option<u64>,
    #[command(flatten)]
    connect: ConnectArgs,
}

impl TenantArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        match &self.command {
            TenantCommand::Ls(args) => args.connect.json,
            TenantCommand::Set(args) => args.connect.json,
        }
    }
}

/// Runs the command.
pub async fn run(args: &TenantArgs, config: &Config) -> Result<Exit, Failure> {
    let (connect, answer, tenants) = match &args.command {
        TenantCommand::Ls(args) => {
            let connect = &args.connect;
            let answer = connect
                .ask(config, Operation::TenantList, &json!({}))
                .await?;
            let tenants = answer["tenants"].as_array().cloned();
            (connect, answer, tenants.unwrap_or_default())
        }
        TenantCommand::Set(args) => {
            let mut body = Map::new();
            body.insert("tenant".into(), args.name.clone().into());
            if let Some(weight) = args.weight {
                body.insert("weight".into(), weight.into());
            }
            if let Some(waiting_max) = args.waiting_max {
                body.insert("waiting_max".into(), waiting_max.into());
            }
            let body = Value::Object(body);
            let answer = args
                .connect
                .ask(config, Operation::TenantSet, &body)
                .await?;
            (&args.connect, answer.clone(), vec![answer])
        }
    };
    if connect.json {
        put_json(&answer)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(["TENANT", ">WEIGHT", ">WAITING MAX"]);
    for tenant in &tenants {
        table.row([
            cell(&tenant["tenant"]),
            cell(&tenant["weight"]),
            cell(&tenant["waiting_max"]),
        ]);
    }
    if table.is_empty() {
        eprintln!("no tenants: the first task of one makes it, or `pelton tenant set`");
    } else {
        put(table.render())?;
    }
    Ok(Exit::Ok)
}
