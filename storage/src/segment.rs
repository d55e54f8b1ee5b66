//! Making segments ready and getting rid of them, one device operation at a time.
//!
//! A segment is ready when it is filled (zeroed, or full of an earlier life's bytes), flushed together with its name,
//! and both copies of its header are flushed and read back. The copies are flushed one after the other, so that a
//! crash leaves at least one of them whole: a file with two damaged headers was damaged by the disk.

use pelton_core::planted::{Bug, planted};

use crate::{
    device::{Block, DeviceOp, FileId, Output},
    format::{BLOCK_BYTES, SegmentHeader},
};

/// Bytes of one write while a segment is filled.
pub const FILL_PIECE_BYTES: usize = 128 << 10;

/// A file that holds, held or will hold a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct File {
    pub(crate) id: FileId,
    /// The number in its name.
    pub(crate) number: u32,
}

/// A segment of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) key: u128,
    pub(crate) file: File,
}

/// The name of a segment's file.
pub fn segment_name(number: u32) -> String {
    format!("segment-{number:06}.plt")
}

fn filling_name(number: u32) -> String {
    format!("filling-{number:06}.plt")
}

/// Files are numbered from 1 on, and a log never gets that far: a name with more is not of a log's making.
const FILE_NUMBER_MAX: u32 = u32::MAX / 2;

/// The file number in a segment's name.
pub fn parse_segment_name(name: &str) -> Option<u32> {
    name.strip_prefix("segment-")?
        .strip_suffix(".plt")?
        .parse()
        .ok()
        .filter(|number| *number <= FILE_NUMBER_MAX)
}

/// True for a file whose filling was cut short.
pub fn is_filling_name(name: &str) -> bool {
    name.starts_with("filling-") && name.ends_with(".plt")
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Create,
    Fill,
    FlushFilled,
    Rename,
    FlushName,
    FirstHeader,
    FlushFirst,
    SecondHeader,
    FlushSecond,
    ReadBack,
    Ready,
    Remove,
    FlushRemoved,
    Close,
    Removed,
}

/// A file on its way to being a segment, or to being gone.
#[derive(Debug)]
pub(crate) struct Work {
    stage: Stage,
    number: u32,
    file: Option<FileId>,
    header: SegmentHeader,
    /// Bytes whose zeroing was started.
    filled: u64,
    /// Operations in flight; more than one only while filling.
    flying: u32,
}

/// Where a piece of work stands.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Go on.
    Working,
    /// A segment is ready.
    Ready(Segment),
    /// The file is gone.
    Removed,
    /// What was read back is not what was written: the file is not to be used.
    Mismatch,
}

impl Work {
    /// Makes a new file into the segment of `header`.
    pub(crate) fn create(number: u32, header: SegmentHeader) -> Work {
        Work::new(Stage::Create, number, None, header)
    }

    /// Makes a dead segment's file into the segment of `header`.
    pub(crate) fn recycle(file: File, header: SegmentHeader) -> Work {
        Work::new(Stage::FirstHeader, file.number, Some(file.id), header)
    }

    /// Removes a dead segment's file.
    pub(crate) fn remove(file: File, header: SegmentHeader) -> Work {
        Work::new(Stage::Remove, file.number, Some(file.id), header)
    }

    fn new(stage: Stage, number: u32, file: Option<FileId>, header: SegmentHeader) -> Work {
        Work {
            stage,
            number,
            file,
            header,
            filled: 0,
            flying: 0,
        }
    }

    /// True while the next operation is a piece of filling, which is paced.
    pub(crate) fn is_filling(&self) -> bool {
        self.stage == Stage::Fill
    }

    /// Operations in flight.
    pub(crate) fn flying(&self) -> u32 {
        self.flying
    }

    /// The next operation, or `None` while one in flight must end first.
    pub(crate) fn next_op(&mut self) -> Option<DeviceOp> {
        if self.flying > 0 && self.stage != Stage::Fill {
            return None;
        }
        let file = || self.file.expect("the stage comes after the creation");
        let op = match self.stage {
            Stage::Create => DeviceOp::Create {
                name: filling_name(self.number),
                bytes: self.header.segment_bytes,
            },
            Stage::Fill => {
                let left = self.header.segment_bytes - self.filled;
                if left == 0 {
                    return None;
                }
                let bytes = left.min(FILL_PIECE_BYTES as u64) as usize;
                let offset = self.filled;
                self.filled += bytes as u64;
                DeviceOp::Zero {
                    file: file(),
                    offset,
                    bytes,
                }
            }
            Stage::FlushFilled | Stage::FlushFirst | Stage::FlushSecond => {
                DeviceOp::Flush { file: file() }
            }
            Stage::Rename => DeviceOp::Rename {
                from: filling_name(self.number),
                to: segment_name(self.number),
            },
            Stage::FlushName | Stage::FlushRemoved => DeviceOp::FlushDirectory,
            Stage::FirstHeader | Stage::SecondHeader => DeviceOp::Write {
                file: file(),
                offset: if self.stage == Stage::FirstHeader {
                    0
                } else {
                    BLOCK_BYTES as u64
                },
                data: self.header.encode(),
            },
            Stage::ReadBack => DeviceOp::Read {
                file: file(),
                offset: 0,
                into: Block::new(2 * BLOCK_BYTES),
            },
            Stage::Remove => DeviceOp::Remove {
                name: segment_name(self.number),
            },
            Stage::Close => DeviceOp::Close { file: file() },
            Stage::Ready | Stage::Removed => return None,
        };
        self.flying += 1;
        Some(op)
    }

    /// An operation succeeded.
    pub(crate) fn on_done(&mut self, output: Output) -> Progress {
        self.flying -= 1;
        self.stage = match self.stage {
            Stage::Create => {
                let Output::File(file, _) = output else {
                    panic!("a creation brings a file");
                };
                self.file = Some(file);
                Stage::Fill
            }
            Stage::Fill if self.filled < self.header.segment_bytes || self.flying > 0 => {
                return Progress::Working;
            }
            Stage::Fill => Stage::FlushFilled,
            Stage::FlushFilled => Stage::Rename,
            Stage::Rename if planted(Bug::MissingDirectoryFlush) => Stage::FirstHeader,
            Stage::Rename => Stage::FlushName,
            Stage::FlushName => Stage::FirstHeader,
            Stage::FirstHeader => Stage::FlushFirst,
            Stage::FlushFirst => Stage::SecondHeader,
            Stage::SecondHeader => Stage::FlushSecond,
            Stage::FlushSecond => Stage::ReadBack,
            Stage::ReadBack => {
                let Output::Bytes(bytes) = output else {
                    panic!("a read brings bytes");
                };
                let block = self.header.encode();
                if bytes[..] != [&block[..], &block[..]].concat() {
                    return Progress::Mismatch;
                }
                Stage::Ready
            }
            Stage::Remove => Stage::FlushRemoved,
            Stage::FlushRemoved => Stage::Close,
            Stage::Close => Stage::Removed,
            Stage::Ready | Stage::Removed => unreachable!("nothing is in flight"),
        };
        match self.stage {
            Stage::Ready => Progress::Ready(Segment {
                number: self.header.segment,
                key: self.header.key,
                file: File {
                    id: self.file.expect("it was written to"),
                    number: self.number,
                },
            }),
            Stage::Removed => Progress::Removed,
            Stage::Create
            | Stage::Fill
            | Stage::FlushFilled
            | Stage::Rename
            | Stage::FlushName
            | Stage::FirstHeader
            | Stage::FlushFirst
            | Stage::SecondHeader
            | Stage::FlushSecond
            | Stage::ReadBack
            | Stage::Remove
            | Stage::FlushRemoved
            | Stage::Close => Progress::Working,
        }
    }

    /// An operation failed: what is left of the file, to be closed and, if it never became a segment, removed.
    pub(crate) fn on_failed(&mut self) {
        self.flying -= 1;
    }

    /// What to do with the file of failed work, once nothing is in flight.
    pub(crate) fn abandoned(&self) -> Vec<DeviceOp> {
        let mut ops = Vec::new();
        if matches!(
            self.stage,
            Stage::Create | Stage::Fill | Stage::FlushFilled | Stage::Rename
        ) {
            ops.push(DeviceOp::Remove {
                name: filling_name(self.number),
            });
        }
        if let Some(file) = self.file {
            ops.push(DeviceOp::Close { file });
        }
        ops
    }
}
