//! Making a data directory of a backup, and looking whether one is whole.
//!
//! Every file is compared with its length and checksum before anything is written, and again as it is copied. Then the logs
//! are read as a start reads them, and what they hold is compared with what the backup says. `MANIFEST` is written last:
//! before that nothing starts on the directory.

use std::{
    fmt, fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use pelton_history::{StoreError, count_rows};
use pelton_storage::{
    backup::{Backup, BadBackup, CopiedFile, ShardCopy, copied_name},
    copy::{CopyError, Sink, judge, make_folder, read_through},
    manifest::{DataDirectory, DirectoryError, flush_directory},
    recover::Outcome,
};

use crate::{
    backup::{Copied, OnCopied, empty, is_empty, real_path},
    engine::HISTORY_FOLDER,
    shard_loop::free_bytes,
};

/// What the file system needs beside the bytes of the files.
const ROOM_SPARE_BYTES: u64 = 1 << 20;

/// Why a backup is not restored, or not whole. Of what was written nothing is left, or nothing that starts.
#[derive(Debug)]
pub enum RestoreError {
    /// The folder is no backup.
    Bad(BadBackup),
    /// A file of it is not what was written.
    File { path: PathBuf, what: String },
    /// A log in it does not hold what it should.
    Log { shard: u16, what: String },
    /// The history in it does not.
    History { what: String },
    /// The place for it will not do.
    Target { path: PathBuf, what: String },
    /// There is no room for it.
    Room {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    /// The data directory.
    Directory(DirectoryError),
    /// The system failed.
    Copy(CopyError),
    /// Whoever wanted it has ended it.
    Stopped,
}

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestoreError::Bad(error) => error.fmt(f),
            RestoreError::File { path, what } => {
                write!(f, "the backup is damaged at {}: {what}", path.display())
            }
            RestoreError::Log { shard, what } => {
                write!(
                    f,
                    "the backup is damaged in the log of shard {shard}: {what}"
                )
            }
            RestoreError::History { what } => {
                write!(f, "the backup is damaged in the history: {what}")
            }
            RestoreError::Target { path, what } => write!(f, "{}: {what}", path.display()),
            RestoreError::Room { path, needed, free } => write!(
                f,
                "{} has no room for what is in the backup: it needs {needed} bytes, and {free} are free there",
                path.display()
            ),
            RestoreError::Directory(error) => error.fmt(f),
            RestoreError::Copy(error) => error.fmt(f),
            RestoreError::Stopped => f.write_str("it was stopped"),
        }
    }
}

impl std::error::Error for RestoreError {}

impl From<CopyError> for RestoreError {
    fn from(error: CopyError) -> RestoreError {
        match error {
            CopyError::Stopped => RestoreError::Stopped,
            CopyError::Log(_) | CopyError::Io { .. } => RestoreError::Copy(error),
        }
    }
}

impl From<DirectoryError> for RestoreError {
    fn from(error: DirectoryError) -> RestoreError {
        RestoreError::Directory(error)
    }
}

/// Looks whether a backup is whole: every file by its checksum, every log as a start reads it, and the counts.
pub fn verify(folder: &Path, progress: &mut OnCopied<'_>) -> Result<Backup, RestoreError> {
    let backup = Backup::read(folder).map_err(RestoreError::Bad)?;
    let mut meter = Meter::new(progress, 2 * backup.bytes());
    check_files(folder, &backup, &mut meter)?;
    check_contents(folder, &backup, &mut meter)?;
    meter.end();
    Ok(backup)
}

/// Copies a backup into a data directory, which must be new or empty, and looks whether it is whole there.
pub fn restore(
    folder: &Path,
    data: &Path,
    progress: &mut OnCopied<'_>,
) -> Result<Backup, RestoreError> {
    let backup = Backup::read(folder).map_err(RestoreError::Bad)?;
    let refused = |what: String| RestoreError::Target {
        path: data.to_owned(),
        what,
    };
    let made = !data.exists();
    if !made && !is_empty(data).map_err(|error| refused(error.to_string()))? {
        return Err(refused(
            "it is not empty: a backup is restored into a new data directory".to_owned(),
        ));
    }
    let real = real_path(data).map_err(|error| refused(error.to_string()))?;
    if fs::canonicalize(folder).is_ok_and(|folder| real.starts_with(folder)) {
        return Err(refused("it is inside the backup".to_owned()));
    }
    let mut meter = Meter::new(progress, 3 * backup.bytes());
    check_files(folder, &backup, &mut meter)?;
    make_folder(data).map_err(|error| refused(error.to_string()))?;
    let restored = Restoring {
        folder,
        data,
        backup: &backup,
    }
    .run(&mut meter);
    if let Err(error) = restored {
        // As long as there is a mark of a restore, nothing starts on the rest.
        empty(data);
        if made {
            let _ = fs::remove_dir(data);
        }
        return Err(error);
    }
    meter.end();
    Ok(backup)
}

/// A restore on its way.
struct Restoring<'r> {
    folder: &'r Path,
    data: &'r Path,
    backup: &'r Backup,
}

impl Restoring<'_> {
    fn run(&self, meter: &mut Meter<'_, '_>) -> Result<(), RestoreError> {
        let Restoring {
            folder,
            data,
            backup,
        } = *self;
        let needed = backup.files.iter().map(|file| self.bytes_of(file));
        let needed = needed.sum::<u64>() + ROOM_SPARE_BYTES;
        let free = free_bytes(data).unwrap_or(u64::MAX);
        if free < needed {
            let path = data.to_owned();
            return Err(RestoreError::Room { path, needed, free });
        }
        let mut directory = DataDirectory::open(data)?;
        directory.begin_restore()?;
        for file in &backup.files {
            let mut sink = Sink::create(&data.join(&file.name))?;
            let from = folder.join(&file.name);
            let read = read_through(&from, file.name.clone(), &mut |bytes| {
                sink.write(bytes)?;
                meter.pass(bytes.len() as u64)
            })?;
            compare(&from, file, &read)?;
            sink.fill_to(self.bytes_of(file))?;
            sink.finish(file.name.clone())?;
        }
        for shard in 0..backup.manifest.shards {
            let folder = directory.shard(shard);
            make_folder(&folder).map_err(|error| io_failed("make", &folder, error))?;
            flush_directory(&folder)?;
        }
        if backup.history_rows.is_some() {
            flush_directory(&data.join(HISTORY_FOLDER))?;
        }
        check_contents(data, backup, meter)?;
        directory.note_begun()?;
        directory.write(backup.manifest)?;
        Ok(())
    }

    /// What a file has in the data directory: the last segment of a log is as long as the others there.
    fn bytes_of(&self, file: &CopiedFile) -> u64 {
        let segment_bytes = self.backup.manifest.segment_bytes;
        let mut shards = self.backup.shards.iter().enumerate();
        let is_last = |(shard, copy): (usize, &ShardCopy)| {
            let last = copy.first + copy.segments(segment_bytes).saturating_sub(1);
            file.name == copied_name(&self.backup.manifest, shard as u16, copy.first, last)
        };
        match shards.any(is_last) {
            true => file.bytes.max(segment_bytes),
            false => file.bytes,
        }
    }
}

fn check_files(
    folder: &Path,
    backup: &Backup,
    meter: &mut Meter<'_, '_>,
) -> Result<(), RestoreError> {
    for file in &backup.files {
        let path = folder.join(&file.name);
        let length = fs::metadata(&path).map(|metadata| metadata.len());
        match length {
            Ok(length) if length == file.bytes => {}
            Ok(length) => {
                let what = format!("it has {length} bytes, and {} were written", file.bytes);
                return Err(RestoreError::File { path, what });
            }
            Err(error) => {
                let what = match error.kind() {
                    io::ErrorKind::NotFound => "it is missing".to_owned(),
                    _ => error.to_string(),
                };
                return Err(RestoreError::File { path, what });
            }
        }
        let read = read_through(&path, file.name.clone(), &mut |bytes| {
            meter.pass(bytes.len() as u64)
        });
        let read = read.map_err(|error| match error {
            CopyError::Stopped => RestoreError::Stopped,
            CopyError::Log(_) | CopyError::Io { .. } => RestoreError::File {
                path: path.clone(),
                what: error.to_string(),
            },
        })?;
        compare(&path, file, &read)?;
    }
    Ok(())
}

fn compare(path: &Path, listed: &CopiedFile, read: &CopiedFile) -> Result<(), RestoreError> {
    if listed == read {
        return Ok(());
    }
    Err(RestoreError::File {
        path: path.to_owned(),
        what: format!(
            "its checksum is {:016x}, and {:016x} was written",
            read.checksum, listed.checksum
        ),
    })
}

/// Reads logs and history where they are, and compares what they hold with what the backup says.
fn check_contents(
    place: &Path,
    backup: &Backup,
    meter: &mut Meter<'_, '_>,
) -> Result<(), RestoreError> {
    for (shard, copy) in backup.shards.iter().enumerate() {
        let shard = shard as u16;
        let wrong = |what: String| RestoreError::Log { shard, what };
        let folder = backup.manifest.folder(place, shard);
        let options = backup.manifest.log(shard);
        let judged = judge(&folder, options, &mut |bytes| meter.step(bytes));
        let judged = judged.map_err(|error| match error {
            CopyError::Stopped => RestoreError::Stopped,
            CopyError::Log(_) | CopyError::Io { .. } => wrong(error.to_string()),
        })?;
        if matches!(judged.report.outcome, Outcome::TornTail { .. }) {
            return Err(wrong("it does not end with a whole batch".to_owned()));
        }
        if judged.end != copy.end || judged.counts != copy.counts {
            let (found, said) = (judged.counts, copy.counts);
            return Err(wrong(format!(
                "{} live tasks of {} in {} records up to position {} were found, and {} of {} in {} up to {} were \
                 written",
                found.live,
                found.tasks,
                found.records,
                judged.end.0,
                said.live,
                said.tasks,
                said.records,
                copy.end.0
            )));
        }
    }
    let Some(said) = backup.history_rows else {
        return Ok(());
    };
    let rows = count_rows(&place.join(HISTORY_FOLDER), backup.manifest.log_id);
    match rows {
        Ok(found) if found == said => Ok(()),
        Ok(found) => Err(RestoreError::History {
            what: format!("{found} rows were found, and {said} were written"),
        }),
        Err(
            error @ (StoreError::Directory { .. }
            | StoreError::Foreign { .. }
            | StoreError::Version { .. }
            | StoreError::Database(_)),
        ) => Err(RestoreError::History {
            what: error.to_string(),
        }),
    }
}

/// Counts what is read and written, and tells it.
struct Meter<'m, 'p> {
    progress: &'m mut OnCopied<'p>,
    done: Copied,
}

impl<'m, 'p> Meter<'m, 'p> {
    fn new(progress: &'m mut OnCopied<'p>, bytes_total: u64) -> Meter<'m, 'p> {
        let done = Copied {
            bytes: 0,
            bytes_total,
        };
        Meter { progress, done }
    }

    fn step(&mut self, bytes: u64) -> ControlFlow<()> {
        self.done.bytes = (self.done.bytes + bytes).min(self.done.bytes_total);
        (self.progress)(self.done)
    }

    fn pass(&mut self, bytes: u64) -> Result<(), CopyError> {
        match self.step(bytes) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CopyError::Stopped),
        }
    }

    fn end(mut self) {
        self.done.bytes = self.done.bytes_total;
        let _ = (self.progress)(self.done);
    }
}

fn io_failed(what: &str, path: &Path, error: io::Error) -> RestoreError {
    RestoreError::Copy(CopyError::Io {
        what: format!("{what} {}", path.display()),
        error,
    })
}
