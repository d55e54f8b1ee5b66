//! Submit frames become batches: one per shard, in the frame's own bytes where all its tasks go to the same shard.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use pelton_core::{
    config::Function,
    error::Code,
    event::{Durability, Span, Start, SubmitBatch, SubmitTask, stow},
    id::{CellId, FunctionId, RequestId, ShardId, TenantId},
};
use pelton_engine::routes::Routes;
use pelton_net::{
    error::ProtocolError,
    frame::Frame,
    submit::{self as wire, AnswerWriter, SUBMIT_FUNCTIONS_MAX, SubmitView, TaskAnswer},
};

use crate::edge::{hub::Hub, session::Session};

/// Times that a full inbox is tried again, and the pause between.
const FULL_TRIES: u32 = 500;
const FULL_PAUSE: Duration = Duration::from_millis(2);

const UNKNOWN_FUNCTION: &str =
    "there is no such function: `pelton function set`, or an executor that registers it, makes it";
const CLOSING: &str = "the server is closing: connect again and send the same task_id";
const FULL: &str = "the engine takes no more at the moment: try again later";

/// A function of the frame's table, resolved.
#[derive(Clone, Copy)]
struct Resolved<'r> {
    id: FunctionId,
    function: &'r Function,
    /// Where its tasks without key and name go.
    home: (CellId, ShardId),
}

/// What a frame becomes.
struct Sorted {
    batches: BTreeMap<ShardId, Box<SubmitBatch>>,
    /// Answered here: place in the frame, code, sentence.
    refused: Vec<(u16, Code, &'static str)>,
}

impl Session {
    /// Hands the tasks of a submit frame to their shards. Answers come with the deliveries.
    pub(crate) async fn on_submit(
        self: &Rc<Self>,
        hub: &Hub,
        frame: Frame,
    ) -> Result<(), ProtocolError> {
        let tag = frame.tag;
        let sorted = hub
            .edge
            .with_routes(|routes| self.sort(routes, frame, hub.settings.payload_bytes_max))?;
        self.refuse(tag, sorted.refused.iter().copied());
        if hub.closing.get() {
            for batch in sorted.batches.values() {
                self.refuse_batch(tag, batch, Code::Unavailable, CLOSING);
            }
            return Ok(());
        }
        for (shard, batch) in sorted.batches {
            self.submitted(batch.tasks.len() as u32);
            let mut batch = batch;
            let mut tries = 0;
            // A full inbox stops the reading of this stream; if it stays full, the tasks are refused.
            while let Err(back) = hub.edge.submit(shard, batch) {
                hub.edge.wake();
                if hub.edge.is_closing() || hub.edge.is_gone(shard) {
                    self.refuse_batch(tag, &back, Code::Unavailable, CLOSING);
                    self.answered(back.tasks.len() as u32);
                    return Ok(());
                }
                tries += 1;
                if tries > FULL_TRIES {
                    self.refuse_batch(tag, &back, Code::ResourceExhausted, FULL);
                    self.answered(back.tasks.len() as u32);
                    return Ok(());
                }
                tokio::time::sleep(FULL_PAUSE).await;
                batch = back;
            }
        }
        Ok(())
    }

    fn sort(
        &self,
        routes: &Routes,
        frame: Frame,
        payload_bytes_max: usize,
    ) -> Result<Sorted, ProtocolError> {
        let view = SubmitView::parse(&frame)?;
        let tenant = routes.tenant(&self.tenant);
        let mut functions = [None; SUBMIT_FUNCTIONS_MAX];
        for (index, place) in functions[..view.function_count()].iter_mut().enumerate() {
            let name = view.function(index as u8);
            *place = name.zip(tenant).and_then(|(name, tenant)| {
                let (id, function) = routes.function(tenant, name)?;
                let cell = routes.home_of(function);
                Some(Resolved {
                    id,
                    function,
                    home: (cell, routes.shard_of(cell)),
                })
            });
        }
        let mut refused = Vec::new();
        let mut tasks: Vec<(ShardId, SubmitTask)> = Vec::with_capacity(view.len());
        let base = frame.body.as_ptr() as usize;
        let span = |bytes: &[u8]| {
            if bytes.is_empty() {
                return Span::default();
            }
            Span::new(bytes.as_ptr() as usize - base, bytes.len())
        };
        let mut one_shard = true;
        for (index, task) in view.tasks(payload_bytes_max).enumerate() {
            let task = match task {
                Ok(task) => task,
                Err(error) => {
                    refused.push((index as u16, error.code, error.what));
                    continue;
                }
            };
            let Some(resolved) = functions[usize::from(task.function)] else {
                refused.push((index as u16, Code::NotFound, UNKNOWN_FUNCTION));
                continue;
            };
            let (cell, shard) = place(routes, &resolved, &task);
            one_shard &= tasks.first().is_none_or(|(first, _)| *first == shard);
            tasks.push((
                shard,
                SubmitTask {
                    function: resolved.id,
                    cell,
                    index: index as u32,
                    start: match task.start {
                        wire::Start::Now => Start::Now,
                        wire::Start::DelayMs(delay) => Start::DelayMs(delay),
                        wire::Start::AtMs(at) => Start::AtMs(at),
                    },
                    max_age_s: task.max_age_s,
                    cost: task.cost,
                    priority: task.priority as u8,
                    durability: match task.durability {
                        wire::Durability::Disk => Durability::Disk,
                        wire::Durability::Memory => Durability::Memory,
                    },
                    task_id: span(task.task_id.unwrap_or("").as_bytes()),
                    key: span(task.key.unwrap_or("").as_bytes()),
                    content_type: span(task.content_type.as_bytes()),
                    traceparent: span(task.traceparent.map_or(&[][..], |bytes| &bytes[..])),
                    tags: span(task.tags.as_bytes()),
                    payload: span(task.payload),
                },
            ));
        }
        let batch = Parts {
            session: self,
            tag: frame.tag,
            tenant: tenant.unwrap_or_default(),
            notify: view.notify(),
            with_result: view.with_result(),
        };
        let mut batches = BTreeMap::new();
        if let Some(&(shard, _)) = tasks.first().filter(|_| one_shard) {
            let tasks = tasks.into_iter().map(|(_, task)| task).collect();
            // A body that was put together from several packets is the batch's arena from here on, without a copy.
            batches.insert(shard, batch.make(tasks, Vec::from(frame.body)));
        } else {
            for (shard, task) in tasks {
                let batch = batches
                    .entry(shard)
                    .or_insert_with(|| batch.make(Vec::new(), Vec::new()));
                let copied = copy(&task, &frame.body, &mut batch.bytes);
                batch.tasks.push(copied);
            }
        }
        Ok(Sorted { batches, refused })
    }

    fn refuse_batch(&self, tag: u64, batch: &SubmitBatch, code: Code, what: &'static str) {
        let tasks = batch.tasks.iter();
        self.refuse(tag, tasks.map(|task| (task.index as u16, code, what)));
    }

    fn refuse(&self, tag: u64, refused: impl ExactSizeIterator<Item = (u16, Code, &'static str)>) {
        if refused.len() == 0 {
            return;
        }
        self.write(|out| {
            let mut writer = AnswerWriter::begin(out, tag);
            for (index, code, text) in refused {
                writer.push(&TaskAnswer {
                    index,
                    code,
                    flags: 0,
                    retry_after_ms: if code == Code::ResourceExhausted {
                        1_000
                    } else {
                        0
                    },
                    request_id: RequestId::default(),
                    text,
                });
            }
            writer.finish();
        });
    }
}

/// What all batches of a frame have in common.
struct Parts<'s> {
    session: &'s Session,
    tag: u64,
    tenant: TenantId,
    notify: bool,
    with_result: bool,
}

impl Parts<'_> {
    fn make(&self, tasks: Vec<SubmitTask>, bytes: Vec<u8>) -> Box<SubmitBatch> {
        Box::new(SubmitBatch {
            connection: self.session.id,
            ticket: self.tag,
            tenant: self.tenant,
            notify: self.notify,
            with_result: self.with_result,
            tasks,
            bytes,
            done: 0,
        })
    }
}

fn place(
    routes: &Routes,
    resolved: &Resolved<'_>,
    task: &wire::SubmitTask<'_>,
) -> (CellId, ShardId) {
    if task.key.is_none() && task.task_id.is_none() {
        return resolved.home;
    }
    let cell = routes.cell_of(
        resolved.function,
        task.key.unwrap_or(""),
        task.task_id.unwrap_or(""),
    );
    (cell, routes.shard_of(cell))
}

fn copy(task: &SubmitTask, from: &[u8], to: &mut Vec<u8>) -> SubmitTask {
    let mut moved = |span: Span| stow(to, &from[span.range()]);
    SubmitTask {
        task_id: moved(task.task_id),
        key: moved(task.key),
        content_type: moved(task.content_type),
        traceparent: moved(task.traceparent),
        tags: moved(task.tags),
        payload: moved(task.payload),
        ..*task
    }
}
