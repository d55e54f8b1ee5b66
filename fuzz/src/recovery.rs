//! Recovery over a small sound log whose files are changed as an input says, and over files of any bytes. It ends with
//! a log or with an error that names the place, never otherwise; and what it hands on was appended, in that order.
//!
//! An input is a list of changes of six bytes each: what is done, to which file, where, and with what.

use std::{collections::BTreeMap, sync::OnceLock};

use pelton_core::{
    id::Lsn,
    record::{BatchSpace, ClockRecordV1, RECORD_HEADER_BYTES, Record, Schema, read},
};
use pelton_storage::{
    device::{Device, DeviceOp, Output},
    format::{
        BATCH_HEADER_BYTES, BLOCK_BYTES, BatchHeader, FLAG_CARRY, FLAG_OPENING,
        SEGMENT_DATA_OFFSET, SegmentHeader, seal_records,
    },
    log::Options,
    memory::MemoryDevice,
    recover::{Outcome, RecoverError, Report, inspect, recover},
    segment::segment_name,
};

use crate::Input;

const OPTIONS: Options = Options {
    shard: 3,
    log_id: 42,
    segment_bytes: SEGMENT_BLOCKS * BLOCK_BYTES as u64,
};
const SEGMENT_BLOCKS: u64 = 8;
/// Segments with batches; one more is prepared and holds none.
const SEGMENTS: u64 = 2;
const CHANGES_MAX: usize = 16;
/// With fewer bytes than a checksum has, nobody makes a batch that holds.
const CHECKSUM_BYTES: usize = 4;

type Files = BTreeMap<String, Vec<u8>>;
/// Positions of records and the numbers in them.
type Appended = Vec<(Lsn, u64)>;

struct Sound {
    files: Files,
    appended: Appended,
}

/// What the changes to the files allow.
#[derive(Default)]
struct Changes {
    count: usize,
    /// Single bytes that were written.
    bytes: usize,
    /// A change that a disk does not make by itself: a checksum was computed anew, or any bytes were written.
    forged: bool,
    /// Files came, went, were cut or changed their names: the log may have lost its end.
    names: bool,
}

pub fn run(data: &[u8]) {
    static SOUND: OnceLock<Sound> = OnceLock::new();
    let sound = SOUND.get_or_init(sound);
    let mut files = sound.files.clone();
    let mut changes = Changes::default();
    let mut input = Input(data);
    while !input.0.is_empty() && changes.count < CHANGES_MAX {
        change(&mut files, &mut input, &mut changes);
    }

    let mut device = disk(&files);
    let inspected = inspect(&mut device, OPTIONS, &mut |_, _| Ok(()));
    for (name, bytes) in &files {
        assert_eq!(device.contents(name), bytes, "looking changes nothing");
    }
    let (recovered, found) = start(device);
    let honest = !changes.forged && changes.bytes < CHECKSUM_BYTES;
    if honest {
        let prefix = sound.appended.get(..found.len());
        assert_eq!(
            prefix,
            Some(&*found),
            "only what was appended, in its order"
        );
    }
    match recovered {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok((device, report)) => {
            let inspected = inspected.expect("what is recovered is sound");
            assert_eq!(
                (inspected.outcome, inspected.records),
                (report.outcome, report.records)
            );
            if honest && changes.count <= 1 && !changes.names {
                assert_eq!(
                    found, sound.appended,
                    "one damaged block is named or harmless"
                );
            }
            if report.epoch == u64::MAX {
                return; // Only a forged epoch is that high: none follows it, and the next start says so.
            }
            // What a recovery leaves is a log that ended in order. Only where a file took the number of another one, old
            // batches of that number may be left behind the end, and are erased as a torn tail would be.
            let (again, found_again) = start(device);
            let (_, again) = again.expect("a log that was recovered is sound");
            assert_eq!(found_again, found);
            assert!(again.outcome == Outcome::Clean || !honest || changes.names);
            assert!(again.epoch > report.epoch);
        }
    }
}

/// The log of a shard that wrote small batches into two segments, fell idle, and had the next segment prepared.
fn sound() -> Sound {
    let mut files = Files::new();
    let mut appended = Appended::new();
    let mut prev_crc = 0;
    for segment in 1..=SEGMENTS + 1 {
        let header = SegmentHeader {
            shard: OPTIONS.shard,
            log_id: OPTIONS.log_id,
            segment,
            segment_bytes: OPTIONS.segment_bytes,
            epoch: 1,
            key: u128::from(segment) << 64 | 0x5eed,
        };
        let mut file = vec![0; OPTIONS.segment_bytes as usize];
        for copy in [0, BLOCK_BYTES] {
            file[copy..copy + BLOCK_BYTES].copy_from_slice(&header.encode());
        }
        let blocks = SEGMENT_DATA_OFFSET as usize / BLOCK_BYTES..SEGMENT_BLOCKS as usize;
        for block in blocks {
            // The last segment ends before its last block, with what an idle log writes.
            let left = SEGMENT_BLOCKS as usize - block;
            if segment > SEGMENTS || segment == SEGMENTS && left == 1 {
                break;
            }
            let opening = appended.is_empty() && prev_crc == 0;
            let carry = segment == SEGMENTS && left == 2;
            let lsn = Lsn(segment * OPTIONS.segment_bytes + (block * BLOCK_BYTES) as u64);
            let batch = &mut file[block * BLOCK_BYTES..][..BLOCK_BYTES];
            let mut space = BatchSpace {
                bytes: batch,
                len: BATCH_HEADER_BYTES,
                base: lsn,
                records: 0,
            };
            let records = if opening || carry { 0 } else { 3 };
            for _ in 0..records {
                let record = ClockRecordV1 {
                    logged_ms: 0,
                    next_seq: appended.len() as u64,
                };
                let placed = space.append(Schema::Clock, &record);
                appended.push((placed.lsn, record.next_seq));
            }
            let len = space.len;
            let batch = &mut batch[..len];
            seal_records(batch, lsn, records, header.key);
            prev_crc = BatchHeader {
                crc: 0,
                flags: if opening {
                    FLAG_OPENING
                } else if carry {
                    FLAG_CARRY
                } else {
                    0
                },
                payload_bytes: (len - BATCH_HEADER_BYTES) as u32,
                records,
                shard: OPTIONS.shard,
                segment,
                lsn,
                epoch: 1,
                durable: lsn,
                retired: Lsn(0),
                prev_crc,
            }
            .seal(batch, header.key);
        }
        files.insert(segment_name(segment as u32), file);
    }
    Sound { files, appended }
}

fn disk(files: &Files) -> MemoryDevice {
    let mut device = MemoryDevice::new(1, BLOCK_BYTES);
    let mut perform = |op| device.perform(op).expect("a disk in memory works");
    for (name, bytes) in files {
        let created = perform(DeviceOp::Create {
            name: name.clone(),
            bytes: bytes.len() as u64,
        });
        let Output::File(file, _) = created else {
            panic!("creating brings a file");
        };
        perform(DeviceOp::Write {
            file,
            offset: 0,
            data: bytes.clone(),
        });
        perform(DeviceOp::Flush { file });
    }
    perform(DeviceOp::FlushDirectory);
    device
}

fn start(device: MemoryDevice) -> (Result<(MemoryDevice, Report), RecoverError>, Appended) {
    let mut found = Appended::new();
    let recovered = recover(device, OPTIONS, &mut |lsn, schema, body| {
        let Ok(Record::Clock(clock)) = read(schema, body) else {
            return Err(());
        };
        found.push((lsn, clock.next_seq.to_native()));
        Ok(())
    });
    let recovered = recovered.map(|(log, report)| (log.into_device(), report));
    (recovered, found)
}

fn change(files: &mut Files, input: &mut Input<'_>, changes: &mut Changes) {
    changes.count += 1;
    let what = input.byte() % 14;
    let names: Vec<String> = files.keys().cloned().collect();
    let nth = usize::from(input.byte());
    let place = usize::from(input.u16());
    let with = input.u16();
    let name = match names.get(nth % names.len().max(1)) {
        Some(name) => name.clone(),
        None => segment_name(1),
    };
    let mut file = files.remove(&name).unwrap_or_default();
    let blocks = file.len() / BLOCK_BYTES;
    let at = place % file.len().max(1);
    let block = place % blocks.max(1) * BLOCK_BYTES;
    match what {
        0 => {
            changes.bytes += 1;
            if let Some(byte) = file.get_mut(at) {
                *byte ^= with as u8;
            }
        }
        1 => {
            changes.bytes += 1;
            // Within the header of a batch or a segment, where the bytes have a meaning.
            let at = block + usize::from(with >> 8) % 128;
            if let Some(byte) = file.get_mut(at) {
                *byte = with as u8;
            }
        }
        2 => {
            // Lost before it was written.
            if blocks > 0 {
                file[block..block + BLOCK_BYTES].fill(0);
            }
        }
        3 => {
            // Written to another place, of the same file or of another one.
            if blocks > 0 {
                let copy = file[block..block + BLOCK_BYTES].to_vec();
                let to = usize::from(with >> 8);
                if (with as u8).is_multiple_of(2) {
                    let at = to % blocks * BLOCK_BYTES;
                    file[at..at + BLOCK_BYTES].copy_from_slice(&copy);
                } else if let Some(other) = files.values_mut().nth(to % 2)
                    && other.len() >= BLOCK_BYTES
                {
                    let at = to / 2 % (other.len() / BLOCK_BYTES) * BLOCK_BYTES;
                    other[at..at + BLOCK_BYTES].copy_from_slice(&copy);
                }
            }
        }
        4 => {
            changes.names = true;
            return;
        }
        5 => {
            changes.names = true;
            file.truncate(place);
        }
        6 => {
            changes.names = true;
            files.insert(segment_name(u32::from(with)), file.clone());
        }
        7 => {
            changes.names = true;
            files.insert(segment_name(u32::MAX - u32::from(with)), file);
            return;
        }
        8 => {
            changes.names = true;
            // A name of a file that is being filled, a stray one, or one that is almost right.
            let name = ["filling", "stray", "segment"][usize::from(with % 3)];
            files.insert(format!("{}.{name}", segment_name(u32::from(with))), file);
            return;
        }
        9 => {
            changes.names = true;
            if let Some(other) = files.values_mut().next() {
                std::mem::swap(other, &mut file);
            }
        }
        10 => {
            changes.forged = true;
            forge_segment(&mut file, place, input);
        }
        11 => {
            changes.forged = true;
            forge_batch(&mut file, block, with, input);
        }
        12 => {
            changes.forged = true;
            // Any bytes at a place.
            let bytes = input.take(usize::from(with % 512));
            let end = (at + bytes.len()).min(file.len());
            file[at..end].copy_from_slice(&bytes[..end - at]);
        }
        _ => {
            changes.forged = true;
            changes.names = true;
            // A file of any bytes.
            file = input.take(usize::from(with)).to_vec();
        }
    }
    files.insert(name, file);
}

/// A segment's header with other numbers and the right checksum, in one copy or both.
fn forge_segment(file: &mut [u8], place: usize, input: &mut Input<'_>) {
    let Some(mut header) = header_of(file) else {
        return;
    };
    match place % 4 {
        0 => header.segment = input.u64(),
        1 => header.epoch = input.u64(),
        2 => header.segment_bytes = input.u64(),
        _ => header.key = u128::from(input.u64()),
    }
    for copy in 0..1 + place / 4 % 2 {
        if let Some(block) = file.get_mut(copy * BLOCK_BYTES..(copy + 1) * BLOCK_BYTES) {
            block.copy_from_slice(&header.encode());
        }
    }
}

/// The batch at a block with other numbers, or another length of its first record, and the right checksum.
fn forge_batch(file: &mut [u8], block: usize, with: u16, input: &mut Input<'_>) {
    let Some(key) = header_of(file).map(|header| header.key) else {
        return;
    };
    let Some(mut header) = file.get(block..).and_then(BatchHeader::peek) else {
        return;
    };
    match with % 9 {
        0 => header.segment = input.u64(),
        1 => header.lsn = Lsn(input.u64()),
        2 => header.epoch = input.u64(),
        3 => header.durable = Lsn(input.u64()),
        4 => header.retired = Lsn(input.u64()),
        5 => header.prev_crc = input.u32(),
        6 => header.records = input.u32(),
        7 => header.payload_bytes = input.u32(),
        _ => {
            let length = input.u32().to_le_bytes();
            let first = block + BATCH_HEADER_BYTES;
            if let Some(record) = file.get_mut(first..first + RECORD_HEADER_BYTES) {
                record[..4].copy_from_slice(&length);
            }
        }
    }
    let end = block.checked_add(BATCH_HEADER_BYTES + header.payload_bytes as usize);
    if let Some(batch) = end.and_then(|end| file.get_mut(block..end)) {
        header.seal(batch, key);
    }
}

fn header_of(file: &[u8]) -> Option<SegmentHeader> {
    SegmentHeader::decode(file.get(..BLOCK_BYTES)?).ok()
}
