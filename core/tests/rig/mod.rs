//! A shard on a log that lives in memory: batches become durable when the test says so, and a restart replays them.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use std::collections::BTreeMap;

use pelton_core::{
    clock::Now,
    config::{FunctionConfig, Wish},
    error::Code,
    event::*,
    id::*,
    record::{BatchSpace, RECORD_ALIGN, RECORD_HEADER_BYTES},
    shard::{Options, Shard},
    times::Part,
};

pub const HEADER: usize = 128;
pub const CALLER: ConnectionId = ConnectionId(1);
pub const WORKER: ConnectionId = ConnectionId(2);
pub const EXECUTOR: u64 = 77;

pub struct Rig {
    pub shard: Shard,
    pub options: Options,
    pub now: Now,
    pub inbox: Inbox,
    /// Durable batches: position and bytes.
    pub log: Vec<(u64, Vec<u8>)>,
    open: Vec<u8>,
    len: usize,
    records: u32,
    base: u64,
    in_flight: Option<(u64, Vec<u8>)>,
    pub out: EdgeBatch,
    /// How long tasks took, in the order in which it was noted.
    pub times: Vec<(Part, u64)>,
    /// What executors say of how long attempts ran.
    pub run_us: u32,
    /// Everything that ended before this position is in history.
    pub history_saved: Lsn,
    /// What history was handed last.
    pub ended: Option<EndedBatch>,
    /// What other shards are to be told.
    pub sent: Vec<(ShardId, Control)>,
    ticket: u64,
}

impl Rig {
    pub fn new(options: Options) -> Rig {
        let mut shard = Shard::new(options);
        let now = Now {
            mono_ns: 1,
            logged_ms: 1_000_000,
        };
        shard.start(now, Lsn(0));
        Rig {
            shard,
            options,
            now,
            inbox: Inbox {
                disk_has_room: true,
                ..Inbox::default()
            },
            log: Vec::new(),
            open: vec![0; 2 << 20],
            len: HEADER,
            records: 0,
            base: 4096,
            in_flight: None,
            out: EdgeBatch::default(),
            times: Vec::new(),
            run_us: 0,
            history_saved: Lsn(0),
            ended: None,
            sent: Vec::new(),
            ticket: 0,
        }
    }

    /// One step; seals if the shard wants that and nothing is in flight.
    pub fn step(&mut self, durable: Option<(u64, Vec<u8>)>) {
        let segment = self.options.segment_bytes;
        if segment - self.base % segment < 2 << 20 && self.records == 0 && self.in_flight.is_none()
        {
            self.base = self.base.next_multiple_of(segment) + 4096;
        }
        let mut effects = Effects::default();
        let mut space = BatchSpace {
            bytes: &mut self.open,
            len: self.len,
            base: Lsn(self.base),
            records: self.records,
        };
        let view = durable.as_ref().map(|(base, bytes)| Durable {
            bytes,
            offset: base % segment,
        });
        self.shard
            .step(self.now, view, &mut self.inbox, &mut space, &mut effects);
        (self.len, self.records) = (space.len, space.records);
        self.shard.audit();
        for part in Part::ALL {
            for run in self.shard.times().of(part) {
                let time = (part, run.time);
                self.times.extend((0..run.count).map(|_| time));
            }
        }
        if let Some(batch) = durable {
            self.log.push(batch);
        }
        for fetch in std::mem::take(&mut effects.fetches) {
            let record = Some(self.read(fetch.position, fetch.bytes));
            self.inbox.fetched.push(Fetched {
                request: fetch.request,
                record,
            });
        }
        if let Some(from) = effects.scan.take() {
            self.inbox.scanned = Some(self.scan(from));
        }
        let retired = self.shard.retire_before().0;
        self.log.retain(|(base, _)| *base >= retired);
        for edge in &mut effects.edges {
            self.out.absorb(edge);
        }
        self.sent.append(&mut effects.shards);
        if let Some(batch) = effects.history.take() {
            self.ended = Some(batch);
        }
        if effects.urgency != Urgency::Nothing && self.in_flight.is_none() {
            let bytes = self.open[..self.len].to_vec();
            self.in_flight = Some((self.base, bytes));
            self.base += self.len.next_multiple_of(4096) as u64;
            (self.len, self.records) = (HEADER, 0);
            self.shard.on_sealed();
        }
    }

    /// The batches of a segment from here on, as one stretch.
    fn scan(&self, from: Lsn) -> Scanned {
        let segment = self.options.segment_bytes;
        let mut scanned = Scanned {
            start: from,
            ..Scanned::default()
        };
        for (base, batch) in &self.log {
            if base / segment != from.0 / segment || *base < from.0 {
                continue;
            }
            scanned.bytes.resize((base - from.0) as usize, 0);
            let start = scanned.bytes.len();
            scanned.bytes.extend_from_slice(batch);
            let mut at = HEADER;
            while at < batch.len() {
                scanned.records.push((start + at) as u32);
                let bytes = u32::from_le_bytes(batch[at..at + 4].try_into().unwrap()) as usize;
                at = (at + RECORD_HEADER_BYTES + bytes).next_multiple_of(RECORD_ALIGN);
            }
        }
        scanned
    }

    pub fn read(&self, position: Lsn, bytes: u32) -> Vec<u8> {
        let (base, batch) = self
            .log
            .iter()
            .rev()
            .find(|(base, _)| *base <= position.0)
            .expect("read behind the log");
        let start = (position.0 - base) as usize;
        batch[start..(start + bytes as usize).min(batch.len())].to_vec()
    }

    /// Steps and flushes until nothing is left to do.
    pub fn settle(&mut self) {
        for _ in 0..100 {
            let durable = self.in_flight.take();
            let idle = durable.is_none();
            self.step(durable);
            if idle
                && self.in_flight.is_none()
                && self.inbox.fetched.is_empty()
                && self.inbox.scanned.is_none()
                && self.inbox.submits.is_empty()
            {
                return;
            }
        }
        panic!("it never settles");
    }

    pub fn advance(&mut self, ms: u64) {
        self.now.mono_ns += ms * 1_000_000;
        self.now.logged_ms += ms;
        self.settle();
    }

    /// Power off and on again: what was not durable is gone.
    pub fn restart(&mut self) {
        let mut shard = Shard::new(self.options);
        for (base, batch) in &self.log {
            let mut at = HEADER;
            while at < batch.len() {
                let bytes = u32::from_le_bytes(batch[at..at + 4].try_into().unwrap()) as usize;
                let schema = u16::from_le_bytes(batch[at + 4..at + 6].try_into().unwrap());
                let body = &batch[at + RECORD_HEADER_BYTES..][..bytes];
                shard.replay(Lsn(base + at as u64), schema, body).unwrap();
                at = (at + RECORD_HEADER_BYTES + bytes).next_multiple_of(RECORD_ALIGN);
            }
        }
        shard.start(self.now, self.history_saved);
        shard.audit();
        self.shard = shard;
        self.in_flight = None;
        self.base = self.log.last().map_or(4096, |(base, batch)| {
            base + batch.len().next_multiple_of(4096) as u64
        });
        (self.len, self.records) = (HEADER, 0);
        self.inbox = Inbox {
            disk_has_room: true,
            ..Inbox::default()
        };
        self.out = EdgeBatch::default();
        self.sent.clear();
    }

    pub fn configure(&mut self, wish: Wish) {
        self.ticket += 1;
        self.inbox.control.push_back(Control::Configure {
            connection: CALLER,
            ticket: self.ticket,
            wish,
        });
        self.settle();
        let (_, _, reply) = self.out.replies.pop().expect("a wish is answered");
        assert_eq!(reply, Reply::Done { state: None });
    }

    pub fn function(&mut self, tenant: &str, name: &str, config: FunctionConfig) -> FunctionId {
        self.configure(Wish::SetFunction {
            tenant: tenant.into(),
            name: name.into(),
            config,
        });
        let directory = self.shard.directory();
        directory
            .function_id(directory.tenant_id(tenant).unwrap(), name)
            .unwrap()
    }

    pub fn task(
        &self,
        function: FunctionId,
        task_id: &str,
        key: &str,
        payload: &[u8],
    ) -> SubmitBatch {
        let mut bytes = Vec::new();
        let task = SubmitTask {
            function,
            cell: CellId(0),
            index: 0,
            start: Start::Now,
            max_age_s: 0,
            cost: 0,
            priority: 0,
            durability: Durability::Disk,
            task_id: stow(&mut bytes, task_id.as_bytes()),
            key: stow(&mut bytes, key.as_bytes()),
            content_type: Span::default(),
            traceparent: Span::default(),
            tags: Span::default(),
            payload: stow(&mut bytes, payload),
        };
        let tenant = self.shard.directory().function(function).unwrap().tenant;
        SubmitBatch {
            connection: CALLER,
            ticket: 0,
            tenant,
            notify: true,
            with_result: true,
            tasks: vec![task],
            bytes,
            done: 0,
        }
    }

    pub fn post(&mut self, batch: SubmitBatch) {
        self.ticket += 1;
        self.inbox.submits.push_back(Box::new(SubmitBatch {
            ticket: self.ticket,
            ..batch
        }));
    }

    pub fn submit(&mut self, batch: SubmitBatch) -> Answer {
        self.post(batch);
        self.settle();
        let answer = self.out.answers.pop().expect("a submit is answered");
        self.out.runs.clear();
        answer
    }

    pub fn accept(&mut self, function: FunctionId, payload: &[u8]) -> RequestId {
        let answer = self.submit(self.task(function, "", "", payload));
        assert_eq!((answer.code, answer.durable), (Code::Ok, true));
        answer.request
    }

    pub fn lend(&mut self, function: FunctionId, count: u32) {
        self.inbox.control.push_back(Control::SessionOpened {
            executor: EXECUTOR,
            connection: WORKER,
        });
        self.inbox.control.push_back(Control::SlotsLent {
            executor: EXECUTOR,
            function,
            index: 0,
            count,
        });
        self.settle();
    }

    /// Connects the executor again with these leases; the answer is still to come.
    pub fn present(&mut self, connection: ConnectionId, leases: &[(RequestId, Token)]) {
        self.inbox.control.extend([
            Control::SessionOpened {
                executor: EXECUTOR,
                connection,
            },
            Control::LeasesPresented {
                executor: EXECUTOR,
                connection,
                ticket: 5,
                leases: leases.to_vec(),
            },
        ]);
    }

    /// What a heartbeat of this executor is told to be lost of these leases.
    pub fn lost(
        &mut self,
        executor: u64,
        leases: &[(RequestId, Token)],
    ) -> Vec<(RequestId, Token)> {
        self.inbox.control.push_back(Control::LeasesHeld {
            executor,
            connection: WORKER,
            ticket: 6,
            leases: leases.to_vec(),
        });
        self.settle();
        match self.out.replies.pop().expect("a heartbeat is answered").2 {
            Reply::LeasesLost { lost } => lost,
            other => panic!("{other:?}"),
        }
    }

    pub fn executes(&mut self) -> Vec<(RequestId, Token, Vec<u8>)> {
        let bytes = self.out.bytes.clone();
        let taken = std::mem::take(&mut self.out.executes);
        taken
            .iter()
            .map(|e| (e.request, e.token, bytes[e.payload.range()].to_vec()))
            .collect()
    }

    /// One outcome as its executor sends it.
    pub fn outcome_of(
        &self,
        request: RequestId,
        token: Token,
        verdict: Verdict,
        text: &str,
    ) -> OutcomeBatch {
        let mut bytes = Vec::new();
        let span = stow(&mut bytes, text.as_bytes());
        let (error, result) = match verdict {
            Verdict::Succeeded => (Span::default(), span),
            Verdict::Failed | Verdict::Throttled { .. } | Verdict::Rejected | Verdict::Stopped => {
                (span, Span::default())
            }
        };
        let outcome = Outcome {
            request,
            token,
            verdict,
            code: Code::Ok,
            run_us: self.run_us,
            error,
            output: Span::default(),
            result,
        };
        OutcomeBatch {
            connection: WORKER,
            ticket: 9,
            outcomes: vec![outcome],
            bytes,
            done: 0,
            refused: vec![],
        }
    }

    pub fn outcome(
        &mut self,
        request: RequestId,
        token: Token,
        verdict: Verdict,
        text: &str,
    ) -> Result<(), Code> {
        self.post_outcome(request, token, verdict, text);
        self.settle();
        let ack = self.out.acks.pop().expect("an outcome is confirmed");
        ack.refused.first().map_or(Ok(()), |&(_, code)| Err(code))
    }

    pub fn post_outcome(&mut self, request: RequestId, token: Token, verdict: Verdict, text: &str) {
        let batch = self.outcome_of(request, token, verdict, text);
        self.inbox.control.push_back(Control::Outcomes(batch));
    }

    pub fn query(&mut self, query: Query) -> Reply {
        self.ticket += 1;
        let control = Control::Query {
            connection: CALLER,
            ticket: self.ticket,
            tenant: TenantId(0),
            query,
        };
        self.inbox.control.push_back(control);
        self.settle();
        self.out.replies.pop().expect("a query is answered").2
    }

    pub fn state(&mut self, request: RequestId) -> pelton_core::state::State {
        match self.query(Query::Get {
            target: Target::Request(request),
        }) {
            Reply::Task { view } => view.state,
            other => panic!("{other:?}"),
        }
    }

    pub fn finished(&mut self) -> BTreeMap<RequestId, (pelton_core::state::State, Vec<u8>)> {
        let bytes = self.out.bytes.clone();
        let taken = std::mem::take(&mut self.out.finished);
        taken
            .iter()
            .map(|f| (f.request, (f.state, bytes[f.result.range()].to_vec())))
            .collect()
    }
}
