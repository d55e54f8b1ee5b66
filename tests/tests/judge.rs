//! The judge of the kill loop, with histories that nobody wrote: one that is right, and one for each way in which it can
//! be wrong.

use pelton_tests::chaos::judge::{Judge, Verdict};

const T1: &str = "t00000000000000000000000000000001";
const T2: &str = "t00000000000000000000000000000002";
const T3: &str = "t00000000000000000000000000000003";

/// Two tasks of one key, one that is stopped, one that is refused, one without an answer that was taken all the same,
/// one that failed twice, and one that is tried again because a kill took its first attempt.
const STREAM: &str = "\
10 intent s0-1 1 acme echo named k 3 00000000000000aa
10 intent s0-2 1 acme echo - k 0 00000000000000bb
11 accepted s0-1 1 t00000000000000000000000000000001 new durable
11 accepted s0-2 1 t00000000000000000000000000000002 new durable
20 intent s0-3 2 acme slow named - 3 00000000000000cc
21 accepted s0-3 2 t00000000000000000000000000000003 new durable
22 stop s0-3 Stopped
30 intent s0-4 3 acme echo - - 3 00000000000000dd
31 refused s0-4 3 RESOURCE_EXHAUSTED
40 intent s0-5 4 acme echo - - 3 00000000000000ee
41 unknown s0-5 4
50 intent s0-6 5 acme flaky - - 3 00000000000000ff
51 accepted s0-6 5 t00000000000000000000000000000006 new durable
60 intent s0-1 6 acme echo named k 3 00000000000000aa
61 accepted s0-1 6 t00000000000000000000000000000001 duplicate durable
70 intent s0-7 7 acme slow - - 3 0000000000000011
71 accepted s0-7 7 t00000000000000000000000000000007 new durable
80 ended s0-1 t00000000000000000000000000000001 Succeeded 1 e0.0
900 seen s0-1 t00000000000000000000000000000001 echo Succeeded 1 0 3 00000000000000aa e0.0
901 seen s0-2 t00000000000000000000000000000002 echo Running 1 0 0 00000000000000bb -
902 seen s0-2 t00000000000000000000000000000002 echo Succeeded 1 0 0 00000000000000bb e0.1
903 seen s0-3 t00000000000000000000000000000003 slow Stopped 0 0 3 00000000000000cc -
904 seen s0-6 t00000000000000000000000000000006 flaky Failed 4 3 3 00000000000000ff -
905 seen s0-7 t00000000000000000000000000000007 slow Succeeded 10 8 3 0000000000000011 e0.3
990 complete
";

const LEDGER: &str = "\
12 begun s0-1 t00000000000000000000000000000001 1 echo 3 00000000000000aa
13 over t00000000000000000000000000000001 1 succeeded e0.0
14 begun s0-2 t00000000000000000000000000000002 1 echo 0 00000000000000bb
15 over t00000000000000000000000000000002 1 succeeded e0.1
45 begun s0-5 t00000000000000000000000000000005 1 echo 3 00000000000000ee
46 over t00000000000000000000000000000005 1 succeeded e0.2
52 begun s0-6 t00000000000000000000000000000006 1 flaky 3 00000000000000ff
53 over t00000000000000000000000000000006 1 failed -
54 begun s0-6 t00000000000000000000000000000006 4 flaky 3 00000000000000ff
55 over t00000000000000000000000000000006 4 failed -
72 begun s0-7 t00000000000000000000000000000007 1 slow 3 0000000000000011
75 begun s0-7 t00000000000000000000000000000007 10 slow 3 0000000000000011
76 over t00000000000000000000000000000007 10 succeeded e0.3
77 begun s0-7 t00000000000000000000000000000007 2 slow 3 0000000000000011
";

const CONDUCTOR: &str = "\
42 server-killed serving
43 server-killed recovery
73 server-killed serving
74 executor-killed
";

fn judge(stream: &str, ledger: &str) -> Verdict {
    let mut judge = Judge::default();
    judge.read("stream-0.history", stream, true);
    judge.read("executor-e0.ledger", ledger, false);
    judge.read("conductor.history", CONDUCTOR, false);
    judge.verdict(true)
}

fn broken(stream: &str, ledger: &str) -> Vec<(&'static str, u64)> {
    let verdict = judge(stream, ledger);
    let broken = verdict.violations.iter();
    broken
        .map(|(invariant, count, _)| (invariant.name(), count))
        .collect()
}

/// The right history with one line replaced breaks this and nothing else.
fn check(line: &str, by: &str, expected: &[(&'static str, u64)]) {
    let of = |text: &str| text.matches(line).count();
    assert_eq!(of(STREAM) + of(LEDGER), 1, "{line} is there once");
    let (stream, ledger) = (STREAM.replace(line, by), LEDGER.replace(line, by));
    assert_eq!(broken(&stream, &ledger), expected, "{line} -> {by}");
}

#[test]
fn a_right_history_breaks_nothing_and_is_counted() {
    let verdict = judge(STREAM, LEDGER);
    assert!(verdict.violations.is_empty(), "{:?}", verdict.violations);
    assert_eq!((verdict.accepted, verdict.executed), (5, 8));
    assert_eq!(verdict.executed_more_than_once, 1);
    assert_eq!((verdict.unknown_outcome, verdict.unknown_executed), (1, 1));
    let kills: Vec<(&str, u64)> = verdict.kills.iter().map(|(p, &n)| (p.name(), n)).collect();
    assert_eq!(kills, [("serving", 2), ("recovery", 1)]);
    assert_eq!(verdict.executors_killed, 1);
    let ended: Vec<(&str, u64)> = verdict.ended.into_iter().collect();
    assert_eq!(ended, [("Failed", 1), ("Stopped", 1), ("Succeeded", 3)]);
}

#[test]
fn an_acknowledged_task_that_is_missing_or_never_seen_is_lost() {
    let line = format!("905 seen s0-7 {} slow", T1.replace('1', "7"));
    let stream: String = STREAM
        .lines()
        .filter(|other| !other.starts_with(&line))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_ne!(stream, STREAM);
    let lost = [("nothing_is_lost", 1), ("every_task_ends", 1)];
    assert_eq!(broken(&stream, LEDGER), lost);
    let missing = stream.replace("990 complete", "906 missing s0-7\n990 complete");
    assert_eq!(broken(&missing, LEDGER), [("nothing_is_lost", 1)]);
    // Seen again or not: it was missing.
    let again = STREAM.replace("905 seen s0-7", "904 missing s0-7\n905 seen s0-7");
    assert_eq!(broken(&again, LEDGER), [("nothing_is_lost", 1)]);
}

#[test]
fn a_task_that_is_not_there_at_once_is_named() {
    check(
        "905 seen s0-7",
        "904 late s0-7\n905 seen s0-7",
        &[("callers_read_their_writes", 1)],
    );
}

#[test]
fn what_is_acknowledged_from_memory_is_named() {
    check(
        "51 accepted s0-6 5 t00000000000000000000000000000006 new durable",
        "51 accepted s0-6 5 t00000000000000000000000000000006 new volatile",
        &[("acknowledged_is_durable", 1)],
    );
}

#[test]
fn a_task_that_does_not_end_is_named() {
    check(
        "flaky Failed 4 3",
        "flaky Retrying 4 3",
        &[("every_task_ends", 1)],
    );
}

#[test]
fn a_task_has_one_end() {
    let one = [("one_end", 1)];
    check(
        "902 seen s0-2",
        "900 seen s0-2 t00000000000000000000000000000002 echo Succeeded 1 0 0 00000000000000bb e0.1\n901 seen s0-2 t00000000000000000000000000000002 echo Running 1 0 0 00000000000000bb -\n902 seen s0-2",
        &one,
    );
    check(
        "80 ended s0-1 t00000000000000000000000000000001 Succeeded 1 e0.0",
        "80 ended s0-1 t00000000000000000000000000000001 Failed 1 -",
        &one,
    );
    // Another result of the same attempt, and another attempt.
    check(
        "echo Succeeded 1 0 3 00000000000000aa e0.0",
        "echo Succeeded 1 0 3 00000000000000aa e0.9",
        &one,
    );
    check(
        "echo Succeeded 1 0 3 00000000000000aa e0.0",
        "echo Succeeded 2 0 3 00000000000000aa e0.0",
        &one,
    );
}

#[test]
fn a_submission_is_one_task_and_a_task_one_submission() {
    let name = "one_submit_one_task";
    check(
        "61 accepted s0-1 6 t00000000000000000000000000000001 duplicate",
        "61 accepted s0-1 6 t00000000000000000000000000000009 duplicate",
        &[(name, 1)],
    );
    check(
        "61 accepted s0-1 6 t00000000000000000000000000000001 duplicate durable",
        "61 refused s0-1 6 ID_REUSED",
        &[(name, 1)],
    );
    check(
        "61 accepted s0-1 6 t00000000000000000000000000000001 duplicate",
        "61 accepted s0-1 6 t00000000000000000000000000000001 new",
        &[(name, 1)],
    );
    // A submit without an answer was taken twice.
    let twice = format!(
        "{LEDGER}48 begun s0-5 t00000000000000000000000000000008 1 echo 3 00000000000000ee\n"
    );
    assert_eq!(broken(STREAM, &twice), [(name, 1)]);
    // Two submissions were told the same task.
    let shared = STREAM.replace(T2, T1).replace("e0.1", "e0.0");
    assert!(
        broken(&shared, LEDGER)
            .iter()
            .any(|(broken, _)| *broken == name)
    );
    let nobodys = format!(
        "{LEDGER}48 begun s7-5 t00000000000000000000000000000008 1 echo 3 00000000000000ee\n"
    );
    assert_eq!(broken(STREAM, &nobodys), [(name, 1)]);
}

#[test]
fn payload_and_function_are_those_that_were_handed_in() {
    let broken = [("payload_is_intact", 1)];
    check(
        "12 begun s0-1 t00000000000000000000000000000001 1 echo 3 00000000000000aa",
        "12 begun s0-1 t00000000000000000000000000000001 1 echo 3 00000000000000ab",
        &broken,
    );
    check(
        "slow Stopped 0 0 3 00000000000000cc",
        "slow Stopped 0 0 2 00000000000000cc",
        &broken,
    );
    check(
        "slow Stopped 0 0 3 00000000000000cc",
        "echo Stopped 0 0 3 00000000000000cc",
        &broken,
    );
}

#[test]
fn a_token_is_begun_once() {
    let twice = format!(
        "{LEDGER}78 begun s0-7 t00000000000000000000000000000007 10 slow 3 0000000000000011\n"
    );
    assert_eq!(broken(STREAM, &twice), [("one_token_one_start", 1)]);
}

#[test]
fn a_success_is_that_of_an_attempt() {
    check(
        "76 over t00000000000000000000000000000007 10 succeeded e0.3",
        "76 over t00000000000000000000000000000007 10 failed -",
        &[("success_was_executed", 1)],
    );
    check(
        "slow Succeeded 10 8",
        "slow Succeeded 9 8",
        &[("success_was_executed", 1)],
    );
}

#[test]
fn attempts_are_those_of_retries_and_kills() {
    let broken = [("attempts_are_bounded", 1)];
    check("flaky Failed 4 3", "flaky Failed 4 4", &broken);
    check("flaky Failed 4 3", "flaky Failed 7 3", &broken);
}

#[test]
fn a_key_keeps_its_order() {
    check(
        "14 begun s0-2",
        "12 begun s0-2",
        &[("keys_keep_their_order", 1)],
    );
    // Of a task that was taken at a try nobody knows of the place is not known.
    let unknown = STREAM.replace(
        "11 accepted s0-2 1 t00000000000000000000000000000002 new",
        "11 accepted s0-2 1 t00000000000000000000000000000002 duplicate",
    );
    assert_eq!(
        broken(&unknown, &LEDGER.replace("14 begun s0-2", "12 begun s0-2")),
        []
    );
}

#[test]
fn a_stopped_task_stays_stopped() {
    let name = "stopped_is_stopped";
    let begun = format!("{LEDGER}30 begun s0-3 {T3} 1 slow 3 00000000000000cc\n");
    assert_eq!(broken(STREAM, &begun), [(name, 1)]);
    let before = format!("{LEDGER}21 begun s0-3 {T3} 1 slow 3 00000000000000cc\n");
    assert_eq!(broken(STREAM, &before), []);
    check("slow Stopped 0 0", "slow Failed 0 0", &[(name, 1)]);
}

#[test]
fn what_was_refused_is_not_executed() {
    let begun = format!(
        "{LEDGER}35 begun s0-4 t00000000000000000000000000000004 1 echo 3 00000000000000dd\n"
    );
    assert_eq!(broken(STREAM, &begun), [("refused_is_not_executed", 1)]);
}

#[test]
fn a_file_that_is_cut_short_or_unreadable_is_named() {
    let name = "histories_are_whole";
    check("990 complete\n", "", &[(name, 1)]);
    check("41 unknown s0-5 4", "41 unknown s0-5", &[(name, 1)]);
    check(
        "13 over t00000000000000000000000000000001 1",
        "13 over t00000000000000000000000000000001 3",
        &[("success_was_executed", 1), (name, 1)],
    );
    // An executor that is killed while it writes leaves a part of a line.
    assert_eq!(broken(STREAM, &format!("{LEDGER}99 beg")), []);
    assert_eq!(broken(&format!("{STREAM}991 se"), LEDGER), [(name, 1)]);
}
