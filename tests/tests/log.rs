//! What the server does with a log that is not as it left it.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use pelton_client::{Client, Operation, Task, TaskName};
use pelton_tests::{Server, ServerOptions};

/// Every file below a folder, with its bytes.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            files.insert(path, bytes);
        }
    }
    files
}

/// Where a task's bytes are.
fn find(files: &BTreeMap<PathBuf, Vec<u8>>, bytes: &[u8]) -> (PathBuf, usize) {
    let mut found = files.iter().filter_map(|(path, file)| {
        let at = file
            .windows(bytes.len())
            .position(|window| window == bytes)?;
        Some((path.clone(), at))
    });
    found.next().unwrap()
}

fn flip(path: &Path, at: usize) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
}

async fn submit(client: &Client, name: &str) -> TaskName {
    let task = Task::new(format!("<<{name}>>")).task_id(name);
    TaskName::Request(client.submit("f", task).await.unwrap().request_id)
}

async fn damage(crashed: bool) {
    let mut server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "f"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let mut tasks = Vec::new();
    // Each is a batch of its own, so that there are sound ones before the damage and behind it.
    for number in 0..20 {
        tasks.push(submit(&client, &format!("task-{number:04}")).await);
    }
    match crashed {
        true => server.kill9(),
        false => drop(server.stop()),
    }
    let (path, at) = find(&snapshot(&server.data()), b"<<task-0010>>");
    flip(&path, at + 7);
    let damaged = snapshot(&server.data());

    let (status, said) = server.refuses_to_start();
    assert!(!status.success());
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(name), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    let offset = said.split("byte offset ").nth(1).unwrap();
    let digits: String = offset.chars().take_while(char::is_ascii_digit).collect();
    let offset: usize = digits.parse().unwrap();
    assert!(
        offset <= at && at - offset < 16 << 10,
        "{said}; the damage is at {at}"
    );
    let after = snapshot(&server.data());
    assert!(
        damaged.keys().eq(after.keys()),
        "files came or went: {:?}",
        after.keys()
    );
    for (path, before) in &damaged {
        assert!(before == &after[path], "{} was changed", path.display());
    }

    flip(&path, at + 7);
    server.restart();
    let client = server.client().await;
    for task in &tasks {
        let task = client.get(task).await.unwrap();
        assert!(task.contains("<<task-"), "{task}");
    }
}

#[tokio::test]
async fn a_damaged_log_is_refused_by_name_and_offset_and_left_as_it_is() {
    damage(false).await;
}

#[tokio::test]
async fn a_damaged_log_of_a_crashed_server_is_refused_and_left_as_it_is() {
    damage(true).await;
}

#[tokio::test]
async fn a_second_server_on_the_same_data_is_refused_and_the_first_goes_on() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "f"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let task = submit(&client, "before").await;
    let second = std::process::Command::new(pelton_tests::server::binary())
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(server.data())
        .output();
    let second = second.unwrap();
    assert!(!second.status.success());
    let state = fs::read(server.data().join("server.json"));
    assert!(state.is_ok(), "the first one's state file is still there");
    client.get(&task).await.unwrap();
    let waited = client.wait(&task, Duration::ZERO).await;
    assert!(waited.is_err(), "it still waits for an executor");
}
