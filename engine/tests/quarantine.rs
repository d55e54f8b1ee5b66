//! One shard's log is damaged: the engine starts without it, says where, refuses what is that shard's and goes on with
//! the rest; with the files restored everything is there.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::*},
    },
    time::Duration,
};

use pelton_core::{
    config::{FunctionConfig, Wish},
    error::Code,
    id::{RequestId, ShardId, shard_of},
    state::State,
};
use pelton_engine::{
    Engine, OpenError, Options,
    embedded::{Accepted, Error, Task},
    engine::shard_folder,
};
use pelton_storage::recover::RecoverError;

const SHARDS: u16 = 3;
const LEASE: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(30);

fn open(directory: &Path) -> Result<Engine, OpenError> {
    let options = Options {
        shards: Some(SHARDS),
        segment_bytes: 8 << 20,
        space_bytes_min: 0,
        lease: LEASE,
        ..Options::default()
    };
    Engine::open_with(directory, options)
}

fn folder() -> tempfile::TempDir {
    // Not in /tmp, which may be in memory: the log wants a disk.
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

fn shard_of_task(request: RequestId) -> ShardId {
    shard_of(request.cell(), SHARDS)
}

fn set(engine: &Engine, name: &str, concurrency: u32) -> Result<(), Error> {
    engine.configure(Wish::SetFunction {
        tenant: "acme".into(),
        name: name.into(),
        config: FunctionConfig {
            concurrency,
            ..FunctionConfig::default()
        },
    })
}

fn submit(engine: &Engine, function: &str, name: &str) -> Result<Accepted, Error> {
    engine.submit(Task::new("acme", function, format!("<<{function}/{name}>>")).named(name))
}

/// A function whose home is this shard, made by the engine.
fn function_at(engine: &Engine, home: ShardId, prefix: &str) -> String {
    let names = (0..).map(|number| format!("{prefix}{number}"));
    let mut at_home = names.filter(|name| {
        set(engine, name, 0).unwrap();
        let accepted = engine.submit(Task::new("acme", name, "home"));
        shard_of_task(accepted.unwrap().request_id) == home
    });
    at_home.next().unwrap()
}

/// A name with this prefix whose tasks belong to this shard.
fn name_at(engine: &Engine, function: &str, shard: ShardId, prefix: &str) -> String {
    let names = (0..).map(|number| format!("{prefix}-{number}"));
    let mut there = names.filter(|name| match submit(engine, function, name) {
        Ok(accepted) => shard_of_task(accepted.request_id) == shard,
        Err(error) => error.code == Code::Unavailable,
    });
    there.next().unwrap()
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.path(), fs::read(entry.path()).unwrap()))
        .collect()
}

/// Flips a bit where these bytes stand in a folder; the file and the place.
fn damage(folder: &Path, bytes: &[u8]) -> (PathBuf, u64) {
    let found = files(folder).into_iter().find_map(|(path, file)| {
        let at = file.windows(bytes.len()).position(|w| w == bytes)?;
        Some((path, at as u64))
    });
    let (path, at) = found.unwrap();
    flip(&path, at);
    (path, at)
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn only_quarantined(engine: &Engine) -> (ShardId, RecoverError) {
    let all: Vec<_> = engine.quarantined().cloned().collect();
    let [one] = &all[..] else {
        panic!("{all:?}");
    };
    (one.shard, one.error.clone())
}

fn unavailable<T: std::fmt::Debug>(result: Result<T, Error>) -> &'static str {
    let error = result.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    error.what
}

#[test]
fn a_damaged_log_of_one_shard_is_named_and_left_as_it_is_and_the_others_serve() {
    for hurt in (0..SHARDS).map(ShardId) {
        let folder = folder();
        let directory = folder.path();
        let engine = open(directory).unwrap();
        assert_eq!(engine.quarantined().count(), 0);
        let homeless = function_at(&engine, hurt, "homeless");
        set(&engine, "f", 0).unwrap();
        let names: Vec<String> = (0..60).map(|number| format!("n{number}")).collect();
        let accepted: Vec<RequestId> = names
            .iter()
            .map(|name| submit(&engine, "f", name).unwrap().request_id)
            .collect();
        let here: Vec<&String> = names
            .iter()
            .zip(&accepted)
            .filter(|(_, request)| shard_of_task(**request) == hurt)
            .map(|(name, _)| name)
            .collect();
        assert!(here.len() > 4);
        assert!(engine.close(PATIENCE).complete);
        drop(engine);
        let log = shard_folder(directory, hurt.0);
        let (path, at) = damage(&log, format!("<<f/{}>>", here[2]).as_bytes());
        let before = files(&log);

        let engine = open(directory).unwrap();
        let (shard, error) = only_quarantined(&engine);
        let (file, segment, offset) = error.place().unwrap();
        assert_eq!((shard, segment), (hurt, 1), "{error}");
        assert_eq!(file, path.file_name().unwrap().to_str().unwrap());
        assert!(offset <= at && at - offset < 64 << 10, "{error}; {at}");
        // What is the shard's is refused with what to do.
        let what = unavailable(engine.get("acme", &format!("f/{}", here[0])));
        assert!(what.contains("restored"), "{what}");
        unavailable(engine.stop("acme", &format!("f/{}", here[1])));
        let fresh = name_at(&engine, "f", hurt, "fresh");
        unavailable(submit(&engine, "f", &fresh));
        // The rest is there and runs; so do tasks without a name whose function is at home there.
        let run = |job: &pelton_engine::embedded::Job| Ok(job.payload.clone());
        engine.function("acme", "f", 2, run).unwrap();
        engine.function("acme", &homeless, 2, run).unwrap();
        for (name, request) in names.iter().zip(&accepted) {
            if shard_of_task(*request) != hurt {
                let ended = engine.wait("acme", &format!("f/{name}"), PATIENCE).unwrap();
                assert_eq!(ended.view.state, State::Succeeded);
                assert_eq!(ended.result, format!("<<f/{name}>>").into_bytes());
            }
        }
        let unnamed = engine.submit(Task::new("acme", &homeless, "x")).unwrap();
        assert_ne!(shard_of_task(unnamed.request_id), hurt);
        let id = unnamed.request_id.to_string();
        let ended = engine.wait("acme", &id, PATIENCE).unwrap();
        assert_eq!(ended.view.state, State::Succeeded);
        // Configuration needs shard 0 alone.
        let changed = set(&engine, "later", 7);
        match hurt {
            ShardId(0) => assert!(unavailable(changed).contains("configuration")),
            ShardId(_) => changed.unwrap(),
        }
        assert!(engine.close(PATIENCE).complete);
        drop(engine);
        assert!(before == files(&log), "the damaged log was changed");

        flip(&path, at);
        let engine = open(directory).unwrap();
        assert_eq!(engine.quarantined().count(), 0);
        engine.function("acme", "f", 2, run).unwrap();
        for name in &names {
            let ended = engine.wait("acme", &format!("f/{name}"), PATIENCE).unwrap();
            assert_eq!(ended.view.state, State::Succeeded);
        }
        let ended = engine.get("acme", &id).unwrap();
        assert_eq!(ended.view.state, State::Succeeded, "it kept its id");
        if hurt != ShardId(0) {
            // The shard has learned what was changed without it: its tasks are taken there too.
            let name = name_at(&engine, "later", hurt, "late");
            assert!(submit(&engine, "later", &name).unwrap().duplicate);
        }
    }
}

#[test]
fn a_limit_whose_home_is_not_served_starts_nothing_until_it_is_lifted_or_the_home_is_back() {
    let folder = folder();
    let hurt = ShardId(1);
    let engine = open(folder.path()).unwrap();
    let homeless = function_at(&engine, hurt, "homeless");
    let housed = function_at(&engine, ShardId(2), "housed");
    for function in [&homeless, &housed] {
        set(&engine, function, 2).unwrap();
    }
    let mark = name_at(&engine, &homeless, hurt, "mark");
    submit(&engine, &homeless, "another").unwrap();
    engine.close(PATIENCE);
    drop(engine);
    let log = shard_folder(folder.path(), hurt.0);
    let (path, at) = damage(&log, format!("<<{homeless}/{mark}>>").as_bytes());

    let engine = open(folder.path()).unwrap();
    assert_eq!(only_quarantined(&engine).0, hurt);
    let (started, at_once, most) = <(Arc<AtomicU32>, Arc<AtomicU32>, Arc<AtomicU32>)>::default();
    let serve = |engine: &Engine| {
        let (started, at_once, most) = (started.clone(), at_once.clone(), most.clone());
        let handler = move |_: &pelton_engine::embedded::Job| {
            started.fetch_add(1, SeqCst);
            most.fetch_max(at_once.fetch_add(1, SeqCst) + 1, SeqCst);
            std::thread::sleep(Duration::from_millis(2));
            at_once.fetch_sub(1, SeqCst);
            Ok(Vec::new())
        };
        engine.function("acme", &homeless, 6, handler).unwrap();
    };
    serve(&engine);
    engine
        .function("acme", &housed, 2, |_| Ok(Vec::new()))
        .unwrap();
    let elsewhere = |function: &str| -> Vec<String> {
        let names = (0..).map(|number| format!("e{number}"));
        let there = names.filter(|name| match submit(&engine, function, name) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.code, Code::Unavailable);
                false
            }
        });
        there.take(12).collect()
    };
    let (held, running) = (elsewhere(&homeless), elsewhere(&housed));
    // A home that waits for the word of the shard that is not served waits for one lease term.
    for name in &running {
        let ended = engine.wait("acme", &format!("{housed}/{name}"), PATIENCE);
        assert_eq!(ended.unwrap().view.state, State::Succeeded);
    }
    assert_eq!(started.load(SeqCst), 0, "nobody knows what runs already");
    let waits = engine.get("acme", &format!("{homeless}/{}", held[0]));
    assert_eq!(waits.unwrap().view.state, State::Enqueued);
    // Whoever knows better lifts the limit.
    set(&engine, &homeless, 0).unwrap();
    for name in &held[..6] {
        let ended = engine.wait("acme", &format!("{homeless}/{name}"), PATIENCE);
        assert_eq!(ended.unwrap().view.state, State::Succeeded);
    }
    set(&engine, &homeless, 2).unwrap();
    engine.close(PATIENCE);
    drop(engine);

    flip(&path, at);
    let engine = open(folder.path()).unwrap();
    most.store(0, SeqCst);
    serve(&engine);
    for name in (0..20).map(|number| format!("again{number}")) {
        submit(&engine, &homeless, &name).unwrap();
    }
    let mut names: Vec<String> = (0..20).map(|number| format!("again{number}")).collect();
    names.push(mark);
    for name in names {
        let ended = engine.wait("acme", &format!("{homeless}/{name}"), PATIENCE);
        assert_eq!(ended.unwrap().view.state, State::Succeeded);
    }
    assert!(most.load(SeqCst) <= 2, "the limit holds again");
}

#[test]
fn a_folder_that_is_gone_or_empty_or_holds_anothers_file_is_quarantined() {
    let folder = folder();
    let directory = folder.path();
    let engine = open(directory).unwrap();
    set(&engine, "f", 0).unwrap();
    engine.close(PATIENCE);
    drop(engine);
    let (log, away) = (shard_folder(directory, 2), directory.join("away"));
    let segment = |shard| shard_folder(directory, shard).join("segment-000001.plt");
    let quarantined = |check: &dyn Fn(&RecoverError) -> bool| {
        let engine = open(directory).unwrap();
        let (shard, error) = only_quarantined(&engine);
        assert!(shard == ShardId(2) && check(&error), "{error}");
        assert!(engine.close(PATIENCE).complete);
        error.to_string()
    };
    fs::rename(&log, &away).unwrap();
    let said = quarantined(&|error| matches!(error, RecoverError::Device(_)));
    assert!(said.contains("shard-002"), "{said}");
    // As a mount point whose disk is not mounted.
    fs::create_dir(&log).unwrap();
    let said = quarantined(&|error| matches!(error, RecoverError::Corrupt { .. }));
    assert!(said.contains("mounted"), "{said}");
    assert_eq!(files(&log).len(), 0, "no log is begun in its place");
    fs::copy(segment(0), segment(2)).unwrap();
    quarantined(&|error| matches!(error, RecoverError::Foreign { .. }));
    fs::remove_dir_all(&log).unwrap();
    fs::rename(&away, &log).unwrap();
    assert_eq!(open(directory).unwrap().quarantined().count(), 0);
}

#[test]
fn an_engine_without_one_sound_log_or_of_another_version_does_not_start() {
    let folder = folder();
    let directory = folder.path();
    let engine = open(directory).unwrap();
    set(&engine, "f", 0).unwrap();
    for number in 0..40 {
        submit(&engine, "f", &format!("n{number}")).unwrap();
    }
    engine.close(PATIENCE);
    drop(engine);
    let mut places = Vec::new();
    for shard in 0..SHARDS {
        places.push(damage(&shard_folder(directory, shard), b"acme"));
    }
    let Err(OpenError::Recover(shards)) = open(directory) else {
        panic!("no shard can serve");
    };
    let named: Vec<u16> = shards.iter().map(|quarantine| quarantine.shard.0).collect();
    assert_eq!(named, [0, 1, 2]);
    let text = OpenError::Recover(shards).to_string();
    assert_eq!(text.lines().count(), 3, "{text}");
    for (line, (path, _)) in text.lines().zip(&places) {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            line.contains(name) && line.contains("byte offset "),
            "{line}"
        );
    }
    for (path, at) in places {
        flip(&path, at);
    }
    // A header of a later version, with a checksum that holds.
    let path = shard_folder(directory, 1).join("segment-000001.plt");
    let whole = fs::read(&path).unwrap();
    let mut newer = whole.clone();
    for copy in [0, 4096] {
        let block = &mut newer[copy..copy + 4096];
        block[4] += 1;
        block[8..12].fill(0);
        let crc = crc32c::crc32c(block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(&path, &newer).unwrap();
    let error = open(directory).unwrap_err();
    assert!(error.to_string().contains("start the version"), "{error}");
    fs::write(&path, &whole).unwrap();
    assert_eq!(open(directory).unwrap().quarantined().count(), 0);
}
