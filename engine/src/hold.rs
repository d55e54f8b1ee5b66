//! How a backup has running shards keep their logs as they are: each holds its log, says after every turn how far it is
//! durable, and lets go when it is told to, or by itself where the disk runs low or the shard ends.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::*},
    },
    time::{Duration, Instant},
};

use pelton_core::id::{Lsn, ShardId};

use crate::engine::{Shared, lock};

/// How long a shard may take to hear that its log is wanted.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// What a shard says of its log.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Said {
    Nothing,
    /// It is held. The last durable batch says that everything before `retired` is dead.
    Held {
        retired: Lsn,
        durable: Lsn,
    },
    /// It is not held any more, and why.
    Lost(Lost),
}

/// Why a shard has let go of its log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Lost {
    /// So few bytes are free on the disk of its log.
    Space { free: u64 },
    /// It has ended, or does not answer.
    Ended,
}

/// One shard's part of a backup.
#[derive(Debug)]
pub(crate) struct Hold {
    said: Mutex<Said>,
    changed: Condvar,
    released: AtomicBool,
}

impl Hold {
    fn new() -> Hold {
        Hold {
            said: Mutex::new(Said::Nothing),
            changed: Condvar::new(),
            released: AtomicBool::new(false),
        }
    }

    /// The log is held, and stands like this.
    pub(crate) fn note(&self, retired: Lsn, durable: Lsn) {
        let mut said = lock(&self.said);
        if *said == Said::Nothing {
            self.changed.notify_all();
        }
        *said = Said::Held { retired, durable };
    }

    /// The log is not held any more.
    pub(crate) fn lose(&self, why: Lost) {
        *lock(&self.said) = Said::Lost(why);
        self.changed.notify_all();
    }

    /// True once the backup has what it wanted.
    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Acquire)
    }
}

/// Where a shard finds what is wanted of it when it is called.
#[derive(Debug, Default)]
pub(crate) struct HoldPlace(Mutex<Option<Arc<Hold>>>);

impl HoldPlace {
    pub(crate) fn take(&self) -> Option<Arc<Hold>> {
        lock(&self.0).take()
    }
}

/// The logs of all shards, held until this is dropped.
pub(crate) struct Holds {
    shared: Arc<Shared>,
    holds: Vec<Arc<Hold>>,
}

impl Holds {
    /// Asks every shard, and waits until all of them hold their logs.
    pub(crate) fn take(shared: &Arc<Shared>) -> Result<Holds, (ShardId, Lost)> {
        let mut this = Holds {
            shared: Arc::clone(shared),
            holds: Vec::new(),
        };
        for (place, inbox) in shared.holds.iter().zip(&shared.inboxes) {
            let hold = Arc::new(Hold::new());
            *lock(&place.0) = Some(Arc::clone(&hold));
            this.holds.push(hold);
            inbox.call();
        }
        let until = Instant::now() + ANSWER_WAIT;
        for (shard, hold) in this.holds.iter().enumerate() {
            let mut said = lock(&hold.said);
            while *said == Said::Nothing {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() || shared.inboxes[shard].gone.load(Relaxed) {
                    return Err((ShardId(shard as u16), Lost::Ended));
                }
                let wait = hold
                    .changed
                    .wait_timeout(said, left.min(Duration::from_millis(100)));
                said = match wait {
                    Ok((said, _)) => said,
                    Err(poisoned) => poisoned.into_inner().0,
                };
            }
        }
        this.stand()?;
        Ok(this)
    }

    /// By shard: what its last durable batch says of what is dead, and where that batch ends. What a shard has answered
    /// for before this is called stands in front of that. Shard 0 is asked last: it orders configuration, and no other
    /// shard may know more of that than it.
    pub(crate) fn stand(&self) -> Result<Vec<(Lsn, Lsn)>, (ShardId, Lost)> {
        let stand = self.holds.iter().enumerate().rev().map(|(shard, hold)| {
            let lost = match &*lock(&hold.said) {
                Said::Held { retired, durable }
                    if !self.shared.inboxes[shard].gone.load(Relaxed) =>
                {
                    return Ok((*retired, *durable));
                }
                Said::Held { .. } | Said::Nothing => Lost::Ended,
                Said::Lost(why) => why.clone(),
            };
            Err((ShardId(shard as u16), lost))
        });
        let mut stand = stand.collect::<Result<Vec<_>, _>>()?;
        stand.reverse();
        Ok(stand)
    }
}

impl Drop for Holds {
    fn drop(&mut self) {
        for (shard, hold) in self.holds.iter().enumerate() {
            hold.released.store(true, Release);
            self.shared.inboxes[shard].call();
        }
    }
}
