//! Settings and where each of them comes from: defaults, then the file, then `PELTON_SECTION__KEY`, then flags.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use pelton_core::limits::{
    FINISHED_BYTES_MAX_DEFAULT, FINISHED_MAX_DEFAULT, HISTORY_BYTES_MAX_DEFAULT,
    HISTORY_DEFER_MAX_DEFAULT, HISTORY_LAG_MAX_DEFAULT, HISTORY_RETENTION_MS_DEFAULT,
    PAYLOAD_BYTES_DEFAULT, PAYLOAD_BYTES_LIMIT, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Read where no `--config` is given, if it is there.
pub const FILE_DEFAULT: &str = "pelton.toml";
/// A variable of this shape names a setting; `PELTON_SERVER` and its like, with one underscore, do not.
const ENV_PREFIX: &str = "PELTON_";

/// What one source says; what it does not say is `None`.
#[derive(Clone, Default, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layer {
    pub server: ServerLayer,
    pub limits: LimitsLayer,
    pub history: HistoryLayer,
    pub executor: ExecutorLayer,
}

/// `[server]`
#[derive(Clone, Default, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerLayer {
    pub listen: Option<SocketAddr>,
    pub data: Option<PathBuf>,
    pub shards: Option<u16>,
    pub edges: Option<usize>,
    pub log: Option<String>,
    pub segment_bytes: Option<u64>,
}

/// `[limits]`
#[derive(Clone, Default, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsLayer {
    pub payload_bytes_max: Option<usize>,
    pub in_flight_max: Option<u32>,
    pub space_bytes_min: Option<u64>,
    pub finished_max: Option<u32>,
    pub finished_bytes_max: Option<u64>,
}

/// `[history]`
#[derive(Clone, Default, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HistoryLayer {
    pub retention_s: Option<u64>,
    pub bytes_max: Option<u64>,
    pub lag_max: Option<u64>,
    pub defer_max: Option<u64>,
}

/// `[executor]`
#[derive(Clone, Default, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExecutorLayer {
    pub lease_ms: Option<u64>,
    pub heartbeat_ms: Option<u64>,
}

/// Where a value comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nobody said otherwise.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// An environment variable.
    Env(String),
    /// The command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(path) => write!(f, "{}", path.display()),
            Source::Env(name) => f.write_str(name),
            Source::Flag => f.write_str("flag"),
        }
    }
}

/// A value with its source.
#[derive(Clone, PartialEq, Debug)]
pub struct Setting<T> {
    pub value: T,
    pub source: Source,
}

/// Every setting. `None` for `edges` means that the machine decides, and for `shards` that the data directory does, or
/// the machine for a new one.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    pub listen: Setting<SocketAddr>,
    pub data: Setting<PathBuf>,
    pub shards: Setting<Option<u16>>,
    pub edges: Setting<Option<usize>>,
    pub log: Setting<String>,
    /// Counts where a data directory is made; its `MANIFEST` says it from then on.
    pub segment_bytes: Setting<u64>,
    pub payload_bytes_max: Setting<usize>,
    pub in_flight_max: Setting<u32>,
    pub space_bytes_min: Setting<u64>,
    pub finished_max: Setting<u32>,
    pub finished_bytes_max: Setting<u64>,
    pub history_retention_s: Setting<u64>,
    pub history_bytes_max: Setting<u64>,
    pub history_lag_max: Setting<u64>,
    pub history_defer_max: Setting<u64>,
    pub lease_ms: Setting<u64>,
    pub heartbeat_ms: Setting<u64>,
}

/// The settings that there are: section, key, and whether it is a number.
const KEYS: [(&str, &str, bool); 17] = [
    ("server", "listen", false),
    ("server", "data", false),
    ("server", "shards", true),
    ("server", "edges", true),
    ("server", "log", false),
    ("server", "segment_bytes", true),
    ("limits", "payload_bytes_max", true),
    ("limits", "in_flight_max", true),
    ("limits", "space_bytes_min", true),
    ("limits", "finished_max", true),
    ("limits", "finished_bytes_max", true),
    ("history", "retention_s", true),
    ("history", "bytes_max", true),
    ("history", "lag_max", true),
    ("history", "defer_max", true),
    ("executor", "lease_ms", true),
    ("executor", "heartbeat_ms", true),
];

impl Config {
    /// Reads the file and the environment. `file` must exist; the default one need not.
    pub fn load(file: Option<&Path>, flags: Layer) -> Result<Config, String> {
        let path = file.unwrap_or(Path::new(FILE_DEFAULT));
        let text = match fs::read_to_string(path) {
            Ok(text) => Some((path, text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_none() => None,
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let text = text.as_ref().map(|(path, text)| (*path, text.as_str()));
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.to_str()?.to_owned()))
        });
        Config::from_layers(text, variables, flags)
    }

    /// Puts the sources together.
    pub fn from_layers(
        file: Option<(&Path, &str)>,
        variables: impl Iterator<Item = (String, String)>,
        flags: Layer,
    ) -> Result<Config, String> {
        let (path, from_file) = match file {
            None => (Path::new(FILE_DEFAULT), Layer::default()),
            Some((path, text)) => (
                path,
                toml::from_str(text)
                    .map_err(|error| format!("{}: {}", path.display(), error.to_string().trim()))?,
            ),
        };
        let from_env = env_layer(variables)?;
        let config = Config::merge(path, &from_file, &from_env, &flags);
        config.check()?;
        Ok(config)
    }

    fn merge(path: &Path, file: &Layer, env: &Layer, flags: &Layer) -> Config {
        let pick = Pick {
            path,
            layers: [file, env, flags],
        };
        let auto_shards = pick.of("server", "shards", |l| l.server.shards.map(Some), None);
        let auto_edges = pick.of("server", "edges", |l| l.server.edges.map(Some), None);
        Config {
            listen: pick.of(
                "server",
                "listen",
                |layer| layer.server.listen,
                SocketAddr::from(([127, 0, 0, 1], 7420)),
            ),
            data: pick.of(
                "server",
                "data",
                |layer| layer.server.data.clone(),
                "pelton-data".into(),
            ),
            shards: auto_shards,
            edges: auto_edges,
            log: pick.of(
                "server",
                "log",
                |layer| layer.server.log.clone(),
                "warn".into(),
            ),
            segment_bytes: pick.of(
                "server",
                "segment_bytes",
                |layer| layer.server.segment_bytes,
                SEGMENT_BYTES_DEFAULT as u64,
            ),
            payload_bytes_max: pick.of(
                "limits",
                "payload_bytes_max",
                |layer| layer.limits.payload_bytes_max,
                PAYLOAD_BYTES_DEFAULT,
            ),
            in_flight_max: pick.of(
                "limits",
                "in_flight_max",
                |layer| layer.limits.in_flight_max,
                65_536,
            ),
            space_bytes_min: pick.of(
                "limits",
                "space_bytes_min",
                |layer| layer.limits.space_bytes_min,
                1 << 30,
            ),
            finished_max: pick.of(
                "limits",
                "finished_max",
                |layer| layer.limits.finished_max,
                FINISHED_MAX_DEFAULT,
            ),
            finished_bytes_max: pick.of(
                "limits",
                "finished_bytes_max",
                |layer| layer.limits.finished_bytes_max,
                FINISHED_BYTES_MAX_DEFAULT,
            ),
            history_retention_s: pick.of(
                "history",
                "retention_s",
                |layer| layer.history.retention_s,
                HISTORY_RETENTION_MS_DEFAULT / 1_000,
            ),
            history_bytes_max: pick.of(
                "history",
                "bytes_max",
                |layer| layer.history.bytes_max,
                HISTORY_BYTES_MAX_DEFAULT,
            ),
            history_lag_max: pick.of(
                "history",
                "lag_max",
                |layer| layer.history.lag_max,
                HISTORY_LAG_MAX_DEFAULT,
            ),
            history_defer_max: pick.of(
                "history",
                "defer_max",
                |layer| layer.history.defer_max,
                HISTORY_DEFER_MAX_DEFAULT,
            ),
            lease_ms: pick.of(
                "executor",
                "lease_ms",
                |layer| layer.executor.lease_ms,
                15_000,
            ),
            heartbeat_ms: pick.of(
                "executor",
                "heartbeat_ms",
                |layer| layer.executor.heartbeat_ms,
                5_000,
            ),
        }
    }

    fn check(&self) -> Result<(), String> {
        let refuse =
            |name: &str, source: &Source, rule: &str| Err(format!("{name} ({source}): {rule}"));
        if self.shards.value == Some(0) {
            return refuse("server.shards", &self.shards.source, "at least 1");
        }
        if self.edges.value == Some(0) {
            return refuse("server.edges", &self.edges.source, "at least 1");
        }
        let segment_bytes = self.segment_bytes.value;
        if !(SEGMENT_BYTES_MIN as u64..=SEGMENT_BYTES_MAX as u64).contains(&segment_bytes)
            || !segment_bytes.is_multiple_of(1 << 20)
        {
            return refuse(
                "server.segment_bytes",
                &self.segment_bytes.source,
                "whole mebibytes from 4194304 to 268435456",
            );
        }
        if !(1..=PAYLOAD_BYTES_LIMIT).contains(&self.payload_bytes_max.value) {
            return refuse(
                "limits.payload_bytes_max",
                &self.payload_bytes_max.source,
                "from 1 to 1048576",
            );
        }
        if self.in_flight_max.value == 0 {
            return refuse(
                "limits.in_flight_max",
                &self.in_flight_max.source,
                "at least 1",
            );
        }
        if self.heartbeat_ms.value < 100 {
            return refuse(
                "executor.heartbeat_ms",
                &self.heartbeat_ms.source,
                "at least 100",
            );
        }
        if self.lease_ms.value < 2 * self.heartbeat_ms.value {
            return refuse(
                "executor.lease_ms",
                &self.lease_ms.source,
                "at least twice executor.heartbeat_ms, or one late heartbeat costs the lease",
            );
        }
        Ok(())
    }

    /// Each setting: its name, its value, its source.
    pub fn rows(&self) -> Vec<(String, Value, Source)> {
        KEYS.iter()
            .map(|&(section, key, _)| {
                let (value, source) = match key {
                    "listen" => (json!(self.listen.value.to_string()), &self.listen.source),
                    "data" => (json!(self.data.value), &self.data.source),
                    "shards" => (auto(self.shards.value), &self.shards.source),
                    "edges" => (auto(self.edges.value), &self.edges.source),
                    "log" => (json!(self.log.value), &self.log.source),
                    "segment_bytes" => {
                        (json!(self.segment_bytes.value), &self.segment_bytes.source)
                    }
                    "payload_bytes_max" => (
                        json!(self.payload_bytes_max.value),
                        &self.payload_bytes_max.source,
                    ),
                    "in_flight_max" => {
                        (json!(self.in_flight_max.value), &self.in_flight_max.source)
                    }
                    "space_bytes_min" => (
                        json!(self.space_bytes_min.value),
                        &self.space_bytes_min.source,
                    ),
                    "finished_max" => (json!(self.finished_max.value), &self.finished_max.source),
                    "finished_bytes_max" => (
                        json!(self.finished_bytes_max.value),
                        &self.finished_bytes_max.source,
                    ),
                    "retention_s" => (
                        json!(self.history_retention_s.value),
                        &self.history_retention_s.source,
                    ),
                    "bytes_max" => (
                        json!(self.history_bytes_max.value),
                        &self.history_bytes_max.source,
                    ),
                    "lag_max" => (
                        json!(self.history_lag_max.value),
                        &self.history_lag_max.source,
                    ),
                    "defer_max" => (
                        json!(self.history_defer_max.value),
                        &self.history_defer_max.source,
                    ),
                    "lease_ms" => (json!(self.lease_ms.value), &self.lease_ms.source),
                    _ => (json!(self.heartbeat_ms.value), &self.heartbeat_ms.source),
                };
                (format!("{section}.{key}"), value, source.clone())
            })
            .collect()
    }

    /// As `config show --json` prints it.
    pub fn to_json(&self) -> Value {
        let rows = self.rows().into_iter().map(|(name, value, source)| {
            (
                name,
                json!({ "value": value, "source": source.to_string() }),
            )
        });
        Value::Object(rows.collect::<Map<_, _>>())
    }
}

fn auto<N: Serialize>(value: Option<N>) -> Value {
    value.map_or(json!("auto"), |value| json!(value))
}

/// Chooses the last layer that says something.
struct Pick<'a> {
    path: &'a Path,
    layers: [&'a Layer; 3],
}

impl Pick<'_> {
    fn of<T>(
        &self,
        section: &str,
        key: &str,
        read: impl Fn(&Layer) -> Option<T>,
        default: T,
    ) -> Setting<T> {
        for (nth, layer) in self.layers.iter().enumerate().rev() {
            if let Some(value) = read(layer) {
                let source = match nth {
                    0 => Source::File(self.path.to_owned()),
                    1 => Source::Env(variable(section, key)),
                    _ => Source::Flag,
                };
                return Setting { value, source };
            }
        }
        Setting {
            value: default,
            source: Source::Default,
        }
    }
}

fn variable(section: &str, key: &str) -> String {
    format!("{ENV_PREFIX}{section}__{key}").to_uppercase()
}

fn env_layer(variables: impl Iterator<Item = (String, String)>) -> Result<Layer, String> {
    let mut all = toml::Table::new();
    for (name, value) in variables {
        if !name.starts_with(ENV_PREFIX) || !name.contains("__") {
            continue;
        }
        let known = KEYS
            .iter()
            .find(|(section, key, _)| variable(section, key) == name);
        let Some(&(section, key, number)) = known else {
            let names: Vec<String> = KEYS.iter().map(|(s, k, _)| variable(s, k)).collect();
            return Err(format!(
                "{name} names no setting; known are {}",
                names.join(", ")
            ));
        };
        let value = match (number, value.parse()) {
            (true, Ok(number)) => toml::Value::Integer(number),
            (true, Err(_)) => return Err(format!("{name}: {value:?} is no whole number")),
            (false, _) => toml::Value::String(value),
        };
        let mut one = toml::Table::new();
        one.insert(key.to_owned(), value.clone());
        let alone = toml::Table::from_iter([(section.to_owned(), toml::Value::Table(one))]);
        let checked: Result<Layer, _> = alone.try_into();
        checked.map_err(|error| format!("{name}: {}", error.message()))?;
        let table = all
            .entry(section)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        if let toml::Value::Table(table) = table {
            table.insert(key.to_owned(), value);
        }
    }
    all.try_into().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, env: &[(&str, &str)], flags: Layer) -> Result<Config, String> {
        let variables = env.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
        Config::from_layers(Some((Path::new("p.toml"), file)), variables, flags)
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file_which_beats_defaults() {
        let file = "[server]\ndata = 'file'\nshards = 2\nedges = 2\n";
        let env = [
            ("PELTON_SERVER__SHARDS", "3"),
            ("PELTON_SERVER__EDGES", "3"),
            ("PELTON_SERVER", "127.0.0.1:9"),
        ];
        let mut flags = Layer::default();
        flags.server.edges = Some(4);
        let config = load(file, &env, flags).unwrap();
        assert_eq!(config.log.source, Source::Default);
        assert_eq!(config.data.value, Path::new("file"));
        assert_eq!(config.data.source, Source::File("p.toml".into()));
        assert_eq!(config.shards.value, Some(3));
        assert_eq!(
            config.shards.source,
            Source::Env("PELTON_SERVER__SHARDS".into())
        );
        assert_eq!(
            (config.edges.value, config.edges.source),
            (Some(4), Source::Flag)
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = load(
            "[server]\n\nlisten = '127.0.0.1:1'\nlitsen = 1\n",
            &[],
            Layer::default(),
        )
        .unwrap_err();
        assert!(
            error.contains("p.toml") && error.contains("line 4"),
            "{error}"
        );
        assert!(error.contains("litsen"), "{error}");
        let error = load("", &[("PELTON_SERVER__LITSEN", "1")], Layer::default()).unwrap_err();
        assert!(error.contains("PELTON_SERVER__LITSEN"), "{error}");
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_with_its_source() {
        let wrong = [("PELTON_LIMITS__IN_FLIGHT_MAX", "many")];
        let error = load("", &wrong, Layer::default()).unwrap_err();
        assert!(error.contains("PELTON_LIMITS__IN_FLIGHT_MAX"), "{error}");
        let wrong = [("PELTON_SERVER__LISTEN", "here")];
        let error = load("", &wrong, Layer::default()).unwrap_err();
        assert!(error.contains("PELTON_SERVER__LISTEN"), "{error}");
        let error = load("[executor]\nlease_ms = 10\n", &[], Layer::default()).unwrap_err();
        assert!(error.contains("executor.lease_ms (p.toml)"), "{error}");
    }

    #[test]
    fn every_setting_is_shown() {
        let config = load("", &[], Layer::default()).unwrap();
        let shown = config.to_json();
        assert_eq!(shown["server.listen"]["value"], "127.0.0.1:7420");
        assert_eq!(shown["server.shards"]["value"], "auto");
        assert_eq!(shown["executor.heartbeat_ms"]["value"], 5_000);
        assert_eq!(config.rows().len(), KEYS.len());
    }
}
