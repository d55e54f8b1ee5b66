//! How a shard sleeps: in the ring of its log, which the bell of its inboxes ends.

use std::{sync::atomic::Ordering::*, time::Duration};

use crate::{
    inbox::ShardInbox,
    linger::Linger,
    sync::{Instant, RingDevice},
};

/// The longest sleep, so that the wall clock is followed.
const SLEEP_MAX: Duration = Duration::from_secs(10);

/// Sleeps until something comes in, an operation ends, or `wake` has come, after it has looked for these for a while.
/// A shard that `hears` nothing sleeps over what comes in. True if it slept.
pub(crate) fn sleep(
    ring: &mut RingDevice,
    linger: &mut Linger,
    inbox: &ShardInbox,
    hears: bool,
    wake: Option<Instant>,
) -> bool {
    // An operation may have ended while another was being taken.
    if ring.has_completed() {
        return false;
    }
    let worked = Instant::now();
    while linger.goes_on(worked) {
        ring.reap();
        if ring.has_completed()
            || hears && (!inbox.is_empty() || inbox.stop.load(Relaxed))
            || wake.is_some_and(|wake| wake <= Instant::now())
        {
            return false;
        }
        Linger::yield_core();
    }
    if hears && !inbox.park() {
        return false;
    }
    let slept = Instant::now();
    let timeout = wake.map_or(SLEEP_MAX, |wake| {
        wake.saturating_duration_since(slept).min(SLEEP_MAX)
    });
    ring.wait(timeout);
    inbox.unpark();
    linger.slept(slept.elapsed());
    true
}
