//! The backup that a running server takes, one at a time: begun by one query, followed by others, given up when nobody
//! follows it any more.

use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use pelton_core::error::Code;
use pelton_engine::{
    BackupError, BackupOptions, Engine,
    backup::{Backup, Copied},
};
use pelton_storage::copy::CopyError;
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// What a restored server needs of the data directory beside the engine's: the keys, and the certificate by which its
/// clients know it.
const FILES: [&str; 3] = ["keys.json", "quic-cert.pem", "quic-key.pem"];
/// A backup is given up when nobody has asked about it for so long.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(10);

/// How this program takes backups.
pub fn options() -> BackupOptions {
    BackupOptions {
        files: FILES.map(str::to_owned).into(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The backups of a server.
pub struct Backups {
    engine: Arc<Engine>,
    /// The last one.
    job: Mutex<Option<Arc<Job>>>,
}

struct Job {
    number: u64,
    state: Mutex<State>,
}

struct State {
    progress: Copied,
    /// When somebody has asked about it last.
    followed: Instant,
    cancelled: bool,
    ended: Option<Result<Value, (Code, String)>>,
}

type Refusal = (Code, String);

impl Backups {
    pub fn new(engine: Arc<Engine>) -> Backups {
        Backups {
            engine,
            job: Mutex::new(None),
        }
    }

    /// Begins a backup. Answers when the first of it is copied, or with the reason why there is none.
    pub async fn start(&self, path: &str) -> Result<Value, Refusal> {
        let path = PathBuf::from(path);
        let (begun, begins) = oneshot::channel();
        let job = {
            let mut last = lock(&self.job);
            let number = match &*last {
                Some(job) if lock(&job.state).ended.is_none() => {
                    return Err(refusal_of(&BackupError::Busy));
                }
                Some(job) => job.number + 1,
                None => 1,
            };
            let job = Arc::new(Job {
                number,
                state: Mutex::new(State {
                    progress: Copied::default(),
                    followed: Instant::now(),
                    cancelled: false,
                    ended: None,
                }),
            });
            *last = Some(Arc::clone(&job));
            job
        };
        let engine = Arc::clone(&self.engine);
        let taken = Arc::clone(&job);
        let thread = thread::Builder::new().name("pelton-backup-of".to_owned());
        let thread = thread.spawn(move || taken.take(&engine, &path, begun));
        if let Err(error) = thread {
            let refusal = (
                Code::Unavailable,
                format!("a thread for the backup: {error}"),
            );
            lock(&job.state).ended = Some(Err(refusal.clone()));
            return Err(refusal);
        }
        // Whoever takes it says at least that it has ended.
        let _ = begins.await;
        let state = lock(&job.state);
        match &state.ended {
            Some(Err(refusal)) => Err(refusal.clone()),
            Some(Ok(_)) | None => Ok(json!({
                "backup": job.number,
                "bytes_total": state.progress.bytes_total,
            })),
        }
    }

    /// How far a backup is. It goes on for a while from here on.
    pub fn status(&self, number: u64) -> Result<Value, Refusal> {
        let job = self.job(number)?;
        let mut state = lock(&job.state);
        state.followed = Instant::now();
        let Copied { bytes, bytes_total } = state.progress;
        let (name, result) = match &state.ended {
            None => ("running", &Value::Null),
            Some(Ok(result)) => ("done", result),
            Some(Err(refusal)) => return Err(refusal.clone()),
        };
        Ok(json!({
            "backup": number,
            "state": name,
            "bytes": bytes,
            "bytes_total": bytes_total,
            "result": result,
        }))
    }

    /// Ends a backup, if it has not ended.
    pub fn cancel(&self, number: u64) -> Result<Value, Refusal> {
        lock(&self.job(number)?.state).cancelled = true;
        Ok(json!({ "backup": number, "cancelled": true }))
    }

    fn job(&self, number: u64) -> Result<Arc<Job>, Refusal> {
        let job = lock(&self.job).clone();
        job.filter(|job| job.number == number).ok_or_else(|| {
            let text = "there is no such backup: the server has been started again, or another one was taken since";
            (Code::NotFound, text.to_owned())
        })
    }
}

impl Job {
    fn take(&self, engine: &Engine, path: &Path, begun: oneshot::Sender<()>) {
        let start = Instant::now();
        let mut begun = Some(begun);
        let mut progress = |progress: Copied| {
            let mut state = lock(&self.state);
            state.progress = progress;
            if let Some(begun) = begun.take() {
                let _ = begun.send(());
            }
            if state.cancelled || state.followed.elapsed() > FOLLOWED_WITHIN {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let taken = engine.backup_with(path, &options(), &mut progress);
        match &taken {
            Ok(backup) => tracing::info!(
                path = %path.display(),
                bytes = backup.bytes(),
                took_ms = start.elapsed().as_millis() as u64,
                "a backup was taken"
            ),
            Err(error) => tracing::warn!(path = %path.display(), %error, "no backup was taken"),
        }
        let ended = taken
            .map(|backup| describe(&backup, path, start.elapsed()))
            .map_err(|error| refusal_of(&error));
        lock(&self.state).ended = Some(ended);
        drop(begun);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a backup has, as data.
pub fn describe(backup: &Backup, path: &Path, took: Duration) -> Value {
    let mut sums = [0; 3];
    let segment_bytes = backup.manifest.segment_bytes;
    let shards = backup.shards.iter().enumerate().map(|(shard, copy)| {
        let folder = format!("{}/", backup.manifest.folder_name(shard as u16));
        let files = backup.files.iter();
        let bytes: u64 = files
            .filter(|file| file.name.starts_with(&folder))
            .map(|file| file.bytes)
            .sum();
        let segments = copy.segments(segment_bytes);
        let counts = copy.counts;
        for (sum, figure) in sums.iter_mut().zip([segments, counts.live, counts.tasks]) {
            *sum += figure;
        }
        json!({
            "shard": shard,
            "segments": segments,
            "bytes": bytes,
            "live_tasks": counts.live,
            "tasks": counts.tasks,
            "records": counts.records,
            "batches": counts.batches,
            "end": copy.end.0,
        })
    });
    let shards: Vec<Value> = shards.collect();
    json!({
        "path": path.display().to_string(),
        "taken_ms": backup.taken_ms,
        "program": backup.program,
        "shards": shards,
        "segments": sums[0],
        "live_tasks": sums[1],
        "tasks": sums[2],
        "history_rows": backup.history_rows,
        "files": backup.files.len(),
        "bytes": backup.bytes(),
        "seconds": took.as_millis() as f64 / 1e3,
    })
}

fn refusal_of(error: &BackupError) -> Refusal {
    let code = match error {
        BackupError::Target { .. } => Code::InvalidArgument,
        BackupError::Room { .. } | BackupError::Space { .. } => Code::ResourceExhausted,
        BackupError::Busy
        | BackupError::Stopped
        | BackupError::Quarantined(_)
        | BackupError::NoData { .. } => Code::FailedPrecondition,
        BackupError::Closing | BackupError::Shard { .. } => Code::Unavailable,
        BackupError::Copy {
            error: CopyError::Io { error, .. },
            ..
        } if error.kind() == io::ErrorKind::StorageFull => Code::ResourceExhausted,
        BackupError::Copy { .. }
        | BackupError::Directory(_)
        | BackupError::History(_)
        | BackupError::HistoryFails => Code::Internal,
    };
    (code, error.to_string())
}
