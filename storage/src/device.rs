//! The seam to the disk: one operation in, one completion out. The real device and the simulated one pass the same
//! contract suite (`storage/tests/contract.rs`).
//!
//! Contract: a write is durable only after a later flush of the same file; a new, renamed or removed name only after a
//! flush of the directory. `Commit` is a write and a flush in one. Nothing is ever retried by a device.

use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::format::BLOCK_BYTES;

/// An open file of the log's directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u32);

/// What a device is asked to do. Offsets and lengths of reads and writes are multiples of the block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceOp {
    /// The names in the directory.
    List,
    /// Makes a file of so many bytes, its space reserved; fails if the name exists.
    Create { name: String, bytes: u64 },
    /// Opens a file for reading and writing.
    Open { name: String },
    /// Reads as many bytes as `into` has, and brings it back: shorter where the file ends.
    Read {
        file: FileId,
        offset: u64,
        into: Block,
    },
    /// Writes a few blocks.
    Write {
        file: FileId,
        offset: u64,
        data: Vec<u8>,
    },
    /// Writes zeroes.
    Zero {
        file: FileId,
        offset: u64,
        bytes: usize,
    },
    /// Makes earlier writes to the file durable.
    Flush { file: FileId },
    /// Writes the first bytes of a registered buffer and flushes the file. `alone` says that the caller has nothing
    /// else to do before this has ended, so that starting it may take until then.
    Commit {
        file: FileId,
        offset: u64,
        buffer: usize,
        bytes: usize,
        alone: bool,
    },
    /// Gives a file another name, replacing what had it.
    Rename { from: String, to: String },
    /// Removes a name. An open file lives on until it is closed.
    Remove { name: String },
    /// Ends the use of a file.
    Close { file: FileId },
    /// Makes creations, renames and removals durable.
    FlushDirectory,
}

impl DeviceOp {
    /// Every kind of operation, by the name that [`DeviceOp::name`] gives it.
    pub const NAMES: [&str; 12] = [
        "list",
        "create",
        "open",
        "read",
        "write",
        "zero",
        "flush",
        "commit",
        "rename",
        "remove",
        "close",
        "flush-directory",
    ];

    /// What it is called where operations are counted by kind.
    pub fn name(&self) -> &'static str {
        match self {
            DeviceOp::List => "list",
            DeviceOp::Create { .. } => "create",
            DeviceOp::Open { .. } => "open",
            DeviceOp::Read { .. } => "read",
            DeviceOp::Write { .. } => "write",
            DeviceOp::Zero { .. } => "zero",
            DeviceOp::Flush { .. } => "flush",
            DeviceOp::Commit { .. } => "commit",
            DeviceOp::Rename { .. } => "rename",
            DeviceOp::Remove { .. } => "remove",
            DeviceOp::Close { .. } => "close",
            DeviceOp::FlushDirectory => "flush-directory",
        }
    }
}

/// What an operation brings.
#[derive(Debug)]
pub enum Output {
    /// Nothing but the success.
    Done,
    /// Names, in any order.
    Names(Vec<String>),
    /// A file and its length.
    File(FileId, u64),
    /// What was read.
    Bytes(Block),
}

/// An operation failed; its effect is unknown unless it only reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceError {
    /// What a caller branches on.
    pub kind: DeviceErrorKind,
    /// What was tried and what the system said.
    pub what: String,
}

/// Kinds of failures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceErrorKind {
    /// No space is left.
    NoSpace,
    /// There is no such name.
    NotFound,
    /// The name exists.
    Exists,
    /// Fewer bytes than asked were written.
    Short,
    /// Anything else.
    Io,
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for DeviceError {}

/// The caller's number for an operation in flight.
pub type Tag = u64;

/// A disk with one directory for one shard's log.
pub trait Device {
    /// Performs an operation to its end: for the start and for tools, never while a shard serves. `Commit` too.
    fn perform(&mut self, op: DeviceOp) -> Result<Output, DeviceError>;
    /// The buffers that `Commit` names, all of the same length.
    fn buffers(&mut self) -> &mut [Block];
    /// Starts an operation.
    fn start(&mut self, tag: Tag, op: DeviceOp);
    /// An operation that has ended, in any order.
    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)>;
    /// Ends once an operation that was started has ended, if there is one: for the start and for tools, as `perform`.
    fn await_one(&mut self);
    /// A random number, for keys.
    fn random(&mut self) -> u128;
}

/// A device that is lent: whoever lent it has it back when a recovery fails.
impl<D: Device> Device for &mut D {
    fn perform(&mut self, op: DeviceOp) -> Result<Output, DeviceError> {
        (**self).perform(op)
    }

    fn buffers(&mut self) -> &mut [Block] {
        (**self).buffers()
    }

    fn start(&mut self, tag: Tag, op: DeviceOp) {
        (**self).start(tag, op);
    }

    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)> {
        (**self).completed()
    }

    fn await_one(&mut self) {
        (**self).await_one();
    }

    fn random(&mut self) -> u128 {
        (**self).random()
    }
}

/// Bytes whose address is a multiple of the block, as direct I/O wants them.
pub struct Block {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Block {
    /// Zeroes.
    pub fn new(len: usize) -> Block {
        // The vector never grows, so that its address and the aligned start in it stay.
        let bytes = vec![0; len + BLOCK_BYTES];
        let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Block { bytes, start, len }
    }

    /// The same bytes, fewer of them.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Any bytes, so many of them: at most as many as it was made with.
    pub fn renew(&mut self, len: usize) {
        assert!(self.start + len <= self.bytes.len(), "it was made as long");
        self.len = len;
    }
}

impl Clone for Block {
    fn clone(&self) -> Block {
        let mut copy = Block::new(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl PartialEq for Block {
    fn eq(&self, other: &Block) -> bool {
        self[..] == other[..]
    }
}

impl Eq for Block {}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Block {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({} bytes)", self.len)
    }
}
