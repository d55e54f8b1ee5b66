//! The history with the real engine: rows are there after restarts, go when they are too old or too many, and lists are
//! the same whether a task is in memory or on the disk.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use pelton_core::{
    config::{FunctionConfig, Wish},
    error::Code,
    event::Start,
    id::RequestId,
    state::State,
};
use pelton_engine::{
    Engine, Options,
    embedded::{JobError, Task},
    listing::ListFilter,
};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);

fn options() -> Options {
    Options {
        shards: Some(2),
        segment_bytes: 8 << 20,
        space_bytes_min: 0,
        // Hardly anything stays in memory.
        finished_max: 5,
        ..Options::default()
    }
}

fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be in memory: the log wants a disk.
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    std::fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

/// A function that answers, and fails for odd payloads.
fn serve(engine: &Engine) {
    let wish = Wish::SetFunction {
        tenant: "acme".into(),
        name: "parity".into(),
        config: FunctionConfig {
            retries: 0,
            ..FunctionConfig::default()
        },
    };
    engine.configure(wish).unwrap();
    let handler = |job: &pelton_engine::embedded::Job| match job.payload[0] % 2 {
        0 => Ok(job.payload.to_vec()),
        _ => Err(JobError::Failed("odd".into())),
    };
    engine.function("acme", "parity", 8, handler).unwrap();
}

fn submit(engine: &Engine, numbers: impl Iterator<Item = u32>) -> Vec<RequestId> {
    let task = |n: u32| Task {
        tags: if n.is_multiple_of(10) {
            vec!["tenth".into()]
        } else {
            Vec::new()
        },
        ..Task::new("acme", "parity", n.to_le_bytes()).named(&format!("n{n}"))
    };
    let accepted = engine.submit_all(numbers.map(task).collect());
    accepted
        .into_iter()
        .map(|a| a.unwrap().request_id)
        .collect()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn rows(engine: &Engine) -> u64 {
    engine.history().unwrap().stats().store.rows
}

/// Every page of a list.
fn listed(engine: &Engine, filter: &ListFilter) -> Vec<RequestId> {
    let mut found = Vec::new();
    let mut filter = filter.clone();
    loop {
        let (tasks, cursor) = engine.list("acme", filter.clone()).unwrap();
        assert!(tasks.len() <= filter.limit as usize);
        found.extend(tasks.iter().map(|task| task.view.request));
        match cursor {
            Some(cursor) => filter.cursor = Some(cursor),
            None => break,
        }
    }
    assert!(
        found.is_sorted_by(|a, b| a.order() > b.order()),
        "one order, no doubles"
    );
    found
}

fn in_order(mut tasks: Vec<RequestId>) -> Vec<RequestId> {
    tasks.sort_by_key(|task| std::cmp::Reverse(task.order()));
    tasks
}

#[test]
fn what_has_ended_is_found_on_the_disk_and_listed_with_what_has_not_also_after_restarts() {
    let folder = folder();
    let mut engine = Engine::open_with(folder.path(), options()).unwrap();
    serve(&engine);
    let ended = submit(&engine, 0..500);
    until("history has all rows", || rows(&engine) == 500);
    let later: Vec<RequestId> = (0..20)
        .map(|n| {
            let task = Task {
                start: Start::DelayMs(86_400_000),
                ..Task::new("acme", "parity", vec![0]).named(&format!("later{n}"))
            };
            engine.submit(task).unwrap().request_id
        })
        .collect();
    let all = in_order([&ended[..], &later].concat());
    for restart in 0..3 {
        if restart > 0 {
            assert!(engine.close(10 * SECOND).complete);
            drop(engine);
            engine = Engine::open_with(folder.path(), options()).unwrap();
        }
        assert_eq!(rows(&engine), 500, "nothing is written twice");
        for (n, request) in ended.iter().enumerate() {
            let by_id = engine.get("acme", &request.to_string()).unwrap();
            let by_name = engine.get("acme", &format!("parity/n{n}")).unwrap();
            assert_eq!(by_id.view.request, by_name.view.request);
            assert_eq!(by_id.payload, (n as u32).to_le_bytes());
            assert!(by_id.ended_ms >= request.accepted_ms());
            if n.is_multiple_of(2) {
                assert_eq!(
                    (by_id.view.state, by_id.result),
                    (State::Succeeded, by_id.payload)
                );
            } else {
                assert_eq!(
                    (by_id.view.state, by_id.error.as_str()),
                    (State::Failed, "odd")
                );
            }
        }
        let ended_as = engine.wait("acme", "parity/n7", SECOND).unwrap();
        assert_eq!(ended_as.view.state, State::Failed);
        let stopped = engine.stop("acme", "parity/n8").unwrap_err();
        assert_eq!(stopped.code, Code::FailedPrecondition);
        assert_eq!(
            engine.get("acme", "parity/nobody").unwrap_err().code,
            Code::NotFound
        );
        assert_eq!(
            engine
                .get("globex", &ended[0].to_string())
                .unwrap_err()
                .code,
            Code::NotFound
        );

        for limit in [7, 1_000] {
            let filter = ListFilter {
                limit,
                ..ListFilter::default()
            };
            assert_eq!(listed(&engine, &filter), all);
            let of = |filter: ListFilter| -> BTreeSet<RequestId> {
                listed(&engine, &filter).into_iter().collect()
            };
            let state = Some(State::Failed);
            let odd = ended.iter().copied().skip(1).step_by(2).collect();
            assert_eq!(
                of(ListFilter {
                    state,
                    ..filter.clone()
                }),
                odd
            );
            let state = Some(State::Scheduled);
            let scheduled = later.iter().copied().collect();
            assert_eq!(
                of(ListFilter {
                    state,
                    ..filter.clone()
                }),
                scheduled
            );
            let prefix = "later".to_owned();
            assert_eq!(
                of(ListFilter {
                    prefix,
                    ..filter.clone()
                }),
                scheduled
            );
            let tag = "tenth".to_owned();
            let tenth = ended.iter().copied().step_by(10).collect();
            assert_eq!(
                of(ListFilter {
                    tag,
                    ..filter.clone()
                }),
                tenth
            );
            let prefix = "n12".to_owned();
            let twelve = [12].into_iter().chain(120..130).map(|n| ended[n]).collect();
            assert_eq!(
                of(ListFilter {
                    prefix,
                    ..filter.clone()
                }),
                twelve
            );
            let since_ms = later[0].accepted_ms();
            let recent = all
                .iter()
                .copied()
                .filter(|task| task.accepted_ms() >= since_ms);
            assert_eq!(
                of(ListFilter {
                    since_ms,
                    ..filter.clone()
                }),
                recent.collect()
            );
            let until_ms = since_ms;
            let old = all
                .iter()
                .copied()
                .filter(|task| task.accepted_ms() < until_ms);
            assert_eq!(
                of(ListFilter {
                    until_ms,
                    ..filter.clone()
                }),
                old.collect()
            );
        }
    }
    assert!(engine.close(10 * SECOND).complete);
}

#[test]
fn rows_go_when_they_are_too_old_or_too_many() {
    let folder = folder();
    let short = || Options {
        history_retention: SECOND,
        ..options()
    };
    let engine = Engine::open_with(folder.path(), options()).unwrap();
    serve(&engine);
    submit(&engine, 0..300);
    until("history has all rows", || rows(&engine) == 300);
    assert!(engine.close(10 * SECOND).complete);
    drop(engine);

    let few = Options {
        history_bytes_max: 0,
        ..options()
    };
    let engine = Engine::open_with(folder.path(), few).unwrap();
    until("the bound of bytes drops all", || rows(&engine) == 0);
    assert!(engine.close(10 * SECOND).complete);
    drop(engine);
    // What is gone from history is not brought back from the log.
    let engine = Engine::open_with(folder.path(), short()).unwrap();
    serve(&engine);
    let again = submit(&engine, 1_000..1_100);
    until("history has the new rows alone", || rows(&engine) == 100);
    assert!(engine.close(10 * SECOND).complete);
    drop(engine);
    std::thread::sleep(Duration::from_millis(1_100));
    let engine = Engine::open_with(folder.path(), short()).unwrap();
    until("the time drops all", || rows(&engine) == 0);
    let gone = |task: &&RequestId| engine.get("acme", &task.to_string()).is_err();
    // Memory keeps a few of those that are safe.
    assert!(again.iter().filter(gone).count() >= 90);
    assert!(engine.close(10 * SECOND).complete);
}

#[test]
fn without_its_folder_the_history_is_made_anew_from_what_the_log_has() {
    let folder = folder();
    let options = || Options {
        // The log keeps what memory keeps.
        finished_max: 1_000,
        ..options()
    };
    let engine = Engine::open_with(folder.path(), options()).unwrap();
    serve(&engine);
    let ended = submit(&engine, 0..200);
    until("history has all rows", || rows(&engine) == 200);
    assert!(engine.close(10 * SECOND).complete);
    drop(engine);
    std::fs::remove_dir_all(folder.path().join("history")).unwrap();
    let engine = Engine::open_with(folder.path(), options()).unwrap();
    until("history has all rows again", || rows(&engine) == 200);
    let filter = ListFilter::default();
    assert_eq!(listed(&engine, &filter), in_order(ended));
    assert!(engine.close(10 * SECOND).complete);
}

#[test]
fn submits_are_refused_while_the_history_is_too_far_behind_and_nothing_is_lost() {
    let folder = folder();
    let engine = Engine::open_with(
        folder.path(),
        Options {
            history_lag_max: 1,
            ..options()
        },
    )
    .unwrap();
    serve(&engine);
    let mut accepted = Vec::new();
    let mut refused = 0;
    for round in 0..200u32 {
        let tasks = (0..50).map(|n| Task::new("acme", "parity", (round + n).to_le_bytes()));
        for result in engine.submit_all(tasks.collect()) {
            match result {
                Ok(task) => accepted.push(task.request_id),
                Err(error) => {
                    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
                    assert!(error.what.contains("history_lag_max"), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0 && !accepted.is_empty());
    for task in &accepted {
        let ended = engine.wait("acme", &task.to_string(), PATIENCE).unwrap();
        assert!(ended.view.state.terminal());
    }
    until("history has all rows", || {
        rows(&engine) == accepted.len() as u64
    });
    assert!(engine.close(10 * SECOND).complete);
}
