//! Frames: however a stream is cut into pieces, the same frames come out of it; and every body, of both directions, is
//! read as what was sent or refused. A body that was read can be written and reads the same again.
//!
//! The first byte says how: even, the rest is a stream; odd, it is one body, with the type, flags and count before it.

use bytes::{Bytes, BytesMut};
use pelton_core::{
    error::Code,
    limits::{CONTENT_TYPE_BYTES_MAX, ERROR_BYTES_MAX, FRAME_BYTES_MAX, NAME_BYTES_MAX},
};
use pelton_net::{
    execute::{
        Cancel, ExecuteTask, RefusedOutcome, Register, Registered, ResumedLease, TaskOutcome,
    },
    frame::{Frame, FrameReader, FrameType},
    item::{Item, ItemWriter, Items},
    query::{Query, QueryAnswer},
    session::{ErrorFrame, Hello, Lease, Welcome},
    submit::{
        ANSWER_DUPLICATE, ANSWER_DURABLE, AnswerView, AnswerWriter, Finished, PushError, Stop,
        StopAnswer, SubmitTask, SubmitView, SubmitWriter, TaskAnswer, Wait,
    },
};

use crate::Input;

/// A payload that is larger is refused, so that this is tried too.
const PAYLOAD_BYTES_MAX: usize = 512;
const TAG: u64 = 7;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let how = input.byte();
    if how % 2 == 0 {
        stream(usize::from(how / 2), input.0);
        return;
    }
    let number = usize::from(input.byte());
    let kind = FrameType::ALL[number % FrameType::ALL.len()];
    let flags = input.byte();
    let count = usize::from(input.u16()).min(kind.count_max()) as u16;
    if input.0.len() > kind.body_bytes_max() {
        return;
    }
    body(&Frame {
        kind,
        number: kind as u8,
        flags,
        count,
        tag: TAG,
        body: Bytes::copy_from_slice(input.0),
    });
}

fn stream(piece: usize, stream: &[u8]) {
    let whole = cut(stream, stream.len());
    assert_eq!(
        cut(stream, piece + 1),
        whole,
        "the pieces of a stream do not matter"
    );
    for frame in &whole.0 {
        assert!(frame.body.len() <= frame.kind.body_bytes_max());
        assert!(
            usize::from(frame.count) <= frame.kind.count_max() || frame.kind == FrameType::Unknown
        );
        body(frame);
    }
}

/// The frames of a stream that comes in pieces, and whether it may end there; `None` where it broke.
fn cut(stream: &[u8], piece: usize) -> (Vec<Frame>, Option<bool>) {
    let mut reader = FrameReader::new(FRAME_BYTES_MAX);
    let mut frames = Vec::new();
    for chunk in stream.chunks(piece.max(1)) {
        reader.feed(Bytes::copy_from_slice(chunk));
        loop {
            match reader.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, None),
            }
        }
    }
    (frames, Some(reader.at_boundary()))
}

/// Reads a body; where the writer keeps all of what was read, writes that and reads it again.
macro_rules! again {
    ($frame:expr, $body:ty) => {
        again!($frame, $body, |_| true)
    };
    ($frame:expr, $body:ty, $kept:expr) => {
        again!($frame, $body, $kept, |read, out| read.encode(out, TAG))
    };
    ($frame:expr, $body:ty, $kept:expr, |$read:ident, $out:ident| $write:expr) => {
        if let Ok($read) = <$body>::parse($frame) {
            let kept: fn(&$body) -> bool = $kept;
            if kept(&$read) {
                let frame = sent(|$out| $write);
                assert_eq!(<$body>::parse(&frame), Ok($read));
            }
        }
    };
}

/// The same for a frame that is a list.
macro_rules! items {
    ($frame:expr, $item:ty) => {
        items!($frame, $item, |_| true)
    };
    ($frame:expr, $item:ty, $kept:expr) => {
        if let Ok(read) = Items::<$item>::parse($frame) {
            assert_eq!(read.iter().count(), usize::from($frame.count));
            let kept: fn(&$item) -> bool = $kept;
            if read.iter().all(|item| kept(&item)) {
                let frame = sent(|out| write_items(out, $frame.kind, read.iter()));
                let again = Items::<$item>::parse(&frame).expect("what is written can be read");
                assert!(again.iter().eq(read.iter()));
            }
        }
    };
}

fn body(frame: &Frame) {
    match frame.kind {
        FrameType::Unknown => assert!(frame.body.is_empty()),
        FrameType::Goodbye => {}
        // A name that is only for logs is cut to the length of a name.
        FrameType::Hello => again!(frame, Hello<'_>, |hello| hello.client.len()
            <= NAME_BYTES_MAX),
        FrameType::Welcome => again!(frame, Welcome<'_>),
        FrameType::Error => again!(frame, ErrorFrame<'_>, |error| {
            error.text.len() <= ERROR_BYTES_MAX
        }),
        FrameType::Heartbeat | FrameType::HeartbeatAck | FrameType::Resume => {
            items!(frame, Lease);
        }
        // What a server never accepted, it need not be able to hand out.
        FrameType::Execute => items!(frame, ExecuteTask<'_>, |task| {
            task.content_type.len() <= CONTENT_TYPE_BYTES_MAX
        }),
        FrameType::Outcome => items!(frame, TaskOutcome<'_>),
        FrameType::OutcomeAck => items!(frame, RefusedOutcome),
        FrameType::Cancel => items!(frame, Cancel),
        FrameType::Resumed => items!(frame, ResumedLease),
        FrameType::Finished => items!(frame, Finished<'_>, |finished| {
            finished.error.len() <= ERROR_BYTES_MAX
        }),
        FrameType::Stop => items!(frame, Stop),
        FrameType::StopAnswer => items!(frame, StopAnswer),
        FrameType::Wait => again!(frame, Wait<'_>),
        FrameType::Query => again!(frame, Query<'_>, |_| true, |query, out| assert!(
            query.encode(out, TAG)
        )),
        FrameType::QueryAnswer => again!(frame, QueryAnswer<'_>, |_| true, |answer, out| assert!(
            answer.encode(out, TAG)
        )),
        FrameType::Register => again!(frame, Register<'_>),
        FrameType::Registered => again!(frame, Registered),
        FrameType::Submit => submit(frame),
        FrameType::SubmitAnswer => submit_answer(frame),
    }
}

/// A submit's tasks are read one by one; those that are taken are written and read again.
fn submit(frame: &Frame) {
    let Ok(view) = SubmitView::parse(frame) else {
        return;
    };
    let names: Vec<&str> = (0..view.function_count())
        .map(|at| view.function(at as u8).unwrap_or(""))
        .collect();
    let tasks: Vec<SubmitTask<'_>> = view.tasks(PAYLOAD_BYTES_MAX).flatten().collect();
    assert_eq!(view.tasks(PAYLOAD_BYTES_MAX).count(), view.len());
    let mut written = 0;
    let frame = sent(|out| {
        let mut writer = SubmitWriter::begin(out, TAG, 0, &names, FRAME_BYTES_MAX);
        for task in &tasks {
            match writer.push(task) {
                Ok(()) => written += 1,
                Err(PushError::Full) => break,
                Err(PushError::Invalid(error)) => panic!("taken, and then refused: {error:?}"),
            }
        }
        writer.finish();
    });
    let view = SubmitView::parse(&frame).expect("what is written can be read");
    assert!(
        view.tasks(PAYLOAD_BYTES_MAX)
            .map(Result::ok)
            .eq(tasks[..written].iter().copied().map(Some))
    );
}

/// The answers of an honest server are written in fewer or as many runs, and read the same again.
fn submit_answer(frame: &Frame) {
    let Ok(view) = AnswerView::parse(frame) else {
        return;
    };
    let answers: Vec<TaskAnswer<'_>> = view.iter().collect();
    assert_eq!(answers.len(), view.len());
    let accepted = answers
        .iter()
        .filter(|answer| answer.code == Code::Ok)
        .count();
    assert_eq!(accepted, view.accepted());
    let known = ANSWER_DURABLE | ANSWER_DUPLICATE;
    let texts = answers.iter().map(|answer| answer.text.len()).max();
    if answers.iter().any(|answer| answer.flags & !known != 0) || texts > Some(0) {
        return;
    }
    let frame = sent(|out| {
        let mut writer = AnswerWriter::begin(out, TAG);
        for answer in &answers {
            writer.push(answer);
        }
        writer.finish();
    });
    let again = AnswerView::parse(&frame).expect("what is written can be read");
    assert!(again.iter().eq(answers));
}

/// The frame that is written, as it arrives.
fn sent(write: impl FnOnce(&mut BytesMut)) -> Frame {
    let mut out = BytesMut::new();
    write(&mut out);
    let (mut frames, at_boundary) = cut(&out, out.len());
    assert!(frames.len() == 1 && at_boundary == Some(true));
    frames.remove(0)
}

fn write_items<'a, T: Item<'a>>(
    out: &mut BytesMut,
    kind: FrameType,
    items: impl Iterator<Item = T>,
) {
    let mut writer = ItemWriter::begin(out, kind, TAG);
    for item in items {
        writer
            .push(&item)
            .expect("what came in one frame goes into one");
    }
    writer.finish();
}
