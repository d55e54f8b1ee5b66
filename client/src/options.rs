//! Where the server is, how it is recognised, and who speaks.

use std::env;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use pelton_net::id::name_is_valid;
use pelton_net::quic::client::Trust;
use pelton_net::quic::transport::KEEP_ALIVE;
use pelton_net::session::KEY_BYTES_MAX;

use crate::error::Error;
use crate::link::SharedSocket;

/// The address of a server that nobody configured.
pub const SERVER_DEFAULT: &str = "127.0.0.1:7420";
/// The certificate that such a server makes at its first start.
pub const CA_FILE_DEFAULT: &str = "pelton-data/quic-cert.pem";

/// What a connection needs to know. Plain data; nothing happens before `connect`.
#[derive(Clone)]
pub struct ClientOptions {
    /// Host and port: `127.0.0.1:7420`, `[::1]:7420`, `pelton.example.com:7420`.
    pub server: String,
    /// The name that the certificate must have, if it is not the host; only for a CA file.
    pub server_name: Option<String>,
    /// How the server is recognised.
    pub trust: Trust,
    /// The bearer key, as `pelton key create` printed it.
    pub key: Option<String>,
    /// The tenant, where the key does not say it.
    pub tenant: Option<String>,
    /// What this program calls itself in the server's log.
    pub client: String,
    /// A connection without traffic is probed this often. A restarted server tells its former clients with the first
    /// packet that it gets from them, so this is how soon a client that only waits learns of the restart.
    pub keep_alive: Duration,
    /// The UDP socket, if it is shared with other connections; else every connection has its own.
    pub socket: Option<SharedSocket>,
}

impl ClientOptions {
    /// Options for this server, with the default trust and without a key.
    pub fn new(server: impl Into<String>) -> ClientOptions {
        ClientOptions {
            server: server.into(),
            ..ClientOptions::default()
        }
    }

    /// Options for a server at this address.
    pub fn at(server: SocketAddr) -> ClientOptions {
        ClientOptions::new(server.to_string())
    }

    /// Reads `PELTON_SERVER`, `PELTON_KEY` and `PELTON_CA`; the latter is the path of a PEM file, or `sha256:` and the
    /// certificate's fingerprint. What is not set has its default.
    pub fn from_env() -> Result<ClientOptions, Error> {
        let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let mut options = ClientOptions::default();
        if let Some(server) = set("PELTON_SERVER") {
            options.server = server;
        }
        options.key = set("PELTON_KEY");
        if let Some(ca) = set("PELTON_CA") {
            options.trust = Trust::parse(&ca).ok_or_else(|| {
                Error::Invalid("PELTON_CA is a file, or sha256: and 64 hex digits".into())
            })?;
        }
        Ok(options)
    }

    /// Sets how the server is recognised.
    pub fn trust(mut self, trust: Trust) -> ClientOptions {
        self.trust = trust;
        self
    }

    /// Sets the bearer key.
    pub fn key(mut self, key: impl Into<String>) -> ClientOptions {
        self.key = Some(key.into());
        self
    }

    /// Sets the tenant.
    pub fn tenant(mut self, tenant: impl Into<String>) -> ClientOptions {
        self.tenant = Some(tenant.into());
        self
    }

    /// Has connections share a socket.
    pub fn socket(mut self, socket: &SharedSocket) -> ClientOptions {
        self.socket = Some(socket.clone());
        self
    }

    /// Refuses what a hello cannot carry.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self
            .key
            .as_ref()
            .is_some_and(|key| key.is_empty() || key.len() > KEY_BYTES_MAX)
        {
            return Err(Error::Invalid("a key has 1 to 512 bytes".into()));
        }
        if let Some(tenant) = &self.tenant
            && !name_is_valid(tenant)
        {
            return Err(Error::Invalid(format!("{tenant:?} is no name of a tenant")));
        }
        Ok(())
    }

    /// The name to check the certificate for.
    pub(crate) fn certificate_name(&self) -> &str {
        if let Some(name) = &self.server_name {
            return name;
        }
        let host = match self.server.rsplit_once(':') {
            Some((host, _)) => host,
            None => &self.server,
        };
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
    }
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            server: SERVER_DEFAULT.into(),
            server_name: None,
            trust: Trust::CaFile(CA_FILE_DEFAULT.into()),
            key: None,
            tenant: None,
            client: concat!("pelton-client/", env!("CARGO_PKG_VERSION")).into(),
            keep_alive: KEEP_ALIVE,
            socket: None,
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("server", &self.server)
            .field("server_name", &self.server_name)
            .field("trust", &self.trust)
            .field("key", &self.key.as_ref().map(|_| ".."))
            .field("tenant", &self.tenant)
            .field("client", &self.client)
            .field("keep_alive", &self.keep_alive)
            .field("shares_a_socket", &self.socket.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_certificate_is_checked_for_the_host() {
        for (server, name) in [
            ("127.0.0.1:7420", "127.0.0.1"),
            ("[::1]:7420", "::1"),
            ("pelton.example.com:7420", "pelton.example.com"),
        ] {
            assert_eq!(ClientOptions::new(server).certificate_name(), name);
        }
    }

    #[test]
    fn a_key_is_never_printed() {
        let text = format!("{:?}", ClientOptions::default().key("pk_secret"));
        assert!(!text.contains("secret"), "{text}");
    }
}
