//! What the server measures of the way of tasks.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pelton_client::{Attempt, Client, Operation, Task, TaskError};
use pelton_tests::{Server, ServerOptions, Worker, eventually, worker::Gate};
use serde_json::Value;

/// The parts of the way in its order; the time in all is last.
const WAY: [&str; 8] = [
    "durable_us",
    "queued_us",
    "fetched_us",
    "dispatched_us",
    "carried_us",
    "run_us",
    "delivered_us",
    "total_ms",
];
/// Tasks of one batch.
const TASKS: usize = 500;

async fn stats(client: &Client) -> Value {
    let stats = client.query(Operation::Stats, "{}").await.unwrap();
    serde_json::from_str(&stats).unwrap()
}

/// Over all shards: how many tasks have passed a part, and how long they took for it together, in microseconds.
fn passed(stats: &Value, part: &str) -> (u64, f64) {
    let shards = stats["shards"].as_array().unwrap();
    let unit = if part.ends_with("_ms") { 1_000.0 } else { 1.0 };
    shards.iter().fold((0, 0.0), |(count, time), shard| {
        let histogram = &shard["histograms"][part];
        let here = histogram["count"].as_u64().unwrap();
        let mean = histogram["mean"].as_f64().unwrap();
        (count + here, time + here as f64 * mean * unit)
    })
}

async fn tasks_pass_every_stage(options: ServerOptions) {
    let server = Server::start(options);
    let client = server.client().await;
    let make = r#"{"function": "way", "backoff_ms_min": 1, "backoff_ms_max": 2}"#;
    client.query(Operation::FunctionSet, make).await.unwrap();
    // Named, so that they are spread over the shards.
    let tasks = |round: &str| -> Vec<Task> {
        let name = |n| format!("{round}-{n}");
        (0..TASKS)
            .map(|n| Task::new("x").task_id(name(n)))
            .collect()
    };
    for accepted in client.submit_batch("way", &tasks("waits")).await {
        accepted.unwrap();
    }
    let waiting = stats(&client).await;
    assert_eq!(passed(&waiting, "durable_us").0, TASKS as u64);
    for part in &WAY[1..] {
        assert_eq!(passed(&waiting, part).0, 0, "nobody runs them: {part}");
    }

    let gate = Gate::default();
    gate.open(2 * TASKS);
    let held = gate.clone();
    let _worker = Worker::of(server.options(), "way", 16, move |task: Attempt| {
        let held = held.clone();
        async move {
            held.pass().await;
            tokio::time::sleep(Duration::from_millis(2)).await;
            if task.task_id() == Some("last") && task.attempt() == 1 {
                return Err(TaskError::failed("once"));
            }
            Ok(Vec::new())
        }
    })
    .await;
    for accepted in client.submit_batch("way", &tasks("runs")).await {
        accepted.unwrap();
    }
    let all = 2 * TASKS as u64;
    let ended = async || stats(&client).await["totals"]["succeeded"] == all;
    eventually("all tasks have ended", ended).await;
    let after = stats(&client).await;
    // A slot that was lent to another shard meanwhile sends the task that was to have it back into its queue.
    let dequeued = passed(&after, "queued_us").0;
    assert!(dequeued >= all, "{after}");
    for part in WAY {
        let times = match part {
            "queued_us" | "fetched_us" => dequeued,
            _ => all,
        };
        assert_eq!(passed(&after, part).0, times, "{part}: {after}");
    }
    let (ran, total) = (passed(&after, "run_us").1, passed(&after, "total_ms").1);
    assert!(ran / all as f64 >= 1_900.0, "each sleeps for 2 ms: {ran}");
    // Histograms keep two digits, and logged time is in whole milliseconds.
    let sum: f64 = WAY[..7].iter().map(|part| passed(&after, part).1).sum();
    let slack = 0.03 * total + 2_000.0 * all as f64;
    assert!((sum - total).abs() < slack, "{sum} and {total}: {after}");
    for shard in after["shards"].as_array().unwrap() {
        for part in WAY {
            let of = |figure: &str| shard["histograms"][part][figure].as_u64().unwrap();
            let figures = ["p50", "p99", "p999", "max"].map(of);
            assert!(figures.is_sorted(), "{part}: {after}");
        }
    }

    // Another attempt passes the stages from its turn to its outcome again, and its end comes once.
    gate.open(2);
    let last = Task::new("x").task_id("last");
    let last = client.submit_and_wait("way", last).await.unwrap();
    assert_eq!(last.attempts, 2);
    let after = stats(&client).await;
    let dequeued_now = passed(&after, "queued_us").0;
    assert!(dequeued_now >= dequeued + 2, "{after}");
    for part in WAY {
        let times = match part {
            "queued_us" | "fetched_us" => dequeued_now,
            "durable_us" | "total_ms" => all + 1,
            _ => all + 2,
        };
        assert_eq!(passed(&after, part).0, times, "{part}: {after}");
    }
}

#[tokio::test]
async fn every_stage_counts_every_task_that_passes_it_and_they_add_up() {
    tasks_pass_every_stage(ServerOptions::default()).await;
}

#[tokio::test]
async fn every_shard_measures_its_own_tasks_and_together_they_are_all() {
    tasks_pass_every_stage(ServerOptions { shards: 3 }).await;
}
