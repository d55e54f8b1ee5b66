//! Replay: the log's records become facts again, and the volatile state starts from them.

use alloc::boxed::Box;

use crate::{
    clock::Now,
    config::Change,
    error::Code,
    event::Effects,
    flow::admit::{key_hash, name_hash},
    id::{ConnectionId, FunctionId, Lsn, RequestId, TenantId, Token},
    planted::{Bug, planted},
    record::{ArchivedTaskRecordV1, RECORD_HEADER_BYTES, Record, Unreadable, read},
    shard::{Accepted, Fact, Shard},
    state::State,
    table::task::{FLAG_MEMORY, FLAG_META, NIL},
};

impl Shard {
    /// Takes one record of the log, in order. `position` is that of its header.
    pub fn replay(&mut self, position: Lsn, schema: u16, body: &[u8]) -> Result<(), Unreadable> {
        assert!(self.replaying, "the log is replayed before the start");
        let unreadable = Unreadable { schema };
        let record_bytes = (RECORD_HEADER_BYTES + body.len()) as u32;
        let (fact, at_ms) = match read(schema, body)? {
            Record::Task(task) => {
                let accepted = self.accepted_of(task, position, record_bytes);
                (Fact::Accepted(accepted), accepted.request.accepted_ms())
            }
            Record::Lease(lease) => {
                let request = RequestId(lease.request.to_native());
                let token = Token {
                    generation: lease.generation.to_native(),
                    attempt: lease.attempt.to_native(),
                };
                (
                    Fact::Leased {
                        request,
                        token,
                        binding: NIL,
                        connection: ConnectionId(0),
                    },
                    lease.at_ms.to_native(),
                )
            }
            Record::Outcome(outcome) => {
                let fact = Fact::Ended {
                    request: RequestId(outcome.request.to_native()),
                    state: State::from_number(outcome.state).ok_or(unreadable)?,
                    retries: outcome.retries,
                    due_ms: outcome.due_ms.to_native(),
                    position,
                    record_bytes,
                    code: Code::from_number(outcome.code.to_native()).ok_or(unreadable)?,
                };
                (fact, outcome.at_ms.to_native())
            }
            Record::Move(moved) => {
                let request = RequestId(moved.request.to_native());
                let state = State::from_number(moved.state).ok_or(unreadable)?;
                (Fact::Moved { request, state }, moved.at_ms.to_native())
            }
            Record::Config(config) => {
                let change = Box::new(config.change().ok_or(unreadable)?);
                if let Change::Function { id, .. } = *change
                    && self.directory.function(id).is_some()
                    && planted(Bug::ConfigNotReplayed)
                {
                    return Ok(());
                }
                (
                    Fact::Config {
                        version: config.version.to_native(),
                        change,
                    },
                    0,
                )
            }
            Record::RelocatedTask(relocated) => {
                let state = State::from_number(relocated.state).ok_or(unreadable)?;
                let accepted = self.accepted_of(&relocated.task, position, record_bytes);
                self.see_segment(self.segment_of(position));
                self.now.logged_ms = self.now.logged_ms.max(relocated.at_ms.to_native());
                self.replay_relocated(relocated, accepted, state);
                return Ok(());
            }
            Record::RelocatedOutcome(relocated) => {
                let fact = Fact::OutcomeRelocated {
                    request: RequestId(relocated.outcome.request.to_native()),
                    from: Lsn(relocated.from.to_native()),
                    to: position,
                    record_bytes,
                };
                (fact, relocated.outcome.at_ms.to_native())
            }
            Record::RelocatedName(name) => {
                let function = FunctionId(name.function.to_native());
                let fact = Fact::NameRelocated {
                    request: RequestId(name.request.to_native()),
                    payload_hash: name.payload_hash.to_native(),
                    name: name_hash(
                        self.options.seed,
                        function,
                        name.key.as_bytes(),
                        name.task_id.as_bytes(),
                    ),
                    to: position,
                };
                (fact, 0)
            }
            Record::Clock(clock) => {
                self.clock_segment = Some(self.segment_of(position));
                (
                    Fact::Clock {
                        next_seq: clock.next_seq.to_native(),
                    },
                    clock.logged_ms.to_native(),
                )
            }
        };
        self.see_segment(self.segment_of(position));
        self.now.logged_ms = self.now.logged_ms.max(at_ms);
        self.apply(fact, None, &mut Effects::default());
        Ok(())
    }

    fn accepted_of(
        &self,
        task: &ArchivedTaskRecordV1<'_>,
        position: Lsn,
        record_bytes: u32,
    ) -> Accepted {
        let function = FunctionId(task.function.to_native());
        let (task_id, key) = (task.task_id.as_bytes(), task.key.as_bytes());
        let seed = self.options.seed;
        let meta = task_id.len() + key.len() + task.content_type.len() + task.traceparent.len() > 0;
        Accepted {
            request: task.request(),
            tenant: TenantId(task.tenant.to_native()),
            function,
            position,
            record_bytes,
            due_ms: task.due_ms.to_native(),
            max_age_s: task.max_age_s.to_native(),
            cost: task.cost.to_native().max(1),
            flags: if meta { FLAG_META } else { 0 }
                | if task.durability == 1 { FLAG_MEMORY } else { 0 },
            name: if task_id.is_empty() {
                0
            } else {
                name_hash(seed, function, key, task_id)
            },
            key: key_hash(seed, function, key),
            payload_hash: task.payload_hash.to_native(),
            leased: false,
            waiter: NIL,
        }
    }

    /// The log has been read: the shard is ready to step. Leases that it found start again with a full term.
    pub fn start(&mut self, now: Now) {
        assert!(self.replaying, "a shard starts once");
        self.restore_order();
        self.replaying = false;
        self.now = Now {
            mono_ns: now.mono_ns,
            logged_ms: now.logged_ms.max(self.now.logged_ms),
        };
        self.tasks.rebuild_free();
        self.counters = crate::event::Counters {
            recovered: u64::from(self.tasks.live() - self.finished.count),
            ..Default::default()
        };
        self.orphans_end_ns = now.mono_ns + self.options.lease_ms * 1_000_000;
        let mut slot = self.orphans.head;
        while slot != NIL {
            self.tasks[slot].at = now.mono_us();
            slot = self.tasks[slot].next;
        }
        for function in 0..self.lanes.len() as u32 {
            self.arm_lane_age(FunctionId(function));
            if !self.lanes[function as usize].live {
                self.doom(FunctionId(function));
            }
        }
        self.count_at_start();
    }
}
