//! What a caller sees: answers, refusals, ends, lost connections.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::fake::{Fake, IN_FLIGHT_MAX, PAYLOAD_MAX};
use pelton_client::{
    Client, Code, Error, List, Operation, SharedSocket, Task, TaskError, TaskName, TaskStatus,
    Trust, pipeline,
};
use pelton_net::submit::{SUBMIT_NOTIFY, SubmitTask};

/// Executes the function `shout` for the rest of the test.
async fn with_shouter(fake: &Fake) {
    let mut executor = fake.executor().await;
    executor.function("shout", 8, async |task: pelton_client::Attempt| {
        let text = std::str::from_utf8(task.payload())?;
        if text == "hush" {
            return Err(TaskError::failed("not in here"));
        }
        Ok(text.to_uppercase())
    });
    tokio::spawn(executor.run());
}

#[tokio::test]
async fn a_submit_tells_identity_duplicate_and_durability() {
    let fake = Fake::start();
    let client = fake.client().await;
    let first = client
        .submit("f", Task::new("x").task_id("one").key("k").tag("a=b"))
        .await
        .unwrap();
    assert!(first.durable && !first.duplicate);
    let again = client
        .submit("f", Task::new("x").task_id("one"))
        .await
        .unwrap();
    assert!(again.duplicate);
    assert_eq!(again.request_id, first.request_id);
    let reused = client
        .submit("f", Task::new("y").task_id("one"))
        .await
        .unwrap_err();
    let Error::Refused(refusal) = &reused else {
        panic!("{reused}")
    };
    assert_eq!(reused.code(), Code::IdReused);
    assert_eq!(reused.number(), 7);
    assert_eq!(refusal.request_id, Some(first.request_id));
}

#[tokio::test]
async fn connections_that_share_a_socket_end_one_by_one_and_trust_for_themselves() {
    let fake = Fake::start();
    let socket = SharedSocket::new();
    let options = fake.options().socket(&socket);
    let one = Client::connect(options.clone()).await.unwrap();
    let other = Client::connect(options.clone()).await.unwrap();
    one.submit("f", Task::new("x").task_id("one"))
        .await
        .unwrap();
    one.close().await;
    let again = other.submit("f", Task::new("x").task_id("one")).await;
    assert!(again.unwrap().duplicate);
    let stranger = options.trust(Trust::Fingerprint([7; 32]));
    assert!(Client::connect(stranger).await.is_err());
    other.close().await;
    tokio::time::timeout(Duration::from_secs(5), socket.wait_idle())
        .await
        .expect("nothing holds the socket any more");
}

#[tokio::test]
async fn a_refusal_says_when_to_try_again() {
    let fake = Fake::start();
    let client = fake.client().await;
    let error = client.submit("full", Task::new("x")).await.unwrap_err();
    assert!(error.retryable());
    assert_eq!(
        error.to_string(),
        "RESOURCE_EXHAUSTED: the queue is full (try again in 1500 ms)"
    );
}

#[tokio::test]
async fn one_bad_task_does_not_spoil_its_batch() {
    let fake = Fake::start();
    let client = fake.client().await;
    let tasks = [
        Task::new("good"),
        Task::new("bad").task_id("no name"),
        Task::new(vec![0; PAYLOAD_MAX as usize + 1]),
        Task::new("bad").tag(""),
        Task::new("bad").content_type("tëxt"),
        Task::new("bad").traceparent("00"),
        Task::new("bad").cost(u16::MAX),
        Task::new("good"),
    ];
    let codes: Vec<_> = client
        .submit_batch("f", &tasks)
        .await
        .into_iter()
        .map(|result| result.map_or_else(|error| error.code(), |_| Code::Ok))
        .collect();
    use Code::{InvalidArgument as Invalid, Ok as Good, PayloadTooLarge as Large};
    assert_eq!(
        codes,
        [
            Good, Invalid, Large, Invalid, Invalid, Invalid, Invalid, Good
        ]
    );
    let nowhere = client.submit("no function", Task::new("x")).await;
    assert_eq!(nowhere.unwrap_err().code(), Invalid);
    assert!(client.submit_batch("f", &[]).await.is_empty());
}

#[tokio::test]
async fn a_batch_beyond_all_limits_is_cut_into_frames_and_answered_in_order() {
    let fake = Fake::start();
    let client = fake.client().await;
    // More tasks than a frame and than may be in flight, and more bytes than a frame.
    let many = vec![Task::new("x"); IN_FLIGHT_MAX as usize + 1_000];
    let results = client.submit_batch("f", &many).await;
    let ids: Vec<_> = results
        .iter()
        .map(|r| r.as_ref().unwrap().request_id)
        .collect();
    assert!(ids.is_sorted());
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), many.len());
    assert_eq!(fake.knobs.submit_frames.load(Ordering::SeqCst), 2);
    let large = vec![Task::new(vec![1; PAYLOAD_MAX as usize]); 20];
    let results = client.submit_batch("f", &large).await;
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(fake.knobs.submit_frames.load(Ordering::SeqCst), 22);
}

#[tokio::test]
async fn the_end_of_a_task_comes_with_its_result() {
    let fake = Fake::start();
    let client = fake.client().await;
    with_shouter(&fake).await;
    let finished = client
        .submit_and_wait("shout", Task::new("hello"))
        .await
        .unwrap();
    assert!(finished.succeeded());
    assert_eq!(finished.result.as_deref(), Some(&b"HELLO"[..]));
    let failed = client
        .submit_and_wait("shout", Task::new("hush"))
        .await
        .unwrap();
    assert_eq!(failed.status, TaskStatus::Failed);
    assert_eq!(failed.error, "not in here");

    let unwatched = client
        .submit("shout", Task::new("later").task_id("later"))
        .await
        .unwrap();
    assert!(unwatched.finished().await.unwrap().succeeded());
    let name = TaskName::parse("shout/later").unwrap();
    let waited = client.wait(&name, Duration::from_secs(5)).await.unwrap();
    assert_eq!(waited.result.as_deref(), Some(&b"LATER"[..]));

    let batch: Vec<_> = (0..100).map(|n| Task::new(format!("n{n}"))).collect();
    for (n, submitted) in client
        .submit_batch_watched("shout", &batch)
        .await
        .into_iter()
        .enumerate()
    {
        let finished = submitted.unwrap().finished().await.unwrap();
        assert_eq!(finished.result.unwrap(), format!("N{n}"));
    }
}

#[tokio::test]
async fn a_wait_ends_with_its_time() {
    let fake = Fake::start();
    let client = fake.client().await;
    let submitted = client.submit("nobody", Task::new("x")).await.unwrap();
    let name = TaskName::Request(submitted.request_id);
    let error = client
        .wait(&name, Duration::from_millis(50))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    let missing = TaskName::parse("f/missing").unwrap();
    let error = client
        .wait(&missing, Duration::from_secs(5))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
}

#[tokio::test]
async fn rare_operations_carry_json() {
    let fake = Fake::start();
    let client = fake.client().await;
    let name = TaskName::parse("f/k/x").unwrap();
    assert_eq!(client.get(&name).await.unwrap(), r#"{"task":"f/k/x"}"#);
    let missing = TaskName::parse("f/missing").unwrap();
    let error = client.get(&missing).await.unwrap_err();
    assert_eq!(error.to_string(), "NOT_FOUND: no task \"missing\"");
    let list = List {
        function: Some("f".into()),
        status: Some(TaskStatus::Running),
        cursor: Some("a\"b".into()),
        ..List::default()
    };
    assert_eq!(
        client.list(&list).await.unwrap(),
        r#"{"function":"f","status":"Running","cursor":"a\"b"}"#
    );
    assert_eq!(client.query(Operation::Stats, "{}").await.unwrap(), "{}");
    let stopped = client.stop(&name, Duration::ZERO).await.unwrap();
    assert_eq!(stopped, Some(TaskStatus::Stopping));
    let submitted = client.submit("f", Task::new("x")).await.unwrap();
    let name = TaskName::Request(submitted.request_id);
    let stopped = client.stop(&name, Duration::ZERO).await.unwrap();
    assert_eq!(stopped, Some(TaskStatus::Stopping));
}

#[tokio::test]
async fn a_client_that_is_not_let_in_is_told_why() {
    let mut fake = Fake::start();
    let error = Client::connect(fake.options().key("pk_wrong"))
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "UNAUTHENTICATED: that key is not known");
    let error = Client::connect(fake.options().key("")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let error = Client::connect(fake.options().tenant("no name"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let other = fake.options().trust(Trust::Fingerprint([1; 32]));
    let error = Client::connect(other).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
    let options = fake.options();
    fake.kill();
    let error = Client::connect(options).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
}

#[tokio::test]
async fn a_submit_of_unknown_outcome_is_repeated_as_a_duplicate() {
    let mut fake = Fake::start();
    let client = fake.client().await;
    fake.knobs.deaf.store(true, Ordering::SeqCst);
    let lost = tokio::spawn({
        let client = client.clone();
        async move { client.submit("f", Task::new("x").task_id("one")).await }
    });
    fake.until(|fake| !fake.state.lock().unwrap().tasks.is_empty())
        .await;
    fake.kill();
    fake.knobs.deaf.store(false, Ordering::SeqCst);
    fake.restart();
    let error = lost.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::ConnectionLost(_)), "{error}");
    assert!(error.to_string().contains("same task_id"), "{error}");
    let again = client
        .submit("f", Task::new("x").task_id("one"))
        .await
        .unwrap();
    assert!(again.duplicate);
}

#[tokio::test]
async fn waiting_for_an_end_survives_a_restart() {
    let mut fake = Fake::start();
    let client = fake.client().await;
    let submitted = client
        .submit_watched("shout", Task::new("hello"))
        .await
        .unwrap();
    let waiting = tokio::spawn(submitted.finished());
    fake.kill();
    fake.restart();
    with_shouter(&fake).await;
    let finished = waiting.await.unwrap().unwrap();
    assert_eq!(finished.result.unwrap(), "HELLO");
}

#[tokio::test]
async fn a_closed_client_fails_what_waits_and_connects_again() {
    let fake = Fake::start();
    let client = fake.client().await;
    let submitted = client.submit("nobody", Task::new("x")).await.unwrap();
    let name = TaskName::Request(submitted.request_id);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.wait(&name, Duration::from_secs(60)).await }
    });
    let watched = |fake: &Fake| {
        let state = fake.state.lock().unwrap();
        state.tasks.len() == 1
    };
    fake.until(watched).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    client.close().await;
    assert_eq!(waiting.await.unwrap().unwrap_err(), Error::Closed);
    assert!(client.submit("nobody", Task::new("y")).await.is_ok());
}

#[tokio::test]
async fn many_callers_share_one_connection() {
    let fake = Fake::start();
    let client = fake.client().await;
    let callers: Vec<_> = (0..200)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                let task = Task::new(format!("{n}")).task_id(format!("n{}", n % 50));
                client.submit(&format!("f{}", n / 100), task).await
            })
        })
        .collect();
    let mut ids = HashSet::new();
    for caller in callers {
        match caller.await.unwrap() {
            Ok(submitted) => assert!(ids.insert(submitted.request_id)),
            Err(error) => assert_eq!(error.code(), Code::IdReused),
        }
    }
    assert_eq!(ids.len(), 100);
}

#[tokio::test]
async fn a_pipeline_keeps_many_frames_in_flight() {
    let fake = Fake::start();
    let (mut sender, mut receiver) = pipeline::connect(&fake.options()).await.unwrap();
    assert_eq!(sender.limits().in_flight_tasks_max, IN_FLIGHT_MAX as usize);
    let tasks = [SubmitTask::new(b"some bytes"); 100];
    let prepared = pipeline::Prepared::new(0, &["f"], &tasks).unwrap();
    let mut tags = HashSet::new();
    for _ in 0..20 {
        assert!(tags.insert(sender.send(&prepared)));
    }
    let named = (0..50).map(|n| SubmitTask {
        task_id: [Some("a"), Some("b")][n % 2],
        ..SubmitTask::new(b"named")
    });
    let (tag, count) = sender.submit(SUBMIT_NOTIFY, &["g"], named).unwrap();
    assert_eq!(count, 50);
    assert!(tags.insert(tag));
    sender.flush().await.unwrap();
    let (mut accepted, mut duplicates) = (0, 0);
    while accepted < 20 * 100 + 50 {
        let pipeline::Event::Answer(answer) = receiver.next().await.unwrap() else {
            panic!("nothing else was asked for");
        };
        assert!(tags.contains(&answer.tag()));
        let view = answer.view().unwrap();
        accepted += view.accepted();
        duplicates += view.iter().filter(|task| task.flags & 2 != 0).count();
    }
    assert_eq!(duplicates, 48);
    assert!(receiver.try_next().unwrap().is_none());
    sender.close().await;
}
