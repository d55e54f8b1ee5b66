//! The clients: closed loops that keep a number of frames in flight, and an open loop with intended start times.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::Range,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hdrhistogram::Histogram;
use pelton_client::{
    ClientOptions, Error, SharedSocket,
    pipeline::{self, Event},
};
use pelton_net::submit::{Durability, SUBMIT_NOTIFY, Start, SubmitTask};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::{io::AsyncReadExt, net::unix::pipe};

/// What a run of clients is told.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) options: ClientOptions,
    pub(crate) connections: usize,
    pub(crate) batch: usize,
    pub(crate) in_flight: usize,
    pub(crate) payload: usize,
    pub(crate) tenants: usize,
    pub(crate) functions: usize,
    /// Number of the first of them.
    pub(crate) first_function: usize,
    /// Every task is delayed by some time between [`DELAY_MS`].
    pub(crate) delayed: bool,
    pub(crate) durability: Durability,
    /// A frame is over when its tasks are finished, not when they are accepted.
    pub(crate) until_finished: bool,
    pub(crate) warmup: Duration,
    pub(crate) time: Duration,
    /// Tasks in all; the time does not matter then.
    pub(crate) tasks_max: Option<u64>,
}

/// How long a delayed task is put off: from an hour to a year.
const DELAY_MS: Range<u64> = 3_600_000..365 * 86_400_000;

/// What the clients counted, all of it and in the measured time.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    /// Tasks whose frame ended in the measured time.
    pub(crate) measured: u64,
    pub(crate) seconds: f64,
    /// Microseconds from a frame's sending to its end.
    pub(crate) latency: Histogram<u64>,
    /// When each tenth of the tasks had been answered, where their number is given.
    pub(crate) tenths: Vec<Duration>,
}

impl Counted {
    pub(crate) fn new() -> Counted {
        Counted {
            accepted: 0,
            refused: 0,
            completed: 0,
            failed: 0,
            measured: 0,
            seconds: 0.0,
            latency: histogram(),
            tenths: Vec::new(),
        }
    }

    /// Tasks per second in each tenth of the tasks.
    pub(crate) fn rates(&self) -> Vec<f64> {
        let tasks = self.accepted as f64 / 10.0;
        let begun = [Duration::ZERO]
            .into_iter()
            .chain(self.tenths.iter().copied());
        let took = self.tenths.iter().zip(begun);
        took.map(|(end, begun)| tasks / (*end - begun).as_secs_f64().max(1e-9))
            .collect()
    }
}

pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("the bounds and digits are valid")
}

/// The name of a tenant.
pub(crate) fn tenant_name(index: usize) -> String {
    format!("bench_{index}")
}

/// The name of a function.
pub(crate) fn function_name(index: usize) -> String {
    format!("noop_{index}")
}

/// What all connections share.
struct Shared {
    load: Load,
    counted: RefCell<Counted>,
    started: Instant,
    /// The measured time has begun: a mark is called once.
    sent: Cell<u64>,
}

impl Shared {
    fn measuring(&self, now: Instant) -> bool {
        let since = now - self.started;
        since >= self.load.warmup && since < self.load.warmup + self.load.time
    }

    fn is_over(&self) -> bool {
        match self.load.tasks_max {
            Some(tasks) => self.sent.get() >= tasks,
            None => self.started.elapsed() >= self.load.warmup + self.load.time,
        }
    }
}

/// Runs the closed loops to their end; `at_start` and `at_end` are called around the measured time.
pub(crate) async fn closed(
    load: Load,
    at_start: impl FnOnce() + 'static,
    at_end: impl FnOnce() + 'static,
) -> Result<Counted, Error> {
    let socket = SharedSocket::new();
    let mut load = load;
    load.options = load.options.socket(&socket);
    let shared = Rc::new(Shared {
        started: Instant::now(),
        load,
        counted: RefCell::new(Counted::new()),
        sent: Cell::new(0),
    });
    let (warmup, time) = (shared.load.warmup, shared.load.time);
    let mut loops = Vec::new();
    for index in 0..shared.load.connections {
        loops.push(tokio::task::spawn_local(connection(
            Rc::clone(&shared),
            index,
        )));
    }
    let marks = tokio::task::spawn_local(async move {
        tokio::time::sleep(warmup).await;
        at_start();
        let start = Instant::now();
        tokio::time::sleep(time).await;
        at_end();
        start.elapsed()
    });
    for running in loops {
        running.await.expect("a loop does not panic")?;
    }
    socket.wait_idle().await;
    let elapsed = if shared.load.tasks_max.is_some() {
        marks.abort();
        shared.started.elapsed()
    } else {
        marks.await.expect("the marks do not panic")
    };
    let mut counted = shared.counted.replace(Counted::new());
    counted.seconds = elapsed.as_secs_f64();
    Ok(counted)
}

/// A frame that is under way.
struct Flying {
    sent: Instant,
    tasks: usize,
    finished: usize,
}

async fn connection(shared: Rc<Shared>, index: usize) -> Result<(), Error> {
    let load = &shared.load;
    let tenant = tenant_name(index % load.tenants);
    let (mut sender, mut receiver) =
        pipeline::connect(&load.options.clone().tenant(tenant)).await?;
    let functions = load.first_function..load.first_function + load.functions;
    let functions: Vec<String> = functions.map(function_name).collect();
    let mut random = Random(index as u64);
    let payload = vec![0x5a; load.payload];
    let flags = if load.until_finished {
        SUBMIT_NOTIFY
    } else {
        0
    };
    let mut next_function = index;
    let mut flying: HashMap<u64, Flying> = HashMap::new();
    loop {
        let mut pushed = false;
        while flying.len() < load.in_flight && !shared.is_over() {
            let function = functions[next_function % functions.len()].as_str();
            next_function += 1;
            let task = SubmitTask {
                durability: load.durability,
                ..SubmitTask::new(&payload)
            };
            let tasks = std::iter::repeat_n(task, load.batch).map(|task| SubmitTask {
                start: match load.delayed {
                    true => Start::DelayMs(random.between(DELAY_MS)),
                    false => Start::Now,
                },
                ..task
            });
            let (tag, count) = sender.submit(flags, &[function], tasks)?;
            shared.sent.set(shared.sent.get() + count as u64);
            let sent = Instant::now();
            flying.insert(
                tag,
                Flying {
                    sent,
                    tasks: count,
                    finished: 0,
                },
            );
            pushed = true;
        }
        if pushed {
            sender.flush().await?;
        }
        if flying.is_empty() {
            break;
        }
        let mut event = Some(receiver.next().await?);
        while let Some(one) = event {
            on_event(&shared, &mut flying, &one)?;
            event = receiver.try_next()?;
        }
    }
    sender.close().await;
    Ok(())
}

fn on_event(
    shared: &Shared,
    flying: &mut HashMap<u64, Flying>,
    event: &Event,
) -> Result<(), Error> {
    let mut counted = shared.counted.borrow_mut();
    match event {
        Event::Answer(answer) => {
            let view = answer.view()?;
            let (answered, accepted) = (view.len(), view.accepted());
            counted.accepted += accepted as u64;
            counted.refused += (answered - accepted) as u64;
            // Who waits for the end does not wait for refused ones.
            let over = if shared.load.until_finished {
                answered - accepted
            } else {
                answered
            };
            ended(shared, &mut counted, flying, answer.tag(), over);
        }
        Event::Finished(finished) => {
            for item in finished.items()?.iter() {
                counted.completed += 1;
                counted.failed += u64::from(item.code != pelton_net::Code::Ok);
                ended(shared, &mut counted, flying, item.tag, 1);
            }
        }
        Event::Refused { tag, .. } => {
            if let Some(frame) = flying.remove(tag) {
                counted.refused += frame.tasks as u64;
            }
        }
        Event::Goodbye => {}
    }
    Ok(())
}

fn ended(
    shared: &Shared,
    counted: &mut Counted,
    flying: &mut HashMap<u64, Flying>,
    tag: u64,
    tasks: usize,
) {
    let Some(frame) = flying.get_mut(&tag) else {
        return;
    };
    frame.finished += tasks;
    if frame.finished < frame.tasks {
        return;
    }
    let frame = flying.remove(&tag).expect("looked up above");
    let now = Instant::now();
    if let Some(tasks) = shared.load.tasks_max {
        let next = (counted.tenths.len() as u64 + 1) * tasks / 10;
        if counted.tenths.len() < 10 && counted.accepted + counted.refused >= next {
            counted.tenths.push(now - shared.started);
        }
    }
    if shared.measuring(now) || shared.load.tasks_max.is_some() {
        counted.measured += frame.tasks as u64;
        let us = (now - frame.sent).as_micros() as u64;
        counted.latency.saturating_record(us);
    }
}

/// Submits at a fixed rate, each task with its intended time in its payload, whatever the answers do. The executor
/// measures from there.
pub(crate) async fn open(
    options: ClientOptions,
    function: usize,
    connections: usize,
    payload: usize,
    rate: u64,
    time: Duration,
) -> Result<Counted, Error> {
    let counted = Rc::new(RefCell::new(Counted::new()));
    let mut senders = Vec::new();
    let mut receivers = Vec::new();
    let options = options.tenant(tenant_name(0)).socket(&SharedSocket::new());
    for _ in 0..connections {
        let (sender, mut receiver) = pipeline::connect(&options).await?;
        senders.push(sender);
        let counted = Rc::clone(&counted);
        receivers.push(tokio::task::spawn_local(async move {
            while let Ok(event) = receiver.next().await {
                if let Event::Answer(answer) = event
                    && let Ok(view) = answer.view()
                {
                    let mut counted = counted.borrow_mut();
                    counted.accepted += view.accepted() as u64;
                    counted.refused += (view.len() - view.accepted()) as u64;
                }
            }
        }));
    }
    let function = function_name(function);
    let mut payload = vec![0x5a; payload.max(8)];
    let start = now_ns();
    let interval = 1_000_000_000 / rate.max(1);
    let total = (time.as_secs_f64() * rate as f64) as u64;
    let mut pacer = Pacer::new().map_err(|error| Error::Unreachable(error.to_string()))?;
    let mut sent = 0;
    let mut dirty = vec![false; connections];
    while sent < total {
        let now = now_ns();
        while sent < total && start + sent * interval <= now {
            let intended = start + sent * interval;
            payload[..8].copy_from_slice(&intended.to_le_bytes());
            let place = sent as usize % connections;
            let task = SubmitTask::new(&payload);
            senders[place].submit(0, &[&function], [task])?;
            dirty[place] = true;
            sent += 1;
        }
        for (sender, dirty) in senders.iter_mut().zip(&mut dirty) {
            if std::mem::take(dirty) {
                sender.flush().await?;
            }
        }
        if sent < total {
            pacer
                .wait_until(start + sent * interval)
                .await
                .map_err(|error| Error::Unreachable(error.to_string()))?;
        }
    }
    let waited = Instant::now();
    loop {
        let answered = {
            let counted = counted.borrow();
            counted.accepted + counted.refused
        };
        if answered >= total || waited.elapsed() > Duration::from_secs(10) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for receiver in receivers {
        receiver.abort();
    }
    let mut counted = counted.replace(Counted::new());
    counted.measured = counted.accepted;
    counted.seconds = time.as_secs_f64();
    Ok(counted)
}

/// Hands in tasks that are due at some time of the given span, each with that time in its payload.
pub(crate) async fn timers(
    options: ClientOptions,
    function: usize,
    count: u64,
    due: Range<Duration>,
) -> Result<u64, Error> {
    let options = options.tenant(tenant_name(0)).socket(&SharedSocket::new());
    let (mut sender, mut receiver) = pipeline::connect(&options).await?;
    let function = function_name(function);
    let mut random = Random(count);
    let wall_ns = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos() as u64
    };
    let (wall_ns, monotonic_ns) = (wall_ns(), now_ns());
    let due = due.start.as_millis() as u64..due.end.as_millis() as u64;
    let (mut sent, mut accepted) = (0, 0);
    while sent < count {
        let batch: Vec<(u64, [u8; 8])> = (sent..count.min(sent + 256))
            .map(|_| {
                let at_ms = wall_ns / 1_000_000 + random.between(due.clone());
                let at_ns = (at_ms * 1_000_000).saturating_sub(wall_ns) + monotonic_ns;
                (at_ms, at_ns.to_le_bytes())
            })
            .collect();
        let tasks = batch.iter().map(|(at_ms, payload)| SubmitTask {
            start: Start::AtMs(*at_ms),
            ..SubmitTask::new(payload)
        });
        let (_, tasks) = sender.submit(0, &[&function], tasks)?;
        sender.flush().await?;
        sent += tasks as u64;
        if let Event::Answer(answer) = receiver.next().await? {
            accepted += answer.view()?.accepted() as u64;
        }
    }
    sender.close().await;
    Ok(accepted)
}

/// Numbers without a pattern, the same in every run.
struct Random(u64);

impl Random {
    fn between(&mut self, range: Range<u64>) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        range.start + (mixed ^ mixed >> 31) % (range.end - range.start).max(1)
    }
}

/// Monotonic nanoseconds, the same clock in every process.
pub(crate) fn now_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Wakes at nanoseconds, where the runtime's own timers know milliseconds only: a timer of the system's that the
/// runtime waits for as it does for packets. A thread that sleeps would wake late by the system's slack and by the
/// hand-over to this one, which would count as the server's.
struct Pacer {
    timer: OwnedFd,
    /// The same timer for the runtime, which knows no timers of this kind; what it does with the reading end of a pipe,
    /// waiting for it and reading from it, is all that this one needs.
    expired: pipe::Receiver,
}

impl Pacer {
    fn new() -> std::io::Result<Pacer> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let expired = pipe::Receiver::from_owned_fd_unchecked(timer.try_clone()?)?;
        Ok(Pacer { timer, expired })
    }

    async fn wait_until(&mut self, at_ns: u64) -> std::io::Result<()> {
        let timer = Itimerspec {
            it_interval: timespec(0),
            // Zero would stop it.
            it_value: timespec(at_ns.max(1)),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &timer)?;
        let mut count = [0; 8];
        self.expired.read_exact(&mut count).await?;
        Ok(())
    }
}

fn timespec(ns: u64) -> Timespec {
    Timespec {
        tv_sec: (ns / 1_000_000_000) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    }
}
