//! Who holds the credits of a function with a concurrency limit: the ledger of its home shard, and a shard's own share.
//!
//! The home lends credits in the order of asking. Where none is left it asks holders for theirs: first those that hold
//! more than a fair part, then, where there are fewer credits than shards that want one, whoever has held for longest.
//! A credit that is asked back returns when the task that uses it has ended.

use alloc::{collections::VecDeque, vec, vec::Vec};

use crate::id::ShardId;

/// What the home wants a shard to be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The shard has so many more credits.
    Lend(ShardId, u32),
    /// The shard is to give back so many.
    Recall(ShardId, u32),
}

/// One shard in the ledger.
#[derive(Clone, Copy, Debug)]
struct Line {
    /// Credits that it has or that are on their way, either way.
    lent: u32,
    /// How many of them it was asked to give back.
    recalled: u32,
    /// The number of the last loan; the lowest has held for longest.
    since: u64,
    /// It has not said yet what it holds.
    silent: bool,
}

/// A shard that waits for credits.
#[derive(Clone, Copy, Debug)]
struct Asked {
    shard: ShardId,
    /// The limit that it knows: one that differs from the home's is not served, because one of the two is behind.
    limit: u32,
    count: u32,
}

/// The credits of one function, as its home shard has lent them. Owned by that shard.
///
/// Invariant: what is lent is more than the limit only after the limit was lowered, or where shards reported more at
/// the beginning; nothing is lent then.
#[derive(Clone, Debug)]
pub struct Ledger {
    term: u64,
    limit: u32,
    lines: Vec<Line>,
    queue: VecDeque<Asked>,
    lent: u64,
    loans: u64,
    silent: usize,
}

impl Ledger {
    /// A ledger that knows nothing yet: it lends nothing until every shard has reported.
    pub fn new(term: u64, limit: u32, shards: u16) -> Ledger {
        let line = Line {
            lent: 0,
            recalled: 0,
            since: 0,
            silent: true,
        };
        Ledger {
            term,
            limit,
            lines: vec![line; usize::from(shards)],
            queue: VecDeque::new(),
            lent: 0,
            loans: 0,
            silent: usize::from(shards),
        }
    }

    /// The count that it began with; words of another one mean nothing to it.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Credits that are lent, or on their way back.
    pub fn lent(&self) -> u64 {
        self.lent
    }

    /// Credits that are lent to a shard, or on their way to it or back.
    pub fn lent_to(&self, shard: ShardId) -> u32 {
        self.lines[usize::from(shard.0)].lent
    }

    /// Credits that may be lent.
    pub fn free(&self) -> u32 {
        let free = u64::from(self.limit).saturating_sub(self.lent);
        u32::try_from(free).expect("at most the limit is free")
    }

    /// True once it knows what every shard holds.
    pub fn ready(&self) -> bool {
        self.silent == 0
    }

    fn lends(&self) -> bool {
        self.ready() || crate::planted::planted(crate::planted::Bug::LendsBeforeReports)
    }

    /// A shard says what it holds.
    pub fn report(&mut self, shard: ShardId, count: u32) {
        let line = &mut self.lines[usize::from(shard.0)];
        self.silent -= usize::from(line.silent);
        line.silent = false;
        line.lent += count;
        self.lent += u64::from(count);
    }

    /// Shards that have not reported hold nothing any more.
    pub fn stop_waiting(&mut self) {
        self.silent = 0;
        for line in &mut self.lines {
            line.silent = false;
        }
    }

    /// Another limit from now on. What is lent stays lent until it comes back.
    pub fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// A shard wants credits. A second question of the same shard takes the place of its first.
    pub fn ask(&mut self, shard: ShardId, limit: u32, count: u32) {
        let asked = Asked {
            shard,
            limit,
            count: count.max(1),
        };
        match self.queue.iter_mut().find(|known| known.shard == shard) {
            Some(known) => *known = asked,
            None => self.queue.push_back(asked),
        }
    }

    /// Credits have come back.
    pub fn returned(&mut self, shard: ShardId, count: u32) {
        let line = &mut self.lines[usize::from(shard.0)];
        assert!(line.lent >= count, "a credit is given back once");
        line.lent -= count;
        line.recalled = line.recalled.saturating_sub(count).min(line.lent);
        self.lent -= u64::from(count);
    }

    /// True if the home may take a credit for itself without asking: nobody waits.
    pub fn may_draw(&self) -> bool {
        self.lends() && self.queue.is_empty() && self.free() > 0
    }

    /// The home takes a credit for itself.
    pub fn draw(&mut self, shard: ShardId) {
        assert!(self.may_draw(), "only what is free is lent");
        self.lend(shard, 1);
    }

    fn lend(&mut self, shard: ShardId, count: u32) {
        self.loans += 1;
        let line = &mut self.lines[usize::from(shard.0)];
        line.lent += count;
        line.since = self.loans;
        self.lent += u64::from(count);
    }

    /// Lends what is free to those who wait, in their order, and asks for more where that does not do.
    pub fn settle(&mut self) -> Vec<Order> {
        let mut orders = Vec::new();
        if !self.lends() {
            return orders;
        }
        let limit = self.limit;
        let mut waiting = self.waiting().count() as u32;
        while waiting > 0 && self.free() > 0 {
            let at = self
                .queue
                .iter()
                .position(|asked| asked.limit == limit)
                .expect("counted above");
            let asked = self.queue.remove(at).expect("found above");
            let count = asked.count.min((self.free() / waiting).max(1));
            self.lend(asked.shard, count);
            orders.push(Order::Lend(asked.shard, count));
            waiting -= 1;
        }
        if waiting > 0 || self.lent > u64::from(limit) {
            self.recall(&mut orders);
        }
        orders
    }

    /// Those who wait and know the limit.
    fn waiting(&self) -> impl Iterator<Item = &Asked> {
        self.queue.iter().filter(|asked| asked.limit == self.limit)
    }

    fn recall(&mut self, orders: &mut Vec<Order>) {
        let lent_to = |asked: &&Asked| self.lent_to(asked.shard) == 0;
        let claimants = self.lines.iter().filter(|line| line.lent > 0).count()
            + self.waiting().filter(lent_to).count();
        let fair = (self.limit / (claimants as u32).max(1)).max(1);
        let needs = self.waiting().map(|asked| {
            let below = fair.saturating_sub(self.lent_to(asked.shard));
            u64::from(below.min(asked.count))
        });
        let beyond = self.lent.saturating_sub(u64::from(self.limit));
        let recalled: u64 = self.lines.iter().map(|line| u64::from(line.recalled)).sum();
        let mut missing = (needs.sum::<u64>() + beyond).saturating_sub(recalled);
        let mut holders: Vec<usize> = (0..self.lines.len()).collect();
        holders.sort_by_key(|&shard| self.lines[shard].since);
        // Beyond their fair part first; then one from each.
        let mut counts = vec![0; self.lines.len()];
        for (keep, most) in [(fair, u32::MAX), (0, 1)] {
            for &shard in &holders {
                let line = &mut self.lines[shard];
                let spare = (line.lent - line.recalled).saturating_sub(keep).min(most);
                let count = u64::from(spare).min(missing) as u32;
                line.recalled += count;
                missing -= u64::from(count);
                counts[shard] += count;
            }
        }
        for shard in holders.into_iter().filter(|&shard| counts[shard] > 0) {
            orders.push(Order::Recall(ShardId(shard as u16), counts[shard]));
        }
    }

    /// Panics if it contradicts itself.
    pub fn audit(&self) {
        let lent: u64 = self.lines.iter().map(|line| u64::from(line.lent)).sum();
        assert_eq!(self.lent, lent, "lent credits add up");
        let silent = self.lines.iter().filter(|line| line.silent).count();
        assert_eq!(self.silent, silent, "shards that have not reported");
        for line in &self.lines {
            assert!(line.recalled <= line.lent, "only what is lent is recalled");
        }
        let asked: Vec<ShardId> = self.queue.iter().map(|asked| asked.shard).collect();
        let mut once = asked.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(asked.len(), once.len(), "a shard asks once at a time");
    }
}

/// What a shard holds of one function's limit. Owned by the function's lane.
///
/// Invariant: the tasks in flight are at most `held + adopted`; `owed` is more than 0 only while no credit is idle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Share {
    /// The count in which the shard has told the home what it holds; 0 before that.
    pub term: u64,
    /// Credits that may be used again when their task has ended.
    pub held: u32,
    /// Tasks that ran before the count or under a higher limit: their credits go back as they end.
    pub adopted: u32,
    /// Credits in use that go back when their tasks have ended, because others wait.
    pub owed: u32,
    /// The home has a question of this shard.
    pub asked: bool,
    /// It is to ask at the end of the step.
    pub wanted: bool,
    /// The fewest credits that were idle since the timer was set, and whether it is.
    pub idle_min: u32,
    pub idle_timed: bool,
}

impl Share {
    /// Credits that no task uses.
    pub fn idle(&self, in_flight: u32) -> u32 {
        self.held
            .saturating_sub(in_flight.saturating_sub(self.adopted))
    }

    /// Takes up to `count` idle credits out of the share. What goes back, for whatever reason, is not owed any more.
    pub fn give_idle(&mut self, count: u32, in_flight: u32) -> u32 {
        let given = count.min(self.idle(in_flight));
        self.held -= given;
        self.owed = self.owed.saturating_sub(given);
        self.idle_min = self.idle_min.min(self.idle(in_flight));
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ShardId = ShardId(0);
    const B: ShardId = ShardId(1);
    const C: ShardId = ShardId(2);

    fn ledger(limit: u32) -> Ledger {
        let mut ledger = Ledger::new(1, limit, 3);
        for shard in [A, B, C] {
            assert!(!ledger.may_draw());
            ledger.report(shard, 0);
        }
        ledger
    }

    #[test]
    fn a_credit_that_goes_back_because_it_was_idle_is_owed_no_more() {
        let mut share = Share {
            held: 2,
            owed: 1,
            idle_min: 2,
            ..Share::default()
        };
        assert_eq!(share.give_idle(5, 1), 1, "one is in use");
        assert_eq!((share.held, share.owed), (1, 0));
        assert_eq!(share.give_idle(5, 0), 1);
        assert_eq!((share.held, share.owed, share.idle_min), (0, 0, 0));
    }

    #[test]
    fn a_limit_of_one_goes_round_in_the_order_of_asking() {
        let mut ledger = ledger(1);
        ledger.ask(B, 1, 9);
        assert_eq!(ledger.settle(), [Order::Lend(B, 1)]);
        ledger.ask(A, 1, 9);
        assert_eq!(ledger.settle(), [Order::Recall(B, 1)]);
        ledger.ask(C, 1, 9);
        ledger.ask(B, 1, 9);
        assert_eq!(ledger.settle(), [], "it was recalled already");
        for (from, to) in [(B, A), (A, C), (C, B)] {
            ledger.returned(from, 1);
            assert!(
                !ledger.may_draw(),
                "the home takes none from those who wait"
            );
            let orders = ledger.settle();
            assert_eq!(orders, [Order::Lend(to, 1), Order::Recall(to, 1)]);
            ledger.ask(from, 1, 9);
            ledger.settle();
            ledger.audit();
        }
    }

    #[test]
    fn whoever_holds_more_than_a_fair_part_gives_it_up_to_who_has_less() {
        let mut ledger = ledger(10);
        ledger.ask(A, 10, 100);
        assert_eq!(ledger.settle(), [Order::Lend(A, 10)]);
        ledger.ask(A, 10, 90);
        assert_eq!(ledger.settle(), [], "nobody else wants any");
        ledger.ask(B, 10, 2);
        assert_eq!(ledger.settle(), [Order::Recall(A, 2)]);
        ledger.ask(C, 10, 100);
        assert_eq!(ledger.settle(), [Order::Recall(A, 3)]);
        ledger.audit();
    }

    #[test]
    fn a_lowered_limit_lends_nothing_until_enough_has_come_back() {
        let mut ledger = ledger(4);
        ledger.ask(A, 4, 4);
        ledger.settle();
        ledger.set_limit(2);
        ledger.ask(B, 4, 1);
        assert_eq!(ledger.settle(), [Order::Recall(A, 2)]);
        ledger.returned(A, 2);
        assert_eq!(ledger.settle(), [], "B asked under another limit");
        ledger.returned(A, 1);
        assert_eq!(ledger.settle(), []);
        ledger.ask(B, 2, 1);
        assert_eq!(ledger.settle(), [Order::Lend(B, 1)]);
        assert_eq!((ledger.lent(), ledger.free()), (2, 0));
    }

    #[test]
    fn what_shards_report_counts_even_beyond_the_limit() {
        let mut ledger = Ledger::new(1, 2, 3);
        ledger.ask(C, 2, 1);
        ledger.report(A, 2);
        ledger.report(B, 1);
        assert_eq!(ledger.settle(), [], "C has not reported");
        ledger.stop_waiting();
        assert_eq!(ledger.settle(), [Order::Recall(A, 2)]);
        ledger.returned(A, 1);
        assert_eq!(ledger.settle(), []);
        ledger.returned(A, 1);
        assert_eq!(ledger.settle(), [Order::Lend(C, 1)]);
    }
}
