//! Rare operations. They have a numeric operation and a JSON object as the body, since none of them is on the data
//! path and their fields grow with every version. This crate carries the text and does not look into it.

use bytes::{BufMut, BytesMut};
use pelton_core::error::Code;

use crate::error::ProtocolError;
use crate::frame::{Frame, FrameType, put_header};
use crate::wire::Cursor;

macro_rules! operations {
    ($($(#[$doc:meta])* $variant:ident = $number:literal;)*) => {
        /// What a query asks for. The numbers never change their meaning.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u16)]
        pub enum Operation {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Operation {
            /// Every operation, in the order of the numbers.
            pub const ALL: &'static [Operation] = &[$(Operation::$variant,)*];

            /// The operation with this number.
            pub fn from_number(number: u16) -> Option<Operation> {
                match number { $($number => Some(Operation::$variant),)* _ => None }
            }
        }
    };
}

operations! {
    /// One task: `{"task": ID}`.
    Get = 1;
    /// Tasks: `{"status"?, "function"?, "prefix"?, "cursor"?, "limit"?}`.
    List = 2;
    /// Ends a task by any of its names: `{"task": ID, "grace_ms"?}`.
    Stop = 3;
    /// The tenant's functions: `{}`.
    FunctionList = 16;
    /// One function: `{"function": NAME}`.
    FunctionGet = 17;
    /// Makes or changes a function: `{"function": NAME, ...}`; what is not named stays.
    FunctionSet = 18;
    /// Removes a function: `{"function": NAME}`.
    FunctionRemove = 19;
    /// Tenants: `{}`.
    TenantList = 32;
    /// Makes or changes a tenant: `{"tenant": NAME, ...}`.
    TenantSet = 33;
    /// Counters, gauges and durations: `{}`.
    Stats = 48;
    /// Keys, without their secrets: `{}`.
    KeyList = 64;
    /// Makes a key; the answer has its secret, once: `{"tenants", "scopes", ...}`.
    KeyCreate = 65;
    /// Ends a key: `{"key": ID}`.
    KeyRevoke = 66;
    /// Begins a backup on the server's machine: `{"path": DIR}`.
    BackupStart = 80;
    /// How far a backup is, and that it is still wanted: `{"backup": ID}`.
    BackupStatus = 81;
    /// Ends a backup: `{"backup": ID}`.
    BackupCancel = 82;
}

/// A rare operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query<'a> {
    /// What is asked for.
    pub operation: Operation,
    /// A JSON object.
    pub json: &'a str,
}

impl<'a> Query<'a> {
    /// Appends the frame; false, and nothing appended, if the text is too long for a frame.
    #[must_use]
    pub fn encode(&self, out: &mut BytesMut, tag: u64) -> bool {
        put(out, FrameType::Query, tag, self.operation as u16, self.json)
    }

    /// Reads the body. An operation that this version does not know is `Unimplemented`.
    pub fn parse(frame: &'a Frame) -> Result<Query<'a>, ProtocolError> {
        let (number, json) = get(frame)?;
        let operation = Operation::from_number(number).ok_or(ProtocolError {
            code: Code::Unimplemented,
            what: "this server does not know that operation",
            offset: 0,
        })?;
        Ok(Query { operation, json })
    }
}

/// The answer to a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueryAnswer<'a> {
    /// `Ok`, or why not; then the JSON is `{"code", "error", "retryable"}`.
    pub code: Code,
    /// A JSON object.
    pub json: &'a str,
}

impl<'a> QueryAnswer<'a> {
    /// Appends the frame; false, and nothing appended, if the text is too long for a frame.
    #[must_use]
    pub fn encode(&self, out: &mut BytesMut, tag: u64) -> bool {
        put(
            out,
            FrameType::QueryAnswer,
            tag,
            self.code as u16,
            self.json,
        )
    }

    /// Reads the body. A code that this version does not know reads as `Internal`.
    pub fn parse(frame: &'a Frame) -> Result<QueryAnswer<'a>, ProtocolError> {
        let (number, json) = get(frame)?;
        Ok(QueryAnswer {
            code: Code::from_number(number).unwrap_or(Code::Internal),
            json,
        })
    }
}

fn put(out: &mut BytesMut, kind: FrameType, tag: u64, number: u16, json: &str) -> bool {
    let body_len = 4 + json.len();
    if body_len > kind.body_bytes_max() {
        return false;
    }
    put_header(out, kind, 0, 0, tag, body_len);
    out.put_u16_le(number);
    out.put_u16_le(0);
    out.put_slice(json.as_bytes());
    true
}

fn get(frame: &Frame) -> Result<(u16, &str), ProtocolError> {
    frame.check_flags(0)?;
    let mut cursor = Cursor::new(&frame.body);
    let number = cursor.u16()?;
    cursor.reserved(2)?;
    let json = cursor.text(cursor.rest().len())?;
    Ok((number, json))
}
