//! Receive: the fair pick among lanes that may start something, within each pool's credit, and the read of tasks that
//! are not in memory.

use alloc::vec::Vec;

use crate::{
    event::{Effects, Fetch, Fetched},
    id::FunctionId,
    record::{BatchSpace, read_task},
    schedule::pool::{Signal, WINDOW_NS},
    shard::Shard,
    state::{Event, State},
    table::task::*,
    times::Part,
};

/// Tasks behind the head that are read along with it, and the stretch of log within which they must stand.
const READ_AHEAD_TASKS: u32 = 64;
const READ_AHEAD_BYTES: u64 = 256 << 10;

impl Shard {
    pub(crate) fn receive(&mut self, space: &mut BatchSpace<'_>, effects: &mut Effects) {
        while let Some((tenant, lane)) = self.robin.front() {
            let function = FunctionId(lane);
            if self.lanes[lane as usize].waiting.head == NIL || !self.may_start(function) {
                self.robin.drop_front_lane();
                self.lanes[lane as usize].in_ring = false;
                self.wake_lane(function); // It asks for what it lacks.
                continue;
            }
            if !self.has_room(256, space) {
                effects.full = true;
                return;
            }
            let slot = self.lanes[lane as usize].waiting.head;
            let task = self.tasks[slot];
            if task.has(FLAG_BUSY) {
                // Its stop or expiry is on its way to the disk; the lane goes on when that is there.
                self.robin.drop_front_lane();
                self.lanes[lane as usize].in_ring = false;
                continue;
            }
            if !self.robin.pay(task.cost) {
                continue;
            }
            if !self.queues[tenant as usize].pool.take() {
                let (lanes, queue) = (&mut self.lanes, &mut self.queues[tenant as usize]);
                self.robin.drop_front_queue(|lane| {
                    lanes[lane as usize].in_ring = false;
                    queue.blocked.push(lane);
                });
                continue;
            }
            self.dequeue(slot, space, effects);
        }
    }

    /// Takes the head of a lane, for which a credit has been taken, and leases it, at once or when it has been read.
    fn dequeue(&mut self, slot: u32, space: &mut BatchSpace<'_>, effects: &mut Effects) {
        let task = self.tasks[slot];
        self.meet(task.state(), Event::Dequeue);
        let lane = &mut self.lanes[task.function.0 as usize];
        let mut waiting = lane.waiting;
        let next = task.next;
        self.tasks.unlink(&mut waiting, slot);
        let lane = &mut self.lanes[task.function.0 as usize];
        lane.waiting = waiting;
        lane.promised += 1;
        self.queues[lane.tenant.0 as usize].waiting -= 1;
        let now_us = self.now.mono_us();
        self.times
            .note(Part::Queued, now_us.saturating_sub(task.at), 1);
        self.tasks[slot].at = now_us;
        self.take_share(task.function);
        self.tasks[slot].set_state(State::Dequeued);
        if task.holder != NIL {
            self.invoke(slot, space);
        } else if !task.has(FLAG_FETCHING) {
            self.fetch(slot, effects);
            self.read_ahead(task.position.0, next, effects);
        }
    }

    fn fetch(&mut self, slot: u32, effects: &mut Effects) {
        self.tasks[slot].set(FLAG_FETCHING);
        let task = &self.tasks[slot];
        effects.fetches.push(Fetch {
            request: self.tasks.request(slot),
            position: task.position,
            bytes: task.record_bytes(),
        });
    }

    fn read_ahead(&mut self, from: u64, mut slot: u32, effects: &mut Effects) {
        let mut bytes = self.blobs.bytes();
        for _ in 0..READ_AHEAD_TASKS {
            let Some(task) = self.tasks.get(slot) else {
                return;
            };
            bytes += task.record_bytes() as usize;
            if task.position.0.wrapping_sub(from) > READ_AHEAD_BYTES
                || bytes > self.options.fetched_bytes_max
            {
                return;
            }
            let next = task.next;
            if task.holder == NIL && !task.has(FLAG_FETCHING) {
                self.fetch(slot, effects);
            }
            slot = next;
        }
    }

    /// Records that were read back: tasks that wait for them are leased, others keep them.
    pub(crate) fn fetched(&mut self, fetched: &mut Vec<Fetched>, space: &mut BatchSpace<'_>) {
        let mut dealt = 0;
        for Fetched { request, record } in fetched.iter() {
            if !self.has_room(256, space) {
                break;
            }
            dealt += 1;
            let Some(slot) = self.tasks.find(*request) else {
                continue;
            };
            let task = &mut self.tasks[slot];
            if !task.has(FLAG_FETCHING) {
                continue;
            }
            task.clear(FLAG_FETCHING);
            let wanted =
                matches!(task.state(), State::Enqueued | State::Dequeued) && task.holder == NIL;
            // What the disk gave back is looked at before it is believed.
            let sound =
                |record: &&Vec<u8>| read_task(record).is_ok_and(|t| t.request() == *request);
            match record.as_ref().filter(sound) {
                Some(record) if wanted => {
                    let blob = self.blobs.put(record);
                    self.tasks[slot].holder = blob;
                    // A stop on its way to the disk ends it there; it is not started any more.
                    let task = &self.tasks[slot];
                    if task.state() == State::Dequeued && !task.has(FLAG_BUSY) {
                        if self.limit_fell(task.function) {
                            self.put_back(slot);
                        } else {
                            self.invoke(slot, space);
                        }
                    }
                }
                None if self.tasks[slot].state() == State::Dequeued
                    && !self.tasks[slot].has(FLAG_BUSY) =>
                {
                    let function = self.tasks[slot].function;
                    self.put_back(slot);
                    self.park(function, WINDOW_NS * 10);
                }
                Some(_) | None => {}
            }
        }
        fetched.drain(..dealt);
    }

    /// A fetched task goes back to the front of its lane; nothing was logged, nothing is spent.
    pub(crate) fn put_back(&mut self, slot: u32) {
        let task = self.tasks[slot];
        self.meet(task.state(), Event::Release);
        let function = task.function.0 as usize;
        // It passes both parts again, and the sum of all parts stays the time in all.
        let fetched_us = self.now.mono_us().saturating_sub(task.at);
        self.times.note(Part::Fetched, fetched_us, 1);
        self.lanes[function].promised -= 1;
        self.give_credit(slot, Signal::Clean, false);
        let tenant = self.lanes[function].tenant;
        self.queues[tenant.0 as usize].waiting += 1;
        self.enqueue(slot, true);
    }

    /// True if the lane's function could start one more task, the pool's credit aside.
    pub(crate) fn may_start(&self, function: FunctionId) -> bool {
        self.could_start(function) && self.has_share(function)
    }

    /// True if nothing but credit keeps the lane's function from starting one more task.
    pub(crate) fn could_start(&self, function: FunctionId) -> bool {
        let lane = &self.lanes[function.0 as usize];
        lane.live
            && !lane.config.paused
            && lane.free_slots > lane.promised
            && lane.parked_until_ns <= self.now.mono_ns
    }

    /// Puts a lane into the ring if it can start something and is not there. Where its concurrency limit alone keeps it
    /// from that, it is going to ask for credits.
    pub(crate) fn wake_lane(&mut self, function: FunctionId) {
        let lane = &self.lanes[function.0 as usize];
        if lane.in_ring || lane.waiting.head == NIL || self.replaying || !self.could_start(function)
        {
            return;
        }
        if !self.has_share(function) {
            self.want_share(function);
            return;
        }
        let lane = &self.lanes[function.0 as usize];
        let tenant = lane.tenant.0;
        self.lanes[function.0 as usize].in_ring = true;
        self.robin.add(tenant, function.0);
    }

    /// Starts nothing of a lane for a while.
    pub(crate) fn park(&mut self, function: FunctionId, for_ns: u64) {
        let until = self.now.mono_ns + for_ns;
        let lane = &mut self.lanes[function.0 as usize];
        if until > lane.parked_until_ns {
            self.parks.remove(&(lane.parked_until_ns, function.0));
            lane.parked_until_ns = until;
            self.parks.insert((until, function.0));
        }
    }

    /// Counts a task that recovery finds leased against its function and its queue.
    pub(crate) fn adopt_credit(&mut self, slot: u32) {
        let lane = &mut self.lanes[self.tasks[slot].function.0 as usize];
        lane.in_flight += 1;
        let tenant = lane.tenant.0;
        self.queues[tenant as usize].pool.adopt();
    }

    /// Gives back the credit of a task that is no longer beyond `Enqueued`, and notes how it went.
    pub(crate) fn give_credit(&mut self, slot: u32, signal: Signal, ran: bool) {
        let function = self.tasks[slot].function;
        let lane = &mut self.lanes[function.0 as usize];
        lane.in_flight -= 1;
        let tenant = lane.tenant.0;
        if lane.share.term != 0 {
            self.free_share(function);
        }
        let queue = &mut self.queues[tenant as usize];
        queue.pool.give();
        if ran {
            let only = self.robin.lanes(tenant) <= 1 && queue.blocked.is_empty();
            queue.pool.note(self.now.mono_ns, signal, function.0, only);
        }
        for lane in core::mem::take(&mut queue.blocked) {
            self.wake_lane(FunctionId(lane));
        }
        self.wake_lane(function);
    }
}
