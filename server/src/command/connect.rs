//! How a command finds its server and recognises it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use pelton_client::{Client, ClientOptions, Operation, RequestId, TaskName, Trust};
use serde_json::Value;

use crate::{
    command::{
        exit::{Exit, Failure},
        serve::STATE_FILE,
    },
    config::Config,
};

/// The certificate that a server makes in its data directory.
const CERTIFICATE_FILE: &str = "quic-cert.pem";

/// Where the server is, and who asks. Without any of these, the server of the data directory is asked.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Connection")]
pub struct ConnectArgs {
    /// The server; without it, the one that runs on the data directory
    #[arg(long, env = "PELTON_SERVER", value_name = "HOST:PORT")]
    pub server: Option<String>,
    /// Bearer key, as `pelton key create` printed it
    #[arg(
        long,
        env = "PELTON_KEY",
        value_name = "SECRET",
        hide_env_values = true
    )]
    pub key: Option<String>,
    /// How to recognise the server: a PEM file, or sha256:FINGERPRINT
    #[arg(long, env = "PELTON_CA", value_name = "FILE|sha256:HEX")]
    pub ca: Option<String>,
    /// The tenant, where the key covers several
    #[arg(long, env = "PELTON_TENANT", value_name = "NAME")]
    pub tenant: Option<String>,
    /// Data directory of a server on this machine [default: pelton-data]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Print JSON
    #[arg(long, help_heading = "Options")]
    pub json: bool,
}

/// What `DATA/server.json` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Local {
    pub address: String,
    pub fingerprint: String,
}

impl Local {
    /// Reads the file; `None` if no server runs on the directory.
    pub fn read(data: &Path) -> Result<Option<Local>, Failure> {
        let path = data.join(STATE_FILE);
        let failed =
            |what: String| Failure::new(Exit::Failure, format!("{}: {what}", path.display()));
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(failed(error.to_string())),
        };
        let state: Value =
            serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        let field = |name: &str| match &state[name] {
            Value::String(text) => Ok(text.clone()),
            _ => Err(failed(format!("`{name}` is missing"))),
        };
        Ok(Some(Local {
            address: field("address")?,
            fingerprint: field("fingerprint")?,
        }))
    }
}

impl ConnectArgs {
    /// The data directory.
    pub fn data<'a>(&'a self, config: &'a Config) -> &'a Path {
        self.data.as_deref().unwrap_or(&config.data.value)
    }

    /// What the client needs to know.
    pub fn options(&self, config: &Config) -> Result<ClientOptions, Failure> {
        let data = self.data(config);
        let set = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let local = Local::read(data)?;
        let server = match (set(&self.server), &local) {
            (Some(server), _) => with_port(server),
            (None, Some(local)) => local.address.clone(),
            (None, None) => {
                return Err(Failure::new(
                    Exit::Unreachable,
                    format!(
                        "no server runs on {}: start one with `pelton serve`, or say where it is with --server or --data",
                        data.display()
                    ),
                ));
            }
        };
        let trust = match (set(&self.ca), local) {
            (Some(ca), _) => Trust::parse(&ca)
                .ok_or_else(|| Failure::usage("--ca is a file, or sha256: and 64 hex digits"))?,
            (None, Some(local)) if local.address == server => {
                let text = format!("sha256:{}", local.fingerprint.trim_start_matches("sha256:"));
                Trust::parse(&text).ok_or_else(|| {
                    Failure::new(Exit::Failure, format!("{text} is no fingerprint"))
                })?
            }
            (None, _) if data.join(CERTIFICATE_FILE).exists() => {
                Trust::CaFile(data.join(CERTIFICATE_FILE))
            }
            (None, _) => {
                return Err(Failure::usage(format!(
                    "how to recognise {server}? Give --ca FILE or --ca sha256:FINGERPRINT (the server keeps its certificate in DATA/{CERTIFICATE_FILE} and its fingerprint in DATA/{STATE_FILE})"
                )));
            }
        };
        let mut options = ClientOptions::new(server).trust(trust);
        options.key = set(&self.key);
        options.tenant = set(&self.tenant);
        options.client = concat!("pelton-cli/", env!("CARGO_PKG_VERSION")).into();
        Ok(options)
    }

    /// Connects.
    pub async fn connect(&self, config: &Config) -> Result<Client, Failure> {
        Ok(Client::connect(self.options(config)?).await?)
    }

    /// Connects, asks one thing, and ends the connection.
    pub async fn ask(
        &self,
        config: &Config,
        operation: Operation,
        body: &Value,
    ) -> Result<Value, Failure> {
        let client = self.connect(config).await?;
        let answer = client.query(operation, &body.to_string()).await;
        client.close().await;
        read_answer(&answer?)
    }
}

/// The JSON of a server's answer.
pub fn read_answer(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text)
        .map_err(|error| Failure::new(Exit::Failure, format!("the server's answer: {error}")))
}

fn with_port(server: String) -> String {
    let host_end = server.rfind(']').map_or(0, |end| end + 1);
    if server[host_end..].contains(':') {
        return server;
    }
    format!("{server}:7420")
}

/// Reads an ID of the command line.
pub fn parse_id(text: &str) -> Result<TaskName, String> {
    if let Some(name) = TaskName::parse(text) {
        return Ok(name);
    }
    let hex = text.strip_prefix('t').unwrap_or(text);
    let looks_generated = hex.len() > 16 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    Err(if looks_generated && RequestId::parse(text).is_none() {
        "a request id is `t` and 32 lower-case hex digits".to_owned()
    } else {
        "a task is named by its request id, FUNCTION/TASK_ID, or FUNCTION/KEY/TASK_ID".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_of_three_forms() {
        let id = format!("t{}", "0".repeat(32));
        assert!(matches!(parse_id(&id), Ok(TaskName::Request(_))));
        assert!(matches!(
            parse_id("digest/order-42"),
            Ok(TaskName::Given { key: None, .. })
        ));
        assert!(matches!(
            parse_id("digest/customer-7/order-42"),
            Ok(TaskName::Given { key: Some(_), .. })
        ));
        assert!(parse_id(&id[..20]).unwrap_err().contains("32"));
        assert!(parse_id("order-42").unwrap_err().contains("FUNCTION/"));
        assert!(parse_id("digest/4 2").is_err());
    }

    #[test]
    fn a_server_without_a_port_has_the_usual_one() {
        assert_eq!(
            with_port("pelton.example.com".into()),
            "pelton.example.com:7420"
        );
        assert_eq!(with_port("[::1]".into()), "[::1]:7420");
        assert_eq!(with_port("[::1]:9".into()), "[::1]:9");
        assert_eq!(with_port("127.0.0.1:9".into()), "127.0.0.1:9");
    }

    #[test]
    fn the_server_of_the_data_directory_is_found_and_flags_go_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::from_layers(None, std::iter::empty(), Default::default()).unwrap();
        let mut args = ConnectArgs {
            data: Some(folder.path().to_owned()),
            ..ConnectArgs::default()
        };
        assert_eq!(args.options(&config).unwrap_err().exit, Exit::Unreachable);
        let state = format!(
            r#"{{"address":"127.0.0.1:7","fingerprint":"{}","pid":1}}"#,
            "ab".repeat(32)
        );
        fs::write(folder.path().join(STATE_FILE), state).unwrap();
        let options = args.options(&config).unwrap();
        assert_eq!(options.server, "127.0.0.1:7");
        assert_eq!(options.trust, Trust::Fingerprint([0xab; 32]));
        args.server = Some("127.0.0.1:8".into());
        assert_eq!(args.options(&config).unwrap_err().exit, Exit::Usage);
        args.ca = Some("ca.pem".into());
        let options = args.options(&config).unwrap();
        assert_eq!(options.server, "127.0.0.1:8");
        assert_eq!(options.trust, Trust::CaFile("ca.pem".into()));
    }
}
