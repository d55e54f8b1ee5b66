//! The scenarios, each from its processes to its report.

use std::{
    cell::Cell,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use pelton_client::{Client, ClientOptions, Operation, Trust};
use pelton_net::submit;
use serde_json::{Value, json};

use crate::{
    args::{BenchArgs, Durability, Flags, Scenario},
    host::{Folder, Server, Worker, cpu_seconds, rss_bytes, rss_bytes_max},
    limits::{self, Limits},
    load::{Counted, Load, closed, function_name, open, tenant_name, timers},
    report::{environment, print, round, write_distribution},
};

/// A snapshot of many tasks takes seconds: its pace is bounded.
const SNAPSHOT_MAX: Duration = Duration::from_secs(120);

/// Runs a scenario and prints its report; false if a count does not hold.
pub async fn run(args: BenchArgs) -> Result<bool, String> {
    let scenario = args.scenario;
    let flags = scenario.flags().clone();
    let folder = Folder::make(flags.data.as_deref())
        .map_err(|error| format!("the data folder cannot be made: {error}"))?;
    let (report, holds) = match &scenario {
        Scenario::Submit(_) | Scenario::E2e(_) => throughput(&scenario, &flags, &folder).await?,
        Scenario::Latency(_) => latency(&flags, &folder).await?,
        Scenario::Limits(_) => machine(&flags, &folder).await?,
        Scenario::Backlog(_) => backlog(&flags, &folder).await?,
        Scenario::Recovery(_) => recovery(&flags, &folder).await?,
        Scenario::History(_) => history(&flags, &folder).await?,
        Scenario::Idle(_) => idle(&flags, &folder).await?,
    };
    print(&report, flags.json);
    if !holds {
        eprintln!("the counts of client and server differ: see `check` in the report");
    }
    Ok(holds)
}

/// The shape of the load that the flags ask for.
fn shape(flags: &Flags, options: &ClientOptions, until_finished: bool) -> Load {
    let batch = flags
        .batch
        .unwrap_or(if until_finished { 256 } else { 512 });
    let in_flight = flags.in_flight.unwrap_or(if batch == 1 { 1 } else { 4 });
    Load {
        options: options.clone(),
        connections: flags.connections.max(1),
        batch: batch.clamp(1, 4096),
        in_flight: in_flight.max(1),
        payload: flags.payload,
        tenants: flags.tenants.max(1),
        functions: flags.functions.max(1),
        first_function: 0,
        delayed: false,
        durability: match flags.durability {
            Durability::Disk => submit::Durability::Disk,
            Durability::Memory => submit::Durability::Memory,
        },
        until_finished,
        warmup: Duration::from_secs_f64(flags.warmup.max(0.0)),
        time: Duration::from_secs_f64(flags.seconds.max(0.1)),
        tasks_max: None,
    }
}

/// The server that is measured: its own, or the one that was named.
struct Target {
    server: Option<Server>,
    options: ClientOptions,
}

impl Target {
    fn start(flags: &Flags, data: &Path) -> Result<Target, String> {
        if let Some(address) = flags.target {
            let mut options = ClientOptions::at(address);
            if let Some(ca) = &flags.ca {
                let trust = Trust::parse(ca).ok_or("--ca is a file or sha256:FINGERPRINT")?;
                options = options.trust(trust);
            }
            if let Some(key) = &flags.key {
                options = options.key(key);
            }
            return Ok(Target {
                server: None,
                options,
            });
        }
        let server = Server::start(data, flags.shards)?;
        Ok(Target {
            options: server.options.clone(),
            server: Some(server),
        })
    }

    fn cpu(&self) -> f64 {
        self.server
            .as_ref()
            .map_or(0.0, |server| cpu_seconds(server.pid()))
    }
}

async fn make_functions(options: &ClientOptions, flags: &Flags) -> Result<(), String> {
    for tenant in 0..flags.tenants.max(1) {
        let options = options.clone().tenant(tenant_name(tenant));
        let client = connect(&options).await?;
        for function in 0..flags.functions.max(1) {
            let body = json!({ "function": function_name(function) }).to_string();
            let set = client.query(Operation::FunctionSet, &body).await;
            set.map_err(|error| format!("a function cannot be made: {error}"))?;
        }
        client.close().await;
    }
    Ok(())
}

async fn connect(options: &ClientOptions) -> Result<Client, String> {
    Client::connect(options.clone())
        .await
        .map_err(|error| format!("the server cannot be reached: {error}"))
}

async fn stats(options: &ClientOptions) -> Result<Value, String> {
    let client = connect(&options.clone().tenant(tenant_name(0))).await?;
    let answer = client.query(Operation::Stats, "{}").await;
    client.close().await;
    let answer = answer.map_err(|error| format!("the server's figures: {error}"))?;
    serde_json::from_str(&answer).map_err(|error| error.to_string())
}

fn total(stats: &Value, name: &str) -> u64 {
    stats["totals"][name].as_u64().unwrap_or(0)
}

fn log_total(stats: &Value, name: &str) -> u64 {
    let shards = stats["shards"].as_array();
    let values = shards.into_iter().flatten();
    values.filter_map(|s| s["log"][name].as_u64()).sum()
}

fn worker_arguments(options: &ClientOptions, flags: &Flags, slots: u32) -> Vec<String> {
    let mut arguments = vec![
        "--server".to_owned(),
        options.server.clone(),
        "--ca".to_owned(),
        options.trust.to_string(),
        "--tenants".to_owned(),
        flags.tenants.max(1).to_string(),
        "--functions".to_owned(),
        flags.functions.max(1).to_string(),
        "--slots".to_owned(),
        slots.to_string(),
    ];
    if let Some(key) = &flags.key {
        arguments.extend(["--key".to_owned(), key.clone()]);
    }
    arguments
}

/// Processor seconds of the three processes.
#[derive(Clone, Copy, Default)]
struct Cpu {
    client: f64,
    server: f64,
    executor: f64,
}

impl Cpu {
    fn per_100k(self, before: Cpu, tasks: u64) -> Value {
        let per =
            |after: f64, before: f64| round((after - before) * 100_000.0 / tasks.max(1) as f64);
        json!({
            "client": per(self.client, before.client),
            "server": per(self.server, before.server),
            "executor": per(self.executor, before.executor),
        })
    }
}

async fn throughput(
    scenario: &Scenario,
    flags: &Flags,
    folder: &Folder,
) -> Result<(Value, bool), String> {
    let until_finished = matches!(scenario, Scenario::E2e(_));
    let data = folder.path().join("data");
    let target = Target::start(flags, &data)?;
    let load = shape(flags, &target.options, until_finished);
    let limits = limits::measure(folder.path(), &load).await?;
    make_functions(&target.options, flags).await?;
    let slots = flags
        .slots
        .unwrap_or(if load.batch == 1 { 16 } else { 16_384 });
    let worker = match until_finished {
        true => Some(Worker::start(&worker_arguments(
            &target.options,
            flags,
            slots,
        ))?),
        false => None,
    };
    let before = stats(&target.options).await?;
    let pids = (
        target.server.as_ref().map(Server::pid),
        worker.as_ref().map(Worker::pid),
    );
    let cpu = move || Cpu {
        client: cpu_seconds(std::process::id()),
        server: pids.0.map_or(0.0, cpu_seconds),
        executor: pids.1.map_or(0.0, cpu_seconds),
    };
    let marks = Rc::new(Cell::new((Cpu::default(), Cpu::default())));
    let (start, end) = (Rc::clone(&marks), Rc::clone(&marks));
    let counted = closed(
        load.clone(),
        move || start.set((cpu(), Cpu::default())),
        move || end.set((end.get().0, cpu())),
    )
    .await
    .map_err(|error| format!("a client failed: {error}"))?;
    let (cpu_before, cpu_after) = marks.get();
    let after = stats(&target.options).await?;
    let rss = pids.0.map_or(0, rss_bytes);
    let accepted = total(&after, "accepted") - total(&before, "accepted");
    let batches = log_total(&after, "batches") - log_total(&before, "batches");
    let bytes = log_total(&after, "bytes") - log_total(&before, "bytes");
    let whole = load.warmup.as_secs_f64() + counted.seconds;
    let per_s = counted.measured as f64 / counted.seconds;
    let mut check = json!({
        "accepted_client": counted.accepted,
        "accepted_server": accepted,
        "completed_client": counted.completed,
    });
    let mut holds = flags.target.is_some() || counted.accepted == accepted;
    holds &= !until_finished || counted.completed == counted.accepted;
    drop(worker);
    if let Some(server) = target.server {
        server.kill();
        if flags.durability == Durability::Disk {
            let found = after_restart(flags, &data).await?;
            let expected = if until_finished { 0 } else { counted.accepted };
            check["waiting_after_restart"] = found.into();
            check["waiting_expected"] = expected.into();
            holds &= found == expected;
        }
    }
    let limit = limits.quic_frames_per_s.min(limits.log_records_per_s);
    let report = json!({
        "bench": scenario.name(),
        "schema": 1,
        "tasks_per_s": round(per_s),
        "p50_us": counted.latency.value_at_quantile(0.5),
        "p99_us": counted.latency.value_at_quantile(0.99),
        "p999_us": counted.latency.value_at_quantile(0.999),
        "payload_bytes": load.payload,
        "connections": load.connections,
        "batch": load.batch,
        "in_flight": load.in_flight,
        "shards": after["shards"].as_array().map_or(0, Vec::len),
        "durability": format!("{:?}", flags.durability).to_lowercase(),
        "flushes_per_s": round(batches as f64 / whole),
        "bytes_per_flush": round(bytes as f64 / batches.max(1) as f64),
        "tasks_per_flush_p50": round(per_s * limits.flush_p50_us / 1e6),
        "accepted": counted.accepted,
        "completed": counted.completed,
        "failed": counted.failed,
        "refused": counted.refused,
        "ratio_to_limit": round(per_s / limit),
        "cpu_s_per_100k": cpu_after.per_100k(cpu_before, counted.measured),
        "rss_bytes": rss,
        "limits": describe(&limits),
        "check": check,
        "env": environment(folder.path(), limits.flush_p50_us, placement(flags)),
    });
    save(flags, &counted)?;
    Ok((report, holds))
}

/// Tasks that wait after a restart on the same directory.
async fn after_restart(flags: &Flags, data: &Path) -> Result<u64, String> {
    let server = Server::start(data, flags.shards)?;
    let figures = stats(&server.options).await?;
    server.kill();
    Ok(total(&figures, "recovered"))
}

fn describe(limits: &Limits) -> Value {
    json!({
        "quic_frames_per_s": round(limits.quic_frames_per_s),
        "log_records_per_s": round(limits.log_records_per_s),
        "flush_p50_us": round(limits.flush_p50_us),
    })
}

fn placement(flags: &Flags) -> &'static str {
    if flags.target.is_some() {
        "another server"
    } else {
        "server, executor and client on the same cores, as the scheduler places them"
    }
}

fn save(flags: &Flags, counted: &Counted) -> Result<(), String> {
    match &flags.hdr {
        Some(path) => write_distribution(path, &counted.latency)
            .map_err(|error| format!("{}: {error}", path.display())),
        None => Ok(()),
    }
}

async fn latency(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let data = folder.path().join("data");
    let target = Target::start(flags, &data)?;
    let load = shape(flags, &target.options, true);
    let limits = limits::measure(folder.path(), &load).await?;
    make_functions(&target.options, flags).await?;
    let mut arguments = worker_arguments(&target.options, flags, flags.slots.unwrap_or(1024));
    arguments.push("--stamped".to_owned());
    let mut worker = Worker::start(&arguments)?;
    let run = |seconds: f64| {
        open(
            target.options.clone(),
            0,
            flags.connections.clamp(1, 4),
            flags.payload,
            flags.rate,
            Duration::from_secs_f64(seconds),
        )
    };
    let failed = |error| format!("a client failed: {error}");
    run(flags.warmup.max(0.5)).await.map_err(failed)?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    worker.reset();
    let server_before = target.cpu();
    let counted = run(flags.seconds).await.map_err(failed)?;
    let server_cpu = target.cpu() - server_before;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let measured = worker.report()?;
    let started = measured["count"].as_u64().unwrap_or(0);
    let holds = started == counted.accepted;
    if let Some(path) = &flags.hdr {
        std::fs::write(path, format!("{:#}\n", measured["percentiles"]))
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let report = json!({
        "bench": "latency",
        "schema": 1,
        "rate": flags.rate,
        "tasks_per_s": round(counted.accepted as f64 / counted.seconds),
        "p50_us": round(measured["p50_us"].as_f64().unwrap_or(0.0)),
        "p99_us": round(measured["p99_us"].as_f64().unwrap_or(0.0)),
        "p999_us": round(measured["p999_us"].as_f64().unwrap_or(0.0)),
        "max_us": round(measured["max_us"].as_f64().unwrap_or(0.0)),
        "payload_bytes": flags.payload,
        "accepted": counted.accepted,
        "refused": counted.refused,
        "check": { "accepted_client": counted.accepted, "started_executor": started },
        "cpu_s_per_100k": {
            "server": round(server_cpu * 100_000.0 / counted.accepted.max(1) as f64),
        },
        "p50_over_flush_us": round(
            measured["p50_us"].as_f64().unwrap_or(0.0) - limits.flush_p50_us
        ),
        "env": environment(folder.path(), limits.flush_p50_us, placement(flags)),
    });
    Ok((report, holds))
}

async fn machine(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let load = shape(flags, &ClientOptions::new(""), false);
    let limits = limits::measure(folder.path(), &load).await?;
    let mut report = json!({ "bench": "limits", "schema": 1 });
    for (name, value) in describe(&limits).as_object().into_iter().flatten() {
        report[name] = value.clone();
    }
    report["payload_bytes"] = load.payload.into();
    report["batch"] = load.batch.into();
    report["env"] = environment(folder.path(), limits.flush_p50_us, "two threads");
    Ok((report, true))
}

/// Timers that are measured over a full table.
const TIMERS: u64 = 20_000;
/// The first of them is due so long after all were handed in.
const TIMERS_AFTER: Duration = Duration::from_secs(3);

/// Tasks that nobody executes, then delayed ones, then a restart with all of them, then timers that are due while tasks
/// come in.
async fn backlog(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let data = folder.path().join("data");
    let functions = flags.functions.max(1);
    let target = Target::start(flags, &data)?;
    // The timers have a function of their own, the first one.
    let all = Flags {
        functions: functions + 1,
        ..flags.clone()
    };
    make_functions(&target.options, &all).await?;
    let server = target.server.ok_or("backlog needs a server of its own")?;
    let load = Load {
        tasks_max: Some(flags.tasks),
        first_function: 1,
        ..shape(flags, &server.options, false)
    };
    let failed = |error| format!("a client failed: {error}");
    let empty = rss_bytes(server.pid());
    let waiting = closed(load.clone(), || {}, || {}).await.map_err(failed)?;
    let with_waiting = rss_bytes(server.pid());
    let delayed = match flags.delayed {
        0 => Counted::new(),
        tasks => {
            let load = Load {
                tasks_max: Some(tasks),
                delayed: true,
                ..load
            };
            closed(load, || {}, || {}).await.map_err(failed)?
        }
    };
    let with_all = rss_bytes(server.pid());
    let rss_max = rss_bytes_max(server.pid());
    let accepted = waiting.accepted + delayed.accepted;
    let stopped = Instant::now();
    server.stop()?;
    let stop = stopped.elapsed();
    let server = Server::start(&data, flags.shards)?;
    let ready = server.ready;
    let recovered = total(&stats(&server.options).await?, "recovered");
    let (restarted, restarted_max) = (rss_bytes(server.pid()), rss_bytes_max(server.pid()));
    let (due, timers) = timers_over(flags, &server).await?;
    let per_task = |bytes: u64, before: u64, tasks: u64| match tasks {
        0 => Value::Null,
        tasks => round(bytes.saturating_sub(before) as f64 / tasks as f64).into(),
    };
    let rates = |counted: &Counted| {
        let rates = counted.rates();
        let (first, last) = (rates.first().copied(), rates.last().copied());
        json!({
            "tasks_per_s": round(counted.accepted as f64 / counted.seconds.max(1e-9)),
            "first_tenth_per_s": round(first.unwrap_or(0.0)),
            "last_tenth_per_s": round(last.unwrap_or(0.0)),
            "tenths_per_s": rates.into_iter().map(round).collect::<Vec<f64>>(),
        })
    };
    let report = json!({
        "bench": "backlog",
        "schema": 2,
        "accepted": accepted,
        "waiting": rates(&waiting),
        "delayed": match flags.delayed {
            0 => Value::Null,
            _ => rates(&delayed),
        },
        "rss_bytes": with_all,
        "rss_bytes_max": rss_max,
        "rss_bytes_empty": empty,
        "rss_bytes_per_waiting_task": per_task(with_waiting, empty, waiting.accepted),
        "rss_bytes_per_delayed_task": per_task(with_all, with_waiting, delayed.accepted),
        "stop_s": round(stop.as_secs_f64()),
        "restart_s": round(ready.as_secs_f64()),
        "rss_bytes_after_restart": restarted,
        "rss_bytes_max_of_restart": restarted_max,
        "timers": timers,
        "check": {
            "accepted_client": accepted,
            "recovered": recovered,
            "timers_accepted": due,
            "timers_started": timers["started"],
        },
        "env": environment(folder.path(), 0.0, placement(flags)),
    });
    let holds = recovered == accepted && timers["started"] == due;
    Ok((report, holds))
}

/// How late tasks start that are due while others come in: how many were handed in, and what their executor has seen.
async fn timers_over(flags: &Flags, server: &Server) -> Result<(u64, Value), String> {
    let one = Flags {
        tenants: 1,
        functions: 1,
        ..flags.clone()
    };
    let mut arguments = worker_arguments(&server.options, &one, flags.slots.unwrap_or(1024));
    arguments.push("--stamped".to_owned());
    let mut worker = Worker::start(&arguments)?;
    let time = Duration::from_secs_f64(flags.seconds.max(1.0));
    let due = TIMERS_AFTER..TIMERS_AFTER + time;
    let load_time = due.end + Duration::from_secs(1);
    let options = server.options.clone();
    let load = open(options.clone(), 1, 1, flags.payload, flags.rate, load_time);
    let (accepted, load) = tokio::join!(timers(options, 0, TIMERS, due), load);
    let failed = |error| format!("a client failed: {error}");
    let accepted = accepted.map_err(failed)?;
    load.map_err(failed)?;
    let measured = worker.report()?;
    let figure = |name: &str| round(measured[name].as_f64().unwrap_or(0.0) / 1000.0);
    let seen = json!({
        "started": measured["count"],
        "beside_tasks_per_s": flags.rate,
        "late_ms_p50": figure("p50_us"),
        "late_ms_p99": figure("p99_us"),
        "late_ms_max": figure("max_us"),
    });
    Ok((accepted, seen))
}

/// The server is killed and started twice: with the snapshot that it has made, and without, so that it reads the whole
/// log. Both are read past the page cache, so that they are always cold.
async fn recovery(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let data = folder.path().join("data");
    let target = Target::start(flags, &data)?;
    make_functions(&target.options, flags).await?;
    let server = target.server.ok_or("recovery needs a server of its own")?;
    let load = Load {
        tasks_max: Some(flags.tasks),
        ..shape(flags, &server.options, false)
    };
    let counted = closed(load, || {}, || {})
        .await
        .map_err(|error| format!("a client failed: {error}"))?;
    snapshots_written(&server.options).await?;
    server.kill();
    let server = Server::start(&data, flags.shards)?;
    let from_snapshot = server.ready;
    let figures = stats(&server.options).await?;
    let recovered_from_snapshot = total(&figures, "recovered");
    let snapshot_bytes = recovery_sum(&figures, "snapshot_bytes");
    let behind_bytes = recovery_sum(&figures, "bytes");
    server.kill();
    remove_snapshots(&data).map_err(|error| format!("a snapshot stays: {error}"))?;
    let server = Server::start(&data, flags.shards)?;
    let ready = server.ready;
    let figures = stats(&server.options).await?;
    let shards = figures["shards"].as_array().map_or(0, Vec::len);
    let sum = |figure: &str| recovery_sum(&figures, figure);
    // What the shards took together: they may share a core.
    let seconds = sum("took_us") as f64 / 1e6;
    let recovered = total(&figures, "recovered");
    let report = json!({
        "bench": "recovery",
        "schema": 1,
        "accepted": counted.accepted,
        "shards": shards,
        "batches": sum("batches"),
        "records": sum("records"),
        "bytes": sum("bytes"),
        "records_per_s_and_shard": round(sum("records") as f64 / seconds),
        "bytes_per_s_and_shard": round(sum("bytes") as f64 / seconds),
        "replay_s": round(seconds),
        "restart_s": round(ready.as_secs_f64()),
        "from_snapshot": {
            "restart_s": round(from_snapshot.as_secs_f64()),
            "snapshot_bytes": snapshot_bytes,
            "bytes": behind_bytes,
        },
        "check": {
            "accepted_client": counted.accepted,
            "recovered": recovered,
            "recovered_from_snapshot": recovered_from_snapshot,
        },
        "env": environment(folder.path(), 0.0, placement(flags)),
    });
    let all = recovered == counted.accepted && recovered_from_snapshot == counted.accepted;
    Ok((report, all))
}

/// What the last start did, over all shards.
fn recovery_sum(figures: &Value, figure: &str) -> u64 {
    let shards = figures["shards"].as_array().into_iter().flatten();
    shards
        .map(|shard| shard["recovery"][figure].as_u64().unwrap_or(0))
        .sum()
}

/// Waits until every shard has written the snapshots that are due.
async fn snapshots_written(options: &ClientOptions) -> Result<(), String> {
    let until = Instant::now() + SNAPSHOT_MAX;
    while Instant::now() < until {
        let figures = stats(options).await?;
        let mut logs = figures["shards"].as_array().into_iter().flatten();
        let written = |shard: &Value| {
            let log = |figure: &str| shard["log"][figure].as_u64().unwrap_or(0);
            let entries: u64 = ["tasks", "names"]
                .iter()
                .map(|kind| shard[kind].as_u64().unwrap_or(0))
                .sum();
            // The next one is due once the log has grown by a segment and by half as many records as there are entries.
            2 * log("replay_records") < entries || log("live_segments") <= 1
        };
        if logs.all(written) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err("no snapshot is written".into())
}

/// A start without snapshots reads the whole log.
fn remove_snapshots(data: &Path) -> std::io::Result<()> {
    for shard in std::fs::read_dir(data)? {
        let shard = shard?.path();
        if !shard.is_dir() {
            continue;
        }
        for file in std::fs::read_dir(shard)? {
            let file = file?;
            if file.file_name().to_string_lossy().starts_with("snapshot-") {
                std::fs::remove_file(file.path())?;
            }
        }
    }
    Ok(())
}

/// How often the history is looked at while tasks run.
const HISTORY_LOOK: Duration = Duration::from_millis(100);
/// How long it may take to catch up.
const HISTORY_WAIT: Duration = Duration::from_secs(300);

/// Tasks are executed while the history takes what has ended, or waits until there is enough; then it catches up. How much
/// may come together is the server's setting: `PELTON_HISTORY__DEFER_MAX=0` for none.
async fn history(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let data = folder.path().join("data");
    let target = Target::start(flags, &data)?;
    make_functions(&target.options, flags).await?;
    let server = target.server.ok_or("history needs a server of its own")?;
    let load = Load {
        tasks_max: Some(flags.tasks),
        ..shape(flags, &server.options, true)
    };
    let slots = flags.slots.unwrap_or(16_384);
    let worker = Worker::start(&worker_arguments(&server.options, flags, slots))?;
    let over = Cell::new(false);
    let watch = async {
        let client = connect(&server.options.clone().tenant(tenant_name(0))).await?;
        let mut lag_bytes_max = 0;
        while !over.get() {
            let figures = client.query(Operation::Stats, "{}").await;
            let figures = figures.map_err(|error| format!("the server's figures: {error}"))?;
            let figures: Value =
                serde_json::from_str(&figures).map_err(|error| error.to_string())?;
            lag_bytes_max = lag_bytes_max.max(history_figure(&figures, "lag_bytes"));
            tokio::time::sleep(HISTORY_LOOK).await;
        }
        client.close().await;
        Ok::<u64, String>(lag_bytes_max)
    };
    let run = async {
        let counted = closed(load, || {}, || {}).await;
        over.set(true);
        counted.map_err(|error| format!("a client failed: {error}"))
    };
    let (lag_bytes_max, counted) = tokio::join!(watch, run);
    let (lag_bytes_max, counted) = (lag_bytes_max?, counted?);
    drop(worker);
    let at_end = stats(&server.options).await?;
    let begun = Instant::now();
    let caught_up = loop {
        let figures = stats(&server.options).await?;
        if total(&figures, "unsaved") == 0 {
            break figures;
        }
        if begun.elapsed() > HISTORY_WAIT {
            return Err("the history does not catch up".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let took = begun.elapsed().as_secs_f64();
    let written = |figures: &Value| history_figure(figures, "written");
    let left = written(&caught_up).saturating_sub(written(&at_end));
    let busy_s = (history_figure(&caught_up, "read_us") + history_figure(&caught_up, "write_us"))
        as f64
        / 1e6;
    let rows = history_figure(&caught_up, "rows");
    let report = json!({
        "bench": "history",
        "schema": 1,
        "completed": counted.completed,
        "tasks_per_s": round(counted.completed as f64 / counted.seconds),
        "rows_per_s_under_load": round(written(&at_end) as f64 / counted.seconds),
        "lag_bytes_max": lag_bytes_max,
        "lag_rows_at_end": total(&at_end, "unsaved"),
        "caught_up_rows": left,
        "caught_up_s": round(took),
        "caught_up_rows_per_s": round(left as f64 / took.max(1e-9)),
        "rows_per_s_of_writing": round(written(&caught_up) as f64 / busy_s.max(1e-9)),
        "rows": rows,
        "bytes_per_row": round(
            history_figure(&caught_up, "bytes") as f64 / rows.max(1) as f64
        ),
        "rss_bytes": rss_bytes(server.pid()),
        "check": { "completed_client": counted.completed, "rows": rows },
        "env": environment(folder.path(), 0.0, placement(flags)),
    });
    Ok((report, rows == counted.completed))
}

fn history_figure(figures: &Value, name: &str) -> u64 {
    figures["history"][name].as_u64().unwrap_or(0)
}

async fn idle(flags: &Flags, folder: &Folder) -> Result<(Value, bool), String> {
    let data = folder.path().join("data");
    let target = Target::start(flags, &data)?;
    make_functions(&target.options, flags).await?;
    // The log prepares its next segments first.
    tokio::time::sleep(Duration::from_secs_f64(flags.warmup.max(3.0))).await;
    let before = target.cpu();
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(flags.seconds)).await;
    let share = (target.cpu() - before) / start.elapsed().as_secs_f64();
    let figures = stats(&target.options).await?;
    let shards = figures["shards"].as_array().map_or(1, Vec::len).max(1);
    let report = json!({
        "bench": "idle",
        "schema": 1,
        "shards": shards,
        "cpu_percent_of_a_core": round(share * 100.0),
        "cpu_percent_per_shard": round(share * 100.0 / shards as f64),
        "rss_bytes": target.server.as_ref().map_or(0, |server| rss_bytes(server.pid())),
        "env": environment(folder.path(), 0.0, placement(flags)),
    });
    Ok((report, true))
}
