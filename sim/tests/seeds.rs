//! A few seeds of the simulation, as a smoke test: `pelton-sim` runs thousands.

use pelton_sim::{
    run::{Verdict, catch_panics, run_seed},
    swarm::Plan,
};

#[test]
fn a_seed_does_the_same_twice_and_another_one_does_something_else() {
    catch_panics();
    let (first, again, other) = (run_seed(1, false), run_seed(1, false), run_seed(2, false));
    assert_eq!((first.hash, first.events), (again.hash, again.events));
    assert_ne!(first.hash, other.hash);
}

#[test]
fn every_invariant_holds_over_a_few_seeds_and_all_of_them_do_real_work() {
    catch_panics();
    let verdicts: Vec<_> = (0..16).map(|seed| run_seed(seed, false)).collect();
    for verdict in &verdicts {
        assert_eq!(verdict.violation, None, "seed {}", verdict.seed);
    }
    let total = |count: fn(&Verdict) -> u64| verdicts.iter().map(count).sum::<u64>();
    let (accepted, executed) = (total(|v| v.tally.accepted), total(|v| v.tally.executed));
    assert!(
        accepted > 1_000 * 16 && executed > 1_000 * 16,
        "{accepted} accepted, {executed} executed"
    );
    let crashes: u64 = verdicts.iter().map(|verdict| verdict.counts.crashes).sum();
    assert!(crashes > 3 * 16, "{crashes} crashes");
}

#[test]
fn plans_differ_in_what_they_enable() {
    let plans: Vec<Plan> = (0..64).map(Plan::draw).collect();
    let share = |enabled: fn(&Plan) -> bool| plans.iter().filter(|plan| enabled(plan)).count();
    for count in [
        share(|plan| plan.shards == 1),
        share(|plan| plan.keys),
        share(|plan| plan.deletions),
        share(|plan| plan.long_timeouts),
        share(|plan| plan.caller_window == 1),
    ] {
        assert!((4..=60).contains(&count), "{count} of 64");
    }
}
