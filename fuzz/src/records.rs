//! The records of the log: any bytes are a record that can be read whole, or are refused. The first two bytes are the
//! schema, the rest is the body.

use pelton_core::{
    config::Change,
    id::Lsn,
    record::{
        BatchSpace, ConfigRecordV1, Placed, Record, RelocatedNameRecordV1,
        RelocatedOutcomeRecordV1, RelocatedTaskRecordV1, Schema, read, read_task, read_whole,
        record_bytes, tags,
    },
};

use crate::Input;

pub fn run(data: &[u8]) {
    // As a whole record its header says what it is, or lies.
    let _ = read_whole(data);
    let _ = read_task(data);

    let mut input = Input(data);
    let schema = input.u16();
    // Mostly a schema that there is.
    let schema = if schema < 0xff00 { schema % 11 } else { schema };
    let Ok(record) = read(schema, input.0) else {
        return;
    };
    match record {
        Record::RelocatedTask(relocated) => {
            let again = RelocatedTaskRecordV1 {
                task: relocated.task.to_record(),
                from: relocated.from.to_native(),
                at_ms: relocated.at_ms.to_native(),
                due_ms: relocated.due_ms.to_native(),
                outcome: relocated.outcome.to_native(),
                outcome_bytes: relocated.outcome_bytes.to_native(),
                max_age_s: relocated.max_age_s.to_native(),
                generation: relocated.generation.to_native(),
                attempt: relocated.attempt.to_native(),
                state: relocated.state,
                retries: relocated.retries,
                holds_key: relocated.holds_key,
            };
            let task = again.task;
            let texts = [task.task_id, task.key, task.content_type, task.traceparent];
            let variable = texts.iter().map(|text| text.len()).sum::<usize>()
                + task.tags.len()
                + task.payload.len();
            let append = |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedTask, &again);
            written(variable, append, |record| {
                let Record::RelocatedTask(read) = record else {
                    panic!("a moved task reads as a moved task");
                };
                assert_eq!(read.from, relocated.from);
                assert_eq!(&*read.task.payload, task.payload);
            });
        }
        Record::RelocatedOutcome(relocated) => {
            let again = RelocatedOutcomeRecordV1 {
                outcome: relocated.outcome.to_record(),
                from: relocated.from.to_native(),
            };
            let outcome = again.outcome;
            let variable = outcome.error.len() + outcome.output.len() + outcome.result.len();
            let append =
                |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedOutcome, &again);
            written(variable, append, |record| {
                let Record::RelocatedOutcome(read) = record else {
                    panic!("a moved outcome reads as a moved outcome");
                };
                assert_eq!(read.from, relocated.from);
                assert_eq!(&*read.outcome.result, outcome.result);
            });
        }
        Record::RelocatedName(name) => {
            let again = RelocatedNameRecordV1 {
                request: name.request.to_native(),
                payload_hash: name.payload_hash.to_native(),
                function: name.function.to_native(),
                key: &name.key,
                task_id: &name.task_id,
            };
            let variable = again.key.len() + again.task_id.len();
            let append = |space: &mut BatchSpace<'_>| space.append(Schema::RelocatedName, &again);
            written(variable, append, |record| {
                let Record::RelocatedName(read) = record else {
                    panic!("a moved name reads as a moved name");
                };
                assert_eq!(&*read.task_id, again.task_id);
            });
        }
        Record::Task(task) => {
            let _ = task.request();
            let again = task.to_record();
            let tag_bytes: usize = tags(&task.tags).map(|tag| 1 + tag.len()).sum();
            assert!(tag_bytes <= task.tags.len());
            let texts = [
                again.task_id,
                again.key,
                again.content_type,
                again.traceparent,
            ];
            let variable = texts.iter().map(|text| text.len()).sum::<usize>()
                + again.tags.len()
                + again.payload.len();
            let append = |space: &mut BatchSpace<'_>| space.append(Schema::Task, &again);
            written(variable, append, |record| {
                let Record::Task(read) = record else {
                    panic!("a task reads as a task");
                };
                assert_eq!(read.request, task.request);
                assert_eq!(read.due_ms, task.due_ms);
                let texts = [
                    &read.task_id,
                    &read.key,
                    &read.content_type,
                    &read.traceparent,
                ];
                assert_eq!(
                    texts.map(|text| &**text),
                    [
                        again.task_id,
                        again.key,
                        again.content_type,
                        again.traceparent
                    ]
                );
                assert_eq!((&*read.tags, &*read.payload), (again.tags, again.payload));
            });
        }
        Record::Outcome(outcome) => {
            let again = outcome.to_record();
            let variable = again.error.len() + again.output.len() + again.result.len();
            let append = |space: &mut BatchSpace<'_>| space.append(Schema::Outcome, &again);
            written(variable, append, |record| {
                let Record::Outcome(read) = record else {
                    panic!("an outcome reads as an outcome");
                };
                assert_eq!(read.at_ms, outcome.at_ms);
                assert_eq!(&*read.error, again.error);
                assert_eq!((&*read.output, &*read.result), (again.output, again.result));
            });
        }
        Record::Config(config) => {
            let Some(change) = config.change() else {
                return;
            };
            let again = ConfigRecordV1::new(config.version.to_native(), &change);
            let name = match &change {
                Change::Tenant { name, .. } | Change::Function { name, .. } => name.len(),
                Change::FunctionRemoved { .. } => 0,
            };
            let append = |space: &mut BatchSpace<'_>| space.append(Schema::Config, &again);
            written(name, append, |record| {
                let Record::Config(read) = record else {
                    panic!("a change reads as a change");
                };
                assert_eq!(read.change().as_ref(), Some(&change));
            });
        }
        Record::Lease(lease) => {
            let _ = (lease.request.to_native(), lease.attempt.to_native());
        }
        Record::Move(moved) => {
            let _ = (moved.request.to_native(), moved.state);
        }
        Record::Clock(clock) => {
            let _ = (clock.logged_ms.to_native(), clock.next_seq.to_native());
        }
    }
}

/// What was read is written as a shard writes it, within the bytes that a shard counts for it, and read again.
fn written(
    variable: usize,
    append: impl FnOnce(&mut BatchSpace<'_>) -> Placed,
    check: impl FnOnce(Record<'_>),
) {
    let mut bytes = vec![0xa5; record_bytes(variable)];
    let mut space = BatchSpace {
        bytes: &mut bytes,
        len: 0,
        base: Lsn(0),
        records: 0,
    };
    let placed = append(&mut space);
    let record = &bytes[..placed.bytes as usize];
    check(read_whole(record).expect("what a shard writes can be read"));
}
