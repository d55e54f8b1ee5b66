//! Every scenario in every order, and the planted bugs, each of which has to be found where it bites.

use std::process::{Command, Output};

use pelton_model::{planted::Bug, scenario::SCENARIOS};

/// Runs the checker in a process of its own: one that has found something may abort.
fn run(scenario: &str, bug: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pelton-model"));
    command.arg(scenario).args(bug).env("RUST_BACKTRACE", "0");
    command.output().expect("the checker was built")
}

#[test]
fn no_wake_up_and_no_batch_is_lost_in_any_order() {
    for scenario in SCENARIOS {
        let output = run(scenario.name, &[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}:\n{said}", scenario.name);
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_planted_lost_wakeup_leaves_threads_waiting() {
    const FALL: [(Bug, &[&str]); 3] = [
        (
            Bug::LostWakeup,
            &[
                "a_sleeping_shard_takes_every_batch",
                "a_lingering_shard_takes_every_batch",
                "a_shard_that_waits_for_its_flush_hears_again",
                "a_sleeping_shard_hears_that_it_is_to_stop",
                "a_sleeping_edge_takes_every_delivery",
                "a_call_is_answered_or_refused",
            ],
        ),
        (
            Bug::SleepsWithoutLooking,
            &[
                "a_sleeping_shard_takes_every_batch",
                "a_lingering_shard_takes_every_batch",
                "a_shard_that_waits_for_its_flush_hears_again",
                "a_sleeping_edge_takes_every_delivery",
            ],
        ),
        (
            Bug::NotRung,
            &[
                "a_sleeping_shard_takes_every_batch",
                "a_lingering_shard_takes_every_batch",
                "a_shard_that_waits_for_its_flush_hears_again",
                "a_sleeping_shard_hears_that_it_is_to_stop",
            ],
        ),
    ];
    for (bug, scenarios) in FALL {
        for scenario in scenarios {
            let output = run(scenario, &[bug.name()]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && said.contains("deadlock; threads"),
                "{} was not found by {scenario}:\n{said}",
                bug.name()
            );
        }
    }
}
