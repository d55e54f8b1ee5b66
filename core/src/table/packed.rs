//! Packed: a page of tasks in few bytes. Tasks that lie in one page were mostly accepted one after the other, wait in the
//! same lanes and are alike, so that each word of an entry is guessed from the two entries in front, and only what was guessed
//! wrong is written: a mask of half words, then their errors, low 7 bits first. Entries that were guessed are counted.
//!
//! These bytes never leave the memory of the process.

use alloc::{boxed::Box, vec::Vec};

use crate::table::task::{EMPTY, TASKS_PER_PAGE, Task};

/// The tasks of a page, one a slot.
pub(super) type TaskPage = [Task; TASKS_PER_PAGE];

/// A page in which every slot is empty.
pub(super) fn empty_page() -> Box<TaskPage> {
    let page = alloc::vec![EMPTY; TASKS_PER_PAGE].into_boxed_slice();
    page.try_into().expect("a page has as many slots")
}

/// What the next task is guessed from: each of its words goes on as it went from the task before last to the last.
#[derive(Default)]
struct Guess {
    last: [u64; 8],
    step: [u64; 8],
}

impl Guess {
    fn next(&self) -> [u64; 8] {
        core::array::from_fn(|word| self.last[word].wrapping_add(self.step[word]))
    }

    fn learn(&mut self, words: [u64; 8]) {
        self.step = core::array::from_fn(|word| words[word].wrapping_sub(self.last[word]));
        self.last = words;
    }
}

/// The low and the high half of a word.
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// Writes a page into `bytes`, from its beginning.
pub(super) fn pack(page: &TaskPage, bytes: &mut Vec<u8>) {
    bytes.clear();
    let mut guess = Guess::default();
    let mut guessed = 0;
    for task in page {
        let words = task.words();
        let expected = guess.next();
        guess.learn(words);
        if (0..8).fold(0, |wrong, word| wrong | words[word] ^ expected[word]) == 0 {
            guessed += 1;
            continue;
        }
        put_guessed(&mut guessed, bytes);
        let mask_at = bytes.len();
        let mut mask = 0u16;
        bytes.extend([0, 0]);
        for (word, guess) in words.into_iter().zip(expected) {
            for (half, guess) in halves(word).into_iter().zip(halves(guess)) {
                mask >>= 1;
                if half != guess {
                    mask |= 1 << 15;
                    let error = half.wrapping_sub(guess) as i32;
                    put_number((error << 1 ^ error >> 31) as u32, bytes);
                }
            }
        }
        bytes[mask_at..mask_at + 2].copy_from_slice(&mask.to_le_bytes());
    }
    put_guessed(&mut guessed, bytes);
}

/// A mask of nothing, and of how many tasks all was guessed.
fn put_guessed(guessed: &mut u16, bytes: &mut Vec<u8>) {
    if *guessed > 0 {
        bytes.extend([0, 0]);
        bytes.extend(guessed.to_le_bytes());
        *guessed = 0;
    }
}

fn put_number(mut number: u32, bytes: &mut Vec<u8>) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The page that was packed into these bytes.
pub(super) fn unpack(bytes: &[u8]) -> Box<TaskPage> {
    let mut page = empty_page();
    let mut guess = Guess::default();
    let mut rest = bytes;
    let mut guessed = 0u16;
    for slot in page.iter_mut() {
        let mut words = guess.next();
        if guessed > 0 {
            guessed -= 1;
        } else {
            let mask = take_u16(&mut rest);
            if mask == 0 {
                guessed = take_u16(&mut rest) - 1;
            }
            for (number, word) in words.iter_mut().enumerate() {
                let [mut low, mut high] = halves(*word);
                for (bit, half) in [&mut low, &mut high].into_iter().enumerate() {
                    if mask >> (2 * number + bit) & 1 != 0 {
                        let number = take_number(&mut rest);
                        let error = number >> 1 ^ (number & 1).wrapping_neg();
                        *half = half.wrapping_add(error);
                    }
                }
                *word = u64::from(high) << 32 | u64::from(low);
            }
        }
        guess.learn(words);
        *slot = Task::from_words(words);
    }
    page
}

fn take_u16(rest: &mut &[u8]) -> u16 {
    let (first, behind) = rest.split_first_chunk().expect("packed by `pack`");
    *rest = behind;
    u16::from_le_bytes(*first)
}

fn take_number(rest: &mut &[u8]) -> u32 {
    let mut number = 0;
    let mut shift = 0;
    loop {
        let (&byte, behind) = rest.split_first().expect("packed by `pack`");
        *rest = behind;
        number |= u32::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return number;
        }
        shift += 7;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{CellId, FunctionId, Lsn, RequestId, SlotIndex},
        state::State,
        table::task::*,
    };

    fn packed_bytes(page: &TaskPage) -> usize {
        let mut bytes = Vec::new();
        pack(page, &mut bytes);
        assert_eq!(*unpack(&bytes), *page, "a page comes back as it was");
        bytes.len()
    }

    /// Numbers without a pattern.
    fn scatter(seed: &mut u64) -> u64 {
        *seed = seed
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        let mixed = (*seed ^ *seed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ mixed >> 32
    }

    #[test]
    fn any_page_comes_back_and_one_of_a_backlog_is_small() {
        assert!(packed_bytes(&empty_page()) < 64);
        let mut backlog = empty_page();
        for (slot, task) in backlog.iter_mut().enumerate() {
            let seq = 7_000_000 + slot as u64;
            let ms = 1_790_000_000_000 + slot as u64 / 500;
            let request = RequestId::new(CellId(9), ms, seq, SlotIndex(slot as u32));
            let position = Lsn((1 << 40) + slot as u64 * 384 + slot as u64 / 200 * 4096);
            *task = Task::new(request, FunctionId(3), position, 380);
            task.next = 5_000 + slot as u32;
            task.prev = 4_998 + slot as u32;
            task.at = 77_000 + slot as u64 / 200;
        }
        let bytes = packed_bytes(&backlog);
        assert!(bytes <= 1_024, "{bytes} bytes for a page of one lane");

        let mut seed = 1;
        let delayed = |task: &mut Task, random: u64| {
            task.set_state(State::Scheduled);
            task.at = 1_790_000_000_000 + random % 31_536_000_000;
            (task.next, task.prev) = (NIL, random as u32 % 200);
        };
        for task in backlog.iter_mut() {
            delayed(task, scatter(&mut seed));
        }
        let bytes = packed_bytes(&backlog);
        assert!(
            bytes <= 12 * 1_024,
            "{bytes} bytes for a page of delayed tasks"
        );
    }

    #[test]
    fn a_page_of_noise_comes_back() {
        let mut seed = 2;
        let mut page = empty_page();
        for task in page.iter_mut() {
            let mut words = task.words();
            for word in &mut words {
                if scatter(&mut seed).is_multiple_of(3) {
                    *word = scatter(&mut seed) >> (scatter(&mut seed) % 64);
                }
            }
            *task = Task::from_words(words);
            assert_eq!(task.words(), words, "a field has all of its bits");
        }
        packed_bytes(&page);
    }
}
