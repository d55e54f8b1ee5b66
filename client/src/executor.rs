//! Runs functions: registers them, receives attempts, sends outcomes, and keeps both over lost connections.

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pelton_net::Code;
use pelton_net::execute::{ExecuteTask, Offer, Register, Registered};
use pelton_net::frame::{Frame, FrameType, REGISTER_FUNCTIONS_MAX};
use pelton_net::id::name_is_valid;
use pelton_net::session::{ErrorFrame, encode_goodbye};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::attempt::{Attempt, TaskError};
use crate::error::Error;
use crate::link::{Link, unexpected};
use crate::options::ClientOptions;
use crate::work::{Function, Handler, Work};

/// Pauses between attempts to connect again: doubled from the first to the last, and shortened by up to a half at random.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// After the time to close is over, the last outcomes get this long to be acknowledged.
const LAST_ACKS: Duration = Duration::from_secs(5);
/// Bytes that wait for the connection before more outcomes are put behind them.
const OUTBOUND_BYTES_MAX: usize = 4 << 20;

/// What an executor is, beside its connection.
#[derive(Clone, Debug, Default)]
pub struct ExecutorOptions {
    /// The server and the key.
    pub client: ClientOptions,
    /// Slots over all functions together; 0 means the sum of theirs.
    pub slots: u32,
    /// Processor capacity in thousandths; 0 means not said.
    pub cpu_millis: u32,
    /// Memory; 0 means not said.
    pub memory_mib: u32,
}

impl From<ClientOptions> for ExecutorOptions {
    fn from(client: ClientOptions) -> ExecutorOptions {
        ExecutorOptions {
            client,
            ..ExecutorOptions::default()
        }
    }
}

/// Runs functions for a server.
///
/// ```no_run
/// use pelton_client::{Attempt, ClientOptions, Executor, TaskError};
///
/// # async fn example() -> Result<(), pelton_client::Error> {
/// let mut executor = Executor::connect(ClientOptions::from_env()?).await?;
/// executor.function("shout", 8, async |task: Attempt| {
///     let text = std::str::from_utf8(task.payload())?;
///     Ok(text.to_uppercase())
/// });
/// executor.run().await
/// # }
/// ```
///
/// When the connection breaks, running attempts go on; the next connection presents their leases and the outcomes that
/// nobody has acknowledged, so that a restart of the server costs no work.
pub struct Executor {
    options: ExecutorOptions,
    identity: u64,
    link: Link,
    functions: Vec<Function>,
    handle: ExecutorHandle,
    closing: watch::Receiver<Option<Instant>>,
    ended: watch::Sender<()>,
}

/// Closes an executor that runs elsewhere. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExecutorHandle {
    closing: watch::Sender<Option<Instant>>,
    ended: watch::Receiver<()>,
}

impl Executor {
    /// Connects. Nothing is registered before `run`.
    pub async fn connect(options: impl Into<ExecutorOptions>) -> Result<Executor, Error> {
        let options = options.into();
        let identity = random();
        let link = Link::open(&options.client, Some(identity)).await?;
        let (close, closing) = watch::channel(None);
        let (ended, end) = watch::channel(());
        Ok(Executor {
            options,
            identity,
            link,
            functions: Vec::new(),
            handle: ExecutorHandle {
                closing: close,
                ended: end,
            },
            closing,
            ended,
        })
    }

    /// Offers a function: at most `slots` of its tasks run here at once, each as a task of the runtime.
    ///
    /// An `async` closure may be given as long as it borrows nothing from its surroundings; `|task| async move { .. }`
    /// is the same.
    pub fn function<F, R, A>(&mut self, name: &str, slots: u32, handler: F) -> &mut Executor
    where
        F: Fn(Attempt) -> A + Send + 'static,
        A: Future<Output = Result<R, TaskError>> + Send + 'static,
        R: Into<Bytes>,
    {
        let start = move |attempt, finisher: crate::work::Finisher| {
            let running = handler(attempt);
            let task = tokio::spawn(async move {
                let result = running.await;
                finisher.finish(result.map(Into::into));
            });
            task.abort_handle()
        };
        self.offer(name, slots, Handler::Spawning(Box::new(start)))
    }

    /// Offers a function that is so cheap that it runs right where its tasks arrive, one after the other: it writes its
    /// result into the buffer and must not block, since nothing else of this executor happens meanwhile.
    ///
    /// ```no_run
    /// # fn example(mut executor: pelton_client::Executor) {
    /// executor.function_sync("length", 10_000, |task, result| {
    ///     result.extend_from_slice(task.payload.len().to_string().as_bytes());
    ///     Ok(())
    /// });
    /// # }
    /// ```
    pub fn function_sync<F>(&mut self, name: &str, slots: u32, handler: F) -> &mut Executor
    where
        F: FnMut(&ExecuteTask<'_>, &mut Vec<u8>) -> Result<(), TaskError> + Send + 'static,
    {
        self.offer(name, slots, Handler::Inline(Box::new(handler)))
    }

    fn offer(&mut self, name: &str, slots: u32, handler: Handler) -> &mut Executor {
        self.functions.push(Function {
            name: name.to_owned(),
            slots,
            handler,
        });
        self
    }

    /// Bytes that a payload and a result may have, as the server said.
    pub fn payload_bytes_max(&self) -> usize {
        self.link.limits.payload_bytes_max
    }

    /// A handle that closes this executor while it runs.
    pub fn handle(&self) -> ExecutorHandle {
        self.handle.clone()
    }

    /// Runs until it is closed, or until the server refuses it for good. A lost connection is made again for as long as
    /// it takes. Dropping the future drops the handlers that run.
    pub async fn run(self) -> Result<(), Error> {
        for function in &self.functions {
            if !name_is_valid(&function.name) {
                return Err(Error::Invalid(format!(
                    "{:?} is no name of a function",
                    function.name
                )));
            }
        }
        let limits = self.link.limits;
        let mut service = Service {
            options: self.options,
            identity: self.identity,
            work: Work::new(self.functions, limits),
            closing: self.closing,
            close_at: None,
            served: false,
            backoff: BACKOFF_MIN,
            _handle: self.handle,
            _ended: self.ended,
        };
        let mut link = Some(self.link);
        loop {
            let mut current = match link.take() {
                Some(link) => link,
                None => match service.connect_again().await? {
                    Some(link) => link,
                    None => return Ok(()),
                },
            };
            match service.serve(&mut current).await {
                Ok(()) => {
                    current.close().await;
                    return Ok(());
                }
                Err(error) => {
                    current.abandon(&error);
                    if is_final(&error) {
                        current.close().await;
                        return Err(error);
                    }
                    tracing::warn!(%error, "connection lost, connecting again");
                    service.work.on_disconnect()?;
                }
            }
        }
    }
}

impl ExecutorHandle {
    /// Takes no new attempts, lets those that run go on for at most `deadline`, then drops them; returns when `run` has
    /// returned.
    pub async fn close(&self, deadline: Duration) {
        let close_at = Instant::now() + deadline;
        self.closing.send_replace(Some(close_at));
        let mut ended = self.ended.clone();
        // Nothing is ever sent: the error says that the other end is gone.
        while ended.changed().await.is_ok() {}
    }
}

/// A running executor.
struct Service {
    options: ExecutorOptions,
    identity: u64,
    work: Work,
    closing: watch::Receiver<Option<Instant>>,
    close_at: Option<Instant>,
    /// There was a connection before: the next one resumes.
    served: bool,
    backoff: Duration,
    /// So that `closing` never sees its last sender go.
    _handle: ExecutorHandle,
    _ended: watch::Sender<()>,
}

impl Service {
    /// `None` if the executor was closed meanwhile and has nothing left to tell.
    async fn connect_again(&mut self) -> Result<Option<Link>, Error> {
        loop {
            let jitter = random() % 512;
            let pause = self.backoff.mul_f64(1.0 - jitter as f64 / 1024.0);
            self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
            self.close_at = *self.closing.borrow();
            if let Some(close_at) = self.close_at {
                self.work.close();
                if self.work.is_idle() {
                    return Ok(None);
                }
                if close_at <= Instant::now() {
                    return Err(Error::Unreachable(
                        "closed without a connection; the leases of what ran will expire".into(),
                    ));
                }
            }
            let mut closing = self.closing.clone();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = closing.changed(), if self.close_at.is_none() => continue,
            }
            match Link::open(&self.options.client, Some(self.identity)).await {
                Ok(link) => return Ok(Some(link)),
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => tracing::debug!(%error, "not connected yet"),
            }
        }
    }

    /// Serves one connection until the executor is closed.
    async fn serve(&mut self, link: &mut Link) -> Result<(), Error> {
        let mut registered = Registration::default();
        if std::mem::replace(&mut self.served, true) {
            // First the leases: the server frees what it has handed out and is not presented.
            self.work.resume(link.limits);
        } else {
            self.register(&mut registered);
        }
        let mut heartbeat = interval(link.limits.heartbeat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        let done = self.work.done();
        let mut said_goodbye = false;
        let mut dropped = false;
        loop {
            self.work.drain();
            if link.outbound.bytes() < OUTBOUND_BYTES_MAX {
                link.outbound.queue(self.work.take_bytes());
            }
            if let Some(close_at) = self.close_at {
                if !said_goodbye {
                    said_goodbye = true;
                    self.work.close();
                    encode_goodbye(self.work.frame().0);
                    continue;
                }
                let now = Instant::now();
                if self.work.is_idle() && link.outbound.is_empty() {
                    return Ok(());
                }
                if close_at <= now && !dropped {
                    dropped = true;
                    self.work.end_all();
                }
                if close_at + LAST_ACKS <= now {
                    return Ok(());
                }
            }
            let timer = self.next_timer(dropped);
            tokio::select! {
                biased;
                _ = heartbeat.tick() => self.work.heartbeat(),
                () = until(timer), if timer.is_some() => self.work.end_graces(Instant::now()),
                _ = self.closing.changed(), if self.close_at.is_none() => {
                    self.close_at = *self.closing.borrow();
                }
                ready = link.ready() => ready?,
                () = done.wake.notified() => {}
            }
            while let Some(frame) = link.inbound.next()? {
                self.on_frame(&frame, &mut registered)?;
            }
        }
    }

    fn next_timer(&self, dropped: bool) -> Option<Instant> {
        let close = self.close_at.map(|close_at| match dropped {
            false => close_at,
            true => close_at + LAST_ACKS,
        });
        [self.work.next_grace(), close].into_iter().flatten().min()
    }

    fn on_frame(&mut self, frame: &Frame, registered: &mut Registration) -> Result<(), Error> {
        match frame.kind {
            FrameType::Execute => self.work.on_execute(frame)?,
            FrameType::OutcomeAck => self.work.on_ack(frame)?,
            FrameType::Cancel => self.work.on_cancel(frame)?,
            FrameType::HeartbeatAck => self.work.on_lost(frame)?,
            FrameType::Resumed => {
                if self.work.on_resumed(frame)? {
                    self.register(registered);
                }
            }
            FrameType::Registered => self.on_registered(frame, registered)?,
            // The server is going away; its successor will be presented what is left.
            FrameType::Goodbye => {}
            FrameType::Error => {
                let error = Error::from_frame(&ErrorFrame::parse(frame)?);
                if frame.tag == 0 || registered.tags.contains(&frame.tag) {
                    return Err(error);
                }
                let outcomes = self.work.on_refused_frame(frame.tag, error.retryable())?;
                tracing::warn!(%error, outcomes, "the server refused a frame");
            }
            FrameType::Unknown => {
                let error = ErrorFrame::new(Code::Unimplemented, "unknown frame type");
                error.encode(self.work.frame().0, frame.tag);
            }
            FrameType::Hello
            | FrameType::Welcome
            | FrameType::Heartbeat
            | FrameType::Submit
            | FrameType::SubmitAnswer
            | FrameType::Finished
            | FrameType::Stop
            | FrameType::StopAnswer
            | FrameType::Wait
            | FrameType::Query
            | FrameType::QueryAnswer
            | FrameType::Register
            | FrameType::Outcome
            | FrameType::Resume => return Err(unexpected(frame).into()),
        }
        Ok(())
    }

    /// Offers all functions, in their order.
    fn register(&mut self, registered: &mut Registration) {
        let offers: Vec<(String, u32)> = self
            .work
            .functions
            .iter()
            .map(|function| (function.name.clone(), function.slots))
            .collect();
        for offers in offers.chunks(REGISTER_FUNCTIONS_MAX) {
            let (out, tag) = self.work.frame();
            let register = Register {
                slots: self.options.slots,
                cpu_millis: self.options.cpu_millis,
                memory_mib: self.options.memory_mib,
                offers: offers
                    .iter()
                    .map(|(function, slots)| Offer {
                        function,
                        slots: *slots,
                    })
                    .collect(),
            };
            register.encode(out, tag);
            registered.tags.push(tag);
        }
    }

    fn on_registered(&mut self, frame: &Frame, registered: &mut Registration) -> Result<(), Error> {
        let answer = Registered::parse(frame)?;
        registered.tags.retain(|tag| *tag != frame.tag);
        for (nth, &code) in answer.codes.iter().enumerate() {
            if code == Code::Ok {
                continue;
            }
            let index = usize::from(answer.first_index) + nth;
            let name = match self.work.functions.get(index) {
                Some(function) => &function.name,
                None => "?",
            };
            let error = Error::refused(code, format!("the function {name} was not registered"));
            return Err(error);
        }
        if registered.tags.is_empty() {
            self.backoff = BACKOFF_MIN;
        }
        Ok(())
    }
}

/// Register frames that are not answered yet.
#[derive(Default)]
struct Registration {
    tags: Vec<u64>,
}

async fn until(timer: Option<Instant>) {
    match timer {
        Some(timer) => sleep_until(timer.into()).await,
        None => std::future::pending().await,
    }
}

/// True for an error that another try would meet again.
fn is_final(error: &Error) -> bool {
    match error {
        Error::Unreachable(_) | Error::ConnectionLost(_) => false,
        Error::Refused(refusal) => !refusal.code.retryable(),
        Error::Invalid(_) | Error::Protocol(_) | Error::Closed => true,
    }
}

/// A number that nobody else has drawn: the keys of the standard library's hasher come from the system.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
