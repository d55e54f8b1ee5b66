//! One shard: its facts, its volatile state, and the step that moves both.
//!
//! Facts change only in `commit`; after a restart [`Shard::replay`] finds them in the log. Everything else here is made
//! from them by [`Shard::start`] and never logged. A step runs the stages in one fixed order; stages never call each other.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet, VecDeque},
    vec::Vec,
};

use crate::{
    clock::Now,
    config::{Change, Directory, FunctionConfig, OnFailure, Wish},
    error::Code,
    event::{Control, Counters, Durable, EdgeBatch, Effects, Inbox, Urgency},
    flow::{clean::Cleaning, history::Unsaved, replay::Replayed},
    id::{ConnectionId, FunctionId, Lsn, RequestId, ShardId, TenantId, Token},
    limits::{
        DEDUP_WINDOW_MS, FINISHED_BYTES_MAX_DEFAULT, FINISHED_MAX_DEFAULT, PAGES_PACKED_STEP,
        PAYLOAD_BYTES_DEFAULT, SEGMENT_BYTES_DEFAULT, TASK_PAGES_MAX_DEFAULT,
    },
    planted::{Bug, planted},
    record::BatchSpace,
    refuse,
    schedule::{
        ledger::{Ledger, Share},
        pool::Pool,
        robin::Robin,
    },
    state::{Event, State},
    table::{
        blob::BlobPool,
        due::Due,
        numbering::Numbering,
        paged::{PagedQueue, PagedSlab},
        split::SplitMap,
        task::{List, TaskTable},
    },
    times::{Appended, Times},
};

/// What a shard is told when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Its number.
    pub shard: ShardId,
    /// Shards of the process.
    pub shards: u16,
    /// The first page of the task table that is not inherited from shards that are gone, and the logarithm of how many
    /// shards share the pages from there on: see [`Numbering`].
    pub first_page: u32,
    /// See `first_page`.
    pub page_shift: u8,
    /// Pages of the task table, of 64 KiB, that are in memory as they are; further ones are packed.
    pub task_pages_max: u32,
    /// Bytes of a segment of its log.
    pub segment_bytes: u64,
    /// Secret that makes name hashes and jitter; any value, drawn anew at each start.
    pub seed: u64,
    /// Largest payload and result.
    pub payload_bytes_max: u32,
    /// Bytes of waiting tasks that may be held in memory.
    pub fetched_bytes_max: usize,
    /// Finished tasks kept for queries.
    pub finished_max: u32,
    /// Bytes of their records in the log.
    pub finished_bytes_max: u64,
    /// Bytes of the records of ended tasks that history may lack before submits are refused; 0 where there is no
    /// history, and the oldest finished tasks are forgotten for good.
    pub history_lag_max: u64,
    /// Time for which a lease outlives its executor's connection.
    pub lease_ms: u64,
    /// Time for which a `task_id` names one task.
    pub dedup_window_ms: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            shard: ShardId(0),
            shards: 1,
            first_page: 0,
            page_shift: 0,
            task_pages_max: TASK_PAGES_MAX_DEFAULT,
            segment_bytes: SEGMENT_BYTES_DEFAULT as u64,
            seed: 0,
            payload_bytes_max: PAYLOAD_BYTES_DEFAULT as u32,
            fetched_bytes_max: 64 << 20,
            finished_max: FINISHED_MAX_DEFAULT,
            finished_bytes_max: FINISHED_BYTES_MAX_DEFAULT,
            history_lag_max: 0,
            lease_ms: 15_000,
            dedup_window_ms: DEDUP_WINDOW_MS,
        }
    }
}

/// A change of the durable facts. It is made when its record is appended and applied when that is durable.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    Accepted(Accepted),
    Leased {
        request: RequestId,
        token: Token,
        binding: u32,
        /// The connection over which the order to execute goes out.
        connection: ConnectionId,
    },
    Ended {
        request: RequestId,
        state: State,
        retries: u8,
        due_ms: u64,
        position: Lsn,
        record_bytes: u32,
        code: Code,
    },
    Moved {
        request: RequestId,
        state: State,
        position: Lsn,
    },
    Config {
        version: u64,
        change: Box<Change>,
    },
    Clock {
        next_seq: u64,
    },
    /// The task's record stands in another place, and its name's with it.
    Relocated {
        request: RequestId,
        from: Lsn,
        to: Lsn,
        record_bytes: u32,
        name: u128,
    },
    OutcomeRelocated {
        request: RequestId,
        from: Lsn,
        to: Lsn,
        record_bytes: u32,
    },
    NameRelocated {
        request: RequestId,
        name: u128,
        to: Lsn,
    },
    /// All configuration stands in this segment or later ones.
    ConfigComplete {
        segment: u64,
    },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Accepted {
    pub(crate) request: RequestId,
    pub(crate) tenant: TenantId,
    pub(crate) function: FunctionId,
    pub(crate) position: Lsn,
    pub(crate) record_bytes: u32,
    pub(crate) due_ms: u64,
    pub(crate) max_age_s: u32,
    pub(crate) cost: u16,
    pub(crate) flags: u16,
    /// Secret hash of the given name; 0 for none.
    pub(crate) name: u128,
    /// Secret hash of the ordering key; 0 for none.
    pub(crate) key: u128,
    pub(crate) payload_hash: u64,
    /// Its lease is the next fact; it never enters its lane.
    pub(crate) leased: bool,
    /// First waiter; `NIL` for none.
    pub(crate) waiter: u32,
}

/// What became of one sealed batch's worth of work, waiting for its flush.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    pub(crate) facts: Vec<Fact>,
    /// What edges are told once it is durable.
    pub(crate) edges: Effects,
    /// Blobs to be kept in memory when their task is accepted: index of the fact, span in the log's buffer.
    pub(crate) names: Vec<u128>,
    /// What was appended when, one entry a step; and what this step has appended so far.
    pub(crate) steps: Vec<Appended>,
    pub(crate) appended: Appended,
}

/// One function's part of this shard: its lane, and who runs it.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) tenant: TenantId,
    pub(crate) config: FunctionConfig,
    pub(crate) live: bool,
    /// Tasks that may start, in order.
    pub(crate) waiting: List,
    /// Tasks behind an ordering key's head.
    pub(crate) behind_keys: u32,
    /// Accepted, not durable, not leased at once.
    pub(crate) unsettled: u32,
    /// Tasks beyond `Enqueued`.
    pub(crate) in_flight: u32,
    /// What this shard holds of the function's concurrency limit, where it has one and there are other shards.
    pub(crate) share: Share,
    /// Slots that nobody uses, over all bindings, and how many of them are promised to tasks being read.
    pub(crate) free_slots: u32,
    pub(crate) promised: u32,
    /// Bindings that may have a free slot, in turn.
    pub(crate) bindings: VecDeque<u32>,
    /// Monotonic time until which it starts nothing.
    pub(crate) parked_until_ns: u64,
    pub(crate) in_ring: bool,
    pub(crate) age_armed: bool,
}

/// One tenant's account queue on this shard.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) pool: Pool,
    /// Tasks accepted and not beyond `Enqueued`.
    pub(crate) waiting: u64,
    pub(crate) waiting_max: u64,
    /// Lanes that found no credit.
    pub(crate) blocked: Vec<u32>,
}

/// An executor's registration for one function.
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) executor: u64,
    pub(crate) function: FunctionId,
    /// The function as the executor numbered it.
    pub(crate) index: u16,
    /// Slots lent by the edge, busy ones included; none while the connection is gone.
    pub(crate) lent: u32,
    /// Slots in use: leased, being leased, or timed out and not yet given back.
    pub(crate) used: u32,
    /// Leased tasks in the order of their start.
    pub(crate) running: List,
    /// It is in its lane's `bindings`.
    pub(crate) queued: bool,
    /// It is in `watch`.
    pub(crate) watched: bool,
}

impl Lane {
    /// True if a failure of the function holds its task's ordering key.
    pub(crate) fn holds_keys(&self) -> bool {
        self.live && self.config.on_failure == OnFailure::Hold
    }
}

impl Binding {
    pub(crate) fn free(&self) -> u32 {
        self.lent.saturating_sub(self.used)
    }
}

/// An executor as this shard knows it, over reconnects.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connection: ConnectionId,
    pub(crate) connected: bool,
    pub(crate) bindings: Vec<u32>,
    /// Attempts that timed out and whose slot has not come back.
    pub(crate) overdue: BTreeMap<(RequestId, Token), u32>,
    /// When its leases end; 0 while it is connected.
    pub(crate) ends_ns: u64,
}

/// The entry of a given name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    pub(crate) request: RequestId,
    pub(crate) payload_hash: u64,
    pub(crate) segment: u32,
}

/// An ordering key with tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key {
    pub(crate) hash: u128,
    pub(crate) function: FunctionId,
    /// The one task that may go beyond `Enqueued`; `NIL` while the key is held.
    pub(crate) head: u32,
    pub(crate) successors: List,
    /// Tasks of the key that are not finished.
    pub(crate) members: u32,
    /// A failure holds it until its function is set to go on.
    pub(crate) held: bool,
}

/// A caller waiting for a task's end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    pub(crate) connection: ConnectionId,
    pub(crate) ticket: u64,
    pub(crate) index: u32,
    pub(crate) with_result: bool,
    /// A query rather than a submit: it is answered with the task's view.
    pub(crate) next: u32,
}

/// A wish that shard 0 is carrying out.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) connection: ConnectionId,
    pub(crate) ticket: u64,
    pub(crate) changes: Vec<(u64, Change)>,
    /// Reports of other shards still to come.
    pub(crate) awaited: usize,
}

/// The state machine of one shard. Owned by one thread, never shared.
#[derive(Debug)]
pub struct Shard {
    pub(crate) options: Options,
    pub(crate) now: Now,
    pub(crate) poisoned: bool,
    pub(crate) replaying: bool,

    // Facts.
    pub(crate) directory: Directory,
    pub(crate) tasks: TaskTable,
    pub(crate) next_seq: u64,
    pub(crate) names: SplitMap<Name>,
    pub(crate) name_ages: PagedQueue<(u128, u64)>,
    pub(crate) keys_by_hash: SplitMap<u32>,
    pub(crate) keys: PagedSlab<Key>,
    pub(crate) finished: List,
    /// Bytes of their records.
    pub(crate) finished_bytes: u64,
    /// The last of them, which history does not have yet.
    pub(crate) unsaved: Unsaved,
    /// Live references into each segment from `first_segment` on.
    pub(crate) segments: VecDeque<u32>,
    pub(crate) first_segment: u64,
    /// Every tenant and function has a record in this segment or a later one.
    pub(crate) config_segment: u64,
    /// Bytes of the records that are still needed, configuration aside.
    pub(crate) live_bytes: u64,

    // Facts in another order.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) queues: Vec<Queue>,
    /// Scheduled and retrying tasks by logged time.
    pub(crate) due: Due,
    /// Tasks whose age is not their lane's, by logged time: slot, and the low half of the running number, by which an
    /// entry that outlived its task is known.
    pub(crate) ages: BTreeSet<(u64, u32, u32)>,

    // Volatile state.
    pub(crate) robin: Robin,
    pub(crate) lane_ages: BTreeSet<(u64, u32)>,
    pub(crate) parks: BTreeSet<(u64, u32)>,
    pub(crate) watch: BTreeSet<(u64, u32)>,
    pub(crate) graces: BTreeSet<(u64, u64)>,
    /// By slot, what tasks that are being stopped were given to end by themselves, where it is not the default.
    pub(crate) stop_graces: BTreeMap<u32, u32>,
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) bindings: Vec<Binding>,
    pub(crate) free_bindings: Vec<u32>,
    /// Leased tasks whose executor has not shown up since the start.
    pub(crate) orphans: List,
    pub(crate) orphans_end_ns: u64,
    pub(crate) blobs: BlobPool,
    pub(crate) waiters: PagedSlab<Waiter>,
    pub(crate) doomed: Vec<u32>,
    pub(crate) pending_names: BTreeMap<u128, (RequestId, u64, u64)>,
    pub(crate) open: Pending,
    pub(crate) open_number: u64,
    pub(crate) sealed: VecDeque<Pending>,
    pub(crate) spare: Vec<Pending>,
    pub(crate) urgency: Urgency,
    pub(crate) large_in_batch: bool,
    pub(crate) large_in_last: bool,
    pub(crate) clock_segment: Option<u64>,
    pub(crate) deferred: VecDeque<Control>,
    pub(crate) wishes: VecDeque<(ConnectionId, u64, Wish)>,
    pub(crate) carried: Option<Carried>,
    pub(crate) dump: Option<(u64, usize)>,
    pub(crate) cleaning: Cleaning,
    /// What a replay keeps until the start.
    pub(crate) replayed: Replayed,
    pub(crate) counters: Counters,
    met: [u16; State::ALL.len()],
    pub(crate) times: Times,

    // Volatile state of concurrency limits; empty where there is one shard.
    /// Functions whose home is here and that have a limit.
    pub(crate) ledgers: BTreeMap<FunctionId, Ledger>,
    /// The count that the next ledger begins with; the first one is that of the start.
    pub(crate) next_term: u64,
    /// When a ledger stops waiting for reports: time, function, count.
    pub(crate) counting: BTreeSet<(u64, FunctionId, u64)>,
    /// Counts that a home has begun before this shard knew of the limit.
    pub(crate) counted_early: BTreeMap<FunctionId, u64>,
    /// When idle credits are looked at, by monotonic time.
    pub(crate) idle_credits: BTreeSet<(u64, FunctionId)>,
    /// Lanes that want credits, asked for at the end of the step.
    pub(crate) wanting: Vec<FunctionId>,
    /// Functions whose credits the home wants back.
    pub(crate) recalled: Vec<FunctionId>,
    /// What is said at the end of the step, and what waits for what was appended by then.
    pub(crate) outgoing: Vec<(ShardId, Control)>,
    pub(crate) returning: Vec<(ShardId, Control)>,
}

impl Shard {
    /// An empty shard. Feed it the log with [`Shard::replay`], then call [`Shard::start`].
    pub fn new(options: Options) -> Shard {
        Shard {
            options,
            now: Now::default(),
            poisoned: false,
            replaying: true,
            directory: Directory::default(),
            tasks: TaskTable::new(
                Numbering {
                    first_page: options.first_page,
                    page_shift: options.page_shift,
                    shard: if options.page_shift == 0 {
                        ShardId(0)
                    } else {
                        options.shard
                    },
                },
                options.task_pages_max,
            ),
            next_seq: 1,
            names: SplitMap::default(),
            name_ages: PagedQueue::default(),
            keys_by_hash: SplitMap::default(),
            keys: PagedSlab::default(),
            finished: List::default(),
            finished_bytes: 0,
            unsaved: Unsaved::default(),
            segments: VecDeque::new(),
            first_segment: 0,
            config_segment: 0,
            live_bytes: 0,
            lanes: Vec::new(),
            queues: Vec::new(),
            due: Due::default(),
            ages: BTreeSet::new(),
            robin: Robin::default(),
            lane_ages: BTreeSet::new(),
            parks: BTreeSet::new(),
            watch: BTreeSet::new(),
            graces: BTreeSet::new(),
            stop_graces: BTreeMap::new(),
            sessions: BTreeMap::new(),
            bindings: Vec::new(),
            free_bindings: Vec::new(),
            orphans: List::default(),
            orphans_end_ns: 0,
            blobs: BlobPool::default(),
            waiters: PagedSlab::default(),
            doomed: Vec::new(),
            pending_names: BTreeMap::new(),
            open: Pending::default(),
            open_number: 0,
            sealed: VecDeque::new(),
            spare: Vec::new(),
            urgency: Urgency::Nothing,
            large_in_batch: false,
            large_in_last: false,
            clock_segment: None,
            deferred: VecDeque::new(),
            wishes: VecDeque::new(),
            carried: None,
            dump: None,
            cleaning: Cleaning::default(),
            replayed: Replayed::default(),
            counters: Counters::default(),
            met: [0; State::ALL.len()],
            times: Times::default(),
            ledgers: BTreeMap::new(),
            next_term: 1,
            counting: BTreeSet::new(),
            counted_early: BTreeMap::new(),
            idle_credits: BTreeSet::new(),
            wanting: Vec::new(),
            recalled: Vec::new(),
            outgoing: Vec::new(),
            returning: Vec::new(),
        }
    }

    /// One turn: what became durable takes effect, what arrived is decided, what may start is leased. `space` is the
    /// batch being filled; the caller seals it as `effects.urgency` says and then calls [`Shard::on_sealed`].
    pub fn step(
        &mut self,
        now: Now,
        durable: Option<Durable<'_>>,
        inbox: &mut Inbox,
        space: &mut BatchSpace<'_>,
        effects: &mut Effects,
    ) {
        assert!(
            now.mono_ns >= self.now.mono_ns && now.logged_ms >= self.now.logged_ms,
            "time does not go back"
        );
        assert!(!self.replaying, "a shard starts before it steps");
        self.now = now;
        self.times.clear();
        if let Some(durable) = durable {
            self.commit(durable, effects);
        }
        if self.poisoned {
            self.refuse_everything(inbox, effects);
            return;
        }
        self.open_segment(space);
        self.timers(space);
        self.fetched(&mut inbox.fetched, space);
        self.control(inbox, space, effects);
        self.submits(inbox, space, effects);
        self.receive(space, effects);
        while self.ask_for_credits() {
            self.receive(space, effects);
        }
        effects.shards.append(&mut self.outgoing);
        self.carry_wishes(effects);
        self.carry_config(space);
        self.clean(inbox, space, effects);
        self.note_appended();
        self.tasks.pack(PAGES_PACKED_STEP);
        effects.urgency = self.urgency;
    }

    fn note_appended(&mut self) {
        let appended = core::mem::take(&mut self.open.appended);
        if !appended.is_empty() {
            let at_us = self.now.mono_us();
            self.open.steps.push(Appended { at_us, ..appended });
        }
    }

    /// The caller has sealed the batch: what was appended since the last call waits for its flush.
    pub fn on_sealed(&mut self) {
        let next = self.spare.pop().unwrap_or_default();
        self.sealed
            .push_back(core::mem::replace(&mut self.open, next));
        self.open_number += 1;
        self.urgency = Urgency::Nothing;
        self.large_in_last = self.large_in_batch;
        self.large_in_batch = false;
    }

    /// The log is poisoned: whoever waits is told `UNAVAILABLE`, and so is everybody from now on.
    pub fn on_poisoned(&mut self, effects: &mut Effects) {
        self.poisoned = true;
        let open = core::mem::take(&mut self.open);
        for mut pending in self.sealed.drain(..).chain([open]) {
            for edge in &mut pending.edges.edges {
                for answer in &mut edge.answers {
                    answer.code = Code::Unavailable;
                    answer.durable = false;
                    answer.request = RequestId::default();
                    answer.what = refuse::FAILED.tasks;
                }
                edge.executes.clear();
                edge.acks.iter_mut().for_each(refuse::take_back);
                edge.cancels.clear();
                for (_, _, reply) in &mut edge.replies {
                    *reply = crate::event::Reply::Refused {
                        code: Code::Unavailable,
                        what: refuse::FAILED.tasks,
                    };
                }
            }
            // Shard 0 is not kept waiting: the next start gives this shard the changes that it lacks.
            let applied = pending.edges.shards.drain(..);
            let applied = applied.filter(|(_, said)| matches!(said, Control::Applied { .. }));
            effects.shards.extend(applied);
            for (index, edge) in pending.edges.edges.iter_mut().enumerate() {
                effects.edge(crate::id::EdgeId(index as u16)).absorb(edge);
            }
        }
        if !planted(Bug::FailedLogNotTold) {
            self.refuse_who_waits(effects);
        }
    }

    /// Everything before this position is dead and may be recycled.
    pub fn retire_before(&self) -> Lsn {
        Lsn(self.first_segment * self.options.segment_bytes)
    }

    /// When the next timer is due, in monotonic nanoseconds; `None` if nothing is.
    pub fn next_wake_ns(&self) -> Option<u64> {
        if self.poisoned {
            return None;
        }
        let mono = [
            self.parks.first().map(|entry| entry.0),
            self.watch.first().map(|entry| entry.0),
            self.graces.first().map(|entry| entry.0),
            (self.orphans.count > 0).then_some(self.orphans_end_ns),
            (!self.deferred.is_empty() && self.sealed.is_empty()).then_some(self.now.mono_ns),
            (!self.doomed.is_empty()).then_some(self.now.mono_ns + 1_000_000),
            self.cleaning.next_ns(self.now.mono_ns),
            self.counting.first().map(|entry| entry.0),
            self.idle_credits.first().map(|entry| entry.0),
        ];
        let logged = [
            self.due.next_ms(),
            self.ages.first().map(|entry| entry.0),
            self.lane_ages.first().map(|entry| entry.0),
            self.name_ages
                .front()
                .map(|entry| entry.1 + self.options.dedup_window_ms),
        ];
        let logged = logged.into_iter().flatten().min();
        let logged =
            logged.map(|at| self.now.mono_ns + at.saturating_sub(self.now.logged_ms) * 1_000_000);
        mono.into_iter().flatten().chain(logged).min()
    }

    /// Tenants and functions.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The largest logged time that a replay has seen; logged time starts from there at least.
    pub fn last_logged_ms(&self) -> u64 {
        self.now.logged_ms
    }

    /// Slots of the task table that were ever used.
    pub fn slots(&self) -> u32 {
        self.tasks.used()
    }

    /// True if the task is in memory.
    pub fn holds(&self, request: RequestId) -> bool {
        self.tasks.find(request).is_some()
    }

    /// Which events have met which states since the start: a bit an event, by state, in the order of their table.
    pub fn met(&self) -> [u16; State::ALL.len()] {
        self.met
    }

    /// Something happens to a task in this state. Panics if the table of states does not know it: callers have asked.
    pub(crate) fn meet(&mut self, state: State, event: Event) {
        assert!(state.on(event).is_some(), "{state} meets {event:?}");
        self.met[state as usize - 1] |= 1 << event as u16;
    }

    /// How long tasks took on the parts of their way that the last step saw the end of.
    pub fn times(&self) -> &Times {
        &self.times
    }

    /// Counters and gauges as of now.
    pub fn counters(&self) -> Counters {
        Counters {
            tasks: u64::from(self.tasks.live()),
            waiting: self
                .lanes
                .iter()
                .map(|lane| u64::from(lane.waiting.count + lane.behind_keys))
                .sum(),
            running: self
                .bindings
                .iter()
                .map(|binding| u64::from(binding.running.count))
                .sum::<u64>()
                + u64::from(self.orphans.count),
            finished: u64::from(self.finished.count),
            unsaved: u64::from(self.unsaved.count),
            unsaved_bytes: self.unsaved.bytes,
            names: self.names.len() as u64,
            fetched_bytes: self.blobs.bytes() as u64,
            table_bytes: self.tasks.bytes(),
            live_bytes: self.live_bytes,
            ..self.counters
        }
    }

    pub(crate) fn lane_mut(&mut self, function: FunctionId, tenant: TenantId) -> &mut Lane {
        let index = function.0 as usize;
        while self.lanes.len() <= index {
            self.lanes.push(Lane {
                tenant,
                config: FunctionConfig::default(),
                live: false,
                waiting: List::default(),
                behind_keys: 0,
                unsettled: 0,
                in_flight: 0,
                share: Share::default(),
                free_slots: 0,
                promised: 0,
                bindings: VecDeque::new(),
                parked_until_ns: 0,
                in_ring: false,
                age_armed: false,
            });
        }
        self.queue_mut(tenant);
        &mut self.lanes[index]
    }

    pub(crate) fn queue_mut(&mut self, tenant: TenantId) -> &mut Queue {
        let index = tenant.0 as usize;
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, || Queue {
                waiting_max: u64::MAX,
                ..Queue::default()
            });
        }
        &mut self.queues[index]
    }

    pub(crate) fn tenant_of(&self, slot: u32) -> TenantId {
        self.lanes[self.tasks[slot].function.0 as usize].tenant
    }

    pub(crate) fn note(&mut self, urgency: Urgency) {
        self.urgency = self.urgency.max(urgency);
    }

    pub(crate) fn segment_of(&self, position: Lsn) -> u64 {
        position.0 / self.options.segment_bytes
    }

    /// The edge's part of what is sent when the open batch is durable.
    pub(crate) fn after_flush(&mut self, connection: ConnectionId) -> &mut EdgeBatch {
        self.open.edges.edge(connection.edge())
    }

    pub(crate) fn add_waiter(&mut self, first: u32, waiter: Waiter) -> u32 {
        self.waiters.insert(Waiter {
            next: first,
            ..waiter
        })
    }
}
