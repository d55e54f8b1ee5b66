//! The executor process of a run: no-op functions that measure how late they start.

use std::{
    cell::RefCell,
    io::{BufRead, Write},
    sync::{Arc, Mutex},
};

use clap::Args;
use hdrhistogram::Histogram;
use pelton_client::{ClientOptions, Error, Executor, Trust};
use serde_json::json;

use crate::load::{function_name, histogram, now_ns, tenant_name};

/// What the process is told.
#[derive(Args, Clone, Debug)]
pub struct WorkerArgs {
    /// The server
    #[arg(long)]
    pub server: String,
    /// How to know it
    #[arg(long)]
    pub ca: String,
    /// The key
    #[arg(long)]
    pub key: Option<String>,
    /// Tenants, each with a connection of its own
    #[arg(long, default_value_t = 1)]
    pub tenants: usize,
    /// Connections of each tenant
    #[arg(long, default_value_t = 1)]
    pub connections: usize,
    /// Functions of each tenant
    #[arg(long, default_value_t = 1)]
    pub functions: usize,
    /// Slots of each function and connection
    #[arg(long)]
    pub slots: u32,
    /// Payloads begin with the time at which the task was to be submitted
    #[arg(long)]
    pub stamped: bool,
}

/// Registers, says `ready`, and answers `reset` and `report` on stdin until that ends.
pub async fn run(args: WorkerArgs) -> Result<(), Error> {
    let trust = Trust::parse(&args.ca)
        .ok_or_else(|| Error::Unreachable("--ca names no CA and no fingerprint".to_owned()))?;
    let measured: Arc<Mutex<(u64, Histogram<u64>)>> = Arc::new(Mutex::new((0, histogram())));
    let mut running = Vec::new();
    for tenant in 0..args.tenants {
        for _ in 0..args.connections {
            let mut options = ClientOptions::new(&args.server)
                .trust(trust.clone())
                .tenant(tenant_name(tenant));
            if let Some(key) = &args.key {
                options = options.key(key);
            }
            let mut executor = Executor::connect(options).await?;
            for function in 0..args.functions {
                let measured = Arc::clone(&measured);
                let stamped = args.stamped;
                let name = function_name(function);
                executor.function_sync(&name, args.slots, move |task, _result| {
                    if stamped {
                        started(&measured, task.payload);
                    }
                    Ok(())
                });
            }
            running.push(tokio::task::spawn_local(executor.run()));
        }
    }
    // Registration is answered before the first task comes; the run's warm-up covers the rest.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    say("ready");
    let (lines, mut line) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    while let Some(line) = line.recv().await {
        let mut measured = measured.lock().unwrap_or_else(|held| held.into_inner());
        match line.as_str() {
            "reset" => *measured = (0, histogram()),
            "report" => {
                let (count, histogram) = &*measured;
                let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
                say(&json!({
                    "count": count,
                    "p50_us": at(0.5),
                    "p99_us": at(0.99),
                    "p999_us": at(0.999),
                    "max_us": histogram.max() as f64 / 1000.0,
                    "percentiles": PERCENTILES.map(|p| json!([p, at(p / 100.0)])),
                })
                .to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

const PERCENTILES: [f64; 12] = [
    10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0,
];

fn started(measured: &Mutex<(u64, Histogram<u64>)>, payload: &[u8]) {
    let Some(intended) = payload.first_chunk() else {
        return;
    };
    let late_ns = now_ns().saturating_sub(u64::from_le_bytes(*intended));
    let mut measured = measured.lock().unwrap_or_else(|held| held.into_inner());
    measured.0 += 1;
    measured.1.saturating_record(late_ns);
}

fn say(line: &str) {
    thread_local! {
        static OUT: RefCell<std::io::Stdout> = RefCell::new(std::io::stdout());
    }
    OUT.with_borrow_mut(|out| {
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    });
}
