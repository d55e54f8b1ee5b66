//! The bytes of a segment: its header block, written twice, and the header of each batch. All numbers are
//! little-endian. `docs/FORMAT.md` is the full text; a test compares it with the constants here.

use pelton_core::{
    id::Lsn,
    record::{RECORD_ALIGN, RECORD_HEADER_BYTES},
};
use xxhash_rust::xxh3::xxh3_64;

/// Everything is aligned to this, the block of every device that Pelton is made for.
pub const BLOCK_BYTES: usize = 4096;
/// Version of segment and batch layout.
pub const FORMAT_VERSION: u16 = 1;
/// Where the batches of a segment begin: behind two copies of its header.
pub const SEGMENT_DATA_OFFSET: u64 = 2 * BLOCK_BYTES as u64;
/// Bytes of a batch header.
pub const BATCH_HEADER_BYTES: usize = 80;

const SEGMENT_MAGIC: u32 = u32::from_le_bytes(*b"PLTS");
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"PLTB");

/// Batch flag: written by a recovery, with a new epoch, before anything else.
pub const FLAG_OPENING: u16 = 1;
/// Batch flag: carries the durable position forward after the log fell idle; has no records.
pub const FLAG_CARRY: u16 = 2;
/// Batch flag: the log was closed in order.
pub const FLAG_CLOSING: u16 = 4;

/// What a segment's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The shard whose log this is.
    pub shard: u16,
    /// The log directory's identity.
    pub log_id: u128,
    /// The segment's number; the log's positions follow from it.
    pub segment: u64,
    /// Bytes of every segment of this log.
    pub segment_bytes: u64,
    /// The epoch in which the segment was prepared.
    pub epoch: u64,
    /// Random, drawn when the segment was prepared and never shown to a peer: the checksum of every batch starts from
    /// it, so that neither bytes of a tenant nor an earlier life of the segment can pass for a batch.
    pub key: u128,
}

/// Why a block is no header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadHeader {
    /// Nothing but zeroes.
    Zero,
    /// Not a header, or a damaged one.
    Damaged,
    /// A sound header of another version.
    Version(u16),
}

impl SegmentHeader {
    /// The header as a block.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[0..4].copy_from_slice(&SEGMENT_MAGIC.to_le_bytes());
        block[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        block[12..14].copy_from_slice(&self.shard.to_le_bytes());
        block[16..32].copy_from_slice(&self.log_id.to_le_bytes());
        block[32..40].copy_from_slice(&self.segment.to_le_bytes());
        block[40..48].copy_from_slice(&self.segment_bytes.to_le_bytes());
        block[48..56].copy_from_slice(&self.epoch.to_le_bytes());
        block[56..72].copy_from_slice(&self.key.to_le_bytes());
        let crc = crc32c::crc32c(&block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads a header block.
    pub fn decode(block: &[u8]) -> Result<SegmentHeader, BadHeader> {
        assert_eq!(block.len(), BLOCK_BYTES);
        if block.iter().all(|&byte| byte == 0) {
            return Err(BadHeader::Zero);
        }
        let crc = crc32c::crc32c_append(
            crc32c::crc32c_append(crc32c::crc32c(&block[..8]), &[0; 4]),
            &block[12..],
        );
        if u32_at(block, 0) != SEGMENT_MAGIC || u32_at(block, 8) != crc {
            return Err(BadHeader::Damaged);
        }
        if u16_at(block, 4) != FORMAT_VERSION {
            return Err(BadHeader::Version(u16_at(block, 4)));
        }
        Ok(SegmentHeader {
            shard: u16_at(block, 12),
            log_id: u128_at(block, 16),
            segment: u64_at(block, 32),
            segment_bytes: u64_at(block, 40),
            epoch: u64_at(block, 48),
            key: u128_at(block, 56),
        })
    }
}

/// What a batch's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    /// Header and payload, from the segment's key on.
    pub crc: u32,
    /// See `FLAG_OPENING` and the others.
    pub flags: u16,
    /// Bytes behind the header.
    pub payload_bytes: u32,
    /// Records in them.
    pub records: u32,
    /// The shard.
    pub shard: u16,
    /// The segment.
    pub segment: u64,
    /// The position of the header.
    pub lsn: Lsn,
    /// Raised by every recovery.
    pub epoch: u64,
    /// Everything before this position was durable when the batch was written.
    pub durable: Lsn,
    /// Everything before this position is dead.
    pub retired: Lsn,
    /// The checksum of the batch before.
    pub prev_crc: u32,
}

impl BatchHeader {
    /// Writes the header in front of the payload that stands behind it, and returns the batch's checksum. `crc` is
    /// not read.
    pub fn seal(&self, batch: &mut [u8], key: u128) -> u32 {
        assert_eq!(
            batch.len(),
            BATCH_HEADER_BYTES + self.payload_bytes as usize
        );
        let header = &mut batch[..BATCH_HEADER_BYTES];
        header.fill(0);
        header[0..4].copy_from_slice(&BATCH_MAGIC.to_le_bytes());
        header[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[6..8].copy_from_slice(&self.flags.to_le_bytes());
        header[12..16].copy_from_slice(&self.payload_bytes.to_le_bytes());
        header[16..20].copy_from_slice(&self.records.to_le_bytes());
        header[20..22].copy_from_slice(&self.shard.to_le_bytes());
        header[24..32].copy_from_slice(&self.segment.to_le_bytes());
        header[32..40].copy_from_slice(&self.lsn.0.to_le_bytes());
        header[40..48].copy_from_slice(&self.epoch.to_le_bytes());
        header[48..56].copy_from_slice(&self.durable.0.to_le_bytes());
        header[56..64].copy_from_slice(&self.retired.0.to_le_bytes());
        header[64..68].copy_from_slice(&self.prev_crc.to_le_bytes());
        let crc = checksum(batch, key);
        batch[8..12].copy_from_slice(&crc.to_le_bytes());
        crc
    }

    /// Reads the header at the start of `bytes` without its checksum; `None` if this is no header of this version or
    /// its length cannot be.
    pub fn peek(bytes: &[u8]) -> Option<BatchHeader> {
        let header = bytes.get(..BATCH_HEADER_BYTES)?;
        if u32_at(header, 0) != BATCH_MAGIC || u16_at(header, 4) != FORMAT_VERSION {
            return None;
        }
        Some(BatchHeader {
            crc: u32_at(header, 8),
            flags: u16_at(header, 6),
            payload_bytes: u32_at(header, 12),
            records: u32_at(header, 16),
            shard: u16_at(header, 20),
            segment: u64_at(header, 24),
            lsn: Lsn(u64_at(header, 32)),
            epoch: u64_at(header, 40),
            durable: Lsn(u64_at(header, 48)),
            retired: Lsn(u64_at(header, 56)),
            prev_crc: u32_at(header, 64),
        })
    }

    /// Bytes of header and payload.
    pub fn bytes(&self) -> usize {
        BATCH_HEADER_BYTES + self.payload_bytes as usize
    }

    /// The position behind the batch, where the next one begins.
    pub fn end(&self) -> Lsn {
        Lsn(self.lsn.0 + self.bytes().next_multiple_of(BLOCK_BYTES) as u64)
    }

    /// True if the checksum of the whole batch holds under this key.
    pub fn holds(&self, batch: &[u8], key: u128) -> bool {
        batch.len() == self.bytes() && checksum(batch, key) == self.crc
    }
}

/// CRC32C over the key and the batch, the checksum's own bytes taken as zero.
fn checksum(batch: &[u8], key: u128) -> u32 {
    let crc = crc32c::crc32c(&key.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &batch[..8]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &batch[12..])
}

/// Bytes of the record that begins here, header included; `None` where there is no whole header.
pub fn record_bytes(record: &[u8]) -> Option<usize> {
    let header = record.get(..RECORD_HEADER_BYTES)?;
    Some(RECORD_HEADER_BYTES + u32_at(header, 0) as usize)
}

/// Writes the checksum of each record of a batch into its header. `lsn` is the position of the batch.
pub fn seal_records(batch: &mut [u8], lsn: Lsn, records: u32, key: u128) {
    let mut at = BATCH_HEADER_BYTES;
    for _ in 0..records {
        let bytes = record_bytes(&batch[at..]).expect("a record has a header");
        let record = &mut batch[at..at + bytes];
        let check = record_checksum(record, Lsn(lsn.0 + at as u64), key);
        record[8..16].copy_from_slice(&check.to_le_bytes());
        at = (at + bytes).next_multiple_of(RECORD_ALIGN);
    }
    assert_eq!(at, batch.len(), "the records fill the batch");
}

/// True if a whole record, header included, is the one that was written at this position under this key.
pub fn record_holds(record: &[u8], position: Lsn, key: u128) -> bool {
    record_bytes(record) == Some(record.len())
        && record_checksum(record, position, key) == u64_at(record, 8)
}

/// XXH3-64 over the body's own XXH3-64, the position, length and schema, and the key. With the position in it, a record
/// that the disk gives for another one does not hold; with the key, neither does one of an earlier life of the file.
/// Not CRC32C as for the batch: records are short, and there it takes twice the time.
fn record_checksum(record: &[u8], position: Lsn, key: u128) -> u64 {
    let mut place = [0; 40];
    place[..8].copy_from_slice(&xxh3_64(&record[RECORD_HEADER_BYTES..]).to_le_bytes());
    place[8..16].copy_from_slice(&position.0.to_le_bytes());
    place[16..24].copy_from_slice(&record[..8]);
    place[24..].copy_from_slice(&key.to_le_bytes());
    xxh3_64(&place)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> (BatchHeader, Vec<u8>) {
        let mut bytes = vec![7; BATCH_HEADER_BYTES + 48];
        let mut header = BatchHeader {
            crc: 0,
            flags: FLAG_OPENING,
            payload_bytes: 48,
            records: 3,
            shard: 1,
            segment: 9,
            lsn: Lsn(9 << 26 | 8192),
            epoch: 4,
            durable: Lsn(9 << 26),
            retired: Lsn(7 << 26),
            prev_crc: 0xdead_beef,
        };
        header.crc = header.seal(&mut bytes, 77);
        (header, bytes)
    }

    #[test]
    fn a_record_holds_in_its_place_alone_and_no_flipped_bit_passes() {
        let (lsn, key) = (Lsn(3 << 22), 77);
        let mut batch = vec![0; BATCH_HEADER_BYTES + 2 * 64];
        for at in [BATCH_HEADER_BYTES, BATCH_HEADER_BYTES + 64] {
            batch[at..at + 4].copy_from_slice(&40u32.to_le_bytes());
            batch[at + 4..at + 6].copy_from_slice(&1u16.to_le_bytes());
            batch[at + RECORD_HEADER_BYTES..at + RECORD_HEADER_BYTES + 40].fill(9);
        }
        seal_records(&mut batch, lsn, 2, key);
        let position = Lsn(lsn.0 + BATCH_HEADER_BYTES as u64);
        let mut record = batch[BATCH_HEADER_BYTES..][..RECORD_HEADER_BYTES + 40].to_vec();
        assert!(record_holds(&record, position, key));
        assert!(!record_holds(&record, Lsn(position.0 + 64), key));
        assert!(!record_holds(&record, position, key + 1));
        for bit in 0..record.len() * 8 {
            record[bit / 8] ^= 1 << (bit % 8);
            assert!(!record_holds(&record, position, key), "bit {bit}");
            record[bit / 8] ^= 1 << (bit % 8);
        }
        for cut in 0..record.len() {
            assert!(!record_holds(&record[..cut], position, key), "cut at {cut}");
        }
    }

    #[test]
    fn a_batch_header_reads_back_and_no_flipped_bit_passes() {
        let (header, mut bytes) = batch();
        assert_eq!(BatchHeader::peek(&bytes), Some(header));
        assert!(header.holds(&bytes, 77));
        assert!(!header.holds(&bytes, 78), "another life of the segment");
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let passes = BatchHeader::peek(&bytes)
                .is_some_and(|header| bytes.len() == header.bytes() && header.holds(&bytes, 77));
            assert!(!passes, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_segment_header_reads_back_and_damage_is_told_from_zeroes_and_versions() {
        let header = SegmentHeader {
            shard: 3,
            log_id: 1 << 100,
            segment: 12,
            segment_bytes: 64 << 20,
            epoch: 5,
            key: 99,
        };
        let mut block = header.encode();
        assert_eq!(SegmentHeader::decode(&block), Ok(header));
        block[50] ^= 1;
        assert_eq!(SegmentHeader::decode(&block), Err(BadHeader::Damaged));
        assert_eq!(
            SegmentHeader::decode(&[0; BLOCK_BYTES]),
            Err(BadHeader::Zero)
        );
        block[50] ^= 1;
        block[4] = 2;
        block[8..12].fill(0);
        let crc = crc32c::crc32c(&block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&block), Err(BadHeader::Version(2)));
    }
}
