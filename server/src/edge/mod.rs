//! The QUIC edges: threads that turn frames into batches for shards and what shards say into frames. They decide
//! nothing but who may speak.
//!
//! Each edge is one thread with one socket and one single-threaded runtime; nothing in it is shared with another edge
//! except the engine. Reading order: `session` is one stream of frames; `submit` and `execute` the two kinds of frames
//! on the data path; `query` the rare ones; `hub` what an edge's sessions share, and where deliveries come in.

mod execute;
mod hub;
mod query;
mod session;
mod submit;

use std::{
    fmt, io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use pelton_engine::{Engine, linger::take_short_turns};
use pelton_net::quic::{
    certificate::Certificate,
    server::{BindError, EdgeSocket, bind},
};
use tokio::{
    sync::{Notify, watch},
    task::LocalSet,
};

use crate::{backup::Backups, edge::hub::Hub, keys::Keys};

/// What the edges are told.
#[derive(Clone)]
pub struct EdgeSettings {
    /// Where they listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Edge threads.
    pub edges: usize,
    /// Cores to pin them to, in turn; empty to leave them to the scheduler.
    pub pin: Vec<usize>,
    /// Largest payload and result.
    pub payload_bytes_max: usize,
    /// Tasks of one session that may be submitted and unanswered.
    pub in_flight_max: u32,
    /// How often an executor shows that it lives.
    pub heartbeat: Duration,
    /// How long an edge looks for work, at most, before it sleeps.
    pub linger: Duration,
    /// The server's certificate.
    pub certificate: Arc<Certificate>,
    /// The server's backups.
    pub backups: Arc<Backups>,
}

/// Why the edges do not start.
#[derive(Debug)]
pub enum EdgeError {
    /// The address cannot be bound.
    Bind(BindError),
    /// A thread or its runtime could not be made.
    Thread(io::Error),
    /// The engine has no room for more edges.
    TooMany,
}

impl fmt::Display for EdgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EdgeError::Bind(error) => error.fmt(f),
            EdgeError::Thread(error) => write!(f, "an edge's thread could not be started: {error}"),
            EdgeError::TooMany => f.write_str("the engine has no room for so many edges"),
        }
    }
}

impl std::error::Error for EdgeError {}

/// The running edges of a server.
pub struct Edges {
    address: SocketAddr,
    stop: watch::Sender<Option<Duration>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Edges {
    /// Binds the address and starts the threads; returns when all of them listen.
    pub fn start(
        engine: Arc<Engine>,
        keys: Arc<Keys>,
        settings: EdgeSettings,
    ) -> Result<Edges, EdgeError> {
        let sockets = bind(settings.listen, settings.edges, &settings.certificate)
            .map_err(EdgeError::Bind)?;
        let address = sockets[0].local_addr();
        let (stop, stopping) = watch::channel(None);
        let (started, starts) = mpsc::channel();
        let mut threads = Vec::new();
        for (index, socket) in sockets.into_iter().enumerate() {
            let engine = Arc::clone(&engine);
            let keys = Arc::clone(&keys);
            let settings = settings.clone();
            let stopping = stopping.clone();
            let started = started.clone();
            let thread = thread::Builder::new()
                .name(format!("pelton-edge-{index}"))
                .spawn(move || {
                    if let Some(core) = pinned_core(&settings.pin, index) {
                        pin_to(core);
                    }
                    run_edge(&engine, keys, settings, socket, stopping, &started);
                })
                .map_err(EdgeError::Thread)?;
            threads.push(thread);
        }
        drop(started);
        for started in starts.iter().take(settings.edges) {
            started?;
        }
        Ok(Edges {
            address,
            stop,
            threads,
        })
    }

    /// Where the edges listen.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more submits, answers what is in flight within `grace`, says goodbye and ends.
    pub fn stop(self, grace: Duration) {
        self.stop.send_replace(Some(grace));
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn pinned_core(cores: &[usize], index: usize) -> Option<usize> {
    (!cores.is_empty()).then(|| cores[index % cores.len()])
}

/// Keeps the calling thread on one core. That it could not be done costs speed only.
fn pin_to(core: usize) {
    if let Err(error) = core_affinity(core) {
        tracing::warn!(core, %error, "an edge could not be pinned");
    }
}

fn core_affinity(core: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set)?;
    Ok(())
}

fn run_edge(
    engine: &Engine,
    keys: Arc<Keys>,
    settings: EdgeSettings,
    socket: EdgeSocket,
    mut stopping: watch::Receiver<Option<Duration>>,
    started: &mpsc::Sender<Result<(), EdgeError>>,
) {
    if !settings.linger.is_zero() {
        take_short_turns();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(EdgeError::Thread(error)));
            return;
        }
    };
    let bell = Arc::new(Notify::new());
    let ring = Arc::clone(&bell);
    let Some(edge) = engine.attach(move || ring.notify_one()) else {
        let _ = started.send(Err(EdgeError::TooMany));
        return;
    };
    let hub = Rc::new(Hub::new(edge, bell, keys, settings, engine));
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let listener = match socket.listen() {
            Ok(listener) => Rc::new(listener),
            Err(error) => {
                let _ = started.send(Err(EdgeError::Thread(error)));
                return;
            }
        };
        let _ = started.send(Ok(()));
        let pump = tokio::task::spawn_local(Rc::clone(&hub).pump());
        let ringer = tokio::task::spawn_local(Rc::clone(&hub).ring());
        let minder = tokio::task::spawn_local(Rc::clone(&hub).mind());
        let accept = tokio::task::spawn_local(session::accept(Rc::clone(&hub), listener.clone()));
        let grace = stopping
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|grace| *grace);
        accept.abort();
        hub.say_goodbye(grace.unwrap_or_default()).await;
        minder.abort();
        pump.abort();
        ringer.abort();
        listener.endpoint().close(0u32.into(), b"closing");
        let _ = tokio::time::timeout(Duration::from_secs(1), listener.endpoint().wait_idle()).await;
    });
}
