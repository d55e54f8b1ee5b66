//! Reading segments for a start, piece by piece: whoever goes on from one piece to the next finds it read already, or on
//! its way. Every byte comes from the disk once and stays where it was read to, but for a batch that begins in one piece
//! and ends in the next: what is held of it is put in front of that one.

use std::collections::{BTreeMap, VecDeque};

use pelton_core::{id::Lsn, limits::BATCH_BYTES_MAX};

use crate::{
    device::{Block, Device, DeviceError, DeviceOp, FileId, Output, Tag},
    format::{BLOCK_BYTES, BatchHeader, SEGMENT_DATA_OFFSET},
    log::READ_TRIES,
    segment::Segment,
};

/// Bytes of one read.
const PIECE_BYTES: usize = 2 << 20;
/// Reads in flight while a piece is looked at by a reader that goes on from piece to piece.
const READS_MAX: usize = 2;

const _: () = assert!(
    PIECE_BYTES >= BATCH_BYTES_MAX,
    "a batch ends at the latest in the piece behind the one where it begins"
);

/// Reads, as often as the live log does where the disk fails; it has `failed` so often already.
pub(crate) fn read<D: Device>(
    device: &mut D,
    file: FileId,
    offset: u64,
    room: impl Fn() -> Block,
    mut failed: u32,
) -> Result<Block, DeviceError> {
    loop {
        let op = DeviceOp::Read {
            file,
            offset,
            into: room(),
        };
        match device.perform(op) {
            Ok(output) => return Ok(bytes_of(output)),
            Err(error) if failed + 1 >= READ_TRIES => return Err(error),
            Err(_) => failed += 1,
        }
    }
}

fn bytes_of(output: Output) -> Block {
    match output {
        Output::Bytes(block) => block,
        Output::Done | Output::Names(_) | Output::File(..) => panic!("a read brings bytes"),
    }
}

/// Room for a piece that may have fewer bytes than the next one.
fn piece_of(bytes: usize) -> Block {
    let mut room = Block::new(PIECE_BYTES);
    room.renew(bytes);
    room
}

/// A byte of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    segment: Segment,
    offset: u64,
}

impl Place {
    fn plus(self, bytes: usize) -> Place {
        Place {
            offset: self.offset + bytes as u64,
            ..self
        }
    }
}

/// Bytes of a segment from a place on.
struct Held {
    from: Place,
    block: Block,
    /// The file ends with them.
    to_end: bool,
}

impl Held {
    /// What is held from this place on, be it nothing, and whether the file ends with it; `None` for a place elsewhere.
    fn at(&self, place: Place) -> Option<(&[u8], bool)> {
        let start = place.offset.checked_sub(self.from.offset)? as usize;
        let bytes = match self.block.get(start..) {
            None if self.to_end => &[],
            bytes => bytes?,
        };
        (place.segment == self.from.segment).then_some((bytes, self.to_end))
    }

    fn end(&self) -> Place {
        self.from.plus(self.block.len())
    }
}

/// A read in flight, or ended and not taken.
struct Ahead {
    tag: Tag,
    from: Place,
    bytes: usize,
    result: Option<Result<Output, DeviceError>>,
}

/// Reads the segments of a log. Nothing else may be in flight on its device.
pub(crate) struct ReadAhead<'r, D: Device> {
    device: &'r mut D,
    segments: &'r BTreeMap<u64, Segment>,
    segment_bytes: u64,
    held: Option<Held>,
    /// In the order of the log.
    ahead: VecDeque<Ahead>,
    next_tag: Tag,
    spare: Vec<Block>,
    /// A batch that begins in one piece and ends in the next.
    joined: Vec<u8>,
}

impl<'r, D: Device> ReadAhead<'r, D> {
    pub(crate) fn new(
        device: &'r mut D,
        segments: &'r BTreeMap<u64, Segment>,
        segment_bytes: u64,
    ) -> ReadAhead<'r, D> {
        ReadAhead {
            device,
            segments,
            segment_bytes,
            held: None,
            ahead: VecDeque::new(),
            next_tag: 0,
            spare: Vec::new(),
            joined: Vec::new(),
        }
    }

    /// The sound batch at this place, with its bytes; `None` if there is none.
    pub(crate) fn batch(
        &mut self,
        segment: &Segment,
        offset: u64,
    ) -> Result<Option<(BatchHeader, &[u8])>, DeviceError> {
        let segment_bytes = self.segment_bytes;
        if offset + BLOCK_BYTES as u64 > segment_bytes {
            return Ok(None);
        }
        let place = Lsn(segment.number * segment_bytes + offset);
        let Some(header) = BatchHeader::peek(self.at(segment, offset, BLOCK_BYTES)?) else {
            return Ok(None);
        };
        let fits =
            header.bytes() <= BATCH_BYTES_MAX && offset + header.bytes() as u64 <= segment_bytes;
        if header.segment != segment.number || header.lsn != place || !fits {
            return Ok(None);
        }
        let bytes = self.at(segment, offset, header.bytes())?;
        let Some(bytes) = bytes.get(..header.bytes()) else {
            return Ok(None);
        };
        Ok(header.holds(bytes, segment.key).then_some((header, bytes)))
    }

    /// The bytes of a segment from `offset` on: at least `want`, which is at most a batch, where segment and file have
    /// them.
    pub(crate) fn at(
        &mut self,
        segment: &Segment,
        offset: u64,
        want: usize,
    ) -> Result<&[u8], DeviceError> {
        let want = want.min((self.segment_bytes - offset) as usize);
        let place = Place {
            segment: *segment,
            offset,
        };
        let held = self.held.as_ref().and_then(|held| held.at(place));
        if held.is_none_or(|(bytes, to_end)| bytes.len() < want && !to_end) {
            let kept = held.map_or(0, |(bytes, _)| bytes.len());
            let piece = self.take(place.plus(kept))?;
            let before = self.held.replace(piece);
            if let Some(before) = before {
                let kept = &before.block[before.block.len() - kept..];
                self.joined.clear();
                self.joined.extend(kept);
                self.spare.push(before.block);
            }
            if kept > 0 {
                let piece = self.held.as_ref().map_or(&[][..], |held| &held.block[..]);
                self.joined.extend(&piece[..piece.len().min(want - kept)]);
                return Ok(&self.joined);
            }
        }
        let held = self.held.as_ref().and_then(|held| held.at(place));
        Ok(held.expect("it was held, or read just now").0)
    }

    /// The device, with nothing in flight.
    pub(crate) fn device(&mut self) -> &mut D {
        while !self.ahead.is_empty() {
            self.pass_over_first();
        }
        self.device
    }

    /// The piece at this place.
    fn take(&mut self, place: Place) -> Result<Held, DeviceError> {
        // The log goes on in the next segment where the last batches left room in this one.
        while self.ahead.front().is_some_and(|ahead| ahead.from != place) {
            self.pass_over_first();
        }
        let held = self.held.as_ref();
        let goes_on = held.is_some_and(|held| self.behind(held.end()) == Some(place));
        let goes_on = goes_on || !self.ahead.is_empty();
        if self.ahead.is_empty() {
            self.start(place);
        }
        let (piece, result) = self.end_first();
        if goes_on {
            self.read_ahead(&piece);
        }
        let failed = u32::from(result.is_err());
        let block = match result.map(bytes_of) {
            Ok(block) if block.len() == piece.bytes => block,
            // One that came short may have been interrupted.
            Ok(_) | Err(_) => {
                let room = || piece_of(piece.bytes);
                read(
                    self.device,
                    place.segment.file.id,
                    place.offset,
                    room,
                    failed,
                )?
            }
        };
        Ok(Held {
            from: place,
            to_end: block.len() < piece.bytes,
            block,
        })
    }

    /// Has reads in flight while the piece that ended last is looked at.
    fn read_ahead(&mut self, ended: &Ahead) {
        let last = self.ahead.back().unwrap_or(ended);
        let mut next = self.behind(last.from.plus(last.bytes));
        while let Some(from) = next.filter(|_| self.ahead.len() < READS_MAX) {
            let bytes = self.start(from);
            next = self.behind(from.plus(bytes));
        }
        self.see_ended();
    }

    /// Where the log goes on if it does not end in front of this place; `None` behind the last segment.
    fn behind(&self, place: Place) -> Option<Place> {
        if place.offset < self.segment_bytes {
            return Some(place);
        }
        let segment = *self.segments.get(&(place.segment.number + 1))?;
        Some(Place {
            segment,
            offset: SEGMENT_DATA_OFFSET,
        })
    }

    /// Starts reading the piece at this place. How many bytes it has.
    fn start(&mut self, from: Place) -> usize {
        let bytes = PIECE_BYTES.min((self.segment_bytes - from.offset) as usize);
        let spare = self.spare.pop();
        let mut into = spare.unwrap_or_else(|| piece_of(bytes));
        into.renew(bytes);
        self.next_tag += 1;
        let read = DeviceOp::Read {
            file: from.segment.file.id,
            offset: from.offset,
            into,
        };
        self.device.start(self.next_tag, read);
        self.ahead.push_back(Ahead {
            tag: self.next_tag,
            from,
            bytes,
            result: None,
        });
        bytes
    }

    fn pass_over_first(&mut self) {
        if let (_, Ok(output)) = self.end_first() {
            self.spare.push(bytes_of(output));
        }
    }

    /// Waits for the end of the first read in flight.
    fn end_first(&mut self) -> (Ahead, Result<Output, DeviceError>) {
        loop {
            self.see_ended();
            let first = self.ahead.front_mut().expect("a read is in flight");
            if let Some(result) = first.result.take() {
                let first = self.ahead.pop_front().expect("it is there");
                return (first, result);
            }
            self.device.await_one();
        }
    }

    /// Takes note of the reads that have ended. Asking also makes the device begin with what was started.
    fn see_ended(&mut self) {
        while let Some((tag, result)) = self.device.completed() {
            let ended = self.ahead.iter_mut().find(|ahead| ahead.tag == tag);
            ended.expect("nothing else is in flight").result = Some(result);
        }
    }
}

impl<D: Device> Drop for ReadAhead<'_, D> {
    fn drop(&mut self) {
        self.device();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{memory::MemoryDevice, segment::File};

    const SEGMENT_BYTES: u64 = 8 << 20;

    /// Three segments whose blocks are filled with numbers, of which the last one's file is short.
    fn log() -> (MemoryDevice, BTreeMap<u64, Segment>) {
        let mut device = MemoryDevice::new(1, BLOCK_BYTES);
        let segments = (1..=3).map(|number| {
            let blocks = if number == 3 {
                700
            } else {
                SEGMENT_BYTES / BLOCK_BYTES as u64
            };
            let created = device.perform(DeviceOp::Create {
                name: number.to_string(),
                bytes: blocks * BLOCK_BYTES as u64,
            });
            let Ok(Output::File(id, _)) = created else {
                panic!("a creation brings a file");
            };
            for block in 0..blocks {
                let offset = block * BLOCK_BYTES as u64;
                let data = (number * SEGMENT_BYTES + offset)
                    .to_le_bytes()
                    .repeat(BLOCK_BYTES / 8);
                let written = device.perform(DeviceOp::Write {
                    file: id,
                    offset,
                    data,
                });
                assert!(written.is_ok());
            }
            let file = File {
                id,
                number: number as u32,
            };
            let key = number.into();
            (number, Segment { number, key, file })
        });
        let segments = segments.collect();
        (device, segments)
    }

    fn check(
        reader: &mut ReadAhead<'_, MemoryDevice>,
        segment: &Segment,
        offset: u64,
        want: usize,
    ) {
        let bytes = reader.at(segment, offset, want).expect("the disk works");
        let wanted = want.min((SEGMENT_BYTES - offset) as usize);
        assert!(bytes.len() >= wanted || segment.number == 3);
        for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let place = segment.number * SEGMENT_BYTES + offset + (index * BLOCK_BYTES) as u64;
            assert_eq!(block[..8], place.to_le_bytes());
            assert_eq!(block[BLOCK_BYTES - 8..], place.to_le_bytes());
        }
    }

    #[test]
    fn what_is_read_in_any_order_is_what_stands_there() {
        let (mut device, segments) = log();
        let mut reader = ReadAhead::new(&mut device, &segments, SEGMENT_BYTES);
        // In order, batches of all lengths, which end where a segment ends or in front of it.
        for segment in segments.values() {
            let mut offset = SEGMENT_DATA_OFFSET;
            for blocks in [1, 511, 512, 3, 300, 512, 100, 77] {
                check(&mut reader, segment, offset, BLOCK_BYTES);
                check(&mut reader, segment, offset, blocks * BLOCK_BYTES);
                offset += (blocks * BLOCK_BYTES) as u64;
            }
        }
        // To and fro.
        for (number, block) in [
            (2, 2047),
            (1, 0),
            (3, 699),
            (3, 698),
            (1, 2047),
            (2, 2),
            (2, 500),
        ] {
            let offset = block * BLOCK_BYTES as u64;
            check(&mut reader, &segments[&number], offset, BATCH_BYTES_MAX);
        }
    }

    #[test]
    fn nothing_is_left_in_flight_and_a_read_ahead_that_fails_is_made_again() {
        for fails in 1..=READ_TRIES {
            let (mut device, segments) = log();
            let mut reader = ReadAhead::new(&mut device, &segments, SEGMENT_BYTES);
            let piece = PIECE_BYTES as u64;
            for offset in [0, piece] {
                check(&mut reader, &segments[&1], offset, PIECE_BYTES);
            }
            assert_eq!(reader.ahead.len(), READS_MAX);
            reader.device.fail_next_reads(fails);
            if fails < READ_TRIES {
                check(&mut reader, &segments[&1], 2 * piece, PIECE_BYTES);
                check(&mut reader, &segments[&1], 3 * piece, PIECE_BYTES);
            } else {
                assert!(reader.at(&segments[&1], 2 * piece, 1).is_err());
            }
            assert!(!reader.ahead.is_empty());
            drop(reader);
            assert!(device.queued() == 0 && device.completed().is_none());
        }
    }
}
