//! What becomes of tasks whose executor is gone.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pelton_client::{Attempt, Code, Operation, RequestId, Task, TaskName, TaskStatus};
use pelton_net::{
    execute::{
        ExecuteTask, Offer, OutcomeStatus, RefusedOutcome, Register, Registered, ResumedLease,
        TaskOutcome,
    },
    frame::FrameType,
    item::{ItemWriter, Items},
    session::Lease,
};
use pelton_tests::{
    Server, ServerOptions, Worker,
    raw::{Raw, hello},
    worker::Ledger,
};

/// What a lease gets without a sign of life from its executor.
const LEASE: Duration = Duration::from_secs(15);
/// When it must have been noticed, on a machine that has more to do.
const NOTICED: Duration = Duration::from_secs(24);

/// An executor process of this test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_task_of_a_killed_executor_is_taken_over_by_another() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "stuck", "backoff_ms_min": 1, "backoff_ms_max": 2}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_test-executor"))
        .arg(server.address().to_string())
        .arg(server.trust().to_string())
        .arg("stuck")
        .stdout(Stdio::piped())
        .spawn();
    let mut process = Process(child.unwrap());
    let submitted = client.submit("stuck", Task::new("x")).await.unwrap();
    let mut lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
    let started = tokio::task::spawn_blocking(move || lines.next().unwrap().unwrap());
    let started = started.await.unwrap();
    assert_eq!(RequestId::parse(&started), Some(submitted.request_id));

    process.0.kill().unwrap();
    process.0.wait().unwrap();
    let killed = Instant::now();
    let ledger = Ledger::default();
    let noted = ledger.clone();
    let _worker = Worker::of(server.options(), "stuck", 1, move |task: Attempt| {
        noted.note(&task);
        async { Ok(b"by another".to_vec()) }
    })
    .await;
    let name = TaskName::Request(submitted.request_id);
    let finished = client.wait(&name, 3 * LEASE).await.unwrap();
    assert_eq!(finished.status, TaskStatus::Succeeded);
    assert_eq!(finished.result.as_deref(), Some(&b"by another"[..]));
    assert_eq!(ledger.runs(submitted.request_id), 1);
    assert!(killed.elapsed() < NOTICED, "{:?}", killed.elapsed());
}

fn register(raw: &Raw, function: &str, slots: u32) {
    raw.send(|out| {
        let offer = Offer { function, slots };
        let register = Register {
            slots: 0,
            cpu_millis: 0,
            memory_mib: 0,
            offers: vec![offer],
        };
        register.encode(out, 2);
    });
}

#[tokio::test]
async fn a_late_outcome_of_an_executor_that_lost_its_lease_is_refused() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "late", "backoff_ms_min": 1, "backoff_ms_max": 2}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let mut first = Raw::hello(&server, Some(77)).await;
    register(&first, "late", 1);
    let registered = first.expect(FrameType::Registered).await;
    assert_eq!(Registered::parse(&registered).unwrap().codes, [Code::Ok]);
    let task = client
        .submit("late", Task::new("x"))
        .await
        .unwrap()
        .request_id;
    let frame = first.expect(FrameType::Execute).await;
    let lease = {
        let items = Items::<ExecuteTask<'_>>::parse(&frame).unwrap();
        let item = items.iter().next().unwrap();
        assert_eq!((item.request_id, item.payload), (task, &b"x"[..]));
        Lease {
            request_id: item.request_id,
            token: item.token,
        }
    };
    drop(first);

    let answer = async |_: Attempt| Ok(b"of the second".to_vec());
    let _worker = Worker::of(server.options(), "late", 1, answer).await;
    let name = TaskName::Request(task);
    let finished = client.wait(&name, 3 * LEASE).await.unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"of the second"[..]));

    let mut back = Raw::connect(&server).await;
    back.send(|out| hello(out, Some(77)));
    back.expect(FrameType::Welcome).await;
    back.send(|out| {
        let mut resume = ItemWriter::begin(out, FrameType::Resume, 3);
        resume.push(&lease).unwrap();
        resume.finish();
    });
    let resumed = back.expect(FrameType::Resumed).await;
    let verdicts = Items::<ResumedLease>::parse(&resumed).unwrap();
    assert_eq!(verdicts.iter().collect::<Vec<_>>(), [ResumedLease::Refused]);
    back.send(|out| {
        let mut outcomes = ItemWriter::begin(out, FrameType::Outcome, 4);
        let outcome = TaskOutcome {
            result: b"of the first",
            ..TaskOutcome::new(lease, OutcomeStatus::Succeeded)
        };
        outcomes.push(&outcome).unwrap();
        outcomes.finish();
    });
    let ack = back.expect(FrameType::OutcomeAck).await;
    let refused = Items::<RefusedOutcome>::parse(&ack).unwrap();
    let refused: Vec<_> = refused
        .iter()
        .map(|refused| (refused.index, refused.code))
        .collect();
    assert!(
        matches!(refused[..], [(0, Code::StaleLease | Code::NotFound)]),
        "{refused:?}"
    );
    let finished = client.wait(&name, Duration::ZERO).await.unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"of the second"[..]));
}
