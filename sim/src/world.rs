//! The simulated world: virtual time, the process with its shards and edges, its disks, and the faults that befall it.
//! Callers and executors are in `caller` and `worker`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pelton_core::{
    clock::{LoggedClock, Now},
    config::{Change, Directory, FunctionConfig, OnFailure, TenantConfig, Wish},
    event::{Answer, Control, EdgeBatch, Effects, Finished, OutcomeAck, Reply},
    id::{CellId, ConnectionId, EdgeId, Lsn, RequestId, ShardId, TenantId, Token, shard_of},
    limits::BATCH_BYTES_MAX,
    shard::{Options, Shard},
};
use pelton_storage::{
    device::DeviceOp,
    log::READ_TRIES,
    manifest::Manifest,
    memory::{MemoryDevice, Random},
    recover::{Outcome as Recovered, inspect, records, recover_with},
};

use crate::{
    caller::{Administrator, Caller, Frame, Question},
    coverage::{Coverage, Moment, Recovery},
    damage::{Expected, expected, is_named},
    history::History,
    host::Host,
    oracle::{Check, Oracle, Violation, broken},
    swarm::{Fault, Plan, SEGMENT_BYTES},
    trace::Trace,
    worker::{Sending, Worker},
};

/// What identifies the logs of the first generation.
const LOG_ID: u128 = 42;
/// Wall time at the start of every world.
const WALL_MS: u64 = 1_790_000_000_000;
/// Virtual time within which a healed world must come to rest: what is due by a wall clock that jumped four times may
/// lie eight hours ahead, a delay may be of two, and an attempt that nobody ends lasts a day.
const REST_NS: u64 = 12 * 3_600_000_000_000;
/// Events of one run at most: a world that spins is broken too.
const EVENTS_MAX: u64 = 6_000_000;

/// What can happen next.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A shard's turn.
    Turn { life: u64, shard: usize },
    /// The disk of a shard has done its oldest operation.
    Disk { life: u64, shard: usize },
    /// A caller does something.
    CallerActs { caller: usize },
    /// Answers to a submit reach their caller.
    Answers {
        connection: ConnectionId,
        ticket: u64,
        answers: Vec<Answer>,
    },
    /// The end of a task reaches its caller.
    Finished {
        connection: ConnectionId,
        finished: Finished,
    },
    /// A reply reaches whoever asked.
    Reply {
        connection: ConnectionId,
        ticket: u64,
        shard: usize,
        reply: Reply,
    },
    /// A caller connects again.
    CallerBack { caller: usize },
    /// An executor is sent an attempt.
    Execute {
        connection: ConnectionId,
        request: RequestId,
        token: Token,
        index: u16,
    },
    /// An executor is asked to stop an attempt.
    Cancel {
        connection: ConnectionId,
        request: RequestId,
        token: Token,
    },
    /// An executor's outcomes were dealt with.
    Acknowledged { shard: usize, ack: OutcomeAck },
    /// An attempt ends at its executor.
    AttemptEnds {
        worker: usize,
        request: RequestId,
        token: Token,
    },
    /// An executor sends what it has for a shard.
    WorkerSends {
        worker: usize,
        connection: ConnectionId,
        shard: usize,
    },
    /// An executor connects.
    WorkerConnects { worker: usize },
    /// The administrator does something.
    Administers,
    /// History takes what has ended.
    HistoryActs,
    /// Something breaks.
    Breaks { fault: Fault },
    /// A fault that lasts is over.
    SpaceIsBack { shard: usize },
    /// Somebody notices that a shard refuses everything, and restarts the process.
    OperatorRestarts { life: u64 },
    /// The process starts again.
    Restart,
}

/// What is counted over a run.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Process deaths.
    pub crashes: u64,
    /// Logs that ended in a torn tail.
    pub torn: u64,
    /// What was reached.
    pub coverage: Coverage,
    /// Turns of all shards.
    pub turns: u64,
    /// Logs that were poisoned.
    pub poisoned: u64,
    /// Segments that were recycled.
    pub recycled: u64,
    /// Segments that were dead when a process ended.
    pub retired: u64,
    /// Disks with a damaged last batch that nothing vouched for, repaired before the start.
    pub unvouched: u64,
    /// Records that could not be read after all tries.
    pub read_failures: u64,
    /// Snapshots that were written.
    pub snapshots: u64,
}

impl Counts {
    /// Adds those of another run.
    pub fn add(&mut self, other: &Counts) {
        self.crashes += other.crashes;
        self.torn += other.torn;
        self.coverage.add(&other.coverage);
        self.turns += other.turns;
        self.poisoned += other.poisoned;
        self.recycled += other.recycled;
        self.retired += other.retired;
        self.unvouched += other.unvouched;
        self.read_failures += other.read_failures;
        self.snapshots += other.snapshots;
    }
}

/// All of it. Owned by one run.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) random: Random,
    pub(crate) now_ns: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    order: u64,
    pub(crate) trace: Trace,
    pub(crate) oracle: Oracle,
    pub(crate) history: History,
    pub(crate) counts: Counts,

    /// The number of the process's life: what happens to an earlier one happens no more.
    life: u64,
    pub(crate) up: bool,
    serving: bool,
    mono_base_ns: u64,
    wall_offset_ms: i64,
    clock: LoggedClock,
    pub(crate) hosts: Vec<Host>,
    pub(crate) disks: Vec<MemoryDevice>,
    pub(crate) manifest: Manifest,
    /// What edges know.
    pub(crate) directory: Directory,
    pub(crate) connections: u64,

    pub(crate) callers: Vec<Caller>,
    pub(crate) administrator: Administrator,
    pub(crate) workers: Vec<Worker>,
    /// What edges remember until a shard has answered, by connection and number.
    pub(crate) frames: BTreeMap<(ConnectionId, u64), Frame>,
    pub(crate) questions: BTreeMap<(ConnectionId, u64), Question>,
    pub(crate) presentations: BTreeSet<(ConnectionId, u64, usize)>,
    pub(crate) sendings: BTreeMap<(ConnectionId, u64), Sending>,
    /// Frames whose tasks' ends are to be told, and whose connection is whose.
    pub(crate) notifying: BTreeSet<(ConnectionId, u64)>,
    pub(crate) tenants_of: BTreeMap<ConnectionId, TenantId>,
    /// Tasks handed in, and the next fault in the plan.
    pub(crate) handed_in: usize,
    next_fault: usize,
    crash_in_turn: bool,
    /// The power fails when a disk comes to an operation of this kind.
    crash_at_disk: Option<&'static str>,
    crash_in_recovery: bool,
    read_error_at_start: bool,
    other_shards: bool,
    pub(crate) healing: bool,
}

impl World {
    /// An empty disk and a process that starts on it.
    pub fn new(plan: Plan, print: bool) -> World {
        let mut random = Random(plan.seed ^ 0x5151_5151);
        let mut oracle = Oracle::new(plan.shards);
        oracle.may_exhaust = plan.waiting_bounds
            || plan.knows(Fault::NoSpace)
            || plan.history && plan.history_lag_max < 1 << 30;
        oracle.payload_bytes_max = plan.payload_bytes_max;
        oracle.dedup_window_ms = plan.dedup_window_ms;
        let disks = (0..plan.shards)
            .map(|_| MemoryDevice::new(random.draw(), BATCH_BYTES_MAX))
            .collect();
        // The very first start may be cut short, too.
        let crash_in_recovery = plan.knows(Fault::CrashInRecovery) && random.one_in(2);
        let callers = (0..plan.callers)
            .map(|index| Caller::new(index % plan.tenants))
            .collect();
        let workers = (0..plan.workers)
            .map(|index| Worker::new(&plan, index as u64 + 1, &mut random))
            .collect();
        World {
            random,
            now_ns: 1,
            queue: BTreeMap::new(),
            order: 0,
            trace: Trace::new(print),
            oracle,
            history: History::new(plan.shards),
            counts: Counts::default(),
            life: 0,
            up: false,
            serving: false,
            mono_base_ns: 0,
            wall_offset_ms: 0,
            clock: LoggedClock::start(0, WALL_MS, 0),
            hosts: Vec::new(),
            disks,
            manifest: Manifest::new(LOG_ID, plan.shards, SEGMENT_BYTES),
            directory: Directory::default(),
            connections: 0,
            callers,
            administrator: Administrator::default(),
            workers,
            frames: BTreeMap::new(),
            questions: BTreeMap::new(),
            presentations: BTreeSet::new(),
            sendings: BTreeMap::new(),
            notifying: BTreeSet::new(),
            tenants_of: BTreeMap::new(),
            handed_in: 0,
            next_fault: 0,
            crash_in_turn: false,
            crash_at_disk: None,
            crash_in_recovery,
            read_error_at_start: false,
            other_shards: false,
            healing: false,
            plan,
        }
    }

    /// What was counted, the process that still runs included.
    pub fn counts(&self) -> Counts {
        let mut counts = self.counts.clone();
        for host in &self.hosts {
            counts.coverage.shard(host.shard.met());
        }
        counts
    }

    /// Runs the world to its rest.
    pub fn run(&mut self) -> Check {
        self.restart()?;
        self.set_up();
        self.until_quiet("the set-up is carried out", |world| {
            world.administrator.idle()
        })?;
        for caller in 0..self.callers.len() {
            self.after(1_000, Happening::CallerActs { caller });
        }
        self.administer_in(self.plan.pause_ns * 20);
        self.after(self.plan.history_ns, Happening::HistoryActs);
        let plan = self.plan.clone();
        self.until_quiet("callers hand in what they have", |world| {
            world.handed_in >= plan.tasks
        })?;
        self.heal()?;
        self.until_quiet("a healed world comes to rest", |world| {
            world.up && world.at_rest()
        })?;
        self.oracle.at_rest()?;
        self.check_rest()?;
        // Once more from the disk: nothing that has ended may change, nothing may come back.
        self.crash(Moment::BetweenTurns);
        self.restart()?;
        self.until_quiet("a restart at rest stays at rest", |world| {
            world.up && world.at_rest()
        })?;
        self.oracle.at_rest()?;
        self.check_rest()
    }

    fn until_quiet(&mut self, what: &'static str, done: impl Fn(&World) -> bool) -> Check {
        let deadline = self.now_ns + REST_NS;
        while !done(self) {
            let Some(((at, _), happening)) = self.queue.pop_first() else {
                self.oracle.at_rest()?;
                return broken(
                    "the_world_moves",
                    format!(
                        "nothing is left to happen before {what}; {}",
                        self.restless()
                    ),
                );
            };
            if at > deadline || self.trace.events() > EVENTS_MAX {
                self.oracle.at_rest()?;
                return broken(
                    "the_world_comes_to_rest",
                    format!("it did not within bounds: {what}; {}", self.restless()),
                );
            }
            self.now_ns = at;
            self.happen(happening)?;
        }
        Ok(())
    }

    /// Lets something happen later.
    pub(crate) fn after(&mut self, delay_ns: u64, happening: Happening) {
        self.order += 1;
        self.queue
            .insert((self.now_ns + delay_ns, self.order), happening);
    }

    /// A delay around `mean_ns`, now and then much longer.
    pub(crate) fn around(&mut self, mean_ns: u64) -> u64 {
        let mean_ns = mean_ns.max(2);
        let delay = mean_ns / 2 + self.random.below(mean_ns);
        if self.random.one_in(50) {
            delay * 10
        } else {
            delay
        }
    }

    fn happen(&mut self, happening: Happening) -> Check {
        match happening {
            Happening::Turn { life, shard } => {
                if life == self.life && self.up && self.hosts[shard].turn_at_ns == Some(self.now_ns)
                {
                    self.turn(shard)?;
                }
            }
            Happening::Disk { life, shard } => {
                if life == self.life && self.up {
                    self.trace.event(self.now_ns, &[1, shard as u64], || {
                        format!("disk {shard} has done one")
                    });
                    let next = self.hosts[shard].log.device().at_work();
                    if next.is_some() && next == self.crash_at_disk {
                        self.crash_at_disk = None;
                        self.crash(Moment::BetweenTurns);
                        return Ok(());
                    }
                    if self.hosts[shard].unreadable_until_ns > self.now_ns {
                        // Every try fails, and the record counts as lost for a while.
                        self.spoil(shard);
                    }
                    self.hosts[shard].run_disk();
                    self.wake(shard, 2_000);
                    self.spin_disk(shard);
                }
            }
            Happening::CallerActs { caller } => self.caller_acts(caller),
            Happening::Answers {
                connection,
                ticket,
                answers,
            } => self.answers_arrive(connection, ticket, &answers)?,
            Happening::Finished {
                connection,
                finished,
            } => self.finished_arrives(connection, &finished)?,
            Happening::Reply {
                connection,
                ticket,
                shard,
                reply,
            } => self.reply_arrives(connection, ticket, shard, reply)?,
            Happening::CallerBack { caller } => self.caller_back(caller),
            Happening::Execute {
                connection,
                request,
                token,
                index,
            } => self.execute_arrives(connection, request, token, index),
            Happening::Cancel {
                connection,
                request,
                token,
            } => self.cancel_arrives(connection, request, token),
            Happening::Acknowledged { shard, ack } => self.acknowledgement_arrives(shard, &ack),
            Happening::AttemptEnds {
                worker,
                request,
                token,
            } => self.attempt_ends(worker, request, token),
            Happening::WorkerSends {
                worker,
                connection,
                shard,
            } => self.worker_sends(worker, connection, shard),
            Happening::WorkerConnects { worker } => self.worker_connects(worker),
            Happening::Administers => self.administers(),
            Happening::HistoryActs => self.history_acts()?,
            Happening::Breaks { fault } => self.breaks(fault),
            Happening::SpaceIsBack { shard } => {
                // There may be fewer shards by now.
                if self.up && shard < self.hosts.len() {
                    self.hosts[shard].log.device().limit_space(usize::MAX);
                    self.wake(shard, 1_000);
                }
            }
            Happening::OperatorRestarts { life } => {
                if life == self.life && self.up {
                    self.crash(Moment::BetweenTurns);
                }
            }
            Happening::Restart => self.restart()?,
        }
        Ok(())
    }

    /// Sees to it that a shard has a turn soon.
    pub(crate) fn wake(&mut self, shard: usize, within_ns: u64) {
        let delay = 500 + self.random.below(within_ns.max(1));
        self.turn_by(shard, self.now_ns + delay);
    }

    fn turn_by(&mut self, shard: usize, at_ns: u64) {
        let host = &mut self.hosts[shard];
        if host.turn_at_ns.is_none_or(|known| known > at_ns) {
            host.turn_at_ns = Some(at_ns);
            self.order += 1;
            let life = self.life;
            self.queue
                .insert((at_ns, self.order), Happening::Turn { life, shard });
        }
    }

    fn spin_disk(&mut self, shard: usize) {
        let (mean, slow) = (
            self.plan.disk_ns,
            self.hosts[shard].slow_until_ns > self.now_ns,
        );
        let delay = self.around(if slow { mean * 100 } else { mean });
        let host = &mut self.hosts[shard];
        if host.disk_busy || !host.disk_waits() {
            return;
        }
        host.disk_busy = true;
        let life = self.life;
        self.after(delay, Happening::Disk { life, shard });
    }

    fn now(&mut self) -> Now {
        let mono_ns = self.mono_base_ns + self.now_ns;
        let wall_ms =
            (WALL_MS + self.now_ns / 1_000_000).saturating_add_signed(self.wall_offset_ms);
        Now {
            mono_ns,
            logged_ms: self.clock.advance(mono_ns, wall_ms),
        }
    }

    /// Logged time as of the last turn of any shard.
    pub(crate) fn wall_ms(&self) -> u64 {
        (WALL_MS + self.now_ns / 1_000_000).saturating_add_signed(self.wall_offset_ms)
    }

    fn turn(&mut self, shard: usize) -> Check {
        let now = self.now();
        self.counts.turns += 1;
        let host = &mut self.hosts[shard];
        host.turn_at_ns = None;
        let was_poisoned = host.poisoned;
        let mut effects = host.turn(shard, now, self.plan.submits_max, &mut self.oracle)?;
        if host.poisoned && !was_poisoned {
            self.counts.poisoned += 1;
            let delay = self.around(20_000_000);
            let life = self.life;
            self.after(delay, Happening::OperatorRestarts { life });
        }
        if self.crash_in_turn && effects.urgency != pelton_core::event::Urgency::Nothing {
            self.crash_in_turn = false;
            self.trace.event(self.now_ns, &[2, shard as u64], || {
                format!("power fails within a turn of shard {shard}")
            });
            self.crash(Moment::AfterSeal);
            return Ok(());
        }
        self.trace
            .event(self.now_ns, &[3, shard as u64, now.logged_ms], || {
                format!(
                    "shard {shard} steps at {} ({:?})",
                    now.logged_ms, effects.urgency
                )
            });
        if !self.serving {
            self.look_whether_serving();
        }
        self.perform(shard, &mut effects)?;
        if self.hosts[shard].poisoned {
            self.check_poisoned(shard)?;
        }
        self.spin_disk(shard);
        let base = self.mono_base_ns;
        if let Some(at) = self.hosts[shard].wants_turn_ns(now.mono_ns) {
            self.turn_by(shard, (at - base).max(self.now_ns + 500));
        }
        Ok(())
    }

    fn perform(&mut self, shard: usize, effects: &mut Effects) -> Check {
        for (to, control) in std::mem::take(&mut effects.shards) {
            self.trace
                .event(self.now_ns, &[4, shard as u64, u64::from(to.0)], || {
                    format!("shard {shard} -> shard {}: {control:?}", to.0)
                });
            self.tell(to.0 as usize, control);
        }
        let published = !effects.published.is_empty();
        for (version, change) in &effects.published {
            self.directory.apply(*version, change);
        }
        for edge in std::mem::take(&mut effects.edges) {
            self.perform_edge(shard, edge)?;
        }
        if published {
            self.offer_everywhere();
        }
        match effects.history.take() {
            Some(batch) => self.history_answered(shard, batch),
            None => Ok(()),
        }
    }

    fn perform_edge(&mut self, shard: usize, edge: EdgeBatch) -> Check {
        let poisoned = self.hosts[shard].poisoned;
        for run in &edge.runs {
            let answers = &edge.answers[run.first as usize..(run.first + run.count) as usize];
            self.answers_leave(shard, run.connection, run.ticket, answers, poisoned)?;
        }
        for execute in &edge.executes {
            self.execute_leaves(shard, execute, &edge.bytes)?;
        }
        for finished in &edge.finished {
            self.finished_leaves(finished, &edge.bytes)?;
        }
        for ack in edge.acks {
            self.acknowledgement_leaves(shard, ack)?;
        }
        for cancel in &edge.cancels {
            let (connection, request, token) = (cancel.connection, cancel.request, cancel.token);
            self.trace.event(self.now_ns, &[5, request.0 as u64], || {
                format!("cancel {request} {token:?}")
            });
            let delay = self.around(100_000);
            self.after(
                delay,
                Happening::Cancel {
                    connection,
                    request,
                    token,
                },
            );
        }
        for (connection, ticket, reply) in edge.replies {
            self.reply_leaves(shard, connection, ticket, reply, poisoned)?;
        }
        Ok(())
    }

    /// Puts something into a shard's control inbox.
    pub(crate) fn tell(&mut self, shard: usize, control: Control) {
        self.hosts[shard].inbox.control.push_back(control);
        self.wake(shard, 3_000);
    }

    /// The shard of a cell.
    pub(crate) fn shard_of(&self, cell: CellId) -> usize {
        usize::from(shard_of(cell, self.plan.shards).0)
    }

    /// A new connection on one of the edges.
    pub(crate) fn connect(&mut self) -> ConnectionId {
        self.connections += 1;
        let edge = EdgeId(self.random.below(u64::from(self.plan.edges)) as u16);
        ConnectionId::new(edge, self.connections)
    }

    /// Faults of the plan whose time has come.
    pub(crate) fn provoke(&mut self) {
        while let Some(&(after, fault)) = self.plan.faults.get(self.next_fault) {
            if after > self.handed_in || self.healing {
                return;
            }
            self.next_fault += 1;
            let delay = self.random.below(3_000_000);
            self.after(delay, Happening::Breaks { fault });
        }
    }

    /// The next read of a disk fails, or brings what nobody has written.
    fn spoil(&mut self, shard: usize) {
        let device = self.hosts[shard].log.device();
        if self.random.one_in(2) {
            device.fail_next_read();
        } else {
            device.spoil_next_read();
        }
    }

    fn breaks(&mut self, fault: Fault) {
        if !self.up || self.healing {
            return;
        }
        self.counts.coverage.faults[fault as usize] += 1;
        self.trace.event(self.now_ns, &[6, fault as u64], || {
            format!("fault: {fault:?}")
        });
        let shard = self.random.below(u64::from(self.plan.shards)) as usize;
        let worker = self.random.below(self.workers.len() as u64) as usize;
        match fault {
            Fault::Crash => self.crash(Moment::BetweenTurns),
            Fault::CrashAtDisk => {
                let kinds = DeviceOp::NAMES.len() as u64;
                self.crash_at_disk = Some(DeviceOp::NAMES[self.random.below(kinds) as usize]);
            }
            Fault::CrashInRecovery => {
                self.crash_in_recovery = true;
                self.crash(Moment::BetweenTurns);
            }
            Fault::ReadErrorAtStart => {
                self.read_error_at_start = true;
                self.crash(Moment::BetweenTurns);
            }
            Fault::OtherShards => {
                self.other_shards = true;
                self.crash(Moment::BetweenTurns);
            }
            Fault::LostWrite => self.hosts[shard].log.device().lose_next_write(),
            Fault::MisdirectedWrite => self.hosts[shard].log.device().misdirect_next_write(),
            Fault::Rot => {
                self.hosts[shard].log.device().rot_somewhere();
            }
            Fault::CrashInTurn => self.crash_in_turn = true,
            Fault::ReadError if self.random.one_in(2) => self.spoil(shard),
            Fault::ReadError => {
                let span = self.around(5_000_000);
                self.hosts[shard].unreadable_until_ns = self.now_ns + span;
            }
            Fault::FlushError => self.hosts[shard].log.device().fail_next_flush(),
            Fault::WriteError => self.hosts[shard].log.device().fail_next_write(),
            Fault::NoSpace => {
                self.hosts[shard].log.device().limit_space(0);
                let delay = self.around(50_000_000);
                self.after(delay, Happening::SpaceIsBack { shard });
            }
            Fault::SlowDisk => {
                let span = self.around(20_000_000);
                self.hosts[shard].slow_until_ns = self.now_ns + span;
            }
            Fault::ExecutorDeath => self.worker_dies(worker),
            Fault::ExecutorGone => self.worker_leaves(worker, false),
            Fault::ExecutorClosed => self.worker_leaves(worker, true),
            Fault::ExecutorLost => self.worker_lost(worker),
            Fault::CallerLost => {
                let caller = self.random.below(self.callers.len() as u64) as usize;
                self.caller_lost(caller);
            }
            Fault::WallJump => {
                let far = self.random.below(self.plan.wall_jump_ms) as i64;
                self.wall_offset_ms += if self.random.one_in(2) { far } else { -far };
            }
        }
    }

    /// The power fails.
    fn crash(&mut self, moment: Moment) {
        self.counts.crashes += 1;
        self.life += 1;
        self.up = false;
        for mut host in std::mem::take(&mut self.hosts) {
            let coverage = &mut self.counts.coverage;
            coverage.shard(host.shard.met());
            coverage.crash(moment, host.log.device().at_work());
            self.counts.recycled += host.log.stats().recycled;
            self.counts.read_failures += host.log.stats().read_failures;
            self.counts.snapshots += host.log.stats().snapshots;
            self.counts.retired += host.shard.retire_before().0 / SEGMENT_BYTES;
            self.disks.push(host.crash());
        }
        self.trace.event(self.now_ns, &[7, self.life], || {
            "the process is gone".to_owned()
        });
        self.oracle.crashed();
        self.history.crashed();
        self.frames.clear();
        self.questions.clear();
        self.presentations.clear();
        self.sendings.clear();
        self.notifying.clear();
        for caller in 0..self.callers.len() {
            self.caller_lost(caller);
        }
        self.administrator_lost();
        for worker in 0..self.workers.len() {
            self.worker_lost(worker);
        }
        let delay = if self.random.one_in(8) {
            self.plan.lease_ms * 1_500_000
        } else {
            self.around(5_000_000)
        };
        self.after(delay, Happening::Restart);
    }

    fn restart(&mut self) -> Check {
        if self.up {
            return Ok(());
        }
        if !self.disks_are_ready()? {
            let delay = self.around(5_000_000);
            self.after(delay, Happening::Restart);
            return Ok(());
        }
        if std::mem::take(&mut self.other_shards) {
            self.place()?;
        }
        let mut last_ms = 0;
        let mut found = Vec::new();
        for (index, mut device) in std::mem::take(&mut self.disks).into_iter().enumerate() {
            device.limit_space(usize::MAX);
            let options = self.shard_options(index);
            let mut shard = Shard::new(options);
            let log_options = self.manifest.log(index as u16);
            let recovered = recover_with(device, log_options, &mut shard);
            let (mut log, report) = recovered.map_err(|error| Violation {
                invariant: "a_crash_is_no_corruption",
                sentence: format!("shard {index}: {error}"),
            })?;
            // The whole log, whatever a snapshot has spared: it must say what the oracle knows, and lead to the same.
            let mut whole = Shard::new(Options {
                seed: shard.secret(),
                ..options
            });
            let oracle = &mut self.oracle;
            oracle.recovery_begins(index);
            let mut seen = Ok(());
            let read = inspect(log.device(), log_options, &mut |header, batch| {
                let walked = records(batch, header.records, |at, schema, body| {
                    let position = Lsn(header.lsn.0 + at as u64);
                    if seen.is_ok() {
                        seen = oracle.record(index, position, schema, body);
                    }
                    whole.replay(position, schema, body).ok()
                });
                assert!(walked.is_some(), "a sound batch is read to its end");
                Ok(())
            });
            seen?;
            read.map_err(|error| Violation {
                invariant: "a_crash_is_no_corruption",
                sentence: format!("shard {index}, read once more: {error}"),
            })?;
            self.oracle.recovery_ends(index)?;
            self.counts.torn += u64::from(matches!(report.outcome, Recovered::TornTail { .. }));
            self.counts.coverage.recovery(match report.outcome {
                Recovered::Empty => Recovery::Empty,
                Recovered::Clean => Recovery::Clean,
                Recovered::TornTail { .. } => Recovery::TornTail,
            });
            if report.snapshot_bytes > 0 {
                self.counts.coverage.recovery(Recovery::FromSnapshot);
            }
            if report.snapshots_passed_over > 0 {
                self.counts.coverage.recovery(Recovery::SnapshotPassedOver);
            }
            self.trace
                .event(self.now_ns, &[8, index as u64, report.records], || {
                    format!("shard {index}: {report:?}")
                });
            last_ms = last_ms.max(shard.last_logged_ms());
            found.push((shard, whole, log));
        }
        self.mono_base_ns = self.random.below(1 << 50);
        let (mono_ns, wall_ms) = (self.mono_base_ns + self.now_ns, self.wall_ms());
        self.clock = LoggedClock::start(mono_ns, wall_ms, last_ms);
        let now = self.now();
        for (index, (mut shard, mut whole, log)) in found.into_iter().enumerate() {
            let saved = self.history.through(index);
            shard.start(now, saved);
            shard.audit();
            whole.start(now, saved);
            shard.audit_against(&whole);
            self.hosts.push(Host::new(shard, log));
        }
        self.up = true;
        self.life += 1;
        self.check_history()?;
        self.reconcile()?;
        for shard in 0..self.hosts.len() {
            self.wake(shard, 1_000);
        }
        for caller in 0..self.callers.len() {
            let delay = self.around(500_000);
            self.after(delay, Happening::CallerBack { caller });
        }
        for worker in 0..self.workers.len() {
            let delay = self.around(2_000_000);
            self.after(delay, Happening::WorkerConnects { worker });
        }
        self.administer_in(100_000);
        Ok(())
    }

    /// What a shard is made with.
    pub(crate) fn shard_options(&mut self, index: usize) -> Options {
        Options {
            shard: ShardId(index as u16),
            shards: self.manifest.shards,
            first_page: self.manifest.first_page,
            page_shift: self.manifest.page_shift,
            segment_bytes: SEGMENT_BYTES,
            seed: self.random.draw(),
            payload_bytes_max: self.plan.payload_bytes_max,
            fetched_bytes_max: self.plan.fetched_bytes_max,
            finished_max: self.plan.finished_max,
            finished_bytes_max: self.plan.finished_bytes_max,
            history_lag_max: if self.plan.history {
                self.plan.history_lag_max
            } else {
                0
            },
            lease_ms: self.plan.lease_ms,
            dedup_window_ms: self.plan.dedup_window_ms,
            task_pages_max: self.plan.task_pages_max,
        }
    }

    /// What damaged disks must come to, and starts that do not get to their end. False if this is one of them.
    fn disks_are_ready(&mut self) -> Result<bool, Violation> {
        let mut disks = std::mem::take(&mut self.disks);
        for (index, device) in disks.iter_mut().enumerate() {
            device.limit_space(usize::MAX);
            let options = self.manifest.log(index as u16);
            let named = match expected(device, options)? {
                Expected::Sound => continue,
                Expected::Either => "a header that nobody needs".to_owned(),
                Expected::BehindSnapshot => {
                    self.counts.coverage.recovery(Recovery::BehindSnapshot);
                    "what a snapshot spares the start".to_owned()
                }
                Expected::Unvouched => {
                    self.counts.unvouched += 1;
                    "the last batch, which nothing vouches for".to_owned()
                }
                Expected::Named(places) => {
                    self.counts.coverage.recovery(Recovery::Corrupt);
                    is_named(
                        device,
                        options,
                        Shard::new(self.shard_options(index)),
                        &places,
                    )?
                }
            };
            self.trace.event(self.now_ns, &[10, index as u64], || {
                format!("disk {index} is damaged and gets repaired: {named}")
            });
            device.repair();
        }
        let fails = std::mem::take(&mut self.read_error_at_start);
        let interrupted = std::mem::take(&mut self.crash_in_recovery);
        if fails || interrupted {
            let index = self.random.below(disks.len() as u64) as usize;
            let kind = DeviceOp::NAMES[self.random.below(DeviceOp::NAMES.len() as u64) as usize];
            let before = self.random.below(4) as u32;
            let before = if self.random.one_in(2) { 0 } else { before };
            let device = &mut disks[index];
            let changes = device.changes();
            if fails {
                device.fail_next_reads(READ_TRIES);
            } else {
                device.lose_power_at(kind, before);
            }
            let mut shard = Shard::new(self.shard_options(index));
            let started =
                recover_with(&mut *device, self.manifest.log(index as u16), &mut shard).is_ok();
            if fails && started && !device.names().is_empty() {
                broken(
                    "a_failed_read_is_no_end",
                    format!("shard {index} starts although a read failed again and again"),
                )?;
            }
            if fails && !started && device.changes() != changes {
                broken(
                    "a_refused_start_changes_nothing",
                    format!("shard {index} changed its disk and could not read it"),
                )?;
            }
            let at = device.power_failed_at();
            self.trace.event(self.now_ns, &[11, index as u64], || {
                format!("the start ends early at shard {index}: {at:?}")
            });
            let coverage = &mut self.counts.coverage;
            if fails {
                coverage.recovery(Recovery::ReadFailed);
            } else {
                self.counts.crashes += 1;
                coverage.recovery(Recovery::Interrupted);
                coverage.crash(Moment::InRecovery, at);
            }
            device.crash();
        }
        self.disks = disks;
        Ok(!fails && !interrupted)
    }

    /// Shard 0 orders configuration. A crash between its log and another's leaves that one behind: before anybody is
    /// served, the missing changes are applied there through its log, and edges start from shard 0's directory.
    fn reconcile(&mut self) -> Check {
        let truth = self.hosts[0].shard.directory().clone();
        for index in 1..self.hosts.len() {
            let behind = self.hosts[index].shard.directory();
            let missing: Vec<Change> = truth
                .dump()
                .filter(|change| match change {
                    Change::Tenant { id, .. } => behind.tenant(*id) != truth.tenant(*id),
                    Change::Function { id, .. } => behind.function(*id) != truth.function(*id),
                    Change::FunctionRemoved { id } => behind.function(*id) != truth.function(*id),
                })
                .collect();
            for change in missing {
                let version = truth.version();
                self.tell(index, Control::Apply { version, change });
            }
        }
        self.directory = truth;
        self.look_whether_serving();
        Ok(())
    }

    /// True once every shard has the configuration that shard 0 had at the start.
    pub(crate) fn serving(&self) -> bool {
        self.up && self.serving
    }

    fn look_whether_serving(&mut self) {
        let truth = self.hosts[0].shard.directory();
        self.serving = self.hosts.iter().all(|host| {
            let found = host.shard.directory();
            found.tenants() == truth.tenants() && found.functions() == truth.functions()
        });
    }

    /// Everything is repaired: no more faults, no more new tasks, an executor for every function.
    fn heal(&mut self) -> Check {
        self.healing = true;
        self.trace
            .event(self.now_ns, &[9], || "everything heals".to_owned());
        let hurt = |host: &mut Host| host.poisoned || !host.log.device().damage().is_empty();
        if self.up && self.hosts.iter_mut().any(hurt) {
            self.crash(Moment::BetweenTurns);
        }
        for shard in 0..self.hosts.len() {
            self.hosts[shard].log.device().heal();
            self.hosts[shard].slow_until_ns = 0;
            self.hosts[shard].unreadable_until_ns = 0;
        }
        self.crash_in_turn = false;
        self.crash_at_disk = None;
        self.crash_in_recovery = false;
        self.read_error_at_start = false;
        self.other_shards = false;
        self.heal_workers();
        self.heal_configuration();
        Ok(())
    }

    /// True if nothing is to be done but wait for nothing.
    fn at_rest(&self) -> bool {
        self.oracle.unfinished() == 0
            && self.history.idle()
            && self.administrator.idle()
            && self.callers.iter().all(Caller::idle)
            && self.workers.iter().all(Worker::idle)
            && self.hosts.iter().all(|host| {
                host.inbox.control.is_empty()
                    && host.inbox.submits.is_empty()
                    && host.at_edges.is_empty()
                    && host.log.open_records() == 0
                    && host.log.can_seal()
                    && host.shard.credits_out() == 0
                    && host.shard.history_lag_bytes() == 0
            })
    }

    /// Who keeps the world from its rest.
    fn restless(&self) -> String {
        let callers = self.callers.iter().filter(|caller| !caller.idle());
        let workers = self.workers.iter().filter(|worker| !worker.idle());
        format!(
            "callers {:?}, executors {:?}, administrator idle: {}, credits out: {:?}",
            callers.collect::<Vec<_>>(),
            workers.collect::<Vec<_>>(),
            self.administrator.idle(),
            self.hosts
                .iter()
                .map(|host| host.shard.credits_out())
                .collect::<Vec<_>>()
        )
    }

    fn check_rest(&self) -> Check {
        self.check_history()?;
        for (index, host) in self.hosts.iter().enumerate() {
            host.shard.audit();
            host.shard.audit_rest();
            for (name, config) in &self.administrator.confirmed {
                let found = host.shard.directory();
                let id = found
                    .tenant_id(&name.0)
                    .and_then(|tenant| found.function_id(tenant, &name.1));
                if let Some(id) = id {
                    Oracle::configuration(
                        index,
                        id,
                        found.function(id).map(|function| &function.config),
                        config,
                    )?;
                }
            }
        }
        Ok(())
    }
}

/// The configuration that a function has when everything is well.
pub(crate) fn healed(config: &FunctionConfig) -> FunctionConfig {
    FunctionConfig {
        on_failure: OnFailure::Continue,
        paused: false,
        ..*config
    }
}

/// The name of a tenant.
pub(crate) fn tenant_name(index: usize) -> String {
    format!("tenant{index}")
}

/// The name of a function.
pub(crate) fn function_name(index: usize) -> String {
    format!("function{index}")
}

/// A tenant's configuration without bounds.
pub(crate) fn unbounded(weight: u16) -> TenantConfig {
    TenantConfig {
        weight,
        ..TenantConfig::default()
    }
}

/// The wishes that make the world's tenants and functions.
pub(crate) fn first_wishes(plan: &Plan, random: &mut Random) -> VecDeque<Wish> {
    let mut wishes = VecDeque::new();
    for tenant in 0..plan.tenants {
        wishes.push_back(Wish::SetTenant {
            name: tenant_name(tenant),
            config: unbounded(1 + random.below(4) as u16),
        });
        for function in 0..plan.functions {
            wishes.push_back(Wish::SetFunction {
                tenant: tenant_name(tenant),
                name: function_name(function),
                config: crate::caller::draw_config(plan, random),
            });
        }
    }
    wishes
}
