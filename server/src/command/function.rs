//! `pelton function`: what functions there are and how their tasks are run.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use pelton_client::Operation;
use serde_json::{Map, Value, json};

use crate::{
    command::{
        connect::ConnectArgs,
        exit::{Exit, Failure, put, put_json},
        table::{Table, cell, fields},
        time::{parse_duration, show_duration},
    },
    config::Config,
};

/// Functions, and how their tasks are run
#[derive(Args, Clone, Debug)]
pub struct FunctionArgs {
    #[command(subcommand)]
    command: FunctionCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum FunctionCommand {
    /// List the functions
    #[command(alias = "list")]
    Ls(AllArgs),
    /// Show a function
    Get(OneArgs),
    /// Make a function, or change what is given here
    Set(Box<SetArgs>),
    /// Remove a function; what waits for it ends as Invalid
    #[command(alias = "remove")]
    Rm(OneArgs),
}

#[derive(Args, Clone, Debug)]
struct AllArgs {
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct OneArgs {
    /// The function's name
    #[arg(value_name = "FUNCTION")]
    function: String,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct SetArgs {
    /// The function's name
    function: String,
    /// Tasks that run at once; 0 for no limit of its own
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// Retries after the first attempt, 0 to 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=8))]
    retries: Option<u8>,
    /// Wait before the first retry; doubles with each further one
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    backoff_min: Option<Duration>,
    /// The longest wait before a retry
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    backoff_max: Option<Duration>,
    /// A task that is not running expires at this age
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// Time for one attempt
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// What a failed task does to the tasks behind it of the same ordering key
    #[arg(long, value_name = "WHAT")]
    on_failure: Option<OnFailureName>,
    /// Take tasks and start none; `--paused=false` starts them again
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    paused: Option<bool>,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnFailureName {
    /// They follow
    Continue,
    /// They are held until this is set to `continue`
    Hold,
}

impl FunctionArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        match &self.command {
            FunctionCommand::Ls(args) => args.connect.json,
            FunctionCommand::Get(args) | FunctionCommand::Rm(args) => args.connect.json,
            FunctionCommand::Set(args) => args.connect.json,
        }
    }
}

/// Runs the command.
pub async fn run(args: &FunctionArgs, config: &Config) -> Result<Exit, Failure> {
    match &args.command {
        FunctionCommand::Ls(args) => list(&args.connect, config).await,
        FunctionCommand::Get(args) => {
            let body = json!({ "function": args.function });
            let connect = &args.connect;
            let function = connect.ask(config, Operation::FunctionGet, &body).await?;
            show(&function, connect.json)
        }
        FunctionCommand::Set(args) => {
            let connect = &args.connect;
            let body = args.body();
            let function = connect.ask(config, Operation::FunctionSet, &body).await?;
            show(&function, connect.json)
        }
        FunctionCommand::Rm(args) => {
            let body = json!({ "function": args.function });
            let connect = &args.connect;
            let removed = connect
                .ask(config, Operation::FunctionRemove, &body)
                .await?;
            if connect.json {
                put_json(&removed)?;
            } else {
                eprintln!("{} is removed", args.function);
            }
            Ok(Exit::Ok)
        }
    }
}

impl SetArgs {
    fn body(&self) -> Value {
        let ms = |time: Option<Duration>| time.map(|time| time.as_millis() as u64);
        let age = self.max_age;
        let age_s = age.map(|age| age.as_secs() + u64::from(age.subsec_nanos() > 0));
        let on_failure = self.on_failure.map(|what| match what {
            OnFailureName::Continue => "continue",
            OnFailureName::Hold => "hold",
        });
        let all = [
            ("function", json!(self.function)),
            ("concurrency", json!(self.concurrency)),
            ("retries", json!(self.retries)),
            ("backoff_ms_min", json!(ms(self.backoff_min))),
            ("backoff_ms_max", json!(ms(self.backoff_max))),
            ("max_age_s", json!(age_s)),
            ("timeout_ms", json!(ms(self.timeout))),
            ("on_failure", json!(on_failure)),
            ("paused", json!(self.paused)),
        ];
        let said = all.into_iter().filter(|(_, value)| !value.is_null());
        Value::Object(
            said.map(|(name, value)| (name.to_owned(), value))
                .collect::<Map<_, _>>(),
        )
    }
}

async fn list(connect: &ConnectArgs, config: &Config) -> Result<Exit, Failure> {
    let answer = connect
        .ask(config, Operation::FunctionList, &json!({}))
        .await?;
    if connect.json {
        put_json(&answer)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new([
        "FUNCTION",
        ">CONCURRENCY",
        ">RETRIES",
        ">BACKOFF",
        ">MAX AGE",
        ">TIMEOUT",
        "ON FAILURE",
        "PAUSED",
    ]);
    for function in answer["functions"].as_array().into_iter().flatten() {
        let [concurrency, backoff, age, timeout] = readable(function);
        table.row([
            cell(&function["function"]),
            concurrency,
            cell(&function["retries"]),
            backoff,
            age,
            timeout,
            cell(&function["on_failure"]),
            paused(function),
        ]);
    }
    if table.is_empty() {
        eprintln!("no functions: an executor that offers one makes it, or `pelton function set`");
    } else {
        put(table.render())?;
    }
    Ok(Exit::Ok)
}

fn show(function: &Value, json: bool) -> Result<Exit, Failure> {
    if json {
        put_json(function)?;
        return Ok(Exit::Ok);
    }
    let [concurrency, backoff, age, timeout] = readable(function);
    put(fields(&[
        ("function", cell(&function["function"])),
        ("concurrency", concurrency),
        ("retries", cell(&function["retries"])),
        ("backoff", backoff),
        ("max age", age),
        ("timeout", timeout),
        ("on failure", cell(&function["on_failure"])),
        ("paused", paused(function)),
    ]))?;
    Ok(Exit::Ok)
}

/// Concurrency, backoff, age and timeout for people.
fn readable(function: &Value) -> [String; 4] {
    let time = |name: &str, unit_ms: u64| {
        let value = function[name].as_u64();
        value.map_or("-".into(), |value| show_duration(value * unit_ms))
    };
    let concurrency = match function["concurrency"].as_u64() {
        Some(0) => "no limit".to_owned(),
        _ => cell(&function["concurrency"]),
    };
    let backoff = format!(
        "{} to {}",
        time("backoff_ms_min", 1),
        time("backoff_ms_max", 1)
    );
    [
        concurrency,
        backoff,
        time("max_age_s", 1_000),
        time("timeout_ms", 1),
    ]
}

fn paused(function: &Value) -> String {
    match function["paused"].as_bool() {
        Some(true) => "yes".to_owned(),
        _ => "no".to_owned(),
    }
}
