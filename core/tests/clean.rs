//! Cleaning: what lives in the log's oldest segments is moved forward, the segments go, and a start that never sees them
//! finds everything as it was. The audit runs after every step.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[expect(dead_code, reason = "`core/tests/shard.rs` uses the rest of it")]
mod rig;

use pelton_core::limits::CLEAN_BYTES_STEP;
use pelton_core::{
    config::{FunctionConfig, OnFailure},
    error::Code,
    event::{Query, Reply, Start, SubmitBatch, Target, TaskView, Verdict},
    id::{FunctionId, RequestId},
    record::{Record, read_whole},
    shard::Options,
    state::State,
};
use rig::Rig;

const SEGMENT_BYTES: u64 = 4 << 20;

fn rig(finished_max: u32) -> Rig {
    Rig::new(Options {
        segment_bytes: SEGMENT_BYTES,
        finished_max,
        ..Options::default()
    })
}

/// Writes and ends as many tasks as fill this many segments.
fn churn(rig: &mut Rig, function: FunctionId, segments: u64) {
    let until = rig.shard.retire_before().0 / SEGMENT_BYTES + segments;
    while rig.log.last().unwrap().0 / SEGMENT_BYTES < until {
        rig.accept(function, &[7; 100_000]);
        for (request, token, _) in rig.executes() {
            rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
        }
        rig.advance(1);
    }
}

fn view(rig: &mut Rig, request: RequestId) -> TaskView {
    let target = Target::Request(request);
    match rig.query(Query::Get { target }) {
        Reply::Task { view } => view,
        other => panic!("{other:?}"),
    }
}

fn payload(rig: &mut Rig, request: RequestId) -> Vec<u8> {
    let (position, bytes) = view(rig, request).record;
    let record = rig.read(position, bytes);
    let task = pelton_core::record::read_task(&record).unwrap();
    assert_eq!(task.request(), request);
    task.payload.to_vec()
}

fn delayed(batch: SubmitBatch, delay_ms: u64) -> SubmitBatch {
    let mut batch = batch;
    batch.tasks[0].start = Start::DelayMs(delay_ms);
    batch
}

#[test]
fn what_lives_in_old_segments_outlives_them_and_a_start_finds_it_as_it_was() {
    let mut rig = rig(8);
    let config = FunctionConfig {
        backoff_ms_min: 3_600_000,
        backoff_ms_max: 3_600_000,
        ..FunctionConfig::default()
    };
    let slow = rig.function("acme", "slow", config);
    let idle = rig.function("acme", "idle", config);
    let busy = rig.function("noisy", "busy", FunctionConfig::default());
    let month = 30 * 86_400_000;
    let batch = delayed(rig.task(idle, "later", "", b"later"), month);
    let later = rig.submit(batch).request;
    let waiting: Vec<RequestId> = (0..20u8).map(|n| rig.accept(idle, &[n; 300])).collect();
    rig.lend(slow, 2);
    let key: Vec<RequestId> = (0..4u8)
        .map(|n| rig.submit(rig.task(slow, "", "k", &[n])).request)
        .collect();
    let running = rig.executes()[0].clone();
    assert_eq!(running.0, key[0]);
    let retrying = rig.accept(slow, b"again");
    let (_, token, _) = rig.executes()[0].clone();
    rig.outcome(retrying, token, Verdict::Failed, "no").unwrap();
    assert_eq!(rig.state(retrying), State::Retrying);
    let due_ms = view(&mut rig, retrying).due_ms;

    rig.lend(busy, 1);
    churn(&mut rig, busy, 12);
    let first = rig.shard.retire_before().0 / SEGMENT_BYTES;
    let last = rig.log.last().unwrap().0 / SEGMENT_BYTES;
    assert!(first > 2, "the segments of the first tasks are gone");
    assert!(last - first < 8, "{} segments are left", last - first + 1);

    for restart in [false, true, true] {
        if restart {
            rig.restart();
            assert_eq!(rig.shard.counters().recovered, 26);
        }
        assert_eq!(rig.state(later), State::Scheduled);
        assert_eq!(payload(&mut rig, later), b"later");
        for (n, &request) in waiting.iter().enumerate() {
            assert_eq!(rig.state(request), State::Enqueued);
            assert_eq!(payload(&mut rig, request), [n as u8; 300]);
        }
        assert_eq!(rig.state(key[0]), State::Running);
        assert_eq!(view(&mut rig, key[0]).token, running.1);
        assert_eq!(rig.state(key[1]), State::Enqueued);
        let again = view(&mut rig, retrying);
        assert_eq!(
            (
                again.state,
                again.retries,
                again.due_ms,
                again.token.attempt
            ),
            (State::Retrying, 1, due_ms, 1)
        );
        let answer = rig.submit(delayed(rig.task(idle, "later", "", b"later"), month));
        assert_eq!((answer.request, answer.duplicate), (later, true));
    }
    // The key goes on in its order, and so does the lane.
    rig.lend(slow, 2);
    rig.outcome(running.0, running.1, Verdict::Succeeded, "")
        .unwrap();
    for &next in &key[1..] {
        let (request, token, _) = rig.executes()[0].clone();
        assert_eq!(request, next);
        rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
    }
    rig.lend(idle, 1);
    for &next in &waiting {
        let (request, token, _) = rig.executes()[0].clone();
        assert_eq!(request, next);
        rig.outcome(request, token, Verdict::Succeeded, "").unwrap();
    }
}

#[test]
fn a_finished_task_keeps_its_result_when_its_records_are_moved() {
    let mut rig = rig(64);
    let busy = rig.function("noisy", "busy", FunctionConfig::default());
    let held = rig.function(
        "noisy",
        "held",
        FunctionConfig {
            retries: 0,
            on_failure: OnFailure::Hold,
            ..FunctionConfig::default()
        },
    );
    rig.lend(busy, 1);
    let done = rig.accept(busy, b"first");
    let (_, token, _) = rig.executes()[0].clone();
    rig.outcome(done, token, Verdict::Succeeded, "the result")
        .unwrap();
    rig.lend(held, 1);
    let failed = rig.submit(rig.task(held, "", "k", b"1")).request;
    let (_, token, _) = rig.executes()[0].clone();
    rig.outcome(failed, token, Verdict::Failed, "broken")
        .unwrap();
    let behind = rig.submit(rig.task(held, "", "k", b"2")).request;
    let later = rig
        .submit(delayed(rig.task(busy, "", "", b"l"), 86_400_000))
        .request;
    // Leases of one task that is given back again and again fill the log with what is dead at once.
    rig.lend(busy, 1);
    let restless = rig.accept(busy, b"restless");
    for _ in 0..5_000 {
        let (request, token, _) = rig.executes()[0].clone();
        assert_eq!(request, restless);
        rig.outcome(request, token, Verdict::Rejected, "").unwrap();
        rig.advance(100);
    }
    assert!(rig.shard.retire_before().0 >= 2 * SEGMENT_BYTES);
    for restart in [false, true] {
        if restart {
            rig.restart();
        }
        assert_eq!(rig.state(later), State::Scheduled);
        assert_eq!(rig.state(behind), State::Enqueued);
        let kept = view(&mut rig, failed);
        assert_eq!(kept.state, State::Failed);
        let record = rig.read(kept.outcome, 4096);
        let Ok(Record::RelocatedOutcome(moved)) = read_whole(&record) else {
            panic!("the outcome was moved")
        };
        assert_eq!(&*moved.outcome.error, "broken");
    }
    rig.lend(held, 1);
    assert!(rig.executes().is_empty(), "the failure still holds the key");
}

#[test]
fn a_task_and_its_outcome_are_moved_together_and_found_again() {
    let together = (0..10).map(ends_in_front_of_its_record).max();
    assert!(
        together.is_some_and(|bytes| bytes > 0),
        "both stood in what one step of cleaning looks at"
    );
}

/// A task ends so many turns after a segment has begun to which cleaning moves its record some turns later. Both are moved
/// on from there, the outcome first. How close to each other they were is told, 0 for not close.
fn ends_in_front_of_its_record(turns: u32) -> u64 {
    let mut rig = rig(64);
    let busy = rig.function("noisy", "busy", FunctionConfig::default());
    rig.lend(busy, 2);
    let restless = rig.accept(busy, b"restless");
    let (mut kept, mut turns_left, mut together) = (None, turns, 0);
    while rig.log.last().unwrap().0 < 10 * SEGMENT_BYTES {
        // Leases that are given back fill the log with what is dead at once.
        for (request, token, _) in rig.executes() {
            if request == restless {
                rig.outcome(request, token, Verdict::Rejected, "").unwrap();
            } else {
                kept = Some((request, token));
            }
        }
        rig.advance(10);
        let head = rig.log.last().unwrap().0;
        let Some((request, token)) = kept else {
            // Its record is among the last of the first segment: cleaning takes some turns to come to it.
            if head > SEGMENT_BYTES * 2 / 5 && rig.shard.counters().accepted == 1 {
                rig.accept(busy, b"kept");
            }
            continue;
        };
        if head < 4 * SEGMENT_BYTES {
            continue;
        }
        if turns_left > 0 {
            turns_left -= 1;
            continue;
        }
        let ended = rig.shard.counters().succeeded > 0;
        if !ended {
            rig.outcome(request, token, Verdict::Succeeded, "the result")
                .unwrap();
        }
        let now = view(&mut rig, request);
        if now.outcome < now.record.0 && now.record.0.0 - now.outcome.0 < CLEAN_BYTES_STEP as u64 {
            together = now.record.0.0 - now.outcome.0;
        }
        assert!(rig.replayed().holds(request), "{turns}: {now:?}");
    }
    together
}

#[test]
fn a_name_outlives_its_forgotten_task_for_its_window() {
    let mut rig = rig(1);
    let busy = rig.function("noisy", "busy", FunctionConfig::default());
    rig.lend(busy, 1);
    let named = rig
        .submit(rig.task(busy, "order-1", "k", b"payload"))
        .request;
    let (_, token, _) = rig.executes()[0].clone();
    rig.outcome(named, token, Verdict::Succeeded, "").unwrap();
    churn(&mut rig, busy, 10);
    assert!(rig.shard.retire_before().0 >= 2 * SEGMENT_BYTES);
    for restart in [false, true, true] {
        if restart {
            rig.restart();
            rig.lend(busy, 1);
        }
        let answer = rig.submit(rig.task(busy, "order-1", "k", b"payload"));
        assert_eq!(
            (answer.code, answer.duplicate, answer.request),
            (Code::Ok, true, named)
        );
        let other = rig.submit(rig.task(busy, "order-1", "k", b"another"));
        assert_eq!(other.code, Code::IdReused);
    }
    rig.advance(86_400_000);
    let answer = rig.submit(rig.task(busy, "order-1", "k", b"payload"));
    assert!(!answer.duplicate && answer.request != named);
}
