//! Credits: a function's concurrency limit over all shards. Its home shard keeps a ledger and lends credits; a shard
//! that lacks one for a task that could start asks for it, uses it for one task after the other, and gives it back when
//! it has been idle for a while or somebody else waits. With one shard there is nothing to share and nothing is said.
//!
//! Nothing of this is logged. What a limit counts are tasks beyond `Enqueued`, and those are facts: after a start each
//! shard finds its own in its log and reports them before it starts anything, and the home lends nothing until all have
//! reported, or until one lease term has passed, after which leases that nobody has presented are over. A credit that
//! no task uses is worth nothing after a restart, so that nothing is lost with it.
//!
//! That the count is exact over a crash too hangs on one rule: a credit leaves a shard only after what freed it is
//! durable. Otherwise the log of one shard could hold the lease that got the credit while the log of another one lacks
//! the outcome that freed it. Words that give credits back therefore wait in the open batch; all others leave with the
//! step. What is given back in memory alone (a rejected attempt, one that was never delivered) is found leased again
//! by a restart: it counts then, and nothing is lent until it has ended.
//!
//! A shard never waits to say something. What is on its way is bounded: a shard has one question at the home of a
//! function, each answer and each recall is about credits that exist, and what is said to one shard in a turn is one
//! message.

use alloc::{vec, vec::Vec};

use crate::{
    event::{Control, CreditKind, CreditWord, Urgency},
    id::{FunctionId, RequestId, ShardId, shard_of},
    schedule::ledger::{Ledger, Order, Share},
    shard::{Fact, Lane, Shard},
};

/// Time after which a shard gives back credits that it does not use.
const IDLE_NS: u64 = 100_000_000;

impl Shard {
    /// True if the function's concurrency limit, if it has one, lets it start one more task on this shard now.
    pub(crate) fn has_share(&self, function: FunctionId) -> bool {
        let lane = &self.lanes[function.0 as usize];
        let limit = lane.config.concurrency;
        if limit == 0 {
            return true;
        }
        if self.options.shards == 1 {
            return lane.in_flight < limit;
        }
        lane.share.idle(lane.in_flight) > 0
            || self
                .ledgers
                .get(&function)
                .is_some_and(|ledger| ledger.may_draw())
    }

    /// True if a task that was being read may have been taken from its lane under a higher limit, or under none: what
    /// has not started yet does not start.
    pub(crate) fn limit_fell(&self, function: FunctionId) -> bool {
        let lane = &self.lanes[function.0 as usize];
        let limit = lane.config.concurrency;
        if self.options.shards == 1 {
            return limit > 0 && lane.in_flight > limit;
        }
        limit > 0 && (lane.share.adopted > 0 || lane.share.term == 0)
    }

    /// Counts a task that goes beyond `Enqueued`; [`Shard::has_share`] has said that it may.
    pub(crate) fn take_share(&mut self, function: FunctionId) {
        let me = self.options.shard;
        let lane = &mut self.lanes[function.0 as usize];
        if lane.config.concurrency > 0 && self.options.shards > 1 {
            if lane.share.idle(lane.in_flight) == 0 {
                let ledger = self.ledgers.get_mut(&function);
                ledger
                    .expect("only the home starts a task without an idle credit")
                    .draw(me);
                lane.share.held += 1;
            }
            let idle = lane.share.idle(lane.in_flight + 1);
            lane.share.idle_min = lane.share.idle_min.min(idle);
        }
        lane.in_flight += 1;
    }

    /// A task that the shard has reported, or that used a credit, is no longer in flight.
    pub(crate) fn free_share(&mut self, function: FunctionId) {
        let share = &mut self.lanes[function.0 as usize].share;
        if share.adopted > 0 {
            share.adopted -= 1;
            self.return_credits(function, 1);
        } else if share.owed > 0 {
            share.owed -= 1;
            share.held -= 1;
            self.return_credits(function, 1);
        } else {
            self.watch_idle(function);
        }
    }

    /// The lane could start a task if it had a credit: asked for at the end of the step.
    pub(crate) fn want_share(&mut self, function: FunctionId) {
        let share = &mut self.lanes[function.0 as usize].share;
        if share.term != 0 && !share.asked && !share.wanted {
            share.wanted = true;
            self.wanting.push(function);
        }
    }

    /// Asks for what lanes lack, and hears what the shard has to say to itself. True if it got credits by that.
    pub(crate) fn ask_for_credits(&mut self) -> bool {
        let mut got = false;
        while let Some(function) = self.wanting.pop() {
            self.lanes[function.0 as usize].share.wanted = false;
            if !self.could_start(function) {
                continue;
            }
            if self.has_share(function) {
                // It came back to the home after the lane had looked for it.
                self.wake_lane(function);
                got = true;
                continue;
            }
            let lane = &mut self.lanes[function.0 as usize];
            let waiting = lane.waiting.count + lane.unsettled;
            if waiting == 0 || lane.share.term == 0 || lane.share.asked {
                continue;
            }
            lane.share.asked = true;
            let count = waiting.min(lane.free_slots - lane.promised);
            self.say(function, CreditKind::Ask, count);
        }
        loop {
            if self.hear_itself() || got {
                return true;
            }
            // A lane that the full batch has kept in the ring uses its credit with the next one.
            let lanes = &self.lanes;
            let idle = |function: &FunctionId| !lanes[function.0 as usize].in_ring;
            if let Some(at) = self.recalled.iter().position(idle) {
                let function = self.recalled.swap_remove(at);
                self.give_recalled(function);
            } else if self.returning.is_empty() {
                return false;
            } else if self.sealed.is_empty() && self.open.facts.is_empty() {
                self.outgoing.append(&mut self.returning);
            } else {
                // What freed them may be on its way to the disk: they leave when that is there.
                self.open.edges.shards.append(&mut self.returning);
                self.note(Urgency::Now);
            }
        }
    }

    /// Hears what the shard has to say to itself. True if it lent itself something.
    fn hear_itself(&mut self) -> bool {
        let (me, mut lent) = (self.options.shard, false);
        while let Some(at) = self.outgoing.iter().position(|&(to, _)| to == me) {
            if let (_, Control::Credits { from, words }) = self.outgoing.remove(at) {
                lent |= words.iter().any(|word| word.kind == CreditKind::Lend);
                self.hear_credits(from, &words);
            }
        }
        lent
    }

    /// The home wants credits back, and everything that may start in this step has started: idle ones go back now,
    /// others when their tasks have ended.
    fn give_recalled(&mut self, function: FunctionId) {
        let lane = &mut self.lanes[function.0 as usize];
        let given = lane.share.give_idle(lane.share.owed, lane.in_flight);
        self.return_credits(function, given);
    }

    /// What a shard has to say about limits.
    pub(crate) fn hear_credits(&mut self, from: ShardId, words: &[CreditWord]) {
        for word in words {
            match word.kind {
                CreditKind::Count => self.counted(word.function, word.term),
                CreditKind::Holds => self.hear_as_home(word, |home| home.report(from, word.count)),
                CreditKind::Ask => {
                    self.hear_as_home(word, |home| home.ask(from, word.limit, word.count));
                }
                CreditKind::Return => {
                    self.hear_as_home(word, |home| home.returned(from, word.count));
                }
                CreditKind::Lend => self.credits_lent(word),
                CreditKind::Recall => self.credits_recalled(word),
            }
        }
    }

    fn hear_as_home(&mut self, word: &CreditWord, hear: impl FnOnce(&mut Ledger)) {
        let ledger = self.ledgers.get_mut(&word.function);
        if let Some(ledger) = ledger.filter(|ledger| ledger.term() == word.term) {
            hear(ledger);
            self.settle_ledger(word.function);
        }
    }

    /// The lane of a function whose home speaks of the count that this shard takes part in.
    fn lane_in_count(&mut self, word: &CreditWord) -> Option<&mut Lane> {
        let lane = self.lanes.get_mut(word.function.0 as usize);
        lane.filter(|lane| lane.share.term == word.term)
    }

    fn credits_lent(&mut self, word: &CreditWord) {
        let Some(lane) = self.lane_in_count(word) else {
            return;
        };
        lane.share.asked = false;
        if lane.config.concurrency == word.limit {
            lane.share.held += word.count;
            if lane.share.owed > 0 {
                self.recalled.push(word.function);
            }
            self.watch_idle(word.function);
        } else {
            // Lent under a limit that holds no longer: nothing may start by it.
            self.return_credits(word.function, word.count);
        }
        self.wake_lane(word.function);
    }

    fn credits_recalled(&mut self, word: &CreditWord) {
        if let Some(lane) = self.lane_in_count(word) {
            // Where it holds less than that, the rest is adopted and comes back by itself.
            let share = &mut lane.share;
            share.owed = (share.owed + word.count).min(share.held);
            self.recalled.push(word.function);
        }
    }

    /// Lends and recalls as the ledger says.
    fn settle_ledger(&mut self, function: FunctionId) {
        let Some(ledger) = self.ledgers.get_mut(&function) else {
            return;
        };
        let term = ledger.term();
        let limit = self.lanes[function.0 as usize].config.concurrency;
        for order in ledger.settle() {
            let (to, kind, count) = match order {
                Order::Lend(to, count) => (to, CreditKind::Lend, count),
                Order::Recall(to, count) => (to, CreditKind::Recall, count),
            };
            let word = CreditWord {
                function,
                kind,
                term,
                limit,
                count,
            };
            say(&mut self.outgoing, self.options.shard, to, word);
        }
    }

    /// Says something to a function's home at the end of the step.
    fn say(&mut self, function: FunctionId, kind: CreditKind, count: u32) {
        let word = self.word(function, kind, count);
        let home = self.home_of(function);
        say(&mut self.outgoing, self.options.shard, home, word);
    }

    /// Gives credits back, once everything that is appended up to the end of the step is durable.
    fn return_credits(&mut self, function: FunctionId, count: u32) {
        if count > 0 {
            let word = self.word(function, CreditKind::Return, count);
            let home = self.home_of(function);
            say(&mut self.returning, self.options.shard, home, word);
        }
    }

    fn word(&self, function: FunctionId, kind: CreditKind, count: u32) -> CreditWord {
        let lane = &self.lanes[function.0 as usize];
        CreditWord {
            function,
            kind,
            term: lane.share.term,
            limit: lane.config.concurrency,
            count,
        }
    }

    fn home_of(&self, function: FunctionId) -> ShardId {
        let known = self.directory.function(function);
        let home = known
            .expect("a function with a limit is in the directory")
            .home;
        shard_of(home, self.options.shards)
    }

    /// The shard has read its log: what it found running counts against the limits.
    pub(crate) fn count_at_start(&mut self) {
        let term = self.next_term;
        self.next_term += 1;
        for index in 0..self.lanes.len() as u32 {
            let lane = &self.lanes[index as usize];
            if lane.live && lane.config.concurrency > 0 && self.options.shards > 1 {
                let limit = lane.config.concurrency;
                self.open_ledger(FunctionId(index), term, limit);
                // Every shard begins with the same count and knows it: nobody has to be asked.
                self.join_count(FunctionId(index), term);
            }
        }
    }

    /// A function's limit is another one from now on; 0 for none.
    pub(crate) fn limit_changed(&mut self, function: FunctionId, before: u32, after: u32) {
        if self.replaying || self.options.shards == 1 || before == after {
            return;
        }
        if after == 0 {
            self.ledgers.remove(&function);
            self.counted_early.remove(&function);
            self.reset_share(function, Share::default());
            return;
        }
        if before == 0 {
            let term = self.next_term;
            self.open_ledger(function, term, after);
            if self.ledgers.contains_key(&function) {
                self.next_term += 1;
                self.join_count(function, term);
            } else if let Some(term) = self.counted_early.remove(&function) {
                self.join_count(function, term);
            }
            return;
        }
        if let Some(ledger) = self.ledgers.get_mut(&function) {
            ledger.set_limit(after);
        }
        // What was asked under the other limit is not answered.
        let lane = &mut self.lanes[function.0 as usize];
        lane.share.asked = false;
        if after < before {
            // Nothing new starts by what was lent under the higher limit.
            let given = lane.share.give_idle(u32::MAX, lane.in_flight);
            let share = Share {
                term: lane.share.term,
                adopted: lane.share.adopted + lane.share.held,
                ..Share::default()
            };
            self.reset_share(function, share);
            self.return_credits(function, given);
        }
        self.settle_ledger(function);
    }

    /// Begins to count, if this is the function's home: every other shard is to report.
    fn open_ledger(&mut self, function: FunctionId, term: u64, limit: u32) {
        let (me, shards) = (self.options.shard, self.options.shards);
        if self.home_of(function) != me {
            return;
        }
        self.ledgers
            .insert(function, Ledger::new(term, limit, shards));
        let until_ns = self.now.mono_ns + self.options.lease_ms * 1_000_000;
        self.counting.insert((until_ns, function, term));
        let word = CreditWord {
            function,
            kind: CreditKind::Count,
            term,
            limit,
            count: 0,
        };
        for shard in (0..shards).map(ShardId).filter(|&shard| shard != me) {
            say(&mut self.outgoing, me, shard, word);
        }
    }

    /// The home counts: this shard reports, or does so when it knows of the limit.
    fn counted(&mut self, function: FunctionId, term: u64) {
        let lane = self.lanes.get(function.0 as usize);
        match lane.filter(|lane| lane.live && lane.config.concurrency > 0) {
            Some(lane) if lane.share.term == term => {}
            Some(_) => self.join_count(function, term),
            None => {
                self.counted_early.insert(function, term);
            }
        }
    }

    /// Reports what runs here. Ends that are on their way to the disk count until they are there.
    fn join_count(&mut self, function: FunctionId, term: u64) {
        let adopted = self.lanes[function.0 as usize].in_flight;
        let share = Share {
            term,
            adopted,
            ..Share::default()
        };
        self.reset_share(function, share);
        let unsettled = self.ends_on_their_way(function);
        self.say(function, CreditKind::Holds, adopted + unsettled);
        self.return_credits(function, unsettled);
        self.wake_lane(function);
    }

    /// Tasks of a function that have ended and whose outcome is not durable. Looks at every fact of two batches, which
    /// only a function that gets a limit makes necessary.
    fn ends_on_their_way(&self, function: FunctionId) -> u32 {
        let of_function = |request: RequestId| {
            let slot = self.tasks.find(request);
            slot.is_some_and(|slot| self.tasks[slot].function == function)
        };
        let pending = self.sealed.iter().chain([&self.open]);
        let ends = pending
            .flat_map(|pending| &pending.facts)
            .filter(|fact| matches!(fact, Fact::Ended { request, .. } if of_function(*request)));
        ends.count() as u32
    }

    /// Replaces a share; what is set up about it stays set up.
    fn reset_share(&mut self, function: FunctionId, share: Share) {
        let before = &mut self.lanes[function.0 as usize].share;
        *before = Share {
            wanted: before.wanted,
            idle_timed: before.idle_timed,
            ..share
        };
    }

    /// Sees to it that idle credits are looked at after a while.
    fn watch_idle(&mut self, function: FunctionId) {
        let lane = &mut self.lanes[function.0 as usize];
        let idle = lane.share.idle(lane.in_flight);
        if idle > 0 && !lane.share.idle_timed {
            lane.share.idle_timed = true;
            lane.share.idle_min = idle;
            self.idle_credits
                .insert((self.now.mono_ns + IDLE_NS, function));
        }
    }

    /// Gives back what was idle all the time.
    pub(crate) fn idle_shares(&mut self) {
        while let Some(&(at, function)) = self.idle_credits.first() {
            if at > self.now.mono_ns {
                return;
            }
            self.idle_credits.pop_first();
            let lane = &mut self.lanes[function.0 as usize];
            lane.share.idle_timed = false;
            let given = lane.share.give_idle(lane.share.idle_min, lane.in_flight);
            self.return_credits(function, given);
            self.watch_idle(function);
        }
    }

    /// Ledgers that have waited for reports for one lease term go on without them.
    pub(crate) fn silent_shards(&mut self) {
        while let Some(&(at, function, term)) = self.counting.first() {
            if at > self.now.mono_ns {
                return;
            }
            self.counting.pop_first();
            let ledger = self.ledgers.get_mut(&function);
            if let Some(ledger) = ledger.filter(|ledger| ledger.term() == term && !ledger.ready()) {
                ledger.stop_waiting();
                self.settle_ledger(function);
                self.wake_lane(function);
            }
        }
    }

    /// Credits that this shard has lent, itself included, and holds: 0 once all that was idle has come back.
    pub fn credits_out(&self) -> u64 {
        let lent: u64 = self.ledgers.values().map(Ledger::lent).sum();
        let held = self.lanes.iter().map(|lane| u64::from(lane.share.held));
        lent + held.sum::<u64>()
    }

    /// Panics if shares and ledgers contradict what runs.
    pub(crate) fn audit_credits(&self) {
        for (index, lane) in self.lanes.iter().enumerate() {
            let share = &lane.share;
            if share.term == 0 {
                assert_eq!(share.held + share.adopted + share.owed, 0, "no share");
                continue;
            }
            assert!(
                (share.adopted..=share.held + share.adopted).contains(&lane.in_flight),
                "function {index}: {} in flight, {share:?}",
                lane.in_flight
            );
            let idle = share.idle(lane.in_flight);
            assert!(
                share.owed <= share.held && (share.owed == 0 || idle == 0 || lane.in_ring),
                "function {index}: {} in flight, {share:?}",
                lane.in_flight
            );
        }
        for (function, ledger) in &self.ledgers {
            ledger.audit();
            let share = &self.lanes[function.0 as usize].share;
            let lent = ledger.lent_to(self.options.shard);
            assert!(
                share.term != ledger.term()
                    || !ledger.ready()
                    || share.held + share.adopted <= lent,
                "function {}: the home holds {share:?} and has lent itself {lent}",
                function.0
            );
        }
    }

    /// Panics unless every credit is back in its ledger.
    pub(crate) fn audit_credits_at_rest(&self) {
        for (index, lane) in self.lanes.iter().enumerate() {
            let share = &lane.share;
            assert_eq!(
                (share.held, share.adopted, share.owed),
                (0, 0, 0),
                "function {index}: credits held, adopted, owed"
            );
        }
        for (function, ledger) in &self.ledgers {
            let limit = self.lanes[function.0 as usize].config.concurrency;
            assert_eq!(
                (ledger.ready(), ledger.lent(), ledger.free()),
                (true, 0, limit),
                "function {}: all have reported, credits lent, free",
                function.0
            );
        }
    }
}

/// Adds a word to what goes to a shard; one message a turn, and credits given back add up.
fn say(list: &mut Vec<(ShardId, Control)>, from: ShardId, to: ShardId, word: CreditWord) {
    let known = list.iter_mut().rev().find_map(|(other, control)| {
        if let Control::Credits { words, .. } = control
            && *other == to
        {
            Some(words)
        } else {
            None
        }
    });
    let Some(words) = known else {
        let words = vec![word];
        list.push((to, Control::Credits { from, words }));
        return;
    };
    let same = words.last_mut().filter(|last| {
        word.kind == CreditKind::Return
            && (last.function, last.kind, last.term) == (word.function, word.kind, word.term)
    });
    match same {
        Some(last) => last.count += word.count,
        None => words.push(word),
    }
}
