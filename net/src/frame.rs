//! Frames: a 16-byte header and a body. A `FrameReader` cuts what a stream delivers into frames.
//!
//! Invariants: a length is checked before anything is allocated for it; memory held for an unfinished frame is bounded
//! by what has arrived plus 64 KiB, whatever the header promised; a frame of an unknown type never stops the stream.

use bytes::{BufMut, Bytes, BytesMut};
use pelton_core::error::Code;
use pelton_core::limits::{
    CONTROL_FRAME_BYTES_MAX, FRAME_BYTES_MAX, OUTCOMES_MAX, SUBMIT_TASKS_MAX,
};

use crate::error::ProtocolError;
use crate::wire::field;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 16;

/// Header flag of any type: a receiver that does not know the type skips the frame instead of answering an error.
pub const FLAG_IGNORABLE: u8 = 0x80;

/// What a reader reserves ahead of the bytes that have arrived.
const RESERVE_AHEAD_BYTES: usize = 64 << 10;

macro_rules! frame_types {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $max:ident, $count:expr;)*) => {
        /// What a frame is. The numbers never change their meaning.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum FrameType {
            /// A type that this version does not know; never sent. `Frame::number` has the number.
            Unknown = 0,
            $($(#[$doc])* $variant = $number,)*
        }

        impl FrameType {
            /// Every known type, in the order of the numbers.
            pub const ALL: &'static [FrameType] = &[$(FrameType::$variant,)*];

            /// The type with this number, or `Unknown`.
            pub fn from_number(number: u8) -> FrameType {
                match number { $($number => FrameType::$variant,)* _ => FrameType::Unknown }
            }

            /// Bytes that a body of this type may have.
            pub const fn body_bytes_max(self) -> usize {
                match self { FrameType::Unknown => CONTROL_FRAME_BYTES_MAX, $(FrameType::$variant => $max,)* }
            }

            /// Items that a frame of this type may carry; 0 for a type without items.
            pub const fn count_max(self) -> usize {
                match self { FrameType::Unknown => 0, $(FrameType::$variant => $count,)* }
            }
        }
    };
}

frame_types! {
    /// The first frame of a connection: who speaks, and with which credential.
    Hello = 1, CONTROL_FRAME_BYTES_MAX, 0;
    /// The answer to a hello, with the limits of the session.
    Welcome = 2, CONTROL_FRAME_BYTES_MAX, 0;
    /// Refuses the frame whose tag it carries; with tag 0, the connection.
    Error = 3, CONTROL_FRAME_BYTES_MAX, 0;
    /// The sender is leaving: from a server, no more tasks are taken or handed out; from an executor, hand out none to it.
    Goodbye = 4, CONTROL_FRAME_BYTES_MAX, 0;
    /// Shows that the sender lives, with the leases that it is running.
    Heartbeat = 5, CONTROL_FRAME_BYTES_MAX, LEASES_PER_FRAME_MAX;
    /// Answers a heartbeat, with those of its leases that are lost.
    HeartbeatAck = 6, CONTROL_FRAME_BYTES_MAX, LEASES_PER_FRAME_MAX;
    /// Hands in tasks.
    Submit = 16, FRAME_BYTES_MAX, SUBMIT_TASKS_MAX;
    /// Tells what became of some or all tasks of a submit.
    SubmitAnswer = 17, FRAME_BYTES_MAX, SUBMIT_TASKS_MAX;
    /// Tells that tasks are terminal: asked for by a submit's flag, or the answer to a wait.
    Finished = 18, FRAME_BYTES_MAX, SUBMIT_TASKS_MAX;
    /// Ends tasks by request id.
    Stop = 19, CONTROL_FRAME_BYTES_MAX, STOPS_PER_FRAME_MAX;
    /// Answers a stop, item by item.
    StopAnswer = 20, CONTROL_FRAME_BYTES_MAX, STOPS_PER_FRAME_MAX;
    /// Asks to be told when one task is terminal.
    Wait = 21, CONTROL_FRAME_BYTES_MAX, 0;
    /// A rare operation with a JSON body.
    Query = 24, CONTROL_FRAME_BYTES_MAX, 0;
    /// Answers a query, with a JSON body.
    QueryAnswer = 25, FRAME_BYTES_MAX, 0;
    /// Offers functions and slots.
    Register = 32, CONTROL_FRAME_BYTES_MAX, REGISTER_FUNCTIONS_MAX;
    /// Answers a register, function by function.
    Registered = 33, CONTROL_FRAME_BYTES_MAX, REGISTER_FUNCTIONS_MAX;
    /// Hands tasks to an executor.
    Execute = 34, FRAME_BYTES_MAX, SUBMIT_TASKS_MAX;
    /// Tells how attempts ended.
    Outcome = 35, FRAME_BYTES_MAX, OUTCOMES_MAX;
    /// The outcomes of one frame are durable, except for those listed.
    OutcomeAck = 36, CONTROL_FRAME_BYTES_MAX, OUTCOMES_MAX;
    /// Tells an executor to end attempts.
    Cancel = 37, CONTROL_FRAME_BYTES_MAX, LEASES_PER_FRAME_MAX;
    /// Presents leases after a reconnect.
    Resume = 38, CONTROL_FRAME_BYTES_MAX, LEASES_PER_FRAME_MAX;
    /// Answers a resume, lease by lease.
    Resumed = 39, CONTROL_FRAME_BYTES_MAX, LEASES_PER_FRAME_MAX;
}

/// Leases in one heartbeat, resume or cancel frame.
pub const LEASES_PER_FRAME_MAX: usize = 2048;
/// Tasks in one stop frame.
pub const STOPS_PER_FRAME_MAX: usize = 2048;
/// Functions in one register frame.
pub const REGISTER_FUNCTIONS_MAX: usize = 256;

const _: () = assert!(
    LEASES_PER_FRAME_MAX * 24 <= CONTROL_FRAME_BYTES_MAX,
    "a full list of leases fits a control frame"
);
const _: () = assert!(
    REGISTER_FUNCTIONS_MAX * (8 + 128) + 16 <= CONTROL_FRAME_BYTES_MAX,
    "a full register fits a control frame"
);
const _: () = assert!(SUBMIT_TASKS_MAX <= u16::MAX as usize && OUTCOMES_MAX <= u16::MAX as usize);

/// One frame as it arrived. `body` is a slice of what the transport delivered where the frame lay in one piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The type; `Unknown` comes with an empty body, the bytes are skipped.
    pub kind: FrameType,
    /// The type's number as sent.
    pub number: u8,
    /// Flags; their meaning depends on the type, except for `FLAG_IGNORABLE`.
    pub flags: u8,
    /// Items in the body, or 0 for a type without items.
    pub count: u16,
    /// The sender's ticket: an answer carries the tag of what it answers.
    pub tag: u64,
    /// What follows the header.
    pub body: Bytes,
}

impl Frame {
    /// Refuses flag bits outside `known`, so that they stay free for later versions.
    pub(crate) fn check_flags(&self, known: u8) -> Result<(), ProtocolError> {
        if self.flags & !(known | FLAG_IGNORABLE) != 0 {
            return Err(ProtocolError::invalid("unknown flags must be zero", 0));
        }
        Ok(())
    }
}

/// Writes the header of a frame whose body is known. Owned by nobody; the bytes go to the end of `out`.
pub(crate) fn put_header(
    out: &mut BytesMut,
    kind: FrameType,
    flags: u8,
    count: usize,
    tag: u64,
    body_len: usize,
) {
    assert!(body_len <= kind.body_bytes_max() && count <= kind.count_max());
    out.put_slice(&header(kind, flags, count, tag, body_len));
}

/// The header of a frame that was encoded before, with another tag: the body can be sent any number of times without
/// a copy. Panics on what is shorter than a header.
pub fn retagged_header(frame: &[u8], tag: u64) -> [u8; HEADER_BYTES] {
    let mut header: [u8; HEADER_BYTES] = field(frame, 0);
    header[8..16].copy_from_slice(&tag.to_le_bytes());
    header
}

/// Starts a frame whose body is not written yet; `end` completes it. Returns the position to hand to `end`.
pub(crate) fn begin(out: &mut BytesMut, kind: FrameType, flags: u8, tag: u64) -> usize {
    let at = out.len();
    out.put_slice(&header(kind, flags, 0, tag, 0));
    at
}

/// Completes the frame that `begin` started at `at`: everything behind its header is its body.
pub(crate) fn end(out: &mut BytesMut, at: usize, kind: FrameType, count: usize) {
    let body_len = out.len() - at - HEADER_BYTES;
    assert!(body_len <= kind.body_bytes_max() && count <= kind.count_max());
    out[at..at + 4].copy_from_slice(&(body_len as u32).to_le_bytes());
    out[at + 6..at + 8].copy_from_slice(&(count as u16).to_le_bytes());
}

fn header(
    kind: FrameType,
    flags: u8,
    count: usize,
    tag: u64,
    body_len: usize,
) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&(body_len as u32).to_le_bytes());
    header[4] = kind as u8;
    header[5] = flags;
    header[6..8].copy_from_slice(&(count as u16).to_le_bytes());
    header[8..16].copy_from_slice(&tag.to_le_bytes());
    header
}

/// Cuts one direction of one stream into frames. Fed with chunks in order, then drained with `next` before the next
/// chunk. After an error the stream cannot be read further: where the next frame starts is not known.
pub struct FrameReader {
    chunk: Bytes,
    head: [u8; HEADER_BYTES],
    head_len: usize,
    state: State,
    body_bytes_max: usize,
}

enum State {
    Header,
    Body(Frame, usize, BytesMut),
    Skip(Frame, usize),
}

impl FrameReader {
    /// A reader that takes bodies up to `body_bytes_max`, and never more than a type allows. A server starts with
    /// `CONTROL_FRAME_BYTES_MAX` and raises it once the hello is accepted.
    pub fn new(body_bytes_max: usize) -> FrameReader {
        FrameReader {
            chunk: Bytes::new(),
            head: [0; HEADER_BYTES],
            head_len: 0,
            state: State::Header,
            body_bytes_max,
        }
    }

    /// Changes the bound for the frames whose header has not been read yet.
    pub fn set_body_bytes_max(&mut self, body_bytes_max: usize) {
        self.body_bytes_max = body_bytes_max;
    }

    /// Hands in the next bytes of the stream. The former chunk must have been drained: `next` answered `None`.
    pub fn feed(&mut self, chunk: Bytes) {
        assert!(self.chunk.is_empty(), "next() is called until it is None");
        self.chunk = chunk;
    }

    /// True if the stream may end here: no frame has been begun.
    pub fn at_boundary(&self) -> bool {
        self.chunk.is_empty() && self.head_len == 0 && matches!(self.state, State::Header)
    }

    /// The next whole frame, or `None` if more bytes are needed. Ignorable frames of unknown types are passed over;
    /// other unknown ones come out with an empty body, to be answered with `UNIMPLEMENTED`.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator's end is final, this one's None means: feed more"
    )]
    pub fn next(&mut self) -> Result<Option<Frame>, ProtocolError> {
        loop {
            match &mut self.state {
                State::Header => {
                    let head = if self.head_len == 0 && self.chunk.len() >= HEADER_BYTES {
                        let head: [u8; HEADER_BYTES] = field(&self.chunk, 0);
                        let _ = self.chunk.split_to(HEADER_BYTES);
                        head
                    } else {
                        let taken = self.chunk.len().min(HEADER_BYTES - self.head_len);
                        self.head[self.head_len..self.head_len + taken]
                            .copy_from_slice(&self.chunk.split_to(taken));
                        self.head_len += taken;
                        if self.head_len < HEADER_BYTES {
                            return Ok(None);
                        }
                        self.head_len = 0;
                        self.head
                    };
                    if let Some(frame) = self.on_header(head)? {
                        return Ok(Some(frame));
                    }
                }
                State::Body(frame, length, arrived) => {
                    let missing = *length - arrived.len();
                    let taken = missing.min(self.chunk.len());
                    if arrived.capacity() - arrived.len() < taken {
                        // Doubles, so that a large frame is moved at most a few times, and never beyond its length.
                        let ahead = arrived.len().max(RESERVE_AHEAD_BYTES).max(taken);
                        arrived.reserve(ahead.min(missing));
                    }
                    arrived.extend_from_slice(&self.chunk.split_to(taken));
                    if taken < missing {
                        return Ok(None);
                    }
                    frame.body = std::mem::take(arrived).freeze();
                    return Ok(Some(self.take_frame()));
                }
                State::Skip(frame, missing) => {
                    let taken = (*missing).min(self.chunk.len());
                    let _ = self.chunk.split_to(taken);
                    *missing -= taken;
                    if *missing > 0 {
                        return Ok(None);
                    }
                    let ignorable = frame.flags & FLAG_IGNORABLE != 0;
                    let frame = self.take_frame();
                    if !ignorable {
                        return Ok(Some(frame));
                    }
                }
            }
        }
    }

    /// Checks a header; answers the frame at once if its body lies in the chunk at hand.
    fn on_header(&mut self, head: [u8; HEADER_BYTES]) -> Result<Option<Frame>, ProtocolError> {
        let length = u32::from_le_bytes(field(&head, 0)) as usize;
        let mut frame = Frame {
            kind: FrameType::from_number(head[4]),
            number: head[4],
            flags: head[5],
            count: u16::from_le_bytes(field(&head, 6)),
            tag: u64::from_le_bytes(field(&head, 8)),
            body: Bytes::new(),
        };
        if length > self.body_bytes_max.min(frame.kind.body_bytes_max()) {
            return Err(ProtocolError {
                code: Code::PayloadTooLarge,
                what: "the frame is longer than its type or the session allows",
                offset: 0,
            });
        }
        if frame.kind == FrameType::Unknown {
            self.state = State::Skip(frame, length);
            return Ok(None);
        }
        if usize::from(frame.count) > frame.kind.count_max() {
            return Err(ProtocolError::invalid(
                "the frame counts more items than its type allows",
                0,
            ));
        }
        if self.chunk.len() >= length {
            frame.body = self.chunk.split_to(length);
            return Ok(Some(frame));
        }
        let ahead = length.min(RESERVE_AHEAD_BYTES);
        self.state = State::Body(frame, length, BytesMut::with_capacity(ahead));
        Ok(None)
    }

    fn take_frame(&mut self) -> Frame {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Body(frame, _, _) | State::Skip(frame, _) => frame,
            State::Header => unreachable!("only called while a body is being read"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame_bytes(kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = header(FrameType::Hello, flags, 0, 7, body.len()).to_vec();
        bytes[4] = kind;
        bytes.extend_from_slice(body);
        bytes
    }

    fn read_in_pieces(
        stream: &[u8],
        piece: usize,
    ) -> Result<Vec<(FrameType, u64, Vec<u8>)>, ProtocolError> {
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        let mut frames = Vec::new();
        for chunk in stream.chunks(piece) {
            reader.feed(Bytes::copy_from_slice(chunk));
            while let Some(frame) = reader.next()? {
                frames.push((frame.kind, frame.tag, frame.body.to_vec()));
            }
        }
        assert!(reader.at_boundary());
        Ok(frames)
    }

    #[test]
    fn frames_do_not_depend_on_how_the_stream_is_cut() {
        let mut stream = frame_bytes(FrameType::Hello as u8, 0, b"hello");
        stream.extend(frame_bytes(200, FLAG_IGNORABLE, &[9; 100]));
        stream.extend(frame_bytes(201, 0, &[9; 50]));
        stream.extend(frame_bytes(FrameType::Submit as u8, 0, &[3; 200_000]));
        stream.extend(frame_bytes(FrameType::Goodbye as u8, 0, b""));
        let whole = read_in_pieces(&stream, stream.len()).unwrap();
        let kinds: Vec<_> = whole.iter().map(|frame| frame.0).collect();
        assert_eq!(
            kinds,
            [
                FrameType::Hello,
                FrameType::Unknown,
                FrameType::Submit,
                FrameType::Goodbye
            ]
        );
        for piece in [1, 7, 15, 16, 17, 1200, 65_536] {
            assert_eq!(read_in_pieces(&stream, piece).unwrap(), whole, "{piece}");
        }
    }

    #[test]
    fn a_frame_in_one_chunk_is_not_copied() {
        let chunk = Bytes::from(frame_bytes(FrameType::Submit as u8, 0, &[3; 100]));
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        reader.feed(chunk.clone());
        let frame = reader.next().unwrap().unwrap();
        assert_eq!(
            frame.body.as_ptr(),
            chunk[HEADER_BYTES..].as_ptr(),
            "a slice of the chunk"
        );
    }

    #[test]
    fn a_promised_length_does_not_cost_memory() {
        let mut bytes = frame_bytes(FrameType::Submit as u8, 0, &[0; 10]);
        bytes[0..4].copy_from_slice(&(FRAME_BYTES_MAX as u32).to_le_bytes());
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        reader.feed(Bytes::from(bytes));
        assert_eq!(reader.next(), Ok(None));
        let State::Body(_, _, arrived) = &reader.state else {
            panic!("a body is begun");
        };
        assert!(arrived.capacity() <= RESERVE_AHEAD_BYTES);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_from_the_header_alone() {
        for (kind, length, limit) in [
            (
                FrameType::Hello,
                CONTROL_FRAME_BYTES_MAX + 1,
                FRAME_BYTES_MAX,
            ),
            (FrameType::Submit, FRAME_BYTES_MAX + 1, FRAME_BYTES_MAX),
            (
                FrameType::Submit,
                CONTROL_FRAME_BYTES_MAX + 1,
                CONTROL_FRAME_BYTES_MAX,
            ),
            (FrameType::Unknown, u32::MAX as usize, FRAME_BYTES_MAX),
        ] {
            let mut reader = FrameReader::new(limit);
            reader.feed(Bytes::copy_from_slice(&header(kind, 0, 0, 0, length)));
            assert_eq!(
                reader.next().unwrap_err().code,
                Code::PayloadTooLarge,
                "{kind:?}"
            );
        }
    }
}
