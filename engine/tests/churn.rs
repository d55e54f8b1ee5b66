//! The disk under churn: a hundred times the bytes of what lives go through the log, and it stays within three times
//! what lives. Real files, allocated blocks, padding included.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, Instant},
};

use pelton_core::{
    config::{FunctionConfig, Wish},
    event::Start,
    state::State,
};
use pelton_engine::{Engine, Options, embedded::Task};

const SEGMENT_BYTES: u64 = 4 << 20;
/// Delayed tasks, which stay, and what each holds.
const LIVE_TASKS: u64 = 5_000;
const LIVE_PAYLOAD: usize = 4 << 10;
/// Tasks that come and go.
const CHURN_TASKS: usize = 70_000;
const CHURN_PAYLOAD: usize = 32 << 10;
const FINISHED_BYTES: u64 = 1 << 20;

/// Bytes that the files of a directory take on the disk.
fn allocated(directory: &Path) -> u64 {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            // A file may be removed between the listing and this.
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
                Ok(metadata) => metadata.blocks() * 512,
                Err(_) => 0,
            }
        })
        .sum()
}

#[test]
fn a_hundred_times_what_lives_goes_through_the_log_and_the_disk_stays_small() {
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    std::fs::create_dir_all(&base).unwrap();
    let folder = tempfile::tempdir_in(base).unwrap();
    let options = || Options {
        shards: Some(1),
        segment_bytes: SEGMENT_BYTES,
        space_bytes_min: 0,
        finished_bytes_max: FINISHED_BYTES,
        // The log alone: a history would keep what comes and goes.
        history_retention: Duration::ZERO,
        ..Options::default()
    };
    let engine = Engine::open_with(folder.path(), options()).unwrap();
    let wish = Wish::SetFunction {
        tenant: "acme".into(),
        name: "later".into(),
        config: FunctionConfig::default(),
    };
    engine.configure(wish).unwrap();
    let later = |n: u64| Task {
        start: Start::DelayMs(86_400_000),
        ..Task::new("acme", "later", vec![n as u8; LIVE_PAYLOAD]).named(&format!("n{n}"))
    };
    for accepted in engine.submit_all((0..LIVE_TASKS).map(later).collect()) {
        assert!(accepted.unwrap().durable);
    }
    engine
        .function("acme", "busy", 8, |_| Ok(Vec::new()))
        .unwrap();
    let mut accepted = Vec::new();
    for _ in 0..CHURN_TASKS / 500 {
        let tasks = (0..500).map(|_| Task::new("acme", "busy", vec![7; CHURN_PAYLOAD]));
        for task in engine.submit_all(tasks.collect()) {
            accepted.push(task.unwrap().request_id);
        }
    }
    let last = accepted.last().unwrap().to_string();
    let ended = engine.wait("acme", &last, Duration::from_secs(60)).unwrap();
    assert_eq!(ended.view.state, State::Succeeded);

    let live = LIVE_TASKS * LIVE_PAYLOAD as u64 + FINISHED_BYTES;
    let churned = (CHURN_TASKS * CHURN_PAYLOAD) as u64;
    assert!(churned >= 100 * live && churned >= 2 << 30);
    let until = Instant::now() + Duration::from_secs(30);
    while allocated(folder.path()) > 3 * live && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    let disk = allocated(folder.path());
    println!("{churned} bytes went through, {live} live, {disk} on the disk");
    assert!(disk <= 3 * live, "{disk} bytes for {live} that live");

    assert!(engine.close(Duration::from_secs(10)).complete);
    drop(engine);
    let engine = Engine::open_with(folder.path(), options()).unwrap();
    for n in 0..LIVE_TASKS {
        let task = engine.get("acme", &format!("later/n{n}")).unwrap();
        assert_eq!(task.view.state, State::Scheduled);
        assert_eq!(task.payload, vec![n as u8; LIVE_PAYLOAD]);
    }
    assert!(engine.close(Duration::from_secs(10)).complete);
}
