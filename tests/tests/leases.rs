//! What executors are told of the leases that they hold.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use pelton_client::{
    Attempt, Client, Code, Operation, RequestId, Task, TaskError, TaskName, TaskStatus,
};
use pelton_net::{
    execute::{
        ExecuteTask, Offer, OutcomeStatus, RefusedOutcome, Register, ResumedLease, TaskOutcome,
    },
    frame::{Frame, FrameType},
    id::Token,
    item::{ItemWriter, Items},
    session::Lease,
};
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually,
    raw::Raw,
    worker::{Gate, Ledger},
};
use serde_json::Value;

/// Identity of the executors that send single frames.
const EXECUTOR: u64 = 77;

async fn make(client: &Client) {
    let make = r#"{"function": "held", "backoff_ms_min": 1, "backoff_ms_max": 2}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
}

/// Offers the function; the server has heard it.
async fn register(raw: &mut Raw, slots: u32) {
    raw.send(|out| {
        let register = Register {
            slots: 0,
            cpu_millis: 0,
            memory_mib: 0,
            offers: vec![Offer {
                function: "held",
                slots,
            }],
        };
        register.encode(out, 2);
    });
    raw.expect(FrameType::Registered).await;
}

/// Leases of as many tasks as are executed next.
async fn leases(raw: &mut Raw, count: usize) -> Vec<Lease> {
    let mut leases = Vec::new();
    while leases.len() < count {
        let frame = raw.expect(FrameType::Execute).await;
        let items = Items::<ExecuteTask<'_>>::parse(&frame).unwrap();
        leases.extend(items.iter().map(|item| Lease {
            request_id: item.request_id,
            token: item.token,
        }));
    }
    leases
}

fn name(raw: &Raw, kind: FrameType, leases: &[Lease]) {
    raw.send(|out| {
        let mut writer = ItemWriter::begin(out, kind, 3);
        for lease in leases {
            writer.push(lease).unwrap();
        }
        writer.finish();
    });
}

fn succeed(raw: &Raw, lease: Lease) {
    raw.send(|out| {
        let mut outcomes = ItemWriter::begin(out, FrameType::Outcome, 4);
        let outcome = TaskOutcome {
            result: b"done",
            ..TaskOutcome::new(lease, OutcomeStatus::Succeeded)
        };
        outcomes.push(&outcome).unwrap();
        outcomes.finish();
    });
}

async fn acknowledged(raw: &mut Raw) {
    let ack = raw.expect(FrameType::OutcomeAck).await;
    let refused = Items::<RefusedOutcome>::parse(&ack).unwrap();
    assert_eq!(refused.iter().count(), 0);
}

fn lost(frame: &Frame) -> Vec<Lease> {
    let mut lost: Vec<Lease> = Items::parse(frame).unwrap().iter().collect();
    lost.sort_by_key(|lease| lease.request_id);
    lost
}

fn verdicts(frame: &Frame) -> Vec<ResumedLease> {
    Items::parse(frame).unwrap().iter().collect()
}

/// The lease under another number.
fn another_attempt(lease: Lease) -> Lease {
    Lease {
        token: Token {
            attempt: 9,
            ..lease.token
        },
        ..lease
    }
}

/// Names that lie on all shards.
async fn submit(client: &Client, count: usize) -> Vec<RequestId> {
    let tasks: Vec<Task> = (0..count)
        .map(|n| Task::new("x").task_id(format!("n{n}")))
        .collect();
    let submitted = client.submit_batch("held", &tasks).await;
    submitted
        .into_iter()
        .map(|submitted| submitted.unwrap().request_id)
        .collect()
}

async fn heartbeats(options: ServerOptions) {
    let server = Server::start(options);
    let client = server.client().await;
    make(&client).await;
    let mut raw = Raw::hello(&server, Some(EXECUTOR)).await;
    register(&mut raw, 30).await;
    submit(&client, 30).await;
    let held = leases(&mut raw, 30).await;
    name(&raw, FrameType::Heartbeat, &[]);
    let ack = raw.expect(FrameType::HeartbeatAck).await;
    assert_eq!((lost(&ack), ack.tag), (vec![], 3));
    name(&raw, FrameType::Heartbeat, &held);
    assert_eq!(lost(&raw.expect(FrameType::HeartbeatAck).await), []);

    let (ended, runs) = held.split_at(10);
    for &lease in ended {
        succeed(&raw, lease);
        acknowledged(&mut raw).await;
    }
    let never = another_attempt(runs[0]);
    let mut expected: Vec<Lease> = ended.iter().copied().chain([never]).collect();
    expected.sort_by_key(|lease| lease.request_id);
    name(&raw, FrameType::Heartbeat, &[&held[..], &[never]].concat());
    assert_eq!(lost(&raw.expect(FrameType::HeartbeatAck).await), expected);
    // Those that are not lost are still wanted.
    for &lease in runs {
        succeed(&raw, lease);
        acknowledged(&mut raw).await;
    }
}

#[tokio::test]
async fn a_heartbeat_is_answered_with_the_leases_that_are_lost() {
    heartbeats(ServerOptions::default()).await;
}

#[tokio::test]
async fn a_heartbeat_is_answered_for_every_shard() {
    heartbeats(ServerOptions { shards: 3 }).await;
}

/// Says when it is dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn an_executor_whose_task_was_taken_over_learns_it_by_its_next_heartbeat() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client).await;
    let (ledger, never, over) = (Ledger::default(), Gate::default(), Arc::default());
    let (noted, held, dropped) = (ledger.clone(), never.clone(), Arc::clone(&over));
    let _worker = Worker::of(server.options(), "held", 1, move |task: Attempt| {
        noted.note(&task);
        let (held, dropped) = (held.clone(), Dropped(Arc::clone(&dropped)));
        async move {
            let _dropped = dropped;
            held.pass().await;
            Ok::<_, TaskError>(b"of the first".to_vec())
        }
    })
    .await;
    let task = submit(&client, 1).await[0];
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    let named = TaskName::Request(task);
    let view: Value = serde_json::from_str(&client.get(&named).await.unwrap()).unwrap();
    let identity = u64::from_str_radix(view["instance_id"].as_str().unwrap(), 16).unwrap();

    // Somebody comes back as this executor and holds nothing: its task is given out again.
    let mut again = Raw::hello(&server, Some(identity)).await;
    name(&again, FrameType::Resume, &[]);
    assert_eq!(verdicts(&again.expect(FrameType::Resumed).await), []);
    register(&mut again, 1).await;
    let lease = leases(&mut again, 1).await[0];
    assert_eq!((lease.request_id, lease.token.attempt), (task, 2));
    eventually("the first one gives up", async || {
        over.load(Ordering::SeqCst)
    })
    .await;

    succeed(&again, lease);
    let finished = client.wait(&named, PATIENCE).await.unwrap();
    assert_eq!(finished.status, TaskStatus::Succeeded);
    assert_eq!(finished.result.as_deref(), Some(&b"done"[..]));
    assert_eq!(ledger.runs(task), 1);
}

async fn resumes(options: ServerOptions) {
    let mut server = Server::start(options);
    let client = server.client().await;
    make(&client).await;
    let mut raw = Raw::hello(&server, Some(EXECUTOR)).await;
    register(&mut raw, 9).await;
    submit(&client, 9).await;
    let held = leases(&mut raw, 9).await;
    let (ended, runs) = held.split_at(4);
    for &lease in ended {
        succeed(&raw, lease);
        acknowledged(&mut raw).await;
    }
    server.kill9();
    server.restart();

    let mut back = Raw::hello(&server, Some(EXECUTOR)).await;
    let presented = [&held[..], &[another_attempt(runs[0])]].concat();
    name(&back, FrameType::Resume, &presented);
    let mut expected = vec![ResumedLease::Known; 4];
    expected.extend([ResumedLease::Kept; 5]);
    expected.push(ResumedLease::Refused);
    assert_eq!(verdicts(&back.expect(FrameType::Resumed).await), expected);
    for &lease in runs {
        succeed(&back, lease);
        acknowledged(&mut back).await;
    }
    // They end, and none is given out a second time.
    for lease in &held {
        let named = TaskName::Request(lease.request_id);
        let finished = client.wait(&named, PATIENCE).await.unwrap();
        assert_eq!((finished.attempts, finished.code), (1, Code::Ok));
    }
}

#[tokio::test]
async fn leases_presented_after_a_crash_are_kept_known_or_refused() {
    resumes(ServerOptions::default()).await;
}

#[tokio::test]
async fn leases_of_several_shards_are_kept_known_or_refused() {
    resumes(ServerOptions { shards: 3 }).await;
}
