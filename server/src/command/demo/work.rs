//! The executor process: the three functions, and a ledger with a line per execution.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufWriter, Read, Write},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use pelton_client::{Attempt, ClientOptions, Executor, RequestId, TaskError, Trust};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;

use crate::command::bench::local;

/// Slots of the functions that only compute.
const SLOTS: u32 = 64;
/// How often the ledger reaches its file.
const FLUSH: Duration = Duration::from_millis(20);
const GRACE: Duration = Duration::from_secs(2);

/// Who runs what.
pub const TENANTS: [(&str, &str); 3] = [
    ("acme", "digest"),
    ("globex", "wordcount"),
    ("noisy", "flaky"),
];

/// What the process is told.
#[derive(Args, Clone, Debug)]
pub struct ExecutorArgs {
    /// The server
    #[arg(long)]
    server: String,
    /// How to know it
    #[arg(long)]
    ca: String,
    /// Where executions are written down
    #[arg(long)]
    ledger: PathBuf,
    /// Slots of `flaky`
    #[arg(long)]
    slots: u32,
    /// How long `flaky` takes
    #[arg(long)]
    flaky_us: u64,
}

/// Executes until stdin ends.
pub fn run(args: ExecutorArgs) -> ExitCode {
    match local(execute(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("executor: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn execute(args: ExecutorArgs) -> Result<(), String> {
    let trust = Trust::parse(&args.ca).ok_or("--ca names no CA and no fingerprint")?;
    let file = File::create(&args.ledger)
        .map_err(|error| format!("{}: {error}", args.ledger.display()))?;
    let ledger = Ledger(Arc::new(Mutex::new(BufWriter::new(file))));
    let mut running = tokio::task::JoinSet::new();
    let mut handles = Vec::new();
    for (tenant, function) in TENANTS {
        let options = ClientOptions::new(&args.server)
            .trust(trust.clone())
            .tenant(tenant);
        let mut executor = Executor::connect(options)
            .await
            .map_err(|error| error.to_string())?;
        let flaky = function == "flaky";
        let slots = if flaky { args.slots } else { SLOTS };
        let pause = Duration::from_micros(args.flaky_us);
        let ledger = ledger.clone();
        executor.function(function, slots, move |task: Attempt| {
            let mut execution = ledger.begin(&task, function);
            async move {
                let result = match function {
                    "digest" => Ok(digest(task.payload())),
                    "wordcount" => Ok(wordcount(task.payload())),
                    _ => flaky_work(&task, pause).await,
                };
                execution.ended(result.is_ok());
                result
            }
        });
        handles.push(executor.handle());
        running.spawn_local(executor.run());
    }
    println!("ready");
    let (told, end) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = told.send(());
    });
    let mut flush = tokio::time::interval(FLUSH);
    tokio::pin!(end);
    loop {
        tokio::select! {
            _ = flush.tick() => ledger.flush(),
            _ = &mut end => break,
            Some(ended) = running.join_next() => {
                let ended = ended.map_err(|error| error.to_string())?;
                ended.map_err(|error| error.to_string())?;
            }
        }
    }
    for handle in &handles {
        handle.close(GRACE).await;
    }
    ledger.flush();
    Ok(())
}

/// SHA-256 in hex.
pub fn digest(bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// Lines, words and bytes, as `wc` counts them.
pub fn wordcount(bytes: &[u8]) -> String {
    let lines = bytes.iter().filter(|&&byte| byte == b'\n').count();
    let words = bytes
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    format!("{lines} {} {}", words.count(), bytes.len())
}

/// Whether the first attempt at a task of `flaky` fails.
pub fn fails_first(request: RequestId) -> bool {
    let mixed = (request.0 as u64 ^ (request.0 >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 33).is_multiple_of(3)
}

async fn flaky_work(task: &Attempt, pause: Duration) -> Result<String, TaskError> {
    tokio::time::sleep(pause).await;
    if task.attempt() == 1 && fails_first(task.request_id()) {
        return Err(TaskError::failed("what lies behind me did not answer"));
    }
    Ok(format!("done at attempt {}", task.attempt()))
}

/// Where executions are written down.
#[derive(Clone)]
struct Ledger(Arc<Mutex<BufWriter<File>>>);

impl Ledger {
    fn begin(&self, task: &Attempt, function: &'static str) -> Execution {
        Execution {
            ledger: self.clone(),
            request: task.request_id(),
            attempt: task.attempt(),
            function,
            start_ms: now_ms(),
            outcome: "dropped",
        }
    }

    fn flush(&self) {
        let _ = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush();
    }
}

/// One execution; written down when it is over, whichever way.
struct Execution {
    ledger: Ledger,
    request: RequestId,
    attempt: u16,
    function: &'static str,
    start_ms: u64,
    outcome: &'static str,
}

impl Execution {
    fn ended(&mut self, ok: bool) {
        self.outcome = if ok { "ok" } else { "failed" };
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        let mut file = self.ledger.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(
            file,
            "{} {} {} {} {} {}",
            self.request,
            self.attempt,
            self.start_ms,
            now_ms(),
            self.function,
            self.outcome
        );
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_functions_say_what_the_usual_tools_say() {
        assert_eq!(
            digest(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(wordcount(b"one two\nthree\n"), "2 3 14");
        assert_eq!(wordcount(b""), "0 0 0");
    }
}
