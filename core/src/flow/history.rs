//! History: tasks that have ended are handed to whoever keeps them on the disk, and stay in memory, and with them their
//! place in the log, until that is done. Nothing is told by itself: the one who keeps them asks, says how many of those
//! that it was given are safe, and gets the next ones.
//!
//! The list of finished tasks is in the order of their ends: first those that are safe, which are kept as long as there
//! is room; then those that were handed out; then those that were not.

use alloc::{collections::VecDeque, vec::Vec};

use crate::{
    event::{Effects, Ended, EndedBatch},
    id::Lsn,
    planted::{Bug, planted},
    shard::Shard,
    table::task::*,
};

/// Ends between two marks. What is handed out again after a crash, though it was safe, is at most this.
const MARK_EVERY: u64 = 1024;

/// Finished tasks that are not safe yet. Volatile: a start finds them again behind the position up to which all are.
#[derive(Debug)]
pub(crate) struct Unsaved {
    /// The first of them, and the first that was not handed out; `NIL` for none.
    pub(crate) first: u32,
    next: u32,
    /// Tasks between the two.
    handed: u32,
    pub(crate) count: u32,
    /// Bytes of their records.
    pub(crate) bytes: u64,
    /// Ends since the start, and how many of them are safe.
    ends: u64,
    saved: u64,
    /// The last end's position.
    last_end: Lsn,
    /// Every so many ends, and where all were handed out: their number, and the position behind the last of them.
    marks: VecDeque<(u64, Lsn)>,
    /// All ends before this position are safe.
    through: Lsn,
    /// Of the ends, those that the start found.
    replayed: u64,
}

impl Default for Unsaved {
    fn default() -> Unsaved {
        Unsaved {
            first: NIL,
            next: NIL,
            handed: 0,
            count: 0,
            bytes: 0,
            ends: 0,
            saved: 0,
            last_end: Lsn(0),
            marks: VecDeque::new(),
            through: Lsn(0),
            replayed: 0,
        }
    }
}

impl Shard {
    /// True if somebody keeps what has ended.
    pub(crate) fn has_history(&self) -> bool {
        self.options.history_lag_max > 0
    }

    /// Bytes of the records of ended tasks that history does not have yet.
    pub fn history_lag_bytes(&self) -> u64 {
        self.unsaved.bytes
    }

    /// A task has ended by the record at `end`: history does not have it.
    pub(crate) fn note_end(&mut self, slot: u32, end: Lsn) {
        if self.has_history() {
            self.tasks[slot].set(FLAG_UNSAVED);
            self.unsaved.last_end = self.unsaved.last_end.max(end);
        }
    }

    /// A task that history does not have is the last of the finished ones.
    pub(crate) fn count_unsaved(&mut self, slot: u32) {
        let task = &self.tasks[slot];
        let unsaved = &mut self.unsaved;
        unsaved.count += 1;
        unsaved.bytes += u64::from(task.record_bytes() + task.outcome_bytes());
        if unsaved.first == NIL {
            unsaved.first = slot;
        }
        if unsaved.next == NIL {
            unsaved.next = slot;
        }
        unsaved.ends += 1;
        if unsaved.ends.is_multiple_of(MARK_EVERY) && !self.replaying {
            unsaved
                .marks
                .push_back((unsaved.ends, Lsn(unsaved.last_end.0 + 1)));
        }
    }

    /// The finished tasks are in place. Everything that ended before `saved` is safe; of the rest no part is known to be
    /// before all of it is, which all stands before `behind`.
    pub(crate) fn start_history(&mut self, saved: Lsn, behind: Lsn) {
        let unsaved = &mut self.unsaved;
        unsaved.through = saved;
        unsaved.replayed = unsaved.ends;
        unsaved.last_end = unsaved.last_end.max(Lsn(behind.0.saturating_sub(1)));
        if unsaved.ends > 0 {
            unsaved.marks.push_back((unsaved.ends, behind));
        }
    }

    /// Of the tasks that were handed out, the first `saved` are safe. With `again`, the others are handed out once more,
    /// because they could not be read where they were said to be.
    pub(crate) fn hand_to_history(
        &mut self,
        saved: u32,
        again: bool,
        rows_max: u32,
        bytes_max: u64,
        effects: &mut Effects,
    ) {
        self.saved(saved);
        if again {
            self.unsaved.next = self.unsaved.first;
            self.unsaved.handed = 0;
        }
        let left = self.unsaved.count - self.unsaved.handed;
        let mut batch = EndedBatch {
            rows: Vec::with_capacity(left.min(rows_max) as usize),
            ..EndedBatch::default()
        };
        let mut bytes = 0;
        while self.unsaved.next != NIL && (batch.rows.len() as u32) < rows_max && bytes < bytes_max
        {
            let slot = self.unsaved.next;
            let task = &self.tasks[slot];
            bytes += u64::from(task.record_bytes() + task.outcome_bytes());
            batch.rows.push(Ended {
                tenant: self.tenant_of(slot),
                outcome_bytes: task.outcome_bytes(),
                view: self.view(slot),
            });
            self.unsaved.next = task.next;
            self.unsaved.handed += 1;
        }
        let unsaved = &mut self.unsaved;
        if unsaved.next == NIL
            && unsaved.marks.back().map_or(unsaved.saved, |mark| mark.0) < unsaved.ends
        {
            let behind = Lsn(unsaved.last_end.0 + 1);
            unsaved.marks.push_back((unsaved.ends, behind));
        }
        let number = unsaved.saved + u64::from(unsaved.handed);
        let before = number - batch.rows.len() as u64;
        batch.may_be_saved = before < unsaved.replayed;
        let marks = unsaved.marks.partition_point(|mark| mark.0 <= number);
        batch.through = match marks.checked_sub(1) {
            Some(last) => unsaved.marks[last].1,
            None => unsaved.through,
        };
        batch.lag_bytes = unsaved.bytes;
        effects.history = Some(batch);
        if planted(Bug::HistoryConfirmsTooEarly) {
            self.saved(self.unsaved.handed);
        }
        self.after_commit();
    }

    fn saved(&mut self, count: u32) {
        for _ in 0..count.min(self.unsaved.handed) {
            let slot = self.unsaved.first;
            let task = &mut self.tasks[slot];
            task.clear(FLAG_UNSAVED);
            let unsaved = &mut self.unsaved;
            unsaved.count -= 1;
            unsaved.bytes -= u64::from(task.record_bytes() + task.outcome_bytes());
            unsaved.first = task.next;
            unsaved.handed -= 1;
            unsaved.saved += 1;
        }
        let unsaved = &mut self.unsaved;
        while let Some(mark) = unsaved.marks.front().filter(|m| m.0 <= unsaved.saved) {
            unsaved.through = mark.1;
            unsaved.marks.pop_front();
        }
        self.trim_finished();
    }

    /// The oldest of the finished tasks go where there are enough, but none that history lacks.
    pub(crate) fn trim_finished(&mut self) {
        while (self.finished.count > self.options.finished_max
            || self.finished_bytes > self.options.finished_bytes_max)
            && !self.tasks[self.finished.head].has(FLAG_UNSAVED)
        {
            self.forget(self.finished.head);
        }
    }

    /// Panics unless those that are not safe are the last of the finished tasks, and counted.
    pub(crate) fn audit_history(&self) {
        let (mut count, mut bytes, mut handed) = (0, 0, 0);
        let (mut slot, mut first, mut met_next) = (self.finished.head, NIL, false);
        while slot != NIL {
            let task = &self.tasks[slot];
            let unsaved = task.has(FLAG_UNSAVED);
            assert!(
                unsaved || first == NIL,
                "what history has ended before what it has not"
            );
            if unsaved {
                first = if first == NIL { slot } else { first };
                met_next |= slot == self.unsaved.next;
                handed += u32::from(!met_next);
                count += 1;
                bytes += u64::from(task.record_bytes() + task.outcome_bytes());
            }
            slot = task.next;
        }
        let unsaved = &self.unsaved;
        assert_eq!(
            (first, count, bytes, handed),
            (unsaved.first, unsaved.count, unsaved.bytes, unsaved.handed),
            "first, count, bytes and handed out of what history lacks"
        );
        assert_eq!(
            unsaved.ends - unsaved.saved,
            u64::from(count),
            "ends that are not safe"
        );
    }
}
