//! A stream of the protocol without a client behind it: single frames, or bytes that are none.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pelton_net::{
    frame::{Frame, FrameReader, FrameType},
    limits::FRAME_BYTES_MAX,
    quic::client::Connector,
    session::{Credential, Hello, PROTOCOL_VERSION},
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{deadline::PATIENCE, server::Server};

/// One connection with one stream. Dropped, it closes the connection.
#[derive(Debug)]
pub struct Raw {
    out: UnboundedSender<Bytes>,
    frames: UnboundedReceiver<Frame>,
}

impl Raw {
    /// Connects and opens a stream, which the server learns of with the first bytes.
    pub async fn connect(server: &Server) -> Raw {
        Raw::open(server, true).await
    }

    /// As `connect`, but nothing is ever read, so that the server's answers pile up.
    pub async fn deaf(server: &Server) -> Raw {
        Raw::open(server, false).await
    }

    /// Connects and says hello; `executor` is the identity of one. The welcome has been read.
    pub async fn hello(server: &Server, executor: Option<u64>) -> Raw {
        let mut raw = Raw::connect(server).await;
        raw.send(|out| hello(out, executor));
        raw.expect(FrameType::Welcome).await;
        raw
    }

    async fn open(server: &Server, reads: bool) -> Raw {
        let connector = Connector::with_keep_alive(
            server.address(),
            server.trust(),
            Duration::from_millis(100),
        );
        let connector = connector.expect("a fingerprint needs no file");
        let connected = connector.connect(server.address(), "localhost").await;
        let connection = connected.expect("the server listens");
        let (mut send, mut receive) = connection.open_bi().await.expect("a stream is free");
        let (out, mut bytes) = unbounded_channel::<Bytes>();
        let (cut, frames) = unbounded_channel();
        tokio::spawn(async move {
            let held = connector;
            let writing = async {
                while let Some(bytes) = bytes.recv().await {
                    if send.write_chunk(bytes).await.is_err() {
                        break;
                    }
                }
            };
            let reading = async {
                let mut reader = FrameReader::new(FRAME_BYTES_MAX);
                let mut buffer = vec![0; 64 << 10];
                while let Ok(Some(length)) = receive.read(&mut buffer).await {
                    reader.feed(Bytes::copy_from_slice(&buffer[..length]));
                    while let Ok(Some(frame)) = reader.next() {
                        if cut.send(frame).is_err() {
                            return;
                        }
                    }
                }
            };
            // The stream ends here when the owner is gone, when the server ends it, or when the connection is lost.
            tokio::select! {
                () = writing => {}
                () = reading, if reads => {}
                _ = connection.closed() => {}
            }
            drop(cut);
            connection.close(0_u32.into(), b"");
            held.endpoint().wait_idle().await;
        });
        Raw { out, frames }
    }

    /// Sends what `write` appends.
    pub fn send(&self, write: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        write(&mut out);
        // A connection that has ended is noticed when the answer is read.
        let _ = self.out.send(out.freeze());
    }

    /// The next frame; `None` if the server has ended the stream.
    pub async fn next(&mut self) -> Option<Frame> {
        let frame = tokio::time::timeout(PATIENCE, self.frames.recv()).await;
        frame.expect("a frame or the end comes in time")
    }

    /// The next frame of this type; heartbeats' answers and the like are passed over.
    pub async fn expect(&mut self, kind: FrameType) -> Frame {
        loop {
            let frame = self.next().await;
            let frame = frame.unwrap_or_else(|| panic!("the stream ended before a {kind:?}"));
            if frame.kind == kind {
                return frame;
            }
            assert_ne!(frame.kind, FrameType::Error, "refused: {frame:?}");
        }
    }

    /// Waits until the connection has ended.
    pub async fn ended(&mut self) {
        while self.next().await.is_some() {}
    }
}

/// The first frame of a client without a key.
pub fn hello(out: &mut BytesMut, executor: Option<u64>) {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        credential: Credential::None,
        tenant: None,
        client: "tests",
        executor,
    };
    hello.encode(out, 1);
}
