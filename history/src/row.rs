//! A row: what is kept of a task that has ended, and its bytes. Little-endian, fixed part first, then what varies.

use pelton_core::{
    error::Code,
    id::{FunctionId, RequestId, TenantId, Token},
    state::State,
};

/// Bytes of the fixed part.
const FIXED_BYTES: usize = 60;

/// A task that has ended. What it points to belongs to whoever made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row<'a> {
    /// The task.
    pub request: RequestId,
    /// Its tenant. Not in the row's bytes: rows are kept by tenant and state.
    pub tenant: TenantId,
    /// How it ended.
    pub state: State,
    /// Its function.
    pub function: FunctionId,
    /// Its last lease.
    pub token: Token,
    /// Retries spent.
    pub retries: u8,
    /// Logged time of its end.
    pub ended_ms: u64,
    /// The code of its last error; `Ok` without one.
    pub code: Code,
    /// A record of it could not be read when the row was made.
    pub damaged: bool,
    /// The given `task_id`; empty for a generated one.
    pub task_id: &'a str,
    /// The ordering key; empty for none.
    pub key: &'a str,
    /// The payload's content type; empty for none.
    pub content_type: &'a str,
    /// W3C trace context; empty for none.
    pub traceparent: &'a str,
    /// Tags, each behind a byte with its length.
    pub tags: &'a [u8],
    /// The payload.
    pub payload: &'a [u8],
    /// What the executor said of the error.
    pub error: &'a str,
    /// The tail of what the last attempt printed.
    pub output: &'a [u8],
    /// The result.
    pub result: &'a [u8],
}

impl<'a> Row<'a> {
    /// Appends the row's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let parts = self.parts();
        let varying: usize = parts.iter().map(|part| part.len()).sum();
        out.reserve(FIXED_BYTES + varying);
        out.extend_from_slice(&((FIXED_BYTES + varying) as u32).to_le_bytes());
        out.extend_from_slice(&self.request.0.to_le_bytes());
        out.extend_from_slice(&self.ended_ms.to_le_bytes());
        out.extend_from_slice(&self.function.0.to_le_bytes());
        out.extend_from_slice(&self.token.generation.to_le_bytes());
        out.extend_from_slice(&self.token.attempt.to_le_bytes());
        out.extend_from_slice(&(self.code as u16).to_le_bytes());
        out.push(self.retries);
        out.push(u8::from(self.damaged));
        for short in &parts[..4] {
            out.push(short.len() as u8);
        }
        for middle in &parts[4..7] {
            out.extend_from_slice(&(middle.len() as u16).to_le_bytes());
        }
        for long in &parts[7..] {
            out.extend_from_slice(&(long.len() as u32).to_le_bytes());
        }
        out.extend_from_slice(&[0; 2]);
        for part in parts {
            out.extend_from_slice(part);
        }
    }

    /// Bytes that [`Row::encode`] appends.
    pub fn bytes(&self) -> usize {
        FIXED_BYTES + self.parts().iter().map(|part| part.len()).sum::<usize>()
    }

    /// What varies: four parts with a length of one byte, three of two, two of four. All are within the limits of what
    /// a record holds, which is less.
    fn parts(&self) -> [&'a [u8]; 9] {
        [
            self.task_id.as_bytes(),
            self.key.as_bytes(),
            self.content_type.as_bytes(),
            self.traceparent.as_bytes(),
            self.tags,
            self.error.as_bytes(),
            self.output,
            self.payload,
            self.result,
        ]
    }

    /// Reads a row and what follows it; `None` if these are not a row's bytes.
    pub fn decode(tenant: TenantId, state: State, bytes: &'a [u8]) -> Option<(Row<'a>, &'a [u8])> {
        let whole = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let (row, behind) = bytes.split_at_checked(whole)?;
        let (fixed, mut rest) = row.split_at_checked(FIXED_BYTES)?;
        let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let mut take = |bytes: usize| {
            let (part, left) = rest.split_at_checked(bytes)?;
            rest = left;
            Some(part)
        };
        let text = |bytes: &'a [u8]| str::from_utf8(bytes).ok();
        let row = Row {
            request: RequestId(u128::from(u64_at(4)) | u128::from(u64_at(12)) << 64),
            tenant,
            state,
            ended_ms: u64_at(20),
            function: FunctionId(u32_at(28)),
            token: Token {
                generation: u16_at(32),
                attempt: u16_at(34),
            },
            code: Code::from_number(u16_at(36))?,
            retries: fixed[38],
            damaged: fixed[39] != 0,
            task_id: text(take(usize::from(fixed[40]))?)?,
            key: text(take(usize::from(fixed[41]))?)?,
            content_type: text(take(usize::from(fixed[42]))?)?,
            traceparent: text(take(usize::from(fixed[43]))?)?,
            tags: take(usize::from(u16_at(44)))?,
            error: text(take(usize::from(u16_at(46)))?)?,
            output: take(usize::from(u16_at(48)))?,
            payload: take(u32_at(50) as usize)?,
            result: take(u32_at(54) as usize)?,
        };
        rest.is_empty().then_some((row, behind))
    }

    /// The order of the row that begins here, without reading the rest; `None` at the end.
    pub(crate) fn peek_order(bytes: &[u8]) -> Option<u128> {
        let request = bytes.get(4..20)?;
        Some(RequestId(u128::from_le_bytes(request.try_into().ok()?)).order())
    }

    /// True if one of its tags is this one.
    pub fn has_tag(&self, wanted: &[u8]) -> bool {
        pelton_core::record::tags(self.tags).any(|tag| tag == wanted)
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use pelton_core::id::{CellId, SlotIndex};

    fn row() -> Row<'static> {
        Row {
            request: RequestId::new(CellId(9), 1_790_000_000_000, 77, SlotIndex(3)),
            tenant: TenantId(2),
            state: State::Failed,
            function: FunctionId(5),
            token: Token {
                generation: 1,
                attempt: 4,
            },
            retries: 3,
            ended_ms: 1_790_000_000_456,
            code: Code::DeadlineExceeded,
            damaged: false,
            task_id: "order-1",
            key: "customer",
            content_type: "text/plain",
            traceparent: "",
            tags: b"\x03a=b\x01c",
            payload: b"hello",
            error: "too slow",
            output: b"\xff\x00",
            result: b"",
        }
    }

    #[test]
    fn a_row_is_read_as_it_was_written_and_damage_is_noticed() {
        let mut bytes = Vec::new();
        row().encode(&mut bytes);
        assert_eq!(bytes.len(), row().bytes());
        bytes.extend_from_slice(b"behind");
        let (read, behind) = Row::decode(TenantId(2), State::Failed, &bytes).unwrap();
        assert_eq!((read, behind), (row(), &b"behind"[..]));
        assert_eq!(Row::peek_order(&bytes), Some(row().request.order()));
        assert!(read.has_tag(b"a=b") && read.has_tag(b"c") && !read.has_tag(b"a"));
        for cut in 0..row().bytes() {
            assert_eq!(
                Row::decode(TenantId(2), State::Failed, &bytes[..cut]),
                None,
                "cut at {cut}"
            );
        }
        for bit in 0..row().bytes() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = Row::decode(TenantId(2), State::Failed, &flipped);
        }
    }
}
