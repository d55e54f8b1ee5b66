//! Server and executor processes, and what they cost.

use std::{
    fs, io,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pelton_client::{ClientOptions, Trust};
use serde_json::Value;

/// A folder that is removed when the run is over.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn make(base: Option<&Path>) -> io::Result<Folder> {
        let base = match base {
            Some(base) => base.to_owned(),
            None => std::env::current_dir()?,
        };
        for number in 0.. {
            let path = base.join(format!("pelton-bench-{}-{number}", std::process::id()));
            match fs::create_dir_all(&base).and_then(|()| fs::create_dir(&path)) {
                Ok(()) => return Ok(Folder(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("some number is free")
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server process of this run, killed when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) options: ClientOptions,
    /// From its start until it listened.
    pub(crate) ready: Duration,
}

impl Server {
    /// Starts `pelton serve` on a free port and waits until it listens.
    pub(crate) fn start(data: &Path, shards: Option<u16>) -> Result<Server, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(data);
        if let Some(shards) = shards {
            command.args(["--shards", &shards.to_string()]);
        }
        let start = Instant::now();
        let state = data.join("server.json");
        let _ = fs::remove_file(&state);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the server does not start: {error}"))?;
        let mut server = Server {
            child,
            options: ClientOptions::new(""),
            ready: Duration::ZERO,
        };
        loop {
            if let Some(options) = read_state(&state) {
                server.options = options;
                server.ready = start.elapsed();
                return Ok(server);
            }
            if let Ok(Some(status)) = server.child.try_wait() {
                let mut said = String::new();
                if let Some(mut stderr) = server.child.stderr.take() {
                    let _ = io::Read::read_to_string(&mut stderr, &mut said);
                }
                return Err(format!("the server ended with {status}: {}", said.trim()));
            }
            if start.elapsed() > Duration::from_secs(120) {
                return Err("the server does not listen after two minutes".to_owned());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an operator would.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        terminate(&self.child);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            if let Ok(Some(_)) = self.child.try_wait() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err("the server does not end within 30 seconds of SIGTERM".to_owned())
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn terminate(child: &Child) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

/// Address and fingerprint as the server wrote them for local clients.
fn read_state(path: &Path) -> Option<ClientOptions> {
    let state: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let address = state["address"].as_str()?.parse().ok()?;
    let trust = Trust::parse(&format!("sha256:{}", state["fingerprint"].as_str()?))?;
    Some(ClientOptions::at(address).trust(trust))
}

/// An executor process of this run.
pub(crate) struct Worker {
    child: Child,
    lines: io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Worker {
    /// Starts the executor and waits until its functions are registered.
    pub(crate) fn start(arguments: &[String]) -> Result<Worker, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(program)
            .arg("bench-worker")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the executor does not start: {error}"))?;
        let stdout = child.stdout.take().ok_or("the executor has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        match lines.next() {
            Some(Ok(line)) if line == "ready" => Ok(Worker { child, lines }),
            other => {
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("the executor does not come up: {other:?}"))
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it forget what it measured so far.
    pub(crate) fn reset(&mut self) {
        if let Some(stdin) = &mut self.child.stdin {
            let _ = stdin.write_all(b"reset\n").and_then(|()| stdin.flush());
        }
    }

    /// What it measured since the last reset.
    pub(crate) fn report(&mut self) -> Result<Value, String> {
        let stdin = self.child.stdin.as_mut().ok_or("it has no input")?;
        stdin
            .write_all(b"report\n")
            .and_then(|()| stdin.flush())
            .map_err(|error| format!("the executor is gone: {error}"))?;
        match self.lines.next() {
            Some(Ok(line)) => serde_json::from_str(&line).map_err(|error| error.to_string()),
            Some(Err(error)) => Err(error.to_string()),
            None => Err("the executor is gone".to_owned()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor seconds of a process since its start.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return 0.0;
    };
    // The name, in parentheses, may hold spaces.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut ticks = fields.split_whitespace().skip(11);
    let mut next = || ticks.next().and_then(|t| t.parse::<f64>().ok());
    let (user, system) = (next().unwrap_or(0.0), next().unwrap_or(0.0));
    (user + system) / rustix::param::clock_ticks_per_second() as f64
}

/// The most bytes of memory that a process has held.
pub(crate) fn rss_bytes_max(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Bytes of memory that a process holds.
pub(crate) fn rss_bytes(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
