//! The settings of a connection: bounds against a peer that floods or stalls, and what makes loopback fast.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

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
const _: () = assert!(KEEP_ALIVE.as_millis() * 2 < IDLE_MS as u128);

/// Bytes of the loopback interface's packets where the system does not say.
const LOOPBACK_PACKET_BYTES: u16 = u16::MAX;
/// Headers of IPv6 and UDP; those of IPv4 are smaller.
const PACKET_HEADER_BYTES: u16 = 48;
/// Where the congestion window starts on loopback: there is no path to be gentle to, and a small window is paced with
/// timers of a millisecond. It must not be smaller than a packet, or nothing is ever sent.
const LOOPBACK_WINDOW_BYTES: u64 = STREAM_RECEIVE_WINDOW_BYTES as u64;
/// Packets that the peer may leave unacknowledged, and for how long: a request and its two answers, each a packet of its
/// own, need no packet for acknowledgements then, which travel with the next request. All of them together are less than
/// half of the window, so that it never runs out for want of an acknowledgement.
const LOOPBACK_UNACKNOWLEDGED_PACKETS: u32 = 4;
const LOOPBACK_ACK_DELAY: Duration = Duration::from_millis(5);
const _: () = assert!(
    LOOPBACK_UNACKNOWLEDGED_PACKETS as u64 * LOOPBACK_PACKET_BYTES as u64 * 2
        <= LOOPBACK_WINDOW_BYTES
);
/// When packets get lost on loopback, a buffer was full; the size is right and is tried again soon.
const LOOPBACK_BLACK_HOLE_COOLDOWN: Duration = Duration::from_secs(1);

const _: () = assert!(LOOPBACK_WINDOW_BYTES > 2 * LOOPBACK_PACKET_BYTES as u64);

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
            let mtu = loopback_mtu();
            let mut congestion = CubicConfig::default();
            congestion.initial_window(LOOPBACK_WINDOW_BYTES);
            let mut discovery = MtuDiscoveryConfig::default();
            discovery
                .upper_bound(mtu)
                .black_hole_cooldown(LOOPBACK_BLACK_HOLE_COOLDOWN);
            let mut acks = AckFrequencyConfig::default();
            acks.ack_eliciting_threshold(VarInt::from_u32(LOOPBACK_UNACKNOWLEDGED_PACKETS))
                .max_ack_delay(Some(LOOPBACK_ACK_DELAY));
            transport
                .ack_frequency_config(Some(acks))
                .initial_mtu(mtu)
                .mtu_discovery_config(Some(discovery))
                .initial_rtt(Duration::from_millis(1))
                .congestion_controller_factory(Arc::new(congestion))
                // Several packets of this size are more than one system call can carry, and would vanish.
                .enable_segmentation_offload(false);
        }
        Path::Network => {}
    }
    transport
}

/// The largest UDP payload that the loopback interface carries. Over the default of 1,452 bytes with segmentation
/// offload it halves what a byte costs on both sides (0.44 against 1.08 ns a byte, 16 KiB batches on 2 cores).
fn loopback_mtu() -> u16 {
    static MTU: OnceLock<u16> = OnceLock::new();
    *MTU.get_or_init(|| {
        let told = std::fs::read_to_string("/sys/class/net/lo/mtu")
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok())
            .unwrap_or(u32::from(LOOPBACK_PACKET_BYTES));
        let packet = told.min(u32::from(LOOPBACK_PACKET_BYTES)) as u16;
        packet.saturating_sub(PACKET_HEADER_BYTES)
    })
}
