//! The history in the simulation: whoever keeps ended tasks asks the shards for them, has them in memory for a while,
//! flushes now and then, and tells the shards late. A crash takes what was not flushed.

use std::collections::BTreeMap;

use pelton_core::{
    event::{Control, Ended, EndedBatch},
    id::{Lsn, RequestId},
};

use crate::{
    oracle::{Check, broken},
    world::{Happening, World},
};

/// One shard's part.
#[derive(Debug, Default)]
struct Source {
    /// It was asked and has not answered.
    asked: bool,
    /// Of what it handed over, what is in memory, and what is flushed and was not confirmed.
    taken: u32,
    saved: u32,
    /// What it handed over could not be read: all of it is asked for again.
    again: bool,
    /// Rows in memory, and how far the shard is in history with them.
    rows: Vec<Ended>,
    through: Lsn,
    /// The same on the disk.
    flushed_through: Lsn,
}

/// What history has. Owned by one run; survives every crash.
#[derive(Debug)]
pub struct History {
    sources: Vec<Source>,
    /// Rows on the disk.
    pub rows: BTreeMap<RequestId, Ended>,
}

impl History {
    /// Nothing has ended yet.
    pub fn new(shards: u16) -> History {
        History {
            sources: (0..shards).map(|_| Source::default()).collect(),
            rows: BTreeMap::new(),
        }
    }

    /// Everything of a shard that ended before this position is on history's disk.
    pub fn through(&self, shard: usize) -> Lsn {
        self.sources[shard].flushed_through
    }

    /// All tasks were placed on so many shards: what is known of the logs is void, what history has it keeps.
    pub fn place(&mut self, shards: u16) {
        self.sources = History::new(shards).sources;
    }

    /// The power has failed.
    pub fn crashed(&mut self) {
        for source in &mut self.sources {
            *source = Source {
                flushed_through: source.flushed_through,
                through: source.flushed_through,
                ..Source::default()
            };
        }
    }

    /// True if nothing is to be flushed or told.
    pub fn idle(&self) -> bool {
        self.sources
            .iter()
            .all(|source| source.taken == 0 && source.saved == 0)
    }
}

impl World {
    /// Asks shards, flushes, and comes back.
    pub(crate) fn history_acts(&mut self) -> Check {
        if !self.plan.history {
            return Ok(());
        }
        let delay = self.around(self.plan.history_ns);
        self.after(delay, Happening::HistoryActs);
        if !self.up {
            return Ok(());
        }
        if self.random.one_in(3) {
            self.flush_history()?;
        }
        for shard in 0..self.hosts.len() {
            let rows_max = self.random.below(self.plan.history_rows) as u32;
            let lose = !self.healing && self.random.one_in(30);
            let source = &mut self.history.sources[shard];
            let idle = rows_max == 0 || self.hosts[shard].shard.history_lag_bytes() == 0;
            if source.asked || idle && source.saved == 0 {
                continue;
            }
            if lose {
                // Records could not be read: what is in memory goes.
                source.again = true;
                source.rows.clear();
                source.taken = 0;
                source.through = source.flushed_through;
            }
            let saved = source.saved.min(1 + rows_max);
            let again = source.again && source.saved == saved && source.taken == 0;
            let rows_max = if source.again && !again { 0 } else { rows_max };
            source.saved -= saved;
            source.again &= !again;
            source.asked = true;
            let control = Control::History {
                saved,
                again,
                rows_max,
                bytes_max: 64 << 10,
            };
            self.trace
                .event(self.now_ns, &[40, shard as u64, u64::from(saved)], || {
                    format!("history -> shard {shard}: {control:?}")
                });
            self.tell(shard, control);
        }
        Ok(())
    }

    /// A shard has handed over what has ended.
    pub(crate) fn history_answered(&mut self, shard: usize, batch: EndedBatch) -> Check {
        self.trace
            .event(self.now_ns, &[41, shard as u64, batch.through.0], || {
                format!("shard {shard} -> history: {batch:?}")
            });
        let retired = self.hosts[shard].shard.retire_before();
        let source = &mut self.history.sources[shard];
        source.asked = false;
        if source.again || batch.rows.is_empty() {
            return Ok(());
        }
        for row in &batch.rows {
            let outcome = row.view.outcome;
            if row.view.record.0 < retired || outcome.0 != 0 && outcome < retired {
                return broken(
                    "history_can_read_what_has_ended",
                    format!(
                        "{} is handed over and the log before {retired:?} is gone: {row:?}",
                        row.view.request
                    ),
                );
            }
            self.oracle.ended_for_history(row)?;
        }
        source.taken += batch.rows.len() as u32;
        source.rows.extend(batch.rows);
        source.through = batch.through;
        Ok(())
    }

    fn flush_history(&mut self) -> Check {
        for source in &mut self.history.sources {
            source.saved += std::mem::take(&mut source.taken);
            source.flushed_through = source.through;
            for row in source.rows.drain(..) {
                self.history.rows.insert(row.view.request, row);
            }
        }
        self.trace.event(self.now_ns, &[42], || {
            format!("history has {} rows", self.history.rows.len())
        });
        Ok(())
    }

    /// Every task that has ended is in the memory of its shard or in history.
    pub(crate) fn check_history(&self) -> Check {
        if !self.plan.history {
            return Ok(());
        }
        for (&request, known) in &self.oracle.tasks {
            let shard = self.shard_of(request.cell());
            if known.state.terminal()
                && !self.hosts[shard].shard.holds(request)
                && !self.history.rows.contains_key(&request)
            {
                return broken(
                    "no_row_is_lost",
                    format!(
                        "{request} has ended as {} and is neither in the memory of shard {shard} nor in history",
                        known.state
                    ),
                );
            }
        }
        Ok(())
    }

    /// A shard says that it does not hold a task: then it has ended, and history has it.
    pub(crate) fn check_not_held(&self, shard: usize, request: Option<RequestId>) -> Check {
        let Some(known) = request.and_then(|request| self.oracle.tasks.get(&request)) else {
            return Ok(());
        };
        let request = request.unwrap_or_default();
        if !self.plan.history || self.history.rows.contains_key(&request) {
            return Ok(());
        }
        broken(
            "a_reader_finds_what_has_ended",
            format!(
                "shard {shard} does not hold {request}, which is {}, and history does not have it",
                known.state
            ),
        )
    }
}
