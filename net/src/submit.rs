//! Submits, their answers, and what is told when a task is terminal.
//!
//! A frame that is broken as a whole (lengths that do not add up) is refused as a whole; a task that breaks a rule
//! within a sound frame is refused alone. `SubmitView::parse` settles the first, iterating tells the second.

use bytes::{BufMut, BytesMut};
use pelton_core::error::Code;
use pelton_core::id::{RequestId, name_is_valid};
use pelton_core::limits::{
    CONTENT_TYPE_BYTES_MAX, COST_MAX, DELAY_MS_MAX, ERROR_BYTES_MAX, MAX_AGE_S_MAX, NAME_BYTES_MAX,
    SUBMIT_TASKS_MAX, TAG_BYTES_MAX, TAG_COUNT_MAX, TRACEPARENT_BYTES,
};

use crate::error::ProtocolError;
use crate::frame::{self, Frame, FrameType, HEADER_BYTES};
use crate::item::sealed::{CursorOf, Layout};
use crate::wire::{Cursor, cut, field};

/// Submit frame flag: send `Finished` for each task of the frame when it is terminal.
pub const SUBMIT_NOTIFY: u8 = 1;
/// Submit frame flag, with `SUBMIT_NOTIFY`: with the result's bytes.
pub const SUBMIT_RESULT: u8 = 2;

/// Functions that one submit frame may name.
pub const SUBMIT_FUNCTIONS_MAX: usize = 64;

const TASK_FIXED_BYTES: usize = 28;
const TASK_MEMORY: u8 = 1;
const TASK_TRACEPARENT: u8 = 2;
const TASK_AT: u8 = 4;
const TASK_HASH: u8 = 8;
const TASK_FLAGS: u8 = TASK_MEMORY | TASK_TRACEPARENT | TASK_AT | TASK_HASH;

/// The class in which a task waits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum Priority {
    /// What the function says; else standard.
    #[default]
    Default = 0,
    /// Somebody waits for it.
    Interactive = 1,
    /// The middle.
    Standard = 2,
    /// It has time.
    Batch = 3,
}

/// What an acknowledgement of a submit means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Durability {
    /// The task is on disk.
    #[default]
    Disk,
    /// The task is in memory; a crash may lose it.
    Memory,
}

/// When a task may start.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Start {
    /// At once.
    #[default]
    Now,
    /// So many milliseconds after it was accepted.
    DelayMs(u64),
    /// At this time, in milliseconds since 1970.
    AtMs(u64),
}

/// One task as it is handed in; everything borrowed from the frame or from the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubmitTask<'a> {
    /// The function's place in the frame's table of functions.
    pub function: u8,
    /// The name within the function, and within `key` if that is given too.
    pub task_id: Option<&'a str>,
    /// The ordering key.
    pub key: Option<&'a str>,
    /// See `Priority`.
    pub priority: Priority,
    /// See `Durability`.
    pub durability: Durability,
    /// See `Start`.
    pub start: Start,
    /// What the task counts in the round robin; 0 is the default of 1.
    pub cost: u16,
    /// Seconds after which a task that has not ended expires; 0 is the function's setting.
    pub max_age_s: u32,
    /// MIME type of the payload; empty if not said.
    pub content_type: &'a str,
    /// W3C trace context.
    pub traceparent: Option<&'a [u8; TRACEPARENT_BYTES]>,
    /// At most 8.
    pub tags: Tags<'a>,
    /// XXH3-64 of the payload with seed 0, where the caller has computed it: tells two payloads under one `task_id`
    /// apart. The server computes it otherwise.
    pub payload_hash: Option<u64>,
    /// The task's bytes.
    pub payload: &'a [u8],
}

impl<'a> SubmitTask<'a> {
    /// A task with defaults everywhere, for the first function of the frame.
    pub fn new(payload: &'a [u8]) -> SubmitTask<'a> {
        SubmitTask {
            function: 0,
            task_id: None,
            key: None,
            priority: Priority::Default,
            durability: Durability::Disk,
            start: Start::Now,
            cost: 0,
            max_age_s: 0,
            content_type: "",
            traceparent: None,
            tags: Tags::default(),
            payload_hash: None,
            payload,
        }
    }
}

/// The tags of a task as they lie on the wire: each one a length byte and UTF-8.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Tags<'a> {
    bytes: &'a [u8],
    count: u8,
}

impl<'a> Tags<'a> {
    /// Writes tags into `buffer`, which the answer borrows. Panics beyond `TAG_COUNT_MAX` tags or a tag that is empty
    /// or longer than `TAG_BYTES_MAX`: the caller has checked what its user gave.
    pub fn pack(tags: &[&str], buffer: &'a mut Vec<u8>) -> Tags<'a> {
        assert!(tags.len() <= TAG_COUNT_MAX);
        buffer.clear();
        for tag in tags {
            assert!(!tag.is_empty() && tag.len() <= TAG_BYTES_MAX);
            buffer.push(tag.len() as u8);
            buffer.extend_from_slice(tag.as_bytes());
        }
        Tags {
            bytes: buffer,
            count: tags.len() as u8,
        }
    }

    /// The tags as they lie on the wire.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Tags in the list.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// True without tags.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The tags in their order.
    pub fn iter(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let (&len, behind) = rest.split_first()?;
            let (tag, behind) = behind.split_at(usize::from(len));
            rest = behind;
            Some(std::str::from_utf8(tag).expect("tags are checked when they are read"))
        })
    }

    fn read(bytes: &'a [u8], count: u8) -> Result<Tags<'a>, &'static str> {
        if usize::from(count) > TAG_COUNT_MAX {
            return Err("a task has at most 8 tags");
        }
        let mut rest = bytes;
        for _ in 0..count {
            let split = rest
                .split_first()
                .and_then(|(&len, behind)| behind.split_at_checked(usize::from(len)));
            let Some((tag, behind)) = split else {
                return Err("the tags do not fit their length");
            };
            if tag.is_empty() || tag.len() > TAG_BYTES_MAX || std::str::from_utf8(tag).is_err() {
                return Err("a tag is 1 to 128 bytes of UTF-8");
            }
            rest = behind;
        }
        if !rest.is_empty() {
            return Err("the tags do not fit their length");
        }
        Ok(Tags { bytes, count })
    }
}

impl std::fmt::Debug for Tags<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Why one task of a sound frame is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskError {
    /// What the answer says.
    pub code: Code,
    /// The rule that is broken.
    pub what: &'static str,
}

impl TaskError {
    fn invalid(what: &'static str) -> TaskError {
        TaskError {
            code: Code::InvalidArgument,
            what,
        }
    }
}

const NAME_RULE: &str =
    "a name is 1 to 128 bytes: a letter or '_', then letters, digits, '_' and '-'";

/// A submit frame whose lengths add up.
pub struct SubmitView<'a> {
    body: &'a [u8],
    tasks_at: usize,
    count: usize,
    functions: [(u16, u8); SUBMIT_FUNCTIONS_MAX],
    function_count: usize,
    flags: u8,
}

impl<'a> SubmitView<'a> {
    /// Checks the frame as a whole: the table of functions, that every task lies within the body, that nothing
    /// follows. Allocates nothing.
    pub fn parse(frame: &'a Frame) -> Result<SubmitView<'a>, ProtocolError> {
        frame.check_flags(SUBMIT_NOTIFY | SUBMIT_RESULT)?;
        let mut cursor = Cursor::new(&frame.body);
        let function_count = usize::from(cursor.u8()?);
        if function_count > SUBMIT_FUNCTIONS_MAX {
            return Err(ProtocolError::invalid(
                "a submit frame names at most 64 functions",
                0,
            ));
        }
        let mut functions = [(0, 0); SUBMIT_FUNCTIONS_MAX];
        for function in &mut functions[..function_count] {
            let len = cursor.u8()?;
            *function = (cursor.offset() as u16, len);
            cursor.take(usize::from(len))?;
        }
        let tasks_at = cursor.offset();
        for _ in 0..frame.count {
            let fixed = cursor.array::<TASK_FIXED_BYTES>()?;
            cursor.take(variable_bytes(fixed))?;
        }
        cursor.end()?;
        Ok(SubmitView {
            body: &frame.body,
            tasks_at,
            count: usize::from(frame.count),
            functions,
            function_count,
            flags: frame.flags,
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

    /// True if the end of each task is to be told.
    pub fn notify(&self) -> bool {
        self.flags & SUBMIT_NOTIFY != 0
    }

    /// True if the end is told with the result.
    pub fn with_result(&self) -> bool {
        self.flags & SUBMIT_RESULT != 0
    }

    /// Names in the table of functions.
    pub fn function_count(&self) -> usize {
        self.function_count
    }

    /// The name at this place of the table, or `None` if there is none or it breaks the rule for names.
    pub fn function(&self, index: u8) -> Option<&'a str> {
        let index = usize::from(index);
        if index >= self.function_count {
            return None;
        }
        let (at, len) = self.functions[index];
        let bytes = &self.body[usize::from(at)..usize::from(at) + usize::from(len)];
        std::str::from_utf8(bytes)
            .ok()
            .filter(|name| name_is_valid(name))
    }

    /// The tasks in their order, each one checked. `payload_bytes_max` is what the welcome told.
    pub fn tasks(&self, payload_bytes_max: usize) -> SubmitIter<'a> {
        let mut usable = 0u64;
        for index in 0..self.function_count {
            if self.function(index as u8).is_some() {
                usable |= 1 << index;
            }
        }
        SubmitIter {
            cursor: {
                let mut cursor = Cursor::new(self.body);
                cursor
                    .take(self.tasks_at)
                    .expect("SubmitView::parse has read that far");
                cursor
            },
            left: self.count,
            usable,
            payload_bytes_max,
        }
    }
}

/// Iterates over the tasks of a sound submit frame.
pub struct SubmitIter<'a> {
    cursor: Cursor<'a>,
    left: usize,
    /// Bit i: function i of the table exists and its name keeps the rule.
    usable: u64,
    payload_bytes_max: usize,
}

impl<'a> Iterator for SubmitIter<'a> {
    type Item = Result<SubmitTask<'a>, TaskError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let checked = "SubmitView::parse has read the same bytes";
        let fixed = self.cursor.array::<TASK_FIXED_BYTES>().expect(checked);
        let variable = self.cursor.take(variable_bytes(fixed)).expect(checked);
        Some(read_task(
            fixed,
            variable,
            self.usable,
            self.payload_bytes_max,
        ))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// Bytes behind a task's fixed part, as its lengths say.
#[inline]
fn variable_bytes(fixed: &[u8; TASK_FIXED_BYTES]) -> usize {
    let flags = fixed[1];
    usize::from(fixed[4])
        + usize::from(fixed[5])
        + usize::from(fixed[6])
        + if flags & TASK_TRACEPARENT != 0 {
            TRACEPARENT_BYTES
        } else {
            0
        }
        + if flags & TASK_HASH != 0 { 8 } else { 0 }
        + usize::from(u16::from_le_bytes(field(fixed, 10)))
        + u32::from_le_bytes(field(fixed, 24)) as usize
}

#[inline]
fn read_task<'a>(
    fixed: &'a [u8; TASK_FIXED_BYTES],
    variable: &'a [u8],
    usable: u64,
    payload_bytes_max: usize,
) -> Result<SubmitTask<'a>, TaskError> {
    let flags = fixed[1];
    let function = fixed[0];
    if usize::from(function) >= SUBMIT_FUNCTIONS_MAX || usable & 1 << function == 0 {
        return Err(TaskError::invalid(
            "the function is not in the frame's table, or its name breaks the rule for names",
        ));
    }
    if flags & !TASK_FLAGS != 0 || fixed[7] != 0 {
        return Err(TaskError::invalid(
            "unknown task flags and reserved bytes must be zero",
        ));
    }
    let priority = match fixed[2] {
        0 => Priority::Default,
        1 => Priority::Interactive,
        2 => Priority::Standard,
        3 => Priority::Batch,
        _ => {
            return Err(TaskError::invalid(
                "priority is 0 (default), 1 (interactive), 2 (standard) or 3 (batch)",
            ));
        }
    };
    let cost = u16::from_le_bytes(field(fixed, 8));
    if cost > COST_MAX {
        return Err(TaskError::invalid("cost is at most 1000"));
    }
    let max_age_s = u32::from_le_bytes(field(fixed, 12));
    if max_age_s > MAX_AGE_S_MAX {
        return Err(TaskError::invalid("max age is at most 604800 seconds"));
    }
    let delay = u64::from_le_bytes(field(fixed, 16));
    let start = match (flags & TASK_AT != 0, delay) {
        (true, at) => Start::AtMs(at),
        (false, 0) => Start::Now,
        (false, delay) if delay <= DELAY_MS_MAX => Start::DelayMs(delay),
        (false, _) => return Err(TaskError::invalid("delay is at most 366 days")),
    };
    if u32::from_le_bytes(field(fixed, 24)) as usize > payload_bytes_max {
        return Err(TaskError {
            code: Code::PayloadTooLarge,
            what: "the payload is larger than payload_bytes_max of the welcome",
        });
    }
    let mut rest = variable;
    let task_id = read_name(&mut rest, fixed[4])?;
    if let Some(id) = task_id
        && id.len() == 33
        && RequestId::parse(id).is_some()
    {
        return Err(TaskError::invalid(
            "a task_id must not look like a request id: t and 32 hex digits",
        ));
    }
    let key = read_name(&mut rest, fixed[5])?;
    let content_type = read_content_type(split(&mut rest, usize::from(fixed[6])))?;
    let traceparent = if flags & TASK_TRACEPARENT != 0 {
        Some(read_traceparent(split(&mut rest, TRACEPARENT_BYTES))?)
    } else {
        None
    };
    let payload_hash =
        (flags & TASK_HASH != 0).then(|| u64::from_le_bytes(field(split(&mut rest, 8), 0)));
    let tags_len = usize::from(u16::from_le_bytes(field(fixed, 10)));
    let tags = if tags_len == 0 && fixed[3] == 0 {
        Tags::default()
    } else {
        Tags::read(split(&mut rest, tags_len), fixed[3]).map_err(TaskError::invalid)?
    };
    Ok(SubmitTask {
        function,
        task_id,
        key,
        priority,
        durability: if flags & TASK_MEMORY != 0 {
            Durability::Memory
        } else {
            Durability::Disk
        },
        start,
        cost,
        max_age_s,
        content_type,
        traceparent,
        tags,
        payload_hash,
        payload: rest,
    })
}

/// Takes bytes whose presence `variable_bytes` has settled.
#[inline]
fn split<'a>(rest: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, behind) = rest.split_at(len);
    *rest = behind;
    taken
}

#[inline]
fn read_name<'a>(rest: &mut &'a [u8], len: u8) -> Result<Option<&'a str>, TaskError> {
    if len == 0 {
        return Ok(None);
    }
    match std::str::from_utf8(split(rest, usize::from(len))) {
        Ok(name) if name_is_valid(name) => Ok(Some(name)),
        _ => Err(TaskError::invalid(NAME_RULE)),
    }
}

#[inline]
fn read_content_type(bytes: &[u8]) -> Result<&str, TaskError> {
    if bytes.len() > CONTENT_TYPE_BYTES_MAX || !bytes.iter().all(|b| (b' '..=b'~').contains(b)) {
        return Err(TaskError::invalid(
            "a content type is at most 128 printable ASCII bytes",
        ));
    }
    Ok(std::str::from_utf8(bytes).expect("ASCII is UTF-8"))
}

/// Checks the shape `vv-<32 hex>-<16 hex>-ff` of <https://www.w3.org/TR/trace-context/>.
fn read_traceparent(bytes: &[u8]) -> Result<&[u8; TRACEPARENT_BYTES], TaskError> {
    let bytes: &[u8; TRACEPARENT_BYTES] = bytes
        .try_into()
        .expect("the caller takes exactly that many bytes");
    let sound = bytes.iter().enumerate().all(|(at, &byte)| match at {
        2 | 35 | 52 => byte == b'-',
        _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
    });
    if !sound {
        return Err(TaskError::invalid(
            "a traceparent is 55 bytes: 00-<32 hex>-<16 hex>-<2 hex>",
        ));
    }
    Ok(bytes)
}

/// Why a task could not be added to a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PushError {
    /// Finish this frame and begin another.
    Full,
    /// A field breaks a rule; the server would refuse the task with the same error.
    Invalid(TaskError),
}

/// Writes one submit frame at the end of a buffer. Dropped without `finish`, it takes the frame back.
pub struct SubmitWriter<'b> {
    out: &'b mut BytesMut,
    at: usize,
    usable: u64,
    count: usize,
    body_bytes_max: usize,
    finished: bool,
}

impl<'b> SubmitWriter<'b> {
    /// Begins a frame with these flags (`SUBMIT_NOTIFY`, `SUBMIT_RESULT`) for these functions. `body_bytes_max` is
    /// the welcome's `frame_bytes_max`. Panics beyond `SUBMIT_FUNCTIONS_MAX` functions or on a name that is too long
    /// for its length byte.
    pub fn begin(
        out: &'b mut BytesMut,
        tag: u64,
        flags: u8,
        functions: &[&str],
        body_bytes_max: usize,
    ) -> SubmitWriter<'b> {
        assert!(functions.len() <= SUBMIT_FUNCTIONS_MAX);
        let at = frame::begin(out, FrameType::Submit, flags, tag);
        out.put_u8(functions.len() as u8);
        let mut usable = 0;
        for (index, function) in functions.iter().enumerate() {
            let len = u8::try_from(function.len()).expect("a function's name is at most 128 bytes");
            out.put_u8(len);
            out.put_slice(function.as_bytes());
            if name_is_valid(function) {
                usable |= 1 << index;
            }
        }
        SubmitWriter {
            out,
            at,
            usable,
            count: 0,
            body_bytes_max: body_bytes_max.min(FrameType::Submit.body_bytes_max()),
            finished: false,
        }
    }

    /// Adds a task. A task with a field that its length byte cannot hold is refused here; every other rule is left to
    /// the server, which has to check it anyway.
    pub fn push(&mut self, task: &SubmitTask<'_>) -> Result<(), PushError> {
        if self.count == SUBMIT_TASKS_MAX {
            return Err(PushError::Full);
        }
        let task_id = task.task_id.unwrap_or("");
        let key = task.key.unwrap_or("");
        if task_id.len() > NAME_BYTES_MAX || key.len() > NAME_BYTES_MAX {
            return Err(PushError::Invalid(TaskError::invalid(NAME_RULE)));
        }
        if task.content_type.len() > CONTENT_TYPE_BYTES_MAX {
            return Err(PushError::Invalid(TaskError::invalid(
                "a content type is at most 128 printable ASCII bytes",
            )));
        }
        if usize::from(task.function) >= SUBMIT_FUNCTIONS_MAX
            || self.usable & 1 << task.function == 0
        {
            return Err(PushError::Invalid(TaskError::invalid(
                "the function is not in the frame's table, or its name breaks the rule for names",
            )));
        }
        let mut flags = 0;
        let mut fixed = [0; TASK_FIXED_BYTES];
        let delay = match task.start {
            Start::Now => 0,
            Start::DelayMs(delay) => delay,
            Start::AtMs(at) => {
                flags |= TASK_AT;
                at
            }
        };
        match task.durability {
            Durability::Disk => {}
            Durability::Memory => flags |= TASK_MEMORY,
        }
        if task.traceparent.is_some() {
            flags |= TASK_TRACEPARENT;
        }
        if task.payload_hash.is_some() {
            flags |= TASK_HASH;
        }
        fixed[0] = task.function;
        fixed[1] = flags;
        fixed[2] = task.priority as u8;
        fixed[3] = task.tags.count;
        fixed[4] = task_id.len() as u8;
        fixed[5] = key.len() as u8;
        fixed[6] = task.content_type.len() as u8;
        fixed[8..10].copy_from_slice(&task.cost.to_le_bytes());
        fixed[10..12].copy_from_slice(&(task.tags.bytes.len() as u16).to_le_bytes());
        fixed[12..16].copy_from_slice(&task.max_age_s.to_le_bytes());
        fixed[16..24].copy_from_slice(&delay.to_le_bytes());
        let oversize = PushError::Invalid(TaskError {
            code: Code::PayloadTooLarge,
            what: "the payload is larger than a frame",
        });
        let payload_len = u32::try_from(task.payload.len()).map_err(|_| oversize)?;
        fixed[24..28].copy_from_slice(&payload_len.to_le_bytes());
        let bytes = TASK_FIXED_BYTES + variable_bytes(&fixed);
        if self.body_len() + bytes > self.body_bytes_max {
            return Err(if self.count == 0 {
                oversize
            } else {
                PushError::Full
            });
        }
        self.out.reserve(bytes);
        self.out.put_slice(&fixed);
        self.out.put_slice(task_id.as_bytes());
        self.out.put_slice(key.as_bytes());
        self.out.put_slice(task.content_type.as_bytes());
        if let Some(traceparent) = task.traceparent {
            self.out.put_slice(traceparent);
        }
        if let Some(hash) = task.payload_hash {
            self.out.put_u64_le(hash);
        }
        self.out.put_slice(task.tags.bytes);
        self.out.put_slice(task.payload);
        self.count += 1;
        Ok(())
    }

    /// Tasks written.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the body so far.
    pub fn body_len(&self) -> usize {
        self.out.len() - self.at - HEADER_BYTES
    }

    /// Completes the header.
    pub fn finish(mut self) {
        frame::end(self.out, self.at, FrameType::Submit, self.count);
        self.finished = true;
    }
}

impl Drop for SubmitWriter<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.out.truncate(self.at);
        }
    }
}

/// Answer flag: the task is on disk.
pub const ANSWER_DURABLE: u8 = 1;
/// Answer flag: the `task_id` was there already; the request id is the first one's.
pub const ANSWER_DUPLICATE: u8 = 2;
/// Set by the writer on a run of accepted tasks whose request ids follow from the first one.
const ANSWER_SEQUENTIAL: u8 = 0x80;

const RUN_BYTES: usize = 32;
const TEXTS_MAX: usize = 255;

/// What became of one task of a submit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TaskAnswer<'a> {
    /// The task's place in its submit frame.
    pub index: u16,
    /// `Ok` for an accepted one.
    pub code: Code,
    /// `ANSWER_DURABLE`, `ANSWER_DUPLICATE`.
    pub flags: u8,
    /// For a refusal: when to try again; 0 if that is not known.
    pub retry_after_ms: u32,
    /// The task's identity; for `IdReused` the identity of the task that has the name; 0 for other refusals.
    pub request_id: RequestId,
    /// For a refusal: a sentence; may be empty.
    pub text: &'a str,
}

/// Writes one answer frame. Neighbouring tasks that fared alike become one run of 32 bytes, so that 512 accepted
/// tasks with ids in sequence cost as much as one. Dropped without `finish`, it takes the frame back.
pub struct AnswerWriter<'b> {
    out: &'b mut BytesMut,
    at: usize,
    runs: usize,
    run: Option<Run>,
    texts: Vec<&'b str>,
    text_bytes: usize,
    finished: bool,
}

#[derive(Clone, Copy)]
struct Run {
    first: u16,
    count: u16,
    code: Code,
    flags: u8,
    text: u8,
    retry_after_ms: u32,
    slot_step: i32,
    request_id: RequestId,
}

impl<'b> AnswerWriter<'b> {
    /// Begins an answer to the submit with this tag.
    pub fn begin(out: &'b mut BytesMut, tag: u64) -> AnswerWriter<'b> {
        let at = frame::begin(out, FrameType::SubmitAnswer, 0, tag);
        AnswerWriter {
            out,
            at,
            runs: 0,
            run: None,
            texts: Vec::new(),
            text_bytes: 0,
            finished: false,
        }
    }

    /// Adds the answer of one task. Any order is allowed; ascending indices make runs. A text beyond the room for
    /// texts is left out: the code says enough. A whole submit's answers always fit one frame.
    pub fn push(&mut self, answer: &TaskAnswer<'b>) {
        let text = self.text(answer.text);
        if let Some(run) = &mut self.run {
            if run.extend(answer, text) {
                return;
            }
            let done = *run;
            self.put(done);
        }
        self.run = Some(Run {
            first: answer.index,
            count: 1,
            code: answer.code,
            flags: answer.flags & (ANSWER_DURABLE | ANSWER_DUPLICATE),
            text,
            retry_after_ms: answer.retry_after_ms,
            slot_step: 0,
            request_id: answer.request_id,
        });
    }

    /// Completes the frame.
    pub fn finish(mut self) {
        if let Some(run) = self.run.take() {
            self.put(run);
        }
        if !self.texts.is_empty() {
            self.out.put_u8(self.texts.len() as u8);
            for text in &self.texts {
                self.out.put_u16_le(text.len() as u16);
                self.out.put_slice(text.as_bytes());
            }
        }
        frame::end(self.out, self.at, FrameType::SubmitAnswer, self.runs);
        self.finished = true;
    }

    fn put(&mut self, run: Run) {
        let mut bytes = [0; RUN_BYTES];
        bytes[0..2].copy_from_slice(&run.first.to_le_bytes());
        bytes[2..4].copy_from_slice(&run.count.to_le_bytes());
        bytes[4..6].copy_from_slice(&(run.code as u16).to_le_bytes());
        bytes[6] = run.flags;
        bytes[7] = run.text;
        bytes[8..12].copy_from_slice(&run.retry_after_ms.to_le_bytes());
        bytes[12..16].copy_from_slice(&run.slot_step.to_le_bytes());
        bytes[16..32].copy_from_slice(&run.request_id.0.to_le_bytes());
        self.out.put_slice(&bytes);
        self.runs += 1;
    }

    /// The number of a sentence in the table, counted from 1; 0 for none.
    fn text(&mut self, text: &'b str) -> u8 {
        let text = cut(text, ERROR_BYTES_MAX);
        if text.is_empty() {
            return 0;
        }
        if let Some(known) = self.texts.iter().position(|known| *known == text) {
            return known as u8 + 1;
        }
        let room = FrameType::SubmitAnswer.body_bytes_max() - SUBMIT_TASKS_MAX * RUN_BYTES - 1;
        if self.texts.len() == TEXTS_MAX || self.text_bytes + 2 + text.len() > room {
            return 0;
        }
        self.text_bytes += 2 + text.len();
        self.texts.push(text);
        self.texts.len() as u8
    }
}

impl Drop for AnswerWriter<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.out.truncate(self.at);
        }
    }
}

impl Run {
    /// Takes the next task into the run if the run still says everything about it.
    fn extend(&mut self, answer: &TaskAnswer<'_>, text: u8) -> bool {
        let flags = self.flags & !ANSWER_SEQUENTIAL;
        if usize::from(answer.index) != usize::from(self.first) + usize::from(self.count)
            || answer.code != self.code
            || answer.flags != flags
            || answer.retry_after_ms != self.retry_after_ms
            || text != self.text
        {
            return false;
        }
        let sequential = if self.count == 1 {
            if answer.request_id == self.request_id {
                None
            } else {
                Some(
                    answer
                        .request_id
                        .slot()
                        .0
                        .wrapping_sub(self.request_id.slot().0) as i32,
                )
            }
        } else if self.flags & ANSWER_SEQUENTIAL != 0 {
            Some(self.slot_step)
        } else {
            None
        };
        match sequential {
            None if answer.request_id == self.request_id => {}
            Some(step) if id_in_run(self.request_id, step, self.count) == answer.request_id => {
                self.flags |= ANSWER_SEQUENTIAL;
                self.slot_step = step;
            }
            _ => return false,
        }
        self.count += 1;
        true
    }
}

/// The id of the `nth` task of a sequential run: the sequence number counts up by one, the slot by `slot_step`, both
/// wrapping within their 40 and 32 bits.
fn id_in_run(first: RequestId, slot_step: i32, nth: u16) -> RequestId {
    let high = first.0 >> 72 << 72;
    let seq = (first.seq() + u64::from(nth)) & RequestId::SEQ_MAX;
    let slot = first
        .slot()
        .0
        .wrapping_add((slot_step as u32).wrapping_mul(u32::from(nth)));
    RequestId(high | u128::from(seq) << 32 | u128::from(slot))
}

/// A checked answer frame.
pub struct AnswerView<'a> {
    runs: &'a [u8],
    texts: &'a [u8],
}

impl<'a> AnswerView<'a> {
    /// Checks the frame as a whole.
    pub fn parse(frame: &'a Frame) -> Result<AnswerView<'a>, ProtocolError> {
        frame.check_flags(0)?;
        let mut cursor = Cursor::new(&frame.body);
        let runs = cursor.take(usize::from(frame.count) * RUN_BYTES)?;
        let texts = cursor.rest();
        let mut text_count = 0;
        if !texts.is_empty() {
            text_count = cursor.u8()?;
            for _ in 0..text_count {
                let len = usize::from(cursor.u16()?);
                cursor.text(len)?;
            }
        }
        cursor.end()?;
        let mut tasks = 0;
        for (nth, run) in runs.chunks_exact(RUN_BYTES).enumerate() {
            let offset = nth * RUN_BYTES;
            let first = usize::from(u16::from_le_bytes(field(run, 0)));
            let count = usize::from(u16::from_le_bytes(field(run, 2)));
            tasks += count;
            if count == 0 || first + count > SUBMIT_TASKS_MAX || tasks > SUBMIT_TASKS_MAX {
                return Err(ProtocolError::invalid(
                    "a run lies within the tasks of a submit",
                    offset,
                ));
            }
            if run[7] > text_count {
                return Err(ProtocolError::invalid(
                    "a run names a text that is not there",
                    offset + 7,
                ));
            }
        }
        Ok(AnswerView { runs, texts })
    }

    /// Tasks answered.
    pub fn len(&self) -> usize {
        self.runs
            .chunks_exact(RUN_BYTES)
            .map(|run| usize::from(u16::from_le_bytes(field(run, 2))))
            .sum()
    }

    /// True for an answer about no task.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Accepted tasks, counted run by run: what a load generator needs.
    pub fn accepted(&self) -> usize {
        self.runs
            .chunks_exact(RUN_BYTES)
            .filter(|run| u16::from_le_bytes(field(run, 4)) == Code::Ok as u16)
            .map(|run| usize::from(u16::from_le_bytes(field(run, 2))))
            .sum()
    }

    /// The answers task by task. A code that this version does not know reads as `Internal`.
    pub fn iter(&self) -> impl Iterator<Item = TaskAnswer<'a>> + use<'a> {
        let texts = self.texts;
        self.runs.chunks_exact(RUN_BYTES).flat_map(move |run| {
            let first = u16::from_le_bytes(field(run, 0));
            let count = u16::from_le_bytes(field(run, 2));
            let code =
                Code::from_number(u16::from_le_bytes(field(run, 4))).unwrap_or(Code::Internal);
            let flags = run[6];
            let text = text_at(texts, run[7]);
            let retry_after_ms = u32::from_le_bytes(field(run, 8));
            let slot_step = i32::from_le_bytes(field(run, 12));
            let request_id = RequestId(u128::from_le_bytes(field(run, 16)));
            (0..count).map(move |nth| TaskAnswer {
                index: first + nth,
                code,
                flags: flags & !ANSWER_SEQUENTIAL,
                retry_after_ms,
                request_id: if flags & ANSWER_SEQUENTIAL != 0 {
                    id_in_run(request_id, slot_step, nth)
                } else {
                    request_id
                },
                text,
            })
        })
    }
}

fn text_at(texts: &[u8], number: u8) -> &str {
    if number == 0 {
        return "";
    }
    let checked = "AnswerView::parse has read the table";
    let mut cursor = Cursor::new(texts);
    cursor.u8().expect(checked);
    for _ in 1..number {
        let len = usize::from(cursor.u16().expect(checked));
        cursor.take(len).expect(checked);
    }
    let len = usize::from(cursor.u16().expect(checked));
    cursor.text(len).expect(checked)
}

/// Where a task stands, as callers see it. The numbers are the wire's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum TaskStatus {
    /// Delayed.
    Scheduled = 1,
    /// Waiting.
    Enqueued = 2,
    /// Fetched into memory.
    Dequeued = 3,
    /// Leased to an executor.
    Running = 4,
    /// Waiting for its next attempt.
    Retrying = 5,
    /// Held until it is resumed.
    Paused = 6,
    /// A stop is under way.
    Stopping = 7,
    /// Ended well.
    Succeeded = 8,
    /// Ended after its last attempt failed.
    Failed = 9,
    /// Ended by a stop.
    Stopped = 10,
    /// Too old.
    Expired = 11,
    /// Its function is gone.
    Invalid = 12,
}

impl TaskStatus {
    /// Every status, in the order of the numbers.
    pub const ALL: &'static [TaskStatus] = &[
        TaskStatus::Scheduled,
        TaskStatus::Enqueued,
        TaskStatus::Dequeued,
        TaskStatus::Running,
        TaskStatus::Retrying,
        TaskStatus::Paused,
        TaskStatus::Stopping,
        TaskStatus::Succeeded,
        TaskStatus::Failed,
        TaskStatus::Stopped,
        TaskStatus::Expired,
        TaskStatus::Invalid,
    ];

    /// The status with this number.
    pub fn from_number(number: u8) -> Option<TaskStatus> {
        TaskStatus::ALL
            .get(usize::from(number).checked_sub(1)?)
            .copied()
    }

    /// The name that callers know, such as `Succeeded`.
    pub fn name(self) -> &'static str {
        match self {
            TaskStatus::Scheduled => "Scheduled",
            TaskStatus::Enqueued => "Enqueued",
            TaskStatus::Dequeued => "Dequeued",
            TaskStatus::Running => "Running",
            TaskStatus::Retrying => "Retrying",
            TaskStatus::Paused => "Paused",
            TaskStatus::Stopping => "Stopping",
            TaskStatus::Succeeded => "Succeeded",
            TaskStatus::Failed => "Failed",
            TaskStatus::Stopped => "Stopped",
            TaskStatus::Expired => "Expired",
            TaskStatus::Invalid => "Invalid",
        }
    }
}

const FINISHED_FIXED_BYTES: usize = 40;
const FINISHED_RESULT: u8 = 1;

/// A task is terminal: an item of a `Finished` frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finished<'a> {
    /// The tag of the submit, or of the wait, that asked.
    pub tag: u64,
    /// The task's place in its submit; 0 for a wait.
    pub index: u32,
    /// The task.
    pub request_id: RequestId,
    /// A terminal status.
    pub status: TaskStatus,
    /// `Ok` if it succeeded, else why it did not.
    pub code: Code,
    /// Attempts that were made.
    pub attempts: u16,
    /// The last attempt's error; empty if there was none.
    pub error: &'a str,
    /// The result, where it was asked for and there is one.
    pub result: Option<&'a [u8]>,
}

impl<'a> Layout<'a> for Finished<'a> {
    fn read(cursor: &mut CursorOf<'a>) -> Result<Finished<'a>, ProtocolError> {
        let offset = cursor.0.offset();
        let fixed = cursor.0.array::<FINISHED_FIXED_BYTES>()?;
        let Some(status) = TaskStatus::from_number(fixed[28]) else {
            return Err(ProtocolError::invalid("unknown task status", offset + 28));
        };
        if fixed[29] & !FINISHED_RESULT != 0 {
            return Err(ProtocolError::invalid(
                "unknown flags must be zero",
                offset + 29,
            ));
        }
        let error = cursor
            .0
            .text(usize::from(u16::from_le_bytes(field(fixed, 34))))?;
        let result = cursor
            .0
            .take(u32::from_le_bytes(field(fixed, 36)) as usize)?;
        Ok(Finished {
            tag: u64::from_le_bytes(field(fixed, 0)),
            request_id: RequestId(u128::from_le_bytes(field(fixed, 8))),
            index: u32::from_le_bytes(field(fixed, 24)),
            status,
            code: Code::from_number(u16::from_le_bytes(field(fixed, 30))).unwrap_or(Code::Internal),
            attempts: u16::from_le_bytes(field(fixed, 32)),
            error,
            result: (fixed[29] & FINISHED_RESULT != 0).then_some(result),
        })
    }

    fn write(&self, out: &mut BytesMut) {
        let error = cut(self.error, ERROR_BYTES_MAX);
        let result = self.result.unwrap_or(&[]);
        let mut fixed = [0; FINISHED_FIXED_BYTES];
        fixed[0..8].copy_from_slice(&self.tag.to_le_bytes());
        fixed[8..24].copy_from_slice(&self.request_id.0.to_le_bytes());
        fixed[24..28].copy_from_slice(&self.index.to_le_bytes());
        fixed[28] = self.status as u8;
        fixed[29] = if self.result.is_some() {
            FINISHED_RESULT
        } else {
            0
        };
        fixed[30..32].copy_from_slice(&(self.code as u16).to_le_bytes());
        fixed[32..34].copy_from_slice(&self.attempts.to_le_bytes());
        fixed[34..36].copy_from_slice(&(error.len() as u16).to_le_bytes());
        fixed[36..40].copy_from_slice(&(result.len() as u32).to_le_bytes());
        out.put_slice(&fixed);
        out.put_slice(error.as_bytes());
        out.put_slice(result);
    }
}

const STOP_BYTES: usize = 20;

/// Ends a task: an item of a `Stop` frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop {
    /// The task.
    pub request_id: RequestId,
    /// What a running attempt gets to end by itself.
    pub grace_ms: u32,
}

impl<'a> Layout<'a> for Stop {
    fn read(cursor: &mut CursorOf<'a>) -> Result<Stop, ProtocolError> {
        let fixed = cursor.0.array::<STOP_BYTES>()?;
        Ok(Stop {
            request_id: RequestId(u128::from_le_bytes(field(fixed, 0))),
            grace_ms: u32::from_le_bytes(field(fixed, 16)),
        })
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_u128_le(self.request_id.0);
        out.put_u32_le(self.grace_ms);
    }
}

/// What became of a stop: an item of a `StopAnswer` frame, in the order asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StopAnswer {
    /// The task.
    pub request_id: RequestId,
    /// `Ok`, `NotFound`, or `FailedPrecondition` for a task that has ended.
    pub code: Code,
    /// Where the task stands now: `Stopping` or `Stopped` after `Ok`; `None` if it is not known.
    pub status: Option<TaskStatus>,
}

impl<'a> Layout<'a> for StopAnswer {
    fn read(cursor: &mut CursorOf<'a>) -> Result<StopAnswer, ProtocolError> {
        let offset = cursor.0.offset();
        let fixed = cursor.0.array::<STOP_BYTES>()?;
        let status = TaskStatus::from_number(fixed[18]);
        if status.is_none() && fixed[18] != 0 {
            return Err(ProtocolError::invalid("unknown task status", offset + 18));
        }
        if fixed[19] != 0 {
            return Err(ProtocolError::invalid(
                "reserved bytes must be zero",
                offset + 19,
            ));
        }
        Ok(StopAnswer {
            request_id: RequestId(u128::from_le_bytes(field(fixed, 0))),
            code: Code::from_number(u16::from_le_bytes(field(fixed, 16))).unwrap_or(Code::Internal),
            status,
        })
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_u128_le(self.request_id.0);
        out.put_u16_le(self.code as u16);
        out.put_u8(self.status.map_or(0, |status| status as u8));
        out.put_u8(0);
    }
}

/// Which task is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TaskRef<'a> {
    /// By request id.
    Request(RequestId),
    /// By the name that the caller gave.
    Given {
        /// The function.
        function: &'a str,
        /// The ordering key, for a task that has one.
        key: Option<&'a str>,
        /// The name.
        task_id: &'a str,
    },
}

/// Wait frame flag: answer with the result's bytes.
pub const WAIT_RESULT: u8 = 1;

/// Asks to be told when a task is terminal: answered by a `Finished` frame with one item and the wait's tag, or by an
/// error frame, `DeadlineExceeded` when the time is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wait<'a> {
    /// The task.
    pub task: TaskRef<'a>,
    /// How long to wait; 0 answers at once.
    pub timeout_ms: u32,
    /// Whether the answer is to have the result.
    pub with_result: bool,
}

impl<'a> Wait<'a> {
    /// Appends the frame. Panics if a name is longer than a name may be.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        let flags = if self.with_result { WAIT_RESULT } else { 0 };
        let at = frame::begin(out, FrameType::Wait, flags, tag);
        out.put_u32_le(self.timeout_ms);
        match self.task {
            TaskRef::Request(id) => {
                out.put_u32_le(0);
                out.put_u128_le(id.0);
            }
            TaskRef::Given {
                function,
                key,
                task_id,
            } => {
                out.put_u8(1);
                let names = [function, key.unwrap_or(""), task_id];
                for name in names {
                    assert!(name.len() <= NAME_BYTES_MAX);
                    out.put_u8(name.len() as u8);
                }
                for name in names {
                    out.put_slice(name.as_bytes());
                }
            }
        }
        frame::end(out, at, FrameType::Wait, 0);
    }

    /// Reads the body.
    pub fn parse(frame: &'a Frame) -> Result<Wait<'a>, ProtocolError> {
        frame.check_flags(WAIT_RESULT)?;
        let mut cursor = Cursor::new(&frame.body);
        let timeout_ms = cursor.u32()?;
        let kind = cursor.u8()?;
        let lens = *cursor.array::<3>()?;
        let task = match kind {
            0 if lens == [0; 3] => TaskRef::Request(RequestId(cursor.u128()?)),
            1 => {
                let function = cursor.name(usize::from(lens[0]))?;
                let key = cursor.name(usize::from(lens[1]))?;
                let task_id = cursor.name(usize::from(lens[2]))?;
                let (Some(function), Some(task_id)) = (function, task_id) else {
                    return Err(cursor.error("a task's name has a function and a task_id"));
                };
                TaskRef::Given {
                    function,
                    key,
                    task_id,
                }
            }
            _ => {
                return Err(ProtocolError::invalid(
                    "a task is named by 0 (request id) or 1 (function, key, task_id)",
                    4,
                ));
            }
        };
        cursor.end()?;
        Ok(Wait {
            task,
            timeout_ms,
            with_result: frame.flags & WAIT_RESULT != 0,
        })
    }
}
