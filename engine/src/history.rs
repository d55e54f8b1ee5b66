//! What has ended goes from the shards to the store of `pelton-history`, on one thread that no shard waits for.
//!
//! The thread asks a shard for tasks that have ended, reads their records back from the shard's log, writes rows for them
//! and tells the shard once they are on the disk; then the shard may forget them, and its log their records. While the
//! shards are busy it lets rows come together and takes them when there are enough, or when it is quiet: nobody waits for
//! a row, since the shard answers for a task until the store does.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::*, fence},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::queue::ArrayQueue;
use pelton_core::{
    error::Code,
    event::{Control, Ended, EndedBatch, Target},
    id::{Lsn, RequestId, ShardId, TenantId},
    record::{ArchivedRelocatedOutcomeRecordV1, Record, read_task, read_whole},
};
use pelton_history::{Batch, Filter, Limits, Row, Stats as StoreStats, Store, StoreError};
use pelton_storage::{
    log::Options as LogOptions,
    manifest::Manifest,
    reader::{Reader, Wanted},
};

use crate::{
    edge::Edge,
    engine::{Shared, lock},
    info::TaskInfo,
};

/// Tasks that a shard hands over, and takes back as safe, in one step; and bytes of their records.
const ROWS_PER_ASK: u32 = 2_048;
const BYTES_PER_ASK: u64 = 2 << 20;
/// What is written in one go at most.
const ROWS_PER_WRITE: usize = 64 << 10;
const BYTES_PER_WRITE: usize = 16 << 20;
/// How often it is looked whether there is something to write.
const TICK: Duration = Duration::from_millis(100);
/// A shard whose ended tasks grow by more than this in a tick is busy.
const BUSY_BYTES: u64 = 256 << 10;
/// How long a shard may take to answer before the others go on without it.
const ANSWER_WAIT: Duration = Duration::from_millis(500);
/// How often old rows are dropped.
const EXPIRE_EVERY: Duration = Duration::from_secs(60);
/// Pause after the store has failed.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Tries to read a task's records before its row is written without them.
const READ_TRIES: u32 = 5;

/// Figures of the history since the start.
#[derive(Clone, Debug, Default)]
pub struct HistoryStats {
    /// What is in the store.
    pub store: StoreStats,
    /// Bytes of the records of ended tasks that the store does not have yet, over all shards.
    pub lag_bytes: u64,
    /// Rows written.
    pub written: u64,
    /// Writes, each one flush.
    pub writes: u64,
    /// Time spent with reading records and making rows, and with writing them.
    pub read_us: u64,
    /// See `read_us`.
    pub write_us: u64,
    /// Rows without a record that could not be read.
    pub damaged: u64,
    /// Why the store takes nothing at the moment.
    pub failed: Option<String>,
}

/// The history as shards, edges and the writing thread share it.
pub struct History {
    store: Store,
    limits: Limits,
    /// Bytes that may come together while the shards are busy.
    defer_max: u64,
    /// Half of what a shard may lack before it refuses submits.
    lag_high: u64,
    shards: Vec<Noted>,
    /// What shards hand over: one answer a shard at most.
    handed: ArrayQueue<(ShardId, EndedBatch)>,
    writer: OnceLock<thread::Thread>,
    /// The writer sleeps until a shard has something.
    asleep: AtomicBool,
    stop: AtomicBool,
    stats: Mutex<HistoryStats>,
}

/// What a shard says of itself after a turn.
#[derive(Default)]
struct Noted {
    lag_bytes: AtomicU64,
    logged_ms: AtomicU64,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History").finish_non_exhaustive()
    }
}

/// How a history is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HistoryOptions {
    pub(crate) retention: Duration,
    pub(crate) bytes_max: u64,
    pub(crate) lag_max: u64,
    pub(crate) defer_max: u64,
}

impl History {
    pub(crate) fn open(
        folder: &Path,
        manifest: &Manifest,
        options: HistoryOptions,
    ) -> Result<History, StoreError> {
        let shards = manifest.shards;
        let store = Store::open(folder, manifest.log_id)?;
        store.enter(manifest.generation)?;
        let stats = HistoryStats {
            store: store.stats()?,
            ..HistoryStats::default()
        };
        Ok(History {
            store,
            limits: Limits {
                retention_ms: options.retention.as_millis() as u64,
                bytes_max: options.bytes_max,
            },
            defer_max: options.defer_max.min(options.lag_max / 2),
            lag_high: options.lag_max / 2,
            shards: (0..shards).map(|_| Noted::default()).collect(),
            handed: ArrayQueue::new(usize::from(shards)),
            writer: OnceLock::new(),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            stats: Mutex::new(stats),
        })
    }

    /// Everything of a shard that ended before this position is in the store.
    pub(crate) fn saved(&self, shard: u16) -> Result<Lsn, StoreError> {
        self.store.saved(shard)
    }

    /// A shard has had a turn.
    pub(crate) fn note(&self, shard: ShardId, lag_bytes: u64, logged_ms: u64) {
        let noted = &self.shards[usize::from(shard.0)];
        noted.logged_ms.store(logged_ms, Relaxed);
        noted.lag_bytes.store(lag_bytes, Relaxed);
        if lag_bytes > 0 {
            fence(SeqCst);
            if self.asleep.load(Relaxed) && self.asleep.swap(false, AcqRel) {
                self.wake();
            }
        }
    }

    /// A shard hands over what it was asked for.
    pub(crate) fn take(&self, shard: ShardId, batch: EndedBatch) {
        let full = self.handed.push((shard, batch)).is_err();
        assert!(!full, "a shard is asked again when it has answered");
        self.wake();
    }

    /// The store, to be copied.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    fn wake(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    /// Ends the writer; what it has not written yet is found in the logs by the next start.
    pub(crate) fn stop(&self) {
        self.stop.store(true, SeqCst);
        self.wake();
    }

    /// Figures.
    pub fn stats(&self) -> HistoryStats {
        let lag_bytes = self.lag_bytes();
        HistoryStats {
            lag_bytes,
            ..lock(&self.stats).clone()
        }
    }

    fn lag_bytes(&self) -> u64 {
        let lags = self
            .shards
            .iter()
            .map(|noted| noted.lag_bytes.load(Relaxed));
        lags.sum()
    }

    /// A task of a tenant; `request` is its identity where its shard knows that, and else the last task with its name is
    /// taken. Reads the disk: not for a thread that others wait for.
    pub fn get(
        &self,
        tenant: TenantId,
        target: &Target,
        request: Option<RequestId>,
    ) -> Result<Option<TaskInfo>, StoreError> {
        match (target, request) {
            (_, Some(request)) | (&Target::Request(request), None) => {
                self.store.get(tenant, request, TaskInfo::of_row)
            }
            (
                Target::Given {
                    function,
                    key,
                    task_id,
                },
                None,
            ) => self
                .store
                .find(tenant, *function, key, task_id, TaskInfo::of_row),
        }
    }

    /// Rows in order, without payloads, results and outputs, and the order down to which there are no others; 0 for the
    /// end. Reads the disk.
    pub fn list(
        &self,
        tenant: TenantId,
        filter: &Filter<'_>,
    ) -> Result<(Vec<TaskInfo>, u128), StoreError> {
        let mut tasks = Vec::new();
        let page = self.store.list(tenant, filter, |row| {
            let bare = Row {
                payload: &[],
                output: &[],
                result: &[],
                ..*row
            };
            tasks.push(TaskInfo::of_row(&bare));
        })?;
        if page.damaged > 0 {
            tracing::error!(blocks = page.damaged, "blocks of the history are damaged");
        }
        Ok((tasks, page.floor))
    }
}

impl Edge {
    /// The history, if there is one.
    pub fn history(&self) -> Option<&Arc<History>> {
        self.shared.history.get()
    }
}

/// What the writer knows of a shard.
struct Source {
    shard: ShardId,
    reader: Reader,
    /// It was asked and has not answered.
    asked: bool,
    /// Of what it handed over, what is in the batch, and what is on the disk and was not confirmed.
    taken: u32,
    saved: u32,
    /// Some of what it handed over could not be read: it is asked for all of it again.
    again: bool,
    /// Tries to read a task whose records could not be read.
    tries: BTreeMap<RequestId, u32>,
    lag_seen: u64,
}

/// The thread that writes.
pub(crate) struct Writer {
    history: Arc<History>,
    shared: Arc<Shared>,
    sources: Vec<Source>,
    batch: Batch,
    records: Vec<u8>,
    /// It writes until the lag is small again.
    catching_up: bool,
    expired: Option<Instant>,
}

impl Writer {
    pub(crate) fn new(
        history: Arc<History>,
        shared: Arc<Shared>,
        logs: impl IntoIterator<Item = (std::path::PathBuf, LogOptions)>,
    ) -> Writer {
        let sources = logs.into_iter().map(|(folder, log)| Source {
            shard: ShardId(log.shard),
            reader: Reader::new(folder, log),
            asked: false,
            taken: 0,
            saved: 0,
            again: false,
            tries: BTreeMap::new(),
            lag_seen: 0,
        });
        Writer {
            history,
            shared,
            sources: sources.collect(),
            batch: Batch::default(),
            records: Vec::new(),
            catching_up: false,
            expired: None,
        }
    }

    pub(crate) fn run(mut self) {
        // Nobody else sets it.
        let _ = self.history.writer.set(thread::current());
        while !self.history.stop.load(SeqCst) {
            let result = self.work();
            let mut stats = lock(&self.history.stats);
            match result {
                Ok(wrote) => {
                    if stats.failed.take().is_some() {
                        tracing::info!("the history is written again");
                    }
                    drop(stats);
                    self.rest(wrote);
                }
                Err(error) => {
                    let why = Some(error.to_string());
                    if stats.failed != why {
                        tracing::error!(%error, "the history cannot be written");
                        stats.failed = why;
                    }
                    drop(stats);
                    self.pause();
                    self.start_again();
                }
            }
        }
        // An edge may outlive the engine: the next one must be able to open it.
        self.history.store.close();
    }

    /// Waits before the next try, whoever wakes it.
    fn pause(&self) {
        let until = Instant::now() + AGAIN_AFTER;
        while !self.history.stop.load(SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::park_timeout(left);
        }
    }

    /// One round: what there is to write is written, what is too old is dropped. True if there was something to write.
    fn work(&mut self) -> Result<bool, StoreError> {
        let wrote = self.is_due() && self.write_all()?;
        if self
            .expired
            .is_none_or(|last| last.elapsed() >= EXPIRE_EVERY)
        {
            self.expired = Some(Instant::now());
            let noted = self.history.shards.iter();
            let now_ms = noted.map(|noted| noted.logged_ms.load(Relaxed)).max();
            let limits = self.history.limits;
            let mut more = true;
            while more && !self.history.stop.load(SeqCst) {
                more = self.history.store.expire(now_ms.unwrap_or(0), |_| limits)?;
            }
            lock(&self.history.stats).store = self.history.store.stats()?;
        }
        Ok(wrote)
    }

    /// Something is to be written, and now is a good time.
    fn is_due(&mut self) -> bool {
        let (mut most, mut busy) = (0, false);
        for source in &mut self.sources {
            let noted = &self.history.shards[usize::from(source.shard.0)];
            let lag = noted.lag_bytes.load(Relaxed);
            busy |= lag > source.lag_seen + BUSY_BYTES;
            source.lag_seen = lag;
            most = most.max(lag);
        }
        if most >= self.history.lag_high {
            self.catching_up = true;
        } else if most < self.history.lag_high / 2 {
            self.catching_up = false;
        }
        most > 0 && (!busy || self.catching_up || most > self.history.defer_max)
    }

    /// Sleeps for a tick, or until a shard has something.
    fn rest(&mut self, wrote: bool) {
        let history = Arc::clone(&self.history);
        if self.catching_up && wrote {
            return;
        }
        if history.lag_bytes() > 0 {
            thread::park_timeout(TICK);
            return;
        }
        history.asleep.store(true, Relaxed);
        fence(SeqCst);
        if history.lag_bytes() == 0 && !history.stop.load(SeqCst) {
            thread::park_timeout(EXPIRE_EVERY);
        }
        history.asleep.store(false, Relaxed);
    }

    /// Asks the shards, makes rows, writes them, and tells the shards.
    fn write_all(&mut self) -> Result<bool, StoreError> {
        let begun = Instant::now();
        for at in 0..self.sources.len() {
            self.ask(at, ROWS_PER_ASK);
        }
        while let Some((at, batch)) = self.answer() {
            let room = self.batch.len() < ROWS_PER_WRITE && self.batch.bytes() < BYTES_PER_WRITE;
            if !batch.rows.is_empty() && room && !self.sources[at].again {
                // While the rows are made the shard looks for the next ones.
                self.ask(at, ROWS_PER_ASK);
            }
            self.make_rows(at, &batch);
        }
        let read = begun.elapsed();
        let rows = self.batch.len() as u64;
        if self.batch.is_empty() {
            return Ok(false);
        }
        self.history.store.write(&mut self.batch)?;
        let store = self.history.store.stats()?;
        let mut stats = lock(&self.history.stats);
        stats.store = store;
        stats.written += rows;
        stats.writes += 1;
        stats.read_us += read.as_micros() as u64;
        stats.write_us += (begun.elapsed() - read).as_micros() as u64;
        drop(stats);
        for source in &mut self.sources {
            source.saved += std::mem::take(&mut source.taken);
        }
        // In small portions, since each is work for the shard.
        for at in 0..self.sources.len() {
            self.ask(at, 0);
        }
        while let Some((at, _)) = self.answer() {
            self.ask(at, 0);
        }
        Ok(true)
    }

    /// Asks a shard for rows, unless it has nothing to say and nothing to hear.
    fn ask(&mut self, at: usize, rows_max: u32) {
        let source = &mut self.sources[at];
        let noted = &self.history.shards[usize::from(source.shard.0)];
        let lag = noted.lag_bytes.load(Relaxed);
        let idle = rows_max == 0 || lag == 0;
        if source.asked || idle && source.saved == 0 || self.history.stop.load(SeqCst) {
            return;
        }
        let saved = source.saved.min(ROWS_PER_ASK);
        // Only what is neither in the batch nor on its way is asked for again.
        let again = source.again && source.saved == saved && source.taken == 0;
        let control = Control::History {
            saved,
            again,
            rows_max: if source.again && !again { 0 } else { rows_max },
            bytes_max: BYTES_PER_ASK,
        };
        let inbox = &self.shared.inboxes[usize::from(source.shard.0)];
        if inbox.push_control(control).is_ok() {
            inbox.wake();
            source.asked = true;
            source.saved -= saved;
            source.again &= !again;
        }
    }

    /// The next answer of a shard; `None` when none is due, or none comes.
    fn answer(&mut self) -> Option<(usize, EndedBatch)> {
        let until = Instant::now() + ANSWER_WAIT;
        loop {
            if let Some((shard, batch)) = self.history.handed.pop() {
                let at = usize::from(shard.0);
                self.sources[at].asked = false;
                return Some((at, batch));
            }
            let left = until.saturating_duration_since(Instant::now());
            let due = self.sources.iter().any(|source| source.asked);
            if !due || left.is_zero() || self.history.stop.load(SeqCst) {
                return None;
            }
            thread::park_timeout(left);
        }
    }

    /// Reads the records of tasks and adds their rows to the batch.
    fn make_rows(&mut self, at: usize, ended: &EndedBatch) {
        let source = &mut self.sources[at];
        if ended.rows.is_empty() || source.again {
            return;
        }
        let mut wanted = Vec::with_capacity(2 * ended.rows.len());
        for (index, row) in ended.rows.iter().enumerate() {
            let (position, bytes) = row.view.record;
            wanted.push(Wanted {
                index: 2 * index,
                position,
                bytes: bytes as usize,
            });
            if row.view.outcome.0 != 0 {
                wanted.push(Wanted {
                    index: 2 * index + 1,
                    position: row.view.outcome,
                    bytes: row.outcome_bytes as usize,
                });
            }
        }
        let records = &mut self.records;
        records.clear();
        let mut places = vec![(0, 0); 2 * ended.rows.len()];
        source.reader.read(&mut wanted, |index, record| {
            let record = record.unwrap_or_default();
            places[index] = (records.len(), record.len());
            records.extend_from_slice(record);
        });
        let record = |index: usize| &records[places[index].0..][..places[index].1];
        for (index, row) in ended.rows.iter().enumerate() {
            let (task, outcome) = (record(2 * index), record(2 * index + 1));
            let whole = row_of(row, task, outcome).or_else(|| {
                // It may have been moved since, or the disk does better the next time.
                let tries = source.tries.entry(row.view.request).or_default();
                *tries += 1;
                (*tries >= READ_TRIES).then(|| {
                    tracing::error!(
                        shard = source.shard.0,
                        task = %row.view.request,
                        "records of an ended task cannot be read: its row is incomplete"
                    );
                    lock(&self.history.stats).damaged += 1;
                    damaged_row(row, task, outcome)
                })
            });
            let Some(whole) = whole else {
                source.again = true;
                return;
            };
            if !source.tries.is_empty() {
                source.tries.remove(&row.view.request);
            }
            self.batch.push(&whole, ended.may_be_saved);
            source.taken += 1;
        }
        self.batch.saves(source.shard.0, ended.through);
    }

    /// The store has failed. What was taken and not written is asked for again.
    fn start_again(&mut self) {
        self.batch.clear();
        for source in &mut self.sources {
            source.taken = 0;
            source.again = true;
        }
        if let Err(error) = self.history.store.reopen() {
            tracing::error!(%error, "the history cannot be opened again");
        }
    }
}

/// The row of a task; `None` if a record that it should have is not one of its records.
fn row_of<'r>(ended: &Ended, task: &'r [u8], outcome: &'r [u8]) -> Option<Row<'r>> {
    let record = read_task(task).ok()?;
    if record.request() != ended.view.request {
        return None;
    }
    let mut row = Row {
        task_id: &record.task_id,
        key: &record.key,
        content_type: &record.content_type,
        traceparent: &record.traceparent,
        tags: &record.tags,
        payload: &record.payload,
        ..bare_row(ended)
    };
    if ended.view.outcome.0 != 0 {
        add_outcome(&mut row, outcome)?;
    }
    Some(row)
}

/// Puts the outcome's fields into the row of its task; `None` if this is not its record.
fn add_outcome<'r>(row: &mut Row<'r>, record: &'r [u8]) -> Option<()> {
    match read_whole(record).ok()? {
        Record::Outcome(outcome)
        | Record::RelocatedOutcome(ArchivedRelocatedOutcomeRecordV1 { outcome, .. })
            if outcome.request.to_native() == row.request.0 =>
        {
            row.code = Code::from_number(outcome.code.to_native()).unwrap_or(Code::Internal);
            row.error = &outcome.error;
            row.output = &outcome.output;
            row.result = &outcome.result;
            row.ended_ms = outcome.at_ms.to_native();
            Some(())
        }
        Record::Outcome(_)
        | Record::RelocatedOutcome(_)
        | Record::Task(_)
        | Record::RelocatedTask(_)
        | Record::Lease(_)
        | Record::Move(_)
        | Record::Config(_)
        | Record::Clock(_)
        | Record::RelocatedName(_) => None,
    }
}

/// What is known of a task without its records.
fn bare_row<'r>(ended: &Ended) -> Row<'r> {
    let view = &ended.view;
    Row {
        request: view.request,
        tenant: ended.tenant,
        state: view.state,
        function: view.function,
        token: view.token,
        retries: view.retries,
        ended_ms: view.ended_ms,
        code: Code::Ok,
        damaged: false,
        task_id: "",
        key: "",
        content_type: "",
        traceparent: "",
        tags: &[],
        payload: &[],
        error: "",
        output: &[],
        result: &[],
    }
}

/// The row of a task one of whose records is lost: what the other one says is in it.
fn damaged_row<'r>(ended: &Ended, task: &'r [u8], outcome: &'r [u8]) -> Row<'r> {
    let without = Ended {
        view: pelton_core::event::TaskView {
            outcome: Lsn(0),
            ..ended.view
        },
        ..*ended
    };
    let mut row = row_of(&without, task, &[]).unwrap_or_else(|| bare_row(ended));
    let _ = add_outcome(&mut row, outcome);
    row.damaged = true;
    row
}
