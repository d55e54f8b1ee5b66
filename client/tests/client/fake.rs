//! A server as far as a client can see one: it takes tasks, hands them to executors and remembers everything over a
//! restart. Nothing is on disk, nothing is fair, one thread.

use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pelton_client::{Client, ClientOptions, Executor, Trust};
use pelton_net::Code;
use pelton_net::execute::{
    Cancel, ExecuteTask, OutcomeStatus, RefusedOutcome, Register, Registered, ResumedLease,
    TaskOutcome,
};
use pelton_net::frame::{Frame, FrameReader, FrameType, LEASES_PER_FRAME_MAX};
use pelton_net::id::{CellId, RequestId, SlotIndex, Token};
use pelton_net::item::{Item, ItemWriter, Items};
use pelton_net::limits::FRAME_BYTES_MAX;
use pelton_net::query::{Operation, Query, QueryAnswer};
use pelton_net::quic::certificate::Certificate;
use pelton_net::quic::server;
use pelton_net::session::{Credential, ErrorFrame, Hello, Lease, Welcome};
use pelton_net::submit::{
    ANSWER_DUPLICATE, ANSWER_DURABLE, AnswerWriter, Finished, Stop, StopAnswer, SubmitView,
    TaskAnswer, TaskRef, TaskStatus, Wait,
};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

pub const IN_FLIGHT_MAX: u32 = 5_000;
pub const PAYLOAD_MAX: u32 = 256 << 10;
pub const KEY: &str = "pk_right";

type Outbox = UnboundedSender<Bytes>;

/// A fake server and what it remembers.
pub struct Fake {
    dir: TempDir,
    pub address: SocketAddr,
    pub state: Arc<Mutex<State>>,
    pub knobs: Arc<Knobs>,
    running: Option<(watch::Sender<bool>, std::thread::JoinHandle<()>)>,
}

/// What tests turn.
#[derive(Default)]
pub struct Knobs {
    /// Submits are taken and not answered.
    pub deaf: AtomicBool,
    /// Outcomes are neither taken nor acknowledged.
    pub ignore_outcomes: AtomicBool,
    /// The next outcome frame is answered with `Unavailable` for each of its items.
    pub refuse_outcomes_once: AtomicBool,
    /// The next heartbeat is answered with all its leases as lost.
    pub lose_leases_once: AtomicBool,
    /// Frames of outcomes and of submits that arrived.
    pub outcome_frames: AtomicUsize,
    pub submit_frames: AtomicUsize,
    pub heartbeats: AtomicUsize,
    pub goodbyes: AtomicUsize,
}

#[derive(Default)]
pub struct State {
    pub tasks: HashMap<RequestId, Task>,
    names: HashMap<(String, String), RequestId>,
    waiting: HashMap<String, VecDeque<RequestId>>,
    executors: HashMap<u64, Executors>,
    seq: u64,
}

struct Executors {
    out: Outbox,
    functions: Vec<(String, u32)>,
    leaving: bool,
}

pub struct Task {
    function: String,
    payload: Vec<u8>,
    pub status: TaskStatus,
    pub attempts: u16,
    holder: Option<(u64, u16)>,
    pub error: String,
    result: Option<Vec<u8>>,
    watchers: Vec<(Outbox, u64, u32)>,
}

impl Fake {
    pub fn start() -> Fake {
        let mut fake = Fake {
            dir: TempDir::new().unwrap(),
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            state: Arc::default(),
            knobs: Arc::default(),
            running: None,
        };
        fake.restart();
        fake
    }

    /// Ends the server as a crash would, if it runs.
    pub fn kill(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            stop.send(true).unwrap();
            thread.join().unwrap();
            let mut state = self.state.lock().unwrap();
            for task in state.tasks.values_mut() {
                task.watchers.clear();
            }
            state.executors.clear();
        }
    }

    /// Starts it, on the same port as before.
    pub fn restart(&mut self) {
        let certificate = Certificate::load_or_make(self.dir.path()).unwrap();
        let socket = server::bind(self.address, 1, &certificate)
            .unwrap()
            .pop()
            .unwrap();
        self.address = socket.local_addr();
        let (stop, mut stopped) = watch::channel(false);
        let (state, knobs) = (self.state.clone(), self.knobs.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = socket.listen().unwrap();
                let accept = async {
                    while let Some(handshake) = listener.accept().await {
                        let (state, knobs) = (state.clone(), knobs.clone());
                        tokio::spawn(async move {
                            let connection = handshake.finish().await.unwrap();
                            let (send, receive) = connection.accept_bi().await.unwrap();
                            let (out, outbox) = unbounded_channel();
                            tokio::spawn(write(send, outbox));
                            let session = Session {
                                out,
                                state,
                                knobs,
                                executor: None,
                            };
                            session.run(receive).await;
                        });
                    }
                };
                tokio::select! {
                    () = accept => {}
                    _ = stopped.changed() => {}
                }
            });
        });
        self.running = Some((stop, thread));
    }

    pub fn options(&self) -> ClientOptions {
        let certificate = Certificate::load_or_make(self.dir.path()).unwrap();
        let mut options = ClientOptions::at(self.address)
            .trust(Trust::Fingerprint(certificate.fingerprint_bytes()))
            .key(KEY);
        options.keep_alive = Duration::from_millis(200);
        options
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.options()).await.unwrap()
    }

    pub async fn executor(&self) -> Executor {
        Executor::connect(self.options()).await.unwrap()
    }

    /// Waits until something is so.
    pub async fn until(&self, what: impl Fn(&Fake) -> bool) {
        for _ in 0..2_000 {
            if what(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it never came to be");
    }

    pub fn running(&self) -> usize {
        let state = self.state.lock().unwrap();
        let running = |task: &&Task| task.status == TaskStatus::Running;
        state.tasks.values().filter(running).count()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn write(mut send: quinn::SendStream, mut outbox: UnboundedReceiver<Bytes>) {
    while let Some(bytes) = outbox.recv().await {
        if send.write_chunk(bytes).await.is_err() {
            return;
        }
    }
}

struct Session {
    out: Outbox,
    state: Arc<Mutex<State>>,
    knobs: Arc<Knobs>,
    executor: Option<u64>,
}

impl Session {
    async fn run(mut self, mut receive: quinn::RecvStream) {
        let mut reader = FrameReader::new(FRAME_BYTES_MAX);
        while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
            reader.feed(chunk.bytes);
            while let Some(frame) = reader.next().unwrap() {
                self.on_frame(&frame);
            }
        }
    }

    fn send(&self, encode: impl FnOnce(&mut BytesMut)) {
        send(&self.out, encode);
    }

    fn on_frame(&mut self, frame: &Frame) {
        match frame.kind {
            FrameType::Hello => self.on_hello(frame),
            FrameType::Submit => self.on_submit(frame),
            FrameType::Wait => self.on_wait(frame),
            FrameType::Stop => self.on_stop(frame),
            FrameType::Query => self.on_query(frame),
            FrameType::Register => self.on_register(frame),
            FrameType::Outcome => self.on_outcome(frame),
            FrameType::Heartbeat => {
                self.knobs.heartbeats.fetch_add(1, Ordering::SeqCst);
                let lose = self.knobs.lose_leases_once.swap(false, Ordering::SeqCst);
                let leases = Items::<Lease>::parse(frame).unwrap();
                let lost: Vec<Lease> = leases.iter().filter(|_| lose).collect();
                self.send(|out| list(out, FrameType::HeartbeatAck, frame.tag, &lost));
            }
            FrameType::Resume => self.on_resume(frame),
            FrameType::Goodbye => {
                self.knobs.goodbyes.fetch_add(1, Ordering::SeqCst);
                let mut state = self.state.lock().unwrap();
                if let Some(executor) = self.executor.and_then(|id| state.executors.get_mut(&id)) {
                    executor.leaving = true;
                }
            }
            other => panic!("{other:?} is nothing that a client sends"),
        }
    }

    fn on_hello(&mut self, frame: &Frame) {
        let hello = Hello::parse(frame).unwrap();
        if hello.credential != Credential::Key(KEY.as_bytes()) {
            let error = ErrorFrame::new(Code::Unauthenticated, "that key is not known");
            self.send(|out| error.encode(out, 0));
            return;
        }
        self.executor = hello.executor;
        let welcome = Welcome {
            protocol: 1,
            server: 7,
            frame_bytes_max: PAYLOAD_MAX + (64 << 10),
            payload_bytes_max: PAYLOAD_MAX,
            in_flight_tasks_max: IN_FLIGHT_MAX,
            heartbeat_ms: 100,
            lease_ms: 10_000,
            tenant: "acme",
        };
        self.send(|out| welcome.encode(out, frame.tag));
    }

    fn on_submit(&mut self, frame: &Frame) {
        self.knobs.submit_frames.fetch_add(1, Ordering::SeqCst);
        let view = SubmitView::parse(frame).unwrap();
        assert!(view.len() <= IN_FLIGHT_MAX as usize);
        let mut guard = self.state.lock().unwrap();
        let state = &mut *guard;
        let mut answers = Vec::new();
        for (index, task) in view.tasks(PAYLOAD_MAX as usize).enumerate() {
            let mut answer = TaskAnswer {
                index: index as u16,
                code: Code::Ok,
                flags: ANSWER_DURABLE,
                retry_after_ms: 0,
                request_id: RequestId::default(),
                text: "",
            };
            let task = match task {
                Ok(task) => task,
                Err(error) => {
                    answer.code = error.code;
                    answer.text = error.what;
                    answers.push(answer);
                    continue;
                }
            };
            let function = view.function(task.function).unwrap().to_owned();
            if function == "full" {
                answer.code = Code::ResourceExhausted;
                answer.retry_after_ms = 1_500;
                answer.text = "the queue is full";
                answers.push(answer);
                continue;
            }
            let named = task.task_id.map(|id| (function.clone(), id.to_owned()));
            if let Some(known) = named.as_ref().and_then(|name| state.names.get(name)) {
                answer.request_id = *known;
                if state.tasks[known].payload == task.payload {
                    answer.flags |= ANSWER_DUPLICATE;
                } else {
                    answer.code = Code::IdReused;
                    answer.text = "the task_id names another payload";
                }
                answers.push(answer);
                continue;
            }
            state.seq += 1;
            let id = RequestId::new(CellId(5), 1_000, state.seq, SlotIndex(state.seq as u32));
            answer.request_id = id;
            if let Some(name) = named {
                state.names.insert(name, id);
            }
            let watchers = match view.notify() {
                true => vec![(self.out.clone(), frame.tag, index as u32)],
                false => Vec::new(),
            };
            state.tasks.insert(
                id,
                Task {
                    function: function.clone(),
                    payload: task.payload.to_vec(),
                    status: TaskStatus::Enqueued,
                    attempts: 0,
                    holder: None,
                    error: String::new(),
                    result: None,
                    watchers,
                },
            );
            state.waiting.entry(function).or_default().push_back(id);
            answers.push(answer);
        }
        if !self.knobs.deaf.load(Ordering::SeqCst) {
            // Two frames, as two shards would send them.
            let (even, odd): (Vec<_>, Vec<_>) = answers
                .into_iter()
                .partition(|answer| answer.index % 2 == 0);
            for half in [odd, even] {
                self.send(|out| {
                    let mut writer = AnswerWriter::begin(out, frame.tag);
                    half.iter().for_each(|answer| writer.push(answer));
                    writer.finish();
                });
            }
        }
        state.dispatch();
    }

    fn on_wait(&mut self, frame: &Frame) {
        let wait = Wait::parse(frame).unwrap();
        let mut state = self.state.lock().unwrap();
        let id = match wait.task {
            TaskRef::Request(id) => Some(id),
            TaskRef::Given {
                function, task_id, ..
            } => {
                let name = (function.to_owned(), task_id.to_owned());
                state.names.get(&name).copied()
            }
        };
        let Some((id, task)) = id.and_then(|id| Some((id, state.tasks.get_mut(&id)?))) else {
            let error = ErrorFrame::new(Code::NotFound, "no such task");
            self.send(|out| error.encode(out, frame.tag));
            return;
        };
        if terminal(task.status) {
            tell(id, task, &self.out, frame.tag, 0);
        } else {
            task.watchers.push((self.out.clone(), frame.tag, 0));
            let (out, tag) = (self.out.clone(), frame.tag);
            let timeout = Duration::from_millis(u64::from(wait.timeout_ms));
            tokio::spawn(async move {
                tokio::time::sleep(timeout).await;
                let error = ErrorFrame::new(Code::DeadlineExceeded, "it still runs");
                send(&out, |out| error.encode(out, tag));
            });
        }
    }

    fn on_stop(&mut self, frame: &Frame) {
        let mut state = self.state.lock().unwrap();
        let mut answers = Vec::new();
        for stop in Items::<Stop>::parse(frame).unwrap().iter() {
            let (code, status) = state.stop(stop);
            answers.push(StopAnswer {
                request_id: stop.request_id,
                code,
                status,
            });
        }
        self.send(|out| list(out, FrameType::StopAnswer, frame.tag, &answers));
    }

    fn on_query(&mut self, frame: &Frame) {
        let query = Query::parse(frame).unwrap();
        let (code, json) = match query.operation {
            Operation::Get if query.json.contains("missing") => (
                Code::NotFound,
                r#"{"code":"NOT_FOUND","error":"no task \"missing\"","retryable":false}"#
                    .to_owned(),
            ),
            Operation::Stop => (Code::Ok, r#"{"status":"Stopping"}"#.to_owned()),
            _ => (Code::Ok, query.json.to_owned()),
        };
        let answer = QueryAnswer { code, json: &json };
        self.send(|out| assert!(answer.encode(out, frame.tag)));
    }

    fn on_register(&mut self, frame: &Frame) {
        let register = Register::parse(frame).unwrap();
        let mut state = self.state.lock().unwrap();
        let identity = self.executor.unwrap();
        let out = self.out.clone();
        let executor = state.executors.entry(identity).or_insert(Executors {
            out,
            functions: Vec::new(),
            leaving: false,
        });
        executor.out = self.out.clone();
        let first_index = executor.functions.len() as u16;
        let mut codes = Vec::new();
        for offer in &register.offers {
            executor
                .functions
                .push((offer.function.to_owned(), offer.slots));
            codes.push(match offer.function {
                "forbidden" => Code::PermissionDenied,
                _ => Code::Ok,
            });
        }
        let registered = Registered { first_index, codes };
        self.send(|out| registered.encode(out, frame.tag));
        state.dispatch();
    }

    fn on_outcome(&mut self, frame: &Frame) {
        self.knobs.outcome_frames.fetch_add(1, Ordering::SeqCst);
        if self.knobs.ignore_outcomes.load(Ordering::SeqCst) {
            return;
        }
        let refuse = self
            .knobs
            .refuse_outcomes_once
            .swap(false, Ordering::SeqCst);
        let mut state = self.state.lock().unwrap();
        let mut refused = Vec::new();
        let outcomes = Items::<TaskOutcome<'_>>::parse(frame).unwrap();
        for (index, outcome) in outcomes.iter().enumerate() {
            let code = match refuse {
                true => Code::Unavailable,
                false => state.complete(&outcome),
            };
            if code != Code::Ok {
                refused.push(RefusedOutcome {
                    index: index as u16,
                    code,
                });
            }
        }
        self.send(|out| list(out, FrameType::OutcomeAck, frame.tag, &refused));
        state.dispatch();
    }

    fn on_resume(&mut self, frame: &Frame) {
        let leases = Items::<Lease>::parse(frame).unwrap();
        assert!(leases.len() <= LEASES_PER_FRAME_MAX);
        let mut state = self.state.lock().unwrap();
        assert!(
            !state.executors.contains_key(&self.executor.unwrap()),
            "leases come before slots"
        );
        let verdicts: Vec<_> = leases
            .iter()
            .map(|lease| match state.tasks.get_mut(&lease.request_id) {
                Some(task) if terminal(task.status) => ResumedLease::Known,
                Some(task) if task.attempts == lease.token.attempt => ResumedLease::Kept,
                _ => ResumedLease::Refused,
            })
            .collect();
        self.send(|out| list(out, FrameType::Resumed, frame.tag, &verdicts));
    }
}

impl State {
    fn dispatch(&mut self) {
        for (&identity, executor) in &mut self.executors {
            if executor.leaving {
                continue;
            }
            for (index, (function, free)) in executor.functions.iter_mut().enumerate() {
                let Some(waiting) = self.waiting.get_mut(function) else {
                    continue;
                };
                while *free > 0
                    && let Some(id) = waiting.pop_front()
                {
                    *free -= 1;
                    let task = self.tasks.get_mut(&id).unwrap();
                    task.attempts += 1;
                    task.status = TaskStatus::Running;
                    task.holder = Some((identity, index as u16));
                    let execute = ExecuteTask {
                        request_id: id,
                        token: token(task.attempts),
                        function: index as u16,
                        attempts_max: 3,
                        timeout_ms: 60_000,
                        task_id: None,
                        key: None,
                        content_type: "",
                        traceparent: None,
                        payload: &task.payload,
                    };
                    send(&executor.out, |out| {
                        list(out, FrameType::Execute, 0, &[execute]);
                    });
                }
            }
        }
    }

    fn complete(&mut self, outcome: &TaskOutcome<'_>) -> Code {
        let Some(task) = self.tasks.get_mut(&outcome.request_id) else {
            return Code::NotFound;
        };
        if terminal(task.status) || outcome.token != token(task.attempts) {
            return Code::StaleLease;
        }
        if let Some((identity, index)) = task.holder.take()
            && let Some(executor) = self.executors.get_mut(&identity)
        {
            executor.functions[usize::from(index)].1 += 1;
        }
        task.error = outcome.error.to_owned();
        task.status = match outcome.status {
            OutcomeStatus::Succeeded => TaskStatus::Succeeded,
            OutcomeStatus::Failed => TaskStatus::Failed,
            OutcomeStatus::Throttled => {
                task.error = format!("throttled for {} ms", outcome.retry_after_ms);
                TaskStatus::Failed
            }
            OutcomeStatus::Rejected => TaskStatus::Enqueued,
            OutcomeStatus::Stopped => TaskStatus::Stopped,
        };
        if task.status == TaskStatus::Enqueued {
            let waiting = self.waiting.entry(task.function.clone()).or_default();
            waiting.push_back(outcome.request_id);
            return Code::Ok;
        }
        if !outcome.output.is_empty() {
            task.error = String::from_utf8_lossy(outcome.output).into_owned();
        }
        task.result = Some(outcome.result.to_vec());
        for (out, tag, index) in std::mem::take(&mut task.watchers) {
            tell(outcome.request_id, task, &out, tag, index);
        }
        Code::Ok
    }

    fn stop(&mut self, stop: Stop) -> (Code, Option<TaskStatus>) {
        let Some(task) = self.tasks.get_mut(&stop.request_id) else {
            return (Code::NotFound, None);
        };
        if terminal(task.status) {
            return (Code::FailedPrecondition, Some(task.status));
        }
        if let Some((identity, _)) = task.holder {
            let cancel = Cancel {
                lease: Lease {
                    request_id: stop.request_id,
                    token: token(task.attempts),
                },
                grace_ms: stop.grace_ms,
            };
            let out = &self.executors[&identity].out;
            send(out, |out| list(out, FrameType::Cancel, 0, &[cancel]));
        }
        (Code::Ok, Some(TaskStatus::Stopping))
    }
}

fn token(attempt: u16) -> Token {
    Token {
        generation: 1,
        attempt,
    }
}

fn terminal(status: TaskStatus) -> bool {
    status as u8 >= TaskStatus::Succeeded as u8
}

fn tell(id: RequestId, task: &Task, out: &Outbox, tag: u64, index: u32) {
    let finished = Finished {
        tag,
        index,
        request_id: id,
        status: task.status,
        code: match task.status {
            TaskStatus::Succeeded => Code::Ok,
            _ => Code::Internal,
        },
        attempts: task.attempts,
        error: &task.error,
        result: task.result.as_deref(),
    };
    send(out, |out| list(out, FrameType::Finished, 0, &[finished]));
}

fn list<'a, T: Item<'a>>(out: &mut BytesMut, kind: FrameType, tag: u64, items: &[T]) {
    let mut writer = ItemWriter::begin(out, kind, tag);
    for item in items {
        writer.push(item).unwrap();
    }
    writer.finish();
}

fn send(out: &Outbox, encode: impl FnOnce(&mut BytesMut)) {
    let mut buffer = BytesMut::new();
    encode(&mut buffer);
    // The client may be gone.
    let _ = out.send(buffer.freeze());
}
