//! The store: blocks of rows in an embedded database, by number, with an index of what they hold.
//!
//! Tables: `blocks`, number to block. `index`, tenant, state, time bucket of acceptance and number to the first and last
//! order in the block. `ages`, tenant and number to what is needed to drop the block: numbers grow with the ends of tasks,
//! so that the first of a tenant is the oldest. `terms`, tenant, term and order to the state of a row that has a given
//! name or a tag. `totals`, tenant to rows and bytes. `saved`, shard to the position of its log up to which everything
//! that ended is here. `about`, what the store is.
//!
//! A batch is one transaction, and it is on the disk when [`Store::write`] returns.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io,
    ops::{ControlFlow, RangeInclusive},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering::*},
    },
};

use pelton_core::{
    id::{Lsn, RequestId, TenantId},
    state::State,
};
use redb::{
    Builder, Database, Key, ReadTransaction, ReadableDatabase, ReadableTable, Table,
    TableDefinition, Value, WriteTransaction, backends::FileBackend,
};

use crate::{
    block::{Block, Writer},
    row::Row,
};

pub(crate) const BLOCKS: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("blocks");
pub(crate) const INDEX: TableDefinition<'static, [u8; 18], [u8; 32]> =
    TableDefinition::new("index");
const AGES: TableDefinition<'static, [u8; 12], [u8; 30]> = TableDefinition::new("ages");
pub(crate) const TERMS: TableDefinition<'static, &[u8], u8> = TableDefinition::new("terms");
const TOTALS: TableDefinition<'static, u32, (u64, u64)> = TableDefinition::new("totals");
const SAVED: TableDefinition<'static, u16, u64> = TableDefinition::new("saved");
const ABOUT: TableDefinition<'static, &str, u128> = TableDefinition::new("about");

/// Version of what stands in the tables.
const VERSION: u128 = 1;
/// A block and what the database adds to it fit 64 KiB, unless it is a single row.
const BLOCK_BYTES: usize = 63 << 10;
/// Memory for pages that were read.
const CACHE_BYTES: usize = 32 << 20;
/// Blocks that are dropped in one transaction.
const DROPPED_MAX: usize = 512;
/// Bytes of a copy that are written in one transaction.
const COPIED_BYTES: u64 = 8 << 20;
/// The database's file in the store's folder.
pub const FILE_NAME: &str = "rows.redb";

/// How a tenant's rows are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Milliseconds after its end at which a row may go.
    pub retention_ms: u64,
    /// Bytes of rows beyond which the oldest go earlier.
    pub bytes_max: u64,
}

/// What is in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Rows.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Logged time of the oldest end; 0 without any.
    pub oldest_ms: u64,
}

/// Why the store does not do what it should.
#[derive(Debug)]
pub enum StoreError {
    /// It cannot be made or opened.
    Directory { path: PathBuf, error: io::Error },
    /// It belongs to another data directory.
    Foreign { path: PathBuf },
    /// Another version has written it.
    Version { path: PathBuf, found: u128 },
    /// The database below says so.
    Database(Box<redb::Error>),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Directory { path, error } => {
                write!(f, "the history in {}: {error}", path.display())
            }
            StoreError::Foreign { path } => write!(
                f,
                "{} belongs to another data directory: move it away, and the history begins with what the log still has",
                path.display()
            ),
            StoreError::Version { path, found } => write!(
                f,
                "{} has version {found}, this program reads {VERSION}; start the version that wrote it, or move it away",
                path.display()
            ),
            StoreError::Database(error) => write!(f, "the history's database: {error}"),
        }
    }
}

impl std::error::Error for StoreError {}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> StoreError {
        StoreError::Database(Box::new(error.into()))
    }
}

/// Rows that are to be written together, and how far the logs are in the store with them.
#[derive(Debug, Default)]
pub struct Batch {
    entries: Vec<Entry>,
    bytes: Vec<u8>,
    terms: Vec<(Vec<u8>, u8)>,
    saved: BTreeMap<u16, Lsn>,
    writer: Writer,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    tenant: TenantId,
    state: State,
    order: u128,
    ended_ms: u64,
    start: usize,
    bytes: usize,
    terms: bool,
    may_be_there: bool,
}

impl Batch {
    /// Adds a row. `may_be_there`: it is looked for before it is written.
    pub fn push(&mut self, row: &Row<'_>, may_be_there: bool) {
        let start = self.bytes.len();
        row.encode(&mut self.bytes);
        let order = row.request.order();
        let state = row.state as u8;
        let terms = self.terms.len();
        if !row.task_id.is_empty() {
            let name = term(row.tenant, Term::Name(row.task_id), Some(order));
            self.terms.push((name, state));
        }
        for tag in pelton_core::record::tags(row.tags) {
            let tag = term(row.tenant, Term::Tag(tag), Some(order));
            self.terms.push((tag, state));
        }
        self.entries.push(Entry {
            tenant: row.tenant,
            state: row.state,
            order,
            ended_ms: row.ended_ms,
            start,
            bytes: self.bytes.len() - start,
            terms: self.terms.len() > terms,
            may_be_there,
        });
    }

    /// With this batch everything of a shard that ended before `through` is in the store.
    pub fn saves(&mut self, shard: u16, through: Lsn) {
        self.saved.insert(shard, through);
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.saved.is_empty()
    }

    /// Bytes of the rows.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.bytes.clear();
        self.terms.clear();
        self.saved.clear();
    }
}

/// What rows are found by besides their identity.
pub(crate) enum Term<'a> {
    Name(&'a str),
    Tag(&'a [u8]),
}

/// The key of a term, or what all keys of the term begin with. A name's begins with what those of longer names begin
/// with; neither names nor tags have a zero byte.
pub(crate) fn term(tenant: TenantId, term: Term<'_>, order: Option<u128>) -> Vec<u8> {
    let (kind, text) = match term {
        Term::Name(name) => (b'n', name.as_bytes()),
        Term::Tag(tag) => (b't', tag),
    };
    let mut key = Vec::with_capacity(4 + 1 + text.len() + 1 + 16);
    key.extend_from_slice(&tenant.0.to_be_bytes());
    key.push(kind);
    key.extend_from_slice(text);
    if let Some(order) = order {
        key.push(0);
        key.extend_from_slice(&order.to_be_bytes());
    }
    key
}

/// The rows on the disk. Shared: one thread writes, any reads.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: RwLock<Option<Database>>,
    /// Somebody waits for all who look, to close it.
    closing: AtomicBool,
}

impl Store {
    /// Opens or makes the store in this folder. `identity` is that of the data directory.
    pub fn open(folder: &Path, identity: u128) -> Result<Store, StoreError> {
        fs::create_dir_all(folder).map_err(|error| StoreError::Directory {
            path: folder.to_owned(),
            error,
        })?;
        let path = folder.join(FILE_NAME);
        let store = Store {
            database: RwLock::new(Some(open(&path)?)),
            path,
            closing: AtomicBool::new(false),
        };
        store.check(identity)?;
        Ok(store)
    }

    fn check(&self, identity: u128) -> Result<(), StoreError> {
        let path = self.path.clone();
        self.change(|change| {
            let mut about = change.open_table(ABOUT)?;
            let version = about.get("version")?.map(|version| version.value());
            let known = about.get("identity")?.map(|known| known.value());
            match (version, known) {
                (None, None) => {
                    about.insert("version", VERSION)?;
                    about.insert("identity", identity)?;
                }
                (Some(VERSION), Some(known)) if known == identity => {}
                (Some(VERSION), _) => return Err(StoreError::Foreign { path }),
                (found, _) => {
                    let found = found.unwrap_or(0);
                    return Err(StoreError::Version { path, found });
                }
            }
            drop(about);
            // Readers find every table.
            change.open_table(BLOCKS)?;
            change.open_table(INDEX)?;
            change.open_table(AGES)?;
            change.open_table(TERMS)?;
            change.open_table(TOTALS)?;
            change.open_table(SAVED)?;
            Ok(())
        })
    }

    /// The data directory has this generation of shards. Positions are those of its logs: what is known of an earlier
    /// generation's is forgotten, and what their shards handed over is handed over again by those of this one.
    pub fn enter(&self, generation: u64) -> Result<(), StoreError> {
        let known = self.look(|look| {
            let about = look.open_table(ABOUT)?;
            Ok(about.get("generation")?.map_or(1, |known| known.value()))
        })?;
        if known == u128::from(generation) {
            return Ok(());
        }
        self.change(|change| {
            change.open_table(SAVED)?.retain(|_, _| false)?;
            let mut about = change.open_table(ABOUT)?;
            about.insert("generation", u128::from(generation))?;
            Ok(())
        })
    }

    /// After an error the database below takes nothing more: it is closed and opened again.
    pub fn reopen(&self) -> Result<(), StoreError> {
        let mut database = self.take_over();
        *database = None;
        *database = Some(open(&self.path)?);
        Ok(())
    }

    /// Closes it for good, whoever still holds it: what is asked of it from now on is an error.
    pub fn close(&self) {
        *self.take_over() = None;
    }

    /// Waits until nobody looks any more. A copy that is being made ends.
    fn take_over(&self) -> RwLockWriteGuard<'_, Option<Database>> {
        self.closing.store(true, SeqCst);
        let database = match self.database.write() {
            Ok(database) => database,
            Err(poisoned) => poisoned.into_inner(),
        };
        self.closing.store(false, SeqCst);
        database
    }

    /// True while somebody waits for all who look, to close it.
    pub fn is_closing(&self) -> bool {
        self.closing.load(SeqCst)
    }

    /// Bytes of its file.
    pub fn file_bytes(&self) -> Result<u64, StoreError> {
        let metadata = fs::metadata(&self.path);
        metadata
            .map(|metadata| metadata.len())
            .map_err(|error| StoreError::Directory {
                path: self.path.clone(),
                error,
            })
    }

    /// Writes a store with what this one has into a new file, in which each table stands in one piece. `begun` is called
    /// when it is settled what is copied: what is written into this store from then on is not. `step` is told bytes. The
    /// rows; `None` if `step` or whoever closes this store has ended it.
    pub fn copy(
        &self,
        target: &Path,
        begun: impl FnOnce() -> ControlFlow<()>,
        step: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Option<u64>, StoreError> {
        self.look(|look| {
            if begun().is_break() {
                return Ok(None);
            }
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(target)
                .map_err(|error| StoreError::Directory {
                    path: target.to_owned(),
                    error,
                })?;
            let copy = Builder::new()
                .set_cache_size(CACHE_BYTES / 2)
                .create_with_backend(FileBackend::new(file)?)?;
            let mut step = |bytes| match step(bytes) {
                ControlFlow::Continue(()) if !self.is_closing() => ControlFlow::Continue(()),
                ControlFlow::Continue(()) | ControlFlow::Break(()) => ControlFlow::Break(()),
            };
            let whole = copy_table(look, &copy, ABOUT, &mut step)?
                && copy_table(look, &copy, SAVED, &mut step)?
                && copy_table(look, &copy, TOTALS, &mut step)?
                && copy_table(look, &copy, AGES, &mut step)?
                && copy_table(look, &copy, INDEX, &mut step)?
                && copy_table(look, &copy, BLOCKS, &mut step)?
                && copy_table(look, &copy, TERMS, &mut step)?;
            copy.close()?;
            whole.then(|| rows(look)).transpose()
        })
    }

    /// Everything of a shard that ended before this position is in the store.
    pub fn saved(&self, shard: u16) -> Result<Lsn, StoreError> {
        self.look(|look| {
            let saved = look.open_table(SAVED)?;
            Ok(Lsn(saved.get(shard)?.map_or(0, |saved| saved.value())))
        })
    }

    /// Writes a batch and empties it. It is on the disk, as a whole, or this is an error and the batch is as it was.
    pub fn write(&self, batch: &mut Batch) -> Result<(), StoreError> {
        batch
            .entries
            .sort_unstable_by_key(|entry| (entry.tenant, entry.state as u8, entry.order));
        let Batch {
            entries,
            bytes,
            terms,
            saved,
            writer,
        } = batch;
        terms.sort_unstable();
        self.change(|change| {
            let mut blocks = Blocks::new(change)?;
            let mut group: Option<(TenantId, State, u64)> = None;
            let mut open = OpenBlock::default();
            for entry in entries.iter() {
                if entry.may_be_there && blocks.has(entry)? {
                    continue;
                }
                let place = (entry.tenant, entry.state, bucket(entry.order));
                let full = writer.bytes() + 4 + entry.bytes > BLOCK_BYTES;
                if let Some(before) = group.filter(|before| full || *before != place)
                    && !writer.is_empty()
                {
                    blocks.add(before, &open, writer)?;
                    open = OpenBlock::default();
                }
                group = Some(place);
                open.add(entry);
                writer.push(&bytes[entry.start..][..entry.bytes]);
            }
            if let Some(last) = group.filter(|_| !writer.is_empty()) {
                blocks.add(last, &open, writer)?;
            }
            blocks.close(change)?;
            let mut table = change.open_table(TERMS)?;
            for (term, state) in terms.iter() {
                table.insert(term.as_slice(), state)?;
            }
            let mut table = change.open_table(SAVED)?;
            for (&shard, &through) in saved.iter() {
                table.insert(shard, through.0)?;
            }
            Ok(())
        })?;
        batch.clear();
        Ok(())
    }

    /// Drops rows that are too old or too many. True if there may be more of them.
    pub fn expire(
        &self,
        now_ms: u64,
        limits: impl Fn(TenantId) -> Limits,
    ) -> Result<bool, StoreError> {
        let mut dropped = Vec::new();
        let mut totals = Vec::new();
        self.look(|look| {
            let ages = look.open_table(AGES)?;
            for total in look.open_table(TOTALS)?.range::<u32>(..)? {
                let (tenant, total) = total?;
                let (tenant, (mut rows, mut bytes)) = (TenantId(tenant.value()), total.value());
                let limits = limits(tenant);
                for entry in ages.range(age_keys(tenant))? {
                    let (key, age) = entry?;
                    let age = Age::read(&age.value());
                    let old = age.ended_ms.saturating_add(limits.retention_ms) < now_ms;
                    if dropped.len() == DROPPED_MAX || !old && bytes <= limits.bytes_max {
                        break;
                    }
                    rows -= u64::from(age.rows);
                    bytes -= age.bytes;
                    dropped.push((tenant, key.value(), age));
                }
                totals.push((tenant, rows, bytes));
            }
            Ok(())
        })?;
        if dropped.is_empty() {
            return Ok(false);
        }
        self.change(|change| {
            let mut blocks = change.open_table(BLOCKS)?;
            let mut index = change.open_table(INDEX)?;
            let mut ages = change.open_table(AGES)?;
            let mut terms = change.open_table(TERMS)?;
            for (tenant, key, age) in &dropped {
                let number = number_of(key);
                if age.terms
                    && let Some(block) = blocks.get(number)?
                    && let Some(block) = Block::read(*tenant, age.state, block.value())
                {
                    for row in (0..block.count()).filter_map(|row| block.row(row)) {
                        forget_terms(&mut terms, &row)?;
                    }
                }
                blocks.remove(number)?;
                index.remove(index_key(*tenant, age.state, age.bucket, number))?;
                ages.remove(key)?;
            }
            let mut table = change.open_table(TOTALS)?;
            for (tenant, rows, bytes) in &totals {
                if *rows == 0 {
                    table.remove(tenant.0)?;
                } else {
                    table.insert(tenant.0, (*rows, *bytes))?;
                }
            }
            Ok(())
        })?;
        Ok(dropped.len() == DROPPED_MAX)
    }

    /// The row of a task of this tenant, given to `found`; `None` if there is none.
    pub fn get<R>(
        &self,
        tenant: TenantId,
        request: RequestId,
        found: impl FnOnce(&Row<'_>) -> R,
    ) -> Result<Option<R>, StoreError> {
        self.look(|look| {
            let Some((block, at)) = find(look, tenant, request.order())? else {
                return Ok(None);
            };
            Ok(block.row(at).map(|row| found(&row)))
        })
    }

    /// Rows, bytes and the oldest row.
    pub fn stats(&self) -> Result<Stats, StoreError> {
        self.look(|look| {
            let mut stats = Stats::default();
            let ages = look.open_table(AGES)?;
            for total in look.open_table(TOTALS)?.range::<u32>(..)? {
                let (tenant, total) = total?;
                let (rows, bytes) = total.value();
                stats.rows += rows;
                stats.bytes += bytes;
                if let Some(first) = ages.range(age_keys(TenantId(tenant.value())))?.next() {
                    let ended_ms = Age::read(&first?.1.value()).ended_ms;
                    stats.oldest_ms = match stats.oldest_ms {
                        0 => ended_ms,
                        oldest_ms => oldest_ms.min(ended_ms),
                    };
                }
            }
            Ok(stats)
        })
    }

    /// Something is read as it was when the last batch had been written.
    pub(crate) fn look<R>(
        &self,
        look: impl FnOnce(&ReadTransaction) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let database = self.database();
        look(&closed(&database)?.begin_read()?)
    }

    fn change<R>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        let database = self.database();
        let mut transaction = closed(&database)?.begin_write()?;
        // After a crash the store opens at once instead of reading all of it.
        transaction.set_quick_repair(true);
        let result = change(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }

    fn database(&self) -> RwLockReadGuard<'_, Option<Database>> {
        match self.database.read() {
            Ok(database) => database,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// Copies a table in the order of its keys; false if it was ended.
fn copy_table<K: Key + 'static, V: Value + 'static>(
    look: &ReadTransaction,
    copy: &Database,
    table: TableDefinition<'static, K, V>,
    step: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<bool, StoreError> {
    let from = look.open_table(table)?;
    let mut entries = from.iter()?.peekable();
    loop {
        let change = copy.begin_write()?;
        let mut to = change.open_table(table)?;
        let mut bytes = 0;
        while bytes < COPIED_BYTES
            && let Some(entry) = entries.next()
        {
            let (key, value) = entry?;
            let (key, value) = (key.value(), value.value());
            bytes += K::as_bytes(&key).as_ref().len() as u64;
            bytes += V::as_bytes(&value).as_ref().len() as u64;
            to.insert(&key, &value)?;
        }
        drop(to);
        change.commit()?;
        if step(bytes).is_break() {
            return Ok(false);
        }
        if entries.peek().is_none() {
            return Ok(true);
        }
    }
}

/// The rows of a store that is in nobody's use, which is not changed. `identity` is that of its data directory.
pub fn count_rows(folder: &Path, identity: u128) -> Result<u64, StoreError> {
    let path = folder.join(FILE_NAME);
    let database = Builder::new()
        .set_cache_size(CACHE_BYTES / 2)
        .open_read_only(&path)?;
    let look = database.begin_read()?;
    let about = look.open_table(ABOUT)?;
    let said = |name| Ok::<_, StoreError>(about.get(name)?.map_or(0, |said| said.value()));
    match (said("version")?, said("identity")?) {
        (VERSION, known) if known == identity => rows(&look),
        (VERSION, _) => Err(StoreError::Foreign { path }),
        (found, _) => Err(StoreError::Version { path, found }),
    }
}

fn rows(look: &ReadTransaction) -> Result<u64, StoreError> {
    let mut rows = 0;
    for total in look.open_table(TOTALS)?.range::<u32>(..)? {
        rows += total?.1.value().0;
    }
    Ok(rows)
}

fn open(path: &Path) -> Result<Database, StoreError> {
    Ok(Database::builder()
        .set_cache_size(CACHE_BYTES)
        .create(path)?)
}

fn closed(database: &Option<Database>) -> Result<&Database, StoreError> {
    database
        .as_ref()
        .ok_or_else(|| redb::Error::DatabaseClosed.into())
}

/// The tables that a batch's blocks go to.
struct Blocks<'t> {
    blocks: Table<'t, u64, &'static [u8]>,
    index: Table<'t, [u8; 18], [u8; 32]>,
    ages: Table<'t, [u8; 12], [u8; 30]>,
    next: u64,
    totals: BTreeMap<TenantId, (u64, u64)>,
}

/// What is known of the rows that a block has so far.
#[derive(Clone, Copy, Default)]
struct OpenBlock {
    rows: u32,
    first: u128,
    last: u128,
    ended_ms: u64,
    bytes: u64,
    terms: bool,
}

impl OpenBlock {
    fn add(&mut self, entry: &Entry) {
        if self.rows == 0 {
            self.first = entry.order;
        }
        self.rows += 1;
        self.last = entry.order;
        self.ended_ms = self.ended_ms.max(entry.ended_ms);
        self.bytes += entry.bytes as u64;
        self.terms |= entry.terms;
    }
}

impl<'t> Blocks<'t> {
    fn new(change: &'t WriteTransaction) -> Result<Blocks<'t>, StoreError> {
        let blocks = change.open_table(BLOCKS)?;
        let next = blocks.last()?.map_or(1, |last| last.0.value() + 1);
        Ok(Blocks {
            blocks,
            index: change.open_table(INDEX)?,
            ages: change.open_table(AGES)?,
            next,
            totals: BTreeMap::new(),
        })
    }

    fn has(&self, entry: &Entry) -> Result<bool, StoreError> {
        let keys = index_keys(entry.tenant, entry.state, bucket(entry.order));
        for found in self.index.range(keys)? {
            let (key, span) = found?;
            if holds(&span.value(), entry.order)
                && let Some(block) = self.blocks.get(number_of(&key.value()))?
                && let Some(block) = Block::read(entry.tenant, entry.state, block.value())
                && block.order(block.rank(entry.order)) == entry.order
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn add(
        &mut self,
        (tenant, state, bucket): (TenantId, State, u64),
        open: &OpenBlock,
        writer: &mut Writer,
    ) -> Result<(), StoreError> {
        let number = self.next;
        self.next += 1;
        self.blocks.insert(number, writer.finish())?;
        let mut span = [0; 32];
        span[..16].copy_from_slice(&open.first.to_be_bytes());
        span[16..].copy_from_slice(&open.last.to_be_bytes());
        self.index
            .insert(index_key(tenant, state, bucket, number), span)?;
        let age = Age {
            ended_ms: open.ended_ms,
            bucket,
            bytes: open.bytes,
            rows: open.rows,
            state,
            terms: open.terms,
        };
        self.ages.insert(age_key(tenant, number), age.write())?;
        let total = self.totals.entry(tenant).or_default();
        total.0 += u64::from(open.rows);
        total.1 += open.bytes;
        Ok(())
    }

    fn close(self, change: &WriteTransaction) -> Result<(), StoreError> {
        let mut table = change.open_table(TOTALS)?;
        for (tenant, (rows, bytes)) in self.totals {
            let before = table.get(tenant.0)?.map_or((0, 0), |total| total.value());
            table.insert(tenant.0, (before.0 + rows, before.1 + bytes))?;
        }
        Ok(())
    }
}

/// What is needed to drop a block.
#[derive(Clone, Copy, Debug)]
struct Age {
    ended_ms: u64,
    bucket: u64,
    bytes: u64,
    rows: u32,
    state: State,
    terms: bool,
}

impl Age {
    fn write(&self) -> [u8; 30] {
        let mut bytes = [0; 30];
        bytes[..8].copy_from_slice(&self.ended_ms.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.bucket.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.bytes.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.rows.to_be_bytes());
        bytes[28] = self.state as u8;
        bytes[29] = u8::from(self.terms);
        bytes
    }

    fn read(bytes: &[u8; 30]) -> Age {
        let number = |at: usize| {
            let part = bytes[at..at + 8].iter();
            part.fold(0u64, |number, &byte| number << 8 | u64::from(byte))
        };
        Age {
            ended_ms: number(0),
            bucket: number(8),
            bytes: number(16),
            rows: u32::from_be_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]),
            state: State::from_number(bytes[28]).unwrap_or(State::Succeeded),
            terms: bytes[29] != 0,
        }
    }
}

fn forget_terms(terms: &mut Table<'_, &'static [u8], u8>, row: &Row<'_>) -> Result<(), StoreError> {
    let order = Some(row.request.order());
    if !row.task_id.is_empty() {
        terms.remove(term(row.tenant, Term::Name(row.task_id), order).as_slice())?;
    }
    for tag in pelton_core::record::tags(row.tags) {
        terms.remove(term(row.tenant, Term::Tag(tag), order).as_slice())?;
    }
    Ok(())
}

/// The block that has the row with this order, and the row's place in it.
pub(crate) fn find(
    look: &ReadTransaction,
    tenant: TenantId,
    order: u128,
) -> Result<Option<(Block, usize)>, StoreError> {
    let index = look.open_table(INDEX)?;
    let blocks = look.open_table(BLOCKS)?;
    for state in State::ALL.into_iter().filter(|state| state.terminal()) {
        for found in index.range(index_keys(tenant, state, bucket(order)))? {
            let (key, span) = found?;
            if !holds(&span.value(), order) {
                continue;
            }
            if let Some(block) = blocks.get(number_of(&key.value()))?
                && let Some(block) = Block::read(tenant, state, block.value())
            {
                let at = block.rank(order);
                if at < block.count() && block.order(at) == order {
                    return Ok(Some((block, at)));
                }
            }
        }
    }
    Ok(None)
}

/// Acceptance times are told apart by 4.096 s in the index.
const BUCKET_BITS: u32 = 12;

pub(crate) fn bucket(order: u128) -> u64 {
    RequestId::from_order(order).accepted_ms() >> BUCKET_BITS
}

/// The smallest order of a bucket.
pub(crate) fn bucket_start(bucket: u64) -> u128 {
    RequestId::order_at(bucket << BUCKET_BITS)
}

pub(crate) fn index_key(tenant: TenantId, state: State, bucket: u64, number: u64) -> [u8; 18] {
    let mut key = [0; 18];
    key[..4].copy_from_slice(&tenant.0.to_be_bytes());
    key[4] = state as u8;
    key[5..10].copy_from_slice(&bucket.to_be_bytes()[3..]);
    key[10..].copy_from_slice(&number.to_be_bytes());
    key
}

pub(crate) fn index_keys(tenant: TenantId, state: State, bucket: u64) -> RangeInclusive<[u8; 18]> {
    index_key(tenant, state, bucket, 0)..=index_key(tenant, state, bucket, u64::MAX)
}

/// The bucket in a key of the index.
pub(crate) fn bucket_of(key: &[u8; 18]) -> u64 {
    let part = key[5..10].iter();
    part.fold(0, |bucket, &byte| bucket << 8 | u64::from(byte))
}

fn age_key(tenant: TenantId, number: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&tenant.0.to_be_bytes());
    key[4..].copy_from_slice(&number.to_be_bytes());
    key
}

fn age_keys(tenant: TenantId) -> RangeInclusive<[u8; 12]> {
    age_key(tenant, 0)..=age_key(tenant, u64::MAX)
}

/// The block's number at the end of a key.
pub(crate) fn number_of(key: &[u8]) -> u64 {
    let part = key[key.len() - 8..].iter();
    part.fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// First and last order of a block.
pub(crate) fn span_of(span: &[u8; 32]) -> (u128, u128) {
    let number = |bytes: &[u8]| {
        let part = bytes.iter();
        part.fold(0u128, |number, &byte| number << 8 | u128::from(byte))
    };
    (number(&span[..16]), number(&span[16..]))
}

fn holds(span: &[u8; 32], order: u128) -> bool {
    let (first, last) = span_of(span);
    first <= order && order <= last
}
