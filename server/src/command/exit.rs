//! How a command ends: the exit code, and the sentence on stderr that goes with it.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
};

use pelton_client::{Code, Error};
use serde_json::{Value, json};

/// Exit codes of `pelton`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failure = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Throttled = 5,
    Unreachable = 6,
    /// The awaited task failed.
    TaskFailed = 7,
    /// This machine does not do.
    Unfit = 8,
    /// The wait timed out.
    TimedOut = 9,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// The exit code for what a server, or the way to it, answered.
pub fn exit_of(error: &Error) -> Exit {
    match error {
        Error::Unreachable(_) | Error::ConnectionLost(_) => Exit::Unreachable,
        Error::Invalid(_) => Exit::Usage,
        Error::Protocol(_) | Error::Closed => Exit::Failure,
        Error::Refused(refusal) => match refusal.code {
            Code::InvalidArgument | Code::PayloadTooLarge => Exit::Usage,
            Code::NotFound => Exit::NotFound,
            Code::AlreadyExists | Code::FailedPrecondition | Code::IdReused | Code::StaleLease => {
                Exit::Conflict
            }
            Code::ResourceExhausted => Exit::Throttled,
            Code::Unavailable => Exit::Unreachable,
            Code::DeadlineExceeded => Exit::TimedOut,
            Code::Ok
            | Code::Unauthenticated
            | Code::PermissionDenied
            | Code::ResultTooLarge
            | Code::UnsupportedVersion
            | Code::Unimplemented
            | Code::Internal => Exit::Failure,
        },
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// Empty if everything was said already.
    pub text: String,
    code: Option<Code>,
}

impl Failure {
    /// A failure of the command itself.
    pub fn new(exit: Exit, text: impl Into<String>) -> Failure {
        Failure {
            exit,
            text: text.into(),
            code: None,
        }
    }

    /// Wrong arguments.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, text)
    }

    fn to_json(&self) -> Value {
        match self.code {
            None => json!({ "error": self.text }),
            Some(code) => json!({
                "code": code.name(),
                "error": self.text,
                "retryable": code.retryable(),
            }),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure {
            exit: exit_of(&error),
            text: error.to_string(),
            code: Some(error.code()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Says on stderr what went wrong, if anything, and gives the exit code.
pub fn end(result: Result<Exit, Failure>, json: bool) -> ExitCode {
    let exit = match result {
        Ok(exit) => exit,
        Err(failure) => {
            if json && !failure.text.is_empty() {
                eprintln!("{}", failure.to_json());
            } else if !failure.text.is_empty() {
                eprintln!("pelton: {failure}");
            }
            failure.exit
        }
    };
    exit.into()
}

/// Writes data to stdout. Whoever reads it may stop to: that is no failure.
pub fn put(bytes: impl AsRef<[u8]>) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(bytes.as_ref())
        .and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            Exit::Failure,
            format!("standard output: {error}"),
        )),
        _ => Ok(()),
    }
}

/// Writes a line to stdout.
pub fn put_line(text: &str) -> Result<(), Failure> {
    put(format!("{text}\n"))
}

/// Writes JSON to stdout.
pub fn put_json(value: &Value) -> Result<(), Failure> {
    put(format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use pelton_client::Refusal;

    use super::*;

    #[test]
    fn each_refusal_has_its_exit_code() {
        let exit = |code| {
            exit_of(&Error::Refused(Refusal {
                code,
                text: String::new(),
                retry_after: None,
                request_id: None,
            }))
        };
        assert_eq!(exit(Code::NotFound), Exit::NotFound);
        assert_eq!(exit(Code::IdReused), Exit::Conflict);
        assert_eq!(exit(Code::ResourceExhausted), Exit::Throttled);
        assert_eq!(exit(Code::DeadlineExceeded), Exit::TimedOut);
        assert_eq!(exit(Code::PermissionDenied), Exit::Failure);
        assert_eq!(
            exit_of(&Error::Unreachable(String::new())),
            Exit::Unreachable
        );
    }
}
