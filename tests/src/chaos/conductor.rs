//! The cycles: load, a kill at a moment that the seed draws, a start, which may be killed too, and so on over one data
//! directory; then everything heals, comes to rest and is judged.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{IsTerminal, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pelton_client::{Client, ClientOptions, Operation, Trust};
use serde_json::{Value, json};

use super::{
    history::{Event, History},
    host::{Reached, Server, Watcher},
    judge::{Invariant, Judge, Verdict},
    plan::{Dice, FUNCTIONS, TENANTS},
    power::{Cut, Cuts, Power, Writes},
};

const CALLERS: u16 = 3;
const EXECUTORS: usize = 2;
/// Submissions that are acknowledged in each cycle, at least.
pub const ACCEPTED_MIN: u64 = 1_000;
/// A cycle in which that is not reached by then has found a server that does not serve.
const CYCLE_MAX: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
/// Of a hundred starts, those that are killed.
const STARTS_KILLED: u64 = 35;
/// Of a hundred cycles, those with the kill of an executor.
const EXECUTORS_KILLED: u64 = 10;
/// Of a hundred looks at a server in a rare phase, those that end in a kill at once.
const RARE_PHASES_KILLED: u64 = 50;
/// About as long a segment is cleaned, in microseconds.
const CLEANING_US: u64 = 15_000;
/// For everything to come to rest: what callers wait, and the time to ask after this many tasks a second.
const REST: Duration = Duration::from_secs(120);
const ASKED_A_SECOND: u64 = 1_000;
/// Shards of the server: two, so that they have to agree.
const SHARDS: u16 = 2;

#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Kill the server this often under load; starts are killed beside that
    #[arg(long, default_value_t = 20)]
    cycles: u64,
    /// What decides about submissions, moments and kills [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// How long a server serves before it is killed, on average
    #[arg(long, default_value_t = 0.6)]
    seconds_per_cycle: f64,
    /// Submissions a second over all callers
    #[arg(long, default_value_t = 4_000)]
    rate: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
    /// Succeed if something that was acknowledged is lost: for builds with a planted bug
    #[arg(long)]
    expect_loss: bool,
    /// The `pelton` to kill
    #[arg(long)]
    program: PathBuf,
    /// Where the run's folder is made
    #[arg(long)]
    folder: PathBuf,
}

/// Runs all cycles and prints what they came to; true if that is what was expected. With `cuts` the power is cut where the
/// server is killed otherwise, and `Some(true)` has the disk lie about flushes.
pub fn run(args: &RunArgs, cuts: Option<Cuts>) -> Result<bool, String> {
    if !(args.seconds_per_cycle.is_finite() && (0.0..=600.0).contains(&args.seconds_per_cycle)) {
        return Err("--seconds-per-cycle is a number from 0 to 600".into());
    }
    let seed = args.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.as_secs())
    });
    // A run that was killed leaves its folder, and process numbers repeat.
    let folder = fs::create_dir_all(&args.folder)
        .and_then(|()| {
            let prefix = format!("seed-{seed}-");
            tempfile::Builder::new()
                .prefix(&prefix)
                .tempdir_in(&args.folder)
        })
        .map_err(|error| format!("{}: {error}", args.folder.display()))?
        .keep();
    let began = Instant::now();
    let mut run = Run::start(args, cuts, seed, &folder)?;
    let broken = run.cycles().and_then(|()| run.rest()).err();
    if let (Some(power), Some(_), false) = (&run.power, &broken, args.expect_loss) {
        power.keep(&folder);
    }
    let (cycles, max_start) = (run.cycle, run.max_start);
    let writes = run.power.as_ref().map(|power| power.writes);
    // Whoever is still there after a failure is killed, so that their files do not grow any more.
    drop(run);
    let mut verdict = judge(&folder, broken.is_none())?;
    if let Some(broken) = broken {
        let (invariant, what) = broken.told();
        verdict.violations.add(invariant, what);
    }
    let report = Report {
        seed,
        cycles,
        max_start,
        took: began.elapsed(),
        writes,
        verdict,
    };
    let lost = report.verdict.violations.count(Invariant::NothingIsLost);
    let good = match args.expect_loss {
        true => lost > 0,
        false => report.verdict.violations.is_empty(),
    };
    if args.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.table());
    }
    if report.verdict.violations.is_empty() || args.expect_loss {
        fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    } else {
        eprintln!("kept for inspection: {}", folder.display());
        let chore = if cuts.is_some() { "power-cut" } else { "chaos" };
        eprintln!(
            "to repeat: cargo xtask {chore} --cycles {} --seed {seed} --seconds-per-cycle {} --rate {}",
            args.cycles, args.seconds_per_cycle, args.rate
        );
    }
    Ok(good)
}

/// Why cycles were broken off.
enum Broken {
    /// The server does not do what it is there for.
    Server(String),
    /// A caller has been told that a task is missing: there is no need to go on.
    Loss,
    /// The run itself cannot go on.
    Run(String),
}

impl Broken {
    fn told(self) -> (Invariant, String) {
        match self {
            Broken::Server(what) => (Invariant::TheServerLives, what),
            Broken::Loss => (
                Invariant::HistoriesAreWhole,
                "the run was broken off at the first loss".into(),
            ),
            Broken::Run(what) => (Invariant::HistoriesAreWhole, what),
        }
    }
}

impl From<String> for Broken {
    fn from(what: String) -> Broken {
        Broken::Run(what)
    }
}

struct Run<'a> {
    args: &'a RunArgs,
    seed: u64,
    folder: &'a Path,
    dice: Dice,
    history: History,
    /// `None` only between a kill and the next start.
    server: Option<Server>,
    /// What its directory lies on, if that loses power.
    power: Option<Power>,
    reached: Reached,
    /// Starts of the server.
    starts: u64,
    last_start: Duration,
    max_start: Duration,
    callers: Vec<Watcher>,
    tails: Vec<Tail>,
    executors: Vec<Watcher>,
    /// Executors that were started.
    executors_named: u64,
    cycle: u64,
    bar: ProgressBar,
}

impl<'a> Run<'a> {
    fn start(
        args: &'a RunArgs,
        cuts: Option<Cuts>,
        seed: u64,
        folder: &'a Path,
    ) -> Result<Run<'a>, String> {
        let history = History::create(&folder.join("conductor.history"));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut power = cuts.map(|_| Power::on(folder, seed)).transpose()?;
        let data = data(folder, power.as_ref());
        let mut server = Server::spawn(&args.program, folder, data, SHARDS, any, 0)?;
        let (reached, took) = server.ready()?;
        configure(&reached)?;
        if let (Some(power), Some(Cuts { lying_flush: true })) = (&mut power, cuts) {
            power.lie()?;
        }
        let mut run = Run {
            args,
            seed,
            folder,
            dice: Dice::of(&[seed, 5]),
            history: history.map_err(|error| error.to_string())?,
            server: Some(server),
            power,
            reached,
            starts: 1,
            last_start: took,
            max_start: took,
            callers: Vec::new(),
            tails: Vec::new(),
            executors: Vec::new(),
            executors_named: 0,
            cycle: 0,
            bar: bar(args.cycles),
        };
        for _ in 0..EXECUTORS {
            run.start_executor()?;
        }
        let streams = u64::from(CALLERS) * TENANTS.len() as u64;
        for index in 0..CALLERS {
            let rate = (args.rate / streams).max(1);
            let mut arguments = run.arguments("caller");
            arguments.extend(["--index".into(), index.to_string()]);
            arguments.extend(["--rate".into(), rate.to_string()]);
            let caller = Watcher::spawn(format!("caller {index}"), &arguments)?;
            run.callers.push(caller);
        }
        for stream in 0..streams {
            let path = folder.join(format!("stream-{stream}.history"));
            run.tails.push(Tail::new(path));
        }
        Ok(run)
    }

    fn arguments(&self, what: &str) -> Vec<String> {
        [
            what,
            "--server",
            &self.reached.address.to_string(),
            "--trust",
            &self.reached.fingerprint,
            "--seed",
            &self.seed.to_string(),
            "--folder",
            &self.folder.to_string_lossy(),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn start_executor(&mut self) -> Result<(), String> {
        let name = format!("e{}", self.executors_named);
        self.executors_named += 1;
        let mut arguments = self.arguments("executor");
        arguments.extend(["--name".into(), name.clone()]);
        let executor = Watcher::spawn(format!("executor {name}"), &arguments)?;
        self.executors.push(executor);
        Ok(())
    }

    fn cycles(&mut self) -> Result<(), Broken> {
        while self.cycle < self.args.cycles {
            self.serve()?;
            self.kill()?;
            self.cycle += 1;
            while self.dice.chance(STARTS_KILLED) {
                self.kill_a_start()?;
            }
            self.start_again()?;
            self.bar.set_position(self.cycle);
            let step = (self.args.cycles / 10).max(1);
            if self.bar.is_hidden() && self.cycle.is_multiple_of(step) {
                eprintln!(
                    "{} of {} cycles, {} submissions accepted, the last start took {} ms",
                    self.cycle,
                    self.args.cycles,
                    self.accepted(),
                    self.last_start.as_millis()
                );
            }
        }
        Ok(())
    }

    /// Lets the server serve until enough is acknowledged and the drawn moment has come, or it is in a phase that is
    /// rarely met.
    fn serve(&mut self) -> Result<(), Broken> {
        let start = Instant::now();
        let drawn = self.dice.below(2_000) as f64 / 1_000.0;
        let moment = Duration::from_secs_f64(self.args.seconds_per_cycle * drawn);
        let kills_executor = self.dice.chance(EXECUTORS_KILLED);
        let mut executor_dies = kills_executor.then(|| moment.mul_f64(drawn / 2.0));
        let before = self.accepted();
        loop {
            std::thread::sleep(LOOK);
            self.all_live()?;
            let mut missing = false;
            for tail in &mut self.tails {
                tail.read_on()?;
                missing |= tail.missing;
            }
            if missing {
                return Err(Broken::Loss);
            }
            let enough = self.accepted() - before >= ACCEPTED_MIN;
            if enough && start.elapsed() >= moment {
                return Ok(());
            }
            let server = self.server.as_mut().expect("it is up during a cycle");
            if enough && server.writes_snapshot() && self.dice.chance(RARE_PHASES_KILLED) {
                return Ok(());
            }
            if server.begins_segment() && enough && self.dice.chance(RARE_PHASES_KILLED) {
                // The oldest segment is cleaned now, for a moment.
                let moment = Duration::from_micros(self.dice.below(CLEANING_US));
                std::thread::sleep(moment);
                return Ok(());
            }
            if executor_dies.is_some_and(|at| start.elapsed() >= at) {
                executor_dies = None;
                let which = self.dice.below(self.executors.len() as u64) as usize;
                self.executors.swap_remove(which).kill()?;
                self.note(&Event::ExecutorKilled)?;
                self.start_executor()?;
            }
            if start.elapsed() > CYCLE_MAX {
                return Err(Broken::Server(format!(
                    "of {} submissions in {} s not more than {} were accepted",
                    ACCEPTED_MIN,
                    CYCLE_MAX.as_secs(),
                    self.accepted() - before
                )));
            }
        }
    }

    fn all_live(&mut self) -> Result<(), Broken> {
        if let Some(server) = &mut self.server {
            server.must_live().map_err(Broken::Server)?;
        }
        for watcher in self.callers.iter_mut().chain(&mut self.executors) {
            watcher.must_live()?;
        }
        Ok(())
    }

    fn accepted(&self) -> u64 {
        self.tails.iter().map(|tail| tail.accepted).sum()
    }

    fn kill(&mut self) -> Result<(), Broken> {
        let server = self.server.take().expect("it is up during a cycle");
        self.end(server)
    }

    fn end(&mut self, server: Server) -> Result<(), Broken> {
        let phase = match &mut self.power {
            Some(power) => power.cut(server).map_err(|cut| match cut {
                Cut::Server(what) => Broken::Server(what),
                Cut::Run(what) => Broken::Run(what),
            })?,
            None => server.kill().map_err(Broken::Server)?.phase(),
        };
        self.note(&Event::ServerKilled { phase })
    }

    fn note(&mut self, event: &Event<'_>) -> Result<(), Broken> {
        self.history.note(event);
        let flushed = self.history.flush();
        flushed.map_err(|error| Broken::Run(error.to_string()))
    }

    fn spawn(&mut self) -> Result<Server, Broken> {
        let (program, number) = (&self.args.program, self.starts);
        self.starts += 1;
        let (data, listen) = (data(self.folder, self.power.as_ref()), self.reached.address);
        Server::spawn(program, self.folder, data, SHARDS, listen, number).map_err(Broken::Server)
    }

    /// Starts the server and kills it before it is likely to listen.
    fn kill_a_start(&mut self) -> Result<(), Broken> {
        let within = self.last_start.as_micros() as u64;
        let moment = Duration::from_micros(self.dice.below(within.max(1)));
        let server = self.spawn()?;
        std::thread::sleep(moment);
        self.end(server)
    }

    fn start_again(&mut self) -> Result<(), Broken> {
        let mut server = self.spawn()?;
        let (reached, took) = server.ready().map_err(Broken::Server)?;
        if reached.fingerprint != self.reached.fingerprint {
            return Err(Broken::Server("its certificate is another one".into()));
        }
        self.server = Some(server);
        self.last_start = took;
        self.max_start = self.max_start.max(took);
        Ok(())
    }

    /// Nobody is killed any more: all work has to come to rest.
    fn rest(&mut self) -> Result<(), Broken> {
        self.bar.set_message("waiting for the end of every task");
        for caller in &mut self.callers {
            caller.tell("finish")?;
        }
        let patience = REST + Duration::from_secs(self.accepted() / ASKED_A_SECOND);
        for caller in &mut self.callers {
            caller.join(patience)?;
        }
        self.callers.clear();
        let start = Instant::now();
        loop {
            self.all_live()?;
            let (waiting, running) = counters(&self.reached).map_err(Broken::Server)?;
            if waiting + running == 0 {
                break;
            }
            if start.elapsed() > REST {
                return Err(Broken::Server(format!(
                    "{waiting} tasks wait and {running} run although everything is well"
                )));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for executor in &mut self.executors {
            executor.let_go();
        }
        for executor in &mut self.executors {
            executor.join(REST)?;
        }
        self.executors.clear();
        self.bar.finish_and_clear();
        Ok(())
    }
}

/// Where a server has its data.
fn data(folder: &Path, power: Option<&Power>) -> PathBuf {
    power.map_or_else(|| folder.join("data"), Power::data)
}

fn bar(cycles: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} cycles, {eta} left {msg}");
    ProgressBar::new(cycles).with_style(style.expect("the template is one"))
}

/// Counts what a stream has written, while it writes.
struct Tail {
    path: PathBuf,
    file: Option<File>,
    rest: Vec<u8>,
    accepted: u64,
    missing: bool,
}

impl Tail {
    fn new(path: PathBuf) -> Tail {
        Tail {
            path,
            file: None,
            rest: Vec::new(),
            accepted: 0,
            missing: false,
        }
    }

    /// Its process may not have made the file yet.
    fn read_on(&mut self) -> Result<(), String> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let read = file.read_to_end(&mut self.rest);
        read.map_err(|error| format!("{}: {error}", self.path.display()))?;
        let whole = self.rest.iter().rposition(|&byte| byte == b'\n');
        let lines: Vec<u8> = self.rest.drain(..whole.map_or(0, |end| end + 1)).collect();
        for line in lines.split(|&byte| byte == b'\n') {
            let mut fields = line.split(|&byte| byte == b' ').skip(1);
            match fields.next() {
                Some(b"accepted") => self.accepted += u64::from(fields.nth(3) == Some(b"new")),
                Some(b"missing") => self.missing = true,
                Some(_) | None => {}
            }
        }
        Ok(())
    }
}

/// Runs a few calls to the server.
fn call<T>(
    reached: &Reached,
    tenant: &str,
    calls: impl AsyncFnOnce(Client) -> Result<T, pelton_client::Error>,
) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let trust = Trust::parse(&reached.fingerprint).ok_or("the server names no fingerprint")?;
    let options = ClientOptions::at(reached.address)
        .trust(trust)
        .tenant(tenant);
    let called = runtime.block_on(async {
        let client = Client::connect(options).await?;
        calls(client).await
    });
    called.map_err(|error| error.to_string())
}

fn configure(reached: &Reached) -> Result<(), String> {
    for tenant in TENANTS {
        call(reached, tenant, async |client| {
            for function in &FUNCTIONS {
                let config = json!({
                    "function": function.name,
                    "retries": function.retries,
                    "concurrency": function.concurrency,
                    "backoff_ms_min": 10,
                    "backoff_ms_max": 100,
                });
                let config = config.to_string();
                client.query(Operation::FunctionSet, &config).await?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Tasks that wait and tasks that run, over all shards.
fn counters(reached: &Reached) -> Result<(u64, u64), String> {
    let stats = call(reached, TENANTS[0], async |client| {
        client.query(Operation::Stats, "{}").await
    })?;
    let stats: Value = serde_json::from_str(&stats).map_err(|error| error.to_string())?;
    let count = |name: &str| stats["totals"][name].as_u64();
    count("waiting")
        .zip(count("running"))
        .ok_or_else(|| "its statistics have no counters".to_owned())
}

/// Reads every file of the run: callers first.
fn judge(folder: &Path, complete: bool) -> Result<Verdict, String> {
    let entries = fs::read_dir(folder).map_err(|error| error.to_string())?;
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    let mut judge = Judge::default();
    for kind in ["stream-", "executor-", "conductor"] {
        for name in names.iter().filter(|name| name.starts_with(kind)) {
            let text = fs::read_to_string(folder.join(name));
            let text = text.map_err(|error| format!("{name}: {error}"))?;
            judge.read(name, &text, complete && kind == "stream-");
        }
    }
    Ok(judge.verdict(complete))
}

/// What is printed.
struct Report {
    seed: u64,
    cycles: u64,
    max_start: Duration,
    took: Duration,
    /// Of a run with power cuts.
    writes: Option<Writes>,
    verdict: Verdict,
}

impl Report {
    fn table(&self) -> String {
        let verdict = &self.verdict;
        let lost = verdict.violations.count(Invariant::NothingIsLost);
        let mut rows = vec![
            ("seed".to_owned(), self.seed),
            ("cycles".to_owned(), self.cycles),
        ];
        let what = if self.writes.is_some() {
            "cuts"
        } else {
            "kills"
        };
        for (phase, count) in verdict.kills() {
            rows.push((format!("{what}, {}", phase.name()), count));
        }
        if let Some(writes) = self.writes {
            rows.extend([
                ("flushes".to_owned(), writes.flushes),
                ("writes dropped".to_owned(), writes.dropped),
                ("writes torn".to_owned(), writes.torn),
                ("writes kept".to_owned(), writes.kept),
            ]);
        }
        rows.extend([
            ("kills of executors".to_owned(), verdict.executors_killed),
            ("accepted".to_owned(), verdict.accepted),
            ("lost".to_owned(), lost),
        ]);
        for (status, &count) in &verdict.ended {
            rows.push((format!("ended, {status}"), count));
        }
        rows.extend([
            ("attempts executed".to_owned(), verdict.executed),
            (
                "executed more than once".to_owned(),
                verdict.executed_more_than_once,
            ),
            ("unknown outcome".to_owned(), verdict.unknown_outcome),
            ("  of them executed".to_owned(), verdict.unknown_executed),
            (
                "max replay, ms".to_owned(),
                self.max_start.as_millis() as u64,
            ),
            ("seconds".to_owned(), self.took.as_secs()),
        ]);
        let mut table = String::new();
        // Writing to a string does not fail.
        for (name, value) in rows {
            let _ = writeln!(table, "{name:<28}{value:>12}");
        }
        for (invariant, count, told) in verdict.violations.iter() {
            let _ = writeln!(table, "broken: {} {count} times", invariant.name());
            for what in told {
                let _ = writeln!(table, "    {what}");
            }
        }
        table
    }

    fn json(&self) -> Value {
        let verdict = &self.verdict;
        let kills: serde_json::Map<String, Value> = verdict
            .kills()
            .map(|(phase, count)| (phase.name().to_owned(), count.into()))
            .collect();
        let violations: Vec<Value> = verdict
            .violations
            .iter()
            .map(|(invariant, count, told)| {
                json!({ "invariant": invariant.name(), "count": count, "first": told })
            })
            .collect();
        let writes = self.writes.map(|writes| {
            json!({
                "flushes": writes.flushes,
                "dropped": writes.dropped,
                "torn": writes.torn,
                "kept": writes.kept,
            })
        });
        json!({
            "seed": self.seed,
            "cycles": self.cycles,
            "kills": kills,
            "writes": writes,
            "executors_killed": verdict.executors_killed,
            "accepted": verdict.accepted,
            "lost": verdict.violations.count(Invariant::NothingIsLost),
            "ended": verdict.ended,
            "executed": verdict.executed,
            "executed_more_than_once": verdict.executed_more_than_once,
            "unknown_outcome": verdict.unknown_outcome,
            "unknown_executed": verdict.unknown_executed,
            "max_replay_ms": self.max_start.as_millis() as u64,
            "seconds": self.took.as_secs_f64(),
            "violations": violations,
        })
    }
}
