//! Complete: what an executor says of an attempt becomes an outcome in the log. The slot and the credit are free at
//! once, so that the next lease goes into the same batch; the task's new state waits for the flush.

use crate::{
    error::Code,
    event::{Outcome, OutcomeAck, OutcomeBatch, Urgency, Verdict},
    id::{ConnectionId, RequestId},
    limits::{ERROR_BYTES_MAX, OUTPUT_BYTES_MAX, RECORD_BYTES_LARGE},
    planted::{Bug, planted},
    record::{BatchSpace, OutcomeRecordV1, Schema},
    schedule::pool::{Signal, WINDOW_NS},
    shard::{Fact, Shard},
    state::{Event, State},
    table::task::*,
    times::Part,
};

impl Shard {
    /// Deals with a batch of outcomes in order; `false` if the next one has to wait for the batch in flight.
    pub(crate) fn complete(
        &mut self,
        batch: &mut OutcomeBatch,
        space: &mut BatchSpace<'_>,
    ) -> bool {
        while let Some(outcome) = batch.outcomes.get(batch.done) {
            if self.settling(outcome.request) {
                return false;
            }
            let (error, output) = clip(outcome, &batch.bytes);
            let result = &batch.bytes[outcome.result.range()];
            if !self.has_room(error.len() + output.len() + result.len(), space) {
                return false;
            }
            if let Err(code) = self.complete_one(outcome, error, output, result, space) {
                self.free_overdue(outcome, batch.connection);
                self.counters.stale += 1;
                batch.refused.push((batch.done as u32, code));
            }
            batch.done += 1;
        }
        let ack = OutcomeAck {
            connection: batch.connection,
            ticket: batch.ticket,
            count: batch.outcomes.len() as u32,
            refused: core::mem::take(&mut batch.refused),
        };
        self.after_flush(batch.connection).acks.push(ack);
        self.note(Urgency::Soon);
        true
    }

    fn complete_one(
        &mut self,
        outcome: &Outcome,
        error: &str,
        output: &[u8],
        result: &[u8],
        space: &mut BatchSpace<'_>,
    ) -> Result<(), Code> {
        let Some(slot) = self.leased(outcome) else {
            return Err(Code::StaleLease);
        };
        // What the executor measured with its own clock cannot be longer than what this shard saw of it.
        let away_us = self.now.mono_us() - self.tasks[slot].at;
        let run_us = u64::from(outcome.run_us).min(away_us);
        self.times.note(Part::Carried, away_us - run_us, 1);
        self.times.note(Part::Run, run_us, 1);
        let stopping = self.tasks[slot].state() == State::Stopping;
        match outcome.verdict {
            Verdict::Throttled { .. } | Verdict::Rejected if !stopping => {
                self.give_back(slot, outcome.verdict);
                return Ok(());
            }
            Verdict::Succeeded
            | Verdict::Failed
            | Verdict::Throttled { .. }
            | Verdict::Rejected
            | Verdict::Stopped => {}
        }
        self.leave_executor(slot);
        if stopping {
            self.append_outcome(slot, State::Stopped, 0, Code::Ok, error, output, &[], space);
        } else if outcome.verdict == Verdict::Succeeded
            && result.len() > self.options.payload_bytes_max as usize
        {
            self.fail_attempt(
                slot,
                Code::ResultTooLarge,
                "the result exceeds payload_bytes_max",
                space,
            );
        } else if outcome.verdict == Verdict::Succeeded {
            self.note_signal(slot, Signal::Clean);
            self.append_outcome(
                slot,
                State::Succeeded,
                0,
                Code::Ok,
                error,
                output,
                result,
                space,
            );
        } else {
            self.note_signal(slot, Signal::Clean);
            let code = if outcome.code == Code::Ok {
                Code::Internal
            } else {
                outcome.code
            };
            self.fail_or_retry(slot, code, error, output, space);
        }
        Ok(())
    }

    /// True while another fact about the task is on its way to the disk: a stop that was asked for first, or the same
    /// outcome said twice. What it decides is known when it is there.
    fn settling(&self, request: RequestId) -> bool {
        self.tasks.find(request).is_some_and(|slot| {
            let task = &self.tasks[slot];
            !planted(Bug::CompletionCountedTwice)
                && task.has(FLAG_BUSY)
                && matches!(task.state(), State::Running | State::Stopping)
        })
    }

    /// The slot of the task that this outcome may end.
    fn leased(&self, outcome: &Outcome) -> Option<u32> {
        let slot = self.tasks.find(outcome.request)?;
        let task = &self.tasks[slot];
        let running = matches!(task.state(), State::Running | State::Stopping);
        let current = task.token() == outcome.token || planted(Bug::StaleTokenAccepted);
        (running && current).then_some(slot)
    }

    /// An attempt that had timed out is over at last: its slot is free. Only its own executor can say so.
    fn free_overdue(&mut self, outcome: &Outcome, connection: ConnectionId) {
        let attempt = (outcome.request, outcome.token);
        let freed = self
            .sessions
            .values_mut()
            .filter(|session| session.connection == connection)
            .find_map(|session| session.overdue.remove(&attempt));
        if let Some(binding) = freed {
            let before = self.bindings[binding as usize].free();
            self.bindings[binding as usize].used -= 1;
            self.recount(binding, before);
        }
    }

    /// A lease is given back before the start: in memory only, no retry is spent, the lane pauses.
    fn give_back(&mut self, slot: u32, verdict: Verdict) {
        let function = self.tasks[slot].function;
        let (signal, park_ns) = match verdict {
            Verdict::Throttled { retry_after_ms } if retry_after_ms > 0 => (
                Signal::Overload,
                u64::from(retry_after_ms).min(60_000) * 1_000_000,
            ),
            Verdict::Throttled { .. } => (Signal::Overload, WINDOW_NS),
            Verdict::Rejected | Verdict::Succeeded | Verdict::Failed | Verdict::Stopped => {
                (Signal::Clean, WINDOW_NS / 10)
            }
        };
        self.counters.throttled += u64::from(signal == Signal::Overload);
        // Parked first, or the lane would start another task as the slot falls free.
        self.park(function, park_ns);
        if planted(Bug::CreditLeak) && signal == Signal::Overload {
            self.adopt_credit(slot);
        }
        self.release(slot);
        self.note_signal(slot, signal);
    }

    /// A running task goes back to the front of its lane without a record: a restart finds it leased and waits a term.
    pub(crate) fn release(&mut self, slot: u32) {
        self.meet(self.tasks[slot].state(), Event::Release);
        self.leave_executor(slot);
        let tenant = self.tenant_of(slot);
        self.queues[tenant.0 as usize].waiting += 1;
        self.tasks[slot].set(FLAG_RELEASED);
        self.enqueue(slot, true);
    }

    fn note_signal(&mut self, slot: u32, signal: Signal) {
        let function = self.tasks[slot].function;
        let tenant = self.lanes[function.0 as usize].tenant.0;
        let queue = &mut self.queues[tenant as usize];
        let only = self.robin.lanes(tenant) <= 1 && queue.blocked.is_empty();
        queue.pool.note(self.now.mono_ns, signal, function.0, only);
    }

    /// An attempt ended without its executor's word: too slow, or the executor is gone. The task is in no list.
    pub(crate) fn fail_attempt(
        &mut self,
        slot: u32,
        code: Code,
        error: &str,
        space: &mut BatchSpace<'_>,
    ) {
        if self.tasks[slot].state() == State::Stopping {
            self.append_outcome(slot, State::Stopped, 0, Code::Ok, error, &[], &[], space);
            return;
        }
        if code == Code::DeadlineExceeded {
            self.note_signal(slot, Signal::Overload);
        }
        self.fail_or_retry(slot, code, error, &[], space);
    }

    fn fail_or_retry(
        &mut self,
        slot: u32,
        code: Code,
        error: &str,
        output: &[u8],
        space: &mut BatchSpace<'_>,
    ) {
        let task = &self.tasks[slot];
        let config = self.lanes[task.function.0 as usize].config;
        let lane_live = self.lanes[task.function.0 as usize].live;
        let allowed = config.retries + u8::from(planted(Bug::OneRetryTooMany));
        if task.retries() >= allowed || task.has(FLAG_OVERDUE) || !lane_live {
            self.append_outcome(slot, State::Failed, 0, code, error, output, &[], space);
            return;
        }
        let retries = task.retries() + 1;
        let request = self.tasks.request(slot);
        self.tasks[slot].set_retries(retries);
        let wait_ms = if code == Code::Unavailable {
            0
        } else {
            self.backoff_ms(
                request,
                retries,
                config.backoff_ms_min,
                config.backoff_ms_max,
            )
        };
        self.append_outcome(
            slot,
            State::Retrying,
            self.now.logged_ms + wait_ms,
            code,
            error,
            output,
            &[],
            space,
        );
    }

    /// Exponential backoff with full jitter in its upper half, from the shard's seed: equal seeds wait equally long.
    fn backoff_ms(&self, request: RequestId, retries: u8, min_ms: u32, max_ms: u32) -> u64 {
        let ceiling = (u64::from(min_ms) << (retries - 1).min(31)).min(u64::from(max_ms));
        let mut seed = [0u8; 17];
        seed[..16].copy_from_slice(&request.0.to_le_bytes());
        seed[16] = retries;
        let random = xxhash_rust::xxh3::xxh3_64_with_seed(&seed, self.options.seed);
        ceiling / 2 + random % (ceiling / 2 + 1)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one record")]
    fn append_outcome(
        &mut self,
        slot: u32,
        state: State,
        due_ms: u64,
        code: Code,
        error: &str,
        output: &[u8],
        result: &[u8],
        space: &mut BatchSpace<'_>,
    ) {
        let event = if state == State::Retrying {
            Event::Retry
        } else if state == State::Succeeded {
            Event::Succeed
        } else if state == State::Stopped {
            Event::StopDone
        } else {
            Event::Fail
        };
        self.meet(self.tasks[slot].state(), event);
        let lane = &self.lanes[self.tasks[slot].function.0 as usize];
        let request = self.tasks.request(slot);
        let task = &mut self.tasks[slot];
        task.set(FLAG_BUSY);
        if state == State::Failed && task.key != NIL && lane.holds_keys() {
            task.set(FLAG_HOLDS_KEY);
        }
        let holds_key = u8::from(task.has(FLAG_HOLDS_KEY));
        let (token, retries) = (task.token(), task.retries());
        let record = OutcomeRecordV1 {
            request: request.0,
            at_ms: self.now.logged_ms,
            due_ms,
            generation: token.generation,
            attempt: token.attempt,
            state: state as u8,
            retries,
            code: code as u16,
            holds_key,
            error,
            output,
            result,
        };
        let placed = space.append(Schema::Outcome, &record);
        self.open.appended.outcomes += 1;
        self.large_in_batch |= placed.bytes as usize > RECORD_BYTES_LARGE;
        if state == State::Retrying {
            let tenant = self.tenant_of(slot);
            self.queues[tenant.0 as usize].waiting += 1;
        }
        self.open.facts.push(Fact::Ended {
            request,
            state,
            retries,
            due_ms,
            position: placed.lsn,
            record_bytes: placed.bytes,
            code,
        });
        self.note(Urgency::Soon);
    }
}

/// The error, cut to its bound at a character, and the tail of the output.
fn clip<'a>(outcome: &Outcome, bytes: &'a [u8]) -> (&'a str, &'a [u8]) {
    let error = &bytes[outcome.error.range()];
    let error = &error[..error.len().min(ERROR_BYTES_MAX)];
    let error = match core::str::from_utf8(error) {
        Ok(text) => text,
        Err(damage) => core::str::from_utf8(&error[..damage.valid_up_to()]).unwrap_or_default(),
    };
    let output = &bytes[outcome.output.range()];
    (
        error,
        &output[output.len().saturating_sub(OUTPUT_BYTES_MAX)..],
    )
}
