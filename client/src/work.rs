//! What an executor is doing: attempts that run, outcomes on their way to the disk of the server. No input or output
//! here; frames come in, bytes to be sent come out.
//!
//! An attempt is in exactly one place: in `running` until its outcome is written into a frame, in `unacked` until the
//! server says that the outcome is durable, or in `held` if it has to be presented again. So whatever happens to the
//! connection, each attempt's lease can be named to the next one, and its outcome is not lost.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pelton_net::Code;
use pelton_net::error::ProtocolError;
use pelton_net::execute::{
    Cancel, ExecuteTask, OutcomeStatus, RefusedOutcome, ResumedLease, TaskOutcome,
};
use pelton_net::frame::{Frame, FrameType, HEADER_BYTES, LEASES_PER_FRAME_MAX};
use pelton_net::item::{ItemWriter, Items};
use pelton_net::session::Lease;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::attempt::{Attempt, Control, End, TaskError};
use crate::link::{HELLO_TAG, Limits};

/// Bytes of outcomes that the server has not acknowledged; beyond it new attempts are rejected.
const UNACKED_BYTES_MAX: usize = 64 << 20;
/// Where an outcome's variable parts begin.
const OUTCOME_FIXED_BYTES: usize = 40;

/// Room for a result that is reserved ahead.
const RESULT_BYTES_USUAL: usize = 8;

/// Runs an attempt on the current thread and writes its result into the buffer.
pub(crate) type InlineHandler =
    Box<dyn FnMut(&ExecuteTask<'_>, &mut Vec<u8>) -> Result<(), TaskError> + Send>;
/// Starts an attempt as a task of the runtime.
pub(crate) type SpawningHandler = Box<dyn Fn(Attempt, Finisher) -> AbortHandle + Send>;

/// How attempts of a function are executed.
pub(crate) enum Handler {
    Inline(InlineHandler),
    Spawning(SpawningHandler),
}

/// A function that this executor offers. Its place in the list is its number on the wire.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) slots: u32,
    pub(crate) handler: Handler,
}

/// Owned by the executor's one task.
pub(crate) struct Work {
    pub(crate) functions: Vec<Function>,
    limits: Limits,
    running: HashMap<Lease, Running>,
    graces: Vec<(Instant, Lease)>,
    done: Arc<DoneQueue>,
    drained: Vec<Done>,
    outbox: Outbox,
    unacked: VecDeque<Sent>,
    unacked_bytes: usize,
    held: HashMap<Lease, Done>,
    resuming: VecDeque<(u64, Vec<Lease>)>,
    result: Vec<u8>,
    closing: bool,
}

struct Running {
    abort: AbortHandle,
    control: Arc<Control>,
}

/// An outcome frame as it was sent.
struct Sent {
    tag: u64,
    frame: Bytes,
}

/// Frames that are being written, and which parts of the buffer are outcome frames.
struct Outbox {
    buffer: BytesMut,
    outcomes: Vec<(u64, usize, usize)>,
    next_tag: u64,
}

impl Work {
    pub(crate) fn new(functions: Vec<Function>, limits: Limits) -> Work {
        Work {
            functions,
            limits,
            running: HashMap::new(),
            graces: Vec::new(),
            done: Arc::new(DoneQueue {
                list: Mutex::new(Vec::new()),
                wake: Notify::new(),
            }),
            drained: Vec::new(),
            outbox: Outbox {
                buffer: BytesMut::new(),
                outcomes: Vec::new(),
                next_tag: HELLO_TAG + 1,
            },
            unacked: VecDeque::new(),
            unacked_bytes: 0,
            held: HashMap::new(),
            resuming: VecDeque::new(),
            result: Vec::new(),
            closing: false,
        }
    }

    /// Where attempts report that they have ended.
    pub(crate) fn done(&self) -> Arc<DoneQueue> {
        self.done.clone()
    }

    /// Begins a frame that this module does not write itself: where to, and its tag.
    pub(crate) fn frame(&mut self) -> (&mut BytesMut, u64) {
        let tag = self.outbox.take_tag();
        (&mut self.outbox.buffer, tag)
    }

    /// Executes or starts the attempts of an execute frame.
    pub(crate) fn on_execute(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let tasks = Items::<ExecuteTask<'_>>::parse(frame)?;
        let full = self.closing || self.unacked_bytes > UNACKED_BYTES_MAX;
        let mut sink = self.outbox.outcomes(&self.limits, tasks.len());
        let mut then = Instant::now();
        for task in tasks.iter() {
            let lease = Lease {
                request_id: task.request_id,
                token: task.token,
            };
            let Some(function) = self.functions.get_mut(usize::from(task.function)) else {
                return Err(ProtocolError {
                    code: Code::InvalidArgument,
                    what: "a task of a function that was not registered",
                    offset: 0,
                });
            };
            if full {
                sink.push(&TaskOutcome::new(lease, OutcomeStatus::Rejected));
                continue;
            }
            match &mut function.handler {
                Handler::Inline(handler) => {
                    self.result.clear();
                    let result = &mut self.result;
                    let ended = catch_unwind(AssertUnwindSafe(|| handler(&task, result)))
                        .unwrap_or_else(|_| Err(TaskError::failed(PANICKED)));
                    let now = Instant::now();
                    let run_us = micros(now - then);
                    then = now;
                    match &ended {
                        Ok(()) => sink.push(&TaskOutcome {
                            run_us,
                            result: &self.result,
                            ..TaskOutcome::new(lease, OutcomeStatus::Succeeded)
                        }),
                        Err(error) => sink.push(&TaskOutcome {
                            run_us,
                            ..failure(lease, error)
                        }),
                    }
                }
                Handler::Spawning(start) => {
                    let control = Arc::new(Control::default());
                    let attempt = Attempt::new(&task, &frame.body, control.clone());
                    let finisher = Finisher {
                        lease,
                        started: Instant::now(),
                        control: control.clone(),
                        queue: self.done.clone(),
                        told: false,
                    };
                    let abort = start(attempt, finisher);
                    self.running.insert(lease, Running { abort, control });
                }
            }
        }
        sink.finish();
        Ok(())
    }

    /// Writes the outcomes of attempts that have ended.
    pub(crate) fn drain(&mut self) {
        if !self.resuming.is_empty() {
            // Which of them are still wanted is being asked.
            return;
        }
        self.done.take(&mut self.drained);
        if self.drained.is_empty() {
            return;
        }
        let mut sink = self.outbox.outcomes(&self.limits, self.drained.len());
        for done in self.drained.drain(..) {
            // An attempt whose lease was lost has been forgotten.
            if self.running.remove(&done.lease).is_some() {
                sink.push(&done.outcome());
            }
        }
        sink.finish();
    }

    /// Takes what is to be sent, and keeps the outcomes among it until they are acknowledged.
    pub(crate) fn take_bytes(&mut self) -> Bytes {
        let bytes = self.outbox.buffer.split().freeze();
        for (tag, start, end) in self.outbox.outcomes.drain(..) {
            self.unacked_bytes += end - start;
            self.unacked.push_back(Sent {
                tag,
                frame: bytes.slice(start..end),
            });
        }
        bytes
    }

    /// The outcomes of one frame are durable, but for those listed.
    pub(crate) fn on_ack(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let refused = Items::<RefusedOutcome>::parse(frame)?;
        let Some(sent) = self.take_unacked(frame.tag) else {
            return Ok(());
        };
        if refused.is_empty() {
            return Ok(());
        }
        let mut outcomes: Vec<Option<Done>> = outcomes_of(&sent)?.into_iter().map(Some).collect();
        for refusal in refused.iter() {
            let place = outcomes.get_mut(usize::from(refusal.index));
            let Some(done) = place.and_then(Option::take) else {
                continue;
            };
            match refusal.code {
                Code::Unavailable => {
                    self.held.insert(done.lease, done);
                }
                code => {
                    tracing::warn!(task = %done.lease.request_id, %code, "outcome was not taken");
                }
            }
        }
        Ok(())
    }

    /// A frame was refused as a whole. Outcomes in it are presented again where that makes sense. True if there were any.
    pub(crate) fn on_refused_frame(
        &mut self,
        tag: u64,
        again: bool,
    ) -> Result<bool, ProtocolError> {
        let Some(sent) = self.take_unacked(tag) else {
            return Ok(false);
        };
        if again {
            for done in outcomes_of(&sent)? {
                self.held.insert(done.lease, done);
            }
        }
        Ok(true)
    }

    /// Asks attempts to end.
    pub(crate) fn on_cancel(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let cancels = Items::<Cancel>::parse(frame)?;
        let now = Instant::now();
        for cancel in cancels.iter() {
            if let Some(running) = self.running.get(&cancel.lease) {
                running.control.ask_for_end(End::Cancelled);
                let grace = Duration::from_millis(u64::from(cancel.grace_ms));
                self.graces.push((now + grace, cancel.lease));
            }
        }
        Ok(())
    }

    /// When the next grace is over.
    pub(crate) fn next_grace(&self) -> Option<Instant> {
        self.graces.iter().map(|(end, _)| *end).min()
    }

    /// Drops the handlers whose grace is over; their outcome will be that they were stopped.
    pub(crate) fn end_graces(&mut self, now: Instant) {
        let running = &self.running;
        self.graces.retain(|(end, lease)| {
            let over = *end <= now;
            if over && let Some(attempt) = running.get(lease) {
                attempt.abort.abort();
            }
            !over
        });
    }

    /// Shows that the executor lives and what it holds, and presents what was not taken before.
    pub(crate) fn heartbeat(&mut self) {
        let mut leases = self.running.keys().chain(self.held.keys()).peekable();
        loop {
            let tag = self.outbox.take_tag();
            let mut writer = ItemWriter::begin(&mut self.outbox.buffer, FrameType::Heartbeat, tag);
            for lease in leases.by_ref().take(LEASES_PER_FRAME_MAX) {
                writer
                    .push(lease)
                    .expect("as many leases as a frame may have fit it");
            }
            writer.finish();
            if leases.peek().is_none() {
                break;
            }
        }
        self.present_held();
    }

    /// Leases that the server has given to others: their attempts end, unheard.
    pub(crate) fn on_lost(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        for lease in Items::<Lease>::parse(frame)?.iter() {
            tracing::warn!(task = %lease.request_id, "lease lost");
            self.forget(&lease);
        }
        Ok(())
    }

    /// The connection is gone: what was not acknowledged has to be presented to the next one.
    pub(crate) fn on_disconnect(&mut self) -> Result<(), ProtocolError> {
        let _ = self.take_bytes();
        self.resuming.clear();
        self.unacked_bytes = 0;
        for sent in mem::take(&mut self.unacked) {
            for done in outcomes_of(&sent)? {
                self.held.insert(done.lease, done);
            }
        }
        Ok(())
    }

    /// Writes resume frames with all leases. A full frame says that another one follows.
    pub(crate) fn resume(&mut self, limits: Limits) {
        self.limits = limits;
        let mut leases: Vec<Lease> = self
            .running
            .keys()
            .chain(self.held.keys())
            .copied()
            .collect();
        loop {
            let rest = leases.split_off(leases.len().min(LEASES_PER_FRAME_MAX));
            let tag = self.outbox.take_tag();
            let mut writer = ItemWriter::begin(&mut self.outbox.buffer, FrameType::Resume, tag);
            for lease in &leases {
                writer
                    .push(lease)
                    .expect("as many leases as a frame may have fit it");
            }
            writer.finish();
            let full = leases.len() == LEASES_PER_FRAME_MAX;
            self.resuming.push_back((tag, leases));
            if !full {
                return;
            }
            leases = rest;
        }
    }

    /// Learns which leases are still valid. True once all have been answered.
    pub(crate) fn on_resumed(&mut self, frame: &Frame) -> Result<bool, ProtocolError> {
        let verdicts = Items::<ResumedLease>::parse(frame)?;
        let place = self.resuming.iter().position(|(tag, _)| *tag == frame.tag);
        let Some((_, leases)) = place.and_then(|place| self.resuming.remove(place)) else {
            return Ok(false);
        };
        if leases.len() != verdicts.len() {
            return Err(ProtocolError {
                code: Code::InvalidArgument,
                what: "a resumed frame answers every lease of its resume",
                offset: 0,
            });
        }
        for (lease, verdict) in leases.iter().zip(verdicts.iter()) {
            match verdict {
                ResumedLease::Kept => {}
                ResumedLease::Refused | ResumedLease::Known => self.forget(lease),
            }
        }
        if !self.resuming.is_empty() {
            return Ok(false);
        }
        self.present_held();
        Ok(true)
    }

    /// From now on new attempts are rejected.
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// Drops the handlers that still run.
    pub(crate) fn end_all(&mut self) {
        for running in self.running.values() {
            running.control.ask_for_end(End::Closed);
            running.abort.abort();
        }
    }

    /// True if nothing runs and nothing waits to be acknowledged.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.held.is_empty()
            && self.unacked.is_empty()
            && self.outbox.outcomes.is_empty()
    }

    fn present_held(&mut self) {
        if self.held.is_empty() || !self.resuming.is_empty() {
            return;
        }
        let mut sink = self.outbox.outcomes(&self.limits, self.held.len());
        for (_, done) in self.held.drain() {
            sink.push(&done.outcome());
        }
        sink.finish();
    }

    fn forget(&mut self, lease: &Lease) {
        self.held.remove(lease);
        if let Some(running) = self.running.remove(lease) {
            running.control.ask_for_end(End::Cancelled);
            running.abort.abort();
        }
    }

    fn take_unacked(&mut self, tag: u64) -> Option<Sent> {
        let place = self.unacked.iter().position(|sent| sent.tag == tag)?;
        let sent = self.unacked.remove(place)?;
        self.unacked_bytes -= sent.frame.len();
        Some(sent)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.end_all();
    }
}

impl Outbox {
    fn take_tag(&mut self) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        tag
    }

    /// Begins an outcome frame for about so many outcomes.
    fn outcomes(&mut self, limits: &Limits, count: usize) -> OutcomeSink<'_> {
        let tag = self.take_tag();
        self.buffer
            .reserve(HEADER_BYTES + count * (OUTCOME_FIXED_BYTES + RESULT_BYTES_USUAL));
        let start = self.buffer.len();
        OutcomeSink {
            writer: ItemWriter::begin(&mut self.buffer, FrameType::Outcome, tag),
            written: &mut self.outcomes,
            next_tag: &mut self.next_tag,
            tag,
            start,
            body_bytes_max: limits.frame_bytes_max,
            result_bytes_max: limits.payload_bytes_max,
        }
    }
}

/// Writes outcomes into as many frames as they take.
struct OutcomeSink<'b> {
    writer: ItemWriter<'b>,
    written: &'b mut Vec<(u64, usize, usize)>,
    next_tag: &'b mut u64,
    tag: u64,
    start: usize,
    body_bytes_max: usize,
    result_bytes_max: usize,
}

impl OutcomeSink<'_> {
    fn push(&mut self, outcome: &TaskOutcome<'_>) {
        if outcome.result.len() > self.result_bytes_max {
            let error = format!(
                "{}: the result has {} bytes, the server takes {}",
                Code::ResultTooLarge,
                outcome.result.len(),
                self.result_bytes_max
            );
            self.push(&TaskOutcome {
                status: OutcomeStatus::Failed,
                error: &error,
                result: &[],
                ..*outcome
            });
            return;
        }
        let bytes =
            OUTCOME_FIXED_BYTES + outcome.error.len() + outcome.output.len() + outcome.result.len();
        let beyond = self.writer.body_len() + bytes > self.body_bytes_max;
        if (beyond && self.writer.count() > 0) || self.writer.push(outcome).is_err() {
            let tag = *self.next_tag;
            *self.next_tag += 1;
            let start = self.writer.next_frame(tag);
            self.written.push((self.tag, self.start, start));
            (self.tag, self.start) = (tag, start);
            self.writer
                .push(outcome)
                .expect("a result within the limit fits an empty frame");
        }
    }

    /// Completes the last frame; one without outcomes is taken back.
    fn finish(self) {
        if self.writer.count() > 0 {
            let end = self.start + HEADER_BYTES + self.writer.body_len();
            self.writer.finish();
            self.written.push((self.tag, self.start, end));
        }
    }
}

/// An outcome that is not in a frame.
pub(crate) struct Done {
    lease: Lease,
    status: OutcomeStatus,
    retry_after_ms: u32,
    run_us: u32,
    error: String,
    output: Bytes,
    result: Bytes,
}

impl Done {
    fn outcome(&self) -> TaskOutcome<'_> {
        TaskOutcome {
            retry_after_ms: self.retry_after_ms,
            run_us: self.run_us,
            error: &self.error,
            output: &self.output,
            result: &self.result,
            ..TaskOutcome::new(self.lease, self.status)
        }
    }
}

/// The outcomes of a frame that was sent.
fn outcomes_of(sent: &Sent) -> Result<Vec<Done>, ProtocolError> {
    let mut reader = pelton_net::frame::FrameReader::new(usize::MAX);
    reader.feed(sent.frame.clone());
    let frame = reader.next()?.expect("a whole frame was written and kept");
    let outcomes = Items::<TaskOutcome<'_>>::parse(&frame)?;
    Ok(outcomes
        .iter()
        .map(|outcome| Done {
            lease: Lease {
                request_id: outcome.request_id,
                token: outcome.token,
            },
            status: outcome.status,
            retry_after_ms: outcome.retry_after_ms,
            run_us: outcome.run_us,
            error: outcome.error.to_owned(),
            output: frame.body.slice_ref(outcome.output),
            result: frame.body.slice_ref(outcome.result),
        })
        .collect())
}

/// Ended attempts on their way to the executor's task.
pub(crate) struct DoneQueue {
    list: Mutex<Vec<Done>>,
    pub(crate) wake: Notify,
}

impl DoneQueue {
    fn push(&self, done: Done) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(done);
        let first = list.len() == 1;
        drop(list);
        if first {
            self.wake.notify_one();
        }
    }

    /// Exchanges the list for an empty one.
    fn take(&self, empty: &mut Vec<Done>) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        mem::swap(&mut *list, empty);
    }
}

/// Reports the end of one attempt, exactly once: with what the handler answers, or, dropped before that, with why.
pub(crate) struct Finisher {
    lease: Lease,
    started: Instant,
    control: Arc<Control>,
    queue: Arc<DoneQueue>,
    told: bool,
}

const PANICKED: &str = "the handler panicked";

impl Finisher {
    pub(crate) fn finish(mut self, result: Result<Bytes, TaskError>) {
        self.tell(result);
    }

    fn tell(&mut self, ended: Result<Bytes, TaskError>) {
        self.told = true;
        let (outcome, result) = match &ended {
            Ok(result) => (
                TaskOutcome::new(self.lease, OutcomeStatus::Succeeded),
                result.clone(),
            ),
            Err(error) => (failure(self.lease, error), Bytes::new()),
        };
        self.queue.push(Done {
            lease: self.lease,
            status: outcome.status,
            retry_after_ms: outcome.retry_after_ms,
            run_us: micros(self.started.elapsed()),
            error: outcome.error.to_owned(),
            output: self.control.take_output().into(),
            result,
        });
    }
}

impl Drop for Finisher {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        let error = match self.control.end() {
            Some(End::Cancelled) => TaskError::Stopped,
            Some(End::Closed) => {
                TaskError::failed("the executor was closed before the attempt ended")
            }
            None => TaskError::failed(PANICKED),
        };
        self.tell(Err(error));
    }
}

fn failure(lease: Lease, error: &TaskError) -> TaskOutcome<'_> {
    match error {
        TaskError::Failed(text) => TaskOutcome {
            error: text,
            ..TaskOutcome::new(lease, OutcomeStatus::Failed)
        },
        TaskError::Throttled { retry_after_ms } => TaskOutcome {
            retry_after_ms: *retry_after_ms,
            ..TaskOutcome::new(lease, OutcomeStatus::Throttled)
        },
        TaskError::Rejected => TaskOutcome::new(lease, OutcomeStatus::Rejected),
        TaskError::Stopped => TaskOutcome::new(lease, OutcomeStatus::Stopped),
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pelton_net::frame::FrameReader;
    use pelton_net::id::{RequestId, Token};

    const LIMITS: Limits = Limits {
        frame_bytes_max: 100_000,
        payload_bytes_max: 40_000,
        in_flight_tasks_max: 1,
        heartbeat: Duration::from_secs(1),
    };

    fn frames(bytes: Bytes) -> Vec<Frame> {
        let mut reader = FrameReader::new(usize::MAX);
        reader.feed(bytes);
        let mut frames = Vec::new();
        while let Some(frame) = reader.next().unwrap() {
            frames.push(frame);
        }
        assert!(reader.at_boundary());
        frames
    }

    fn frame<'a, T: pelton_net::item::Item<'a>>(kind: FrameType, tag: u64, items: &[T]) -> Frame {
        let mut buffer = BytesMut::new();
        let mut writer = ItemWriter::begin(&mut buffer, kind, tag);
        for item in items {
            writer.push(item).unwrap();
        }
        writer.finish();
        frames(buffer.freeze()).remove(0)
    }

    fn task(id: u128) -> ExecuteTask<'static> {
        ExecuteTask {
            request_id: RequestId(id),
            token: Token {
                generation: 0,
                attempt: 1,
            },
            function: 0,
            attempts_max: 1,
            timeout_ms: 1_000,
            task_id: None,
            key: None,
            content_type: "",
            traceparent: None,
            payload: b"",
        }
    }

    fn work(handler: Handler) -> Work {
        let function = Function {
            name: "f".into(),
            slots: 10_000,
            handler,
        };
        Work::new(vec![function], LIMITS)
    }

    fn kinds(frames: &[Frame]) -> Vec<(FrameType, u16)> {
        frames
            .iter()
            .map(|frame| (frame.kind, frame.count))
            .collect()
    }

    #[tokio::test]
    async fn a_full_resume_says_that_another_follows() {
        for held in [0, 5, LEASES_PER_FRAME_MAX, LEASES_PER_FRAME_MAX + 1] {
            let start = |_, finisher: Finisher| {
                tokio::spawn(async move {
                    std::future::pending::<()>().await;
                    drop(finisher);
                })
                .abort_handle()
            };
            let mut work = work(Handler::Spawning(Box::new(start)));
            let tasks: Vec<_> = (0..held).map(|id| task(id as u128)).collect();
            work.on_execute(&frame(FrameType::Execute, 0, &tasks))
                .unwrap();
            work.on_disconnect().unwrap();
            work.resume(LIMITS);
            let frames = frames(work.take_bytes());
            let full = held / LEASES_PER_FRAME_MAX;
            let rest = (FrameType::Resume, (held % LEASES_PER_FRAME_MAX) as u16);
            let mut expected = vec![(FrameType::Resume, LEASES_PER_FRAME_MAX as u16); full];
            expected.push(rest);
            assert_eq!(kinds(&frames), expected);
            for (nth, resume) in frames.iter().enumerate() {
                let verdicts = vec![ResumedLease::Kept; usize::from(resume.count)];
                let resumed = frame(FrameType::Resumed, resume.tag, &verdicts);
                let all = work.on_resumed(&resumed).unwrap();
                assert_eq!(all, nth + 1 == frames.len());
            }
        }
    }

    #[test]
    fn outcomes_stay_until_they_are_acknowledged() {
        let inline = |_: &ExecuteTask<'_>, result: &mut Vec<u8>| {
            result.resize(30_000, 7);
            Ok(())
        };
        let mut work = work(Handler::Inline(Box::new(inline)));
        let tasks: Vec<_> = (0..7).map(task).collect();
        work.on_execute(&frame(FrameType::Execute, 0, &tasks))
            .unwrap();
        assert!(!work.is_idle(), "written and not yet taken");
        let sent = frames(work.take_bytes());
        let outcome = FrameType::Outcome;
        assert_eq!(kinds(&sent), [(outcome, 3), (outcome, 3), (outcome, 1)]);
        assert_eq!(
            work.unacked_bytes,
            sent.iter().map(|f| f.body.len() + 16).sum::<usize>()
        );

        // The middle one first, with its second outcome to be presented again.
        let again = RefusedOutcome {
            index: 1,
            code: Code::Unavailable,
        };
        work.on_ack(&frame(FrameType::OutcomeAck, sent[1].tag, &[again]))
            .unwrap();
        let ack = |tag| frame::<RefusedOutcome>(FrameType::OutcomeAck, tag, &[]);
        work.on_ack(&ack(sent[0].tag)).unwrap();
        work.heartbeat();
        let next = frames(work.take_bytes());
        assert_eq!(kinds(&next), [(FrameType::Heartbeat, 1), (outcome, 1)]);
        let item = Items::<TaskOutcome<'_>>::parse(&next[1])
            .unwrap()
            .iter()
            .next()
            .unwrap();
        assert_eq!(item.request_id, RequestId(4));
        assert_eq!(item.result, [7; 30_000]);

        // The rest goes down with the connection and is presented to the next one, which knows one of the two.
        work.on_disconnect().unwrap();
        work.resume(LIMITS);
        work.drain();
        let resume = frames(work.take_bytes()).remove(0);
        let leases: Vec<Lease> = Items::parse(&resume).unwrap().iter().collect();
        assert_eq!(leases.len(), 2);
        let verdicts: Vec<_> = leases
            .iter()
            .map(|lease| match lease.request_id {
                RequestId(4) => ResumedLease::Known,
                _ => ResumedLease::Kept,
            })
            .collect();
        let resumed = frame(FrameType::Resumed, resume.tag, &verdicts);
        assert!(work.on_resumed(&resumed).unwrap());
        let last = frames(work.take_bytes());
        assert_eq!(kinds(&last), [(outcome, 1)]);
        work.on_ack(&ack(last[0].tag)).unwrap();
        assert!(work.is_idle());
        assert_eq!(work.unacked_bytes, 0);
    }

    #[test]
    fn a_bound_of_unacknowledged_outcomes_turns_tasks_away() {
        let inline = |_: &ExecuteTask<'_>, result: &mut Vec<u8>| {
            result.resize(40_000, 7);
            Ok(())
        };
        let mut work = work(Handler::Inline(Box::new(inline)));
        let mut id = 0;
        while work.unacked_bytes <= UNACKED_BYTES_MAX {
            id += 1;
            work.on_execute(&frame(FrameType::Execute, 0, &[task(id)]))
                .unwrap();
            let _ = work.take_bytes();
        }
        assert!(id > 1_000);
        work.on_execute(&frame(FrameType::Execute, 0, &[task(id + 1)]))
            .unwrap();
        let rejected = frames(work.take_bytes()).remove(0);
        let item = Items::<TaskOutcome<'_>>::parse(&rejected)
            .unwrap()
            .iter()
            .next()
            .unwrap();
        assert_eq!(item.status, OutcomeStatus::Rejected);
    }
}
