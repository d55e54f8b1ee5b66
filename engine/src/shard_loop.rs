//! The loop of one shard: gather what came, step, perform what the step wants, sleep.
//!
//! It runs as the main task of a glommio executor on its own thread and sleeps in the log's ring, which the bell of the
//! inboxes ends.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{Arc, atomic::Ordering::*, mpsc::Sender},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pelton_core::{
    clock::{LoggedClock, Now},
    event::{Control, EdgeBatch, Effects, Fetched, Inbox, Reply, TaskView, Urgency},
    id::{ConnectionId, EdgeId, Lsn, RequestId, ShardId},
    shard::{Options as CoreOptions, Shard},
    snapshot::Cursor,
};
use pelton_storage::{
    device::{Device, DeviceOp},
    file::FileDevice,
    log::{Log, LogEvent, Options as LogOptions},
    recover::{Report, expect_segments, recover_with},
    ring::RingDevice,
};

use crate::{
    engine::{Ended, OpenError, Shared},
    hold::{Hold, Lost},
    inbox::ShardInbox,
    info::{InfoReply, TaskInfo},
    linger::{Linger, take_short_turns},
    outgoing::Outgoing,
    progress::{Opening, Progress},
    quarantine::Quarantine,
    sleep::sleep,
    stats::{Recovery, ShardStats, Stage},
};

/// A batch that holds only outcomes waits this long for company. The planted bug has all batches wait, and longer: those
/// who wait for them were answered before.
const SOON_NS: u64 = if cfg!(pelton_planted = "ack_before_device") {
    5_000_000
} else {
    150_000
};
/// On a core of its own, a batch of so many records or fewer, with nothing behind it, is committed while the loop waits:
/// what comes meanwhile is about as much, and is worked off in less time than the wait saves. On a shared core there is
/// no such bound: the time of the wait is somebody else's.
const ALONE_RECORDS_MAX: u32 = 64;
/// How often the disk's free space is looked at, and how often while the log is held for a backup.
const SPACE_EVERY_NS: u64 = 1_000_000_000;
const SPACE_HELD_EVERY_NS: u64 = 100_000_000;
/// Segments for which there must be room above the high-water mark while the log is held: below that it is let go, before
/// a submit is refused.
const HELD_ROOM_SEGMENTS: u64 = 4;
/// What an outcome is taken to have; of a longer one the log reads the rest by itself.
const OUTCOME_BYTES_LIKELY: usize = 4096;

/// What a shard is made with.
pub(crate) struct Setup {
    pub(crate) core: CoreOptions,
    pub(crate) log: LogOptions,
    pub(crate) directory: PathBuf,
    /// The shard has a log already.
    pub(crate) begun: bool,
    pub(crate) space_bytes_min: u64,
    pub(crate) linger: Duration,
    /// The shard has no core of its own.
    pub(crate) shares_core: bool,
    pub(crate) progress: Arc<Progress>,
    pub(crate) shared: Arc<Shared>,
}

/// What a shard that is recovered hears before it serves.
pub(crate) struct Begin {
    /// The changes of configuration that its log lacks.
    pub(crate) missing: Vec<Control>,
    /// Everything of it that ended before this position is in the history.
    pub(crate) saved: Lsn,
}

/// A page or a task whose records are being read.
struct Lookup {
    connection: ConnectionId,
    ticket: u64,
    tasks: Vec<TaskInfo>,
    /// `Some` for a page: the pages of the table that were not looked at.
    pages: Option<u32>,
    /// Reads that have not come back.
    reads: usize,
}

/// What a read of the log is for. Tickets below `RequestId`s' range are lookups.
#[derive(Clone, Copy)]
struct LookupRead {
    lookup: u64,
    task: usize,
}

pub(crate) struct ShardLoop {
    shared: Arc<Shared>,
    me: ShardId,
    shard: Shard,
    log: Log<RingDevice>,
    /// How far the snapshot is that is being taken.
    snapshot: Cursor,
    inbox: Inbox,
    effects: Effects,
    outgoing: Outgoing,
    /// What could not be given to other shards yet.
    to_shards: VecDeque<(ShardId, Control)>,
    lookups: BTreeMap<u64, Lookup>,
    lookup_reads: BTreeMap<u64, LookupRead>,
    next_lookup: u64,
    started: Instant,
    clock: LoggedClock,
    sealed_ns: u64,
    soon_since_ns: Option<u64>,
    space_seen_ns: u64,
    space_bytes_min: u64,
    segment_bytes: u64,
    /// The backup for which the log is held.
    hold: Option<Arc<Hold>>,
    directory: PathBuf,
    linger: Linger,
    /// Records of a batch that is committed while the loop waits, if nothing is behind it.
    alone_records_max: u32,
    poisoned: bool,
    stats: ShardStats,
}

/// Milliseconds since 1970 by the machine's clock.
pub(crate) fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

impl ShardLoop {
    /// Recovers the shard's log. Called on the shard's thread, in its executor.
    pub(crate) fn open(setup: Setup) -> Result<(ShardLoop, Report), OpenError> {
        let me = setup.core.shard;
        if !setup.linger.is_zero() {
            take_short_turns();
        }
        let bell = setup.shared.inboxes[usize::from(me.0)].bell.fd();
        let damaged = |error| OpenError::Recover(vec![Quarantine { shard: me, error }]);
        let mut seen = FileDevice::new(&setup.directory);
        // A folder that cannot be read is this shard's trouble; what else keeps the device from opening, everybody's.
        let listed = if setup.begun {
            expect_segments(&mut seen)
        } else {
            seen.perform(DeviceOp::List).map(drop).map_err(Into::into)
        };
        listed.map_err(damaged)?;
        let device = RingDevice::open(&setup.directory, bell).map_err(OpenError::Device)?;
        let registered = device.is_registered();
        let mut opening = Opening::new(Shard::new(setup.core), setup.progress);
        let begun = Instant::now();
        let (log, report) = recover_with(device, setup.log, &mut opening).map_err(damaged)?;
        let shard = opening.into_shard();
        let clock = LoggedClock::start(0, wall_ms(), shard.last_logged_ms());
        let mut stats = ShardStats::new(me);
        stats.registered = registered;
        let segment_bytes = setup.log.segment_bytes;
        let outgoing = Outgoing::new(Arc::clone(&setup.shared), me);
        let mut this = ShardLoop {
            shared: setup.shared,
            me,
            snapshot: shard.snapshot(),
            shard,
            log,
            inbox: Inbox::default(),
            effects: Effects::default(),
            outgoing,
            to_shards: VecDeque::new(),
            lookups: BTreeMap::new(),
            lookup_reads: BTreeMap::new(),
            next_lookup: 1,
            started: Instant::now(),
            clock,
            sealed_ns: 0,
            soon_since_ns: None,
            space_seen_ns: 0,
            space_bytes_min: setup.space_bytes_min,
            segment_bytes,
            hold: None,
            directory: setup.directory,
            linger: Linger::new(setup.linger),
            alone_records_max: if setup.shares_core {
                u32::MAX
            } else {
                ALONE_RECORDS_MAX
            },
            poisoned: false,
            stats,
        };
        this.stats.recovery = Recovery {
            batches: report.batches,
            records: report.records,
            bytes: report.bytes,
            snapshot_bytes: report.snapshot_bytes,
            snapshots_passed_over: report.snapshots_passed_over,
            took_us: begun.elapsed().as_micros() as u64,
        };
        Ok((this, report))
    }

    /// The tenants and functions that the log held.
    pub(crate) fn directory(&self) -> &pelton_core::config::Directory {
        self.shard.directory()
    }

    /// Logs the configuration that it lacks and says that it is ready, then serves until the engine stops it, flushes
    /// and closes the log.
    pub(crate) fn run(mut self, begin: Begin, ready: &Sender<()>) -> Ended {
        let now = self.now();
        let starts = Instant::now();
        self.shard.start(now, begin.saved);
        self.stats.recovery.took_us += starts.elapsed().as_micros() as u64;
        self.look_at_space(now.mono_ns);
        let shared = Arc::clone(&self.shared);
        let inbox = &shared.inboxes[usize::from(self.me.0)];
        let gone = Gone(inbox);
        let mut told = false;
        self.inbox.control.extend(begin.missing);
        loop {
            if !told && self.is_drained() {
                // Whoever opens the engine may have given up.
                let _ = ready.send(());
                told = true;
            }
            let now = self.now();
            let worked = self.turn(now, inbox);
            if !worked && inbox.is_done() && self.is_drained() {
                break;
            }
            if !worked {
                self.sleep(now, inbox);
            }
        }
        let me = self.me;
        let running = self.shard.counters().running;
        self.let_go(Some(Lost::Ended));
        let failed = self.close().map(|cause| (me, cause));
        drop(gone);
        Ended { running, failed }
    }

    /// One turn; true if another one should follow at once.
    fn turn(&mut self, now: Now, inbox: &ShardInbox) -> bool {
        inbox.gather(&mut self.inbox);
        self.hear_log(now);
        self.log.tick(now.mono_ns);
        let every_ns = match self.hold {
            Some(_) => SPACE_HELD_EVERY_NS,
            None => SPACE_EVERY_NS,
        };
        if now.mono_ns >= self.space_seen_ns + every_ns {
            self.look_at_space(now.mono_ns);
        }
        self.keep_hold(inbox);
        let had_work = self.log.has_durable()
            || !self.inbox.control.is_empty()
            || !self.inbox.submits.is_empty()
            || !self.inbox.fetched.is_empty()
            || self.inbox.scanned.is_some();
        if inbox.stop.load(Relaxed) {
            self.shard.stop_cleaning();
        }
        let (durable, mut space) = self.log.batch();
        self.shard
            .step(now, durable, &mut self.inbox, &mut space, &mut self.effects);
        self.stats.record_way(self.shard.times());
        if let Some(history) = self.shared.history.get() {
            history.note(self.me, self.shard.history_lag_bytes(), now.logged_ms);
        }
        let (len, records) = (space.len, space.records);
        self.log.filled(len, records);
        // What is due leaves first: sealing may take until the batch is durable.
        self.perform();
        self.log.start_reads();
        self.take_snapshot(now);
        if had_work {
            self.stats.turns += 1;
            let took = self.started.elapsed().as_nanos() as u64 - now.mono_ns;
            self.stats.record(Stage::Turn, took / 1000);
        }
        let rolled = self.seal(now, inbox);
        // What the batch had no room for waits for the flush in flight; nothing else keeps the loop awake.
        rolled || self.log.has_durable() || self.has_backlog() && self.log.can_seal() && had_work
    }

    /// Holds the log if a backup wants that, and tells it how far the log is before anybody is answered for that.
    fn keep_hold(&mut self, inbox: &ShardInbox) {
        if inbox.is_called()
            && let Some(hold) = self.shared.holds[usize::from(self.me.0)].take()
        {
            self.let_go(Some(Lost::Ended));
            self.log.hold();
            self.hold = Some(hold);
        }
        match &self.hold {
            Some(hold) if hold.is_released() => self.let_go(None),
            Some(hold) => hold.note(self.log.retired(), self.log.durable()),
            None => {}
        }
    }

    /// Lets go of the log, and says why where that was not asked for.
    fn let_go(&mut self, why: Option<Lost>) {
        if let Some(hold) = self.hold.take() {
            self.log.release();
            if let Some(why) = why {
                hold.lose(why);
            }
        }
    }

    /// Takes the next piece of a snapshot, if one is being written or due.
    fn take_snapshot(&mut self, now: Now) {
        if self
            .log
            .wants_snapshot(now.mono_ns, self.shard.snapshot_entries())
        {
            self.snapshot = self.shard.snapshot();
            let (secret, bytes) = (self.shard.secret(), self.shard.snapshot_bytes());
            self.log.begin_snapshot(secret, bytes);
        }
        if self.log.wants_piece() {
            let piece = self.shard.snapshot_piece(&mut self.snapshot);
            self.log.put_piece(piece.as_ref());
        }
    }

    /// Something was gathered that the batch had no room for.
    fn has_backlog(&self) -> bool {
        !self.inbox.submits.is_empty() || !self.inbox.control.is_empty()
    }

    fn hear_log(&mut self, now: Now) {
        while let Some(event) = self.log.poll(now.mono_ns) {
            match event {
                LogEvent::Durable => {
                    let took = now.mono_ns.saturating_sub(self.sealed_ns);
                    self.stats.record(Stage::Commit, took / 1000);
                }
                LogEvent::Read { ticket, record } => match u64::try_from(ticket) {
                    Ok(lookup) => self.on_lookup_read(lookup, record),
                    Err(_) => self.inbox.fetched.push(Fetched {
                        request: RequestId(ticket),
                        record,
                    }),
                },
                LogEvent::Scanned(scanned) => self.inbox.scanned = Some(scanned),
                LogEvent::Unreadable {
                    segment,
                    offset,
                    rotten,
                } => tracing::error!(
                    shard = self.me.0,
                    segment,
                    offset,
                    rotten,
                    "a record of the log cannot be read"
                ),
                LogEvent::Poisoned => {
                    let cause = self.log.poisoned().map(ToString::to_string);
                    tracing::error!(
                        shard = self.me.0,
                        cause,
                        "the log has failed and is read-only"
                    );
                    self.stats.poisoned = cause;
                    self.poisoned = true;
                    self.shard.on_poisoned(&mut self.effects);
                }
            }
        }
    }

    /// Seals the batch if the step wants that; true if the log went on to its next segment instead.
    fn seal(&mut self, now: Now, inbox: &ShardInbox) -> bool {
        let wanted = match std::mem::take(&mut self.effects.urgency) {
            Urgency::Nothing => false,
            Urgency::Now if !cfg!(pelton_planted = "ack_before_device") => true,
            Urgency::Now | Urgency::Soon => {
                let since = *self.soon_since_ns.get_or_insert(now.mono_ns);
                now.mono_ns >= since + SOON_NS
            }
        };
        if wanted && self.log.can_seal() {
            if self.log.open_records() > 0 {
                self.stats
                    .record(Stage::BatchRecords, u64::from(self.log.open_records()));
            }
            self.shard.on_sealed();
            self.soon_since_ns = None;
            self.sealed_ns = self.started.elapsed().as_nanos() as u64;
            let alone = self.log.open_records() <= self.alone_records_max
                && !self.has_backlog()
                && inbox.is_empty();
            self.log.seal(alone);
            if let Some(bytes) = self.log.in_flight_bytes() {
                self.stats.record(Stage::BatchBytes, bytes as u64);
            }
        }
        self.log.retire_before(self.shard.retire_before());
        let full = std::mem::take(&mut self.effects.full);
        let stuck = full && self.log.open_records() == 0 && self.log.can_seal();
        stuck && self.log.end_segment()
    }

    fn perform(&mut self) {
        let mut effects = std::mem::take(&mut self.effects);
        for fetch in effects.fetches.drain(..) {
            self.log
                .read(fetch.request.0, fetch.position, fetch.bytes as usize);
        }
        if let Some(from) = effects.scan.take() {
            self.log.scan(from);
        }
        if let Some(batch) = effects.history.take()
            && let Some(history) = self.shared.history.get()
        {
            history.take(self.me, batch);
        }
        if !effects.published.is_empty() {
            self.shared.routes.publish(&effects.published);
            effects.published.clear();
        }
        for (index, batch) in effects.edges.iter_mut().enumerate() {
            if !batch.is_empty() {
                self.deliver(EdgeId(index as u16), batch);
            }
        }
        self.outgoing.flush();
        self.to_shards.extend(effects.shards.drain(..));
        while let Some((shard, control)) = self.to_shards.pop_front() {
            let inbox = &self.shared.inboxes[usize::from(shard.0)];
            if let Err(control) = inbox.push_control(control) {
                if !inbox.gone.load(Relaxed) {
                    self.to_shards.push_front((shard, control));
                    break;
                }
                continue;
            }
            inbox.wake();
        }
        self.effects = effects;
    }

    /// Adds to what an edge is to be told. Replies that need the log become lookups first.
    fn deliver(&mut self, edge: EdgeId, batch: &mut EdgeBatch) {
        if !batch.replies.is_empty() {
            let replies = std::mem::take(&mut batch.replies);
            for (connection, ticket, reply) in replies {
                match reply {
                    Reply::Task { view } => self.look_up(connection, ticket, vec![view], None),
                    Reply::Page { views, pages } => {
                        self.look_up(connection, ticket, views, Some(pages));
                    }
                    Reply::NotHeld { request } => {
                        self.outgoing
                            .inform(connection, ticket, InfoReply::NotHeld { request });
                    }
                    Reply::Stats { counters } => {
                        self.stats.counters = *counters;
                        self.stats.log = self.log.stats();
                        self.stats.clock_held = self.clock.held();
                        let reply = InfoReply::Stats(Box::new(self.stats.clone()));
                        self.outgoing.inform(connection, ticket, reply);
                    }
                    Reply::Done { .. }
                    | Reply::Leases { .. }
                    | Reply::LeasesLost { .. }
                    | Reply::Refused { .. } => {
                        batch.replies.push((connection, ticket, reply));
                    }
                }
            }
        }
        if !batch.is_empty() {
            self.outgoing.to(edge).batch.absorb(batch);
        }
    }

    fn look_up(
        &mut self,
        connection: ConnectionId,
        ticket: u64,
        views: Vec<TaskView>,
        pages: Option<u32>,
    ) {
        let lookup = self.next_lookup;
        self.next_lookup += 1;
        let mut reads = 0;
        for (task, view) in views.iter().enumerate() {
            let (position, bytes) = view.record;
            self.read_for(lookup, task, position, bytes as usize);
            reads += 1;
            if view.outcome.0 != 0 {
                self.read_for(lookup, task, view.outcome, OUTCOME_BYTES_LIKELY);
                reads += 1;
            }
        }
        let entry = Lookup {
            connection,
            ticket,
            tasks: views.into_iter().map(TaskInfo::new).collect(),
            pages,
            reads,
        };
        if reads == 0 {
            self.finish_lookup(entry);
        } else {
            self.lookups.insert(lookup, entry);
        }
    }

    fn read_for(&mut self, lookup: u64, task: usize, position: Lsn, bytes: usize) {
        let ticket = self.next_lookup;
        self.next_lookup += 1;
        self.lookup_reads
            .insert(ticket, LookupRead { lookup, task });
        self.log.read(u128::from(ticket), position, bytes);
    }

    fn on_lookup_read(&mut self, ticket: u64, record: Option<Vec<u8>>) {
        let Some(read) = self.lookup_reads.remove(&ticket) else {
            return;
        };
        let Some(mut entry) = self.lookups.remove(&read.lookup) else {
            return;
        };
        let task = &mut entry.tasks[read.task];
        let understood = record.as_ref().is_some_and(|record| task.read(record));
        task.damaged |= !understood;
        if entry.pages.is_some() {
            task.payload = Vec::new();
            task.result = Vec::new();
            task.output = Vec::new();
        }
        entry.reads -= 1;
        if entry.reads == 0 {
            self.finish_lookup(entry);
        } else {
            self.lookups.insert(read.lookup, entry);
        }
    }

    fn finish_lookup(&mut self, mut entry: Lookup) {
        let reply = match (entry.pages, entry.tasks.pop()) {
            (Some(pages), last) => {
                entry.tasks.extend(last);
                InfoReply::Page {
                    tasks: entry.tasks,
                    pages,
                }
            }
            (None, Some(task)) => InfoReply::Task(Box::new(task)),
            (None, None) => unreachable!("a lookup that is no page has one task"),
        };
        self.outgoing.inform(entry.connection, entry.ticket, reply);
    }

    /// Sleeps until something comes in, a commit ends, or the next timer is due.
    fn sleep(&mut self, now: Now, inbox: &ShardInbox) {
        let soon = self.soon_since_ns.map(|since| since + SOON_NS);
        let wakes = [
            self.shard.next_wake_ns(),
            self.log.next_wake_ns(now.mono_ns),
            soon.filter(|_| self.log.can_seal()),
            self.has_undelivered().then_some(now.mono_ns + 1_000_000),
        ];
        let wake = wakes.into_iter().flatten().min();
        let wake = wake.map(|wake| self.started + Duration::from_nanos(wake));
        // With a backlog the shard waits for its flush alone: whatever else comes in would not be taken before that.
        let hears = !self.has_backlog();
        if sleep(self.log.device(), &mut self.linger, inbox, hears, wake) {
            self.stats.parks += 1;
        }
    }

    fn has_undelivered(&self) -> bool {
        !self.outgoing.is_empty() || !self.to_shards.is_empty()
    }

    fn is_drained(&self) -> bool {
        self.log.is_quiet()
            && self.log.open_records() == 0
            && self.inbox.control.is_empty()
            && self.lookups.is_empty()
            || self.poisoned
    }

    /// Writes the closing batch, so that the next start knows that nothing is missing. Why the log has failed, if it has.
    fn close(mut self) -> Option<String> {
        if !self.poisoned && self.log.can_seal() {
            self.log.close();
        }
        loop {
            let now = self.now();
            self.hear_log(now);
            if self.log.is_quiet() || self.poisoned {
                break;
            }
            self.log.device().wait(Duration::from_millis(10));
        }
        self.outgoing.flush();
        self.stats.poisoned
    }

    fn look_at_space(&mut self, mono_ns: u64) {
        self.space_seen_ns = mono_ns;
        let free = free_bytes(&self.directory).unwrap_or(u64::MAX);
        let full = free < self.space_bytes_min || self.log.out_of_space();
        if full || free < room_to_hold(self.space_bytes_min, self.segment_bytes) {
            self.let_go(Some(Lost::Space { free }));
        }
        if full != self.stats.disk_full {
            tracing::warn!(
                shard = self.me.0,
                full,
                free_bytes = free,
                "disk space crossed the high-water mark"
            );
        }
        self.stats.disk_full = full;
        self.inbox.disk_has_room = !full;
    }

    fn now(&mut self) -> Now {
        let mono_ns = self.started.elapsed().as_nanos() as u64;
        Now {
            mono_ns,
            logged_ms: self.clock.advance(mono_ns, wall_ms()),
        }
    }
}

/// Marks the shard as gone when its thread ends, in a panic too, so that edges answer instead of waiting.
pub(crate) struct Gone<'a>(pub(crate) &'a ShardInbox);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.gone.store(true, Relaxed);
    }
}

/// Bytes that must be free on the disk of a log that is held.
pub(crate) fn room_to_hold(space_bytes_min: u64, segment_bytes: u64) -> u64 {
    space_bytes_min.saturating_add(HELD_ROOM_SEGMENTS * segment_bytes)
}

/// Bytes that the file system of `directory` still gives to this process.
pub(crate) fn free_bytes(directory: &std::path::Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with a zero byte, and there is room for the answer.
    let result = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) };
    if result != 0 {
        return None;
    }
    // SAFETY: the call succeeded and has written all of it.
    let stat = unsafe { stat.assume_init() };
    Some(stat.f_bavail * stat.f_frsize)
}
