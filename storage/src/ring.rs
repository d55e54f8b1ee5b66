//! The real device: one io_uring ring for everything that a shard's log does. A commit is a linked write and flush
//! from registered buffers; filling, reading back and what concerns names run beside it; and the bell of the shard's
//! inboxes is read there too, so that one wait covers all of it and no wake-up depends on a second loop.
//! `docs/decisions/0001-one-ring.md` has what was measured.

use std::{
    collections::VecDeque,
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use pelton_core::limits::BATCH_BYTES_MAX;

use crate::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output, Tag},
    format::BLOCK_BYTES,
    log::BUFFER_COUNT,
    segment::FILL_PIECE_BYTES,
};

const RING_ENTRIES: u32 = 64;
/// Operations beside the commit that the ring holds at once; more wait their turn.
const BESIDE_MAX: usize = 32;
const USER_WRITE: u64 = 1;
const USER_FLUSH: u64 = 2;
const USER_BELL: u64 = 3;
/// From here on: the place of an operation beside the commit.
const USER_BESIDE: u64 = 16;

struct Commit {
    tag: Tag,
    bytes: usize,
    /// What the write said, where it failed or was short.
    error: Option<DeviceError>,
}

/// An operation beside the commit, with everything that the kernel may still touch.
struct Beside {
    tag: Tag,
    op: DeviceOp,
    block: Block,
    names: [CString; 2],
    /// The file of a creation, once it is open and its space is being reserved.
    created: Option<OwnedFd>,
}

/// The device of one shard's log. Made and used on the shard's thread only.
pub struct RingDevice {
    directory: PathBuf,
    directory_file: File,
    ring: IoUring,
    bell: RawFd,
    bell_count: Box<u64>,
    bell_armed: bool,
    buffers: Vec<Block>,
    registered: bool,
    zeroes: Block,
    files: Vec<Option<File>>,
    finished: VecDeque<(Tag, Result<Output, DeviceError>)>,
    commit: Option<Commit>,
    beside: Vec<Option<Box<Beside>>>,
    waiting: VecDeque<(Tag, DeviceOp)>,
    /// Entries pushed that the kernel has not been told of.
    unsubmitted: bool,
}

/// Makes a ring and drops it: an error says why no device can be opened here.
pub fn probe() -> io::Result<()> {
    make_ring().map(drop)
}

fn make_ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(RING_ENTRIES)
}

impl RingDevice {
    /// Opens the directory, which must exist. `bell` is an eventfd that outlives the device: a write to it ends a
    /// wait.
    pub fn open(directory: &Path, bell: RawFd) -> Result<RingDevice, DeviceError> {
        let directory_file =
            File::open(directory).map_err(|error| failed("open", directory, &error))?;
        let ring = make_ring().map_err(|error| failed("io_uring_setup for", directory, &error))?;
        let mut buffers: Vec<Block> = (0..BUFFER_COUNT)
            .map(|_| Block::new(BATCH_BYTES_MAX))
            .collect();
        let vectors: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|buffer| libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            })
            .collect();
        // SAFETY: the buffers' memory never moves and lives as long as the ring, which is dropped before them.
        let registered = unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
        Ok(RingDevice {
            directory: directory.to_owned(),
            directory_file,
            ring,
            bell,
            bell_count: Box::new(0),
            bell_armed: false,
            buffers,
            registered,
            zeroes: Block::new(FILL_PIECE_BYTES),
            files: Vec::new(),
            finished: VecDeque::new(),
            commit: None,
            beside: (0..BESIDE_MAX).map(|_| None).collect(),
            waiting: VecDeque::new(),
            unsubmitted: false,
        })
    }

    /// False if the memlock limit was too low to register the buffers with the kernel: it works, a little slower.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// True if an operation has ended that [`Device::completed`] has not told yet.
    pub fn has_completed(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Waits until the bell rings, an operation ends, or `timeout` is over.
    pub fn wait(&mut self, timeout: Duration) {
        if !self.bell_armed {
            let read = opcode::Read::new(
                types::Fd(self.bell),
                std::ptr::from_mut(&mut *self.bell_count).cast(),
                size_of::<u64>() as u32,
            );
            self.push(&read.build().user_data(USER_BELL));
            self.bell_armed = true;
        }
        let time = types::Timespec::from(timeout);
        let arguments = types::SubmitArgs::new().timespec(&time);
        let waited = self.ring.submitter().submit_with_args(1, &arguments);
        self.unsubmitted = false;
        match waited {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => panic!("io_uring_enter: {error}"),
        }
        self.reap();
    }

    /// Takes what has completed without waiting.
    pub fn reap(&mut self) {
        self.submit();
        if self.ring.submission().taskrun() {
            // Completions are posted only by an enter that asks for events.
            const GETEVENTS: u32 = 1;
            // SAFETY: nothing is submitted, and there is no argument for the kernel to read.
            let _ = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 0, GETEVENTS, None)
            };
        }
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            self.on_entry(entry.user_data(), entry.result());
        }
    }

    fn on_entry(&mut self, user_data: u64, result: i32) {
        match user_data {
            USER_BELL => {
                self.bell_armed = false;
            }
            USER_WRITE => {
                // A success is not reported. What is reported is a failure or a short write, and the linked flush is
                // cancelled, which is reported too.
                let bytes = self.commit.as_ref().expect("a commit is in flight").bytes;
                let error = if result < 0 {
                    system_error("write", &self.directory, -result)
                } else {
                    self.short_write(result, bytes)
                };
                let commit = self.commit.as_mut().expect("a commit is in flight");
                commit.error = Some(error);
            }
            USER_FLUSH => {
                let commit = self.commit.take().expect("a commit is in flight");
                let result = match commit.error {
                    Some(error) => Err(error),
                    None if result < 0 => Err(system_error("flush", &self.directory, -result)),
                    None => Ok(Output::Done),
                };
                self.finished.push_back((commit.tag, result));
            }
            beside => self.on_beside((beside - USER_BESIDE) as usize, result),
        }
    }

    /// Tells the kernel what was pushed since.
    fn submit(&mut self) {
        if std::mem::take(&mut self.unsubmitted) {
            match self.ring.submit() {
                Ok(_) => {}
                // What was not taken is taken with the next call.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) =>
                {
                    self.unsubmitted = true;
                }
                Err(error) => panic!("io_uring_enter: {error}"),
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to, a buffer of this device or its bell counter, lives as long as the ring.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the ring is larger than what is in flight");
        self.unsubmitted = true;
    }

    fn start_commit(&mut self, tag: Tag, file: FileId, offset: u64, buffer: usize, bytes: usize) {
        assert!(self.commit.is_none(), "one commit at a time");
        assert!(bytes.is_multiple_of(BLOCK_BYTES) && bytes <= self.buffers[buffer].len());
        let fd = types::Fd(self.file(file).as_raw_fd());
        let pointer = self.buffers[buffer].as_ptr();
        let write = if self.registered {
            opcode::WriteFixed::new(fd, pointer, bytes as u32, buffer as u16)
                .offset(offset)
                .build()
        } else {
            opcode::Write::new(fd, pointer, bytes as u32)
                .offset(offset)
                .build()
        };
        let flags = squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS;
        self.push(&write.flags(flags).user_data(USER_WRITE));
        let flush = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
        self.push(&flush.build().user_data(USER_FLUSH));
        self.commit = Some(Commit {
            tag,
            bytes,
            error: None,
        });
        self.submit();
    }

    /// Writes and flushes in one call that ends when both have: no worker of the kernel takes part, which is a third of
    /// the processor time of the linked pair and a quarter of its time. `docs/decisions/0004-a-lone-batch.md` has what
    /// was measured.
    fn commit_blocking(
        &mut self,
        file: FileId,
        offset: u64,
        buffer: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        assert!(self.commit.is_none(), "one commit at a time");
        assert!(bytes.is_multiple_of(BLOCK_BYTES));
        let fd = self.file(file).as_raw_fd();
        let vector = libc::iovec {
            iov_base: self.buffers[buffer][..bytes].as_ptr().cast_mut().cast(),
            iov_len: bytes,
        };
        loop {
            // SAFETY: the one vector covers a buffer of this device, which the kernel only reads.
            let written = unsafe { libc::pwritev2(fd, &vector, 1, offset as i64, libc::RWF_DSYNC) };
            if written == bytes as isize {
                return Ok(());
            }
            if written >= 0 {
                return Err(self.short_write(written as i32, bytes));
            }
            let error = io::Error::last_os_error();
            // Unlike a second flush, a second try here writes everything again.
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(failed("write", &self.directory, &error));
            }
        }
    }

    fn short_write(&self, written: i32, bytes: usize) -> DeviceError {
        DeviceError {
            kind: DeviceErrorKind::Short,
            what: format!(
                "write to {}: {written} of {bytes} bytes",
                self.directory.display()
            ),
        }
    }

    /// Starts an operation beside the commit, or has it wait for a place.
    fn start_beside(&mut self, tag: Tag, mut op: DeviceOp) {
        if let DeviceOp::Close { file } = op {
            self.files[file.0 as usize] = None;
            self.finished.push_back((tag, Ok(Output::Done)));
            return;
        }
        let Some(place) = self.beside.iter().position(Option::is_none) else {
            self.waiting.push_back((tag, op));
            return;
        };
        let name = |name: &str| CString::new(name).expect("names of the log have no zero byte");
        let none = CString::default;
        let (block, names) = match &mut op {
            DeviceOp::Read { into, .. } => {
                (std::mem::replace(into, Block::new(0)), [none(), none()])
            }
            DeviceOp::Write { data, .. } => {
                let mut block = Block::new(data.len());
                block.copy_from_slice(data);
                (block, [none(), none()])
            }
            DeviceOp::Create { name: made, .. } => (Block::new(0), [name(made), none()]),
            DeviceOp::Remove { name: removed } => (Block::new(0), [name(removed), none()]),
            DeviceOp::Rename { from, to } => (Block::new(0), [name(from), name(to)]),
            DeviceOp::Zero { bytes, .. } => {
                assert!(*bytes <= self.zeroes.len());
                (Block::new(0), [none(), none()])
            }
            DeviceOp::Flush { .. } | DeviceOp::FlushDirectory => (Block::new(0), [none(), none()]),
            DeviceOp::List
            | DeviceOp::Open { .. }
            | DeviceOp::Commit { .. }
            | DeviceOp::Close { .. } => unreachable!("{op:?} is not started beside a commit"),
        };
        let mut beside = Box::new(Beside {
            tag,
            op,
            block,
            names,
            created: None,
        });
        let entry = self
            .entry_of(&mut beside)
            .user_data(USER_BESIDE + place as u64);
        self.beside[place] = Some(beside);
        self.push(&entry);
    }

    /// What is asked of the kernel. The entry points into the operation, which stays in its place until it has ended.
    fn entry_of(&self, beside: &mut Beside) -> squeue::Entry {
        let directory = types::Fd(self.directory_file.as_raw_fd());
        let fd = |file: FileId| {
            let file = self.files[file.0 as usize].as_ref();
            types::Fd(file.expect("a file is used until it is closed").as_raw_fd())
        };
        let [first, second] = &beside.names;
        match beside.op {
            DeviceOp::Read { file, offset, .. } => {
                let bytes = beside.block.len() as u32;
                opcode::Read::new(fd(file), beside.block.as_mut_ptr(), bytes)
                    .offset(offset)
                    .build()
            }
            DeviceOp::Write { file, offset, .. } => {
                let bytes = beside.block.len() as u32;
                opcode::Write::new(fd(file), beside.block.as_ptr(), bytes)
                    .offset(offset)
                    .build()
            }
            DeviceOp::Zero {
                file,
                offset,
                bytes,
            } => opcode::Write::new(fd(file), self.zeroes.as_ptr(), bytes as u32)
                .offset(offset)
                .build(),
            DeviceOp::Flush { file } => opcode::Fsync::new(fd(file))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            DeviceOp::FlushDirectory => opcode::Fsync::new(directory).build(),
            DeviceOp::Create { bytes, .. } => match &beside.created {
                None => opcode::OpenAt::new(directory, first.as_ptr())
                    .flags(
                        libc::O_RDWR
                            | libc::O_CREAT
                            | libc::O_EXCL
                            | libc::O_DIRECT
                            | libc::O_CLOEXEC,
                    )
                    .mode(0o600)
                    .build(),
                Some(created) => {
                    opcode::Fallocate::new(types::Fd(created.as_raw_fd()), bytes).build()
                }
            },
            DeviceOp::Remove { .. } => opcode::UnlinkAt::new(directory, first.as_ptr()).build(),
            DeviceOp::Rename { .. } => {
                opcode::RenameAt::new(directory, first.as_ptr(), directory, second.as_ptr()).build()
            }
            DeviceOp::List
            | DeviceOp::Open { .. }
            | DeviceOp::Commit { .. }
            | DeviceOp::Close { .. } => unreachable!("refused by start_beside"),
        }
    }

    fn on_beside(&mut self, place: usize, result: i32) {
        let mut beside = self.beside[place].take().expect("it was in flight");
        let failure = (result < 0).then(|| {
            let what = match &beside.op {
                DeviceOp::Read { .. } => "read",
                DeviceOp::Flush { .. } | DeviceOp::FlushDirectory => "flush",
                DeviceOp::Create { .. } => "create",
                DeviceOp::Remove { .. } => "remove",
                DeviceOp::Rename { .. } => "rename",
                _ => "write",
            };
            system_error(what, &self.directory, -result)
        });
        let wanted = match &beside.op {
            DeviceOp::Write { data, .. } => data.len(),
            DeviceOp::Zero { bytes, .. } => *bytes,
            _ => 0,
        };
        let outcome = match (failure, &beside.op) {
            (Some(failure), _) => Err(failure),
            (None, DeviceOp::Read { .. }) => {
                beside.block.truncate(result as usize);
                let block = std::mem::replace(&mut beside.block, Block::new(0));
                Ok(Output::Bytes(block))
            }
            (None, DeviceOp::Create { bytes, .. }) => match beside.created.take() {
                None => {
                    // SAFETY: the kernel has just opened the descriptor for this operation, and nobody else knows it.
                    beside.created = Some(unsafe { OwnedFd::from_raw_fd(result) });
                    let entry = self.entry_of(&mut beside);
                    let entry = entry.user_data(USER_BESIDE + place as u64);
                    self.beside[place] = Some(beside);
                    self.push(&entry);
                    return;
                }
                Some(created) => {
                    let bytes = *bytes;
                    Ok(Output::File(self.keep(File::from(created)), bytes))
                }
            },
            (None, _) if wanted > 0 && result as usize != wanted => {
                Err(self.short_write(result, wanted))
            }
            (None, _) => Ok(Output::Done),
        };
        self.finished.push_back((beside.tag, outcome));
        if let Some((tag, op)) = self.waiting.pop_front() {
            self.start_beside(tag, op);
        }
    }

    fn is_at_work(&self) -> bool {
        self.commit.is_some() || self.beside.iter().any(Option::is_some)
    }

    fn file(&self, file: FileId) -> &File {
        let file = self.files[file.0 as usize].as_ref();
        file.expect("a file is used until it is closed")
    }

    fn keep(&mut self, file: File) -> FileId {
        self.files.push(Some(file));
        FileId(self.files.len() as u32 - 1)
    }
}

enum NamesOutput {
    Done,
    Names(Vec<String>),
    File(File, u64),
}

/// What concerns names and space; blocking.
fn names_op(
    op: DeviceOp,
    directory: &Path,
    directory_file: &File,
) -> Result<NamesOutput, DeviceError> {
    let at = |name: &str| directory.join(name);
    match op {
        DeviceOp::List => {
            let entries =
                std::fs::read_dir(directory).map_err(|error| failed("list", directory, &error))?;
            let mut names = Vec::new();
            for entry in entries {
                let entry = entry.map_err(|error| failed("list", directory, &error))?;
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
            Ok(NamesOutput::Names(names))
        }
        DeviceOp::Create { name, bytes } => {
            let path = at(&name);
            let file = direct()
                .create_new(true)
                .open(&path)
                .map_err(|error| failed("create", &path, &error))?;
            // SAFETY: the descriptor is open; the call touches no memory of this process.
            let reserved = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as i64) };
            if reserved != 0 {
                return Err(failed("reserve", &path, &io::Error::last_os_error()));
            }
            Ok(NamesOutput::File(file, bytes))
        }
        DeviceOp::Open { name } => {
            let path = at(&name);
            let file = direct()
                .open(&path)
                .map_err(|error| failed("open", &path, &error))?;
            let metadata = file
                .metadata()
                .map_err(|error| failed("stat", &path, &error))?;
            Ok(NamesOutput::File(file, metadata.len()))
        }
        DeviceOp::Rename { from, to } => {
            std::fs::rename(at(&from), at(&to))
                .map_err(|error| failed("rename", &at(&from), &error))?;
            Ok(NamesOutput::Done)
        }
        DeviceOp::Remove { name } => {
            std::fs::remove_file(at(&name))
                .map_err(|error| failed("remove", &at(&name), &error))?;
            Ok(NamesOutput::Done)
        }
        DeviceOp::FlushDirectory => {
            directory_file
                .sync_all()
                .map_err(|error| failed("flush", directory, &error))?;
            Ok(NamesOutput::Done)
        }
        DeviceOp::Read { .. }
        | DeviceOp::Write { .. }
        | DeviceOp::Zero { .. }
        | DeviceOp::Flush { .. }
        | DeviceOp::Commit { .. }
        | DeviceOp::Close { .. } => unreachable!("this is no operation on names"),
    }
}

fn direct() -> std::fs::OpenOptions {
    let mut options = std::fs::OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_DIRECT);
    options
}

impl Device for RingDevice {
    fn perform(&mut self, op: DeviceOp) -> Result<Output, DeviceError> {
        let path = &self.directory;
        let write = |file: &File, bytes: &[u8], offset: u64| {
            file.write_all_at(bytes, offset)
                .map_err(|error| failed("write", path, &error))
        };
        let flush = |file: &File| {
            file.sync_data()
                .map_err(|error| failed("flush", path, &error))
        };
        match op {
            DeviceOp::Read {
                file,
                offset,
                into: mut block,
            } => {
                let file = self.file(file);
                let mut held = 0;
                while held < block.len() {
                    match file.read_at(&mut block[held..], offset + held as u64) {
                        Ok(0) => break,
                        Ok(read) => held += read,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(failed("read", &self.directory, &error)),
                    }
                }
                block.truncate(held);
                Ok(Output::Bytes(block))
            }
            DeviceOp::Write { file, offset, data } => {
                let mut block = Block::new(data.len());
                block.copy_from_slice(&data);
                write(self.file(file), &block, offset)?;
                Ok(Output::Done)
            }
            DeviceOp::Zero {
                file,
                offset,
                bytes,
            } => {
                write(self.file(file), &Block::new(bytes), offset)?;
                Ok(Output::Done)
            }
            DeviceOp::Flush { file } => {
                flush(self.file(file))?;
                Ok(Output::Done)
            }
            DeviceOp::Commit {
                file,
                offset,
                buffer,
                bytes,
                alone: _,
            } => {
                self.commit_blocking(file, offset, buffer, bytes)?;
                Ok(Output::Done)
            }
            DeviceOp::Close { file } => {
                self.files[file.0 as usize] = None;
                Ok(Output::Done)
            }
            DeviceOp::List
            | DeviceOp::Create { .. }
            | DeviceOp::Open { .. }
            | DeviceOp::Rename { .. }
            | DeviceOp::Remove { .. }
            | DeviceOp::FlushDirectory => {
                Ok(match names_op(op, &self.directory, &self.directory_file)? {
                    NamesOutput::Done => Output::Done,
                    NamesOutput::Names(names) => Output::Names(names),
                    NamesOutput::File(file, bytes) => Output::File(self.keep(file), bytes),
                })
            }
        }
    }

    fn buffers(&mut self) -> &mut [Block] {
        &mut self.buffers
    }

    fn start(&mut self, tag: Tag, op: DeviceOp) {
        if let DeviceOp::Commit {
            file,
            offset,
            buffer,
            bytes,
            alone,
        } = op
        {
            if alone {
                let written = self.commit_blocking(file, offset, buffer, bytes);
                self.finished
                    .push_back((tag, written.map(|()| Output::Done)));
            } else {
                self.start_commit(tag, file, offset, buffer, bytes);
            }
            return;
        }
        self.start_beside(tag, op);
    }

    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)> {
        if self.finished.is_empty() {
            self.reap();
        }
        self.finished.pop_front()
    }

    fn await_one(&mut self) {
        while self.finished.is_empty() && self.is_at_work() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => self.unsubmitted = false,
                // What was not taken is taken with the next call.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(error) => panic!("io_uring_enter: {error}"),
            }
            self.reap();
        }
    }

    fn random(&mut self) -> u128 {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
        u128::from_le_bytes(bytes)
    }
}

impl Drop for RingDevice {
    fn drop(&mut self) {
        // The kernel may still read a buffer or write the bell counter: nothing is freed before it is done.
        if self.bell_armed {
            let one = 1u64.to_ne_bytes();
            // SAFETY: the bell is open, and the eight bytes are there.
            unsafe { libc::write(self.bell, one.as_ptr().cast(), one.len()) };
        }
        self.waiting.clear();
        while self.bell_armed || self.is_at_work() {
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::yield_now();
            }
            self.reap();
        }
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> DeviceError {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DeviceErrorKind::NoSpace,
        io::ErrorKind::NotFound => DeviceErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => DeviceErrorKind::Exists,
        io::ErrorKind::WriteZero => DeviceErrorKind::Short,
        _ => DeviceErrorKind::Io,
    };
    DeviceError {
        kind,
        what: format!("{what} {}: {error}", path.display()),
    }
}

fn system_error(what: &str, path: &Path, number: i32) -> DeviceError {
    failed(what, path, &io::Error::from_raw_os_error(number))
}

const _: () = assert!(FILL_PIECE_BYTES.is_multiple_of(BLOCK_BYTES));
