//! Snapshots beside the log: the pieces of a shard's facts in a file of their own, written while the shard goes on,
//! and found again at a start. `docs/FORMAT.md` has the bytes.
//!
//! A snapshot is made as `snapshot-N.tmp`, flushed, renamed, its name flushed, and then read back and verified; only then
//! does it count and does an older one go. Two are kept. None is ever needed: the log is complete without.

use pelton_core::{
    id::Lsn,
    limits::SNAPSHOT_PIECE_BYTES,
    planted::{Bug, planted},
    snapshot::{Piece, PieceKind},
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    device::{Block, Device, DeviceError, DeviceOp, FileId, Output},
    format::BLOCK_BYTES,
    log::Options,
};

/// Version of the file's layout and of what the pieces hold.
pub const SNAPSHOT_VERSION: u16 = 3;
/// Bytes of the header in front of each piece.
pub const PIECE_HEADER_BYTES: usize = 64;
/// Snapshots that are kept.
pub const SNAPSHOTS_KEPT: usize = 2;
const MAGIC: u32 = u32::from_le_bytes(*b"PLSN");
/// The number of a first piece's kind; the others are those of [`PieceKind`].
const KIND_BEGIN: u16 = 0;
const BEGIN_BYTES: usize = 32;
/// Bytes of one read. A piece always fits.
const READ_BYTES: usize = 1 << 20;
const PIECE_BYTES_MAX: usize =
    (PIECE_HEADER_BYTES + SNAPSHOT_PIECE_BYTES).next_multiple_of(BLOCK_BYTES);
const _: () = assert!(PIECE_BYTES_MAX <= READ_BYTES);

/// Where a snapshot begins, and what a start needs to go on from there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Begin {
    /// The place in the log from which on it is replayed.
    pub start: Lsn,
    /// The epoch and the checksum of the batch in front of it.
    pub epoch: u64,
    /// See `epoch`.
    pub prev_crc: u32,
    /// The secret of the shard's hashes.
    pub secret: u64,
}

/// The name of a snapshot.
pub fn snapshot_name(number: u64) -> String {
    format!("snapshot-{number:06}.pls")
}

fn temporary_name(number: u64) -> String {
    format!("snapshot-{number:06}.tmp")
}

/// The number in a snapshot's name.
pub fn parse_snapshot_name(name: &str) -> Option<u64> {
    let number = name.strip_prefix("snapshot-")?.strip_suffix(".pls")?;
    number.parse().ok().filter(|number| *number < u64::MAX / 2)
}

/// True for a snapshot that was not finished.
pub fn is_temporary_name(name: &str) -> bool {
    name.starts_with("snapshot-") && name.ends_with(".tmp")
}

/// The first piece.
pub fn encode_begin(options: Options, number: u64, begin: Begin) -> Vec<u8> {
    let mut payload = Vec::with_capacity(BEGIN_BYTES);
    payload.extend(begin.epoch.to_le_bytes());
    payload.extend(u64::from(begin.prev_crc).to_le_bytes());
    payload.extend(begin.secret.to_le_bytes());
    payload.extend(options.segment_bytes.to_le_bytes());
    encode_piece(options, number, 0, KIND_BEGIN, begin.start, &payload)
}

/// A piece with its header, padded to whole blocks.
pub fn encode_piece(
    options: Options,
    number: u64,
    index: u32,
    kind: u16,
    position: Lsn,
    payload: &[u8],
) -> Vec<u8> {
    let bytes = PIECE_HEADER_BYTES + payload.len();
    let mut block = Vec::with_capacity(bytes.next_multiple_of(BLOCK_BYTES));
    block.extend(MAGIC.to_le_bytes());
    block.extend(SNAPSHOT_VERSION.to_le_bytes());
    block.extend(kind.to_le_bytes());
    block.extend((payload.len() as u32).to_le_bytes());
    block.extend(index.to_le_bytes());
    block.extend(options.log_id.to_le_bytes());
    block.extend(number.to_le_bytes());
    block.extend(position.0.to_le_bytes());
    block.extend(u32::from(options.shard).to_le_bytes());
    block.extend([0; 4]);
    block.extend([0; 8]); // The checksum.
    block.extend(payload);
    let sum = checksum(&block).to_le_bytes();
    block[CHECKSUM_AT..PIECE_HEADER_BYTES].copy_from_slice(&sum);
    block.resize(bytes.next_multiple_of(BLOCK_BYTES), 0);
    block
}

const CHECKSUM_AT: usize = 56;

/// XXH3-64 of the payload, mixed with the header.
fn checksum(piece: &[u8]) -> u64 {
    let header = xxh3_64(&piece[..CHECKSUM_AT]);
    xxh3_64(&piece[PIECE_HEADER_BYTES..]).rotate_left(1) ^ header
}

/// A piece as it stands in a file.
struct Found<'a> {
    kind: u16,
    position: Lsn,
    payload: &'a [u8],
    /// With header and padding.
    bytes: usize,
}

/// The piece here; `None` if it is not whole, or not the one that belongs here.
fn decode(bytes: &[u8], options: Options, number: u64, index: u32) -> Option<Found<'_>> {
    let header: &[u8; PIECE_HEADER_BYTES] = bytes.first_chunk()?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| {
        header[at..]
            .first_chunk()
            .map_or(0, |field| u32::from_le_bytes(*field))
    };
    let u64_at = |at: usize| {
        header[at..]
            .first_chunk()
            .map_or(0, |field| u64::from_le_bytes(*field))
    };
    let log_id = header[16..]
        .first_chunk()
        .map_or(0, |field| u128::from_le_bytes(*field));
    let length = u32_at(8) as usize;
    let belongs = u32_at(0) == MAGIC
        && u16_at(4) == SNAPSHOT_VERSION
        && u32_at(12) == index
        && log_id == options.log_id
        && u64_at(32) == number
        && u32_at(48) == u32::from(options.shard)
        && length <= SNAPSHOT_PIECE_BYTES;
    if !belongs {
        return None;
    }
    let piece = bytes.get(..PIECE_HEADER_BYTES + length)?;
    if checksum(piece) != u64_at(CHECKSUM_AT) && !planted(Bug::DamagedSnapshotTrusted) {
        return None;
    }
    Some(Found {
        kind: u16_at(6),
        position: Lsn(u64_at(40)),
        payload: &piece[PIECE_HEADER_BYTES..],
        bytes: piece.len().next_multiple_of(BLOCK_BYTES),
    })
}

fn begin_of(found: &Found<'_>, segment_bytes: u64) -> Option<Begin> {
    let payload: &[u8; BEGIN_BYTES] = found.payload.try_into().ok()?;
    let u64_at = |at: usize| {
        payload[at..]
            .first_chunk()
            .map_or(0, |field| u64::from_le_bytes(*field))
    };
    (found.kind == KIND_BEGIN)
        .then(|| Begin {
            start: found.position,
            epoch: u64_at(0),
            prev_crc: u64_at(8) as u32,
            secret: u64_at(16),
        })
        .filter(|_| u64_at(24) == segment_bytes)
}

/// A snapshot that is read from its beginning to its end.
pub struct Reading {
    options: Options,
    number: u64,
    file: FileId,
    file_bytes: u64,
    /// What was read last, from where in the file, and how much of it is done.
    held: Block,
    offset: u64,
    done: usize,
    index: u32,
}

/// What a snapshot's reading comes to, piece by piece.
pub enum Read<'a> {
    /// A piece, taken as of this place in the log.
    Piece(PieceKind, Lsn, &'a [u8]),
    /// The rest cannot be had.
    Damaged,
}

impl Reading {
    /// Opens a snapshot; `None` if its beginning cannot be had.
    pub fn open<D: Device>(
        device: &mut D,
        options: Options,
        number: u64,
    ) -> Result<Option<(Reading, Begin)>, DeviceError> {
        let name = snapshot_name(number);
        let Output::File(file, file_bytes) = device.perform(DeviceOp::Open { name })? else {
            panic!("opening brings a file");
        };
        let mut reading = Reading {
            options,
            number,
            file,
            file_bytes,
            held: Block::new(0),
            offset: 0,
            done: 0,
            index: 0,
        };
        reading.fill(device)?;
        let first = decode(&reading.held, options, number, 0);
        let begin = first
            .as_ref()
            .and_then(|first| Some((begin_of(first, options.segment_bytes)?, first.bytes)));
        let Some((begin, bytes)) = begin else {
            reading.close(device);
            return Ok(None);
        };
        reading.done = bytes;
        reading.index = 1;
        Ok(Some((reading, begin)))
    }

    fn fill<D: Device>(&mut self, device: &mut D) -> Result<(), DeviceError> {
        self.offset += self.done as u64;
        self.done = 0;
        let read = DeviceOp::Read {
            file: self.file,
            offset: self.offset,
            into: Block::new(READ_BYTES),
        };
        let Output::Bytes(bytes) = device.perform(read)? else {
            panic!("a read brings bytes");
        };
        self.held = bytes;
        Ok(())
    }

    /// The next piece.
    pub fn next<D: Device>(&mut self, device: &mut D) -> Result<Read<'_>, DeviceError> {
        if self.held.len() - self.done < PIECE_BYTES_MAX {
            self.fill(device)?;
        }
        let (options, number, index) = (self.options, self.number, self.index);
        let Some(found) = decode(&self.held[self.done..], options, number, index) else {
            return Ok(Read::Damaged);
        };
        let Some(kind) = PieceKind::from_number(found.kind) else {
            return Ok(Read::Damaged);
        };
        self.done += found.bytes;
        self.index += 1;
        Ok(Read::Piece(kind, found.position, found.payload))
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes of it that were read.
    pub fn read(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// Ends the reading. How many bytes were read.
    pub fn close<D: Device>(self, device: &mut D) -> u64 {
        // A file that cannot be closed was still read.
        let _ = device.perform(DeviceOp::Close { file: self.file });
        self.read()
    }
}

/// What is known of a snapshot that was read from end to end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// Its file.
    pub name: String,
    /// Where it begins and up to where it vouches for the log; `None` if it is damaged.
    pub sound: Option<(Begin, Lsn)>,
}

/// Reads every snapshot there is, the newest first, and changes nothing.
pub fn judge_snapshots<D: Device>(
    device: &mut D,
    options: Options,
) -> Result<Vec<Judgement>, DeviceError> {
    let mut judgements = Vec::new();
    for number in numbers(device)? {
        let mut sound = None;
        if let Some((mut reading, begin)) = Reading::open(device, options, number)? {
            while let Read::Piece(kind, position, _) = reading.next(device)? {
                if kind == PieceKind::End {
                    sound = Some((begin, position));
                    break;
                }
            }
            reading.close(device);
        }
        let name = snapshot_name(number);
        judgements.push(Judgement { name, sound });
    }
    Ok(judgements)
}

/// The numbers of the snapshots, the newest first.
pub(crate) fn numbers<D: Device>(device: &mut D) -> Result<Vec<u64>, DeviceError> {
    let Output::Names(names) = device.perform(DeviceOp::List)? else {
        panic!("a listing brings names");
    };
    let numbers = names.iter().filter_map(|name| parse_snapshot_name(name));
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    Ok(numbers)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Create,
    Fill,
    Flush,
    Rename,
    FlushName,
    Verify,
    Remove,
    Close,
    Done,
}

/// A snapshot on its way to the disk, one operation at a time.
#[derive(Debug)]
pub(crate) struct Writer {
    options: Options,
    number: u64,
    begin: Begin,
    stage: Stage,
    file: Option<FileId>,
    flying: bool,
    /// About what it is going to have.
    expected_bytes: u64,
    /// The piece to be written next.
    block: Option<Vec<u8>>,
    index: u32,
    written: u64,
    ended: bool,
    /// How far it has been read back, and the piece that comes next.
    verified: u64,
    verified_index: u32,
    /// Snapshots that go when this one counts.
    outdated: Vec<u64>,
}

/// Where a snapshot stands after an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Written {
    Working,
    Done,
    /// What was read back is not what was written.
    Mismatch,
}

impl Writer {
    pub(crate) fn new(
        options: Options,
        number: u64,
        begin: Begin,
        expected_bytes: u64,
        outdated: Vec<u64>,
    ) -> Writer {
        let block = encode_begin(options, number, begin);
        Writer {
            options,
            number,
            begin,
            stage: Stage::Create,
            file: None,
            flying: false,
            expected_bytes,
            block: Some(block),
            index: 1,
            written: 0,
            ended: false,
            verified: 0,
            verified_index: 0,
            outdated,
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Bytes written so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.written
    }

    pub(crate) fn is_flying(&self) -> bool {
        self.flying
    }

    /// True if the next piece can be taken.
    pub(crate) fn wants_piece(&self) -> bool {
        self.stage == Stage::Fill && self.block.is_none() && !self.ended && !self.flying
    }

    /// Takes a piece, which knows of everything before `position`.
    pub(crate) fn put(&mut self, piece: &Piece, position: Lsn) {
        assert!(self.wants_piece() && position >= self.begin.start);
        let kind = piece.kind as u16;
        let block = encode_piece(
            self.options,
            self.number,
            self.index,
            kind,
            position,
            &piece.bytes,
        );
        self.block = Some(block);
        self.index += 1;
        self.ended = piece.kind == PieceKind::End;
    }

    /// The next operation; `None` while one is in flight or a piece is missing.
    pub(crate) fn next_op(&mut self) -> Option<DeviceOp> {
        if self.flying {
            return None;
        }
        let file = || self.file.expect("the stage comes after the creation");
        let op = match self.stage {
            Stage::Create => DeviceOp::Create {
                name: temporary_name(self.number),
                bytes: self.expected_bytes.next_multiple_of(BLOCK_BYTES as u64),
            },
            Stage::Fill => DeviceOp::Write {
                file: file(),
                offset: self.written,
                data: self.block.clone()?,
            },
            Stage::Flush => DeviceOp::Flush { file: file() },
            Stage::Rename => DeviceOp::Rename {
                from: temporary_name(self.number),
                to: snapshot_name(self.number),
            },
            Stage::FlushName => DeviceOp::FlushDirectory,
            Stage::Verify => DeviceOp::Read {
                file: file(),
                offset: self.verified,
                into: Block::new(PIECE_BYTES_MAX),
            },
            Stage::Remove => DeviceOp::Remove {
                name: snapshot_name(*self.outdated.last()?),
            },
            Stage::Close => DeviceOp::Close { file: file() },
            Stage::Done => return None,
        };
        self.flying = true;
        Some(op)
    }

    /// An operation succeeded.
    pub(crate) fn on_done(&mut self, output: Output) -> Written {
        self.flying = false;
        self.stage = match self.stage {
            Stage::Create => {
                let Output::File(file, _) = output else {
                    panic!("a creation brings a file");
                };
                self.file = Some(file);
                Stage::Fill
            }
            Stage::Fill => {
                let block = self.block.take().expect("it was written");
                self.written += block.len() as u64;
                if self.ended {
                    Stage::Flush
                } else {
                    Stage::Fill
                }
            }
            Stage::Flush => Stage::Rename,
            Stage::Rename => Stage::FlushName,
            Stage::FlushName => Stage::Verify,
            Stage::Verify => {
                let Output::Bytes(bytes) = output else {
                    panic!("a read brings bytes");
                };
                let (options, number) = (self.options, self.number);
                let (before, mut at) = (self.verified_index, 0);
                while self.verified_index < self.index
                    && let Some(piece) = bytes.get(at..)
                    && let Some(found) = decode(piece, options, number, self.verified_index)
                {
                    at += found.bytes;
                    self.verified_index += 1;
                }
                // One that was cut off by the end of the read is at the beginning of the next.
                if self.verified_index == before {
                    return Written::Mismatch;
                }
                self.verified += at as u64;
                match (self.verified_index == self.index, self.outdated.is_empty()) {
                    (false, _) => Stage::Verify,
                    (true, false) => Stage::Remove,
                    (true, true) => Stage::Close,
                }
            }
            Stage::Remove => {
                self.outdated.pop();
                if self.outdated.is_empty() {
                    Stage::Close
                } else {
                    Stage::Remove
                }
            }
            Stage::Close => Stage::Done,
            Stage::Done => unreachable!("nothing is in flight"),
        };
        match self.stage {
            Stage::Done => Written::Done,
            Stage::Create
            | Stage::Fill
            | Stage::Flush
            | Stage::Rename
            | Stage::FlushName
            | Stage::Verify
            | Stage::Remove
            | Stage::Close => Written::Working,
        }
    }

    /// What to do with the file of a snapshot that is given up, once nothing is in flight.
    pub(crate) fn abandoned(&self) -> Vec<DeviceOp> {
        let name = match self.stage {
            Stage::Create | Stage::Fill | Stage::Flush | Stage::Rename => {
                temporary_name(self.number)
            }
            Stage::FlushName | Stage::Verify => snapshot_name(self.number),
            // It counts; what failed is the removal of another one.
            Stage::Remove | Stage::Close | Stage::Done => String::new(),
        };
        let mut ops = Vec::new();
        if !name.is_empty() {
            ops.push(DeviceOp::Remove { name });
        }
        ops.extend(self.file.map(|file| DeviceOp::Close { file }));
        ops
    }

    /// True if it counts although what followed has failed.
    pub(crate) fn counts(&self) -> bool {
        matches!(self.stage, Stage::Remove | Stage::Close | Stage::Done)
    }

    /// An operation failed.
    pub(crate) fn on_failed(&mut self) {
        self.flying = false;
    }
}

/// Pause between two operations of a snapshot, each of which is a piece or reads some: what it takes from the disk is
/// bounded.
const OP_EVERY_NS: u64 = 1_000_000;
/// Pause after a snapshot that came to nothing.
const AGAIN_NS: u64 = 10_000_000_000;
/// Segments of log that make a snapshot worth it.
const SEGMENTS_MIN: u64 = 1;

/// The snapshots of a log: those that are there, and the one being written.
#[derive(Debug)]
pub(crate) struct Snapshots {
    options: Options,
    /// The numbers of those that count, the newest first.
    kept: Vec<u64>,
    next_number: u64,
    writer: Option<Writer>,
    /// The writer is to be given up.
    failed: bool,
    /// The log since the start of the last one, and since the start of the one being written.
    pub(crate) since: Stretch,
    writing: Stretch,
    last_bytes: u64,
    not_before_ns: u64,
    pub(crate) made: u64,
    pub(crate) failures: u64,
}

/// A part of the log.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Stretch {
    pub(crate) bytes: u64,
    pub(crate) records: u64,
}

impl Snapshots {
    /// `kept` are those found, the newest first; `since` the log behind the start of the one that was loaded.
    pub(crate) fn new(
        options: Options,
        kept: Vec<u64>,
        since: Stretch,
        last_bytes: u64,
    ) -> Snapshots {
        Snapshots {
            options,
            next_number: kept.first().map_or(1, |newest| newest + 1),
            kept,
            writer: None,
            failed: false,
            since,
            writing: Stretch::default(),
            last_bytes,
            not_before_ns: 0,
            made: 0,
            failures: 0,
        }
    }

    /// Bytes of the last one.
    pub(crate) fn last_bytes(&self) -> u64 {
        self.last_bytes
    }

    pub(crate) fn appended(&mut self, bytes: u64, records: u64) {
        for stretch in [&mut self.since, &mut self.writing] {
            stretch.bytes += bytes;
            stretch.records += records;
        }
    }

    /// True if another one is worth it, which would hold so many entries: two are written for a record at most, and a
    /// table that only grows has doubled since the last one.
    pub(crate) fn is_due(&self, now_ns: u64, entries: u64) -> bool {
        self.writer.is_none()
            && self.since.bytes >= SEGMENTS_MIN * self.options.segment_bytes
            && 2 * self.since.records >= entries
            && now_ns >= self.not_before_ns
    }

    pub(crate) fn begin(&mut self, begin: Begin, expected_bytes: u64) {
        let outdated = self.kept.iter().skip(SNAPSHOTS_KEPT - 1).copied().collect();
        let number = self.next_number;
        self.next_number += 1;
        self.writing = Stretch::default();
        self.failed = false;
        self.writer = Some(Writer::new(
            self.options,
            number,
            begin,
            expected_bytes,
            outdated,
        ));
    }

    pub(crate) fn wants_piece(&self) -> bool {
        !self.failed && self.writer.as_ref().is_some_and(Writer::wants_piece)
    }

    /// Takes the next piece; `None` gives the snapshot up.
    pub(crate) fn put(&mut self, piece: Option<&Piece>, position: Lsn) {
        match (&mut self.writer, piece) {
            (Some(writer), Some(piece)) => writer.put(piece, position),
            (_, _) => self.failed = true,
        }
    }

    /// The next operation, if it is time for it; and those that clear away a snapshot that was given up.
    pub(crate) fn next_ops(&mut self, now_ns: u64) -> (Option<DeviceOp>, Vec<DeviceOp>) {
        let Some(writer) = &mut self.writer else {
            return (None, Vec::new());
        };
        if self.failed && !writer.is_flying() {
            let ops = writer.abandoned();
            if writer.counts() {
                self.made += 1;
                self.count();
            } else {
                self.failures += 1;
                self.writer = None;
                self.not_before_ns = now_ns + AGAIN_NS;
            }
            return (None, ops);
        }
        if now_ns < self.not_before_ns || self.failed {
            return (None, Vec::new());
        }
        let op = writer.next_op();
        if op.is_some() {
            self.not_before_ns = now_ns + OP_EVERY_NS;
        }
        (op, Vec::new())
    }

    /// The one being written counts from now on.
    fn count(&mut self) {
        let writer = self.writer.take().expect("it was being written");
        self.kept.insert(0, writer.number());
        self.kept.truncate(SNAPSHOTS_KEPT);
        self.since = self.writing;
        self.last_bytes = writer.bytes();
    }

    pub(crate) fn on_done(&mut self, result: Result<Output, DeviceError>) {
        let writer = self.writer.as_mut().expect("its operation was in flight");
        match result {
            Ok(output) => match writer.on_done(output) {
                Written::Working => {}
                Written::Done => {
                    self.made += 1;
                    self.count();
                }
                Written::Mismatch => self.failed = true,
            },
            Err(_) => {
                writer.on_failed();
                self.failed = true;
            }
        }
    }

    /// When there is something to do without an event.
    pub(crate) fn next_wake_ns(&self, now_ns: u64) -> Option<u64> {
        let writer = self.writer.as_ref()?;
        let waits = !writer.is_flying() && !self.wants_piece();
        waits.then_some(self.not_before_ns.max(now_ns + 1))
    }
}
