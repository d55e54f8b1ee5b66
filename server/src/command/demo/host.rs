//! The engine and the executor as processes of this run: started, killed and stopped by their own handles.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pelton_client::{ClientOptions, Trust};
use serde_json::Value;

use crate::command::serve::STATE_FILE;

const START_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(2);

/// A process of this run, killed when this is dropped.
struct Process(Child);

impl Process {
    /// False if it has not ended by itself by then.
    async fn ends_within(&mut self, time: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < time {
            if let Ok(Some(_)) = self.0.try_wait() {
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The engine process.
pub struct Server {
    process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The fingerprint of its certificate.
    pub ca: String,
    /// From its start until it listened.
    pub ready: Duration,
}

impl Server {
    /// Starts this program as a server and waits until it listens.
    pub async fn start(data: &Path, said: &Path, listen: SocketAddr) -> Result<Server, String> {
        let state = data.join(STATE_FILE);
        // A server that was killed leaves its own behind.
        let _ = fs::remove_file(&state);
        let file = |path: &Path| {
            let file = File::options().create(true).append(true).open(path);
            file.map_err(|error| format!("{}: {error}", path.display()))
        };
        let start = Instant::now();
        let child = Command::new(program()?)
            .args(["serve", "--listen", &listen.to_string(), "--data"])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(file(said)?)
            .stderr(file(said)?)
            .spawn()
            .map_err(|error| format!("the server does not start: {error}"))?;
        let mut process = Process(child);
        loop {
            if let Some((address, ca)) = read_state(&state) {
                return Ok(Server {
                    process,
                    address,
                    ca,
                    ready: start.elapsed(),
                });
            }
            let ended = process.0.try_wait();
            if ended.as_ref().is_ok_and(Option::is_some) || start.elapsed() > START_MAX {
                return Err(format!(
                    "the server does not come up; it said: {}",
                    fs::read_to_string(said).unwrap_or_default().trim()
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// How a client of this tenant reaches it.
    pub fn options(&self, tenant: &str) -> Result<ClientOptions, String> {
        let trust = Trust::parse(&self.ca).ok_or("the server names no fingerprint")?;
        Ok(ClientOptions::at(self.address).trust(trust).tenant(tenant))
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Ends it as a crash would: SIGKILL.
    pub fn kill(&mut self) -> Result<(), String> {
        let child = &mut self.process.0;
        child
            .kill()
            .and_then(|()| child.wait())
            .map(drop)
            .map_err(|error| format!("the server cannot be killed: {error}"))
    }

    /// Ends it as an operator would: SIGTERM.
    pub async fn stop(mut self) -> Result<(), String> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.0.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        self.process
            .ends_within(STOP_MAX)
            .await
            .then_some(())
            .ok_or_else(|| "the server does not end within 30 seconds of SIGTERM".to_owned())
    }
}

/// The executor process.
pub struct Executor(Process);

impl Executor {
    /// Starts this program as an executor and waits until it is connected.
    pub fn start(
        server: &Server,
        ledger: &Path,
        slots: u32,
        flaky: Duration,
    ) -> Result<Executor, String> {
        let mut child = Command::new(program()?)
            .args(["demo-executor", "--server", &server.address.to_string()])
            .args(["--ca", &server.ca])
            .args(["--slots", &slots.to_string()])
            .args(["--flaky-us", &flaky.as_micros().to_string()])
            .arg("--ledger")
            .arg(ledger)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("the executor does not start: {error}"))?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let _ = BufReader::new(stdout).read_line(&mut line);
        }
        let executor = Executor(Process(child));
        if line.trim() == "ready" {
            Ok(executor)
        } else {
            Err("the executor does not come up".to_owned())
        }
    }

    /// False if it has ended by itself.
    pub fn runs(&mut self) -> bool {
        matches!(self.0.0.try_wait(), Ok(None))
    }

    /// Lets it say goodbye.
    pub async fn stop(mut self) -> Result<(), String> {
        drop(self.0.0.stdin.take());
        self.0
            .ends_within(STOP_MAX)
            .await
            .then_some(())
            .ok_or_else(|| "the executor does not end".to_owned())
    }
}

/// This program.
pub fn program() -> Result<PathBuf, String> {
    std::env::current_exe().map_err(|error| format!("this program does not find itself: {error}"))
}

/// Address and fingerprint as the server wrote them for local clients.
fn read_state(path: &Path) -> Option<(SocketAddr, String)> {
    let state: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let address = state["address"].as_str()?.parse().ok()?;
    Some((
        address,
        format!("sha256:{}", state["fingerprint"].as_str()?),
    ))
}
