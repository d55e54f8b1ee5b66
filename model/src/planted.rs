//! Bugs of what the engine's files stand on, each as bad as a line that is missing in them, to show that the checker
//! finds them. They are chosen for one check and are nowhere but in this crate.

use std::cell::Cell;

/// A bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// Nothing orders what a thread wrote before what it reads next: the fences are missing between the push and the
    /// look at the sleeper, and between the announcement of the sleep and the look into the queues.
    LostWakeup,
    /// Who is going to sleep does not look into the queues once more.
    SleepsWithoutLooking,
    /// Who pushed finds the sleeper and does not ring.
    NotRung,
}

impl Bug {
    /// Every bug.
    pub const ALL: [Bug; 3] = [Bug::LostWakeup, Bug::SleepsWithoutLooking, Bug::NotRung];

    /// The name by which a command asks for it.
    pub fn name(self) -> &'static str {
        match self {
            Bug::LostWakeup => "lost_wakeup",
            Bug::SleepsWithoutLooking => "sleeps_without_looking",
            Bug::NotRung => "not_rung",
        }
    }

    /// The bug with this name.
    pub fn from_name(name: &str) -> Option<Bug> {
        Bug::ALL.into_iter().find(|bug| bug.name() == name)
    }
}

thread_local! {
    static AWAKE: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// True while this bug is awake. All threads of a scenario are one thread of the system.
pub(crate) fn planted(bug: Bug) -> bool {
    AWAKE.get() == Some(bug)
}

/// Wakes a bug, or none, for what this thread checks from now on.
pub(crate) fn plant(bug: Option<Bug>) {
    AWAKE.set(bug);
}
