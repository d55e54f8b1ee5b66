//! Power cuts: the run's data directory lies on an ext4 file system, that on a loop device, and that on the file of
//! `disk`, whose power fails.
//!
//! A run has namespaces of its own for mounts and processes. Whatever ends it, a kill included, ends all its processes
//! and with them its mounts and its loop device, so that nothing is left that the next run could stumble over.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use rustix::mount::{UnmountFlags, unmount};

use super::{
    conductor::{self, RunArgs},
    host::{Phase, Server},
};

/// Of this, only what is written takes memory.
const DISK_BYTES: u64 = 4 << 30;
/// Everything is laid out at once, so that the file system does not go on with that later; a few files need few inodes.
const MKFS: [&str; 7] = [
    "-q",
    "-F",
    "-N1024",
    "-Jsize=16",
    "-Elazy_itable_init=0,lazy_journal_init=0,nodiscard",
    "-b4096",
    "-text4",
];
/// The kernel may hold files of a killed process a moment longer.
const UNMOUNT_MAX: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(5);
/// What has to be there beside the kernel's part.
const TOOLS: [&str; 4] = ["unshare", "mkfs.ext4", "mount", "losetup"];

#[derive(Args, Clone, Debug)]
pub struct PowerArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Once the first server listens, have the disk acknowledge flushes without doing them
    #[arg(long)]
    lying_flush: bool,
    /// This process has the run's namespaces
    #[arg(long, hide = true)]
    contained: bool,
}

/// Runs all cycles, in namespaces of their own, and prints what they came to; true if that is what was expected or the
/// machine does not allow a run.
pub fn run(args: &PowerArgs) -> Result<bool, String> {
    if args.contained {
        end_with_parent();
        return conductor::run(
            &args.run,
            Some(Cuts {
                lying_flush: args.lying_flush,
            }),
        );
    }
    if let Some(why) = why_not() {
        println!("skipped: {why}");
        return Ok(true);
    }
    contain()
}

/// What keeps power cuts from being played here.
fn why_not() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may mount".into());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if let Err(error) = File::options().read(true).write(true).open(device) {
            return Some(format!("{device}: {error}"));
        }
    }
    for tool in TOOLS {
        if let Err(error) = said(Command::new(tool).arg("-V")) {
            return Some(format!("{tool}: {error}"));
        }
    }
    for kind in ["fuse", "ext4"] {
        // Where it is a module, the kernel loads it when it is first mounted; only then is it in the list.
        let loads = || said(Command::new("modprobe").args(["-q", kind])).is_ok();
        if !(is_known(kind) || loads() && is_known(kind)) {
            return Some(format!("the kernel knows no {kind}"));
        }
    }
    let mount = "mount -n -t tmpfs none /tmp";
    if let Err(error) = said(unshare().args(["sh", "-c", mount])) {
        return Some(format!("nothing may be mounted: {error}"));
    }
    // Any file will do.
    let attach =
        "device=$(losetup --find --show --read-only \"$0\") && losetup --detach \"$device\"";
    let file = env::current_exe().unwrap_or_default();
    let attached = said(Command::new("sh").args(["-c", attach]).arg(file));
    let error = attached.err()?;
    Some(format!("no loop device can be had: {error}"))
}

/// True if the kernel has this kind of file system.
fn is_known(kind: &str) -> bool {
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    kinds.split_whitespace().any(|word| word == kind)
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL"]);
    command
}

/// Runs a command to its end: what it said, or why it failed.
fn said(command: &mut Command) -> Result<String, String> {
    let ran = command.stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| error.to_string())?;
    if ran.status.success() {
        return Ok(String::from_utf8_lossy(&ran.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&ran.stderr);
    let errors: Vec<&str> = errors.lines().map(str::trim).collect();
    Err(format!("{}: {}", ran.status, errors.join("; ")))
}

/// Starts this program again, as the first process of its namespaces. It lives as long as this one.
fn contain() -> Result<bool, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let mut command = unshare();
    command.arg("--").arg(program).args(env::args_os().skip(1));
    command.arg("--contained").stdin(Stdio::piped());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    // Waiting for it would close its stdin first.
    let stdin = child.stdin.take();
    let ended = child.wait().map_err(|error| error.to_string())?;
    drop(stdin);
    Ok(ended.success())
}

/// The parent holds the other end of stdin. The first process of a namespace hears no Ctrl-C.
fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(130);
    });
}

/// How a run cuts the power.
#[derive(Clone, Copy, Debug)]
pub struct Cuts {
    /// Once the first server listens, the disk acknowledges flushes without doing them.
    pub lying_flush: bool,
}

/// What cuts did to writes that no flush had made durable, and how many flushes came through.
#[derive(Clone, Copy, Default, Debug)]
pub struct Writes {
    pub dropped: u64,
    pub kept: u64,
    pub torn: u64,
    pub flushes: u64,
}

/// The disk of a run, with its file system, on which the server has its directory. Dropped, all of it is gone.
pub struct Power {
    disk: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Where the disk is served, and where its file system is mounted.
    served: PathBuf,
    mounted: PathBuf,
    is_mounted: bool,
    pub writes: Writes,
}

impl Power {
    /// Makes the disk and its file system. `folder` is the run's.
    pub fn on(folder: &Path, seed: u64) -> Result<Power, String> {
        let (served, mounted) = (folder.join("served"), folder.join("mounted"));
        for made in [&served, &mounted] {
            fs::create_dir_all(made).map_err(|error| format!("{}: {error}", made.display()))?;
        }
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let mut disk = Command::new(program)
            .arg("disk")
            .arg("--folder")
            .arg(&served)
            .args(["--bytes", &DISK_BYTES.to_string()])
            .args(["--seed", &seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the disk does not start: {error}"))?;
        let ends = disk.stdin.take().zip(disk.stdout.take());
        let (commands, answers) = ends.expect("both ends were asked for");
        let mut power = Power {
            disk,
            commands,
            answers: BufReader::new(answers),
            served,
            mounted,
            is_mounted: false,
            writes: Writes::default(),
        };
        let file = power.name()?;
        said(Command::new("mkfs.ext4").args(MKFS).arg(&file))
            .map_err(|error| format!("mkfs.ext4: {error}"))?;
        power.mount(&file)?;
        Ok(power)
    }

    pub fn data(&self) -> PathBuf {
        self.mounted.join("data")
    }

    /// From here on flushes do nothing.
    pub fn lie(&mut self) -> Result<(), String> {
        match self.ask("lie")?.as_str() {
            "lies" => Ok(()),
            other => Err(format!("the disk said {other:?}")),
        }
    }

    /// The power fails: first nothing is answered any more, then the server is gone, then the disk comes back with what
    /// survived, and its file system is mounted again.
    pub fn cut(&mut self, server: Server) -> Result<Phase, Cut> {
        let told = self.ask("cut").map_err(Cut::Run)?;
        let mut numbers = told.split(' ').skip(1).map(str::parse::<u64>);
        let mut number = || match numbers.next() {
            Some(Ok(number)) => Ok(number),
            Some(Err(_)) | None => Err(Cut::Run(format!("the disk said {told:?}"))),
        };
        self.writes.dropped += number()?;
        self.writes.kept += number()?;
        self.writes.torn += number()?;
        self.writes.flushes = number()?;
        let mut file = Ok(PathBuf::new());
        // A thread that waits for the disk dies only when it is answered.
        let killed = server
            .kill_while(|| file = self.tell("on").and_then(|()| self.name()))
            .map_err(Cut::Server)?;
        let file = file.map_err(Cut::Run)?;
        self.unmount().map_err(Cut::Run)?;
        self.mount(&file).map_err(Cut::Server)?;
        Ok(killed.phase())
    }

    /// Copies the directory as the last server left it.
    pub fn keep(&self, folder: &Path) {
        if self.is_mounted {
            let _ = said(Command::new("cp").arg("-a").arg(self.data()).arg(folder));
        }
    }

    fn ask(&mut self, command: &str) -> Result<String, String> {
        self.tell(command)?;
        self.answer()
    }

    fn tell(&mut self, command: &str) -> Result<(), String> {
        let told = writeln!(self.commands, "{command}").and_then(|()| self.commands.flush());
        told.map_err(|error| format!("the disk is gone: {error}"))
    }

    fn answer(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err("the disk has ended by itself".into()),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(format!("the disk is gone: {error}")),
        }
    }

    /// The file under which the disk is there from now on.
    fn name(&mut self) -> Result<PathBuf, String> {
        let line = self.answer()?;
        let name = line.strip_prefix("on ");
        let name = name.ok_or_else(|| format!("the disk said {line:?}"))?;
        Ok(self.served.join(name))
    }

    /// `mount` makes the loop device, and the kernel takes it away with the mount.
    fn mount(&mut self, file: &Path) -> Result<(), String> {
        let mut command = Command::new("mount");
        command.args(["-n", "-t", "ext4", "-o", "loop,noatime"]);
        said(command.arg(file).arg(&self.mounted))
            .map_err(|error| format!("its file system cannot be mounted: {error}"))?;
        self.is_mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            match unmount(&self.mounted, UnmountFlags::empty()) {
                Ok(()) => {
                    self.is_mounted = false;
                    return Ok(());
                }
                Err(rustix::io::Errno::BUSY) if start.elapsed() < UNMOUNT_MAX => {
                    std::thread::sleep(LOOK);
                }
                Err(error) => return Err(format!("{}: {error}", self.mounted.display())),
            }
        }
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        if self.is_mounted && self.unmount().is_err() {
            let _ = unmount(&self.mounted, UnmountFlags::DETACH);
        }
        let _ = self.disk.kill();
        let _ = self.disk.wait();
        let _ = unmount(&self.served, UnmountFlags::DETACH);
    }
}

/// Why a cut was not followed by a start.
pub enum Cut {
    /// The server had ended before, or the file system does not come back.
    Server(String),
    /// The run cannot go on.
    Run(String),
}
