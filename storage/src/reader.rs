//! Reading records of a log that its shard is writing at the same time: from another thread, by position, in pieces that
//! go past the page cache as the log's own writes do. What is read may be gone or moved meanwhile: a record counts only if
//! its checksum holds at this position under its segment's key.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    ops::RangeInclusive,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use pelton_core::{id::Lsn, limits::BATCH_BYTES_MAX};

use crate::{
    device::Block,
    format::{
        BLOCK_BYTES, BatchHeader, SEGMENT_DATA_OFFSET, SegmentHeader, record_bytes, record_holds,
    },
    log::Options,
    segment::parse_segment_name,
};

/// Records this close to each other are read in one piece, of at most this many bytes.
const GAP_BYTES: u64 = 32 << 10;
const PIECE_BYTES: u64 = 1 << 20;

/// A record that is to be read.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The reader's number for it.
    pub index: usize,
    /// Where it stands.
    pub position: Lsn,
    /// Its length, or about that.
    pub bytes: usize,
}

/// Reads one shard's log. Owned by one thread; the shard's own is another.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    options: Options,
    /// By number, the segments whose files have been met.
    segments: BTreeMap<u64, (File, u128)>,
}

impl Reader {
    /// Nothing is opened before the first read.
    pub fn new(directory: PathBuf, options: Options) -> Reader {
        Reader {
            directory,
            options,
            segments: BTreeMap::new(),
        }
    }

    /// Reads the records in the order of their positions and gives each that holds to `found`. What could not be had is
    /// told as `None`.
    pub fn read(&mut self, wanted: &mut [Wanted], mut found: impl FnMut(usize, Option<&[u8]>)) {
        wanted.sort_unstable_by_key(|wanted| wanted.position);
        if let Some(first) = wanted.first() {
            // Nothing older is asked for again, unless its record is met where it was moved to.
            let oldest = first.position.0 / self.options.segment_bytes;
            self.segments = self.segments.split_off(&oldest);
        }
        let mut rest = &wanted[..];
        while let Some(first) = rest.first() {
            let start = first.position.0;
            let segment = start / self.options.segment_bytes;
            let mut end = start + first.bytes as u64;
            let mut count = 1;
            for next in &rest[1..] {
                let next_end = end.max(next.position.0 + next.bytes as u64);
                if next.position.0 / self.options.segment_bytes != segment
                    || next.position.0 > end + GAP_BYTES
                    || next_end > start + PIECE_BYTES
                {
                    break;
                }
                end = next_end;
                count += 1;
            }
            let (piece, behind) = rest.split_at(count);
            rest = behind;
            self.read_piece(segment, piece, end, &mut found);
        }
    }

    fn read_piece(
        &mut self,
        segment: u64,
        piece: &[Wanted],
        end: u64,
        found: &mut impl FnMut(usize, Option<&[u8]>),
    ) {
        let start = piece[0].position.0 / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let block = self.bytes(segment, start, end).ok();
        let bytes: &[u8] = block.as_deref().unwrap_or_default();
        for wanted in piece {
            let at = (wanted.position.0 - start) as usize;
            match self.holding(
                segment,
                bytes.get(at..).unwrap_or_default(),
                wanted.position,
            ) {
                Held::Whole(record) => found(wanted.index, Some(record)),
                Held::Longer(longer) => {
                    let from = wanted.position.0 / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
                    let until = wanted.position.0 + longer as u64;
                    let block = self.bytes(segment, from, until).ok();
                    let bytes: &[u8] = block.as_deref().unwrap_or_default();
                    let at = (wanted.position.0 - from) as usize;
                    let rest = bytes.get(at..).unwrap_or_default();
                    match self.holding(segment, rest, wanted.position) {
                        Held::Whole(record) => found(wanted.index, Some(record)),
                        Held::Longer(_) | Held::No => found(wanted.index, None),
                    }
                }
                Held::No => {
                    // The file may hold another segment by now.
                    self.segments.remove(&segment);
                    found(wanted.index, None);
                }
            }
        }
    }

    fn holding<'b>(&self, segment: u64, bytes: &'b [u8], position: Lsn) -> Held<'b> {
        let Some(&(_, key)) = self.segments.get(&segment) else {
            return Held::No;
        };
        let Some(whole) = record_bytes(bytes) else {
            return Held::No;
        };
        match bytes.get(..whole) {
            Some(record) if record_holds(record, position, key) => Held::Whole(record),
            None if whole <= BATCH_BYTES_MAX => Held::Longer(whole),
            Some(_) | None => Held::No,
        }
    }

    /// The bytes of a segment between two positions, the first of which is a block's.
    fn bytes(&mut self, segment: u64, start: u64, end: u64) -> io::Result<Block> {
        if !self.segments.contains_key(&segment) {
            self.look_for(segment)?;
        }
        let Some((file, _)) = self.segments.get(&segment) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let base = segment * self.options.segment_bytes;
        let end = end.min(base + self.options.segment_bytes);
        let bytes = ((end - start) as usize).next_multiple_of(BLOCK_BYTES);
        let mut block = Block::new(bytes);
        let read = read_at(file, &mut block, start - base)?;
        block.truncate(read);
        Ok(block)
    }

    fn look_for(&mut self, segment: u64) -> io::Result<()> {
        let mut wanted = segment_files(&self.directory, self.options, segment..=segment)?;
        if let Some(SegmentFile { name, key }) = wanted.remove(&segment) {
            let file = open_direct(&self.directory.join(name))?;
            self.segments.insert(segment, (file, key));
        }
        Ok(())
    }
}

/// A file that holds a segment.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    pub(crate) name: String,
    pub(crate) key: u128,
}

pub(crate) fn open_direct(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_DIRECT);
    options.open(path)
}

/// Finds the files that hold these segments, by the headers of all files. A crash while a segment was being prepared
/// leaves its number twice: the later epoch counts, as it does for a start, and within one the file that has been begun.
pub(crate) fn segment_files(
    directory: &Path,
    options: Options,
    segments: RangeInclusive<u64>,
) -> io::Result<BTreeMap<u64, SegmentFile>> {
    let mut best: BTreeMap<u64, ((u64, bool), SegmentFile)> = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if parse_segment_name(&name).is_none() {
            continue;
        }
        let Ok(file) = open_direct(&entry.path()) else {
            continue; // It went meanwhile.
        };
        let mut block = Block::new(SEGMENT_DATA_OFFSET as usize + BLOCK_BYTES);
        read_at(&file, &mut block, 0)?;
        let header = SegmentHeader::decode(&block[..BLOCK_BYTES])
            .or_else(|_| SegmentHeader::decode(&block[BLOCK_BYTES..2 * BLOCK_BYTES]));
        let Ok(header) = header else {
            continue;
        };
        let mine = header.shard == options.shard && header.log_id == options.log_id;
        if !mine || !segments.contains(&header.segment) {
            continue;
        }
        let first = BatchHeader::peek(&block[SEGMENT_DATA_OFFSET as usize..]);
        let begun = first.is_some_and(|batch| batch.segment == header.segment);
        let rank = (header.epoch, begun);
        let known = best.get(&header.segment);
        if known.is_none_or(|(known, _)| *known < rank) {
            let key = header.key;
            let found = SegmentFile { name, key };
            best.insert(header.segment, (rank, found));
        }
    }
    let found = best.into_iter();
    Ok(found.map(|(segment, (_, file))| (segment, file)).collect())
}

enum Held<'b> {
    Whole(&'b [u8]),
    /// So many bytes are needed to tell.
    Longer(usize),
    No,
}

pub(crate) fn read_at(file: &File, block: &mut Block, offset: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < block.len() {
        match file.read_at(&mut block[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}
