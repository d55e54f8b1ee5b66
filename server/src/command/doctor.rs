//! `pelton doctor`: whether this machine does, and what to do if not.

use std::{
    fmt,
    fs::{self, File, TryLockError},
    io::{self, Write},
    net::{SocketAddr, UdpSocket},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use pelton_client::Operation;
use pelton_engine::engine::{default_shards, probe_ring};
use rustix::{
    fs::{OFlags, statvfs},
    process::{Resource, getrlimit},
    system::uname,
};
use serde_json::{Value, json};

use crate::{
    command::{
        connect::{ConnectArgs, Local},
        exit::{Exit, Failure, put, put_json},
        log::{Judged, judge},
    },
    config::{Config, Layer},
};

/// The first kernel whose io_uring has all that a shard asks for.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// What a shard registers with the kernel.
const MEMLOCK_BYTES_PER_SHARD: u64 = 8 << 20;

/// Check whether a server can run here, and say what to do if not
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    /// Where the log is to live [default: pelton-data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the server is to listen [default: 127.0.0.1:7420]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl DoctorArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.json
    }

    /// What the flags say of the configuration.
    pub fn layer(&self) -> Layer {
        let mut layer = Layer::default();
        layer.server.data = self.data.clone();
        layer.server.listen = self.listen;
        layer
    }
}

/// How a check went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grade {
    Ok,
    /// It works, worse than it could.
    Warning,
    /// A server cannot run.
    Problem,
}

impl Grade {
    fn name(self) -> &'static str {
        match self {
            Grade::Ok => "ok",
            Grade::Warning => "warning",
            Grade::Problem => "problem",
        }
    }
}

/// One check: what was found, and what to do about it.
#[derive(Clone, Debug)]
pub struct Check {
    name: &'static str,
    pub grade: Grade,
    found: String,
    /// Empty if there is nothing to do.
    remedy: String,
    /// It is a Pelton server that is in the way.
    running: bool,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check {
            name,
            grade: Grade::Ok,
            found: found.into(),
            remedy: String::new(),
            running: false,
        }
    }

    fn bad(
        grade: Grade,
        name: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Check {
        Check {
            name,
            grade,
            found: found.into(),
            remedy: remedy.into(),
            running: false,
        }
    }

    fn by_server(mut self, running: bool) -> Check {
        self.running = running;
        self
    }

    fn to_json(&self) -> Value {
        json!({
            "check": self.name,
            "grade": self.grade.name(),
            "found": self.found,
            "remedy": (!self.remedy.is_empty()).then_some(&self.remedy),
        })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:7}  {:9}  {}",
            self.grade.name(),
            self.name,
            self.found
        )?;
        if !self.remedy.is_empty() {
            write!(f, ": {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Prints every check.
pub async fn run(args: &DoctorArgs, config: &Config) -> Result<Exit, Failure> {
    let mut checks = check(config);
    checks.extend(check_shards(config).await);
    for check in &mut checks {
        // A server that runs already shows that it can.
        if check.running && check.grade == Grade::Problem {
            check.grade = Grade::Warning;
        }
    }
    let fit = checks.iter().all(|check| check.grade != Grade::Problem);
    if args.json {
        let all: Vec<Value> = checks.iter().map(Check::to_json).collect();
        put_json(&json!({ "fit": fit, "checks": all }))?;
    } else {
        let lines: String = checks.iter().map(|check| format!("{check}\n")).collect();
        put(lines)?;
    }
    Ok(if fit { Exit::Ok } else { Exit::Unfit })
}

/// Prints the problems of a server that is to start, if there are any.
pub fn check_before_serving(config: &Config) -> Result<(), Failure> {
    let checks = check(config);
    let mut problems = checks
        .iter()
        .filter(|check| check.grade == Grade::Problem)
        .peekable();
    if problems.peek().is_none() {
        return Ok(());
    }
    for problem in problems {
        eprintln!("{problem}");
    }
    Err(Failure::new(Exit::Unfit, ""))
}

/// Every check, for the server that this configuration describes.
fn check(config: &Config) -> Vec<Check> {
    let data = &config.data.value;
    let shards = config.shards.value.unwrap_or_else(default_shards);
    let folder = existing(data);
    let (lock, running) = check_lock(data);
    let mut checks = vec![check_kernel(), check_ring(), check_memlock(shards)];
    checks.push(check_direct(&folder));
    checks.push(check_space(&folder, config.space_bytes_min.value));
    checks.push(lock);
    checks.push(check_port(config.listen.value, running.as_deref()));
    checks
}

/// The directory itself, or the nearest one above it.
fn existing(data: &Path) -> PathBuf {
    let whole = std::path::absolute(data).unwrap_or_else(|_| data.to_owned());
    let mut folders = whole.ancestors();
    let found = folders.find(|folder| folder.exists());
    found.unwrap_or(Path::new("/")).to_owned()
}

fn check_kernel() -> Check {
    let release = uname().release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version < KERNEL_MIN => Check::bad(
            Grade::Problem,
            "kernel",
            release,
            format!("Linux {}.{} or later is needed", KERNEL_MIN.0, KERNEL_MIN.1),
        ),
        Some(_) => Check::ok("kernel", format!("Linux {release}")),
        None => Check::bad(
            Grade::Warning,
            "kernel",
            release,
            "the version cannot be read; 6.1 or later is needed",
        ),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn check_ring() -> Check {
    let error = match probe_ring() {
        Ok(()) => return Check::ok("io_uring", "a ring can be made"),
        Err(error) => error,
    };
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "allow it: sysctl kernel.io_uring_disabled=0, and in a container a seccomp profile that lets io_uring_setup, io_uring_enter and io_uring_register pass"
        }
        io::ErrorKind::InvalidInput => "the kernel is too old for it: 6.1 or later",
        io::ErrorKind::Unsupported => "the kernel was built without it",
        io::ErrorKind::OutOfMemory => "raise the memlock limit: ulimit -l",
        _ => "ask the kernel log (dmesg)",
    };
    Check::bad(
        Grade::Problem,
        "io_uring",
        format!("no ring can be made ({error})"),
        remedy,
    )
}

fn check_memlock(shards: u16) -> Check {
    let needed = u64::from(shards) * MEMLOCK_BYTES_PER_SHARD;
    match getrlimit(Resource::Memlock).current {
        None => Check::ok("memlock", "no limit"),
        Some(limit) if limit >= needed => Check::ok("memlock", size(limit)),
        Some(limit) => Check::bad(
            Grade::Warning,
            "memlock",
            format!(
                "{} where {shards} shards register {}",
                size(limit),
                size(needed)
            ),
            format!(
                "works, a little slower; `ulimit -l {}`, or LimitMEMLOCK={} in the unit",
                needed >> 10,
                needed
            ),
        ),
    }
}

/// A larger log is not read by this command.
const JUDGED_BYTES_MAX: u64 = 4 << 30;
/// Time for a running server to say how its shards are.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// One block, as the log writes them.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// Which step of writing a block failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Open,
    Write,
    Flush,
}

const PROBE_PREFIX: &str = ".pelton-doctor-";

/// What was left behind by processes that were killed while they wrote a block. The numbers of processes come again, and
/// the file would be in the way of the next one with this number.
fn remove_old_probes(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(PROBE_PREFIX)
        {
            // Whoever is writing it just now does not need its name any more.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn check_direct(folder: &Path) -> Check {
    remove_old_probes(folder);
    let path = folder.join(format!("{PROBE_PREFIX}{}", std::process::id()));
    let written = write_block(&path);
    // A file system without O_DIRECT makes the file and then refuses to open it.
    let _ = fs::remove_file(&path);
    match written {
        Ok(took) => Check::ok(
            "O_DIRECT",
            format!(
                "a block is written to {} and flushed in {} us",
                folder.display(),
                took.as_micros()
            ),
        ),
        Err((step, error)) => {
            let (found, remedy) = cannot_write(folder, step, &error);
            Check::bad(Grade::Problem, "O_DIRECT", found, remedy)
        }
    }
}

/// Writes and flushes one block as a shard does; how long the two took.
fn write_block(path: &Path) -> Result<Duration, (Step, io::Error)> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)
        .map_err(|error| (Step::Open, error))?;
    let block = Box::new(Block([0; 4096]));
    let start = Instant::now();
    file.write_all(&block.0)
        .map_err(|error| (Step::Write, error))?;
    file.sync_data().map_err(|error| (Step::Flush, error))?;
    Ok(start.elapsed())
}

/// What is wrong, and what to do about it.
fn cannot_write(folder: &Path, step: Step, error: &io::Error) -> (String, &'static str) {
    let folder = folder.display();
    let elsewhere = "put the data on ext4, xfs or btrfs (--data)";
    match (step, error.kind()) {
        (Step::Open, io::ErrorKind::InvalidInput) => (
            format!("the file system of {folder} does not have it"),
            elsewhere,
        ),
        (Step::Write, io::ErrorKind::InvalidInput) => (
            format!("the file system of {folder} takes no block of 4096 bytes ({error})"),
            elsewhere,
        ),
        (_, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => (
            format!("there is no room for a block on {folder} ({error})"),
            "make room, or choose another place with --data",
        ),
        (_, io::ErrorKind::ReadOnlyFilesystem) => (
            format!("the file system of {folder} is read-only"),
            "mount it for writing, or choose another place with --data",
        ),
        (Step::Open, _) => (
            format!("{folder} cannot be written ({error})"),
            "let this user write there, or choose another place with --data",
        ),
        (Step::Write, _) => (
            format!("a block cannot be written to {folder} ({error})"),
            "ask the kernel log (dmesg) what the disk has, or choose another place with --data",
        ),
        (Step::Flush, _) => (
            format!("a block on {folder} cannot be flushed ({error})"),
            "nothing would be durable there: ask the kernel log (dmesg) what the disk has",
        ),
    }
}

fn check_space(folder: &Path, space_bytes_min: u64) -> Check {
    let stat = match statvfs(folder) {
        Ok(stat) => stat,
        Err(error) => {
            return Check::bad(
                Grade::Warning,
                "space",
                format!("{}: {error}", folder.display()),
                "free space is unknown",
            );
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let found = format!("{} free on {}", size(free), folder.display());
    let remedy = format!(
        "below {} submits are refused (limits.space_bytes_min): make room",
        size(space_bytes_min)
    );
    // What is in the log is served all the same, so this keeps no server from its work.
    if free / 2 < space_bytes_min {
        Check::bad(Grade::Warning, "space", found, remedy)
    } else {
        Check::ok("space", found)
    }
}

/// The check, and the address of the server that has the directory open.
fn check_lock(data: &Path) -> (Check, Option<String>) {
    let locked = match File::open(data.join("LOCK")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(lock) => match lock.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        },
    };
    let shown = data.display();
    match locked {
        Ok(false) if data.is_dir() => (
            Check::ok("data", format!("{shown} is there and not in use")),
            None,
        ),
        Ok(false) => (Check::ok("data", format!("{shown} will be made")), None),
        Ok(true) => {
            let local = Local::read(data).ok().flatten();
            let address = local.map(|local| local.address);
            let server = match &address {
                Some(address) => format!("a server has {shown} open, at {address}"),
                None => format!("another process has {shown} open"),
            };
            let remedy = "stop it before another one starts, or choose another place with --data";
            let check = Check::bad(Grade::Problem, "data", server, remedy);
            (check.by_server(address.is_some()), address)
        }
        Err(error) => (
            Check::bad(
                Grade::Problem,
                "data",
                format!("{shown}: {error}"),
                "let this user read and write there",
            ),
            None,
        ),
    }
}

/// Whether every shard serves, as the running server says; or whether every log could be served, where none runs.
async fn check_shards(config: &Config) -> Vec<Check> {
    let data = &config.data.value;
    // A state file may be a crashed server's; the lock is not.
    if check_lock(data).1.is_none() {
        return match judge(data, JUDGED_BYTES_MAX) {
            None => Vec::new(),
            Some(Judged::TooLarge { bytes }) => vec![Check::ok(
                "log",
                format!(
                    "{}, not read here: `pelton log verify` judges it",
                    size(bytes)
                ),
            )],
            Some(Judged::Read(shards)) => {
                let damaged = shards.iter().filter_map(|(shard, read)| {
                    let error = read.as_ref().err()?;
                    Some(not_served(*shard, &error.to_string()))
                });
                let damaged: Vec<Check> = damaged.collect();
                if damaged.is_empty() {
                    let found = format!("every checksum of {} logs holds", shards.len());
                    return vec![Check::ok("log", found)];
                }
                damaged
            }
        };
    }
    let connect = ConnectArgs {
        key: std::env::var("PELTON_KEY").ok(),
        ..ConnectArgs::default()
    };
    let question = json!({});
    let asked = connect.ask(config, Operation::Stats, &question);
    match tokio::time::timeout(ASK_TIMEOUT, asked).await {
        Ok(Ok(stats)) => shards_of(&stats),
        Ok(Err(failure)) => vec![Check::bad(
            Grade::Warning,
            "shards",
            format!("the server does not say how they are ({failure})"),
            "set PELTON_KEY to one of its keys",
        )],
        Err(_) => vec![Check::bad(
            Grade::Warning,
            "shards",
            format!(
                "the server has not answered for {} s",
                ASK_TIMEOUT.as_secs()
            ),
            "ask again, and look at its log",
        )],
    }
}

/// What a server's statistics say of its shards.
fn shards_of(stats: &Value) -> Vec<Check> {
    let none = Vec::new();
    let shards = stats["shards"].as_array().unwrap_or(&none);
    let mut checks = Vec::new();
    for shard in shards {
        let number = shard["shard"].as_u64().unwrap_or_default();
        if let Some(error) = shard["quarantined"]["error"].as_str() {
            checks.push(not_served(number as u16, error));
        }
        if let Some(cause) = shard["log"]["poisoned"].as_str() {
            checks.push(Check::bad(
                Grade::Problem,
                "log",
                format!("the log of shard {number} has failed, and the shard serves nobody ({cause})"),
                "ask the kernel log (dmesg) what the disk has, and restart the server when it is mended",
            ));
        }
        if shard["disk_full"] == true {
            checks.push(Check::bad(
                Grade::Warning,
                "log",
                format!("shard {number} refuses submits, and goes on with what it has accepted"),
                "make room: it takes submits again within seconds",
            ));
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok("shards", format!("{} serve", shards.len())));
    }
    checks
}

fn not_served(shard: u16, error: &str) -> Check {
    Check::bad(
        Grade::Problem,
        "log",
        format!("shard {shard} is not served: {error}"),
        "restart the server when its files are restored; the other shards serve meanwhile",
    )
}

fn check_port(listen: SocketAddr, running: Option<&str>) -> Check {
    match UdpSocket::bind(listen) {
        Ok(_) => Check::ok("port", format!("{listen} (UDP) is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let own = running == Some(listen.to_string().as_str());
            let whose = if own { "that server's" } else { "taken" };
            Check::bad(
                Grade::Problem,
                "port",
                format!("{listen} (UDP) is {whose}"),
                "choose another one with --listen",
            )
            .by_server(own)
        }
        Err(error) => Check::bad(
            Grade::Problem,
            "port",
            format!("{listen} (UDP): {error}"),
            "choose an address of this machine with --listen",
        ),
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x2_8000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_by_number() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert!(version("5.15.90.1-microsoft") < Some(KERNEL_MIN));
        assert!(version("6.10.3") > Some(KERNEL_MIN));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn a_locked_directory_and_a_taken_port_are_problems() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(check_lock(folder.path()).0.grade, Grade::Ok);
        let lock = File::create(folder.path().join("LOCK")).unwrap();
        lock.lock().unwrap();
        assert_eq!(check_lock(folder.path()).0.grade, Grade::Problem);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = check_port(socket.local_addr().unwrap(), None);
        assert_eq!(taken.grade, Grade::Problem);
        assert!(taken.to_string().contains("--listen"));
    }

    #[test]
    fn a_block_is_written_and_flushed_and_nothing_of_it_stays() {
        // Not in /tmp, which may be in memory: there O_DIRECT may be refused.
        let base = std::env::current_dir().unwrap().join("../target/test-data");
        fs::create_dir_all(&base).unwrap();
        let folder = tempfile::tempdir_in(base).unwrap();
        // One of this number was killed here.
        let left = format!("{PROBE_PREFIX}{}", std::process::id());
        fs::write(folder.path().join(left), [0; 4096]).unwrap();
        let check = check_direct(folder.path());
        assert_eq!(check.grade, Grade::Ok, "{check}");
        assert!(check.found.contains(" and flushed in "), "{check}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let nowhere = check_direct(&folder.path().join("nowhere"));
        assert_eq!(nowhere.grade, Grade::Problem);
        assert!(nowhere.to_string().contains("--data"), "{nowhere}");
    }

    #[test]
    fn whatever_keeps_a_block_from_the_disk_has_a_remedy() {
        let of = |step, number| {
            let error = io::Error::from_raw_os_error(number);
            let (found, remedy) = cannot_write(Path::new("/data"), step, &error);
            assert!(found.contains("/data") && !remedy.is_empty(), "{found}");
            format!("{found}: {remedy}")
        };
        let (invalid, full, read_only, broken, denied) = (22, 28, 30, 5, 13);
        assert!(of(Step::Open, invalid).contains("does not have it: put the data on ext4"));
        assert!(of(Step::Write, invalid).contains("4096 bytes"));
        assert!(of(Step::Write, full).contains("make room"));
        assert!(of(Step::Open, read_only).contains("read-only"));
        assert!(of(Step::Open, denied).contains("let this user write there"));
        assert!(of(Step::Write, broken).contains("dmesg"));
        assert!(of(Step::Flush, broken).contains("nothing would be durable"));
    }

    #[test]
    fn what_a_server_says_of_its_shards_is_told_with_what_to_do() {
        let shard = |number: u16, poisoned: Value, full: bool, quarantined: Value| json!({ "shard": number, "log": { "poisoned": poisoned }, "disk_full": full, "quarantined": quarantined });
        let damaged = json!({ "error": "the log is damaged at segment-000001.plt" });
        let sound = shard(0, Value::Null, false, Value::Null);
        let checks = shards_of(&json!({ "shards": [sound] }));
        assert_eq!((checks.len(), checks[0].grade), (1, Grade::Ok));
        let checks = shards_of(&json!({ "shards": [
            sound,
            shard(1, Value::Null, false, damaged),
            shard(2, "flush: EIO".into(), false, Value::Null),
            shard(3, Value::Null, true, Value::Null),
        ] }));
        let grades: Vec<Grade> = checks.iter().map(|check| check.grade).collect();
        assert_eq!(grades, [Grade::Problem, Grade::Problem, Grade::Warning]);
        let said: Vec<String> = checks.iter().map(Check::to_string).collect();
        assert!(
            said[0].contains("shard 1 is not served: the log is damaged at segment-000001.plt")
        );
        assert!(said[1].contains("shard 2 has failed") && said[1].contains("flush: EIO"));
        assert!(said[2].contains("shard 3 refuses submits") && said[2].contains("make room"));
    }

    #[test]
    fn the_place_of_a_new_directory_is_the_one_above_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(existing(&folder.path().join("a/b")), folder.path());
    }
}
