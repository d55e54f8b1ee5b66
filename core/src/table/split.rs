//! A hash map whose growth is spread out: sub-tables of at most 4,096 places that split one at a time. A plain hash map
//! that grows at 15 million entries stalls its shard for seconds; here no insert moves more than 4,096 entries.
//!
//! Keys are 128-bit hashes made with a secret seed, so they are used as they are: the high bits choose the sub-table
//! (extendible hashing, Fagin et al. 1979), the low bits the place in it (linear probing, deletion by shifting back).

use alloc::{boxed::Box, vec, vec::Vec};

/// Places of a full-grown sub-table.
const PLACES_MAX: usize = 4096;
const PLACES_MIN: usize = 16;

#[derive(Debug)]
struct SubTable<V> {
    /// Bits of the hash that all keys in here share.
    depth: u32,
    used: usize,
    places: Box<[Option<(u128, V)>]>,
}

/// A map from secret 128-bit hashes to small values.
#[derive(Debug)]
pub struct SplitMap<V> {
    depth: u32,
    directory: Vec<u32>,
    tables: Vec<SubTable<V>>,
    len: usize,
}

impl<V: Copy> Default for SplitMap<V> {
    fn default() -> SplitMap<V> {
        SplitMap {
            depth: 0,
            directory: vec![0],
            tables: vec![SubTable::new(0, PLACES_MIN)],
            len: 0,
        }
    }
}

impl<V: Copy> SubTable<V> {
    fn new(depth: u32, places: usize) -> SubTable<V> {
        SubTable {
            depth,
            used: 0,
            places: vec![None; places].into_boxed_slice(),
        }
    }

    fn full(&self) -> bool {
        self.used * 4 >= self.places.len() * 3
    }

    /// The place of `key`, or the empty one where it belongs.
    fn seek(&self, key: u128) -> usize {
        let mask = self.places.len() - 1;
        let mut at = key as usize & mask;
        while let Some((other, _)) = &self.places[at] {
            if *other == key {
                break;
            }
            at = (at + 1) & mask;
        }
        at
    }

    fn put(&mut self, key: u128, value: V) {
        let at = self.seek(key);
        self.used += usize::from(self.places[at].is_none());
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
            let home = *key as usize & mask;
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

    fn table_of(&self, key: u128) -> usize {
        let index = if self.depth == 0 {
            0
        } else {
            (key >> (128 - self.depth)) as usize
        };
        self.directory[index] as usize
    }

    /// The value of a key.
    pub fn get(&self, key: u128) -> Option<&V> {
        let table = &self.tables[self.table_of(key)];
        table.places[table.seek(key)]
            .as_ref()
            .map(|(_, value)| value)
    }

    /// The value of a key, to be changed in place.
    pub fn get_mut(&mut self, key: u128) -> Option<&mut V> {
        let index = self.table_of(key);
        let table = &mut self.tables[index];
        let at = table.seek(key);
        table.places[at].as_mut().map(|(_, value)| value)
    }

    /// Sets the value of a key.
    pub fn insert(&mut self, key: u128, value: V) {
        let mut index = self.table_of(key);
        while self.tables[index].full() {
            self.relieve(index);
            index = self.table_of(key);
        }
        let table = &mut self.tables[index];
        let before = table.used;
        table.put(key, value);
        self.len += table.used - before;
    }

    /// Removes a key and returns its value.
    pub fn remove(&mut self, key: u128) -> Option<V> {
        let index = self.table_of(key);
        let table = &mut self.tables[index];
        let at = table.seek(key);
        let (_, value) = table.places[at]?;
        table.vacate(at);
        self.len -= 1;
        Some(value)
    }

    /// Doubles a small sub-table, or splits a full-grown one by the next bit of the hash.
    fn relieve(&mut self, index: usize) {
        let places = self.tables[index].places.len();
        let depth = self.tables[index].depth;
        if places < PLACES_MAX {
            let old = core::mem::replace(&mut self.tables[index], SubTable::new(depth, places * 2));
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
        let sibling = self.tables.len() as u32;
        let old = core::mem::replace(
            &mut self.tables[index],
            SubTable::new(depth + 1, PLACES_MAX),
        );
        self.tables.push(SubTable::new(depth + 1, PLACES_MAX));
        for (key, value) in old.places.iter().flatten() {
            let upper = key >> (127 - depth) & 1 == 1;
            let target = if upper { sibling as usize } else { index };
            self.tables[target].put(*key, *value);
        }
        for (at, table) in self.directory.iter_mut().enumerate() {
            let upper = at >> (self.depth - depth - 1) & 1 == 1;
            if *table as usize == index && upper {
                *table = sibling;
            }
        }
    }
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
        assert!(
            map.tables.len() > 8
                && map
                    .tables
                    .iter()
                    .all(|table| table.places.len() <= PLACES_MAX)
        );
    }
}
