//! The six cases that every client of the protocol can carry out, with the Rust client here and with the Python client
//! of `tests/python`.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    env,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use pelton_client::{Attempt, Client, Code, Operation, Task, TaskError, TaskName, TaskStatus};
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually,
    worker::{Gate, Ledger},
};

async fn make(client: &Client, function: &str) {
    let fields =
        format!(r#"{{"function": "{function}", "backoff_ms_min": 1, "backoff_ms_max": 2}}"#);
    client.query(Operation::FunctionSet, &fields).await.unwrap();
}

async fn submit(client: &Client) {
    let unknown = client.submit("submit", Task::new("x")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    make(client, "submit").await;
    let payload = |n: u32| format!("payload {n}");
    let tasks: Vec<Task> = (0..100).map(|n| Task::new(payload(n))).collect();
    let submitted = client.submit_batch("submit", &tasks).await;
    let mut ids = Vec::new();
    for submitted in submitted {
        ids.push(submitted.unwrap().request_id);
    }
    for n in [0, 33, 66, 99] {
        let task = client
            .get(&TaskName::Request(ids[n as usize]))
            .await
            .unwrap();
        assert!(
            task.contains(&payload(n)) && task.contains("Enqueued"),
            "{task}"
        );
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 100);
}

async fn execute(server: &Server, client: &Client) {
    make(client, "execute").await;
    let _worker = Worker::of(
        server.options(),
        "execute",
        2,
        async |task: Attempt| match (task.task_id(), task.attempt()) {
            (Some("good"), _) => Ok(task.payload().to_ascii_uppercase()),
            (_, 1) => Err(TaskError::failed("once")),
            (_, _) => Ok(Vec::new()),
        },
    )
    .await;
    let good = Task::new("abc").task_id("good");
    let good = client.submit_and_wait("execute", good).await.unwrap();
    assert_eq!(
        (good.attempts, good.result.as_deref()),
        (1, Some(&b"ABC"[..]))
    );
    let bad = client
        .submit_and_wait("execute", Task::new("def"))
        .await
        .unwrap();
    assert_eq!((bad.attempts, bad.status), (2, TaskStatus::Succeeded));
}

async fn duplicate(server: &Server, client: &Client) {
    make(client, "duplicate").await;
    let other = server.client().await;
    let task = |payload: &'static str| Task::new(payload).task_id("order-1");
    let first = client.submit("duplicate", task("10")).await.unwrap();
    let again = other.submit("duplicate", task("10")).await.unwrap();
    assert!(!first.duplicate && again.duplicate);
    assert_eq!(first.request_id, again.request_id);
    let reused = other.submit("duplicate", task("11")).await.unwrap_err();
    assert_eq!(reused.code(), Code::IdReused);
}

async fn throttle(server: &Server, client: &Client) {
    make(client, "throttle").await;
    let _worker = Worker::of(
        server.options(),
        "throttle",
        1,
        async |task: Attempt| match task.attempt() {
            1 => Err(TaskError::Throttled {
                retry_after_ms: 300,
            }),
            _ => Ok(b"y".to_vec()),
        },
    )
    .await;
    let start = Instant::now();
    let finished = client
        .submit_and_wait("throttle", Task::new("x"))
        .await
        .unwrap();
    assert_eq!(
        (finished.attempts, finished.result.as_deref()),
        (2, Some(&b"y"[..]))
    );
    assert!(start.elapsed() >= Duration::from_millis(290));
}

async fn stop(server: &Server, client: &Client) {
    make(client, "stop").await;
    let ledger = Ledger::default();
    let noted = ledger.clone();
    let waiting = client
        .submit("stop", Task::new("x"))
        .await
        .unwrap()
        .request_id;
    let waiting = TaskName::Request(waiting);
    let stopped = client.stop(&waiting, Duration::ZERO).await.unwrap();
    assert_eq!(stopped, Some(TaskStatus::Stopped));
    let again = client.stop(&waiting, Duration::ZERO).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    let _worker = Worker::of(server.options(), "stop", 1, move |task: Attempt| {
        noted.note(&task);
        async move {
            task.cancelled().await;
            Err(TaskError::Stopped)
        }
    })
    .await;
    let running = client.submit_watched("stop", Task::new("y")).await.unwrap();
    let task = running.request_id;
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    client
        .stop(&TaskName::Request(task), PATIENCE)
        .await
        .unwrap();
    assert_eq!(
        running.finished().await.unwrap().status,
        TaskStatus::Stopped
    );
}

async fn reconnect(server: &mut Server, client: &Client) {
    make(client, "reconnect").await;
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let _worker = Worker::of(server.options(), "reconnect", 2, move |task: Attempt| {
        noted.note(&task);
        let held = held.clone();
        async move {
            held.pass().await;
            Ok(b"kept".to_vec())
        }
    })
    .await;
    let task = client
        .submit("reconnect", Task::new("x"))
        .await
        .unwrap()
        .request_id;
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    server.kill9();
    server.restart();
    gate.open(1);
    let finished = client
        .wait(&TaskName::Request(task), PATIENCE)
        .await
        .unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"kept"[..]));
    assert_eq!((finished.attempts, ledger.runs(task)), (1, 1));
}

#[tokio::test]
async fn the_rust_client_conforms() {
    let mut server = Server::start(ServerOptions::default());
    let client = server.client().await;
    submit(&client).await;
    execute(&server, &client).await;
    duplicate(&server, &client).await;
    throttle(&server, &client).await;
    stop(&server, &client).await;
    reconnect(&mut server, &client).await;
}

#[test]
fn a_client_written_from_the_protocol_document_conforms() {
    let Some(python) = env::var_os("PELTON_TEST_PYTHON") else {
        println!("skipped: PELTON_TEST_PYTHON names no interpreter that has aioquic");
        return;
    };
    let server = Server::start(ServerOptions::default());
    let trust = server.trust().to_string();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/conformance.py");
    let ran = Command::new(python)
        .arg("-B")
        .arg(script)
        .arg(server.address().to_string())
        .arg(trust.strip_prefix("sha256:").unwrap())
        .output()
        .unwrap();
    let (said, complained) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    assert!(ran.status.success(), "{said}{complained}");
    for case in [
        "submit",
        "execute",
        "duplicate",
        "throttle",
        "stop",
        "reconnect",
    ] {
        assert!(said.contains(&format!("{case}: ok")), "{said}{complained}");
    }
}
