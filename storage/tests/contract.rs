//! What every device must do, tried on the simulated one and on the real one.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use pelton_core::limits::BATCH_BYTES_MAX;
use pelton_storage::{
    device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output},
    format::BLOCK_BYTES,
    log::BUFFER_COUNT,
    memory::MemoryDevice,
};

const FILE_BYTES: u64 = 1 << 20;

/// A device, and how it is given time.
struct Tried<D> {
    device: D,
    run: fn(&mut D),
    next: u64,
}

impl<D: Device> Tried<D> {
    /// Starts an operation and waits for its end.
    fn live(&mut self, op: DeviceOp) -> Result<Output, DeviceError> {
        self.next += 1;
        self.device.start(self.next, op);
        for _ in 0..10_000 {
            if let Some((tag, result)) = self.device.completed() {
                assert_eq!(tag, self.next, "the tag comes back");
                return result;
            }
            (self.run)(&mut self.device);
        }
        panic!("the operation never ends");
    }

    fn done(&mut self, op: DeviceOp) {
        assert!(matches!(self.live(op), Ok(Output::Done)));
    }

    fn read(&mut self, file: FileId, offset: u64, bytes: usize) -> Vec<u8> {
        let op = DeviceOp::Read {
            file,
            offset,
            into: Block::new(bytes),
        };
        let Output::Bytes(live) = self.live(op.clone()).unwrap() else {
            panic!("a read brings bytes");
        };
        let Output::Bytes(blocking) = self.device.perform(op).unwrap() else {
            panic!("a read brings bytes");
        };
        assert_eq!(live[..], blocking[..], "both ways read the same");
        self.device.await_one(); // Nothing is in flight, and so it ends.
        self.next += 1;
        let into = Block::new(bytes);
        self.device
            .start(self.next, DeviceOp::Read { file, offset, into });
        let mut completed = self.device.completed();
        if completed.is_none() {
            self.device.await_one();
            completed = self.device.completed();
        }
        let Some((tag, Ok(Output::Bytes(awaited)))) = completed else {
            panic!("what was waited for has ended");
        };
        assert_eq!((tag, &awaited[..]), (self.next, &live[..]));
        live.to_vec()
    }

    fn names(&mut self) -> Vec<String> {
        let Output::Names(mut names) = self.device.perform(DeviceOp::List).unwrap() else {
            panic!("a listing brings names");
        };
        names.sort();
        names
    }
}

fn name(name: &str) -> String {
    name.to_owned()
}

fn keeps_the_contract<D: Device>(device: D, run: fn(&mut D)) {
    let mut tried = Tried {
        device,
        run,
        next: 100,
    };
    assert!(tried.device.buffers().len() >= BUFFER_COUNT);
    assert_ne!(tried.device.random(), tried.device.random());

    let create = DeviceOp::Create {
        name: name("a"),
        bytes: FILE_BYTES,
    };
    let Output::File(file, FILE_BYTES) = tried.live(create.clone()).unwrap() else {
        panic!("a creation brings a file of the length asked for");
    };
    let again = tried.live(create).unwrap_err();
    assert_eq!(again.kind, DeviceErrorKind::Exists);
    assert_eq!(tried.read(file, 0, BLOCK_BYTES), vec![0; BLOCK_BYTES]);

    let data: Vec<u8> = (0..2 * BLOCK_BYTES).map(|at| at as u8).collect();
    tried.done(DeviceOp::Write {
        file,
        offset: BLOCK_BYTES as u64,
        data: data.clone(),
    });
    tried.done(DeviceOp::Flush { file });
    assert_eq!(tried.read(file, BLOCK_BYTES as u64, data.len()), data);
    tried.done(DeviceOp::Zero {
        file,
        offset: BLOCK_BYTES as u64,
        bytes: BLOCK_BYTES,
    });
    let both = tried.read(file, BLOCK_BYTES as u64, data.len());
    assert_eq!(both[..BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    assert_eq!(both[BLOCK_BYTES..], data[BLOCK_BYTES..]);

    for alone in [true, false] {
        for buffer in 0..BUFFER_COUNT {
            let bytes = (buffer + 1) * BLOCK_BYTES;
            let byte = buffer as u8 + 1 + 16 * u8::from(alone);
            tried.device.buffers()[buffer][..bytes].fill(byte);
            let offset = 8 * BLOCK_BYTES as u64;
            tried.done(DeviceOp::Commit {
                file,
                offset,
                buffer,
                bytes,
                alone,
            });
            assert_eq!(tried.read(file, offset, bytes), vec![byte; bytes]);
        }
    }
    let end = tried.read(file, FILE_BYTES - BLOCK_BYTES as u64, 4 * BLOCK_BYTES);
    assert_eq!(end.len(), BLOCK_BYTES, "a read ends where the file ends");

    tried.done(DeviceOp::Rename {
        from: name("a"),
        to: name("b"),
    });
    tried.done(DeviceOp::FlushDirectory);
    assert_eq!(tried.names(), ["b"]);
    let open = tried.read(file, 8 * BLOCK_BYTES as u64, BLOCK_BYTES);
    assert_eq!(open[0], BUFFER_COUNT as u8, "it is still open");
    tried.done(DeviceOp::Close { file });
    let open = tried.device.perform(DeviceOp::Open { name: name("b") });
    let Output::File(file, FILE_BYTES) = open.unwrap() else {
        panic!("opening brings the file and its length");
    };
    assert_eq!(
        tried.read(file, 8 * BLOCK_BYTES as u64, BLOCK_BYTES)[0],
        BUFFER_COUNT as u8
    );
    tried.done(DeviceOp::Close { file });
    let missing = tried.device.perform(DeviceOp::Open { name: name("a") });
    assert_eq!(missing.unwrap_err().kind, DeviceErrorKind::NotFound);
    tried.done(DeviceOp::Remove { name: name("b") });
    tried.done(DeviceOp::FlushDirectory);
    let removed = tried.live(DeviceOp::Remove { name: name("b") });
    assert_eq!(removed.unwrap_err().kind, DeviceErrorKind::NotFound);
    assert!(tried.names().is_empty());
}

#[test]
fn the_simulated_device_keeps_the_contract() {
    keeps_the_contract(MemoryDevice::new(1, BATCH_BYTES_MAX), |device| {
        device.run_one();
    });
}

#[cfg(feature = "device")]
#[test]
fn the_real_device_keeps_the_contract() {
    use std::{os::fd::AsRawFd, time::Duration};

    use pelton_storage::ring::RingDevice;

    let folder = std::env::current_dir().unwrap().join(format!(
        "../target/test-data/contract-{}",
        std::process::id()
    ));
    std::fs::create_dir_all(&folder).unwrap();
    let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let device = RingDevice::open(&folder, bell.as_raw_fd()).unwrap();
    keeps_the_contract(device, |device| device.wait(Duration::from_millis(100)));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_misdirected_write_never_reaches_its_own_place() {
    let mut elsewhere = 0;
    for seed in 0..64 {
        let mut device = MemoryDevice::new(seed, BATCH_BYTES_MAX);
        let mut files = Vec::new();
        for name in ["a", "b"] {
            let created = device.perform(DeviceOp::Create {
                name: name.into(),
                bytes: FILE_BYTES,
            });
            let Output::File(file, _) = created.unwrap() else {
                panic!("a creation brings a file");
            };
            let zeroed = DeviceOp::Zero {
                file,
                offset: 0,
                bytes: FILE_BYTES as usize,
            };
            device.perform(zeroed).unwrap();
            device.perform(DeviceOp::Flush { file }).unwrap();
            files.push(file);
        }
        device.misdirect_next_write();
        // At the start of a file, where nothing is in front of it.
        let write = DeviceOp::Write {
            file: files[0],
            offset: 0,
            data: vec![7; BLOCK_BYTES],
        };
        device.perform(write).unwrap();
        assert!(device.contents("a").iter().all(|&byte| byte == 0));
        elsewhere += u32::from(device.contents("b")[0] == 7);
    }
    assert!(elsewhere > 0);
}
