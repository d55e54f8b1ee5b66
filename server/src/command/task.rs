//! `pelton task`: hand in tasks, look at them, wait for them, stop them.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clap::{Args, Subcommand, ValueEnum};
use pelton_client::{
    Client, Code, Error, Finished, Operation, Priority, Task, TaskName, TaskStatus,
};
use serde_json::{Map, Value, json};

use crate::{
    command::{
        connect::{ConnectArgs, parse_id, read_answer},
        exit::{Exit, Failure, put, put_json, put_line},
        table::{Table, cell, fields},
        time::{parse_duration, parse_moment, show_duration, show_ms},
    },
    config::Config,
};

/// A wait without a limit is asked again after this long.
const WAIT_STEP: Duration = Duration::from_secs(60);

/// Hand in tasks, look at them, wait for them, stop them
#[derive(Args, Clone, Debug)]
pub struct TaskArgs {
    #[command(subcommand)]
    command: TaskCommand,
}

#[derive(Subcommand, Clone, Debug)]
enum TaskCommand {
    /// Hand in a task; prints its request id, or with --wait its result
    Submit(SubmitArgs),
    /// Show a task
    Get(OneArgs),
    /// Wait until a task has ended; prints its result
    Wait(WaitArgs),
    /// List tasks, the last one accepted first
    #[command(alias = "ls")]
    List(ListArgs),
    /// Stop a task; prints where it stands then
    Stop(StopArgs),
}

#[derive(Args, Clone, Debug)]
struct SubmitArgs {
    /// The function that runs it
    function: String,
    /// `-` reads the payload from standard input
    #[arg(value_parser = ["-"], hide_possible_values = true, value_name = "-")]
    stdin: Option<String>,
    /// The payload
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["file", "stdin"])]
    payload: Option<String>,
    /// Read the payload from a file
    #[arg(long, value_name = "FILE", conflicts_with = "stdin")]
    file: Option<PathBuf>,
    /// Name of the task within its function: the same name again is the same task
    #[arg(long, value_name = "TASK_ID")]
    id: Option<String>,
    /// Tasks of one ordering key are run one after the other
    #[arg(long, value_name = "KEY")]
    ordering_key: Option<String>,
    /// Start no earlier than after this long: 500ms, 5s, 1m30s, 2h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    delay: Option<Duration>,
    /// Start no earlier than then: 2026-01-31T12:00:00Z, or milliseconds since 1970
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, conflicts_with = "delay")]
    at: Option<SystemTime>,
    /// Give up when it has not ended after this long
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_age: Option<Duration>,
    /// Tag it: a word or NAME=VALUE; may be repeated
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// The class in which it waits, if not that of its function
    #[arg(long, value_name = "CLASS")]
    priority: Option<PriorityName>,
    /// MIME type of the payload
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// Acknowledge it before it is on disk: faster, and a crash may lose it
    #[arg(long)]
    memory: bool,
    /// Wait for its end, at most TIME if that is given
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Option<Duration>>,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PriorityName {
    /// Somebody waits for it
    Interactive,
    /// The middle
    Standard,
    /// It has time
    Batch,
}

impl From<PriorityName> for Priority {
    fn from(name: PriorityName) -> Priority {
        match name {
            PriorityName::Interactive => Priority::Interactive,
            PriorityName::Standard => Priority::Standard,
            PriorityName::Batch => Priority::Batch,
        }
    }
}

#[derive(Args, Clone, Debug)]
struct OneArgs {
    /// A request id, FUNCTION/TASK_ID, or FUNCTION/KEY/TASK_ID
    #[arg(value_name = "ID", value_parser = parse_id)]
    id: TaskName,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct StopArgs {
    #[command(flatten)]
    task: OneArgs,
    /// What an attempt that runs gets to end by itself before it is ended by force; at most 1h
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    grace: Duration,
}

#[derive(Args, Clone, Debug)]
struct WaitArgs {
    /// A request id, FUNCTION/TASK_ID, or FUNCTION/KEY/TASK_ID
    #[arg(value_name = "ID", value_parser = parse_id)]
    id: TaskName,
    /// Wait at most this long, then exit with 9
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    connect: ConnectArgs,
}

#[derive(Args, Clone, Debug)]
struct ListArgs {
    /// Only tasks in this status
    #[arg(long, value_parser = parse_status)]
    status: Option<TaskStatus>,
    /// Only tasks of this function
    #[arg(long, value_name = "NAME")]
    function: Option<String>,
    /// Only tasks whose given name begins like this
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Only tasks with this tag
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// Only tasks accepted then or later: 2026-01-31T12:00:00Z, or milliseconds since 1970
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment)]
    since: Option<SystemTime>,
    /// Only tasks accepted before then
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment)]
    until: Option<SystemTime>,
    /// Tasks on a page
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    limit: u32,
    /// Where the former page ended
    #[arg(long)]
    cursor: Option<String>,
    #[command(flatten)]
    connect: ConnectArgs,
}

fn parse_status(text: &str) -> Result<TaskStatus, String> {
    let mut known = TaskStatus::ALL.iter().copied();
    known
        .find(|status| status.name().eq_ignore_ascii_case(text))
        .ok_or_else(|| {
            let names: Vec<&str> = TaskStatus::ALL.iter().map(|s| s.name()).collect();
            format!("a status is one of {}", names.join(", "))
        })
}

impl TaskArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        match &self.command {
            TaskCommand::Submit(args) => args.connect.json,
            TaskCommand::Get(args) => args.connect.json,
            TaskCommand::Stop(args) => args.task.connect.json,
            TaskCommand::Wait(args) => args.connect.json,
            TaskCommand::List(args) => args.connect.json,
        }
    }
}

/// Runs the command.
pub async fn run(args: &TaskArgs, config: &Config) -> Result<Exit, Failure> {
    match &args.command {
        TaskCommand::Submit(args) => submit(args, config).await,
        TaskCommand::Get(args) => get(args, config).await,
        TaskCommand::Wait(args) => {
            let client = args.connect.connect(config).await?;
            let end = wait(&client, &args.id, args.timeout).await;
            client.close().await;
            report(&end?, None, args.connect.json)
        }
        TaskCommand::List(args) => list(args, config).await,
        TaskCommand::Stop(args) => stop(args, config).await,
    }
}

async fn submit(args: &SubmitArgs, config: &Config) -> Result<Exit, Failure> {
    let payload = payload(args)?;
    let mut task = Task::new(payload);
    if let Some(priority) = args.priority {
        task = task.priority(priority.into());
    }
    if let Some(id) = &args.id {
        task = task.task_id(id);
    }
    if let Some(key) = &args.ordering_key {
        task = task.key(key);
    }
    if let Some(delay) = args.delay {
        task = task.delay(delay);
    }
    if let Some(at) = args.at {
        task = task.at(at);
    }
    if let Some(age) = args.max_age {
        task = task.max_age(age);
    }
    if let Some(content_type) = &args.content_type {
        task = task.content_type(content_type);
    }
    for tag in &args.tag {
        task = task.tag(tag);
    }
    if args.memory {
        task = task.in_memory();
    }
    let client = args.connect.connect(config).await?;
    let submitted = match args.wait {
        None => client.submit(&args.function, task).await?,
        Some(_) => client.submit_watched(&args.function, task).await?,
    };
    let request_id = submitted.request_id;
    let facts = json!({
        "request_id": request_id.to_string(),
        "duplicate": submitted.duplicate,
        "durable": submitted.durable,
    });
    if submitted.duplicate {
        eprintln!("{request_id} was handed in before under this name");
    }
    let Some(limit) = args.wait else {
        client.close().await;
        if args.connect.json {
            put_json(&facts)?;
        } else {
            put_line(&request_id.to_string())?;
        }
        return Ok(Exit::Ok);
    };
    let finished = match limit {
        None => submitted.finished().await?,
        Some(limit) => match tokio::time::timeout(limit, submitted.finished()).await {
            Ok(finished) => finished?,
            Err(_) => return Err(timed_out(&request_id.to_string(), limit)),
        },
    };
    client.close().await;
    report(&finished, facts.as_object(), args.connect.json)
}

fn payload(args: &SubmitArgs) -> Result<Vec<u8>, Failure> {
    if let Some(text) = &args.payload {
        return Ok(text.clone().into_bytes());
    }
    if let Some(file) = args.file.as_deref().filter(|file| *file != Path::new("-")) {
        return fs::read(file)
            .map_err(|error| Failure::usage(format!("{}: {error}", file.display())));
    }
    let mut bytes = Vec::new();
    if args.stdin.is_some() || args.file.is_some() {
        let mut stdin = io::stdin().lock();
        if stdin.is_terminal() {
            eprintln!("type the payload, then Ctrl-D");
        }
        stdin
            .read_to_end(&mut bytes)
            .map_err(|error| Failure::new(Exit::Failure, format!("standard input: {error}")))?;
    }
    Ok(bytes)
}

async fn wait(
    client: &Client,
    id: &TaskName,
    limit: Option<Duration>,
) -> Result<Finished, Failure> {
    loop {
        match client.wait(id, limit.unwrap_or(WAIT_STEP)).await {
            Err(Error::Refused(refusal)) if refusal.code == Code::DeadlineExceeded => {
                if let Some(limit) = limit {
                    return Err(timed_out(&show_name(id), limit));
                }
            }
            other => return Ok(other?),
        }
    }
}

fn timed_out(task: &str, limit: Duration) -> Failure {
    Failure::new(
        Exit::TimedOut,
        format!(
            "{task} has not ended after {}; `pelton task wait {task}` waits on",
            show_duration(limit.as_millis() as u64)
        ),
    )
}

/// The result on stdout, how it ended on stderr.
fn report(
    finished: &Finished,
    more: Option<&Map<String, Value>>,
    json: bool,
) -> Result<Exit, Failure> {
    let exit = if finished.succeeded() {
        Exit::Ok
    } else {
        Exit::TaskFailed
    };
    if json {
        let mut fields = more.cloned().unwrap_or_default();
        fields.insert("request_id".into(), finished.request_id.to_string().into());
        fields.insert("status".into(), finished.status.name().into());
        fields.insert("attempts".into(), finished.attempts.into());
        if !finished.succeeded() {
            fields.insert("error_code".into(), finished.code.name().into());
            fields.insert("task_error_message".into(), finished.error.clone().into());
        }
        if let Some(result) = &finished.result {
            match std::str::from_utf8(result) {
                Ok(text) => fields.insert("return_payload".into(), text.into()),
                Err(_) => {
                    fields.insert("return_payload_encoding".into(), "base64".into());
                    fields.insert("return_payload".into(), BASE64.encode(result).into())
                }
            };
        }
        put_json(&Value::Object(fields))?;
        return Ok(exit);
    }
    let attempts = match finished.attempts {
        1 => "1 attempt".to_owned(),
        n => format!("{n} attempts"),
    };
    let mut line = format!(
        "{} {} after {attempts}",
        finished.request_id,
        finished.status.name()
    );
    if !finished.error.is_empty() {
        line.push_str(&format!(": {}", finished.error));
    }
    eprintln!("{line}");
    if finished.succeeded()
        && let Some(result) = &finished.result
    {
        put(result)?;
        if io::stdout().is_terminal() && !result.is_empty() && !result.ends_with(b"\n") {
            put("\n")?;
        }
    }
    Ok(exit)
}

async fn get(args: &OneArgs, config: &Config) -> Result<Exit, Failure> {
    let client = args.connect.connect(config).await?;
    let answer = client.get(&args.id).await;
    client.close().await;
    let task = read_answer(&answer?)?;
    if args.connect.json {
        put_json(&task)?;
        return Ok(Exit::Ok);
    }
    let Some(object) = task.as_object() else {
        return Err(Failure::new(Exit::Failure, "the answer is no object"));
    };
    let mut rows = Vec::new();
    for (name, value) in object {
        let value = match (name.strip_suffix("_ms"), value.as_u64()) {
            (Some(_), Some(ms)) => show_ms(ms),
            _ => cell(value),
        };
        rows.push((name.strip_suffix("_ms").unwrap_or(name), value));
    }
    put(fields(&rows))?;
    Ok(Exit::Ok)
}

async fn list(args: &ListArgs, config: &Config) -> Result<Exit, Failure> {
    let mut body = Map::new();
    if let Some(status) = args.status {
        body.insert("status".into(), status.name().into());
    }
    if let Some(function) = &args.function {
        body.insert("function".into(), function.clone().into());
    }
    for (name, text) in [("prefix", &args.prefix), ("tag", &args.tag)] {
        if let Some(text) = text {
            body.insert(name.into(), text.clone().into());
        }
    }
    for (name, moment) in [("since_ms", args.since), ("until_ms", args.until)] {
        let since = moment.and_then(|moment| moment.duration_since(SystemTime::UNIX_EPOCH).ok());
        if let Some(since) = since {
            body.insert(name.into(), (since.as_millis() as u64).into());
        }
    }
    if let Some(cursor) = &args.cursor {
        body.insert("cursor".into(), cursor.clone().into());
    }
    body.insert("limit".into(), args.limit.into());
    let page = args
        .connect
        .ask(config, Operation::List, &Value::Object(body))
        .await?;
    if args.connect.json {
        put_json(&page)?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new([
        "REQUEST ID",
        "FUNCTION",
        "TASK ID",
        "STATUS",
        ">TRIES",
        "ACCEPTED",
        "ERROR",
    ]);
    for task in page["tasks"].as_array().into_iter().flatten() {
        let id = cell(&task["request_id"]);
        let name = match &task["task_id"] {
            Value::String(text) if *text == id => "-".to_owned(),
            other => cell(other),
        };
        let name = match task["key"].as_str() {
            Some(key) => format!("{key}/{name}"),
            None => name,
        };
        table.row([
            id,
            cell(&task["function"]),
            name,
            cell(&task["status"]),
            cell(&task["attempts"]),
            task["accepted_ms"].as_u64().map_or("-".into(), show_ms),
            error_of(task),
        ]);
    }
    if table.is_empty() {
        eprintln!("no tasks");
    } else {
        put(table.render())?;
    }
    if let Some(shards) = page["unserved_shards"].as_array() {
        eprintln!(
            "{} of the shards are quarantined, and their tasks are not in the list: `pelton stats` says why",
            shards.len()
        );
    }
    if let Some(cursor) = page["cursor"].as_str() {
        eprintln!("more: --cursor {cursor}");
    }
    Ok(Exit::Ok)
}

fn error_of(task: &Value) -> String {
    const WIDTH_MAX: usize = 60;
    let text = match task["task_error_message"].as_str() {
        Some(text) if !text.is_empty() => text,
        _ => task["error_code"].as_str().unwrap_or(""),
    };
    if text.chars().count() <= WIDTH_MAX {
        return text.to_owned();
    }
    text.chars().take(WIDTH_MAX - 1).chain(['…']).collect()
}

async fn stop(args: &StopArgs, config: &Config) -> Result<Exit, Failure> {
    let StopArgs { task: args, grace } = args;
    let client = args.connect.connect(config).await?;
    let answer = client.stop(&args.id, *grace).await;
    client.close().await;
    let status = answer?.map(TaskStatus::name);
    if args.connect.json {
        put_json(&json!({ "task": show_name(&args.id), "status": status }))?;
    } else {
        put_line(status.unwrap_or("-"))?;
    }
    Ok(Exit::Ok)
}

fn show_name(name: &TaskName) -> String {
    match name {
        TaskName::Request(id) => id.to_string(),
        TaskName::Given {
            function,
            key: None,
            task_id,
        } => format!("{function}/{task_id}"),
        TaskName::Given {
            function,
            key: Some(key),
            task_id,
        } => format!("{function}/{key}/{task_id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_known_in_any_case() {
        assert_eq!(parse_status("running"), Ok(TaskStatus::Running));
        assert!(parse_status("done").unwrap_err().contains("Succeeded"));
    }

    #[test]
    fn an_id_is_shown_as_it_was_read() {
        let id = format!("t{}", "1".repeat(32));
        for text in [&id[..], "digest/order-42", "digest/customer-7/order-42"] {
            assert_eq!(show_name(&parse_id(text).unwrap()), text);
        }
    }

    #[test]
    fn a_long_error_is_cut_in_the_list() {
        let task = json!({ "task_error_message": "ä".repeat(100), "error_code": "INTERNAL" });
        assert_eq!(error_of(&task).chars().count(), 60);
        assert_eq!(error_of(&json!({ "error_code": "INTERNAL" })), "INTERNAL");
    }
}
