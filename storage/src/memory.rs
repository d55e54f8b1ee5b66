//! A disk that lives in memory and does what disks do when the power fails: what was not flushed is kept, dropped or
//! torn at 512 bytes, write by write; names that were not flushed come and go. Operations can be made to fail.
//!
//! Deterministic: everything random comes from the seed.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output, Tag},
    log::BUFFER_COUNT,
};

/// Bytes that a disk writes all or nothing.
const SECTOR_BYTES: usize = 512;

/// A small random number generator (splitmix64), for faults and keys.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0);
        self.draw() % bound
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug, Default)]
struct Data {
    /// What a reader sees now.
    bytes: Vec<u8>,
    /// What the power failing leaves, before unflushed writes are drawn.
    durable: Vec<u8>,
    /// Ranges written since the last flush, with what was written.
    unflushed: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failing {
    Write,
    Flush,
    NoSpace,
    Read,
    /// A read succeeds and brings wrong bytes.
    Rot,
}

/// Bits that a rotten read flips stand in bytes so far from each other, so that it strikes almost every record.
const ROT_STRIDE_BYTES: usize = 64;

/// The disk. Survives crashes; the log on it does not.
#[derive(Debug)]
pub struct MemoryDevice {
    random: Random,
    data: Vec<Data>,
    /// Names as they are, and as the last directory flush left them.
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    buffers: Vec<Block>,
    started: VecDeque<(Tag, DeviceOp)>,
    completed: VecDeque<(Tag, Result<Output, DeviceError>)>,
    failing: Option<Failing>,
    flushes_lie: bool,
    space: usize,
}

impl MemoryDevice {
    /// An empty disk whose faults follow from `seed`.
    pub fn new(seed: u64, buffer_bytes: usize) -> MemoryDevice {
        MemoryDevice {
            random: Random(seed),
            data: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            buffers: (0..BUFFER_COUNT)
                .map(|_| Block::new(buffer_bytes))
                .collect(),
            started: VecDeque::new(),
            completed: VecDeque::new(),
            failing: None,
            flushes_lie: false,
            space: usize::MAX,
        }
    }

    /// Performs the oldest operation that was started, if there is one. Until then nothing of it has happened.
    pub fn run_one(&mut self) -> bool {
        let Some((tag, op)) = self.started.pop_front() else {
            return false;
        };
        let result = self.perform(op);
        self.completed.push_back((tag, result));
        true
    }

    /// Operations started and not yet performed.
    pub fn queued(&self) -> usize {
        self.started.len()
    }

    /// The power fails: an operation in progress may have got anywhere, and of what was not flushed each write is
    /// kept, dropped or torn.
    pub fn crash(&mut self) {
        while let Some((_, op)) = self.started.pop_front() {
            match op {
                DeviceOp::Commit { .. } | DeviceOp::Write { .. } | DeviceOp::Zero { .. } => {
                    if self.random.one_in(2) {
                        let _ = self.write_only(op);
                    }
                }
                op => {
                    if self.random.one_in(2) {
                        let _ = self.perform(op);
                    }
                }
            }
        }
        self.completed.clear();
        for data in &mut self.data {
            let mut survived = std::mem::take(&mut data.durable);
            for (offset, bytes) in data.unflushed.drain(..) {
                let mut keep = |from: usize, to: usize| {
                    if survived.len() < offset + to {
                        survived.resize(offset + to, 0);
                    }
                    survived[offset + from..offset + to].copy_from_slice(&bytes[from..to]);
                };
                match self.random.below(3) {
                    0 => {}
                    1 => keep(0, bytes.len()),
                    _ => {
                        let mut at = 0;
                        while at < bytes.len() {
                            let end = (at + SECTOR_BYTES).min(bytes.len());
                            if self.random.one_in(2) {
                                keep(at, end);
                            }
                            at = end;
                        }
                    }
                }
            }
            data.bytes.clone_from(&survived);
            data.durable = survived;
        }
        // A name that was made, moved or removed without a flush is drawn between before and after.
        if self.random.one_in(2) {
            self.names = self.durable_names.clone();
        }
        self.durable_names = self.names.clone();
        self.failing = None;
    }

    /// Flips a bit of a file, as rot does.
    pub fn rot(&mut self, name: &str, offset: usize) {
        let data = &mut self.data[self.names[name]];
        data.bytes[offset] ^= 1;
        data.durable[offset] ^= 1;
    }

    /// The next write fails.
    pub fn fail_next_write(&mut self) {
        self.failing = Some(Failing::Write);
    }

    /// The next flush fails, and what it should have made durable stays undecided.
    pub fn fail_next_flush(&mut self) {
        self.failing = Some(Failing::Flush);
    }

    /// The next read fails.
    pub fn fail_next_read(&mut self) {
        self.failing = Some(Failing::Read);
    }

    /// The next read succeeds and brings wrong bytes, although the right ones stand on the disk.
    pub fn spoil_next_read(&mut self) {
        self.failing = Some(Failing::Rot);
    }

    /// The next write into a new place finds no space.
    pub fn fail_next_for_space(&mut self) {
        self.failing = Some(Failing::NoSpace);
    }

    /// Flushes answer without flushing, to prove that this is noticed.
    pub fn let_flushes_lie(&mut self) {
        self.flushes_lie = true;
    }

    /// Bytes that all files may have together.
    pub fn limit_space(&mut self, bytes: usize) {
        self.space = bytes;
    }

    /// The names, for tests.
    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// The bytes of a file, for tests.
    pub fn contents(&self, name: &str) -> &[u8] {
        &self.data[self.names[name]].bytes
    }

    fn write_only(&mut self, op: DeviceOp) -> Result<(), DeviceError> {
        match op {
            DeviceOp::Commit {
                file,
                offset,
                buffer,
                bytes,
                alone: _,
            } => {
                let data = self.buffers[buffer][..bytes].to_vec();
                self.write(file, offset, data)
            }
            DeviceOp::Write { file, offset, data } => self.write(file, offset, data),
            DeviceOp::Zero {
                file,
                offset,
                bytes,
            } => self.write(file, offset, vec![0; bytes]),
            other => unreachable!("{other:?} writes nothing"),
        }
    }

    fn write(&mut self, file: FileId, offset: u64, bytes: Vec<u8>) -> Result<(), DeviceError> {
        match self.failing {
            Some(Failing::Write) => {
                self.failing = None;
                return Err(error(DeviceErrorKind::Io, "write: simulated EIO"));
            }
            Some(Failing::NoSpace) => {
                self.failing = None;
                return Err(error(DeviceErrorKind::NoSpace, "write: simulated ENOSPC"));
            }
            Some(Failing::Flush | Failing::Read | Failing::Rot) | None => {}
        }
        let end = offset as usize + bytes.len();
        self.reserve(end.saturating_sub(self.data[file.0 as usize].bytes.len()))?;
        let data = &mut self.data[file.0 as usize];
        if data.bytes.len() < end {
            data.bytes.resize(end, 0);
        }
        data.bytes[offset as usize..end].copy_from_slice(&bytes);
        data.unflushed.push((offset as usize, bytes));
        Ok(())
    }

    fn reserve(&self, growth: usize) -> Result<(), DeviceError> {
        let used: usize = self.data.iter().map(|data| data.bytes.len()).sum();
        if growth > 0 && used + growth > self.space {
            return Err(error(DeviceErrorKind::NoSpace, "no space is left"));
        }
        Ok(())
    }

    fn flush(&mut self, file: FileId) -> Result<(), DeviceError> {
        if self.failing == Some(Failing::Flush) {
            self.failing = None;
            return Err(error(DeviceErrorKind::Io, "flush: simulated EIO"));
        }
        if self.flushes_lie {
            return Ok(());
        }
        let data = &mut self.data[file.0 as usize];
        data.durable.resize(data.bytes.len(), 0);
        for (offset, bytes) in data.unflushed.drain(..) {
            data.durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }
}

fn error(kind: DeviceErrorKind, what: &str) -> DeviceError {
    DeviceError {
        kind,
        what: what.to_owned(),
    }
}

impl Device for MemoryDevice {
    fn perform(&mut self, op: DeviceOp) -> Result<Output, DeviceError> {
        match op {
            DeviceOp::List => Ok(Output::Names(self.names())),
            DeviceOp::Create { name, bytes } => {
                if self.names.contains_key(&name) {
                    return Err(error(DeviceErrorKind::Exists, "create: the name exists"));
                }
                self.reserve(bytes as usize)?;
                self.data.push(Data {
                    bytes: vec![0; bytes as usize],
                    ..Data::default()
                });
                let index = self.data.len() - 1;
                self.names.insert(name, index);
                Ok(Output::File(FileId(index as u32), bytes))
            }
            DeviceOp::Open { name } => match self.names.get(&name) {
                Some(&index) => Ok(Output::File(
                    FileId(index as u32),
                    self.data[index].bytes.len() as u64,
                )),
                None => Err(error(DeviceErrorKind::NotFound, "open: no such name")),
            },
            DeviceOp::Read {
                file,
                offset,
                bytes,
            } => {
                if self.failing == Some(Failing::Read) {
                    self.failing = None;
                    return Err(error(DeviceErrorKind::Io, "read: simulated EIO"));
                }
                let data = &self.data[file.0 as usize].bytes;
                let start = (offset as usize).min(data.len());
                let end = (start + bytes).min(data.len());
                let mut block = Block::new(end - start);
                block.copy_from_slice(&data[start..end]);
                if self.failing == Some(Failing::Rot) {
                    self.failing = None;
                    let first = self.random.below(ROT_STRIDE_BYTES as u64) as usize;
                    for byte in block.iter_mut().skip(first).step_by(ROT_STRIDE_BYTES) {
                        *byte ^= 1 << self.random.below(8);
                    }
                }
                Ok(Output::Bytes(block))
            }
            DeviceOp::Write { .. } | DeviceOp::Zero { .. } => {
                self.write_only(op)?;
                Ok(Output::Done)
            }
            DeviceOp::Flush { file } => {
                self.flush(file)?;
                Ok(Output::Done)
            }
            DeviceOp::Commit { file, .. } => {
                self.write_only(op)?;
                self.flush(file)?;
                Ok(Output::Done)
            }
            DeviceOp::Rename { from, to } => match self.names.remove(&from) {
                Some(index) => {
                    self.names.insert(to, index);
                    Ok(Output::Done)
                }
                None => Err(error(DeviceErrorKind::NotFound, "rename: no such name")),
            },
            DeviceOp::Remove { name } => match self.names.remove(&name) {
                Some(_) => Ok(Output::Done),
                None => Err(error(DeviceErrorKind::NotFound, "remove: no such name")),
            },
            DeviceOp::Close { file } => {
                // Space comes back once no name holds the file; an unflushed removal may bring it back.
                let index = file.0 as usize;
                let held = |names: &BTreeMap<String, usize>| names.values().any(|&i| i == index);
                if !held(&self.names) && !held(&self.durable_names) {
                    self.data[index] = Data::default();
                }
                Ok(Output::Done)
            }
            DeviceOp::FlushDirectory => {
                self.durable_names = self.names.clone();
                Ok(Output::Done)
            }
        }
    }

    fn buffers(&mut self) -> &mut [Block] {
        &mut self.buffers
    }

    fn start(&mut self, tag: Tag, op: DeviceOp) {
        self.started.push_back((tag, op));
    }

    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)> {
        self.completed.pop_front()
    }

    fn random(&mut self) -> u128 {
        u128::from(self.random.draw()) << 64 | u128::from(self.random.draw())
    }
}
