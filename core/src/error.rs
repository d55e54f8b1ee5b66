//! The numbered errors that every face of Pelton speaks: QUIC, HTTP, CLI and C use the same codes and names.

use core::fmt;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $retryable:literal;)*) => {
        /// Why a request was refused. The number is part of the wire protocol and of the log; it never changes its
        /// meaning. `Ok` is zero so that an answer needs no option around it.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Code {
            $($(#[$doc])* $variant = $number,)*
        }

        impl Code {
            /// Every code, in the order of the numbers.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The name that callers see, such as `RESOURCE_EXHAUSTED`.
            pub fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// True if the same request may succeed later without a change.
            pub fn retryable(self) -> bool {
                match self { $(Code::$variant => $retryable,)* }
            }

            /// The code with this number, or `None` for a number that this version does not know.
            pub fn from_number(number: u16) -> Option<Code> {
                match number { $($number => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    /// The request was carried out.
    Ok = 0, "OK", false;
    /// A field breaks a rule; the sentence names the field and the rule.
    InvalidArgument = 1, "INVALID_ARGUMENT", false;
    /// No credential, or one that is not known.
    Unauthenticated = 2, "UNAUTHENTICATED", false;
    /// The credential is known and does not cover this.
    PermissionDenied = 3, "PERMISSION_DENIED", false;
    /// There is no such thing for this tenant; another tenant's things answer the same.
    NotFound = 4, "NOT_FOUND", false;
    /// A thing of that name exists already.
    AlreadyExists = 5, "ALREADY_EXISTS", false;
    /// The thing is in a state that does not allow this.
    FailedPrecondition = 6, "FAILED_PRECONDITION", false;
    /// The `task_id` names another payload within the dedup window.
    IdReused = 7, "ID_REUSED", false;
    /// The fencing token belongs to an attempt that is over.
    StaleLease = 8, "STALE_LEASE", false;
    /// The payload is larger than `payload_bytes_max`.
    PayloadTooLarge = 9, "PAYLOAD_TOO_LARGE", false;
    /// The result is larger than `payload_bytes_max`; the attempt fails with this.
    ResultTooLarge = 10, "RESULT_TOO_LARGE", false;
    /// A bound is reached: quota, inbox, disk, table. Try again after the time told.
    ResourceExhausted = 11, "RESOURCE_EXHAUSTED", true;
    /// The peer speaks a version that this one does not.
    UnsupportedVersion = 12, "UNSUPPORTED_VERSION", false;
    /// The time given ran out.
    DeadlineExceeded = 13, "DEADLINE_EXCEEDED", true;
    /// The shard cannot serve now; whether an unanswered submit was accepted is unknown: send the same `task_id` again.
    Unavailable = 14, "UNAVAILABLE", true;
    /// This version does not do that.
    Unimplemented = 15, "UNIMPLEMENTED", false;
    /// A bug of ours.
    Internal = 16, "INTERNAL", false;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    #[test]
    fn every_number_names_the_code_it_came_from() {
        for &code in Code::ALL {
            assert_eq!(Code::from_number(code as u16), Some(code));
        }
        assert_eq!(Code::from_number(Code::ALL.len() as u16), None);
    }
}
