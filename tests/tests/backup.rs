//! Backups of a server that serves, with real processes: what is in them, what is refused, what is left of one that came
//! to nothing, and what a restore makes of them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    rc::Rc,
    time::Duration,
};

use pelton_client::{Attempt, Client, Code, Error, Operation, RequestId, Task, TaskName};
use pelton_storage::backup::Backup;
use pelton_tests::{Disk, PATIENCE, Server, ServerOptions, Worker, binary, eventually, pelton};
use serde_json::{Value, json};
use tokio::task::{LocalSet, spawn_blocking, spawn_local};

const SEGMENT_BYTES: u64 = 4 << 20;

fn server(shards: u16) -> Server {
    let mut server = Server::prepared(ServerOptions { shards });
    server.set("PELTON_SERVER__SEGMENT_BYTES", SEGMENT_BYTES);
    server
}

async fn make(client: &Client, function: &str) {
    let wish = format!(r#"{{"function": "{function}"}}"#);
    client.query(Operation::FunctionSet, &wish).await.unwrap();
}

/// Its payload is its result.
async fn echo(server: &Server, function: &str) -> Worker {
    let handler = async |attempt: Attempt| Ok(attempt.payload().to_vec());
    Worker::of(server.options(), function, 16, handler).await
}

fn payload(name: &str, bytes: usize) -> Vec<u8> {
    name.as_bytes()
        .iter()
        .copied()
        .cycle()
        .take(bytes)
        .collect()
}

fn given(function: &str, name: &str) -> TaskName {
    TaskName::parse(&format!("{function}/{name}")).unwrap()
}

async fn stats(client: &Client) -> Value {
    let stats = client.query(Operation::Stats, "{}").await.unwrap();
    serde_json::from_str(&stats).unwrap()
}

fn sum(stats: &Value, of: impl Fn(&Value) -> &Value) -> u64 {
    let shards = stats["shards"].as_array().unwrap();
    shards.iter().map(|shard| of(shard).as_u64().unwrap()).sum()
}

/// Runs a command while this thread goes on; exit code, what it printed and what it said.
async fn run(arguments: &[&str], data: &Path) -> (i32, String, String) {
    let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
    let data = data.to_owned();
    let ran = spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        pelton(&arguments, &data)
    });
    ran.await.unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Has so many bytes of waiting tasks in the log.
async fn fill(client: &Client, function: &str, megabytes: u32) {
    make(client, function).await;
    for number in 0..megabytes {
        let name = format!("w{number}");
        let task = Task::new(payload(&name, 1_000_000)).task_id(&name);
        client.submit(function, task).await.unwrap();
    }
}

/// A backup that has begun and copies.
fn begin(server: &Server, target: &Path) -> Child {
    let mut child = Command::new(binary())
        .arg("backup")
        .arg(target)
        .arg("--data")
        .arg(server.data())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let first = target.join("shard-000/segment-000001.plt");
    for _ in 0..PATIENCE.as_millis() / 2 {
        if first.exists() {
            return child;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let _ = child.wait();
    panic!("the backup does not begin");
}

fn ended(child: Child) -> (bool, String) {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

#[tokio::test]
async fn a_backup_under_load_has_everything_acknowledged_before_it() {
    LocalSet::new().run_until(backup_under_load()).await;
}

async fn backup_under_load() {
    let mut server = server(2);
    // What has ended is soon in the history alone, and its segments are used again.
    server.set("PELTON_LIMITS__FINISHED_MAX", 100);
    server.set("PELTON_HISTORY__DEFER_MAX", 1 << 20);
    server.restart();
    let client = server.client().await;
    make(&client, "f").await;
    make(&client, "later").await;
    let worker = echo(&server, "f").await;

    // Tasks go in, are executed and end, and others wait for nobody, all the time. Segments are used again. Each lane waits
    // for its task, so that the history keeps up.
    let acknowledged: Rc<RefCell<BTreeMap<(&str, String), RequestId>>> = Rc::default();
    let finished: Rc<RefCell<Vec<String>>> = Rc::default();
    let over: Rc<Cell<bool>> = Rc::default();
    let mut load = Vec::new();
    for lane in 0..6 {
        let client = server.client().await;
        let acknowledged = Rc::clone(&acknowledged);
        let finished = Rc::clone(&finished);
        let over = Rc::clone(&over);
        load.push(spawn_local(async move {
            for number in 0.. {
                if over.get() {
                    break;
                }
                let name = format!("t{lane}-{number}");
                let (function, bytes) = match number % 8 {
                    0 => ("later", 300),
                    _ => ("f", 30_000),
                };
                let task = Task::new(payload(&name, bytes)).task_id(&name);
                let submitted = client.submit(function, task).await.unwrap();
                let key = (function, name.clone());
                acknowledged.borrow_mut().insert(key, submitted.request_id);
                if function == "f" {
                    let end = client
                        .wait(&given(function, &name), PATIENCE)
                        .await
                        .unwrap();
                    assert!(end.succeeded());
                    finished.borrow_mut().push(name);
                }
            }
        }));
    }
    let recycled = async || sum(&stats(&client).await, |shard| &shard["log"]["recycled"]);
    eventually("segments are used again", async || recycled().await > 4).await;

    let before = acknowledged.borrow().clone();
    let ended = finished.borrow().clone();
    let target = server.folder().join("backup");
    let (code, printed, said) = run(&["backup", text(&target), "--json"], &server.data()).await;
    assert_eq!(code, 0, "{said}");
    let result: Value = serde_json::from_str(&printed).unwrap();
    let during = recycled().await;
    eventually("segments are used again after it", async || {
        recycled().await > during + 4
    })
    .await;
    over.set(true);
    for lane in load {
        lane.await.unwrap();
    }
    assert!(
        acknowledged.borrow().len() > before.len(),
        "the load went on"
    );
    assert_eq!(stats(&client).await["shards"][0]["log"]["held"], false);
    worker.close().await.unwrap();
    server.stop();

    // Nobody else reads what is secret in it.
    for name in [
        "shard-000/segment-000001.plt",
        "history/rows.redb",
        "quic-key.pem",
    ] {
        let mode = fs::metadata(target.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let mode = fs::metadata(&target).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    let mut restored = self::server(2);
    let (code, printed, said) = run(&["restore", text(&target), "--json"], &restored.data()).await;
    assert_eq!(code, 0, "{said}");
    let told: Value = serde_json::from_str(&printed).unwrap();
    for figure in ["live_tasks", "tasks", "history_rows", "segments", "bytes"] {
        assert_eq!(told[figure], result[figure], "{figure}");
    }
    let (code, printed, _) = run(&["log", "verify"], &restored.data()).await;
    assert_eq!(code, 0, "{printed}");
    restored.restart();
    let client = restored.client().await;
    // The server counts what the backup has counted.
    let counted = stats(&client).await;
    let live = sum(&counted, |shard| &shard["waiting"]) + sum(&counted, |shard| &shard["running"]);
    assert_eq!(Some(live), result["live_tasks"].as_u64());
    assert!(result["history_rows"].as_u64() > Some(0), "{result}");

    // What had ended has its result, also if only the history knows of it.
    for name in &ended {
        let end = client.wait(&given("f", name), Duration::ZERO).await;
        let end = end.unwrap_or_else(|error| panic!("{name} had ended: {error}"));
        assert!(end.succeeded());
        assert_eq!(end.result.unwrap(), payload(name, 30_000));
    }
    let _worker = echo(&restored, "f").await;
    let _later = echo(&restored, "later").await;
    for ((function, name), request) in &before {
        let task = TaskName::Request(*request);
        let end = client.wait(&task, PATIENCE).await;
        let end = end.unwrap_or_else(|error| panic!("{function}/{name} was acknowledged: {error}"));
        assert!(end.succeeded(), "{function}/{name}: {end:?}");
    }
    for ((function, name), request) in before.iter().step_by(7) {
        let bytes = if *function == "later" { 300 } else { 30_000 };
        let task = Task::new(payload(name, bytes)).task_id(name);
        let again = client.submit(function, task).await.unwrap();
        assert!(again.duplicate, "{function}/{name}");
        assert_eq!(again.request_id, *request);
    }
}

#[tokio::test]
async fn what_was_placed_on_other_shards_is_backed_up_and_placed_again_after_a_restore() {
    let mut server = server(2);
    server.restart();
    let client = server.client().await;
    make(&client, "f").await;
    let mut tasks = BTreeMap::new();
    for number in 0..60 {
        let name = format!("t{number}");
        let task = Task::new(payload(&name, 3_000)).task_id(&name);
        tasks.insert(name, client.submit("f", task).await.unwrap().request_id);
    }
    let worker = echo(&server, "f").await;
    for name in tasks.keys().take(20) {
        client.wait(&given("f", name), PATIENCE).await.unwrap();
    }
    worker.close().await.unwrap();
    server.kill9();
    server.set_shards(3);
    server.restart();
    // A generation has its folders and its logs, also in a backup.
    let target = server.folder().join("backup");
    let (code, _, said) = run(&["backup", text(&target)], &server.data()).await;
    assert_eq!(code, 0, "{said}");
    assert!(target.join("shard-002.2/segment-000001.plt").exists());

    let mut restored = self::server(3);
    let (code, _, said) = run(&["restore", text(&target)], &restored.data()).await;
    assert_eq!(code, 0, "{said}");
    for shards in [3, 1] {
        restored.set_shards(shards);
        restored.restart();
        let client = restored.client().await;
        for (name, request) in &tasks {
            let task = Task::new(payload(name, 3_000)).task_id(name);
            let again = client.submit("f", task).await.unwrap();
            assert!(again.duplicate && again.request_id == *request, "{name}");
        }
        restored.stop();
    }
    restored.restart();
    let _worker = echo(&restored, "f").await;
    let client = restored.client().await;
    for (name, request) in &tasks {
        let end = client.wait(&TaskName::Request(*request), PATIENCE).await;
        assert_eq!(end.unwrap().result.unwrap(), payload(name, 3_000), "{name}");
    }
}

#[tokio::test]
async fn a_restore_finds_and_names_a_damaged_byte_in_any_file_and_leaves_nothing() {
    let mut server = server(2);
    server.restart();
    let client = server.client().await;
    make(&client, "f").await;
    let worker = echo(&server, "f").await;
    for number in 0..20 {
        let name = format!("t{number}");
        let task = Task::new(payload(&name, 10_000)).task_id(&name);
        client.submit("f", task).await.unwrap();
        client.wait(&given("f", &name), PATIENCE).await.unwrap();
    }
    worker.close().await.unwrap();
    let (code, _, said) = run(&["key", "create", "--scope", "admin"], &server.data()).await;
    assert_eq!(code, 0, "{said}");
    server.stop();
    // Without a server the directory itself is copied, by the same code.
    let target = server.folder().join("backup");
    let (code, printed, said) = run(&["backup", text(&target)], &server.data()).await;
    assert_eq!(code, 0, "{said}");
    assert!(printed.contains(" history rows"), "{printed}");
    let verify = |target: &Path| {
        let output = Command::new(binary())
            .args(["restore", "--verify", text(target)])
            .output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), said)
    };
    assert_eq!(verify(&target).0, 0);

    let backup = Backup::read(&target).unwrap();
    let names: Vec<&str> = backup.files.iter().map(|file| &*file.name).collect();
    for name in [
        "keys.json",
        "quic-cert.pem",
        "quic-key.pem",
        "history/rows.redb",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    let data = server.folder().join("restored");
    for file in &backup.files {
        let path = target.join(&file.name);
        let sound = fs::read(&path).unwrap();
        let mut damaged = sound.clone();
        damaged[sound.len() / 2] ^= 0x10;
        fs::write(&path, &damaged).unwrap();
        let (code, _, said) = pelton(&["restore", text(&target)], &data);
        for (code, said) in [verify(&target), (code, said)] {
            assert_eq!(code, 1, "{}: {said}", file.name);
            assert!(said.contains(text(&path)), "{said}");
        }
        assert!(!data.exists(), "nothing is left of a restore that failed");
        fs::write(&path, &sound[1..]).unwrap();
        assert_eq!(verify(&target).0, 1, "{} is short", file.name);
        fs::remove_file(&path).unwrap();
        let (code, said) = verify(&target);
        assert!(code == 1 && said.contains("missing"), "{said}");
        fs::write(&path, &sound).unwrap();
    }
    assert_eq!(verify(&target).0, 0, "it is whole again");
    fs::rename(target.join("BACKUP"), target.join("B")).unwrap();
    let (code, _, said) = pelton(&["restore", text(&target)], &data);
    assert!(code == 3 && said.contains("is no backup"), "{said}");
    fs::rename(target.join("B"), target.join("BACKUP")).unwrap();
    // What is there is not written over.
    let (code, _, said) = pelton(&["restore", text(&target)], &server.data());
    assert!(code == 2 && said.contains("not empty"), "{said}");
    let (code, _, said) = pelton(&["restore", text(&target)], &data);
    assert_eq!(code, 0, "{said}");
    // The key that was made counts there too, and the certificate is the same.
    for name in ["keys.json", "quic-cert.pem", "quic-key.pem"] {
        assert_eq!(
            fs::read(data.join(name)).unwrap(),
            fs::read(server.data().join(name)).unwrap()
        );
    }
}

#[tokio::test]
async fn a_kill_in_the_middle_leaves_no_backup_and_a_sound_server() {
    let mut server = server(1);
    server.restart();
    let client = server.client().await;
    fill(&client, "w", 150).await;
    let target = server.folder().join("backup");
    let child = begin(&server, &target);
    server.kill9();
    let (whole, said) = ended(child);
    assert!(!whole, "{said}");
    assert!(target.join("shard-000").is_dir() && !target.join("BACKUP").exists());
    let data = server.folder().join("restored");
    let (code, _, said) = run(&["restore", text(&target)], &data).await;
    assert!(code == 3 && said.contains("is no backup"), "{said}");
    assert!(!data.exists());
    server.restart();
    let client = server.client().await;
    let _worker = echo(&server, "w").await;
    for number in 0..150 {
        let end = client
            .wait(&given("w", &format!("w{number}")), PATIENCE)
            .await;
        assert!(end.unwrap().succeeded());
    }
    // What is left is not taken for a place for the next one.
    let (code, _, said) = run(&["backup", text(&target)], &server.data()).await;
    assert!(code == 2 && said.contains("not empty"), "{said}");
    let again = server.folder().join("again");
    let (code, _, said) = run(&["backup", text(&again)], &server.data()).await;
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn one_backup_at_a_time_goes_into_a_place_of_its_own_and_nobody_leaves_one_behind() {
    let mut server = server(1);
    server.restart();
    let client = server.client().await;
    fill(&client, "w", 150).await;
    let refused = async |path: &Path, code: Code| {
        let wish = json!({ "path": path }).to_string();
        match client.query(Operation::BackupStart, &wish).await {
            Err(Error::Refused(refusal)) => assert_eq!(refusal.code, code, "{}", refusal.text),
            other => panic!("{other:?}"),
        }
    };
    refused(Path::new("relative"), Code::InvalidArgument).await;
    refused(&server.data().join("inside"), Code::InvalidArgument).await;
    refused(&server.data().join("../data/inside"), Code::InvalidArgument).await;
    refused(server.folder(), Code::InvalidArgument).await;

    let held = async || stats(&client).await["shards"][0]["log"]["held"] == true;
    let start = async |target: &Path| {
        let wish = json!({ "path": target }).to_string();
        let begun = client.query(Operation::BackupStart, &wish).await.unwrap();
        let begun: Value = serde_json::from_str(&begun).unwrap();
        json!({ "backup": begun["backup"] }).to_string()
    };
    let target = server.folder().join("backup");
    let backup = start(&target).await;
    assert!(held().await);
    refused(&server.folder().join("second"), Code::FailedPrecondition).await;
    client
        .query(Operation::BackupCancel, &backup)
        .await
        .unwrap();
    let stopped = async || {
        client
            .query(Operation::BackupStatus, &backup)
            .await
            .is_err()
    };
    eventually("it is stopped", stopped).await;
    assert!(!held().await && !target.exists());
    // Whoever wanted this one is gone.
    let mut child = begin(&server, &target);
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the log is let go", async || !held().await).await;
    let settled = async || target.join("BACKUP").exists() || !target.exists();
    eventually("it is whole or gone", settled).await;
    // An orderly end does not wait for one.
    let last = server.folder().join("last");
    let wish = json!({ "path": last }).to_string();
    // The one before has its end a moment after its folder has.
    let begins = async || {
        let begun = client.query(Operation::BackupStart, &wish).await;
        begun.is_ok()
    };
    eventually("the last one begins", begins).await;
    server.stop();
    assert!(!last.exists());
}

#[tokio::test]
async fn a_backup_needs_the_right_to_administer() {
    let mut server = Server::prepared(ServerOptions::default());
    server.restart();
    let (code, printed, _) = run(
        &[
            "key",
            "create",
            "--scope",
            "submit,manage,execute",
            "--json",
        ],
        &server.data(),
    )
    .await;
    assert_eq!(code, 0);
    let key: Value = serde_json::from_str(&printed).unwrap();
    let mut options = server.options();
    options.key = key["secret"].as_str().map(str::to_owned);
    options.tenant = Some("default".to_owned());
    let client = Client::connect(options).await.unwrap();
    for (operation, wish) in [
        (
            Operation::BackupStart,
            json!({ "path": server.folder().join("b") }),
        ),
        (Operation::BackupStatus, json!({ "backup": 1 })),
        (Operation::BackupCancel, json!({ "backup": 1 })),
    ] {
        let error = client
            .query(operation, &wish.to_string())
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    }
}

/// A disk of its own, or a word on why there is none.
fn disk(server: &Server, bytes: u64) -> Option<Disk> {
    match Disk::make(server.folder().join("disk.img"), bytes) {
        Ok(disk) => Some(disk),
        Err(why) => {
            eprintln!("skipped: no file system of its own can be made and mounted here: {why}");
            None
        }
    }
}

fn free_bytes(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

/// Takes all but so many bytes of the disk.
fn occupy(place: &Path, left: u64) -> PathBuf {
    let ballast = place.join("ballast");
    // Others take from it meanwhile.
    let mut reserved = false;
    for _ in 0..100 {
        let bytes = free_bytes(place).saturating_sub(left).max(1);
        let asked = Command::new("fallocate")
            .arg("-l")
            .arg(bytes.to_string())
            .arg(&ballast)
            .stderr(Stdio::null())
            .status();
        reserved = asked.unwrap().success();
        if reserved {
            break;
        }
    }
    assert!(reserved);
    ballast
}

#[tokio::test]
async fn a_target_without_room_is_told_before_and_one_that_fills_leaves_nothing() {
    let mut server = server(1);
    let Some(mut disk) = disk(&server, 320 << 20) else {
        return;
    };
    let place = server.folder().join("place");
    disk.mount(&place).unwrap();
    server.restart();
    let client = server.client().await;
    fill(&client, "w", 150).await;
    let ballast = occupy(&place, 100 << 20);
    let target = place.join("backup");
    let (code, _, said) = run(&["backup", text(&target)], &server.data()).await;
    assert!(code == 5 && said.contains("it needs 1"), "{code} {said}");
    assert!(!target.exists());
    fs::remove_file(&ballast).unwrap();

    let child = begin(&server, &target);
    let ballast = occupy(&place, 1 << 20);
    let (whole, said) = ended(child);
    assert!(!whole && said.contains("No space left"), "{said}");
    assert!(!target.exists());
    fs::remove_file(&ballast).unwrap();
    let (code, _, said) = run(&["backup", text(&target)], &server.data()).await;
    assert_eq!(code, 0, "{said}");
}

#[tokio::test]
async fn a_backup_is_given_up_before_a_submit_is_refused_for_want_of_space() {
    const SPACE_BYTES_MIN: u64 = 24 << 20;
    let mut server = server(1);
    let Some(mut disk) = disk(&server, 640 << 20) else {
        return;
    };
    disk.mount(&server.data()).unwrap();
    server.set("PELTON_LIMITS__SPACE_BYTES_MIN", SPACE_BYTES_MIN);
    server.restart();
    let client = server.client().await;
    fill(&client, "w", 200).await;
    let target = server.folder().join("backup");
    let child = begin(&server, &target);
    // More than submits need, and less than a log that is held.
    let ballast = occupy(&server.data(), SPACE_BYTES_MIN + 2 * SEGMENT_BYTES);
    let (whole, said) = ended(child);
    assert!(
        !whole && said.contains("given up so that submits go on"),
        "{said}"
    );
    assert!(!target.exists());
    let counted = stats(&client).await;
    assert_eq!(counted["shards"][0]["log"]["held"], false);
    assert_eq!(counted["shards"][0]["disk_full"], false);
    let task = Task::new("x").task_id("goes-in");
    client.submit("w", task).await.unwrap();
    fs::remove_file(&ballast).unwrap();
    let (code, _, said) = run(&["backup", text(&target)], &server.data()).await;
    assert_eq!(code, 0, "{said}");
}
