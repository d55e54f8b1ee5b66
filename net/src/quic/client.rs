//! The client's side: whom to trust, an endpoint, a connection.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use socket2::{Domain, Protocol, Socket, Type};

use super::ALPN;
use super::certificate::fingerprint_of;
use super::socket::{self, enlarge_buffers};
use super::transport::{HANDSHAKE_TIMEOUT, KEEP_ALIVE, Path, Side, transport};

/// Which server a client takes for the right one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// The one whose certificate has this SHA-256.
    Fingerprint([u8; 32]),
    /// One with a certificate for the name asked for, issued by (or equal to) one in this PEM file.
    CaFile(PathBuf),
}

impl fmt::Display for Trust {
    /// What [`Trust::parse`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trust::Fingerprint(bytes) => {
                f.write_str("sha256:")?;
                bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Trust::CaFile(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Trust {
    /// Reads `sha256:` and 64 hex digits as a fingerprint, anything else as the path of a CA file. `None` for a
    /// fingerprint that is none.
    pub fn parse(text: &str) -> Option<Trust> {
        let Some(digits) = text.strip_prefix("sha256:") else {
            return Some(Trust::CaFile(text.into()));
        };
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let mut fingerprint = [0; 32];
        for (byte, pair) in fingerprint.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).expect("hex digits are ASCII");
            *byte = u8::from_str_radix(pair, 16).expect("both are hex digits");
        }
        Some(Trust::Fingerprint(fingerprint))
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// The CA file cannot be read or has no certificate in it.
    CaFile {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No local socket.
    Socket(io::Error),
    /// The server is named by something that is no name.
    Name(String),
    /// The server's certificate is not the trusted one, or the server speaks another protocol.
    Refused(String),
    /// Nobody answered, or the connection broke during the handshake.
    Unreachable(ConnectionError),
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::CaFile { path, reason } => {
                write!(f, "CA file {}: {reason}", path.display())
            }
            ConnectError::Socket(source) => write!(f, "no local socket: {source}"),
            ConnectError::Name(name) => write!(f, "{name:?} is no server name"),
            ConnectError::Refused(reason) => write!(f, "the handshake was refused: {reason}"),
            ConnectError::Unreachable(source) => write!(f, "the server is not reached: {source}"),
        }
    }
}

impl std::error::Error for ConnectError {}

/// An endpoint and its trust, for any number of connections. Owned by the runtime in which it was made.
#[derive(Clone)]
pub struct Connector {
    endpoint: Endpoint,
    loopback: ClientConfig,
    network: ClientConfig,
}

impl Connector {
    /// A connector for servers of the same address family as `server`.
    pub fn new(server: SocketAddr, trust: &Trust) -> Result<Connector, ConnectError> {
        Connector::with_keep_alive(server, trust, KEEP_ALIVE)
    }

    /// As `new`; connections without traffic are probed this often.
    pub fn with_keep_alive(
        server: SocketAddr,
        trust: &Trust,
        keep_alive: Duration,
    ) -> Result<Connector, ConnectError> {
        Connector::over(endpoint_to(server)?, trust, keep_alive)
    }

    /// A connector on an endpoint that others may use too, with a trust of its own.
    pub fn over(
        endpoint: Endpoint,
        trust: &Trust,
        keep_alive: Duration,
    ) -> Result<Connector, ConnectError> {
        let tls = QuicClientConfig::try_from(Arc::new(client_tls(trust)?))
            .expect("the provider has the cipher suite that QUIC starts with");
        let mut loopback = ClientConfig::new(Arc::new(tls));
        let mut network = loopback.clone();
        for (config, path) in [
            (&mut loopback, Path::Loopback),
            (&mut network, Path::Network),
        ] {
            let mut transport = transport(Side::Client, path);
            transport.keep_alive_interval(Some(keep_alive));
            config.transport_config(Arc::new(transport));
        }
        Ok(Connector {
            endpoint,
            loopback,
            network,
        })
    }

    /// A connection to `server`, whose certificate is checked for `name` (a host name or an address) where the trust
    /// is a CA file. Takes at most `HANDSHAKE_TIMEOUT`.
    pub async fn connect(
        &self,
        server: SocketAddr,
        name: &str,
    ) -> Result<Connection, ConnectError> {
        let config = match Path::to(server.ip()) {
            Path::Loopback => &self.loopback,
            Path::Network => &self.network,
        };
        let connecting = self
            .endpoint
            .connect_with(config.clone(), server, name)
            .map_err(|error| match error {
                quinn::ConnectError::InvalidServerName(name) => ConnectError::Name(name),
                other => ConnectError::Socket(io::Error::other(other)),
            })?;
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(ConnectionError::TransportError(error))) => {
                Err(ConnectError::Refused(error.reason))
            }
            Ok(Err(ConnectionError::ConnectionClosed(close))) => {
                Err(ConnectError::Refused(close.to_string()))
            }
            Ok(Err(error)) => Err(ConnectError::Unreachable(error)),
            Err(_) => Err(ConnectError::Unreachable(ConnectionError::TimedOut)),
        }
    }

    /// The endpoint, to close it and to wait until it is idle.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

/// An endpoint with a socket of its own for servers of the address family of `server`.
pub fn endpoint_to(server: SocketAddr) -> Result<Endpoint, ConnectError> {
    let local: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))
        .map_err(ConnectError::Socket)?;
    enlarge_buffers(&socket);
    socket.bind(&local.into()).map_err(ConnectError::Socket)?;
    socket::endpoint(EndpointConfig::default(), None, socket.into()).map_err(ConnectError::Socket)
}

/// TLS 1.3 without early data.
fn client_tls(trust: &Trust) -> Result<rustls::ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring has the cipher suites of TLS 1.3");
    let mut config = match trust {
        Trust::Fingerprint(fingerprint) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(FingerprintVerifier {
                fingerprint: *fingerprint,
                provider,
            }))
            .with_no_client_auth(),
        Trust::CaFile(path) => {
            let error = |reason: String| ConnectError::CaFile {
                path: path.clone(),
                reason,
            };
            let mut roots = RootCertStore::empty();
            for certificate in
                CertificateDer::pem_file_iter(path).map_err(|e| error(e.to_string()))?
            {
                let certificate = certificate.map_err(|e| error(e.to_string()))?;
                roots.add(certificate).map_err(|e| error(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(error("no certificate in it".into()));
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_early_data = false;
    Ok(config)
}

/// Takes the one certificate with a known hash, whatever it says about names and dates. The handshake still proves
/// that the server has its key.
#[derive(Debug)]
struct FingerprintVerifier {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if fingerprint_of(end_entity) != self.fingerprint {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
