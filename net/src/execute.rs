//! The frames between the server and an executor: register, execute, outcome, cancel, resume.

use bytes::{BufMut, BytesMut};
use pelton_core::error::Code;
use pelton_core::id::{RequestId, Token};
use pelton_core::limits::{
    CONTENT_TYPE_BYTES_MAX, ERROR_BYTES_MAX, NAME_BYTES_MAX, OUTPUT_BYTES_MAX, TRACEPARENT_BYTES,
};

use crate::error::ProtocolError;
use crate::frame::{self, Frame, FrameType, REGISTER_FUNCTIONS_MAX};
use crate::item::sealed::{CursorOf, Layout};
use crate::session::Lease;
use crate::wire::{Cursor, cut, field};

/// A function that an executor offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer<'a> {
    /// Its name.
    pub function: &'a str,
    /// How many of its tasks may run at once.
    pub slots: u32,
}

/// What an executor can do. The functions of a connection are numbered in the order in which they are registered,
/// from 0, over all its register frames; `ExecuteTask::function` is that number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Register<'a> {
    /// Slots over all functions together; 0 means the sum of theirs.
    pub slots: u32,
    /// Processor capacity in thousandths; 0 means not said.
    pub cpu_millis: u32,
    /// Memory; 0 means not said.
    pub memory_mib: u32,
    /// The functions.
    pub offers: Vec<Offer<'a>>,
}

impl<'a> Register<'a> {
    /// Appends the frame. Panics beyond `REGISTER_FUNCTIONS_MAX` functions or on a name longer than a name may be.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        assert!(self.offers.len() <= REGISTER_FUNCTIONS_MAX);
        let at = frame::begin(out, FrameType::Register, 0, tag);
        out.put_u32_le(self.slots);
        out.put_u32_le(self.cpu_millis);
        out.put_u32_le(self.memory_mib);
        for offer in &self.offers {
            assert!(offer.function.len() <= NAME_BYTES_MAX);
            out.put_u32_le(offer.slots);
            out.put_u8(offer.function.len() as u8);
            out.put_slice(offer.function.as_bytes());
        }
        frame::end(out, at, FrameType::Register, self.offers.len());
    }

    /// Reads the body.
    pub fn parse(frame: &'a Frame) -> Result<Register<'a>, ProtocolError> {
        frame.check_flags(0)?;
        let mut cursor = Cursor::new(&frame.body);
        let slots = cursor.u32()?;
        let cpu_millis = cursor.u32()?;
        let memory_mib = cursor.u32()?;
        let mut offers = Vec::with_capacity(usize::from(frame.count));
        for _ in 0..frame.count {
            let slots = cursor.u32()?;
            let len = usize::from(cursor.u8()?);
            let Some(function) = cursor.name(len)? else {
                return Err(cursor.error("a function has a name"));
            };
            offers.push(Offer { function, slots });
        }
        cursor.end()?;
        Ok(Register {
            slots,
            cpu_millis,
            memory_mib,
            offers,
        })
    }
}

/// The answer to a register: one code per function, in its order. A refused function keeps its number and gets no
/// tasks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registered {
    /// The number of the first function of the register that is answered.
    pub first_index: u16,
    /// What became of each function.
    pub codes: Vec<Code>,
}

impl Registered {
    /// Appends the frame.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        assert!(self.codes.len() <= REGISTER_FUNCTIONS_MAX);
        let at = frame::begin(out, FrameType::Registered, 0, tag);
        out.put_u16_le(self.first_index);
        for &code in &self.codes {
            out.put_u16_le(code as u16);
        }
        frame::end(out, at, FrameType::Registered, self.codes.len());
    }

    /// Reads the body. A code that this version does not know reads as `Internal`.
    pub fn parse(frame: &Frame) -> Result<Registered, ProtocolError> {
        frame.check_flags(0)?;
        let mut cursor = Cursor::new(&frame.body);
        let first_index = cursor.u16()?;
        let mut codes = Vec::with_capacity(usize::from(frame.count));
        for _ in 0..frame.count {
            codes.push(Code::from_number(cursor.u16()?).unwrap_or(Code::Internal));
        }
        cursor.end()?;
        Ok(Registered { first_index, codes })
    }
}

const EXECUTE_FIXED_BYTES: usize = 36;
const EXECUTE_TRACEPARENT: u8 = 1;

/// One attempt handed to an executor: an item of an `Execute` frame. Its lease is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExecuteTask<'a> {
    /// The task.
    pub request_id: RequestId,
    /// The attempt; goes back with the outcome.
    pub token: Token,
    /// The function's number on this connection.
    pub function: u16,
    /// Attempts that the task gets in all; 0 if not said.
    pub attempts_max: u16,
    /// What the attempt may take.
    pub timeout_ms: u32,
    /// The name that the caller gave.
    pub task_id: Option<&'a str>,
    /// The ordering key.
    pub key: Option<&'a str>,
    /// MIME type of the payload; empty if not said.
    pub content_type: &'a str,
    /// W3C trace context.
    pub traceparent: Option<&'a [u8; TRACEPARENT_BYTES]>,
    /// The task's bytes.
    pub payload: &'a [u8],
}

impl<'a> Layout<'a> for ExecuteTask<'a> {
    #[inline]
    fn read(cursor: &mut CursorOf<'a>) -> Result<ExecuteTask<'a>, ProtocolError> {
        let cursor = &mut cursor.0;
        let offset = cursor.offset();
        let fixed = cursor.array::<EXECUTE_FIXED_BYTES>()?;
        let flags = fixed[22];
        if flags & !EXECUTE_TRACEPARENT != 0 {
            return Err(ProtocolError::invalid(
                "unknown flags must be zero",
                offset + 22,
            ));
        }
        let lease = Lease::from_bytes(&fixed[..Lease::BYTES]);
        Ok(ExecuteTask {
            request_id: lease.request_id,
            token: lease.token,
            function: u16::from_le_bytes(field(fixed, 20)),
            attempts_max: u16::from_le_bytes(field(fixed, 26)),
            timeout_ms: u32::from_le_bytes(field(fixed, 28)),
            task_id: cursor.name(usize::from(fixed[23]))?,
            key: cursor.name(usize::from(fixed[24]))?,
            content_type: cursor.text(usize::from(fixed[25]))?,
            traceparent: if flags & EXECUTE_TRACEPARENT != 0 {
                Some(cursor.array()?)
            } else {
                None
            },
            payload: cursor.take(u32::from_le_bytes(field(fixed, 32)) as usize)?,
        })
    }

    #[inline]
    fn write(&self, out: &mut BytesMut) {
        let task_id = self.task_id.unwrap_or("");
        let key = self.key.unwrap_or("");
        assert!(
            task_id.len() <= NAME_BYTES_MAX
                && key.len() <= NAME_BYTES_MAX
                && self.content_type.len() <= CONTENT_TYPE_BYTES_MAX,
            "checked when the task was accepted"
        );
        let mut fixed = [0; EXECUTE_FIXED_BYTES];
        let lease = Lease {
            request_id: self.request_id,
            token: self.token,
        };
        fixed[..Lease::BYTES].copy_from_slice(&lease.to_bytes());
        fixed[20..22].copy_from_slice(&self.function.to_le_bytes());
        fixed[22] = if self.traceparent.is_some() {
            EXECUTE_TRACEPARENT
        } else {
            0
        };
        fixed[23] = task_id.len() as u8;
        fixed[24] = key.len() as u8;
        fixed[25] = self.content_type.len() as u8;
        fixed[26..28].copy_from_slice(&self.attempts_max.to_le_bytes());
        fixed[28..32].copy_from_slice(&self.timeout_ms.to_le_bytes());
        fixed[32..36].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        out.reserve(EXECUTE_FIXED_BYTES + 2 * NAME_BYTES_MAX + self.payload.len());
        out.put_slice(&fixed);
        out.put_slice(task_id.as_bytes());
        out.put_slice(key.as_bytes());
        out.put_slice(self.content_type.as_bytes());
        if let Some(traceparent) = self.traceparent {
            out.put_slice(traceparent);
        }
        out.put_slice(self.payload);
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum OutcomeStatus {
    /// The function did its work.
    Succeeded = 1,
    /// The function ran and failed; an attempt is spent.
    Failed = 2,
    /// What lies behind the function is busy; no retry is spent, and `retry_after_ms` is honoured.
    Throttled = 3,
    /// The executor did not start it; no attempt is spent.
    Rejected = 4,
    /// It was ended by a cancel.
    Stopped = 5,
}

impl OutcomeStatus {
    /// The status with this number.
    pub fn from_number(number: u8) -> Option<OutcomeStatus> {
        match number {
            1 => Some(OutcomeStatus::Succeeded),
            2 => Some(OutcomeStatus::Failed),
            3 => Some(OutcomeStatus::Throttled),
            4 => Some(OutcomeStatus::Rejected),
            5 => Some(OutcomeStatus::Stopped),
            _ => None,
        }
    }
}

const OUTCOME_FIXED_BYTES: usize = 40;

/// How one attempt ended: an item of an `Outcome` frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskOutcome<'a> {
    /// The task.
    pub request_id: RequestId,
    /// The attempt, as it was handed out.
    pub token: Token,
    /// How it ended.
    pub status: OutcomeStatus,
    /// For a throttle or a rejection: when to try again; 0 if not said.
    pub retry_after_ms: u32,
    /// What the handler took, in microseconds; the largest number means that or more.
    pub run_us: u32,
    /// The error of an attempt that did not succeed; cut at `ERROR_BYTES_MAX`.
    pub error: &'a str,
    /// Captured output; the last `OUTPUT_BYTES_MAX` bytes are kept. Not necessarily text.
    pub output: &'a [u8],
    /// The result.
    pub result: &'a [u8],
}

impl<'a> TaskOutcome<'a> {
    /// An outcome with nothing beside the status.
    pub fn new(lease: Lease, status: OutcomeStatus) -> TaskOutcome<'a> {
        TaskOutcome {
            request_id: lease.request_id,
            token: lease.token,
            status,
            retry_after_ms: 0,
            run_us: 0,
            error: "",
            output: &[],
            result: &[],
        }
    }
}

impl<'a> Layout<'a> for TaskOutcome<'a> {
    #[inline]
    fn read(cursor: &mut CursorOf<'a>) -> Result<TaskOutcome<'a>, ProtocolError> {
        let cursor = &mut cursor.0;
        let offset = cursor.offset();
        let fixed = cursor.array::<OUTCOME_FIXED_BYTES>()?;
        let Some(status) = OutcomeStatus::from_number(fixed[20]) else {
            return Err(ProtocolError::invalid(
                "an outcome is 1 (succeeded) to 5 (stopped)",
                offset + 20,
            ));
        };
        if fixed[21] != 0 || fixed[26] != 0 || fixed[27] != 0 {
            return Err(ProtocolError::invalid(
                "reserved bytes must be zero",
                offset + 21,
            ));
        }
        let lease = Lease::from_bytes(&fixed[..Lease::BYTES]);
        let error_len = usize::from(u16::from_le_bytes(field(fixed, 22)));
        let output_len = usize::from(u16::from_le_bytes(field(fixed, 24)));
        if error_len > ERROR_BYTES_MAX || output_len > OUTPUT_BYTES_MAX {
            return Err(ProtocolError::invalid(
                "an error has at most 4096 bytes, captured output at most 8192",
                offset + 22,
            ));
        }
        Ok(TaskOutcome {
            request_id: lease.request_id,
            token: lease.token,
            status,
            retry_after_ms: u32::from_le_bytes(field(fixed, 28)),
            run_us: u32::from_le_bytes(field(fixed, 32)),
            error: cursor.text(error_len)?,
            output: cursor.take(output_len)?,
            result: cursor.take(u32::from_le_bytes(field(fixed, 36)) as usize)?,
        })
    }

    #[inline]
    fn write(&self, out: &mut BytesMut) {
        let error = cut(self.error, ERROR_BYTES_MAX);
        let output = &self.output[self.output.len().saturating_sub(OUTPUT_BYTES_MAX)..];
        let mut fixed = [0; OUTCOME_FIXED_BYTES];
        let lease = Lease {
            request_id: self.request_id,
            token: self.token,
        };
        fixed[..Lease::BYTES].copy_from_slice(&lease.to_bytes());
        fixed[20] = self.status as u8;
        fixed[22..24].copy_from_slice(&(error.len() as u16).to_le_bytes());
        fixed[24..26].copy_from_slice(&(output.len() as u16).to_le_bytes());
        fixed[28..32].copy_from_slice(&self.retry_after_ms.to_le_bytes());
        fixed[32..36].copy_from_slice(&self.run_us.to_le_bytes());
        fixed[36..40].copy_from_slice(&(self.result.len() as u32).to_le_bytes());
        out.reserve(OUTCOME_FIXED_BYTES + error.len() + output.len() + self.result.len());
        out.put_slice(&fixed);
        out.put_slice(error.as_bytes());
        out.put_slice(output);
        out.put_slice(self.result);
    }
}

const REFUSED_BYTES: usize = 8;

/// An outcome that was not taken: an item of an `OutcomeAck` frame. The outcomes not listed are durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RefusedOutcome {
    /// Its place in the outcome frame.
    pub index: u16,
    /// Why: `StaleLease`, `NotFound`, `ResultTooLarge`; with `Unavailable` the executor keeps the outcome and
    /// presents it again.
    pub code: Code,
}

impl<'a> Layout<'a> for RefusedOutcome {
    fn read(cursor: &mut CursorOf<'a>) -> Result<RefusedOutcome, ProtocolError> {
        let fixed = cursor.0.array::<REFUSED_BYTES>()?;
        Ok(RefusedOutcome {
            index: u16::from_le_bytes(field(fixed, 0)),
            code: Code::from_number(u16::from_le_bytes(field(fixed, 2))).unwrap_or(Code::Internal),
        })
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_u16_le(self.index);
        out.put_u16_le(self.code as u16);
        out.put_u32_le(0);
    }
}

/// Tells an executor to end an attempt: an item of a `Cancel` frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cancel {
    /// The attempt.
    pub lease: Lease,
    /// What it gets to end by itself.
    pub grace_ms: u32,
}

impl<'a> Layout<'a> for Cancel {
    fn read(cursor: &mut CursorOf<'a>) -> Result<Cancel, ProtocolError> {
        let fixed = cursor.0.array::<24>()?;
        Ok(Cancel {
            lease: Lease::from_bytes(&fixed[..Lease::BYTES]),
            grace_ms: u32::from_le_bytes(field(fixed, 20)),
        })
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_slice(&self.lease.to_bytes());
        out.put_u32_le(self.grace_ms);
    }
}

/// What the server says to a presented lease: an item of a `Resumed` frame, in the order asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum ResumedLease {
    /// It is valid: go on, and send the outcome on this connection.
    Kept = 0,
    /// It is not valid any more: end the attempt and forget its outcome.
    Refused = 1,
    /// Its outcome is durable already: forget it.
    Known = 2,
}

impl<'a> Layout<'a> for ResumedLease {
    fn read(cursor: &mut CursorOf<'a>) -> Result<ResumedLease, ProtocolError> {
        match cursor.0.u8()? {
            0 => Ok(ResumedLease::Kept),
            1 => Ok(ResumedLease::Refused),
            2 => Ok(ResumedLease::Known),
            _ => Err(cursor
                .0
                .error("a resumed lease is 0 (kept), 1 (refused) or 2 (known)")),
        }
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_u8(*self as u8);
    }
}
