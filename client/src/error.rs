//! What a call may answer beside success.

use std::fmt;
use std::time::Duration;

use pelton_net::Code;
use pelton_net::error::ProtocolError;
use pelton_net::id::RequestId;
use pelton_net::quic::client::ConnectError;
use pelton_net::session::ErrorFrame;

/// Why a call did not succeed.
#[derive(Clone, PartialEq, Debug)]
pub enum Error {
    /// An option or an argument that no server would take.
    Invalid(String),
    /// There is no connection; nothing was sent.
    Unreachable(String),
    /// The connection broke while the answer was awaited. Whether the request was carried out is unknown: submit again
    /// with the same `task_id`, and a task that was accepted answers as a duplicate.
    ConnectionLost(String),
    /// The server said no.
    Refused(Refusal),
    /// The server sent what breaks the protocol; the connection is closed.
    Protocol(ProtocolError),
    /// This client or executor has been closed.
    Closed,
}

/// What the server said.
#[derive(Clone, PartialEq, Debug)]
pub struct Refusal {
    /// The numbered reason.
    pub code: Code,
    /// What happened, to what, and what to do; may be empty.
    pub text: String,
    /// When to try again, where the server knows.
    pub retry_after: Option<Duration>,
    /// For `ID_REUSED` the task that has the name.
    pub request_id: Option<RequestId>,
}

impl Error {
    /// The reason as one of the codes that all faces of Pelton share.
    pub fn code(&self) -> Code {
        match self {
            Error::Invalid(_) => Code::InvalidArgument,
            Error::Unreachable(_) | Error::ConnectionLost(_) => Code::Unavailable,
            Error::Refused(refusal) => refusal.code,
            Error::Protocol(_) => Code::Internal,
            Error::Closed => Code::FailedPrecondition,
        }
    }

    /// The code's number on the wire.
    pub fn number(&self) -> u16 {
        self.code() as u16
    }

    /// True if the same request may succeed later without a change.
    pub fn retryable(&self) -> bool {
        self.code().retryable()
    }

    pub(crate) fn refused(code: Code, text: impl Into<String>) -> Error {
        Error::Refused(Refusal {
            code,
            text: text.into(),
            retry_after: None,
            request_id: None,
        })
    }

    pub(crate) fn from_frame(frame: &ErrorFrame<'_>) -> Error {
        Error::Refused(Refusal {
            code: frame.code,
            text: frame.text.to_owned(),
            retry_after: retry_after(frame.retry_after_ms),
            request_id: None,
        })
    }
}

/// 0 means that it is not known.
pub(crate) fn retry_after(ms: u32) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(u64::from(ms)))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(what) => f.write_str(what),
            Error::Unreachable(reason) => write!(f, "{reason}"),
            Error::ConnectionLost(reason) => write!(
                f,
                "the connection was lost and the outcome is unknown ({reason}); submit again with the same task_id"
            ),
            Error::Refused(refusal) => {
                write!(f, "{}", refusal.code)?;
                if !refusal.text.is_empty() {
                    write!(f, ": {}", refusal.text)?;
                }
                if let Some(after) = refusal.retry_after {
                    write!(f, " (try again in {} ms)", after.as_millis())?;
                }
                Ok(())
            }
            Error::Protocol(error) => write!(f, "the server broke the protocol: {error}"),
            Error::Closed => f.write_str("closed"),
        }
    }
}

impl std::error::Error for Error {}

impl From<ProtocolError> for Error {
    fn from(error: ProtocolError) -> Error {
        Error::Protocol(error)
    }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Error {
        match error {
            ConnectError::CaFile { .. } | ConnectError::Name(_) => {
                Error::Invalid(error.to_string())
            }
            ConnectError::Socket(_) | ConnectError::Refused(_) | ConnectError::Unreachable(_) => {
                Error::Unreachable(error.to_string())
            }
        }
    }
}
