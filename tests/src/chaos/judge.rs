//! Compares what callers were told with what executors did. Everything is read first and judged afterwards, because the
//! files of a run have no order among each other beyond the times in them.
//!
//! What is not judged here: which of two tasks without an ordering key comes first, how long anything takes, and what a
//! task whose submit nobody answered ended as; that such tasks come to rest is seen from the server's counters.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    fmt,
};

use pelton_client::{RequestId, TaskStatus};

use super::{
    history::{Event, is_end, parse},
    host::Phase,
    plan::{FUNCTIONS, Id},
};

/// Cases of one invariant that are told; more are counted.
const TOLD: usize = 8;

/// What must hold in every run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Invariant {
    /// A task that was acknowledged is there whenever it is asked after.
    NothingIsLost,
    /// An acknowledgement is given for what is on disk.
    AcknowledgedIsDurable,
    /// A task that was acknowledged is there at once, and not only a moment later.
    CallersReadTheirWrites,
    /// A task that was acknowledged ends, once everything has healed.
    EveryTaskEnds,
    /// A task has one end: neither its status nor its result changes afterwards.
    OneEnd,
    /// A submission, however often it is handed in, is one task, and a task is one submission.
    OneSubmitOneTask,
    /// Callers and executors get the payload and the function that were handed in.
    PayloadIsIntact,
    /// A token is given to one executor and begun once.
    OneTokenOneStart,
    /// A success is that of the attempt that it names, with that attempt's result.
    SuccessWasExecuted,
    /// There are no more retries than the function has, and no more attempts than those and what was killed explain.
    AttemptsAreBounded,
    /// Tasks of one key are executed one after the other, in the order of their acceptance.
    KeysKeepTheirOrder,
    /// What was answered as stopped ends as that, and is not begun afterwards.
    StoppedIsStopped,
    /// What was refused is not executed.
    RefusedIsNotExecuted,
    /// The files of a run can be read and are whole.
    HistoriesAreWhole,
    /// The server starts on what a kill or a power cut has left, and lives until the next one.
    TheServerLives,
}

impl Invariant {
    pub fn name(self) -> &'static str {
        match self {
            Invariant::NothingIsLost => "nothing_is_lost",
            Invariant::AcknowledgedIsDurable => "acknowledged_is_durable",
            Invariant::CallersReadTheirWrites => "callers_read_their_writes",
            Invariant::EveryTaskEnds => "every_task_ends",
            Invariant::OneEnd => "one_end",
            Invariant::OneSubmitOneTask => "one_submit_one_task",
            Invariant::PayloadIsIntact => "payload_is_intact",
            Invariant::OneTokenOneStart => "one_token_one_start",
            Invariant::SuccessWasExecuted => "success_was_executed",
            Invariant::AttemptsAreBounded => "attempts_are_bounded",
            Invariant::KeysKeepTheirOrder => "keys_keep_their_order",
            Invariant::StoppedIsStopped => "stopped_is_stopped",
            Invariant::RefusedIsNotExecuted => "refused_is_not_executed",
            Invariant::HistoriesAreWhole => "histories_are_whole",
            Invariant::TheServerLives => "the_server_lives",
        }
    }
}

/// Broken invariants, each with its first cases and how many there are.
#[derive(Debug, Default)]
pub struct Violations(BTreeMap<Invariant, (u64, Vec<String>)>);

impl Violations {
    pub fn add(&mut self, invariant: Invariant, what: impl fmt::Display) {
        let (count, told) = self.0.entry(invariant).or_default();
        *count += 1;
        if told.len() < TOLD {
            told.push(what.to_string());
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn count(&self, invariant: Invariant) -> u64 {
        self.0.get(&invariant).map_or(0, |(count, _)| *count)
    }

    /// Each invariant with its count and its first cases.
    pub fn iter(&self) -> impl Iterator<Item = (Invariant, u64, &[String])> {
        let all = self.0.iter();
        all.map(|(&invariant, (count, told))| (invariant, *count, told.as_slice()))
    }
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Submissions with an acknowledgement.
    pub accepted: u64,
    /// How they ended.
    pub ended: BTreeMap<&'static str, u64>,
    /// Attempts that executors began.
    pub executed: u64,
    /// Acknowledged tasks that were begun again although no attempt had failed.
    pub executed_more_than_once: u64,
    /// Submissions of which nobody learned whether they were taken.
    pub unknown_outcome: u64,
    /// Those among them that were executed.
    pub unknown_executed: u64,
    /// Kills of the server.
    pub kills: BTreeMap<Phase, u64>,
    pub executors_killed: u64,
    pub violations: Violations,
}

impl Verdict {
    /// Kills in every phase, also in those that none hit.
    pub fn kills(&self) -> impl Iterator<Item = (Phase, u64)> {
        Phase::ALL
            .into_iter()
            .map(|phase| (phase, self.kills.get(&phase).copied().unwrap_or(0)))
    }
}

/// A submission as its caller knows it.
#[derive(Debug)]
struct Case {
    function: Box<str>,
    key: Option<Box<str>>,
    bytes: u64,
    hash: u64,
    intended_us: u64,
    /// The batch in which it was taken, where the answer said that it was new.
    taken_in: Option<u64>,
    request: Option<RequestId>,
    /// The server has said no, at least once.
    refused: bool,
    unknown: bool,
    missing: bool,
    seen: bool,
    stopped_us: Option<u64>,
    end: Option<End>,
}

#[derive(Clone, PartialEq, Debug)]
struct End {
    at_us: u64,
    status: TaskStatus,
    attempts: u16,
    result: Option<Box<str>>,
}

/// An attempt as its executor knows it.
#[derive(Debug)]
struct Run {
    id: Id,
    attempt: u16,
    begun_us: u64,
    over_us: Option<u64>,
    failed: bool,
    result: Option<Box<str>>,
}

/// Reads the files of a run.
#[derive(Debug, Default)]
pub struct Judge {
    cases: HashMap<Id, Case>,
    runs: HashMap<RequestId, Vec<Run>>,
    kills_us: Vec<u64>,
    verdict: Verdict,
}

impl Judge {
    /// Reads a file. One of a stream must have come to its last line; the last line of any file may be cut short only
    /// where its process was killed.
    pub fn read(&mut self, name: &str, text: &str, complete: bool) {
        let mut whole = false;
        let mut lines = text.split_inclusive('\n').peekable();
        while let Some(line) = lines.next() {
            let cut = !line.ends_with('\n') && lines.peek().is_none();
            match parse(line.trim_end_matches('\n')) {
                Some((_, Event::Complete)) if !cut => whole = true,
                Some((at_us, event)) if !cut => self.on_event(at_us, event),
                Some(_) | None if cut && !complete => {}
                Some(_) | None => self.verdict.violations.add(
                    Invariant::HistoriesAreWhole,
                    format_args!("{name} has the line {line:?}"),
                ),
            }
        }
        if complete && !whole {
            let what = format_args!("{name} ends before its stream was done");
            let violations = &mut self.verdict.violations;
            violations.add(Invariant::HistoriesAreWhole, what);
        }
    }

    fn on_event(&mut self, at_us: u64, event: Event<'_>) {
        let violations = &mut self.verdict.violations;
        let id = match &event {
            Event::ServerKilled { phase } => {
                *self.verdict.kills.entry(*phase).or_default() += 1;
                self.kills_us.push(at_us);
                return;
            }
            Event::ExecutorKilled => {
                self.verdict.executors_killed += 1;
                self.kills_us.push(at_us);
                return;
            }
            Event::Complete => return,
            Event::Begun {
                id,
                request,
                attempt,
                ..
            } => {
                self.on_begun(at_us, *id, *request, *attempt, &event);
                return;
            }
            Event::Over {
                request,
                attempt,
                failed,
                result,
            } => {
                let runs = self.runs.get_mut(request).into_iter().flatten();
                let run = runs
                    .rev()
                    .find(|run| run.attempt == *attempt && run.over_us.is_none());
                match run {
                    Some(run) => {
                        run.over_us = Some(at_us);
                        run.failed = *failed;
                        run.result = result.map(Into::into);
                    }
                    None => violations.add(
                        Invariant::HistoriesAreWhole,
                        format_args!("attempt {attempt} of {request} is over and was not begun"),
                    ),
                }
                return;
            }
            Event::Intent {
                id,
                function,
                key,
                bytes,
                hash,
                ..
            } => {
                self.cases.entry(*id).or_insert_with(|| Case {
                    function: (*function).into(),
                    key: key.map(Into::into),
                    bytes: *bytes,
                    hash: *hash,
                    intended_us: at_us,
                    taken_in: None,
                    request: None,
                    refused: false,
                    unknown: false,
                    missing: false,
                    seen: false,
                    stopped_us: None,
                    end: None,
                });
                return;
            }
            Event::Accepted { id, .. }
            | Event::Refused { id, .. }
            | Event::Unknown { id, .. }
            | Event::Seen { id, .. }
            | Event::Ended { id, .. }
            | Event::Late { id }
            | Event::Missing { id }
            | Event::StopAnswered { id, .. } => *id,
        };
        let Some(case) = self.cases.get_mut(&id) else {
            let what = format_args!("{id} has an answer and was not handed in");
            return violations.add(Invariant::HistoriesAreWhole, what);
        };
        case.hear(at_us, id, &event, violations);
    }

    fn on_begun(
        &mut self,
        at_us: u64,
        id: Id,
        request: RequestId,
        attempt: u16,
        event: &Event<'_>,
    ) {
        let violations = &mut self.verdict.violations;
        let runs = self.runs.entry(request).or_default();
        if runs.iter().any(|run| run.attempt == attempt) {
            let what = format_args!("attempt {attempt} of {id} {request} was begun twice");
            violations.add(Invariant::OneTokenOneStart, what);
        }
        self.verdict.executed += 1;
        runs.push(Run {
            id,
            attempt,
            begun_us: at_us,
            over_us: None,
            failed: false,
            result: None,
        });
        // Callers' files are read first.
        let Some(case) = self.cases.get(&id) else {
            let what = format_args!("{id} {request} was executed and never handed in");
            return violations.add(Invariant::OneSubmitOneTask, what);
        };
        if let Event::Begun {
            function,
            bytes,
            hash,
            ..
        } = event
            && (&*case.function, case.bytes, case.hash) != (*function, *bytes, *hash)
        {
            let what = format_args!("an executor of {function} got {id} with {bytes} bytes");
            violations.add(Invariant::PayloadIsIntact, what);
        }
    }

    /// Judges what was read. Of a run that was broken off it is not known what became of a task later.
    pub fn verdict(mut self, complete: bool) -> Verdict {
        for runs in self.runs.values_mut() {
            runs.sort_by_key(|run| run.begun_us);
        }
        self.judge_identity();
        let mut ids: Vec<&Id> = self.cases.keys().collect();
        ids.sort_unstable();
        let executed: HashSet<Id> = self.runs.values().flatten().map(|run| run.id).collect();
        for id in ids {
            let case = &self.cases[id];
            let verdict = &mut self.verdict;
            let Some(request) = case.request else {
                let was_executed = executed.contains(id);
                // A run that was broken off leaves submissions without any answer.
                if case.unknown || !case.refused {
                    verdict.unknown_outcome += 1;
                    verdict.unknown_executed += u64::from(was_executed);
                } else if was_executed {
                    let what = format_args!("{id} was refused each time and was executed");
                    verdict
                        .violations
                        .add(Invariant::RefusedIsNotExecuted, what);
                }
                continue;
            };
            verdict.accepted += 1;
            let runs = self.runs.get(&request).map_or(&[][..], Vec::as_slice);
            let failed = runs.iter().filter(|run| run.failed).count();
            verdict.executed_more_than_once += u64::from(runs.len() > failed + 1);
            if let Some(end) = &case.end {
                *verdict.ended.entry(end.status.name()).or_default() += 1;
            }
            let kills = &self.kills_us;
            let violations = &mut verdict.violations;
            case.judge(*id, request, runs, kills, violations);
            if complete {
                case.judge_rest(*id, request, violations);
            }
        }
        self.judge_order();
        self.verdict
    }

    /// One submission is one task, over everything that callers and executors say.
    fn judge_identity(&mut self) {
        let violations = &mut self.verdict.violations;
        let mut requests: HashMap<Id, RequestId> = HashMap::new();
        let mut ids: HashMap<RequestId, Id> = HashMap::new();
        let told = self
            .cases
            .iter()
            .filter_map(|(&id, case)| Some((id, case.request?)));
        let begun = self
            .runs
            .iter()
            .flat_map(|(&request, runs)| runs.iter().map(move |run| (run.id, request)));
        for (id, request) in told.chain(begun) {
            match requests.entry(id) {
                Entry::Occupied(known) if *known.get() != request => violations.add(
                    Invariant::OneSubmitOneTask,
                    format_args!("{id} is {} and {request}", known.get()),
                ),
                Entry::Occupied(_) => {}
                Entry::Vacant(place) => {
                    place.insert(request);
                }
            }
            match ids.entry(request) {
                Entry::Occupied(known) if *known.get() != id => violations.add(
                    Invariant::OneSubmitOneTask,
                    format_args!("{request} is {} and {id}", known.get()),
                ),
                Entry::Occupied(_) => {}
                Entry::Vacant(place) => {
                    place.insert(id);
                }
            }
        }
    }

    /// Of two tasks of one key the earlier one's success comes before the later one's first start. Batches of a stream
    /// follow each other, and within one the order is that of the numbers. What was answered as a duplicate may have
    /// been taken at any of its tries and is left out.
    fn judge_order(&mut self) {
        let mut keys: BTreeMap<(&str, &str), Vec<(u64, Id)>> = BTreeMap::new();
        for (&id, case) in &self.cases {
            if let (Some(key), Some(batch)) = (&case.key, case.taken_in) {
                let members = keys.entry((&case.function, key)).or_default();
                members.push((batch, id));
            }
        }
        for ((function, key), mut members) in keys {
            members.sort_unstable();
            let mut last: Option<(u64, Id)> = None;
            for (_, id) in members {
                let case = &self.cases[&id];
                let runs = case.request.and_then(|request| self.runs.get(&request));
                let runs = runs.map_or(&[][..], Vec::as_slice);
                if let (Some(first), Some((over_us, before))) = (runs.first(), last)
                    && first.begun_us < over_us
                {
                    let what = format_args!(
                        "of the key {key} of {function}, {id} began at {} and {before} before it ended at {over_us}",
                        first.begun_us
                    );
                    let violations = &mut self.verdict.violations;
                    violations.add(Invariant::KeysKeepTheirOrder, what);
                }
                let success = case.success(runs).and_then(|run| run.over_us);
                if let Some(over_us) = success
                    && last.is_none_or(|(other, _)| other < over_us)
                {
                    last = Some((over_us, id));
                }
            }
        }
    }
}

impl Case {
    /// Takes in one answer. The lines of a stream are in their order.
    fn hear(&mut self, at_us: u64, id: Id, event: &Event<'_>, violations: &mut Violations) {
        match event {
            Event::Accepted {
                batch,
                request,
                duplicate,
                durable,
                ..
            } => {
                if !durable {
                    let what = format_args!("{id} {request} was acknowledged before that");
                    violations.add(Invariant::AcknowledgedIsDurable, what);
                }
                if !duplicate {
                    if self.request.is_some() {
                        let what = format_args!("{id} {request} is new although it was there");
                        violations.add(Invariant::OneSubmitOneTask, what);
                    }
                    self.taken_in.get_or_insert(*batch);
                }
                self.is(id, *request, violations);
            }
            Event::Refused { code, .. } => {
                self.refused = true;
                if *code == "ID_REUSED" {
                    let what = format_args!("{id} has another payload than it was given");
                    violations.add(Invariant::OneSubmitOneTask, what);
                }
            }
            Event::Unknown { .. } => self.unknown = true,
            Event::Seen {
                request,
                function,
                status,
                attempts,
                retried,
                bytes,
                hash,
                result,
                ..
            } => {
                self.seen = true;
                self.is(id, *request, violations);
                if (&*self.function, self.bytes, self.hash) != (*function, *bytes, *hash) {
                    let what = format_args!("{id} is described as of {function}, {bytes} bytes");
                    violations.add(Invariant::PayloadIsIntact, what);
                }
                let function = FUNCTIONS.iter().find(|known| known.name == *function);
                if function.is_none_or(|function| *retried > u16::from(function.retries)) {
                    let what = format_args!("{id} was retried {retried} times");
                    violations.add(Invariant::AttemptsAreBounded, what);
                }
                self.stands(at_us, id, *status, *attempts, *result, violations);
            }
            Event::Ended {
                request,
                status,
                attempts,
                result,
                ..
            } => {
                self.is(id, *request, violations);
                self.stands(at_us, id, *status, *attempts, *result, violations);
            }
            Event::Late { .. } => {
                let what = format_args!("{id} was not there when it was asked after");
                violations.add(Invariant::CallersReadTheirWrites, what);
            }
            Event::Missing { .. } => {
                if !self.missing {
                    let request = self.request.map(|request| request.to_string());
                    let what = format_args!("{id} {} is missing", request.unwrap_or_default());
                    violations.add(Invariant::NothingIsLost, what);
                }
                self.missing = true;
            }
            Event::StopAnswered { status, .. } => {
                if *status == TaskStatus::Stopped {
                    self.stopped_us.get_or_insert(at_us);
                }
            }
            Event::Intent { .. }
            | Event::Begun { .. }
            | Event::Over { .. }
            | Event::ServerKilled { .. }
            | Event::ExecutorKilled
            | Event::Complete => unreachable!("this is no answer to a caller"),
        }
    }

    fn is(&mut self, id: Id, request: RequestId, violations: &mut Violations) {
        let known = *self.request.get_or_insert(request);
        if known != request {
            let what = format_args!("{id} was {known} and is {request}");
            violations.add(Invariant::OneSubmitOneTask, what);
        }
    }

    fn stands(
        &mut self,
        at_us: u64,
        id: Id,
        status: TaskStatus,
        attempts: u16,
        result: Option<&str>,
        violations: &mut Violations,
    ) {
        let now = is_end(status).then(|| End {
            at_us,
            status,
            attempts,
            result: result.map(Into::into),
        });
        match (&self.end, now) {
            (None, now) => self.end = now,
            (Some(_), None) => {
                let what = format_args!("{id} had ended and is {}", status.name());
                violations.add(Invariant::OneEnd, what);
            }
            (Some(known), Some(now)) => {
                let known = (known.status, known.attempts, &known.result);
                if known != (now.status, now.attempts, &now.result) {
                    let what = format_args!("{id} ended as {known:?} and as {now:?}");
                    violations.add(Invariant::OneEnd, what);
                }
            }
        }
    }

    /// The attempt whose result is the task's.
    fn success<'r>(&self, runs: &'r [Run]) -> Option<&'r Run> {
        let end = self.end.as_ref()?;
        runs.iter().find(|run| {
            end.status == TaskStatus::Succeeded
                && run.attempt == end.attempts
                && run.result.is_some()
                && run.result == end.result
        })
    }

    /// What must be known after everything has come to rest.
    fn judge_rest(&self, id: Id, request: RequestId, violations: &mut Violations) {
        if !self.seen && !self.missing {
            let what = format_args!("{id} {request} was acknowledged and not seen again");
            violations.add(Invariant::NothingIsLost, what);
        }
        if self.end.is_none() && !self.missing {
            let what = format_args!("{id} {request} did not");
            violations.add(Invariant::EveryTaskEnds, what);
        }
    }

    /// What can be said only with the ledgers of all executors.
    fn judge(
        &self,
        id: Id,
        request: RequestId,
        runs: &[Run],
        kills_us: &[u64],
        violations: &mut Violations,
    ) {
        if let Some(stopped_us) = self.stopped_us {
            if let Some(run) = runs.iter().find(|run| run.begun_us > stopped_us) {
                let what = format_args!(
                    "{id} {request} was stopped and its attempt {} began {} us later",
                    run.attempt,
                    run.begun_us - stopped_us
                );
                violations.add(Invariant::StoppedIsStopped, what);
            }
            let ended = self.end.as_ref().map(|end| end.status);
            if ended.is_some_and(|status| status != TaskStatus::Stopped) {
                let what = format_args!("{id} {request} was stopped and ended as {ended:?}");
                violations.add(Invariant::StoppedIsStopped, what);
            }
        }
        let Some(end) = &self.end else {
            return;
        };
        if end.status == TaskStatus::Succeeded && self.success(runs).is_none() {
            let what = format_args!("{id} {request} is told as {end:?}; executors did {runs:?}");
            violations.add(Invariant::SuccessWasExecuted, what);
        }
        let function = FUNCTIONS.iter().find(|known| known.name == &*self.function);
        let retries = function.map_or(0, |function| u64::from(function.retries));
        let within = self.intended_us..=end.at_us;
        let killed = kills_us.iter().filter(|at| within.contains(at)).count() as u64;
        if u64::from(end.attempts) > 1 + retries + killed {
            let what = format_args!(
                "{id} {request} had {} attempts, with {retries} retries and {killed} kills meanwhile",
                end.attempts
            );
            violations.add(Invariant::AttemptsAreBounded, what);
        }
    }
}
