//! `pelton demo`: real work on a folder's files for three tenants, with an engine and an executor in processes of their
//! own; with `--crash`, through the death of the engine.
//!
//! Reading order: `files` is the input; `work` the executor process and its ledger; `ledger` reads that; `host` holds
//! the processes; `submit` hands in and asks after; `screen` and `report` are what is seen.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf, absolute},
    process::ExitCode,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Args;
use pelton_client::{Client, Finished, Operation, RequestId};
use pelton_core::limits::PAYLOAD_BYTES_DEFAULT;
use serde_json::{Value, json};

mod files;
mod host;
mod ledger;
mod report;
mod screen;
mod submit;
pub mod work;

use crate::command::{bench::local, table::grouped};
use files::{DATA_PREFIX, Input, Inputs};
use host::{Executor, Server};
use ledger::Ledger;
use report::{CrashEnd, Report, counted};
use screen::Screen;
use submit::{Acknowledged, Job, Plan, ask_all, submit};
use work::{TENANTS, digest, fails_first, now_ms, wordcount};

/// What the slow work shall take in all, and over which time the quick work is handed in.
const WORK: Duration = Duration::from_millis(8_500);
const PACE: Duration = Duration::from_secs(8);
/// Tasks of `flaky` for each file, and what they are multiplied to.
const FLAKY_EACH: usize = 10;
const FLAKY_TASKS: usize = 4_000;
const FLAKY_TASKS_CRASH: usize = 11_000;
/// Tasks of `digest` for few files.
const DIGEST_TASKS: usize = 400;
const ROUNDS_MAX: usize = 50;
/// Payloads of all rounds together.
const BYTES_MAX: u64 = 128 << 20;
/// An attempt of `flaky` takes about this long.
const FLAKY: Duration = Duration::from_millis(25);
const SLOTS_MAX: u32 = 64;

/// A crash needs so many accepted tasks, and so many of them not terminal.
const CRASH_ACCEPTED: usize = 10_000;
const CRASH_OUTSTANDING: usize = 1_000;
/// The crash comes then, or earlier if little is left.
const CRASH_AFTER: Duration = Duration::from_secs(3);
const CRASH_SOON: usize = 4_000;

const TICK: Duration = Duration::from_millis(100);
/// Without any progress for so long the run is judged as it stands.
const STALLED: Duration = Duration::from_secs(30);

/// See it work on a folder of this machine
///
/// Digests and counts the words of every file of DIR, for two tenants, while a third one floods the engine with slow
/// tasks of which a third fail at first. Then every result is checked against the files, and every accepted task is
/// asked after.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Folder with the files to work on
    #[arg(default_value = ".", value_name = "DIR")]
    folder: PathBuf,
    /// Kill the engine with SIGKILL in the middle, start it again, and count what is lost
    #[arg(long)]
    crash: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Where the log goes; it is kept [default: ./pelton-demo-data-PID]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

/// Exit code 1 if something is lost or wrong, 8 if the run cannot be made.
pub fn run(args: DemoArgs) -> ExitCode {
    let done = local(async {
        tokio::select! {
            done = drive(&args) => done,
            () = interrupted() => Err("interrupted; its processes were stopped".to_owned()),
        }
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("pelton demo: {error}");
            ExitCode::from(8)
        }
    }
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let kinds = [SignalKind::interrupt(), SignalKind::terminate()];
    let [Ok(mut interrupt), Ok(mut terminate)] = kinds.map(signal) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

async fn drive(args: &DemoArgs) -> Result<bool, String> {
    let at = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    let data = match &args.data {
        Some(data) => data.clone(),
        None => format!("{DATA_PREFIX}-{}", std::process::id()).into(),
    };
    let data = absolute(&data).map_err(|error| at(&data, error))?;
    let inputs = Inputs::collect(&args.folder, &data, PAYLOAD_BYTES_DEFAULT)
        .map_err(|error| at(&args.folder, error))?;
    if inputs.files.is_empty() {
        return Err(format!(
            "there is no file to work on in {}",
            args.folder.display()
        ));
    }
    let aside = data.join("demo");
    fs::create_dir_all(&aside).map_err(|error| at(&aside, error))?;
    introduce(args, &inputs, &data);
    let run = Run::start(args, inputs, &data, &aside).await?;
    let report = run.finish().await?;
    if args.json {
        println!("{}", report.to_json(&data));
    } else {
        report.print();
        println!("{}", report::next_steps(&host::program()?, &data));
    }
    Ok(report.faults().is_empty())
}

/// Says what is about to happen; on stderr, where the progress is.
fn introduce(args: &DemoArgs, inputs: &Inputs, data: &Path) {
    let folder = args.folder.canonicalize();
    let folder = folder.as_deref().unwrap_or(&args.folder);
    eprintln!(
        "{}, {:.1} MiB, of {}{}",
        counted(inputs.files.len() as u64, "file"),
        inputs.bytes as f64 / f64::from(1 << 20),
        folder.display(),
        if inputs.cut {
            " (there are more; this is what ten seconds take)"
        } else {
            ""
        }
    );
    const NAMED: usize = 5;
    if !inputs.skipped.is_empty() {
        eprintln!("{} skipped:", inputs.skipped.len());
        for (path, why) in inputs.skipped.iter().take(NAMED) {
            eprintln!("  {}: {why}", path.display());
        }
        if inputs.skipped.len() > NAMED {
            eprintln!("  and {} more", inputs.skipped.len() - NAMED);
        }
    }
    eprintln!("data  {}", data.display());
}

/// How much of which work fits the time.
struct Size {
    rounds: usize,
    flaky_rounds: usize,
    slots: u32,
    flaky: Duration,
}

impl Size {
    fn of(files: usize, bytes: u64, crash: bool) -> Size {
        let fitting = BYTES_MAX / (2 * bytes.max(1));
        let rounds = DIGEST_TASKS.div_ceil(files).min(ROUNDS_MAX);
        let wanted = if crash {
            FLAKY_TASKS_CRASH.div_ceil(FLAKY_EACH * files)
        } else {
            FLAKY_TASKS.div_ceil(FLAKY_EACH * files).min(ROUNDS_MAX)
        };
        // A third of the tasks takes two attempts.
        let attempts = (wanted * files * FLAKY_EACH * 4 / 3) as u32;
        let slots = (FLAKY * attempts).as_millis().div_ceil(WORK.as_millis()) as u32;
        let slots = slots.clamp(1, SLOTS_MAX);
        Size {
            rounds: rounds.min(fitting.max(1) as usize),
            flaky_rounds: wanted,
            slots,
            flaky: WORK * slots / attempts,
        }
    }
}

/// A run in progress.
struct Run {
    crash: bool,
    plain: bool,
    data: PathBuf,
    server_log: PathBuf,
    inputs: Inputs,
    plans: [Rc<Plan>; 3],
    acknowledged: [Acknowledged; 3],
    submitting: tokio::task::JoinSet<Result<(), String>>,
    server: Server,
    executor: Executor,
    ledger: Ledger,
    started: Instant,
}

/// The kill as it was.
struct Kill {
    at_ms: u64,
    /// Acknowledged tasks of each tenant by then.
    acknowledged: [usize; 3],
    replay: Duration,
}

impl Run {
    async fn start(
        args: &DemoArgs,
        inputs: Inputs,
        data: &Path,
        aside: &Path,
    ) -> Result<Run, String> {
        let tag = format!("d{:x}", now_ms());
        let size = Size::of(inputs.files.len(), inputs.bytes, args.crash);
        let server_log = aside.join("server.log");
        let ledger = aside.join(format!("{tag}.ledger"));
        let any = "127.0.0.1:0".parse().expect("this is an address");
        let server = Server::start(data, &server_log, any).await?;
        let mut clients = Vec::new();
        for (tenant, function) in TENANTS {
            let client = Client::connect(server.options(tenant)?)
                .await
                .map_err(|error| error.to_string())?;
            let mut config = json!({ "function": function });
            if function == "flaky" {
                config["backoff_ms_min"] = 100.into();
                config["backoff_ms_max"] = 400.into();
            }
            client
                .query(Operation::FunctionSet, &config.to_string())
                .await
                .map_err(|error| format!("{tenant}/{function}: {error}"))?;
            clients.push(client);
        }
        let executor = Executor::start(&server, &ledger, size.slots, size.flaky)?;
        let ledger =
            Ledger::open(&ledger).map_err(|error| format!("{}: {error}", ledger.display()))?;
        let plans =
            TENANTS.map(|(_, function)| Rc::new(plan(function, &tag, &inputs.files, &size)));
        eprintln!(
            "engine  process {}, {}, {} ms to its start",
            server.pid(),
            server.address,
            server.ready.as_millis()
        );
        eprintln!(
            "tasks   {} digest, {} wordcount, {} flaky ({} at a time, {:.0} ms each, a third fail at first)\n",
            grouped(plans[0].jobs.len() as u64),
            grouped(plans[1].jobs.len() as u64),
            grouped(plans[2].jobs.len() as u64),
            size.slots,
            size.flaky.as_secs_f64() * 1e3
        );
        let acknowledged: [Acknowledged; 3] = Default::default();
        let mut submitting = tokio::task::JoinSet::new();
        for ((client, plan), acknowledged) in clients.into_iter().zip(&plans).zip(&acknowledged) {
            submitting.spawn_local(submit(client, Rc::clone(plan), Rc::clone(acknowledged)));
        }
        Ok(Run {
            crash: args.crash,
            plain: args.json,
            data: data.to_owned(),
            server_log,
            inputs,
            plans,
            acknowledged,
            submitting,
            server,
            executor,
            ledger,
            started: Instant::now(),
        })
    }

    fn accepted(&self) -> [usize; 3] {
        [0, 1, 2].map(|tenant: usize| self.acknowledged[tenant].borrow().len())
    }

    fn read_ledger(&mut self) -> Result<usize, String> {
        self.ledger.read_on().map_err(|error| error.to_string())?;
        let done: u64 = self.ledger.tallies.iter().map(|tally| tally.done).sum();
        Ok(done as usize)
    }

    /// Goes on until everything is handed in and done.
    async fn work(&mut self) -> Result<Option<Kill>, String> {
        let totals = [0, 1, 2].map(|tenant: usize| self.plans[tenant].jobs.len());
        let mut screen = Screen::new(totals, self.plain);
        let mut kill = None;
        let mut known = (0, 0);
        let mut moved = Instant::now();
        loop {
            tokio::time::sleep(TICK).await;
            let done = self.read_ledger()?;
            let accepted: usize = self.accepted().iter().sum();
            screen.update(&self.ledger.tallies, accepted);
            while let Some(ended) = self.submitting.try_join_next() {
                ended.map_err(|error| error.to_string())??;
            }
            if !self.executor.runs() {
                return Err("the executor has ended by itself".to_owned());
            }
            let left = accepted.saturating_sub(done);
            let ripe = accepted >= CRASH_ACCEPTED && left >= CRASH_OUTSTANDING;
            let time = self.started.elapsed() >= CRASH_AFTER || left <= CRASH_SOON;
            if self.crash && kill.is_none() && ripe && time {
                kill = Some(self.kill(&screen, left).await?);
                moved = Instant::now();
            }
            if self.submitting.is_empty() && left == 0 {
                break;
            }
            if known != (accepted, done) {
                known = (accepted, done);
                moved = Instant::now();
            }
            if moved.elapsed() > STALLED {
                screen.say("nothing has happened for 30 seconds: the run is judged as it stands");
                break;
            }
        }
        screen.end();
        Ok(kill)
    }

    async fn kill(&mut self, screen: &Screen, left: usize) -> Result<Kill, String> {
        self.server.kill()?;
        let at_ms = now_ms();
        let acknowledged = self.accepted();
        screen.say(&format!(
            "SIGKILL to the engine, process {}, with about {} accepted tasks outstanding",
            self.server.pid(),
            grouped(left as u64)
        ));
        let server = Server::start(&self.data, &self.server_log, self.server.address).await?;
        let replay = server.ready;
        self.server = server;
        screen.say(&format!(
            "started again as process {}: it listens after {} ms",
            self.server.pid(),
            replay.as_millis()
        ));
        Ok(Kill {
            at_ms,
            acknowledged,
            replay,
        })
    }

    async fn finish(mut self) -> Result<Report, String> {
        let kill = self.work().await?;
        let seconds = self.started.elapsed().as_secs_f64();
        let mut answers = Vec::new();
        for ((tenant, _), acknowledged) in TENANTS.iter().zip(&self.acknowledged) {
            let ids = acknowledged.borrow().iter().map(|(id, _)| *id).collect();
            answers.push(ask_all(self.server.options(tenant)?, ids).await?);
        }
        let recovered = match &kill {
            Some(_) => recovered(&self.server).await?,
            None => 0,
        };
        let Run {
            executor,
            server,
            mut ledger,
            ..
        } = self;
        // What a process does at its end does not hide the verdict.
        for ended in [executor.stop().await, server.stop().await] {
            if let Err(error) = ended {
                eprintln!("{error}; it was killed");
            }
        }
        ledger.read_on().map_err(|error| error.to_string())?;
        let mut report = Report {
            tenants: Default::default(),
            lost: Vec::new(),
            digests: (0, 0),
            counts: (0, 0),
            wrong: Vec::new(),
            unaccepted: 0,
            skipped: self.inputs.skipped.len(),
            crash: None,
            outstanding_min: CRASH_OUTSTANDING as u64,
            seconds,
        };
        let mut known = HashSet::new();
        let expected: Vec<[String; 2]> = self.inputs.files.iter().map(expected).collect();
        for (place, answers) in answers.into_iter().enumerate() {
            let acknowledged = self.acknowledged[place].borrow();
            let plan = &self.plans[place];
            let end = &mut report.tenants[place];
            end.accepted = acknowledged.len() as u64;
            report.unaccepted += plan.jobs.len() - acknowledged.len();
            end.tally = std::mem::take(&mut ledger.tallies[place]);
            for (&(id, job), answer) in acknowledged.iter().zip(answers) {
                if !known.insert(id) {
                    let why = format!("a second task, {}, has this id", plan.jobs[job].task_id);
                    report.lost.push((id, why));
                    continue;
                }
                let finished = match answer {
                    Ok(finished) => finished,
                    Err(why) => {
                        report.lost.push((id, why));
                        continue;
                    }
                };
                if !finished.succeeded() {
                    end.failed += 1;
                    continue;
                }
                end.succeeded += 1;
                let file = plan.jobs[job].file;
                let checked = match plan.function {
                    "digest" => &mut report.digests,
                    "wordcount" => &mut report.counts,
                    _ => continue,
                };
                checked.0 += 1;
                match differs(&finished, &expected[file][place]) {
                    None => checked.1 += 1,
                    Some(why) => {
                        let path = self.inputs.files[file].path.display();
                        report.wrong.push((id, format!("{path}: {why}")));
                    }
                }
            }
        }
        if self.crash {
            report.crash = Some(match kill {
                Some(kill) => CrashEnd {
                    outstanding_at_kill: outstanding(&self.acknowledged, &kill, &ledger),
                    recovered,
                    executed_more_than_once: too_often(&ledger),
                    replay_ms: kill.replay.as_millis() as u64,
                },
                None => CrashEnd {
                    outstanding_at_kill: 0,
                    recovered: 0,
                    executed_more_than_once: too_often(&ledger),
                    replay_ms: 0,
                },
            });
        }
        Ok(report)
    }
}

fn plan(function: &'static str, tag: &str, files: &[Input], size: &Size) -> Plan {
    let flaky = function == "flaky";
    let rounds = if flaky {
        size.flaky_rounds * FLAKY_EACH
    } else {
        size.rounds
    };
    let mut jobs = Vec::with_capacity(rounds * files.len());
    for _ in 0..rounds {
        for (file, input) in files.iter().enumerate() {
            let task_id = format!("{tag}-{}", jobs.len());
            let payload = if flaky {
                Bytes::from(input.path.to_string_lossy().into_owned())
            } else {
                input.bytes.clone()
            };
            jobs.push(Job {
                task_id,
                file,
                payload,
            });
        }
    }
    Plan {
        function,
        jobs,
        pace: if flaky { Duration::ZERO } else { PACE },
    }
}

/// What the functions must say of a file, from the file as it is now; if it was changed meanwhile, from what it was.
fn expected(input: &Input) -> [String; 2] {
    match fs::read(&input.path) {
        Ok(bytes) if bytes == input.bytes => [digest(&bytes), wordcount(&bytes)],
        Ok(_) | Err(_) => [digest(&input.bytes), wordcount(&input.bytes)],
    }
}

fn differs(finished: &Finished, expected: &str) -> Option<String> {
    match &finished.result {
        Some(result) if *result == expected.as_bytes() => None,
        Some(result) => Some(format!(
            "the result is `{}`, the file says `{expected}`",
            result.escape_ascii()
        )),
        None => Some("there is no result".to_owned()),
    }
}

/// Tasks that were acknowledged at the kill and had not been done by then.
fn outstanding(acknowledged: &[Acknowledged; 3], kill: &Kill, ledger: &Ledger) -> u64 {
    let is_done = |id: &RequestId| {
        let done_ms = ledger.tasks.get(id).and_then(|task| task.done_ms);
        done_ms.is_some_and(|done_ms| done_ms <= kill.at_ms)
    };
    let counts = acknowledged.iter().zip(kill.acknowledged);
    counts
        .map(|(acknowledged, count)| {
            let acknowledged = acknowledged.borrow();
            let left = acknowledged[..count].iter().filter(|(id, _)| !is_done(id));
            left.count() as u64
        })
        .sum()
}

/// Tasks that were started more often than by their own failure.
fn too_often(ledger: &Ledger) -> u64 {
    let tasks = ledger.tasks.iter();
    let often = tasks.filter(|(id, task)| {
        let own = task.flaky && fails_first(**id);
        task.starts > 1 + u32::from(own)
    });
    often.count() as u64
}

async fn recovered(server: &Server) -> Result<u64, String> {
    let client = Client::connect(server.options(TENANTS[0].0)?)
        .await
        .map_err(|error| error.to_string())?;
    let stats = client
        .query(Operation::Stats, "{}")
        .await
        .map_err(|error| error.to_string())?;
    let stats: Value = serde_json::from_str(&stats).map_err(|error| error.to_string())?;
    stats["totals"]["recovered"]
        .as_u64()
        .ok_or_else(|| "the server's stats say nothing of `recovered`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_lasts_about_as_long_whatever_the_folder_holds() {
        for files in [1, 7, 100, 2_000] {
            for crash in [false, true] {
                let size = Size::of(files, 1 << 20, crash);
                let attempts = size.flaky_rounds * files * FLAKY_EACH * 4 / 3;
                let seconds = attempts as f64 * size.flaky.as_secs_f64() / f64::from(size.slots);
                assert!((8.0..9.0).contains(&seconds), "{files} files: {seconds} s");
                assert!(!crash || size.flaky_rounds * files * FLAKY_EACH >= CRASH_ACCEPTED);
                assert!(size.flaky >= Duration::from_millis(5));
            }
        }
        assert_eq!(Size::of(100, 64 << 20, false).rounds, 1);
    }
}
