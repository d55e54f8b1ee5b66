//! What a shard promises, shown one promise a test on a log in memory. The audit runs after every step.

mod rig;

use pelton_core::{
    config::{Change, FunctionConfig, OnFailure, TenantConfig, Wish},
    error::Code,
    event::{Control, Effects, Outcome, OutcomeBatch, Query, Reply, Span, Start, Target, Verdict},
    id::{ConnectionId, FunctionId, RequestId, ShardId, TenantId, Token},
    limits::{STOP_GRACE_MS_DEFAULT, STOP_GRACE_MS_MAX},
    shard::Options,
    state::State,
    times::Part,
};
use rig::{CALLER, EXECUTOR, Rig, WORKER};

fn rig() -> Rig {
    Rig::new(Options {
        segment_bytes: 8 << 20,
        ..Options::default()
    })
}

#[test]
fn a_task_is_accepted_leased_and_finished_with_its_result() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 4);
    let request = rig.accept(function, b"hello");
    let [(leased, token, payload)] = &rig.executes()[..] else {
        panic!("one lease")
    };
    assert_eq!(
        (*leased, token.attempt, &payload[..]),
        (request, 1, &b"hello"[..])
    );
    assert_eq!(rig.state(request), State::Running);
    assert_eq!(
        rig.outcome(request, *token, Verdict::Succeeded, "world"),
        Ok(())
    );
    assert_eq!(
        rig.finished()[&request],
        (State::Succeeded, b"world".to_vec())
    );
    assert_eq!(
        rig.outcome(request, *token, Verdict::Succeeded, "again"),
        Err(Code::StaleLease)
    );
}

#[test]
fn a_lease_into_an_empty_lane_takes_one_flush() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let before = rig.log.len();
    rig.accept(function, b"x");
    assert_eq!(rig.log.len() - before, 1);
    assert_eq!(rig.executes().len(), 1);
}

#[test]
fn every_part_of_a_tasks_way_is_timed_and_they_add_up() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    let take = |rig: &mut Rig, ms: u64| {
        rig.now.mono_ns += ms * 1_000_000;
        rig.now.logged_ms += ms;
    };
    // One that waits for somebody to run it, and is read back then.
    rig.post(rig.task(function, "", "", b"waits"));
    rig.step(None);
    rig.advance(5);
    take(&mut rig, 20);
    rig.inbox.control.extend([
        Control::SessionOpened {
            executor: EXECUTOR,
            connection: WORKER,
        },
        Control::SlotsLent {
            executor: EXECUTOR,
            function,
            index: 0,
            count: 1,
        },
    ]);
    rig.step(None);
    take(&mut rig, 3);
    rig.step(None);
    rig.advance(4);
    let (request, token, _) = rig.executes()[0];
    take(&mut rig, 7);
    rig.run_us = 6_500;
    rig.post_outcome(request, token, Verdict::Succeeded, "");
    rig.step(None);
    rig.advance(2);
    let waited = [
        (Part::Durable, 5_000),
        (Part::Queued, 20_000),
        (Part::Fetched, 3_000),
        (Part::Dispatched, 4_000),
        (Part::Carried, 500),
        (Part::Run, 6_500),
        (Part::Delivered, 2_000),
        (Part::Total, 41),
    ];
    assert_eq!(std::mem::take(&mut rig.times), waited);

    // One that is leased as it is accepted, by an executor whose clock is fast.
    rig.post(rig.task(function, "", "", b"runs"));
    rig.step(None);
    rig.advance(6);
    let (request, token, _) = rig.executes()[0];
    take(&mut rig, 1);
    rig.run_us = u32::MAX;
    rig.post_outcome(request, token, Verdict::Succeeded, "");
    rig.step(None);
    rig.advance(2);
    let at_once = [
        (Part::Durable, 6_000),
        (Part::Queued, 0),
        (Part::Fetched, 0),
        (Part::Dispatched, 0),
        (Part::Carried, 0),
        (Part::Run, 1_000),
        (Part::Delivered, 2_000),
        (Part::Total, 9),
    ];
    assert_eq!(rig.times, at_once);
    for way in [waited, at_once] {
        let (total, parts) = way.split_last().unwrap();
        let sum: u64 = parts.iter().map(|part| part.1).sum();
        assert_eq!(sum, total.1 * 1_000);
    }
}

#[test]
fn time_behind_an_ordering_key_counts_as_waiting() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 2);
    for payload in [b"first", b"later"] {
        assert_eq!(
            rig.submit(rig.task(function, "", "order", payload)).code,
            Code::Ok
        );
    }
    rig.advance(10);
    let (request, token, _) = rig.executes()[0];
    let queued = |rig: &Rig| {
        let queued = rig.times.iter().filter(|time| time.0 == Part::Queued);
        queued.map(|time| time.1).collect::<Vec<u64>>()
    };
    assert_eq!(queued(&rig), [0]);
    assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
    assert_eq!(queued(&rig), [0, 10_000]);
}

#[test]
fn a_backlog_survives_a_restart_and_runs_in_order() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    let requests: Vec<RequestId> = (0..50u8).map(|n| rig.accept(function, &[n; 300])).collect();
    rig.restart();
    for &request in &requests {
        assert_eq!(rig.state(request), State::Enqueued);
    }
    rig.lend(function, 10);
    let mut ran = Vec::new();
    while ran.len() < 50 {
        let batch = rig.executes();
        assert!(!batch.is_empty() && batch.len() <= 10);
        for (request, token, payload) in batch {
            assert_eq!(payload, [ran.len() as u8; 300]);
            ran.push(request);
            assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
        }
    }
    assert_eq!(ran, requests);
}

#[test]
fn a_running_task_keeps_its_lease_over_a_restart() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let request = rig.accept(function, b"long");
    let (_, token, _) = rig.executes()[0].clone();
    rig.restart();
    assert_eq!(rig.state(request), State::Running);
    rig.inbox.control.push_back(Control::SessionOpened {
        executor: EXECUTOR,
        connection: WORKER,
    });
    let leases = vec![
        (request, token),
        (
            request,
            Token {
                attempt: 9,
                ..token
            },
        ),
    ];
    rig.inbox.control.push_back(Control::LeasesPresented {
        executor: EXECUTOR,
        connection: WORKER,
        ticket: 5,
        leases,
    });
    rig.settle();
    assert_eq!(
        rig.out.replies.pop().unwrap().2,
        Reply::Leases {
            kept: vec![(request, token)],
            known: vec![]
        }
    );
    rig.lend(function, 1);
    rig.advance(20_000);
    assert!(rig.executes().is_empty(), "it is not run again");
    assert_eq!(
        rig.outcome(request, token, Verdict::Succeeded, "done"),
        Ok(())
    );
    assert_eq!(rig.state(request), State::Succeeded);
}

#[test]
fn a_lost_executor_is_taken_over_after_one_term_and_its_late_answer_refused() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let request = rig.accept(function, b"x");
    let (_, old, _) = rig.executes()[0].clone();
    rig.inbox.control.push_back(Control::SessionLost {
        executor: EXECUTOR,
        connection: WORKER,
    });
    rig.settle();
    rig.advance(14_000);
    assert_eq!(rig.state(request), State::Running);
    rig.advance(2_000);
    rig.advance(1);
    assert_eq!(rig.state(request), State::Enqueued);
    let other = ConnectionId(3);
    rig.inbox.control.push_back(Control::SessionOpened {
        executor: 78,
        connection: other,
    });
    rig.inbox.control.push_back(Control::SlotsLent {
        executor: 78,
        function,
        index: 0,
        count: 1,
    });
    rig.settle();
    let (again, new, _) = rig.executes()[0].clone();
    assert_eq!((again, new.attempt), (request, 2));
    assert_eq!(
        rig.outcome(request, old, Verdict::Succeeded, "late"),
        Err(Code::StaleLease)
    );
    assert_eq!(rig.outcome(request, new, Verdict::Succeeded, "new"), Ok(()));
    assert_eq!(rig.finished()[&request].1, b"new");
}

#[test]
fn a_failure_is_retried_with_growing_waits_and_ends_as_failed() {
    let mut rig = rig();
    let config = FunctionConfig {
        retries: 2,
        backoff_ms_min: 100,
        backoff_ms_max: 1_000,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "flaky", config);
    rig.lend(function, 1);
    let request = rig.accept(function, b"x");
    for attempt in 1..=3 {
        let (_, token, _) = rig.executes()[0].clone();
        assert_eq!(token.attempt, attempt);
        assert_eq!(rig.outcome(request, token, Verdict::Failed, "boom"), Ok(()));
        if attempt < 3 {
            assert_eq!(rig.state(request), State::Retrying);
            if attempt == 1 {
                rig.restart();
                rig.lend(function, 1);
            }
            rig.advance(200);
        }
    }
    assert_eq!(rig.state(request), State::Failed);
}

#[test]
fn a_throttle_parks_the_lane_and_spends_no_retry() {
    let mut rig = rig();
    let function = rig.function(
        "acme",
        "busy",
        FunctionConfig {
            retries: 0,
            ..FunctionConfig::default()
        },
    );
    rig.lend(function, 1);
    let request = rig.accept(function, b"x");
    for attempt in 1..5 {
        let (_, token, _) = rig.executes()[0].clone();
        assert_eq!(token.attempt, attempt);
        assert_eq!(
            rig.outcome(
                request,
                token,
                Verdict::Throttled {
                    retry_after_ms: 500
                },
                ""
            ),
            Ok(())
        );
        rig.advance(499);
        assert!(rig.executes().is_empty());
        rig.advance(1);
    }
    let (_, token, _) = rig.executes()[0].clone();
    assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
    assert_eq!(rig.state(request), State::Succeeded);
}

#[test]
fn one_name_is_one_task_before_and_after_a_restart() {
    let mut rig = rig();
    let function = rig.function("acme", "order", FunctionConfig::default());
    let (a, b) = (
        rig.task(function, "o-1", "", b"same"),
        rig.task(function, "o-1", "", b"same"),
    );
    rig.post(a);
    rig.post(b);
    rig.settle();
    let [first, second] = &rig.out.answers[..] else {
        panic!("two answers")
    };
    assert_eq!((first.code, first.duplicate), (Code::Ok, false));
    assert_eq!(
        (second.code, second.duplicate, second.request),
        (Code::Ok, true, first.request)
    );
    let request = first.request;
    rig.restart();
    let again = rig.submit(rig.task(function, "o-1", "", b"same"));
    assert_eq!(
        (again.code, again.duplicate, again.request),
        (Code::Ok, true, request)
    );
    assert_eq!(
        rig.submit(rig.task(function, "o-1", "", b"other")).code,
        Code::IdReused
    );
    rig.advance(86_400_001);
    assert!(
        !rig.submit(rig.task(function, "o-1", "", b"other"))
            .duplicate,
        "the window is over"
    );
}

#[test]
fn a_key_runs_one_task_at_a_time_in_order() {
    let mut rig = rig();
    let function = rig.function(
        "acme",
        "ledger",
        FunctionConfig {
            backoff_ms_min: 50,
            ..FunctionConfig::default()
        },
    );
    rig.lend(function, 8);
    let mut requests = Vec::new();
    for n in 0..3u8 {
        requests.push(
            rig.submit(rig.task(function, "", "account-1", &[n]))
                .request,
        );
    }
    let other = rig
        .submit(rig.task(function, "", "account-2", b"z"))
        .request;
    let started: Vec<_> = rig.executes();
    assert_eq!(
        started.iter().map(|e| e.0).collect::<Vec<_>>(),
        [requests[0], other]
    );
    assert_eq!(
        rig.outcome(requests[0], started[0].1, Verdict::Failed, "once"),
        Ok(())
    );
    assert!(rig.executes().is_empty(), "its retry holds its key");
    rig.advance(1_000);
    for &request in &requests {
        let [(next, token, _)] = rig.executes().try_into().unwrap();
        assert_eq!(next, request);
        assert_eq!(rig.outcome(next, token, Verdict::Succeeded, ""), Ok(()));
    }
}

#[test]
fn a_failed_key_is_held_until_its_function_goes_on() {
    let mut rig = rig();
    let hold = FunctionConfig {
        retries: 0,
        on_failure: OnFailure::Hold,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "ledger", hold);
    rig.lend(function, 8);
    let first = rig.submit(rig.task(function, "", "k", b"1")).request;
    let second = rig.submit(rig.task(function, "", "k", b"2")).request;
    let (_, token, _) = rig.executes()[0].clone();
    assert_eq!(rig.outcome(first, token, Verdict::Failed, "no"), Ok(()));
    assert!(rig.executes().is_empty());
    rig.function(
        "acme",
        "ledger",
        FunctionConfig {
            on_failure: OnFailure::Continue,
            ..hold
        },
    );
    assert_eq!(rig.executes()[0].0, second);
}

#[test]
fn stopping_ends_waiting_tasks_at_once_and_running_ones_through_their_executor() {
    let mut rig = rig();
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 1);
    let running = rig.accept(function, b"1");
    let waiting = rig.accept(function, b"2");
    let (_, token, _) = rig.executes()[0].clone();
    let stop = |request| Query::Stop {
        target: Target::Request(request),
        grace_ms: STOP_GRACE_MS_DEFAULT,
    };
    assert_eq!(
        rig.query(stop(waiting)),
        Reply::Done {
            state: Some(State::Stopped)
        }
    );
    assert_eq!(
        rig.query(stop(running)),
        Reply::Done {
            state: Some(State::Stopping)
        }
    );
    assert_eq!(rig.out.cancels.pop().unwrap().request, running);
    assert_eq!(
        rig.outcome(running, token, Verdict::Succeeded, "too late"),
        Ok(())
    );
    assert_eq!(
        (rig.state(running), rig.state(waiting)),
        (State::Stopped, State::Stopped)
    );
    assert!(matches!(
        rig.query(stop(running)),
        Reply::Refused {
            code: Code::FailedPrecondition,
            ..
        }
    ));
    rig.restart();
    assert_eq!(
        (rig.state(running), rig.state(waiting)),
        (State::Stopped, State::Stopped)
    );
}

#[test]
fn the_grace_of_a_stop_goes_with_its_cancel_also_to_an_executor_that_was_away() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let request = rig.accept(function, b"x");
    let token = rig.executes()[0].1;
    let stop = |grace_ms| Query::Stop {
        target: Target::Request(request),
        grace_ms,
    };
    let refused = rig.query(stop(STOP_GRACE_MS_MAX + 1));
    assert!(
        matches!(&refused, Reply::Refused { code: Code::InvalidArgument, what } if what.contains("hour")),
        "{refused:?}"
    );
    assert_eq!(rig.state(request), State::Running);
    let graces = |rig: &mut Rig| -> Vec<u32> {
        let cancels = rig.out.cancels.drain(..);
        cancels.map(|cancel| cancel.grace_ms).collect()
    };
    rig.inbox.control.push_back(Control::SessionLost {
        executor: EXECUTOR,
        connection: WORKER,
    });
    rig.query(stop(STOP_GRACE_MS_MAX));
    assert!(graces(&mut rig).is_empty(), "nobody is there to hear it");
    for _ in 0..2 {
        rig.present(WORKER, &[(request, token)]);
        rig.settle();
        assert_eq!(graces(&mut rig), [STOP_GRACE_MS_MAX]);
    }
    rig.restart();
    rig.present(WORKER, &[(request, token)]);
    rig.settle();
    assert_eq!(graces(&mut rig), [STOP_GRACE_MS_DEFAULT]);
    assert_eq!(rig.outcome(request, token, Verdict::Stopped, ""), Ok(()));
    assert_eq!(rig.state(request), State::Stopped);
}

#[test]
fn tasks_expire_by_their_own_age_or_their_functions() {
    let mut rig = rig();
    let function = rig.function(
        "acme",
        "f",
        FunctionConfig {
            max_age_s: 10,
            ..FunctionConfig::default()
        },
    );
    let lane = rig.accept(function, b"1");
    let mut own = rig.task(function, "", "", b"2");
    own.tasks[0].max_age_s = 2;
    let own = rig.submit(own).request;
    rig.advance(2_100);
    assert_eq!(
        (rig.state(own), rig.state(lane)),
        (State::Expired, State::Enqueued)
    );
    rig.restart();
    rig.advance(8_000);
    assert_eq!(
        (rig.state(own), rig.state(lane)),
        (State::Expired, State::Expired)
    );
}

#[test]
fn a_delayed_task_waits_for_its_time() {
    let mut rig = rig();
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 1);
    let mut task = rig.task(function, "", "", b"later");
    task.tasks[0].start = Start::DelayMs(5_000);
    let request = rig.submit(task).request;
    assert_eq!(rig.state(request), State::Scheduled);
    rig.advance(4_999);
    assert!(rig.executes().is_empty());
    rig.restart();
    rig.lend(function, 1);
    rig.advance(1);
    assert_eq!(rig.executes()[0].0, request);
}

#[test]
fn an_attempt_that_takes_too_long_is_cancelled_and_its_slot_stays_taken_until_it_lets_go() {
    let mut rig = rig();
    let config = FunctionConfig {
        timeout_ms: 1_000,
        backoff_ms_min: 10,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "f", config);
    rig.lend(function, 1);
    let request = rig.accept(function, b"slow");
    let (_, token, _) = rig.executes()[0].clone();
    rig.advance(1_001);
    assert_eq!(rig.state(request), State::Retrying);
    assert_eq!(rig.out.cancels.pop().unwrap().token, token);
    rig.advance(1_000);
    assert!(rig.executes().is_empty(), "the only slot is still busy");
    assert_eq!(
        rig.outcome(request, token, Verdict::Stopped, ""),
        Err(Code::StaleLease)
    );
    assert_eq!(rig.executes()[0].1.attempt, 2);
}

#[test]
fn tenants_share_by_weight_and_one_flood_does_not_starve_another() {
    let mut rig = rig();
    let noisy = rig.function("noisy", "f", FunctionConfig::default());
    let quiet = rig.function("quiet", "f", FunctionConfig::default());
    rig.configure(Wish::SetTenant {
        name: "quiet".into(),
        config: TenantConfig {
            weight: 2,
            ..TenantConfig::default()
        },
    });
    for _ in 0..300 {
        rig.accept(noisy, b"n");
    }
    for _ in 0..30 {
        rig.accept(quiet, b"q");
    }
    rig.restart();
    rig.lend(noisy, 1);
    rig.lend(quiet, 1);
    let mut seen = [0; 2];
    while seen[1] < 30 {
        for (request, token, payload) in rig.executes() {
            seen[usize::from(payload == b"q")] += 1;
            assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
        }
    }
    assert!(seen[0] <= 35, "{seen:?}");
}

#[test]
fn concurrency_is_never_exceeded() {
    let mut rig = rig();
    let function = rig.function(
        "acme",
        "f",
        FunctionConfig {
            concurrency: 3,
            ..FunctionConfig::default()
        },
    );
    rig.lend(function, 100);
    for _ in 0..10 {
        rig.accept(function, b"x");
    }
    let running = rig.executes();
    assert_eq!(running.len(), 3);
    assert_eq!(
        rig.outcome(running[0].0, running[0].1, Verdict::Succeeded, ""),
        Ok(())
    );
    assert_eq!(rig.executes().len(), 1);
}

#[test]
fn a_tenants_bound_refuses_and_another_tenants_task_is_not_found() {
    let mut rig = rig();
    let function = rig.function("acme", "f", FunctionConfig::default());
    let other = rig.function("globex", "f", FunctionConfig::default());
    let config = TenantConfig {
        waiting_max: 2,
        ..TenantConfig::default()
    };
    rig.configure(Wish::SetTenant {
        name: "acme".into(),
        config,
    });
    rig.accept(function, b"1");
    rig.accept(function, b"2");
    let refused = rig.submit(rig.task(function, "", "", b"3"));
    assert_eq!(refused.code, Code::ResourceExhausted);
    assert!(refused.retry_after_ms > 0 && !refused.what.is_empty());
    let foreign = rig.accept(other, b"x");
    let get = Query::Get {
        target: Target::Request(foreign),
    };
    assert!(
        matches!(
            rig.query(get),
            Reply::NotHeld { request } if request == Some(foreign)
        ),
        "callers here are acme"
    );
    let mut wrong = rig.task(other, "", "", b"x");
    wrong.tenant = rig.task(function, "", "", b"").tenant;
    assert_eq!(rig.submit(wrong).code, Code::NotFound);
}

#[test]
fn a_deleted_function_invalidates_what_waits() {
    let mut rig = rig();
    let function = rig.function("acme", "f", FunctionConfig::default());
    let request = rig.accept(function, b"x");
    rig.configure(Wish::RemoveFunction {
        tenant: "acme".into(),
        name: "f".into(),
    });
    rig.advance(1);
    assert_eq!(rig.state(request), State::Invalid);
    assert_eq!(
        rig.submit(rig.task(function, "", "", b"y")).code,
        Code::NotFound
    );
}

#[test]
fn finished_tasks_let_old_segments_go_and_configuration_stays() {
    let mut rig = Rig::new(Options {
        segment_bytes: 4 << 20,
        finished_max: 10,
        ..Options::default()
    });
    let function = rig.function("acme", "f", FunctionConfig::default());
    rig.lend(function, 64);
    for _ in 0..60 {
        for _ in 0..20 {
            let batch = rig.task(function, "", "", &[7; 30_000]);
            rig.post(batch);
        }
        rig.settle();
        for (request, token, _) in rig.executes() {
            assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
        }
        rig.out = Default::default();
    }
    let dead = rig.shard.retire_before();
    assert!(dead.0 > 4 * (4 << 20), "{dead:?}");
    rig.log.retain(|(base, _)| *base >= dead.0);
    rig.restart();
    assert!(rig.shard.directory().function(function).unwrap().live);
    rig.lend(function, 1);
    let request = rig.accept(function, b"still works");
    assert_eq!(rig.executes()[0].0, request);
}

#[test]
fn a_failed_log_answers_unavailable() {
    let mut rig = rig();
    let function = rig.function("acme", "f", FunctionConfig::default());
    let batch = rig.task(function, "", "", b"x");
    rig.post(batch);
    rig.step(None);
    let mut effects = Effects::default();
    rig.shard.on_poisoned(&mut effects);
    assert_eq!(
        effects.edge(CALLER.edge()).answers[0].code,
        Code::Unavailable
    );
    let refused = rig.submit(rig.task(function, "", "", b"y"));
    assert_eq!(refused.code, Code::Unavailable);
}

#[test]
fn a_wish_is_answered_when_the_last_shard_reports_and_reports_of_others_do_not_count() {
    let mut rig = Rig::new(Options {
        shards: 2,
        segment_bytes: 8 << 20,
        ..Options::default()
    });
    let wish = Wish::EnsureTenant {
        name: "acme".into(),
    };
    rig.inbox.control.push_back(Control::Configure {
        connection: CALLER,
        ticket: 1,
        wish,
    });
    rig.settle();
    for version in [0, 1] {
        assert!(
            rig.out.replies.is_empty(),
            "the other shard has not logged it"
        );
        rig.inbox.control.push_back(Control::Applied {
            shard: ShardId(1),
            version,
        });
        rig.settle();
    }
    assert_eq!(
        rig.out.replies,
        [(CALLER, 1, Reply::Done { state: None })],
        "without any further flush"
    );
}

#[test]
fn a_name_given_again_after_its_window_keeps_its_second_window_over_a_restart() {
    let mut rig = Rig::new(Options {
        segment_bytes: 8 << 20,
        dedup_window_ms: 1_000,
        ..Options::default()
    });
    let function = rig.function("acme", "digest", FunctionConfig::default());
    let first = rig.submit(rig.task(function, "order", "", b"x"));
    rig.advance(1_500);
    let second = rig.submit(rig.task(function, "order", "", b"x"));
    assert!(!second.duplicate && second.request != first.request);
    rig.restart();
    rig.advance(500);
    let third = rig.submit(rig.task(function, "order", "", b"x"));
    assert_eq!((third.duplicate, third.request), (true, second.request));
}

/// A delayed task of a key is leased, and another one of the key waits behind it.
fn delayed_and_leased(rig: &mut Rig, config: FunctionConfig) -> (RequestId, Token, RequestId) {
    let function = rig.function("acme", "digest", config);
    let mut delayed = rig.task(function, "", "k", b"1");
    delayed.tasks[0].start = Start::DelayMs(10_000);
    let first = rig.submit(delayed).request;
    rig.lend(function, 4);
    rig.advance(10_000);
    let executes = rig.executes();
    assert_eq!((executes.len(), executes[0].0), (1, first));
    let second = rig.submit(rig.task(function, "", "k", b"2")).request;
    assert!(rig.executes().is_empty());
    (first, executes[0].1, second)
}

#[test]
fn a_delayed_task_that_runs_keeps_its_key_over_a_restart() {
    let mut rig = rig();
    let (first, token, second) = delayed_and_leased(&mut rig, FunctionConfig::default());
    rig.restart();
    let function = rig.shard.directory().function_id(TenantId(0), "digest");
    rig.lend(function.unwrap(), 4);
    assert!(rig.executes().is_empty(), "its key is taken");
    assert_eq!(rig.outcome(first, token, Verdict::Succeeded, ""), Ok(()));
    assert_eq!(rig.executes()[0].0, second);
}

#[test]
fn the_age_of_a_delayed_task_counts_from_when_it_was_due_over_a_restart_too() {
    let mut rig = rig();
    let config = FunctionConfig {
        max_age_s: 5,
        ..FunctionConfig::default()
    };
    let (first, token, _) = delayed_and_leased(&mut rig, config);
    rig.restart();
    assert_eq!(rig.outcome(first, token, Verdict::Failed, ""), Ok(()));
    assert_eq!(rig.state(first), State::Retrying);
    rig.advance(3_000);
    assert_eq!(rig.state(first), State::Enqueued);
    rig.advance(3_000);
    assert_eq!(rig.state(first), State::Expired);
}

#[test]
fn a_held_key_of_a_deleted_function_lets_its_tasks_go() {
    let mut rig = rig();
    let config = FunctionConfig {
        retries: 0,
        on_failure: OnFailure::Hold,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    rig.lend(function, 1);
    let first = rig.submit(rig.task(function, "", "k", b"1")).request;
    let second = rig.submit(rig.task(function, "", "k", b"2")).request;
    let token = rig.executes()[0].1;
    assert_eq!(rig.outcome(first, token, Verdict::Failed, ""), Ok(()));
    rig.advance(10);
    assert_eq!(rig.state(second), State::Enqueued);
    rig.configure(Wish::RemoveFunction {
        tenant: "acme".into(),
        name: "digest".into(),
    });
    rig.advance(10);
    assert_eq!(rig.state(second), State::Invalid);
}

#[test]
fn the_slot_of_an_attempt_that_timed_out_is_free_when_its_executor_comes_back() {
    let mut rig = rig();
    let config = FunctionConfig {
        retries: 0,
        timeout_ms: 1_000,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    rig.lend(function, 1);
    rig.accept(function, b"1");
    assert_eq!(rig.executes().len(), 1);
    rig.advance(2_000);
    rig.accept(function, b"2");
    assert!(rig.executes().is_empty(), "the executor has not let go");
    rig.lend(function, 1);
    rig.inbox.control.push_back(Control::LeasesPresented {
        executor: EXECUTOR,
        connection: WORKER,
        ticket: 1,
        leases: vec![],
    });
    rig.settle();
    assert_eq!(rig.executes().len(), 1);
}

#[test]
fn a_presented_lease_is_kept_or_known_or_neither() {
    let mut rig = rig();
    let config = FunctionConfig {
        retries: 1,
        backoff_ms_min: 60_000,
        backoff_ms_max: 60_000,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    rig.lend(function, 9);
    let lease = |rig: &mut Rig| {
        rig.accept(function, b"x");
        let (request, token, _) = rig.executes().pop().unwrap();
        (request, token)
    };
    let runs = lease(&mut rig);
    let succeeded = lease(&mut rig);
    rig.outcome(succeeded.0, succeeded.1, Verdict::Succeeded, "")
        .unwrap();
    let retrying = lease(&mut rig);
    rig.outcome(retrying.0, retrying.1, Verdict::Failed, "")
        .unwrap();
    let given_back = lease(&mut rig);
    rig.outcome(given_back.0, given_back.1, Verdict::Rejected, "")
        .unwrap();
    let wrong = Token {
        attempt: 9,
        ..runs.1
    };
    let leases = [runs, succeeded, retrying, given_back, (runs.0, wrong)];
    rig.present(ConnectionId(3), &leases);
    rig.settle();
    assert_eq!(
        rig.out.replies.pop().unwrap().2,
        Reply::Leases {
            kept: vec![runs],
            known: vec![succeeded, retrying],
        }
    );
}

#[test]
fn an_outcome_on_its_way_to_the_disk_is_called_known_when_it_is_there() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 9);
    let request = rig.accept(function, b"x");
    let token = rig.executes()[0].1;
    rig.post_outcome(request, token, Verdict::Succeeded, "");
    rig.step(None);
    // Its batch is being flushed, and nothing else is to follow.
    rig.present(WORKER, &[(request, token)]);
    rig.step(None);
    assert!(rig.out.replies.is_empty(), "it may still be lost");
    rig.settle();
    let known = Reply::Leases {
        kept: vec![],
        known: vec![(request, token)],
    };
    assert_eq!(rig.out.replies.pop().unwrap().2, known);
}

#[test]
fn a_lease_whose_stop_is_on_its_way_to_the_disk_is_kept_and_then_cancelled() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 9);
    let request = rig.accept(function, b"x");
    let token = rig.executes()[0].1;
    let again = ConnectionId(3);
    rig.inbox.control.push_back(Control::Query {
        connection: CALLER,
        ticket: 1,
        tenant: TenantId(0),
        query: Query::Stop {
            target: Target::Request(request),
            grace_ms: STOP_GRACE_MS_DEFAULT,
        },
    });
    rig.present(again, &[(request, token)]);
    rig.settle();
    let kept = Reply::Leases {
        kept: vec![(request, token)],
        known: vec![],
    };
    assert_eq!(rig.out.replies[0].2, kept);
    let cancels = rig.out.cancels.iter().map(|c| (c.connection, c.request));
    let cancels: Vec<_> = cancels.collect();
    assert_eq!(cancels, [(again, request)]);
}

#[test]
fn a_heartbeat_is_told_what_its_executor_has_lost() {
    let mut rig = rig();
    let config = FunctionConfig {
        timeout_ms: 60_000,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    rig.lend(function, 2);
    let lease = |rig: &mut Rig| {
        rig.accept(function, b"x");
        let (request, token, _) = rig.executes().pop().unwrap();
        (request, token)
    };
    let (runs, ended) = (lease(&mut rig), lease(&mut rig));
    rig.outcome(ended.0, ended.1, Verdict::Succeeded, "")
        .unwrap();
    let stale = (
        runs.0,
        Token {
            attempt: 9,
            ..runs.1
        },
    );
    let named = [runs, ended, stale];
    assert_eq!(rig.lost(EXECUTOR, &named), [ended, stale]);
    assert_eq!(rig.lost(EXECUTOR + 1, &named), named, "they were never its");
    rig.restart();
    let after = rig.lost(EXECUTOR, &named);
    assert_eq!(
        after,
        [ended, stale],
        "what it may still present is not lost"
    );

    // What takes too long is being cancelled; its outcome frees the slot.
    rig.present(WORKER, &[runs]);
    rig.settle();
    rig.advance(60_000);
    assert_eq!(rig.out.cancels.len(), 1);
    assert_eq!(rig.lost(EXECUTOR, &[runs]), []);
    assert!(rig.outcome(runs.0, runs.1, Verdict::Stopped, "").is_err());
    assert_eq!(rig.lost(EXECUTOR, &[runs]), [runs]);
}

#[test]
fn a_lease_whose_executor_connects_again_before_it_is_durable_is_given_anew() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    rig.post(rig.task(function, "", "", b"x"));
    rig.step(None);
    let again = ConnectionId(3);
    rig.inbox.control.extend([
        Control::SessionOpened {
            executor: EXECUTOR,
            connection: again,
        },
        Control::LeasesPresented {
            executor: EXECUTOR,
            connection: again,
            ticket: 1,
            leases: vec![],
        },
        Control::SlotsLent {
            executor: EXECUTOR,
            function,
            index: 0,
            count: 1,
        },
    ]);
    rig.step(None);
    rig.settle();
    let sent: Vec<_> = rig
        .out
        .executes
        .iter()
        .map(|e| (e.connection, e.token.attempt))
        .collect();
    assert_eq!(sent, [(WORKER, 1), (again, 2)]);
}

#[test]
fn the_age_of_a_finished_task_does_not_end_the_next_one_in_its_slot() {
    let mut rig = Rig::new(Options {
        segment_bytes: 8 << 20,
        finished_max: 1,
        ..Options::default()
    });
    let config = FunctionConfig {
        max_age_s: 10,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    let delayed = |rig: &mut Rig, delay_ms| {
        let mut task = rig.task(function, "", "", b"x");
        task.tasks[0].start = Start::DelayMs(delay_ms);
        rig.submit(task).request
    };
    let stop = |rig: &mut Rig, request| {
        let target = Target::Request(request);
        rig.query(Query::Stop {
            target,
            grace_ms: STOP_GRACE_MS_DEFAULT,
        });
    };
    let first = delayed(&mut rig, 8_000);
    rig.advance(8_000);
    stop(&mut rig, first);
    // The second end pushes the first task out of memory, and its slot is used again.
    let second = rig.accept(function, b"y");
    stop(&mut rig, second);
    let third = delayed(&mut rig, 5_000);
    assert_eq!(third.slot(), first.slot());
    rig.advance(10_500);
    assert_eq!(rig.state(third), State::Enqueued, "it is due since 5.5 s");
    rig.advance(5_000);
    assert_eq!(rig.state(third), State::Expired);
}

#[test]
fn tasks_whose_function_is_defined_later_in_the_log_count_for_their_own_tenant() {
    let mut rig = rig();
    let first = rig.function("acme", "digest", FunctionConfig::default());
    let second = rig.function("umbrella", "digest", FunctionConfig::default());
    let defined = rig.log.len();
    rig.lend(first, 1);
    rig.accept(second, b"1");
    let request = rig.accept(first, b"2");
    let token = rig.executes()[0].1;
    // As when configuration was written anew and the segments before it are gone.
    rig.log.rotate_left(defined);
    rig.restart();
    assert_eq!(rig.outcome(request, token, Verdict::Succeeded, ""), Ok(()));
    assert_eq!(rig.state(request), State::Succeeded);
}

#[test]
fn a_failed_log_refuses_everybody_who_waits() {
    let mut rig = Rig::new(Options {
        shards: 2,
        segment_bytes: 8 << 20,
        ..Options::default()
    });
    for (ticket, name) in [(1, "acme"), (2, "umbrella")] {
        rig.inbox.control.push_back(Control::Configure {
            connection: CALLER,
            ticket,
            wish: Wish::EnsureFunction {
                tenant: name.into(),
                name: "digest".into(),
            },
        });
    }
    rig.settle();
    let function = FunctionId(0);
    let request = rig.accept(function, b"x");
    let ask = |ticket, query| Control::Query {
        connection: CALLER,
        ticket,
        tenant: TenantId(0),
        query,
    };
    let target = Target::Request(request);
    let (wait, stop) = (
        Query::Wait {
            target: target.clone(),
        },
        Query::Stop {
            target,
            grace_ms: STOP_GRACE_MS_DEFAULT,
        },
    );
    rig.inbox.control.push_back(ask(3, wait));
    rig.inbox.control.push_back(ask(4, stop.clone()));
    rig.inbox.control.push_back(ask(5, stop));
    rig.step(None);
    assert!(rig.out.replies.is_empty());
    let mut effects = Effects::default();
    rig.shard.on_poisoned(&mut effects);
    let mut refused: Vec<u64> = effects.edges[0]
        .replies
        .iter()
        .filter(|(_, _, reply)| matches!(reply, Reply::Refused { code, .. } if *code == Code::Unavailable))
        .map(|&(_, ticket, _)| ticket)
        .collect();
    refused.sort_unstable();
    assert_eq!(refused, [1, 2, 3, 4, 5]);
    assert_eq!(rig.shard.next_wake_ns(), None);
}

#[test]
fn a_failed_log_has_outcomes_kept_and_holds_up_no_configuration() {
    let mut rig = Rig::new(Options {
        shard: ShardId(1),
        shards: 2,
        segment_bytes: 8 << 20,
        ..Options::default()
    });
    let change = |version| Control::Apply {
        version,
        change: Change::Tenant {
            id: TenantId(version as u32 - 1),
            name: format!("t{version}"),
            config: TenantConfig::default(),
        },
    };
    let outcomes = |ticket, count| {
        let outcome = Outcome {
            request: RequestId(7),
            token: Token::default(),
            verdict: Verdict::Succeeded,
            code: Code::Ok,
            run_us: 0,
            error: Span::default(),
            output: Span::default(),
            result: Span::default(),
        };
        Control::Outcomes(OutcomeBatch {
            connection: WORKER,
            ticket,
            outcomes: vec![outcome; count],
            bytes: Vec::new(),
            done: 0,
            refused: Vec::new(),
        })
    };
    // On their way to the disk when it fails, and later: a change, and outcomes of which none has a task.
    let mut effects = Effects::default();
    rig.inbox.control.extend([change(1), outcomes(1, 2)]);
    rig.step(None);
    rig.shard.on_poisoned(&mut effects);
    rig.inbox.control.extend([change(2), outcomes(2, 3)]);
    rig.step(None);
    let (acks, shards) = (&mut effects.edges[0].acks, &mut effects.shards);
    acks.append(&mut rig.out.acks);
    shards.append(&mut rig.sent);
    let applied: Vec<u64> = shards
        .iter()
        .filter_map(|(to, control)| match control {
            Control::Applied {
                shard: ShardId(1),
                version,
            } if *to == ShardId(0) => Some(*version),
            _ => None,
        })
        .collect();
    assert_eq!(applied, [1, 2]);
    let [first, second] = &acks[..] else {
        panic!("{acks:?}");
    };
    // What is stale is stale whatever the disk says; the rest is presented again.
    let stale = vec![(0, Code::StaleLease), (1, Code::StaleLease)];
    assert_eq!((first.ticket, &first.refused), (1, &stale));
    let kept: Vec<_> = (0..3).map(|index| (index, Code::Unavailable)).collect();
    assert_eq!((second.ticket, &second.refused), (2, &kept));
}

#[test]
fn a_task_being_stopped_has_stopped_when_its_executor_comes_back_without_it() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let request = rig.accept(function, b"x");
    assert_eq!(rig.executes().len(), 1);
    let target = Target::Request(request);
    rig.query(Query::Stop {
        target,
        grace_ms: STOP_GRACE_MS_DEFAULT,
    });
    assert_eq!(rig.state(request), State::Stopping);
    rig.inbox.control.push_back(Control::SessionOpened {
        executor: EXECUTOR,
        connection: ConnectionId(3),
    });
    rig.inbox.control.push_back(Control::LeasesPresented {
        executor: EXECUTOR,
        connection: ConnectionId(3),
        ticket: 1,
        leases: vec![],
    });
    rig.settle();
    assert_eq!(rig.state(request), State::Stopped);
}

#[test]
fn configuration_that_is_written_anew_does_not_undo_a_change_on_its_way_to_the_disk() {
    let mut rig = Rig::new(Options {
        segment_bytes: 4 << 20,
        finished_max: 1,
        ..Options::default()
    });
    let function = rig.function("acme", "digest", FunctionConfig::default());
    let before = rig.shard.retire_before();
    for round in 1..60 {
        let config = FunctionConfig {
            concurrency: round,
            ..FunctionConfig::default()
        };
        let wish = Wish::SetFunction {
            tenant: "acme".into(),
            name: "digest".into(),
            config,
        };
        rig.post(rig.task(function, "", "", &vec![0; 1 << 20]));
        rig.step(None);
        // The wish arrives with the flush, at which a new segment may begin and with it the writing anew.
        rig.inbox.control.push_back(Control::Configure {
            connection: CALLER,
            ticket: 2,
            wish,
        });
        rig.settle();
        let request = rig.out.answers.pop().expect("a submit is answered").request;
        rig.query(Query::Stop {
            target: Target::Request(request),
            grace_ms: STOP_GRACE_MS_DEFAULT,
        });
        let found = rig.shard.directory().function(function).unwrap().config;
        assert_eq!(found, config);
    }
    assert!(rig.shard.retire_before() > before, "segments were retired");
}

#[test]
fn nobody_but_its_executor_frees_the_slot_of_an_attempt_that_timed_out() {
    let mut rig = rig();
    let config = FunctionConfig {
        retries: 0,
        timeout_ms: 1_000,
        ..FunctionConfig::default()
    };
    let function = rig.function("acme", "digest", config);
    rig.lend(function, 1);
    let first = rig.accept(function, b"1");
    let token = rig.executes()[0].1;
    rig.advance(2_000);
    rig.accept(function, b"2");
    for (connection, sent) in [(ConnectionId(3), 0), (WORKER, 1)] {
        let outcome = Outcome {
            request: first,
            token,
            verdict: Verdict::Succeeded,
            code: Code::Ok,
            run_us: 0,
            error: Span::default(),
            output: Span::default(),
            result: Span::default(),
        };
        rig.inbox.control.push_back(Control::Outcomes(OutcomeBatch {
            connection,
            ticket: 1,
            outcomes: vec![outcome],
            bytes: vec![],
            done: 0,
            refused: vec![],
        }));
        rig.settle();
        assert_eq!(rig.executes().len(), sent);
    }
}

#[test]
fn a_task_that_was_leased_at_once_and_comes_back_keeps_its_own_age() {
    let mut rig = rig();
    let function = rig.function("acme", "digest", FunctionConfig::default());
    rig.lend(function, 1);
    let mut batch = rig.task(function, "", "", b"x");
    batch.tasks[0].max_age_s = 60;
    let request = rig.submit(batch).request;
    let (_, token, _) = rig.executes()[0].clone();
    let throttled = Verdict::Throttled {
        retry_after_ms: 3_600_000,
    };
    assert_eq!(rig.outcome(request, token, throttled, ""), Ok(()));
    assert_eq!(rig.state(request), State::Enqueued);
    rig.advance(59_000);
    assert_eq!(rig.state(request), State::Enqueued);
    rig.advance(2_000);
    assert_eq!(rig.state(request), State::Expired);
}
