//! Packing: entries of a table in few bytes. Entries that stand side by side were mostly made one after the other and are
//! alike, so that each word of an entry is guessed from the two entries in front, and only what was guessed wrong is
//! written. `docs/FORMAT.md` has the bytes, as a snapshot holds them.

use alloc::vec::Vec;

/// What the next entry is guessed from: each of its words goes on as it went from the entry before last to the last.
struct Guess<const WORDS: usize> {
    last: [u64; WORDS],
    step: [u64; WORDS],
}

impl<const WORDS: usize> Guess<WORDS> {
    const FIRST: Guess<WORDS> = Guess {
        last: [0; WORDS],
        step: [0; WORDS],
    };

    fn next(&self) -> [u64; WORDS] {
        core::array::from_fn(|word| self.last[word].wrapping_add(self.step[word]))
    }

    fn learn(&mut self, words: [u64; WORDS]) {
        self.step = core::array::from_fn(|word| words[word].wrapping_sub(self.last[word]));
        self.last = words;
    }
}

/// The low and the high half of a word.
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// Writes entries of so many words, 16 at most.
pub(crate) struct Packer<'a, const WORDS: usize> {
    guess: Guess<WORDS>,
    /// Entries that were guessed and are not written yet.
    guessed: u32,
    bytes: &'a mut Vec<u8>,
}

impl<'a, const WORDS: usize> Packer<'a, WORDS> {
    /// The most bytes that one entry takes.
    pub(crate) const ENTRY_BYTES_MAX: usize = (1 + 2 * WORDS) * NUMBER_BYTES_MAX;

    /// Entries go behind what is in `bytes`.
    pub(crate) fn new(bytes: &'a mut Vec<u8>) -> Packer<'a, WORDS> {
        const { assert!(WORDS <= 16, "a mask has a bit for each half of a word") };
        Packer {
            guess: Guess::FIRST,
            guessed: 0,
            bytes,
        }
    }

    pub(crate) fn put(&mut self, words: [u64; WORDS]) {
        let expected = self.guess.next();
        self.guess.learn(words);
        let differ = |differ, word: usize| differ | words[word] ^ expected[word];
        if (0..WORDS).fold(0, differ) == 0 {
            self.guessed += 1;
            return;
        }
        self.put_guessed();
        let mut mask = 0;
        for word in 0..WORDS {
            let [low, high] = halves(words[word] ^ expected[word]);
            mask |= (u32::from(low != 0) | u32::from(high != 0) << 1) << (2 * word);
        }
        put_number(mask, self.bytes);
        for word in 0..WORDS {
            let (is, was) = (halves(words[word]), halves(expected[word]));
            for half in 0..2 {
                if is[half] != was[half] {
                    let error = is[half].wrapping_sub(was[half]) as i32;
                    put_number((error << 1 ^ error >> 31) as u32, self.bytes);
                }
            }
        }
    }

    fn put_guessed(&mut self) {
        if self.guessed > 0 {
            put_number(0, self.bytes);
            put_number(self.guessed, self.bytes);
            self.guessed = 0;
        }
    }

    /// No entry comes any more.
    pub(crate) fn end(mut self) {
        self.put_guessed();
    }
}

/// Reads what a [`Packer`] wrote.
pub(crate) struct Unpacker<'a, const WORDS: usize> {
    guess: Guess<WORDS>,
    guessed: u32,
    rest: &'a [u8],
}

impl<'a, const WORDS: usize> Unpacker<'a, WORDS> {
    pub(crate) fn new(bytes: &'a [u8]) -> Unpacker<'a, WORDS> {
        Unpacker {
            guess: Guess::FIRST,
            guessed: 0,
            rest: bytes,
        }
    }

    /// The next entry; `None` if the bytes have none.
    pub(crate) fn next(&mut self) -> Option<[u64; WORDS]> {
        let mut words = self.guess.next();
        if self.guessed > 0 {
            self.guessed -= 1;
        } else {
            let mask = take_number(&mut self.rest)?;
            if mask == 0 {
                self.guessed = take_number(&mut self.rest)?.checked_sub(1)?;
            } else {
                self.correct(&mut words, mask)?;
            }
        }
        self.guess.learn(words);
        Some(words)
    }

    fn correct(&mut self, words: &mut [u64; WORDS], mask: u32) -> Option<()> {
        for (number, word) in words.iter_mut().enumerate() {
            let mut parts = halves(*word);
            for (half, part) in parts.iter_mut().enumerate() {
                if mask >> (2 * number + half) & 1 != 0 {
                    let error = take_number(&mut self.rest)?;
                    *part = part.wrapping_add(error >> 1 ^ (error & 1).wrapping_neg());
                }
            }
            *word = u64::from(parts[1]) << 32 | u64::from(parts[0]);
        }
        (u64::from(mask) < 1 << (2 * WORDS)).then_some(())
    }

    /// True if no bytes are left over.
    pub(crate) fn is_at_end(&self) -> bool {
        self.rest.is_empty() && self.guessed == 0
    }
}

const NUMBER_BYTES_MAX: usize = 5;

/// Low 7 bits first; all bytes but the last have their highest bit set.
fn put_number(mut number: u32, bytes: &mut Vec<u8>) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(rest: &mut &[u8]) -> Option<u32> {
    let mut number = 0u64;
    for place in 0..NUMBER_BYTES_MAX {
        let (&byte, behind) = rest.split_first()?;
        *rest = behind;
        number |= u64::from(byte & 0x7F) << (7 * place);
        if byte < 0x80 {
            return u32::try_from(number).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(entries: &[[u64; 3]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut packer = Packer::new(&mut bytes);
        for entry in entries {
            packer.put(*entry);
        }
        packer.end();
        bytes
    }

    #[test]
    fn any_entries_come_back_and_cut_bytes_do_not() {
        let far = u64::MAX;
        let entries = [
            [0, 0, 0],
            [far, 1, far >> 1],
            [1, far, 1 << 31],
            [2, far, 1 << 32],
            [3, far, (1 << 32) + (1 << 31)],
            [4, far, 2 << 32],
            [far - 5, 0, 0],
        ];
        let bytes = packed(&entries);
        assert!(bytes.len() <= entries.len() * Packer::<3>::ENTRY_BYTES_MAX);
        for cut in 0..=bytes.len() {
            let mut unpacker = Unpacker::<3>::new(&bytes[..cut]);
            let found: Vec<_> = core::iter::from_fn(|| unpacker.next()).take(9).collect();
            assert!(entries.starts_with(&found));
            assert_eq!(found.len() == entries.len(), cut == bytes.len());
        }
        let steady: Vec<_> = (0..1_000).map(|n| [n, 7, n << 40]).collect();
        let bytes = packed(&steady);
        assert!(bytes.len() < 32, "{} bytes", bytes.len());
        let mut unpacker = Unpacker::new(&bytes);
        for entry in steady {
            assert!(!unpacker.is_at_end());
            assert_eq!(unpacker.next(), Some(entry));
        }
        assert!(unpacker.is_at_end());
    }

    #[test]
    fn what_no_packer_writes_is_refused() {
        let first = |bytes: &[u8]| Unpacker::<3>::new(bytes).next();
        assert_eq!(first(&[0, 0]), None, "none guessed");
        assert_eq!(first(&[0x40, 2]), None, "a word too many");
        assert_eq!(first(&[1, 0xff, 0xff, 0xff, 0xff, 0x1f]), None, "33 bits");
        assert_eq!(
            first(&[1, 0x80, 0x80, 0x80, 0x80, 0x80, 0]),
            None,
            "6 bytes"
        );
        assert_eq!(first(&[1, 4]), Some([2, 0, 0]));
    }
}
