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

use crate::log;

/// Version of the data directory's layout.
pub const DIRECTORY_VERSION: u32 = 2;
/// The version before, which is read too.
const DIRECTORY_VERSION_BEFORE: u32 = 1;

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
    /// Pages of the table of tasks below this one hold what was placed there from an earlier generation, and no new task.
    pub first_page: u32,
    /// From there on each shard has every so many pages, as a power of two: no two shards have the same one.
    pub page_shift: u8,
}

impl Manifest {
    /// The manifest of a new directory.
    pub fn new(log_id: u128, shards: u16, segment_bytes: u64) -> Manifest {
        Manifest {
            log_id,
            generation: 1,
            shards,
            segment_bytes,
            first_page: 0,
            page_shift: page_shift(shards),
        }
    }

    /// The manifest of the next generation, with so many shards, where none of this one has used a page from `used_pages` on.
    pub fn next(&self, shards: u16, used_pages: u32) -> Manifest {
        Manifest {
            generation: self.generation + 1,
            shards,
            first_page: used_pages,
            page_shift: page_shift(shards),
            ..*self
        }
    }

    /// True if no two shards have a task at the same place of their tables, so that one shard can take over both. Only
    /// directories of the version before may have such shards.
    pub fn places_are_apart(&self) -> bool {
        1 << self.page_shift >= u32::from(self.shards)
    }

    /// What identifies the log of a shard. Logs of another generation are not taken for this one's.
    pub fn log(&self, shard: u16) -> log::Options {
        log::Options {
            shard,
            log_id: self.log_id.wrapping_add(u128::from(self.generation - 1)),
            segment_bytes: self.segment_bytes,
        }
    }

    /// The folder of a shard's log in a data directory.
    pub fn folder(&self, directory: &Path, shard: u16) -> PathBuf {
        directory.join(self.folder_name(shard))
    }

    /// Its name.
    pub fn folder_name(&self, shard: u16) -> String {
        folder_name(self.generation, shard)
    }
}

/// The power of two that is no smaller than the number of shards.
fn page_shift(shards: u16) -> u8 {
    shards.next_power_of_two().trailing_zeros() as u8
}

fn folder_name(generation: u64, shard: u16) -> String {
    match generation {
        1 => format!("shard-{shard:03}"),
        _ => format!("shard-{shard:03}.{generation}"),
    }
}

/// Generation and shard of a folder with this name.
fn parse_folder_name(name: &str) -> Option<(u64, u16)> {
    let rest = name.strip_prefix("shard-")?;
    let (shard, generation) = match rest.split_once('.') {
        Some((shard, generation)) => (shard.parse().ok()?, generation.parse().ok()?),
        None => (rest.parse().ok()?, 1),
    };
    (folder_name(generation, shard) == name).then_some((generation, shard))
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
                "{} has version {version}, this program reads {DIRECTORY_VERSION_BEFORE} and {DIRECTORY_VERSION}; start the version \
                 that wrote it",
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

    /// Makes the folders of the shards, without any file in them. They are on the disk when this returns.
    pub fn make_folders(&self, manifest: &Manifest) -> Result<(), DirectoryError> {
        for shard in 0..manifest.shards {
            let folder = manifest.folder(&self.path, shard);
            fs::create_dir_all(&folder).map_err(|error| failed("make", &folder, error))?;
        }
        flush_directory(&self.path)
    }

    /// Removes the folders of shards that are not the manifest's: what a crash has left of logs that were being made, or of
    /// logs whose tasks have all been placed on other shards. Only for a directory whose logs have all been found sound.
    pub fn remove_leftovers(&self) -> Result<(), DirectoryError> {
        let Some(manifest) = self.manifest else {
            return Ok(());
        };
        let mut removed = false;
        for folder in leftovers(&self.path, &manifest)? {
            fs::remove_dir_all(&folder).map_err(|error| failed("remove", &folder, error))?;
            removed = true;
        }
        match removed {
            true => flush_directory(&self.path),
            false => Ok(()),
        }
    }

    /// Makes the folders of the shards and then the manifest that names them.
    pub fn write(&mut self, manifest: Manifest) -> Result<(), DirectoryError> {
        self.make_folders(&manifest)?;
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
        let first = Manifest::new(0, 1, 0);
        self.manifest.unwrap_or(first).folder(&self.path, shard)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The folder of a shard's log in a data directory, as its manifest says; without one, that of a first generation.
pub fn shard_folder(directory: &Path, shard: u16) -> PathBuf {
    let manifest = read_manifest(directory).ok().flatten();
    let manifest = manifest.unwrap_or(Manifest::new(0, 1, 0));
    manifest.folder(directory, shard)
}

/// Folders of shards that are not the manifest's.
fn leftovers(directory: &Path, manifest: &Manifest) -> Result<Vec<PathBuf>, DirectoryError> {
    let failed = |error| failed("list", directory, error);
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let of = name.to_str().and_then(parse_folder_name);
        if of.is_some_and(|(generation, _)| generation != manifest.generation) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
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
        "pelton-data {DIRECTORY_VERSION}\nlog_id {:032x}\ngeneration {}\nshards {}\nsegment_bytes {}\nfirst_page {}\n\
         page_shift {}\n",
        manifest.log_id,
        manifest.generation,
        manifest.shards,
        manifest.segment_bytes,
        manifest.first_page,
        manifest.page_shift
    );
    with_checksum(body)
}

/// As the version before wrote it.
fn encode_before(manifest: &Manifest) -> String {
    let body = format!(
        "pelton-data {DIRECTORY_VERSION_BEFORE}\nlog_id {:032x}\ngeneration {}\nshards {}\nsegment_bytes {}\n",
        manifest.log_id, manifest.generation, manifest.shards, manifest.segment_bytes
    );
    with_checksum(body)
}

fn with_checksum(body: String) -> String {
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
    let before = version == DIRECTORY_VERSION_BEFORE.to_string();
    if !before && version != DIRECTORY_VERSION.to_string() {
        return Err(DirectoryError::Version {
            path: path.to_owned(),
            version: version.to_owned(),
        });
    }
    let log_id = u128::from_str_radix(field("log_id")?, 16).map_err(|_| damaged("log_id"))?;
    let mut number = |name: &str| -> Result<u64, DirectoryError> {
        field(name)?.parse().map_err(|_| damaged(name))
    };
    let mut manifest = Manifest {
        log_id,
        generation: number("generation")?,
        shards: u16::try_from(number("shards")?).map_err(|_| damaged("shards"))?,
        segment_bytes: number("segment_bytes")?,
        first_page: 0,
        page_shift: 0,
    };
    if !before {
        manifest.first_page =
            u32::try_from(number("first_page")?).map_err(|_| damaged("first_page"))?;
        manifest.page_shift =
            u8::try_from(number("page_shift")?).map_err(|_| damaged("page_shift"))?;
    }
    let written = match before {
        true => encode_before(&manifest),
        false => encode(&manifest),
    };
    if text != written {
        return Err(damaged("the checksum does not match"));
    }
    if manifest.shards == 0 || manifest.generation == 0 || manifest.page_shift > 16 {
        return Err(damaged("it says what no program writes"));
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
        let manifest = Manifest::new(7 << 90, 3, 64 << 20);
        assert_eq!(
            (manifest.page_shift, manifest.places_are_apart()),
            (2, true)
        );
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
            text.replace("pelton-data 2", "pelton-data 9"),
        )
        .unwrap();
        let error = DataDirectory::open(&path).unwrap_err();
        assert!(matches!(error, DirectoryError::Version { .. }), "{error}");
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_manifest_of_the_version_before_is_read() {
        let path = Path::new("MANIFEST");
        let kept = "pelton-data 1\nlog_id 0123456789abcdef0123456789abcdef\ngeneration 1\nshards 2\n\
                    segment_bytes 67108864\ncrc32c 7c8b3508\n";
        let read = decode(kept, path).unwrap();
        assert_eq!((read.shards, read.segment_bytes), (2, 64 << 20));
        assert!(!read.places_are_apart());
        for (shards, apart) in [(1, true), (3, false)] {
            let manifest = Manifest {
                page_shift: 0,
                ..Manifest::new(9, shards, 4 << 20)
            };
            let read = decode(&encode_before(&manifest), path).unwrap();
            assert_eq!((read, read.places_are_apart()), (manifest, apart));
        }
    }

    #[test]
    fn another_generation_has_other_folders_and_other_logs_and_nothing_else_is_left_over() {
        let path = std::env::temp_dir().join(format!("pelton-generation-{}", std::process::id()));
        let first = Manifest::new(9, 3, 4 << 20);
        let mut directory = DataDirectory::open(&path).unwrap();
        directory.write(first).unwrap();
        for name in ["history", "shard-1", "shard-001.x", "shard-001.1"] {
            fs::create_dir_all(path.join(name)).unwrap();
        }
        directory.remove_leftovers().unwrap();
        let second = first.next(2, 17);
        assert_eq!((second.generation, second.first_page), (2, 17));
        assert_ne!(first.log(1), second.log(1));
        directory.make_folders(&second).unwrap();
        let names = |directory: &DataDirectory| {
            let entries = fs::read_dir(directory.path()).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.filter(|name| name.starts_with("shard-")).collect();
            names.sort();
            names.join(" ")
        };
        assert_eq!(
            names(&directory),
            "shard-000 shard-000.2 shard-001 shard-001.1 shard-001.2 shard-001.x shard-002 shard-1"
        );
        directory.remove_leftovers().unwrap();
        assert!(!names(&directory).contains(".2"), "half-made logs go");
        directory.write(second).unwrap();
        directory.remove_leftovers().unwrap();
        assert_eq!(
            names(&directory),
            "shard-000.2 shard-001.1 shard-001.2 shard-001.x shard-1"
        );
        assert_eq!(directory.shard(1), path.join("shard-001.2"));
        drop(directory);
        assert_eq!(shard_folder(&path, 1), path.join("shard-001.2"));
        fs::remove_dir_all(&path).unwrap();
    }
}
