//! The endpoints over real sockets: steering, trust, busy ports, certificates over restarts, half-open connections.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stand outside the test functions"
)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pelton_net::quic::certificate::{CERTIFICATE_FILE, Certificate, CertificateError, KEY_FILE};
use pelton_net::quic::client::{ConnectError, Connector, Trust};
use pelton_net::quic::server::{self, BindError, HALF_OPEN_RETRY, Listener};
use quinn::{Connection, ConnectionError};
use tempfile::TempDir;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn certificate() -> (TempDir, Certificate) {
    let dir = TempDir::new().unwrap();
    let certificate = Certificate::load_or_make(dir.path()).unwrap();
    (dir, certificate)
}

fn trust(certificate: &Certificate) -> Trust {
    Trust::Fingerprint(certificate.fingerprint_bytes())
}

/// A server whose edges, one thread each, send back what a stream brings. Lives until its connections end.
struct Echo {
    address: SocketAddr,
    accepted: Arc<Vec<AtomicUsize>>,
    stop: tokio::sync::watch::Sender<bool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(address: SocketAddr, edges: usize, certificate: &Certificate) -> Echo {
        let sockets = server::bind(address, edges, certificate).unwrap();
        let address = sockets[0].local_addr();
        let accepted: Arc<Vec<_>> = Arc::new((0..edges).map(|_| AtomicUsize::new(0)).collect());
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let threads = sockets
            .into_iter()
            .enumerate()
            .map(|(edge, socket)| {
                assert_eq!(socket.local_addr(), address);
                let accepted = accepted.clone();
                let mut stopped = stopped.clone();
                std::thread::spawn(move || {
                    runtime().block_on(async move {
                        let listener = socket.listen().unwrap();
                        tokio::select! {
                            () = echo(&listener, &accepted[edge]) => {}
                            _ = stopped.changed() => {}
                        }
                    });
                })
            })
            .collect();
        Echo {
            address,
            accepted,
            stop,
            threads,
        }
    }

    /// Ends the edges as a crash would: nobody is told.
    fn kill(self) {
        self.stop.send(true).unwrap();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

async fn echo(listener: &Listener, accepted: &AtomicUsize) {
    while let Some(handshake) = listener.accept().await {
        let Ok(connection) = handshake.finish().await else {
            continue;
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                let bytes = receive.read_to_end(1 << 20).await.unwrap();
                send.write_all(&bytes).await.unwrap();
                send.finish().unwrap();
            }
        });
    }
}

async fn say(connection: &Connection, text: &[u8]) -> bool {
    let Ok((mut send, mut receive)) = connection.open_bi().await else {
        return false;
    };
    if send.write_all(text).await.is_err() {
        return false;
    }
    send.finish().unwrap();
    receive
        .read_to_end(1 << 20)
        .await
        .is_ok_and(|heard| heard == text)
}

#[test]
fn connections_survive_a_change_of_the_clients_port() {
    let (_dir, certificate) = certificate();
    let echo = Echo::start(ANY_PORT, 4, &certificate);
    runtime().block_on(async {
        let connector = Connector::new(echo.address, &trust(&certificate)).unwrap();
        let mut connections = Vec::new();
        for _ in 0..64 {
            connections.push(connector.connect(echo.address, "localhost").await.unwrap());
        }
        for round in 0..3 {
            for connection in &connections {
                assert!(say(connection, &[round; 3000]).await);
            }
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            connector.endpoint().rebind(socket).unwrap();
        }
        for connection in &connections {
            assert!(say(connection, b"after the last change").await);
        }
        let spread: Vec<_> = echo
            .accepted
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        assert_eq!(spread.iter().sum::<usize>(), 64);
        assert!(spread.iter().all(|&count| count > 0), "{spread:?}");
    });
}

#[test]
fn a_server_with_another_certificate_is_refused() {
    let (_dir, certificate) = certificate();
    let echo = Echo::start(ANY_PORT, 1, &certificate);
    runtime().block_on(async {
        let connector = Connector::new(echo.address, &Trust::Fingerprint([7; 32])).unwrap();
        let error = connector
            .connect(echo.address, "localhost")
            .await
            .unwrap_err();
        assert!(matches!(error, ConnectError::Refused(_)), "{error}");

        let (other_dir, _) = self::certificate();
        let other = Trust::CaFile(other_dir.path().join(CERTIFICATE_FILE));
        let connector = Connector::new(echo.address, &other).unwrap();
        let error = connector
            .connect(echo.address, "localhost")
            .await
            .unwrap_err();
        assert!(matches!(error, ConnectError::Refused(_)), "{error}");
    });
}

#[test]
fn the_certificate_file_serves_as_the_ca_file_for_the_names_in_it() {
    let (dir, certificate) = certificate();
    let echo = Echo::start(ANY_PORT, 1, &certificate);
    runtime().block_on(async {
        let trust = Trust::CaFile(dir.path().join(CERTIFICATE_FILE));
        let connector = Connector::new(echo.address, &trust).unwrap();
        for name in ["localhost", "127.0.0.1", "::1"] {
            let connection = connector.connect(echo.address, name).await.unwrap();
            assert!(say(&connection, name.as_bytes()).await);
        }
        let error = connector
            .connect(echo.address, "example.com")
            .await
            .unwrap_err();
        assert!(matches!(error, ConnectError::Refused(_)), "{error}");
    });
}

#[test]
fn another_protocol_is_refused() {
    let (dir, certificate) = certificate();
    let echo = Echo::start(ANY_PORT, 1, &certificate);
    runtime().block_on(async {
        let pem = fs::read_to_string(dir.path().join(CERTIFICATE_FILE)).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        use rustls::pki_types::pem::PemObject;
        roots
            .add(rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"pelton/999".to_vec()];
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(tls));
        let endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let error = endpoint
            .connect_with(config, echo.address, "localhost")
            .unwrap()
            .await
            .unwrap_err();
        let ConnectionError::ConnectionClosed(close) = &error else {
            panic!("{error}");
        };
        // TLS alert 120, no_application_protocol.
        assert_eq!(
            close.error_code,
            quinn::TransportErrorCode::crypto(120),
            "{error}"
        );
    });
}

#[test]
fn a_busy_port_is_told_whether_or_not_it_is_shared() {
    let (_dir, certificate) = certificate();
    for first in [1, 3] {
        let held = server::bind(ANY_PORT, first, &certificate).unwrap();
        let address = held[0].local_addr();
        assert_ne!(address.port(), 0);
        for second in [1, 3] {
            match server::bind(address, second, &certificate) {
                Err(BindError::AddressInUse(busy)) => assert_eq!(busy, address),
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("bound beside another listener"),
            }
        }
        drop(held);
        assert!(server::bind(address, 2, &certificate).is_ok());
    }
    assert!(matches!(
        server::bind(ANY_PORT, 0, &certificate),
        Err(BindError::SocketCount(0))
    ));
    assert!(matches!(
        server::bind(ANY_PORT, 257, &certificate),
        Err(BindError::SocketCount(257))
    ));
}

#[test]
fn a_certificate_survives_a_restart_and_its_key_is_private() {
    let (dir, first) = certificate();
    let mode = |file| {
        let metadata = fs::metadata(dir.path().join(file)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(KEY_FILE), 0o600);
    let second = Certificate::load_or_make(dir.path()).unwrap();
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(first.fingerprint().len(), 64);
    let text = format!("sha256:{}", first.fingerprint());
    assert_eq!(Trust::parse(&text), Some(trust(&first)));
    let names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "nothing temporary stays: {names:?}");
}

#[test]
fn a_crash_between_key_and_certificate_is_completed() {
    let (dir, _) = certificate();
    fs::remove_file(dir.path().join(CERTIFICATE_FILE)).unwrap();
    fs::write(dir.path().join("quic-cert.pem.new"), "half").unwrap();
    let key = fs::read(dir.path().join(KEY_FILE)).unwrap();
    Certificate::load_or_make(dir.path()).unwrap();
    assert_eq!(fs::read(dir.path().join(KEY_FILE)).unwrap(), key);

    fs::remove_file(dir.path().join(KEY_FILE)).unwrap();
    assert!(matches!(
        Certificate::load_or_make(dir.path()),
        Err(CertificateError::KeyMissing(_))
    ));
}

#[test]
fn clients_of_a_killed_server_are_told_by_its_successor() {
    let (dir, certificate) = certificate();
    for (before, after) in [(1, 1), (2, 3)] {
        let echo = Echo::start(ANY_PORT, before, &certificate);
        let address = echo.address;
        runtime().block_on(async {
            let connector = Connector::new(address, &trust(&certificate)).unwrap();
            let connection = connector.connect(address, "localhost").await.unwrap();
            assert!(say(&connection, b"before").await);
            echo.kill();
            let restarted = Certificate::load_or_make(dir.path()).unwrap();
            let _echo = Echo::start(address, after, &restarted);
            let asked = Instant::now();
            assert!(!say(&connection, b"into the void").await);
            let reason = connection.close_reason().unwrap();
            assert!(matches!(reason, ConnectionError::Reset), "{reason}");
            assert!(asked.elapsed() < Duration::from_secs(5));
            let connection = connector.connect(address, "localhost").await.unwrap();
            assert!(say(&connection, b"after").await);
        });
    }
}

#[test]
fn many_half_open_connections_make_the_next_client_prove_its_address() {
    let (_dir, certificate) = certificate();
    runtime().block_on(async {
        let socket = server::bind(ANY_PORT, 1, &certificate)
            .unwrap()
            .pop()
            .unwrap();
        let address = socket.local_addr();
        let listener = socket.listen().unwrap();
        let connector = Connector::new(address, &trust(&certificate)).unwrap();
        // Handshakes that are taken and not finished stay half-open.
        let mut half_open = Vec::new();
        let clients: Vec<_> = (0..HALF_OPEN_RETRY)
            .map(|_| {
                let connector = connector.clone();
                tokio::spawn(async move { connector.connect(address, "localhost").await })
            })
            .collect();
        for _ in 0..HALF_OPEN_RETRY {
            let handshake = listener.accept().await.unwrap();
            assert!(!handshake.address_proved());
            half_open.push(handshake);
        }
        let last = {
            let connector = connector.clone();
            tokio::spawn(async move { connector.connect(address, "localhost").await })
        };
        let proved = listener.accept().await.unwrap();
        assert!(proved.address_proved());
        proved.finish().await.unwrap();
        last.await.unwrap().unwrap();
        for handshake in half_open {
            handshake.finish().await.unwrap();
        }
        for client in clients {
            client.await.unwrap().unwrap();
        }
    });
}
