//! What the seeds have reached: which event met which state, which faults struck, how recoveries ended, and where
//! crashes hit. A cell that no seed reaches is a place where the simulation shows nothing.

use pelton_core::state::{Event, State};
use pelton_storage::device::DeviceOp;

use crate::swarm::Fault;

/// How a recovery of one log ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Recovery {
    /// There was no log.
    Empty,
    /// The log ended with a whole batch.
    Clean,
    /// What was being written was erased.
    TornTail,
    /// Damage was named, and the disk left as it was.
    Corrupt,
    /// A read failed, and the start with it.
    ReadFailed,
    /// The power failed before the end.
    Interrupted,
    /// A snapshot was loaded; what is more is one of the others.
    FromSnapshot,
    /// A snapshot was passed over.
    SnapshotPassedOver,
    /// Damage in front of a snapshot's start, which the start does not look at.
    BehindSnapshot,
    /// All tasks were placed on another number of shards.
    Placed,
    /// A disk failed while they were being placed.
    PlacingFailed,
    /// They were not placed, since what holds a key is not in the log any more.
    NotPlaced,
}

impl Recovery {
    /// Every end.
    pub const ALL: [Recovery; 12] = [
        Recovery::Empty,
        Recovery::Clean,
        Recovery::TornTail,
        Recovery::Corrupt,
        Recovery::ReadFailed,
        Recovery::Interrupted,
        Recovery::FromSnapshot,
        Recovery::SnapshotPassedOver,
        Recovery::BehindSnapshot,
        Recovery::Placed,
        Recovery::PlacingFailed,
        Recovery::NotPlaced,
    ];
}

/// What the process was doing when the power failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// No shard was in a turn.
    BetweenTurns,
    /// A shard had sealed a batch, and its effects had not left.
    AfterSeal,
    /// A log was being recovered.
    InRecovery,
}

impl Moment {
    /// Every moment.
    pub const ALL: [Moment; 3] = [Moment::BetweenTurns, Moment::AfterSeal, Moment::InRecovery];
}

/// What the disk was asked for: the names of its operations, and nothing.
pub const DISK_STEPS: usize = DeviceOp::NAMES.len() + 1;
const IDLE: &str = "nothing";

/// Pairs of the table of states that no shard comes to, with the reason.
const UNREACHED: [(&[State], &[Event], &str); 6] = [
    (
        &State::ALL,
        &[Event::Pause, Event::Resume, Event::Redrive],
        "no caller can ask for it",
    ),
    (&[State::Paused], &Event::ALL, "no caller can pause a task"),
    (
        &[State::Scheduled],
        &[Event::Expire],
        "a delayed task ages from when it is due",
    ),
    (
        &[State::Stopping],
        &[Event::Release],
        "what an executor gives back while it is to stop has stopped: StopDone",
    ),
    (
        &[State::Scheduled, State::Retrying],
        &[Event::Remove],
        "a delayed task is removed when it is due",
    ),
    (
        &[State::Dequeued],
        &[Event::Remove],
        "a task that is being read goes back to its lane first",
    ),
];

/// Counts of one run or of many. Filled from what happens anyway; nothing depends on it.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Runs in which a state met an event.
    pub met: [[u64; Event::ALL.len()]; State::ALL.len()],
    /// Faults by kind.
    pub faults: [u64; Fault::ALL.len()],
    /// Recoveries by their end.
    pub recoveries: [u64; Recovery::ALL.len()],
    /// Crashes by moment and by what the disk was at.
    pub crashes: [[u64; DISK_STEPS]; Moment::ALL.len()],
}

impl Coverage {
    /// A shard's life is over: what it has met counts.
    pub fn shard(&mut self, met: [u16; State::ALL.len()]) {
        for (cells, bits) in self.met.iter_mut().zip(met) {
            for (event, cell) in cells.iter_mut().enumerate() {
                *cell += u64::from(bits >> event & 1);
            }
        }
    }

    /// A recovery has ended.
    pub fn recovery(&mut self, end: Recovery) {
        self.recoveries[end as usize] += 1;
    }

    /// The power has failed for one disk.
    pub fn crash(&mut self, moment: Moment, disk: Option<&'static str>) {
        let step = disk.and_then(|name| DeviceOp::NAMES.iter().position(|known| *known == name));
        self.crashes[moment as usize][step.unwrap_or(DISK_STEPS - 1)] += 1;
    }

    /// Adds what another run has reached.
    pub fn add(&mut self, other: &Coverage) {
        let pairs = self
            .met
            .iter_mut()
            .flatten()
            .zip(other.met.iter().flatten());
        let faults = self.faults.iter_mut().zip(&other.faults);
        let ends = self.recoveries.iter_mut().zip(&other.recoveries);
        let crashes = self
            .crashes
            .iter_mut()
            .flatten()
            .zip(other.crashes.iter().flatten());
        for (cell, more) in pairs.chain(faults).chain(ends).chain(crashes) {
            *cell += more;
        }
    }

    /// Kinds of faults that struck.
    pub fn kinds(&self) -> u64 {
        self.faults.iter().filter(|&&count| count > 0).count() as u64
    }

    /// The cells that should be reached and were not.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for state in State::ALL {
            for event in Event::ALL {
                if reachable(state, event) && self.met[state as usize - 1][event as usize] == 0 {
                    missing.push(format!("{state} x {event:?}"));
                }
            }
        }
        for fault in Fault::ALL {
            if self.faults[fault as usize] == 0 {
                missing.push(format!("fault {fault:?}"));
            }
        }
        for end in Recovery::ALL {
            if self.recoveries[end as usize] == 0 {
                missing.push(format!("recovery {end:?}"));
            }
        }
        for moment in Moment::ALL {
            for step in 0..DISK_STEPS {
                if possible(moment, step_name(step)) && self.crashes[moment as usize][step] == 0 {
                    missing.push(format!("crash {moment:?} at {}", step_name(step)));
                }
            }
        }
        missing
    }

    /// The table, a line a row.
    pub fn table(&self) -> String {
        let mut text = String::from("coverage: state x event, lives of shards that met it\n");
        for state in State::ALL {
            let cells: Vec<String> = Event::ALL
                .into_iter()
                .filter(|&event| reachable(state, event))
                .map(|event| format!("{event:?} {}", self.met[state as usize - 1][event as usize]))
                .collect();
            if !cells.is_empty() {
                text += &format!("  {:<14}{}\n", state.name(), cells.join("  "));
            }
        }
        text += "coverage: faults\n";
        for fault in Fault::ALL {
            let name = format!("{fault:?}");
            text += &format!("  {name:<20}{:>12}\n", self.faults[fault as usize]);
        }
        text += "coverage: recoveries of a log by their end\n";
        for end in Recovery::ALL {
            let name = format!("{end:?}");
            text += &format!("  {name:<20}{:>12}\n", self.recoveries[end as usize]);
        }
        text += "coverage: crashes of a shard by moment, and what its disk was at\n";
        for moment in Moment::ALL {
            let cells: Vec<String> = (0..DISK_STEPS)
                .filter(|&step| possible(moment, step_name(step)))
                .map(|step| {
                    format!(
                        "{} {}",
                        step_name(step),
                        self.crashes[moment as usize][step]
                    )
                })
                .collect();
            let name = format!("{moment:?}");
            text += &format!("  {name:<14}{}\n", cells.join("  "));
        }
        text
    }
}

fn step_name(step: usize) -> &'static str {
    DeviceOp::NAMES.get(step).copied().unwrap_or(IDLE)
}

/// True for the pairs that the table of states allows and a shard can come to.
fn reachable(state: State, event: Event) -> bool {
    let excluded = UNREACHED
        .iter()
        .any(|(states, events, _)| states.contains(&state) && events.contains(&event));
    state.on(event).is_some() && !excluded
}

/// What a disk may be asked for at a moment.
fn possible(moment: Moment, step: &str) -> bool {
    match moment {
        Moment::BetweenTurns => !matches!(step, "list" | "open"),
        // The steps that take a disk a moment are met between turns.
        Moment::AfterSeal => matches!(step, "read" | "write" | "zero" | "commit" | IDLE),
        Moment::InRecovery => true,
    }
}
