//! The AIMD pool of a queue: how many of its tasks may be fetched or executing at once.
//!
//! Executors announce their slots, so those are not probed for; the pool learns what nobody announces, the capacity of
//! the function and of what lies behind it. It therefore starts wide and is cut when it hurts: additive increase,
//! multiplicative decrease (Chiu and Jain, 1989), at most one cut a window, growth only where it was the limit.

/// Credits of a new pool, and the most that one grows to.
pub const POOL_CREDITS_MAX: u32 = 65_536;
/// Length of a window.
pub const WINDOW_NS: u64 = 100_000_000;
/// Credits added after a clean window in which the pool was the limit.
pub const INCREASE: u32 = 16;
/// A cut leaves this share, in tenths.
pub const DECREASE_TENTHS: u32 = 8;
/// This many throttled lanes in one window cut a pool that several functions share.
pub const LANES_TO_CUT: u8 = 2;

/// What an attempt's end says about capacity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// It ran.
    Clean,
    /// Throttled, overloaded or timed out.
    Overload,
}

/// Credits of one queue on one shard. `in_use` may exceed `size` for a while after a cut; nothing new starts then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pool {
    size: u32,
    in_use: u32,
    window_end_ns: u64,
    /// It was the limit at least once in this window.
    limited: bool,
    /// Lanes that reported overload in this window, the last of them, and whether the window was cut.
    overloaded_lanes: u8,
    last_lane: u32,
    cut: bool,
}

impl Default for Pool {
    fn default() -> Pool {
        Pool {
            size: POOL_CREDITS_MAX,
            in_use: 0,
            window_end_ns: 0,
            limited: false,
            overloaded_lanes: 0,
            last_lane: u32::MAX,
            cut: false,
        }
    }
}

impl Pool {
    /// Credits in all.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Credits in use.
    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Takes a credit if there is one; remembers that the pool was the limit if not.
    pub fn take(&mut self) -> bool {
        let free = self.in_use < self.size;
        self.limited |= !free;
        self.in_use += u32::from(free);
        free
    }

    /// Takes a credit for a task that runs already: a lease found by recovery.
    pub fn adopt(&mut self) {
        self.in_use += 1;
    }

    /// Gives a credit back.
    pub fn give(&mut self) {
        assert!(self.in_use > 0, "a credit is given back once");
        self.in_use -= 1;
    }

    /// Notes an attempt's end. `lane` is its function, `only` says that the queue has no other active lane.
    pub fn note(&mut self, now_ns: u64, signal: Signal, lane: u32, only: bool) {
        if now_ns >= self.window_end_ns {
            if self.window_end_ns > 0 && self.limited && self.overloaded_lanes == 0 {
                self.size = (self.size + INCREASE).min(POOL_CREDITS_MAX);
            }
            self.window_end_ns = now_ns + WINDOW_NS;
            self.limited = false;
            self.overloaded_lanes = 0;
            self.last_lane = u32::MAX;
            self.cut = false;
        }
        if signal == Signal::Clean {
            return;
        }
        if lane != self.last_lane {
            self.overloaded_lanes = self.overloaded_lanes.saturating_add(1);
            self.last_lane = lane;
        }
        if !self.cut && (only || self.overloaded_lanes >= LANES_TO_CUT) {
            let base = self.size.min(self.in_use.max(1));
            self.size = (base * DECREASE_TENTHS / 10).max(1);
            self.cut = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(credits: u32) -> Pool {
        let mut pool = Pool::default();
        for _ in 0..credits {
            assert!(pool.take());
        }
        pool
    }

    #[test]
    fn an_overload_cuts_once_a_window_and_from_what_was_in_use() {
        let mut pool = used(100);
        pool.note(1, Signal::Overload, 1, true);
        assert_eq!(pool.size(), 80);
        pool.note(2, Signal::Overload, 1, true);
        assert_eq!(pool.size(), 80);
        pool.note(1 + WINDOW_NS, Signal::Overload, 1, true);
        assert_eq!(pool.size(), 64);
    }

    #[test]
    fn one_lane_of_many_does_not_cut_its_siblings() {
        let mut pool = used(100);
        pool.note(1, Signal::Overload, 1, false);
        pool.note(2, Signal::Overload, 1, false);
        assert_eq!(pool.size(), POOL_CREDITS_MAX);
        pool.note(3, Signal::Overload, 2, false);
        assert_eq!(pool.size(), 80);
    }

    #[test]
    fn it_grows_only_after_a_clean_window_in_which_it_was_the_limit() {
        let mut pool = used(10);
        pool.note(1, Signal::Overload, 1, true);
        assert_eq!(pool.size(), 8);
        assert!(!pool.take());
        pool.note(1 + WINDOW_NS, Signal::Clean, 1, true);
        assert_eq!(pool.size(), 8, "the window was not clean");
        assert!(!pool.take());
        pool.note(1 + 2 * WINDOW_NS, Signal::Clean, 1, true);
        assert_eq!(pool.size(), 24);
        pool.note(1 + 3 * WINDOW_NS, Signal::Clean, 1, true);
        assert_eq!(pool.size(), 24, "it was not the limit");
    }

    #[test]
    fn it_never_falls_below_one() {
        let mut pool = used(1);
        for window in 0..100 {
            pool.note(1 + window * WINDOW_NS, Signal::Overload, 1, true);
        }
        assert_eq!(pool.size(), 1);
    }
}
