//! What has ended is handed to history and stays until history has it. The audit runs after every step.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[expect(dead_code, reason = "`core/tests/shard.rs` uses the rest of it")]
mod rig;

use pelton_core::{
    config::FunctionConfig,
    error::Code,
    event::{Control, EndedBatch, Filter, Query, Reply, Start, Target, Verdict},
    id::{FunctionId, Lsn, RequestId},
    shard::Options,
    state::State,
};
use rig::Rig;

const SEGMENT_BYTES: u64 = 4 << 20;

fn rig(options: Options) -> Rig {
    Rig::new(Options {
        segment_bytes: SEGMENT_BYTES,
        history_lag_max: 1 << 40,
        ..options
    })
}

/// Asks as the one who keeps ended tasks does.
fn ask(rig: &mut Rig, saved: u32, again: bool, rows_max: u32) -> EndedBatch {
    let control = Control::History {
        saved,
        again,
        rows_max,
        bytes_max: 1 << 30,
    };
    rig.inbox.control.push_back(control);
    rig.settle();
    rig.ended.take().expect("history is answered")
}

fn requests(batch: &EndedBatch) -> Vec<RequestId> {
    batch.rows.iter().map(|row| row.view.request).collect()
}

/// Tasks that have ended, in the order of their ends.
fn ended(rig: &mut Rig, function: FunctionId, count: usize) -> Vec<RequestId> {
    let accepted: Vec<RequestId> = (0..count)
        .map(|n| rig.accept(function, &[n as u8]))
        .collect();
    for (request, token, _) in rig.executes() {
        rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
    }
    accepted
}

fn is_held(rig: &mut Rig, request: RequestId) -> bool {
    let target = Target::Request(request);
    match rig.query(Query::Get { target }) {
        Reply::Task { view } => view.request == request,
        Reply::NotHeld { request: known } => {
            assert_eq!(known, Some(request));
            false
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_has_ended_stays_until_history_has_it_and_is_handed_out_in_order() {
    let mut rig = rig(Options {
        finished_max: 2,
        ..Options::default()
    });
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 64);
    let tasks = ended(&mut rig, function, 10);
    assert_eq!(rig.shard.counters().unsaved, 10);
    assert!(tasks.iter().all(|&task| is_held(&mut rig, task)));

    let first = ask(&mut rig, 0, false, 4);
    assert_eq!(requests(&first), tasks[..4]);
    assert_eq!(first.rows[0].view.state, State::Succeeded);
    assert!(first.rows[0].view.ended_ms >= first.rows[0].view.request.accepted_ms());
    let second = ask(&mut rig, 0, false, 100);
    assert_eq!(requests(&second), tasks[4..]);
    assert!(second.through > first.through && second.through > first.rows[3].view.outcome);
    // Nothing is safe yet, and nothing has gone; what could not be read is handed out again.
    assert_eq!(rig.shard.counters().finished, 10);
    let third = ask(&mut rig, 3, true, 100);
    assert_eq!(requests(&third), tasks[3..]);
    assert_eq!(rig.shard.counters().unsaved, 7);
    for (at, &task) in tasks.iter().enumerate() {
        assert_eq!(is_held(&mut rig, task), at >= 3, "task {at}");
    }
    let rest = ask(&mut rig, 7, false, 100);
    assert!(rest.rows.is_empty());
    let counters = rig.shard.counters();
    assert_eq!(
        (counters.unsaved, counters.unsaved_bytes, counters.finished),
        (0, 0, 2)
    );
    assert!(is_held(&mut rig, tasks[9]) && !is_held(&mut rig, tasks[0]));
}

#[test]
fn a_start_hands_out_what_history_does_not_have_and_nothing_else() {
    let mut rig = rig(Options::default());
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 64);
    let tasks = ended(&mut rig, function, 6);
    let delayed = {
        let mut batch = rig.task(function, "", "", b"later");
        batch.tasks[0].start = Start::DelayMs(1_000_000);
        rig.submit(batch).request
    };
    let target = Target::Request(delayed);
    rig.query(Query::Stop {
        target,
        grace_ms: 1_000,
    });
    let batch = ask(&mut rig, 0, false, 100);
    assert_eq!(requests(&batch)[..6], tasks);
    assert_eq!(
        requests(&batch)[6],
        delayed,
        "a stop ends a task without an outcome"
    );
    assert_eq!(batch.rows[6].view.outcome, Lsn(0));

    // Nobody has saved it.
    rig.restart();
    let again = ask(&mut rig, 0, false, 100);
    assert_eq!(requests(&again), requests(&batch));
    assert_eq!(again.rows[6].view.ended_ms, batch.rows[6].view.ended_ms);
    assert!(again.may_be_saved);
    // Somebody has.
    rig.history_saved = again.through;
    rig.lend(function, 64);
    let more = ended(&mut rig, function, 2);
    rig.restart();
    let rest = ask(&mut rig, 0, false, 100);
    assert_eq!(requests(&rest), more);
    // Somebody has saved what stands behind the end of this log: it is an older one, and says nothing of what is saved.
    rig.history_saved = Lsn(rig.log.last().unwrap().0 + (1 << 30));
    rig.restart();
    let all = ask(&mut rig, 0, false, 100);
    assert_eq!(requests(&all).len(), requests(&batch).len() + more.len());
    assert!(all.may_be_saved);
}

#[test]
fn the_log_keeps_what_history_lacks_and_submits_are_refused_when_that_is_too_much() {
    let mut rig = Rig::new(Options {
        segment_bytes: 2 * SEGMENT_BYTES,
        finished_max: 1,
        history_lag_max: 20 << 20,
        ..Options::default()
    });
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 64);
    let mut accepted = Vec::new();
    let refused = loop {
        let answer = rig.submit(rig.task(function, "", "", &[7; 100_000]));
        if answer.code != Code::Ok {
            break answer;
        }
        accepted.push(answer.request);
        for (request, token, _) in rig.executes() {
            rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
        }
        assert!(accepted.len() < 1_000, "it is refused at last");
    };
    assert_eq!(refused.code, Code::ResourceExhausted);
    assert!(refused.what.contains("history_lag_max"), "{}", refused.what);
    let lag = rig.shard.counters().unsaved_bytes;
    assert!(lag > 20 << 20 && lag < 21 << 20, "{lag}");
    assert_eq!(rig.shard.retire_before(), Lsn(0), "nothing has gone");

    let batch = ask(&mut rig, 0, false, 1_000);
    assert_eq!(requests(&batch), accepted);
    for row in &batch.rows {
        let record = rig.read(row.view.record.0, row.view.record.1);
        let task = pelton_core::record::read_task(&record).unwrap();
        assert_eq!(task.request(), row.view.request);
    }
    ask(&mut rig, accepted.len() as u32, false, 0);
    rig.accept(function, b"there is room again");
    assert!(rig.shard.retire_before() > Lsn(0), "the log is let go");
}

#[test]
fn a_record_that_is_moved_is_handed_out_where_it_stands_and_the_time_of_an_end_is_kept() {
    let mut rig = rig(Options {
        finished_max: 1,
        ..Options::default()
    });
    let function = rig.function("acme", "f", FunctionConfig::default());
    let idle = rig.function("acme", "idle", FunctionConfig::default());
    let stopped = rig.accept(idle, b"stopped");
    rig.advance(5_000);
    let target = Target::Request(stopped);
    rig.query(Query::Stop {
        target,
        grace_ms: 1_000,
    });
    let before = ask(&mut rig, 0, false, 1).rows[0];
    assert_eq!(before.view.ended_ms, stopped.accepted_ms() + 5_000);
    // Others end and are saved behind it, until cleaning moves it; it itself is not.
    rig.lend(function, 64);
    let mut batch = ask(&mut rig, 0, true, 1);
    while batch.rows[0].view.record == before.view.record {
        for _ in 0..40 {
            rig.accept(function, &[7; 100_000]);
        }
        let executes = rig.executes();
        for (request, token, _) in executes {
            rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
        }
        // The first one is never safe, so all stay: only names and moves let the log go on.
        rig.advance(100);
        batch = ask(&mut rig, 0, true, 1);
        assert!(rig.log.len() < 100_000);
        if rig.shard.counters().unsaved > 400 {
            break;
        }
    }
    rig.restart();
    let after = ask(&mut rig, 0, false, 1_000);
    let after = after.rows.iter().find(|row| row.view.request == stopped);
    let after = after.expect("it is handed out by every start until it is safe");
    assert_eq!(after.view.ended_ms, before.view.ended_ms);
}

#[test]
fn a_list_is_in_order_over_slots_that_were_used_again_and_goes_on_where_it_ended() {
    let mut rig = rig(Options {
        finished_max: 0,
        ..Options::default()
    });
    let function = rig.function("acme", "f", FunctionConfig::default());
    let idle = rig.function("acme", "idle", FunctionConfig::default());
    rig.lend(function, 64);
    let mut waiting = Vec::new();
    for n in 0..300u32 {
        waiting.push(rig.accept(idle, &n.to_le_bytes()));
        if n % 3 == 0 {
            // Its slot is free again at once.
            ended(&mut rig, function, 1);
            let handed = ask(&mut rig, 0, false, 10).rows.len() as u32;
            ask(&mut rig, handed, false, 0);
        }
        if n % 50 == 0 {
            rig.advance(1);
        }
    }
    waiting.reverse();
    let mut listed = Vec::new();
    let mut before = u128::MAX;
    loop {
        let filter = Filter {
            before,
            limit: 7,
            ..Filter::default()
        };
        let Reply::Page { views, pages } = rig.query(Query::List { filter }) else {
            panic!("a list is answered with a page");
        };
        assert_eq!(pages, 0);
        let Some(last) = views.last() else { break };
        before = last.request.order();
        listed.extend(views.iter().map(|view| view.request));
    }
    assert_eq!(listed, waiting);
}
