//! `pelton serve`: the engine, its edges, and an orderly end.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use pelton_engine::{Closed, Engine, Options, Placed, Progress, Quarantine};
use pelton_net::quic::certificate::Certificate;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    backup::Backups,
    command::{
        doctor::check_before_serving,
        exit::{Exit, Failure},
        starting::Starting,
    },
    config::{Config, Layer},
    edge::{EdgeSettings, Edges},
    keys::{Keys, replace},
};

/// The file that tells local clients where the server is.
pub const STATE_FILE: &str = "server.json";
/// How long shards and edges look for work, at most, before they sleep.
const LINGER: Duration = Duration::from_micros(200);
/// Time for what is in flight when the server ends.
const GRACE: Duration = Duration::from_secs(5);

/// Run a server
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Where the log lives [default: pelton-data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where clients and executors connect (QUIC, UDP); port 0 takes a free one [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Shards; an existing data directory with another number has its tasks placed on so many [default: those of the
    /// directory, half the cores for a new one]
    #[arg(long, value_name = "N")]
    shards: Option<u16>,
    /// Edge threads [default: the other half]
    #[arg(long, value_name = "N")]
    edges: Option<usize>,
}

impl ServeArgs {
    /// What the flags say of the configuration.
    pub fn layer(&self) -> Layer {
        let mut layer = Layer::default();
        layer.server.data = self.data.clone();
        layer.server.listen = self.listen;
        layer.server.shards = self.shards;
        layer.server.edges = self.edges;
        layer
    }
}

/// Serves until SIGINT or SIGTERM.
pub fn run(config: &Config) -> Result<Exit, Failure> {
    check_before_serving(config)?;
    serve(config).map_err(|error| Failure::new(Exit::Unfit, error))?;
    Ok(Exit::Ok)
}

fn serve(config: &Config) -> Result<(), String> {
    let data = &config.data.value;
    let listen = config.listen.value;
    let start = Instant::now();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // On few cores shards, edges and clients share them: the scheduler places them better than a fixed rule.
    let roomy = cores >= 4;
    let edges = config
        .edges
        .value
        .unwrap_or(if roomy { cores - cores / 2 } else { 1 });
    let progress = Arc::new(Progress::default());
    let options = Options {
        shards: config.shards.value,
        pin: if roomy {
            (0..cores / 2).collect()
        } else {
            Vec::new()
        },
        linger: LINGER,
        segment_bytes: config.segment_bytes.value,
        payload_bytes_max: config.payload_bytes_max.value,
        space_bytes_min: config.space_bytes_min.value,
        finished_max: config.finished_max.value,
        finished_bytes_max: config.finished_bytes_max.value,
        history_retention: Duration::from_secs(config.history_retention_s.value),
        history_bytes_max: config.history_bytes_max.value,
        history_lag_max: config.history_lag_max.value,
        history_defer_max: config.history_defer_max.value,
        lease: Duration::from_millis(config.lease_ms.value),
        progress: Arc::clone(&progress),
    };
    let mut signals = Signals::catch().map_err(|error| error.to_string())?;
    let shown = Starting::show(progress);
    let engine = Engine::open_with(data, options).map_err(|error| error.to_string())?;
    drop(shown);
    let engine = Arc::new(engine);
    let keys = Arc::new(Keys::open(data).map_err(|error| error.to_string())?);
    if keys.is_empty() && !listen.ip().is_loopback() {
        return Err(format!(
            "{} is reachable from other machines and there is no key yet: `pelton key create --data {}` makes one",
            listen,
            data.display()
        ));
    }
    let certificate = Arc::new(Certificate::load_or_make(data).map_err(|e| e.to_string())?);
    let settings = EdgeSettings {
        listen,
        edges,
        pin: if roomy {
            (cores / 2..cores).collect()
        } else {
            Vec::new()
        },
        payload_bytes_max: config.payload_bytes_max.value,
        in_flight_max: config.in_flight_max.value,
        heartbeat: Duration::from_millis(config.heartbeat_ms.value),
        linger: LINGER,
        certificate: Arc::clone(&certificate),
        backups: Arc::new(Backups::new(Arc::clone(&engine))),
    };
    let running = Edges::start(Arc::clone(&engine), keys, settings).map_err(|e| e.to_string())?;
    let _state = State::write(data, running.local_addr(), &certificate)?;
    let records: u64 = engine.reports().iter().map(|report| report.records).sum();
    let quarantined: Vec<&Quarantine> = engine.quarantined().collect();
    let mut said = format!(
        "listening on quic://{}, data {}, {} shards{}, {} edges, {} records read, ready in {} ms\n",
        running.local_addr(),
        data.display(),
        engine.shard_count(),
        match quarantined.len() {
            0 => String::new(),
            count => format!(" ({count} of them quarantined: see below)"),
        },
        edges,
        records,
        start.elapsed().as_millis()
    );
    if let Some(placed) = engine.placed() {
        said += &format!("{}\n", placed_line(&placed));
    }
    for quarantine in &quarantined {
        said += &format!("QUARANTINED, the other shards serve: {quarantine}\n");
    }
    print!("{said}");
    signals.wait();
    let end = Instant::now();
    running.stop(GRACE);
    let closed = engine.close(GRACE);
    for quarantine in &quarantined {
        println!("was not served: {quarantine}");
    }
    for (shard, why) in &closed.failed {
        println!("the log of shard {} had failed: {why}", shard.0);
    }
    println!("{}", closing_line(end.elapsed(), &closed));
    Ok(())
}

/// What became of the tasks of another number of shards.
fn placed_line(placed: &Placed) -> String {
    let names = match placed.names {
        0 => String::new(),
        names => format!(" and {names} names of earlier ones"),
    };
    format!(
        "placed {} tasks{names} of {} shards on {}: {} bytes in {} ms",
        placed.tasks,
        placed.from,
        placed.to,
        placed.bytes,
        placed.took.as_millis()
    )
}

/// What the server says last: nothing that runs is interrupted by its end.
fn closing_line(took: Duration, closed: &Closed) -> String {
    let running = match closed.running {
        0 => "no task is left running".to_owned(),
        1 => "1 task is left running with its executor".to_owned(),
        many => format!("{many} tasks are left running with their executors"),
    };
    let late = if closed.complete {
        ""
    } else {
        "; a shard did not end in time: the log is as a crash leaves it"
    };
    format!("closed in {} ms, {running}{late}", took.as_millis())
}

/// SIGINT and SIGTERM, caught from the moment this is made.
struct Signals {
    runtime: tokio::runtime::Runtime,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn catch() -> io::Result<Signals> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        drop(entered);
        Ok(Signals {
            runtime,
            interrupt,
            terminate,
        })
    }

    fn wait(&mut self) {
        let (interrupt, terminate) = (&mut self.interrupt, &mut self.terminate);
        self.runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
    }
}

/// The state file, removed when the server ends in order.
struct State(PathBuf);

impl State {
    fn write(data: &Path, address: SocketAddr, certificate: &Certificate) -> Result<State, String> {
        let state = json!({
            "address": address.to_string(),
            "fingerprint": certificate.fingerprint(),
            "pid": std::process::id(),
        });
        replace(data, STATE_FILE, state.to_string().as_bytes())
            .map_err(|error| format!("{}: {error}", data.join(STATE_FILE).display()))?;
        Ok(State(data.join(STATE_FILE)))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placing_says_what_it_did() {
        let placed = Placed {
            from: 3,
            to: 5,
            tasks: 7,
            names: 2,
            bytes: 4096,
            took: Duration::from_millis(9),
        };
        assert_eq!(
            placed_line(&placed),
            "placed 7 tasks and 2 names of earlier ones of 3 shards on 5: 4096 bytes in 9 ms"
        );
    }

    #[test]
    fn the_closing_line_says_what_is_left_running_and_whether_it_was_in_time() {
        let line = |running, complete| {
            let took = Duration::from_millis(12);
            closing_line(
                took,
                &Closed {
                    complete,
                    took,
                    running,
                    failed: Vec::new(),
                },
            )
        };
        assert_eq!(line(0, true), "closed in 12 ms, no task is left running");
        assert_eq!(
            line(1, true),
            "closed in 12 ms, 1 task is left running with its executor"
        );
        assert_eq!(
            line(3, false),
            "closed in 12 ms, 3 tasks are left running with their executors; a shard did not end in time: the log is as a crash leaves it"
        );
    }
}
