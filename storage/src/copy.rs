//! Copying a log up to a durable position, while its shard goes on writing it behind that. The shard must be held
//! ([`crate::log::Log::hold`]), or be no one's.
//!
//! What is copied is looked at on its way: every batch must hold, and follow the one before, up to that very position. A
//! log that has rotted is not copied as if it were sound.

use std::{
    collections::BTreeMap,
    fmt, fs,
    fs::File,
    io::{self, Read, Write},
    ops::ControlFlow,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use pelton_core::{id::Lsn, limits::BATCH_BYTES_MAX};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    backup::{CopiedFile, ShardCopy, copied_name, last_segment},
    count::{Counter, Counts, Uncountable},
    device::Block,
    file::FileDevice,
    format::{BLOCK_BYTES, BatchHeader, SEGMENT_DATA_OFFSET},
    log::Options,
    manifest::Manifest,
    reader::{SegmentFile, open_direct, read_at, segment_files},
    recover::{RecoverError, Report, inspect},
};

/// Bytes of one read, and of one write.
pub const PIECE_BYTES: usize = 1 << 20;
/// What is written goes to the disk, and out of the page cache, so many bytes at a time.
const FLUSH_BYTES: u64 = 8 << 20;

/// Told how many bytes have been passed; may end the work.
pub type Step<'s> = dyn FnMut(u64) -> ControlFlow<()> + 's;

/// Why something is not copied.
#[derive(Debug)]
pub enum CopyError {
    /// The log is damaged, or what stands in it is of another version.
    Log(RecoverError),
    /// The system failed.
    Io { what: String, error: io::Error },
    /// The step has said so.
    Stopped,
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CopyError::Log(error) => error.fmt(f),
            CopyError::Io { what, error } => write!(f, "{what}: {error}"),
            CopyError::Stopped => f.write_str("it was stopped"),
        }
    }
}

impl std::error::Error for CopyError {}

impl From<RecoverError> for CopyError {
    fn from(error: RecoverError) -> CopyError {
        CopyError::Log(error)
    }
}

/// The stretch of a log that is to be copied.
#[derive(Debug)]
pub struct LogCopy {
    folder: PathBuf,
    options: Options,
    files: BTreeMap<u64, SegmentFile>,
    first: u64,
    end: Lsn,
}

impl LogCopy {
    /// From the segment on in which `retired` lies to `end`, of the log in this folder. Everything before `end` is
    /// durable, and the last batch in front of it says `retired`.
    pub fn new(
        folder: PathBuf,
        options: Options,
        retired: Lsn,
        end: Lsn,
    ) -> Result<LogCopy, CopyError> {
        let first = (retired.0 / options.segment_bytes).max(1);
        let last = last_segment(end, options.segment_bytes);
        let files = segment_files(&folder, options, first..=last)
            .map_err(|error| failed("list", &folder, error))?;
        let copy = LogCopy {
            folder,
            options,
            files,
            first,
            end,
        };
        match (first..=last).find(|segment| !copy.files.contains_key(segment)) {
            None => Ok(copy),
            Some(missing) => Err(copy.damaged(
                Lsn(missing * options.segment_bytes + SEGMENT_DATA_OFFSET),
                "a segment that holds live data is missing",
            )),
        }
    }

    /// Bytes that are copied.
    pub fn bytes(&self) -> u64 {
        let segments = self.files.keys();
        segments.map(|&segment| self.bytes_of(segment)).sum()
    }

    fn bytes_of(&self, segment: u64) -> u64 {
        let segment_bytes = self.options.segment_bytes;
        segment_bytes.min(self.end.0 - segment * segment_bytes)
    }

    /// Copies it into the folder of a backup of the directory with this manifest. The files are on the disk when this
    /// returns, their names are not.
    pub fn copy(
        &self,
        manifest: &Manifest,
        target: &Path,
        step: &mut Step<'_>,
    ) -> Result<(ShardCopy, Vec<CopiedFile>), CopyError> {
        let mut copied = Vec::new();
        let mut chain = Chain::default();
        let mut block = Block::new(PIECE_BYTES);
        for (&segment, file) in &self.files {
            let name = copied_name(manifest, self.options.shard, self.first, segment);
            let from = self.folder.join(&file.name);
            let source = open_direct(&from).map_err(|error| failed("open", &from, error))?;
            let mut sink = Sink::create(&target.join(&name))?;
            let bytes = self.bytes_of(segment);
            chain.begin(segment, file.key);
            let mut offset = 0;
            while offset < bytes {
                block.renew(PIECE_BYTES.min((bytes - offset) as usize));
                let read = read_at(&source, &mut block, offset);
                let read = read.map_err(|error| failed("read", &from, error))?;
                if read < block.len() {
                    let short = io::ErrorKind::UnexpectedEof.into();
                    return Err(failed("read", &from, short));
                }
                self.follow(&mut chain, offset, &block)?;
                sink.write(&block)?;
                offset += block.len() as u64;
                if step(block.len() as u64).is_break() {
                    return Err(CopyError::Stopped);
                }
            }
            copied.push(sink.finish(name)?);
        }
        if chain.counter.end() != self.end {
            let at = chain.counter.end().max(self.start());
            return Err(self.damaged(at, "the batch here is unreadable, and it was durable"));
        }
        let shard = ShardCopy {
            first: self.first,
            end: self.end,
            counts: chain.counter.counts(),
        };
        Ok((shard, copied))
    }

    fn start(&self) -> Lsn {
        Lsn(self.first * self.options.segment_bytes + SEGMENT_DATA_OFFSET)
    }

    fn follow(&self, chain: &mut Chain, offset: u64, bytes: &[u8]) -> Result<(), CopyError> {
        let header = SEGMENT_DATA_OFFSET
            .saturating_sub(offset)
            .min(bytes.len() as u64);
        let bytes = &bytes[header as usize..];
        chain.take(bytes, self.options).map_err(|(header, why)| {
            CopyError::Log(uncountable(
                why,
                &header,
                &self.files[&header.segment].name,
                self.options.segment_bytes,
            ))
        })
    }

    fn damaged(&self, at: Lsn, what: &'static str) -> CopyError {
        let segment = at.0 / self.options.segment_bytes;
        let file = self.files.get(&segment).map(|file| file.name.clone());
        CopyError::Log(RecoverError::Corrupt {
            file: file.unwrap_or_else(|| "(no file)".to_owned()),
            segment,
            offset: at.0 % self.options.segment_bytes,
            what,
        })
    }
}

/// Follows the batches of a log through its bytes.
#[derive(Default)]
struct Chain {
    segment: u64,
    key: u128,
    /// Of the batch before.
    crc: Option<u32>,
    epoch: u64,
    /// What was taken and is no whole batch yet.
    pending: Vec<u8>,
    /// Where it begins in the segment.
    offset: u64,
    /// No batch of this segment follows any more.
    over: bool,
    counter: Counter,
}

impl Chain {
    fn begin(&mut self, segment: u64, key: u128) {
        self.segment = segment;
        self.key = key;
        self.pending.clear();
        self.offset = SEGMENT_DATA_OFFSET;
        self.over = false;
    }

    /// Takes the next bytes of the segment behind its headers.
    fn take(&mut self, bytes: &[u8], options: Options) -> Result<(), (BatchHeader, Uncountable)> {
        if self.over {
            return Ok(());
        }
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(rest) = self
            .pending
            .get(at..)
            .filter(|rest| rest.len() >= BLOCK_BYTES)
        {
            let place = Lsn(self.segment * options.segment_bytes + self.offset);
            let fits = |header: &BatchHeader| {
                header.lsn == place
                    && header.segment == self.segment
                    && header.shard == options.shard
                    && header.epoch >= self.epoch
                    && header.bytes() <= BATCH_BYTES_MAX
                    && self.offset + header.bytes() as u64 <= options.segment_bytes
                    && self.crc.is_none_or(|crc| crc == header.prev_crc)
            };
            let Some(header) = BatchHeader::peek(rest).filter(fits) else {
                self.over = true;
                break;
            };
            let padded = (header.end().0 - header.lsn.0) as usize;
            if rest.len() < padded {
                break;
            }
            let batch = &rest[..header.bytes()];
            if !header.holds(batch, self.key) {
                self.over = true;
                break;
            }
            self.counter
                .take(&header, batch)
                .map_err(|why| (header, why))?;
            self.crc = Some(header.crc);
            self.epoch = header.epoch;
            self.offset += padded as u64;
            at += padded;
        }
        self.pending.drain(..at);
        Ok(())
    }
}

fn uncountable(
    why: Uncountable,
    header: &BatchHeader,
    file: &str,
    segment_bytes: u64,
) -> RecoverError {
    let file = file.to_owned();
    let segment = header.segment;
    match why {
        Uncountable::Unreadable { at, schema } => RecoverError::Unreadable {
            file,
            segment,
            offset: at.0 % segment_bytes,
            schema,
        },
        Uncountable::Lengths => RecoverError::Corrupt {
            file,
            segment,
            offset: header.lsn.0 % segment_bytes,
            what: "the lengths of a batch's records do not add up",
        },
    }
}

/// What [`judge`] has found.
#[derive(Clone, Copy, Debug)]
pub struct JudgedLog {
    /// How the log ended.
    pub report: Report,
    /// What it holds.
    pub counts: Counts,
    /// The position behind its last batch; 0 without any.
    pub end: Lsn,
    /// What its last batch says of what is dead.
    pub retired: Lsn,
}

/// Reads and judges a log as a start does, and counts what is in it. Changes nothing.
pub fn judge(folder: &Path, options: Options, step: &mut Step<'_>) -> Result<JudgedLog, CopyError> {
    let mut counter = Counter::default();
    let mut stopped = false;
    let mut device = FileDevice::new(folder);
    let judged = inspect(&mut device, options, &mut |header, batch| {
        if stopped || step(header.bytes() as u64).is_break() {
            stopped = true;
            return Ok(());
        }
        counter.take(header, batch).map_err(|why| {
            let segment = header.segment;
            let files = segment_files(folder, options, segment..=segment);
            let file = files.ok().and_then(|mut files| files.remove(&segment));
            let name = file.map_or_else(|| "(no file)".to_owned(), |file| file.name);
            uncountable(why, header, &name, options.segment_bytes)
        })
    });
    if stopped {
        return Err(CopyError::Stopped);
    }
    Ok(JudgedLog {
        report: judged?,
        counts: counter.counts(),
        end: counter.end(),
        retired: counter.retired(),
    })
}

/// A file that is written once, from front to back, readable by its owner alone. What it holds does not stay in the page
/// cache.
pub struct Sink {
    path: PathBuf,
    file: File,
    hash: Xxh3,
    bytes: u64,
    flushed: u64,
}

impl Sink {
    /// Makes the file and the folders in front of it, which nobody but the owner may enter.
    pub fn create(path: &Path) -> Result<Sink, CopyError> {
        if let Some(folder) = path.parent() {
            make_folder(folder).map_err(|error| failed("make", folder, error))?;
        }
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| failed("create", path, error))?;
        Ok(Sink {
            path: path.to_owned(),
            file,
            hash: Xxh3::new(),
            bytes: 0,
            flushed: 0,
        })
    }

    /// Appends.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CopyError> {
        self.hash.update(bytes);
        self.append(bytes)
    }

    /// Appends zeroes up to a length. They do not count for the checksum.
    pub fn fill_to(&mut self, length: u64) -> Result<(), CopyError> {
        let zeroes = vec![0; PIECE_BYTES];
        while self.bytes < length {
            let piece = (length - self.bytes).min(PIECE_BYTES as u64);
            self.append(&zeroes[..piece as usize])?;
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), CopyError> {
        self.file
            .write_all(bytes)
            .map_err(|error| failed("write", &self.path, error))?;
        self.bytes += bytes.len() as u64;
        if self.bytes >= self.flushed + FLUSH_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CopyError> {
        self.file
            .sync_data()
            .map_err(|error| failed("flush", &self.path, error))?;
        forget(&self.file, self.flushed, self.bytes - self.flushed);
        self.flushed = self.bytes;
        Ok(())
    }

    /// Flushes it. What it was given, under this name.
    pub fn finish(mut self, name: String) -> Result<CopiedFile, CopyError> {
        self.flush()?;
        self.file
            .sync_all()
            .map_err(|error| failed("flush", &self.path, error))?;
        Ok(CopiedFile {
            name,
            bytes: self.bytes,
            checksum: self.hash.digest(),
        })
    }
}

/// Makes a folder and those in front of it, for the owner alone.
pub fn make_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// Reads a file from front to back, hands each piece on, and says what it was. What was read does not stay in the page
/// cache.
pub fn read_through(
    path: &Path,
    name: String,
    each: &mut dyn FnMut(&[u8]) -> Result<(), CopyError>,
) -> Result<CopiedFile, CopyError> {
    let mut file = File::open(path).map_err(|error| failed("open", path, error))?;
    let mut hash = Xxh3::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let read = match file.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed("read", path, error)),
        };
        hash.update(&piece[..read]);
        each(&piece[..read])?;
        forget(&file, bytes, read as u64);
        bytes += read as u64;
    }
    Ok(CopiedFile {
        name,
        bytes,
        checksum: hash.digest(),
    })
}

/// Tells the kernel that nobody reads these bytes of a file again soon.
fn forget(file: &File, offset: u64, bytes: u64) {
    // SAFETY: the descriptor is open; the call touches no memory of this process.
    let _ = unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            offset as i64,
            bytes as i64,
            libc::POSIX_FADV_DONTNEED,
        )
    };
}

fn failed(what: &str, path: &Path, error: io::Error) -> CopyError {
    CopyError::Io {
        what: format!("{what} {}", path.display()),
        error,
    }
}
