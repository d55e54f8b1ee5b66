//! The server's side: a port bound once per edge thread, and connections as far as the end of their handshake.
//!
//! The sockets are made on one thread, where a busy port can be told, and travel to the edge threads, whose runtimes turn
//! them into endpoints. All of them share the certificate, the key of address tokens and the key of stateless resets.

use std::fmt;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pelton_core::limits::EDGE_COUNT_MAX;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, ServerConfig};
use socket2::{Domain, Protocol, Socket, Type};

use super::certificate::{Certificate, CertificateError};
use super::socket::{self, enlarge_buffers};
use super::steering::{SteeredIds, steer};
use super::transport::{HANDSHAKE_TIMEOUT, Path, Side, transport};

/// Connections of one socket that wait for their first look; beyond it packets of new ones are dropped.
pub const INCOMING_MAX: usize = 1024;
/// Bytes kept for one of them, and for all together: first flights are small.
const INCOMING_BUFFER_BYTES: u64 = 16 << 10;
const INCOMING_BUFFER_TOTAL_BYTES: u64 = 4 << 20;
/// Handshakes of one socket under way; beyond it new ones are refused.
pub const HALF_OPEN_MAX: usize = 1024;
/// From here on a client must first prove that it receives at its address.
pub const HALF_OPEN_RETRY: usize = 64;

const _: () = assert!(INCOMING_MAX <= 4096 && HALF_OPEN_RETRY < HALF_OPEN_MAX);

/// Binding a port of the kernel's choice is tried this often: between two steps another process may take it.
const PORT_TRIES: usize = 8;

/// Why a listener is not there.
#[derive(Debug)]
pub enum BindError {
    /// Another process, or this one, listens there already.
    AddressInUse(SocketAddr),
    /// The number of sockets is 0 or more than `EDGE_COUNT_MAX`.
    SocketCount(usize),
    /// The certificate cannot be used.
    Certificate(CertificateError),
    /// The system refused something else.
    Socket {
        /// Which step.
        step: &'static str,
        /// For which address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BindError::AddressInUse(address) => write!(
                f,
                "UDP {address} is in use; stop the process that listens there or choose another address"
            ),
            BindError::SocketCount(count) => write!(
                f,
                "a listener has 1 to {EDGE_COUNT_MAX} sockets, {count} were asked for"
            ),
            BindError::Certificate(source) => source.fmt(f),
            BindError::Socket {
                step,
                address,
                source,
            } => write!(f, "UDP {address}: {step}: {source}"),
        }
    }
}

impl std::error::Error for BindError {}

/// One bound socket of a listener, on its way to the thread that will own it.
pub struct EdgeSocket {
    socket: UdpSocket,
    address: SocketAddr,
    endpoint: EndpointConfig,
    loopback: Arc<ServerConfig>,
    network: Arc<ServerConfig>,
}

/// Binds `address` once for each of `count` edge threads. Port 0 lets the kernel choose one port for all of them.
pub fn bind(
    address: SocketAddr,
    count: usize,
    certificate: &Certificate,
) -> Result<Vec<EdgeSocket>, BindError> {
    if count == 0 || count > EDGE_COUNT_MAX {
        return Err(BindError::SocketCount(count));
    }
    let tls = certificate
        .server_config()
        .map_err(BindError::Certificate)?;
    let tls = QuicServerConfig::try_from(Arc::new(tls))
        .expect("the provider has the cipher suite that QUIC starts with");
    // Cloned, not made twice: the key of address tokens is drawn here and shared by all sockets.
    let mut loopback = ServerConfig::with_crypto(Arc::new(tls));
    loopback
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL_BYTES)
        .migration(true);
    let mut network = loopback.clone();
    loopback.transport_config(Arc::new(transport(Side::Server, Path::Loopback)));
    network.transport_config(Arc::new(transport(Side::Server, Path::Network)));
    let (loopback, network) = (Arc::new(loopback), Arc::new(network));

    let endpoint = EndpointConfig::new(Arc::new(certificate.reset_key()));

    let sockets = bind_sockets(address, count)?;
    let socket_count = count as u16;
    if count > 1 {
        steer(&sockets[0], socket_count).map_err(|source| BindError::Socket {
            step: "steering connections to their sockets",
            address,
            source,
        })?;
    }
    sockets
        .into_iter()
        .enumerate()
        .map(|(index, socket)| {
            let address = socket.local_addr().map_err(|source| BindError::Socket {
                step: "asking for the bound address",
                address,
                source,
            })?;
            let mut endpoint = endpoint.clone();
            let index = index as u8;
            endpoint.cid_generator(move || Box::new(SteeredIds::new(index, socket_count)));
            Ok(EdgeSocket {
                socket,
                address,
                endpoint,
                loopback: loopback.clone(),
                network: network.clone(),
            })
        })
        .collect()
}

/// A shared port is first bound alone: with `SO_REUSEPORT` a second process would silently get a part of the packets.
fn bind_sockets(address: SocketAddr, count: usize) -> Result<Vec<UdpSocket>, BindError> {
    let alone = bind_socket(address, false)?;
    if count == 1 {
        return Ok(vec![alone]);
    }
    let mut probe = Some(alone);
    let mut last = BindError::AddressInUse(address);
    for _ in 0..PORT_TRIES {
        let alone = match probe.take() {
            Some(alone) => alone,
            None => bind_socket(address, false)?,
        };
        let chosen = alone.local_addr().map_err(|source| BindError::Socket {
            step: "asking for the bound address",
            address,
            source,
        })?;
        drop(alone);
        let sockets: Result<Vec<_>, _> = (0..count).map(|_| bind_socket(chosen, true)).collect();
        match sockets {
            Ok(sockets) => return Ok(sockets),
            Err(error) if address.port() != 0 => return Err(error),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn bind_socket(address: SocketAddr, shared: bool) -> Result<UdpSocket, BindError> {
    let error = |step| {
        move |source: io::Error| {
            if source.kind() == io::ErrorKind::AddrInUse {
                BindError::AddressInUse(address)
            } else {
                BindError::Socket {
                    step,
                    address,
                    source,
                }
            }
        }
    };
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )
    .map_err(error("making a socket"))?;
    socket
        .set_nonblocking(true)
        .map_err(error("making the socket non-blocking"))?;
    if shared {
        socket
            .set_reuse_port(true)
            .map_err(error("sharing the port"))?;
    }
    enlarge_buffers(&socket);
    socket.bind(&address.into()).map_err(error("binding"))?;
    Ok(socket.into())
}

impl EdgeSocket {
    /// The address with the port that is really bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that the kernel keeps for this socket's received packets, as granted.
    pub fn receive_buffer_bytes(&self) -> io::Result<usize> {
        socket2::SockRef::from(&self.socket).recv_buffer_size()
    }

    /// Starts serving on the current tokio runtime, whose thread owns the endpoint from now on.
    pub fn listen(self) -> io::Result<Listener> {
        let endpoint = socket::endpoint(self.endpoint, Some((*self.network).clone()), self.socket)?;
        Ok(Listener {
            endpoint,
            loopback: self.loopback,
            network: self.network,
            half_open: Arc::new(AtomicUsize::new(0)),
        })
    }
}

/// One edge's endpoint. Owned by the runtime in which it was made.
pub struct Listener {
    endpoint: Endpoint,
    loopback: Arc<ServerConfig>,
    network: Arc<ServerConfig>,
    half_open: Arc<AtomicUsize>,
}

impl Listener {
    /// The next client that knocks, or `None` once the endpoint is closed. To be finished in a task of its own, so that
    /// a slow client does not keep others waiting.
    pub async fn accept(&self) -> Option<Handshake> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let half_open = self.half_open.load(Ordering::Relaxed);
            if half_open >= HALF_OPEN_MAX {
                incoming.refuse();
                continue;
            }
            if half_open >= HALF_OPEN_RETRY && incoming.may_retry() {
                // A failure here means that the client has proved its address already, which `may_retry` excludes.
                let _ = incoming.retry();
                continue;
            }
            let config = match Path::to(incoming.remote_address().ip()) {
                Path::Loopback => &self.loopback,
                Path::Network => &self.network,
            };
            // A first packet that cannot be decrypted is no client.
            let address_proved = incoming.remote_address_validated();
            if let Ok(connecting) = incoming.accept_with(config.clone()) {
                self.half_open.fetch_add(1, Ordering::Relaxed);
                return Some(Handshake {
                    connecting,
                    address_proved,
                    _half_open: HalfOpen(self.half_open.clone()),
                });
            }
        }
    }

    /// The endpoint, to close it and to wait until it is idle.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

/// A handshake under way.
pub struct Handshake {
    connecting: quinn::Connecting,
    address_proved: bool,
    _half_open: HalfOpen,
}

impl Handshake {
    /// Where the client seems to be.
    pub fn remote_address(&self) -> SocketAddr {
        self.connecting.remote_address()
    }

    /// True if the client has shown that it receives at that address before anything was done for it.
    pub fn address_proved(&self) -> bool {
        self.address_proved
    }

    /// Waits for the end of the handshake, at most `HANDSHAKE_TIMEOUT`.
    pub async fn finish(self) -> Result<Connection, ConnectionError> {
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, self.connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(ConnectionError::TimedOut),
        }
    }
}

/// Counts a handshake for as long as it lives.
struct HalfOpen(Arc<AtomicUsize>);

impl Drop for HalfOpen {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
