//! A caller process: one stream of submissions for each tenant, each with a history of its own.
//!
//! A stream hands in batches at a pace, asks after its tasks, waits for some and stops some. When its connection breaks
//! it connects again, hands in once more what it does not know the outcome of where a name makes that safe, and asks
//! after everything that was acknowledged since it last asked. Told to finish, it waits for the end of all its tasks and
//! asks after each of them a last time.

use std::{
    io::BufRead,
    path::PathBuf,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clap::Args;
use pelton_client::{
    Client, ClientOptions, Code, Error, RequestId, Submitted, Task, TaskName, TaskStatus, Trust,
};
use serde_json::Value;
use tokio::{sync::watch, task::JoinSet, task::LocalSet};

use super::{
    history::{Event, History, is_end, status},
    plan::{Dice, FUNCTIONS, Id, Submission, TENANTS, hash, submission},
};

/// A try to connect. One that began while nobody listened is not worth waiting for.
const CONNECT: Duration = Duration::from_millis(250);
const CONNECT_PAUSE: Duration = Duration::from_millis(10);
/// How often a client that only waits looks whether its server is still the same.
const KEEP_ALIVE: Duration = Duration::from_millis(50);
/// Tasks of the largest batch.
const BATCH_MAX: u64 = 64;
/// Questions that a stream has unanswered at once.
const QUESTIONS: usize = 48;
/// Tasks that ended long ago and are asked after again at each reconnect.
const SAMPLE: u64 = 16;
/// What a wait in the middle of the load lasts at most.
const WAIT: Duration = Duration::from_millis(30);
/// Time after `finish` for everything to end.
const REST: Duration = Duration::from_secs(90);
/// How often is looked whether it has.
const LOOK: Duration = Duration::from_millis(100);
/// A task that is not there is asked after a second time after this long.
const AGAIN: Duration = Duration::from_millis(50);
/// An answer of a live server that takes longer counts as none.
const ANSWER: Duration = Duration::from_secs(20);

#[derive(Args, Clone, Debug)]
pub struct CallerArgs {
    /// The server
    #[arg(long)]
    server: String,
    /// How to know it
    #[arg(long)]
    trust: String,
    #[arg(long)]
    seed: u64,
    /// Which caller this is
    #[arg(long)]
    index: u16,
    /// Submissions a second and stream
    #[arg(long)]
    rate: u64,
    /// Where histories are kept
    #[arg(long)]
    folder: PathBuf,
}

/// Runs until stdin says `finish` and everything has ended, or until stdin ends.
pub fn run(args: &CallerArgs) -> Result<(), String> {
    let (tell, told) = watch::channel(false);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if line.is_ok_and(|line| line.trim() == "finish") {
                tell.send_replace(true);
            }
        }
        // Whoever started this process is gone, or does not need it any longer.
        std::process::exit(3);
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let mut streams = JoinSet::new();
        for (index, tenant) in TENANTS.iter().enumerate() {
            let stream = Stream::open(args, index, tenant, told.clone()).await?;
            streams.spawn_local(stream.run());
        }
        while let Some(ended) = streams.join_next().await {
            ended.map_err(|error| error.to_string())??;
        }
        Ok(())
    })
}

/// What a stream knows of a submission of its own.
#[derive(Clone, Copy, Default)]
struct Known {
    request: Option<RequestId>,
    ended: bool,
}

struct Stream {
    seed: u64,
    index: u16,
    tenant: &'static str,
    rate: u64,
    options: ClientOptions,
    client: Client,
    history: History,
    dice: Dice,
    finish: watch::Receiver<bool>,
    /// By number.
    tasks: Vec<Known>,
    batch: u64,
    /// Named submissions without an answer.
    unknown: Vec<u64>,
    /// Acknowledged since everything was last asked after, or not ended by then.
    open: Vec<u64>,
}

/// Why a turn was broken off.
enum Broken {
    /// The connection is gone, or the server says that it is going.
    Lost,
    /// The stream cannot go on.
    Failed(String),
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Broken {
        Broken::Failed(format!("the history cannot be written: {error}"))
    }
}

impl Stream {
    async fn open(
        args: &CallerArgs,
        index: usize,
        tenant: &'static str,
        finish: watch::Receiver<bool>,
    ) -> Result<Stream, String> {
        let trust = Trust::parse(&args.trust).ok_or("--trust names no CA and no fingerprint")?;
        let options = ClientOptions {
            keep_alive: KEEP_ALIVE,
            ..ClientOptions::new(&args.server).trust(trust).tenant(tenant)
        };
        let index = args.index * TENANTS.len() as u16 + index as u16;
        let path = args.folder.join(format!("stream-{index}.history"));
        let history = History::create(&path).map_err(|error| error.to_string())?;
        let client = Client::connect(options.clone())
            .await
            .map_err(|error| error.to_string())?;
        Ok(Stream {
            seed: args.seed,
            index,
            tenant,
            rate: args.rate.max(1),
            options,
            client,
            history,
            dice: Dice::of(&[args.seed, 3, u64::from(index)]),
            finish,
            tasks: Vec::new(),
            batch: 0,
            unknown: Vec::new(),
            open: Vec::new(),
        })
    }

    async fn run(mut self) -> Result<(), String> {
        let mut caught_up = true;
        loop {
            let finishing = *self.finish.borrow();
            let done = match (caught_up, finishing) {
                (false, _) => self.catch_up().await.map(|()| false),
                (true, false) => self.turn().await.map(|()| false),
                (true, true) => self.settle().await.map(|()| true),
            };
            self.history.flush().map_err(|error| error.to_string())?;
            match done {
                Ok(true) => return Ok(()),
                Ok(false) => caught_up = true,
                Err(Broken::Failed(why)) => return Err(format!("stream {}: {why}", self.index)),
                Err(Broken::Lost) => {
                    caught_up = false;
                    self.connect().await;
                }
            }
        }
    }

    async fn connect(&mut self) {
        loop {
            let connecting = Client::connect(self.options.clone());
            if let Ok(Ok(client)) = tokio::time::timeout(CONNECT, connecting).await {
                self.client = client;
                return;
            }
            tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }

    /// One thing among those that callers do.
    async fn turn(&mut self) -> Result<(), Broken> {
        match self.dice.below(100) {
            0..4 => self.repeat().await,
            4..12 => self.stop().await,
            12..17 => {
                let asked = (0..8).filter_map(|_| self.recent()).collect();
                self.ask(asked).await
            }
            17..20 => self.wait().await,
            _ => {
                let size = match self.dice.chance(10) {
                    true => BATCH_MAX,
                    false => 1 + self.dice.below(BATCH_MAX / 2),
                };
                let first = self.tasks.len() as u64;
                self.tasks
                    .resize(self.tasks.len() + size as usize, Known::default());
                self.submit((first..first + size).collect()).await?;
                let pause = size * 1_000_000 / self.rate;
                let pause = pause / 2 + self.dice.below(pause.max(1));
                tokio::time::sleep(Duration::from_micros(pause)).await;
                Ok(())
            }
        }
    }

    /// The number of a task that was acknowledged not long ago.
    fn recent(&mut self) -> Option<u64> {
        let back = self.dice.below(self.tasks.len().min(400) as u64 + 1);
        let number = (self.tasks.len() as u64).checked_sub(back + 1)?;
        self.request(number).map(|_| number)
    }

    fn request(&self, number: u64) -> Option<RequestId> {
        self.tasks[number as usize].request
    }

    fn id(&self, number: u64) -> Id {
        Id {
            stream: self.index,
            number,
        }
    }

    /// Hands in a name a second time on purpose.
    async fn repeat(&mut self) -> Result<(), Broken> {
        let Some(number) = self.recent() else {
            return Ok(());
        };
        if !submission(self.seed, self.id(number)).named {
            return Ok(());
        }
        self.submit(vec![number]).await
    }

    /// Hands in these numbers, those of one function as one batch, the batches at once.
    async fn submit(&mut self, numbers: Vec<u64>) -> Result<(), Broken> {
        let mut batches: [Vec<(u64, Task)>; FUNCTIONS.len()] = Default::default();
        let first = self.batch;
        self.batch += FUNCTIONS.len() as u64;
        for number in numbers {
            let id = self.id(number);
            let submission = submission(self.seed, id);
            self.history.note(&Event::Intent {
                id,
                batch: first + submission.function as u64,
                tenant: self.tenant,
                function: FUNCTIONS[submission.function].name,
                named: submission.named,
                key: submission.key.as_deref(),
                bytes: submission.payload.len() as u64,
                hash: hash(&submission.payload),
            });
            batches[submission.function].push((number, task(id, submission)));
        }
        self.history.flush()?;
        let mut calls = JoinSet::new();
        for (function, batch) in batches.into_iter().enumerate() {
            if batch.is_empty() {
                continue;
            }
            let client = self.client.clone();
            let (numbers, tasks): (Vec<u64>, Vec<Task>) = batch.into_iter().unzip();
            calls.spawn_local(async move {
                let call = client.submit_batch(FUNCTIONS[function].name, &tasks);
                let answers = tokio::time::timeout(ANSWER, call).await;
                (first + function as u64, numbers, answers.ok())
            });
        }
        let mut lost = false;
        while let Some(call) = calls.join_next().await {
            let (batch, numbers, answers) = call.map_err(|error| failed(&error))?;
            let late = || Err(Error::ConnectionLost("no answer".into()));
            let answers = answers.unwrap_or_else(|| numbers.iter().map(|_| late()).collect());
            for (number, answer) in numbers.into_iter().zip(answers) {
                lost |= self.answered(number, batch, answer)?;
            }
        }
        self.history.flush()?;
        if lost { Err(Broken::Lost) } else { Ok(()) }
    }

    /// True if the connection is gone.
    fn answered(
        &mut self,
        number: u64,
        batch: u64,
        answer: Result<Submitted, Error>,
    ) -> Result<bool, Broken> {
        let id = self.id(number);
        match answer {
            Ok(submitted) => {
                self.history.note(&Event::Accepted {
                    id,
                    batch,
                    request: submitted.request_id,
                    duplicate: submitted.duplicate,
                    durable: submitted.durable,
                });
                let known = &mut self.tasks[number as usize];
                if known.request.is_none() {
                    known.request = Some(submitted.request_id);
                    self.open.push(number);
                }
                Ok(false)
            }
            Err(Error::Refused(refusal)) if refusal.code != Code::Unavailable => {
                let code = refusal.code.name();
                self.history.note(&Event::Refused { id, batch, code });
                Ok(false)
            }
            // Nothing was sent.
            Err(Error::Unreachable(_)) => {
                let code = "NOT_SENT";
                self.history.note(&Event::Refused { id, batch, code });
                Ok(true)
            }
            Err(Error::Refused(_) | Error::ConnectionLost(_) | Error::Closed) => {
                self.history.note(&Event::Unknown { id, batch });
                let named = submission(self.seed, id).named;
                if named && self.request(number).is_none() && !self.unknown.contains(&number) {
                    self.unknown.push(number);
                }
                Ok(true)
            }
            Err(error @ (Error::Invalid(_) | Error::Protocol(_))) => Err(failed(&error)),
        }
    }

    /// Stops one of the last few, most of which have not ended.
    async fn stop(&mut self) -> Result<(), Broken> {
        let back = 1 + self.dice.below(BATCH_MAX / 4);
        let last = (self.tasks.len() as u64).checked_sub(back);
        let Some(number) = last.filter(|&number| self.request(number).is_some()) else {
            return Ok(());
        };
        let name = self.name(number);
        let grace = Duration::from_millis(self.dice.below(20));
        let answer = in_time(self.client.stop(&name, grace)).await;
        let id = self.id(number);
        match answer {
            Ok(Some(status)) => {
                self.history.note(&Event::StopAnswered { id, status });
                Ok(())
            }
            Ok(None) => Ok(()),
            // It has ended already.
            Err(Error::Refused(refusal)) if refusal.code == Code::FailedPrecondition => Ok(()),
            answer if is_missing(&answer) => self.missed(number).await,
            Err(error) => self.no_answer(number, &error),
        }
    }

    async fn wait(&mut self) -> Result<(), Broken> {
        let Some(number) = self.recent() else {
            return Ok(());
        };
        let name = self.name(number);
        match in_time(self.client.wait(&name, WAIT)).await {
            Ok(finished) => {
                let result = finished.result.as_deref().map(String::from_utf8_lossy);
                self.history.note(&Event::Ended {
                    id: self.id(number),
                    request: finished.request_id,
                    status: finished.status,
                    attempts: finished.attempts,
                    result: result.as_deref().filter(|result| !result.is_empty()),
                });
                Ok(())
            }
            Err(Error::Refused(refusal)) if refusal.code == Code::DeadlineExceeded => Ok(()),
            answer if is_missing(&answer) => self.missed(number).await,
            Err(error) => self.no_answer(number, &error),
        }
    }

    /// A task was not there: whether it is there a moment later says which promise that broke.
    async fn missed(&mut self, number: u64) -> Result<(), Broken> {
        let id = self.id(number);
        self.history.note(&Event::Late { id });
        tokio::time::sleep(AGAIN).await;
        self.ask(vec![number]).await
    }

    /// How a task is called: by its request id, or now and then by the name that it was given.
    fn name(&mut self, number: u64) -> TaskName {
        let id = self.id(number);
        let by_name = self.dice.chance(25);
        if by_name {
            let submission = submission(self.seed, id);
            if submission.named {
                return TaskName::Given {
                    function: FUNCTIONS[submission.function].name.to_owned(),
                    key: submission.key,
                    task_id: id.to_string(),
                };
            }
        }
        let request = self.request(number).expect("only known tasks are named");
        TaskName::Request(request)
    }

    /// A question about a task that was acknowledged has no answer.
    fn no_answer(&mut self, number: u64, error: &Error) -> Result<(), Broken> {
        match error {
            Error::Refused(refusal) if refusal.code == Code::NotFound => {
                let id = self.id(number);
                self.history.note(&Event::Missing { id });
                Ok(())
            }
            Error::Refused(refusal) if refusal.code != Code::Unavailable => Err(failed(error)),
            Error::Refused(_)
            | Error::Unreachable(_)
            | Error::ConnectionLost(_)
            | Error::Closed => Err(Broken::Lost),
            Error::Invalid(_) | Error::Protocol(_) => Err(failed(error)),
        }
    }

    /// Asks after these tasks and writes down what is said.
    async fn ask(&mut self, mut numbers: Vec<u64>) -> Result<(), Broken> {
        numbers.sort_unstable();
        numbers.dedup();
        for some in numbers.chunks(QUESTIONS) {
            let mut questions = JoinSet::new();
            for &number in some {
                let (client, name) = (self.client.clone(), self.name(number));
                questions.spawn_local(async move {
                    let first = in_time(client.get(&name)).await;
                    if !is_missing(&first) {
                        return (number, false, first);
                    }
                    tokio::time::sleep(AGAIN).await;
                    (number, true, in_time(client.get(&name)).await)
                });
            }
            let mut broken = None;
            while let Some(question) = questions.join_next().await {
                let (number, late, answer) = question.map_err(|error| failed(&error))?;
                if late {
                    let id = self.id(number);
                    self.history.note(&Event::Late { id });
                }
                let heard = match answer {
                    Ok(json) => self.described(number, &json),
                    Err(error) => self.no_answer(number, &error),
                };
                broken = broken.or(heard.err());
            }
            self.history.flush()?;
            if let Some(broken) = broken {
                return Err(broken);
            }
        }
        Ok(())
    }

    fn described(&mut self, number: u64, json: &str) -> Result<(), Broken> {
        let seen = Description::read(json).ok_or_else(|| {
            Broken::Failed(format!("a task is described as nobody expects: {json}"))
        })?;
        self.tasks[number as usize].ended |= is_end(seen.status);
        self.history.note(&Event::Seen {
            id: self.id(number),
            request: seen.request,
            function: &seen.function,
            status: seen.status,
            attempts: seen.attempts,
            retried: seen.retried,
            bytes: seen.payload.len() as u64,
            hash: hash(&seen.payload),
            result: seen.result.as_deref(),
        });
        Ok(())
    }

    /// After a lost connection: nothing that was acknowledged may be missing.
    async fn catch_up(&mut self) -> Result<(), Broken> {
        let unknown = std::mem::take(&mut self.unknown);
        let rest = unknown.clone();
        if let Err(broken) = self.submit(unknown).await {
            for number in rest {
                if self.request(number).is_none() && !self.unknown.contains(&number) {
                    self.unknown.push(number);
                }
            }
            return Err(broken);
        }
        let mut asked = self.open.clone();
        for _ in 0..SAMPLE.min(self.tasks.len() as u64) {
            let number = self.dice.below(self.tasks.len() as u64);
            asked.extend(self.request(number).map(|_| number));
        }
        self.ask(asked).await?;
        self.forget_ended();
        Ok(())
    }

    fn forget_ended(&mut self) {
        let tasks = &self.tasks;
        self.open.retain(|&number| !tasks[number as usize].ended);
    }

    /// Waits for the end of everything and asks after every task.
    async fn settle(&mut self) -> Result<(), Broken> {
        let start = Instant::now();
        while !self.unknown.is_empty() {
            self.catch_up().await?;
        }
        loop {
            self.ask(self.open.clone()).await?;
            self.forget_ended();
            if self.open.is_empty() || start.elapsed() > REST {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        let all = (0..self.tasks.len() as u64).filter(|&number| self.request(number).is_some());
        self.ask(all.collect()).await?;
        self.history.note(&Event::Complete);
        Ok(())
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::ConnectionLost("no answer".into())),
    }
}

fn is_missing<T>(answer: &Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Refused(refusal)) if refusal.code == Code::NotFound)
}

fn failed(error: &impl std::fmt::Display) -> Broken {
    Broken::Failed(error.to_string())
}

fn task(id: Id, submission: Submission) -> Task {
    let mut task = Task::new(submission.payload).content_type(id.to_string());
    if submission.named {
        task = task.task_id(id.to_string());
    }
    if let Some(key) = submission.key {
        task = task.key(key);
    }
    if submission.delay_ms > 0 {
        task = task.delay(Duration::from_millis(submission.delay_ms));
    }
    task
}

/// What `get` says of a task.
struct Description {
    request: RequestId,
    function: String,
    status: TaskStatus,
    attempts: u16,
    retried: u16,
    payload: Vec<u8>,
    result: Option<String>,
}

impl Description {
    fn read(json: &str) -> Option<Description> {
        let value: Value = serde_json::from_str(json).ok()?;
        let number = |name: &str| u16::try_from(value[name].as_u64()?).ok();
        let payload = value["task_payload"].as_str()?;
        let payload = match value["task_payload_encoding"].as_str() {
            Some("base64") => BASE64.decode(payload).ok()?,
            Some(_) => return None,
            None => payload.as_bytes().to_vec(),
        };
        if value.get("damaged").is_some() {
            return None;
        }
        Some(Description {
            request: RequestId::parse(value["request_id"].as_str()?)?,
            function: value["function"].as_str()?.to_owned(),
            status: status(value["status"].as_str()?)?,
            attempts: number("attempts")?,
            retried: number("already_retried_times")?,
            payload,
            result: value["return_payload"].as_str().map(str::to_owned),
        })
    }
}
