//! A server on a disk that is full, that fails while it serves, and that cannot be read: on real file systems, each in a
//! file of its own.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    time::Duration,
};

use pelton_client::{
    Attempt, Client, Code, Error, Operation, RequestId, Submitted, Task, TaskError, TaskName,
};
use pelton_core::id::shard_of;
use pelton_storage::manifest::shard_folder;
use pelton_tests::{
    Disk, PATIENCE, Server, ServerOptions, Worker, eventually, pelton,
    worker::{Gate, Ledger},
};
use serde_json::Value;

/// A disk on which a shard has all its segments, the history what has ended, and which is filled soon.
const DISK_BYTES: u64 = 640 << 20;
const SPACE_BYTES_MIN: u64 = 24 << 20;
const SHARDS: u16 = 2;

/// A disk, or a word on why there is none.
fn disk(server: &Server, bytes: u64) -> Option<Disk> {
    match Disk::make(server.folder().join("disk.img"), bytes) {
        Ok(disk) => Some(disk),
        Err(why) => {
            eprintln!("skipped: no file system of its own can be made and mounted here: {why}");
            None
        }
    }
}

async fn make(client: &Client, function: &str) {
    let wish = format!(r#"{{"function": "{function}", "retries": 0}}"#);
    client.query(Operation::FunctionSet, &wish).await.unwrap();
}

fn shard(request: RequestId) -> u16 {
    shard_of(request.cell(), SHARDS).0
}

async fn submit(client: &Client, function: &str, name: &str) -> Result<Submitted, Error> {
    let task = Task::new(format!("<<{name}>>")).task_id(name);
    client.submit(function, task).await
}

async fn stats(client: &Client) -> Value {
    let stats = client.query(Operation::Stats, "{}").await.unwrap();
    serde_json::from_str(&stats).unwrap()
}

#[tokio::test]
async fn a_full_disk_takes_outcomes_and_stops_refuses_submits_and_serves_again_when_there_is_room()
{
    let mut server = Server::prepared(ServerOptions::default());
    let Some(mut disk) = disk(&server, DISK_BYTES) else {
        return;
    };
    disk.mount(&server.data()).unwrap();
    server.set("PELTON_LIMITS__SPACE_BYTES_MIN", SPACE_BYTES_MIN);
    server.restart();
    let client = server.client().await;
    make(&client, "f").await;
    // All segments are there before the disk is filled.
    let prepared = async || stats(&client).await["shards"][0]["log"]["prepared_segments"] == 2;
    eventually("the segments ahead are prepared", prepared).await;
    let mut tasks = Vec::new();
    for number in 0..100 {
        let submitted = submit(&client, "f", &format!("t{number}")).await;
        tasks.push(submitted.unwrap().request_id);
    }
    let gate = Gate::default();
    let held = gate.clone();
    let handler = move |_: Attempt| {
        let held = held.clone();
        async move {
            held.pass().await;
            Ok::<_, TaskError>(vec![7; 1 << 20])
        }
    };
    let _worker = Worker::of(server.options(), "f", 8, handler).await;

    let ballast = server.data().join("ballast");
    let mut file = File::create(&ballast).unwrap();
    let piece = vec![1; 1 << 16];
    while file.write_all(&piece).is_ok() {}
    while file.write_all(&piece[..512]).is_ok() {}
    let _ = file.sync_all();
    drop(file);
    let refused = async || {
        let task = Task::new("x").task_id("refused");
        match client.submit("f", task).await {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
                true
            }
        }
    };
    eventually("submits are refused", refused).await;
    assert_eq!(stats(&client).await["shards"][0]["disk_full"], true);
    let (_, said, _) = pelton(&["stats"], &server.data());
    assert!(
        said.contains("shard 0 refuses submits: the disk is FULL"),
        "{said}"
    );
    let (_, said, _) = pelton(&["doctor"], &server.data());
    assert!(said.contains("shard 0 refuses submits"), "{said}");

    // 99 MiB of results go on into the segments that were prepared, and so does a stop.
    let stopped = TaskName::Request(tasks.pop().unwrap());
    let stop = client.stop(&stopped, Duration::from_secs(1)).await;
    stop.unwrap();
    gate.open(200);
    for task in &tasks {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert!(done.succeeded(), "{done:?}");
    }
    let log = stats(&client).await["shards"][0]["log"].clone();
    assert!(log["live_segments"].as_u64() > Some(1), "{log}");
    assert_eq!(log["poisoned"], Value::Null);
    assert!(refused().await, "it is still full");
    // Killed and full, it says what is to be done, and starts when that is done.
    server.kill9();
    let (status, said) = server.refuses_to_start();
    assert!(!status.success() && said.contains("make room"), "{said}");
    fs::remove_file(&ballast).unwrap();
    server.restart();
    let client = server.client().await;
    for task in &tasks {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert_eq!(done.result.map(|result| result.len()), Some(1 << 20));
    }
    // Full again, and room again while it serves.
    let mut file = File::create(&ballast).unwrap();
    while file.write_all(&piece).is_ok() {}
    let refused = async || submit(&client, "f", "again").await.is_err();
    eventually("submits are refused", refused).await;
    fs::remove_file(&ballast).unwrap();
    drop(file);
    let taken = async || submit(&client, "f", "again").await.is_ok();
    eventually("submits are taken", taken).await;
    let done = client
        .wait(&TaskName::parse("f/again").unwrap(), PATIENCE)
        .await;
    assert!(done.unwrap().succeeded());
    drop(client);
    server.stop();
    disk.unmount();
}

#[tokio::test]
async fn a_disk_that_fails_takes_one_shard_down_and_its_outcomes_are_taken_when_it_is_back() {
    let mut server = Server::prepared(ServerOptions { shards: SHARDS });
    let Some(mut disk) = disk(&server, DISK_BYTES) else {
        return;
    };
    let log = shard_folder(&server.data(), 1);
    disk.mount(&log).unwrap();
    server.set("PELTON_LIMITS__SPACE_BYTES_MIN", SPACE_BYTES_MIN);
    server.restart();
    let client = server.client().await;
    make(&client, "long").await;
    make(&client, "f").await;
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
        executor.function("f", 4, async |_: Attempt| Ok(Vec::new()));
    })
    .await;
    let mut long = Vec::new();
    for number in 0..16 {
        let submitted = submit(&client, "long", &format!("l{number}")).await;
        long.push(submitted.unwrap().request_id);
    }
    assert!(long.iter().any(|task| shard(*task) == 1) && long.iter().any(|task| shard(*task) == 0));
    eventually("they run", async || ledger.total() == 16).await;

    disk.fail();
    // Whoever hands in a task of that shard is told, the others are served.
    let mut accepted = Vec::new();
    let mut refused = 0;
    for number in 0..40 {
        match submit(&client, "f", &format!("t{number}")).await {
            Ok(submitted) => {
                assert_eq!(shard(submitted.request_id), 0);
                accepted.push(submitted.request_id);
            }
            Err(error) => {
                assert_eq!(error.code(), Code::Unavailable);
                assert!(error.to_string().contains("log has failed"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 4 && accepted.len() > 4);
    for task in &accepted {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert!(done.succeeded());
    }
    gate.open(16);
    for task in long.iter().filter(|task| shard(**task) == 0) {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert!(done.succeeded());
    }
    make(&client, "made-meanwhile").await;
    let said = stats(&client).await;
    let cause = said["shards"][1]["log"]["poisoned"].as_str().unwrap();
    assert!(cause.contains("shard-001"), "{cause}");
    assert_eq!(said["shards"][0]["log"]["poisoned"], Value::Null);
    let (_, text, _) = pelton(&["stats"], &server.data());
    assert!(
        text.starts_with("the log of shard 1 has FAILED") && text.contains(cause),
        "{text}"
    );
    let (code, text, _) = pelton(&["doctor"], &server.data());
    assert!(
        code == 8 && text.contains("the log of shard 1 has failed"),
        "{text}"
    );
    server.stop();
    let (printed, logged) = server.output();
    assert!(
        printed.contains(&format!("the log of shard 1 had failed: {cause}")),
        "{printed}"
    );
    assert!(
        logged.contains("the log has failed and is read-only"),
        "{logged}"
    );

    disk.unmount();
    disk.mount(&log).unwrap();
    server.restart();
    let client = server.client().await;
    for task in long.iter().chain(&accepted) {
        let done = client
            .wait(&TaskName::Request(*task), PATIENCE)
            .await
            .unwrap();
        assert!(done.succeeded() && done.attempts == 1, "{done:?}");
    }
    assert_eq!(ledger.total(), 16, "nothing was run again");
    // Those of unknown outcome are there once or not at all, and the same name takes them.
    for number in 0..40 {
        let submitted = submit(&client, "made-meanwhile", &format!("m{number}")).await;
        submitted.unwrap();
        let submitted = submit(&client, "f", &format!("t{number}")).await.unwrap();
        let name = TaskName::Request(submitted.request_id);
        let done = client.wait(&name, PATIENCE).await.unwrap();
        assert_eq!(done.attempts, 1);
    }
    drop(client);
    server.stop();
    disk.unmount();
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_keeps_its_shard_alone_from_starting() {
    let mut server = Server::prepared(ServerOptions { shards: SHARDS });
    let Some(mut disk) = disk(&server, DISK_BYTES) else {
        return;
    };
    let log = shard_folder(&server.data(), 1);
    disk.mount(&log).unwrap();
    server.set("PELTON_LIMITS__SPACE_BYTES_MIN", SPACE_BYTES_MIN);
    server.restart();
    let client = server.client().await;
    make(&client, "f").await;
    let mut tasks = Vec::new();
    for number in 0..40 {
        let submitted = submit(&client, "f", &format!("t{number}")).await;
        tasks.push(submitted.unwrap().request_id);
    }
    drop(client);
    server.stop();
    disk.unmount();
    // The disk ends before the place where the log is: what is read there fails.
    let image = fs::read(disk.image()).unwrap();
    let at = image.windows(3).position(|w| w == b"<<t").unwrap() & !0xfff;
    disk.mount(&log).unwrap();
    let file = File::options().write(true).open(disk.image()).unwrap();
    file.set_len(at as u64).unwrap();

    server.restart();
    let (printed, _) = server.output();
    let line = printed.lines().find(|line| line.starts_with("QUARANTINED"));
    let line = line.unwrap_or_else(|| panic!("{printed}"));
    assert!(
        line.contains("shard 1: read ") && line.contains("shard-001"),
        "{line}"
    );
    let client = server.client().await;
    let _worker = Worker::of(server.options(), "f", 4, async |_: Attempt| Ok(Vec::new())).await;
    for task in &tasks {
        let waited = client.wait(&TaskName::Request(*task), PATIENCE).await;
        match shard(*task) {
            0 => assert!(waited.unwrap().succeeded()),
            _ => assert_eq!(waited.unwrap_err().code(), Code::Unavailable),
        }
    }
    drop(client);
    server.stop();
    // It is as it was, and so is the log.
    file.write_all_at(&image, 0).unwrap();
    disk.unmount();
    file.write_all_at(&image, 0).unwrap();
    disk.mount(&log).unwrap();
    server.restart();
    assert!(!server.output().0.contains("QUARANTINED"));
    let client = server.client().await;
    for task in &tasks {
        let done = client
            .wait(&TaskName::Request(*task), Duration::from_secs(60))
            .await;
        assert!(done.unwrap().succeeded());
    }
    drop(client);
    server.stop();
    disk.unmount();
}
