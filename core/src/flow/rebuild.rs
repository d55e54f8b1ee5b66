//! Rebuild: what follows from the facts is made from them, once, at the end of a replay: lists, ordering keys, timers,
//! ages, credits in use, and what refers to which segment. Tasks are gone through in the order of their acceptance.

use alloc::vec::Vec;

use crate::{
    clock::Now,
    event::Counters,
    flow::clean::NAME_LIVE_BYTES,
    id::{FunctionId, Lsn},
    planted::{Bug, planted},
    shard::Shard,
    state::State,
    table::task::*,
};

impl Shard {
    /// The log has been read: the shard is ready to step. Leases that it found start again with a full term. Everything
    /// that ended before `saved` is in history, unless the log does not reach that far: then it is another one than history
    /// was fed from, an older copy for example, and history is asked about each.
    pub fn start(&mut self, now: Now, saved: Lsn) {
        assert!(self.replaying, "a shard starts once");
        let saved = if saved > self.replayed.behind {
            Lsn(0)
        } else {
            saved
        };
        self.now = Now {
            mono_ns: now.mono_ns,
            logged_ms: now.logged_ms.max(self.now.logged_ms),
        };
        let (unfinished, finished) = self.sort_out();
        self.keep_newest(finished, saved);
        self.find_heads(&unfinished);
        self.put_in_place(&unfinished);
        self.drop_empty_keys();
        self.find_lost_failures();
        self.count_names();
        self.start_history(saved, self.replayed.behind);
        self.replaying = false;
        self.tasks.rebuild_free();
        self.counters = Counters {
            recovered: unfinished.len() as u64,
            ..Default::default()
        };
        self.orphans_end_ns = now.mono_ns + self.options.lease_ms * 1_000_000;
        for function in 0..self.lanes.len() as u32 {
            self.arm_lane_age(FunctionId(function));
            if !self.lanes[function as usize].live {
                self.doom(FunctionId(function));
            }
        }
        self.count_at_start();
    }

    /// The tasks that have not ended, in the order of their acceptance, and those that have, in that of their ends.
    fn sort_out(&self) -> (Vec<u32>, Vec<u32>) {
        let (mut unfinished, mut finished) = (Vec::new(), Vec::new());
        self.tasks.scan(0..self.tasks.used(), |slot, task| {
            if task.state().terminal() {
                finished.push((task.holder, slot));
            } else {
                // By time first: tasks of several logs that were placed together may have the same numbers.
                let order = u128::from(task.accepted_ms()) << 40 | u128::from(task.seq());
                unfinished.push(order << 32 | u128::from(slot));
            }
        });
        if !planted(Bug::OrderLostInMove) {
            unfinished.sort_unstable();
        }
        finished.sort_unstable();
        (
            unfinished.into_iter().map(|task| task as u32).collect(),
            finished.into_iter().map(|(_, slot)| slot).collect(),
        )
    }

    /// Keeps the tasks that ended last, in front those that history has; those whose records are gone from the log were
    /// forgotten before the restart.
    fn keep_newest(&mut self, finished: Vec<u32>, saved: Lsn) {
        let has_history = self.has_history();
        let (mut had, mut unsaved) = (Vec::new(), Vec::new());
        for slot in finished {
            self.tasks.pack(1);
            let task = &mut self.tasks[slot];
            let end = Lsn(task.at);
            if !has_history || end.0 != 0 && end < saved {
                task.clear(FLAG_UNSAVED);
            } else if saved == Lsn(0) {
                // A snapshot may speak of a history that was taken away.
                task.set(FLAG_UNSAVED);
            }
            if task.outcome_bytes() == 0 {
                task.at = 0;
            }
            if task.has(FLAG_UNSAVED) {
                unsaved.push(slot);
            } else {
                had.push(slot);
            }
        }
        for slot in had.into_iter().chain(unsaved) {
            self.tasks.pack(1);
            let task = &mut self.tasks[slot];
            task.holder = NIL;
            let (position, outcome) = (task.position, Lsn(task.at));
            if self.is_gone(position) || outcome.0 != 0 && self.is_gone(outcome) {
                self.tasks.remove(slot);
                continue;
            }
            self.count_records(slot);
            self.keep_finished(slot);
        }
    }

    /// Counts who belongs to which ordering key, and makes those that were leased the heads of theirs.
    fn find_heads(&mut self, unfinished: &[u32]) {
        if self.keys.used() == 0 {
            return;
        }
        for &slot in unfinished {
            self.tasks.pack(1);
            let task = &mut self.tasks[slot];
            let index = task.key;
            if index == NIL {
                continue;
            }
            let leased = task.attempt > 0;
            if leased {
                task.set(FLAG_KEY_HEAD);
            }
            let key = &mut self.keys[index];
            key.members += 1;
            if leased {
                assert!(key.head == NIL, "one task of a key is beyond `Enqueued`");
                key.head = slot;
                // A moved failure that held the key may stand behind the lease that shows that it was let go.
                key.held = false;
            }
        }
        for index in 0..self.keys.used() {
            let holds = self.lanes[self.keys[index].function.0 as usize].holds_keys();
            self.keys[index].held &= holds;
        }
    }

    fn put_in_place(&mut self, unfinished: &[u32]) {
        self.due.look_ahead(self.now.logged_ms, &mut self.tasks);
        for &slot in unfinished {
            self.tasks.pack(1);
            self.count_records(slot);
            let task = self.tasks[slot];
            let tenant = self.tenant_of(slot).0 as usize;
            match task.state() {
                State::Scheduled | State::Retrying => {
                    self.queues[tenant].waiting += 1;
                    if task.state() == State::Scheduled {
                        self.due.insert(task.at, slot, &mut self.tasks);
                    } else {
                        self.own_age(slot);
                        if !planted(Bug::RetryForgotten) {
                            self.due.insert(task.at, slot, &mut self.tasks);
                        }
                    }
                }
                State::Enqueued => {
                    self.queues[tenant].waiting += 1;
                    self.tasks[slot].at = self.now.mono_us();
                    if task.max_age_s() > 0 {
                        self.own_age(slot);
                    }
                    self.enqueue(slot, false);
                }
                State::Running | State::Stopping => {
                    if task.max_age_s() > 0 {
                        self.own_age(slot);
                    }
                    self.adopt_credit(slot);
                    self.hand_to(slot, NIL);
                    self.tasks[slot].at = self.now.mono_us();
                }
                State::Dequeued
                | State::Paused
                | State::Succeeded
                | State::Failed
                | State::Stopped
                | State::Expired
                | State::Invalid => {
                    unreachable!("no record leaves an unfinished task in this state")
                }
            }
        }
    }

    /// Keys whose tasks have all ended go, unless a failure holds them.
    fn drop_empty_keys(&mut self) {
        for index in 0..self.keys.used() {
            let key = self.keys[index];
            if key.members == 0 && !key.held {
                self.keys_by_hash.remove(key.hash);
                self.keys.remove(index);
            }
        }
    }

    /// Of the failures that hold keys, those that are not in memory.
    fn find_lost_failures(&mut self) {
        for (key, failure) in self.replayed.failures.take().unwrap_or_default() {
            if self.keys[key].held && self.tasks.find(failure.request).is_none() {
                self.replayed.lost.insert(failure.request, failure);
            }
        }
    }

    fn count_names(&mut self) {
        let mut names = core::mem::take(&mut self.names);
        let mut gone = Vec::new();
        for (hash, name) in names.iter() {
            if u64::from(name.segment) < self.first_segment {
                gone.push(hash); // Forgotten after the snapshot had been taken, and its segment with it.
            } else {
                self.reference(u64::from(name.segment));
            }
        }
        for hash in gone {
            names.remove(hash);
        }
        self.live_bytes += NAME_LIVE_BYTES * names.len() as u64;
        self.names = names;
        if self.replayed.names_moved {
            let mut ages = Vec::new();
            while let Some(age) = self.name_ages.pop() {
                ages.push(age);
            }
            ages.sort_unstable_by_key(|&(_, accepted_ms)| accepted_ms);
            for age in ages {
                self.name_ages.push(age);
            }
        }
    }

    /// The segments of a task's records are needed, and so are their bytes.
    fn count_records(&mut self, slot: u32) {
        let task = self.tasks[slot];
        self.live_bytes += u64::from(task.record_bytes() + task.outcome_bytes());
        self.reference(self.segment_of(task.position));
        if task.state().terminal() && task.at != 0 {
            self.reference(self.segment_of(Lsn(task.at)));
        }
    }

    fn is_gone(&self, position: Lsn) -> bool {
        self.segment_of(position) < self.first_segment
    }
}
