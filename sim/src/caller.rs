//! Callers and the administrator: who they are, when they act, and how they go on when an answer is lost. Each thing
//! that they do has a file of its own, with what is handed in, and what must and may come of it: `submit`, `told` (the
//! ends that were promised), `question`, `configure`.

mod submit;

mod told;

mod question;

mod configure;

pub(crate) use configure::draw_config;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pelton_core::{
    config::{FunctionConfig, Wish},
    event::{Filter, Query},
    id::{ConnectionId, RequestId, TenantId},
};

use crate::{
    oracle::{Check, broken},
    world::{Happening, World, tenant_name},
};

/// Rows that a caller asks for at once.
const PAGE_ROWS: u32 = 100;

/// One caller of one tenant. Owned by the world.
#[derive(Debug)]
pub struct Caller {
    tenant: usize,
    connection: Option<ConnectionId>,
    ticket: u64,
    frames: BTreeMap<u64, Sent>,
    questions: BTreeSet<u64>,
    waits: BTreeSet<u64>,
    /// Named tasks whose fate is not known: handed in again.
    again: VecDeque<u32>,
    /// Requests that it was told of.
    known: Vec<RequestId>,
    /// Ends that it was promised to be told of.
    promised: BTreeSet<(u64, u32)>,
    told: BTreeSet<(u64, u32)>,
    stopped: bool,
}

impl Caller {
    /// A caller that has not connected.
    pub fn new(tenant: usize) -> Caller {
        Caller {
            tenant,
            connection: None,
            ticket: 0,
            frames: BTreeMap::new(),
            questions: BTreeSet::new(),
            waits: BTreeSet::new(),
            again: VecDeque::new(),
            known: Vec::new(),
            promised: BTreeSet::new(),
            told: BTreeSet::new(),
            stopped: false,
        }
    }

    /// True if it waits for nothing.
    pub fn idle(&self) -> bool {
        self.frames.is_empty()
            && self.questions.is_empty()
            && self.waits.is_empty()
            && self.again.is_empty()
            && self.promised.is_empty()
    }
}

/// A frame as its caller remembers it: its tasks, and which of them are not answered.
#[derive(Debug)]
struct Sent {
    intents: Vec<u32>,
    open: Vec<bool>,
}

/// Who changes configuration, one wish at a time.
#[derive(Debug, Default)]
pub struct Administrator {
    connection: Option<ConnectionId>,
    ticket: u64,
    wishes: VecDeque<Wish>,
    asking: Option<Wish>,
    due_ns: Option<u64>,
    /// Configurations that were confirmed and not wished otherwise since, by tenant and function.
    pub(crate) confirmed: BTreeMap<(String, String), FunctionConfig>,
}

impl Administrator {
    /// True if nothing is wished for.
    pub fn idle(&self) -> bool {
        self.wishes.is_empty() && self.asking.is_none()
    }
}

/// A frame as the edge that took it remembers it, until the last answer has left the shards.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) intents: Vec<u32>,
    /// Which shard has which task.
    pub(crate) shards: Vec<usize>,
    pub(crate) answered: Vec<bool>,
}

/// A question as its edge remembers it.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) tenant: TenantId,
    pub(crate) shard: usize,
    pub(crate) request: Option<RequestId>,
    pub(crate) wish: bool,
}

impl World {
    /// What the tenant is called, and its number.
    fn tenant_of(&self, caller: usize) -> Option<(String, TenantId)> {
        let name = tenant_name(self.callers[caller].tenant);
        let id = self.directory.tenant_id(&name)?;
        Some((name, id))
    }

    pub(crate) fn caller_acts(&mut self, caller: usize) {
        let delay = self.around(self.plan.pause_ns);
        if self.healing && self.callers[caller].again.is_empty() && self.callers[caller].stopped {
            return;
        }
        self.after(delay, Happening::CallerActs { caller });
        if !self.serving() || self.callers[caller].connection.is_none() {
            return;
        }
        let open = self.callers[caller].frames.len() + self.callers[caller].questions.len();
        if open >= self.plan.caller_window {
            return;
        }
        if self.healing {
            self.callers[caller].stopped = true;
            self.submit_again(caller);
            return;
        }
        match self.random.below(10) {
            0..7 => self.submit_new(caller),
            7 => self.submit_again(caller),
            _ => self.question(caller),
        }
    }

    /// A shard whose log has failed has answered all that it was given, waits included.
    pub(crate) fn check_poisoned(&self, shard: usize) -> Check {
        let host = &self.hosts[shard];
        if !host.at_edges.is_empty() || !host.inbox.control.is_empty() {
            return Ok(());
        }
        let question = self
            .questions
            .iter()
            .find(|(_, question)| question.shard == shard);
        let frame = self.frames.iter().find(|(_, frame)| {
            let mut tasks = frame.shards.iter().zip(&frame.answered);
            tasks.any(|(&of, &answered)| of == shard && !answered)
        });
        match question.map(|found| found.0).or(frame.map(|found| found.0)) {
            Some((connection, ticket)) => broken(
                "a_failed_log_is_told",
                format!(
                    "shard {shard} has failed and leaves {ticket} of {connection:?} without an answer"
                ),
            ),
            None => Ok(()),
        }
    }

    fn caller_of(&self, connection: ConnectionId) -> Option<usize> {
        self.callers
            .iter()
            .position(|caller| caller.connection == Some(connection))
    }

    pub(crate) fn caller_lost(&mut self, caller: usize) {
        let target = &mut self.callers[caller];
        if target.connection.take().is_none() {
            return;
        }
        target.questions.clear();
        target.waits.clear();
        target.promised.clear();
        target.told.clear();
        for (_, sent) in std::mem::take(&mut target.frames) {
            let open = sent.intents.into_iter().zip(sent.open);
            for number in open.filter(|&(_, open)| open).map(|(number, _)| number) {
                let intent = &mut self.oracle.intents[number as usize];
                intent.flying -= 1;
                intent.unknown = true;
                if !intent.task_id.is_empty() {
                    target.again.push_back(number);
                }
            }
        }
        if self.up {
            let delay = self.around(3_000_000);
            self.after(delay, Happening::CallerBack { caller });
        }
    }

    pub(crate) fn caller_back(&mut self, caller: usize) {
        if !self.up || self.callers[caller].connection.is_some() {
            return;
        }
        let Some((_, tenant)) = self.tenant_of(caller).filter(|_| self.serving()) else {
            self.after(500_000, Happening::CallerBack { caller });
            return;
        };
        let connection = self.connect();
        self.callers[caller].connection = Some(connection);
        self.tenants_of.insert(connection, tenant);
        self.callers[caller].stopped = false;
        if self.healing {
            self.after(1_000_000, Happening::CallerActs { caller });
        }
        // Whoever comes back looks at everything: what had ended is as it was.
        for shard in 0..self.hosts.len() {
            let filter = Filter {
                limit: PAGE_ROWS,
                ..Filter::default()
            };
            self.ask(caller, shard, tenant, None, Query::List { filter });
        }
    }
}
