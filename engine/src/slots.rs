//! How an edge lends an executor's slots to shards: all of them are lent, shards that use theirs up get those that
//! others leave idle, and where there are fewer slots than shards, an idle slot goes round.
//!
//! Invariant: `lent` sums up to the slots that are not still busy on a shard that was told to lend fewer. A shard may
//! spend a slot at the moment in which it is taken back; the edge then holds that task until a slot is free.

use pelton_core::id::ShardId;

/// The slots of one function of one executor.
#[derive(Clone, Debug)]
pub struct Lender {
    slots: u32,
    lent: Vec<u32>,
    busy: Vec<u32>,
    /// Shards that may be lent some.
    served: Vec<bool>,
    /// Shards that are to be told a new number.
    told: Vec<u32>,
    /// The shard that is served first next time.
    turn: usize,
}

impl Lender {
    /// Slots over the shards that are served, evenly; one entry a shard says whether it is.
    pub fn new(slots: u32, served: Vec<bool>) -> Lender {
        let shards = served.len();
        let mut lender = Lender {
            slots,
            served,
            lent: vec![0; shards],
            busy: vec![0; shards],
            told: vec![u32::MAX; shards],
            turn: 0,
        };
        lender.give(slots, |_| true);
        lender
    }

    /// Another number of slots from now on.
    pub fn resize(&mut self, slots: u32) {
        self.slots = slots;
        self.lent.fill(0);
        let free = self.free();
        self.give(free, |_| true);
    }

    /// Lends none until the next [`Lender::resize`].
    pub fn hold(&mut self) {
        self.lent.fill(0);
    }

    /// A shard has spent a slot.
    pub fn on_execute(&mut self, shard: ShardId) {
        self.busy[usize::from(shard.0)] += 1;
    }

    /// A slot is free again.
    pub fn on_outcome(&mut self, shard: ShardId) {
        let busy = &mut self.busy[usize::from(shard.0)];
        *busy = busy.saturating_sub(1);
    }

    /// Slots in use.
    pub fn busy(&self) -> u32 {
        self.busy.iter().sum()
    }

    /// All slots.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Moves idle slots to shards that use up theirs, or have none. True if one may want some again soon.
    pub fn rebalance(&mut self) -> bool {
        let shards = self.served.iter().filter(|served| **served).count();
        if shards <= 1 {
            return false;
        }
        let hungry: Vec<bool> = (0..self.lent.len())
            .map(|s| self.served[s] && self.busy[s] >= self.lent[s])
            .collect();
        if !hungry.contains(&true) {
            return false;
        }
        let scarce = (self.slots as usize) < shards;
        for (shard, _) in hungry.iter().enumerate().filter(|(_, hungry)| !**hungry) {
            let idle = self.lent[shard] - self.busy[shard];
            let keep = if scarce { 0 } else { 1.max(self.busy[shard]) };
            let taken = idle.div_ceil(2).min(self.lent[shard].saturating_sub(keep));
            self.lent[shard] -= taken;
        }
        let free = self.free();
        self.give(free, |shard| hungry[shard]);
        true
    }

    /// Shards that were not told their number yet, with it.
    pub fn changes(&mut self) -> Vec<(ShardId, u32)> {
        let mut changes = Vec::new();
        for (shard, (&lent, told)) in self.lent.iter().zip(&mut self.told).enumerate() {
            if *told != lent && (lent > 0 || *told != u32::MAX) {
                changes.push((ShardId(shard as u16), lent));
            }
            *told = lent;
        }
        changes
    }

    /// Slots that are neither lent nor still busy where they were taken back.
    fn free(&self) -> u32 {
        let held = self.lent.iter().zip(&self.busy).map(|(l, b)| *l.max(b));
        self.slots.saturating_sub(held.sum())
    }

    /// Lends `count` more, one at a time, in turn.
    fn give(&mut self, count: u32, wants: impl Fn(usize) -> bool) {
        let shards = self.lent.len();
        let takers: Vec<usize> = (0..shards)
            .map(|i| (self.turn + i) % shards)
            .filter(|&shard| self.served[shard] && wants(shard))
            .collect();
        if takers.is_empty() {
            return;
        }
        let each = count / takers.len() as u32;
        let extra = count as usize % takers.len();
        for (index, &shard) in takers.iter().enumerate() {
            self.lent[shard] += each + u32::from(index < extra);
        }
        if extra > 0 {
            self.turn = (takers[extra - 1] + 1) % shards;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(lender: &Lender) -> u32 {
        lender.lent.iter().sum()
    }

    #[test]
    fn slots_are_lent_evenly_and_follow_demand_without_ever_being_lent_twice() {
        let mut lender = Lender::new(16, vec![true; 4]);
        assert_eq!(lender.lent, [4, 4, 4, 4]);
        assert_eq!(lender.changes().len(), 4);
        for _ in 0..4 {
            lender.on_execute(ShardId(2));
        }
        for _ in 0..10 {
            assert!(lender.rebalance());
            assert!(total(&lender) <= 16);
            while lender.busy[2] < lender.lent[2] {
                lender.on_execute(ShardId(2));
            }
        }
        assert_eq!(lender.lent, [1, 1, 13, 1], "one stays with each shard");
        for _ in 0..13 {
            lender.on_outcome(ShardId(2));
        }
        lender.on_execute(ShardId(0));
        lender.rebalance();
        assert!(lender.lent[0] > 1, "{:?}", lender.lent);
    }

    #[test]
    fn a_shard_that_is_not_served_is_lent_nothing() {
        for slots in [1, 7] {
            let mut lender = Lender::new(slots, vec![true, false, true]);
            for _ in 0..6 {
                assert_eq!((lender.lent[1], total(&lender)), (0, slots));
                lender.rebalance();
            }
            lender.hold();
            lender.resize(slots + 1);
            assert_eq!((lender.lent[1], total(&lender)), (0, slots + 1));
        }
    }

    #[test]
    fn fewer_slots_than_shards_go_round_and_reach_every_shard() {
        let mut lender = Lender::new(1, vec![true; 3]);
        let mut seen = [false; 3];
        for _ in 0..6 {
            for (shard, count) in lender.changes() {
                seen[usize::from(shard.0)] |= count > 0;
            }
            assert_eq!(total(&lender), 1);
            lender.rebalance();
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn a_slot_that_is_still_busy_where_it_was_taken_back_is_not_lent_again() {
        let mut lender = Lender::new(2, vec![true; 2]);
        lender.on_execute(ShardId(0));
        lender.resize(1);
        assert_eq!(total(&lender), 0, "the one slot is busy on shard 0");
        lender.on_outcome(ShardId(0));
        lender.resize(1);
        assert_eq!(total(&lender), 1);
    }
}
