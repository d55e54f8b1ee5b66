//! Names and numbers of things. Every number that could be mixed up with another has a type of its own.

use alloc::string::String;
use core::fmt;

use crate::limits::{CELL_COUNT, NAME_BYTES_MAX};

macro_rules! number {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub $inner);
    )*};
}

number! {
    /// One shard: one thread, one log, one copy of the state machine. Counted from 0.
    ShardId(u16);
    /// One of the 4,096 fixed parts of the id space; always below `CELL_COUNT`.
    CellId(u16);
    /// A tenant, numbered by shard 0 in the order of first sight.
    TenantId(u32);
    /// A function of one tenant, numbered by shard 0 over all tenants; never used again for another function.
    FunctionId(u32);
    /// A place in a shard's task table.
    SlotIndex(u32);
    /// A byte position in a shard's log: segment id times segment size plus the offset within the segment.
    Lsn(u64);
    /// An edge thread, counted from 0 over one process.
    EdgeId(u16);
}

/// A connection as its edge numbers it: the edge in the high 16 bits, a number never used twice by that edge below.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ConnectionId(pub u64);

impl ConnectionId {
    /// The connection with this number on this edge. `number` must fit in 48 bits.
    pub fn new(edge: EdgeId, number: u64) -> ConnectionId {
        assert!(number < 1 << 48);
        ConnectionId(u64::from(edge.0) << 48 | number)
    }

    /// The edge that holds the connection.
    pub fn edge(self) -> EdgeId {
        EdgeId((self.0 >> 48) as u16)
    }

    /// Its number on that edge.
    pub fn number(self) -> u64 {
        self.0 & ((1 << 48) - 1)
    }
}

/// The identity of one accepted task: `cell:12 | accepted_ms:44 | seq:40 | slot:32`, from the high bits down. Sorting
/// the ids of a cell sorts them by acceptance. The slot finds the task without a hash, the rest tells whether it is
/// still that task.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u128);

impl RequestId {
    /// Largest `accepted_ms` that fits; in the year 2527.
    pub const ACCEPTED_MS_MAX: u64 = (1 << 44) - 1;
    /// Largest `seq` that fits: a trillion tasks a shard.
    pub const SEQ_MAX: u64 = (1 << 40) - 1;

    /// Composes an id. Panics if a part does not fit: the shard hands out only what does.
    pub fn new(cell: CellId, accepted_ms: u64, seq: u64, slot: SlotIndex) -> RequestId {
        assert!(
            cell.0 < CELL_COUNT && accepted_ms <= Self::ACCEPTED_MS_MAX && seq <= Self::SEQ_MAX
        );
        RequestId(
            u128::from(cell.0) << 116
                | u128::from(accepted_ms) << 72
                | u128::from(seq) << 32
                | u128::from(slot.0),
        )
    }

    /// The cell that the task belongs to, and so the shard.
    pub fn cell(self) -> CellId {
        CellId((self.0 >> 116) as u16)
    }

    /// Logged time at which the task was accepted, in milliseconds since 1970.
    pub fn accepted_ms(self) -> u64 {
        (self.0 >> 72) as u64 & Self::ACCEPTED_MS_MAX
    }

    /// The shard's running number of accepted tasks.
    pub fn seq(self) -> u64 {
        (self.0 >> 32) as u64 & Self::SEQ_MAX
    }

    /// Where the task lives in its shard's table.
    pub fn slot(self) -> SlotIndex {
        SlotIndex(self.0 as u32)
    }

    /// The number by which tasks are listed: by the time of their acceptance, then by their running number. Of two tasks
    /// of one shard the one that was accepted later has the larger one, and no two tasks have the same.
    pub fn order(self) -> u128 {
        self.0.rotate_left(12)
    }

    /// The task with this order.
    pub fn from_order(order: u128) -> RequestId {
        RequestId(order.rotate_right(12))
    }

    /// The smallest order of a task that was accepted at this time.
    pub fn order_at(accepted_ms: u64) -> u128 {
        u128::from(accepted_ms.min(Self::ACCEPTED_MS_MAX)) << 84
    }

    /// Reads `t` followed by 32 lower-case hex digits; anything else is `None`.
    pub fn parse(text: &str) -> Option<RequestId> {
        let digits = text.strip_prefix('t')?.as_bytes();
        if digits.len() != 32 {
            return None;
        }
        let mut value = 0u128;
        for &digit in digits {
            let nibble = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            value = value << 4 | u128::from(nibble);
        }
        Some(RequestId(value))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The right of one attempt: a completion is taken only while its token is the task's current one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord)]
pub struct Token {
    /// Raised by each redrive.
    pub generation: u16,
    /// Raised by each lease, from 1.
    pub attempt: u16,
}

/// Checks the id rule for given names: `[A-Za-z_][A-Za-z0-9_-]*`, at most 128 bytes.
pub fn name_is_valid(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= NAME_BYTES_MAX
        && bytes
            .first()
            .is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-')
}

/// How a caller names a task: `ID`, `FUNCTION/TASK_ID` or `FUNCTION/KEY/TASK_ID`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TaskName {
    /// A request id, which finds the task by itself.
    Request(RequestId),
    /// A given `task_id` of a function, within an ordering key where it had one.
    Given {
        /// The function's name.
        function: String,
        /// The ordering key, for a task that has one.
        key: Option<String>,
        /// The `task_id` that the caller gave.
        task_id: String,
    },
}

impl TaskName {
    /// Reads one of the three forms. A generated id behind `FUNCTION/` is taken as the request id that it is.
    pub fn parse(text: &str) -> Option<TaskName> {
        if let Some(id) = RequestId::parse(text) {
            return Some(TaskName::Request(id));
        }
        let (function, rest) = text.split_once('/')?;
        if !name_is_valid(function) {
            return None;
        }
        let (key, task_id) = match rest.rsplit_once('/') {
            Some((key, task_id)) => (Some(key), task_id),
            None => (None, rest),
        };
        if let Some(id) = RequestId::parse(task_id) {
            return Some(TaskName::Request(id));
        }
        if !name_is_valid(task_id) || key.is_some_and(|key| !name_is_valid(key)) {
            return None;
        }
        Some(TaskName::Given {
            function: function.into(),
            key: key.map(Into::into),
            task_id: task_id.into(),
        })
    }
}

/// The hash that places names into cells. It is part of the log's format: XXH3-64 with seed 0 over the parts, each
/// followed by a zero byte, which no valid name contains.
pub fn place(tenant: &str, function: &str, discriminator: &str) -> CellId {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for part in [tenant, function, discriminator] {
        hasher.update(part.as_bytes());
        hasher.update(&[0]);
    }
    CellId((hasher.digest() % u64::from(CELL_COUNT)) as u16)
}

/// The rule by which shards own cells: contiguous, even ranges. It is part of what `MANIFEST` records.
pub fn shard_of(cell: CellId, shards: u16) -> ShardId {
    ShardId((u32::from(cell.0) * u32::from(shards) / u32::from(CELL_COUNT)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_id_keeps_its_parts_and_its_text() {
        let id = RequestId::new(
            CellId(4095),
            1_790_000_000_123,
            RequestId::SEQ_MAX,
            SlotIndex(u32::MAX - 1),
        );
        assert_eq!(id.cell(), CellId(4095));
        assert_eq!(id.accepted_ms(), 1_790_000_000_123);
        assert_eq!(id.seq(), RequestId::SEQ_MAX);
        assert_eq!(id.slot(), SlotIndex(u32::MAX - 1));
        assert_eq!(RequestId::from_order(id.order()), id);
        let later = RequestId::new(CellId(0), id.accepted_ms() + 1, 0, SlotIndex(0));
        let end = RequestId::order_at(id.accepted_ms() + 1);
        assert!(id.order() < end && end == later.order());
        let text = alloc::format!("{id}");
        assert_eq!(RequestId::parse(&text), Some(id));
        for broken in [
            &text[1..],
            &text[..32],
            "tG0000000000000000000000000000000",
            "",
        ] {
            assert_eq!(RequestId::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn names_follow_the_id_rule() {
        for good in ["a", "_", "A-b_9"] {
            assert!(name_is_valid(good), "{good}");
        }
        for bad in ["", "9a", "-a", "a b", "a/b", "ä", &"x".repeat(129)] {
            assert!(!name_is_valid(bad), "{bad}");
        }
    }

    #[test]
    fn a_task_is_named_in_three_forms() {
        let id = RequestId::new(CellId(1), 2, 3, SlotIndex(4));
        let given = |key: Option<&str>| TaskName::Given {
            function: "f".into(),
            key: key.map(Into::into),
            task_id: "x".into(),
        };
        assert_eq!(
            TaskName::parse(&alloc::format!("{id}")),
            Some(TaskName::Request(id))
        );
        assert_eq!(
            TaskName::parse(&alloc::format!("f/{id}")),
            Some(TaskName::Request(id))
        );
        assert_eq!(TaskName::parse("f/x"), Some(given(None)));
        assert_eq!(TaskName::parse("f/k/x"), Some(given(Some("k"))));
        for bad in ["x", "f/", "/x", "f/k/9", "f/a/b/c", "f//x"] {
            assert_eq!(TaskName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn placement_is_frozen() {
        assert_eq!(place("acme", "digest", ""), place("acme", "digest", ""));
        assert_ne!(place("acme", "digest", "a"), place("acme", "digesta", ""));
    }
}
