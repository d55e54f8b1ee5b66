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

/// The engine process, killed when this is dropped.
pub struct Server {
    child: Child,
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
        let mut child = Command::new(program()?)
            .args(["serve", "--listen", &listen.to_string(), "--data"])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(file(said)?)
            .stderr(file(said)?)
            .spawn()
            .map_err(|error| format!("the server does not start: {error}"))?;
        loop {
            if let Some((address, ca)) = read_state(&state) {
                return Ok(Server {
                    child,
                    address,
                    ca,
                    ready: start.elapsed(),
                });
            }
            let ended = child.try_wait();
            if ended.as_ref().is_ok_and(Option::is_some) || start.elapsed() > START_MAX {
                let _ = child.kill();
                let _ = child.wait();
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
        self.child.id()
    }

    /// Ends it as a crash would: SIGKILL.
    pub fn kill(&mut self) -> Result<(), String> {
        self.child
            .kill()
            .and_then(|()| self.child.wait())
            .map(drop)
            .map_err(|error| format!("the server cannot be killed: {error}"))
    }

    /// Ends it as an operator would: SIGTERM.
    pub async fn stop(mut self) -> Result<(), String> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        wait(&mut self.child, STOP_MAX)
            .await
            .then_some(())
            .ok_or_else(|| "the server does not end within 30 seconds of SIGTERM".to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The executor process, killed when this is dropped.
pub struct Executor(Child);

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
        let executor = Executor(child);
        if line.trim() == "ready" {
            Ok(executor)
        } else {
            Err("the executor does not come up".to_owned())
        }
    }

    /// False if it has ended by itself.
    pub fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Lets it say goodbye.
    pub async fn stop(mut self) -> Result<(), String> {
        drop(self.0.stdin.take());
        wait(&mut self.0, STOP_MAX)
            .await
            .then_some(())
            .ok_or_else(|| "the executor does not end".to_owned())
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// False if the process has not ended by then.
async fn wait(child: &mut Child, time: Duration) -> bool {
    let start = Instant::now();
    while start.elapsed() < time {
        if let Ok(Some(_)) = child.try_wait() {
            return true;
        }
        tokio::time::sleep(LOOK).await;
    }
    false
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
