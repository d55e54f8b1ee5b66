//! Peers that break the protocol, stall or flood: the server lives on and serves the others.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{net::UdpSocket, time::Duration};

use bytes::{BufMut, BytesMut};
use pelton_client::{Attempt, Client, Code, Task};
use pelton_net::{
    frame::{Frame, FrameType},
    session::{Credential, ErrorFrame, Hello, encode_goodbye},
};
use pelton_tests::{
    Server, ServerOptions, Worker, eventually,
    raw::{Raw, hello},
};

/// A caller and an executor that behave, beside the peers that do not.
struct Others {
    client: Client,
    _worker: Worker,
}

impl Others {
    async fn start(server: &Server) -> Others {
        let echo = async |task: Attempt| Ok(task.payload().to_vec());
        let worker = Worker::of(server.options(), "echo", 4, echo).await;
        let client = server.client().await;
        let known = async || client.submit("echo", Task::new("first")).await.is_ok();
        eventually("the executor is there", known).await;
        Others {
            client,
            _worker: worker,
        }
    }

    /// Both are served on their connections, and so is one that comes now.
    async fn are_served(&self, server: &mut Server) {
        let newcomer = server.client().await;
        for client in [&self.client, &newcomer] {
            let finished = client
                .submit_and_wait("echo", Task::new("hello"))
                .await
                .unwrap();
            assert_eq!(finished.result.as_deref(), Some(&b"hello"[..]));
        }
        assert!(server.lives());
    }
}

/// Bytes of a header.
fn header(length: u32, kind: u8, flags: u8, count: u16, tag: u64) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32_le(length);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u16_le(count);
    out.put_u64_le(tag);
    out
}

fn refusal(frame: &Frame) -> (u64, Code) {
    assert_eq!(frame.kind, FrameType::Error, "{frame:?}");
    (frame.tag, ErrorFrame::parse(frame).unwrap().code)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

#[tokio::test]
async fn garbage_ends_its_own_session_only() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut random = Random(0x5eed);
    for round in 0..60_u64 {
        let greeted = round % 2 == 0;
        let mut raw = match greeted {
            true => Raw::hello(&server, (round % 4 == 0).then_some(round + 1)).await,
            false => Raw::connect(&server).await,
        };
        // Half of them begin as a frame that the server knows, so that its body is looked at.
        let known = FrameType::ALL[random.next() as usize % FrameType::ALL.len()] as u8;
        let length = 1 + random.next() as usize % 300;
        let bytes = random.bytes(length);
        raw.send(|out| {
            if round % 3 > 0 {
                let count = random.next() as u16 % 4;
                out.extend_from_slice(&header(length as u32, known, 0, count, 7));
            }
            out.extend_from_slice(&bytes);
            // Whatever was read as the beginning of a frame is completed or broken by this.
            out.put_bytes(0xff, 64);
        });
        while let Some(frame) = raw.next().await {
            if frame.kind == FrameType::Error && frame.tag == 0 {
                break;
            }
        }
    }
    let noise = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..500 {
        let length = 1 + random.next() as usize % 1_400;
        let bytes = random.bytes(length);
        noise.send_to(&bytes, server.address()).unwrap();
    }
    others.are_served(&mut server).await;
}

#[tokio::test]
async fn a_frame_beyond_its_bound_is_refused_before_its_body_comes() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut raw = Raw::connect(&server).await;
    raw.send(|out| out.extend_from_slice(&header(u32::MAX, FrameType::Hello as u8, 0, 0, 1)));
    let refused = raw.next().await.unwrap();
    assert_eq!(refusal(&refused), (0, Code::PayloadTooLarge));
    raw.ended().await;

    for (kind, length, count, code) in [
        (FrameType::Submit, 2 << 20, 1, Code::PayloadTooLarge),
        (FrameType::Query, 65_537, 0, Code::PayloadTooLarge),
        (FrameType::Submit, 100, 4_097, Code::InvalidArgument),
        (FrameType::Wait, 100, 1, Code::InvalidArgument),
    ] {
        let mut raw = Raw::hello(&server, None).await;
        raw.send(|out| out.extend_from_slice(&header(length, kind as u8, 0, count, 9)));
        let refused = raw.next().await.unwrap();
        assert_eq!(refusal(&refused), (0, code), "{kind:?}");
        raw.ended().await;
    }
    others.are_served(&mut server).await;
}

#[tokio::test]
async fn a_frame_that_makes_no_sense_is_answered_and_the_stream_goes_on() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut raw = Raw::hello(&server, None).await;
    let mut answer = async |bytes: &[u8]| {
        raw.send(|out| out.extend_from_slice(bytes));
        refusal(&raw.next().await.unwrap())
    };
    // A body whose lengths do not add up, an unknown type, an unknown flag, frames that are not a caller's.
    let mut submit = header(5, FrameType::Submit as u8, 0, 1, 11);
    submit.extend_from_slice(&[1, 200, b'x', 0, 0]);
    assert_eq!(answer(&submit).await, (11, Code::InvalidArgument));
    let unknown = header(0, 99, 0, 0, 12);
    assert_eq!(answer(&unknown).await, (12, Code::Unimplemented));
    let flagged = header(0, FrameType::Stop as u8, 0x40, 0, 13);
    assert_eq!(answer(&flagged).await, (13, Code::InvalidArgument));
    let outcome = header(0, FrameType::Outcome as u8, 0, 0, 14);
    assert_eq!(answer(&outcome).await, (14, Code::FailedPrecondition));
    let mut register = header(12, FrameType::Register as u8, 0, 0, 15);
    register.put_bytes(0, 12);
    assert_eq!(answer(&register).await, (15, Code::FailedPrecondition));
    let mut second = BytesMut::new();
    hello(&mut second, None);
    assert_eq!(answer(&second).await, (1, Code::FailedPrecondition));
    // An ignorable frame is passed over: the next answer is for what follows it.
    let mut ignorable = header(3, 99, 0x80, 0, 16);
    ignorable.put_bytes(0, 3);
    ignorable.extend_from_slice(&header(0, 98, 0, 0, 17));
    assert_eq!(answer(&ignorable).await, (17, Code::Unimplemented));
    // The query's operation is not known.
    let mut query = header(6, FrameType::Query as u8, 0, 0, 18);
    query.extend_from_slice(&[0xff, 0xff, 0, 0, b'{', b'}']);
    let (tag, code) = answer(&query).await;
    assert_eq!((tag, code), (18, Code::Unimplemented));
    others.are_served(&mut server).await;
}

#[tokio::test]
async fn a_session_begins_with_a_hello_of_this_version() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut raw = Raw::connect(&server).await;
    raw.send(encode_goodbye);
    let refused = raw.next().await.unwrap();
    assert_eq!(refusal(&refused).1, Code::InvalidArgument);
    raw.ended().await;

    let mut raw = Raw::connect(&server).await;
    raw.send(|out| {
        let later = Hello {
            protocol: 2,
            credential: Credential::None,
            tenant: None,
            client: "",
            executor: None,
        };
        later.encode(out, 5);
    });
    let refused = raw.next().await.unwrap();
    assert_eq!(refusal(&refused), (5, Code::UnsupportedVersion));
    raw.ended().await;
    others.are_served(&mut server).await;
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_sent_away_and_holds_up_nobody() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(Raw::connect(&server).await);
    }
    let mut halves = Vec::new();
    for _ in 0..20 {
        let half = Raw::connect(&server).await;
        half.send(|out| out.extend_from_slice(&header(100, FrameType::Hello as u8, 0, 0, 1)));
        halves.push(half);
    }
    others.are_served(&mut server).await;
    for mut half in halves {
        let refused = half.next().await.unwrap();
        assert_eq!(refusal(&refused), (0, Code::DeadlineExceeded));
        half.ended().await;
    }
    others.are_served(&mut server).await;
}

#[tokio::test]
async fn a_peer_that_never_reads_is_sent_away_and_holds_up_nobody() {
    let mut server = Server::start(ServerOptions::default());
    let others = Others::start(&server).await;
    let mut deaf = Raw::deaf(&server).await;
    deaf.send(|out| hello(out, None));
    // Each is answered with an error that is several times as long.
    let piece: Vec<u8> = (0..1_000)
        .flat_map(|tag| header(0, 99, 0, 0, tag))
        .collect();
    for _ in 0..600 {
        deaf.send(|out| out.extend_from_slice(&piece));
        tokio::task::yield_now().await;
    }
    others.are_served(&mut server).await;
    tokio::time::timeout(Duration::from_secs(30), deaf.ended())
        .await
        .unwrap();
    others.are_served(&mut server).await;
}
