//! Due: the tasks that wait for a time, by that time. What is due soon is sorted. What is due later lies unsorted in
//! buckets of some minutes and is sorted when its time comes near, so that a delay of a year costs a slot's number and
//! neither a search nor a place in a large tree.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use crate::table::task::{NIL, TaskTable};

/// A bucket is `2^18` ms wide, four minutes and a half.
const BUCKET_SHIFT: u32 = 18;
/// Slots in one piece of a bucket.
const CHUNK: usize = 1024;
/// Tasks that are taken out of a bucket in one go.
const SORTED_MAX: usize = 64;

/// Tasks by the logged time at which they are due. A task in a bucket keeps its index there in its `prev`: it is in no
/// list.
#[derive(Debug, Default)]
pub struct Due {
    near: BTreeSet<(u64, u32)>,
    far: BTreeMap<u64, Bucket>,
    /// Tasks due in buckets below this one are sorted.
    horizon: u64,
}

/// Slots in no order, in pieces, so that none is copied when there are many.
#[derive(Debug, Default)]
struct Bucket {
    full: Vec<Vec<u32>>,
    last: Vec<u32>,
}

impl Bucket {
    /// Puts a slot in; its index.
    fn push(&mut self, slot: u32) -> u32 {
        if self.last.len() == CHUNK {
            self.full.push(core::mem::take(&mut self.last));
        }
        self.last.push(slot);
        (self.full.len() * CHUNK + self.last.len() - 1) as u32
    }

    fn pop(&mut self) -> Option<u32> {
        if self.last.is_empty() {
            self.last = self.full.pop()?;
        }
        self.last.pop()
    }

    fn get(&self, index: u32) -> Option<u32> {
        let chunk = match index as usize / CHUNK {
            last if last == self.full.len() => &self.last,
            full => self.full.get(full)?,
        };
        chunk.get(index as usize % CHUNK).copied()
    }

    fn set(&mut self, index: u32, slot: u32) {
        let chunk = self.full.get_mut(index as usize / CHUNK);
        chunk.unwrap_or(&mut self.last)[index as usize % CHUNK] = slot;
    }

    fn is_empty(&self) -> bool {
        self.full.is_empty() && self.last.is_empty()
    }
}

impl Due {
    /// Enters a task that is in no list.
    pub fn insert(&mut self, at: u64, slot: u32, tasks: &mut TaskTable) {
        let bucket = at >> BUCKET_SHIFT;
        if bucket < self.horizon {
            self.near.insert((at, slot));
        } else {
            tasks[slot].prev = self.far.entry(bucket).or_default().push(slot);
        }
    }

    /// Takes a task out again.
    pub fn remove(&mut self, at: u64, slot: u32, tasks: &mut TaskTable) {
        if self.near.remove(&(at, slot)) {
            return;
        }
        let number = at >> BUCKET_SHIFT;
        let index = core::mem::replace(&mut tasks[slot].prev, NIL);
        let bucket = self.far.get_mut(&number).expect("the task has a timer");
        let last = bucket.pop().expect("no bucket is empty");
        if last != slot {
            bucket.set(index, last);
            tasks[last].prev = index;
        }
        if bucket.is_empty() {
            self.far.remove(&number);
        }
    }

    /// Sorts some of what is due before long. Called again and again, it is ahead of the time by a bucket at least.
    pub fn look_ahead(&mut self, now_ms: u64, tasks: &mut TaskTable) {
        let near = (now_ms >> BUCKET_SHIFT) + 2;
        let Some(mut first) = self.far.first_entry().filter(|first| *first.key() < near) else {
            self.horizon = self.horizon.max(near);
            return;
        };
        for _ in 0..SORTED_MAX {
            let Some(slot) = first.get_mut().pop() else {
                self.horizon = self.horizon.max(first.key() + 1);
                first.remove();
                return;
            };
            let task = &mut tasks[slot];
            task.prev = NIL;
            self.near.insert((task.at, slot));
        }
    }

    /// The task that is due first among those that are due before long.
    pub fn first(&self) -> Option<(u64, u32)> {
        self.near.first().copied()
    }

    /// Takes that out.
    pub fn pop_first(&mut self) {
        self.near.pop_first();
    }

    /// The logged time at which there is something to do.
    pub fn next_ms(&self) -> Option<u64> {
        let near = self.near.first().map(|entry| entry.0);
        let far = self.far.keys().next();
        let far = far.map(|bucket| bucket.saturating_sub(1) << BUCKET_SHIFT);
        near.into_iter().chain(far).min()
    }

    /// True if the task is in here.
    pub fn contains(&self, at: u64, slot: u32, tasks: &TaskTable) -> bool {
        let bucket = self.far.get(&(at >> BUCKET_SHIFT));
        let found = bucket.and_then(|bucket| bucket.get(tasks[slot].prev));
        self.near.contains(&(at, slot)) || found == Some(slot)
    }

    /// True if no task waits for a time.
    pub fn is_empty(&self) -> bool {
        self.near.is_empty() && self.far.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{CellId, FunctionId, Lsn, RequestId, SlotIndex},
        table::task::Task,
    };

    const HOUR_MS: u64 = 3_600_000;

    #[test]
    fn tasks_come_out_in_time_wherever_they_lay_and_those_taken_out_do_not() {
        let mut tasks = TaskTable::default();
        let mut due = Due::default();
        let mut now_ms = 1_790_000_000_000;
        due.look_ahead(now_ms, &mut tasks);
        let mut expected = Vec::new();
        for slot in 0..5_000u32 {
            let request = RequestId::new(CellId(0), now_ms, slot.into(), SlotIndex(slot));
            // Some at once, many in one bucket, the others over some hours.
            let delay = match slot % 5 {
                0 => 1,
                1..=3 => HOUR_MS,
                _ => u64::from(slot) * 4_567 % (8 * HOUR_MS),
            };
            let mut task = Task::new(request, FunctionId(0), Lsn(0), 32);
            task.at = now_ms + delay;
            tasks.insert(slot, task);
            due.insert(task.at, slot, &mut tasks);
            expected.push((task.at, slot));
        }
        assert!(due.near.len() < 1_200, "what is far is not sorted");
        let all = expected.clone();
        for (at, slot) in all {
            assert!(due.contains(at, slot, &tasks));
            if slot % 3 == 0 {
                due.remove(at, slot, &mut tasks);
                assert!(!due.contains(at, slot, &tasks));
                expected.retain(|entry| entry.1 != slot);
            }
        }
        expected.sort_unstable();
        let mut fired = Vec::new();
        while let Some(next) = due.next_ms() {
            assert!(next <= now_ms || next - now_ms <= 8 * HOUR_MS);
            now_ms = now_ms.max(next);
            due.look_ahead(now_ms, &mut tasks);
            while let Some((at, slot)) = due.first().filter(|first| first.0 <= now_ms) {
                due.pop_first();
                fired.push((at, slot));
            }
        }
        assert_eq!(fired, expected);
        assert!(due.is_empty());
    }
}
