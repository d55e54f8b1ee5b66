//! QUIC endpoints: one UDP socket per edge thread under one port, and the client's side.
//!
//! A session is one long-lived bidirectional stream of frames, opened by the client; further streams of a connection
//! are sessions of their own, where large frames should not stand in front of small ones. TLS 1.3 only, ring everywhere, no
//! early data: a submit replayed by the network would be a task too many.

pub mod transport;

pub mod certificate;

mod socket;

mod steering;

pub mod server;

pub mod client;

/// The halves of a session and what holds them; named here, so that those who speak the protocol need no other crate.
pub use quinn::{Connection, RecvStream, SendStream, VarInt};

/// What both sides name in the handshake; another version of the protocol has another name.
pub const ALPN: &[u8] = b"pelton/1";
