//! Runs scenarios of the model checker: all of them, or one; that one with a bug that is put in on purpose, which must
//! be found, or with another bound of preemptions, which takes longer the higher it is.

use std::{env, process::ExitCode, time::Instant};

use pelton_model::{
    planted::Bug,
    scenario::{SCENARIOS, Scenario},
};

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let wanted = arguments.next();
    let how = arguments.next().unwrap_or_default();
    let chosen: Vec<Scenario> = SCENARIOS
        .into_iter()
        .filter(|scenario| wanted.as_deref().is_none_or(|name| name == scenario.name))
        .collect();
    let bug = Bug::from_name(&how);
    let preemptions = how.parse().ok();
    if !how.is_empty() && bug.is_none() && preemptions.is_none() {
        return usage();
    }
    if chosen.is_empty() {
        return usage();
    }
    for scenario in chosen {
        let begun = Instant::now();
        let orders = scenario.check(bug, preemptions);
        println!(
            "{:<46}{orders:>8} orders{:>8.1} s",
            scenario.name,
            begun.elapsed().as_secs_f64()
        );
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("pelton-model [SCENARIO [BUG | PREEMPTIONS]]");
    let scenarios = SCENARIOS.iter().map(|scenario| scenario.name);
    for name in scenarios.chain(Bug::ALL.iter().map(|bug| bug.name())) {
        eprintln!("  {name}");
    }
    ExitCode::FAILURE
}
