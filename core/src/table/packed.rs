//! Packed: a page of tasks in few bytes. These never leave the memory of the process.

use alloc::{boxed::Box, vec::Vec};

use crate::{
    packing::{Packer, Unpacker},
    table::task::{EMPTY, TASKS_PER_PAGE, Task},
};

/// The tasks of a page, one a slot.
pub(super) type TaskPage = [Task; TASKS_PER_PAGE];

/// A page in which every slot is empty.
pub(super) fn empty_page() -> Box<TaskPage> {
    let page = alloc::vec![EMPTY; TASKS_PER_PAGE].into_boxed_slice();
    page.try_into().expect("a page has as many slots")
}

/// Writes a page into `bytes`, from its beginning.
pub(super) fn pack(page: &TaskPage, bytes: &mut Vec<u8>) {
    bytes.clear();
    let mut packer = Packer::new(bytes);
    for task in page {
        packer.put(task.words());
    }
    packer.end();
}

/// The page that was packed into these bytes.
pub(super) fn unpack(bytes: &[u8]) -> Box<TaskPage> {
    let mut page = empty_page();
    let mut unpacker = Unpacker::new(bytes);
    for slot in page.iter_mut() {
        let words = unpacker.next();
        *slot = Task::from_words(words.expect("`pack` wrote them"));
    }
    page
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
