//! A start with another number of shards: every task is found again as it was, by its id and by its name, whatever state
//! it is in; what goes on goes on in order; and whatever a crash leaves behind, one set of logs is whole.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use pelton_core::{
    config::{FunctionConfig, OnFailure, Wish},
    error::Code,
    event::{Start, TaskView},
    id::{Lsn, RequestId},
    state::State,
};
use pelton_engine::{
    Engine, NotPlaced, OpenError, Options,
    embedded::{JobError, Task},
    engine::shard_folder,
    info::TaskInfo,
    listing::ListFilter,
};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);

fn options(shards: Option<u16>) -> Options {
    Options {
        shards,
        segment_bytes: 4 << 20,
        space_bytes_min: 0,
        finished_max: 50,
        ..Options::default()
    }
}

fn open(directory: &Path, shards: Option<u16>) -> Engine {
    Engine::open_with(directory, options(shards)).unwrap()
}

fn refused(directory: &Path, shards: u16) -> NotPlaced {
    match Engine::open_with(directory, options(Some(shards))) {
        Err(OpenError::Placing(error)) => error.why,
        other => panic!("{other:?}"),
    }
}

fn close(engine: Engine) {
    assert!(engine.close(10 * SECOND).complete);
}

fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be in memory: the log wants a disk.
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn set(engine: &Engine, name: &str, config: FunctionConfig) {
    let wish = Wish::SetFunction {
        tenant: "acme".into(),
        name: name.into(),
        config,
    };
    engine.configure(wish).unwrap();
}

/// What a task is asked for by: its identity, and its name where it has one.
type Known = BTreeMap<RequestId, String>;

fn submit(engine: &Engine, known: &mut Known, tasks: Vec<Task>) -> Vec<RequestId> {
    let names: Vec<String> = tasks
        .iter()
        .map(|task| match (task.task_id.as_str(), task.key.as_str()) {
            ("", _) => String::new(),
            (name, "") => format!("{}/{name}", task.function),
            (name, key) => format!("{}/{key}/{name}", task.function),
        })
        .collect();
    let accepted = engine.submit_all(tasks);
    let requests = accepted.into_iter().map(|accepted| {
        let accepted = accepted.unwrap();
        assert!(accepted.durable && !accepted.duplicate);
        accepted.request_id
    });
    let requests: Vec<_> = requests.collect();
    known.extend(requests.iter().copied().zip(names));
    requests
}

/// What must not change: everything but the places of records.
fn facts(info: TaskInfo) -> TaskInfo {
    TaskInfo {
        view: TaskView {
            record: (Lsn(0), 0),
            outcome: Lsn(0),
            executor: 0,
            // Until a restart it is the time when the end was durable.
            ended_ms: 0,
            ..info.view
        },
        ..info
    }
}

fn look(engine: &Engine, known: &Known) -> Vec<TaskInfo> {
    known
        .iter()
        .map(|(request, name)| {
            let task = facts(engine.get("acme", &request.to_string()).unwrap());
            assert_eq!(task.view.request, *request);
            assert!(!task.damaged);
            if !name.is_empty() {
                assert_eq!(facts(engine.get("acme", name).unwrap()), task, "{name}");
            }
            task
        })
        .collect()
}

fn check_same(engine: &Engine, known: &Known, before: &[TaskInfo]) {
    let after = look(engine, known);
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before, after);
    }
}

fn listed(engine: &Engine) -> Vec<RequestId> {
    let mut found = Vec::new();
    let mut filter = ListFilter {
        limit: 1_000,
        ..ListFilter::default()
    };
    loop {
        let (tasks, cursor) = engine.list("acme", filter.clone()).unwrap();
        found.extend(tasks.iter().map(|task| task.view.request));
        match cursor {
            Some(cursor) => filter.cursor = Some(cursor),
            None => return found,
        }
    }
}

/// Tasks in every state that outlasts a restart.
fn populate(engine: &Engine, known: &mut Known, round: usize) {
    let task = |function: &str, n: usize| Task::new("acme", function, format!("{round} {n}"));
    let quick = FunctionConfig {
        retries: 0,
        ..FunctionConfig::default()
    };
    set(engine, "parity", quick);
    set(
        engine,
        "strict",
        FunctionConfig {
            on_failure: OnFailure::Hold,
            ..quick
        },
    );
    set(
        engine,
        "again",
        FunctionConfig {
            backoff_ms_min: 3_600_000,
            backoff_ms_max: 3_600_000,
            ..FunctionConfig::default()
        },
    );
    set(
        engine,
        "wait",
        FunctionConfig {
            paused: true,
            ..quick
        },
    );
    set(engine, &format!("of-round-{round}"), quick);
    for (function, slots) in [("parity", 4), ("strict", 1), ("again", 1)] {
        let handler = move |job: &pelton_engine::embedded::Job| match (
            function,
            job.payload.last().unwrap() % 2,
        ) {
            ("parity", 0) => Ok([&job.payload[..], b" done"].concat()),
            _ => Err(JobError::Failed(format!("{function} fails"))),
        };
        engine.function("acme", function, slots, handler).unwrap();
    }
    let ended = (0..400).map(|n| match n % 2 {
        0 => task("parity", n).named(&format!("p{round}-{n}")),
        _ => Task {
            tags: vec!["odd".into()],
            ..task("parity", n)
        },
    });
    let ended = submit(engine, known, ended.collect());
    let tried = submit(engine, known, (0..5).map(|n| task("again", n)).collect());
    let strict = (0..20).map(|n| Task {
        key: format!("k{round}-{}", n % 5),
        ..task("strict", n).named(&format!("s{n}"))
    });
    let strict = submit(engine, known, strict.collect());
    let waiting = (0..1_500).map(|n| Task {
        key: format!("order-{}", n % 50),
        max_age_s: if n % 3 == 0 { 70_000 } else { 0 },
        ..task("wait", n).named(&format!("w{round}-{n}"))
    });
    submit(engine, known, waiting.collect());
    let later = (0..100).map(|n| Task {
        start: Start::DelayMs(86_400_000 + n),
        payload: vec![7; if n == 0 { 900_000 } else { 100 }],
        ..task("parity", n as usize).named(&format!("l{round}-{n}"))
    });
    submit(engine, known, later.collect());
    let state = |request: &RequestId| engine.get("acme", &request.to_string()).unwrap().view.state;
    until("tasks end, fail and are tried again", || {
        ended.iter().all(|request| state(request).terminal())
            && tried.iter().all(|r| state(r) == State::Retrying)
            && strict[..5].iter().all(|r| state(r) == State::Failed)
    });
}

#[test]
fn every_task_is_as_it_was_after_each_change_of_the_shards_and_goes_on_in_order() {
    let folder = folder();
    let mut known = Known::new();
    let mut from = 3;
    let mut engine = open(folder.path(), Some(from));
    assert_eq!(engine.placed(), None);
    populate(&engine, &mut known, 0);
    for (round, to) in [(1, 2), (2, 5), (3, 1), (4, 3)] {
        let ended = known.len() - round * 1_620 - round * 5;
        let rows = || engine.history().unwrap().stats().store.rows;
        if round % 2 == 1 {
            until("the history has what has ended", || {
                rows() >= ended as u64 - 15 * round as u64
            });
        }
        let before = look(&engine, &known);
        let list = listed(&engine);
        close(engine);
        engine = open(folder.path(), Some(to));
        let placed = engine.placed().unwrap();
        assert_eq!((placed.from, placed.to), (from, to));
        assert!(placed.tasks >= 1_600 && placed.names > 0 && placed.bytes > 900_000);
        assert_eq!(engine.shard_count(), to);
        let folders = fs::read_dir(folder.path()).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().starts_with("shard-")
        });
        assert_eq!(folders.count(), usize::from(to), "the old logs are gone");
        check_same(&engine, &known, &before);
        let relisted = listed(&engine);
        assert!(list == relisted, "nothing is missing and nothing twice");
        assert_eq!(relisted.len(), known.len());
        for (name, payload) in [("p0-6", "0 6"), ("w0-7", "0 7")] {
            let (function, key) = match name.starts_with('p') {
                true => ("parity", ""),
                false => ("wait", "order-7"),
            };
            let twice = Task {
                key: key.into(),
                ..Task::new("acme", function, payload).named(name)
            };
            assert!(engine.submit(twice.clone()).unwrap().duplicate, "{name}");
            let other = engine.submit(Task {
                payload: b"other".to_vec(),
                ..twice
            });
            assert_eq!(other.unwrap_err().code, Code::IdReused, "{name}");
        }
        populate(&engine, &mut known, round);
        from = to;
        if round == 2 {
            // A start that says nothing keeps what is there.
            let before = look(&engine, &known);
            close(engine);
            engine = open(folder.path(), None);
            assert_eq!((engine.shard_count(), engine.placed()), (to, None));
            check_same(&engine, &known, &before);
        }
    }
    let seen: Arc<Mutex<Vec<(String, RequestId)>>> = Arc::default();
    let runs = Arc::clone(&seen);
    set(&engine, "wait", FunctionConfig::default());
    let handler = move |job: &pelton_engine::embedded::Job| {
        let run = (job.key.clone(), job.request_id);
        runs.lock().unwrap().push(run);
        Ok(Vec::new())
    };
    engine.function("acme", "wait", 8, handler).unwrap();
    until("everything that waited runs", || {
        seen.lock().unwrap().len() >= 5 * 1_500
    });
    let mut keys: BTreeMap<String, Vec<RequestId>> = BTreeMap::new();
    for (key, request) in seen.lock().unwrap().drain(..) {
        keys.entry(key).or_default().push(request);
    }
    assert_eq!(keys.len(), 50);
    let mut ran = BTreeSet::new();
    for (key, requests) in keys {
        assert!(requests.is_sorted(), "{key} keeps its order");
        assert_eq!(requests.len(), 150);
        ran.extend(requests);
    }
    assert_eq!(ran.len(), 5 * 1_500, "each runs once");
    let held = known
        .iter()
        .filter(|(_, name)| name.starts_with("strict/k0"));
    let held: Vec<_> = held.map(|(request, _)| request.to_string()).collect();
    let states = || {
        held.iter()
            .map(|task| engine.get("acme", task).unwrap().view.state)
    };
    assert_eq!(
        states().filter(|state| *state == State::Enqueued).count(),
        15
    );
    set(
        &engine,
        "strict",
        FunctionConfig {
            retries: 0,
            ..FunctionConfig::default()
        },
    );
    until("keys that were held go on", || {
        states().all(|state| state == State::Failed)
    });
    close(engine);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn shards_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("shard-")).collect()
}

#[test]
fn a_crash_at_any_step_leaves_one_whole_set_of_logs_and_the_next_start_removes_the_rest() {
    let folder = folder();
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    let mut known = Known::new();
    let engine = open(&old, Some(2));
    populate(&engine, &mut known, 0);
    let before = look(&engine, &known);
    close(engine);
    copy(&old, &new);
    close(open(&new, Some(3)));
    let (old_names, new_names) = (shards_in(&old), shards_in(&new));
    assert!(old_names.is_disjoint(&new_names));
    let at = |number: usize| folder.path().join(format!("crash-{number}"));
    let mut crashes = 0;
    let mut check = |make: &dyn Fn(&Path), shards: Option<u16>, expected: u16| {
        let directory = at(crashes);
        crashes += 1;
        make(&directory);
        let engine = open(&directory, shards);
        assert_eq!(engine.shard_count(), expected);
        check_same(&engine, &known, &before);
        close(engine);
        assert_eq!(
            shards_in(&directory).len(),
            usize::from(expected),
            "nothing is left over"
        );
        // What was cut short is done from the beginning.
        let engine = open(&directory, Some(3));
        assert_eq!(engine.shard_count(), 3);
        check_same(&engine, &known, &before);
        drop(engine);
        fs::remove_dir_all(&directory).unwrap();
    };
    // Before the manifest is replaced: any part of the new logs, whole or torn, and a manifest that was being written.
    for made in 0..=new_names.len() {
        for torn in [false, true] {
            let make = |directory: &Path| {
                copy(&old, directory);
                for name in new_names.iter().take(made) {
                    copy(&new.join(name), &directory.join(name));
                }
                if torn && let Some(name) = new_names.iter().take(made).next_back() {
                    tear(&directory.join(name));
                }
                if torn {
                    fs::write(directory.join("MANIFEST.next"), b"pelton-data 2\nlog").unwrap();
                }
            };
            match torn {
                true => check(&make, Some(3), 3),
                false => check(&make, None, 2),
            }
        }
    }
    // After it: any part of the old logs.
    for left in 0..=old_names.len() {
        for torn in [false, true] {
            let make = |directory: &Path| {
                copy(&new, directory);
                // The history as it was when the manifest was replaced.
                fs::remove_dir_all(directory.join("history")).unwrap();
                copy(&old.join("history"), &directory.join("history"));
                for name in old_names.iter().take(left) {
                    copy(&old.join(name), &directory.join(name));
                }
                if torn && let Some(name) = old_names.iter().take(left).next_back() {
                    tear(&directory.join(name));
                }
            };
            check(&make, None, 3);
        }
    }
}

/// Cuts one file of a log short and removes the others.
fn tear(folder: &Path) {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let first = fs::File::options().write(true).open(&files[0]).unwrap();
    first.set_len(5_000).unwrap();
    for file in &files[1..] {
        fs::remove_file(file).unwrap();
    }
}

/// Every file of a directory but those that each start touches.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in shards_in(directory) {
        for entry in fs::read_dir(directory.join(name)).unwrap() {
            let path = entry.unwrap().path();
            found.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    let manifest = directory.join("MANIFEST");
    found.insert(manifest.clone(), fs::read(manifest).unwrap());
    found
}

#[test]
fn a_damaged_log_and_a_directory_of_the_version_before_are_not_placed_and_nothing_changes() {
    let folder = folder();
    let mut known = Known::new();
    let engine = open(folder.path(), Some(2));
    populate(&engine, &mut known, 0);
    let before = look(&engine, &known);
    close(engine);
    let path = shard_folder(folder.path(), 1).join("segment-000001.plt");
    let whole = fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    let at = whole.windows(10).position(|bytes| bytes == b"of-round-0");
    damaged[at.unwrap()] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let untouched = files(folder.path());
    match refused(folder.path(), 3) {
        NotPlaced::Damaged(shards) => {
            assert_eq!(shards.len(), 1);
            assert_eq!(shards[0].shard.0, 1);
        }
        other => panic!("{other:?}"),
    }
    assert!(files(folder.path()) == untouched, "nothing was changed");
    fs::write(&path, &whole).unwrap();
    for shards in [0, 257] {
        let error = Engine::open_with(folder.path(), options(Some(shards))).unwrap_err();
        assert!(matches!(error, OpenError::Shards { .. }), "{error}");
    }
    // As the version before wrote it.
    let manifest = folder.path().join("MANIFEST");
    let text = fs::read_to_string(&manifest).unwrap();
    let lines = text.replace("pelton-data 2", "pelton-data 1");
    let kept = |line: &&str| {
        !["first_page", "page_shift", "crc32c"].contains(&line.split(' ').next().unwrap())
    };
    let body: String = lines
        .lines()
        .filter(kept)
        .map(|line| format!("{line}\n"))
        .collect();
    let checksum = crc32c(body.as_bytes());
    fs::write(&manifest, format!("{body}crc32c {checksum:08x}\n")).unwrap();
    assert!(matches!(refused(folder.path(), 3), NotPlaced::SharedPlaces));
    fs::write(&manifest, &text).unwrap();
    let engine = open(folder.path(), Some(3));
    check_same(&engine, &known, &before);
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}
