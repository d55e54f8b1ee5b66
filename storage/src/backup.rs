//! What a backup is: a folder with the files of a data directory, and `BACKUP`, which is written last and lists them with
//! their lengths and checksums. A folder without it is no backup. Like `MANIFEST` it is text with a checksum.

use std::{
    fmt::{self, Write},
    fs, io,
    path::{Path, PathBuf},
};

use pelton_core::id::Lsn;

use crate::{
    count::Counts,
    manifest::{DirectoryError, Manifest, write_whole},
    segment::segment_name,
};

/// Version of a backup's layout.
pub const BACKUP_VERSION: u32 = 1;
/// The file that makes a folder a backup.
pub const BACKUP_NAME: &str = "BACKUP";

const NEXT_NAME: &str = "BACKUP.next";

/// What a backup says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backup {
    /// That of the directory of which it is one.
    pub manifest: Manifest,
    /// Version of the program that took it.
    pub program: String,
    /// When it was taken, milliseconds since 1970.
    pub taken_ms: u64,
    /// By shard.
    pub shards: Vec<ShardCopy>,
    /// Rows of the history; `None` where there is none.
    pub history_rows: Option<u64>,
    /// Every file but `BACKUP`.
    pub files: Vec<CopiedFile>,
}

/// What a backup has of a shard's log: whole segments, and the last one up to a place where a batch ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardCopy {
    /// The first segment.
    pub first: u64,
    /// The position behind the last batch.
    pub end: Lsn,
    /// What stands in between.
    pub counts: Counts,
}

impl ShardCopy {
    /// Segments.
    pub fn segments(&self, segment_bytes: u64) -> u64 {
        last_segment(self.end, segment_bytes) + 1 - self.first
    }
}

/// The segment in which the batch in front of this position stands.
pub fn last_segment(end: Lsn, segment_bytes: u64) -> u64 {
    end.0.saturating_sub(1) / segment_bytes
}

/// The name in a backup of the file with a segment: files are counted anew from the first segment on.
pub fn copied_name(manifest: &Manifest, shard: u16, first: u64, segment: u64) -> String {
    let number = (segment - first + 1).min(u64::from(u32::MAX)) as u32;
    format!("{}/{}", manifest.folder_name(shard), segment_name(number))
}

/// A file of a backup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopiedFile {
    /// Where it is in the backup and in the data directory, with `/`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// XXH3-64 of it, seed 0.
    pub checksum: u64,
}

/// Why a folder is no backup that can be read.
#[derive(Debug)]
pub enum BadBackup {
    /// It has no `BACKUP`.
    Missing { path: PathBuf },
    /// `BACKUP` is damaged.
    Damaged { path: PathBuf, what: String },
    /// It is of another version.
    Version { path: PathBuf, version: String },
    /// The system failed.
    Io { path: PathBuf, error: io::Error },
}

impl fmt::Display for BadBackup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadBackup::Missing { path } => write!(
                f,
                "{} is no backup: it has no file {BACKUP_NAME}, which is written when all others are whole",
                path.display()
            ),
            BadBackup::Damaged { path, what } => {
                write!(f, "{} is damaged: {what}", path.display())
            }
            BadBackup::Version { path, version } => write!(
                f,
                "{} has version {version}, this program reads {BACKUP_VERSION}; use the version that wrote it",
                path.display()
            ),
            BadBackup::Io { path, error } => write!(f, "read {}: {error}", path.display()),
        }
    }
}

impl std::error::Error for BadBackup {}

impl Backup {
    /// Reads `BACKUP` in this folder.
    pub fn read(folder: &Path) -> Result<Backup, BadBackup> {
        let path = folder.join(BACKUP_NAME);
        match fs::read_to_string(&path) {
            Ok(text) => decode(&text, &path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BadBackup::Missing {
                path: folder.to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(BadBackup::Damaged {
                path,
                what: "it is no text".to_owned(),
            }),
            Err(error) => Err(BadBackup::Io { path, error }),
        }
    }

    /// Writes `BACKUP`, when every other file is on the disk: from then on the folder is a backup.
    pub fn write(&self, folder: &Path) -> Result<(), DirectoryError> {
        write_whole(folder, BACKUP_NAME, NEXT_NAME, &encode(self))
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

fn encode(backup: &Backup) -> String {
    let Backup {
        manifest,
        program,
        taken_ms,
        shards,
        history_rows,
        files,
    } = backup;
    let mut body = format!(
        "pelton-backup {BACKUP_VERSION}\nprogram {program}\ntaken_ms {taken_ms}\nlog_id {:032x}\ngeneration {}\n\
         segment_bytes {}\nfirst_page {}\npage_shift {}\nshards {}\n",
        manifest.log_id,
        manifest.generation,
        manifest.segment_bytes,
        manifest.first_page,
        manifest.page_shift,
        manifest.shards
    );
    let mut line = |text: fmt::Arguments<'_>| body.write_fmt(text).expect("a text takes more");
    for ShardCopy { first, end, counts } in shards {
        let Counts {
            live,
            tasks,
            records,
            batches,
        } = counts;
        line(format_args!(
            "shard {first} {} {live} {tasks} {records} {batches}\n",
            end.0
        ));
    }
    match history_rows {
        Some(rows) => line(format_args!("history_rows {rows}\n")),
        None => line(format_args!("history_rows none\n")),
    }
    for file in files {
        line(format_args!(
            "file {} {:016x} {}\n",
            file.bytes, file.checksum, file.name
        ));
    }
    format!("{body}crc32c {:08x}\n", crc32c::crc32c(body.as_bytes()))
}

fn decode(text: &str, path: &Path) -> Result<Backup, BadBackup> {
    let damaged = |what: &str| BadBackup::Damaged {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let mut lines = text.lines().map(|line| line.split_once(' ')).peekable();
    let mut field = |name: &str| match lines.next() {
        Some(Some((found, value))) if found == name => Ok(value),
        _ => Err(damaged(&format!("the line `{name}` is missing"))),
    };
    let version = field("pelton-backup")?;
    if version != BACKUP_VERSION.to_string() {
        return Err(BadBackup::Version {
            path: path.to_owned(),
            version: version.to_owned(),
        });
    }
    let program = field("program")?.to_owned();
    let taken_ms = number(field("taken_ms")?);
    let log_id = u128::from_str_radix(field("log_id")?, 16).ok();
    let generation = number(field("generation")?);
    let segment_bytes = number(field("segment_bytes")?);
    let first_page = field("first_page")?.parse().ok();
    let page_shift = field("page_shift")?.parse().ok();
    let shard_count = number(field("shards")?).and_then(|count| u16::try_from(count).ok());
    let shard_count = shard_count.ok_or_else(|| damaged("the number of shards"))?;
    let mut shards = Vec::new();
    for _ in 0..shard_count {
        let numbers = field("shard")?.split(' ').map(number);
        let numbers: Option<Vec<u64>> = numbers.collect();
        let Some(&[first, end, live, tasks, records, batches]) = numbers.as_deref() else {
            return Err(damaged("the line of a shard"));
        };
        let counts = Counts {
            live,
            tasks,
            records,
            batches,
        };
        let end = Lsn(end);
        shards.push(ShardCopy { first, end, counts });
    }
    let history_rows = match field("history_rows")? {
        "none" => None,
        rows => Some(number(rows).ok_or_else(|| damaged("the number of rows"))?),
    };
    let mut files = Vec::new();
    while let Some((_, value)) = lines
        .next_if(|line| matches!(line, Some(("file", _))))
        .flatten()
    {
        let mut words = value.splitn(3, ' ');
        let bytes = words.next().and_then(number);
        let checksum = words
            .next()
            .and_then(|word| u64::from_str_radix(word, 16).ok());
        let (Some(bytes), Some(checksum), Some(name)) = (bytes, checksum, words.next()) else {
            return Err(damaged("the line of a file"));
        };
        if !is_inside(name) {
            return Err(damaged("the name of a file"));
        }
        let name = name.to_owned();
        files.push(CopiedFile {
            name,
            bytes,
            checksum,
        });
    }
    let (Some(taken_ms), Some(log_id), Some(generation), Some(segment_bytes)) =
        (taken_ms, log_id, generation, segment_bytes)
    else {
        return Err(damaged("a number"));
    };
    let (Some(first_page), Some(page_shift)) = (first_page, page_shift) else {
        return Err(damaged("the pages of the table of tasks"));
    };
    let backup = Backup {
        manifest: Manifest {
            log_id,
            generation,
            shards: shard_count,
            segment_bytes,
            first_page,
            page_shift,
        },
        program,
        taken_ms,
        shards,
        history_rows,
        files,
    };
    if text != encode(&backup)
        || shard_count == 0
        || segment_bytes == 0
        || generation == 0
        || page_shift > 16
    {
        return Err(damaged("the checksum does not match"));
    }
    let placed = |shard: &ShardCopy| {
        let last = |end| last_segment(end, segment_bytes);
        shard.first > 0
            && (shard.end == Lsn(0) && shard.first == 1 || last(shard.end) >= shard.first)
    };
    if !backup.shards.iter().all(placed) {
        return Err(damaged("the place of a log's end"));
    }
    Ok(backup)
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// True for a name that stays within the folder, of a file that is not `BACKUP`.
fn is_inside(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(plain);
    name != BACKUP_NAME && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backups_text_reads_back_and_no_change_of_it_passes() {
        let folder = std::env::temp_dir().join(format!("pelton-backup-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        assert!(matches!(
            Backup::read(&folder),
            Err(BadBackup::Missing { .. })
        ));
        let manifest = Manifest::new(7 << 90, 2, 4 << 20).next(1, 9);
        let backup = Backup {
            manifest,
            program: "1.2.3".to_owned(),
            taken_ms: 1_700_000_000_000,
            shards: vec![ShardCopy {
                first: 3,
                end: Lsn((5 << 22) + 12_288),
                counts: Counts {
                    live: 1,
                    tasks: 2,
                    records: 3,
                    batches: 4,
                },
            }],
            history_rows: None,
            files: vec![CopiedFile {
                name: copied_name(&manifest, 0, 3, 4),
                bytes: 4 << 20,
                checksum: 0xab,
            }],
        };
        assert_eq!(backup.files[0].name, "shard-000.2/segment-000002.plt");
        assert_eq!(backup.shards[0].segments(4 << 20), 3);
        backup.write(&folder).unwrap();
        assert_eq!(Backup::read(&folder).unwrap(), backup);
        let path = folder.join(BACKUP_NAME);
        let text = fs::read(&path).unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert!(Backup::read(&folder).is_err(), "byte {at}");
            fs::write(&path, &text[..at]).unwrap();
            assert!(Backup::read(&folder).is_err(), "cut at {at}");
        }
        for outside in ["/etc/passwd", "../x", "a/../../x", "BACKUP", "a//b", ""] {
            assert!(!is_inside(outside), "{outside}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
