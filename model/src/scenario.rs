//! What is tried: a few threads that meet as those of an engine do, small enough that every order can be.
//!
//! A thread that waits for what never comes leaves all threads waiting, which the checker calls a deadlock. So each
//! scenario that comes to its end has lost no wake-up, and what it counts there says that no batch was lost.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::*},
    },
    time::Duration,
};

use loom::thread::{JoinHandle, spawn};
use pelton_core::{
    event::{Control, EdgeBatch, Inbox, SubmitBatch},
    id::{ConnectionId, ShardId, TenantId},
    limits::INBOX_SUBMIT_BYTES_MAX,
};

use crate::{
    calls::{Calls, Unsent},
    edge::Edge,
    embedded::{Answer, Command},
    engine::Shared,
    inbox::{Delivery, ShardInbox},
    linger::Linger,
    planted::{Bug, plant},
    queue::ROOM,
    ring::RingDevice,
    routes::{RoutePointer, Routes},
    sleep::sleep,
    sync::{Instant, Thread, park},
};

/// Something that is tried.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// What it is called by.
    pub name: &'static str,
    run: fn(),
    /// How often a thread may be taken off before it waits by itself.
    preemptions: usize,
}

/// Everything that is tried.
pub const SCENARIOS: [Scenario; 10] = [
    scenario("a_sleeping_shard_takes_every_batch", sleeping_shard, 3),
    scenario("a_lingering_shard_takes_every_batch", lingering_shard, 4),
    scenario("a_shard_that_waits_for_its_flush_hears_again", waiting, 3),
    scenario("a_sleeping_shard_hears_that_it_is_to_stop", stopping, 3),
    scenario("a_sleeping_shard_hears_a_call", called, 3),
    scenario("an_inbox_keeps_its_bound_of_bytes", bounds, 3),
    scenario("an_inbox_keeps_its_bound_of_batches", full, 2),
    scenario("a_sleeping_edge_takes_every_delivery", sleeping_edge, 3),
    scenario("a_call_is_answered_or_refused", closing_on_a_caller, 3),
    scenario("the_end_of_an_attempt_is_taken", closing_on_a_worker, 3),
];

const fn scenario(name: &'static str, run: fn(), preemptions: usize) -> Scenario {
    Scenario {
        name,
        run,
        preemptions,
    }
}

impl Scenario {
    /// Tries every order, with this bug in what the engine's files stand on, and panics at the first in which something
    /// is wrong. How many orders were tried. `preemptions` is for a bound other than the scenario's own.
    pub fn check(self, bug: Option<Bug>, preemptions: Option<usize>) -> u64 {
        plant(bug);
        let tried = Arc::new(AtomicU64::new(0));
        let mut checker = loom::model::Builder::new();
        checker.preemption_bound = Some(preemptions.unwrap_or(self.preemptions));
        checker.max_branches = 20_000;
        checker.check({
            let tried = Arc::clone(&tried);
            move || {
                tried.fetch_add(1, Relaxed);
                Instant::restart();
                (self.run)();
            }
        });
        plant(None);
        tried.load(Relaxed)
    }
}

fn shared() -> Arc<Shared> {
    Arc::new(Shared {
        inboxes: vec![ShardInbox::new().expect("it needs nothing of the system")],
        edges: (0..3).map(|_| OnceLock::new()).collect(),
        routes: RoutePointer(Routes),
        quarantined: vec![OnceLock::new()],
    })
}

const SHARD: ShardId = ShardId(0);

fn batch(ticket: u64, bytes: usize) -> Box<SubmitBatch> {
    Box::new(SubmitBatch {
        connection: ConnectionId(0),
        ticket,
        tenant: TenantId(0),
        notify: false,
        with_result: false,
        tasks: Vec::new(),
        bytes: vec![0; bytes],
        done: 0,
    })
}

fn word() -> Control {
    Control::SessionClosed {
        executor: 0,
        connection: ConnectionId(0),
    }
}

fn edge(shared: &Arc<Shared>) -> Edge {
    Edge::attach(shared, Box::new(|| {})).expect("there is room for three")
}

/// One edge hands in two batches, another a word, each as soon as it can.
fn hand_in(shared: &Arc<Shared>) {
    let submits = edge(shared);
    spawn(move || {
        for ticket in [1, 2] {
            assert!(submits.submit(SHARD, batch(ticket, 1)).is_ok());
            submits.wake();
        }
    });
    let controls = edge(shared);
    spawn(move || {
        assert!(controls.control(SHARD, word()).is_ok());
        controls.wake();
    });
}

/// A shard that takes what [`hand_in`] gives, as `ShardLoop::run` does.
fn take_all(shared: &Shared, mut linger: Linger) {
    let inbox = &shared.inboxes[0];
    let mut ring = RingDevice::new(inbox.bell.kernel());
    let mut turn = Inbox::default();
    let mut tickets = Vec::new();
    let mut words = 0;
    loop {
        inbox.gather(&mut turn);
        tickets.extend(turn.submits.drain(..).map(|batch| batch.ticket));
        words += turn.control.drain(..).count();
        if tickets.len() == 2 && words == 1 {
            break;
        }
        sleep(&mut ring, &mut linger, inbox, true, None);
    }
    assert_eq!(tickets, [1, 2]);
    assert!(inbox.is_empty());
}

fn sleeping_shard() {
    let shared = shared();
    hand_in(&shared);
    take_all(&shared, Linger::new(Duration::ZERO));
}

fn lingering_shard() {
    let shared = shared();
    hand_in(&shared);
    let mut linger = Linger::new(Duration::from_micros(25));
    linger.slept(Duration::ZERO);
    take_all(&shared, linger);
}

/// A flush is under way. What is gathered meanwhile has to wait for it, and so the shard is deaf; then it hears again.
fn waiting() {
    let shared = shared();
    let kernel = Arc::clone(shared.inboxes[0].bell.kernel());
    spawn(move || kernel.end_flush());
    let submits = edge(&shared);
    spawn(move || {
        for ticket in [1, 2] {
            assert!(submits.submit(SHARD, batch(ticket, 1)).is_ok());
            submits.wake();
        }
    });
    let inbox = &shared.inboxes[0];
    let mut ring = RingDevice::new(inbox.bell.kernel());
    let mut linger = Linger::new(Duration::ZERO);
    let mut turn = Inbox::default();
    let mut flushing = true;
    let mut tickets = Vec::new();
    while flushing || tickets.len() < 2 {
        inbox.gather(&mut turn);
        flushing &= !ring.completed();
        if !flushing {
            tickets.extend(turn.submits.drain(..).map(|batch| batch.ticket));
            if tickets.len() == 2 {
                break;
            }
        }
        let hears = turn.submits.is_empty();
        sleep(&mut ring, &mut linger, inbox, hears, None);
    }
    assert_eq!(tickets, [1, 2]);
}

/// An edge hands in a last word, then the shard is told to end, while another edge hands in a batch.
fn stopping() {
    let shared = shared();
    let submits = edge(&shared);
    spawn(move || {
        let _ = submits.submit(SHARD, batch(1, 1));
        submits.wake();
    });
    let controls = edge(&shared);
    let closer = Arc::clone(&shared);
    spawn(move || {
        assert!(controls.control(SHARD, word()).is_ok());
        controls.wake();
        closer.inboxes[0].stop();
    });
    let inbox = &shared.inboxes[0];
    let mut ring = RingDevice::new(inbox.bell.kernel());
    let mut linger = Linger::new(Duration::ZERO);
    let mut turn = Inbox::default();
    loop {
        inbox.gather(&mut turn);
        if inbox.is_done() {
            break;
        }
        sleep(&mut ring, &mut linger, inbox, true, None);
    }
    assert_eq!(turn.control.len(), 1, "the last word was taken");
    assert!(edge(&shared).submit(SHARD, batch(2, 1)).is_err());
}

/// A shard is called from beside its queues while an edge hands in a word.
fn called() {
    let shared = shared();
    let caller = Arc::clone(&shared);
    spawn(move || caller.inboxes[0].call());
    let controls = edge(&shared);
    spawn(move || {
        assert!(controls.control(SHARD, word()).is_ok());
        controls.wake();
    });
    let inbox = &shared.inboxes[0];
    let mut ring = RingDevice::new(inbox.bell.kernel());
    let mut linger = Linger::new(Duration::ZERO);
    let mut turn = Inbox::default();
    let mut calls = 0;
    loop {
        inbox.gather(&mut turn);
        calls += u32::from(inbox.is_called());
        if calls == 1 && turn.control.len() == 1 {
            break;
        }
        sleep(&mut ring, &mut linger, inbox, true, None);
    }
    assert!(!inbox.is_called());
}

/// Two edges each hand in what crosses the bound of bytes alone.
fn bounds() {
    let shared = shared();
    assert_eq!(hand_in_at_once(&shared, 2, INBOX_SUBMIT_BYTES_MAX + 1), 1);
    // What is gone weighs nothing.
    assert!(
        shared.inboxes[0]
            .push_submit(batch(0, INBOX_SUBMIT_BYTES_MAX))
            .is_ok()
    );
    assert!(shared.inboxes[0].push_submit(batch(0, 1)).is_ok());
}

/// One edge more than there is room for hands in, none of them too much.
fn full() {
    const HALF: usize = INBOX_SUBMIT_BYTES_MAX / 2;
    let shared = shared();
    let inbox = &shared.inboxes[0];
    assert_eq!(hand_in_at_once(&shared, ROOM + 1, HALF), ROOM);
    // What was refused for its count weighs nothing.
    assert!(inbox.push_submit(batch(0, HALF + 1)).is_ok());
    assert!(inbox.push_submit(batch(0, HALF)).is_ok());
}

/// That many edges hand in that much at once, and the shard takes it; how many were not refused.
fn hand_in_at_once(shared: &Arc<Shared>, edges: usize, bytes: usize) -> usize {
    let pushers = (0..edges).map(|ticket| {
        let shared = Arc::clone(shared);
        spawn(move || {
            let batch = batch(ticket as u64, bytes);
            shared.inboxes[0].push_submit(batch).is_ok()
        })
    });
    let pushers: Vec<_> = pushers.collect();
    let taken = pushers
        .into_iter()
        .map(|pusher| pusher.join().expect("it does not panic"));
    let taken = taken.filter(|taken| *taken).count();
    let mut turn = Inbox::default();
    shared.inboxes[0].gather(&mut turn);
    assert_eq!(turn.submits.len(), taken, "what was taken is there");
    taken
}

/// Two shards deliver to an edge that sleeps with a token, as the embedding thread and the pump of a server's edge do.
fn sleeping_edge() {
    let shared = shared();
    let me = Thread::default();
    me.enter();
    let edge = Edge::attach(&shared, Box::new(move || me.unpark())).expect("there is room");
    for shard in [0, 1] {
        let shared = Arc::clone(&shared);
        spawn(move || {
            let outbox = shared.edges[0].get().expect("the edge is there");
            let delivery = Delivery {
                shard: ShardId(shard),
                batch: EdgeBatch::default(),
                infos: Vec::new(),
            };
            assert!(outbox.deliver(Box::new(delivery)).is_ok());
        });
    }
    let mut seen = [0, 0];
    while seen != [1, 1] {
        while let Some(delivery) = edge.take() {
            seen[usize::from(delivery.shard.0)] += 1;
        }
        if seen != [1, 1] && edge.park() {
            park();
            edge.unpark();
        }
    }
}

/// The thread that takes calls, as the embedding thread does; how many attempts it learned the end of.
fn take_calls(shared: &Arc<Shared>) -> (Arc<Calls>, JoinHandle<u32>) {
    let thread = Thread::default();
    let waked = thread.clone();
    let edge = Edge::attach(shared, Box::new(move || waked.unpark())).expect("there is room");
    let calls = Arc::new(Calls::new(thread.clone()));
    let taken = Arc::clone(&calls);
    let embedding = spawn(move || {
        thread.enter();
        let mut ended = 0;
        loop {
            let ending = taken.is_ending();
            while let Some(command) = taken.take() {
                match command {
                    Command::Submit(answer) => drop(answer),
                    Command::Ended => ended += 1,
                }
            }
            if ending && taken.is_empty() {
                return ended;
            }
            taken.rest(&edge, None);
        }
    });
    (calls, embedding)
}

/// Somebody calls while the engine closes.
fn closing_on_a_caller() {
    let (calls, embedding) = take_calls(&shared());
    spawn({
        let calls = Arc::clone(&calls);
        move || {
            let answer = Answer::default();
            let answered = Arc::clone(&answer.0);
            let sent = calls.send(Command::Submit(answer));
            assert!(sent != Err(Unsent::Full));
            answered.take();
        }
    });
    calls.refuse();
    calls.end();
    embedding.join().expect("it does not panic");
    calls.ended();
}

/// A worker ends its attempt while the engine closes.
fn closing_on_a_worker() {
    let (calls, embedding) = take_calls(&shared());
    let worker = spawn({
        let calls = Arc::clone(&calls);
        move || calls.finish(Command::Ended)
    });
    calls.refuse();
    worker.join().expect("it does not panic");
    calls.end();
    assert_eq!(embedding.join().expect("it does not panic"), 1);
    calls.ended();
}
