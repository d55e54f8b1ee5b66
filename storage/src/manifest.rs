//! The data directory: its manifest, its lock, and the folder of each shard's log.
//!
//! `MANIFEST` is replaced as a whole: written beside, flushed, renamed, the directory flushed. It is text, so that an
//! operator can read it, with a checksum, so that nobody edits it by accident.

use std::{
    fmt, fs,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Version of the data directory's layout.
pub const DIRECTORY_VERSION: u32 = 1;

/// The file that makes a folder a data directory.
pub const MANIFEST_NAME: &str = "MANIFEST";

const NEXT_NAME: &str = "MANIFEST.next";
const LOCK_NAME: &str = "LOCK";
const BEGUN_NAME: &str = "BEGUN";
/// What the manifest begins with while a backup is being copied into the directory.
const RESTORING: &str = "pelton-restoring";

/// What a data directory says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Drawn when the directory was made; every segment carries it.
    pub log_id: u128,
    /// Raised with every change of the shards.
    pub generation: u64,
    /// Shards; each has the cells `c` with `c * shards / 4096` equal to its number.
    pub shards: u16,
    /// Bytes of a segment.
    pub segment_bytes: u64,
}

/// Why a data directory cannot be used.
#[derive(Debug)]
pub enum DirectoryError {
    /// Another process uses it.
    Locked { path: PathBuf },
    /// The manifest is damaged.
    Damaged { path: PathBuf, what: String },
    /// The manifest is of another version.
    Version { path: PathBuf, version: String },
    /// The system failed.
    Io { what: String, error: io::Error },
}

impl fmt::Display for DirectoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirectoryError::Locked { path } => write!(
                f,
                "{} is in use by another process; stop that one, or use another data directory",
                path.display()
            ),
            DirectoryError::Damaged { path, what } => write!(
                f,
                "{} is damaged: {what}; nothing was changed; restore the directory from a backup",
                path.display()
            ),
            DirectoryError::Version { path, version } => write!(
                f,
                "{} has version {version}, this program reads {DIRECTORY_VERSION}; start the version that wrote it",
                path.display()
            ),
            DirectoryError::Io { what, error } => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for DirectoryError {}

/// A data directory in use by this process, until this is dropped.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    manifest: Option<Manifest>,
    _lock: File,
}

impl DataDirectory {
    /// Makes the directory if need be, locks it and reads its manifest.
    pub fn open(path: &Path) -> Result<DataDirectory, DirectoryError> {
        fs::create_dir_all(path).map_err(|error| failed("make", path, error))?;
        let lock_path = path.join(LOCK_NAME);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|error| failed("open", &lock_path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(DirectoryError::Locked {
                    path: path.to_owned(),
                });
            }
            Err(fs::TryLockError::Error(error)) => return Err(failed("lock", &lock_path, error)),
        }
        Ok(DataDirectory {
            manifest: read_manifest(path)?,
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// The manifest; `None` in a new directory.
    pub fn manifest(&self) -> Option<Manifest> {
        self.manifest
    }

    /// Makes the folders of the shards and then the manifest that names them.
    pub fn write(&mut self, manifest: Manifest) -> Result<(), DirectoryError> {
        for shard in 0..manifest.shards {
            let folder = self.shard(shard);
            fs::create_dir_all(&folder).map_err(|error| failed("make", &folder, error))?;
        }
        write_whole(&self.path, MANIFEST_NAME, NEXT_NAME, &encode(&manifest))?;
        if let Some(parent) = self.path.parent().filter(|p| !p.as_os_str().is_empty()) {
            flush_directory(parent)?;
        }
        self.manifest = Some(manifest);
        Ok(())
    }

    /// Marks a new directory as one into which a backup is being copied: until [`DataDirectory::write`] nothing starts
    /// on it.
    pub fn begin_restore(&self) -> Result<(), DirectoryError> {
        write_whole(
            &self.path,
            MANIFEST_NAME,
            NEXT_NAME,
            &format!("{RESTORING} 1\n"),
        )
    }

    /// Remembers that every shard has a log from now on: see [`has_begun`].
    pub fn note_begun(&self) -> Result<(), DirectoryError> {
        let place = self.path.join(BEGUN_NAME);
        File::create(&place)
            .and_then(|file| file.sync_all())
            .map_err(|error| failed("create", &place, error))?;
        flush_directory(&self.path)
    }

    /// The folder of a shard's log.
    pub fn shard(&self, shard: u16) -> PathBuf {
        shard_folder(&self.path, shard)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The folder of a shard's log in a data directory.
pub fn shard_folder(directory: &Path, shard: u16) -> PathBuf {
    directory.join(format!("shard-{shard:03}"))
}

/// True once every shard has had a log: a folder that holds none is then not new but has lost it, or its disk is not
/// mounted.
pub fn has_begun(directory: &Path) -> bool {
    directory.join(BEGUN_NAME).exists()
}

/// Reads the manifest without locking the directory; `None` if there is none.
pub fn read_manifest(directory: &Path) -> Result<Option<Manifest>, DirectoryError> {
    let path = directory.join(MANIFEST_NAME);
    match fs::read_to_string(&path) {
        Ok(text) => decode(&text, &path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", &path, error)),
    }
}

fn encode(manifest: &Manifest) -> String {
    let body = format!(
        "pelton-data {DIRECTORY_VERSION}\nlog_id {:032x}\ngeneration {}\nshards {}\nsegment_bytes {}\n",
        manifest.log_id, manifest.generation, manifest.shards, manifest.segment_bytes
    );
    format!("{body}crc32c {:08x}\n", crc32c::crc32c(body.as_bytes()))
}

fn decode(text: &str, path: &Path) -> Result<Manifest, DirectoryError> {
    let damaged = |what: &str| DirectoryError::Damaged {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let mut fields = text.lines().map(|line| line.split_once(' '));
    let mut field = |name: &str| match fields.next() {
        Some(Some((found, value))) if found == name => Ok(value),
        _ => Err(damaged(&format!("the line `{name}` is missing"))),
    };
    if text.starts_with(RESTORING) {
        return Err(damaged(
            "a restore into the directory has not come to its end",
        ));
    }
    let version = field("pelton-data")?;
    if version != DIRECTORY_VERSION.to_string() {
        return Err(DirectoryError::Version {
            path: path.to_owned(),
            version: version.to_owned(),
        });
    }
    let log_id = u128::from_str_radix(field("log_id")?, 16).map_err(|_| damaged("log_id"))?;
    let generation = field("generation")?.parse();
    let shards = field("shards")?.parse();
    let segment_bytes = field("segment_bytes")?.parse();
    let manifest = Manifest {
        log_id,
        generation: generation.map_err(|_| damaged("generation"))?,
        shards: shards.map_err(|_| damaged("shards"))?,
        segment_bytes: segment_bytes.map_err(|_| damaged("segment_bytes"))?,
    };
    if text != encode(&manifest) || manifest.shards == 0 {
        return Err(damaged("the checksum does not match"));
    }
    Ok(manifest)
}

/// Replaces a file of a directory as a whole: the text is written beside it, flushed and renamed, the directory flushed.
pub(crate) fn write_whole(
    directory: &Path,
    name: &str,
    next_name: &str,
    text: &str,
) -> Result<(), DirectoryError> {
    let next = directory.join(next_name);
    let mut file = File::create(&next).map_err(|error| failed("create", &next, error))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| failed("write", &next, error))?;
    fs::rename(&next, directory.join(name)).map_err(|error| failed("rename", &next, error))?;
    flush_directory(directory)
}

/// Flushes the names in a directory.
pub fn flush_directory(path: &Path) -> Result<(), DirectoryError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| failed("flush", path, error))
}

fn failed(what: &str, path: &Path, error: io::Error) -> DirectoryError {
    DirectoryError::Io {
        what: format!("{what} {}", path.display()),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_reads_back_a_second_process_is_kept_out_and_damage_is_named() {
        let path = std::env::temp_dir().join(format!("pelton-manifest-{}", std::process::id()));
        let manifest = Manifest {
            log_id: 7 << 90,
            generation: 1,
            shards: 3,
            segment_bytes: 64 << 20,
        };
        let mut directory = DataDirectory::open(&path).unwrap();
        assert_eq!(directory.manifest(), None);
        directory.begin_restore().unwrap();
        let error = read_manifest(&path).unwrap_err();
        assert!(error.to_string().contains("restore"), "{error}");
        directory.write(manifest).unwrap();
        assert!(directory.shard(2).is_dir());
        assert!(matches!(
            DataDirectory::open(&path),
            Err(DirectoryError::Locked { .. })
        ));
        drop(directory);
        let directory = DataDirectory::open(&path).unwrap();
        assert_eq!(directory.manifest(), Some(manifest));
        assert!(!has_begun(&path));
        directory.note_begun().unwrap();
        assert!(has_begun(&path));
        drop(directory);
        let text = fs::read_to_string(path.join(MANIFEST_NAME)).unwrap();
        fs::write(
            path.join(MANIFEST_NAME),
            text.replace("shards 3", "shards 4"),
        )
        .unwrap();
        let error = DataDirectory::open(&path).unwrap_err();
        assert!(matches!(error, DirectoryError::Damaged { .. }), "{error}");
        fs::write(
            path.join(MANIFEST_NAME),
            text.replace("pelton-data 1", "pelton-data 9"),
        )
        .unwrap();
        let error = DataDirectory::open(&path).unwrap_err();
        assert!(matches!(error, DirectoryError::Version { .. }), "{error}");
        fs::remove_dir_all(&path).unwrap();
    }
}
