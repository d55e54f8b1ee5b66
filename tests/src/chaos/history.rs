//! What callers, executors and the conductor write down: files of lines that are only ever added to, each with the
//! monotonic time of the machine in front, which all processes share.
//!
//! A line reaches its file in one write, before what it announces is done and before what follows from it: the file of a
//! process that is killed says everything that the process did.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write},
    path::Path,
};

use pelton_client::{RequestId, TaskStatus};
use rustix::time::{ClockId, clock_gettime};

use super::{host::Phase, plan::Id};

/// Microseconds of the machine's monotonic clock.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// One thing that happened. `-` stands for what is not there.
#[derive(Clone, PartialEq, Debug)]
pub enum Event<'a> {
    /// A caller is about to submit. A batch is what one call hands in, in the order of the lines.
    Intent {
        id: Id,
        batch: u64,
        tenant: &'a str,
        function: &'a str,
        named: bool,
        key: Option<&'a str>,
        bytes: u64,
        hash: u64,
    },
    /// The server took it, or had taken it before.
    Accepted {
        id: Id,
        batch: u64,
        request: RequestId,
        duplicate: bool,
        durable: bool,
    },
    /// The server said no, or nothing was sent.
    Refused { id: Id, batch: u64, code: &'a str },
    /// Nobody knows.
    Unknown { id: Id, batch: u64 },
    /// The server described the task.
    Seen {
        id: Id,
        request: RequestId,
        function: &'a str,
        status: TaskStatus,
        attempts: u16,
        retried: u16,
        bytes: u64,
        hash: u64,
        result: Option<&'a str>,
    },
    /// The server told the end of the task to somebody who waited.
    Ended {
        id: Id,
        request: RequestId,
        status: TaskStatus,
        attempts: u16,
        result: Option<&'a str>,
    },
    /// The server says that there is no such task. It is asked again a moment later.
    Late { id: Id },
    /// It says so a second time.
    Missing { id: Id },
    /// A stop was answered with this status.
    StopAnswered { id: Id, status: TaskStatus },
    /// An attempt begins.
    Begun {
        id: Id,
        request: RequestId,
        attempt: u16,
        function: &'a str,
        bytes: u64,
        hash: u64,
    },
    /// An attempt is over; `result` is there if it succeeded.
    Over {
        request: RequestId,
        attempt: u16,
        failed: bool,
        result: Option<&'a str>,
    },
    /// The conductor has killed the server.
    ServerKilled { phase: Phase },
    /// The conductor has killed an executor.
    ExecutorKilled,
    /// A stream has seen all its tasks after everything came to rest.
    Complete,
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_dash = |text: &Option<&str>| text.unwrap_or("-").to_owned();
        match self {
            Event::Intent {
                id,
                batch,
                tenant,
                function,
                named,
                key,
                bytes,
                hash,
            } => {
                let (name, key) = (if *named { "named" } else { "-" }, or_dash(key));
                write!(
                    f,
                    "intent {id} {batch} {tenant} {function} {name} {key} {bytes} {hash:016x}"
                )
            }
            Event::Accepted {
                id,
                batch,
                request,
                duplicate,
                durable,
            } => {
                let new = if *duplicate { "duplicate" } else { "new" };
                let durable = if *durable { "durable" } else { "volatile" };
                write!(f, "accepted {id} {batch} {request} {new} {durable}")
            }
            Event::Refused { id, batch, code } => write!(f, "refused {id} {batch} {code}"),
            Event::Unknown { id, batch } => write!(f, "unknown {id} {batch}"),
            Event::Seen {
                id,
                request,
                function,
                status,
                attempts,
                retried,
                bytes,
                hash,
                result,
            } => {
                let (status, result) = (status.name(), or_dash(result));
                write!(
                    f,
                    "seen {id} {request} {function} {status} {attempts} {retried} {bytes} {hash:016x} {result}"
                )
            }
            Event::Ended {
                id,
                request,
                status,
                attempts,
                result,
            } => {
                let (status, result) = (status.name(), or_dash(result));
                write!(f, "ended {id} {request} {status} {attempts} {result}")
            }
            Event::Late { id } => write!(f, "late {id}"),
            Event::Missing { id } => write!(f, "missing {id}"),
            Event::StopAnswered { id, status } => write!(f, "stop {id} {}", status.name()),
            Event::Begun {
                id,
                request,
                attempt,
                function,
                bytes,
                hash,
            } => write!(
                f,
                "begun {id} {request} {attempt} {function} {bytes} {hash:016x}"
            ),
            Event::Over {
                request,
                attempt,
                failed,
                result,
            } => {
                let how = match (result, failed) {
                    (Some(_), _) => "succeeded",
                    (None, true) => "failed",
                    (None, false) => "dropped",
                };
                write!(f, "over {request} {attempt} {how} {}", or_dash(result))
            }
            Event::ServerKilled { phase } => write!(f, "server-killed {}", phase.name()),
            Event::ExecutorKilled => f.write_str("executor-killed"),
            Event::Complete => f.write_str("complete"),
        }
    }
}

/// Reads a line: its time and what happened.
pub fn parse(line: &str) -> Option<(u64, Event<'_>)> {
    let mut fields = line.split(' ');
    let at_us = fields.next()?.parse().ok()?;
    let mut next = || fields.next();
    let event = match next()? {
        "intent" => Event::Intent {
            id: Id::parse(next()?)?,
            batch: next()?.parse().ok()?,
            tenant: next()?,
            function: next()?,
            named: next()? == "named",
            key: there(next()?),
            bytes: next()?.parse().ok()?,
            hash: hex(next()?)?,
        },
        "accepted" => Event::Accepted {
            id: Id::parse(next()?)?,
            batch: next()?.parse().ok()?,
            request: RequestId::parse(next()?)?,
            duplicate: next()? == "duplicate",
            durable: next()? == "durable",
        },
        "refused" => Event::Refused {
            id: Id::parse(next()?)?,
            batch: next()?.parse().ok()?,
            code: next()?,
        },
        "unknown" => Event::Unknown {
            id: Id::parse(next()?)?,
            batch: next()?.parse().ok()?,
        },
        "seen" => Event::Seen {
            id: Id::parse(next()?)?,
            request: RequestId::parse(next()?)?,
            function: next()?,
            status: status(next()?)?,
            attempts: next()?.parse().ok()?,
            retried: next()?.parse().ok()?,
            bytes: next()?.parse().ok()?,
            hash: hex(next()?)?,
            result: there(next()?),
        },
        "ended" => Event::Ended {
            id: Id::parse(next()?)?,
            request: RequestId::parse(next()?)?,
            status: status(next()?)?,
            attempts: next()?.parse().ok()?,
            result: there(next()?),
        },
        "late" => Event::Late {
            id: Id::parse(next()?)?,
        },
        "missing" => Event::Missing {
            id: Id::parse(next()?)?,
        },
        "stop" => Event::StopAnswered {
            id: Id::parse(next()?)?,
            status: status(next()?)?,
        },
        "begun" => Event::Begun {
            id: Id::parse(next()?)?,
            request: RequestId::parse(next()?)?,
            attempt: next()?.parse().ok()?,
            function: next()?,
            bytes: next()?.parse().ok()?,
            hash: hex(next()?)?,
        },
        "over" => Event::Over {
            request: RequestId::parse(next()?)?,
            attempt: next()?.parse().ok()?,
            failed: next()? == "failed",
            result: there(next()?),
        },
        "server-killed" => Event::ServerKilled {
            phase: Phase::from_name(next()?)?,
        },
        "executor-killed" => Event::ExecutorKilled,
        "complete" => Event::Complete,
        _ => return None,
    };
    next().is_none().then_some((at_us, event))
}

/// The status that is called so.
pub fn status(name: &str) -> Option<TaskStatus> {
    let mut all = TaskStatus::ALL.iter().copied();
    all.find(|status| status.name() == name)
}

/// True if nothing but a redrive follows.
pub fn is_end(status: TaskStatus) -> bool {
    match status {
        TaskStatus::Succeeded
        | TaskStatus::Failed
        | TaskStatus::Stopped
        | TaskStatus::Expired
        | TaskStatus::Invalid => true,
        TaskStatus::Scheduled
        | TaskStatus::Enqueued
        | TaskStatus::Dequeued
        | TaskStatus::Running
        | TaskStatus::Retrying
        | TaskStatus::Paused
        | TaskStatus::Stopping => false,
    }
}

fn there(text: &str) -> Option<&str> {
    (text != "-").then_some(text)
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// A file that one process adds to. What was noted is in it after `flush`.
#[derive(Debug)]
pub struct History {
    file: File,
    lines: String,
}

impl History {
    /// Begins a file, which must not be there yet.
    pub fn create(path: &Path) -> io::Result<History> {
        let file = File::options().append(true).create_new(true).open(path)?;
        Ok(History {
            file,
            lines: String::new(),
        })
    }

    pub fn note(&mut self, event: &Event<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.lines, "{} {event}", now_us());
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(self.lines.as_bytes())?;
        self.lines.clear();
        Ok(())
    }
}
