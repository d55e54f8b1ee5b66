//! Processes of a run: the server, which is killed, and those that watch it. And in which phase a kill hit.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pelton_core::record::Schema;
use pelton_storage::{
    format::{BATCH_HEADER_BYTES, BLOCK_BYTES, BatchHeader, SEGMENT_DATA_OFFSET, SegmentHeader},
    recover::records,
};
use serde_json::Value;

/// A start that takes longer has failed.
const START_MAX: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(1);
/// A lease term and its heartbeats: short, so that takeovers happen while a run lasts.
const LEASE_MS: u32 = 1_000;
const HEARTBEAT_MS: u32 = 200;
/// Small segments, so that snapshots are written and the log is cleaned all the time.
const SEGMENT_BYTES: u64 = 4 << 20;
/// Few finished tasks in memory, so that segments hold little that lives, and most of what is asked after in the end comes
/// from the history.
const FINISHED_MAX: u32 = 500;

/// What a server is doing when it is killed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// It takes and hands out tasks.
    Serving,
    /// It has not said yet that it listens: it reads its log, repairs its tail, prepares.
    Recovery,
    /// It serves, and a shard is writing a snapshot.
    Snapshot,
    /// It serves, and a shard is moving what lives out of the log's oldest segment.
    Cleaning,
}

impl Phase {
    pub const ALL: [Phase; 4] = [
        Phase::Serving,
        Phase::Recovery,
        Phase::Snapshot,
        Phase::Cleaning,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Phase::Serving => "serving",
            Phase::Recovery => "recovery",
            Phase::Snapshot => "snapshot",
            Phase::Cleaning => "cleaning",
        }
    }

    pub fn from_name(name: &str) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.name() == name)
    }

    /// The phase in which a server was killed, by what it has said and what it has left in its directory.
    pub fn of(data: &Path, listens: bool) -> Phase {
        if !listens {
            Phase::Recovery
        } else if writes_snapshot(data) {
            Phase::Snapshot
        } else if shards(data).any(|shard| was_cleaning(&shard)) {
            Phase::Cleaning
        } else {
            Phase::Serving
        }
    }
}

/// A snapshot has a temporary name in its shard's directory until it is whole.
fn writes_snapshot(data: &Path) -> bool {
    let mut files = shards(data).flat_map(|shard| inside(&shard).collect::<Vec<PathBuf>>());
    files.any(|path| starts(&path, "snapshot-") && path.extension() == Some(OsStr::new("tmp")))
}

fn inside(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(Result::ok).map(|entry| entry.path())
}

fn shards(data: &Path) -> impl Iterator<Item = PathBuf> {
    inside(data).filter(|path| starts(path, "shard-"))
}

/// The last segments that shards write to, added up: it grows when one is begun, and then the oldest one is cleaned.
fn last_segments(data: &Path) -> u64 {
    let begun = |path: PathBuf| {
        let mut bytes = [0; SEGMENT_DATA_OFFSET as usize + BATCH_HEADER_BYTES];
        File::open(path).ok()?.read_exact(&mut bytes).ok()?;
        let segment = SegmentHeader::decode(&bytes[..BLOCK_BYTES]).ok()?.segment;
        let first = BatchHeader::peek(&bytes[SEGMENT_DATA_OFFSET as usize..])?;
        (first.segment == segment).then_some(segment)
    };
    let last = |shard: PathBuf| {
        let segments = inside(&shard).filter(|path| starts(path, "segment-"));
        segments.filter_map(begun).max()
    };
    shards(data).filter_map(last).sum()
}

/// The last batch of a shard's log has moved records.
fn was_cleaning(shard: &Path) -> bool {
    let header = |path: &Path| {
        let mut block = [0; BLOCK_BYTES];
        File::open(path).ok()?.read_exact(&mut block).ok()?;
        SegmentHeader::decode(&block).ok()
    };
    let segments = inside(shard).filter(|path| starts(path, "segment-"));
    let mut segments: Vec<(u64, PathBuf)> = segments
        .filter_map(|path| Some((header(&path)?.segment, path)))
        .collect();
    segments.sort_unstable();
    // The last ones are prepared and empty.
    segments.iter().rev().any(|(segment, path)| {
        let bytes = fs::read(path).unwrap_or_default();
        let mut at = SEGMENT_DATA_OFFSET as usize;
        let mut last = None;
        while let Some(found) = bytes.get(at..).and_then(BatchHeader::peek)
            && found.segment == *segment
            && let Some(batch) = bytes.get(at..at + found.bytes())
        {
            if found.records > 0 {
                last = Some((batch, found.records));
            }
            at += found.bytes().next_multiple_of(BLOCK_BYTES);
        }
        let moved = |(batch, count)| {
            let mut moved = false;
            records(batch, count, |_, schema, _| {
                moved |= schema >= Schema::RelocatedTask as u16;
                Some(())
            });
            moved
        };
        last.is_some_and(moved)
    })
}

fn starts(path: &Path, with: &str) -> bool {
    let name = path.file_name().map(OsStr::to_string_lossy);
    name.is_some_and(|name| name.starts_with(with))
}

/// How a server is reached.
#[derive(Clone, Debug)]
pub struct Reached {
    pub address: SocketAddr,
    pub fingerprint: String,
}

/// `pelton serve` on the run's data. Dropped, it is killed.
pub struct Server {
    child: Child,
    data: PathBuf,
    /// What this process printed.
    said: PathBuf,
    started: Instant,
    /// See `begins_segment`.
    last_segments: u64,
}

impl Server {
    /// Starts the process and does not wait for it. `number` tells its output from that of its predecessors.
    /// `data` is its directory, and what it says is kept in `folder`.
    pub fn spawn(
        program: &Path,
        folder: &Path,
        data: PathBuf,
        shards: u16,
        listen: SocketAddr,
        number: u64,
    ) -> Result<Server, String> {
        // What the last one said is kept, what those before it said is not.
        let said = folder.join(format!("server-{}.said", number % 4));
        let file = File::create(&said).map_err(|error| format!("{}: {error}", said.display()))?;
        let errors = file.try_clone().map_err(|error| error.to_string())?;
        let started = Instant::now();
        let child = Command::new(program)
            .arg("serve")
            .args(["--listen", &listen.to_string()])
            .args(["--shards", &shards.to_string()])
            .arg("--data")
            .arg(&data)
            .env("PELTON_SERVER__SEGMENT_BYTES", SEGMENT_BYTES.to_string())
            .env("PELTON_LIMITS__FINISHED_MAX", FINISHED_MAX.to_string())
            .env("PELTON_EXECUTOR__LEASE_MS", LEASE_MS.to_string())
            .env("PELTON_EXECUTOR__HEARTBEAT_MS", HEARTBEAT_MS.to_string())
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        Ok(Server {
            child,
            data,
            said,
            started,
            last_segments: 0,
        })
    }

    /// Waits until it listens: where, and how long that took.
    pub fn ready(&mut self) -> Result<(Reached, Duration), String> {
        loop {
            if self.listens() {
                let took = self.started.elapsed();
                return Ok((self.reached()?, took));
            }
            self.must_live()?;
            if self.started.elapsed() > START_MAX {
                return Err(format!(
                    "the server does not listen after {} s; it said: {}",
                    START_MAX.as_secs(),
                    self.said()
                ));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// An error if it has ended by itself.
    pub fn must_live(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!(
                "the server has ended by itself, {status}; it said: {}",
                self.said()
            )),
            Err(error) => Err(error.to_string()),
        }
    }

    /// True while a shard is writing a snapshot, which is rarely met.
    pub fn writes_snapshot(&self) -> bool {
        writes_snapshot(&self.data)
    }

    /// True if a shard has gone on to another segment since this was asked before.
    pub fn begins_segment(&mut self) -> bool {
        let before = self.last_segments;
        self.last_segments = last_segments(&self.data);
        before != 0 && self.last_segments > before
    }

    /// SIGKILL.
    pub fn kill(self) -> Result<Killed, String> {
        self.kill_while(|| ())
    }

    /// SIGKILL, and `meanwhile` before its end is waited for.
    pub fn kill_while(mut self, meanwhile: impl FnOnce()) -> Result<Killed, String> {
        let lived = self.must_live();
        let killed = self.child.kill();
        meanwhile();
        lived?;
        let killed = killed.and_then(|()| self.child.wait());
        killed.map_err(|error| format!("the server cannot be killed: {error}"))?;
        Ok(Killed {
            data: self.data.clone(),
            listened: self.listens(),
        })
    }

    fn listens(&self) -> bool {
        self.said().contains("listening on ")
    }

    pub fn said(&self) -> String {
        let said = fs::read_to_string(&self.said).unwrap_or_default();
        said.trim().to_owned()
    }

    fn reached(&self) -> Result<Reached, String> {
        let path = self.data.join("server.json");
        let read = || {
            let state: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            Some(Reached {
                address: state["address"].as_str()?.parse().ok()?,
                fingerprint: format!("sha256:{}", state["fingerprint"].as_str()?),
            })
        };
        read().ok_or_else(|| format!("{} is not what is expected", path.display()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server that was killed.
pub struct Killed {
    data: PathBuf,
    listened: bool,
}

impl Killed {
    /// The phase is told from what the dead process left, so that it cannot have changed meanwhile.
    pub fn phase(&self) -> Phase {
        Phase::of(&self.data, self.listened)
    }
}

/// A caller or an executor. It ends when its stdin does; dropped, it is killed.
pub struct Watcher {
    child: Child,
    what: String,
}

impl Watcher {
    /// Starts this program again with these arguments.
    pub fn spawn(what: String, arguments: &[String]) -> Result<Watcher, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{what} does not start: {error}"))?;
        Ok(Watcher { child, what })
    }

    /// An error if it has ended by itself.
    pub fn must_live(&mut self) -> Result<(), String> {
        match self.ended()? {
            None => Ok(()),
            Some(_) => Err(format!("{} has ended by itself", self.what)),
        }
    }

    /// Whether it has ended well; an error if it has ended badly.
    fn ended(&mut self) -> Result<Option<()>, String> {
        match self.child.try_wait() {
            Ok(None) => Ok(None),
            Ok(Some(status)) if status.success() => Ok(Some(())),
            Ok(Some(status)) => {
                let said = self.child.stderr.take().map(BufReader::new);
                let said: Vec<String> = said
                    .into_iter()
                    .flat_map(BufRead::lines)
                    .map_while(Result::ok)
                    .collect();
                Err(format!("{}: {status}: {}", self.what, said.join("; ")))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Writes a line to its stdin.
    pub fn tell(&mut self, line: &str) -> Result<(), String> {
        let stdin = self.child.stdin.as_mut();
        let told = stdin.map(|stdin| writeln!(stdin, "{line}").and_then(|()| stdin.flush()));
        match told {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(format!("{}: {error}", self.what)),
            None => Err(format!("{} is not told anything any more", self.what)),
        }
    }

    /// Ends its stdin.
    pub fn let_go(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for its end.
    pub fn join(&mut self, patience: Duration) -> Result<(), String> {
        let start = Instant::now();
        while self.ended()?.is_none() {
            if start.elapsed() > patience {
                return Err(format!(
                    "{} does not end within {} s",
                    self.what,
                    patience.as_secs()
                ));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(mut self) -> Result<(), String> {
        self.must_live()?;
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map(drop).map_err(|error| error.to_string())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_told_from_what_a_server_has_said_and_left() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let phase = |listens| Phase::of(folder.path(), listens);
        assert_eq!(phase(false), Phase::Recovery);
        assert_eq!(phase(true), Phase::Serving);
        let shard = folder.path().join("shard-001");
        fs::create_dir(&shard).expect("a folder can be made");
        fs::write(shard.join("snapshot-00000007"), "").expect("a file can be written");
        assert_eq!(phase(true), Phase::Serving, "a whole one");
        fs::write(shard.join("snapshot-00000008.tmp"), "").expect("a file can be written");
        assert_eq!(phase(true), Phase::Snapshot);
        assert_eq!(phase(false), Phase::Recovery);
    }
}
