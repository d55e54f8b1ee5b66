//! The engine as a program embeds it: real threads, a real ring, a real directory.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::*},
        mpsc,
    },
    thread,
    time::Duration,
};

use pelton_core::{
    config::{FunctionConfig, Wish},
    error::Code,
    event::Start,
    state::State,
};
use pelton_engine::{
    Engine, Options,
    embedded::{JobError, Task},
};

const SECOND: Duration = Duration::from_secs(1);

fn options(shards: u16) -> Options {
    Options {
        shards: Some(shards),
        segment_bytes: 8 << 20,
        space_bytes_min: 0,
        ..Options::default()
    }
}

fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be in memory: the log wants a disk.
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    std::fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

fn make_function(engine: &Engine, name: &str, config: FunctionConfig) {
    engine
        .configure(Wish::SetFunction {
            tenant: "acme".into(),
            name: name.into(),
            config,
        })
        .unwrap();
}

#[test]
fn a_task_goes_in_is_executed_and_its_result_comes_out_also_after_a_restart() {
    let folder = folder();
    for shards in [1, 3] {
        let directory = folder.path().join(format!("{shards}"));
        let engine = Engine::open_with(&directory, options(shards)).unwrap();
        engine
            .function("acme", "upper", 4, |job| {
                Ok(job.payload.to_ascii_uppercase())
            })
            .unwrap();
        let tasks = (0..200)
            .map(|n| Task::new("acme", "upper", format!("task {n}")).named(&format!("n{n}")))
            .collect();
        let accepted = engine.submit_all(tasks);
        let ids: HashSet<_> = accepted
            .iter()
            .map(|accepted| {
                let accepted = accepted.as_ref().unwrap();
                assert!(accepted.durable && !accepted.duplicate);
                accepted.request_id
            })
            .collect();
        assert_eq!(ids.len(), 200);
        for n in 0..200 {
            let task = engine
                .wait("acme", &format!("upper/n{n}"), 20 * SECOND)
                .unwrap();
            assert_eq!(task.view.state, State::Succeeded);
            assert_eq!(task.result, format!("TASK {n}").as_bytes(), "{task:?}");
        }
        assert!(engine.close(10 * SECOND).complete);
        drop(engine);

        let engine = Engine::open_with(&directory, options(9)).unwrap();
        assert_eq!(
            engine.shard_count(),
            9,
            "a directory takes on another number"
        );
        let task = engine.get("acme", "upper/n7").unwrap();
        assert_eq!(task.view.state, State::Succeeded);
        assert_eq!(
            (task.result.as_slice(), task.payload.as_slice()),
            (&b"TASK 7"[..], &b"task 7"[..])
        );
        let again = engine
            .submit(Task::new("acme", "upper", "task 7").named("n7"))
            .unwrap();
        assert!(again.duplicate && ids.contains(&again.request_id));
        let other = engine.submit(Task::new("acme", "upper", "else").named("n7"));
        assert_eq!(other.unwrap_err().code, Code::IdReused);
    }
}

#[test]
fn tasks_wait_on_disk_until_somebody_runs_their_function() {
    let folder = folder();
    let engine = Engine::open_with(folder.path(), options(2)).unwrap();
    make_function(&engine, "later", FunctionConfig::default());
    let tasks = (0..5_000)
        .map(|n: u32| Task::new("acme", "later", n.to_le_bytes()))
        .collect();
    assert!(engine.submit_all(tasks).iter().all(Result::is_ok));
    drop(engine);
    let engine = Engine::open_with(folder.path(), options(2)).unwrap();
    let recovered: u64 = engine.reports().iter().map(|report| report.records).sum();
    assert!(recovered >= 5_000);
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let (done, all_done) = mpsc::channel();
    let count = Arc::clone(&seen);
    engine
        .function("acme", "later", 8, move |job| {
            let mut seen = count.lock().unwrap();
            assert!(seen.insert(job.payload.clone()), "each runs once");
            if seen.len() == 5_000 {
                done.send(()).unwrap();
            }
            Ok(Vec::new())
        })
        .unwrap();
    all_done.recv_timeout(30 * SECOND).unwrap();
    assert_eq!(seen.lock().unwrap().len(), 5_000);
}

#[test]
fn a_failing_task_is_tried_again_as_often_as_its_function_says() {
    let folder = folder();
    let engine = Engine::open_with(folder.path(), options(1)).unwrap();
    let config = FunctionConfig {
        retries: 2,
        backoff_ms_min: 1,
        backoff_ms_max: 5,
        ..FunctionConfig::default()
    };
    make_function(&engine, "flaky", config);
    make_function(
        &engine,
        "panics",
        FunctionConfig {
            retries: 0,
            ..config
        },
    );
    let calls = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&calls);
    engine
        .function("acme", "flaky", 2, move |job| {
            counted.fetch_add(1, Relaxed);
            if job.payload == b"ends well" && job.attempt == 3 {
                return Ok(b"at last".to_vec());
            }
            Err(JobError::Failed("not today".into()))
        })
        .unwrap();
    engine
        .function("acme", "panics", 1, |_| panic!("a bug in the handler"))
        .unwrap();
    let id = |payload: &str, function: &str| {
        let task = Task::new("acme", function, payload);
        engine.submit(task).unwrap().request_id.to_string()
    };
    let well = engine
        .wait("acme", &id("ends well", "flaky"), 10 * SECOND)
        .unwrap();
    assert_eq!(
        (well.view.state, well.result),
        (State::Succeeded, b"at last".to_vec())
    );
    let badly = engine
        .wait("acme", &id("ends badly", "flaky"), 10 * SECOND)
        .unwrap();
    assert_eq!(badly.view.state, State::Failed);
    assert_eq!(
        (badly.error.as_str(), badly.view.token.attempt),
        ("not today", 3)
    );
    assert_eq!(calls.load(Relaxed), 6);
    let panicked = engine.wait("acme", &id("", "panics"), 10 * SECOND).unwrap();
    assert_eq!(panicked.error, "the handler panicked");
}

#[test]
fn answers_come_by_callback_and_by_polling_an_eventfd() {
    let folder = folder();
    let engine = Engine::open_with(folder.path(), options(1)).unwrap();
    make_function(&engine, "f", FunctionConfig::default());
    let (sender, receiver) = mpsc::channel();
    engine
        .submit_then(Task::new("acme", "f", "x"), move |result| {
            sender.send(result.is_ok()).unwrap();
        })
        .unwrap();
    assert!(receiver.recv_timeout(10 * SECOND).unwrap());

    for ticket in 0..10 {
        engine
            .submit_start(Task::new("acme", "f", "y"), ticket)
            .unwrap();
    }
    let mut poll = libc::pollfd {
        fd: engine.completion_fd().unwrap(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut seen = HashSet::new();
    while seen.len() < 10 {
        // SAFETY: one pollfd is there.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 10_000) }, 1);
        let mut count = [0u8; 8];
        // SAFETY: the eight bytes are there.
        unsafe { libc::read(poll.fd, count.as_mut_ptr().cast(), 8) };
        while let Some(completion) = engine.poll_completion() {
            assert!(completion.result.is_ok());
            seen.insert(completion.ticket);
        }
    }
}

#[test]
fn a_running_task_is_stopped_and_bad_input_is_refused_with_its_reason() {
    let folder = folder();
    let engine = Engine::open_with(folder.path(), options(1)).unwrap();
    engine
        .function("acme", "long", 1, |job| {
            while !job.cancelled.load(Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
            Err(JobError::Stopped)
        })
        .unwrap();
    let id = engine
        .submit(Task::new("acme", "long", ""))
        .unwrap()
        .request_id
        .to_string();
    while engine.get("acme", &id).unwrap().view.state != State::Running {
        thread::yield_now();
    }
    engine.stop("acme", &id).unwrap();
    let task = engine.wait("acme", &id, 10 * SECOND).unwrap();
    assert_eq!(task.view.state, State::Stopped);

    let code = |task: Task| engine.submit(task).unwrap_err().code;
    assert_eq!(code(Task::new("acme", "nobody", "")), Code::NotFound);
    assert_eq!(
        code(Task::new("acme", "long", "").named("0 bad")),
        Code::InvalidArgument
    );
    assert_eq!(
        code(Task::new("acme", "long", vec![0; (1 << 20) + 1])),
        Code::PayloadTooLarge
    );
    let far = Task {
        start: Start::DelayMs(u64::MAX),
        ..Task::new("acme", "long", "")
    };
    assert_eq!(code(far), Code::InvalidArgument);
    assert_eq!(engine.get("globex", &id).unwrap_err().code, Code::NotFound);
}

#[test]
fn what_ends_while_the_engine_closes_is_recorded() {
    let folder = folder();
    // With two shards the embedding thread wakes by itself every now and then.
    let engine = Engine::open_with(folder.path(), options(2)).unwrap();
    let (started, begun) = mpsc::channel();
    let (goes_on, end) = mpsc::channel();
    let end = Mutex::new(end);
    engine
        .function("acme", "slow", 1, move |_| {
            started.send(()).unwrap();
            end.lock().unwrap().recv().unwrap();
            Ok(b"done".to_vec())
        })
        .unwrap();
    engine
        .submit(Task::new("acme", "slow", "").named("one"))
        .unwrap();
    begun.recv().unwrap();
    thread::scope(|scope| {
        let closing = scope.spawn(|| engine.close(10 * SECOND));
        let late = Task::new("acme", "slow", "");
        while engine.submit(late.clone()).is_ok() {}
        // Time for a thread that would not wait for its workers.
        thread::sleep(SECOND / 5);
        goes_on.send(()).unwrap();
        assert!(closing.join().unwrap().complete);
    });
    drop(engine);

    let engine = Engine::open_with(folder.path(), options(2)).unwrap();
    let task = engine.get("acme", "slow/one").unwrap();
    assert_eq!(
        (task.view.state, task.result.as_slice()),
        (State::Succeeded, &b"done"[..])
    );
}

#[test]
fn two_engines_live_in_one_process_and_a_directory_is_open_once() {
    let folder = folder();
    let one = Engine::open_with(folder.path().join("one"), options(1)).unwrap();
    let two = Engine::open_with(folder.path().join("two"), options(2)).unwrap();
    for engine in [&one, &two] {
        make_function(engine, "f", FunctionConfig::default());
        assert!(engine.submit(Task::new("acme", "f", "")).unwrap().durable);
    }
    let again = Engine::open_with(folder.path().join("one"), options(1)).unwrap_err();
    assert!(again.to_string().contains("in use"), "{again}");
}

#[test]
fn an_engine_with_more_shards_than_cores_takes_from_many_threads() {
    let folder = folder();
    let engine = Engine::open_with(folder.path(), options(8)).unwrap();
    engine.function("acme", "f", 3, |_| Ok(Vec::new())).unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let engine = &engine;
            scope.spawn(move || {
                for n in 0..50 {
                    let task = Task::new("acme", "f", "x").named(&format!("t{thread}_{n}"));
                    engine.submit(task).unwrap();
                }
            });
        }
    });
    for thread in 0..8 {
        for n in 0..50 {
            let id = format!("f/t{thread}_{n}");
            let task = engine.wait("acme", &id, 20 * SECOND).unwrap();
            assert_eq!(task.view.state, State::Succeeded);
        }
    }
}
