//! One seed from its draw to its verdict. A panic of the engine is a verdict too: its assertions are invariants.

use std::{cell::RefCell, panic};

use crate::{
    oracle::{Tally, Violation},
    swarm::Plan,
    world::{Counts, World},
};

/// How a seed ended.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The seed.
    pub seed: u64,
    /// The hash of its trace: equal in every run of the same seed.
    pub hash: u64,
    /// Events of the trace.
    pub events: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
    /// What the oracle counted.
    pub tally: Tally,
    /// What the world counted.
    pub counts: Counts,
    /// The first invariant that did not hold, if any.
    pub violation: Option<Violation>,
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Makes panics of simulated engines silent: they are reported as violations. Call it once per process.
pub fn catch_panics() {
    panic::set_hook(Box::new(|info| {
        LAST_PANIC.with(|last| *last.borrow_mut() = info.to_string().replace('\n', " "));
    }));
}

/// Runs one seed.
pub fn run_seed(seed: u64, print: bool) -> Verdict {
    run_plan(Plan::draw(seed), print)
}

/// Runs a plan, which may be less than its seed has drawn.
pub fn run_plan(plan: Plan, print: bool) -> Verdict {
    let seed = plan.seed;
    let mut world = World::new(plan, print);
    let checked = panic::catch_unwind(panic::AssertUnwindSafe(|| world.run()));
    let violation = match checked {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(_) => Some(Violation {
            invariant: "assertions_hold",
            sentence: LAST_PANIC.with(|last| last.borrow().clone()),
        }),
    };
    Verdict {
        seed,
        hash: world.trace.hash(),
        events: world.trace.events(),
        virtual_ns: world.now_ns,
        tally: world.oracle.tally.clone(),
        counts: world.counts(),
        violation,
    }
}
