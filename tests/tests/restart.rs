//! What a crash or a restart of the server must not cost.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use pelton_client::{Attempt, Operation, RequestId, Task, TaskError, TaskName, TaskStatus};
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually,
    worker::{Gate, Ledger},
};

/// Clients that submit at once, and the tasks of each of their batches.
const CLIENTS: usize = 4;
const BATCH: usize = 64;
/// Tasks that are acknowledged before the server is killed.
const LOAD: usize = 4_000;

/// Kills a server under load; every task that it has acknowledged is there afterwards and has run once.
async fn crash_under_load(options: ServerOptions) {
    let mut server = Server::start(options);
    let client = server.client().await;
    let make = r#"{"function": "load"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let ledger = Ledger::default();
    let noted = ledger.clone();
    let _worker = Worker::of(server.options(), "load", 64, move |task: Attempt| {
        noted.note(&task);
        async move { Ok(task.payload().to_vec()) }
    })
    .await;

    let acknowledged = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let mut callers = Vec::new();
    for number in 0..CLIENTS {
        let caller = server.client().await;
        let (acknowledged, over) = (acknowledged.clone(), over.clone());
        callers.push(tokio::spawn(async move {
            let mut ids: Vec<(RequestId, String)> = Vec::new();
            for batch in 0.. {
                let names: Vec<String> = (0..BATCH)
                    .map(|n| format!("n-{number}-{batch}-{n}"))
                    .collect();
                let tasks: Vec<Task> = names
                    .iter()
                    .map(|name| Task::new(name.clone()).task_id(name))
                    .collect();
                let mut broken = false;
                let submitted = caller.submit_batch("load", &tasks).await;
                for (submitted, name) in submitted.into_iter().zip(names) {
                    match submitted {
                        Ok(submitted) => {
                            ids.push((submitted.request_id, name));
                            acknowledged.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => broken = true,
                    }
                }
                if broken || over.load(Ordering::Relaxed) {
                    break;
                }
            }
            ids
        }));
    }
    let loaded = async || acknowledged.load(Ordering::Relaxed) >= LOAD;
    eventually("the load is taken", loaded).await;
    server.kill9();
    // The new server tells the callers that their connections are gone.
    server.restart();
    over.store(true, Ordering::Relaxed);
    let mut ids = Vec::new();
    for caller in callers {
        ids.extend(caller.await.unwrap());
    }
    assert!(ids.len() >= LOAD);
    for (id, name) in &ids {
        let finished = client.wait(&TaskName::Request(*id), PATIENCE).await;
        let finished = finished.unwrap_or_else(|error| panic!("{name} {id}: {error}"));
        assert_eq!(finished.status, TaskStatus::Succeeded, "{finished:?}");
        assert_eq!(finished.result.as_deref(), Some(name.as_bytes()));
        assert_eq!(ledger.runs(*id), 1, "{name} {id}: {finished:?}");
    }
    // A caller that does not know sends the same names again.
    for (id, name) in ids.iter().rev().take(100) {
        let task = Task::new(name.clone()).task_id(name);
        let again = client.submit("load", task).await.unwrap();
        assert!(again.duplicate && again.request_id == *id);
    }
}

#[tokio::test]
async fn every_acknowledged_task_survives_a_crash_under_load_and_runs_once() {
    crash_under_load(ServerOptions::default()).await;
}

#[tokio::test]
async fn every_acknowledged_task_survives_a_crash_of_several_shards() {
    crash_under_load(ServerOptions { shards: 3 }).await;
}

/// What happens to the server while a task runs, and when the task ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Crash,
    Orderly,
}

async fn restart_under_a_running_task(end: End, ends_while_down: bool) {
    let mut server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let done = Arc::new(AtomicUsize::new(0));
    let ended = done.clone();
    let _worker = Worker::of(server.options(), "long", 4, move |task: Attempt| {
        noted.note(&task);
        let (held, ended) = (held.clone(), ended.clone());
        async move {
            held.pass().await;
            ended.fetch_add(1, Ordering::SeqCst);
            Ok::<_, TaskError>(b"kept".to_vec())
        }
    })
    .await;
    let known = async || {
        client
            .submit("long", Task::new("x").task_id("one"))
            .await
            .is_ok()
    };
    eventually("the function is known", known).await;
    let again = client
        .submit_watched("long", Task::new("x").task_id("one"))
        .await
        .unwrap();
    let task = again.request_id;
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    match end {
        End::Crash => server.kill9(),
        End::Orderly => drop(server.stop()),
    }
    if ends_while_down {
        gate.open(1);
        eventually("the task ends", async || done.load(Ordering::SeqCst) == 1).await;
    }
    server.restart();
    if !ends_while_down {
        // The executor is back, and has not been handed the task a second time: this one runs beside it.
        let beside = async || {
            // On the old connection it cannot be known whether the task was taken: the name makes it safe to ask again.
            let submitted = client
                .submit("long", Task::new("y").task_id("beside"))
                .await;
            submitted.is_ok_and(|submitted| ledger.runs(submitted.request_id) == 1)
        };
        eventually("the executor is back", beside).await;
        gate.open(2);
    }
    let finished = tokio::time::timeout(PATIENCE, again.finished())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(finished.status, TaskStatus::Succeeded);
    assert_eq!(finished.result.as_deref(), Some(&b"kept"[..]));
    assert_eq!((finished.attempts, ledger.runs(task)), (1, 1));
}

#[tokio::test]
async fn a_running_task_outlives_a_crash_of_the_server_and_is_not_run_again() {
    restart_under_a_running_task(End::Crash, false).await;
}

#[tokio::test]
async fn a_result_that_came_while_the_server_was_down_is_taken_after_a_crash() {
    restart_under_a_running_task(End::Crash, true).await;
}

#[tokio::test]
async fn a_running_task_outlives_an_orderly_restart_and_is_not_run_again() {
    restart_under_a_running_task(End::Orderly, false).await;
}

#[tokio::test]
async fn the_last_line_tells_how_many_tasks_are_left_running() {
    let mut server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "long"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let _worker = Worker::of(server.options(), "long", 3, move |task: Attempt| {
        noted.note(&task);
        let held = held.clone();
        async move {
            held.pass().await;
            Ok::<_, TaskError>(Vec::new())
        }
    })
    .await;
    // Two of the five wait for a slot.
    let tasks: Vec<Task> = (0..5)
        .map(|n| Task::new("x").task_id(format!("n{n}")))
        .collect();
    let submitted = client.submit_batch("long", &tasks).await;
    eventually("three run", async || ledger.total() == 3).await;
    let line = server.stop();
    let told = ", 3 tasks are left running with their executors";
    assert!(
        line.starts_with("closed in ") && line.ends_with(told),
        "{line}"
    );
    server.restart();
    gate.open(5);
    for submitted in submitted {
        let name = TaskName::Request(submitted.unwrap().request_id);
        let finished = client.wait(&name, PATIENCE).await.unwrap();
        assert_eq!(
            (finished.status, finished.attempts),
            (TaskStatus::Succeeded, 1)
        );
    }
    assert_eq!(ledger.total(), 5, "those that ran were not run again");
    let line = server.stop();
    assert!(line.ends_with(" ms, no task is left running"), "{line}");
}

#[tokio::test]
async fn waiting_delayed_and_finished_tasks_are_there_after_a_restart() {
    let mut server = Server::start(ServerOptions { shards: 3 });
    let client = server.client().await;
    let make = r#"{"function": "kept", "retries": 1}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let echo = async |task: Attempt| Ok(task.payload().to_vec());
    let worker = Worker::of(server.options(), "kept", 8, echo).await;
    let tasks = |what: &str| -> Vec<Task> {
        let names = (0..30).map(|n| format!("{what}-{n}"));
        names
            .map(|name| Task::new(name.clone()).task_id(name))
            .collect()
    };
    let mut finished = Vec::new();
    for task in client
        .submit_batch_watched("kept", &tasks("finished"))
        .await
    {
        finished.push(task.unwrap().finished().await.unwrap());
    }
    worker.close().await.unwrap();
    let submitted = client.submit_batch("kept", &tasks("waiting")).await;
    let mut waiting: Vec<_> = submitted
        .into_iter()
        .map(|task| task.unwrap().request_id)
        .collect();
    let delayed = Task::new("delayed").delay(Duration::from_millis(500));
    waiting.push(client.submit("kept", delayed).await.unwrap().request_id);

    server.stop();
    server.restart();
    for before in &finished {
        let name = TaskName::Request(before.request_id);
        let after = client.wait(&name, PATIENCE).await.unwrap();
        assert_eq!(&after, before);
    }
    let config = client
        .query(Operation::FunctionGet, r#"{"function": "kept"}"#)
        .await
        .unwrap();
    assert!(config.contains(r#""retries":1"#), "{config}");
    let _worker = Worker::of(server.options(), "kept", 8, echo).await;
    for id in waiting {
        let finished = client.wait(&TaskName::Request(id), PATIENCE).await.unwrap();
        assert!(finished.succeeded());
    }
}
