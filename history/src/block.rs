//! A block: rows of one tenant and one state in order, behind each other, with a table of where each begins and a
//! checksum over all of it.
//!
//! `version u8, three zero bytes, count u32, checksum u64` (XXH3-64 of what follows), `count` times `offset u32` from the
//! block's start, rows.

use pelton_core::{id::TenantId, state::State};
use xxhash_rust::xxh3::xxh3_64;

use crate::row::Row;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 16;

/// Collects rows for a block. Its memory is used again.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    offsets: Vec<u32>,
    rows: Vec<u8>,
    block: Vec<u8>,
}

impl Writer {
    pub(crate) fn bytes(&self) -> usize {
        HEADER_BYTES + 4 * self.offsets.len() + self.rows.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// Adds the bytes of a row, which comes behind all others in order.
    pub(crate) fn push(&mut self, row: &[u8]) {
        self.offsets.push(self.rows.len() as u32);
        self.rows.extend_from_slice(row);
    }

    /// The block, and nothing is collected any more.
    pub(crate) fn finish(&mut self) -> &[u8] {
        let first = (HEADER_BYTES + 4 * self.offsets.len()) as u32;
        self.block.clear();
        self.block.extend_from_slice(&[VERSION, 0, 0, 0]);
        self.block
            .extend_from_slice(&(self.offsets.len() as u32).to_le_bytes());
        self.block.extend_from_slice(&[0; 8]);
        for offset in self.offsets.drain(..) {
            self.block
                .extend_from_slice(&(first + offset).to_le_bytes());
        }
        self.block.append(&mut self.rows);
        let check = xxh3_64(&self.block[HEADER_BYTES..]);
        self.block[8..16].copy_from_slice(&check.to_le_bytes());
        &self.block
    }
}

/// A block that was read and holds.
#[derive(Debug)]
pub(crate) struct Block {
    tenant: TenantId,
    state: State,
    bytes: Vec<u8>,
    count: usize,
}

impl Block {
    /// `None` if these are not the bytes of a block, or not all that was written.
    pub(crate) fn read(tenant: TenantId, state: State, bytes: &[u8]) -> Option<Block> {
        let header = bytes.get(..HEADER_BYTES)?;
        let check = u64::from_le_bytes(header[8..].try_into().ok()?);
        if header[0] != VERSION || xxh3_64(&bytes[HEADER_BYTES..]) != check {
            return None;
        }
        let count = u32::from_le_bytes(header[4..8].try_into().ok()?) as usize;
        bytes.get(..HEADER_BYTES + 4 * count)?;
        Some(Block {
            tenant,
            state,
            bytes: bytes.to_vec(),
            count,
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn from(&self, index: usize) -> &[u8] {
        let at = HEADER_BYTES + 4 * index;
        let offset = self.bytes.get(at..at + 4);
        let offset = offset.map_or(usize::MAX, |offset| {
            u32::from_le_bytes([offset[0], offset[1], offset[2], offset[3]]) as usize
        });
        self.bytes.get(offset..).unwrap_or_default()
    }

    /// The order of a row; 0 if it is damaged.
    pub(crate) fn order(&self, index: usize) -> u128 {
        Row::peek_order(self.from(index)).unwrap_or(0)
    }

    pub(crate) fn row(&self, index: usize) -> Option<Row<'_>> {
        Row::decode(self.tenant, self.state, self.from(index)).map(|(row, _)| row)
    }

    /// How many rows come before this order.
    pub(crate) fn rank(&self, order: u128) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = (low + high) / 2;
            if self.order(middle) < order {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}
