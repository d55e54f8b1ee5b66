//! The API for programs that embed the engine: blocking calls, callbacks, or polling with an eventfd, from any thread.
//!
//! Behind it is an edge like any other, on a thread that is started with the first call. Calls from many threads meet
//! there and go to the shards as batches.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt, io,
    os::fd::RawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::*},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam::queue::ArrayQueue;
use pelton_core::{
    config::Wish,
    error::Code,
    event::{
        Control, Durability, EdgeBatch, Filter, Outcome, OutcomeBatch, Query, Reply, Span, Start,
        SubmitBatch, SubmitTask, Target, Verdict, stow,
    },
    id::{ConnectionId, FunctionId, RequestId, ShardId, TaskName, TenantId, Token, name_is_valid},
    limits::{
        CONTENT_TYPE_BYTES_MAX, DELAY_MS_MAX, MAX_AGE_S_MAX, STOP_GRACE_MS_DEFAULT, TAG_BYTES_MAX,
        TAG_COUNT_MAX,
    },
};

use crate::{
    bell::Bell,
    calls::{Calls, Unsent},
    edge::Edge,
    engine::{Engine, lock},
    info::{InfoReply, TaskInfo},
    listing::{ListFilter, Listing},
    routes::Routes,
    slots::Lender,
};

/// Completions that may wait to be polled.
const COMPLETIONS_MAX: usize = 1 << 16;
/// Slots of one function: each is a thread.
const SLOTS_MAX: u32 = 4096;
/// How often idle slots move between shards.
const REBALANCE: Duration = Duration::from_millis(20);

/// A task to be handed in.
#[derive(Clone, Debug, Default)]
pub struct Task {
    /// The tenant.
    pub tenant: String,
    /// The function, which must exist: see [`Engine::function`] and [`Engine::configure`].
    pub function: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// The given name; empty to have one generated.
    pub task_id: String,
    /// The ordering key; empty for none.
    pub key: String,
    /// The payload's content type; empty for none.
    pub content_type: String,
    /// `name=value` or bare words, at most 8.
    pub tags: Vec<String>,
    /// When it may start.
    pub start: Start,
    /// Own maximum age in seconds; 0 for the function's.
    pub max_age_s: u32,
    /// What the acceptance promises.
    pub durability: Durability,
}

impl Task {
    /// A task with defaults everywhere.
    pub fn new(tenant: &str, function: &str, payload: impl Into<Vec<u8>>) -> Task {
        Task {
            tenant: tenant.to_owned(),
            function: function.to_owned(),
            payload: payload.into(),
            ..Task::default()
        }
    }

    /// Gives it a name, under which it is accepted once.
    #[must_use]
    pub fn named(self, task_id: &str) -> Task {
        Task {
            task_id: task_id.to_owned(),
            ..self
        }
    }
}

/// A task was accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Accepted {
    /// Its identity.
    pub request_id: RequestId,
    /// It was there already; this is the first one's identity.
    pub duplicate: bool,
    /// It is on disk.
    pub durable: bool,
}

/// Why a call was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// What a caller branches on.
    pub code: Code,
    /// What to do.
    pub what: &'static str,
}

impl Error {
    fn new(code: Code, what: &'static str) -> Error {
        Error { code, what }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.what)
    }
}

impl std::error::Error for Error {}

const NO_TASK: &str = "there is no such task, or it is no longer kept";
const NO_HISTORY: &str = "the history cannot be read: see the log of this process";
/// Tasks of one page.
const LIST_ROWS_MAX: u32 = 1_000;
const CLOSED: &str = "the engine is closing";
const BUSY: &str = "65,536 calls wait already: try again in a moment";
const NAME: &str = "a name is 1 to 128 bytes: a letter or '_', then letters, digits, '_' and '-'";

/// One attempt, as a function's handler gets it.
#[derive(Clone, Debug)]
pub struct Job {
    /// The task.
    pub request_id: RequestId,
    /// The attempt, counted from 1.
    pub attempt: u16,
    /// The given name; empty for a generated one.
    pub task_id: String,
    /// The ordering key; empty for none.
    pub key: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// Set when somebody stops the task: a handler that looks may end early.
    pub cancelled: Arc<AtomicBool>,
}

/// Why a handler did not succeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum JobError {
    /// It failed; it is tried again if a retry is left.
    Failed(String),
    /// What lies behind it is busy.
    Throttled {
        /// The wait asked for; 0 if not said.
        retry_after_ms: u32,
    },
    /// It was stopped.
    Stopped,
}

/// A submit that was started with [`Engine::submit_start`] has been answered.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The caller's number.
    pub ticket: u64,
    /// The answer.
    pub result: Result<Accepted, Error>,
}

type Handler = Arc<dyn Fn(&Job) -> Result<Vec<u8>, JobError> + Send + Sync>;
type SubmitReply = Box<dyn FnOnce(Result<Accepted, Error>) + Send>;
type AskReply = mpsc::Sender<Result<Asked, Error>>;

#[derive(Debug)]
pub(crate) enum Asked {
    Done,
    Task(Box<TaskInfo>),
    Finished,
    /// It is not in memory; its identity, as far as that is known.
    NotHeld(Option<RequestId>),
    Page {
        tasks: Vec<TaskInfo>,
        pages: u32,
    },
}

pub(crate) enum Question {
    Get,
    Wait,
    Stop,
}

pub(crate) enum Command {
    Submit(Task, SubmitReply),
    Ask {
        tenant: String,
        task: TaskName,
        question: Question,
        reply: AskReply,
    },
    List {
        tenant: TenantId,
        shard: ShardId,
        filter: Filter,
        reply: AskReply,
    },
    Configure(Wish, AskReply),
    Register {
        tenant: String,
        function: String,
        slots: u32,
        workers: Arc<Workers>,
        reply: AskReply,
    },
    Ended {
        request: RequestId,
        token: Token,
        run_us: u32,
        result: Result<Vec<u8>, JobError>,
    },
}

/// The edge that embedding calls share.
pub(crate) struct Embedded {
    calls: Arc<Calls>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
    completions: Arc<ArrayQueue<Completion>>,
    bell: Arc<Bell>,
    pools: Mutex<Vec<Pool>>,
}

impl Engine {
    /// Hands in a task and waits until it is accepted, which is on disk unless the task asks for less.
    pub fn submit(&self, task: Task) -> Result<Accepted, Error> {
        let (sender, receiver) = mpsc::channel();
        self.submit_then(task, move |result| {
            let _ = sender.send(result);
        })?;
        receiver
            .recv()
            .unwrap_or(Err(Error::new(Code::Unavailable, CLOSED)))
    }

    /// Hands in many tasks at once, which costs hardly more than one, and waits until each is answered.
    pub fn submit_all(&self, tasks: Vec<Task>) -> Vec<Result<Accepted, Error>> {
        let (sender, receiver) = mpsc::channel();
        let mut results: Vec<Result<Accepted, Error>> = tasks
            .iter()
            .map(|_| Err(Error::new(Code::Unavailable, CLOSED)))
            .collect();
        for (index, task) in tasks.into_iter().enumerate() {
            let sender = sender.clone();
            let asked = self.submit_then(task, move |result| {
                let _ = sender.send((index, result));
            });
            if let Err(error) = asked {
                results[index] = Err(error);
            }
        }
        drop(sender);
        for (index, result) in receiver {
            results[index] = result;
        }
        results
    }

    /// Hands in a task; `then` is called with the answer, on the embedding thread: it must not block.
    pub fn submit_then(
        &self,
        task: Task,
        then: impl FnOnce(Result<Accepted, Error>) + Send + 'static,
    ) -> Result<(), Error> {
        self.embedded()?.send(Command::Submit(task, Box::new(then)))
    }

    /// Hands in a task; the answer comes by [`Engine::poll_completion`].
    pub fn submit_start(&self, task: Task, ticket: u64) -> Result<(), Error> {
        let embedded = self.embedded()?;
        let completions = Arc::clone(&embedded.completions);
        let bell = Arc::clone(&embedded.bell);
        self.submit_then(task, move |result| {
            // There is room: fewer calls wait than completions fit, unless the caller does not poll.
            let _ = completions.push(Completion { ticket, result });
            bell.ring();
        })
    }

    /// The next answer to a [`Engine::submit_start`], if there is one.
    pub fn poll_completion(&self) -> Option<Completion> {
        self.embedded().ok()?.completions.pop()
    }

    /// An eventfd that is readable when completions may be polled. It belongs to the engine; whoever waits for it
    /// reads its eight bytes and then polls until nothing is left.
    pub fn completion_fd(&self) -> Result<RawFd, Error> {
        Ok(self.embedded()?.bell.fd())
    }

    /// A task by request id, `FUNCTION/TASK_ID` or `FUNCTION/KEY/TASK_ID`.
    pub fn get(&self, tenant: &str, task: &str) -> Result<TaskInfo, Error> {
        self.get_within(tenant, task, Duration::MAX)
    }

    fn get_within(&self, tenant: &str, task: &str, timeout: Duration) -> Result<TaskInfo, Error> {
        match self.ask(tenant, task, Question::Get, timeout)? {
            Asked::Task(info) => Ok(*info),
            Asked::NotHeld(request) => self.get_from_history(tenant, task, request),
            Asked::Done | Asked::Finished | Asked::Page { .. } => {
                Err(Error::new(Code::Internal, "no task was answered"))
            }
        }
    }

    fn get_from_history(
        &self,
        tenant: &str,
        task: &str,
        request: Option<RequestId>,
    ) -> Result<TaskInfo, Error> {
        let none = Error::new(Code::NotFound, NO_TASK);
        let (Some(history), Some(name)) = (self.history(), TaskName::parse(task)) else {
            return Err(none);
        };
        let (tenant, target, _) = self.with_routes(|routes| locate(routes, tenant, name))?;
        match history.get(tenant, &target, request) {
            Ok(found) => found.ok_or(none),
            Err(error) => {
                tracing::error!(%error, "a task cannot be looked for in the history");
                Err(Error::new(Code::Unavailable, NO_HISTORY))
            }
        }
    }

    /// Tasks of a tenant in the order of their acceptance, the last one first, and what to put into
    /// [`ListFilter::cursor`] for the next page; `None` when there is none. With a filter a page may be short, or empty,
    /// and there are others all the same.
    pub fn list(
        &self,
        tenant: &str,
        filter: ListFilter,
    ) -> Result<(Vec<TaskInfo>, Option<u128>), Error> {
        if filter.limit == 0 || filter.limit > LIST_ROWS_MAX {
            return Err(Error::new(
                Code::InvalidArgument,
                "a limit is from 1 to 1000",
            ));
        }
        let Some(tenant) = self.with_routes(|routes| routes.tenant(tenant)) else {
            return Ok((Vec::new(), None));
        };
        let mut listing = Listing::new(filter, self.shard_count());
        while let Some((shard, filter)) = listing.question() {
            if self
                .quarantined()
                .any(|quarantine| quarantine.shard == shard)
            {
                listing.on_page(Vec::new(), 0);
                continue;
            }
            let (reply, receiver) = mpsc::channel();
            self.embedded()?.send(Command::List {
                tenant,
                shard,
                filter,
                reply,
            })?;
            match received(&receiver, Duration::MAX)? {
                Asked::Page { tasks, pages } => listing.on_page(tasks, pages),
                Asked::Done | Asked::Finished | Asked::NotHeld(_) | Asked::Task(_) => {
                    return Err(Error::new(Code::Internal, "no list was answered"));
                }
            }
        }
        listing.finish(tenant, self.history()).map_err(|error| {
            tracing::error!(%error, "the history cannot be listed");
            Error::new(Code::Unavailable, NO_HISTORY)
        })
    }

    /// Waits until a task is terminal, and returns it.
    pub fn wait(&self, tenant: &str, task: &str, timeout: Duration) -> Result<TaskInfo, Error> {
        let start = Instant::now();
        match self.ask(tenant, task, Question::Wait, timeout)? {
            Asked::Task(info) => Ok(*info),
            Asked::NotHeld(request) => self.get_from_history(tenant, task, request),
            Asked::Done | Asked::Finished | Asked::Page { .. } => {
                let left = timeout
                    .saturating_sub(start.elapsed())
                    .max(Duration::from_secs(1));
                self.get_within(tenant, task, left)
            }
        }
    }

    /// Ends a task.
    pub fn stop(&self, tenant: &str, task: &str) -> Result<(), Error> {
        match self.ask(tenant, task, Question::Stop, Duration::MAX)? {
            Asked::NotHeld(request) => {
                self.get_from_history(tenant, task, request)?;
                Err(Error::new(
                    Code::FailedPrecondition,
                    "the task has ended or is being stopped",
                ))
            }
            Asked::Done | Asked::Finished | Asked::Task(_) | Asked::Page { .. } => Ok(()),
        }
    }

    /// Makes or changes a tenant or a function; returns when every shard has it on disk.
    pub fn configure(&self, wish: Wish) -> Result<(), Error> {
        let (reply, receiver) = mpsc::channel();
        self.embedded()?.send(Command::Configure(wish, reply))?;
        received(&receiver, Duration::MAX).map(drop)
    }

    /// Runs a function's tasks in this process, `slots` at a time, each on a thread of the engine's. The function is
    /// made if it does not exist. A handler that panics has failed.
    pub fn function(
        &self,
        tenant: &str,
        function: &str,
        slots: u32,
        handler: impl Fn(&Job) -> Result<Vec<u8>, JobError> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        if slots == 0 || slots > SLOTS_MAX {
            return Err(Error::new(
                Code::InvalidArgument,
                "a function has from 1 to 4096 slots",
            ));
        }
        let embedded = self.embedded()?;
        let workers = Arc::new(Workers::default());
        let handler: Handler = Arc::new(handler);
        let threads: Result<Vec<_>, io::Error> = (0..slots)
            .map(|index| {
                let workers = Arc::clone(&workers);
                let handler = Arc::clone(&handler);
                let calls = Arc::clone(&embedded.calls);
                thread::Builder::new()
                    .name(format!("{function}-{index}"))
                    .spawn(move || workers.work(&handler, &calls))
            })
            .collect();
        let threads = threads.map_err(|_| {
            workers.close();
            Error::new(Code::Unavailable, "the system gives no more threads")
        })?;
        lock(&embedded.pools).push(Pool {
            workers: Arc::clone(&workers),
            threads,
        });
        let (reply, receiver) = mpsc::channel();
        embedded.send(Command::Register {
            tenant: tenant.to_owned(),
            function: function.to_owned(),
            slots,
            workers,
            reply,
        })?;
        received(&receiver, Duration::MAX).map(drop)
    }

    fn ask(
        &self,
        tenant: &str,
        task: &str,
        question: Question,
        timeout: Duration,
    ) -> Result<Asked, Error> {
        let task = TaskName::parse(task).ok_or(Error::new(
            Code::InvalidArgument,
            "a task is named by its request id, FUNCTION/TASK_ID or FUNCTION/KEY/TASK_ID",
        ))?;
        let (reply, receiver) = mpsc::channel();
        self.embedded()?.send(Command::Ask {
            tenant: tenant.to_owned(),
            task,
            question,
            reply,
        })?;
        received(&receiver, timeout)
    }

    fn embedded(&self) -> Result<&Embedded, Error> {
        if let Some(embedded) = self.embedded.get() {
            return Ok(embedded);
        }
        let _one = lock(&self.embedding);
        if let Some(embedded) = self.embedded.get() {
            return Ok(embedded);
        }
        let embedded = Embedded::start(self)?;
        Ok(self.embedded.get_or_init(|| embedded))
    }
}

fn received(
    receiver: &mpsc::Receiver<Result<Asked, Error>>,
    timeout: Duration,
) -> Result<Asked, Error> {
    let received = if timeout == Duration::MAX {
        receiver
            .recv()
            .map_err(|_| mpsc::RecvTimeoutError::Disconnected)
    } else {
        receiver.recv_timeout(timeout)
    };
    match received {
        Ok(answer) => answer,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::new(
            Code::DeadlineExceeded,
            "the task is not terminal yet: wait again",
        )),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::new(Code::Unavailable, CLOSED)),
    }
}

impl Embedded {
    fn start(engine: &Engine) -> Result<Embedded, Error> {
        let unavailable = |what| move |_: io::Error| Error::new(Code::Unavailable, what);
        let bell = Bell::new().map_err(unavailable("the system gives no more descriptors"))?;
        // The edge and the queue are made here, so that they can name the thread, and given to it as it starts.
        let (sender, receiver) = mpsc::channel::<(Edge, Arc<Calls>)>();
        let thread = thread::Builder::new()
            .name("pelton-embedded".to_owned())
            .spawn(move || {
                if let Ok((edge, calls)) = receiver.recv() {
                    Caller::new(edge, calls).run();
                }
            })
            .map_err(unavailable("the system gives no more threads"))?;
        let calls = Arc::new(Calls::new(thread.thread().clone()));
        let waked = thread.thread().clone();
        let edge = engine.attach(move || waked.unpark()).ok_or(Error::new(
            Code::ResourceExhausted,
            "the engine has no room for more edges",
        ))?;
        let _ = sender.send((edge, Arc::clone(&calls)));
        Ok(Embedded {
            calls,
            thread: Mutex::new(Some(thread)),
            completions: Arc::new(ArrayQueue::new(COMPLETIONS_MAX)),
            bell: Arc::new(bell),
            pools: Mutex::default(),
        })
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.calls.send(command).map_err(|unsent| match unsent {
            Unsent::Closed => Error::new(Code::Unavailable, CLOSED),
            Unsent::Full => Error::new(Code::ResourceExhausted, BUSY),
        })
    }

    /// Ends the workers once they have finished what they run, and then the embedding thread.
    pub(crate) fn close(&self) {
        self.calls.refuse();
        for pool in lock(&self.pools).drain(..) {
            pool.workers.close();
            for thread in pool.threads {
                let _ = thread.join();
            }
        }
        self.calls.end();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        self.calls.ended();
    }
}

struct Pool {
    workers: Arc<Workers>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// What waits for the threads of one function.
#[derive(Default)]
pub(crate) struct Workers {
    jobs: Mutex<VecDeque<(Job, Token)>>,
    more: Condvar,
    closed: AtomicBool,
}

impl Workers {
    fn give(&self, job: Job, token: Token) {
        lock(&self.jobs).push_back((job, token));
        self.more.notify_one();
    }

    fn close(&self) {
        self.closed.store(true, SeqCst);
        let _jobs = lock(&self.jobs);
        self.more.notify_all();
    }

    fn work(&self, handler: &Handler, calls: &Calls) {
        loop {
            let (job, token) = {
                let mut jobs = lock(&self.jobs);
                loop {
                    if self.closed.load(Relaxed) {
                        return;
                    }
                    if let Some(job) = jobs.pop_front() {
                        break job;
                    }
                    jobs = self
                        .more
                        .wait(jobs)
                        .unwrap_or_else(|poisoned| poisoned.into_inner());
                }
            };
            let started = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| handler(&job)))
                .unwrap_or_else(|_| Err(JobError::Failed("the handler panicked".to_owned())));
            calls.finish(Command::Ended {
                request: job.request_id,
                token,
                run_us: u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX),
                result,
            });
        }
    }
}

/// A function that this process runs.
struct Served {
    function: FunctionId,
    lender: Lender,
    workers: Arc<Workers>,
}

/// What runs on the embedding thread.
struct Caller {
    edge: Edge,
    calls: Arc<Calls>,
    connection: ConnectionId,
    executor: u64,
    /// By ticket: the batch's shard and the replies of its tasks, in their order.
    submits: HashMap<u64, (ShardId, Vec<Option<SubmitReply>>)>,
    asks: HashMap<u64, AskReply>,
    /// Functions that are being made: what is registered once that is done.
    registering: HashMap<u64, (String, String, u32, Arc<Workers>, AskReply)>,
    served: Vec<Served>,
    running: HashMap<RequestId, (usize, ShardId, Arc<AtomicBool>)>,
    next_ticket: u64,
    rebalanced: Instant,
    /// Messages that found an inbox full.
    unsent: VecDeque<(ShardId, Control)>,
}

impl Caller {
    fn new(edge: Edge, calls: Arc<Calls>) -> Caller {
        let mut executor = [0; 8];
        getrandom::fill(&mut executor).expect("the kernel gives random numbers");
        Caller {
            connection: ConnectionId::new(edge.id(), 0),
            edge,
            calls,
            executor: u64::from_le_bytes(executor),
            submits: HashMap::new(),
            asks: HashMap::new(),
            registering: HashMap::new(),
            served: Vec::new(),
            running: HashMap::new(),
            next_ticket: 1,
            rebalanced: Instant::now(),
            unsent: VecDeque::new(),
        }
    }

    fn run(mut self) {
        loop {
            let ending = self.calls.is_ending();
            self.commands();
            while let Some(delivery) = self.edge.take() {
                self.on_batch(delivery.shard, &delivery.batch);
                for (ticket, reply) in delivery.infos.into_iter().map(|i| (i.ticket, i.reply)) {
                    match reply {
                        InfoReply::Task(task) => self.answer(ticket, Ok(Asked::Task(task))),
                        InfoReply::NotHeld { request } => {
                            self.answer(ticket, Ok(Asked::NotHeld(request)));
                        }
                        InfoReply::Page { tasks, pages } => {
                            self.answer(ticket, Ok(Asked::Page { tasks, pages }));
                        }
                        InfoReply::Stats(_) => {}
                    }
                }
            }
            self.rebalance();
            self.resend();
            self.edge.wake();
            if ending {
                // A shard that is gone answers nobody: its callers learn that the engine is closing.
                let edge = &self.edge;
                self.submits.retain(|_, (shard, _)| !edge.is_gone(*shard));
                if self.calls.is_empty() && self.unsent.is_empty() && self.submits.is_empty() {
                    break;
                }
            }
            let polls = !self.unsent.is_empty() || self.lends_over_shards();
            let most = if ending {
                Some(Duration::from_millis(1))
            } else {
                polls.then_some(REBALANCE)
            };
            self.calls.rest(&self.edge, most);
        }
        for shard in self.edge.shards() {
            self.control(
                shard,
                Control::SessionClosed {
                    executor: self.executor,
                    connection: self.connection,
                },
            );
        }
        self.edge.wake();
    }

    fn ticket(&mut self) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        ticket
    }

    fn control(&mut self, shard: ShardId, control: Control) {
        self.unsent.push_back((shard, control));
        self.resend();
    }

    fn resend(&mut self) {
        while let Some((shard, control)) = self.unsent.pop_front() {
            if let Err(control) = self.edge.control(shard, control)
                && !self.edge.is_gone(shard)
            {
                self.unsent.push_front((shard, control));
                return;
            }
        }
    }

    fn commands(&mut self) {
        let mut submits = Vec::new();
        let mut ended: BTreeMap<ShardId, OutcomeBatch> = BTreeMap::new();
        while let Some(command) = self.calls.take() {
            match command {
                Command::Submit(task, reply) => {
                    submits.push((task, reply));
                    if submits.len() >= 4096 {
                        self.submit(std::mem::take(&mut submits));
                    }
                }
                Command::Ask {
                    tenant,
                    task,
                    question,
                    reply,
                } => self.ask(&tenant, task, &question, reply),
                Command::List {
                    tenant,
                    shard,
                    filter,
                    reply,
                } => {
                    let (connection, ticket) = (self.connection, self.ticket());
                    self.asks.insert(ticket, reply);
                    let query = Query::List { filter };
                    self.control(
                        shard,
                        Control::Query {
                            connection,
                            ticket,
                            tenant,
                            query,
                        },
                    );
                }
                Command::Configure(wish, reply) => {
                    let ticket = self.ticket();
                    self.asks.insert(ticket, reply);
                    self.wish(ticket, wish);
                }
                Command::Register {
                    tenant,
                    function,
                    slots,
                    workers,
                    reply,
                } => {
                    let ticket = self.ticket();
                    let wish = Wish::EnsureFunction {
                        tenant: tenant.clone(),
                        name: function.clone(),
                    };
                    let known = self.function(&tenant, &function).is_some();
                    self.registering
                        .insert(ticket, (tenant, function, slots, workers, reply));
                    // What is known already needs no shard 0, which may not be served.
                    if known {
                        self.registered(ticket, &Reply::Done { state: None });
                    } else {
                        self.wish(ticket, wish);
                    }
                }
                Command::Ended {
                    request,
                    token,
                    run_us,
                    result,
                } => self.ended((request, token, run_us), result, &mut ended),
            }
        }
        self.submit(submits);
        for (shard, batch) in ended {
            self.control(shard, Control::Outcomes(batch));
        }
    }

    fn wish(&mut self, ticket: u64, wish: Wish) {
        let connection = self.connection;
        self.control(
            ShardId(0),
            Control::Configure {
                connection,
                ticket,
                wish,
            },
        );
    }

    fn submit(&mut self, submits: Vec<(Task, SubmitReply)>) {
        let mut batches: BTreeMap<(ShardId, TenantId), Box<SubmitBatch>> = BTreeMap::new();
        let mut refused = Vec::new();
        for (task, reply) in submits {
            let placed = self.edge.with_routes(|routes| place(routes, &task));
            let (tenant, function, cell, shard) = match placed {
                Ok(placed) => placed,
                Err(error) => {
                    refused.push((reply, error));
                    continue;
                }
            };
            let ticket = match batches.get(&(shard, tenant)) {
                Some(batch) => batch.ticket,
                None => {
                    let ticket = self.ticket();
                    let batch = SubmitBatch {
                        connection: self.connection,
                        ticket,
                        tenant,
                        notify: false,
                        with_result: false,
                        tasks: Vec::new(),
                        bytes: Vec::new(),
                        done: 0,
                    };
                    batches.insert((shard, tenant), Box::new(batch));
                    self.submits.insert(ticket, (shard, Vec::new()));
                    ticket
                }
            };
            let batch = batches.get_mut(&(shard, tenant)).expect("made above");
            let (_, replies) = self.submits.get_mut(&ticket).expect("made with the batch");
            let mut tags = Vec::new();
            for tag in &task.tags {
                tags.push(tag.len() as u8);
                tags.extend_from_slice(tag.as_bytes());
            }
            batch.tasks.push(SubmitTask {
                function,
                cell,
                index: replies.len() as u32,
                start: task.start,
                max_age_s: task.max_age_s,
                cost: 0,
                priority: 0,
                durability: task.durability,
                task_id: stow(&mut batch.bytes, task.task_id.as_bytes()),
                key: stow(&mut batch.bytes, task.key.as_bytes()),
                content_type: stow(&mut batch.bytes, task.content_type.as_bytes()),
                traceparent: Span::default(),
                tags: stow(&mut batch.bytes, &tags),
                payload: stow(&mut batch.bytes, &task.payload),
            });
            replies.push(Some(reply));
        }
        for ((shard, _), batch) in batches {
            let ticket = batch.ticket;
            if self.edge.submit(shard, batch).is_err() {
                let error = if self.edge.is_closing() {
                    Error::new(Code::Unavailable, CLOSED)
                } else {
                    Error::new(
                        Code::ResourceExhausted,
                        "the engine takes no more at the moment: try again later",
                    )
                };
                let (_, replies) = self.submits.remove(&ticket).unwrap_or((shard, Vec::new()));
                refused.extend(replies.into_iter().flatten().map(|r| (r, error.clone())));
            }
        }
        for (reply, error) in refused {
            reply(Err(error));
        }
    }

    fn ask(&mut self, tenant: &str, task: TaskName, question: &Question, reply: AskReply) {
        let placed = self.edge.with_routes(|routes| locate(routes, tenant, task));
        let (tenant, target, shard) = match placed {
            Ok(placed) => placed,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let ticket = self.ticket();
        self.asks.insert(ticket, reply);
        let query = match question {
            Question::Get => Query::Get { target },
            Question::Wait => Query::Wait { target },
            Question::Stop => Query::Stop {
                target,
                grace_ms: STOP_GRACE_MS_DEFAULT,
            },
        };
        let connection = self.connection;
        self.control(
            shard,
            Control::Query {
                connection,
                ticket,
                tenant,
                query,
            },
        );
    }

    fn answer(&mut self, ticket: u64, answer: Result<Asked, Error>) {
        if let Some(reply) = self.asks.remove(&ticket) {
            let _ = reply.send(answer);
        }
    }

    fn on_batch(&mut self, shard: ShardId, batch: &EdgeBatch) {
        for run in &batch.runs {
            let answers = &batch.answers[run.first as usize..][..run.count as usize];
            let Some((_, replies)) = self.submits.get_mut(&run.ticket) else {
                continue;
            };
            for answer in answers {
                let reply = replies
                    .get_mut(answer.index as usize)
                    .and_then(Option::take);
                let result = match answer.code {
                    Code::Ok => Ok(Accepted {
                        request_id: answer.request,
                        duplicate: answer.duplicate,
                        durable: answer.durable,
                    }),
                    code => Err(Error::new(code, answer.what)),
                };
                if let Some(reply) = reply {
                    reply(result);
                }
            }
            if replies.iter().all(Option::is_none) {
                self.submits.remove(&run.ticket);
            }
        }
        for execute in &batch.executes {
            let index = usize::from(execute.index);
            let text =
                |span: Span| String::from_utf8_lossy(&batch.bytes[span.range()]).into_owned();
            let Some(served) = self.served.get_mut(index) else {
                continue;
            };
            let cancelled = Arc::new(AtomicBool::new(false));
            served.lender.on_execute(shard);
            let job = Job {
                request_id: execute.request,
                attempt: execute.token.attempt,
                task_id: text(execute.task_id),
                key: text(execute.key),
                payload: batch.bytes[execute.payload.range()].to_vec(),
                cancelled: Arc::clone(&cancelled),
            };
            self.running
                .insert(execute.request, (index, shard, cancelled));
            served.workers.give(job, execute.token);
        }
        for cancel in &batch.cancels {
            if let Some((_, _, cancelled)) = self.running.get(&cancel.request) {
                cancelled.store(true, Relaxed);
            }
        }
        for finished in &batch.finished {
            self.answer(finished.ticket, Ok(Asked::Finished));
        }
        for (_, ticket, reply) in &batch.replies {
            if self.registering.contains_key(ticket) {
                self.registered(*ticket, reply);
                continue;
            }
            match reply {
                Reply::Refused { code, what } => {
                    self.answer(*ticket, Err(Error::new(*code, what)));
                }
                Reply::Done { .. }
                | Reply::Task { .. }
                | Reply::Page { .. }
                | Reply::NotHeld { .. }
                | Reply::Stats { .. }
                | Reply::Leases { .. }
                | Reply::LeasesLost { .. } => self.answer(*ticket, Ok(Asked::Done)),
            }
        }
    }

    fn registered(&mut self, ticket: u64, reply: &Reply) {
        let Some((tenant, name, slots, workers, caller)) = self.registering.remove(&ticket) else {
            return;
        };
        if let Reply::Refused { code, what } = reply {
            let _ = caller.send(Err(Error::new(*code, what)));
            return;
        }
        let Some(function) = self.function(&tenant, &name) else {
            let _ = caller.send(Err(Error::new(Code::NotFound, "the function was removed")));
            return;
        };
        if self.served.is_empty() {
            for shard in self.edge.shards() {
                let (executor, connection) = (self.executor, self.connection);
                let control = Control::SessionOpened {
                    executor,
                    connection,
                };
                self.control(shard, control);
            }
        }
        self.served.push(Served {
            function,
            lender: Lender::new(slots, self.edge.served()),
            workers,
        });
        self.lend(self.served.len() - 1);
        let _ = caller.send(Ok(Asked::Done));
    }

    fn function(&self, tenant: &str, name: &str) -> Option<FunctionId> {
        self.edge.with_routes(|routes| {
            let tenant = routes.tenant(tenant)?;
            Some(routes.function(tenant, name)?.0)
        })
    }

    fn lend(&mut self, index: usize) {
        let served = &mut self.served[index];
        let function = served.function;
        for (shard, count) in served.lender.changes() {
            let executor = self.executor;
            let control = Control::SlotsLent {
                executor,
                function,
                index: index as u16,
                count,
            };
            self.control(shard, control);
        }
    }

    fn lends_over_shards(&self) -> bool {
        !self.served.is_empty() && self.edge.shard_count() > 1
    }

    fn rebalance(&mut self) {
        if !self.lends_over_shards() || self.rebalanced.elapsed() < REBALANCE {
            return;
        }
        self.rebalanced = Instant::now();
        for index in 0..self.served.len() {
            if self.served[index].lender.rebalance() {
                self.lend(index);
            }
        }
    }

    fn ended(
        &mut self,
        (request, token, run_us): (RequestId, Token, u32),
        result: Result<Vec<u8>, JobError>,
        batches: &mut BTreeMap<ShardId, OutcomeBatch>,
    ) {
        let Some((index, shard, _)) = self.running.remove(&request) else {
            return;
        };
        self.served[index].lender.on_outcome(shard);
        let batch = batches.entry(shard).or_insert_with(|| OutcomeBatch {
            connection: self.connection,
            ticket: 0,
            outcomes: Vec::new(),
            bytes: Vec::new(),
            done: 0,
            refused: Vec::new(),
        });
        let (verdict, error, result) = match result {
            Ok(result) => (Verdict::Succeeded, String::new(), result),
            Err(JobError::Failed(error)) => (Verdict::Failed, error, Vec::new()),
            Err(JobError::Throttled { retry_after_ms }) => (
                Verdict::Throttled { retry_after_ms },
                String::new(),
                Vec::new(),
            ),
            Err(JobError::Stopped) => (Verdict::Stopped, String::new(), Vec::new()),
        };
        batch.outcomes.push(Outcome {
            request,
            token,
            verdict,
            code: Code::Ok,
            run_us,
            error: stow(&mut batch.bytes, error.as_bytes()),
            output: Span::default(),
            result: stow(&mut batch.bytes, &result),
        });
    }
}

type Placed = (TenantId, FunctionId, pelton_core::id::CellId, ShardId);

/// Checks what needs no state, as every edge does, and finds the task's shard.
fn place(routes: &Routes, task: &Task) -> Result<Placed, Error> {
    let invalid = |what| Err(Error::new(Code::InvalidArgument, what));
    for name in [&task.task_id, &task.key] {
        if !name.is_empty() && !name_is_valid(name) {
            return invalid(NAME);
        }
    }
    if RequestId::parse(&task.task_id).is_some() {
        return invalid("a task_id must not look like a request id: t and 32 hex digits");
    }
    if task.content_type.len() > CONTENT_TYPE_BYTES_MAX {
        return invalid("a content type has at most 128 bytes");
    }
    let tag_ok = |tag: &String| !tag.is_empty() && tag.len() <= TAG_BYTES_MAX;
    if task.tags.len() > TAG_COUNT_MAX || !task.tags.iter().all(tag_ok) {
        return invalid("a task has at most 8 tags of 1 to 128 bytes");
    }
    if task.max_age_s > MAX_AGE_S_MAX {
        return invalid("max age is at most 604800 seconds");
    }
    if matches!(task.start, Start::DelayMs(delay) if delay > DELAY_MS_MAX) {
        return invalid("a delay is at most 366 days");
    }
    let unknown = Error::new(
        Code::NotFound,
        "there is no such function: Engine::function or Engine::configure makes it",
    );
    let tenant = routes.tenant(&task.tenant).ok_or(unknown.clone())?;
    let (id, function) = routes.function(tenant, &task.function).ok_or(unknown)?;
    let cell = routes.cell_of(function, &task.key, &task.task_id);
    Ok((tenant, id, cell, routes.shard_of(cell)))
}

fn locate(
    routes: &Routes,
    tenant: &str,
    task: TaskName,
) -> Result<(TenantId, Target, ShardId), Error> {
    let none = || Error::new(Code::NotFound, NO_TASK);
    let tenant = routes.tenant(tenant).ok_or_else(none)?;
    match task {
        TaskName::Request(request) => {
            let shard = routes.shard_of(request.cell());
            Ok((tenant, Target::Request(request), shard))
        }
        TaskName::Given {
            function,
            key,
            task_id,
        } => {
            let (id, function) = routes.function(tenant, &function).ok_or_else(none)?;
            let key = key.unwrap_or_default();
            let shard = routes.shard_of(routes.cell_of(function, &key, &task_id));
            let target = Target::Given {
                function: id,
                key,
                task_id,
            };
            Ok((tenant, target, shard))
        }
    }
}

#[cfg(test)]
mod tests {
    use pelton_core::config::{Change, Directory, FunctionConfig, TenantConfig};

    use std::sync::OnceLock;

    use super::*;
    use crate::{engine::Shared, inbox::ShardInbox, routes::RoutePointer};

    #[test]
    fn a_caller_whose_shard_is_gone_learns_it_when_the_engine_closes() {
        let (tenant, name) = (TenantId(0), "acme".to_owned());
        let mut directory = Directory::default();
        let config = TenantConfig::default();
        directory.apply(
            1,
            &Change::Tenant {
                id: tenant,
                name,
                config,
            },
        );
        let (id, name, config) = (FunctionId(0), "job".to_owned(), FunctionConfig::default());
        directory.apply(
            2,
            &Change::Function {
                id,
                tenant,
                name,
                config,
            },
        );
        let shared = Arc::new(Shared {
            history: OnceLock::new(),
            inboxes: vec![ShardInbox::new().unwrap()],
            edges: vec![OnceLock::new()],
            routes: RoutePointer::new(Routes::new(1, directory)),
            quarantined: vec![OnceLock::new()],
            holds: vec![crate::hold::HoldPlace::default()],
        });
        let edge = Edge::attach(&shared, Box::new(|| {})).unwrap();
        let calls = Arc::new(Calls::new(thread::current()));
        let mut caller = Caller::new(edge, Arc::clone(&calls));
        let (sender, receiver) = mpsc::channel();
        let reply: SubmitReply = Box::new(move |result| sender.send(result).unwrap());
        let call = Command::Submit(Task::new("acme", "job", ""), reply);
        assert_eq!(calls.send(call), Ok(()));
        caller.commands();
        assert_eq!(caller.submits.len(), 1);
        shared.inboxes[0].gone.store(true, Relaxed);
        calls.refuse();
        calls.end();
        caller.run();
        assert!(receiver.recv().is_err(), "its way to an answer was dropped");
    }
}
