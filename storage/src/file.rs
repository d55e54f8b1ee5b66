//! A directory that is only read, by plain system calls: for tools that look at a log and must not change it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::device::{Block, Device, DeviceError, DeviceErrorKind, DeviceOp, FileId, Output, Tag};

/// A shard's folder, opened for reading. Whatever writes is refused.
#[derive(Debug)]
pub struct FileDevice {
    directory: PathBuf,
    files: Vec<Option<File>>,
    finished: Vec<(Tag, Result<Output, DeviceError>)>,
}

impl FileDevice {
    /// Nothing is opened before the first operation.
    pub fn new(directory: &Path) -> FileDevice {
        FileDevice {
            directory: directory.to_owned(),
            files: Vec::new(),
            finished: Vec::new(),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn open(&mut self, name: &str) -> io::Result<Output> {
        let file = File::open(self.directory.join(name))?;
        let bytes = file.metadata()?.len();
        self.files.push(Some(file));
        Ok(Output::File(FileId(self.files.len() as u32 - 1), bytes))
    }

    fn read(&self, file: FileId, offset: u64, mut into: Block) -> io::Result<Output> {
        let Some(Some(file)) = self.files.get(file.0 as usize) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut read = 0;
        while read < into.len() {
            match file.read_at(&mut into[read..], offset + read as u64) {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        into.truncate(read);
        Ok(Output::Bytes(into))
    }

    fn failed(&self, what: &str, error: &io::Error) -> DeviceError {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => DeviceErrorKind::NotFound,
            _ => DeviceErrorKind::Io,
        };
        DeviceError {
            kind,
            what: format!("{what} in {}: {error}", self.directory.display()),
        }
    }
}

impl Device for FileDevice {
    fn perform(&mut self, op: DeviceOp) -> Result<Output, DeviceError> {
        match op {
            DeviceOp::List => match self.list() {
                Ok(names) => Ok(Output::Names(names)),
                Err(error) => Err(self.failed("list the files", &error)),
            },
            DeviceOp::Open { name } => self
                .open(&name)
                .map_err(|error| self.failed(&format!("open {name}"), &error)),
            DeviceOp::Read { file, offset, into } => {
                let bytes = into.len();
                self.read(file, offset, into).map_err(|error| {
                    self.failed(&format!("read {bytes} bytes at {offset}"), &error)
                })
            }
            DeviceOp::Close { file } => {
                if let Some(place) = self.files.get_mut(file.0 as usize) {
                    *place = None;
                }
                Ok(Output::Done)
            }
            DeviceOp::Create { .. }
            | DeviceOp::Write { .. }
            | DeviceOp::Zero { .. }
            | DeviceOp::Flush { .. }
            | DeviceOp::Commit { .. }
            | DeviceOp::Rename { .. }
            | DeviceOp::Remove { .. }
            | DeviceOp::FlushDirectory => Err(DeviceError {
                kind: DeviceErrorKind::Io,
                what: format!("{} is open for reading only", self.directory.display()),
            }),
        }
    }

    fn buffers(&mut self) -> &mut [Block] {
        &mut []
    }

    fn start(&mut self, tag: Tag, op: DeviceOp) {
        let result = self.perform(op);
        self.finished.push((tag, result));
    }

    fn completed(&mut self) -> Option<(Tag, Result<Output, DeviceError>)> {
        self.finished.pop()
    }

    /// What was started has ended already.
    fn await_one(&mut self) {}

    /// Nothing that only reads needs a key.
    fn random(&mut self) -> u128 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_to_their_end_and_nothing_is_written() {
        let path = std::env::temp_dir().join(format!("pelton-file-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("one"), b"0123456789").unwrap();
        let mut device = FileDevice::new(&path);
        let open = DeviceOp::Open { name: "one".into() };
        let Ok(Output::File(file, 10)) = device.perform(open) else {
            panic!("the file opens with its length");
        };
        let read = DeviceOp::Read {
            file,
            offset: 4,
            into: Block::new(100),
        };
        let Ok(Output::Bytes(bytes)) = device.perform(read) else {
            panic!("the file is read");
        };
        assert_eq!(&bytes[..], b"456789");
        let missing = device.perform(DeviceOp::Open { name: "two".into() });
        assert_eq!(missing.unwrap_err().kind, DeviceErrorKind::NotFound);
        for op in [
            DeviceOp::Remove { name: "one".into() },
            DeviceOp::Flush { file },
            DeviceOp::Create {
                name: "two".into(),
                bytes: 1,
            },
        ] {
            assert!(device.perform(op).is_err());
        }
        assert_eq!(fs::read(path.join("one")).unwrap(), b"0123456789");
        fs::remove_dir_all(&path).unwrap();
    }
}
