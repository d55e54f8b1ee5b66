//! Submits. A frame of tasks goes to the shards of their cells. Each task is answered once: accepted, which must be true
//! on the disk by then, a duplicate of a task with the same name and payload, or refused with a reason that holds. A lost
//! answer leaves it open whether the task is there; what has a name is handed in again.

use std::collections::BTreeMap;

use pelton_core::{
    error::Code,
    event::{Answer, Durability, Start, SubmitBatch, SubmitTask, stow},
    id::{CellId, ConnectionId, TenantId, place},
};

use super::{Frame, Sent};
use crate::{
    oracle::{Check, Intent, broken},
    world::{Happening, World, function_name},
};

/// Names that callers give again and again.
const POPULAR_NAMES: u64 = 40;

impl World {
    pub(crate) fn submit_again(&mut self, caller: usize) {
        let mut intents = Vec::new();
        for _ in 0..self.plan.frame_tasks.min(8) {
            let Some(number) = self.callers[caller].again.pop_front() else {
                break;
            };
            intents.push(number);
        }
        self.submit(caller, intents);
    }

    pub(crate) fn submit_new(&mut self, caller: usize) {
        let Some((_, tenant)) = self.tenant_of(caller) else {
            return;
        };
        let mut intents = Vec::new();
        for _ in 0..1 + self.random.below(self.plan.frame_tasks) {
            let name = function_name(self.random.below(self.plan.functions as u64) as usize);
            let Some(function) = self.directory.function_id(tenant, &name) else {
                continue;
            };
            let count = self.oracle.intents.len() as u64;
            // Now and then something recent once more, as callers do that do not trust an answer.
            if count > 0 && self.random.one_in(12) {
                let number = count - 1 - self.random.below(count.min(60));
                let earlier = &self.oracle.intents[number as usize];
                if earlier.tenant == tenant
                    && !earlier.task_id.is_empty()
                    && !intents.contains(&(number as u32))
                {
                    intents.push(number as u32);
                    continue;
                }
            }
            let number = count as u32;
            let intent = self.draw_intent(number, tenant, function);
            self.oracle.intend(intent);
            intents.push(number);
        }
        self.handed_in += intents.len();
        self.submit(caller, intents);
        self.provoke();
    }

    pub(crate) fn draw_intent(
        &mut self,
        number: u32,
        tenant: TenantId,
        function: pelton_core::id::FunctionId,
    ) -> Intent {
        let wall_ms = self.wall_ms();
        let plan = &self.plan;
        let r = &mut self.random;
        let task_id = match r.below(10) {
            0..5 => String::new(),
            5..8 => format!("t{number}"),
            _ => format!("p{}", r.below(POPULAR_NAMES)),
        };
        let key = if plan.keys && r.one_in(3) {
            format!("k{}", r.below(6))
        } else {
            String::new()
        };
        let len = if plan.large_one_in > 0 && r.one_in(plan.large_one_in) {
            (60 << 10) + r.below(80 << 10) as usize
        } else {
            match r.below(10) {
                0 => r.below(8) as usize,
                1..8 => 8 + r.below(400) as usize,
                _ => 400 + r.below(4_000) as usize,
            }
        };
        let mut payload: Vec<u8> = number
            .to_le_bytes()
            .into_iter()
            .chain((0..).map(|at: u32| (at.wrapping_mul(number | 1) >> 3) as u8))
            .take(len)
            .collect();
        payload.truncate(len);
        let content_type = if len < 4 || r.one_in(6) {
            format!("n/{number}")
        } else {
            String::new()
        };
        let start = match r.below(if plan.delays { 12 } else { 1 }) {
            0..9 => Start::Now,
            9 => Start::DelayMs(r.below(plan.delay_ms)),
            10 => Start::DelayMs(r.below(20)),
            _ => Start::AtMs((wall_ms + r.below(4_000)).saturating_sub(500)),
        };
        let tags = if r.one_in(8) {
            vec![3, b'a', b'=', b'b']
        } else {
            Vec::new()
        };
        Intent {
            number,
            tenant,
            function,
            task_id,
            key,
            content_type,
            payload,
            start,
            max_age_s: if plan.short_ages && r.one_in(6) {
                1 + r.below(6) as u32
            } else {
                0
            },
            cost: if r.one_in(5) { r.below(30) as u16 } else { 0 },
            priority: r.below(3) as u8,
            durability: if r.one_in(8) {
                Durability::Memory
            } else {
                Durability::Disk
            },
            tags,
            answered: None,
            unknown: false,
            refused: false,
            flying: 0,
        }
    }

    /// The cell that an edge chooses: a key places its tasks, else a name does; what has neither goes anywhere.
    pub(crate) fn cell_of(&mut self, intent: &Intent, tenant: &str) -> CellId {
        let function = &self.directory.functions()[intent.function.0 as usize].name;
        let by = if intent.key.is_empty() {
            &intent.task_id
        } else {
            &intent.key
        };
        if by.is_empty() {
            CellId(
                self.random
                    .below(u64::from(pelton_core::limits::CELL_COUNT)) as u16,
            )
        } else {
            place(tenant, function, by)
        }
    }

    pub(crate) fn submit(&mut self, caller: usize, intents: Vec<u32>) {
        let (Some((tenant_name, tenant)), Some(connection)) =
            (self.tenant_of(caller), self.callers[caller].connection)
        else {
            return;
        };
        if intents.is_empty() {
            return;
        }
        self.callers[caller].ticket += 1;
        let ticket = self.callers[caller].ticket;
        let notify = self.random.one_in(2);
        let with_result = self.random.one_in(2);
        let mut parts: BTreeMap<usize, Box<SubmitBatch>> = BTreeMap::new();
        let mut shards = Vec::new();
        for (index, &number) in intents.iter().enumerate() {
            let intent = self.oracle.intents[number as usize].clone();
            let cell = self.cell_of(&intent, &tenant_name);
            let shard = self.shard_of(cell);
            shards.push(shard);
            let part = parts.entry(shard).or_insert_with(|| {
                Box::new(SubmitBatch {
                    connection,
                    ticket,
                    tenant,
                    notify,
                    with_result,
                    tasks: Vec::new(),
                    bytes: Vec::new(),
                    done: 0,
                })
            });
            let bytes = &mut part.bytes;
            part.tasks.push(SubmitTask {
                function: intent.function,
                cell,
                index: index as u32,
                start: intent.start,
                max_age_s: intent.max_age_s,
                cost: intent.cost,
                priority: intent.priority,
                durability: intent.durability,
                task_id: stow(bytes, intent.task_id.as_bytes()),
                key: stow(bytes, intent.key.as_bytes()),
                content_type: stow(bytes, intent.content_type.as_bytes()),
                traceparent: stow(bytes, b""),
                tags: stow(bytes, &intent.tags),
                payload: stow(bytes, &intent.payload),
            });
            let intent = &mut self.oracle.intents[number as usize];
            intent.flying += 1;
            intent.refused = false;
        }
        self.trace.event(
            self.now_ns,
            &[20, caller as u64, intents.len() as u64],
            || format!("caller {caller} hands in {intents:?} as {connection:?} {ticket}"),
        );
        let answered = vec![false; intents.len()];
        let open = vec![true; intents.len()];
        self.frames.insert(
            (connection, ticket),
            Frame {
                intents: intents.clone(),
                shards,
                answered,
            },
        );
        self.callers[caller]
            .frames
            .insert(ticket, Sent { intents, open });
        if notify {
            self.notifying.insert((connection, ticket));
        }
        for (shard, part) in parts {
            self.hosts[shard].at_edges.push_back(part);
            self.wake(shard, 3_000);
        }
    }

    pub(crate) fn answers_leave(
        &mut self,
        shard: usize,
        connection: ConnectionId,
        ticket: u64,
        answers: &[Answer],
        poisoned: bool,
    ) -> Check {
        let Some(frame) = self.frames.get_mut(&(connection, ticket)) else {
            return broken(
                "answered_once",
                format!(
                    "shard {shard} answers frame {ticket} of {connection:?}, which has no more tasks"
                ),
            );
        };
        for answer in answers {
            let index = answer.index as usize;
            if std::mem::replace(&mut frame.answered[index], true) {
                return broken(
                    "answered_once",
                    format!("task {index} of frame {ticket} of {connection:?} is answered twice"),
                );
            }
            let number = frame.intents[index];
            self.trace.event(
                self.now_ns,
                &[
                    21,
                    u64::from(number),
                    answer.code as u64,
                    answer.request.0 as u64,
                ],
                || {
                    format!(
                        "shard {shard} answers intent {number}: {} {} duplicate {} durable {}",
                        answer.code, answer.request, answer.duplicate, answer.durable
                    )
                },
            );
            self.oracle.answer_leaves(number, answer, poisoned)?;
        }
        if frame.answered.iter().all(|&answered| answered) {
            self.frames.remove(&(connection, ticket));
        }
        let delay = self.around(100_000);
        self.after(
            delay,
            Happening::Answers {
                connection,
                ticket,
                answers: answers.to_vec(),
            },
        );
        Ok(())
    }

    pub(crate) fn answers_arrive(
        &mut self,
        connection: ConnectionId,
        ticket: u64,
        answers: &[Answer],
    ) -> Check {
        let Some(caller) = self.caller_of(connection) else {
            return Ok(());
        };
        let notify = self.notifying.contains(&(connection, ticket));
        for answer in answers {
            let Some(frame) = self.callers[caller].frames.get_mut(&ticket) else {
                return broken(
                    "answered_once",
                    format!("frame {ticket} is answered too often"),
                );
            };
            let number = frame.intents[answer.index as usize];
            frame.open[answer.index as usize] = false;
            let intent = &mut self.oracle.intents[number as usize];
            intent.flying -= 1;
            let named = !intent.task_id.is_empty();
            match answer.code {
                Code::Ok => {
                    if intent.task_id.is_empty() && !answer.duplicate {
                        intent.answered = Some(answer.request);
                    }
                    intent.unknown = false;
                    let spot = (ticket, answer.index);
                    let target = &mut self.callers[caller];
                    target.known.push(answer.request);
                    if notify && !answer.duplicate && answer.durable && !target.told.contains(&spot)
                    {
                        target.promised.insert(spot);
                    }
                }
                Code::Unavailable => {
                    intent.unknown = true;
                    if named {
                        self.callers[caller].again.push_back(number);
                    }
                }
                Code::ResourceExhausted if named && self.random.one_in(2) => {
                    self.callers[caller].again.push_back(number);
                }
                _ => {
                    let settled =
                        intent.flying == 0 && !intent.unknown && intent.answered.is_none();
                    // A given name may stand for a task that was accepted before.
                    intent.refused = settled && !named;
                }
            }
        }
        let target = &mut self.callers[caller];
        if target.frames[&ticket].open.iter().all(|&open| !open) {
            target.frames.remove(&ticket);
        }
        if self.healing && !target.again.is_empty() {
            self.after(1_000_000, Happening::CallerActs { caller });
        }
        Ok(())
    }
}
