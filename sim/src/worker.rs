//! Executors: what they lend, run, answer twice or too late, and how they come back, or do not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pelton_core::{
    error::Code,
    event::{Control, Execute, Outcome, OutcomeAck, OutcomeBatch, Reply, Span, Verdict, stow},
    id::{ConnectionId, FunctionId, RequestId, Token, shard_of},
};
use pelton_storage::memory::Random;

use crate::{
    oracle::{Check, ack_fits, broken, require, result_of},
    swarm::Plan,
    world::{Happening, World, function_name, tenant_name},
};

/// Outcomes of one frame at most.
const OUTCOMES_PER_FRAME: usize = 8;
/// Confirmed outcomes that an executor may say once more.
const REMEMBERED: usize = 16;

type Attempt = (RequestId, Token);

/// An attempt at its executor.
#[derive(Debug)]
struct Lease {
    shard: usize,
    /// How it ended, once it has.
    verdict: Option<Verdict>,
    hangs: bool,
}

/// What an executor's edge and one shard have going on.
#[derive(Debug, Default)]
struct Line {
    /// The shard has said which leases live on: slots may be lent.
    ready: bool,
    presented: Vec<Attempt>,
    /// Frames of outcomes without a confirmation.
    unconfirmed: BTreeMap<u64, Vec<Attempt>>,
    outbox: VecDeque<Attempt>,
    /// Most slots lent over this connection, by function.
    lent: BTreeMap<FunctionId, u32>,
    /// Attempts that the edge has passed on and whose outcome it has not seen.
    out: BTreeMap<Attempt, FunctionId>,
    confirmed: VecDeque<(Attempt, Verdict)>,
    /// Attempts that were ever sent to this executor, over all its connections.
    ever: BTreeSet<Attempt>,
}

/// One executor. Owned by the world; outlives the engine's crashes.
#[derive(Debug)]
pub struct Worker {
    id: u64,
    connection: Option<ConnectionId>,
    ticket: u64,
    /// Serves function `f` of tenant `t` if bit `t * 8 + f` is set.
    serves: u64,
    leases: BTreeMap<Attempt, Lease>,
    lines: Vec<Line>,
    /// The end of the connection before has not been told to the shards.
    untold: Option<ConnectionId>,
}

/// A frame of outcomes as its edge remembers it.
#[derive(Debug)]
pub(crate) struct Sending {
    outcomes: Vec<(RequestId, Token, Verdict)>,
}

impl Worker {
    /// An executor that has not connected.
    pub fn new(plan: &Plan, id: u64, random: &mut Random) -> Worker {
        Worker {
            id,
            connection: None,
            ticket: 0,
            serves: random.draw() | random.draw(),
            leases: BTreeMap::new(),
            lines: (0..plan.shards).map(|_| Line::default()).collect(),
            untold: None,
        }
    }

    /// All tasks were placed on so many shards while it had no connection.
    pub fn place(&mut self, shards: u16) {
        let shard = |request: RequestId| usize::from(shard_of(request.cell(), shards).0);
        let lines = (0..shards).map(|_| Line::default()).collect();
        for line in std::mem::replace(&mut self.lines, lines) {
            for attempt in line.outbox {
                self.lines[shard(attempt.0)].outbox.push_back(attempt);
            }
            for confirmed in line.confirmed {
                let of = &mut self.lines[shard(confirmed.0.0)];
                of.confirmed.push_back(confirmed);
            }
            for attempt in line.ever {
                self.lines[shard(attempt.0)].ever.insert(attempt);
            }
        }
        for ((request, _), lease) in &mut self.leases {
            lease.shard = shard(*request);
        }
    }

    /// True if it runs nothing and waits for nothing.
    pub fn idle(&self) -> bool {
        self.leases.is_empty() && self.connection.is_some() && self.lines.iter().all(|l| l.ready)
    }
}

impl World {
    fn worker_of(&self, connection: ConnectionId) -> Option<usize> {
        self.workers
            .iter()
            .position(|worker| worker.connection == Some(connection))
    }

    pub(crate) fn worker_connects(&mut self, worker: usize) {
        if !self.up || self.workers[worker].connection.is_some() {
            return;
        }
        if !self.serving() {
            self.after(500_000, Happening::WorkerConnects { worker });
            return;
        }
        let connection = self.connect();
        let target = &mut self.workers[worker];
        target.connection = Some(connection);
        let (executor, untold) = (target.id, target.untold.take());
        self.trace.event(self.now_ns, &[30, executor], || {
            format!("executor {executor} connects as {connection:?}")
        });
        for shard in 0..self.hosts.len() {
            self.tell(
                shard,
                Control::SessionOpened {
                    executor,
                    connection,
                },
            );
            if let Some(connection) = untold {
                self.tell(
                    shard,
                    Control::SessionLost {
                        executor,
                        connection,
                    },
                );
            }
            let target = &mut self.workers[worker];
            target.ticket += 1;
            let ticket = target.ticket;
            let leases: Vec<Attempt> = target
                .leases
                .iter()
                .filter(|(_, lease)| lease.shard == shard)
                .map(|(&attempt, _)| attempt)
                .collect();
            let line = &mut target.lines[shard];
            line.presented.clone_from(&leases);
            for &(request, token) in &line.ever {
                if !leases.contains(&(request, token)) {
                    self.oracle.not_presented(request, token);
                }
            }
            line.ever = leases.iter().copied().collect();
            self.presentations.insert((connection, ticket, shard));
            self.tell(
                shard,
                Control::LeasesPresented {
                    executor,
                    connection,
                    ticket,
                    leases,
                },
            );
        }
    }

    /// A shard has said which leases an executor keeps: it drops the others and lends its slots.
    pub(crate) fn leases_answered(&mut self, connection: ConnectionId, shard: usize, reply: Reply) {
        let Some(worker) = self.worker_of(connection) else {
            return;
        };
        let Reply::Leases { kept, .. } = reply else {
            return;
        };
        let target = &mut self.workers[worker];
        let line = &mut target.lines[shard];
        line.ready = true;
        for attempt in std::mem::take(&mut line.presented) {
            if kept.contains(&attempt) {
                if let Some(task) = self.oracle.tasks.get(&attempt.0) {
                    line.out.insert(attempt, task.function);
                }
            } else {
                target.leases.remove(&attempt);
                line.outbox.retain(|&other| other != attempt);
            }
        }
        self.offer(worker);
        self.after(
            50_000,
            Happening::WorkerSends {
                worker,
                connection,
                shard,
            },
        );
    }

    /// Lends slots of every function that an executor serves.
    fn offer(&mut self, worker: usize) {
        if self.workers[worker].connection.is_none() || !self.up {
            return;
        }
        for tenant in 0..self.plan.tenants {
            for function in 0..self.plan.functions {
                let index = (tenant * 8 + function) as u16;
                if self.workers[worker].serves >> index & 1 == 0 {
                    continue;
                }
                let found = self
                    .directory
                    .tenant_id(&tenant_name(tenant))
                    .and_then(|id| self.directory.function_id(id, &function_name(function)));
                let Some(function) = found else {
                    continue;
                };
                for shard in 0..self.hosts.len() {
                    let count = 1 + self.random.below(self.plan.slots) as u32;
                    let target = &mut self.workers[worker];
                    let line = &mut target.lines[shard];
                    if !line.ready {
                        continue;
                    }
                    let most = line.lent.entry(function).or_insert(0);
                    *most = (*most).max(count);
                    let executor = target.id;
                    self.tell(
                        shard,
                        Control::SlotsLent {
                            executor,
                            function,
                            index,
                            count,
                        },
                    );
                }
            }
        }
    }

    pub(crate) fn offer_everywhere(&mut self) {
        for worker in 0..self.workers.len() {
            self.offer(worker);
        }
    }

    pub(crate) fn execute_leaves(
        &mut self,
        shard: usize,
        execute: &Execute,
        bytes: &[u8],
    ) -> Check {
        let (connection, request, token) = (execute.connection, execute.request, execute.token);
        self.trace.event(
            self.now_ns,
            &[31, request.0 as u64, u64::from(token.attempt)],
            || format!("shard {shard} sends {request} {token:?} to {connection:?}"),
        );
        self.oracle.execute_leaves(execute, bytes)?;
        let Some(worker) = self.worker_of(connection) else {
            self.oracle.over(request, token);
            return Ok(());
        };
        let function = self.oracle.tasks[&request].function;
        let line = &mut self.workers[worker].lines[shard];
        line.ever.insert((request, token));
        line.out.insert((request, token), function);
        let out = line
            .out
            .values()
            .filter(|&&other| other == function)
            .count();
        let lent = line.lent.get(&function).copied().unwrap_or(0);
        if out > lent as usize {
            return broken(
                "slots_are_not_exceeded",
                format!(
                    "shard {shard}: {out} attempts of function {} are out, {lent} slots are lent",
                    function.0
                ),
            );
        }
        let index = execute.index;
        let delay = self.around(100_000);
        self.after(
            delay,
            Happening::Execute {
                connection,
                request,
                token,
                index,
            },
        );
        Ok(())
    }

    pub(crate) fn execute_arrives(
        &mut self,
        connection: ConnectionId,
        request: RequestId,
        token: Token,
        _index: u16,
    ) {
        let Some(worker) = self.worker_of(connection) else {
            return;
        };
        let shard = self.shard_of(request.cell());
        let hangs =
            self.plan.hang_one_in > 0 && !self.healing && self.random.one_in(self.plan.hang_one_in);
        self.workers[worker].leases.insert(
            (request, token),
            Lease {
                shard,
                verdict: None,
                hangs,
            },
        );
        if !hangs {
            let mut run_ns = self.around(self.plan.run_ns);
            if !self.healing && self.random.one_in(300) {
                // Longer than most timeouts: the answer comes too late.
                run_ns += 4_000_000_000;
            }
            self.after(
                run_ns,
                Happening::AttemptEnds {
                    worker,
                    request,
                    token,
                },
            );
        }
    }

    pub(crate) fn attempt_ends(&mut self, worker: usize, request: RequestId, token: Token) {
        let verdict = match self.random.below(40) {
            0..29 => Verdict::Succeeded,
            29..35 => Verdict::Failed,
            35 => Verdict::Throttled { retry_after_ms: 0 },
            36 => Verdict::Throttled {
                retry_after_ms: 1 + self.random.below(50) as u32,
            },
            37 | 38 => Verdict::Rejected,
            _ => Verdict::Stopped,
        };
        self.end_attempt(worker, (request, token), verdict);
    }

    fn end_attempt(&mut self, worker: usize, attempt: Attempt, verdict: Verdict) {
        let target = &mut self.workers[worker];
        let Some(lease) = target.leases.get_mut(&attempt) else {
            return;
        };
        if lease.verdict.is_some() {
            return;
        }
        lease.verdict = Some(verdict);
        let shard = lease.shard;
        target.lines[shard].outbox.push_back(attempt);
        let Some(connection) = target.connection else {
            return;
        };
        let delay = self.around(20_000);
        self.after(
            delay,
            Happening::WorkerSends {
                worker,
                connection,
                shard,
            },
        );
    }

    pub(crate) fn cancel_arrives(
        &mut self,
        connection: ConnectionId,
        request: RequestId,
        token: Token,
    ) {
        let Some(worker) = self.worker_of(connection) else {
            return;
        };
        // Some do not listen, and end in their own time or with their connection.
        let listens = self.healing || self.plan.long_timeouts || !self.random.one_in(4);
        if listens {
            self.end_attempt(worker, (request, token), Verdict::Stopped);
        }
    }

    pub(crate) fn worker_sends(&mut self, worker: usize, connection: ConnectionId, shard: usize) {
        if !self.up || self.workers[worker].connection != Some(connection) {
            return;
        }
        let again = self.random.one_in(25);
        let target = &mut self.workers[worker];
        let line = &mut target.lines[shard];
        if !line.ready
            || line.unconfirmed.len() >= self.plan.worker_window
            || line.outbox.is_empty()
        {
            return;
        }
        let mut outcomes = Vec::new();
        let mut mine = Vec::new();
        while outcomes.len() < OUTCOMES_PER_FRAME
            && let Some(attempt) = line.outbox.pop_front()
        {
            let Some(lease) = target.leases.get(&attempt) else {
                continue;
            };
            let verdict = lease.verdict.expect("only what has ended is in the outbox");
            line.out.remove(&attempt);
            mine.push(attempt);
            outcomes.push((attempt.0, attempt.1, verdict));
        }
        if again {
            // Something that was confirmed before, and something under the token before.
            if let Some(&((request, token), verdict)) = line.confirmed.front() {
                outcomes.push((request, token, verdict));
            }
            if let Some(&(request, token)) = mine.first()
                && token.attempt > 1
            {
                let attempt = token.attempt - 1;
                let before = Token { attempt, ..token };
                outcomes.push((request, before, Verdict::Succeeded));
                // Where it is this executor's own, timed out and still running, its slot counts as free from now on.
                line.out.remove(&(request, before));
            }
        }
        if outcomes.is_empty() {
            return;
        }
        target.ticket += 1;
        let ticket = target.ticket;
        line.unconfirmed.insert(ticket, mine);
        let mut bytes = Vec::new();
        let batch = outcomes
            .iter()
            .map(|&(request, token, verdict)| {
                let mut outcome = Outcome {
                    request,
                    token,
                    verdict,
                    code: Code::Ok,
                    run_us: 0,
                    error: Span::default(),
                    output: Span::default(),
                    result: Span::default(),
                };
                match verdict {
                    Verdict::Succeeded => {
                        outcome.result = stow(&mut bytes, &result_of(request, token));
                        outcome.output = stow(&mut bytes, b"done");
                    }
                    Verdict::Failed => {
                        outcome.code = Code::Internal;
                        outcome.error = stow(&mut bytes, "it went wrong \u{2014} twice".as_bytes());
                    }
                    Verdict::Throttled { .. } | Verdict::Rejected | Verdict::Stopped => {}
                }
                outcome
            })
            .collect();
        self.trace.event(
            self.now_ns,
            &[32, worker as u64, shard as u64, ticket],
            || format!("executor {worker} sends shard {shard} frame {ticket}: {outcomes:?}"),
        );
        for &(request, token, verdict) in &outcomes {
            if matches!(verdict, Verdict::Throttled { .. } | Verdict::Rejected) {
                self.oracle.over(request, token);
            }
        }
        self.sendings
            .insert((connection, ticket), Sending { outcomes });
        self.tell(
            shard,
            Control::Outcomes(OutcomeBatch {
                connection,
                ticket,
                outcomes: batch,
                bytes,
                done: 0,
                refused: Vec::new(),
            }),
        );
        self.after(
            30_000,
            Happening::WorkerSends {
                worker,
                connection,
                shard,
            },
        );
    }

    /// A shard whose log has failed says of every outcome that it is to be kept, or that it is stale: for the executor
    /// that is as if nothing had been said.
    fn outcomes_are_kept(&self, ack: &OutcomeAck) -> Check {
        if let Some(sending) = self.sendings.get(&(ack.connection, ack.ticket)) {
            ack_fits(ack, sending.outcomes.len())?;
        }
        let said = |code: &Code| matches!(code, Code::Unavailable | Code::StaleLease);
        require(
            ack.refused.len() == ack.count as usize && ack.refused.iter().all(|(_, c)| said(c)),
            "a_failed_log_is_told",
            || format!("a shard with a failed log confirms {ack:?}"),
        )
    }

    pub(crate) fn acknowledgement_leaves(&mut self, shard: usize, ack: OutcomeAck) -> Check {
        self.trace
            .event(self.now_ns, &[33, shard as u64, ack.ticket], || {
                format!("shard {shard} confirms {ack:?}")
            });
        if self.hosts[shard].poisoned {
            return self.outcomes_are_kept(&ack);
        }
        let Some(sending) = self.sendings.remove(&(ack.connection, ack.ticket)) else {
            return broken(
                "answered_once",
                format!(
                    "frame {} of {:?} is confirmed and was not sent",
                    ack.ticket, ack.connection
                ),
            );
        };
        ack_fits(&ack, sending.outcomes.len())?;
        for (index, &(request, token, verdict)) in sending.outcomes.iter().enumerate() {
            let refused = ack
                .refused
                .iter()
                .find(|&&(at, _)| at as usize == index)
                .map(|&(_, code)| code);
            self.oracle
                .outcome_acknowledged(request, token, verdict, refused)?;
        }
        if let Some(worker) = self.worker_of(ack.connection) {
            let line = &mut self.workers[worker].lines[shard];
            for &(request, token, verdict) in &sending.outcomes {
                line.confirmed.push_back(((request, token), verdict));
                line.ever.remove(&(request, token));
            }
            while line.confirmed.len() > REMEMBERED {
                line.confirmed.pop_front();
            }
        }
        let delay = self.around(100_000);
        self.after(delay, Happening::Acknowledged { shard, ack });
        Ok(())
    }

    pub(crate) fn acknowledgement_arrives(&mut self, shard: usize, ack: &OutcomeAck) {
        let Some(worker) = self.worker_of(ack.connection) else {
            return;
        };
        let target = &mut self.workers[worker];
        let done = target.lines[shard].unconfirmed.remove(&ack.ticket);
        for attempt in done.into_iter().flatten() {
            target.leases.remove(&attempt);
        }
        let connection = ack.connection;
        self.after(
            10_000,
            Happening::WorkerSends {
                worker,
                connection,
                shard,
            },
        );
    }

    /// The connection is gone; what the executor holds it goes on with.
    pub(crate) fn worker_lost(&mut self, worker: usize) {
        let target = &mut self.workers[worker];
        let Some(connection) = target.connection.take() else {
            return;
        };
        target.untold = None;
        for line in &mut target.lines {
            line.ready = false;
            line.presented.clear();
            line.lent.clear();
            line.out.clear();
            let unconfirmed = std::mem::take(&mut line.unconfirmed);
            line.outbox.extend(unconfirmed.into_values().flatten());
        }
        if !self.up {
            return;
        }
        let executor = target.id;
        self.trace.event(self.now_ns, &[34, executor], || {
            format!("executor {executor} loses its connection")
        });
        if self.random.one_in(3) {
            // The edge finds out only when it comes back.
            self.workers[worker].untold = Some(connection);
        } else {
            for shard in 0..self.hosts.len() {
                self.tell(
                    shard,
                    Control::SessionLost {
                        executor,
                        connection,
                    },
                );
            }
        }
        let delay = if self.random.one_in(5) {
            self.plan.lease_ms * 1_300_000
        } else {
            self.around(3_000_000)
        };
        self.after(delay, Happening::WorkerConnects { worker });
    }

    /// The process dies with all it holds and comes back empty, under the same identity.
    pub(crate) fn worker_dies(&mut self, worker: usize) {
        self.worker_lost(worker);
        let target = &mut self.workers[worker];
        target.leases.clear();
        for line in &mut target.lines {
            line.outbox.clear();
        }
    }

    /// The executor leaves for good, with a word or without; a new one takes its place.
    pub(crate) fn worker_leaves(&mut self, worker: usize, says_so: bool) {
        let target = &mut self.workers[worker];
        if let Some(connection) = target.connection
            && says_so
        {
            let executor = target.id;
            for shard in 0..self.hosts.len() {
                self.tell(
                    shard,
                    Control::SessionClosed {
                        executor,
                        connection,
                    },
                );
            }
        }
        self.worker_dies(worker);
        let id = 1_000 + self.connections;
        let target = &mut self.workers[worker];
        if let Some(connection) = target.untold.take() {
            let executor = target.id;
            for shard in 0..self.hosts.len() {
                self.tell(
                    shard,
                    Control::SessionLost {
                        executor,
                        connection,
                    },
                );
            }
        }
        let target = &mut self.workers[worker];
        target.id = id;
        for line in &mut target.lines {
            line.ever.clear();
            line.confirmed.clear();
        }
        self.connections += 1;
    }

    /// Everybody comes back, serves everything and ends what it holds.
    pub(crate) fn heal_workers(&mut self) {
        for worker in 0..self.workers.len() {
            self.workers[worker].serves = u64::MAX;
            let hanging: Vec<Attempt> = self.workers[worker]
                .leases
                .iter()
                .filter(|(_, lease)| lease.hangs && lease.verdict.is_none())
                .map(|(&attempt, _)| attempt)
                .collect();
            for (request, token) in hanging {
                let delay = self.around(5_000_000);
                self.after(
                    delay,
                    Happening::AttemptEnds {
                        worker,
                        request,
                        token,
                    },
                );
            }
        }
        self.offer_everywhere();
    }
}
