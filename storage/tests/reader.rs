//! Reading records beside the shard that writes them, by position, from files as crashes leave them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::Path};

use pelton_core::{
    id::Lsn,
    record::{BatchSpace, ClockRecordV1, Schema},
};
use pelton_storage::{
    format::{BATCH_HEADER_BYTES, BatchHeader, SEGMENT_DATA_OFFSET, SegmentHeader, seal_records},
    log::Options,
    reader::{Reader, Wanted},
    segment::segment_name,
};

const OPTIONS: Options = Options {
    shard: 1,
    log_id: 7,
    segment_bytes: 4 << 20,
};
const SEGMENT: u64 = 52;

/// A file for the segment, prepared in this epoch; with a time it has been begun, and its first record says that. Where
/// that stands, and how long it is.
fn write(folder: &Path, file: u32, epoch: u64, at_ms: Option<u64>) -> (Lsn, usize) {
    let key = u128::from(epoch) << 64 | u128::from(file);
    let header = SegmentHeader {
        shard: OPTIONS.shard,
        log_id: OPTIONS.log_id,
        segment: SEGMENT,
        segment_bytes: OPTIONS.segment_bytes,
        epoch,
        key,
    };
    let mut bytes = [header.encode(), header.encode()].concat();
    assert_eq!(bytes.len(), SEGMENT_DATA_OFFSET as usize);
    let lsn = Lsn(SEGMENT * OPTIONS.segment_bytes + SEGMENT_DATA_OFFSET);
    let position = Lsn(lsn.0 + BATCH_HEADER_BYTES as u64);
    let mut record_bytes = 0;
    if let Some(at_ms) = at_ms {
        let mut batch = vec![0; 4096];
        let clock = ClockRecordV1 {
            logged_ms: at_ms,
            next_seq: 1,
        };
        let mut space = BatchSpace {
            bytes: &mut batch,
            len: BATCH_HEADER_BYTES,
            base: lsn,
            records: 0,
        };
        record_bytes = space.append(Schema::Clock, &clock).bytes as usize;
        let (len, records) = (space.len, space.records);
        seal_records(&mut batch[..len], lsn, records, key);
        let header = BatchHeader {
            crc: 0,
            flags: 0,
            payload_bytes: (len - BATCH_HEADER_BYTES) as u32,
            records,
            shard: OPTIONS.shard,
            segment: SEGMENT,
            lsn,
            epoch,
            prev_crc: 0,
            durable: Lsn(0),
            retired: Lsn(0),
        };
        header.seal(&mut batch[..len], key);
        bytes.extend(batch);
    }
    bytes.resize(64 << 10, 0);
    fs::write(folder.join(segment_name(file)), bytes).unwrap();
    (position, record_bytes)
}

#[test]
fn of_two_files_with_one_number_the_later_epoch_is_read_and_within_one_that_which_was_begun() {
    // Prepared by a process that died, and prepared again by the next one, in files of either order.
    for (older, younger) in [(2, 8), (8, 2)] {
        for begun_epoch in [0x5d, 0x61] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), older, 0x5d, None);
            let (position, bytes) = write(folder.path(), younger, begun_epoch, Some(1_234));
            let mut reader = Reader::new(folder.path().to_owned(), OPTIONS);
            let mut wanted = [Wanted {
                index: 0,
                position,
                bytes,
            }];
            let mut found = None;
            reader.read(&mut wanted, |_, record| found = record.map(<[u8]>::to_vec));
            let file = fs::read(folder.path().join(segment_name(younger))).unwrap();
            let at = SEGMENT_DATA_OFFSET as usize + BATCH_HEADER_BYTES;
            assert_eq!(found.as_deref(), Some(&file[at..at + bytes]));
        }
    }
}
