//! A caller's connection: requests go out in the order in which they were made, answers find their request by its tag.
//!
//! One task drives the link. Callers put their frames into a common buffer, which the driver takes as a whole: what is
//! asked for at the same time travels together. Invariants: an entry of `pending` lives until everything about its
//! request has been told or the session has ended; permits of `in_flight` are held by the entries, so that a caller who
//! stops waiting frees nothing too early.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use pelton_net::Code;
use pelton_net::frame::{Frame, FrameType};
use pelton_net::id::RequestId;
use pelton_net::item::Items;
use pelton_net::limits::SUBMIT_TASKS_MAX;
use pelton_net::session::ErrorFrame;
use pelton_net::submit::{
    ANSWER_DUPLICATE, ANSWER_DURABLE, AnswerView, PushError, SUBMIT_NOTIFY, SUBMIT_RESULT,
    SubmitWriter, TaskAnswer,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::{Error, Refusal, retry_after};
use crate::link::{HELLO_TAG, Limits, Link, unexpected};
use crate::task::{Finished, Task};

/// Bytes of requests that wait to be taken by the driver; beyond it callers wait.
const OUTBOX_BYTES_MAX: usize = 4 << 20;
/// Bytes that the driver keeps for the connection before it takes more.
const OUTBOUND_BYTES_MAX: usize = 1 << 20;

/// What a submit asks to be told beside its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Watch {
    /// Nothing.
    No,
    /// The end of each task, with its result.
    Result,
}

/// A task that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Accepted {
    pub(crate) request_id: RequestId,
    pub(crate) duplicate: bool,
    pub(crate) durable: bool,
}

pub(crate) type FinishedReceiver = oneshot::Receiver<Result<Finished, Error>>;

/// What became of one task of a submit, and where its end will be told if that was asked for.
pub(crate) type SubmitResult = Result<(Accepted, Option<FinishedReceiver>), Error>;

/// A connection that can be asked. Shared by callers and the driver.
pub(crate) struct Session {
    limits: Limits,
    state: Mutex<State>,
    in_flight: Arc<Semaphore>,
    /// To the driver: there is something to send, or the end was asked for.
    wake: Notify,
    /// To callers: there is room in the outbox, or the session has ended.
    room: Notify,
    /// The driver is done.
    done: Notify,
}

struct State {
    outbox: BytesMut,
    pending: HashMap<u64, Pending>,
    next_tag: u64,
    /// The server takes no new work here.
    leaving: bool,
    closing: bool,
    ended: Option<Error>,
    driver_done: bool,
}

enum Pending {
    /// Answered by one frame, which the caller reads.
    Frame(oneshot::Sender<Result<Frame, Error>>),
    /// Answered by one `Finished` item.
    Wait(oneshot::Sender<Result<Finished, Error>>),
    Submit(PendingSubmit),
}

struct PendingSubmit {
    answers: Vec<Option<Result<Accepted, Error>>>,
    unanswered: usize,
    reply: Option<oneshot::Sender<Vec<Result<Accepted, Error>>>>,
    watchers: Vec<Option<oneshot::Sender<Result<Finished, Error>>>>,
    watched: usize,
    permit: Option<OwnedSemaphorePermit>,
}

impl Session {
    /// Starts driving a link on the current runtime.
    pub(crate) fn start(link: Link) -> Arc<Session> {
        let permits = link.limits.in_flight_tasks_max.min(Semaphore::MAX_PERMITS);
        let session = Arc::new(Session {
            limits: link.limits,
            state: Mutex::new(State {
                outbox: BytesMut::new(),
                pending: HashMap::new(),
                next_tag: HELLO_TAG + 1,
                leaving: false,
                closing: false,
                ended: None,
                driver_done: false,
            }),
            in_flight: Arc::new(Semaphore::new(permits)),
            wake: Notify::new(),
            room: Notify::new(),
            done: Notify::new(),
        });
        tokio::spawn(session.clone().drive(link));
        session
    }

    /// What the welcome said.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// True as long as new requests may be made here.
    pub(crate) fn usable(&self) -> bool {
        let state = self.lock();
        state.ended.is_none() && !state.leaving && !state.closing
    }

    /// Asks for the end: requests that wait fail with `Closed`.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.wake.notify_one();
    }

    /// Waits until the connection is gone.
    pub(crate) async fn closed(&self) {
        loop {
            let done = self.done.notified();
            if self.lock().driver_done {
                return;
            }
            done.await;
        }
    }

    /// Hands in tasks, in as many frames as it takes. The answers are in the order of the tasks.
    pub(crate) async fn submit(
        &self,
        function: &str,
        tasks: &[Task],
        watch: Watch,
    ) -> Vec<SubmitResult> {
        let mut results: Vec<Option<SubmitResult>> = Vec::new();
        results.resize_with(tasks.len(), || None);
        let mut frames = Vec::new();
        let mut next = 0;
        while next < tasks.len() {
            match self
                .submit_frame(function, tasks, &mut next, watch, &mut results)
                .await
            {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => {}
                Err(error) => {
                    // Tasks of frames that are out already get what their frame gets.
                    for result in results[next..].iter_mut() {
                        *result = Some(Err(error.clone()));
                    }
                    break;
                }
            }
        }
        for frame in frames {
            let answers = frame.reply.await;
            let answers = answers.unwrap_or_else(|_| {
                let lost = Error::ConnectionLost("the client was dropped".into());
                vec![Err(lost); frame.places.len()]
            });
            let mut watchers = frame.watchers.into_iter();
            for (place, answer) in frame.places.into_iter().zip(answers) {
                let watcher = watchers.next();
                results[place] = Some(answer.map(|accepted| (accepted, watcher)));
            }
        }
        results
            .into_iter()
            .map(|result| result.expect("every task was refused here or stood in a frame"))
            .collect()
    }

    /// Writes the tasks from `next` on that fit one frame, and moves `next` behind them.
    async fn submit_frame(
        &self,
        function: &str,
        tasks: &[Task],
        next: &mut usize,
        watch: Watch,
        results: &mut [Option<SubmitResult>],
    ) -> Result<Option<SubmitFrame>, Error> {
        let wanted = (tasks.len() - *next)
            .min(SUBMIT_TASKS_MAX)
            .min(self.limits.in_flight_tasks_max);
        let mut permit = self
            .in_flight
            .clone()
            .acquire_many_owned(wanted as u32)
            .await
            .map_err(|_| self.ended())?;
        let mut state = self.state_with_room().await?;
        let tag = state.next_tag;
        let flags = match watch {
            Watch::No => 0,
            Watch::Result => SUBMIT_NOTIFY | SUBMIT_RESULT,
        };
        let mut places = Vec::with_capacity(wanted);
        let mut packed = Vec::new();
        let limit = self.limits.frame_bytes_max;
        let mut writer = SubmitWriter::begin(&mut state.outbox, tag, flags, &[function], limit);
        while places.len() < wanted && *next < tasks.len() {
            let task = match tasks[*next].wire(&mut packed) {
                Ok(task) if task.payload.len() > self.limits.payload_bytes_max => {
                    let what = format!(
                        "the payload has {} bytes, the server takes {}",
                        task.payload.len(),
                        self.limits.payload_bytes_max
                    );
                    results[*next] = Some(Err(Error::refused(Code::PayloadTooLarge, what)));
                    *next += 1;
                    continue;
                }
                Ok(task) => task,
                Err(error) => {
                    results[*next] = Some(Err(error));
                    *next += 1;
                    continue;
                }
            };
            match writer.push(&task) {
                Ok(()) => places.push(*next),
                Err(PushError::Full) => break,
                Err(PushError::Invalid(error)) => {
                    results[*next] = Some(Err(Error::refused(error.code, error.what)));
                }
            }
            *next += 1;
        }
        if places.is_empty() {
            return Ok(None);
        }
        writer.finish();
        state.next_tag += 1;
        drop(permit.split(wanted - places.len()));
        let (reply, receiver) = oneshot::channel();
        let (mut senders, mut watchers) = (Vec::new(), Vec::new());
        if watch == Watch::Result {
            for _ in &places {
                let (sender, receiver) = oneshot::channel();
                senders.push(Some(sender));
                watchers.push(receiver);
            }
        }
        state.pending.insert(
            tag,
            Pending::Submit(PendingSubmit {
                answers: vec![None; places.len()],
                unanswered: places.len(),
                reply: Some(reply),
                watched: senders.len(),
                watchers: senders,
                permit: Some(permit),
            }),
        );
        drop(state);
        self.wake.notify_one();
        Ok(Some(SubmitFrame {
            places,
            reply: receiver,
            watchers,
        }))
    }

    /// Sends one request that is answered by one frame.
    pub(crate) async fn ask(
        &self,
        encode: impl FnOnce(&mut BytesMut, u64) -> Result<(), Error>,
    ) -> Result<Frame, Error> {
        let (sender, receiver) = oneshot::channel();
        self.request(Pending::Frame(sender), encode).await?;
        receiver.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// Sends one request that is answered by the end of a task.
    pub(crate) async fn await_end(
        &self,
        encode: impl FnOnce(&mut BytesMut, u64),
    ) -> Result<Finished, Error> {
        let (sender, receiver) = oneshot::channel();
        self.request(Pending::Wait(sender), |out, tag| {
            encode(out, tag);
            Ok(())
        })
        .await?;
        receiver.await.unwrap_or_else(|_| Err(self.ended()))
    }

    async fn request(
        &self,
        pending: Pending,
        encode: impl FnOnce(&mut BytesMut, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.state_with_room().await?;
        let tag = state.next_tag;
        encode(&mut state.outbox, tag)?;
        state.next_tag += 1;
        state.pending.insert(tag, pending);
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    /// Waits until the outbox takes another frame.
    async fn state_with_room(&self) -> Result<MutexGuard<'_, State>, Error> {
        loop {
            // Made before the look: what is told between the look and the wait is not missed.
            let room = self.room.notified();
            {
                let state = self.lock();
                if let Some(error) = &state.ended {
                    return Err(error.clone());
                }
                if state.closing {
                    return Err(Error::Closed);
                }
                if state.outbox.len() < OUTBOX_BYTES_MAX {
                    return Ok(state);
                }
            }
            room.await;
        }
    }

    fn ended(&self) -> Error {
        self.lock().ended.clone().unwrap_or(Error::Closed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held has left at worst one request without an answer.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn drive(self: Arc<Session>, mut link: Link) {
        let error = match self.exchange(&mut link).await {
            Ok(()) => Error::Closed,
            Err(error) => error,
        };
        match &error {
            Error::Closed => {}
            other => {
                tracing::debug!(%other, "connection ended");
                link.abandon(other);
            }
        }
        self.end(&error);
        link.close().await;
        self.lock().driver_done = true;
        self.done.notify_waiters();
    }

    /// Moves frames in both directions until the end is asked for.
    async fn exchange(&self, link: &mut Link) -> Result<(), Error> {
        loop {
            tokio::select! {
                biased;
                ready = link.ready() => ready?,
                () = self.wake.notified() => {}
            }
            while let Some(frame) = link.inbound.next()? {
                self.on_frame(&frame)?;
            }
            let room = link.outbound.bytes() < OUTBOUND_BYTES_MAX;
            let bytes = {
                let mut state = self.lock();
                if state.closing {
                    return Ok(());
                }
                if !room || state.outbox.is_empty() {
                    continue;
                }
                state.outbox.split().freeze()
            };
            link.outbound.queue(bytes);
            self.room.notify_waiters();
        }
    }

    fn on_frame(&self, frame: &Frame) -> Result<(), Error> {
        match frame.kind {
            FrameType::SubmitAnswer => self.on_answer(frame),
            FrameType::Finished => self.on_finished(frame),
            FrameType::StopAnswer | FrameType::QueryAnswer => {
                if let Some(Pending::Frame(sender)) = self.lock().pending.remove(&frame.tag) {
                    let _ = sender.send(Ok(frame.clone()));
                }
                Ok(())
            }
            FrameType::Error => self.on_error(frame),
            FrameType::Goodbye => {
                self.lock().leaving = true;
                Ok(())
            }
            FrameType::Unknown => {
                let error = ErrorFrame::new(Code::Unimplemented, "unknown frame type");
                error.encode(&mut self.lock().outbox, frame.tag);
                Ok(())
            }
            FrameType::Hello
            | FrameType::Welcome
            | FrameType::Heartbeat
            | FrameType::HeartbeatAck
            | FrameType::Submit
            | FrameType::Stop
            | FrameType::Wait
            | FrameType::Query
            | FrameType::Register
            | FrameType::Registered
            | FrameType::Execute
            | FrameType::Outcome
            | FrameType::OutcomeAck
            | FrameType::Cancel
            | FrameType::Resume
            | FrameType::Resumed => Err(unexpected(frame).into()),
        }
    }

    fn on_answer(&self, frame: &Frame) -> Result<(), Error> {
        let view = AnswerView::parse(frame)?;
        let mut state = self.lock();
        if let Some(Pending::Submit(submit)) = state.pending.get_mut(&frame.tag) {
            for answer in view.iter() {
                submit.on_answer(usize::from(answer.index), accepted(&answer));
            }
            if submit.is_told() {
                state.pending.remove(&frame.tag);
            }
        }
        Ok(())
    }

    fn on_finished(&self, frame: &Frame) -> Result<(), Error> {
        let items = Items::<pelton_net::submit::Finished<'_>>::parse(frame)?;
        let mut state = self.lock();
        for item in items.iter() {
            let finished = Finished {
                request_id: item.request_id,
                status: item.status,
                code: item.code,
                attempts: item.attempts,
                error: item.error.to_owned(),
                result: item.result.map(|result| frame.body.slice_ref(result)),
            };
            match state.pending.get_mut(&item.tag) {
                Some(Pending::Submit(submit)) => {
                    submit.on_finished(item.index as usize, finished);
                    if submit.is_told() {
                        state.pending.remove(&item.tag);
                    }
                }
                Some(Pending::Wait(_)) => {
                    if let Some(Pending::Wait(sender)) = state.pending.remove(&item.tag) {
                        let _ = sender.send(Ok(finished));
                    }
                }
                Some(Pending::Frame(_)) | None => {}
            }
        }
        Ok(())
    }

    fn on_error(&self, frame: &Frame) -> Result<(), Error> {
        let error = Error::from_frame(&ErrorFrame::parse(frame)?);
        if frame.tag == 0 {
            return Err(error);
        }
        let pending = self.lock().pending.remove(&frame.tag);
        if let Some(pending) = pending {
            pending.fail(&error);
        }
        Ok(())
    }

    /// Tells everybody who waits.
    fn end(&self, error: &Error) {
        let pending = {
            let mut state = self.lock();
            // What was never sent is as unknown to the caller as what was: one rule, submit again.
            state.ended = Some(error.clone());
            state.outbox = BytesMut::new();
            std::mem::take(&mut state.pending)
        };
        self.in_flight.close();
        for (_, entry) in pending {
            entry.fail(error);
        }
        self.room.notify_waiters();
    }
}

/// A submit frame whose answer is awaited.
struct SubmitFrame {
    /// The tasks' places in the batch.
    places: Vec<usize>,
    reply: oneshot::Receiver<Vec<Result<Accepted, Error>>>,
    watchers: Vec<FinishedReceiver>,
}

impl Pending {
    fn fail(self, error: &Error) {
        match self {
            Pending::Frame(sender) => {
                let _ = sender.send(Err(error.clone()));
            }
            Pending::Wait(sender) => {
                let _ = sender.send(Err(error.clone()));
            }
            Pending::Submit(mut submit) => {
                for index in 0..submit.answers.len() {
                    submit.on_answer(index, Err(error.clone()));
                }
                for watcher in submit.watchers.into_iter().flatten() {
                    let _ = watcher.send(Err(error.clone()));
                }
            }
        }
    }
}

impl PendingSubmit {
    /// Takes the first answer about a task.
    fn on_answer(&mut self, index: usize, answer: Result<Accepted, Error>) {
        let Some(place) = self.answers.get_mut(index).filter(|place| place.is_none()) else {
            return;
        };
        if answer.is_err()
            && let Some(watcher) = self.watchers.get_mut(index)
            && watcher.take().is_some()
        {
            self.watched -= 1;
        }
        *place = Some(answer);
        self.unanswered -= 1;
        if self.unanswered == 0 {
            self.permit = None;
            let answers = std::mem::take(&mut self.answers);
            let answers = answers
                .into_iter()
                .map(|answer| answer.expect("none is unanswered"))
                .collect();
            if let Some(reply) = self.reply.take() {
                let _ = reply.send(answers);
            }
        }
    }

    fn on_finished(&mut self, index: usize, finished: Finished) {
        if let Some(watcher) = self.watchers.get_mut(index).and_then(Option::take) {
            self.watched -= 1;
            let _ = watcher.send(Ok(finished));
        }
    }

    fn is_told(&self) -> bool {
        self.unanswered == 0 && self.watched == 0
    }
}

fn accepted(answer: &TaskAnswer<'_>) -> Result<Accepted, Error> {
    if answer.code == Code::Ok {
        return Ok(Accepted {
            request_id: answer.request_id,
            duplicate: answer.flags & ANSWER_DUPLICATE != 0,
            durable: answer.flags & ANSWER_DURABLE != 0,
        });
    }
    Err(Error::Refused(Refusal {
        code: answer.code,
        text: answer.text.to_owned(),
        retry_after: retry_after(answer.retry_after_ms),
        request_id: (answer.request_id != RequestId::default()).then_some(answer.request_id),
    }))
}
