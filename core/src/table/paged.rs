//! A queue that grows by pages, so that no push pays for what is already in it.

use alloc::{collections::VecDeque, vec::Vec};

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
