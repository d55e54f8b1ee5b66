//! Numbering: which places of a shard's task table stand under which slot numbers in request ids. Shards that live at the
//! same time hand out slots of different pages, so that the tables of several can later be merged and every id still
//! finds its task.

use crate::{
    id::{ShardId, SlotIndex},
    table::task::TASKS_PER_PAGE,
};

const PER_PAGE: u32 = TASKS_PER_PAGE as u32;

/// The pages of slots that a shard uses. Those below `first_page` were handed out by shards that are gone: they hold what
/// was carried over from them, and no new task. Behind them every shard has each `2^page_shift`-th page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Numbering {
    /// The first page of which new slots are handed out.
    pub first_page: u32,
    /// Logarithm of how many shards share the pages from there on.
    pub page_shift: u8,
    /// Which of them this one is.
    pub shard: ShardId,
}

impl Numbering {
    /// The number of the slot at a place of the table; `None` if there is no such number left.
    pub(crate) fn slot(self, place: u32) -> Option<SlotIndex> {
        let page = place / PER_PAGE;
        let page = match page.checked_sub(self.first_page) {
            None => page,
            Some(own) => {
                let pages = u64::from(own) << self.page_shift;
                let page = u64::from(self.first_page) + pages + u64::from(self.shard.0);
                u32::try_from(page).ok()?
            }
        };
        let first = page.checked_mul(PER_PAGE)?;
        Some(SlotIndex(first + place % PER_PAGE))
    }

    /// The place of a slot; `None` if it is another shard's.
    pub(crate) fn place(self, slot: SlotIndex) -> Option<u32> {
        let page = slot.0 / PER_PAGE;
        let page = match page.checked_sub(self.first_page) {
            None => page,
            Some(own) => {
                if own & ((1 << self.page_shift) - 1) != u32::from(self.shard.0) {
                    return None;
                }
                self.first_page + (own >> self.page_shift)
            }
        };
        Some(page * PER_PAGE + slot.0 % PER_PAGE)
    }

    /// True if new tasks may be put into this page of the table.
    pub(crate) fn is_own(self, page: u32) -> bool {
        page >= self.first_page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_share_the_slots_and_none_has_that_of_another() {
        let shards = [0, 1, 2].map(|shard| Numbering {
            first_page: 2,
            page_shift: 2,
            shard: ShardId(shard),
        });
        for place in [0, 5, 2047] {
            for shard in shards {
                assert_eq!(shard.slot(place), Some(SlotIndex(place)), "inherited");
                assert_eq!(shard.place(SlotIndex(place)), Some(place));
            }
        }
        for place in [2048, 3071, 3072, 1 << 20] {
            for (number, shard) in shards.iter().enumerate() {
                let slot = shard.slot(place).unwrap();
                for (other, numbering) in shards.iter().enumerate() {
                    let expected = (other == number).then_some(place);
                    assert_eq!(numbering.place(slot), expected);
                }
            }
        }
        assert_eq!(shards[2].slot(2048), Some(SlotIndex(4 * 1024)));
        assert_eq!(shards[0].slot(u32::MAX), None, "the numbers are used up");
        let alone = Numbering::default();
        for place in [0, 1024, u32::MAX] {
            assert_eq!(alone.slot(place), Some(SlotIndex(place)));
            assert_eq!(alone.place(SlotIndex(place)), Some(place));
        }
    }
}
