//! A task as a caller describes it, and as it ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pelton_net::Code;
use pelton_net::id::{RequestId, name_is_valid};
use pelton_net::limits::{TAG_BYTES_MAX, TAG_COUNT_MAX, TRACEPARENT_BYTES};
use pelton_net::submit::{Durability, Priority, Start, SubmitTask, Tags, TaskStatus};

use crate::error::Error;

/// A task to be submitted. Everything but the payload has a default.
///
/// ```
/// use std::time::Duration;
/// use pelton_client::Task;
///
/// let task = Task::new("{\"order\": 42}")
///     .task_id("order-42")
///     .key("customer-7")
///     .delay(Duration::from_secs(60))
///     .tag("shop=north");
/// ```
#[derive(Clone, Debug, Default)]
pub struct Task {
    payload: Bytes,
    task_id: Option<String>,
    key: Option<String>,
    priority: Priority,
    durability: Durability,
    start: Start,
    cost: u16,
    max_age_s: u32,
    content_type: String,
    traceparent: Option<String>,
    tags: Vec<String>,
}

impl Task {
    /// A task with these bytes.
    pub fn new(payload: impl Into<Bytes>) -> Task {
        Task {
            payload: payload.into(),
            ..Task::default()
        }
    }

    /// Names the task within its function (and within its key): a second submit of the same name is a duplicate.
    pub fn task_id(mut self, task_id: impl Into<String>) -> Task {
        self.task_id = Some(task_id.into());
        self
    }

    /// Tasks of one key are executed one after the other, in the order of their acceptance.
    pub fn key(mut self, key: impl Into<String>) -> Task {
        self.key = Some(key.into());
        self
    }

    /// The class in which it waits.
    pub fn priority(mut self, priority: Priority) -> Task {
        self.priority = priority;
        self
    }

    /// Is acknowledged before it is on disk; a crash may lose it.
    pub fn in_memory(mut self) -> Task {
        self.durability = Durability::Memory;
        self
    }

    /// Starts no earlier than this long after it was accepted.
    pub fn delay(mut self, delay: Duration) -> Task {
        self.start = match millis(delay) {
            0 => Start::Now,
            delay => Start::DelayMs(delay),
        };
        self
    }

    /// Starts no earlier than then.
    pub fn at(mut self, time: SystemTime) -> Task {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.start = Start::AtMs(millis(since));
        self
    }

    /// What it counts in the round robin; 1 is the default.
    pub fn cost(mut self, cost: u16) -> Task {
        self.cost = cost;
        self
    }

    /// Expires when it has not ended by then. Rounded up to whole seconds.
    pub fn max_age(mut self, age: Duration) -> Task {
        let seconds = age.as_secs() + u64::from(age.subsec_nanos() > 0);
        self.max_age_s = u32::try_from(seconds).unwrap_or(u32::MAX);
        self
    }

    /// MIME type of the payload.
    pub fn content_type(mut self, content_type: impl Into<String>) -> Task {
        self.content_type = content_type.into();
        self
    }

    /// W3C trace context, 55 characters.
    pub fn traceparent(mut self, traceparent: impl Into<String>) -> Task {
        self.traceparent = Some(traceparent.into());
        self
    }

    /// Adds a tag, `name=value` or a bare word; at most 8.
    pub fn tag(mut self, tag: impl Into<String>) -> Task {
        self.tags.push(tag.into());
        self
    }

    /// The task as the wire has it, for the first function of a frame. `tags` is where its tags are packed. Checks
    /// what could not be written; everything else is checked by the server.
    pub(crate) fn wire<'a>(&'a self, tags: &'a mut Vec<u8>) -> Result<SubmitTask<'a>, Error> {
        let traceparent = match &self.traceparent {
            None => None,
            Some(text) => {
                let bytes: &[u8; TRACEPARENT_BYTES] = text.as_bytes().try_into().map_err(|_| {
                    Error::Invalid("a traceparent is 55 bytes: 00-<32 hex>-<16 hex>-<2 hex>".into())
                })?;
                Some(bytes)
            }
        };
        for name in [&self.task_id, &self.key].into_iter().flatten() {
            if !name_is_valid(name) {
                return Err(Error::Invalid(format!(
                    "{name:?} is no name: 1 to 128 bytes, a letter or '_', then letters, digits, '_' and '-'"
                )));
            }
        }
        let mut borrowed = [""; TAG_COUNT_MAX];
        if self.tags.len() > TAG_COUNT_MAX {
            return Err(Error::Invalid("a task has at most 8 tags".into()));
        }
        for (place, tag) in borrowed.iter_mut().zip(&self.tags) {
            if tag.is_empty() || tag.len() > TAG_BYTES_MAX {
                return Err(Error::Invalid("a tag is 1 to 128 bytes of UTF-8".into()));
            }
            *place = tag;
        }
        Ok(SubmitTask {
            task_id: self.task_id.as_deref(),
            key: self.key.as_deref(),
            priority: self.priority,
            durability: self.durability,
            start: self.start,
            cost: self.cost,
            max_age_s: self.max_age_s,
            content_type: &self.content_type,
            traceparent,
            tags: Tags::pack(&borrowed[..self.tags.len()], tags),
            ..SubmitTask::new(&self.payload)
        })
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// How a task ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// The task.
    pub request_id: RequestId,
    /// A terminal status.
    pub status: TaskStatus,
    /// `Ok` if it succeeded, else why it did not.
    pub code: Code,
    /// Attempts that were made.
    pub attempts: u16,
    /// The last attempt's error; empty if there was none.
    pub error: String,
    /// The result, where it was asked for and there is one.
    pub result: Option<Bytes>,
}

impl Finished {
    /// True if the task did its work.
    pub fn succeeded(&self) -> bool {
        self.status == TaskStatus::Succeeded
    }
}
