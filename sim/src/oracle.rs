//! What must hold whatever happens. The oracle reads every batch that became durable, by itself and from the bytes,
//! and compares what leaves a shard with that: an answer whose record is not on the disk is caught when it leaves,
//! not only when a crash loses it.
//!
//! Each invariant has a name, which is the first argument of [`broken`].

use std::collections::{BTreeMap, BTreeSet};

use pelton_core::{
    config::{Change, FunctionConfig},
    error::Code,
    event::{
        Answer, Durability, Ended, Execute, Finished, OutcomeAck, Reply, Start, TaskView, Verdict,
    },
    id::{FunctionId, Lsn, RequestId, TenantId, Token, shard_of},
    limits::MAX_AGE_S_DEFAULT,
    record::{Record, read},
    state::State,
};
use pelton_storage::{format::BATCH_HEADER_BYTES, format::BatchHeader, recover::records};

/// A broken invariant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Its name.
    pub invariant: &'static str,
    /// What happened to what.
    pub sentence: String,
}

/// The result of a check.
pub type Check = Result<(), Violation>;

/// Says that `invariant` is broken.
pub fn broken(invariant: &'static str, sentence: String) -> Check {
    Err(Violation {
        invariant,
        sentence,
    })
}

pub(crate) fn require(
    holds: bool,
    invariant: &'static str,
    sentence: impl FnOnce() -> String,
) -> Check {
    if holds {
        Ok(())
    } else {
        broken(invariant, sentence())
    }
}

/// What a caller wants done: one task, however often it is handed in.
#[derive(Clone, Debug)]
pub struct Intent {
    /// Its number, which its payload or content type carries.
    pub number: u32,
    /// The tenant.
    pub tenant: TenantId,
    /// The function.
    pub function: FunctionId,
    /// The given name; empty for none.
    pub task_id: String,
    /// The ordering key; empty for none.
    pub key: String,
    /// The content type.
    pub content_type: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// When it may start.
    pub start: Start,
    /// Own maximum age.
    pub max_age_s: u32,
    /// Cost.
    pub cost: u16,
    /// Priority.
    pub priority: u8,
    /// What its acceptance promises.
    pub durability: Durability,
    /// The caller's tags.
    pub tags: Vec<u8>,
    /// The request that it was answered with, if it was.
    pub answered: Option<RequestId>,
    /// Some answer is missing: it may be there or not.
    pub unknown: bool,
    /// It has no given name, was refused, and never unknown before.
    pub refused: bool,
    /// Times that it was handed in and is not answered.
    pub flying: u32,
}

/// A task as the disk knows it.
#[derive(Clone, Debug)]
pub struct Known {
    /// Which intent it came from.
    pub intent: u32,
    /// Its function.
    pub function: FunctionId,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its key.
    pub key: String,
    /// Its state, as far as records say.
    pub state: State,
    /// When it is due; 0 for at once.
    pub due_ms: u64,
    max_age_s: u32,
    /// Its last lease.
    pub token: Token,
    executed: Token,
    outcomes: u32,
    /// The attempt whose result counts.
    succeeded: Option<Token>,
}

/// What configurations a function was ever wished to have, by its name.
#[derive(Clone, Debug)]
pub struct Wished {
    /// Most retries.
    pub retries_max: u8,
    /// Shortest age.
    pub max_age_s_min: u32,
    /// Whether its removal was ever wished.
    pub removed: bool,
}

impl Default for Wished {
    fn default() -> Wished {
        Wished {
            retries_max: 0,
            max_age_s_min: MAX_AGE_S_DEFAULT,
            removed: false,
        }
    }
}

/// What the disk of one shard holds.
#[derive(Debug, Default)]
struct Disk {
    /// The last record that was read, live or by a recovery.
    last: Lsn,
    /// Tasks that a recovery handed on, while it runs, and the last record.
    replayed: Option<BTreeSet<RequestId>>,
    replayed_last: Lsn,
    /// Tasks of this shard that have not ended.
    unfinished: BTreeSet<RequestId>,
    /// Batches that became durable, and each function's concurrency with the number of the batch that set it.
    batches: u64,
    limits: BTreeMap<FunctionId, (u32, u64)>,
}

/// What is counted for the table at the end.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Tasks whose record became durable.
    pub accepted: u64,
    /// Attempts sent to executors.
    pub executed: u64,
    /// Tasks that ended.
    pub ended: u64,
    /// Duplicates answered.
    pub duplicates: u64,
    /// Submits refused.
    pub refused: u64,
    /// Outcomes refused as stale.
    pub stale: u64,
    /// Leases that were held against their function's concurrency.
    pub limited: u64,
    /// Records that were moved forward.
    pub relocated: u64,
}

impl Tally {
    /// Adds that of another run.
    pub fn add(&mut self, other: &Tally) {
        self.accepted += other.accepted;
        self.executed += other.executed;
        self.ended += other.ended;
        self.duplicates += other.duplicates;
        self.refused += other.refused;
        self.stale += other.stale;
        self.limited += other.limited;
        self.relocated += other.relocated;
    }
}

/// Everything that the checks remember. Owned by one run; survives every crash.
#[derive(Debug, Default)]
pub struct Oracle {
    /// All intents.
    pub intents: Vec<Intent>,
    /// All durable tasks.
    pub tasks: BTreeMap<RequestId, Known>,
    /// What was ever wished, by tenant and function name.
    pub wished: BTreeMap<(String, String), Wished>,
    /// Counts.
    pub tally: Tally,
    /// The configured bounds that allow a refusal.
    pub may_exhaust: bool,
    /// Bytes that a payload may have.
    pub payload_bytes_max: u32,
    /// The dedup window.
    pub dedup_window_ms: u64,
    disks: Vec<Disk>,
    tenants: BTreeMap<TenantId, String>,
    functions: BTreeMap<FunctionId, (TenantId, String)>,
    names: BTreeMap<(FunctionId, String, String), Vec<u32>>,
    named: BTreeMap<(FunctionId, String, String), RequestId>,
    keys: BTreeMap<(FunctionId, String), BTreeSet<RequestId>>,
    /// Attempts whose outcome was confirmed; `true` where the log has it.
    ended: BTreeMap<(RequestId, Token), bool>,
    /// Attempts that may have been given back in memory.
    released: BTreeSet<(RequestId, Token)>,
    /// Leased tasks as the disks know them.
    running: BTreeMap<FunctionId, BTreeSet<RequestId>>,
    /// Attempts that run nowhere, or that their shard may have given back, although the disk does not say so.
    over: BTreeSet<(RequestId, Token)>,
}

impl Oracle {
    /// Knows nothing yet.
    pub fn new(shards: u16) -> Oracle {
        Oracle {
            disks: (0..shards).map(|_| Disk::default()).collect(),
            ..Oracle::default()
        }
    }

    /// All tasks were placed on so many shards, in logs of which nothing was read yet.
    pub fn place(&mut self, shards: u16) {
        let disks = (0..shards).map(|_| Disk::default()).collect();
        let before = std::mem::replace(&mut self.disks, disks);
        for request in before.into_iter().flat_map(|disk| disk.unfinished) {
            let shard = usize::from(shard_of(request.cell(), shards).0);
            self.disks[shard].unfinished.insert(request);
        }
    }

    /// A caller is about to hand in something new.
    pub fn intend(&mut self, intent: Intent) {
        if !intent.task_id.is_empty() {
            self.names
                .entry(name_of(&intent))
                .or_default()
                .push(intent.number);
        }
        self.intents.push(intent);
    }

    fn intent_of(&self, payload: &[u8], content_type: &str) -> Option<u32> {
        let number = match content_type.strip_prefix("n/") {
            Some(number) => number.parse().ok()?,
            None => u32::from_le_bytes(payload.get(..4)?.try_into().ok()?),
        };
        self.intents.get(number as usize)?;
        Some(number)
    }

    /// A batch of a shard is on its disk.
    pub fn batch_durable(&mut self, shard: usize, bytes: &[u8]) -> Check {
        if bytes.len() == BATCH_HEADER_BYTES {
            return Ok(());
        }
        self.disks[shard].batches += 1;
        let header = BatchHeader::peek(bytes).expect("a durable batch has a header");
        let mut result = Ok(());
        let walked = records(bytes, header.records, |at, schema, body| {
            let position = Lsn(header.lsn.0 + at as u64);
            result = self.record(shard, position, schema, body);
            result.is_ok().then_some(())
        });
        result?;
        require(walked.is_some(), "batch_is_whole", || {
            format!("shard {shard}: the records of a batch do not add up")
        })
    }

    /// A record is on the disk: told when its batch became durable, and again by each recovery.
    pub fn record(&mut self, shard: usize, position: Lsn, schema: u16, body: &[u8]) -> Check {
        let disk = &mut self.disks[shard];
        let known = position <= disk.last;
        disk.replayed_last = position;
        disk.last = disk.last.max(position);
        let Ok(record) = read(schema, body) else {
            return broken(
                "record_is_readable",
                format!("shard {shard}: schema {schema} at {position:?}"),
            );
        };
        let accepted = match &record {
            Record::Task(task) => Some(task.request()),
            Record::RelocatedTask(relocated) => Some(relocated.task.request()),
            _ => None,
        };
        if let (Some(request), Some(replayed)) = (accepted, &mut disk.replayed) {
            replayed.insert(request);
        }
        if known {
            return Ok(());
        }
        match record {
            Record::Task(task) => {
                let request = RequestId(task.request.to_native());
                let Some(intent) = self.intent_of(&task.payload, &task.content_type) else {
                    return broken(
                        "record_is_intact",
                        format!("{request} is of no caller's making"),
                    );
                };
                let wanted = &self.intents[intent as usize];
                require(
                    *task.payload == *wanted.payload
                        && *task.task_id == *wanted.task_id
                        && *task.key == *wanted.key
                        && *task.content_type == *wanted.content_type
                        && *task.tags == *wanted.tags
                        && task.function.to_native() == wanted.function.0
                        && task.tenant.to_native() == wanted.tenant.0,
                    "record_is_intact",
                    || format!("{request} differs from intent {intent}"),
                )?;
                require(!wanted.refused, "refused_means_refused", || {
                    format!("{request}: intent {intent} was refused and is there nevertheless")
                })?;
                require(
                    !self.tasks.contains_key(&request),
                    "identity_is_unique",
                    || format!("{request} was given twice"),
                )?;
                let name = name_of(wanted);
                let due_ms = task.due_ms.to_native();
                let before = if wanted.task_id.is_empty() {
                    None
                } else {
                    self.named.insert(name, request)
                };
                if let Some(before) = before {
                    require(
                        request.accepted_ms() >= before.accepted_ms() + self.dedup_window_ms,
                        "one_name_one_task",
                        || {
                            format!(
                                "intent {intent} became {request} while its name was {before}'s"
                            )
                        },
                    )?;
                } else if wanted.task_id.is_empty() {
                    require(
                        wanted.answered.is_none_or(|answered| answered == request),
                        "accepted_once",
                        || format!("intent {intent} is {request} and was {:?}", wanted.answered),
                    )?;
                }
                if wanted.task_id.is_empty() {
                    // From now on a second record of the same intent is one too many.
                    self.intents[intent as usize].answered = Some(request);
                }
                let wanted = &self.intents[intent as usize];
                let state = if due_ms > 0 {
                    State::Scheduled
                } else {
                    State::Enqueued
                };
                self.tasks.insert(
                    request,
                    Known {
                        intent,
                        function: wanted.function,
                        tenant: wanted.tenant,
                        key: wanted.key.clone(),
                        state,
                        due_ms,
                        max_age_s: wanted.max_age_s,
                        token: Token::default(),
                        executed: Token::default(),
                        outcomes: 0,
                        succeeded: None,
                    },
                );
                if !wanted.key.is_empty() {
                    self.keys
                        .entry((wanted.function, wanted.key.clone()))
                        .or_default()
                        .insert(request);
                }
                self.disks[shard].unfinished.insert(request);
                self.tally.accepted += 1;
            }
            Record::Lease(lease) => {
                let request = RequestId(lease.request.to_native());
                let token = Token {
                    generation: lease.generation.to_native(),
                    attempt: lease.attempt.to_native(),
                };
                let at_ms = lease.at_ms.to_native();
                let task = self.task(request)?;
                require(!task.state.terminal(), "no_lease_after_the_end", || {
                    format!("{request} is leased as {token:?} and was {}", task.state)
                })?;
                require(token > task.token, "token_is_new", || {
                    format!("{request} is leased as {token:?} after {:?}", task.token)
                })?;
                require(at_ms >= task.due_ms, "not_before_its_time", || {
                    format!(
                        "{request} is leased at {at_ms} and is due at {}",
                        task.due_ms
                    )
                })?;
                task.token = token;
                task.state = State::Running;
                self.check_key(request, false)?;
                self.check_limit(shard, request)?;
            }
            Record::Outcome(outcome) => {
                let request = RequestId(outcome.request.to_native());
                let token = Token {
                    generation: outcome.generation.to_native(),
                    attempt: outcome.attempt.to_native(),
                };
                let state = State::from_number(outcome.state).expect("a sound record");
                let at_ms = outcome.at_ms.to_native();
                let retries_max = {
                    let function = self.task(request)?.function;
                    self.wished_of(function).retries_max
                };
                let task = self.task(request)?;
                require(
                    matches!(task.state, State::Running | State::Stopping),
                    "one_terminal_state",
                    || format!("{request} ends as {state} and was {}", task.state),
                )?;
                require(
                    token == task.token,
                    "no_outcome_under_a_stale_token",
                    || {
                        format!(
                            "{request} ends under {token:?}, its lease is {:?}",
                            task.token
                        )
                    },
                )?;
                task.outcomes += 1;
                require(
                    task.outcomes <= u32::from(retries_max) + 1,
                    "attempts_are_bounded",
                    || {
                        format!(
                            "{request} had {} counted attempts, {retries_max} retries are allowed",
                            task.outcomes
                        )
                    },
                )?;
                task.state = state;
                let function = task.function;
                self.running.entry(function).or_default().remove(&request);
                let task = self.task(request)?;
                if state == State::Retrying {
                    task.due_ms = outcome.due_ms.to_native();
                    require(task.due_ms >= at_ms, "backoff_goes_forward", || {
                        format!("{request} is due in the past")
                    })?;
                } else {
                    if state == State::Succeeded {
                        task.succeeded = Some(token);
                    }
                    self.end(shard, request);
                }
            }
            Record::Move(moved) => {
                let request = RequestId(moved.request.to_native());
                let state = State::from_number(moved.state).expect("a sound record");
                let at_ms = moved.at_ms.to_native();
                let wished = {
                    let function = self.task(request)?.function;
                    self.wished_of(function)
                };
                let task = self.task(request)?.clone();
                require(!task.state.terminal(), "one_terminal_state", || {
                    format!("{request} becomes {state} and was {}", task.state)
                })?;
                let mut from = task.state;
                if from == State::Running && state.terminal() {
                    // It was given back before, which is in no record.
                    from = State::Enqueued;
                }
                match state {
                    State::Stopping => {
                        require(from == State::Running, "transition_is_in_the_table", || {
                            format!("{request}: {from} -> Stopping")
                        })?;
                    }
                    State::Expired => {
                        let age_s = if task.max_age_s > 0 {
                            task.max_age_s
                        } else {
                            wished.max_age_s_min
                        };
                        // A delayed task ages from when it was due.
                        let intent = task.intent;
                        let base = match self.intents[intent as usize].start {
                            Start::Now => request.accepted_ms(),
                            Start::DelayMs(delay) => request.accepted_ms() + delay,
                            Start::AtMs(at) => at.max(request.accepted_ms()),
                        };
                        require(
                            at_ms >= base + u64::from(age_s) * 1_000,
                            "not_expired_early",
                            || {
                                format!(
                                    "{request} expires at {at_ms}, its age of {age_s} s counts from {base}"
                                )
                            },
                        )?;
                    }
                    State::Invalid => {
                        require(wished.removed, "only_deletion_invalidates", || {
                            format!("{request} is Invalid, its function was never deleted")
                        })?;
                    }
                    State::Stopped => {}
                    other => {
                        return broken(
                            "transition_is_in_the_table",
                            format!("{request}: {from} -> {other}"),
                        );
                    }
                }
                self.task(request)?.state = state;
                if state.terminal() {
                    self.end(shard, request);
                }
            }
            Record::Config(config) => {
                let Some(change) = config.change() else {
                    return broken("record_is_readable", "a change of no kind".to_owned());
                };
                match change {
                    Change::Tenant { id, name, .. } => {
                        self.tenants.insert(id, name);
                    }
                    Change::Function {
                        id,
                        tenant,
                        name,
                        config,
                    } => {
                        self.functions.insert(id, (tenant, name));
                        let disk = &mut self.disks[shard];
                        let before = disk.limits.get(&id).map(|&(limit, _)| limit);
                        if before != Some(config.concurrency) {
                            disk.limits.insert(id, (config.concurrency, disk.batches));
                        }
                    }
                    Change::FunctionRemoved { .. } => {}
                }
            }
            Record::RelocatedTask(relocated) => {
                self.tally.relocated += 1;
                let record = &relocated.task;
                let request = record.request();
                let known = self.task(request)?.clone();
                let wanted = &self.intents[known.intent as usize];
                let state = State::from_number(relocated.state).expect("a sound record");
                let ended = if known.state.terminal() {
                    Some(known.state)
                } else {
                    None
                };
                require(
                    *record.payload == *wanted.payload
                        && *record.task_id == *wanted.task_id
                        && *record.key == *wanted.key
                        && *record.content_type == *wanted.content_type
                        && *record.tags == *wanted.tags
                        && record.function.to_native() == wanted.function.0
                        && record.tenant.to_native() == wanted.tenant.0
                        && relocated.attempt.to_native() == known.token.attempt
                        && (known.state == State::Running) == (state == State::Running)
                        && Some(state).filter(|state| state.terminal()) == ended,
                    "what_is_moved_stays_true",
                    || format!("{request} was moved as {state} and is {known:?}"),
                )?;
            }
            Record::RelocatedOutcome(relocated) => {
                self.tally.relocated += 1;
                let request = RequestId(relocated.outcome.request.to_native());
                let known = self.task(request)?.state;
                let state = State::from_number(relocated.outcome.state).expect("a sound record");
                require(
                    known == state && state.terminal(),
                    "what_is_moved_stays_true",
                    || format!("the outcome of {request} was moved as {state}, it is {known}"),
                )?;
            }
            Record::RelocatedName(name) => {
                self.tally.relocated += 1;
                let request = RequestId(name.request.to_native());
                let intent = self.task(request)?.intent;
                let wanted = &self.intents[intent as usize];
                require(
                    *name.task_id == *wanted.task_id
                        && *name.key == *wanted.key
                        && name.function.to_native() == wanted.function.0,
                    "what_is_moved_stays_true",
                    || format!("the name of {request} was moved as {:?}", &*name.task_id),
                )?;
            }
            Record::Clock(_) => {}
        }
        Ok(())
    }

    fn task(&mut self, request: RequestId) -> Result<&mut Known, Violation> {
        self.tasks.get_mut(&request).ok_or_else(|| Violation {
            invariant: "record_has_its_task",
            sentence: format!("{request} has a record and was never accepted"),
        })
    }

    fn wished_of(&self, function: FunctionId) -> Wished {
        let (tenant, name) = &self.functions[&function];
        let key = (self.tenants[tenant].clone(), name.clone());
        self.wished.get(&key).cloned().unwrap_or_default()
    }

    fn end(&mut self, shard: usize, request: RequestId) {
        let task = &self.tasks[&request];
        if !task.key.is_empty()
            && let Some(members) = self.keys.get_mut(&(task.function, task.key.clone()))
        {
            members.remove(&request);
        }
        self.running
            .entry(task.function)
            .or_default()
            .remove(&request);
        self.disks[shard].unfinished.remove(&request);
        self.tally.ended += 1;
    }

    /// A task of a key goes beyond `Enqueued`: it must be alone there, and first in order.
    fn check_key(&self, request: RequestId, executing: bool) -> Check {
        let task = &self.tasks[&request];
        if task.key.is_empty() {
            return Ok(());
        }
        let Some(members) = self.keys.get(&(task.function, task.key.clone())) else {
            return Ok(());
        };
        for other in members.iter().filter(|&&other| other != request) {
            let rival = &self.tasks[other];
            require(rival.token.attempt == 0, "one_task_of_a_key_is_out", || {
                format!(
                    "{request} is leased while {other} of the same key {} is {} (executing: {executing})",
                    task.key, rival.state
                )
            })?;
            let delayed = self.intents[rival.intent as usize].start != Start::Now;
            require(
                delayed || other.seq() > request.seq(),
                "a_key_keeps_its_order",
                || {
                    format!(
                        "{request} is leased before {other} of the same key {}",
                        task.key
                    )
                },
            )?;
        }
        Ok(())
    }

    /// A task was leased: with it, no more of its function may run than the concurrency that every shard has logged.
    /// The batch that was open when a shard took the limit over may hold leases from before.
    fn check_limit(&mut self, shard: usize, request: RequestId) -> Check {
        let function = self.tasks[&request].function;
        let running = self.running.entry(function).or_default();
        running.insert(request);
        let disk = &self.disks[shard];
        let Some(&(limit, batch)) = disk.limits.get(&function) else {
            return Ok(());
        };
        let agreed = self.disks.iter().all(|other| {
            let known = other.limits.get(&function);
            known.is_some_and(|&(other, _)| other == limit)
        });
        if limit == 0 || !agreed || disk.batches < batch + 2 || disk.replayed.is_some() {
            return Ok(());
        }
        let (tasks, over) = (&self.tasks, &self.over);
        let count = running
            .iter()
            .map(|&other| (other, tasks[&other].token))
            .filter(|attempt| !over.contains(attempt))
            .count();
        self.tally.limited += 1;
        require(
            count <= limit as usize,
            "concurrency_is_never_exceeded",
            || {
                format!(
                    "shard {shard}: with {request}, {count} tasks of function {} run, its limit is {limit}",
                    function.0
                )
            },
        )
    }

    /// An attempt runs nowhere any more, or nobody knows of it, and no record says so.
    pub fn over(&mut self, request: RequestId, token: Token) {
        self.over.insert((request, token));
    }

    /// A recovery of a shard begins.
    pub fn recovery_begins(&mut self, shard: usize) {
        self.disks[shard].replayed = Some(BTreeSet::new());
        self.disks[shard].replayed_last = Lsn(0);
    }

    /// A recovery is over: whatever was accepted and has not ended must have been handed on.
    pub fn recovery_ends(&mut self, shard: usize) -> Check {
        let disk = &mut self.disks[shard];
        let replayed = disk.replayed.take().unwrap_or_default();
        require(
            disk.replayed_last == disk.last,
            "a_log_is_never_shortened",
            || {
                format!(
                    "the log of shard {shard} was durable up to {:?} and ends at {:?} after the restart",
                    disk.last, disk.replayed_last
                )
            },
        )?;
        match disk.unfinished.difference(&replayed).next() {
            Some(lost) => broken(
                "accepted_is_never_lost",
                format!("{lost} was on the disk of shard {shard} and is gone after the restart"),
            ),
            None => Ok(()),
        }
    }

    /// The process is gone, and with it what was only in its memory: leases that were given back are leases again.
    pub fn crashed(&mut self) {
        self.released.clear();
        self.over.clear();
        self.ended.retain(|_, logged| *logged);
    }

    /// An answer to a submit leaves a shard.
    pub fn answer_leaves(&mut self, number: u32, answer: &Answer, poisoned: bool) -> Check {
        let intent = &self.intents[number as usize];
        let request = answer.request;
        match answer.code {
            Code::Ok if answer.durable => {
                self.tally.duplicates += u64::from(answer.duplicate);
                let Some(task) = self.tasks.get(&request) else {
                    return broken(
                        "accepted_is_durable",
                        format!(
                            "intent {number} is told that {request} is on disk before its record is"
                        ),
                    );
                };
                let first = &self.intents[task.intent as usize];
                require(
                    name_of(first) == name_of(intent) && first.tenant == intent.tenant,
                    "no_answer_of_another",
                    || format!("intent {number} is answered with {request} of another name"),
                )?;
                require(
                    answer.duplicate || task.intent == number,
                    "duplicate_is_told",
                    || {
                        format!(
                            "intent {number} is {request}, which intent {} made",
                            task.intent
                        )
                    },
                )?;
                require(
                    first.payload == intent.payload,
                    "other_payload_is_refused",
                    || format!("intent {number} is answered with {request} of another payload"),
                )
            }
            Code::Ok => require(
                intent.durability == Durability::Memory && !answer.duplicate,
                "durability_is_said",
                || format!("intent {number} asked for disk and got memory"),
            ),
            Code::IdReused => {
                self.tally.refused += 1;
                let rivals = &self.names[&name_of(intent)];
                let other = rivals
                    .iter()
                    .any(|&rival| self.intents[rival as usize].payload != intent.payload);
                require(other, "same_payload_is_no_conflict", || {
                    format!("intent {number} is refused as ID_REUSED and nobody had its name")
                })
            }
            Code::NotFound => {
                self.tally.refused += 1;
                let wished = self.wished_of(intent.function);
                require(wished.removed, "function_is_found", || {
                    format!("intent {number}: the function was never deleted")
                })
            }
            Code::PayloadTooLarge => {
                self.tally.refused += 1;
                require(
                    intent.payload.len() > self.payload_bytes_max as usize,
                    "payload_limit_is_exact",
                    || format!("intent {number} has {} bytes", intent.payload.len()),
                )
            }
            Code::ResourceExhausted => {
                self.tally.refused += 1;
                require(self.may_exhaust, "room_is_given", || {
                    format!("intent {number} is refused: {}", answer.what)
                })
            }
            Code::Unavailable => require(poisoned, "unavailable_has_a_reason", || {
                format!("intent {number}: the log of the shard works")
            }),
            other => broken(
                "refusal_has_a_reason",
                format!("intent {number} is refused with {other}: {}", answer.what),
            ),
        }
    }

    /// An order to execute leaves a shard.
    pub fn execute_leaves(&mut self, execute: &Execute, bytes: &[u8]) -> Check {
        self.tally.executed += 1;
        let (request, token) = (execute.request, execute.token);
        let Some(task) = self.tasks.get_mut(&request) else {
            return broken(
                "lease_is_durable",
                format!("{request} is sent to its executor before it is on disk"),
            );
        };
        require(!task.state.terminal(), "no_execute_after_the_end", || {
            format!("{request} is sent as {token:?} and was {}", task.state)
        })?;
        require(task.token == token, "lease_is_durable", || {
            format!(
                "{request} is sent as {token:?}, the disk has {:?}",
                task.token
            )
        })?;
        require(task.executed < token, "lease_is_sent_once", || {
            format!("{request} is sent as {token:?} after {:?}", task.executed)
        })?;
        task.executed = token;
        let intent = &self.intents[task.intent as usize];
        let text = |span: pelton_core::event::Span| &bytes[span.range()];
        // The key is left out of what an executor is sent for a task without one.
        require(
            text(execute.payload) == intent.payload
                && text(execute.task_id) == intent.task_id.as_bytes()
                && text(execute.key) == intent.key.as_bytes()
                && text(execute.content_type) == intent.content_type.as_bytes(),
            "payload_is_intact",
            || format!("{request} reaches its executor changed"),
        )?;
        self.check_key(request, true)
    }

    /// A word on the outcome of an attempt leaves a shard.
    pub fn outcome_acknowledged(
        &mut self,
        request: RequestId,
        token: Token,
        verdict: Verdict,
        refused: Option<Code>,
    ) -> Check {
        let Some(task) = self.tasks.get(&request) else {
            return require(refused.is_some(), "outcome_has_its_task", || {
                format!("{request} is unknown and its outcome was taken")
            });
        };
        let attempt = (request, token);
        let current = task.token == token && matches!(task.state, State::Running | State::Stopping);
        match refused {
            None => {
                require(
                    !self.ended.contains_key(&attempt),
                    "completion_counts_once",
                    || format!("{request} {token:?} was completed twice"),
                )?;
                let in_memory = matches!(verdict, Verdict::Throttled { .. } | Verdict::Rejected);
                let logged = !current && task.token >= token;
                require(
                    task.token >= token && (in_memory || logged),
                    "completion_is_durable",
                    || {
                        format!(
                            "{request} {token:?} is confirmed as {verdict:?} and the disk says {} {:?}",
                            task.state, task.token
                        )
                    },
                )?;
                self.ended.insert(attempt, !in_memory);
                Ok(())
            }
            Some(code) => {
                self.tally.stale += 1;
                require(code == Code::StaleLease, "stale_is_called_stale", || {
                    format!("{request} {token:?} is refused with {code}")
                })?;
                require(
                    !current
                        || self.ended.contains_key(&attempt)
                        || self.released.contains(&attempt),
                    "current_token_is_taken",
                    || format!("{request} {token:?} is current and was refused"),
                )
            }
        }
    }

    /// An executor comes back without this lease: the shard may give it to another one.
    pub fn not_presented(&mut self, request: RequestId, token: Token) {
        self.released.insert((request, token));
        self.over.insert((request, token));
    }

    /// The end of a task is told to a caller of `tenant`.
    pub fn finished_leaves(&self, tenant: TenantId, finished: &Finished, bytes: &[u8]) -> Check {
        let request = finished.request;
        let Some(task) = self.tasks.get(&request) else {
            return broken(
                "ends_are_durable",
                format!("{request} is told to have ended and is not on disk"),
            );
        };
        require(task.tenant == tenant, "no_answer_of_another", || {
            format!("the end of {request} is told to another tenant")
        })?;
        require(task.state == finished.state, "ends_are_durable", || {
            format!(
                "{request} is told to be {}, the disk says {}",
                finished.state, task.state
            )
        })?;
        if finished.with_result
            && let Some(token) = task.succeeded
        {
            require(
                bytes[finished.result.range()] == result_of(request, token),
                "result_is_intact",
                || format!("the result of {request} is not what {token:?} sent"),
            )?;
        }
        Ok(())
    }

    /// A reply to a question of `tenant` leaves a shard.
    pub fn reply_leaves(
        &self,
        tenant: TenantId,
        asked: Option<RequestId>,
        reply: &Reply,
        poisoned: bool,
    ) -> Check {
        match reply {
            Reply::Task { view } => self.view_leaves(tenant, view),
            Reply::Page { views, .. } => {
                let orders = views.iter().map(|view| view.request.order());
                require(
                    orders.is_sorted_by(|before, after| before > after),
                    "a_list_is_in_order",
                    || format!("{views:?}"),
                )?;
                views
                    .iter()
                    .try_for_each(|view| self.view_leaves(tenant, view))
            }
            Reply::Done { state: Some(state) } => {
                let Some(task) = asked.and_then(|request| self.tasks.get(&request)) else {
                    return Ok(());
                };
                require(task.tenant == tenant, "no_answer_of_another", || {
                    format!("{asked:?} was stopped by another tenant")
                })?;
                require(
                    task.state.terminal() || task.state == *state,
                    "stop_is_durable",
                    || {
                        format!(
                            "{asked:?} is told to be {state}, the disk says {}",
                            task.state
                        )
                    },
                )
            }
            Reply::Refused { code, .. } => require(
                *code != Code::Unavailable || poisoned,
                "unavailable_has_a_reason",
                || format!("{asked:?}: the log of the shard works"),
            ),
            Reply::Leases { known, .. } => known.iter().try_for_each(|(request, token)| {
                let durable = self.tasks.get(request).is_none_or(|task| {
                    task.token.attempt > token.attempt
                        || task.state == State::Retrying
                        || task.state.terminal()
                });
                require(durable, "a_known_outcome_is_durable", || {
                    format!("{request} {token:?} is called known and has no outcome on the disk")
                })
            }),
            Reply::NotHeld { .. }
            | Reply::Done { state: None }
            | Reply::Stats { .. }
            | Reply::LeasesLost { .. } => Ok(()),
        }
    }

    /// A task is handed to history.
    pub fn ended_for_history(&self, row: &Ended) -> Check {
        self.view_leaves(row.tenant, &row.view)?;
        require(
            row.view.state.terminal() && row.view.ended_ms >= row.view.request.accepted_ms(),
            "history_gets_what_has_ended",
            || format!("{row:?}"),
        )
    }

    fn view_leaves(&self, tenant: TenantId, view: &TaskView) -> Check {
        let Some(task) = self.tasks.get(&view.request) else {
            return broken(
                "seen_is_durable",
                format!("{} is shown and is not on disk", view.request),
            );
        };
        require(
            task.tenant == tenant && task.function == view.function,
            "no_answer_of_another",
            || format!("{} is shown to another tenant", view.request),
        )?;
        let same = task.state == view.state;
        require(
            same || !(task.state.terminal() || view.state.terminal()),
            "ends_stay",
            || {
                format!(
                    "{} is shown as {}, the disk says {}",
                    view.request, view.state, task.state
                )
            },
        )?;
        require(view.token <= task.token, "lease_is_durable", || {
            format!("{} is shown with {:?}", view.request, view.token)
        })
    }

    /// Everything is quiet: every accepted task has ended.
    pub fn at_rest(&self) -> Check {
        for disk in &self.disks {
            if let Some(request) = disk.unfinished.first() {
                let task = &self.tasks[request];
                return broken(
                    "every_task_ends",
                    format!(
                        "{request} (intent {}, function {}, key {:?}) is {} when all is quiet; {} of {} have not ended",
                        task.intent,
                        task.function.0,
                        task.key,
                        task.state,
                        self.disks
                            .iter()
                            .map(|disk| disk.unfinished.len())
                            .sum::<usize>(),
                        self.tasks.len()
                    ),
                );
            }
        }
        Ok(())
    }

    /// Tasks that have not ended.
    pub fn unfinished(&self) -> usize {
        self.disks.iter().map(|disk| disk.unfinished.len()).sum()
    }

    /// A function must be configured like this in the directory of every shard.
    pub fn configuration(
        shard: usize,
        function: FunctionId,
        found: Option<&FunctionConfig>,
        wanted: &FunctionConfig,
    ) -> Check {
        require(found == Some(wanted), "configuration_holds", || {
            format!(
                "shard {shard}: function {} is {found:?}, {wanted:?} was confirmed",
                function.0
            )
        })
    }
}

fn name_of(intent: &Intent) -> (FunctionId, String, String) {
    (intent.function, intent.key.clone(), intent.task_id.clone())
}

/// What an attempt brings: follows from the task and its lease, so that nobody has to remember it.
pub fn result_of(request: RequestId, token: Token) -> Vec<u8> {
    let word = (request.0 ^ u128::from(token.attempt) << 77) as u64 ^ (request.0 >> 64) as u64;
    let word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let len = match word >> 56 {
        0..=40 => 0,
        255 => 70 << 10,
        other => other as usize * 6,
    };
    word.to_le_bytes()
        .iter()
        .copied()
        .cycle()
        .take(len)
        .collect()
}

/// The acknowledgement of a frame covers what the frame had.
pub fn ack_fits(ack: &OutcomeAck, outcomes: usize) -> Check {
    require(
        ack.count as usize == outcomes
            && ack.refused.iter().all(|&(at, _)| (at as usize) < outcomes),
        "acknowledgement_fits",
        || format!("{} outcomes of {outcomes} are acknowledged", ack.count),
    )
}
