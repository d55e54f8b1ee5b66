//! Opening and closing an engine: the data directory, one thread per shard, and what they share.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use glommio::{LocalExecutorBuilder, Placement};
use pelton_core::{
    config::{Change, Directory},
    event::Control,
    id::{Lsn, ShardId},
    limits::{
        EDGE_COUNT_MAX, FINISHED_BYTES_MAX_DEFAULT, FINISHED_MAX_DEFAULT,
        HISTORY_BYTES_MAX_DEFAULT, HISTORY_DEFER_MAX_DEFAULT, HISTORY_LAG_MAX_DEFAULT,
        HISTORY_RETENTION_MS_DEFAULT, PAYLOAD_BYTES_DEFAULT, SEGMENT_BYTES_DEFAULT,
        SHARD_COUNT_MAX,
    },
    shard::Options as CoreOptions,
};
use pelton_history::StoreError;
use pelton_storage::{
    device::DeviceError,
    manifest::{DIRECTORY_VERSION, DataDirectory, DirectoryError, Manifest, has_begun},
    recover::Report,
};

use crate::{
    backup::OneBackup,
    edge::Edge,
    embedded::Embedded,
    history::{History, HistoryOptions, Writer},
    hold::HoldPlace,
    inbox::{Outbox, ShardInbox},
    place::{Placed, PlacingError, clear, place},
    progress::Progress,
    quarantine::{Quarantine, stand_in},
    routes::{RoutePointer, Routes},
    shard_loop::{Begin, Gone, Setup, ShardLoop},
};

/// The folder of the history in the data directory.
pub(crate) const HISTORY_FOLDER: &str = "history";
/// Memory that glommio registers with the kernel for direct I/O of its own, per shard: the log has its own.
const GLOMMIO_IO_BYTES: usize = 64 << 10;

/// How an engine is opened. The defaults suit a machine that it has to itself.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shards. `None` for those that an existing data directory has, and in a new one for half the cores, at least one. Where
    /// an existing directory has another number its tasks are placed on so many: see [`Engine::placed`].
    pub shards: Option<u16>,
    /// Cores to pin the shards to, in turn; empty to leave them to the scheduler.
    pub pin: Vec<usize>,
    /// How long a shard looks for work, at most, before it sleeps; zero to sleep at once. It yields its core meanwhile.
    pub linger: Duration,
    /// Bytes of a segment of a new directory.
    pub segment_bytes: u64,
    /// Largest payload and result.
    pub payload_bytes_max: usize,
    /// Free bytes of the file system below which submits are refused.
    pub space_bytes_min: u64,
    /// Finished tasks that each shard keeps in memory, and bytes of their records; beyond either the oldest of them that
    /// are in the history are forgotten.
    pub finished_max: u32,
    /// See `finished_max`.
    pub finished_bytes_max: u64,
    /// How long a task is kept after its end, in the history on the disk; zero for no history, and then what is forgotten
    /// by `finished_max` is forgotten for good.
    pub history_retention: Duration,
    /// Bytes of the history of one tenant beyond which its oldest rows go earlier.
    pub history_bytes_max: u64,
    /// Bytes of the records of ended tasks that the history may lack, per shard; beyond that submits are refused.
    pub history_lag_max: u64,
    /// Bytes of them that may come together while shards are busy.
    pub history_defer_max: u64,
    /// Time for which a lease outlives its executor's connection.
    pub lease: Duration,
    /// Filled while the engine opens, for another thread to show: reading a large log takes a while.
    pub progress: Arc<Progress>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            shards: None,
            pin: Vec::new(),
            linger: Duration::ZERO,
            segment_bytes: SEGMENT_BYTES_DEFAULT as u64,
            payload_bytes_max: PAYLOAD_BYTES_DEFAULT,
            space_bytes_min: 1 << 30,
            finished_max: FINISHED_MAX_DEFAULT,
            finished_bytes_max: FINISHED_BYTES_MAX_DEFAULT,
            history_retention: Duration::from_millis(HISTORY_RETENTION_MS_DEFAULT),
            history_bytes_max: HISTORY_BYTES_MAX_DEFAULT,
            history_lag_max: HISTORY_LAG_MAX_DEFAULT,
            history_defer_max: HISTORY_DEFER_MAX_DEFAULT,
            lease: Duration::from_secs(15),
            progress: Arc::default(),
        }
    }
}

/// Why an engine does not open. Nothing in the directory was changed, unless the disk failed.
#[derive(Debug)]
pub enum OpenError {
    /// The data directory.
    Directory(DirectoryError),
    /// The logs of these shards, where no other one is left that could serve, where the directory is being made, or
    /// where it is another version's.
    Recover(Vec<Quarantine>),
    /// The disk, or io_uring.
    Device(DeviceError),
    /// More shards than there may be.
    Shards { asked: usize },
    /// The directory has another number of shards, and its tasks cannot be placed on as many as were asked for.
    Placing(Box<PlacingError>),
    /// The history.
    History(StoreError),
    /// A thread or executor could not be made.
    Thread(String),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::Directory(error) => error.fmt(f),
            OpenError::Recover(shards) => {
                for (index, quarantine) in shards.iter().enumerate() {
                    let line = if index == 0 { "" } else { "\n" };
                    write!(f, "{line}{quarantine}")?;
                }
                Ok(())
            }
            OpenError::Device(error) => error.fmt(f),
            OpenError::Shards { asked } => write!(
                f,
                "{asked} shards were asked for; from 1 to {SHARD_COUNT_MAX} are possible"
            ),
            OpenError::Placing(error) => error.fmt(f),
            OpenError::History(error) => error.fmt(f),
            OpenError::Thread(error) => write!(f, "a shard's thread could not be started: {error}"),
        }
    }
}

impl std::error::Error for OpenError {}

/// What shards and edges share.
pub(crate) struct Shared {
    pub(crate) inboxes: Vec<ShardInbox>,
    pub(crate) edges: Vec<OnceLock<Arc<Outbox>>>,
    pub(crate) routes: RoutePointer,
    /// By shard: why it is not served. Set before anybody is.
    pub(crate) quarantined: Vec<OnceLock<Quarantine>>,
    /// Set when every log has been judged and before anybody is served, if there is to be a history.
    pub(crate) history: OnceLock<Arc<History>>,
    /// By shard: what a backup wants of its log.
    pub(crate) holds: Vec<HoldPlace>,
}

/// How an engine closed.
#[derive(Clone, Debug)]
pub struct Closed {
    /// Every shard flushed and ended in time.
    pub complete: bool,
    /// How long it took.
    pub took: Duration,
    /// Tasks that are left running, over the shards that ended in time: their leases stay with their executors.
    pub running: u64,
    /// Shards whose log had failed, and why.
    pub failed: Vec<(ShardId, String)>,
}

/// How a shard ended.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// Tasks that it left running.
    pub(crate) running: u64,
    /// Why its log had failed, if it had.
    pub(crate) failed: Option<(ShardId, String)>,
}

/// A running engine. Any number of them may live in a process, each in its own directory.
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
    /// How each shard ended, once, and what has been heard of that.
    ended: Mutex<(Receiver<Ended>, Vec<Ended>)>,
    /// The thread that writes the history, and the word that it has ended.
    writer: Mutex<Option<(thread::JoinHandle<()>, Receiver<()>)>>,
    reports: Vec<Report>,
    placed: Option<Placed>,
    options: Options,
    directory: DataDirectory,
    pub(crate) backups: OneBackup,
    pub(crate) embedded: OnceLock<Embedded>,
    /// Held while the embedding thread is started.
    pub(crate) embedding: Mutex<()>,
}

impl Engine {
    /// Opens or makes the data directory with default options and starts the shards.
    pub fn open(directory: impl AsRef<Path>) -> Result<Engine, OpenError> {
        Engine::open_with(directory, Options::default())
    }

    /// Opens or makes the data directory and starts the shards. Returns when every shard has recovered its log, or has
    /// been found not to be served while another one is: [`Engine::quarantined`] says which.
    pub fn open_with(directory: impl AsRef<Path>, options: Options) -> Result<Engine, OpenError> {
        let mut directory =
            DataDirectory::open(directory.as_ref()).map_err(OpenError::Directory)?;
        let known = directory.manifest();
        let asked = options.shards;
        let placed = match known.zip(asked) {
            Some((manifest, asked)) if manifest.shards != asked => {
                Some(place(&mut directory, manifest, &options, asked)?)
            }
            Some(_) | None => None,
        };
        let manifest = match directory.manifest() {
            Some(manifest) => manifest,
            None => {
                let shards = options.shards.unwrap_or_else(default_shards);
                if shards == 0 || usize::from(shards) > SHARD_COUNT_MAX {
                    return Err(OpenError::Shards {
                        asked: usize::from(shards),
                    });
                }
                let manifest = Manifest::new(random(), shards, options.segment_bytes);
                directory.write(manifest).map_err(OpenError::Directory)?;
                manifest
            }
        };
        let inboxes: Result<Vec<_>, _> = (0..manifest.shards).map(|_| ShardInbox::new()).collect();
        let shared = Arc::new(Shared {
            history: OnceLock::new(),
            inboxes: inboxes.map_err(|error| OpenError::Thread(error.to_string()))?,
            edges: (0..EDGE_COUNT_MAX).map(|_| OnceLock::new()).collect(),
            routes: RoutePointer::new(Routes::new(manifest.shards, Directory::default())),
            quarantined: (0..manifest.shards).map(|_| OnceLock::new()).collect(),
            holds: (0..manifest.shards).map(|_| HoldPlace::default()).collect(),
        });
        let (ended_sender, ended) = channel();
        let (opened_sender, opened) = channel();
        let (ready_sender, ready) = channel();
        let mut threads = Vec::new();
        let mut starts = Vec::new();
        for shard in 0..manifest.shards {
            let setup = setup(&options, &manifest, shard, &directory, &shared);
            let (start, begin) = channel();
            starts.push(start);
            let said = Said {
                opened: opened_sender.clone(),
                begin,
                ready: ready_sender.clone(),
            };
            let ended = ended_sender.clone();
            let placement = match options.pin.as_slice() {
                [] => Placement::Unbound,
                cores => Placement::Fixed(cores[usize::from(shard) % cores.len()]),
            };
            let thread = thread::Builder::new()
                .name(format!("pelton-shard-{shard}"))
                .spawn(move || {
                    let how = run_shard(setup, placement, &said);
                    let _ = ended.send(how);
                })
                .map_err(|error| OpenError::Thread(error.to_string()))?;
            threads.push(thread);
        }
        drop(opened_sender);
        drop(ready_sender);
        let mut engine = Engine {
            shared,
            threads: Mutex::new(threads),
            writer: Mutex::new(None),
            ended: Mutex::new((ended, Vec::new())),
            reports: Vec::new(),
            placed,
            options,
            directory,
            backups: OneBackup::default(),
            embedded: OnceLock::new(),
            embedding: Mutex::new(()),
        };
        let mut found = Vec::new();
        let mut quarantined = Vec::new();
        for opened in opened.iter().take(usize::from(manifest.shards)) {
            // Dropping the engine stops the shards that have started.
            match opened {
                Ok(opened) => found.push(opened),
                Err(OpenError::Recover(shards)) => quarantined.extend(shards),
                Err(error) => return Err(error),
            }
        }
        let ended_early = || OpenError::Thread("it ended before it served".to_owned());
        if found.len() + quarantined.len() != starts.len() {
            return Err(ended_early());
        }
        found.sort_by_key(|found| found.0);
        quarantined.sort_by_key(|quarantine: &Quarantine| quarantine.shard);
        let others = |quarantine: &Quarantine| quarantine.error.is_of_another_version();
        if !quarantined.is_empty()
            && (found.is_empty() || known.is_none() || quarantined.iter().any(others))
        {
            return Err(OpenError::Recover(quarantined));
        }
        engine.quarantine(&quarantined)?;
        // Shard 0 orders configuration. A crash between its log and another's leaves that one behind, and so does a
        // start that could not serve that one. Without shard 0, the shard that knows most has the last change that all
        // of these had logged, since they log what shard 0 has on its disk.
        let most = match found[0].0 {
            ShardId(0) => 0,
            ShardId(_) => {
                let known = |at: &usize| found[*at].2.version();
                (0..found.len()).max_by_key(known).unwrap_or(0)
            }
        };
        let truth = found[most].2.clone();
        let unserved: Vec<ShardId> = quarantined.iter().map(|q| q.shard).collect();
        engine.open_history(&manifest)?;
        let mut begins = Vec::with_capacity(starts.len());
        for &shard in &unserved {
            let (missing, saved) = (Vec::new(), Lsn(0));
            begins.push((shard, Begin { missing, saved }));
        }
        for (shard, report, directory) in found {
            engine.reports.push(report);
            let missing = missing(&truth, &directory);
            let saved = match engine.history() {
                Some(history) => history.saved(shard.0).map_err(OpenError::History)?,
                None => Lsn(0),
            };
            begins.push((shard, Begin { missing, saved }));
        }
        for (shard, begin) in begins {
            let _ = starts[usize::from(shard.0)].send(begin);
        }
        engine.shared.routes.adopt(truth, unserved);
        if ready.iter().take(starts.len()).count() != starts.len() {
            return Err(ended_early());
        }
        engine.write_history(&manifest)?;
        Ok(engine)
    }

    /// Opens or makes the history, if there is to be one.
    fn open_history(&self, manifest: &Manifest) -> Result<(), OpenError> {
        let options = HistoryOptions {
            retention: self.options.history_retention,
            bytes_max: self.options.history_bytes_max,
            lag_max: self.options.history_lag_max,
            defer_max: self.options.history_defer_max,
        };
        if !options.retention.is_zero() {
            let folder = self.directory.path().join(HISTORY_FOLDER);
            let history = History::open(&folder, manifest, options).map_err(OpenError::History)?;
            self.shared.history.get_or_init(|| Arc::new(history));
        }
        Ok(())
    }

    /// Starts the thread that writes the history, if there is one.
    fn write_history(&self, manifest: &Manifest) -> Result<(), OpenError> {
        let Some(history) = self.shared.history.get() else {
            return Ok(());
        };
        let logs: Vec<_> = (0..manifest.shards)
            .map(|shard| (self.directory.shard(shard), manifest.log(shard)))
            .collect();
        let writer = Writer::new(Arc::clone(history), Arc::clone(&self.shared), logs);
        let (ended_sender, ended) = channel();
        let thread = thread::Builder::new()
            .name("pelton-history".to_owned())
            .spawn(move || {
                writer.run();
                let _ = ended_sender.send(());
            })
            .map_err(|error| OpenError::Thread(error.to_string()))?;
        *lock(&self.writer) = Some((thread, ended));
        Ok(())
    }

    /// Makes another edge. `wake` is called by shards after they have put something into its outbox; it must be
    /// cheap and must not block. `None` if there are too many already.
    pub fn attach(&self, wake: impl Fn() + Send + Sync + 'static) -> Option<Edge> {
        Edge::attach(&self.shared, Box::new(wake))
    }

    /// Takes note of the shards that are not served, or of that all are.
    fn quarantine(&self, quarantined: &[Quarantine]) -> Result<(), OpenError> {
        for quarantine in quarantined {
            tracing::error!(
                shard = quarantine.shard.0,
                folder = %self.directory.shard(quarantine.shard.0).display(),
                "the shard is quarantined and the others serve: {}",
                quarantine.error
            );
            let place = &self.shared.quarantined[usize::from(quarantine.shard.0)];
            let _ = place.set(quarantine.clone());
        }
        if quarantined.is_empty() {
            clear(&self.directory);
            if !has_begun(self.directory.path()) {
                self.directory.note_begun().map_err(OpenError::Directory)?;
            }
        }
        Ok(())
    }

    /// The shards that are not served since their logs are damaged or cannot be read. What belongs to them is refused
    /// with `UNAVAILABLE`; a start with their files restored serves them.
    pub fn quarantined(&self) -> impl Iterator<Item = &Quarantine> {
        self.shared.quarantined.iter().filter_map(OnceLock::get)
    }

    /// The history, if there is one.
    pub fn history(&self) -> Option<&History> {
        self.shared.history.get().map(Arc::as_ref)
    }

    pub(crate) fn with_routes<R>(&self, read: impl FnOnce(&Routes) -> R) -> R {
        self.shared.routes.with(read)
    }

    /// How the log of each shard that is served was found.
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }

    /// What this start placed on another number of shards than the directory had; `None` if it has the same.
    pub fn placed(&self) -> Option<Placed> {
        self.placed
    }

    /// Shards.
    pub fn shard_count(&self) -> u16 {
        self.shared.inboxes.len() as u16
    }

    /// A number that is the same over restarts on the same data directory.
    pub fn identity(&self) -> u64 {
        self.directory
            .manifest()
            .map_or(0, |manifest| (manifest.log_id >> 64) as u64)
    }

    /// The data directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn data(&self) -> &DataDirectory {
        &self.directory
    }

    /// What it was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Stops taking submits, flushes what was taken, and ends the shards. Leases stay with their executors. After
    /// `deadline` the rest is left as a crash would leave it, which loses nothing accepted.
    pub fn close(&self, deadline: Duration) -> Closed {
        let start = Instant::now();
        if let Some(embedded) = self.embedded.get() {
            embedded.close();
        }
        self.backups.close(deadline);
        if let Some(history) = self.shared.history.get() {
            history.stop();
        }
        for inbox in &self.shared.inboxes {
            inbox.stop();
        }
        let mut threads = lock(&self.threads);
        let (ended, heard) = &mut *lock(&self.ended);
        let mut left = threads.len();
        while left > 0 {
            let rest = deadline.saturating_sub(start.elapsed());
            match ended.recv_timeout(rest) {
                Ok(how) => {
                    heard.push(how);
                    left -= 1;
                }
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => left = 0,
            }
        }
        if left == 0 {
            for thread in threads.drain(..) {
                let _ = thread.join();
            }
        }
        let mut writer = lock(&self.writer);
        let mut written = true;
        if let Some((_, ended)) = &*writer {
            let rest = deadline.saturating_sub(start.elapsed());
            written = ended.recv_timeout(rest) != Err(RecvTimeoutError::Timeout);
        }
        if written && let Some((thread, _)) = writer.take() {
            let _ = thread.join();
        }
        Closed {
            complete: left == 0 && written,
            took: start.elapsed(),
            running: heard.iter().map(|how| how.running).sum(),
            failed: heard.iter().filter_map(|how| how.failed.clone()).collect(),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close(Duration::from_secs(10));
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("directory", &self.directory.path())
            .field("shards", &self.shared.inboxes.len())
            .finish_non_exhaustive()
    }
}

type Opened = Result<(ShardId, Report, Directory), OpenError>;

/// What a shard's thread and whoever opens the engine tell each other: the log is recovered; the changes of
/// configuration that it lacks; they are on disk.
struct Said {
    opened: Sender<Opened>,
    begin: Receiver<Begin>,
    ready: Sender<()>,
}

/// Runs a shard to its end.
fn run_shard(setup: Setup, placement: Placement, said: &Said) -> Ended {
    let me = setup.core.shard;
    let executor = LocalExecutorBuilder::new(placement)
        .name(&format!("pelton-shard-{}", me.0))
        .io_memory(GLOMMIO_IO_BYTES)
        .make();
    let executor = match executor {
        Ok(executor) => executor,
        Err(error) => {
            let _ = said.opened.send(Err(OpenError::Thread(error.to_string())));
            return Ended::default();
        }
    };
    let shared = Arc::clone(&setup.shared);
    let served = executor.run(async {
        let (shard, report) = match ShardLoop::open(setup) {
            Ok(opened) => opened,
            Err(error) => {
                let _ = said.opened.send(Err(error));
                return None;
            }
        };
        let directory = shard.directory().clone();
        if said.opened.send(Ok((me, report, directory))).is_err() {
            return Some(Ended::default());
        }
        Some(match said.begin.recv() {
            Ok(begin) => shard.run(begin, &said.ready),
            Err(_) => Ended::default(),
        })
    });
    served.unwrap_or_else(|| {
        // Whoever opens the engine says whether others serve without this one.
        if said.begin.recv().is_ok() {
            let gone = Gone(&shared.inboxes[usize::from(me.0)]);
            let _ = said.ready.send(());
            stand_in(&shared, me);
            drop(gone);
        }
        Ended::default()
    })
}

/// What a shard must still log to know what shard 0 knows.
fn missing(truth: &Directory, behind: &Directory) -> Vec<Control> {
    let lacks = |change: &Change| match change {
        Change::Tenant { id, .. } => behind.tenant(*id) != truth.tenant(*id),
        Change::Function { id, .. } | Change::FunctionRemoved { id } => {
            behind.function(*id) != truth.function(*id)
        }
    };
    let changes = truth.dump().filter(lacks);
    let version = truth.version();
    changes
        .map(|change| Control::Apply { version, change })
        .collect()
}

/// What the state machine of a shard is made with.
pub(crate) fn core_options(options: &Options, manifest: &Manifest, shard: u16) -> CoreOptions {
    let history_lag_max = match options.history_retention.is_zero() {
        true => 0,
        false => options.history_lag_max.max(1),
    };
    CoreOptions {
        shard: ShardId(shard),
        shards: manifest.shards,
        first_page: manifest.first_page,
        page_shift: manifest.page_shift,
        segment_bytes: manifest.segment_bytes,
        seed: random() as u64,
        payload_bytes_max: options.payload_bytes_max as u32,
        finished_max: options.finished_max,
        finished_bytes_max: options.finished_bytes_max,
        history_lag_max,
        lease_ms: options.lease.as_millis() as u64,
        ..CoreOptions::default()
    }
}

fn setup(
    options: &Options,
    manifest: &Manifest,
    shard: u16,
    directory: &DataDirectory,
    shared: &Arc<Shared>,
) -> Setup {
    Setup {
        core: core_options(options, manifest, shard),
        log: manifest.log(shard),
        directory: directory.shard(shard),
        begun: has_begun(directory.path()),
        progress: Arc::clone(&options.progress),
        space_bytes_min: options.space_bytes_min,
        linger: options.linger,
        shares_core: options.pin.is_empty(),
        shared: Arc::clone(shared),
    }
}

/// Makes an io_uring ring as a shard does, and drops it: an error says why no engine can run here.
pub fn probe_ring() -> std::io::Result<()> {
    pelton_storage::ring::probe()
}

/// Half the cores, at least one: the other half is for edges.
pub fn default_shards() -> u16 {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).clamp(1, SHARD_COUNT_MAX) as u16
}

/// Version of the data directory that this engine reads and writes.
pub fn directory_version() -> u32 {
    DIRECTORY_VERSION
}

/// The folder of a shard's log, as the directory's manifest says.
pub fn shard_folder(directory: &Path, shard: u16) -> PathBuf {
    pelton_storage::manifest::shard_folder(directory, shard)
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
    u128::from_le_bytes(bytes)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing that holds one of these locks can panic half-way through a change.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
