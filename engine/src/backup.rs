//! Backups: a copy of the data directory as a crash at one moment would leave it, taken while the shards serve.
//!
//! In this order: every shard holds its log, so that nothing in it goes; it is settled what of the history is copied; then
//! each log's end is taken, shard 0's last. So what is not in the copy of the history is in the copies of the logs, and
//! nothing is in it that ended behind their ends. The copying itself, on a thread of its own, comes after that. `BACKUP` is
//! written last.

use std::{
    cell::RefCell,
    fmt, fs, io,
    ops::ControlFlow,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pelton_core::id::{Lsn, ShardId};
use pelton_history::{Store, StoreError};
pub use pelton_storage::backup::Backup;
use pelton_storage::{
    backup::{CopiedFile, ShardCopy},
    copy::{CopyError, LogCopy, Sink, judge, make_folder, read_through},
    file::FileDevice,
    manifest::{
        DataDirectory, DirectoryError, MANIFEST_NAME, Manifest, flush_directory, has_begun,
        read_manifest,
    },
    recover::expect_segments,
};

use crate::{
    engine::{Engine, HISTORY_FOLDER, Shared, lock},
    hold::{Holds, Lost},
    quarantine::Quarantine,
    shard_loop::{free_bytes, room_to_hold},
};

/// The history in a backup.
pub(crate) const HISTORY_FILE: &str = "history/rows.redb";
/// What the file system needs beside the bytes of the files.
const ROOM_SPARE_BYTES: u64 = 1 << 20;
/// The copying thread rests as long as it has worked, but not longer: a slow disk is not made slower.
const REST_MAX: Duration = Duration::from_millis(20);
/// How nice the copying thread is to the shards and edges.
const NICE: i32 = 10;

/// How far a backup or a restore is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Copied {
    /// Bytes that are done.
    pub bytes: u64,
    /// Bytes that there are.
    pub bytes_total: u64,
}

/// Hears of the progress; may end the work.
pub type OnCopied<'p> = dyn FnMut(Copied) -> ControlFlow<()> + Send + 'p;

/// How a backup is taken.
#[derive(Clone, Debug, Default)]
pub struct BackupOptions {
    /// Files of the data directory that are copied where they exist, beside what the engine has there.
    pub files: Vec<String>,
    /// The version that the backup names as the one that took it.
    pub program: String,
}

/// Why there is no backup. What had been copied is removed again.
#[derive(Debug)]
pub enum BackupError {
    /// The place for it will not do.
    Target { path: PathBuf, what: String },
    /// There is no room for it.
    Room {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    /// One is being taken.
    Busy,
    /// The engine is closing.
    Closing,
    /// Whoever wanted it has ended it.
    Stopped,
    /// A shard is not served: its log would be missing.
    Quarantined(Box<Quarantine>),
    /// The disk of the logs has run low, and serving goes before.
    Space { free: u64 },
    /// A shard has ended, or does not answer.
    Shard { shard: ShardId },
    /// There is no data directory.
    NoData { path: PathBuf },
    /// The data directory, or `BACKUP`.
    Directory(DirectoryError),
    /// A log, or a file.
    Copy { place: String, error: CopyError },
    /// The history.
    History(StoreError),
    /// The history was closed after an error of its own.
    HistoryFails,
}

impl fmt::Display for BackupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackupError::Target { path, what } => write!(f, "{}: {what}", path.display()),
            BackupError::Room { path, needed, free } => write!(
                f,
                "{} has no room for the backup: it needs {needed} bytes, and {free} are free there",
                path.display()
            ),
            BackupError::Busy => f.write_str("a backup is being taken: wait for its end"),
            BackupError::Closing => f.write_str("the engine is closing"),
            BackupError::Stopped => f.write_str("the backup was stopped"),
            BackupError::Quarantined(quarantine) => {
                write!(f, "a shard would be missing in the backup: {quarantine}")
            }
            BackupError::Space { free } => write!(
                f,
                "the backup was given up so that submits go on: {free} bytes are free on the disk of the logs, which \
                 keep more than they need while they are copied; make room, or take the backup to another disk"
            ),
            BackupError::Shard { shard } => {
                write!(f, "shard {} has ended or does not answer", shard.0)
            }
            BackupError::NoData { path } => write!(
                f,
                "{} is no data directory: it has no MANIFEST",
                path.display()
            ),
            BackupError::Directory(error) => error.fmt(f),
            BackupError::Copy { place, error } => write!(f, "{place}{error}"),
            BackupError::History(error) => error.fmt(f),
            BackupError::HistoryFails => {
                f.write_str("the history has failed: the server's log says why")
            }
        }
    }
}

impl std::error::Error for BackupError {}

impl From<(ShardId, Lost)> for BackupError {
    fn from((shard, lost): (ShardId, Lost)) -> BackupError {
        match lost {
            Lost::Space { free } => BackupError::Space { free },
            Lost::Ended => BackupError::Shard { shard },
        }
    }
}

impl BackupError {
    fn of_file(error: CopyError) -> BackupError {
        match error {
            CopyError::Stopped => BackupError::Stopped,
            CopyError::Log(_) | CopyError::Io { .. } => BackupError::Copy {
                place: String::new(),
                error,
            },
        }
    }

    fn of_log(shard: u16, error: CopyError) -> BackupError {
        match error {
            CopyError::Stopped => BackupError::Stopped,
            CopyError::Log(_) | CopyError::Io { .. } => BackupError::Copy {
                place: format!("shard {shard}: "),
                error,
            },
        }
    }
}

/// That there is one backup at a time, and none when the engine is closed. Owned by the engine.
#[derive(Debug, Default)]
pub(crate) struct OneBackup {
    state: Mutex<OneState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct OneState {
    running: bool,
    closing: bool,
}

impl OneBackup {
    fn begin(&self) -> Result<One<'_>, BackupError> {
        let mut state = lock(&self.state);
        if state.closing {
            return Err(BackupError::Closing);
        }
        if state.running {
            return Err(BackupError::Busy);
        }
        state.running = true;
        Ok(One(self))
    }

    fn is_closing(&self) -> bool {
        lock(&self.state).closing
    }

    /// Ends the one that is being taken, and waits for its end, but not for ever.
    pub(crate) fn close(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        let mut state = lock(&self.state);
        state.closing = true;
        while state.running {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = match self.ended.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// The backup that is being taken.
struct One<'o>(&'o OneBackup);

impl Drop for One<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).running = false;
        self.0.ended.notify_all();
    }
}

impl Engine {
    /// Takes a backup into this folder, which must be new or empty, and returns when it is on the disk. Everything that
    /// was answered for before the call is in it.
    pub fn backup(&self, target: impl AsRef<Path>) -> Result<Backup, BackupError> {
        let options = BackupOptions {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            ..BackupOptions::default()
        };
        self.backup_with(target, &options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Engine::backup`], and tells its progress, which may end it. The copying runs on a thread of its own.
    pub fn backup_with(
        &self,
        target: impl AsRef<Path>,
        options: &BackupOptions,
        progress: &mut OnCopied<'_>,
    ) -> Result<Backup, BackupError> {
        let _one = self.backups.begin()?;
        if let Some(quarantine) = self.quarantined().next() {
            return Err(BackupError::Quarantined(Box::new(quarantine.clone())));
        }
        let data = self.data().path();
        let target = Target::prepare(target.as_ref(), data)?;
        let manifest = self.data().manifest();
        let manifest = manifest.expect("a running engine's directory has a manifest");
        let room = room_to_hold(self.options().space_bytes_min, manifest.segment_bytes);
        let taking = Taking {
            data,
            manifest,
            options,
            target: &target,
            source: Source::Serving(Serving {
                shared: &self.shared,
                backups: &self.backups,
                room,
            }),
        };
        let backup = thread::scope(|scope| {
            let copying = thread::Builder::new()
                .name("pelton-backup".to_owned())
                .spawn_scoped(scope, || {
                    be_nice();
                    taking.run(progress)
                });
            let copying =
                copying.map_err(|error| io_failed("start a thread for", &target.path, error))?;
            match copying.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        target.keep_if(backup)
    }
}

/// Takes a backup of a directory that nobody uses, which stays locked meanwhile.
pub fn backup_offline(
    data: &Path,
    target: &Path,
    options: &BackupOptions,
    progress: &mut OnCopied<'_>,
) -> Result<Backup, BackupError> {
    let none = || BackupError::NoData {
        path: data.to_owned(),
    };
    read_manifest(data)
        .map_err(BackupError::Directory)?
        .ok_or_else(none)?;
    let directory = DataDirectory::open(data).map_err(BackupError::Directory)?;
    let manifest = directory.manifest().ok_or_else(none)?;
    let target = Target::prepare(target, data)?;
    let taking = Taking {
        data,
        manifest,
        options,
        target: &target,
        source: Source::Unused,
    };
    let backup = taking.run(progress);
    target.keep_if(backup)
}

/// The folder of a backup.
struct Target {
    path: PathBuf,
    /// It was not there before.
    made: bool,
}

impl Target {
    fn prepare(path: &Path, data: &Path) -> Result<Target, BackupError> {
        let refused = |what: String| BackupError::Target {
            path: path.to_owned(),
            what,
        };
        if !path.is_absolute() {
            return Err(refused(
                "a backup's folder is named by an absolute path".to_owned(),
            ));
        }
        let made = !path.exists();
        if !made && !is_empty(path).map_err(|error| refused(error.to_string()))? {
            return Err(refused(
                "it is not empty: a backup goes into a folder of its own".to_owned(),
            ));
        }
        let real = real_path(path).map_err(|error| refused(error.to_string()))?;
        let data = fs::canonicalize(data).map_err(|error| refused(error.to_string()))?;
        if real.starts_with(&data) {
            return Err(refused(format!(
                "it is inside the data directory {}, which a backup is to outlive",
                data.display()
            )));
        }
        make_folder(path).map_err(|error| refused(error.to_string()))?;
        Ok(Target {
            path: path.to_owned(),
            made,
        })
    }

    /// Without a backup nothing is left of it.
    fn keep_if(self, backup: Result<Backup, BackupError>) -> Result<Backup, BackupError> {
        if backup.is_err() {
            empty(&self.path);
            if self.made {
                let _ = fs::remove_dir(&self.path);
            }
        }
        backup
    }
}

/// Where a path that may not be there yet leads to.
pub(crate) fn real_path(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let mut behind = PathBuf::new();
    for known in path.ancestors() {
        match fs::canonicalize(known) {
            Ok(real) => return Ok(real.join(behind)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => {
                let name = known.file_name().ok_or(io::ErrorKind::InvalidInput)?;
                behind = match behind.as_os_str().is_empty() {
                    true => PathBuf::from(name),
                    false => Path::new(name).join(behind),
                };
            }
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// True for a folder with nothing in it, but for what a new file system has of itself.
pub(crate) fn is_empty(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        if entry?.file_name() != "lost+found" {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes what was put into a folder that was empty; last what says that it is to be let alone.
pub(crate) fn empty(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut entries: Vec<_> = entries
        .filter(|entry| entry.file_name() != "lost+found")
        .collect();
    entries.sort_by_key(|entry| entry.file_name() == MANIFEST_NAME);
    for entry in entries {
        let path = entry.path();
        let _ = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => fs::remove_dir_all(path),
            false => fs::remove_file(path),
        };
    }
}

/// What is copied from.
enum Source<'s> {
    /// The directory of a running engine.
    Serving(Serving<'s>),
    /// A directory that is locked.
    Unused,
}

#[derive(Clone, Copy)]
struct Serving<'s> {
    shared: &'s Arc<Shared>,
    backups: &'s OneBackup,
    /// Bytes that must stay free on the disk of its logs.
    room: u64,
}

/// A backup on its way.
struct Taking<'t> {
    data: &'t Path,
    manifest: Manifest,
    options: &'t BackupOptions,
    target: &'t Target,
    source: Source<'t>,
}

impl Taking<'_> {
    fn run(&self, progress: &mut OnCopied<'_>) -> Result<Backup, BackupError> {
        match &self.source {
            Source::Serving(serving) => {
                let holds = Holds::take(serving.shared)?;
                let history = serving.shared.history.get();
                let store = history.map(|history| history.store());
                self.copy(store, Some((*serving, holds)), progress)
            }
            Source::Unused => {
                let folder = self.data.join(HISTORY_FOLDER);
                let store = match folder.is_dir() {
                    true => Some(Store::open(&folder, self.manifest.log_id)),
                    false => None,
                };
                let store = store.transpose().map_err(BackupError::History)?;
                self.copy(store.as_ref(), None, progress)
            }
        }
    }

    fn copy(
        &self,
        store: Option<&Store>,
        held: Option<(Serving<'_>, Holds)>,
        progress: &mut OnCopied<'_>,
    ) -> Result<Backup, BackupError> {
        let (serving, holds) = held.unzip();
        let meter = RefCell::new(Meter {
            progress,
            serving,
            holds,
            store,
            data: self.data,
            done: Copied::default(),
            since: Instant::now(),
            failed: None,
        });
        let (logs, history_rows) = match store {
            None => (self.copy_logs(&meter, 0)?, None),
            Some(store) => {
                let path = self.target.path.join(HISTORY_FILE);
                let folder = path.parent().expect("the history has a folder");
                make_folder(folder).map_err(|error| io_failed("make", folder, error))?;
                let bytes = store.file_bytes().map_err(BackupError::History)?;
                let mut logs = None;
                let settled = || match logs.insert(self.copy_logs(&meter, bytes)) {
                    Ok(_) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                };
                let rows = store
                    .copy(&path, settled, &mut |bytes| meter.borrow_mut().pass(bytes))
                    .map_err(BackupError::History)?;
                let logs = logs.expect("it was settled what is copied")?;
                let rows = rows.ok_or_else(|| meter.borrow_mut().why())?;
                (logs, Some(rows))
            }
        };
        let (shards, mut files) = logs;
        if history_rows.is_some() {
            let path = self.target.path.join(HISTORY_FILE);
            let file = read_through(&path, HISTORY_FILE.to_owned(), &mut |_| Ok(()));
            files.push(file.map_err(BackupError::of_file)?);
        }
        for name in &self.options.files {
            files.extend(self.copy_beside(name)?);
        }
        for shard in 0..self.manifest.shards {
            // That of a log without a segment has no file.
            let folder = self.manifest.folder(&self.target.path, shard);
            make_folder(&folder).map_err(|error| io_failed("make", &folder, error))?;
            flush_directory(&folder).map_err(BackupError::Directory)?;
        }
        if history_rows.is_some() {
            let folder = self.target.path.join(HISTORY_FOLDER);
            flush_directory(&folder).map_err(BackupError::Directory)?;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let backup = Backup {
            manifest: self.manifest,
            program: self.options.program.clone(),
            taken_ms: since.map_or(0, |since| since.as_millis() as u64),
            shards,
            history_rows,
            files,
        };
        backup
            .write(&self.target.path)
            .map_err(BackupError::Directory)?;
        if let Some(parent) = self.target.path.parent() {
            flush_directory(parent).map_err(BackupError::Directory)?;
        }
        meter.into_inner().end();
        Ok(backup)
    }

    /// Settles where the logs end, and copies them up to there; the history, of so many bytes, is copied after that. The
    /// logs are let go when they are copied.
    fn copy_logs(
        &self,
        meter: &RefCell<Meter<'_, '_>>,
        history_bytes: u64,
    ) -> Result<Logs, BackupError> {
        let held = meter.borrow().ends()?;
        let ends = match held {
            Some(ends) => ends,
            None => self.judge_logs(meter)?,
        };
        let mut logs = Vec::with_capacity(ends.len());
        for (shard, (retired, end)) in ends.into_iter().enumerate() {
            let shard = shard as u16;
            let (folder, options) = (
                self.manifest.folder(self.data, shard),
                self.manifest.log(shard),
            );
            let log = LogCopy::new(folder, options, retired, end);
            logs.push(log.map_err(|error| BackupError::of_log(shard, error))?);
        }
        let bytes = history_bytes + logs.iter().map(LogCopy::bytes).sum::<u64>();
        self.make_sure_of_room(bytes)?;
        meter.borrow_mut().done.bytes_total += bytes;
        let (mut shards, mut files) = (Vec::new(), Vec::new());
        for (shard, log) in logs.iter().enumerate() {
            let copied = log.copy(&self.manifest, &self.target.path, &mut |bytes| {
                meter.borrow_mut().pass(bytes)
            });
            let (copy, copied) = copied.map_err(|error| match error {
                CopyError::Stopped => meter.borrow_mut().why(),
                CopyError::Log(_) | CopyError::Io { .. } => {
                    BackupError::of_log(shard as u16, error)
                }
            })?;
            shards.push(copy);
            files.extend(copied);
        }
        meter.borrow_mut().holds = None;
        Ok((shards, files))
    }

    /// Of each log that nobody writes: what its last batch says of what is dead, and where it ends.
    fn judge_logs(&self, meter: &RefCell<Meter<'_, '_>>) -> Result<Vec<(Lsn, Lsn)>, BackupError> {
        let mut ends = Vec::new();
        for shard in 0..self.manifest.shards {
            let folder = self.manifest.folder(self.data, shard);
            if has_begun(self.data) {
                expect_segments(&mut FileDevice::new(&folder))
                    .map_err(|error| BackupError::of_log(shard, error.into()))?;
            }
            let judged = judge(&folder, self.manifest.log(shard), &mut |_| {
                meter.borrow_mut().pass(0)
            });
            let judged = judged.map_err(|error| match error {
                CopyError::Stopped => meter.borrow_mut().why(),
                CopyError::Log(_) | CopyError::Io { .. } => BackupError::of_log(shard, error),
            })?;
            ends.push((judged.retired, judged.end));
        }
        Ok(ends)
    }

    fn make_sure_of_room(&self, bytes: u64) -> Result<(), BackupError> {
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let mut needed = bytes + ROOM_SPARE_BYTES;
        if let Source::Serving(Serving { room, .. }) = self.source
            && device(&self.target.path) == device(self.data)
        {
            needed += room;
        }
        let free = free_bytes(&self.target.path).unwrap_or(u64::MAX);
        if free < needed {
            let path = self.target.path.clone();
            return Err(BackupError::Room { path, needed, free });
        }
        Ok(())
    }

    /// Copies a file of the data directory that is replaced as a whole, if it is there.
    fn copy_beside(&self, name: &str) -> Result<Option<CopiedFile>, BackupError> {
        let path = self.data.join(name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_failed("read", &path, error)),
        };
        let sink = Sink::create(&self.target.path.join(name));
        let written = sink.and_then(|mut sink| {
            sink.write(&bytes)?;
            sink.finish(name.to_owned())
        });
        written.map(Some).map_err(BackupError::of_file)
    }
}

/// What was copied of the logs.
type Logs = (Vec<ShardCopy>, Vec<CopiedFile>);

/// Counts what is copied, tells it, looks whether the backup is still to be taken, and rests.
struct Meter<'m, 'p> {
    progress: &'m mut OnCopied<'p>,
    serving: Option<Serving<'m>>,
    holds: Option<Holds>,
    store: Option<&'m Store>,
    data: &'m Path,
    done: Copied,
    /// The last rest's end.
    since: Instant,
    /// Why it is over.
    failed: Option<BackupError>,
}

impl Meter<'_, '_> {
    /// Where the held logs end; `None` where none is held.
    fn ends(&self) -> Result<Option<Vec<(Lsn, Lsn)>>, BackupError> {
        let ends = self.holds.as_ref().map(Holds::stand);
        ends.transpose().map_err(BackupError::from)
    }

    fn pass(&mut self, bytes: u64) -> ControlFlow<()> {
        self.done.bytes = (self.done.bytes + bytes).min(self.done.bytes_total);
        if let Err(error) = self.look() {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        if self.serving.is_some() {
            thread::sleep(self.since.elapsed().min(REST_MAX));
            self.since = Instant::now();
        }
        ControlFlow::Continue(())
    }

    fn look(&mut self) -> Result<(), BackupError> {
        if (self.progress)(self.done).is_break() {
            return Err(BackupError::Stopped);
        }
        let Some(serving) = self.serving else {
            return Ok(());
        };
        if serving.backups.is_closing() {
            return Err(BackupError::Closing);
        }
        if self.store.is_some_and(Store::is_closing) {
            return Err(BackupError::HistoryFails);
        }
        self.ends()?;
        match free_bytes(self.data) {
            Some(free) if free < serving.room => Err(BackupError::Space { free }),
            Some(_) | None => Ok(()),
        }
    }

    fn why(&mut self) -> BackupError {
        // Where nobody has said why, the history was closed.
        self.failed.take().unwrap_or(BackupError::HistoryFails)
    }

    fn end(mut self) {
        self.done.bytes = self.done.bytes_total;
        let _ = (self.progress)(self.done);
    }
}

/// The thread gets what others leave.
fn be_nice() {
    // SAFETY: the call takes numbers alone; 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "the backup's thread keeps its priority");
    }
}

fn io_failed(what: &str, path: &Path, error: io::Error) -> BackupError {
    BackupError::Copy {
        place: String::new(),
        error: CopyError::Io {
            what: format!("{what} {}", path.display()),
            error,
        },
    }
}
