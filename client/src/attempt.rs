//! One attempt as a handler sees it, and what a handler may answer beside a result.

use std::fmt::Display;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pelton_net::execute::ExecuteTask;
use pelton_net::id::{RequestId, Token};
use pelton_net::limits::OUTPUT_BYTES_MAX;
use tokio::sync::Notify;

/// A payload up to this size is copied, so that a long attempt does not hold the whole frame in which it came.
const COPIED_BYTES_MAX: usize = 16 << 10;

/// One attempt at a task. Handed to the handler, which may keep it for as long as it runs.
#[derive(Debug)]
pub struct Attempt {
    request_id: RequestId,
    token: Token,
    attempts_max: u16,
    timeout: Duration,
    task_id: Option<Box<str>>,
    key: Option<Box<str>>,
    content_type: Box<str>,
    traceparent: Option<Box<str>>,
    payload: Bytes,
    control: Arc<Control>,
}

impl Attempt {
    pub(crate) fn new(task: &ExecuteTask<'_>, body: &Bytes, control: Arc<Control>) -> Attempt {
        Attempt {
            request_id: task.request_id,
            token: task.token,
            attempts_max: task.attempts_max,
            timeout: Duration::from_millis(u64::from(task.timeout_ms)),
            task_id: task.task_id.map(Into::into),
            key: task.key.map(Into::into),
            content_type: task.content_type.into(),
            traceparent: task
                .traceparent
                .map(|bytes| String::from_utf8_lossy(bytes).into()),
            payload: if task.payload.len() <= COPIED_BYTES_MAX {
                Bytes::copy_from_slice(task.payload)
            } else {
                body.slice_ref(task.payload)
            },
            control,
        }
    }

    /// The task's bytes.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The task.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// The name that the caller gave the task.
    pub fn task_id(&self) -> Option<&str> {
        self.task_id.as_deref()
    }

    /// The ordering key.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Which attempt this is, from 1.
    pub fn attempt(&self) -> u16 {
        self.token.attempt
    }

    /// Attempts that the task gets in all; 0 if the server did not say.
    pub fn attempts_max(&self) -> u16 {
        self.attempts_max
    }

    /// What the attempt may take; then the server cancels it.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// MIME type of the payload; empty if the caller did not say.
    pub fn content_type(&self) -> &str {
        &self.content_type
    }

    /// W3C trace context.
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref()
    }

    /// True once the attempt is to end; a handler may then return `TaskError::Stopped`.
    pub fn is_cancelled(&self) -> bool {
        self.control.end() == Some(End::Cancelled)
    }

    /// Waits until the attempt is to end. After the grace that the canceller gave, the handler is dropped at its next
    /// `.await`.
    pub async fn cancelled(&self) {
        loop {
            let told = self.control.told.notified();
            if self.is_cancelled() {
                return;
            }
            told.await;
        }
    }

    /// Adds to the output that is kept with the attempt; of more than 8 KiB the end is kept.
    pub fn output(&self, text: &str) {
        let mut output = self
            .control
            .output
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        output.extend_from_slice(text.as_bytes());
        if output.len() > 2 * OUTPUT_BYTES_MAX {
            let surplus = output.len() - OUTPUT_BYTES_MAX;
            output.drain(..surplus);
        }
    }
}

/// Why an attempt is ended from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The server said so.
    Cancelled,
    /// The executor's time to close is over.
    Closed,
}

/// What an executor and a running attempt share.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// 0 while nobody has asked for the end, then 1 for cancelled, 2 for closed; the first one counts.
    end: AtomicU8,
    told: Notify,
    output: Mutex<Vec<u8>>,
}

impl Control {
    pub(crate) fn ask_for_end(&self, end: End) {
        let number = match end {
            End::Cancelled => 1,
            End::Closed => 2,
        };
        let _ = self
            .end
            .compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire);
        self.told.notify_waiters();
    }

    pub(crate) fn end(&self) -> Option<End> {
        match self.end.load(Ordering::Acquire) {
            0 => None,
            1 => Some(End::Cancelled),
            _ => Some(End::Closed),
        }
    }

    pub(crate) fn take_output(&self) -> Vec<u8> {
        std::mem::take(&mut self.output.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Why an attempt did not succeed. Any error turns into `Failed` with its text, so that `?` works in a handler; for
/// that reason this is not an error type itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TaskError {
    /// The function ran and failed; an attempt is spent.
    Failed(String),
    /// What lies behind the function is busy; no retry is spent, and the function waits at least this long.
    Throttled {
        /// 0 if it is not known.
        retry_after_ms: u32,
    },
    /// This executor did not start it; no attempt is spent.
    Rejected,
    /// It ended because it was cancelled.
    Stopped,
}

impl TaskError {
    /// A failure with this text.
    pub fn failed(text: impl Display) -> TaskError {
        TaskError::Failed(text.to_string())
    }
}

impl<E: std::error::Error> From<E> for TaskError {
    fn from(error: E) -> TaskError {
        TaskError::Failed(error.to_string())
    }
}
