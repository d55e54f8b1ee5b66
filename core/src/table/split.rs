//! A hash map whose growth is spread out: sub-tables of at most 512 places that split one at a time. A plain hash map
//! that grows at 15 million entries stalls its shard for seconds; here no insert moves more than 448 entries.
//!
//! Keys are 128-bit hashes made with a secret seed, so they are used as they are: the high bits choose the sub-table
//! (extendible hashing, Fagin et al. 1979), the low bits the place in it (linear probing, deletion by shifting back).
//!
//! Hashes fill all sub-tables evenly. Were all of them full at the same share, they would all split within a few
//! inserts of each other each time that the map has doubled, and a step that inserts hundreds of keys would pay for
//! dozens of splits. Each sub-table therefore has a limit of its own.

use alloc::{boxed::Box, vec, vec::Vec};
use core::num::NonZero;

use crate::table::paged::PagedVec;

/// Places of a full-grown sub-table.
const PLACES_MAX: usize = 512;
const PLACES_MIN: usize = 16;

#[derive(Debug)]
struct SubTable<V> {
    /// Bits of the hash that all keys in here share.
    depth: u32,
    used: u32,
    /// Entries that it takes before it is relieved.
    limit: u32,
    places: Box<[Place<V>]>,
}

/// The niche of the key saves 16 bytes a place.
type Place<V> = Option<(NonZero<u128>, V)>;

/// A map from secret 128-bit hashes to small values. No key is 0.
#[derive(Debug)]
pub struct SplitMap<V> {
    depth: u32,
    directory: Vec<u32>,
    tables: PagedVec<SubTable<V>>,
    len: usize,
}

impl<V: Copy> Default for SplitMap<V> {
    fn default() -> SplitMap<V> {
        let mut tables = PagedVec::default();
        tables.push(SubTable::new(0, 0, PLACES_MIN));
        SplitMap {
            depth: 0,
            directory: vec![0],
            tables,
            len: 0,
        }
    }
}

impl<V: Copy> SubTable<V> {
    /// The limits lie between a half and seven eighths of the places; the golden ratio spreads the tables' numbers over
    /// them without a gap and without a heap.
    fn new(number: u32, depth: u32, places: usize) -> SubTable<V> {
        let spread = (number.wrapping_mul(0x9E37_79B9) >> 26) as usize;
        SubTable {
            depth,
            used: 0,
            limit: (places / 2 + places * spread * 3 / 512) as u32,
            places: vec![None; places].into_boxed_slice(),
        }
    }

    fn full(&self) -> bool {
        self.used >= self.limit
    }

    /// The place of `key`, or the empty one where it belongs.
    fn seek(&self, key: NonZero<u128>) -> usize {
        let mask = self.places.len() - 1;
        let mut at = key.get() as usize & mask;
        while let Some((other, _)) = &self.places[at] {
            if *other == key {
                break;
            }
            at = (at + 1) & mask;
        }
        at
    }

    fn put(&mut self, key: NonZero<u128>, value: V) {
        let at = self.seek(key);
        self.used += u32::from(self.places[at].is_none());
        self.places[at] = Some((key, value));
    }

    /// Empties a place and moves back what had been pushed past it.
    fn vacate(&mut self, mut hole: usize) {
        let mask = self.places.len() - 1;
        self.places[hole] = None;
        self.used -= 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some((key, _)) = &self.places[at] else {
                return;
            };
            let home = key.get() as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.places[hole] = self.places[at].take();
                hole = at;
            }
        }
    }
}

impl<V: Copy> SplitMap<V> {
    /// Entries in the map.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All keys with their values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (u128, V)> {
        (0..self.tables()).flat_map(|table| self.table(table))
    }

    /// Sub-tables. One that splits keeps its number, and half of its keys go into one behind all others.
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// The keys of a sub-table with their values, at most 512.
    pub fn table(&self, table: usize) -> impl Iterator<Item = (u128, V)> {
        let places = self.tables[table].places.iter().flatten();
        places.map(|(key, value)| (key.get(), *value))
    }

    /// The value of a key.
    pub fn get(&self, key: u128) -> Option<&V> {
        let key = nonzero(key);
        let table = &self.tables[self.table_of(key)];
        table.places[table.seek(key)]
            .as_ref()
            .map(|(_, value)| value)
    }

    /// The value of a key, to be changed in place.
    pub fn get_mut(&mut self, key: u128) -> Option<&mut V> {
        let key = nonzero(key);
        let index = self.table_of(key);
        let table = &mut self.tables[index];
        let at = table.seek(key);
        table.places[at].as_mut().map(|(_, value)| value)
    }

    /// Sets the value of a key.
    pub fn insert(&mut self, key: u128, value: V) {
        let key = nonzero(key);
        let mut index = self.table_of(key);
        while self.tables[index].full() {
            self.relieve(index, key);
            index = self.table_of(key);
        }
        let table = &mut self.tables[index];
        let before = table.used;
        table.put(key, value);
        self.len += (table.used - before) as usize;
    }

    /// Removes a key and returns its value.
    pub fn remove(&mut self, key: u128) -> Option<V> {
        let key = nonzero(key);
        let index = self.table_of(key);
        let table = &mut self.tables[index];
        let at = table.seek(key);
        let (_, value) = table.places[at]?;
        table.vacate(at);
        self.len -= 1;
        Some(value)
    }

    fn table_of(&self, key: NonZero<u128>) -> usize {
        self.directory[prefix(key, self.depth)] as usize
    }

    /// Doubles a small sub-table, or splits a full-grown one by the next bit of the hash. `key` belongs into it.
    fn relieve(&mut self, index: usize, key: NonZero<u128>) {
        let places = self.tables[index].places.len();
        let depth = self.tables[index].depth;
        let number = index as u32;
        if places < PLACES_MAX {
            let larger = SubTable::new(number, depth, places * 2);
            let old = core::mem::replace(&mut self.tables[index], larger);
            for (key, value) in old.places.iter().flatten() {
                self.tables[index].put(*key, *value);
            }
            return;
        }
        if depth == self.depth {
            self.directory = self
                .directory
                .iter()
                .flat_map(|&table| [table, table])
                .collect();
            self.depth += 1;
        }
        let sibling = self.tables.len();
        let lower = SubTable::new(number, depth + 1, PLACES_MAX);
        let mut upper = SubTable::new(sibling as u32, depth + 1, PLACES_MAX);
        let old = core::mem::replace(&mut self.tables[index], lower);
        let lower = &mut self.tables[index];
        for (key, value) in old.places.iter().flatten() {
            let target = if prefix(*key, depth + 1) & 1 == 1 {
                &mut upper
            } else {
                &mut *lower
            };
            target.put(*key, *value);
        }
        self.tables.push(upper);
        // The table's entries stand side by side; those of the upper half are the sibling's from now on.
        let half = 1 << (self.depth - depth - 1);
        let middle = prefix(key, depth) * 2 * half + half;
        self.directory[middle..middle + half].fill(sibling as u32);
    }
}

/// The first `bits` bits of a key.
fn prefix(key: NonZero<u128>, bits: u32) -> usize {
    key.get().checked_shr(128 - bits).unwrap_or(0) as usize
}

fn nonzero(key: u128) -> NonZero<u128> {
    NonZero::new(key).expect("whoever hashes a name sees to it that the hash is not 0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;

    fn hash(n: u64) -> u128 {
        xxhash_rust::xxh3::xxh3_128_with_seed(&n.to_le_bytes(), 42)
    }

    #[test]
    fn it_agrees_with_a_plain_map() {
        let mut map = SplitMap::default();
        let mut plain = BTreeMap::new();
        let mut state = 1u64;
        for round in 0..200_000u64 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let key = hash(state >> 33 & 0xFFFF);
            if state & 3 == 0 {
                assert_eq!(map.remove(key), plain.remove(&key));
            } else {
                map.insert(key, round);
                plain.insert(key, round);
            }
            assert_eq!(map.len(), plain.len());
        }
        for n in 0..=0xFFFF {
            assert_eq!(map.get(hash(n)), plain.get(&hash(n)));
        }
        assert!(map.tables.len() > 32);
        for table in map.tables.iter() {
            assert!(table.places.len() <= PLACES_MAX && table.used <= table.limit);
        }
    }

    #[test]
    fn growth_moves_few_entries_at_a_time_and_wastes_little() {
        let mut map = SplitMap::default();
        let (mut tables, mut splits_most) = (0, 0);
        for n in 1..=1 << 21 {
            map.insert(hash(n), n);
            if n % 256 == 0 {
                splits_most = splits_most.max(map.tables.len() - tables);
                tables = map.tables.len();
            }
        }
        assert!(splits_most * PLACES_MAX * 7 / 8 <= 4096, "{splits_most}");
        let places = tables * PLACES_MAX;
        assert!(map.len() * 100 / places >= 45, "{} in {places}", map.len());
    }
}
