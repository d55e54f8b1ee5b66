//! The task's states and every transition between them: one table, and nothing else decides.

use core::fmt;

/// Where a task stands. The number is part of the log and of the wire protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum State {
    /// Accepted for later.
    Scheduled = 1,
    /// Waiting in its lane, or behind its ordering key.
    Enqueued = 2,
    /// Fetched into memory; holds a credit and a slot.
    Dequeued = 3,
    /// Leased to an executor.
    Running = 4,
    /// An attempt failed; the next one is due later.
    Retrying = 5,
    /// Held back by its caller.
    Paused = 6,
    /// Running, and asked to stop.
    Stopping = 7,
    /// Ended with a result.
    Succeeded = 8,
    /// Ended with an error and no retry left.
    Failed = 9,
    /// Ended by its caller.
    Stopped = 10,
    /// Ended because it grew too old.
    Expired = 11,
    /// Ended because its function was deleted.
    Invalid = 12,
}

/// What can happen to a task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// Its delay or backoff is over.
    Due,
    /// The receiver takes it.
    Dequeue,
    /// The invoker leases it.
    Lease,
    /// It is given back before the start: rejected, throttled, or never delivered.
    Release,
    /// The attempt succeeded.
    Succeed,
    /// The attempt failed and a retry is left.
    Retry,
    /// The attempt failed and none is left.
    Fail,
    /// A caller stops it.
    Stop,
    /// The executor confirmed the stop, or is gone.
    StopDone,
    /// It grew too old.
    Expire,
    /// A caller pauses it.
    Pause,
    /// A caller resumes it; the state before comes back by `Due` or at once.
    Resume,
    /// Its function was deleted.
    Remove,
    /// A caller starts it again as a new generation.
    Redrive,
}

impl Event {
    /// Every event, in the order of its number.
    pub const ALL: [Event; 14] = [
        Event::Due,
        Event::Dequeue,
        Event::Lease,
        Event::Release,
        Event::Succeed,
        Event::Retry,
        Event::Fail,
        Event::Stop,
        Event::StopDone,
        Event::Expire,
        Event::Pause,
        Event::Resume,
        Event::Remove,
        Event::Redrive,
    ];
}

impl State {
    /// Every state, in the order of the numbers.
    pub const ALL: [State; 12] = [
        State::Scheduled,
        State::Enqueued,
        State::Dequeued,
        State::Running,
        State::Retrying,
        State::Paused,
        State::Stopping,
        State::Succeeded,
        State::Failed,
        State::Stopped,
        State::Expired,
        State::Invalid,
    ];

    /// The state with this number.
    pub fn from_number(number: u8) -> Option<State> {
        State::ALL.into_iter().find(|state| *state as u8 == number)
    }

    /// The state that is called so, as [`State::name`] writes it; case does not matter.
    pub fn from_name(name: &str) -> Option<State> {
        State::ALL
            .into_iter()
            .find(|state| state.name().eq_ignore_ascii_case(name))
    }

    /// True if nothing but a redrive follows.
    pub fn terminal(self) -> bool {
        self as u8 >= State::Succeeded as u8
    }

    /// The name that callers see.
    pub fn name(self) -> &'static str {
        match self {
            State::Scheduled => "Scheduled",
            State::Enqueued => "Enqueued",
            State::Dequeued => "Dequeued",
            State::Running => "Running",
            State::Retrying => "Retrying",
            State::Paused => "Paused",
            State::Stopping => "Stopping",
            State::Succeeded => "Succeeded",
            State::Failed => "Failed",
            State::Stopped => "Stopped",
            State::Expired => "Expired",
            State::Invalid => "Invalid",
        }
    }

    /// The state after `event`, or `None` where it is refused with `FAILED_PRECONDITION`.
    pub fn on(self, event: Event) -> Option<State> {
        use State::{
            Dequeued, Enqueued, Expired, Failed, Invalid, Paused, Retrying, Running, Scheduled,
            Stopped, Stopping, Succeeded,
        };
        match (self, event) {
            (Scheduled | Retrying, Event::Due) => Some(Enqueued),
            (Enqueued, Event::Dequeue) => Some(Dequeued),
            (Enqueued | Dequeued, Event::Lease) => Some(Running),
            (Dequeued | Running, Event::Release) => Some(Enqueued),
            (Running, Event::Succeed) => Some(Succeeded),
            (Running, Event::Retry) => Some(Retrying),
            (Running, Event::Fail) => Some(Failed),
            (Running, Event::Stop) => Some(Stopping),
            (Stopping, Event::StopDone | Event::Release) => Some(Stopped),
            (Scheduled | Enqueued | Dequeued | Retrying | Paused, Event::Stop) => Some(Stopped),
            (Scheduled | Enqueued | Dequeued | Retrying | Paused, Event::Expire) => Some(Expired),
            (Scheduled | Enqueued | Dequeued | Retrying | Paused, Event::Remove) => Some(Invalid),
            (Scheduled | Enqueued | Dequeued | Retrying, Event::Pause) => Some(Paused),
            (Paused, Event::Resume) => Some(Enqueued),
            (Failed | Stopped | Expired, Event::Redrive) => Some(Enqueued),
            (
                Scheduled | Enqueued | Dequeued | Running | Retrying | Paused | Stopping
                | Succeeded | Failed | Stopped | Expired | Invalid,
                Event::Due
                | Event::Dequeue
                | Event::Lease
                | Event::Release
                | Event::Succeed
                | Event::Retry
                | Event::Fail
                | Event::Stop
                | Event::StopDone
                | Event::Expire
                | Event::Pause
                | Event::Resume
                | Event::Remove
                | Event::Redrive,
            ) => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, string::String};
    use expect_test::expect;

    #[test]
    fn every_state_meets_every_event_as_the_table_says() {
        let mut table = String::new();
        for state in State::ALL {
            assert_eq!(State::from_number(state as u8), Some(state));
            assert_eq!(State::from_name(state.name()), Some(state));
            table += &format!("{state}:");
            for event in Event::ALL {
                if let Some(next) = state.on(event) {
                    table += &format!(" {event:?}->{next}");
                }
            }
            table += "\n";
        }
        expect![[r#"
            Scheduled: Due->Enqueued Stop->Stopped Expire->Expired Pause->Paused Remove->Invalid
            Enqueued: Dequeue->Dequeued Lease->Running Stop->Stopped Expire->Expired Pause->Paused Remove->Invalid
            Dequeued: Lease->Running Release->Enqueued Stop->Stopped Expire->Expired Pause->Paused Remove->Invalid
            Running: Release->Enqueued Succeed->Succeeded Retry->Retrying Fail->Failed Stop->Stopping
            Retrying: Due->Enqueued Stop->Stopped Expire->Expired Pause->Paused Remove->Invalid
            Paused: Stop->Stopped Expire->Expired Resume->Enqueued Remove->Invalid
            Stopping: Release->Stopped StopDone->Stopped
            Succeeded:
            Failed: Redrive->Enqueued
            Stopped: Redrive->Enqueued
            Expired: Redrive->Enqueued
            Invalid:
        "#]]
        .assert_eq(&table);
    }
}
