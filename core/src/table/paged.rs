//! A vector, a slab and a queue that grow by pages, so that no push pays for what is already in them. A plain vector
//! that doubles at 16 million entries copies them all in one step.

use alloc::{collections::VecDeque, vec::Vec};
use core::ops::{Index, IndexMut};

/// Bytes of a vector's page.
const PAGE_BYTES: usize = 64 << 10;

/// A vector in pages of 64 KiB. What it holds never moves, and a page once made is kept.
#[derive(Debug)]
pub struct PagedVec<T> {
    pages: Vec<Vec<T>>,
    len: usize,
}

impl<T> Default for PagedVec<T> {
    fn default() -> PagedVec<T> {
        PagedVec {
            pages: Vec::new(),
            len: 0,
        }
    }
}

impl<T> PagedVec<T> {
    /// A power of two, so that an index is divided by a shift.
    const ITEMS_PER_PAGE: usize = {
        assert!(size_of::<T>() > 0 && size_of::<T>() <= PAGE_BYTES);
        1 << (PAGE_BYTES / size_of::<T>()).ilog2()
    };

    /// Items in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends an item.
    pub fn push(&mut self, item: T) {
        let page = self.len / Self::ITEMS_PER_PAGE;
        if page == self.pages.len() {
            self.pages.push(Vec::with_capacity(Self::ITEMS_PER_PAGE));
        }
        self.pages[page].push(item);
        self.len += 1;
    }

    /// Takes the last item.
    pub fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        self.pages[self.len / Self::ITEMS_PER_PAGE].pop()
    }

    /// The item with this index.
    pub fn get(&self, index: usize) -> Option<&T> {
        let page = self.pages.get(index / Self::ITEMS_PER_PAGE)?;
        page.get(index % Self::ITEMS_PER_PAGE)
    }

    /// All items in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.pages.iter().flatten()
    }
}

impl<T> Index<usize> for PagedVec<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.pages[index / Self::ITEMS_PER_PAGE][index % Self::ITEMS_PER_PAGE]
    }
}

impl<T> IndexMut<usize> for PagedVec<T> {
    fn index_mut(&mut self, index: usize) -> &mut T {
        &mut self.pages[index / Self::ITEMS_PER_PAGE][index % Self::ITEMS_PER_PAGE]
    }
}

/// Items under numbers that are theirs until they are removed; then the number is given out again. Whoever holds a
/// number knows whether it is live: a removed item stays readable until another one takes its place.
#[derive(Debug)]
pub struct PagedSlab<T> {
    items: PagedVec<T>,
    free: PagedVec<u32>,
}

impl<T> Default for PagedSlab<T> {
    fn default() -> PagedSlab<T> {
        PagedSlab {
            items: PagedVec::default(),
            free: PagedVec::default(),
        }
    }
}

impl<T> PagedSlab<T> {
    /// Items that are live.
    pub fn live(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// One past the highest number ever given out.
    pub fn used(&self) -> u32 {
        self.items.len() as u32
    }

    /// Keeps an item and returns its number, which is never `u32::MAX`.
    pub fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.items[number as usize] = item;
                number
            }
            None => {
                assert!(self.items.len() < u32::MAX as usize);
                self.items.push(item);
                self.items.len() as u32 - 1
            }
        }
    }

    /// Gives a number back. The caller does so once.
    pub fn remove(&mut self, number: u32) {
        self.free.push(number);
    }

    /// All items in the order of their numbers, removed ones too.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter()
    }
}

impl<T> Index<u32> for PagedSlab<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        &self.items[number as usize]
    }
}

impl<T> IndexMut<u32> for PagedSlab<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        &mut self.items[number as usize]
    }
}

/// Items of a queue's page.
const ITEMS_PER_PAGE: usize = 2048;

/// First in, first out, in pages of 2,048 items.
#[derive(Debug)]
pub struct PagedQueue<T> {
    pages: VecDeque<Vec<T>>,
    /// Items of the front page that are gone.
    taken: usize,
    len: usize,
}

impl<T> Default for PagedQueue<T> {
    fn default() -> PagedQueue<T> {
        PagedQueue {
            pages: VecDeque::new(),
            taken: 0,
            len: 0,
        }
    }
}

impl<T: Copy> PagedQueue<T> {
    /// Items in the queue.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends an item.
    pub fn push(&mut self, item: T) {
        if self
            .pages
            .back()
            .is_none_or(|page| page.len() == ITEMS_PER_PAGE)
        {
            self.pages.push_back(Vec::with_capacity(ITEMS_PER_PAGE));
        }
        self.pages.back_mut().expect("pushed above").push(item);
        self.len += 1;
    }

    /// The oldest item.
    pub fn front(&self) -> Option<&T> {
        self.pages.front().and_then(|page| page.get(self.taken))
    }

    /// Takes the oldest item.
    pub fn pop(&mut self) -> Option<T> {
        let item = *self.front()?;
        self.taken += 1;
        self.len -= 1;
        if self.taken == self.pages[0].len() {
            self.pages.pop_front();
            self.taken = 0;
        }
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_out_again_and_the_others_keep_their_items() {
        let mut slab = PagedSlab::default();
        for item in 0..50_000u32 {
            assert_eq!(slab.insert(item), item);
        }
        for number in (0..50_000).step_by(3) {
            slab.remove(number);
        }
        let live = slab.live();
        for number in (0..50_000).step_by(3).rev() {
            assert_eq!(slab.insert(number + 1_000_000), number);
        }
        assert_eq!((slab.live() - live, slab.used()), (16_667, 50_000));
        for number in 0..50_000 {
            let again = if number % 3 == 0 { 1_000_000 } else { 0 };
            assert_eq!(slab[number], number + again);
        }
        assert_eq!(slab.insert(7), 50_000);
    }

    #[test]
    fn items_leave_in_the_order_in_which_they_came() {
        let mut queue = PagedQueue::default();
        let (mut next_in, mut next_out) = (0, 0);
        for round in 0..10_000 {
            for _ in 0..round % 5 {
                queue.push(next_in);
                next_in += 1;
            }
            for _ in 0..round % 4 {
                if let Some(item) = queue.pop() {
                    assert_eq!(item, next_out);
                    next_out += 1;
                }
            }
            assert_eq!(queue.len(), next_in - next_out);
            assert_eq!(
                queue.front().copied(),
                (next_in > next_out).then_some(next_out)
            );
        }
    }
}
