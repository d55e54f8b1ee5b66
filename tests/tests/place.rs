//! A server that is started with another number of shards than its data has.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use pelton_client::{
    Attempt, Client, List, Operation, RequestId, Task, TaskError, TaskName, TaskStatus,
};
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually,
    server::pelton,
    worker::{Gate, Ledger},
};
use serde_json::Value;

const KEYS: usize = 40;
const BATCH: usize = 400;

/// Submits named tasks, every second one with a key; their ids by name.
async fn submit(client: &Client, function: &str, round: usize) -> Vec<(RequestId, String)> {
    let names: Vec<String> = (0..BATCH).map(|n| format!("n-{round}-{n}")).collect();
    let task = |(n, name): (usize, &String)| {
        let payload = format!("{name} {}", "x".repeat(1_000));
        let task = Task::new(payload).task_id(name);
        match n % 2 {
            0 => task.key(format!("k{}", n % KEYS)),
            _ => task,
        }
    };
    let tasks: Vec<Task> = names.iter().enumerate().map(task).collect();
    let submitted = client.submit_batch(function, &tasks).await;
    let ids = submitted.into_iter().map(|submitted| {
        let submitted = submitted.unwrap();
        assert!(!submitted.duplicate);
        submitted.request_id
    });
    ids.zip(names).collect()
}

async fn listed(client: &Client) -> Vec<String> {
    let mut list = List {
        limit: Some(1_000),
        ..List::default()
    };
    let mut found = Vec::new();
    loop {
        let page: Value = serde_json::from_str(&client.list(&list).await.unwrap()).unwrap();
        let tasks = page["tasks"].as_array().unwrap().iter();
        found.extend(tasks.map(|task| task["request_id"].as_str().unwrap().to_owned()));
        match page["cursor"].as_str() {
            Some(cursor) => list.cursor = Some(cursor.to_owned()),
            None => return found,
        }
    }
}

#[tokio::test]
async fn killed_and_started_with_other_shards_a_server_finds_every_task_and_ends_it_once() {
    let mut server = Server::start(ServerOptions { shards: 3 });
    let mut client = server.client().await;
    for function in ["run", "parked", "long"] {
        let make = format!(r#"{{"function": "{function}"}}"#);
        client.query(Operation::FunctionSet, &make).await.unwrap();
    }
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let _long = Worker::of(server.options(), "long", 4, move |task: Attempt| {
        noted.note(&task);
        let held = held.clone();
        async move {
            held.pass().await;
            Ok::<_, TaskError>(b"kept".to_vec())
        }
    })
    .await;
    let long = client.submit("long", Task::new("x")).await.unwrap();
    let long = long.request_id;
    eventually("the long task runs", async || ledger.runs(long) == 1).await;
    let order: Arc<Mutex<Vec<(String, RequestId)>>> = Arc::default();
    let (noted, ran) = (ledger.clone(), order.clone());
    let _worker = Worker::of(server.options(), "run", 16, move |task: Attempt| {
        noted.note(&task);
        if let Some(key) = task.key() {
            ran.lock()
                .unwrap()
                .push((key.to_owned(), task.request_id()));
        }
        async move { Ok(task.payload()[..5].to_vec()) }
    })
    .await;

    let (mut run, mut parked) = (Vec::new(), Vec::new());
    for (round, shards) in [2, 1, 5, 3].into_iter().enumerate() {
        parked.extend(submit(&client, "parked", round).await);
        run.extend(submit(&client, "run", round).await);
        // Some have ended by now, some run, some wait.
        server.kill9();
        server.set_shards(shards);
        let (code, said, _) = pelton(&["doctor", "--shards", &shards.to_string()], &server.data());
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(&format!("shards on {shards}: ")), "{said}");
        if round > 1 {
            // Killed at any moment of it.
            for step in 0..8 {
                server.start_and_kill(Duration::from_millis(20 * step));
            }
        }
        server.restart();
        client = server.client().await;
        let (printed, _) = server.output();
        let placed = format!(" shards on {shards}: ");
        let was_placed = printed
            .lines()
            .any(|l| l.starts_with("placed ") && l.contains(&placed));
        assert!(was_placed || round > 1, "{printed}");
        assert!(
            printed.contains(&format!(", {shards} shards, ")),
            "{printed}"
        );
        for (id, name) in run.iter().chain(&parked).step_by(37) {
            let asked = client.get(&TaskName::Request(*id)).await.unwrap();
            assert!(asked.contains(name.as_str()), "{asked}");
        }
        let (id, name) = &parked[round * BATCH + 1];
        let payload = format!("{name} {}", "x".repeat(1_000));
        let again = client
            .submit("parked", Task::new(payload).task_id(name))
            .await;
        let again = again.unwrap();
        assert!(again.duplicate && again.request_id == *id);
    }
    gate.open(1);
    let name = TaskName::Request(long);
    let finished = client.wait(&name, PATIENCE).await.unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"kept"[..]));
    assert_eq!((finished.attempts, ledger.runs(long)), (1, 1));
    for (id, name) in &run {
        let finished = client.wait(&TaskName::Request(*id), PATIENCE).await;
        let finished = finished.unwrap_or_else(|error| panic!("{name} {id}: {error}"));
        assert_eq!(finished.status, TaskStatus::Succeeded, "{finished:?}");
        assert_eq!(finished.result.as_deref(), Some(&name.as_bytes()[..5]));
        assert_eq!(ledger.runs(*id), 1, "{name} {id}: {finished:?}");
    }
    let mut keys: BTreeMap<String, Vec<RequestId>> = BTreeMap::new();
    for (key, id) in order.lock().unwrap().drain(..) {
        keys.entry(key).or_default().push(id);
    }
    assert_eq!(keys.len(), KEYS / 2);
    for (key, ids) in keys {
        assert!(ids.is_sorted(), "{key} keeps its order");
    }
    let all = run.iter().chain(&parked).map(|(id, _)| *id).chain([long]);
    let all: BTreeSet<String> = all.map(|id| id.to_string()).collect();
    let found = listed(&client).await;
    assert_eq!(found.len(), all.len(), "nothing twice");
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), all);
}
