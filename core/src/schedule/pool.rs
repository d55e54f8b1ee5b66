//! The AIMD pool of a queue: how many of its tasks may be fetched or executing at once.
//!
//! Executors announce their slots, so those are not probed for; the pool learns what nobody announces, the capacity of
//! the function and of what lies behind it. It therefore starts wide and is cut when it hurts: additive increase,
//! multiplicative decrease (Chiu and Jain, 1989), at most one cut a window, growth only where it was the limit.
//!
//! A size says something only about what was really used. A cut is therefore taken from the most credits in use lately,
//! as TCP takes it from what is in flight and not from a window that nobody filled (RFC 5681, section 3.1). That alone
//! would ruin a quiet tenant: one throttle of its only task leaves one credit, although it ran hundreds side by side a
//! minute ago. What a clean window has used is therefore remembered as *good*, and a pool below that doubles from
//! window to window, as TCP starts slowly up to its threshold and keeps that threshold over times in which it had
//! little to send (RFC 7661). Each cut takes the same share of what is remembered, so that a capacity that is gone for
//! good is unlearned as fast as the size itself.

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
    /// Most credits in use in this window, and in the one before.
    peak: u32,
    peak_before: u32,
    /// Most credits in use in a clean window; less by each cut since.
    good: u32,
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
            peak: 0,
            peak_before: 0,
            good: 0,
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
        self.peak = self.peak.max(self.in_use);
        free
    }

    /// Takes a credit for a task that runs already: a lease found by recovery.
    pub fn adopt(&mut self) {
        self.in_use += 1;
        self.peak = self.peak.max(self.in_use);
    }

    /// Gives a credit back.
    pub fn give(&mut self) {
        assert!(self.in_use > 0, "a credit is given back once");
        self.in_use -= 1;
    }

    /// Notes an attempt's end, whose credit has been given back. `lane` is its function, `only` says that the queue has
    /// no other active lane.
    pub fn note(&mut self, now_ns: u64, signal: Signal, lane: u32, only: bool) {
        if now_ns >= self.window_end_ns {
            self.next_window(now_ns);
        }
        if signal == Signal::Clean {
            return;
        }
        if lane != self.last_lane {
            self.overloaded_lanes = self.overloaded_lanes.saturating_add(1);
            self.last_lane = lane;
        }
        if !self.cut && (only || self.overloaded_lanes >= LANES_TO_CUT) {
            let used = self.peak.max(self.peak_before);
            self.size = less(self.size.min(used)).max(1);
            self.good = less(self.good);
            self.cut = true;
        }
    }

    /// Ends a window. Only an attempt's end does so, so that a window in which none ended is a long one.
    fn next_window(&mut self, now_ns: u64) {
        // What was in use before a pause says nothing about now; what ends now was in use all the time.
        let paused = now_ns >= self.window_end_ns + WINDOW_NS;
        let peak = if paused { 0 } else { self.peak };
        self.peak_before = peak.max(self.in_use + 1);
        if self.window_end_ns > 0 && self.overloaded_lanes == 0 {
            // What still ran beyond the size after a cut is no evidence: that was too much.
            self.good = self.good.max(self.peak_before.min(self.size));
            if self.limited {
                let grown = if self.size < self.good {
                    (self.size * 2).min(self.good)
                } else {
                    self.size + INCREASE
                };
                self.size = grown.min(POOL_CREDITS_MAX);
            }
        }
        self.peak = self.in_use;
        self.window_end_ns = now_ns + WINDOW_NS;
        self.limited = false;
        self.overloaded_lanes = 0;
        self.last_lane = u32::MAX;
        self.cut = false;
    }
}

/// What a cut leaves of `credits`.
fn less(credits: u32) -> u32 {
    credits * DECREASE_TENTHS / 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::{String, ToString};
    use expect_test::{Expect, expect};

    /// A pool that meets one window after the other: so many tasks are wanted at once, and what runs beyond the capacity
    /// is throttled. The trace shows the size after each window.
    fn check(windows: &[(usize, u32, u32)], sizes: Expect) {
        let mut pool = Pool::default();
        let mut now_ns = 1;
        let mut trace = String::new();
        for &(count, wanted, capacity) in windows {
            for _ in 0..count {
                while pool.in_use() < wanted && pool.take() {}
                now_ns += WINDOW_NS;
                for left in (0..pool.in_use()).rev() {
                    let signal = if left < capacity {
                        Signal::Clean
                    } else {
                        Signal::Overload
                    };
                    pool.give();
                    pool.note(now_ns, signal, 1, true);
                }
                trace += &pool.size().to_string();
                trace += " ";
            }
            trace.pop();
            trace += "\n";
        }
        sizes.assert_eq(&trace);
    }

    #[test]
    fn a_quiet_tenant_that_is_throttled_once_is_soon_back_where_it_was() {
        check(
            &[(3, 500, 1000), (3, 1, 1000), (1, 1, 0), (14, 500, 1000)],
            expect![[r#"
                65536 65536 65536
                65536 65536 65536
                1
                1 2 4 8 16 32 64 128 256 400 416 432 448 464
            "#]],
        );
    }

    #[test]
    fn a_tenant_that_never_ran_much_grows_by_steps() {
        check(
            &[(1, 1, 0), (8, 500, 1000)],
            expect![[r#"
            1
            1 17 33 49 65 81 97 113
        "#]],
        );
    }

    #[test]
    fn the_size_swings_around_the_capacity() {
        check(
            &[(40, 1000, 100)],
            expect![[r#"
            800 640 512 409 327 261 208 166 132 105 84 84 100 116 92 92 108 86 86 102 81 81 97 113 90 90 106 84 84 100 116 92 92 108 86 86 102 81 81 97
        "#]],
        );
    }

    #[test]
    fn a_capacity_that_is_gone_for_good_is_unlearned() {
        check(
            &[(3, 500, 1000), (40, 500, 10)],
            expect![[r#"
            65536 65536 65536
            400 320 256 204 163 130 104 83 66 52 41 32 25 20 16 12 9 9 25 20 16 12 9 9 25 20 16 12 9 9 25 20 16 12 9 9 25 20 16 12
        "#]],
        );
    }

    #[test]
    fn a_throttle_among_many_ends_of_one_moment_cuts_from_what_they_used() {
        let mut pool = Pool::default();
        for window in 1..=3 {
            while pool.in_use() < 100 {
                assert!(pool.take());
            }
            for left in (0..100).rev() {
                pool.give();
                let last = window == 3 && left == 0;
                let signal = if last {
                    Signal::Overload
                } else {
                    Signal::Clean
                };
                pool.note(window * WINDOW_NS, signal, 1, true);
            }
        }
        assert_eq!(pool.size(), 80);
    }

    #[test]
    fn what_was_in_use_before_a_pause_does_not_count() {
        let mut pool = Pool::default();
        for now_ns in [1, 1 + WINDOW_NS] {
            for _ in 0..100 {
                assert!(pool.take());
            }
            for _ in 0..100 {
                pool.give();
                pool.note(now_ns, Signal::Clean, 1, true);
            }
        }
        assert!(pool.take());
        pool.give();
        pool.note(10 * WINDOW_NS, Signal::Overload, 1, true);
        assert_eq!(pool.size(), 1);
    }

    #[test]
    fn an_overload_cuts_once_a_window_and_from_what_was_in_use() {
        let mut pool = Pool::default();
        for _ in 0..100 {
            assert!(pool.take());
        }
        let mut sizes = [0; 3];
        for (size, now_ns) in sizes.iter_mut().zip([1, 2, 1 + WINDOW_NS]) {
            pool.give();
            pool.note(now_ns, Signal::Overload, 1, true);
            *size = pool.size();
        }
        assert_eq!(sizes, [80, 80, 64]);
    }

    #[test]
    fn one_lane_of_many_does_not_cut_its_siblings() {
        let mut pool = Pool::default();
        for _ in 0..100 {
            assert!(pool.take());
        }
        let mut sizes = [0; 3];
        for (size, lane) in sizes.iter_mut().zip([1, 1, 2]) {
            pool.give();
            pool.note(1, Signal::Overload, lane, false);
            *size = pool.size();
        }
        assert_eq!(sizes, [POOL_CREDITS_MAX, POOL_CREDITS_MAX, 80]);
    }

    #[test]
    fn it_grows_only_after_a_clean_window_in_which_it_was_the_limit() {
        check(
            &[(1, 10, 0), (1, 9, 10), (1, 9, 10), (2, 8, 10)],
            expect![[r#"
                8
                8
                24
                24 24
            "#]],
        );
    }

    #[test]
    fn it_never_falls_below_one() {
        check(
            &[(1, 10, 0), (20, 1, 0)],
            expect![[r#"
            8
            6 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
        "#]],
        );
    }
}
