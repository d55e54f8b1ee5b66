//! A disk that loses power: one file, served over FUSE by a process of its own.
//!
//! Writes are seen at once and held back until a flush makes them durable. At a cut each write that was held back is
//! dropped, kept or torn at 512 bytes, and nothing is answered any more. After that the disk is there again under another
//! name, with what survived; the old name gives errors only.
//!
//! The process does not touch what is mounted from its file: it would wait for itself. Killed, it takes the connection to
//! the kernel with it, and whoever waits for it gets an error.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs::File,
    io::{self, BufRead, Write as _},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use clap::Args;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, WriteFlags,
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::plan::Dice;

/// What a disk writes all or nothing.
const SECTOR_BYTES: usize = 512;
/// Beyond that the oldest writes become durable by themselves: a disk's own memory is bounded, too.
const HELD_BACK_BYTES_MAX: usize = 64 << 20;
/// The superblock of ext4 spans two sectors and has one checksum: a mount refuses a torn one, and only a repair by hand
/// would go on. Writes that begin here are dropped or kept as a whole.
const SUPERBLOCK_END: u64 = 4096;
/// Of a hundred cuts, those that drop everything.
const ALL_DROPPED: u64 = 20;
/// A flush takes up to one of these times, drawn anew with each cut. The longer it takes, the more a cut finds.
const FLUSH_US_MAX: [u64; 3] = [100, 1_000, 4_000];
/// Of a hundred cuts, those that wait for a flush and come just before it: that is when most hangs on the disk.
const AT_A_FLUSH: u64 = 60;
/// It has to find one of these numbers of bytes, drawn for each such cut: any batch, a larger one, one beside which a
/// segment is being filled.
const FLUSH_BYTES_MIN: [usize; 3] = [1, 64 << 10, 1 << 20];
/// So long is waited for it. Then the cut comes anyway.
const FLUSH_WAIT: Duration = Duration::from_millis(300);
/// The first name's inode; each name after a cut has the next one.
const FIRST_INODE: u64 = 2;
/// The kernel asks again whenever it wants to know.
const TTL: Duration = Duration::ZERO;

#[derive(Args, Clone, Debug)]
pub struct DiskArgs {
    /// Where the file appears
    #[arg(long)]
    folder: PathBuf,
    /// How large it is
    #[arg(long)]
    bytes: u64,
    /// What decides about the fate of writes
    #[arg(long)]
    seed: u64,
}

/// Serves the file until stdin ends. Each line of stdin is a command, and each answer a line of stdout:
/// `cut` -> `cut DROPPED KEPT TORN FLUSHES`, `on` -> `on NAME`, `lie` -> `lies`. A first `on NAME` tells that it serves.
pub fn run(args: &DiskArgs) -> Result<(), String> {
    let said = |error: io::Error| error.to_string();
    let state = State {
        file: BlockFile::new(args.bytes).map_err(said)?,
        bytes: args.bytes,
        inode: FIRST_INODE,
        unanswered: None,
        cut_at_bytes: None,
        fates: None,
        flush_us_max: FLUSH_US_MAX[0],
        dice: Dice::of(&[args.seed, 6]),
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        is_cut: Condvar::new(),
    });
    let mut options = Config::default();
    options.mount_options = vec![MountOption::FSName("pelton-power-cut".into())];
    let served = Served(Arc::clone(&shared));
    let session = Session::new(served, &args.folder, &options)
        .and_then(Session::spawn)
        .map_err(|error| format!("no FUSE at {}: {error}", args.folder.display()))?;
    let answer = |line: String| {
        let mut out = io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush())
    };
    answer(format!("on {}", name_of(FIRST_INODE))).map_err(said)?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(said)?;
        let mut state = shared.lock();
        let told = match line.trim() {
            "cut" => {
                if state.dice.chance(AT_A_FLUSH) {
                    let drawn = state.dice.below(FLUSH_BYTES_MIN.len() as u64);
                    state.cut_at_bytes = Some(FLUSH_BYTES_MIN[drawn as usize]);
                    let waited = shared
                        .is_cut
                        .wait_timeout_while(state, FLUSH_WAIT, |state| state.fates.is_none());
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                state.cut().map_err(said)?;
                let flushes = state.file.flushes;
                let fates = state.fates.take().expect("it is cut");
                format!(
                    "cut {} {} {} {flushes}",
                    fates.dropped, fates.kept, fates.torn
                )
            }
            "on" => {
                state.on();
                format!("on {}", name_of(state.inode))
            }
            "lie" => {
                state.file.lies = true;
                "lies".to_owned()
            }
            other => return Err(format!("{other:?} is no command")),
        };
        drop(state);
        answer(told).map_err(said)?;
    }
    // What is still mounted from it gets errors from here on.
    drop(session);
    Ok(())
}

fn name_of(inode: u64) -> String {
    format!("disk-{}", inode - FIRST_INODE)
}

/// What the kernel's requests and the commands have in common.
struct Shared {
    state: Mutex<State>,
    /// A cut that waited for a flush has come.
    is_cut: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of the writes that a cut found.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Fates {
    dropped: u64,
    kept: u64,
    torn: u64,
}

/// A write that no flush has made durable.
#[derive(Debug)]
struct HeldBack {
    offset: u64,
    bytes: Vec<u8>,
}

/// The bytes of the disk, as they are read and as they would survive. Both are in memory and take only what was written.
#[derive(Debug)]
struct BlockFile {
    current: File,
    durable: File,
    held_back: VecDeque<HeldBack>,
    held_back_bytes: usize,
    flushes: u64,
    /// Flushes are acknowledged and do nothing. Of what is held back then, a cut takes the last writes: a file system that
    /// is damaged beyond use would hide what was above it.
    lies: bool,
}

impl BlockFile {
    fn new(bytes: u64) -> io::Result<BlockFile> {
        let make = |name: &str| -> io::Result<File> {
            let file = memfd_create(name, MemfdFlags::CLOEXEC)?;
            ftruncate(&file, bytes)?;
            Ok(File::from(file))
        };
        Ok(BlockFile {
            current: make("current")?,
            durable: make("durable")?,
            held_back: VecDeque::new(),
            held_back_bytes: 0,
            flushes: 0,
            lies: false,
        })
    }

    fn read(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut read = vec![0; bytes];
        self.current.read_exact_at(&mut read, offset)?;
        Ok(read)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.current.write_all_at(bytes, offset)?;
        self.held_back_bytes += bytes.len();
        self.held_back.push_back(HeldBack {
            offset,
            bytes: bytes.to_vec(),
        });
        while self.held_back_bytes > HELD_BACK_BYTES_MAX {
            self.settle_oldest()?;
        }
        Ok(())
    }

    fn settle_oldest(&mut self) -> io::Result<()> {
        if let Some(write) = self.held_back.pop_front() {
            self.held_back_bytes -= write.bytes.len();
            self.durable.write_all_at(&write.bytes, write.offset)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        while !self.lies && !self.held_back.is_empty() {
            self.settle_oldest()?;
        }
        Ok(())
    }

    /// Decides what survives, in the order of the writes; that is what is read afterwards.
    fn cut(&mut self, dice: &mut Dice) -> io::Result<Fates> {
        let mut fates = Fates::default();
        let all_dropped = dice.chance(ALL_DROPPED);
        self.held_back_bytes = 0;
        let held_back = std::mem::take(&mut self.held_back);
        let first_taken = dice.below(held_back.len() as u64 + 1) as usize;
        for (place, HeldBack { offset, bytes }) in held_back.iter().enumerate() {
            let one_piece = *offset < SUPERBLOCK_END || bytes.len() <= SECTOR_BYTES;
            let drawn = match self.lies {
                true if place < first_taken => 2,
                true => 0,
                false if all_dropped => 0,
                false => dice.below(3),
            };
            match drawn {
                0 => fates.dropped += 1,
                1 if !one_piece => {
                    fates.torn += 1;
                    for (number, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if dice.chance(50) {
                            let at = offset + (number * SECTOR_BYTES) as u64;
                            self.durable.write_all_at(sector, at)?;
                        }
                    }
                }
                _ => {
                    fates.kept += 1;
                    self.durable.write_all_at(bytes, *offset)?;
                }
            }
        }
        for HeldBack { offset, mut bytes } in held_back {
            self.durable.read_exact_at(&mut bytes, offset)?;
            self.current.write_all_at(&bytes, offset)?;
        }
        Ok(fates)
    }
}

/// The disk and its power.
struct State {
    file: BlockFile,
    bytes: u64,
    /// That of the name under which it is there now.
    inode: u64,
    /// What was asked since the power failed; `None` while it is on. None of it is answered before the power comes back,
    /// so that a server which is killed meanwhile has learned nothing of the failure.
    unanswered: Option<Vec<Unanswered>>,
    /// The next flush that would make so many bytes durable finds the power gone.
    cut_at_bytes: Option<usize>,
    /// What the last cut did, until it is told.
    fates: Option<Fates>,
    flush_us_max: u64,
    dice: Dice,
}

enum Unanswered {
    Read(ReplyData),
    Write(ReplyWrite),
    Flush(ReplyEmpty),
}

impl State {
    /// Once only, until the power is on again.
    fn cut(&mut self) -> io::Result<()> {
        self.cut_at_bytes = None;
        if self.unanswered.is_none() {
            self.unanswered = Some(Vec::new());
            self.fates = Some(self.file.cut(&mut self.dice)?);
        }
        Ok(())
    }

    fn on(&mut self) {
        self.inode += 1;
        self.flush_us_max = FLUSH_US_MAX[self.dice.below(FLUSH_US_MAX.len() as u64) as usize];
        for asked in self.unanswered.take().into_iter().flatten() {
            match asked {
                Unanswered::Read(reply) => reply.error(Errno::EIO),
                Unanswered::Write(reply) => reply.error(Errno::EIO),
                Unanswered::Flush(reply) => reply.error(Errno::EIO),
            }
        }
    }
}

/// What the kernel asks.
struct Served(Arc<Shared>);

impl Served {
    fn attributes(&self, state: &State, inode: u64) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            1 => (FileType::Directory, 0o700, 0),
            inode if inode <= state.inode => (FileType::RegularFile, 0o600, state.bytes),
            _ => return None,
        };
        Some(FileAttr {
            ino: INodeNo(inode),
            size,
            blocks: size / SECTOR_BYTES as u64,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: SECTOR_BYTES as u32,
            flags: 0,
        })
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.0.lock();
        let there = name.to_str() == Some(name_of(state.inode).as_str());
        match self.attributes(&state, state.inode) {
            Some(attributes) if there => reply.entry(&TTL, &attributes, Generation(0)),
            Some(_) | None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(&self.0.lock(), inode.0) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Past the kernel's cache: what is not flushed is held back here and nowhere else.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.0.lock();
        if inode.0 != state.inode {
            return reply.error(Errno::EIO);
        }
        if let Some(unanswered) = &mut state.unanswered {
            return unanswered.push(Unanswered::Read(reply));
        }
        let bytes = u64::from(size).min(state.bytes.saturating_sub(offset));
        match state.file.read(offset, bytes as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.0.lock();
        if inode.0 != state.inode {
            return reply.error(Errno::EIO);
        }
        if let Some(unanswered) = &mut state.unanswered {
            return unanswered.push(Unanswered::Write(reply));
        }
        let fits = offset.checked_add(data.len() as u64) <= Some(state.bytes);
        if !fits {
            return reply.error(Errno::ENOSPC);
        }
        match state.file.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn fsync(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let takes = {
            let mut state = self.0.lock();
            let max = state.flush_us_max;
            Duration::from_micros(state.dice.below(max))
        };
        // Whatever else is asked waits for the flush; a cut does not.
        std::thread::sleep(takes);
        let mut state = self.0.lock();
        if inode.0 != state.inode {
            return reply.error(Errno::EIO);
        }
        let held_back = state.file.held_back_bytes;
        if state.cut_at_bytes.is_some_and(|bytes| held_back >= bytes) {
            if state.cut().is_err() {
                // Without a verdict the run would go on with nonsense; its end is seen.
                std::process::abort();
            }
            self.0.is_cut.notify_all();
        }
        if let Some(unanswered) = &mut state.unanswered {
            return unanswered.push(Unanswered::Flush(reply));
        }
        match state.file.flush() {
            Ok(()) => reply.ok(),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 1 << 20;
    const AT: u64 = 64 << 10;

    fn disk() -> BlockFile {
        BlockFile::new(BYTES).expect("there is memory")
    }

    /// Which of the sectors at `AT` have these bytes, after many cuts of the same disk.
    fn cuts(prepare: impl Fn(&mut BlockFile), check: impl Fn(&[u8], Fates)) {
        for seed in 0..64 {
            let mut disk = disk();
            prepare(&mut disk);
            let fates = disk.cut(&mut Dice::of(&[seed])).expect("memory works");
            let left = disk.read(AT, 4096).expect("memory works");
            check(&left, fates);
            let durable = &mut vec![0; 4096];
            disk.durable
                .read_exact_at(durable, AT)
                .expect("memory works");
            assert_eq!(&left, durable, "what is read is what survived");
        }
    }

    #[test]
    fn what_was_flushed_survives_every_cut() {
        cuts(
            |disk| {
                disk.write(AT, &[1; 4096]).expect("memory works");
                disk.flush().expect("memory works");
            },
            |left, fates| {
                assert_eq!(left, [1; 4096]);
                assert_eq!(fates, Fates::default());
            },
        );
    }

    #[test]
    fn what_was_not_flushed_is_dropped_kept_or_torn_at_whole_sectors() {
        let seen = std::cell::Cell::new(Fates::default());
        cuts(
            |disk| {
                disk.write(AT, &[1; 4096]).expect("memory works");
                disk.flush().expect("memory works");
                disk.write(AT, &[2; 4096]).expect("memory works");
            },
            |left, fates| {
                let new = left.chunks(SECTOR_BYTES).filter(|sector| {
                    assert!(sector.iter().all(|byte| *byte == sector[0]));
                    sector[0] == 2
                });
                let new = new.count();
                assert!(match fates {
                    Fates { dropped: 1, .. } => new == 0,
                    Fates { kept: 1, .. } => new == 8,
                    Fates { torn, .. } => torn == 1,
                });
                let mut all = seen.get();
                all.dropped += fates.dropped;
                all.kept += fates.kept;
                all.torn += u64::from(fates.torn == 1 && new > 0 && new < 8);
                seen.set(all);
            },
        );
        let Fates {
            dropped,
            kept,
            torn,
        } = seen.get();
        assert!(dropped > 0 && kept > 0 && torn > 0);
    }

    #[test]
    fn a_lying_flush_makes_nothing_durable() {
        let lost = std::cell::Cell::new(0);
        cuts(
            |disk| {
                disk.lies = true;
                disk.write(AT, &[1; 4096]).expect("memory works");
                disk.flush().expect("memory works");
            },
            |left, _| lost.set(lost.get() + u64::from(left != [1; 4096])),
        );
        assert!(lost.get() > 0);
    }

    #[test]
    fn a_superblock_is_never_torn() {
        for seed in 0..64 {
            let mut disk = disk();
            disk.write(0, &[1; 4096]).expect("memory works");
            disk.cut(&mut Dice::of(&[seed])).expect("memory works");
            let left = disk.read(0, 4096).expect("memory works");
            assert!(left == [0; 4096] || left == [1; 4096]);
        }
    }

    #[test]
    fn what_is_held_back_is_bounded_and_goes_from_the_oldest_on() {
        let mut disk = BlockFile::new(2 * HELD_BACK_BYTES_MAX as u64).expect("there is memory");
        let piece = vec![1; 1 << 20];
        for number in 0..=(HELD_BACK_BYTES_MAX >> 20) as u64 {
            disk.write(number << 20, &piece).expect("memory works");
        }
        assert_eq!(disk.held_back_bytes, HELD_BACK_BYTES_MAX);
        let mut oldest = vec![0; 1 << 20];
        disk.durable
            .read_exact_at(&mut oldest, 0)
            .expect("memory works");
        assert_eq!(oldest, piece);
    }
}
