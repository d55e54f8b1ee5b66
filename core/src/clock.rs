//! The two clocks: monotonic time for leases and windows, logged time for everything that must mean the same after a
//! restart. Logged time is stamped into records when they are appended, so that a replay sees the time that was.

/// The time of one step, read once by whoever drives the shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// Monotonic nanoseconds; starts anywhere, never goes back within one run.
    pub mono_ns: u64,
    /// Logged milliseconds since 1970; never goes back, not even over a restart.
    pub logged_ms: u64,
}

impl Now {
    /// Monotonic microseconds.
    pub(crate) fn mono_us(self) -> u64 {
        self.mono_ns / 1_000
    }
}

/// A wall clock further away than this is held, not followed.
pub const WALL_STEP_MS_MAX: u64 = 60_000;
/// Logged time approaches wall time by at most one part in this many.
pub const SLEW_PARTS: u64 = 1_000;

/// Keeps logged time: it advances with monotonic time and slews to wall time by at most 0.1 %. A wall clock that
/// jumps by more than a minute is held, so that a jump never expires tasks in bulk nor freezes time in the future.
#[derive(Clone, Debug)]
pub struct LoggedClock {
    mono_ns: u64,
    logged_ns: u64,
    held: bool,
}

impl LoggedClock {
    /// Starts at `wall_ms`, or at the last logged time where that is later. Downtime counts only if the wall clock
    /// says that time went forward.
    pub fn start(mono_ns: u64, wall_ms: u64, last_logged_ms: u64) -> LoggedClock {
        LoggedClock {
            mono_ns,
            logged_ns: wall_ms.max(last_logged_ms) * 1_000_000,
            held: false,
        }
    }

    /// Moves on to `mono_ns` and returns logged milliseconds. A monotonic reading from the past changes nothing.
    pub fn advance(&mut self, mono_ns: u64, wall_ms: u64) -> u64 {
        let elapsed = mono_ns.saturating_sub(self.mono_ns);
        self.mono_ns = self.mono_ns.max(mono_ns);
        self.logged_ns += elapsed;
        let wall_ns = wall_ms.saturating_mul(1_000_000);
        let slew = elapsed / SLEW_PARTS;
        let distance = self.logged_ns.abs_diff(wall_ns);
        self.held = distance > WALL_STEP_MS_MAX * 1_000_000;
        if !self.held {
            if wall_ns > self.logged_ns {
                self.logged_ns += slew.min(distance);
            } else {
                self.logged_ns -= slew.min(distance);
            }
        }
        self.logged_ns / 1_000_000
    }

    /// True while the wall clock is further away than a minute and therefore not followed.
    pub fn held(&self) -> bool {
        self.held
    }

    /// An operator accepts the wall clock: logged time goes there at once if that is forward.
    pub fn accept(&mut self, wall_ms: u64) {
        self.logged_ns = self.logged_ns.max(wall_ms.saturating_mul(1_000_000));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wall_clock_jump_is_held_and_a_small_drift_is_slewed() {
        let mut clock = LoggedClock::start(0, 1_000_000, 0);
        assert_eq!(clock.advance(1_000_000_000, 1_001_000), 1_001_000);
        assert_eq!(clock.advance(2_000_000_000, 9_000_000), 1_002_000);
        assert!(clock.held());
        let logged = clock.advance(3_000_000_000, 1_003_500);
        assert_eq!(logged, 1_003_001, "one second slews by one millisecond");
        assert!(!clock.held());
        assert!(
            clock.advance(4_000_000_000, 1_000_000) > logged,
            "logged time never goes back"
        );
    }

    #[test]
    fn a_start_never_goes_behind_the_log() {
        assert_eq!(LoggedClock::start(5, 100, 200).advance(5, 100), 200);
        assert_eq!(LoggedClock::start(5, 300, 200).advance(5, 300), 300);
    }
}
