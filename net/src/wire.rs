//! Reading little-endian numbers and strings from borrowed bytes, with every length checked.

use crate::error::ProtocolError;

/// A position in a frame's body.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    pub(crate) fn offset(&self) -> usize {
        self.at
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    #[inline]
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        match self.bytes[self.at..].split_at_checked(len) {
            Some((taken, _)) => {
                self.at += len;
                Ok(taken)
            }
            None => Err(self.error("the body is shorter than its lengths say")),
        }
    }

    #[inline]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], ProtocolError> {
        match self.bytes[self.at..].first_chunk::<N>() {
            Some(array) => {
                self.at += N;
                Ok(array)
            }
            None => Err(self.error("the body is shorter than its lengths say")),
        }
    }

    pub(crate) fn u8(&mut self) -> Result<u8, ProtocolError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ProtocolError> {
        Ok(u16::from_le_bytes(*self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ProtocolError> {
        Ok(u32::from_le_bytes(*self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ProtocolError> {
        Ok(u64::from_le_bytes(*self.array()?))
    }

    pub(crate) fn u128(&mut self) -> Result<u128, ProtocolError> {
        Ok(u128::from_le_bytes(*self.array()?))
    }

    pub(crate) fn text(&mut self, len: usize) -> Result<&'a str, ProtocolError> {
        let offset = self.at;
        std::str::from_utf8(self.take(len)?)
            .map_err(|_| ProtocolError::invalid("text must be UTF-8", offset))
    }

    /// A name that may be absent: length 0 says so.
    pub(crate) fn name(&mut self, len: usize) -> Result<Option<&'a str>, ProtocolError> {
        if len == 0 {
            return Ok(None);
        }
        let offset = self.at;
        let name = self.text(len)?;
        if !pelton_core::id::name_is_valid(name) {
            return Err(ProtocolError::invalid(
                "a name is 1 to 128 bytes: a letter or '_', then letters, digits, '_' and '-'",
                offset,
            ));
        }
        Ok(Some(name))
    }

    pub(crate) fn reserved(&mut self, len: usize) -> Result<(), ProtocolError> {
        let offset = self.at;
        if self.take(len)?.iter().any(|&byte| byte != 0) {
            return Err(ProtocolError::invalid(
                "reserved bytes must be zero",
                offset,
            ));
        }
        Ok(())
    }

    pub(crate) fn end(&self) -> Result<(), ProtocolError> {
        if self.at != self.bytes.len() {
            return Err(self.error("the body is longer than its lengths say"));
        }
        Ok(())
    }

    pub(crate) fn error(&self, what: &'static str) -> ProtocolError {
        ProtocolError::invalid(what, self.at)
    }
}

/// The `N` bytes at `at` of a fixed part. The caller passes constants within the array, which the compiler sees.
#[inline(always)]
pub(crate) fn field<const N: usize>(fixed: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&fixed[at..at + N]);
    bytes
}

/// Length of text that a writer was handed, cut to `max` at a character boundary.
pub(crate) fn cut(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let mut end = max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
