//! A disk that lives in memory and does what disks do when the power fails: what was not flushed is kept, dropped or
//! torn at 512 bytes, write by write; names that were not flushed come and go. Operations can be made to fail.
//!
//! It can lie, too: a write is lost or goes elsewhere although it is reported done, and a block rots. What should stand
//! in such a place is remembered, so that whoever checks a recovery knows what was damaged, and can repair it.
//!
//! Deterministic: everything random comes from the seed.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output, Tag},
    format::BLOCK_BYTES,
    log::BUFFER_COUNT,
    snapshot::parse_snapshot_name,
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
    /// `bytes` and `durable` may differ; and they do for good, since a flush has failed.
    dirty: bool,
    spoilt: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failing {
    Write,
    Flush,
    NoSpace,
    /// So many reads in a row.
    Read(u32),
    /// A read succeeds and brings wrong bytes.
    Rot,
    /// A write is reported done and nothing of it reaches the disk.
    LostWrite,
    /// A write is reported done and stands elsewhere.
    MisdirectedWrite,
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
    /// What should stand in blocks that the disk has damaged, by file and number of the block.
    truth: BTreeMap<(usize, usize), Vec<u8>>,
    /// The kind of operation at which the power fails, and how many of it are done before; and whether it has failed.
    power_fails: Option<(&'static str, u32)>,
    failed_at: Option<&'static str>,
    /// Changes of files and names so far.
    changes: u64,
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
            truth: BTreeMap::new(),
            power_fails: None,
            failed_at: None,
            changes: 0,
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

    /// What the disk is about to do, by its name in [`DeviceOp::NAMES`].
    pub fn at_work(&self) -> Option<&'static str> {
        self.started.front().map(|(_, op)| op.name())
    }

    /// The power fails: an operation in progress may have got anywhere, and of what was not flushed each write is
    /// kept, dropped or torn.
    pub fn crash(&mut self) {
        self.failing = None;
        self.power_fails = None;
        self.failed_at = None;
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
        for data in self.data.iter_mut().filter(|data| data.dirty) {
            data.dirty = false;
            data.spoilt = false;
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
    }

    /// The power fails when the disk is asked to perform an operation of this kind ([`DeviceOp::NAMES`]), after so many
    /// others of it: that one, and every operation after it, is refused until [`MemoryDevice::crash`] has been called.
    pub fn lose_power_at(&mut self, kind: &'static str, done_before: u32) {
        self.power_fails = Some((kind, done_before));
    }

    /// What the disk was asked to do when the power failed by [`MemoryDevice::lose_power_at`].
    pub fn power_failed_at(&self) -> Option<&'static str> {
        self.failed_at
    }

    /// The next write is reported done and lost.
    pub fn lose_next_write(&mut self) {
        self.failing = Some(Failing::LostWrite);
    }

    /// The next write is reported done and stands elsewhere: at the same place of another file, or at another place of
    /// the same. Where that is where it belongs, it is lost.
    pub fn misdirect_next_write(&mut self) {
        self.failing = Some(Failing::MisdirectedWrite);
    }

    /// A block that holds something rots, in one bit or all over: of a snapshot as often as of the many segments. False
    /// if none was found.
    pub fn rot_somewhere(&mut self) -> bool {
        for _ in 0..64 {
            let of_snapshot = self.random.below(2) == 0;
            let is_of_kind = |name: &str| parse_snapshot_name(name).is_some() == of_snapshot;
            let Some(file) = self.settled_file(is_of_kind) else {
                continue;
            };
            let blocks = self.data[file].bytes.len() / BLOCK_BYTES;
            let block = self.random.below(blocks as u64) as usize;
            let at = block * BLOCK_BYTES;
            if self.data[file].bytes[at..at + BLOCK_BYTES]
                .iter()
                .all(|&byte| byte == 0)
            {
                continue;
            }
            self.remember(file, at, BLOCK_BYTES);
            let all_over = self.random.below(2) == 0;
            let stride = if all_over {
                ROT_STRIDE_BYTES
            } else {
                BLOCK_BYTES
            };
            let first = self.random.below(stride as u64) as usize;
            for offset in (first..BLOCK_BYTES).step_by(stride) {
                let flipped = 1 << self.random.below(8);
                self.data[file].bytes[at + offset] ^= flipped;
                self.data[file].durable[at + offset] ^= flipped;
            }
            return true;
        }
        false
    }

    /// The damaged blocks: name of the file and offset in it.
    pub fn damage(&self) -> Vec<(String, u64)> {
        let named = |file: usize| self.names.iter().find(|&(_, &index)| index == file);
        self.truth
            .keys()
            .filter_map(|&(file, block)| {
                named(file).map(|(name, _)| (name.clone(), (block * BLOCK_BYTES) as u64))
            })
            .collect()
    }

    /// Every damaged block gets what should stand there.
    pub fn repair(&mut self) {
        for ((file, block), bytes) in std::mem::take(&mut self.truth) {
            let at = block * BLOCK_BYTES;
            let data = &mut self.data[file];
            if data.bytes.len() >= at + BLOCK_BYTES {
                data.bytes[at..at + BLOCK_BYTES].copy_from_slice(&bytes);
                data.durable[at..at + BLOCK_BYTES].copy_from_slice(&bytes);
            }
        }
    }

    /// The disk as it would be without its damage, at rest.
    pub fn repaired(&self) -> MemoryDevice {
        let mut copy = self.copied();
        copy.repair();
        copy
    }

    /// The disk as it is, at rest.
    pub fn copied(&self) -> MemoryDevice {
        let mut copy = MemoryDevice::new(self.random.0, self.buffers[0].len());
        copy.data.clone_from(&self.data);
        copy.names.clone_from(&self.names);
        copy.durable_names.clone_from(&self.durable_names);
        copy.truth.clone_from(&self.truth);
        copy
    }

    /// Changes of files and names so far; flushes change nothing.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// A file with a name, all of whose writes are flushed.
    fn settled_file(&mut self, is_meant: impl Fn(&str) -> bool) -> Option<usize> {
        let settled: Vec<usize> = self
            .names
            .iter()
            .filter(|(name, _)| is_meant(name))
            .map(|(_, &file)| file)
            .filter(|&file| {
                let data = &self.data[file];
                data.unflushed.is_empty()
                    && data.bytes.len() >= BLOCK_BYTES
                    && data.durable.len() == data.bytes.len()
            })
            .collect();
        (!settled.is_empty()).then(|| settled[self.random.below(settled.len() as u64) as usize])
    }

    /// Notes what should stand in these blocks, which are about to be damaged.
    fn remember(&mut self, file: usize, at: usize, bytes: usize) {
        let data = &self.data[file].bytes;
        for block in at / BLOCK_BYTES..(at + bytes).div_ceil(BLOCK_BYTES) {
            let from = block * BLOCK_BYTES;
            self.truth
                .entry((file, block))
                .or_insert_with(|| data[from..from + BLOCK_BYTES].to_vec());
        }
    }

    /// A write that its file never sees. What it was to write is the truth from now on, but for headers of segments,
    /// which are read back before they count.
    fn lose(&mut self, file: FileId, offset: u64, bytes: &[u8], header: bool) {
        if header {
            return;
        }
        for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            let number = offset as usize / BLOCK_BYTES + index;
            self.truth.insert((file.0 as usize, number), block.to_vec());
        }
    }

    fn misdirect(&mut self, file: FileId, offset: u64, bytes: &[u8]) {
        let other = if self.random.one_in(2) {
            self.settled_file(|_| true)
        } else {
            None
        };
        let (target, at) = match other {
            Some(other) if other != file.0 as usize => (other, offset as usize),
            Some(_) | None => {
                let before = (offset as usize / BLOCK_BYTES).max(1);
                let block = self.random.below(before as u64) as usize;
                (file.0 as usize, block * BLOCK_BYTES)
            }
        };
        let elsewhere = (target, at) != (file.0 as usize, offset as usize);
        let data = &self.data[target];
        let fits = data.unflushed.is_empty()
            && data.durable.len() == data.bytes.len()
            && at + bytes.len() <= data.bytes.len();
        if !elsewhere || !fits {
            return;
        }
        self.remember(target, at, bytes.len());
        let data = &mut self.data[target];
        data.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        data.durable[at..at + bytes.len()].copy_from_slice(bytes);
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
        self.fail_next_reads(1);
    }

    /// So many reads fail, one after the other.
    pub fn fail_next_reads(&mut self, count: u32) {
        self.failing = Some(Failing::Read(count));
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

    /// Faults that were asked for and have not struck do not strike any more.
    pub fn heal(&mut self) {
        self.failing = None;
        self.space = usize::MAX;
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
                if self.lies(file, offset, &data, false) {
                    return Ok(());
                }
                self.write(file, offset, data)
            }
            DeviceOp::Write { file, offset, data } => {
                if self.lies(file, offset, &data, true) {
                    return Ok(());
                }
                self.write(file, offset, data)
            }
            DeviceOp::Zero {
                file,
                offset,
                bytes,
            } => self.write(file, offset, vec![0; bytes]),
            other => unreachable!("{other:?} writes nothing"),
        }
    }

    /// True if the disk reports this write done and does something else.
    fn lies(&mut self, file: FileId, offset: u64, bytes: &[u8], header: bool) -> bool {
        let misdirected = match self.failing {
            Some(Failing::LostWrite) => false,
            Some(Failing::MisdirectedWrite) => true,
            Some(
                Failing::Write
                | Failing::Flush
                | Failing::NoSpace
                | Failing::Read(_)
                | Failing::Rot,
            )
            | None => return false,
        };
        self.failing = None;
        self.lose(file, offset, bytes, header);
        if misdirected {
            self.misdirect(file, offset, bytes);
        }
        true
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
            Some(
                Failing::Flush
                | Failing::Read(_)
                | Failing::Rot
                | Failing::LostWrite
                | Failing::MisdirectedWrite,
            )
            | None => {}
        }
        let end = offset as usize + bytes.len();
        self.reserve(end.saturating_sub(self.data[file.0 as usize].bytes.len()))?;
        let data = &mut self.data[file.0 as usize];
        if data.bytes.len() < end {
            data.bytes.resize(end, 0);
        }
        data.bytes[offset as usize..end].copy_from_slice(&bytes);
        self.changes += 1;
        if !self.truth.is_empty() {
            for block in offset as usize / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
                self.truth.remove(&(file.0 as usize, block));
            }
        }
        data.dirty = true;
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
            // As on Linux: the pages count as clean from now on, whether they were written or not.
            let data = &mut self.data[file.0 as usize];
            data.durable.resize(data.bytes.len(), 0);
            data.spoilt = true;
            for (offset, bytes) in data.unflushed.drain(..) {
                if self.random.one_in(2) {
                    data.durable[offset..offset + bytes.len()].copy_from_slice(&bytes);
                }
            }
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
        // What a failed flush has dropped is not on the disk after this one either.
        data.dirty = data.spoilt;
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
        if let Some((kind, left)) = &mut self.power_fails
            && *kind == op.name()
        {
            if *left == 0 {
                self.failed_at = Some(op.name());
            }
            *left = left.saturating_sub(1);
        }
        if self.failed_at.is_some() {
            return Err(error(DeviceErrorKind::Io, "the power is gone"));
        }
        match op {
            DeviceOp::List => Ok(Output::Names(self.names())),
            DeviceOp::Create { name, bytes } => {
                if self.names.contains_key(&name) {
                    return Err(error(DeviceErrorKind::Exists, "create: the name exists"));
                }
                self.reserve(bytes as usize)?;
                self.data.push(Data {
                    bytes: vec![0; bytes as usize],
                    dirty: true,
                    ..Data::default()
                });
                let index = self.data.len() - 1;
                self.names.insert(name, index);
                self.changes += 1;
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
                into: mut block,
            } => {
                if let Some(Failing::Read(count)) = self.failing {
                    self.failing = (count > 1).then_some(Failing::Read(count - 1));
                    return Err(error(DeviceErrorKind::Io, "read: simulated EIO"));
                }
                let data = &self.data[file.0 as usize].bytes;
                let start = (offset as usize).min(data.len());
                let end = (start + block.len()).min(data.len());
                block.truncate(end - start);
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
                    self.changes += 1;
                    Ok(Output::Done)
                }
                None => Err(error(DeviceErrorKind::NotFound, "rename: no such name")),
            },
            DeviceOp::Remove { name } => match self.names.remove(&name) {
                Some(_) => {
                    self.changes += 1;
                    Ok(Output::Done)
                }
                None => Err(error(DeviceErrorKind::NotFound, "remove: no such name")),
            },
            DeviceOp::Close { file } => {
                // Space comes back once no name holds the file; an unflushed removal may bring it back.
                let index = file.0 as usize;
                let held = |names: &BTreeMap<String, usize>| names.values().any(|&i| i == index);
                if !held(&self.names) && !held(&self.durable_names) {
                    self.data[index] = Data::default();
                    self.truth.retain(|&(file, _), _| file != index);
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

    fn await_one(&mut self) {
        if self.completed.is_empty() {
            self.run_one();
        }
    }

    fn random(&mut self) -> u128 {
        u128::from(self.random.draw()) << 64 | u128::from(self.random.draw())
    }
}
