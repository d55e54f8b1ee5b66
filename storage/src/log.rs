//! The live log of one shard: the batch that is being filled, the one in flight, the one that became durable, and the
//! segments behind and ahead of them.
//!
//! ```text
//!   live segments                        the last one                      prepared ones
//!   [h|batch|batch|..|batch|...] ... [h|batch|batch|in flight|open|....]  [h|.........] [h|.........]
//!    ^ retired                                       ^ durable
//! ```
//!
//! Invariants: at most one batch is in flight; a batch never crosses a segment; a segment is recycled only after a
//! durable batch says that it is dead, and not while the log is held; after a failed write or flush the log is poisoned
//! for good.

use std::collections::{BTreeMap, VecDeque};

use pelton_core::{
    event::{Durable, Scanned},
    id::Lsn,
    limits::BATCH_BYTES_MAX,
    planted::{Bug, planted},
    record::BatchSpace,
    snapshot::Piece,
};

use crate::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, Output, Tag},
    format::{
        BATCH_HEADER_BYTES, BLOCK_BYTES, BatchHeader, FLAG_CARRY, FLAG_CLOSING,
        SEGMENT_DATA_OFFSET, SegmentHeader, record_bytes, record_holds, seal_records,
    },
    recover::records,
    segment::{FILL_PIECE_BYTES, File, Progress, Segment, Work},
    snapshot::{Begin, Snapshots, Stretch},
};

/// Buffers that a device holds for a log: one in flight, one open, one durable and being read.
pub const BUFFER_COUNT: usize = 3;
/// Prepared segments that are kept ready.
pub const PREPARED_COUNT: usize = 2;
/// Dead files that are kept for recycling; more are removed.
pub const DEAD_COUNT_MAX: usize = 2;
/// Pieces of filling in flight at once.
pub const FILL_PIECES_MAX: u32 = 4;
/// A segment with less room than this is at its end.
const ROLL_BYTES: u64 = 128 << 10;
/// Time after the last batch at which an empty one carries the durable position forward.
pub const CARRY_AFTER_NS: u64 = 5_000_000;
/// Pause after failed preparation of a segment.
pub const PREPARE_AGAIN_NS: u64 = 1_000_000_000;
/// What filling may do while nothing is appended, per millisecond.
const FILL_IDLE_BYTES_PER_MS: u64 = 64 << 10;
/// Tries of a read before the record counts as lost.
pub const READ_TRIES: u32 = 3;

/// Records this close to each other are read in one piece, of at most this many bytes.
const READ_GAP_BYTES: u64 = 16 << 10;
const READ_PIECE_BYTES: u64 = 256 << 10;
/// Bytes of one read of whole batches, unless the first of them is longer.
const SCAN_BYTES: u64 = 256 << 10;

const TAG_COMMIT: Tag = 0;
const TAG_WORK: Tag = 1;
const TAG_ASIDE: Tag = 2;
const TAG_SCAN: Tag = 3;
const TAG_SNAPSHOT: Tag = 4;
const TAG_READS: Tag = 16;

/// What identifies a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// The shard.
    pub shard: u16,
    /// The directory's identity, from its manifest.
    pub log_id: u128,
    /// Bytes of a segment.
    pub segment_bytes: u64,
}

/// What [`Log::poll`] tells.
#[derive(Debug)]
pub enum LogEvent {
    /// The batch in flight is durable: show it to the next step through [`Log::batch`].
    Durable,
    /// A whole record was read and its checksum holds, or it could not be had.
    Read {
        ticket: u128,
        record: Option<Vec<u8>>,
    },
    /// What [`Log::scan`] asked for.
    Scanned(Scanned),
    /// The record here could not be read, or is `rotten`: read each time, and never what was written. What asked for it
    /// is told by an event of its own.
    Unreadable {
        segment: u64,
        offset: u64,
        rotten: bool,
    },
    /// A write or flush failed. The log takes nothing more.
    Poisoned,
}

/// Figures of a log since its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogStats {
    /// Batches with records that became durable.
    pub batches: u64,
    /// Their bytes, headers and padding included.
    pub bytes: u64,
    /// Segments that hold live data.
    pub live_segments: u64,
    /// Segments that are ready to be written.
    pub prepared_segments: u64,
    /// Segments that were recycled.
    pub recycled: u64,
    /// Preparations that failed, for want of space above all.
    pub prepare_failures: u64,
    /// Records that could not be read.
    pub read_failures: u64,
    /// Snapshots that were written.
    pub snapshots: u64,
    /// Snapshots that came to nothing.
    pub snapshot_failures: u64,
    /// Bytes of the last snapshot.
    pub snapshot_bytes: u64,
    /// Bytes of log that a start would replay.
    pub replay_bytes: u64,
    /// Records in it.
    pub replay_records: u64,
    /// A backup is being taken: no segment is used again until it has what it wants.
    pub held: bool,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    buffer: usize,
    base: Lsn,
    bytes: usize,
    records: u32,
    retired: Lsn,
    /// Not the core's: an empty batch of the log itself.
    internal: bool,
}

/// A record that is to be read.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    ticket: u128,
    position: Lsn,
    bytes: usize,
}

/// Neighbouring records that are read as one piece.
#[derive(Debug)]
struct PendingRead {
    /// In the order of their positions.
    records: Vec<Wanted>,
    /// The position of the piece's first byte.
    start: Lsn,
    /// The key of their segment.
    key: u128,
    tries: u32,
}

impl PendingRead {
    fn new(records: Vec<Wanted>, tries: u32) -> PendingRead {
        let first = records[0].position.0;
        PendingRead {
            records,
            start: Lsn(first - first % BLOCK_BYTES as u64),
            key: 0,
            tries,
        }
    }
}

/// Whole batches that are to be read.
#[derive(Clone, Copy, Debug)]
struct PendingScan {
    start: Lsn,
    /// The key of their segment.
    key: u128,
    bytes: u64,
    tries: u32,
}

/// What a recovery hands over to the live log.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) epoch: u64,
    pub(crate) live: VecDeque<Segment>,
    pub(crate) dead: Vec<File>,
    pub(crate) next_file: u32,
    pub(crate) tail: u64,
    pub(crate) prev_crc: u32,
    pub(crate) retired: Lsn,
    /// The newest first.
    pub(crate) snapshots: Vec<u64>,
    /// Bytes of the one that was loaded.
    pub(crate) snapshot_bytes: u64,
    /// The log that was replayed.
    pub(crate) replayed: Stretch,
}

/// The log of one shard. Owned by the shard's thread.
#[derive(Debug)]
pub struct Log<D> {
    device: D,
    options: Options,
    epoch: u64,
    live: VecDeque<Segment>,
    prepared: VecDeque<Segment>,
    dead: Vec<File>,
    next_file: u32,
    /// Offset of the open batch in the last live segment.
    tail: u64,
    prev_crc: u32,
    durable: Lsn,
    /// The durable position that a batch on disk carries.
    carried: Lsn,
    retire_wanted: Lsn,
    retired: Lsn,
    /// Somebody copies the log: nothing more is said to be dead, and no segment is used again.
    held: bool,
    open: usize,
    len: usize,
    records: u32,
    in_flight: Option<Flight>,
    done: Option<Flight>,
    poisoned: Option<DeviceError>,
    work: Option<Work>,
    work_failed: bool,
    work_pause_until_ns: u64,
    out_of_space: bool,
    fill_credit: u64,
    fill_seen_ns: u64,
    wanted: Vec<Wanted>,
    reads: BTreeMap<Tag, PendingRead>,
    read: VecDeque<(u128, Option<Vec<u8>>)>,
    scan: Option<PendingScan>,
    scanned: Option<Scanned>,
    /// Positions of records that could not be had, and whether they are rotten.
    unreadable: VecDeque<(Lsn, bool)>,
    next_read: Tag,
    last_commit_ns: u64,
    snapshots: Snapshots,
    stats: LogStats,
}

impl<D: Device> Log<D> {
    pub(crate) fn new(device: D, options: Options, found: Found) -> Log<D> {
        let last = found.live.back().expect("a recovery leaves a segment");
        let durable = Lsn(last.number * options.segment_bytes + found.tail);
        let mut log = Log {
            device,
            options,
            epoch: found.epoch,
            live: found.live,
            prepared: VecDeque::new(),
            dead: found.dead,
            next_file: found.next_file,
            tail: found.tail,
            prev_crc: found.prev_crc,
            durable,
            carried: durable,
            retire_wanted: found.retired,
            retired: found.retired,
            held: false,
            open: 0,
            len: BATCH_HEADER_BYTES,
            records: 0,
            in_flight: None,
            done: None,
            poisoned: None,
            work: None,
            work_failed: false,
            work_pause_until_ns: 0,
            out_of_space: false,
            fill_credit: 0,
            fill_seen_ns: 0,
            wanted: Vec::new(),
            reads: BTreeMap::new(),
            read: VecDeque::new(),
            scan: None,
            scanned: None,
            unreadable: VecDeque::new(),
            next_read: TAG_READS,
            last_commit_ns: 0,
            snapshots: Snapshots::new(
                options,
                found.snapshots,
                found.replayed,
                found.snapshot_bytes,
            ),
            stats: LogStats::default(),
        };
        assert!(log.device.buffers().len() >= BUFFER_COUNT);
        log
    }

    /// What happened since the last call, one event at a time.
    pub fn poll(&mut self, now_ns: u64) -> Option<LogEvent> {
        while let Some((tag, result)) = self.device.completed() {
            match tag {
                TAG_COMMIT => {
                    let event = self.on_commit(result, now_ns);
                    if event.is_some() {
                        return event;
                    }
                }
                TAG_WORK => self.on_work(result, now_ns),
                TAG_ASIDE => {}
                TAG_SCAN => self.on_scan(result),
                TAG_SNAPSHOT => self.snapshots.on_done(result),
                read => self.on_read(read, result),
            }
        }
        if let Some((position, rotten)) = self.unreadable.pop_front() {
            return Some(LogEvent::Unreadable {
                segment: position.0 / self.options.segment_bytes,
                offset: position.0 % self.options.segment_bytes,
                rotten,
            });
        }
        if let Some(scanned) = self.scanned.take() {
            return Some(LogEvent::Scanned(scanned));
        }
        let (ticket, record) = self.read.pop_front()?;
        self.stats.read_failures += u64::from(record.is_none());
        Some(LogEvent::Read { ticket, record })
    }

    /// The batch that became durable, shown once, and the space of the one that is being filled.
    pub fn batch(&mut self) -> (Option<Durable<'_>>, BatchSpace<'_>) {
        self.roll_if_at_end();
        let base = self.position();
        let capacity = self.capacity();
        let segment_bytes = self.options.segment_bytes;
        let buffers = self.device.buffers();
        let Some(done) = self.done else {
            let space = BatchSpace {
                bytes: &mut buffers[self.open][..capacity],
                len: self.len,
                base,
                records: self.records,
            };
            return (None, space);
        };
        let [durable, open] = buffers
            .get_disjoint_mut([done.buffer, self.open])
            .expect("a durable batch and the open one have a buffer each");
        let durable = Durable {
            bytes: &durable[..done.bytes],
            offset: done.base.0 % segment_bytes,
        };
        let space = BatchSpace {
            bytes: &mut open[..capacity],
            len: self.len,
            base,
            records: self.records,
        };
        (Some(durable), space)
    }

    /// The step is over: the durable batch has been seen, and the open one holds this much now.
    pub fn filled(&mut self, len: usize, records: u32) {
        assert!(len >= self.len && records >= self.records && len <= self.capacity());
        self.done = None;
        self.len = len;
        self.records = records;
    }

    /// True if [`Log::seal`] may be called.
    pub fn can_seal(&self) -> bool {
        self.in_flight.is_none() && self.done.is_none() && self.poisoned.is_none()
    }

    /// Seals the open batch and opens the next one. A batch without records is durable at once, since everything
    /// before it is: nothing is written for it. `alone` says that the caller has nothing else to do until the batch is
    /// durable: the device may then take until that time.
    pub fn seal(&mut self, alone: bool) {
        assert!(self.can_seal());
        if self.records == 0 {
            self.done = Some(Flight {
                buffer: self.open,
                base: self.position(),
                bytes: self.len,
                records: 0,
                retired: self.retired,
                internal: false,
            });
            self.next_buffer();
            return;
        }
        self.commit(0, false, alone);
    }

    /// True if the next call of [`Log::batch`] shows a durable batch.
    pub fn has_durable(&self) -> bool {
        self.done.is_some()
    }

    /// The open batch is empty and the next record does not fit what is left of the segment: go on in the next one.
    /// False if no segment is ready.
    pub fn end_segment(&mut self) -> bool {
        assert_eq!(self.records, 0);
        self.roll()
    }

    /// Starts what the log itself wants: an empty batch after falling idle, the next segment, removals.
    pub fn tick(&mut self, now_ns: u64) {
        if self.poisoned.is_some() {
            return;
        }
        if self.wants_carry() && now_ns >= self.last_commit_ns + CARRY_AFTER_NS {
            self.roll_if_at_end();
            if self.capacity() > BATCH_HEADER_BYTES {
                self.commit(FLAG_CARRY, true, true);
            }
        }
        self.background(now_ns);
        if self.in_flight.is_none() {
            let (next, cleared) = self.snapshots.next_ops(now_ns);
            for op in cleared {
                self.device.start(TAG_ASIDE, op);
            }
            if let Some(op) = next {
                self.device.start(TAG_SNAPSHOT, op);
            }
        }
    }

    /// True if a snapshot is worth it and may begin: between a step and the next batch's sealing.
    /// It would hold so many entries.
    pub fn wants_snapshot(&self, now_ns: u64, entries: u64) -> bool {
        self.can_seal() && self.snapshots.is_due(now_ns, entries)
    }

    /// Begins a snapshot with what every batch before the open one has said. `secret` is what the shard's hashes hang
    /// on, and `bytes` about what it is going to have.
    pub fn begin_snapshot(&mut self, secret: u64, bytes: u64) {
        assert!(
            self.can_seal(),
            "every batch before the open one is durable"
        );
        let begin = Begin {
            start: self.durable,
            epoch: self.epoch,
            prev_crc: self.prev_crc,
            secret,
        };
        self.snapshots.begin(begin, bytes);
    }

    /// True if [`Log::put_piece`] may be called.
    pub fn wants_piece(&self) -> bool {
        self.poisoned.is_none() && self.done.is_none() && self.snapshots.wants_piece()
    }

    /// Takes the next piece of the snapshot, as the step before left the shard; `None` gives the snapshot up.
    pub fn put_piece(&mut self, piece: Option<&Piece>) {
        let flight = self.in_flight.filter(|flight| !flight.internal);
        let applied = flight.map_or_else(|| self.position(), |flight| flight.base);
        self.snapshots.put(piece, applied.min(self.durable));
    }

    /// When [`Log::tick`] has something to do next; `None` if nothing is foreseen.
    pub fn next_wake_ns(&self, now_ns: u64) -> Option<u64> {
        if self.poisoned.is_some() {
            return None;
        }
        let carry = self
            .wants_carry()
            .then_some(self.last_commit_ns + CARRY_AFTER_NS);
        let work = match &self.work {
            Some(work) if work.flying() > 0 => None,
            Some(_) => Some(now_ns + 1_000_000),
            None if self.needs_work() => Some(self.work_pause_until_ns.max(now_ns + 1)),
            None => None,
        };
        let snapshot = match self.in_flight {
            Some(_) => None, // Its end wakes.
            None => self.snapshots.next_wake_ns(now_ns),
        };
        [carry, work, snapshot].into_iter().flatten().min()
    }

    /// Everything before this position is dead: its segments go once a durable batch says so.
    pub fn retire_before(&mut self, position: Lsn) {
        if self.held {
            return;
        }
        self.retire_wanted = self.retire_wanted.max(position);
        if planted(Bug::RecycledTooEarly) {
            self.bury(self.retire_wanted);
        }
    }

    /// From now on until [`Log::release`] the log only grows: no batch says that more is dead than those before it were
    /// told, and no segment is used again. What a start would read of the log at this moment stays where it is.
    pub fn hold(&mut self) {
        self.held = true;
    }

    /// The opposite of [`Log::hold`].
    pub fn release(&mut self) {
        self.held = false;
        self.bury(self.retired);
    }

    /// Everything before this position is dead, says the last durable batch.
    pub fn retired(&self) -> Lsn {
        self.retired
    }

    /// Reads the record at `position` with the next [`Log::start_reads`]; told by [`LogEvent::Read`]. `bytes` is a guess
    /// of its length: a longer one is read once more.
    pub fn read(&mut self, ticket: u128, position: Lsn, bytes: usize) {
        self.wanted.push(Wanted {
            ticket,
            position,
            bytes,
        });
    }

    /// Reads the whole batches from here on, as many as one read brings and this segment has; told by
    /// [`LogEvent::Scanned`]. One at a time.
    pub fn scan(&mut self, from: Lsn) {
        assert!(self.scan.is_none() && self.scanned.is_none());
        let offset = (from.0 % self.options.segment_bytes).max(SEGMENT_DATA_OFFSET);
        let start = Lsn(from.0 - from.0 % self.options.segment_bytes + offset);
        self.start_scan(start, SCAN_BYTES, 1);
    }

    /// Writes the closing batch. Call it when nothing is in flight and nothing is open; its end is no event, so ask
    /// [`Log::can_seal`].
    pub fn close(&mut self) {
        assert!(self.can_seal() && self.records == 0);
        self.roll_if_at_end();
        if self.capacity() > BATCH_HEADER_BYTES {
            self.commit(FLAG_CLOSING, true, true);
        }
    }

    /// The first failure, if the log is poisoned.
    pub fn poisoned(&self) -> Option<&DeviceError> {
        self.poisoned.as_ref()
    }

    /// True after a segment could not be prepared for want of space, until one is.
    pub fn out_of_space(&self) -> bool {
        self.out_of_space
    }

    /// True if nothing is in flight, in the background neither.
    pub fn is_quiet(&self) -> bool {
        self.in_flight.is_none()
            && self.done.is_none()
            && self.reads.is_empty()
            && self.wanted.is_empty()
            && self.read.is_empty()
            && self.scan.is_none()
            && self.scanned.is_none()
            && self.work.as_ref().is_none_or(|work| work.flying() == 0)
    }

    /// Everything before this position is durable.
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// Records in the open batch.
    pub fn open_records(&self) -> u32 {
        self.records
    }

    /// Bytes in the batch that is in flight; `None` if none is.
    pub fn in_flight_bytes(&self) -> Option<usize> {
        self.in_flight.map(|flight| flight.bytes)
    }

    /// Figures.
    pub fn stats(&self) -> LogStats {
        LogStats {
            live_segments: self.live.len() as u64,
            prepared_segments: self.prepared.len() as u64,
            snapshots: self.snapshots.made,
            snapshot_failures: self.snapshots.failures,
            snapshot_bytes: self.snapshots.last_bytes(),
            replay_bytes: self.snapshots.since.bytes,
            replay_records: self.snapshots.since.records,
            held: self.held,
            ..self.stats
        }
    }

    /// The device, to wait on it.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Gives the device back, as after a crash.
    pub fn into_device(self) -> D {
        self.device
    }

    fn position(&self) -> Lsn {
        let last = self.live.back().expect("there is always a segment");
        Lsn(last.number * self.options.segment_bytes + self.tail)
    }

    /// Bytes that the open batch may have. At the end of the last segment with none prepared there is only room for
    /// the header, which no record fits.
    fn capacity(&self) -> usize {
        let left = self.options.segment_bytes - self.tail;
        if left < ROLL_BYTES && self.records == 0 {
            return BATCH_HEADER_BYTES;
        }
        left.min(BATCH_BYTES_MAX as u64) as usize
    }

    fn roll_if_at_end(&mut self) {
        if self.records == 0 && self.options.segment_bytes - self.tail < ROLL_BYTES {
            self.roll();
        }
    }

    fn roll(&mut self) -> bool {
        // A batch in flight belongs to the segment that ends; the next one may be filled meanwhile.
        let Some(next) = self.prepared.pop_front() else {
            return false;
        };
        self.live.push_back(next);
        self.tail = SEGMENT_DATA_OFFSET;
        true
    }

    fn next_buffer(&mut self) {
        let taken = [self.in_flight, self.done].map(|flight| flight.map(|flight| flight.buffer));
        self.open = (0..BUFFER_COUNT)
            .find(|&buffer| !taken.contains(&Some(buffer)))
            .expect("two of three buffers are taken at most");
        self.len = BATCH_HEADER_BYTES;
        self.records = 0;
    }

    fn commit(&mut self, flags: u16, internal: bool, alone: bool) {
        let base = self.position();
        let segment = *self.live.back().expect("there is always a segment");
        let bytes = if internal {
            BATCH_HEADER_BYTES
        } else {
            self.len
        };
        let header = BatchHeader {
            crc: 0,
            flags,
            payload_bytes: (bytes - BATCH_HEADER_BYTES) as u32,
            records: if internal { 0 } else { self.records },
            shard: self.options.shard,
            segment: segment.number,
            lsn: base,
            epoch: self.epoch,
            durable: self.durable,
            retired: self.retire_wanted,
            prev_crc: self.prev_crc,
        };
        let padded = bytes.next_multiple_of(BLOCK_BYTES);
        let buffer = &mut self.device.buffers()[self.open];
        buffer[bytes..padded].fill(0);
        let batch = &mut buffer[..bytes];
        seal_records(batch, base, header.records, segment.key);
        self.prev_crc = header.seal(batch, segment.key);
        self.carried = self.durable;
        self.in_flight = Some(Flight {
            buffer: self.open,
            base,
            bytes,
            records: header.records,
            retired: self.retire_wanted,
            internal,
        });
        self.device.start(
            TAG_COMMIT,
            DeviceOp::Commit {
                file: segment.file.id,
                offset: self.tail,
                buffer: self.open,
                bytes: padded,
                alone,
            },
        );
        self.tail += padded as u64;
        self.fill_credit =
            (self.fill_credit + 2 * padded as u64).min(2 * self.options.segment_bytes);
        self.next_buffer();
    }

    fn on_commit(&mut self, result: Result<Output, DeviceError>, now_ns: u64) -> Option<LogEvent> {
        let flight = self.in_flight.take().expect("a commit was in flight");
        self.last_commit_ns = now_ns;
        if let Err(error) = result {
            let file = self.live.back().expect("there is always a segment").file.id;
            if planted(Bug::RetriedFlush) {
                self.in_flight = Some(flight);
                self.device.start(TAG_COMMIT, DeviceOp::Flush { file });
                return None;
            }
            self.poisoned.get_or_insert(error);
            return Some(LogEvent::Poisoned);
        }
        let padded = flight.bytes.next_multiple_of(BLOCK_BYTES) as u64;
        self.durable = Lsn(flight.base.0 + padded);
        self.bury(flight.retired);
        if flight.internal {
            // An empty batch need not be carried by another one.
            self.carried = self.durable;
            return None;
        }
        self.stats.batches += 1;
        self.stats.bytes += padded;
        self.snapshots.appended(padded, u64::from(flight.records));
        assert!(
            self.done.is_none(),
            "a durable batch is seen before the next"
        );
        assert!(flight.records > 0);
        self.done = Some(flight);
        Some(LogEvent::Durable)
    }

    /// A durable batch says that everything before `retired` is dead.
    fn bury(&mut self, retired: Lsn) {
        self.retired = retired;
        if self.held {
            return;
        }
        let first = retired.0 / self.options.segment_bytes;
        while self.live.len() > 1 && self.live[0].number < first {
            let segment = self.live.pop_front().expect("there are two");
            self.dead.push(segment.file);
        }
    }

    fn wants_carry(&self) -> bool {
        self.can_seal() && self.records == 0 && self.carried < self.durable
    }

    fn needs_work(&self) -> bool {
        self.prepared.len() < PREPARED_COUNT || self.dead.len() > DEAD_COUNT_MAX
    }

    fn background(&mut self, now_ns: u64) {
        let idle_ms = (now_ns - self.fill_seen_ns.min(now_ns)) / 1_000_000;
        if idle_ms > 0 {
            self.fill_seen_ns = now_ns;
            self.fill_credit = (self.fill_credit + idle_ms.min(4) * FILL_IDLE_BYTES_PER_MS)
                .min(2 * self.options.segment_bytes);
        }
        let starved = self.prepared.is_empty();
        if self.in_flight.is_some() && !starved {
            return;
        }
        if self.work.is_none() && self.needs_work() && now_ns >= self.work_pause_until_ns {
            self.work = Some(self.next_work());
            self.work_failed = false;
        }
        while let Some(work) = &mut self.work {
            if self.work_failed {
                break;
            }
            if work.is_filling() {
                let paced = self.fill_credit < FILL_PIECE_BYTES as u64 && !starved;
                if paced || work.flying() >= FILL_PIECES_MAX {
                    break;
                }
            }
            let filling = work.is_filling();
            let Some(op) = work.next_op() else {
                break;
            };
            if filling {
                self.fill_credit = self.fill_credit.saturating_sub(FILL_PIECE_BYTES as u64);
            }
            self.device.start(TAG_WORK, op);
        }
    }

    fn next_work(&mut self) -> Work {
        let last = self.prepared.back().or(self.live.back());
        let header = SegmentHeader {
            shard: self.options.shard,
            log_id: self.options.log_id,
            segment: last.expect("there is always a segment").number + 1,
            segment_bytes: self.options.segment_bytes,
            epoch: self.epoch,
            key: self.device.random(),
        };
        if self.prepared.len() >= PREPARED_COUNT {
            let file = self.dead.pop().expect("too many are dead");
            return Work::remove(file, header);
        }
        if let Some(file) = self.dead.pop() {
            self.stats.recycled += 1;
            return Work::recycle(file, header);
        }
        self.next_file += 1;
        Work::create(self.next_file, header)
    }

    fn on_work(&mut self, result: Result<Output, DeviceError>, now_ns: u64) {
        let work = self.work.as_mut().expect("work was in flight");
        let failed = match result {
            Ok(output) if !self.work_failed => match work.on_done(output) {
                Progress::Working => false,
                Progress::Ready(segment) => {
                    self.prepared.push_back(segment);
                    self.out_of_space = false;
                    self.work = None;
                    false
                }
                Progress::Removed => {
                    self.work = None;
                    false
                }
                Progress::Mismatch => true,
            },
            Ok(_) => {
                work.on_failed();
                true
            }
            Err(error) => {
                work.on_failed();
                self.out_of_space |= error.kind == DeviceErrorKind::NoSpace;
                true
            }
        };
        if !failed {
            return;
        }
        self.work_failed = true;
        let work = self.work.as_ref().expect("it has just failed");
        if work.flying() == 0 {
            for op in work.abandoned() {
                self.device.start(TAG_ASIDE, op);
            }
            self.work = None;
            self.stats.prepare_failures += 1;
            self.work_pause_until_ns = now_ns + PREPARE_AGAIN_NS;
        }
    }

    /// Starts the reads asked for. Neighbours are read in one piece: a backlog is read back in the order in which it was written.
    pub fn start_reads(&mut self) {
        if self.wanted.is_empty() {
            return;
        }
        let mut wanted = std::mem::take(&mut self.wanted);
        wanted.sort_unstable_by_key(|wanted| wanted.position);
        let segment_bytes = self.options.segment_bytes;
        let piece =
            |a: &Wanted, b: &Wanted| a.position.0 / segment_bytes == b.position.0 / segment_bytes;
        let mut rest = &wanted[..];
        while let Some(first) = rest.first() {
            let start = first.position.0;
            let mut end = start + first.bytes as u64;
            let mut count = 1;
            for next in &rest[1..] {
                let next_end = end.max(next.position.0 + next.bytes as u64);
                if !piece(first, next)
                    || next.position.0 > end + READ_GAP_BYTES
                    || next_end > start + READ_PIECE_BYTES
                {
                    break;
                }
                end = next_end;
                count += 1;
            }
            let (records, behind) = rest.split_at(count);
            rest = behind;
            self.start_read(PendingRead::new(records.to_vec(), 1));
        }
        wanted.clear();
        self.wanted = wanted;
    }

    fn start_read(&mut self, mut read: PendingRead) {
        let segment_bytes = self.options.segment_bytes;
        let number = read.start.0 / segment_bytes;
        let Some(segment) = self.live_segment(number) else {
            // Nobody needs what stood in a segment that is gone.
            let gone = read.records.iter().map(|wanted| (wanted.ticket, None));
            self.read.extend(gone);
            return;
        };
        read.key = segment.key;
        let end = read.records.iter().map(|r| r.position.0 + r.bytes as u64);
        let end = end.max().expect("a piece has records");
        let end = end.min((number + 1) * segment_bytes);
        let tag = self.next_read;
        self.next_read += 1;
        self.device.start(
            tag,
            DeviceOp::Read {
                file: segment.file.id,
                offset: read.start.0 % segment_bytes,
                into: Block::new(((end - read.start.0) as usize).next_multiple_of(BLOCK_BYTES)),
            },
        );
        self.reads.insert(tag, read);
    }

    fn live_segment(&self, number: u64) -> Option<Segment> {
        let index = number.checked_sub(self.live[0].number)?;
        self.live.get(index as usize).copied()
    }

    fn start_scan(&mut self, start: Lsn, bytes: u64, tries: u32) {
        let offset = start.0 % self.options.segment_bytes;
        let number = start.0 / self.options.segment_bytes;
        let Some(segment) = self.live_segment(number) else {
            self.scanned = Some(Scanned {
                start,
                ..Scanned::default()
            });
            return;
        };
        self.scan = Some(PendingScan {
            start,
            key: segment.key,
            bytes,
            tries,
        });
        let left = self.options.segment_bytes - offset;
        self.device.start(
            TAG_SCAN,
            DeviceOp::Read {
                file: segment.file.id,
                offset,
                into: Block::new(left.min(bytes) as usize),
            },
        );
    }

    fn on_scan(&mut self, result: Result<Output, DeviceError>) {
        let scan = self.scan.take().expect("a scan was in flight");
        let Ok(Output::Bytes(bytes)) = result else {
            self.scan_again(scan, scan.start, false);
            return;
        };
        let segment_bytes = self.options.segment_bytes;
        let mut scanned = Scanned {
            start: scan.start,
            ..Scanned::default()
        };
        let mut at = 0;
        while at < bytes.len() {
            let place = Lsn(scan.start.0 + at as u64);
            let header = BatchHeader::peek(&bytes[at..])
                .filter(|header| header.lsn == place && header.shard == self.options.shard);
            let Some(header) = header else {
                break; // The segment's end.
            };
            let Some(batch) = bytes.get(at..at + header.bytes()) else {
                if at == 0 && scan.bytes < BATCH_BYTES_MAX as u64 {
                    self.start_scan(scan.start, BATCH_BYTES_MAX as u64, scan.tries);
                    return;
                }
                scanned.next = Some(place).filter(|_| at > 0);
                break;
            };
            let mut found = Vec::new();
            let sound = header.holds(batch, scan.key)
                && records(batch, header.records, |record, _, _| {
                    found.push((at + record) as u32);
                    Some(())
                })
                .is_some();
            if !sound {
                self.scan_again(scan, place, true);
                return;
            }
            scanned.records.append(&mut found);
            at = (header.end().0 - scan.start.0) as usize;
            let more = header.end().0 % segment_bytes != 0;
            scanned.next = Some(header.end()).filter(|_| more && at >= bytes.len());
        }
        scanned.bytes = bytes[..at.min(bytes.len())].to_vec();
        self.scanned = Some(scanned);
    }

    fn scan_again(&mut self, scan: PendingScan, place: Lsn, rotten: bool) {
        if scan.tries < READ_TRIES {
            self.start_scan(scan.start, scan.bytes, scan.tries + 1);
            return;
        }
        self.stats.read_failures += 1;
        self.unreadable.push_back((place, rotten));
        self.scanned = Some(Scanned {
            start: scan.start,
            ..Scanned::default()
        });
    }

    fn on_read(&mut self, tag: Tag, result: Result<Output, DeviceError>) {
        let read = self.reads.remove(&tag).expect("the read was started");
        let Ok(Output::Bytes(bytes)) = result else {
            self.try_again(read.records, read.tries, false);
            return;
        };
        let mut rotten = Vec::new();
        for wanted in read.records {
            let from = (wanted.position.0 - read.start.0) as usize;
            let found = bytes.get(from..).unwrap_or_default();
            let whole = record_bytes(found).unwrap_or(usize::MAX);
            match found.get(..whole) {
                Some(record)
                    if record_holds(record, wanted.position, read.key)
                        || planted(Bug::RotAccepted) =>
                {
                    self.read.push_back((wanted.ticket, Some(record.to_vec())));
                }
                None if wanted.bytes < whole && whole <= BATCH_BYTES_MAX => {
                    let longer = Wanted {
                        bytes: whole,
                        ..wanted
                    };
                    self.start_read(PendingRead::new(vec![longer], read.tries));
                }
                Some(_) | None => rotten.push(wanted),
            }
        }
        if !rotten.is_empty() {
            self.try_again(rotten, read.tries, true);
        }
    }

    /// A disk that fails or gives wrong bytes once may do better the next time.
    fn try_again(&mut self, records: Vec<Wanted>, tries: u32, rotten: bool) {
        if tries < READ_TRIES {
            self.start_read(PendingRead::new(records, tries + 1));
            return;
        }
        for wanted in records {
            self.unreadable.push_back((wanted.position, rotten));
            self.read.push_back((wanted.ticket, None));
        }
    }
}
