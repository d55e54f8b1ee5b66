//! The server's certificate: made at the first start, or put there by the operator.
//!
//! Two PEM files in the data directory: `quic-cert.pem`, which clients may use as their CA file, and `quic-key.pem`, for
//! the server's eyes only. The key is written first, so a crash in between leaves a key without a certificate, which the
//! next start completes; a certificate without a key is nothing that a crash can leave, and is refused.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};

use super::ALPN;

/// The file with the certificate, or the chain of them, the server's own first.
pub const CERTIFICATE_FILE: &str = "quic-cert.pem";
/// The file with the private key; mode 0600.
pub const KEY_FILE: &str = "quic-key.pem";

/// A certificate chain and its key. Owned by the server for its life.
pub struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// Why there is no usable certificate.
#[derive(Debug)]
pub enum CertificateError {
    /// A file could not be read or written.
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file holds no usable PEM.
    Pem {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificate is there and its key is not.
    KeyMissing(PathBuf),
    /// Making a new one failed.
    Generate(rcgen::Error),
    /// The certificate and the key do not belong together, or cannot be used for TLS.
    Unusable(rustls::Error),
}

impl fmt::Display for CertificateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CertificateError::File { path, source } => write!(f, "{}: {source}", path.display()),
            CertificateError::Pem { path, reason } => write!(
                f,
                "{}: {reason}; put the right file there, or remove both {CERTIFICATE_FILE} and {KEY_FILE} to have new \
                 ones made",
                path.display()
            ),
            CertificateError::KeyMissing(path) => write!(
                f,
                "{} is missing beside its certificate; restore it, or remove {CERTIFICATE_FILE} to have a new pair made",
                path.display()
            ),
            CertificateError::Generate(source) => {
                write!(f, "no certificate could be made: {source}")
            }
            CertificateError::Unusable(source) => {
                write!(f, "the certificate cannot be used: {source}")
            }
        }
    }
}

impl std::error::Error for CertificateError {}

impl Certificate {
    /// Reads the two files in `dir`, or makes them: self-signed for `localhost`, `127.0.0.1` and `::1`.
    pub fn load_or_make(dir: &Path) -> Result<Certificate, CertificateError> {
        let cert_path = dir.join(CERTIFICATE_FILE);
        let key_path = dir.join(KEY_FILE);
        let cert_pem = read(&cert_path)?;
        let key_pem = read(&key_path)?;
        let (cert_pem, key_pem) = match (cert_pem, key_pem) {
            (Some(cert), Some(key)) => (cert, key),
            (Some(_), None) => return Err(CertificateError::KeyMissing(key_path)),
            (None, key) => {
                let key = match key {
                    Some(key) => key,
                    None => {
                        let key = KeyPair::generate().map_err(CertificateError::Generate)?;
                        let key = key.serialize_pem();
                        write(dir, KEY_FILE, 0o600, &key)?;
                        key
                    }
                };
                let cert = self_signed(&key).map_err(CertificateError::Generate)?;
                write(dir, CERTIFICATE_FILE, 0o644, &cert)?;
                (cert, key)
            }
        };
        let chain = CertificateDer::pem_slice_iter(cert_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| pem_error(&cert_path, &error))?;
        if chain.is_empty() {
            return Err(CertificateError::Pem {
                path: cert_path,
                reason: "no certificate in it".into(),
            });
        }
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| pem_error(&key_path, &error))?;
        Ok(Certificate { chain, key })
    }

    /// SHA-256 of the server's own certificate, as 64 hex digits: what a client trusts with `Trust::Fingerprint`.
    pub fn fingerprint(&self) -> String {
        hex(&fingerprint_of(&self.chain[0]))
    }

    /// The same as bytes.
    pub fn fingerprint_bytes(&self) -> [u8; 32] {
        fingerprint_of(&self.chain[0])
    }

    /// TLS 1.3 without client certificates, session tickets and early data.
    pub(crate) fn server_config(&self) -> Result<rustls::ServerConfig, CertificateError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring has the cipher suites of TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(CertificateError::Unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.max_early_data_size = 0;
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// The key of stateless resets. It follows from the private key, so that a restarted server can tell the clients
    /// of its former life at once that their connections are gone; otherwise they would wait out the idle time.
    pub(crate) fn reset_key(&self) -> ring::hmac::Key {
        let mut hash = Sha256::new();
        hash.update(b"pelton stateless reset");
        hash.update(self.key.secret_der());
        ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &hash.finalize())
    }
}

/// SHA-256 of a certificate's DER.
pub(crate) fn fingerprint_of(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate.as_ref()).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn self_signed(key_pem: &str) -> Result<String, rcgen::Error> {
    let key = KeyPair::from_pem(key_pem)?;
    let names = ["localhost", "127.0.0.1", "::1"].map(String::from);
    let mut params = CertificateParams::new(names)?;
    params
        .distinguished_name
        .push(DnType::CommonName, "Pelton, self-signed");
    Ok(params.self_signed(&key)?.pem())
}

fn read(path: &Path) -> Result<Option<String>, CertificateError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CertificateError::File {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// Writes a file so that after a crash it is there whole or not at all.
fn write(dir: &Path, name: &str, mode: u32, text: &str) -> Result<(), CertificateError> {
    let path = dir.join(name);
    let temporary = dir.join(format!("{name}.new"));
    let written = (|| {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()
    })();
    written.map_err(|source| CertificateError::File { path, source })
}

fn pem_error(path: &Path, error: &rustls::pki_types::pem::Error) -> CertificateError {
    CertificateError::Pem {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
}
