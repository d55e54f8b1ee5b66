//! Submits by the frame, for load generators and for whoever counts nanoseconds: no task of its own, no allocation per
//! task, answers as they lie on the wire.
//!
//! ```no_run
//! use pelton_client::{ClientOptions, Error, pipeline};
//! use pelton_net::submit::SubmitTask;
//!
//! # async fn example() -> Result<(), Error> {
//! let (mut sender, mut receiver) = pipeline::connect(&ClientOptions::from_env()?).await?;
//! let tasks = [SubmitTask::new(b"some bytes"); 512];
//! let prepared = pipeline::Prepared::new(0, &["digest"], &tasks)?;
//! for _ in 0..8 {
//!     sender.send(&prepared);
//! }
//! sender.flush().await?;
//! let mut accepted = 0;
//! while accepted < 8 * 512 {
//!     if let pipeline::Event::Answer(answer) = receiver.next().await? {
//!         accepted += answer.view()?.accepted();
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The two halves belong into two tasks, or into one that keeps fewer tasks in flight than `Limits` allows.

use bytes::{Bytes, BytesMut};
use pelton_net::Code;
use pelton_net::error::ProtocolError;
use pelton_net::frame::{Frame, FrameType, HEADER_BYTES, retagged_header};
use pelton_net::item::Items;
use pelton_net::session::ErrorFrame;
use pelton_net::submit::{AnswerView, Finished, PushError, SubmitTask, SubmitWriter};

use crate::error::Error;
pub use crate::link::Limits;
use crate::link::{HELLO_TAG, Held, Inbound, Link, Outbound, unexpected};
use crate::options::ClientOptions;

/// Opens a connection of its own and parts it into its two directions.
pub async fn connect(options: &ClientOptions) -> Result<(Sender, Receiver), Error> {
    let (inbound, outbound, limits, held) = Link::open(options, None).await?.split();
    let sender = Sender {
        outbound,
        buffer: BytesMut::new(),
        frame_bytes: 0,
        next_tag: HELLO_TAG + 1,
        limits,
        held: held.clone(),
    };
    let receiver = Receiver {
        inbound,
        _held: held,
    };
    Ok((sender, receiver))
}

/// A submit frame that is encoded once and sent any number of times; its bytes are shared, not copied. For tasks
/// without a `task_id`, which are new tasks each time.
#[derive(Clone, Debug)]
pub struct Prepared {
    frame: Bytes,
    count: usize,
}

impl Prepared {
    /// Encodes a frame with these flags (`SUBMIT_NOTIFY`, `SUBMIT_RESULT`). All tasks must fit it.
    pub fn new(flags: u8, functions: &[&str], tasks: &[SubmitTask<'_>]) -> Result<Prepared, Error> {
        let mut buffer = BytesMut::new();
        let mut writer = SubmitWriter::begin(&mut buffer, 0, flags, functions, usize::MAX);
        for task in tasks {
            writer.push(task).map_err(push_error)?;
        }
        writer.finish();
        Ok(Prepared {
            frame: buffer.freeze(),
            count: tasks.len(),
        })
    }

    /// Tasks in the frame.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True for a frame without tasks.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The sending half. Frames are kept until `flush`.
pub struct Sender {
    outbound: Outbound,
    buffer: BytesMut,
    /// The largest frame so far: what is reserved for the next one, so that it does not grow step by step.
    frame_bytes: usize,
    next_tag: u64,
    limits: Limits,
    held: Held,
}

impl Sender {
    /// What the welcome said. That no more than `in_flight_tasks_max` are unanswered is the caller's to keep.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sends a prepared frame; its answer will carry the tag that is returned.
    pub fn send(&mut self, prepared: &Prepared) -> u64 {
        let tag = self.take_tag();
        self.buffer
            .extend_from_slice(&retagged_header(&prepared.frame, tag));
        self.queue_buffer();
        self.outbound.queue(prepared.frame.slice(HEADER_BYTES..));
        tag
    }

    /// Encodes tasks into one frame. Returns its tag and how many of the tasks it took: as many as fit.
    pub fn submit<'t>(
        &mut self,
        flags: u8,
        functions: &[&str],
        tasks: impl IntoIterator<Item = SubmitTask<'t>>,
    ) -> Result<(u64, usize), Error> {
        let tag = self.next_tag;
        let limit = self.limits.frame_bytes_max;
        self.buffer.reserve(self.frame_bytes);
        let mut writer = SubmitWriter::begin(&mut self.buffer, tag, flags, functions, limit);
        for task in tasks {
            match writer.push(&task) {
                Ok(()) => {}
                Err(PushError::Full) => break,
                Err(error) => return Err(push_error(error)),
            }
        }
        let count = writer.count();
        writer.finish();
        self.frame_bytes = self.frame_bytes.max(self.buffer.len());
        self.queue_buffer();
        self.next_tag += 1;
        Ok((tag, count))
    }

    /// Hands everything to the connection; waits for it where it has no room.
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.outbound.flush().await
    }

    /// Closes the connection, for both halves.
    pub async fn close(self) {
        self.held.close().await;
    }

    fn take_tag(&mut self) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        tag
    }

    fn queue_buffer(&mut self) {
        self.outbound.queue(self.buffer.split().freeze());
    }
}

/// The receiving half.
pub struct Receiver {
    inbound: Inbound,
    _held: Held,
}

/// What the server sends to a pipeline.
#[derive(Debug)]
pub enum Event {
    /// What became of some or all tasks of a frame.
    Answer(Answer),
    /// Tasks have ended.
    Finished(FinishedTasks),
    /// A frame was refused as a whole.
    Refused {
        /// Its tag.
        tag: u64,
        /// Why.
        error: Error,
    },
    /// The server takes no more tasks on this connection.
    Goodbye,
}

/// The answer to a frame, unread.
#[derive(Debug)]
pub struct Answer {
    frame: Frame,
}

impl Answer {
    /// The tag of the submit frame.
    pub fn tag(&self) -> u64 {
        self.frame.tag
    }

    /// The answer, checked and borrowed: `accepted()` counts without looking at single tasks, `iter()` does.
    pub fn view(&self) -> Result<AnswerView<'_>, ProtocolError> {
        AnswerView::parse(&self.frame)
    }
}

/// Ended tasks, unread; the order is that of their ends.
#[derive(Debug)]
pub struct FinishedTasks {
    frame: Frame,
}

impl FinishedTasks {
    /// The tasks, checked and borrowed.
    pub fn items(&self) -> Result<Items<'_, Finished<'_>>, ProtocolError> {
        Items::parse(&self.frame)
    }
}

impl Receiver {
    /// The next event. Cancel-safe.
    pub async fn next(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.try_next()? {
                return Ok(event);
            }
            self.inbound.ready().await?;
        }
    }

    /// The next event among those that have arrived.
    pub fn try_next(&mut self) -> Result<Option<Event>, Error> {
        let Some(frame) = self.inbound.next()? else {
            return Ok(None);
        };
        match frame.kind {
            FrameType::SubmitAnswer => Ok(Some(Event::Answer(Answer { frame }))),
            FrameType::Finished => Ok(Some(Event::Finished(FinishedTasks { frame }))),
            FrameType::Goodbye => Ok(Some(Event::Goodbye)),
            FrameType::Error => {
                let error = Error::from_frame(&ErrorFrame::parse(&frame)?);
                match frame.tag {
                    0 => Err(error),
                    tag => Ok(Some(Event::Refused { tag, error })),
                }
            }
            _ => Err(unexpected(&frame).into()),
        }
    }
}

fn push_error(error: PushError) -> Error {
    match error {
        PushError::Full => Error::refused(Code::PayloadTooLarge, "the tasks do not fit one frame"),
        PushError::Invalid(error) => Error::refused(error.code, error.what),
    }
}
