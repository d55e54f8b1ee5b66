//! An embedding program takes a backup of its engine while it serves, and opens what is restored of it.

use std::{fs, ops::ControlFlow, time::Duration};

use pelton_core::{
    config::{FunctionConfig, Wish},
    state::State,
};
use pelton_engine::{
    BackupError, BackupOptions, Engine, Options, RestoreError, backup_offline, embedded::Task,
    restore, verify,
};

fn options() -> Options {
    Options {
        shards: Some(2),
        segment_bytes: 4 << 20,
        space_bytes_min: 0,
        ..Options::default()
    }
}

const EVER: Duration = Duration::from_secs(60);

#[test]
fn an_engine_is_backed_up_while_it_serves_and_opens_again_from_it() {
    // Not in /tmp, which may be in memory: the log wants a disk.
    let base = std::env::current_dir().unwrap().join("../target/test-data");
    fs::create_dir_all(&base).unwrap();
    let folder = tempfile::tempdir_in(base.canonicalize().unwrap()).unwrap();
    let data = folder.path().join("data");
    let engine = Engine::open_with(&data, options()).unwrap();
    let wish = Wish::SetFunction {
        tenant: "t".into(),
        name: "f".into(),
        config: FunctionConfig::default(),
    };
    engine.configure(wish).unwrap();
    let mut tasks = Vec::new();
    for number in 0..200 {
        let mut task = Task::new("t", "f", vec![number as u8; 20_000]);
        task.task_id = format!("n{number}");
        tasks.push(engine.submit(task).unwrap().request_id);
    }
    let target = folder.path().join("backup");
    let mut told = Vec::new();
    let backup = engine.backup_with(&target, &BackupOptions::default(), &mut |progress| {
        told.push(progress);
        ControlFlow::Continue(())
    });
    let backup = backup.unwrap();
    assert!(told.is_sorted_by_key(|progress| progress.bytes) && told.len() > 1);
    let last = told.last().unwrap();
    assert!(
        last.bytes == last.bytes_total && last.bytes > 4_000_000,
        "{last:?}"
    );
    let live: u64 = backup.shards.iter().map(|shard| shard.counts.live).sum();
    assert_eq!(live, 200);
    assert_eq!(
        verify(&target, &mut |_| ControlFlow::Continue(())).unwrap(),
        backup
    );

    // One that is stopped leaves nothing, and the next one is taken.
    let second = folder.path().join("second");
    let stopped = engine.backup_with(&second, &BackupOptions::default(), &mut |_| {
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(BackupError::Stopped)), "{stopped:?}");
    assert!(!second.exists());
    fs::create_dir_all(second.join("lost+found")).unwrap();
    engine.backup(&second).unwrap();
    for (wrong, what) in [
        (target.clone(), "not empty"),
        (data.join("x"), "inside the data directory"),
        ("here".into(), "absolute"),
    ] {
        let refused = engine.backup(&wrong).unwrap_err();
        assert!(refused.to_string().contains(what), "{refused}");
    }
    engine.close(EVER);
    assert!(matches!(
        engine.backup(folder.path().join("late")),
        Err(BackupError::Closing)
    ));
    drop(engine);

    // The directory that nobody uses gives the same tasks.
    let third = folder.path().join("third");
    let unused = backup_offline(&data, &third, &BackupOptions::default(), &mut |_| {
        ControlFlow::Continue(())
    });
    let unused = unused.unwrap();
    let live: u64 = unused.shards.iter().map(|shard| shard.counts.live).sum();
    assert_eq!(live, 200);

    for (number, from) in [&target, &second, &third].into_iter().enumerate() {
        let data = folder.path().join(format!("restored-{number}"));
        restore(from, &data, &mut |_| ControlFlow::Continue(())).unwrap();
        let again = restore(from, &data, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(again, Err(RestoreError::Target { .. })));
        let engine = Engine::open_with(&data, options()).unwrap();
        for request in &tasks {
            let task = engine.get("t", &request.to_string()).unwrap();
            assert_eq!(task.view.state, State::Enqueued);
            assert_eq!(task.payload.len(), 20_000);
        }
        engine.close(EVER);
    }
    // One that was begun and did not end is nothing to start on.
    let data = folder.path().join("broken");
    let stopped = restore(&target, &data, &mut |progress| match progress.bytes
        > progress.bytes_total / 2
    {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert!(matches!(stopped, Err(RestoreError::Stopped)), "{stopped:?}");
    assert!(!data.exists());
}
