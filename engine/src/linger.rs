//! How a thread waits: it looks for work for a while before it sleeps, and yields its core between looks.
//!
//! A sleeping thread on an idle core takes the system tens of microseconds to wake, a yield a fraction of one; what is
//! about to come is met awake. The time follows what happened: it doubles when work came soon after the thread had gone
//! to sleep, and halves when it did not, as the kernel's halt polling does. Without work it is nothing.
//! `docs/decisions/0005-lingering.md` has what was measured.

use std::{io, time::Duration};

use crate::sync::{Instant, yield_now};

/// What the time begins with when it grows.
const LEAST: Duration = Duration::from_micros(25);

/// How long one thread lingers. Owned by that thread.
#[derive(Debug)]
pub struct Linger {
    most: Duration,
    now: Duration,
}

impl Linger {
    /// A thread that lingers for `most` at most; zero for one that sleeps at once.
    pub fn new(most: Duration) -> Linger {
        Linger {
            most,
            now: Duration::ZERO,
        }
    }

    /// True while it is too early to sleep, for a thread whose last work ended at `worked`.
    pub fn goes_on(&self, worked: Instant) -> bool {
        !self.now.is_zero() && worked.elapsed() < self.now
    }

    /// Notes how long the thread has slept.
    pub fn slept(&mut self, time: Duration) {
        self.now = if time <= self.most {
            (self.now * 2).clamp(LEAST.min(self.most), self.most)
        } else if self.now > LEAST {
            self.now / 2
        } else {
            Duration::ZERO
        };
    }

    /// Lets other threads of this core have it.
    pub fn yield_core() {
        yield_now();
    }
}

/// Asks the scheduler to give the calling thread short turns, and so soon ones. A thread that yields gives up the rest
/// of its turn to whoever shares its core, which is milliseconds of them otherwise. Where the kernel does not offer it
/// (before 6.12) or forbids it, nothing is lost but that.
pub fn take_short_turns() {
    /// The shortest turn that the kernel grants.
    const TURN_NS: u64 = 100_000;
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: TURN_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the structure is whole and says its size; the call reads it and nothing else of this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            0,
            std::ptr::from_ref(&attributes),
            0,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "the scheduler grants no short turns");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(200);

    fn after(sleeps_us: &[u64]) -> Duration {
        let mut linger = Linger::new(MOST);
        for &us in sleeps_us {
            linger.slept(Duration::from_micros(us));
        }
        linger.now
    }

    #[test]
    fn it_grows_while_sleeps_are_short_and_ends_while_they_are_long() {
        let us = Duration::from_micros;
        assert_eq!(after(&[]), Duration::ZERO);
        assert_eq!(after(&[100]), us(25));
        assert_eq!(after(&[100, 200, 1]), us(100));
        assert_eq!(after(&[100, 100, 100, 100, 100]), MOST);
        assert_eq!(after(&[100, 100, 100, 100, 5_000]), us(100));
        assert_eq!(
            after(&[100, 100, 100, 100, 300, 300, 300, 300]),
            Duration::ZERO
        );
    }

    #[test]
    fn an_idle_thread_and_one_that_must_not_never_linger() {
        let mut idle = Linger::new(MOST);
        idle.slept(Duration::from_secs(1));
        assert!(!idle.goes_on(Instant::now()));
        let mut never = Linger::new(Duration::ZERO);
        never.slept(Duration::ZERO);
        assert!(!never.goes_on(Instant::now()));
    }

    #[test]
    fn it_lingers_from_the_last_work_on() {
        let mut linger = Linger::new(Duration::from_secs(3600));
        linger.slept(Duration::from_secs(1));
        assert!(linger.goes_on(Instant::now() + Duration::from_secs(1)));
        let long_ago = Instant::now().checked_sub(LEAST * 2);
        assert!(long_ago.is_none_or(|long_ago| !linger.goes_on(long_ago)));
    }
}
