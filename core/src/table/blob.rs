//! Bytes of tasks that wait in memory, in recycled 64 KiB pages: filled front to back, free again when the last blob of
//! a page is gone. A blob larger than a page has a page of its own size.

use alloc::vec::Vec;

use crate::table::paged::PagedSlab;

const PAGE_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
struct Page {
    bytes: Vec<u8>,
    live: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Blob {
    page: u32,
    offset: u32,
    len: u32,
}

/// The pool. Bounded by its owner, who asks [`BlobPool::bytes`] before it adds.
#[derive(Debug, Default)]
pub struct BlobPool {
    pages: Vec<Page>,
    free_pages: Vec<u32>,
    /// The page being filled, and its number.
    open: Option<u32>,
    blobs: PagedSlab<Blob>,
    bytes: usize,
}

impl BlobPool {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Blobs held.
    pub fn count(&self) -> usize {
        self.blobs.live()
    }

    /// Copies `bytes` in and returns a handle.
    pub fn put(&mut self, bytes: &[u8]) -> u32 {
        let fits = |page: &Page| page.bytes.len() + bytes.len() <= PAGE_BYTES;
        let page = match self.open {
            Some(page) if fits(&self.pages[page as usize]) => page,
            full => {
                if let Some(page) = full {
                    self.open = None;
                    self.reclaim(page);
                }
                let page = self.free_pages.pop().unwrap_or_else(|| {
                    self.pages.push(Page::default());
                    self.pages.len() as u32 - 1
                });
                self.pages[page as usize]
                    .bytes
                    .reserve(PAGE_BYTES.max(bytes.len()));
                self.open = Some(page);
                page
            }
        };
        let target = &mut self.pages[page as usize];
        let blob = Blob {
            page,
            offset: target.bytes.len() as u32,
            len: bytes.len() as u32,
        };
        target.bytes.extend_from_slice(bytes);
        target.live += 1;
        self.bytes += bytes.len();
        self.blobs.insert(blob)
    }

    /// The bytes behind a handle.
    pub fn get(&self, handle: u32) -> &[u8] {
        let blob = self.blobs[handle];
        &self.pages[blob.page as usize].bytes[blob.offset as usize..][..blob.len as usize]
    }

    /// Gives a handle back.
    pub fn remove(&mut self, handle: u32) {
        let blob = core::mem::take(&mut self.blobs[handle]);
        self.blobs.remove(handle);
        self.bytes -= blob.len as usize;
        self.pages[blob.page as usize].live -= 1;
        if self.open != Some(blob.page) {
            self.reclaim(blob.page);
        }
    }

    fn reclaim(&mut self, page: u32) {
        let target = &mut self.pages[page as usize];
        if target.live == 0 {
            target.bytes.clear();
            target.bytes.shrink_to(PAGE_BYTES);
            self.free_pages.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{collections::VecDeque, vec};

    #[test]
    fn blobs_keep_their_bytes_and_pages_are_used_again() {
        let mut pool = BlobPool::default();
        let mut held = VecDeque::new();
        for round in 0..50_000usize {
            let bytes = vec![
                round as u8;
                if round % 997 == 0 {
                    100_000
                } else {
                    round % 700
                }
            ];
            held.push_back((pool.put(&bytes), bytes));
            if held.len() > 500 {
                let (handle, bytes) = held.pop_front().unwrap();
                assert_eq!(pool.get(handle), bytes);
                pool.remove(handle);
            }
        }
        assert!(pool.pages.len() < 20, "{} pages", pool.pages.len());
        for (handle, bytes) in held {
            assert_eq!(pool.get(handle), bytes);
            pool.remove(handle);
        }
        assert_eq!((pool.bytes(), pool.count()), (0, 0));
    }
}
