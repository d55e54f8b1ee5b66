//! An executor process: every function for every tenant, and a ledger with a line for the begin and the end of each
//! attempt.

use std::{
    io::Read,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Args;
use pelton_client::{Attempt, ClientOptions, Executor, RequestId, TaskError, Trust};
use tokio::{sync::oneshot, task::JoinSet};

use super::{
    history::{Event, History},
    plan::{Dice, FUNCTIONS, Id, TENANTS, failing_attempts, hash},
};

const KEEP_ALIVE: Duration = Duration::from_millis(50);
/// Time for what runs when the process is told to end.
const GRACE: Duration = Duration::from_secs(5);
/// How long a new executor tries to connect.
const CONNECT_MAX: Duration = Duration::from_secs(60);
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

#[derive(Args, Clone, Debug)]
pub struct WorkerArgs {
    /// The server
    #[arg(long)]
    server: String,
    /// How to know it
    #[arg(long)]
    trust: String,
    #[arg(long)]
    seed: u64,
    /// What this executor is called in its results
    #[arg(long)]
    name: String,
    /// Where its ledger is kept
    #[arg(long)]
    folder: PathBuf,
}

/// Executes until stdin ends.
pub fn run(args: &WorkerArgs) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(execute(args))
}

async fn execute(args: &WorkerArgs) -> Result<(), String> {
    let trust = Trust::parse(&args.trust).ok_or("--trust names no CA and no fingerprint")?;
    let path = args.folder.join(format!("executor-{}.ledger", args.name));
    let ledger = Arc::new(Ledger {
        name: args.name.clone(),
        seed: args.seed,
        results: AtomicU64::new(0),
        history: Mutex::new(History::create(&path).map_err(|error| error.to_string())?),
    });
    let (mut running, mut handles) = (JoinSet::new(), Vec::new());
    for tenant in TENANTS {
        let options = ClientOptions {
            keep_alive: KEEP_ALIVE,
            ..ClientOptions::new(&args.server)
                .trust(trust.clone())
                .tenant(tenant)
        };
        let mut executor = connect(options).await?;
        for function in &FUNCTIONS {
            let (ledger, name) = (ledger.clone(), function.name);
            executor.function(name, function.slots, move |task: Attempt| {
                attempt(ledger.clone(), name, task)
            });
        }
        handles.push(executor.handle());
        running.spawn(executor.run());
    }
    let (tell, mut told) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = tell.send(());
    });
    tokio::select! {
        _ = &mut told => {}
        Some(ended) = running.join_next() => {
            ended.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            return Err("an executor has ended by itself".into());
        }
    }
    for handle in &handles {
        handle.close(GRACE).await;
    }
    Ok(())
}

/// The first connection is made again here, since the server may be killed meanwhile; later ones are the client's business.
async fn connect(options: ClientOptions) -> Result<Executor, String> {
    let begun = Instant::now();
    loop {
        match Executor::connect(options.clone()).await {
            Ok(executor) => return Ok(executor),
            Err(error) if begun.elapsed() > CONNECT_MAX => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(CONNECT_PAUSE).await,
        }
    }
}

/// Where attempts are written down.
struct Ledger {
    name: String,
    seed: u64,
    /// Results that were made: each is different from every other.
    results: AtomicU64,
    history: Mutex<History>,
}

impl Ledger {
    fn note(&self, event: &Event<'_>) -> Result<(), String> {
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.note(event);
        history.flush().map_err(|error| error.to_string())
    }
}

/// An attempt that has begun; its end is written down whichever way it ends.
struct Begun {
    ledger: Arc<Ledger>,
    request: RequestId,
    attempt: u16,
    told: bool,
}

impl Begun {
    fn over(&mut self, failed: bool, result: Option<&str>) -> Result<(), String> {
        self.told = true;
        self.ledger.note(&Event::Over {
            request: self.request,
            attempt: self.attempt,
            failed,
            result,
        })
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.told {
            let _ = self.over(false, None);
        }
    }
}

async fn attempt(
    ledger: Arc<Ledger>,
    function: &'static str,
    task: Attempt,
) -> Result<Vec<u8>, TaskError> {
    let id = Id::parse(task.content_type())
        .ok_or_else(|| TaskError::failed("a task that nobody has handed in"))?;
    // A file that cannot be written makes the run worthless; the conductor sees the end of this process.
    let noted = ledger.note(&Event::Begun {
        id,
        request: task.request_id(),
        attempt: task.attempt(),
        function,
        bytes: task.payload().len() as u64,
        hash: hash(task.payload()),
    });
    if noted.is_err() {
        std::process::abort();
    }
    let mut begun = Begun {
        ledger: ledger.clone(),
        request: task.request_id(),
        attempt: task.attempt(),
        told: false,
    };
    let attempt = u64::from(task.attempt());
    let mut dice = Dice::of(&[ledger.seed, 4, u64::from(id.stream), id.number, attempt]);
    let work = match function {
        "slow" => Duration::from_millis(20 + dice.below(120)),
        "narrow" => Duration::from_millis(1 + dice.below(3)),
        _ => Duration::from_millis(dice.below(2)),
    };
    let ended = match work.is_zero() {
        true => Ok(()),
        false => tokio::select! {
            () = tokio::time::sleep(work) => Ok(()),
            () = task.cancelled() => Err(TaskError::Stopped),
        },
    };
    ended?;
    if task.attempt() <= failing_attempts(ledger.seed, id, function) {
        begun.over(true, None).map_err(TaskError::failed)?;
        return Err(TaskError::failed("as planned"));
    }
    let number = ledger.results.fetch_add(1, Ordering::Relaxed);
    let result = format!("{}.{number}", ledger.name);
    begun
        .over(false, Some(&result))
        .map_err(TaskError::failed)?;
    Ok(result.into_bytes())
}
