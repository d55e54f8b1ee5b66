//! What becomes of a command when its task is stopped.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pelton_client::{Client, Code, Operation, RequestId, Task, TaskName, TaskStatus};
use pelton_tests::{PATIENCE, Server, ServerOptions, eventually, server::binary};
use serde_json::Value;

/// What a stop gives that does not say.
const GRACE_DEFAULT: Duration = Duration::from_secs(5);

/// The command: it does not hear SIGTERM, and ends when there is a file `end`.
const DEAF: &str = r#"trap "" TERM
echo $$ > "$0/$PELTON_TASK_ID.new" && mv "$0/$PELTON_TASK_ID.new" "$0/$PELTON_TASK_ID"
while [ ! -e "$0/end" ]; do sleep 0.02; done"#;

/// An executor that is told to end when the test is over.
struct Executor(Child);

impl Executor {
    fn start(server: &Server, folder: &Path) -> Executor {
        let mut command = Command::new(binary());
        command
            .args(["executor", "--function", "deaf", "--slots", "4", "--data"])
            .arg(server.data())
            .args(["--exec", "--", "sh", "-c", DEAF])
            .arg(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Executor(command.spawn().unwrap())
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn status(client: &Client, task: RequestId) -> String {
    let task = client.get(&TaskName::Request(task)).await.unwrap();
    let task: Value = serde_json::from_str(&task).unwrap();
    task["status"].as_str().unwrap().to_owned()
}

/// Hands in a task and waits until its command runs; its process.
async fn started(client: &Client, folder: &Path, name: &str) -> (RequestId, String) {
    let task = Task::new("x").task_id(name);
    let id = client.submit("deaf", task).await.unwrap().request_id;
    let file = folder.join(name);
    eventually("the command runs", async || file.exists()).await;
    let process = fs::read_to_string(file).unwrap().trim().to_owned();
    (id, process)
}

fn lives(process: &str) -> bool {
    Path::new("/proc").join(process).exists()
}

/// `pelton task stop`: whether it went well, and what it said.
fn stop(server: &Server, task: &str, grace: &str) -> (bool, String) {
    let output = Command::new(binary())
        .args(["task", "stop", task, "--grace", grace, "--data"])
        .arg(server.data())
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[tokio::test]
async fn a_command_that_ignores_sigterm_is_killed_after_the_grace_of_its_stop() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let make = r#"{"function": "deaf"}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let _executor = Executor::start(&server, folder.path());
    let (patient, patients) = started(&client, folder.path(), "patient").await;
    let (quick, quicks) = started(&client, folder.path(), "quick").await;
    let (named, nameds) = started(&client, folder.path(), "named").await;

    let (done, said) = stop(&server, "deaf/named", "2h");
    assert!(!done && said.contains("at most an hour"), "{said}");
    let hours = Duration::from_secs(7_200);
    let refused = client.stop(&TaskName::Request(quick), hours).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert!(refused.to_string().contains("at most an hour"), "{refused}");
    assert_eq!(status(&client, quick).await, "Running");

    let minute = Duration::from_secs(60);
    let begun = Instant::now();
    let stopping = client.stop(&TaskName::Request(patient), minute).await;
    assert_eq!(stopping.unwrap(), Some(TaskStatus::Stopping));
    let grace = Duration::from_millis(300);
    for (task, process, by_command) in [(quick, &quicks, false), (named, &nameds, true)] {
        let begun = Instant::now();
        if by_command {
            let (done, said) = stop(&server, "deaf/named", "300ms");
            assert!(done && said.contains("Stopping"), "{said}");
        } else {
            client.stop(&TaskName::Request(task), grace).await.unwrap();
        }
        let finished = client.wait(&TaskName::Request(task), PATIENCE).await;
        assert_eq!(finished.unwrap().status, TaskStatus::Stopped);
        let took = begun.elapsed();
        assert!(grace <= took && took < GRACE_DEFAULT, "{took:?}");
        eventually("it is killed", async || !lives(process)).await;
    }
    let default_is_over = async || begun.elapsed() > GRACE_DEFAULT + Duration::from_secs(1);
    eventually("time passes", default_is_over).await;
    assert_eq!(status(&client, patient).await, "Stopping");
    assert!(lives(&patients), "it has a minute");
    fs::write(folder.path().join("end"), "").unwrap();
    let finished = client.wait(&TaskName::Request(patient), PATIENCE).await;
    assert_eq!(finished.unwrap().status, TaskStatus::Stopped);
}
