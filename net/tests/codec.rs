//! Every frame's golden bytes, every frame cut short and bit-flipped, and what a decode costs.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stand outside the test functions"
)]

use std::fmt::Write as _;

use bytes::{Bytes, BytesMut};
use pelton_core::error::Code;
use pelton_core::id::{CellId, RequestId, SlotIndex, Token};
use pelton_core::limits::{
    CONTROL_FRAME_BYTES_MAX, FRAME_BYTES_MAX, PAYLOAD_BYTES_LIMIT, SUBMIT_TASKS_MAX,
};
use pelton_net::execute::{
    Cancel, ExecuteTask, Offer, OutcomeStatus, RefusedOutcome, Register, Registered, ResumedLease,
    TaskOutcome,
};
use pelton_net::frame::{Frame, FrameReader, FrameType};
use pelton_net::item::{Full, Item, ItemWriter, Items};
use pelton_net::query::{Operation, Query, QueryAnswer};
use pelton_net::session::{Credential, ErrorFrame, Hello, Lease, Welcome, encode_goodbye};
use pelton_net::submit::{
    ANSWER_DUPLICATE, ANSWER_DURABLE, AnswerView, AnswerWriter, Durability, Finished, Priority,
    PushError, SUBMIT_NOTIFY, SUBMIT_RESULT, Start, Stop, StopAnswer, SubmitTask, SubmitView,
    SubmitWriter, Tags, TaskAnswer, TaskRef, TaskStatus, Wait,
};
use serde_json::{Value, json};

const TRACEPARENT: &[u8; 55] = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn id(seq: u64) -> RequestId {
    RequestId::new(
        CellId(7),
        1_790_000_000_000,
        seq,
        SlotIndex(seq as u32 + 40),
    )
}

fn lease(seq: u64) -> Lease {
    Lease {
        request_id: id(seq),
        token: Token {
            generation: 1,
            attempt: 2,
        },
    }
}

fn items<'a, T: Item<'a>>(kind: FrameType, tag: u64, list: &[T]) -> BytesMut {
    let mut out = BytesMut::new();
    let mut writer = ItemWriter::begin(&mut out, kind, tag);
    for item in list {
        writer.push(item).unwrap();
    }
    writer.finish();
    out
}

fn written(write: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::new();
    write(&mut out);
    out
}

/// One example of every frame, by name.
fn examples() -> Vec<(&'static str, BytesMut)> {
    let mut tags = Vec::new();
    let tags = Tags::pack(&["env=test", "blue"], &mut tags);
    let submit = written(|out| {
        let flags = SUBMIT_NOTIFY | SUBMIT_RESULT;
        let mut writer =
            SubmitWriter::begin(out, 11, flags, &["digest", "wordcount"], FRAME_BYTES_MAX);
        writer.push(&SubmitTask::new(b"plain")).unwrap();
        writer
            .push(&SubmitTask {
                function: 1,
                task_id: Some("order-42"),
                key: Some("customer_7"),
                priority: Priority::Interactive,
                durability: Durability::Memory,
                start: Start::DelayMs(1500),
                cost: 3,
                max_age_s: 600,
                content_type: "text/plain",
                traceparent: Some(TRACEPARENT),
                tags,
                payload_hash: Some(0x0123_4567_89ab_cdef),
                payload: b"hello",
            })
            .unwrap();
        writer
            .push(&SubmitTask {
                start: Start::AtMs(1_790_000_000_000),
                ..SubmitTask::new(b"")
            })
            .unwrap();
        writer.finish();
    });
    let answer = written(|out| {
        let mut writer = AnswerWriter::begin(out, 11);
        for index in 0..4 {
            writer.push(&TaskAnswer {
                index,
                code: Code::Ok,
                flags: ANSWER_DURABLE,
                retry_after_ms: 0,
                request_id: id(u64::from(index)),
                text: "",
            });
        }
        writer.push(&TaskAnswer {
            index: 4,
            code: Code::Ok,
            flags: ANSWER_DURABLE | ANSWER_DUPLICATE,
            retry_after_ms: 0,
            request_id: id(1000),
            text: "",
        });
        for index in 5..7 {
            writer.push(&TaskAnswer {
                index,
                code: Code::ResourceExhausted,
                flags: 0,
                retry_after_ms: 250,
                request_id: RequestId(0),
                text: "the tenant's queue is full",
            });
        }
        writer.finish();
    });
    vec![
        (
            "hello",
            written(|out| {
                Hello {
                    protocol: 1,
                    credential: Credential::Key(b"pk_example"),
                    tenant: None,
                    client: "vectors",
                    executor: Some(0x1122_3344_5566_7788),
                }
                .encode(out, 1);
            }),
        ),
        (
            "hello_without_key",
            written(|out| {
                Hello {
                    protocol: 1,
                    credential: Credential::None,
                    tenant: Some("acme"),
                    client: "vectors",
                    executor: None,
                }
                .encode(out, 1);
            }),
        ),
        (
            "welcome",
            written(|out| {
                Welcome {
                    protocol: 1,
                    server: 0x0102_0304_0506_0708,
                    frame_bytes_max: FRAME_BYTES_MAX as u32,
                    payload_bytes_max: PAYLOAD_BYTES_LIMIT as u32,
                    in_flight_tasks_max: 16_384,
                    heartbeat_ms: 3_000,
                    lease_ms: 10_000,
                    tenant: "acme",
                }
                .encode(out, 1);
            }),
        ),
        (
            "error",
            written(|out| {
                ErrorFrame::new(Code::Unauthenticated, "the key is not known").encode(out, 1);
            }),
        ),
        ("goodbye", written(encode_goodbye)),
        (
            "heartbeat",
            items(FrameType::Heartbeat, 5, &[lease(1), lease(2)]),
        ),
        (
            "heartbeat_ack",
            items(FrameType::HeartbeatAck, 5, &[lease(2)]),
        ),
        ("submit", submit),
        ("submit_answer", answer),
        (
            "finished",
            items(
                FrameType::Finished,
                0,
                &[
                    Finished {
                        tag: 11,
                        index: 0,
                        request_id: id(0),
                        status: TaskStatus::Succeeded,
                        code: Code::Ok,
                        attempts: 1,
                        error: "",
                        result: Some(b"done"),
                    },
                    Finished {
                        tag: 11,
                        index: 2,
                        request_id: id(2),
                        status: TaskStatus::Failed,
                        code: Code::Internal,
                        attempts: 4,
                        error: "exit status 1",
                        result: None,
                    },
                ],
            ),
        ),
        (
            "stop",
            items(
                FrameType::Stop,
                12,
                &[Stop {
                    request_id: id(3),
                    grace_ms: 2000,
                }],
            ),
        ),
        (
            "stop_answer",
            items(
                FrameType::StopAnswer,
                12,
                &[StopAnswer {
                    request_id: id(3),
                    code: Code::Ok,
                    status: Some(TaskStatus::Stopping),
                }],
            ),
        ),
        (
            "wait",
            written(|out| {
                Wait {
                    task: TaskRef::Request(id(3)),
                    timeout_ms: 30_000,
                    with_result: true,
                }
                .encode(out, 13);
            }),
        ),
        (
            "wait_by_name",
            written(|out| {
                Wait {
                    task: TaskRef::Given {
                        function: "wordcount",
                        key: Some("customer_7"),
                        task_id: "order-42",
                    },
                    timeout_ms: 0,
                    with_result: false,
                }
                .encode(out, 14);
            }),
        ),
        (
            "query",
            written(|out| {
                let query = Query {
                    operation: Operation::FunctionGet,
                    json: r#"{"function":"digest"}"#,
                };
                assert!(query.encode(out, 15));
            }),
        ),
        (
            "query_answer",
            written(|out| {
                let answer = QueryAnswer {
                    code: Code::Ok,
                    json: r#"{"function":"digest","retries":3}"#,
                };
                assert!(answer.encode(out, 15));
            }),
        ),
        (
            "register",
            written(|out| {
                Register {
                    slots: 0,
                    cpu_millis: 2000,
                    memory_mib: 512,
                    offers: vec![
                        Offer {
                            function: "digest",
                            slots: 16,
                        },
                        Offer {
                            function: "wordcount",
                            slots: 4,
                        },
                    ],
                }
                .encode(out, 2);
            }),
        ),
        (
            "registered",
            written(|out| {
                Registered {
                    first_index: 0,
                    codes: vec![Code::Ok, Code::PermissionDenied],
                }
                .encode(out, 2);
            }),
        ),
        (
            "execute",
            items(
                FrameType::Execute,
                77,
                &[
                    ExecuteTask {
                        request_id: id(0),
                        token: Token {
                            generation: 0,
                            attempt: 1,
                        },
                        function: 0,
                        attempts_max: 4,
                        timeout_ms: 60_000,
                        task_id: None,
                        key: None,
                        content_type: "",
                        traceparent: None,
                        payload: b"plain",
                    },
                    ExecuteTask {
                        request_id: id(1),
                        token: Token {
                            generation: 1,
                            attempt: 2,
                        },
                        function: 1,
                        attempts_max: 4,
                        timeout_ms: 1_000,
                        task_id: Some("order-42"),
                        key: Some("customer_7"),
                        content_type: "text/plain",
                        traceparent: Some(TRACEPARENT),
                        payload: b"hello",
                    },
                ],
            ),
        ),
        (
            "outcome",
            items(
                FrameType::Outcome,
                6,
                &[
                    TaskOutcome {
                        run_us: 1234,
                        result: b"done",
                        ..TaskOutcome::new(lease(0), OutcomeStatus::Succeeded)
                    },
                    TaskOutcome {
                        retry_after_ms: 500,
                        error: "busy",
                        output: b"stderr\n",
                        ..TaskOutcome::new(lease(1), OutcomeStatus::Throttled)
                    },
                ],
            ),
        ),
        (
            "outcome_ack",
            items(
                FrameType::OutcomeAck,
                6,
                &[RefusedOutcome {
                    index: 1,
                    code: Code::StaleLease,
                }],
            ),
        ),
        (
            "cancel",
            items(
                FrameType::Cancel,
                78,
                &[Cancel {
                    lease: lease(1),
                    grace_ms: 2000,
                }],
            ),
        ),
        ("resume", items(FrameType::Resume, 7, &[lease(1), lease(2)])),
        (
            "resumed",
            items(
                FrameType::Resumed,
                7,
                &[ResumedLease::Kept, ResumedLease::Known],
            ),
        ),
    ]
}

fn read(bytes: &[u8]) -> Frame {
    let mut reader = FrameReader::new(FRAME_BYTES_MAX);
    reader.feed(Bytes::copy_from_slice(bytes));
    let frame = reader.next().unwrap().unwrap();
    assert!(reader.at_boundary());
    frame
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn text(bytes: &[u8]) -> Value {
    json!(String::from_utf8_lossy(bytes))
}

fn lease_json(lease: Lease) -> Value {
    json!({
        "request_id": lease.request_id.to_string(),
        "generation": lease.token.generation,
        "attempt": lease.token.attempt,
    })
}

fn list<'a, T: Item<'a>>(
    frame: &'a Frame,
    show: impl Fn(T) -> Value,
) -> Result<Value, pelton_net::error::ProtocolError> {
    Ok(Items::<T>::parse(frame)?.iter().map(show).collect())
}

/// The body's fields as the vectors show them. Goes through every decoder there is.
fn fields(frame: &Frame) -> Result<Value, pelton_net::error::ProtocolError> {
    Ok(match frame.kind {
        FrameType::Unknown | FrameType::Goodbye => json!({}),
        FrameType::Hello => {
            let hello = Hello::parse(frame)?;
            json!({
                "protocol": hello.protocol,
                "key": match hello.credential {
                    Credential::None => Value::Null,
                    Credential::Key(key) => text(key),
                },
                "tenant": hello.tenant,
                "client": hello.client,
                "executor": hello.executor.map(|executor| format!("{executor:016x}")),
            })
        }
        FrameType::Welcome => {
            let welcome = Welcome::parse(frame)?;
            json!({
                "protocol": welcome.protocol,
                "server": format!("{:016x}", welcome.server),
                "frame_bytes_max": welcome.frame_bytes_max,
                "payload_bytes_max": welcome.payload_bytes_max,
                "in_flight_tasks_max": welcome.in_flight_tasks_max,
                "heartbeat_ms": welcome.heartbeat_ms,
                "lease_ms": welcome.lease_ms,
                "tenant": welcome.tenant,
            })
        }
        FrameType::Error => {
            let error = ErrorFrame::parse(frame)?;
            json!({
                "code": error.code.name(),
                "retryable": error.retryable,
                "retry_after_ms": error.retry_after_ms,
                "text": error.text,
            })
        }
        FrameType::Heartbeat | FrameType::HeartbeatAck | FrameType::Resume => {
            list(frame, lease_json)?
        }
        FrameType::Submit => {
            let view = SubmitView::parse(frame)?;
            let functions: Vec<_> = (0..view.function_count())
                .map(|index| view.function(index as u8))
                .collect();
            let tasks: Vec<_> = view
                .tasks(PAYLOAD_BYTES_LIMIT)
                .map(|task| match task {
                    Err(error) => json!({"code": error.code.name(), "error": error.what}),
                    Ok(task) => json!({
                        "function": task.function,
                        "task_id": task.task_id,
                        "key": task.key,
                        "priority": task.priority as u8,
                        "durability": match task.durability {
                            Durability::Disk => "disk",
                            Durability::Memory => "memory",
                        },
                        "delay_ms": match task.start { Start::DelayMs(delay) => Some(delay), Start::Now | Start::AtMs(_) => None },
                        "at_ms": match task.start { Start::AtMs(at) => Some(at), Start::Now | Start::DelayMs(_) => None },
                        "cost": task.cost,
                        "max_age_s": task.max_age_s,
                        "content_type": task.content_type,
                        "traceparent": task.traceparent.map(|bytes| text(bytes)),
                        "tags": task.tags.iter().collect::<Vec<_>>(),
                        "payload_hash": task.payload_hash.map(|hash| format!("{hash:016x}")),
                        "payload": text(task.payload),
                    }),
                })
                .collect();
            json!({
                "notify": view.notify(),
                "with_result": view.with_result(),
                "functions": functions,
                "tasks": tasks,
            })
        }
        FrameType::SubmitAnswer => {
            let view = AnswerView::parse(frame)?;
            assert_eq!(view.len(), view.iter().count());
            view.iter()
                .map(|answer| {
                    json!({
                        "index": answer.index,
                        "code": answer.code.name(),
                        "durable": answer.flags & ANSWER_DURABLE != 0,
                        "duplicate": answer.flags & ANSWER_DUPLICATE != 0,
                        "retry_after_ms": answer.retry_after_ms,
                        "request_id": answer.request_id.to_string(),
                        "text": answer.text,
                    })
                })
                .collect()
        }
        FrameType::Finished => list(frame, |finished: Finished<'_>| {
            json!({
                "submit_tag": finished.tag,
                "index": finished.index,
                "request_id": finished.request_id.to_string(),
                "status": finished.status.name(),
                "code": finished.code.name(),
                "attempts": finished.attempts,
                "error": finished.error,
                "result": finished.result.map(text),
            })
        })?,
        FrameType::Stop => list(
            frame,
            |stop: Stop| json!({"request_id": stop.request_id.to_string(), "grace_ms": stop.grace_ms}),
        )?,
        FrameType::StopAnswer => list(frame, |answer: StopAnswer| {
            json!({
                "request_id": answer.request_id.to_string(),
                "code": answer.code.name(),
                "status": answer.status.map(TaskStatus::name),
            })
        })?,
        FrameType::Wait => {
            let wait = Wait::parse(frame)?;
            json!({
                "task": match wait.task {
                    TaskRef::Request(id) => id.to_string(),
                    TaskRef::Given { function, key: None, task_id } => format!("{function}/{task_id}"),
                    TaskRef::Given { function, key: Some(key), task_id } => format!("{function}/{key}/{task_id}"),
                },
                "timeout_ms": wait.timeout_ms,
                "with_result": wait.with_result,
            })
        }
        FrameType::Query => {
            let query = Query::parse(frame)?;
            json!({"operation": query.operation as u16, "json": query.json})
        }
        FrameType::QueryAnswer => {
            let answer = QueryAnswer::parse(frame)?;
            json!({"code": answer.code.name(), "json": answer.json})
        }
        FrameType::Register => {
            let register = Register::parse(frame)?;
            json!({
                "slots": register.slots,
                "cpu_millis": register.cpu_millis,
                "memory_mib": register.memory_mib,
                "functions": register.offers.iter().map(|offer| json!({"function": offer.function, "slots": offer.slots})).collect::<Vec<_>>(),
            })
        }
        FrameType::Registered => {
            let registered = Registered::parse(frame)?;
            json!({
                "first_index": registered.first_index,
                "codes": registered.codes.iter().map(|code| code.name()).collect::<Vec<_>>(),
            })
        }
        FrameType::Execute => list(frame, |task: ExecuteTask<'_>| {
            json!({
                "request_id": task.request_id.to_string(),
                "generation": task.token.generation,
                "attempt": task.token.attempt,
                "function": task.function,
                "attempts_max": task.attempts_max,
                "timeout_ms": task.timeout_ms,
                "task_id": task.task_id,
                "key": task.key,
                "content_type": task.content_type,
                "traceparent": task.traceparent.map(|bytes| text(bytes)),
                "payload": text(task.payload),
            })
        })?,
        FrameType::Outcome => list(frame, |outcome: TaskOutcome<'_>| {
            json!({
                "request_id": outcome.request_id.to_string(),
                "generation": outcome.token.generation,
                "attempt": outcome.token.attempt,
                "status": outcome.status as u8,
                "retry_after_ms": outcome.retry_after_ms,
                "run_us": outcome.run_us,
                "error": outcome.error,
                "output": text(outcome.output),
                "result": text(outcome.result),
            })
        })?,
        FrameType::OutcomeAck => list(
            frame,
            |refused: RefusedOutcome| json!({"index": refused.index, "code": refused.code.name()}),
        )?,
        FrameType::Cancel => list(frame, |cancel: Cancel| {
            let mut value = lease_json(cancel.lease);
            value["grace_ms"] = json!(cancel.grace_ms);
            value
        })?,
        FrameType::Resumed => list(frame, |lease: ResumedLease| json!(lease as u8))?,
    })
}

/// Set `PELTON_BLESS=1` to write the file anew after a deliberate change of the protocol.
#[test]
fn golden_bytes_match_the_code() {
    let vectors: Vec<Value> = examples()
        .iter()
        .map(|(name, bytes)| {
            let frame = read(bytes);
            json!({
                "name": name,
                "type": frame.number,
                "flags": frame.flags,
                "count": frame.count,
                "tag": frame.tag,
                "fields": fields(&frame).unwrap(),
                "hex": hex(bytes),
            })
        })
        .collect();
    let codes: Vec<Value> = Code::ALL
        .iter()
        .map(|code| json!({"number": *code as u16, "name": code.name(), "retryable": code.retryable()}))
        .collect();
    let text = serde_json::to_string_pretty(
        &json!({"protocol": "pelton/1", "codes": codes, "frames": vectors}),
    )
    .unwrap()
        + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol-vectors.json");
    if std::env::var_os("PELTON_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap();
    assert!(golden == text, "docs/protocol-vectors.json differs");
}

#[test]
fn every_type_has_a_golden_frame() {
    let examples = examples();
    for &kind in FrameType::ALL {
        assert!(
            examples.iter().any(|(_, bytes)| bytes[4] == kind as u8),
            "{kind:?}"
        );
        assert_eq!(FrameType::from_number(kind as u8), kind);
    }
}

/// A body cut short is refused, except where what is left is a whole body by itself: a JSON text or an error's
/// sentence may end anywhere, and an answer's table of texts may be missing as a whole.
#[test]
fn a_frame_cut_at_any_byte_is_refused_and_never_panics() {
    for (name, bytes) in examples() {
        let frame = read(&bytes);
        for len in 0..frame.body.len() {
            let cut = Frame {
                body: frame.body.slice(..len),
                ..frame.clone()
            };
            let answer = fields(&cut);
            let may_end_here = match frame.kind {
                FrameType::Query | FrameType::QueryAnswer => len >= 4,
                FrameType::Error => len >= 8,
                FrameType::SubmitAnswer => len == usize::from(frame.count) * 32,
                _ => false,
            };
            if !may_end_here {
                assert!(answer.is_err(), "{name} cut at {len}");
            }
        }
    }
}

#[test]
fn a_frame_with_any_bit_flipped_never_panics() {
    for (_, bytes) in examples() {
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut reader = FrameReader::new(FRAME_BYTES_MAX);
            reader.feed(Bytes::from(flipped));
            while let Ok(Some(frame)) = reader.next() {
                let _ = fields(&frame);
            }
        }
    }
}

#[test]
fn a_task_that_breaks_a_rule_is_refused_alone() {
    let big = vec![0; 2000];
    let mut out = BytesMut::new();
    let mut writer = SubmitWriter::begin(&mut out, 1, 0, &["f"], FRAME_BYTES_MAX);
    let good = SubmitTask::new(b"x");
    let cases = [
        (good, None),
        (
            SubmitTask {
                task_id: Some("9"),
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                task_id: Some("t0123456789abcdef0123456789abcdef"),
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                key: Some("a/b"),
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask { cost: 1001, ..good },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                max_age_s: 604_801,
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                start: Start::DelayMs(u64::MAX),
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                content_type: "a\nb",
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                traceparent: Some(&[b'0'; 55]),
                ..good
            },
            Some(Code::InvalidArgument),
        ),
        (
            SubmitTask {
                payload: &big,
                ..good
            },
            Some(Code::PayloadTooLarge),
        ),
        (good, None),
    ];
    for (task, _) in &cases {
        writer.push(task).unwrap();
    }
    writer.finish();
    let frame = read(&out);
    let view = SubmitView::parse(&frame).unwrap();
    let got: Vec<_> = view
        .tasks(1000)
        .map(|task| task.err().map(|error| error.code))
        .collect();
    let want: Vec<_> = cases.iter().map(|(_, code)| *code).collect();
    assert_eq!(got, want);
}

#[test]
fn a_writer_refuses_what_its_frame_cannot_hold() {
    let mut out = BytesMut::new();
    let mut writer = SubmitWriter::begin(&mut out, 1, 0, &["f", "9"], FRAME_BYTES_MAX);
    for _ in 0..SUBMIT_TASKS_MAX {
        writer.push(&SubmitTask::new(b"")).unwrap();
    }
    assert_eq!(writer.push(&SubmitTask::new(b"")), Err(PushError::Full));
    writer.finish();
    let before = out.len();
    let mut writer = SubmitWriter::begin(&mut out, 1, 0, &["f", "9"], FRAME_BYTES_MAX);
    let payload = vec![0; PAYLOAD_BYTES_LIMIT];
    writer.push(&SubmitTask::new(&payload)).unwrap();
    assert_eq!(
        writer.push(&SubmitTask::new(&payload)),
        Err(PushError::Full)
    );
    let nameless = SubmitTask {
        function: 1,
        ..SubmitTask::new(b"")
    };
    assert!(matches!(writer.push(&nameless), Err(PushError::Invalid(_))));
    drop(writer);
    assert_eq!(out.len(), before, "a dropped writer takes its frame back");

    let mut out = BytesMut::new();
    let mut writer = ItemWriter::begin(&mut out, FrameType::Heartbeat, 1);
    while writer.push(&lease(1)) != Err(Full) {}
    writer.finish();
    assert!(out.len() <= CONTROL_FRAME_BYTES_MAX);
    assert_eq!(read(&out).count, 2048);
}

#[test]
fn accepted_tasks_with_ids_in_sequence_take_one_run() {
    let mut out = BytesMut::new();
    let mut writer = AnswerWriter::begin(&mut out, 1);
    for step in [1i64, -1] {
        for nth in 0..256u16 {
            let slot = (1000 + step * i64::from(nth)) as u32;
            writer.push(&TaskAnswer {
                index: nth + if step > 0 { 0 } else { 256 },
                code: Code::Ok,
                flags: ANSWER_DURABLE,
                retry_after_ms: 0,
                request_id: RequestId::new(CellId(9), 5, u64::from(nth), SlotIndex(slot)),
                text: "",
            });
        }
    }
    writer.finish();
    let frame = read(&out);
    assert_eq!((frame.count, frame.body.len()), (2, 64));
    let view = AnswerView::parse(&frame).unwrap();
    assert_eq!(view.accepted(), 512);
    for (nth, answer) in view.iter().enumerate() {
        assert_eq!(usize::from(answer.index), nth);
        assert_eq!(answer.request_id.seq(), nth as u64 % 256);
        let slot = if nth < 256 {
            1000 + nth
        } else {
            1000 - (nth - 256)
        };
        assert_eq!(answer.request_id.slot().0 as usize, slot);
    }
}

/// Prints the cost of a decode; run it with `--release -- --nocapture` for figures.
#[test]
fn decoding_touches_every_task_once() {
    let payload = [7; 256];
    let out = written(|out| {
        let mut writer = SubmitWriter::begin(out, 1, 0, &["digest"], FRAME_BYTES_MAX);
        for _ in 0..512 {
            writer.push(&SubmitTask::new(&payload)).unwrap();
        }
        writer.finish();
    });
    let frame = read(&out);
    let rounds = if cfg!(debug_assertions) { 10 } else { 2000 };
    let start = std::time::Instant::now();
    let mut tasks = 0u32;
    for _ in 0..rounds {
        let view = SubmitView::parse(std::hint::black_box(&frame)).unwrap();
        for task in view.tasks(PAYLOAD_BYTES_LIMIT) {
            std::hint::black_box(task.unwrap());
            tasks += 1;
        }
    }
    assert_eq!(tasks, rounds * 512);
    println!("submit decode: {:?} a task", start.elapsed() / tasks);

    let task = ExecuteTask {
        request_id: id(1),
        token: Token::default(),
        function: 0,
        attempts_max: 4,
        timeout_ms: 1,
        task_id: None,
        key: None,
        content_type: "",
        traceparent: None,
        payload: &payload,
    };
    let mut out = BytesMut::with_capacity(1 << 20);
    let start = std::time::Instant::now();
    for _ in 0..rounds {
        out.clear();
        let mut writer = ItemWriter::begin(&mut out, FrameType::Execute, 1);
        for _ in 0..512 {
            writer.push(&task).unwrap();
        }
        writer.finish();
    }
    println!("execute encode: {:?} a task", start.elapsed() / tasks);
    let frame = read(&out);
    let start = std::time::Instant::now();
    for _ in 0..rounds {
        for task in Items::<ExecuteTask<'_>>::parse(std::hint::black_box(&frame))
            .unwrap()
            .iter()
        {
            std::hint::black_box(task);
        }
    }
    println!("execute decode: {:?} a task", start.elapsed() / tasks);

    let outcome = TaskOutcome::new(lease(1), OutcomeStatus::Succeeded);
    let mut out = BytesMut::with_capacity(1 << 20);
    let start = std::time::Instant::now();
    for _ in 0..rounds {
        out.clear();
        let mut writer = ItemWriter::begin(&mut out, FrameType::Outcome, 1);
        for _ in 0..512 {
            writer.push(&outcome).unwrap();
        }
        writer.finish();
    }
    println!("outcome encode: {:?} a task", start.elapsed() / tasks);
    let frame = read(&out);
    let start = std::time::Instant::now();
    for _ in 0..rounds {
        for outcome in Items::<TaskOutcome<'_>>::parse(std::hint::black_box(&frame))
            .unwrap()
            .iter()
        {
            std::hint::black_box(outcome);
        }
    }
    println!("outcome decode: {:?} a task", start.elapsed() / tasks);
}
