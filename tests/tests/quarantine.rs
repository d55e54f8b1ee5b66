//! A server with a damaged log of one shard: what it says, what it does, and what its executors keep meanwhile.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use pelton_client::{Attempt, Client, Code, List, Operation, RequestId, Task, TaskError, TaskName};
use pelton_core::id::shard_of;
use pelton_storage::manifest::shard_folder;
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually, pelton,
    worker::{Gate, Ledger},
};
use serde_json::Value;

const SHARDS: u16 = 2;
const HURT: u16 = 1;

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.path(), fs::read(entry.path()).unwrap()))
        .collect()
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// Where these bytes stand first.
fn find(folder: &Path, bytes: &[u8]) -> (PathBuf, u64) {
    let found = files(folder).into_iter().find_map(|(path, file)| {
        let at = file.windows(bytes.len()).position(|w| w == bytes)?;
        Some((path, at as u64))
    });
    found.unwrap()
}

fn shard(request: RequestId) -> u16 {
    shard_of(request.cell(), SHARDS).0
}

/// Hands in named tasks until so many are accepted on each shard; by shard.
async fn on_both(client: &Client, function: &str, count: usize) -> [Vec<RequestId>; 2] {
    let mut tasks = [Vec::new(), Vec::new()];
    for number in 0.. {
        let name = format!("{function}-{number}");
        let task = Task::new(format!("<<{name}>>")).task_id(&name);
        let submitted = client.submit(function, task).await.unwrap();
        tasks[usize::from(shard(submitted.request_id))].push(submitted.request_id);
        if tasks.iter().all(|tasks| tasks.len() >= count) {
            return tasks;
        }
    }
    unreachable!("names go to both shards");
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn a_server_without_one_shard_says_where_and_takes_its_outcomes_when_it_is_back() {
    let mut server = Server::start(ServerOptions { shards: SHARDS });
    let client = server.client().await;
    for function in ["long", "short"] {
        let make = format!(r#"{{"function": "{function}"}}"#);
        client.query(Operation::FunctionSet, &make).await.unwrap();
    }
    // One attempt that outlives the damage on each shard.
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let _worker = Worker::start(server.options(), |executor| {
        executor.function("long", 64, move |task: Attempt| {
            noted.note(&task);
            let held = held.clone();
            async move {
                held.pass().await;
                Ok::<_, TaskError>(b"kept".to_vec())
            }
        });
        executor.function("short", 4, async |task: Attempt| {
            Ok(task.payload().to_vec())
        });
    })
    .await;
    let long = on_both(&client, "long", 1).await;
    let all = (long[0].len() + long[1].len()) as u32;
    eventually("they run", async || ledger.total() == all).await;
    let short = on_both(&client, "short", 8).await;
    for task in short.iter().flatten() {
        let done = client.wait(&TaskName::Request(*task), PATIENCE).await;
        assert!(done.unwrap().succeeded());
    }
    server.stop();

    let log = shard_folder(&server.data(), HURT);
    let (path, at) = find(&log, b"<<short-");
    flip(&path, at);
    let before = files(&log);
    let name = path.file_name().unwrap().to_str().unwrap();
    // Nobody has to start a server to see it.
    let (code, said, _) = pelton(&["doctor"], &server.data());
    assert_eq!(code, 8, "{said}");
    assert!(
        said.contains("shard 1 is not served: ") && said.contains(name),
        "{said}"
    );
    let (code, said, _) = pelton(&["log", "verify", "--json"], &server.data());
    let judged = json(&said)["shards"][1].clone();
    assert_eq!((code, &judged["outcome"]), (1, &"damaged".into()), "{said}");
    let place = format!(
        "{name}, segment {}, byte offset {}",
        judged["segment"], judged["offset"]
    );
    let offset = judged["offset"].as_u64().unwrap();
    assert!(offset <= at && at - offset < 16 << 10, "{said}; {at}");

    server.restart();
    let (printed, logged) = server.output();
    assert!(
        printed.contains("2 shards (1 of them quarantined"),
        "{printed}"
    );
    for text in [&printed, &logged] {
        let line = text.lines().find(|line| line.contains(&place));
        assert!(line.is_some_and(|line| line.contains("shard")), "{text}");
    }
    let (code, said, _) = pelton(&["stats"], &server.data());
    assert_eq!(code, 0);
    assert!(
        said.starts_with("shard 1 is QUARANTINED") && said.contains(&place),
        "{said}"
    );
    let (_, said, _) = pelton(&["stats", "--json"], &server.data());
    let stats = json(&said);
    assert_eq!(stats["shards"][0]["quarantined"], Value::Null);
    let quarantined = &stats["shards"][1]["quarantined"];
    assert_eq!(
        (&quarantined["file"], &quarantined["offset"]),
        (&name.into(), &judged["offset"])
    );
    let (code, said, _) = pelton(&["doctor"], &server.data());
    assert!(code == 8 && said.contains(&place), "{said}");
    let (code, said, _) = pelton(&["doctor", "--json"], &server.data());
    assert!(code == 8 && json(&said)["fit"] == false, "{said}");

    // The other shard has everything, goes on, and its outcomes are taken, also beside the others'.
    let client = server.client().await;
    for task in &short[0] {
        let done = client.wait(&TaskName::Request(*task), PATIENCE).await;
        assert!(done.unwrap().succeeded());
    }
    let refused = client
        .get(&TaskName::Request(short[1][0]))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(
        refused.to_string().contains("restart the server"),
        "{refused}"
    );
    let page = client.list(&List::default()).await.unwrap();
    let page = json(&page);
    assert_eq!(page["unserved_shards"], json("[1]"));
    // What has ended on the other one is listed too where the history had it already.
    let listed = page["tasks"].as_array().unwrap().iter();
    let listed: BTreeSet<_> = listed
        .map(|task| task["request_id"].as_str().unwrap().to_owned())
        .collect();
    let names = |tasks: &[RequestId]| tasks.iter().map(RequestId::to_string).collect();
    let served: BTreeSet<String> = names(&[&long[0][..], &short[0][..]].concat());
    let ended_elsewhere: BTreeSet<String> = names(&short[1]);
    assert!(listed.is_superset(&served), "{page}");
    let others = listed.difference(&served).cloned().collect::<BTreeSet<_>>();
    assert!(others.is_subset(&ended_elsewhere), "{page}");
    let (_, _, said) = pelton(&["task", "ls"], &server.data());
    assert!(said.contains("1 of the shards are quarantined"), "{said}");
    gate.open(all as usize);
    for task in &long[0] {
        let done = client.wait(&TaskName::Request(*task), PATIENCE).await;
        assert!(done.unwrap().succeeded());
    }
    // Without a name a task goes to whoever serves; the executor that holds what it cannot tell serves on.
    for _ in 0..20 {
        let submitted = client
            .submit_watched("short", Task::new("x"))
            .await
            .unwrap();
        assert_eq!(shard(submitted.request_id), 0);
        assert!(submitted.finished().await.unwrap().succeeded());
    }
    let changed = r#"{"function": "short", "retries": 3}"#;
    client.query(Operation::FunctionSet, changed).await.unwrap();
    let last = server.stop();
    let (printed, _) = server.output();
    assert!(printed.contains(&format!(
        "was not served: shard 1: the log is damaged at {place}"
    )));
    assert!(last.starts_with("closed in "), "{last}");
    assert!(before == files(&log), "the damaged log was changed");

    flip(&path, at);
    server.restart();
    let client = server.client().await;
    for task in long.iter().flatten().chain(short.iter().flatten()) {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert!(done.succeeded());
        assert_eq!(done.attempts, 1, "no attempt was lost");
    }
    assert_eq!(ledger.total(), all, "nothing was run again");
    assert_eq!(pelton(&["doctor"], &server.data()).0, 0);
}

#[tokio::test]
async fn without_shard_0_configuration_is_refused_and_the_rest_goes_on() {
    let mut server = Server::start(ServerOptions { shards: SHARDS });
    let client = server.client().await;
    let make = r#"{"function": "f"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let tasks = on_both(&client, "f", 3).await;
    server.stop();
    let log = shard_folder(&server.data(), 0);
    let (path, at) = find(&log, b"<<f-");
    flip(&path, at);

    server.restart();
    let client = server.client().await;
    for (operation, wish) in [
        (Operation::FunctionSet, r#"{"function": "new"}"#),
        (Operation::FunctionRemove, r#"{"function": "f"}"#),
        (Operation::TenantSet, r#"{"tenant": "new"}"#),
    ] {
        let refused = client.query(operation, wish).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(
            refused
                .to_string()
                .contains("configuration cannot be changed"),
            "{refused}"
        );
    }
    // What was configured is known from the others.
    let known = client.query(Operation::FunctionList, "{}").await.unwrap();
    assert!(known.contains(r#""function":"f""#), "{known}");
    let _worker = Worker::of(server.options(), "f", 2, async |_: Attempt| Ok(Vec::new())).await;
    for task in &tasks[1] {
        let done = client.wait(&TaskName::Request(*task), PATIENCE).await;
        assert!(done.unwrap().succeeded());
    }
    server.stop();
    flip(&path, at);
    server.restart();
    let client = server.client().await;
    let make = r#"{"function": "new"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    for task in tasks.iter().flatten() {
        let done = client.wait(&TaskName::Request(*task), PATIENCE).await;
        assert!(done.unwrap().succeeded());
    }
}
