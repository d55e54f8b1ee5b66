//! The targets of `cargo xtask fuzz`: whatever Pelton reads that somebody else, or a disk, has written. A target takes
//! any bytes and panics where the code under it breaks a promise.
//!
//! A target knows nothing of the engine that makes the bytes (`fuzz/src/main.rs`): `fuzz/tests/corpora.rs` gives the kept
//! inputs of `fuzz/corpus/` to the same functions.

mod config;
mod frames;
mod ids;
mod records;
mod recovery;
mod snapshots;

/// The server is a program and exports nothing: what reads its settings is taken from its sources.
#[path = "../../server/src/config.rs"]
pub mod server_config;
#[path = "../../server/src/command/time.rs"]
pub mod server_time;

/// Something that reads bytes, by the name under which it is started and its inputs are kept.
pub struct Target {
    /// Also the folder below `fuzz/corpus/`.
    pub name: &'static str,
    /// What it reads.
    pub what: &'static str,
    /// Reads one input.
    pub run: fn(&[u8]),
}

/// Every target there is. What Pelton learns to read gets a line here and a file of its own.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "frames",
        what: "a stream cut into frames, and every body, of both directions",
        run: frames::run,
    },
    Target {
        name: "records",
        what: "the records of the log",
        run: records::run,
    },
    Target {
        name: "recovery",
        what: "a log whose files were damaged, mixed up or forged",
        run: recovery::run,
    },
    Target {
        name: "snapshots",
        what: "a snapshot whose pieces were changed, with checksums that hold, and files of any bytes",
        run: snapshots::run,
    },
    Target {
        name: "config",
        what: "the server's settings, times, and the settings of tenants and functions",
        run: config::run,
    },
    Target {
        name: "ids",
        what: "ids and names of tasks",
        run: ids::run,
    },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Takes numbers from the front of an input; zeroes behind its end.
pub(crate) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, &[][..]), |(b, r)| (*b, r));
        self.0 = rest;
        first
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// At most so many bytes.
    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
