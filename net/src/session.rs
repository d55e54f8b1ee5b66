//! The frames around a session: hello, welcome, error, goodbye, heartbeat.

use bytes::{BufMut, BytesMut};
use pelton_core::error::Code;
use pelton_core::id::{RequestId, Token};
use pelton_core::limits::{ERROR_BYTES_MAX, NAME_BYTES_MAX};

use crate::error::ProtocolError;
use crate::frame::{Frame, FrameType, put_header};
use crate::item::sealed::{CursorOf, Layout};
use crate::wire::{Cursor, cut, field};

/// The version of the protocol that this crate speaks; also in the ALPN `pelton/1`.
pub const PROTOCOL_VERSION: u16 = 1;

/// Bytes of a bearer key on the wire.
pub const KEY_BYTES_MAX: usize = 512;

const HELLO_EXECUTOR: u8 = 1;

/// What proves who speaks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Credential<'a> {
    /// Nothing; only a server on loopback without keys accepts it, and then `Hello::tenant` names the tenant.
    None,
    /// A bearer key, as `pelton key create` printed it.
    Key(&'a [u8]),
}

impl std::fmt::Debug for Credential<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Credential::None => f.write_str("None"),
            Credential::Key(_) => f.write_str("Key(..)"),
        }
    }
}

/// The first frame of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello<'a> {
    /// The version that the client speaks.
    pub protocol: u16,
    /// Who the client is.
    pub credential: Credential<'a>,
    /// The tenant, where the credential does not say it.
    pub tenant: Option<&'a str>,
    /// What the client calls itself; for logs.
    pub client: &'a str,
    /// For an executor the identity that its leases belong to: random, the same over the process's life.
    pub executor: Option<u64>,
}

impl<'a> Hello<'a> {
    /// Appends the frame. Panics if the key is longer than `KEY_BYTES_MAX` or the tenant is no name.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        let (credential, key): (u8, &[u8]) = match self.credential {
            Credential::None => (0, &[]),
            Credential::Key(key) => (1, key),
        };
        let tenant = self.tenant.unwrap_or("");
        let client = cut(self.client, NAME_BYTES_MAX);
        assert!(key.len() <= KEY_BYTES_MAX && tenant.len() <= NAME_BYTES_MAX);
        put_header(
            out,
            FrameType::Hello,
            0,
            0,
            tag,
            16 + key.len() + tenant.len() + client.len(),
        );
        out.put_u16_le(self.protocol);
        out.put_u8(credential);
        out.put_u8(if self.executor.is_some() {
            HELLO_EXECUTOR
        } else {
            0
        });
        out.put_u64_le(self.executor.unwrap_or(0));
        out.put_u16_le(key.len() as u16);
        out.put_u8(tenant.len() as u8);
        out.put_u8(client.len() as u8);
        out.put_slice(key);
        out.put_slice(tenant.as_bytes());
        out.put_slice(client.as_bytes());
    }

    /// Reads the body. A hello of another version answers `UNSUPPORTED_VERSION` without looking further.
    pub fn parse(frame: &'a Frame) -> Result<Hello<'a>, ProtocolError> {
        let mut cursor = Cursor::new(&frame.body);
        let protocol = cursor.u16()?;
        if protocol != PROTOCOL_VERSION {
            return Err(ProtocolError {
                code: Code::UnsupportedVersion,
                what: "this server speaks protocol version 1",
                offset: 0,
            });
        }
        frame.check_flags(0)?;
        let credential = cursor.u8()?;
        let flags = cursor.u8()?;
        if flags & !HELLO_EXECUTOR != 0 {
            return Err(ProtocolError::invalid("unknown flags must be zero", 3));
        }
        let executor = cursor.u64()?;
        let key_len = usize::from(cursor.u16()?);
        let tenant_len = usize::from(cursor.u8()?);
        let client_len = usize::from(cursor.u8()?);
        if key_len > KEY_BYTES_MAX {
            return Err(ProtocolError::invalid("a key is at most 512 bytes", 12));
        }
        let key = cursor.take(key_len)?;
        let tenant = cursor.name(tenant_len)?;
        let client = cursor.text(client_len)?;
        cursor.end()?;
        let credential = match (credential, key_len) {
            (0, 0) => Credential::None,
            (1, 1..) => Credential::Key(key),
            _ => {
                return Err(ProtocolError::invalid(
                    "the credential is 0 (none) without a key or 1 (bearer key) with one",
                    2,
                ));
            }
        };
        Ok(Hello {
            protocol,
            credential,
            tenant,
            client,
            executor: (flags & HELLO_EXECUTOR != 0).then_some(executor),
        })
    }
}

/// The server's answer to a hello: the limits that hold for the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Welcome<'a> {
    /// The version that both speak.
    pub protocol: u16,
    /// The engine; the same over restarts on the same data directory.
    pub server: u64,
    /// Bytes that a body may have.
    pub frame_bytes_max: u32,
    /// Bytes that a payload or a result may have.
    pub payload_bytes_max: u32,
    /// Tasks of this connection that may be submitted and unanswered.
    pub in_flight_tasks_max: u32,
    /// An executor sends a heartbeat at least this often.
    pub heartbeat_ms: u32,
    /// After this long without a heartbeat its leases are lost.
    pub lease_ms: u32,
    /// The tenant that the session acts for; empty for a key of several tenants.
    pub tenant: &'a str,
}

impl<'a> Welcome<'a> {
    /// Appends the frame, with the tag of the hello.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        assert!(self.tenant.len() <= NAME_BYTES_MAX);
        put_header(out, FrameType::Welcome, 0, 0, tag, 32 + self.tenant.len());
        out.put_u16_le(self.protocol);
        out.put_u8(self.tenant.len() as u8);
        out.put_u8(0);
        out.put_u64_le(self.server);
        out.put_u32_le(self.frame_bytes_max);
        out.put_u32_le(self.payload_bytes_max);
        out.put_u32_le(self.in_flight_tasks_max);
        out.put_u32_le(self.heartbeat_ms);
        out.put_u32_le(self.lease_ms);
        out.put_slice(self.tenant.as_bytes());
    }

    /// Reads the body.
    pub fn parse(frame: &'a Frame) -> Result<Welcome<'a>, ProtocolError> {
        frame.check_flags(0)?;
        let mut cursor = Cursor::new(&frame.body);
        let protocol = cursor.u16()?;
        let tenant_len = usize::from(cursor.u8()?);
        cursor.reserved(1)?;
        let welcome = Welcome {
            protocol,
            server: cursor.u64()?,
            frame_bytes_max: cursor.u32()?,
            payload_bytes_max: cursor.u32()?,
            in_flight_tasks_max: cursor.u32()?,
            heartbeat_ms: cursor.u32()?,
            lease_ms: cursor.u32()?,
            tenant: cursor.name(tenant_len)?.unwrap_or(""),
        };
        cursor.end()?;
        Ok(welcome)
    }
}

/// Refuses a frame (its tag) or the connection (tag 0, then it is closed).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ErrorFrame<'a> {
    /// Why; a number that this version does not know reads as `Internal`.
    pub code: Code,
    /// True if the same request may succeed later.
    pub retryable: bool,
    /// When, or 0.
    pub retry_after_ms: u32,
    /// What happened, to what, and what to do.
    pub text: &'a str,
}

impl<'a> ErrorFrame<'a> {
    /// An error with what the code says about retrying.
    pub fn new(code: Code, text: &'a str) -> ErrorFrame<'a> {
        ErrorFrame {
            code,
            retryable: code.retryable(),
            retry_after_ms: 0,
            text,
        }
    }

    /// Appends the frame; the text is cut at `ERROR_BYTES_MAX`.
    pub fn encode(&self, out: &mut BytesMut, tag: u64) {
        let text = cut(self.text, ERROR_BYTES_MAX);
        put_header(out, FrameType::Error, 0, 0, tag, 8 + text.len());
        out.put_u16_le(self.code as u16);
        out.put_u8(u8::from(self.retryable));
        out.put_u8(0);
        out.put_u32_le(self.retry_after_ms);
        out.put_slice(text.as_bytes());
    }

    /// Reads the body.
    pub fn parse(frame: &'a Frame) -> Result<ErrorFrame<'a>, ProtocolError> {
        let mut cursor = Cursor::new(&frame.body);
        let code = cursor.u16()?;
        let retryable = cursor.u8()? & 1 != 0;
        cursor.reserved(1)?;
        let retry_after_ms = cursor.u32()?;
        let text = cursor.text(cursor.rest().len())?;
        Ok(ErrorFrame {
            code: Code::from_number(code).unwrap_or(Code::Internal),
            retryable,
            retry_after_ms,
            text,
        })
    }
}

/// Appends a goodbye; its body is empty.
pub fn encode_goodbye(out: &mut BytesMut) {
    put_header(out, FrameType::Goodbye, 0, 0, 0, 0);
}

/// One attempt that an executor holds: items of heartbeat, heartbeat ack and resume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Lease {
    /// The task.
    pub request_id: RequestId,
    /// The attempt.
    pub token: Token,
}

impl Lease {
    pub(crate) const BYTES: usize = 20;

    pub(crate) fn from_bytes(bytes: &[u8]) -> Lease {
        Lease {
            request_id: RequestId(u128::from_le_bytes(field(bytes, 0))),
            token: Token {
                generation: u16::from_le_bytes(field(bytes, 16)),
                attempt: u16::from_le_bytes(field(bytes, 18)),
            },
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; Lease::BYTES] {
        let mut bytes = [0; Lease::BYTES];
        bytes[0..16].copy_from_slice(&self.request_id.0.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.token.generation.to_le_bytes());
        bytes[18..20].copy_from_slice(&self.token.attempt.to_le_bytes());
        bytes
    }
}

impl<'a> Layout<'a> for Lease {
    fn read(cursor: &mut CursorOf<'a>) -> Result<Lease, ProtocolError> {
        Ok(Lease::from_bytes(cursor.0.array::<{ Lease::BYTES }>()?))
    }

    fn write(&self, out: &mut BytesMut) {
        out.put_slice(&self.to_bytes());
    }
}
