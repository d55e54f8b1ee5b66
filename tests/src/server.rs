//! `pelton serve` as a child process, with a data folder of its own.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    time::Duration,
};

use pelton_client::{Client, ClientOptions, Trust};
use serde_json::Value;
use tempfile::TempDir;

use crate::deadline::poll;

/// A start may have to wait for the disk, which the other tests use too.
const START: Duration = Duration::from_secs(120);
/// The orderly end: the grace of edges and engine, and a slow disk.
const STOP: Duration = Duration::from_secs(60);

/// How a server is started.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Shards of its log.
    pub shards: u16,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions { shards: 1 }
    }
}

/// A server with its data. Dropped, it kills its own child and removes its folder.
#[derive(Debug)]
pub struct Server {
    folder: TempDir,
    options: ServerOptions,
    variables: Vec<(&'static str, String)>,
    child: Option<Child>,
    state: State,
}

#[derive(Clone, Debug)]
struct State {
    address: SocketAddr,
    trust: Trust,
}

impl Server {
    /// Starts a server on a free port and waits until it listens.
    pub fn start(options: ServerOptions) -> Server {
        let mut server = Server::prepared(options);
        server.run();
        server
    }

    /// A server that has not been started: [`Server::restart`] does.
    pub fn prepared(options: ServerOptions) -> Server {
        let base = target().join("test-data");
        fs::create_dir_all(&base).expect("the target folder can be written");
        let folder = tempfile::Builder::new()
            .prefix("server-")
            .tempdir_in(&base)
            .expect("the target folder can be written");
        Server {
            folder,
            options,
            variables: Vec::new(),
            child: None,
            state: State {
                address: SocketAddr::from(([127, 0, 0, 1], 0)),
                trust: Trust::Fingerprint([0; 32]),
            },
        }
    }

    /// Has its next starts see this environment variable.
    pub fn set(&mut self, name: &'static str, value: impl ToString) {
        self.variables.push((name, value.to_string()));
    }

    /// Has its next starts ask for so many shards.
    pub fn set_shards(&mut self, shards: u16) {
        self.options.shards = shards;
    }

    /// Starts the server and kills it after this long, however far it is by then.
    pub fn start_and_kill(&self, after: Duration) {
        assert!(self.child.is_none(), "the server still runs");
        let mut child = self.spawn();
        std::thread::sleep(after);
        child
            .kill()
            .expect("a child that was not waited for can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// Starts the server again on the same data and the same port. It must not be running.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "the server still runs");
        self.run();
    }

    fn run(&mut self) {
        let mut child = self.spawn();
        let state_file = self.data().join("server.json");
        let pid = u64::from(child.id());
        let mut state = None;
        let mut ended = None;
        let done = poll(START, || {
            let listens = fs::read_to_string(self.printed()).is_ok_and(|said| !said.is_empty());
            state = read_state(&state_file, pid).filter(|_| listens);
            ended = child.try_wait().expect("a child can be waited for");
            state.is_some() || ended.is_some()
        });
        let said = || fs::read_to_string(self.said()).unwrap_or_default();
        assert!(ended.is_none(), "the server ended: {ended:?}: {}", said());
        assert!(done, "the server does not listen: {}", said());
        self.state = state.expect("the loop ends with a state");
        self.child = Some(child);
    }

    fn spawn(&self) -> Child {
        let create = |path| File::create(path).expect("the folder can be written");
        let (printed, said) = (create(self.printed()), create(self.said()));
        Command::new(binary())
            .arg("serve")
            .arg("--listen")
            .arg(self.state.address.to_string())
            .arg("--data")
            .arg(self.data())
            .arg("--shards")
            .arg(self.options.shards.to_string())
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(printed)
            .stderr(said)
            .spawn()
            .expect("the binary was just built")
    }

    /// Starts the server where it is expected to refuse: how it ended, and what it said.
    pub fn refuses_to_start(&self) -> (ExitStatus, String) {
        assert!(self.child.is_none(), "the server still runs");
        let mut child = self.spawn();
        let status = wait(&mut child, START);
        let said = fs::read_to_string(self.said()).unwrap_or_default();
        (status, said)
    }

    /// Ends it as a crash does.
    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("the server runs");
        child.kill().expect("a running child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// Ends it as an operator does, and waits for it; what it printed last.
    pub fn stop(&mut self) -> String {
        let mut child = self.child.take().expect("the server runs");
        let told = Command::new("kill")
            .args(["-TERM", &child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(told.success());
        let status = wait(&mut child, STOP);
        let said = fs::read_to_string(self.said()).unwrap_or_default();
        assert!(status.success(), "the server ended with {status}: {said}");
        let printed = fs::read_to_string(self.printed()).unwrap_or_default();
        printed.lines().next_back().unwrap_or_default().to_owned()
    }

    /// True while the process lives.
    pub fn lives(&mut self) -> bool {
        let Some(child) = &mut self.child else {
            return false;
        };
        let ended = child.try_wait().expect("a child can be waited for");
        ended.is_none()
    }

    /// What it has printed since its start, and what it has said on stderr.
    pub fn output(&self) -> (String, String) {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        (read(self.printed()), read(self.said()))
    }

    /// The folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its log is.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn printed(&self) -> PathBuf {
        self.folder.path().join("stdout")
    }

    fn said(&self) -> PathBuf {
        self.folder.path().join("stderr")
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.state.address
    }

    /// How it is recognised.
    pub fn trust(&self) -> &Trust {
        &self.state.trust
    }

    /// Options for its clients. They look often whether it is still there, so that a restart costs a test no time.
    pub fn options(&self) -> ClientOptions {
        ClientOptions {
            keep_alive: Duration::from_millis(100),
            ..ClientOptions::at(self.state.address).trust(self.state.trust.clone())
        }
    }

    /// A client of the default tenant.
    pub async fn client(&self) -> Client {
        let connected = Client::connect(self.options()).await;
        connected.expect("the server listens")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let said = fs::read_to_string(self.said()).unwrap_or_default();
            eprintln!("the server said: {}", said.trim());
        }
    }
}

fn wait(child: &mut Child, patience: Duration) -> ExitStatus {
    let mut ended = None;
    poll(patience, || {
        ended = child.try_wait().expect("a child can be waited for");
        ended.is_some()
    });
    ended.unwrap_or_else(|| {
        let _ = child.kill();
        let _ = child.wait();
        panic!("the server does not end within {patience:?}")
    })
}

/// What the server wrote for local clients, if it is this process that did.
fn read_state(path: &Path, pid: u64) -> Option<State> {
    let state: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    if state["pid"].as_u64()? != pid {
        return None;
    }
    Some(State {
        address: state["address"].as_str()?.parse().ok()?,
        trust: Trust::parse(&format!("sha256:{}", state["fingerprint"].as_str()?))?,
    })
}

/// `target/release`: the test executable is there, in the folder `deps`.
fn profile() -> PathBuf {
    let program = env::current_exe().expect("a program has a path");
    let folder = program.parent().expect("a program is in a folder");
    match folder.file_name() == Some(OsStr::new("deps")) {
        true => folder.parent().expect("deps is in a folder").to_owned(),
        false => folder.to_owned(),
    }
}

fn target() -> PathBuf {
    let profile = profile();
    let target = profile.parent().expect("a profile is in the target folder");
    target.to_owned()
}

/// Variables that cargo sets for a test, by their beginnings.
const OF_THIS_PACKAGE: [&str; 6] = [
    "CARGO_PKG_",
    "CARGO_MANIFEST_",
    "CARGO_BIN_",
    "CARGO_CRATE_",
    "CARGO_PRIMARY_",
    "OUT_DIR",
];

/// Runs a command of the program to its end; its exit code, and what it printed and said.
pub fn pelton(arguments: &[&str], data: &Path) -> (i32, String, String) {
    let output = Command::new(binary())
        .args(arguments)
        .arg("--data")
        .arg(data)
        .output()
        .expect("the binary was just built");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().expect("it is not killed");
    (code, text(&output.stdout), text(&output.stderr))
}

/// The binary under test, built once by each process that asks.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let profile = profile();
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--locked", "--package", "pelton-server"]);
        build
            .args(["--bin", "pelton", "--target-dir"])
            .arg(target());
        if profile.file_name() == Some(OsStr::new("release")) {
            build.arg("--release");
        }
        // What cargo has told this test about its own package would have build scripts run again, here and next time.
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            if OF_THIS_PACKAGE.iter().any(|of| name.starts_with(of)) {
                build.env_remove(&*name);
            }
        }
        build.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        let built = build.status().expect("cargo can be started");
        assert!(built.success(), "the binary does not build");
        profile.join("pelton")
    })
}
