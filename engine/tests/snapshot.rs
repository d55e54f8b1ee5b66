//! Snapshots of a real engine: a start loads one instead of the log in front of it, knows the same tasks, and does as
//! well without one.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pelton_core::{event::Start, state::State};
use pelton_engine::{Engine, Options, embedded::Task};

const TASKS: u64 = 12_000;
const PAYLOAD: usize = 2 << 10;

fn snapshots(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder.join("shard-000")).unwrap();
    let mut found: Vec<PathBuf> = files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pls"))
        .collect();
    found.sort();
    found
}

/// Every third task is delayed by a day, every other one has ended.
fn task(n: u64) -> Task {
    let start = if n.is_multiple_of(3) {
        Start::DelayMs(86_400_000)
    } else {
        Start::Now
    };
    Task {
        start,
        ..Task::new("acme", "work", vec![n as u8; PAYLOAD]).named(&format!("n{n}"))
    }
}

fn open(folder: &Path) -> Engine {
    let options = Options {
        shards: Some(1),
        segment_bytes: 4 << 20,
        space_bytes_min: 0,
        ..Options::default()
    };
    Engine::open_with(folder, options).unwrap()
}

fn knows_every_task(engine: &Engine) {
    for n in 0..TASKS {
        let known = engine.get("acme", &format!("work/n{n}")).unwrap();
        let state = if n.is_multiple_of(3) {
            State::Scheduled
        } else {
            State::Succeeded
        };
        assert_eq!(
            (known.view.state, known.payload.len()),
            (state, PAYLOAD),
            "n{n}"
        );
    }
    let again = engine.submit(task(7)).unwrap();
    assert!(again.duplicate, "its name is known");
    let other = Task {
        payload: vec![1; 3],
        ..task(8)
    };
    assert!(
        engine.submit(other).is_err(),
        "with another payload it is refused"
    );
}

#[test]
fn a_start_loads_a_snapshot_and_knows_what_the_whole_log_says() {
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    std::fs::create_dir_all(&base).unwrap();
    let folder = tempfile::tempdir_in(base).unwrap();
    let engine = open(folder.path());
    engine
        .function("acme", "work", 64, |_| Ok(vec![5; 100]))
        .unwrap();
    let mut last = String::new();
    for first in (0..TASKS).step_by(500) {
        for accepted in engine.submit_all((first..first + 500).map(task).collect()) {
            let accepted = accepted.unwrap();
            assert!(accepted.durable);
            last = accepted.request_id.to_string();
        }
    }
    engine.wait("acme", &last, Duration::from_secs(60)).unwrap();
    for n in (0..TASKS).filter(|n| !n.is_multiple_of(3)) {
        let id = format!("work/n{n}");
        engine.wait("acme", &id, Duration::from_secs(60)).unwrap();
    }
    let until = Instant::now() + Duration::from_secs(30);
    while snapshots(folder.path()).is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(engine.close(Duration::from_secs(10)).complete);
    drop(engine);

    let engine = open(folder.path());
    let loaded = engine.reports()[0];
    assert!(loaded.snapshot_bytes > 0 && loaded.snapshots_passed_over == 0);
    knows_every_task(&engine);
    assert!(engine.close(Duration::from_secs(10)).complete);
    drop(engine);

    for path in snapshots(folder.path()) {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[9_000] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let engine = open(folder.path());
    let whole = engine.reports()[0];
    assert!(whole.snapshot_bytes == 0 && whole.snapshots_passed_over > 0);
    assert!(whole.records > loaded.records, "{whole:?} and {loaded:?}");
    knows_every_task(&engine);
    assert!(engine.close(Duration::from_secs(10)).complete);
}
