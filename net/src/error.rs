//! What a peer did wrong, precise enough to be answered and to be debugged from the other side.

use std::fmt;

use pelton_core::error::Code;

/// A frame that breaks the protocol. `offset` counts from the start of the frame's body; for a broken header it is 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProtocolError {
    /// What the error frame says.
    pub code: Code,
    /// The rule that is broken, as a sentence for the author of the peer.
    pub what: &'static str,
    /// Where in the body.
    pub offset: usize,
}

impl ProtocolError {
    pub(crate) fn invalid(what: &'static str, offset: usize) -> ProtocolError {
        ProtocolError {
            code: Code::InvalidArgument,
            what,
            offset,
        }
    }
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (byte {})", self.code, self.what, self.offset)
    }
}

impl std::error::Error for ProtocolError {}
