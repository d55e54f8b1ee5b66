//! What an executor does: handlers of both kinds, cancels, lost leases, closing, and work that survives a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pelton_client::{Attempt, Client, Code, ExecutorHandle, Finished, Task, TaskError, TaskStatus};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::fake::{Fake, PAYLOAD_MAX};

/// A function `slow` whose attempts wait for a permit of `gate`; `started` counts them.
struct Slow {
    gate: Arc<Semaphore>,
    started: Arc<AtomicUsize>,
    handle: ExecutorHandle,
    run: JoinHandle<Result<(), pelton_client::Error>>,
}

async fn slow(fake: &Fake, slots: u32) -> Slow {
    let gate = Arc::new(Semaphore::new(0));
    let started = Arc::new(AtomicUsize::new(0));
    let mut executor = fake.executor().await;
    let (inner_gate, inner_started) = (gate.clone(), started.clone());
    executor.function("slow", slots, move |task: Attempt| {
        let (gate, started) = (inner_gate.clone(), inner_started.clone());
        async move {
            started.fetch_add(1, Ordering::SeqCst);
            gate.acquire().await?.forget();
            Ok(task.payload().to_vec())
        }
    });
    Slow {
        gate,
        started,
        handle: executor.handle(),
        run: tokio::spawn(executor.run()),
    }
}

async fn submit(client: &Client, function: &str, payload: &str) -> Finished {
    client
        .submit_and_wait(function, Task::new(payload.to_owned()))
        .await
        .unwrap()
}

#[tokio::test]
async fn every_way_to_end_reaches_the_caller() {
    let fake = Fake::start();
    let client = fake.client().await;
    let mut executor = fake.executor().await;
    executor
        .function("spawned", 4, async |task: Attempt| {
            assert_eq!(task.attempt(), 1);
            task.output("some ");
            task.output("words");
            match &task.payload()[..] {
                b"fail" => Err(TaskError::failed("broken")),
                b"panic" => panic!("on purpose"),
                b"throttle" => Err(TaskError::Throttled {
                    retry_after_ms: 250,
                }),
                b"large" => Ok(vec![0; PAYLOAD_MAX as usize + 1]),
                other => Ok(other.to_vec()),
            }
        })
        .function_sync("inline", 4, |task, result| match task.payload {
            b"fail" => Err(TaskError::failed("broken")),
            b"panic" => panic!("on purpose"),
            b"throttle" => Err(TaskError::Throttled {
                retry_after_ms: 250,
            }),
            b"large" => {
                result.resize(PAYLOAD_MAX as usize + 1, 0);
                Ok(())
            }
            other => {
                result.extend_from_slice(other);
                Ok(())
            }
        });
    tokio::spawn(executor.run());
    for function in ["spawned", "inline"] {
        let good = submit(&client, function, "fine").await;
        assert!(good.succeeded());
        assert_eq!(good.result.unwrap(), "fine");
        for (payload, error) in [
            ("fail", "broken"),
            ("panic", "the handler panicked"),
            ("throttle", "throttled for 250 ms"),
            (
                "large",
                "RESULT_TOO_LARGE: the result has 262145 bytes, the server takes 262144",
            ),
        ] {
            let bad = submit(&client, function, payload).await;
            assert_eq!(bad.status, TaskStatus::Failed);
            // The fake server reports captured output in the place of the error.
            let error = if function == "spawned" {
                "some words"
            } else {
                error
            };
            assert_eq!(bad.error, error, "{function} {payload}");
        }
    }
}

#[tokio::test]
async fn outcomes_are_collected_into_few_frames() {
    let fake = Fake::start();
    let client = fake.client().await;
    let mut executor = fake.executor().await;
    executor.function("echo", 1_000, async |task: Attempt| {
        Ok(task.payload().clone())
    });
    executor.function_sync("inline", 1_000, |task, result| {
        result.extend_from_slice(task.payload);
        Ok(())
    });
    tokio::spawn(executor.run());
    for function in ["echo", "inline"] {
        let before = fake.knobs.outcome_frames.load(Ordering::SeqCst);
        let tasks = vec![Task::new("x"); 1_000];
        for submitted in client.submit_batch_watched(function, &tasks).await {
            assert!(submitted.unwrap().finished().await.unwrap().succeeded());
        }
        let frames = fake.knobs.outcome_frames.load(Ordering::SeqCst) - before;
        // The fake server sends one execute frame a task, and inline outcomes go frame by frame.
        if function == "echo" {
            assert!(frames < 500, "{frames}");
        }
    }
    // Results that together are larger than a frame.
    let tasks = vec![Task::new(vec![7; PAYLOAD_MAX as usize]); 12];
    for submitted in client.submit_batch_watched("echo", &tasks).await {
        let finished = submitted.unwrap().finished().await.unwrap();
        assert_eq!(finished.result.unwrap().len(), PAYLOAD_MAX as usize);
    }
}

#[tokio::test]
async fn a_running_attempt_survives_a_restart_of_the_server() {
    let mut fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 4).await;
    let submitted = client.submit("slow", Task::new("x")).await.unwrap();
    fake.until(|_| slow.started.load(Ordering::SeqCst) == 1)
        .await;
    for _ in 0..2 {
        fake.kill();
        fake.restart();
        fake.until(|fake| fake.knobs.heartbeats.load(Ordering::SeqCst) > 0)
            .await;
        fake.knobs.heartbeats.store(0, Ordering::SeqCst);
    }
    slow.gate.add_permits(1);
    let finished = submitted.finished().await.unwrap();
    assert!(finished.succeeded());
    assert_eq!(finished.attempts, 1);
    assert_eq!(slow.started.load(Ordering::SeqCst), 1);
    let next = submit_with_permit(&client, &slow).await;
    assert!(next.succeeded(), "the function is registered again");
}

async fn submit_with_permit(client: &Client, slow: &Slow) -> Finished {
    slow.gate.add_permits(1);
    submit(client, "slow", "next").await
}

#[tokio::test]
async fn an_outcome_that_nobody_acknowledged_is_presented_again() {
    let mut fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 4).await;
    let submitted = client.submit("slow", Task::new("x")).await.unwrap();
    fake.knobs.ignore_outcomes.store(true, Ordering::SeqCst);
    slow.gate.add_permits(1);
    fake.until(|fake| fake.knobs.outcome_frames.load(Ordering::SeqCst) == 1)
        .await;
    fake.kill();
    fake.knobs.ignore_outcomes.store(false, Ordering::SeqCst);
    fake.restart();
    let finished = submitted.finished().await.unwrap();
    assert_eq!(finished.result.unwrap(), "x");
    assert_eq!(finished.attempts, 1);
    assert_eq!(slow.started.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_outcome_that_was_not_taken_is_presented_again() {
    let fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 4).await;
    fake.knobs
        .refuse_outcomes_once
        .store(true, Ordering::SeqCst);
    let finished = submit_with_permit(&client, &slow).await;
    assert_eq!(finished.attempts, 1);
    assert_eq!(fake.knobs.outcome_frames.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_cancelled_attempt_may_end_by_itself_and_is_dropped_after_its_grace() {
    let fake = Fake::start();
    let client = fake.client().await;
    let mut executor = fake.executor().await;
    executor.function("stoppable", 4, async |task: Attempt| {
        if task.payload() == "stubborn" {
            std::future::pending::<()>().await;
        }
        task.cancelled().await;
        assert!(task.is_cancelled());
        Err::<Vec<u8>, _>(TaskError::Stopped)
    });
    tokio::spawn(executor.run());
    for (payload, grace) in [("polite", 60_000), ("stubborn", 100), ("stubborn", 0)] {
        let submitted = client
            .submit_watched("stoppable", Task::new(payload))
            .await
            .unwrap();
        fake.until(|fake| fake.running() == 1).await;
        let name = pelton_client::TaskName::Request(submitted.request_id);
        let asked = Instant::now();
        let grace = Duration::from_millis(grace);
        let status = client.stop(&name, grace).await.unwrap();
        assert_eq!(status, Some(TaskStatus::Stopping));
        let finished = submitted.finished().await.unwrap();
        assert_eq!(finished.status, TaskStatus::Stopped);
        assert!(asked.elapsed() < Duration::from_secs(30), "{payload}");
        let error = client.stop(&name, grace).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
    }
}

#[tokio::test]
async fn an_attempt_whose_lease_is_lost_ends_unheard() {
    let fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 4).await;
    client.submit("slow", Task::new("x")).await.unwrap();
    fake.until(|fake| fake.running() == 1 && slow.started.load(Ordering::SeqCst) == 1)
        .await;
    fake.knobs.lose_leases_once.store(true, Ordering::SeqCst);
    fake.until(|fake| !fake.knobs.lose_leases_once.load(Ordering::SeqCst))
        .await;
    // The permit goes to the next attempt, since the first one is gone.
    let finished = submit_with_permit(&client, &slow).await;
    assert!(finished.succeeded());
    assert_eq!(fake.knobs.outcome_frames.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn closing_lets_attempts_end_and_takes_no_new_ones() {
    let fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 1).await;
    let first = client
        .submit_watched("slow", Task::new("first"))
        .await
        .unwrap();
    fake.until(|_| slow.started.load(Ordering::SeqCst) == 1)
        .await;
    let closing = tokio::spawn({
        let handle = slow.handle.clone();
        async move { handle.close(Duration::from_secs(30)).await }
    });
    fake.until(|fake| fake.knobs.goodbyes.load(Ordering::SeqCst) == 1)
        .await;
    client.submit("slow", Task::new("second")).await.unwrap();
    slow.gate.add_permits(1);
    assert!(first.finished().await.unwrap().succeeded());
    closing.await.unwrap();
    slow.run.await.unwrap().unwrap();
    assert_eq!(slow.started.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn closing_drops_what_does_not_end_in_time() {
    let fake = Fake::start();
    let client = fake.client().await;
    let slow = slow(&fake, 1).await;
    let submitted = client.submit_watched("slow", Task::new("x")).await.unwrap();
    fake.until(|_| slow.started.load(Ordering::SeqCst) == 1)
        .await;
    slow.handle.close(Duration::from_millis(50)).await;
    let finished = submitted.finished().await.unwrap();
    assert_eq!(
        finished.error,
        "the executor was closed before the attempt ended"
    );
    slow.run.await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_without_a_server_ends_too() {
    let mut fake = Fake::start();
    let idle = slow(&fake, 1).await;
    fake.kill();
    idle.handle.close(Duration::from_secs(30)).await;
    idle.run.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_function_that_may_not_be_offered_ends_the_run() {
    let fake = Fake::start();
    let mut executor = fake.executor().await;
    executor.function("forbidden", 1, async |task: Attempt| {
        Ok(task.payload().clone())
    });
    let error = executor.run().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "PERMISSION_DENIED: the function forbidden was not registered"
    );
}
