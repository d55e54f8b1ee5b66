//! The real device. The commit path is a ring of its own: one linked write and flush at a time from registered
//! buffers, and the bell of the shard's inboxes beside it, so that one wait covers both. Everything else runs as
//! glommio tasks on direct-I/O files in a task queue with fewer shares.
//!
//! A thread that waits in this ring does not run glommio. [`RingDevice::wait`] therefore waits only briefly while
//! background work is in flight, and the caller yields to glommio in between; no wake-up depends on the other side.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use glommio::{
    Latency, Shares, TaskQueueHandle, executor,
    io::{DmaFile, OpenOptions},
    spawn_local_into,
};
use io_uring::{IoUring, opcode, squeue, types};
use pelton_core::limits::BATCH_BYTES_MAX;

use crate::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output, Tag},
    format::BLOCK_BYTES,
    log::BUFFER_COUNT,
    segment::FILL_PIECE_BYTES,
};

const RING_ENTRIES: u32 = 16;
const USER_WRITE: u64 = 1;
const USER_FLUSH: u64 = 2;
const USER_BELL: u64 = 3;

/// The longest wait in the commit ring while glommio has work.
const WAIT_WITH_BACKGROUND: Duration = Duration::from_micros(50);
/// Shares of the background's task queue; the shard's own has 1,000.
const BACKGROUND_SHARES: usize = 100;

#[derive(Clone)]
struct OpenFile {
    file: Rc<File>,
    /// The same file for glommio, opened when the background first needs it.
    dma: Rc<RefCell<Option<Rc<DmaFile>>>>,
}

struct Commit {
    tag: Tag,
    bytes: usize,
    /// What the write said, where it failed or was short.
    error: Option<DeviceError>,
}

type Finished = Rc<RefCell<VecDeque<(Tag, Result<Output, DeviceError>)>>>;

/// The device of one shard's log. Made and used on the shard's thread only, inside a glommio executor.
pub struct RingDevice {
    directory: PathBuf,
    directory_file: Rc<File>,
    ring: IoUring,
    bell: RawFd,
    bell_count: Box<u64>,
    bell_armed: bool,
    buffers: Vec<Block>,
    registered: bool,
    files: Rc<RefCell<Vec<Option<OpenFile>>>>,
    finished: Finished,
    background: Rc<Cell<u32>>,
    queue: TaskQueueHandle,
    commit: Option<Commit>,
}

impl RingDevice {
    /// Opens the directory, which must exist. `bell` is an eventfd that outlives the device: a write to it ends a
    /// wait.
    pub fn open(directory: &Path, bell: RawFd) -> Result<RingDevice, DeviceError> {
        let directory_file =
            File::open(directory).map_err(|error| failed("open", directory, &error))?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(RING_ENTRIES)
            .map_err(|error| failed("io_uring_setup for", directory, &error))?;
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
        let queue = executor().create_task_queue(
            Shares::Static(BACKGROUND_SHARES),
            Latency::NotImportant,
            "background",
        );
        Ok(RingDevice {
            directory: directory.to_owned(),
            directory_file: Rc::new(directory_file),
            ring,
            bell,
            bell_count: Box::new(0),
            bell_armed: false,
            buffers,
            registered,
            files: Rc::default(),
            finished: Rc::default(),
            background: Rc::default(),
            queue,
            commit: None,
        })
    }

    /// False if the memlock limit was too low to register the buffers with the kernel: it works, a little slower.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// True while glommio has work of this device, so that the caller must yield to it.
    pub fn has_background(&self) -> bool {
        self.background.get() > 0
    }

    /// True if an operation has ended that [`Device::completed`] has not told yet.
    pub fn has_completed(&self) -> bool {
        !self.finished.borrow().is_empty()
    }

    /// Waits until the bell rings, the commit ends, or `timeout` is over; with background work at most a moment.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if !self.bell_armed {
            let read = opcode::Read::new(
                types::Fd(self.bell),
                std::ptr::from_mut(&mut *self.bell_count).cast(),
                size_of::<u64>() as u32,
            );
            self.push(&read.build().user_data(USER_BELL));
            self.bell_armed = true;
        }
        let timeout = if self.has_background() {
            Some(timeout.map_or(WAIT_WITH_BACKGROUND, |t| t.min(WAIT_WITH_BACKGROUND)))
        } else {
            timeout
        };
        let waited = match timeout {
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                let arguments = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
            None => self.ring.submit_and_wait(1),
        };
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
                let commit = self.commit.as_mut().expect("a commit is in flight");
                commit.error = Some(if result < 0 {
                    system_error("write", &self.directory, -result)
                } else {
                    DeviceError {
                        kind: DeviceErrorKind::Short,
                        what: format!(
                            "write to {}: {result} of {} bytes",
                            self.directory.display(),
                            commit.bytes
                        ),
                    }
                });
            }
            USER_FLUSH => {
                let commit = self.commit.take().expect("a commit is in flight");
                let result = match commit.error {
                    Some(error) => Err(error),
                    None if result < 0 => Err(system_error("flush", &self.directory, -result)),
                    None => Ok(Output::Done),
                };
                self.finished.borrow_mut().push_back((commit.tag, result));
            }
            other => unreachable!("nothing is submitted as {other}"),
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what the entry points to, a buffer of this device or its bell counter, lives as long as the ring.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the ring is larger than what is in flight");
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
        match self.ring.submit() {
            Ok(_) => {}
            Err(error) => panic!("io_uring_enter: {error}"),
        }
    }

    fn file(&self, file: FileId) -> Rc<File> {
        let files = self.files.borrow();
        let open = files[file.0 as usize].as_ref();
        Rc::clone(&open.expect("a file is used until it is closed").file)
    }

    fn keep(files: &RefCell<Vec<Option<OpenFile>>>, file: File) -> FileId {
        let mut files = files.borrow_mut();
        files.push(Some(OpenFile {
            file: Rc::new(file),
            dma: Rc::default(),
        }));
        FileId(files.len() as u32 - 1)
    }
}

/// One background operation, by glommio where it reads or writes, on its pool of blocking threads where it cannot.
async fn perform_in_background(
    op: DeviceOp,
    directory: PathBuf,
    directory_file: Rc<File>,
    files: Rc<RefCell<Vec<Option<OpenFile>>>>,
) -> Result<Output, DeviceError> {
    let opened = |id: FileId| {
        let files = files.borrow();
        let open = files[id.0 as usize].as_ref();
        open.expect("a file is used until it is closed").clone()
    };
    match op {
        DeviceOp::Read {
            file,
            offset,
            bytes,
        } => {
            let dma = dma_file(opened(file), &directory).await?;
            let read = dma
                .read_at(offset, bytes)
                .await
                .map_err(|error| glommio_failed("read", &directory, error))?;
            let mut block = Block::new(read.len());
            block.copy_from_slice(&read);
            Ok(Output::Bytes(block))
        }
        DeviceOp::Write { file, offset, data } => {
            let dma = dma_file(opened(file), &directory).await?;
            let mut buffer = dma.alloc_dma_buffer(data.len());
            buffer.as_mut().copy_from_slice(&data);
            write_whole(&dma, buffer, offset, &directory).await
        }
        DeviceOp::Zero {
            file,
            offset,
            bytes,
        } => {
            let dma = dma_file(opened(file), &directory).await?;
            let mut buffer = dma.alloc_dma_buffer(bytes);
            buffer.as_mut().fill(0);
            write_whole(&dma, buffer, offset, &directory).await
        }
        DeviceOp::Flush { file } => {
            let dma = dma_file(opened(file), &directory).await?;
            dma.fdatasync()
                .await
                .map_err(|error| glommio_failed("flush", &directory, error))?;
            Ok(Output::Done)
        }
        DeviceOp::Close { file } => {
            let open = files.borrow_mut()[file.0 as usize].take();
            let dma = open.and_then(|open| open.dma.borrow_mut().take());
            if let Some(dma) = dma {
                dma.close_rc()
                    .await
                    .map_err(|error| glommio_failed("close", &directory, error))?;
            }
            Ok(Output::Done)
        }
        DeviceOp::Create { .. }
        | DeviceOp::Rename { .. }
        | DeviceOp::Remove { .. }
        | DeviceOp::FlushDirectory
        | DeviceOp::List
        | DeviceOp::Open { .. } => {
            let directory_fd = directory_file.try_clone();
            let directory_fd =
                directory_fd.map_err(|error| failed("duplicate", &directory, &error))?;
            let done = executor()
                .spawn_blocking(move || names_op(op, &directory, &directory_fd))
                .await?;
            Ok(match done {
                NamesOutput::Done => Output::Done,
                NamesOutput::Names(names) => Output::Names(names),
                NamesOutput::File(file, bytes) => {
                    Output::File(RingDevice::keep(&files, file), bytes)
                }
            })
        }
        DeviceOp::Commit { .. } => unreachable!("commits have a ring of their own"),
    }
}

async fn dma_file(open: OpenFile, directory: &Path) -> Result<Rc<DmaFile>, DeviceError> {
    let OpenFile { file, dma } = open;
    if let Some(dma) = &*dma.borrow() {
        return Ok(Rc::clone(dma));
    }
    // Through /proc, so that a file that was renamed or removed meanwhile is still the same one.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .dma_open(path)
        .await
        .map_err(|error| glommio_failed("open", directory, error))?;
    let opened = Rc::new(opened);
    // Another operation may have opened it meanwhile; then this handle is closed when it is dropped.
    Ok(Rc::clone(dma.borrow_mut().get_or_insert(opened)))
}

async fn write_whole(
    dma: &DmaFile,
    buffer: glommio::io::DmaBuffer,
    offset: u64,
    directory: &Path,
) -> Result<Output, DeviceError> {
    let bytes = buffer.as_ref().len();
    match dma.write_at(buffer, offset).await {
        Ok(written) if written == bytes => Ok(Output::Done),
        Ok(written) => Err(DeviceError {
            kind: DeviceErrorKind::Short,
            what: format!(
                "write to {}: {written} of {bytes} bytes",
                directory.display()
            ),
        }),
        Err(error) => Err(glommio_failed("write", directory, error)),
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
        let write = |file: &File, bytes: &[u8], offset: u64| {
            file.write_all_at(bytes, offset)
                .map_err(|error| failed("write", &self.directory, &error))
        };
        let flush = |file: &File| {
            file.sync_data()
                .map_err(|error| failed("flush", &self.directory, &error))
        };
        match op {
            DeviceOp::Read {
                file,
                offset,
                bytes,
            } => {
                let file = self.file(file);
                let mut block = Block::new(bytes);
                let mut held = 0;
                while held < bytes {
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
                write(&self.file(file), &block, offset)?;
                Ok(Output::Done)
            }
            DeviceOp::Zero {
                file,
                offset,
                bytes,
            } => {
                write(&self.file(file), &Block::new(bytes), offset)?;
                Ok(Output::Done)
            }
            DeviceOp::Flush { file } => {
                flush(&self.file(file))?;
                Ok(Output::Done)
            }
            DeviceOp::Commit {
                file,
                offset,
                buffer,
                bytes,
            } => {
                let file = self.file(file);
                write(&file, &self.buffers[buffer][..bytes], offset)?;
                flush(&file)?;
                Ok(Output::Done)
            }
            DeviceOp::Close { file } => {
                self.files.borrow_mut()[file.0 as usize] = None;
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
                    NamesOutput::File(file, bytes) => {
                        Output::File(RingDevice::keep(&self.files, file), bytes)
                    }
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
        } = op
        {
            self.start_commit(tag, file, offset, buffer, bytes);
            return;
        }
        let finished = Rc::clone(&self.finished);
        let background = Rc::clone(&self.background);
        background.set(background.get() + 1);
        let work = perform_in_background(
            op,
            self.directory.clone(),
            Rc::clone(&self.directory_file),
            Rc::clone(&self.files),
        );
        let task = async move {
            let result = work.await;
            finished.borrow_mut().push_back((tag, result));
            background.set(background.get() - 1);
        };
        spawn_local_into(task, self.queue)
            .expect("the queue lives as long as the executor")
            .detach();
    }

    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)> {
        if self.commit.is_some() {
            self.reap();
        }
        self.finished.borrow_mut().pop_front()
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
        while self.commit.is_some() || self.bell_armed {
            let _ = self.ring.submit_and_wait(1);
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

fn glommio_failed(what: &str, path: &Path, error: glommio::GlommioError<()>) -> DeviceError {
    failed(what, path, &io::Error::from(error))
}

const _: () = assert!(FILL_PIECE_BYTES.is_multiple_of(BLOCK_BYTES));
