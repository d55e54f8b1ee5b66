//! What one caller and one executor may count on.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::{Duration, Instant};

use pelton_client::{
    Attempt, Client, Code, Error, List, Operation, Refusal, RequestId, Task, TaskError, TaskName,
    TaskStatus,
};
use pelton_tests::{
    PATIENCE, Server, ServerOptions, Worker, eventually,
    worker::{Gate, Ledger},
};
use serde_json::Value;

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

async fn make(client: &Client, json: &str) {
    client.query(Operation::FunctionSet, json).await.unwrap();
}

async fn status(client: &Client, task: RequestId) -> String {
    let task = client.get(&TaskName::Request(task)).await.unwrap();
    let task: Value = serde_json::from_str(&task).unwrap();
    task["status"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_submitted_task_is_executed_and_its_result_comes_back() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "shout"}"#).await;
    let _worker = Worker::of(server.options(), "shout", 4, async |task: Attempt| {
        Ok(task.payload().to_ascii_uppercase())
    })
    .await;

    let submitted = client
        .submit_watched("shout", Task::new("abc"))
        .await
        .unwrap();
    assert!(submitted.durable && !submitted.duplicate);
    let request_id = submitted.request_id;
    let finished = submitted.finished().await.unwrap();
    assert_eq!(finished.status, TaskStatus::Succeeded);
    assert_eq!(finished.result.as_deref(), Some(&b"ABC"[..]));
    assert_eq!((finished.attempts, finished.code), (1, Code::Ok));

    let named = TaskName::Request(request_id);
    let waited = client.wait(&named, PATIENCE).await.unwrap();
    assert_eq!(waited.result.as_deref(), Some(&b"ABC"[..]));
    let task: Value = serde_json::from_str(&client.get(&named).await.unwrap()).unwrap();
    assert_eq!(task["status"], "Succeeded");
    assert_eq!(task["task_payload"], "abc");
    assert_eq!(task["return_payload"], "ABC");
    let list = List {
        function: Some("shout".into()),
        status: Some(TaskStatus::Succeeded),
        ..List::default()
    };
    let page: Value = serde_json::from_str(&client.list(&list).await.unwrap()).unwrap();
    assert_eq!(page["tasks"].as_array().unwrap().len(), 1, "{page}");
}

#[tokio::test]
async fn payload_and_result_may_have_any_bytes_up_to_the_limit_and_not_one_more() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "echo"}"#).await;
    let _worker = Worker::of(server.options(), "echo", 4, async |task: Attempt| {
        Ok(task.payload().to_vec())
    })
    .await;

    let limit = client.payload_bytes_max().await.unwrap();
    let largest: Vec<u8> = (0..limit).map(|n| ((n * 31) >> 3) as u8).collect();
    for payload in [Vec::new(), vec![0], largest] {
        let task = Task::new(payload.clone());
        let finished = client.submit_and_wait("echo", task).await.unwrap();
        assert!(finished.succeeded(), "{finished:?}");
        assert!(
            finished.result.unwrap_or_default() == payload,
            "{} bytes",
            payload.len()
        );
    }
    let oversize = client.submit("echo", Task::new(vec![7; limit + 1])).await;
    assert_eq!(oversize.unwrap_err().code(), Code::PayloadTooLarge);
    // The connection has outlived the refusal.
    let finished = client
        .submit_and_wait("echo", Task::new("x"))
        .await
        .unwrap();
    assert!(finished.succeeded());
}

#[tokio::test]
async fn a_delayed_task_is_not_executed_before_its_time() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "later"}"#).await;
    let _worker = Worker::of(server.options(), "later", 1, async |_: Attempt| {
        Ok(Vec::new())
    })
    .await;

    let delay = Duration::from_millis(700);
    let start = Instant::now();
    let task = Task::new("x").delay(delay);
    let submitted = client.submit_watched("later", task).await.unwrap();
    assert_eq!(status(&client, submitted.request_id).await, "Scheduled");
    let finished = submitted.finished().await.unwrap();
    assert!(finished.succeeded());
    // The server counts in whole milliseconds of its own clock.
    assert!(
        start.elapsed() + Duration::from_millis(2) >= delay,
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_failed_attempt_is_followed_by_another_until_the_retries_are_spent() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(
        &client,
        r#"{"function": "flaky", "retries": 2, "backoff_ms_min": 10, "backoff_ms_max": 20}"#,
    )
    .await;
    let _worker = Worker::of(server.options(), "flaky", 1, async |task: Attempt| {
        let good = std::str::from_utf8(task.payload())?.parse::<u16>()?;
        if task.attempt() < good {
            return Err(TaskError::failed(format!("attempt {}", task.attempt())));
        }
        Ok(task.attempt().to_string().into_bytes())
    })
    .await;

    let third = client
        .submit_and_wait("flaky", Task::new("3"))
        .await
        .unwrap();
    assert!(third.succeeded(), "{third:?}");
    assert_eq!(
        (third.attempts, third.result.as_deref()),
        (3, Some(&b"3"[..]))
    );
    let never = client
        .submit_and_wait("flaky", Task::new("9"))
        .await
        .unwrap();
    assert_eq!(never.status, TaskStatus::Failed);
    assert_eq!((never.attempts, never.error.as_str()), (3, "attempt 3"));
}

#[tokio::test]
async fn a_throttled_task_is_tried_again_when_it_was_told_to() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(
        &client,
        r#"{"function": "busy", "backoff_ms_min": 1, "backoff_ms_max": 2}"#,
    )
    .await;
    let _worker = Worker::of(
        server.options(),
        "busy",
        1,
        async |task: Attempt| match task.attempt() {
            1 => Err(TaskError::Throttled {
                retry_after_ms: 300,
            }),
            _ => Ok(b"done".to_vec()),
        },
    )
    .await;

    let start = Instant::now();
    let finished = client
        .submit_and_wait("busy", Task::new("x"))
        .await
        .unwrap();
    assert!(finished.succeeded(), "{finished:?}");
    assert_eq!(finished.attempts, 2);
    assert!(
        start.elapsed() >= Duration::from_millis(295),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_name_stands_for_one_task_and_for_one_payload() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "pay"}"#).await;
    let first = client
        .submit("pay", Task::new("10").task_id("order-1"))
        .await
        .unwrap();
    let again = client
        .submit("pay", Task::new("10").task_id("order-1"))
        .await
        .unwrap();
    assert!(!first.duplicate && again.duplicate);
    assert_eq!(first.request_id, again.request_id);

    let other = refusal(
        client
            .submit("pay", Task::new("11").task_id("order-1"))
            .await,
    );
    assert_eq!(other.code, Code::IdReused);
    assert_eq!(other.request_id, Some(first.request_id));

    let keyed = Task::new("11").task_id("order-1").key("customer-1");
    let keyed = client.submit("pay", keyed).await.unwrap();
    assert!(!keyed.duplicate, "a name is within its key");
    assert_ne!(keyed.request_id, first.request_id);
    let named = TaskName::Given {
        function: "pay".into(),
        key: Some("customer-1".into()),
        task_id: "order-1".into(),
    };
    let task: Value = serde_json::from_str(&client.get(&named).await.unwrap()).unwrap();
    assert_eq!(task["request_id"], keyed.request_id.to_string());
}

#[tokio::test]
async fn an_unknown_function_is_refused_and_its_neighbours_are_not() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let unknown = refusal(client.submit("nobody", Task::new("x")).await);
    assert_eq!(unknown.code, Code::NotFound);
    assert!(unknown.text.contains("function"), "{}", unknown.text);
    make(&client, r#"{"function": "nobody"}"#).await;
    client.submit("nobody", Task::new("x")).await.unwrap();
}

#[tokio::test]
async fn a_task_is_not_found_by_another_tenant() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "secret"}"#).await;
    let task = Task::new("x").task_id("name");
    let task = client.submit("secret", task).await.unwrap().request_id;

    let other = Client::connect(server.options().tenant("other"))
        .await
        .unwrap();
    make(&other, r#"{"function": "secret"}"#).await;
    let by_name = TaskName::Given {
        function: "secret".into(),
        key: None,
        task_id: "name".into(),
    };
    for named in [TaskName::Request(task), by_name] {
        let got = refusal(other.get(&named).await);
        assert_eq!(got.code, Code::NotFound);
        let waited = refusal(other.wait(&named, Duration::ZERO).await);
        assert_eq!(waited.code, Code::NotFound);
        let stopped = refusal(other.stop(&named, Duration::ZERO).await);
        assert_eq!(stopped.code, Code::NotFound);
    }
    let nobody = refusal(
        client
            .get(&TaskName::Request(RequestId(task.0 + (1 << 32))))
            .await,
    );
    assert_eq!(nobody.code, Code::NotFound);
    assert_eq!(status(&client, task).await, "Enqueued");
}

#[tokio::test]
async fn a_stopped_task_ends_whether_it_waits_or_runs() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "slow"}"#).await;
    let waiting = client.submit_watched("slow", Task::new("x")).await.unwrap();
    let name = TaskName::Request(waiting.request_id);
    let stopped = client.stop(&name, Duration::ZERO).await.unwrap();
    assert_eq!(stopped, Some(TaskStatus::Stopped));
    assert_eq!(
        waiting.finished().await.unwrap().status,
        TaskStatus::Stopped
    );
    let again = refusal(client.stop(&name, Duration::ZERO).await);
    assert_eq!(again.code, Code::FailedPrecondition);

    let ledger = Ledger::default();
    let noted = ledger.clone();
    let _worker = Worker::of(server.options(), "slow", 1, move |task: Attempt| {
        noted.note(&task);
        async move {
            task.cancelled().await;
            Err(TaskError::Stopped)
        }
    })
    .await;
    let running = client.submit_watched("slow", Task::new("y")).await.unwrap();
    let task = running.request_id;
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    let stopped = client
        .stop(&TaskName::Request(task), PATIENCE)
        .await
        .unwrap();
    assert!(
        matches!(stopped, Some(TaskStatus::Stopping | TaskStatus::Stopped)),
        "{stopped:?}"
    );
    let finished = running.finished().await.unwrap();
    assert_eq!(finished.status, TaskStatus::Stopped);
    assert_eq!(ledger.total(), 1, "the waiting one never ran");
}

#[tokio::test]
async fn tasks_of_one_key_run_one_after_the_other_in_their_order() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "steps"}"#).await;
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let at_once = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let handler = {
        let (seen, at_once) = (seen.clone(), at_once.clone());
        move |task: Attempt| {
            let (seen, at_once) = (seen.clone(), at_once.clone());
            async move {
                let before = at_once.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                tokio::task::yield_now().await;
                seen.lock().unwrap().push(task.payload().to_vec());
                at_once.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                if before > 0 {
                    return Err(TaskError::failed("two at once"));
                }
                Ok(Vec::new())
            }
        }
    };
    let _worker = Worker::of(server.options(), "steps", 16, handler).await;
    let tasks: Vec<Task> = (0..50)
        .map(|n: u32| Task::new(n.to_string()).key("one"))
        .collect();
    let submitted = client.submit_batch_watched("steps", &tasks).await;
    for task in submitted {
        assert!(task.unwrap().finished().await.unwrap().succeeded());
    }
    let expected: Vec<Vec<u8>> = (0..50).map(|n: u32| n.to_string().into_bytes()).collect();
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[tokio::test]
async fn one_name_from_many_clients_at_once_is_one_task_that_runs_once() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "once"}"#).await;
    let ledger = Ledger::default();
    let noted = ledger.clone();
    let _worker = Worker::of(server.options(), "once", 8, move |task: Attempt| {
        noted.note(&task);
        async { Ok(Vec::new()) }
    })
    .await;
    for round in 0..10 {
        let mut callers = Vec::new();
        for _ in 0..8 {
            callers.push(server.client().await);
        }
        let name = format!("name-{round}");
        let submits = callers.iter().map(|caller| {
            let (caller, name) = (caller.clone(), name.clone());
            tokio::spawn(async move { caller.submit("once", Task::new("x").task_id(name)).await })
        });
        let mut ids = Vec::new();
        let mut first = 0;
        for submit in submits.collect::<Vec<_>>() {
            let submitted = submit.await.unwrap().unwrap();
            first += u32::from(!submitted.duplicate);
            ids.push(submitted.request_id);
        }
        assert_eq!(first, 1, "one of them was the first");
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let finished = client
            .wait(&TaskName::Request(ids[0]), PATIENCE)
            .await
            .unwrap();
        assert!(finished.succeeded());
        assert_eq!(ledger.runs(ids[0]), 1);
    }
    assert_eq!(ledger.total(), 10);
}

#[tokio::test]
async fn an_executor_that_closes_sends_the_outcome_of_what_runs() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    make(&client, r#"{"function": "last"}"#).await;
    let (ledger, gate) = (Ledger::default(), Gate::default());
    let (noted, held) = (ledger.clone(), gate.clone());
    let worker = Worker::of(server.options(), "last", 1, move |task: Attempt| {
        noted.note(&task);
        let held = held.clone();
        async move {
            held.pass().await;
            Ok(b"its own".to_vec())
        }
    })
    .await;
    let task = client
        .submit("last", Task::new("x"))
        .await
        .unwrap()
        .request_id;
    eventually("the task runs", async || ledger.runs(task) == 1).await;
    let closing = tokio::spawn(worker.close());
    let behind = client
        .submit("last", Task::new("y"))
        .await
        .unwrap()
        .request_id;
    gate.open(1);
    closing.await.unwrap().unwrap();
    let finished = client
        .wait(&TaskName::Request(task), Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"its own"[..]));
    assert_eq!(finished.attempts, 1);
    assert_eq!(ledger.runs(behind), 0, "it takes no new tasks");
    assert_eq!(status(&client, behind).await, "Enqueued");
}

#[tokio::test]
async fn a_task_waits_for_an_executor_and_a_function_is_known_once_it_was_offered() {
    let server = Server::start(ServerOptions::default());
    let client = server.client().await;
    let worker = Worker::of(server.options(), "offered", 1, async |_: Attempt| {
        Ok(Vec::new())
    })
    .await;
    let known = async || client.submit("offered", Task::new("x")).await.is_ok();
    eventually("the offer makes the function", known).await;
    worker.close().await.unwrap();
    let waiting = client
        .submit_watched("offered", Task::new("y"))
        .await
        .unwrap();
    assert_eq!(status(&client, waiting.request_id).await, "Enqueued");
    let _worker = Worker::of(server.options(), "offered", 1, async |_: Attempt| {
        Ok(b"late".to_vec())
    })
    .await;
    let finished = waiting.finished().await.unwrap();
    assert_eq!(finished.result.as_deref(), Some(&b"late"[..]));
}

#[tokio::test]
async fn a_listing_has_the_tasks_asked_for_page_by_page_over_all_shards() {
    let server = Server::start(ServerOptions { shards: 3 });
    let client = server.client().await;
    make(&client, r#"{"function": "one"}"#).await;
    make(&client, r#"{"function": "two"}"#).await;
    for function in ["one", "two"] {
        let names = (0..40).map(|n| format!("{}-{n}", if n % 2 == 0 { "even" } else { "odd" }));
        let tasks: Vec<Task> = names.map(|name| Task::new("x").task_id(name)).collect();
        for submitted in client.submit_batch(function, &tasks).await {
            submitted.unwrap();
        }
    }
    for (function, prefix, expected) in [
        (None, None, 80),
        (Some("one"), None, 40),
        (Some("two"), Some("odd-"), 20),
        (None, Some("even-1"), 10),
        (None, Some("nothing"), 0),
    ] {
        let mut list = List {
            function: function.map(str::to_owned),
            prefix: prefix.map(str::to_owned),
            status: Some(TaskStatus::Enqueued),
            limit: Some(7),
            ..List::default()
        };
        let mut found = std::collections::BTreeSet::new();
        loop {
            let page: Value = serde_json::from_str(&client.list(&list).await.unwrap()).unwrap();
            let tasks = page["tasks"].as_array().unwrap();
            assert!(tasks.len() <= 7);
            for task in tasks {
                assert!(
                    task["task_id"]
                        .as_str()
                        .unwrap()
                        .starts_with(prefix.unwrap_or(""))
                );
                assert!(found.insert(task["request_id"].as_str().unwrap().to_owned()));
            }
            list.cursor = page["cursor"].as_str().map(str::to_owned);
            if list.cursor.is_none() {
                break;
            }
        }
        assert_eq!(found.len(), expected, "{function:?} {prefix:?}");
    }
}
