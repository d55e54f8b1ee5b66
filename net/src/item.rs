//! What all frames that carry a list of items share: writing them one after the other, and checking a whole frame
//! before the first item is handed on.

use std::marker::PhantomData;

use bytes::BytesMut;

use crate::error::ProtocolError;
use crate::frame::{self, Frame, FrameType, HEADER_BYTES};
use crate::wire::Cursor;

pub(crate) mod sealed {
    use super::{BytesMut, Cursor, ProtocolError};

    /// How an item is read and written; sealed, since the layouts are the protocol's.
    pub trait Layout<'a>: Sized {
        #[doc(hidden)]
        fn read(cursor: &mut CursorOf<'a>) -> Result<Self, ProtocolError>;
        #[doc(hidden)]
        fn write(&self, out: &mut BytesMut);
    }

    /// A cursor that only this crate can make.
    pub struct CursorOf<'a>(pub(crate) Cursor<'a>);
}

use sealed::{CursorOf, Layout};

/// An item of a list frame: `ExecuteTask`, `TaskOutcome`, `Finished`, `Lease` and the like.
pub trait Item<'a>: Layout<'a> {}
impl<'a, T: Layout<'a>> Item<'a> for T {}

/// No room for the item: finish this frame and begin another. The item is not written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// The checked items of one frame; reading them cannot fail any more.
pub struct Items<'a, T> {
    body: &'a [u8],
    count: usize,
    item: PhantomData<T>,
}

impl<'a, T: Item<'a>> Items<'a, T> {
    /// Checks every item of the frame, and that nothing follows the last one. That the frame's type carries items
    /// of this kind is the caller's knowledge: it has just matched on the type.
    pub fn parse(frame: &'a Frame) -> Result<Items<'a, T>, ProtocolError> {
        frame.check_flags(0)?;
        let mut cursor = CursorOf(Cursor::new(&frame.body));
        for _ in 0..frame.count {
            T::read(&mut cursor)?;
        }
        cursor.0.end()?;
        Ok(Items {
            body: &frame.body,
            count: usize::from(frame.count),
            item: PhantomData,
        })
    }

    /// Items in the frame.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True for a frame without items.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The items in their order.
    pub fn iter(&self) -> ItemIter<'a, T> {
        ItemIter {
            cursor: CursorOf(Cursor::new(self.body)),
            left: self.count,
            item: PhantomData,
        }
    }
}

/// Iterates over checked items.
pub struct ItemIter<'a, T> {
    cursor: CursorOf<'a>,
    left: usize,
    item: PhantomData<T>,
}

impl<'a, T: Item<'a>> Iterator for ItemIter<'a, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(T::read(&mut self.cursor).expect("Items::parse has read the same bytes"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// Writes one list frame at the end of a buffer. Dropped without `finish`, it takes the frame back.
pub struct ItemWriter<'b> {
    out: &'b mut BytesMut,
    at: usize,
    kind: FrameType,
    count: usize,
    finished: bool,
}

impl<'b> ItemWriter<'b> {
    /// Begins a frame of this type.
    pub fn begin(out: &'b mut BytesMut, kind: FrameType, tag: u64) -> ItemWriter<'b> {
        let at = frame::begin(out, kind, 0, tag);
        ItemWriter {
            out,
            at,
            kind,
            count: 0,
            finished: false,
        }
    }

    /// Adds an item, or says that the frame is full. An item always fits an empty frame if its fields keep to
    /// `limits`.
    pub fn push<'a, T: Item<'a>>(&mut self, item: &T) -> Result<(), Full> {
        if self.count == self.kind.count_max() {
            return Err(Full);
        }
        let before = self.out.len();
        item.write(self.out);
        if self.body_len() > self.kind.body_bytes_max() {
            self.out.truncate(before);
            return Err(Full);
        }
        self.count += 1;
        Ok(())
    }

    /// Items written.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the body so far.
    pub fn body_len(&self) -> usize {
        self.out.len() - self.at - HEADER_BYTES
    }

    /// Completes this frame and begins another of the same type behind it. Returns where in the buffer that one starts.
    pub fn next_frame(&mut self, tag: u64) -> usize {
        frame::end(self.out, self.at, self.kind, self.count);
        self.at = frame::begin(self.out, self.kind, 0, tag);
        self.count = 0;
        self.at
    }

    /// Completes the header.
    pub fn finish(mut self) {
        frame::end(self.out, self.at, self.kind, self.count);
        self.finished = true;
    }
}

impl Drop for ItemWriter<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.out.truncate(self.at);
        }
    }
}
