//! Makes a failing seed smaller: faults are left out one kind at a time, and fewer tasks are handed in, as long as the
//! same invariant falls. A plan that was changed draws other numbers afterwards, so that every step is tried and none is
//! taken for granted.

use crate::{
    run::run_plan,
    swarm::{Fault, Plan},
};

/// Runs at most, so that a report does not keep its reader waiting.
const RUNS_MAX: u32 = 40;

/// What is left out of a seed's plan.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cut {
    /// Kinds of faults.
    pub without: Vec<Fault>,
    /// Tasks to hand in, where they are fewer.
    pub tasks: Option<usize>,
}

impl Cut {
    /// The plan of a seed with this left out.
    pub fn plan(&self, seed: u64) -> Plan {
        let plan = self
            .without
            .iter()
            .fold(Plan::draw(seed), |plan, &fault| plan.without(fault));
        match self.tasks {
            Some(tasks) => plan.shortened(tasks),
            None => plan,
        }
    }

    /// The arguments that ask for it.
    pub fn arguments(&self) -> String {
        let mut text = String::new();
        for fault in &self.without {
            text += &format!(" --without {fault:?}");
        }
        if let Some(tasks) = self.tasks {
            text += &format!(" --tasks {tasks}");
        }
        text
    }
}

/// The smallest cut that was found under which `seed` still breaks `invariant`.
pub fn shrink(seed: u64, invariant: &str) -> Cut {
    let mut runs = 0;
    let mut breaks = |cut: &Cut| {
        runs += 1;
        runs <= RUNS_MAX
            && run_plan(cut.plan(seed), false)
                .violation
                .is_some_and(|violation| violation.invariant == invariant)
    };
    let mut cut = Cut::default();
    let drawn = Plan::draw(seed);
    for fault in Fault::ALL.into_iter().filter(|&fault| drawn.knows(fault)) {
        let mut smaller = cut.clone();
        smaller.without.push(fault);
        if breaks(&smaller) {
            cut = smaller;
        }
    }
    let (mut fails, mut holds) = (drawn.tasks, 0);
    while fails - holds > 50 {
        let tasks = holds + (fails - holds) / 2;
        let smaller = Cut {
            tasks: Some(tasks),
            ..cut.clone()
        };
        if breaks(&smaller) {
            (fails, cut) = (tasks, smaller);
        } else {
            holds = tasks;
        }
    }
    cut
}
