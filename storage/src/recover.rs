//! Finding the log again after a stop or a crash, and telling a torn tail from a damaged log.
//!
//! At the first place where no good batch stands, all that follows is searched, in this segment and every later one: a
//! sound batch that was written when that place was durable already is a witness that something accepted is damaged.
//! Without a witness the place is the end, and what half-written batch may stand there is erased. Nothing on the disk
//! is changed before the whole log has been judged.
//!
//! Worked case: A is durable, B in flight, power fails. B is torn, nothing follows: the end is behind A. Had B been
//! accepted, the next batch or the empty one after falling idle would say `durable >= end of B`: if B is unreadable
//! then, that batch is the witness.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use pelton_core::{
    id::Lsn,
    limits::BATCH_BYTES_MAX,
    planted::{Bug, planted},
    record::{RECORD_ALIGN, RECORD_HEADER_BYTES, Unreadable},
    shard::Shard,
    snapshot::{PieceKind, Unloadable},
};

use crate::{
    device::{Block, Device, DeviceError, DeviceOp, FileId, Output},
    format::{
        BATCH_HEADER_BYTES, BLOCK_BYTES, BadHeader, BatchHeader, FLAG_OPENING, FORMAT_VERSION,
        SEGMENT_DATA_OFFSET, SegmentHeader,
    },
    log::{Found, Log, Options},
    read_ahead::{ReadAhead, read},
    segment::{File, Progress, Segment, Work, is_filling_name, parse_segment_name, segment_name},
    snapshot::{Begin, Read, Reading, Stretch, is_temporary_name, parse_snapshot_name},
};

const SEGMENT_MISSING: &str = "a segment that holds live data is missing";

/// Named in the place of a file that should be there.
const NO_FILE: &str = "(no file)";

/// How the log was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// There was none.
    Empty,
    /// It ended with a whole batch.
    Clean,
    /// What was being written when the machine stopped was erased; nobody had been told of it.
    TornTail {
        /// Where.
        at: Lsn,
    },
}

/// What a recovery found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// How the log ended.
    pub outcome: Outcome,
    /// Segments with live data.
    pub segments: u64,
    /// Batches read.
    pub batches: u64,
    /// Records handed on.
    pub records: u64,
    /// Bytes of those batches.
    pub bytes: u64,
    /// The epoch from now on.
    pub epoch: u64,
    /// Bytes of the snapshot that was loaded; 0 for none. What was read of the log is behind its start.
    pub snapshot_bytes: u64,
    /// Snapshots that could not be used, because they are damaged or the log has left them behind.
    pub snapshots_passed_over: u64,
}

/// Why a log is not served. The disk was not changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecoverError {
    /// Something that was accepted cannot be read.
    Corrupt {
        file: String,
        segment: u64,
        offset: u64,
        what: &'static str,
    },
    /// The log was written by another version.
    Version { file: String, version: u16 },
    /// The log belongs to another directory or shard.
    Foreign { file: String },
    /// A sound batch holds a record that this version cannot read.
    Unreadable {
        file: String,
        segment: u64,
        offset: u64,
        schema: u16,
    },
    /// The disk failed.
    Device(DeviceError),
}

impl fmt::Display for RecoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecoverError::Corrupt {
                file,
                segment,
                offset,
                what,
            } => write!(
                f,
                "the log is damaged at {file}, segment {segment}, byte offset {offset}: {what}; nothing was changed; \
                 restore the directory from a backup, or look at it with `pelton log verify`"
            ),
            RecoverError::Version { file, version } => write!(
                f,
                "{file} has log format {version}, this version reads {FORMAT_VERSION}; nothing was changed; start the \
                 version that wrote it"
            ),
            RecoverError::Foreign { file } => write!(
                f,
                "{file} belongs to another data directory or shard; nothing was changed; put it back where it was"
            ),
            RecoverError::Unreadable {
                file,
                segment,
                offset,
                schema,
            } => write!(
                f,
                "{file}, segment {segment}, byte offset {offset}: a record of schema {schema} that this version cannot \
                 read; nothing was changed; start the version that wrote it"
            ),
            RecoverError::Device(error) => write!(f, "{error}"),
        }
    }
}

impl RecoverError {
    /// True if it is the program that does not fit the log: nothing is damaged.
    pub fn is_of_another_version(&self) -> bool {
        match self {
            RecoverError::Version { .. } | RecoverError::Unreadable { .. } => true,
            RecoverError::Corrupt { .. }
            | RecoverError::Foreign { .. }
            | RecoverError::Device(_) => false,
        }
    }

    /// The file, where it is one.
    pub fn file(&self) -> Option<&str> {
        match self {
            RecoverError::Corrupt { file, .. }
            | RecoverError::Unreadable { file, .. }
            | RecoverError::Version { file, .. }
            | RecoverError::Foreign { file } => Some(file),
            RecoverError::Device(_) => None,
        }
    }

    /// File, segment and byte offset, where it is a place in the log.
    pub fn place(&self) -> Option<(&str, u64, u64)> {
        match self {
            RecoverError::Corrupt {
                file,
                segment,
                offset,
                ..
            }
            | RecoverError::Unreadable {
                file,
                segment,
                offset,
                ..
            } => Some((file, *segment, *offset)),
            RecoverError::Version { .. }
            | RecoverError::Foreign { .. }
            | RecoverError::Device(_) => None,
        }
    }
}

impl std::error::Error for RecoverError {}

impl From<DeviceError> for RecoverError {
    fn from(error: DeviceError) -> RecoverError {
        RecoverError::Device(error)
    }
}

/// What a start fills. The records of the log come in their order, behind a snapshot's pieces if one is used.
pub trait Replayer {
    /// A snapshot is going to be loaded, and all that came before is void. Only called by [`recover_with`].
    fn load_begins(&mut self, secret: u64, first_segment: u64);

    /// A piece of it, taken as of this position; an `Err` says that it cannot be loaded.
    fn load(&mut self, kind: PieceKind, position: Lsn, bytes: &[u8]) -> Result<(), Unloadable>;

    /// None can be used, and what was loaded is void: the whole log is going to be replayed.
    fn load_failed(&mut self);

    /// A record, as [`Replay`] takes it.
    fn replay(&mut self, position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable>;

    /// So many of about so many bytes have been read.
    fn progress(&mut self, read: u64, of: u64) {
        let _ = (read, of);
    }
}

impl Replayer for Shard {
    fn load_begins(&mut self, secret: u64, first_segment: u64) {
        Shard::load_begins(self, secret, first_segment);
    }

    fn load(&mut self, kind: PieceKind, position: Lsn, bytes: &[u8]) -> Result<(), Unloadable> {
        Shard::load(self, kind, position, bytes)
    }

    fn load_failed(&mut self) {
        Shard::load_failed(self);
    }

    fn replay(&mut self, position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        Shard::replay(self, position, schema, body)
    }
}

/// Takes a record in the log's order: position of its header, schema, body. An `Err` says that it is unreadable.
pub type Replay<'a> = dyn FnMut(Lsn, u16, &[u8]) -> Result<(), ()> + 'a;

/// Sees a sound batch of the live log, in order.
pub type Visit<'a> = dyn FnMut(&BatchHeader, &[u8]) -> Result<(), RecoverError> + 'a;

/// Reads the whole log, hands on its records, and makes it ready for the next batch: the torn tail erased, the epoch
/// raised, everything flushed.
pub fn recover<D: Device>(
    mut device: D,
    options: Options,
    replay: &mut Replay<'_>,
) -> Result<(Log<D>, Report), RecoverError> {
    let survey = Survey::take(&mut device, options)?;
    let judged = judge(
        &survey,
        &mut survey.reader(&mut device),
        &mut |header, batch| hand_on(&survey, header, batch, replay),
    )?;
    settle(device, options, survey, judged, Loaded::default())
}

/// As [`recover`], but for what a snapshot spares: of the log in front of its start only the segments' headers are read.
pub fn recover_with<D: Device>(
    mut device: D,
    options: Options,
    replayer: &mut dyn Replayer,
) -> Result<(Log<D>, Report), RecoverError> {
    let survey = Survey::take(&mut device, options)?;
    let (judged, loaded) = judge_with(&survey, &mut device, options, replayer)?;
    settle(device, options, survey, judged, loaded)
}

/// As [`recover_with`], but nothing on the disk is changed, and no log follows.
pub fn inspect_with<D: Device>(
    device: &mut D,
    options: Options,
    replayer: &mut dyn Replayer,
) -> Result<Report, RecoverError> {
    let survey = Survey::take(device, options)?;
    Ok(judge_with(&survey, device, options, replayer)?.0.report)
}

/// Loads a snapshot if one can be used, and replays what it does not spare.
fn judge_with<D: Device>(
    survey: &Survey,
    device: &mut D,
    options: Options,
    replayer: &mut dyn Replayer,
) -> Result<(Judged, Loaded), RecoverError> {
    let mut reader = survey.reader(device);
    let range = find_range(survey, &mut reader)?;
    let loaded = match &range {
        Some(range) => load_snapshot(survey, reader.device(), options, range, replayer),
        None => Loaded::default(),
    };
    let end = range.as_ref().map_or(Lsn(0), |range| range.begun_end);
    let begin = match (&loaded.start, &range) {
        (Some(start), _) => start.begin.start,
        (None, Some(range)) => survey.start_of(range.first),
        (None, None) => Lsn(0),
    };
    let of = loaded.bytes + end.0.saturating_sub(begin.0);
    let judged = follow(
        survey,
        &mut reader,
        range,
        loaded.start.as_ref(),
        &mut |header, batch| {
            let read = loaded.bytes + header.end().0.saturating_sub(begin.0);
            replayer.progress(read, of.max(read));
            hand_on(survey, header, batch, &mut |lsn, schema, body| {
                replayer.replay(lsn, schema, body).map_err(|_| ())
            })
        },
    )?;
    Ok((judged, loaded))
}

/// What came of the snapshots.
#[derive(Default)]
struct Loaded {
    start: Option<Start>,
    bytes: u64,
    passed_over: u64,
}

/// Where a snapshot lets the replay begin.
struct Start {
    begin: Begin,
    /// The log is durable up to here, says the snapshot.
    end: Lsn,
}

/// Loads the newest snapshot that can be used. One that cannot be read is passed over like a damaged one.
fn load_snapshot<D: Device>(
    survey: &Survey,
    device: &mut D,
    options: Options,
    range: &Range,
    replayer: &mut dyn Replayer,
) -> Loaded {
    let mut loaded = Loaded::default();
    for &number in &survey.snapshots {
        let opened = Reading::open(device, options, number);
        let Ok(Some((mut reading, begin))) = opened else {
            loaded.passed_over += 1;
            continue;
        };
        if (survey.start_of(range.first)..=range.begun_end).contains(&begin.start) {
            replayer.load_begins(begin.secret, range.first);
            let of = reading.bytes() + range.begun_end.0.saturating_sub(begin.start.0);
            while let Ok(Read::Piece(kind, position, bytes)) = reading.next(device)
                && replayer.load(kind, position, bytes).is_ok()
            {
                replayer.progress(reading.read(), of);
                if kind == PieceKind::End {
                    let end = position;
                    loaded.start = Some(Start { begin, end });
                    break;
                }
            }
        }
        let bytes = reading.close(device);
        if loaded.start.is_some() {
            loaded.bytes = bytes;
            return loaded;
        }
        loaded.passed_over += 1;
    }
    replayer.load_failed();
    loaded
}

/// Reads and judges the log without changing anything. `visit` sees every batch of the live log.
pub fn inspect<D: Device>(
    device: &mut D,
    options: Options,
    visit: &mut Visit<'_>,
) -> Result<Report, RecoverError> {
    let survey = Survey::take(device, options)?;
    Ok(judge(&survey, &mut survey.reader(device), visit)?.report)
}

/// As [`inspect`], record by record.
pub fn inspect_records<D: Device>(
    device: &mut D,
    options: Options,
    replay: &mut Replay<'_>,
) -> Result<Report, RecoverError> {
    let survey = Survey::take(device, options)?;
    let mut reader = survey.reader(device);
    let judged = judge(&survey, &mut reader, &mut |header, batch| {
        hand_on(&survey, header, batch, replay)
    })?;
    Ok(judged.report)
}

/// Refuses a directory that holds no segment at all. Only for a log that has begun: a new one is made in such a
/// directory.
pub fn expect_segments<D: Device>(device: &mut D) -> Result<(), RecoverError> {
    let Output::Names(names) = device.perform(DeviceOp::List)? else {
        panic!("a listing brings names");
    };
    if names.iter().any(|name| parse_segment_name(name).is_some()) {
        return Ok(());
    }
    Err(RecoverError::Corrupt {
        file: NO_FILE.to_owned(),
        segment: 0,
        offset: 0,
        what: "the shard has had a log and its folder holds no segment; its disk may not be mounted",
    })
}

/// Calls `each` for every record of a batch, header excluded from the body; `None` where the lengths do not add up.
pub fn records<'a>(
    batch: &'a [u8],
    count: u32,
    mut each: impl FnMut(usize, u16, &'a [u8]) -> Option<()>,
) -> Option<()> {
    let mut at = BATCH_HEADER_BYTES;
    for _ in 0..count {
        let header = batch.get(at..at + RECORD_HEADER_BYTES)?;
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let schema = u16::from_le_bytes([header[4], header[5]]);
        let body = batch.get(at + RECORD_HEADER_BYTES..)?.get(..length)?;
        each(at, schema, body)?;
        at = (at + RECORD_HEADER_BYTES + length).next_multiple_of(RECORD_ALIGN);
    }
    (at == batch.len()).then_some(())
}

/// What the directory holds, by the headers alone.
struct Survey {
    segments: BTreeMap<u64, Segment>,
    dead: Vec<File>,
    /// What files were by the second copy of their header, where the first one tells of another segment.
    hidden: Vec<Segment>,
    leftovers: Vec<String>,
    /// The numbers of the snapshots, the newest first.
    snapshots: Vec<u64>,
    next_file: u32,
    /// The highest epoch of a header.
    epoch: u64,
    segment_bytes: u64,
}

impl Survey {
    fn take<D: Device>(device: &mut D, options: Options) -> Result<Survey, RecoverError> {
        let Output::Names(mut names) = device.perform(DeviceOp::List)? else {
            panic!("a listing brings names");
        };
        names.sort();
        let mut survey = Survey {
            segments: BTreeMap::new(),
            dead: Vec::new(),
            hidden: Vec::new(),
            leftovers: Vec::new(),
            snapshots: Vec::new(),
            next_file: 0,
            epoch: 0,
            segment_bytes: options.segment_bytes,
        };
        let mut epochs: BTreeMap<u64, u64> = BTreeMap::new();
        for name in names {
            if is_filling_name(&name) || is_temporary_name(&name) {
                survey.leftovers.push(name);
                continue;
            }
            if let Some(number) = parse_snapshot_name(&name) {
                survey.snapshots.push(number);
                continue;
            }
            let Some(number) = parse_segment_name(&name) else {
                continue;
            };
            survey.next_file = survey.next_file.max(number);
            let Output::File(id, _) = device.perform(DeviceOp::Open { name: name.clone() })? else {
                panic!("opening brings a file");
            };
            let file = File { id, number };
            let Some((header, second)) = read_header(device, id, &name)? else {
                survey.dead.push(file);
                continue;
            };
            if let Some(second) = second.filter(|second| {
                *second != header && second.segment < u64::MAX / options.segment_bytes
            }) {
                survey.hidden.push(Segment {
                    number: second.segment,
                    key: second.key,
                    file,
                });
            }
            if header.log_id != options.log_id
                || header.shard != options.shard
                || header.segment_bytes != options.segment_bytes
            {
                return Err(RecoverError::Foreign { file: name });
            }
            if header.segment >= u64::MAX / options.segment_bytes {
                return Err(RecoverError::Corrupt {
                    file: name,
                    segment: header.segment,
                    offset: 0,
                    what: "no log is so long that it has a segment of this number",
                });
            }
            if header.epoch == u64::MAX {
                return Err(RecoverError::Corrupt {
                    file: name,
                    segment: header.segment,
                    offset: 0,
                    what: "no epoch can follow that of the header here",
                });
            }
            survey.epoch = survey.epoch.max(header.epoch);
            let segment = Segment {
                number: header.segment,
                key: header.key,
                file,
            };
            // A crash while a segment was being prepared again leaves its number twice: the younger epoch counts.
            let known = epochs.get(&header.segment).copied();
            if known.is_some_and(|epoch| epoch > header.epoch) {
                survey.dead.push(file);
                continue;
            }
            // Preparation that failed half-way leaves it twice within one epoch: what holds a batch is the segment.
            if known == Some(header.epoch)
                && survey.holds_batch(device, &survey.segments[&header.segment])?
            {
                survey.dead.push(file);
                continue;
            }
            epochs.insert(header.segment, header.epoch);
            if let Some(older) = survey.segments.insert(header.segment, segment) {
                survey.dead.push(older.file);
            }
        }
        survey.snapshots.sort_unstable_by(|a, b| b.cmp(a));
        Ok(survey)
    }

    /// True if a sound batch stands anywhere in this segment.
    fn holds_batch<D: Device>(
        &self,
        device: &mut D,
        segment: &Segment,
    ) -> Result<bool, RecoverError> {
        let mut reader = self.reader(device);
        let mut offset = SEGMENT_DATA_OFFSET;
        while offset < self.segment_bytes {
            if reader.batch(segment, offset)?.is_some() {
                return Ok(true);
            }
            offset += BLOCK_BYTES as u64;
        }
        Ok(false)
    }

    /// A file gets a new header only when its segment is dead, the first copy first. A crash in between leaves two, and
    /// behind the second one nothing that is needed. Where a live segment stands behind it, a write that was meant for
    /// another place has hidden that segment.
    fn look_behind_headers<D: Device>(
        &self,
        reader: &mut ReadAhead<'_, D>,
        first: u64,
    ) -> Result<(), RecoverError> {
        for segment in self.hidden.iter().filter(|hidden| hidden.number >= first) {
            if reader.batch(segment, SEGMENT_DATA_OFFSET)?.is_some() {
                return Err(RecoverError::Corrupt {
                    file: segment_name(segment.file.number),
                    segment: segment.number,
                    offset: SEGMENT_DATA_OFFSET,
                    what: "a live segment, and the first copy of its header is another segment's",
                });
            }
        }
        Ok(())
    }

    fn corrupt(&self, at: Lsn, what: &'static str) -> RecoverError {
        let segment = at.0 / self.segment_bytes;
        let file = self.segments.get(&segment).map_or_else(
            || NO_FILE.to_owned(),
            |segment| segment_name(segment.file.number),
        );
        RecoverError::Corrupt {
            file,
            segment,
            offset: at.0 % self.segment_bytes,
            what,
        }
    }

    fn reader<'r, D: Device>(&'r self, device: &'r mut D) -> ReadAhead<'r, D> {
        ReadAhead::new(device, &self.segments, self.segment_bytes)
    }

    fn start_of(&self, segment: u64) -> Lsn {
        Lsn(segment * self.segment_bytes + SEGMENT_DATA_OFFSET)
    }
}

/// The header of a segment file, from whichever copy is whole, and the second copy if both are; `None` for a file that
/// never became a segment.
fn read_header<D: Device>(
    device: &mut D,
    file: FileId,
    name: &str,
) -> Result<Option<(SegmentHeader, Option<SegmentHeader>)>, RecoverError> {
    let blocks = read(device, file, 0, || Block::new(2 * BLOCK_BYTES), 0)?;
    let copies = [0, BLOCK_BYTES].map(|at| match blocks.get(at..at + BLOCK_BYTES) {
        Some(block) => SegmentHeader::decode(block),
        None => Err(BadHeader::Damaged),
    });
    match copies {
        [Ok(header), second] => Ok(Some((header, second.ok()))),
        [Err(BadHeader::Damaged | BadHeader::Zero), Ok(header)] => Ok(Some((header, None))),
        [Err(BadHeader::Version(version)), _]
        | [
            Err(BadHeader::Zero | BadHeader::Damaged),
            Err(BadHeader::Version(version)),
        ] => Err(RecoverError::Version {
            file: name.to_owned(),
            version,
        }),
        // The second copy is written only after the first was flushed: this one was being prepared for the first time.
        [
            Err(BadHeader::Zero | BadHeader::Damaged),
            Err(BadHeader::Zero),
        ] => Ok(None),
        [
            Err(BadHeader::Damaged | BadHeader::Zero),
            Err(BadHeader::Damaged),
        ] => Err(RecoverError::Corrupt {
            file: name.to_owned(),
            segment: 0,
            offset: 0,
            what: "both copies of the segment's header are damaged",
        }),
    }
}

/// The log as it was judged.
struct Judged {
    report: Report,
    /// The first live segment and the one in which the log goes on.
    first: u64,
    last: u64,
    tail: u64,
    prev_crc: u32,
    retired: Lsn,
    /// What is to be erased: from the tail to here, in the last segment.
    erase_to: u64,
}

/// The live log by what its last segment says.
struct Range {
    /// Its first segment.
    first: u64,
    /// Where the batches that follow each other in the last segment that was begun end.
    begun_end: Lsn,
    /// A batch behind that end says that it was durable.
    vouched: bool,
    retired: Lsn,
}

fn judge<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
    visit: &mut Visit<'_>,
) -> Result<Judged, RecoverError> {
    let range = find_range(survey, reader)?;
    follow(survey, reader, range, None, visit)
}

/// Where the live log is; `None` if there is none.
fn find_range<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
) -> Result<Option<Range>, RecoverError> {
    // The last segment that was begun tells, in its last good batch, where the live log starts.
    let mut begun = None;
    for (&number, segment) in survey.segments.iter().rev() {
        if reader.batch(segment, SEGMENT_DATA_OFFSET)?.is_some() {
            begun = Some(number);
            break;
        }
    }
    let Some(begun) = begun else {
        survey.look_behind_headers(reader, 0)?;
        // No segment holds a first batch. One that holds any other lost its first.
        let witness = find_witness(survey, reader, Lsn(0))?;
        let numbers = survey.segments.keys().copied();
        let Some((lowest, highest)) = numbers.clone().min().zip(numbers.max()) else {
            return Ok(None);
        };
        if witness || highest > 1 && lowest <= 1 {
            // One is prepared ahead only behind one that has a batch.
            return Err(survey.corrupt(
                survey.start_of(lowest),
                "the first batch is unreadable, and what stands behind it says that it was durable",
            ));
        }
        if highest > 1 {
            return Err(survey.corrupt(survey.start_of(lowest - 1), SEGMENT_MISSING));
        }
        return Ok(None);
    };
    let mut retired = Lsn(0);
    let mut place = SEGMENT_DATA_OFFSET;
    while let Some((header, _)) = reader.batch(&survey.segments[&begun], place)? {
        retired = retired.max(header.retired);
        place = header.end().0 % survey.segment_bytes;
        if place == 0 {
            break;
        }
    }
    let begun_end = match place {
        0 => Lsn((begun + 1) * survey.segment_bytes),
        place => Lsn(begun * survey.segment_bytes + place),
    };
    let vouched = find_witness(survey, reader, begun_end)?;
    if vouched {
        // The log is damaged there. Where else it is, and where first, hangs on what is not needed any more: batches
        // behind the damage know that best.
        each_behind(survey, reader, begun_end, &mut |header| {
            retired = retired.max(header.retired);
            false
        })?;
    }
    let first = (retired.0 / survey.segment_bytes).max(1);
    survey.look_behind_headers(reader, first)?;
    if first > begun && !survey.segments.contains_key(&first) {
        return Err(survey.corrupt(
            survey.start_of(begun),
            "the last segment says that it is not needed any more itself",
        ));
    }
    // Segments are prepared one after the other: what lies behind a gap tells of one that was there, also where none of
    // these has a batch yet.
    let ahead = survey.segments.last_key_value();
    let last = ahead.map_or(begun, |(&number, _)| number);
    let missing = (first..=last).find(|number| !survey.segments.contains_key(number));
    if let Some(missing) = missing {
        return Err(survey.corrupt(survey.start_of(missing), SEGMENT_MISSING));
    }
    Ok(Some(Range {
        first,
        begun_end,
        vouched,
        retired,
    }))
}

/// Follows the batches from the first one on, or from a snapshot's start, to the end, and judges what stands there.
fn follow<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
    range: Option<Range>,
    start: Option<&Start>,
    visit: &mut Visit<'_>,
) -> Result<Judged, RecoverError> {
    let mut judged = Judged {
        report: Report {
            outcome: Outcome::Empty,
            segments: 0,
            batches: 0,
            records: 0,
            bytes: 0,
            epoch: 0,
            snapshot_bytes: 0,
            snapshots_passed_over: 0,
        },
        first: 0,
        last: 0,
        tail: 0,
        prev_crc: 0,
        retired: Lsn(0),
        erase_to: 0,
    };
    let Some(range) = range else {
        return Ok(judged);
    };
    judged.first = range.first;
    judged.retired = range.retired;

    // The chain of batches from there.
    let mut number = range.first;
    let mut offset = SEGMENT_DATA_OFFSET;
    let mut chained = false;
    if let Some(Start { begin, .. }) = start {
        number = begin.start.0 / survey.segment_bytes;
        offset = begin.start.0 % survey.segment_bytes;
        if offset == 0 {
            (number, offset) = (number - 1, survey.segment_bytes);
        }
        judged.report.epoch = begin.epoch;
        judged.prev_crc = begin.prev_crc;
        chained = true;
    }
    loop {
        let segment = &survey.segments[&number];
        let epoch = judged.report.epoch;
        let prev_crc = judged.prev_crc;
        let follows = |header: &BatchHeader| {
            header.epoch >= epoch && (!chained || header.prev_crc == prev_crc)
        };
        let found = reader
            .batch(segment, offset)?
            .filter(|(header, _)| follows(header));
        if let Some((header, bytes)) = found {
            visit(&header, bytes)?;
            judged.report.batches += 1;
            judged.report.records += u64::from(header.records);
            judged.report.bytes += header.bytes() as u64;
            judged.report.epoch = header.epoch;
            if header.epoch == u64::MAX {
                return Err(
                    survey.corrupt(header.lsn, "no epoch can follow that of the batch here")
                );
            }
            judged.prev_crc = header.crc;
            judged.retired = judged.retired.max(header.retired);
            chained = true;
            offset += header.end().0 - header.lsn.0;
            continue;
        }
        // The segment may have ended here: then the next one begins with the batch that follows.
        let epoch = judged.report.epoch;
        let next = match survey.segments.get(&(number + 1)) {
            Some(next) if chained => reader.batch(next, SEGMENT_DATA_OFFSET)?,
            Some(_) | None => None,
        };
        if next
            .is_some_and(|(header, _)| header.prev_crc == judged.prev_crc && header.epoch >= epoch)
        {
            number += 1;
            offset = SEGMENT_DATA_OFFSET;
            continue;
        }
        break;
    }
    let end = Lsn(number * survey.segment_bytes + offset);
    if let Some(start) = start
        && start.end > end
    {
        return Err(survey.corrupt(
            end,
            "the batch here is unreadable, and a snapshot says that it was durable",
        ));
    }
    let vouched = match end == range.begun_end {
        true => range.vouched,
        false => find_witness(survey, reader, end)?,
    };
    if vouched && !planted(Bug::TruncateOnCorruption) {
        return Err(survey.corrupt(
            end,
            "the batch here is unreadable, and a later one says that it was durable",
        ));
    }
    judged.last = number;
    judged.tail = offset;
    judged.report.segments = number - range.first + 1;
    judged.erase_to = torn_until(survey, reader, number, offset)?;
    judged.report.outcome = if judged.erase_to > offset {
        Outcome::TornTail { at: end }
    } else {
        Outcome::Clean
    };
    Ok(judged)
}

fn hand_on(
    survey: &Survey,
    header: &BatchHeader,
    batch: &[u8],
    replay: &mut Replay<'_>,
) -> Result<(), RecoverError> {
    let mut unreadable = None;
    let walked = records(batch, header.records, |at, schema, body| {
        let position = Lsn(header.lsn.0 + at as u64);
        replay(position, schema, body)
            .map_err(|()| unreadable = Some((position, schema)))
            .ok()
    });
    let place = |at: Lsn| {
        (
            segment_name(survey.segments[&header.segment].file.number),
            at.0 % survey.segment_bytes,
        )
    };
    match (walked, unreadable) {
        (Some(()), _) => Ok(()),
        (None, Some((position, schema))) => {
            let (file, offset) = place(position);
            Err(RecoverError::Unreadable {
                file,
                segment: header.segment,
                offset,
                schema,
            })
        }
        (None, None) => Err(survey.corrupt(
            header.lsn,
            "the lengths of the records do not add up to the batch",
        )),
    }
}

/// True if a sound batch behind `end` was written when more than that was durable.
fn find_witness<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
    end: Lsn,
) -> Result<bool, RecoverError> {
    each_behind(survey, reader, end, &mut |header| header.durable > end)
}

/// Looks at the sound batches behind `end`, in this segment and all later ones, until one of them is `found`.
fn each_behind<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
    end: Lsn,
    found: &mut dyn FnMut(&BatchHeader) -> bool,
) -> Result<bool, RecoverError> {
    let from_segment = end.0 / survey.segment_bytes;
    for (_, segment) in survey.segments.range(from_segment..) {
        let mut offset = if segment.number == from_segment {
            (end.0 % survey.segment_bytes).max(SEGMENT_DATA_OFFSET)
        } else {
            SEGMENT_DATA_OFFSET
        };
        while offset < survey.segment_bytes {
            if let Some((header, _)) = reader.batch(segment, offset)?
                && found(&header)
            {
                return Ok(true);
            }
            offset += BLOCK_BYTES as u64;
        }
    }
    Ok(false)
}

/// Where the traces of a half-written batch at the tail end; the tail itself if there are none. A batch that was being
/// written is at most one buffer long, and whatever else stands there is of an earlier life and passes for nothing.
fn torn_until<D: Device>(
    survey: &Survey,
    reader: &mut ReadAhead<'_, D>,
    number: u64,
    tail: u64,
) -> Result<u64, RecoverError> {
    let segment = &survey.segments[&number];
    let end = (tail + BATCH_BYTES_MAX as u64).min(survey.segment_bytes);
    let mut torn = tail;
    let mut offset = tail;
    while offset < end {
        let head = reader.at(segment, offset, BLOCK_BYTES)?;
        let begun = BatchHeader::peek(head).is_some_and(|header| header.segment == number);
        if begun {
            torn = end;
        }
        offset += BLOCK_BYTES as u64;
    }
    Ok(torn)
}

/// Everything is judged: erase, raise the epoch, flush, and hand the log over.
fn settle<D: Device>(
    mut device: D,
    options: Options,
    survey: Survey,
    judged: Judged,
    loaded: Loaded,
) -> Result<(Log<D>, Report), RecoverError> {
    for name in survey.leftovers.iter().cloned() {
        device.perform(DeviceOp::Remove { name })?;
    }
    let mut found = Found {
        // Above that of each header too: the file of a segment that is prepared from now on is the younger one.
        epoch: judged.report.epoch.max(survey.epoch) + 1,
        live: VecDeque::new(),
        dead: survey.dead,
        next_file: survey.next_file,
        tail: judged.tail,
        prev_crc: judged.prev_crc,
        retired: judged.retired,
        snapshots: survey.snapshots,
        snapshot_bytes: loaded.bytes,
        replayed: Stretch {
            bytes: judged.report.bytes,
            records: judged.report.records,
        },
    };
    let mut report = judged.report;
    report.epoch = found.epoch;
    report.snapshot_bytes = loaded.bytes;
    report.snapshots_passed_over = loaded.passed_over;
    for (number, segment) in survey.segments {
        if report.outcome != Outcome::Empty && (judged.first..=judged.last).contains(&number) {
            // Whatever was read is now relied upon: it may have been written without being flushed.
            device.perform(DeviceOp::Flush {
                file: segment.file.id,
            })?;
            found.live.push_back(segment);
        } else {
            found.dead.push(segment.file);
        }
    }
    let mut offset = judged.tail;
    while offset < judged.erase_to {
        let bytes = (judged.erase_to - offset).min(1 << 20) as usize;
        let file = found.live.back().expect("a tail has a segment").file.id;
        device.perform(DeviceOp::Zero {
            file,
            offset,
            bytes,
        })?;
        offset += bytes as u64;
    }
    let room = options.segment_bytes.saturating_sub(found.tail);
    if found.live.is_empty() || room < BLOCK_BYTES as u64 {
        let segment = prepare(&mut device, options, &mut found)?;
        found.live.push_back(segment);
        found.tail = SEGMENT_DATA_OFFSET;
    }
    open_epoch(&mut device, options, &mut found)?;
    Ok((Log::new(device, options, found), report))
}

fn prepare<D: Device>(
    device: &mut D,
    options: Options,
    found: &mut Found,
) -> Result<Segment, RecoverError> {
    let header = SegmentHeader {
        shard: options.shard,
        log_id: options.log_id,
        segment: found.live.back().map_or(1, |last| last.number + 1),
        segment_bytes: options.segment_bytes,
        epoch: found.epoch,
        key: device.random(),
    };
    let mut work = match found.dead.pop() {
        Some(file) => Work::recycle(file, header),
        None => {
            found.next_file += 1;
            Work::create(found.next_file, header)
        }
    };
    loop {
        let op = work.next_op().expect("one operation at a time");
        let output = device.perform(op)?;
        match work.on_done(output) {
            Progress::Working => {}
            Progress::Ready(segment) => return Ok(segment),
            Progress::Removed => unreachable!("nothing is removed here"),
            Progress::Mismatch => {
                return Err(RecoverError::Corrupt {
                    file: segment_name(found.next_file),
                    segment: header.segment,
                    offset: 0,
                    what: "a header that was just written reads back differently: the disk is not to be trusted",
                });
            }
        }
    }
}

/// Writes and flushes an empty batch of the new epoch: from here on the old one is fenced off.
fn open_epoch<D: Device>(
    device: &mut D,
    options: Options,
    found: &mut Found,
) -> Result<(), RecoverError> {
    let segment = *found.live.back().expect("there is a segment by now");
    let lsn = Lsn(segment.number * options.segment_bytes + found.tail);
    let header = BatchHeader {
        crc: 0,
        flags: FLAG_OPENING,
        payload_bytes: 0,
        records: 0,
        shard: options.shard,
        segment: segment.number,
        lsn,
        epoch: found.epoch,
        durable: lsn,
        retired: found.retired,
        prev_crc: found.prev_crc,
    };
    let buffer = &mut device.buffers()[0];
    buffer[..BLOCK_BYTES].fill(0);
    found.prev_crc = header.seal(&mut buffer[..BATCH_HEADER_BYTES], segment.key);
    device.perform(DeviceOp::Commit {
        file: segment.file.id,
        offset: found.tail,
        buffer: 0,
        bytes: BLOCK_BYTES,
        alone: true,
    })?;
    found.tail += BLOCK_BYTES as u64;
    Ok(())
}
