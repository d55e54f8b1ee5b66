//! The caller's face: one connection, made again when it is needed and gone.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pelton_net::Code;
use pelton_net::frame::FrameType;
use pelton_net::id::{RequestId, TaskName, name_is_valid};
use pelton_net::item::{ItemWriter, Items};
use pelton_net::query::{Operation, Query, QueryAnswer};
use pelton_net::submit::{Stop, StopAnswer, TaskRef, TaskStatus, Wait};
use serde_json::{Map, Value};

use crate::error::Error;
use crate::link::Link;
use crate::options::ClientOptions;
use crate::session::{Accepted, FinishedReceiver, Session, Watch};
use crate::task::{Finished, Task};

/// One request for the end of a task lasts at most this long; then it is asked again.
const WAIT_STEP: Duration = Duration::from_secs(60);
/// After a lost connection a wait is asked again at this pace.
const WAIT_RETRY: Duration = Duration::from_millis(200);

/// A caller's handle. Cheap to clone; all clones share one connection.
///
/// When the connection breaks, requests that wait for an answer fail with `Error::ConnectionLost`, and the next call
/// connects again. What then became of a submit is unknown: submit again with the same `task_id`.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: ClientOptions,
    session: Mutex<Option<Arc<Session>>>,
    /// Held while connecting, so that many callers make one connection.
    connecting: tokio::sync::Mutex<()>,
}

/// What a listing is limited to; everything is optional.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct List {
    /// Only tasks of this function.
    pub function: Option<String>,
    /// Only tasks in this status.
    pub status: Option<TaskStatus>,
    /// Only tasks whose `task_id` begins with this.
    pub prefix: Option<String>,
    /// Where the former page ended.
    pub cursor: Option<String>,
    /// Tasks on a page.
    pub limit: Option<u32>,
}

impl Client {
    /// Connects. That it works is known when this returns.
    pub async fn connect(options: ClientOptions) -> Result<Client, Error> {
        let client = Client {
            inner: Arc::new(Inner {
                options,
                session: Mutex::new(None),
                connecting: tokio::sync::Mutex::new(()),
            }),
        };
        client.session().await?;
        Ok(client)
    }

    /// Hands in one task. Returns once it is on disk (or in memory, if the task asks for no more).
    pub async fn submit(&self, function: &str, task: Task) -> Result<Submitted, Error> {
        self.submit_one(function, task, Watch::No).await
    }

    /// Hands in one task and asks to be told of its end, which `Submitted::finished` then awaits without another
    /// request.
    pub async fn submit_watched(&self, function: &str, task: Task) -> Result<Submitted, Error> {
        self.submit_one(function, task, Watch::Result).await
    }

    /// Hands in one task and waits for its end and its result.
    ///
    /// ```no_run
    /// # use pelton_client::{Client, Task};
    /// # async fn example(client: Client) -> Result<(), pelton_client::Error> {
    /// let finished = client.submit_and_wait("digest", Task::new("some bytes")).await?;
    /// assert!(finished.succeeded(), "{}", finished.error);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn submit_and_wait(&self, function: &str, task: Task) -> Result<Finished, Error> {
        self.submit_watched(function, task).await?.finished().await
    }

    /// Hands in many tasks of one function; the results are in their order. A task is refused alone.
    pub async fn submit_batch(
        &self,
        function: &str,
        tasks: &[Task],
    ) -> Vec<Result<Submitted, Error>> {
        self.submit_many(function, tasks, Watch::No).await
    }

    /// As `submit_batch`, and asks to be told of the end of each task.
    pub async fn submit_batch_watched(
        &self,
        function: &str,
        tasks: &[Task],
    ) -> Vec<Result<Submitted, Error>> {
        self.submit_many(function, tasks, Watch::Result).await
    }

    /// Waits until a task has ended, at most `timeout`; then `DEADLINE_EXCEEDED`. Survives lost connections.
    pub async fn wait(&self, task: &TaskName, timeout: Duration) -> Result<Finished, Error> {
        check_name(task)?;
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let step = left.min(WAIT_STEP);
            let over = |step| step >= left;
            match self.wait_once(task, step).await {
                Err(Error::Refused(refusal))
                    if refusal.code == Code::DeadlineExceeded && !over(step) => {}
                Err(Error::ConnectionLost(_) | Error::Unreachable(_)) if !over(WAIT_RETRY) => {
                    tokio::time::sleep(WAIT_RETRY).await;
                }
                other => return other,
            }
        }
    }

    async fn wait_once(&self, task: &TaskName, timeout: Duration) -> Result<Finished, Error> {
        let session = self.session().await?;
        let wait = Wait {
            task: task_ref(task),
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            with_result: true,
        };
        session.await_end(|out, tag| wait.encode(out, tag)).await
    }

    /// One task as JSON.
    pub async fn get(&self, task: &TaskName) -> Result<String, Error> {
        self.query(Operation::Get, &object([("task", name(task).into())]))
            .await
    }

    /// A page of tasks as JSON.
    pub async fn list(&self, list: &List) -> Result<String, Error> {
        let text = |value: &Option<String>| value.clone().map_or(Value::Null, Value::from);
        let json = object([
            ("function", text(&list.function)),
            (
                "status",
                list.status
                    .map_or(Value::Null, |status| status.name().into()),
            ),
            ("prefix", text(&list.prefix)),
            ("cursor", text(&list.cursor)),
            ("limit", list.limit.map_or(Value::Null, Value::from)),
        ]);
        self.query(Operation::List, &json).await
    }

    /// Ends a task; a running attempt gets `grace` to end by itself. The answer is where the task stands now.
    pub async fn stop(
        &self,
        task: &TaskName,
        grace: Duration,
    ) -> Result<Option<TaskStatus>, Error> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let TaskName::Request(request_id) = task else {
            let json = object([("task", name(task).into()), ("grace_ms", grace_ms.into())]);
            let answer = self.query(Operation::Stop, &json).await?;
            return Ok(text_field(&answer, "status").and_then(|status| {
                let known = TaskStatus::ALL.iter().copied();
                known.into_iter().find(|known| known.name() == status)
            }));
        };
        let session = self.session().await?;
        let frame = session
            .ask(|out, tag| {
                let mut writer = ItemWriter::begin(out, FrameType::Stop, tag);
                let stop = Stop {
                    request_id: *request_id,
                    grace_ms,
                };
                writer.push(&stop).expect("one item fits an empty frame");
                writer.finish();
                Ok(())
            })
            .await?;
        let answers = Items::<StopAnswer>::parse(&frame)?;
        let Some(answer) = answers.iter().next() else {
            return Err(Error::refused(
                Code::Internal,
                "the answer to a stop is empty",
            ));
        };
        if answer.code == Code::Ok {
            return Ok(answer.status);
        }
        let text = match answer.status {
            Some(status) => format!("{request_id} is {}", status.name()),
            None => request_id.to_string(),
        };
        Err(Error::refused(answer.code, text))
    }

    /// A rare operation: a JSON object out, a JSON object back.
    pub async fn query(&self, operation: Operation, json: &str) -> Result<String, Error> {
        let session = self.session().await?;
        let frame = session
            .ask(|out, tag| {
                let query = Query { operation, json };
                if query.encode(out, tag) {
                    Ok(())
                } else {
                    Err(Error::Invalid("a query has at most 65532 bytes".into()))
                }
            })
            .await?;
        let answer = QueryAnswer::parse(&frame)?;
        if answer.code != Code::Ok {
            let text = text_field(answer.json, "error");
            return Err(Error::refused(answer.code, text.unwrap_or_default()));
        }
        Ok(answer.json.to_owned())
    }

    /// Bytes that a payload may have, as the server said.
    pub async fn payload_bytes_max(&self) -> Result<usize, Error> {
        Ok(self.session().await?.limits().payload_bytes_max)
    }

    /// Ends the connection. Requests that wait fail with `Error::Closed`; a later call connects again.
    pub async fn close(&self) {
        let session = self.inner.lock().take();
        if let Some(session) = session {
            session.close();
            session.closed().await;
        }
    }

    async fn submit_one(
        &self,
        function: &str,
        task: Task,
        watch: Watch,
    ) -> Result<Submitted, Error> {
        let tasks = [task];
        let mut results = self.submit_many(function, &tasks, watch).await;
        results.pop().expect("one task has one result")
    }

    async fn submit_many(
        &self,
        function: &str,
        tasks: &[Task],
        watch: Watch,
    ) -> Vec<Result<Submitted, Error>> {
        let refused = |error: Error| tasks.iter().map(|_| Err(error.clone())).collect();
        if !name_is_valid(function) {
            return refused(Error::Invalid(format!(
                "{function:?} is no name of a function"
            )));
        }
        let session = match self.session().await {
            Ok(session) => session,
            Err(error) => return refused(error),
        };
        let results = session.submit(function, tasks, watch).await;
        results
            .into_iter()
            .map(|result| result.map(|(accepted, end)| self.submitted(accepted, end)))
            .collect()
    }

    fn submitted(&self, accepted: Accepted, end: Option<FinishedReceiver>) -> Submitted {
        Submitted {
            request_id: accepted.request_id,
            duplicate: accepted.duplicate,
            durable: accepted.durable,
            client: self.clone(),
            end,
        }
    }

    /// The connection, made if there is none that takes requests.
    async fn session(&self) -> Result<Arc<Session>, Error> {
        if let Some(session) = self.inner.usable() {
            return Ok(session);
        }
        let _connecting = self.inner.connecting.lock().await;
        if let Some(session) = self.inner.usable() {
            return Ok(session);
        }
        let link = Link::open(&self.inner.options, None).await?;
        let session = Session::start(link);
        let former = self.inner.lock().replace(session.clone());
        drop(former);
        Ok(session)
    }
}

impl Inner {
    fn usable(&self) -> Option<Arc<Session>> {
        self.lock().clone().filter(|session| session.usable())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(session) = self.lock().take() {
            session.close();
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("options", &self.inner.options)
            .finish_non_exhaustive()
    }
}

/// A task that the server has taken.
#[derive(Debug)]
pub struct Submitted {
    /// The task's identity.
    pub request_id: RequestId,
    /// The `task_id` was there already; this is the first one's identity.
    pub duplicate: bool,
    /// The task is on disk, as opposed to in memory.
    pub durable: bool,
    client: Client,
    end: Option<FinishedReceiver>,
}

impl Submitted {
    /// Waits for the task's end, however long it takes; fails when the server is not reached for a minute.
    pub async fn finished(self) -> Result<Finished, Error> {
        let request = TaskName::Request(self.request_id);
        if let Some(end) = self.end {
            match end.await {
                Ok(Err(Error::ConnectionLost(_))) | Err(_) => {}
                Ok(told) => return told,
            }
        }
        loop {
            match self.client.wait(&request, WAIT_STEP).await {
                Err(Error::Refused(refusal)) if refusal.code == Code::DeadlineExceeded => {}
                other => return other,
            }
        }
    }
}

fn check_name(task: &TaskName) -> Result<(), Error> {
    if let TaskName::Given {
        function,
        key,
        task_id,
    } = task
    {
        for part in [Some(function), key.as_ref(), Some(task_id)]
            .into_iter()
            .flatten()
        {
            if !name_is_valid(part) {
                return Err(Error::Invalid(format!("{part:?} is no name")));
            }
        }
    }
    Ok(())
}

/// `ID`, `FUNCTION/TASK_ID` or `FUNCTION/KEY/TASK_ID`.
fn name(task: &TaskName) -> String {
    match task {
        TaskName::Request(id) => id.to_string(),
        TaskName::Given {
            function,
            key: None,
            task_id,
        } => format!("{function}/{task_id}"),
        TaskName::Given {
            function,
            key: Some(key),
            task_id,
        } => format!("{function}/{key}/{task_id}"),
    }
}

fn task_ref(task: &TaskName) -> TaskRef<'_> {
    match task {
        TaskName::Request(id) => TaskRef::Request(*id),
        TaskName::Given {
            function,
            key,
            task_id,
        } => TaskRef::Given {
            function,
            key: key.as_deref(),
            task_id,
        },
    }
}

/// A JSON object of the fields that are there.
fn object<const N: usize>(fields: [(&str, Value); N]) -> String {
    let mut object = Map::new();
    for (field, value) in fields {
        if !value.is_null() {
            object.insert(field.to_owned(), value);
        }
    }
    Value::Object(object).to_string()
}

fn text_field(json: &str, field: &str) -> Option<String> {
    let value: Value = serde_json::from_str(json).ok()?;
    value.get(field)?.as_str().map(str::to_owned)
}
