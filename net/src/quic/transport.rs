//! The settings of a connection: bounds against a peer that floods or stalls, and what makes loopback fast.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

/// Bytes that a peer may have in flight over all streams of a connection.
pub const RECEIVE_WINDOW_BYTES: u32 = 8 << 20;
/// Bytes that a peer may have in flight on one stream.
pub const STREAM_RECEIVE_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes that this side keeps for sending and resending on one connection; then writers wait.
pub const SEND_WINDOW_BYTES: u64 = 8 << 20;
/// Bidirectional streams that a peer may have open.
pub const BIDI_STREAMS_MAX: u32 = 64;
/// A connection without a packet for this long is lost.
pub const IDLE_MS: u32 = 30_000;
/// A client without anything to say sends a packet this often, so that neither side takes the other for lost.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// A handshake takes at most this long.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// What is asked of the kernel for each direction of a socket; it may grant less (`net.core.rmem_max`).
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

const _: () = assert!(KEEP_ALIVE.as_millis() * 2 < IDLE_MS as u128);

/// The largest UDP payload that any path can carry, and so the size of one receive buffer.
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_527;
/// The largest UDP payload over the loopback interface with IPv6, whose headers take 48 of the 65,536 bytes.
const LOOPBACK_MTU: u16 = 65_488;
/// Where the congestion window starts on loopback: there is no path to be gentle to, and a small window is paced with
/// timers of a millisecond.
const LOOPBACK_WINDOW_BYTES: u64 = 4 << 20;

/// Which side of a connection the settings are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Opens the streams and keeps the connection alive.
    Client,
    /// Waits.
    Server,
}

/// What lies between the two sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Path {
    /// One machine: packets as large as the interface takes.
    Loopback,
    /// Anything else: 1,200 bytes at first, then what discovery finds.
    Network,
}

impl Path {
    /// The path to a peer.
    pub fn to(peer: IpAddr) -> Path {
        if peer.to_canonical().is_loopback() {
            Path::Loopback
        } else {
            Path::Network
        }
    }
}

/// The settings of one side of a connection.
pub fn transport(side: Side, path: Path) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let bidi = match side {
        Side::Client => 0,
        Side::Server => BIDI_STREAMS_MAX,
    };
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(bidi))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_MS))));
    match side {
        Side::Client => transport.keep_alive_interval(Some(KEEP_ALIVE)),
        Side::Server => transport.keep_alive_interval(None),
    };
    match path {
        Path::Loopback => {
            let mut congestion = CubicConfig::default();
            congestion.initial_window(LOOPBACK_WINDOW_BYTES);
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(LOOPBACK_MTU);
            transport
                .initial_mtu(LOOPBACK_MTU)
                .mtu_discovery_config(Some(discovery))
                .initial_rtt(Duration::from_millis(1))
                .congestion_controller_factory(Arc::new(congestion))
                // Ten segments of this size are more than one system call can carry.
                .enable_segmentation_offload(false);
        }
        Path::Network => {}
    }
    transport
}

/// Tells the peer how large a packet may be.
pub(crate) fn allow_large_packets(config: &mut EndpointConfig) {
    config
        .max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX)
        .expect("the bound lies between the 1200 and the 65527 that QUIC allows");
}

/// Asks for large socket buffers. That the kernel grants less is no error: packets are lost and sent again.
pub(crate) fn enlarge_buffers(socket: &socket2::Socket) {
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
}
