//! `pelton serve`: the engine, its edges, and an orderly end.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use pelton_core::limits::PAYLOAD_BYTES_DEFAULT;
use pelton_engine::{Engine, Options};
use pelton_net::quic::certificate::Certificate;
use serde_json::json;

use crate::{
    edge::{EdgeSettings, Edges},
    keys::{Keys, replace},
};

/// The file that tells local clients where the server is.
pub const STATE_FILE: &str = "server.json";
/// Time for what is in flight when the server ends.
const GRACE: Duration = Duration::from_secs(5);

/// Run a server
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Where the log lives
    #[arg(long, default_value = "pelton-data", value_name = "DIR")]
    pub data: PathBuf,
    /// Where clients and executors connect (QUIC, UDP); port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:7420", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Shards of a new data directory; an existing one keeps its own
    #[arg(long)]
    pub shards: Option<u16>,
    /// Edge threads
    #[arg(long)]
    pub edges: Option<usize>,
}

/// Serves until SIGINT or SIGTERM.
pub fn run(args: &ServeArgs) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pelton serve: {error}");
            ExitCode::from(8)
        }
    }
}

fn serve(args: &ServeArgs) -> Result<(), String> {
    let start = Instant::now();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shards = args
        .shards
        .unwrap_or_else(pelton_engine::engine::default_shards);
    // On few cores shards, edges and clients share them: the scheduler places them better than a fixed rule.
    let roomy = cores >= 4;
    let edges = args
        .edges
        .unwrap_or(if roomy { cores - cores / 2 } else { 1 });
    let options = Options {
        shards: Some(shards),
        pin: if roomy {
            (0..cores / 2).collect()
        } else {
            Vec::new()
        },
        spin: Duration::from_micros(if roomy { 20 } else { 0 }),
        ..Options::default()
    };
    let engine = Engine::open_with(&args.data, options).map_err(|error| error.to_string())?;
    let engine = Arc::new(engine);
    let keys = Arc::new(Keys::open(&args.data).map_err(|error| error.to_string())?);
    if keys.is_empty() && !args.listen.ip().is_loopback() {
        return Err(format!(
            "{} is reachable from other machines and there is no key yet: `pelton key create --data {}` makes one",
            args.listen,
            args.data.display()
        ));
    }
    let certificate = Arc::new(Certificate::load_or_make(&args.data).map_err(|e| e.to_string())?);
    let settings = EdgeSettings {
        listen: args.listen,
        edges,
        pin: if roomy {
            (cores / 2..cores).collect()
        } else {
            Vec::new()
        },
        payload_bytes_max: PAYLOAD_BYTES_DEFAULT,
        in_flight_max: 65_536,
        heartbeat: Duration::from_secs(5),
        certificate: Arc::clone(&certificate),
    };
    let running = Edges::start(Arc::clone(&engine), keys, settings).map_err(|e| e.to_string())?;
    let _state = State::write(&args.data, running.local_addr(), &certificate)?;
    let records: u64 = engine.reports().iter().map(|report| report.records).sum();
    println!(
        "listening on quic://{}, data {}, {} shards, {} edges, {} records read, ready in {} ms",
        running.local_addr(),
        args.data.display(),
        engine.shard_count(),
        edges,
        records,
        start.elapsed().as_millis()
    );
    wait_for_signal()?;
    let end = Instant::now();
    running.stop(GRACE);
    let closed = engine.close(GRACE);
    println!(
        "closed in {} ms{}",
        end.elapsed().as_millis(),
        if closed.complete {
            ""
        } else {
            "; a shard did not end in time: the log is as a crash leaves it"
        }
    );
    Ok(())
}

fn wait_for_signal() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    })
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
