//! One connection with one stream of frames in each direction, as far as the welcome.
//!
//! Both directions are cancel-safe: a dropped `ready` has read and written nothing, so they may stand in a `select!`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pelton_net::error::ProtocolError;
use pelton_net::frame::{Frame, FrameReader, FrameType};
use pelton_net::limits::FRAME_BYTES_MAX;
use pelton_net::quic::client::{ConnectError, Connector, endpoint_to};
use pelton_net::session::{Credential, ErrorFrame, Hello, PROTOCOL_VERSION, Welcome};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};

use crate::error::Error;
use crate::options::ClientOptions;

/// What a server may take to answer a hello.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);
/// Pieces of the stream taken at once.
const CHUNKS: usize = 32;
/// The tag of the hello; requests count on from here.
pub(crate) const HELLO_TAG: u64 = 1;

/// What the welcome said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes that a frame's body may have.
    pub frame_bytes_max: usize,
    /// Bytes that a payload or a result may have.
    pub payload_bytes_max: usize,
    /// Tasks that may be submitted and unanswered.
    pub in_flight_tasks_max: usize,
    /// How often an executor shows that it lives.
    pub heartbeat: Duration,
}

/// A connection whose hello was accepted. Owned by one task.
pub(crate) struct Link {
    pub(crate) inbound: Inbound,
    pub(crate) outbound: Outbound,
    pub(crate) limits: Limits,
    held: Held,
}

/// Keeps the connection and its socket alive.
#[derive(Clone)]
pub(crate) struct Held {
    connection: Connection,
    /// `None` where the socket is shared: it belongs to whoever shares it.
    own: Option<Endpoint>,
}

/// One UDP socket for many connections: a single read takes the answers of all of them, where many small requests are in
/// flight on many connections. It is made with the first connection, one for each address family, and belongs to the
/// tokio runtime of that connection.
#[derive(Clone, Default)]
pub struct SharedSocket(Arc<[OnceLock<Endpoint>; 2]>);

impl SharedSocket {
    /// A socket that is made when it is first used.
    pub fn new() -> SharedSocket {
        SharedSocket::default()
    }

    /// Waits until the connections that were closed are gone and their servers have been told.
    pub async fn wait_idle(&self) {
        for endpoint in self.0.iter().filter_map(OnceLock::get) {
            endpoint.wait_idle().await;
        }
    }

    fn endpoint(&self, server: SocketAddr) -> Result<Endpoint, ConnectError> {
        let place = &self.0[usize::from(server.is_ipv6())];
        if let Some(endpoint) = place.get() {
            return Ok(endpoint.clone());
        }
        let made = endpoint_to(server)?;
        Ok(place.get_or_init(|| made).clone())
    }
}

/// What arrives, cut into frames.
pub(crate) struct Inbound {
    receive: RecvStream,
    chunks: [Bytes; CHUNKS],
    next: usize,
    count: usize,
    reader: FrameReader,
}

/// What waits to be written.
pub(crate) struct Outbound {
    send: SendStream,
    queue: VecDeque<Bytes>,
    bytes: usize,
}

impl Link {
    /// Connects and says hello. `executor` is the identity of one, for an executor.
    pub(crate) async fn open(
        options: &ClientOptions,
        executor: Option<u64>,
    ) -> Result<Link, Error> {
        options.check()?;
        let connected = connect(options).await?;
        let (send, receive) = connected
            .connection
            .open_bi()
            .await
            .map_err(|error| Error::Unreachable(error.to_string()))?;
        let mut inbound = Inbound::new(receive);
        let mut outbound = Outbound::new(send);
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            credential: match &options.key {
                Some(key) => Credential::Key(key.as_bytes()),
                None => Credential::None,
            },
            tenant: options.tenant.as_deref(),
            client: &options.client,
            executor,
        };
        let mut buffer = BytesMut::new();
        hello.encode(&mut buffer, HELLO_TAG);
        outbound.queue(buffer.freeze());
        let welcome = async {
            outbound.flush().await?;
            loop {
                if let Some(frame) = inbound.next()? {
                    return Ok(frame);
                }
                inbound.ready().await?;
            }
        };
        let frame = match tokio::time::timeout(WELCOME_TIMEOUT, welcome).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(Error::ConnectionLost(reason))) => return Err(Error::Unreachable(reason)),
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                return Err(Error::Unreachable("the hello was not answered".into()));
            }
        };
        let limits = match frame.kind {
            FrameType::Welcome => limits(&Welcome::parse(&frame)?),
            FrameType::Error => return Err(Error::from_frame(&ErrorFrame::parse(&frame)?)),
            _ => return Err(unexpected(&frame).into()),
        };
        Ok(Link {
            inbound,
            outbound,
            limits,
            held: connected,
        })
    }

    /// Waits until bytes have arrived or some have been written.
    pub(crate) async fn ready(&mut self) -> Result<(), Error> {
        // Writing first: it ends with the queue, whereas reading might never let it have its turn.
        tokio::select! {
            biased;
            written = self.outbound.write(), if !self.outbound.is_empty() => written,
            read = self.inbound.ready() => read,
        }
    }

    /// Parts with the directions, for two owners.
    pub(crate) fn split(self) -> (Inbound, Outbound, Limits, Held) {
        (self.inbound, self.outbound, self.limits, self.held)
    }

    /// Closes the connection and waits until the server has been told.
    pub(crate) async fn close(self) {
        self.held.close().await;
    }

    /// Closes the connection because of what the server sent; it is told why.
    pub(crate) fn abandon(&self, error: &Error) {
        let reason = error.to_string();
        let code = VarInt::from_u32(u32::from(error.number()));
        self.held.connection.close(code, reason.as_bytes());
    }
}

impl Held {
    pub(crate) async fn close(self) {
        self.connection.close(VarInt::from_u32(0), b"");
        if let Some(endpoint) = self.own {
            endpoint.wait_idle().await;
        }
    }
}

/// Tries the addresses of the server's name one after the other.
async fn connect(options: &ClientOptions) -> Result<Held, Error> {
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host(&options.server)
        .await
        .map_err(|error| Error::Unreachable(format!("{}: {error}", options.server)))?
        .collect();
    let mut last = Error::Unreachable(format!("{} has no address", options.server));
    for address in addresses {
        let endpoint = match &options.socket {
            Some(socket) => socket.endpoint(address)?,
            None => endpoint_to(address)?,
        };
        let connector = Connector::over(endpoint, &options.trust, options.keep_alive)?;
        match connector.connect(address, options.certificate_name()).await {
            Ok(connection) => {
                let own = options.socket.is_none();
                return Ok(Held {
                    connection,
                    own: own.then(|| connector.endpoint().clone()),
                });
            }
            Err(error) => {
                last = match Error::from(error) {
                    Error::Unreachable(reason) => {
                        Error::Unreachable(format!("{address}: {reason}"))
                    }
                    other => other,
                }
            }
        }
    }
    Err(last)
}

fn limits(welcome: &Welcome<'_>) -> Limits {
    Limits {
        frame_bytes_max: welcome.frame_bytes_max as usize,
        payload_bytes_max: welcome.payload_bytes_max as usize,
        in_flight_tasks_max: welcome.in_flight_tasks_max.max(1) as usize,
        heartbeat: Duration::from_millis(u64::from(welcome.heartbeat_ms.max(10))),
    }
}

/// A frame that a server does not send to this kind of client at this time.
pub(crate) fn unexpected(frame: &Frame) -> ProtocolError {
    ProtocolError {
        code: pelton_net::Code::InvalidArgument,
        what: match frame.kind {
            FrameType::Unknown => "a frame of an unknown type",
            _ => "a frame of a type that is not expected here",
        },
        offset: 0,
    }
}

impl Inbound {
    fn new(receive: RecvStream) -> Inbound {
        Inbound {
            receive,
            chunks: std::array::from_fn(|_| Bytes::new()),
            next: 0,
            count: 0,
            reader: FrameReader::new(FRAME_BYTES_MAX),
        }
    }

    /// Waits for bytes. To be called when `next` has answered `None`.
    pub(crate) async fn ready(&mut self) -> Result<(), Error> {
        debug_assert!(self.next == self.count, "what has arrived is read first");
        match self.receive.read_chunks(&mut self.chunks).await {
            Ok(Some(count)) => {
                (self.next, self.count) = (0, count);
                Ok(())
            }
            Ok(None) => Err(Error::ConnectionLost("the server ended the stream".into())),
            Err(error) => Err(Error::ConnectionLost(error.to_string())),
        }
    }

    /// The next frame among the bytes that have arrived.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, ProtocolError> {
        loop {
            if let Some(frame) = self.reader.next()? {
                return Ok(Some(frame));
            }
            if self.next == self.count {
                return Ok(None);
            }
            self.reader
                .feed(std::mem::take(&mut self.chunks[self.next]));
            self.next += 1;
        }
    }
}

impl Outbound {
    fn new(send: SendStream) -> Outbound {
        Outbound {
            send,
            queue: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Adds bytes behind those that wait.
    pub(crate) fn queue(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.bytes += bytes.len();
            self.queue.push_back(bytes);
        }
    }

    /// Bytes that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Writes as much as the connection takes, at least something.
    pub(crate) async fn write(&mut self) -> Result<(), Error> {
        match self.send.write_chunks(self.queue.make_contiguous()).await {
            Ok(written) => {
                self.queue.drain(..written.chunks);
                self.bytes -= written.bytes;
                Ok(())
            }
            Err(error) => Err(Error::ConnectionLost(error.to_string())),
        }
    }

    /// Writes everything.
    pub(crate) async fn flush(&mut self) -> Result<(), Error> {
        while !self.is_empty() {
            self.write().await?;
        }
        Ok(())
    }
}
