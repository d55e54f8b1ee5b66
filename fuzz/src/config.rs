//! Settings: the server's file and environment, times as the command line reads them, and what may be asked of tenants
//! and functions. The first byte chooses which.

use std::{collections::BTreeSet, path::Path};

use pelton_core::config::{Directory, FunctionConfig, OnFailure, TenantConfig, Wish};

use crate::{
    Input,
    server_config::{Config, Layer},
    server_time::{parse_duration, parse_moment, show_duration, show_ms},
};

const VARIABLES: [&str; 10] = [
    "PELTON_SERVER__LISTEN",
    "PELTON_SERVER__DATA",
    "PELTON_SERVER__SHARDS",
    "PELTON_SERVER__EDGES",
    "PELTON_SERVER__LOG",
    "PELTON_LIMITS__PAYLOAD_BYTES_MAX",
    "PELTON_LIMITS__IN_FLIGHT_MAX",
    "PELTON_LIMITS__SPACE_BYTES_MIN",
    "PELTON_EXECUTOR__LEASE_MS",
    "PELTON_EXECUTOR__HEARTBEAT_MS",
];
/// Wishes in one input.
const WISHES_MAX: usize = 32;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => settings(Some(&String::from_utf8_lossy(input.0)), &[]),
        1 => {
            let text = String::from_utf8_lossy(input.0);
            let variables: Vec<(String, String)> = text
                .lines()
                .map(|line| {
                    let (name, value) = line.split_once('=').unwrap_or((line, ""));
                    // A digit stands for one of the names that there are.
                    let known = name.parse().ok().and_then(|at: usize| VARIABLES.get(at));
                    (known.unwrap_or(&name).to_string(), value.to_owned())
                })
                .collect();
            settings(None, &variables);
        }
        2 => times(&String::from_utf8_lossy(input.0)),
        _ => wishes(input),
    }
}

/// Settings that are taken keep their rules, and all of them can be shown.
fn settings(file: Option<&str>, variables: &[(String, String)]) {
    let file = file.map(|text| (Path::new("pelton.toml"), text));
    let variables = variables.iter().cloned();
    match Config::from_layers(file, variables, Layer::default()) {
        Err(error) => assert!(!error.is_empty()),
        Ok(config) => {
            assert!(config.shards.value != Some(0) && config.edges.value != Some(0));
            assert!(config.lease_ms.value / 2 >= config.heartbeat_ms.value);
            let shown = config.to_json().as_object().map(|all| all.len());
            assert_eq!(shown, Some(config.rows().len()));
            for (name, _, source) in config.rows() {
                assert!(name.contains('.') && !source.to_string().is_empty());
            }
        }
    }
}

/// A moment that is read is shown as the same moment, which is read again.
fn times(text: &str) {
    if let Ok(duration) = parse_duration(text) {
        assert!(!show_duration(duration.as_millis() as u64).is_empty());
    }
    if let Ok(moment) = parse_moment(text) {
        let since = moment.duration_since(std::time::UNIX_EPOCH);
        let ms = since.expect("moments are not before 1970").as_millis() as u64;
        assert_eq!(parse_moment(&show_ms(ms)), Ok(moment));
    }
}

/// Wishes become changes or are refused; the changes fulfil the wish, and the directory can be built again from its
/// dump.
fn wishes(mut input: Input<'_>) {
    let mut directory = Directory::default();
    for _ in 0..WISHES_MAX {
        if input.0.is_empty() {
            break;
        }
        let wish = wish(&mut input);
        let Ok(changes) = directory.plan(&wish) else {
            continue;
        };
        for change in &changes {
            directory.apply(directory.version() + 1, change);
            let once = directory.clone();
            directory.apply(directory.version(), change);
            assert_eq!(directory, once, "a change that comes twice changes nothing");
        }
        match directory.plan(&wish) {
            Ok(changes) => assert!(
                changes.is_empty(),
                "a wish that is fulfilled asks for nothing"
            ),
            Err(_) => assert!(matches!(wish, Wish::RemoveFunction { .. })),
        }
    }
    let mut again = Directory::default();
    for change in directory.dump() {
        again.apply(directory.version(), &change);
    }
    assert_eq!(again, directory);
    let names: BTreeSet<&str> = directory.tenants().iter().map(|t| &*t.name).collect();
    assert_eq!(names.len(), directory.tenants().len());
}

fn wish(input: &mut Input<'_>) -> Wish {
    let kind = input.byte() % 5;
    let (tenant, name) = (name(input), name(input));
    match kind {
        0 => Wish::SetTenant {
            name,
            config: TenantConfig {
                weight: input.u16(),
                waiting_max: input.u64(),
            },
        },
        1 => Wish::SetFunction {
            tenant,
            name,
            config: FunctionConfig {
                concurrency: input.u32(),
                retries: input.byte(),
                backoff_ms_min: input.u32(),
                backoff_ms_max: input.u32(),
                max_age_s: input.u32(),
                timeout_ms: input.u32(),
                on_failure: if input.byte().is_multiple_of(2) {
                    OnFailure::Continue
                } else {
                    OnFailure::Hold
                },
                paused: input.byte() % 2 == 1,
            },
        },
        2 => Wish::EnsureFunction { tenant, name },
        3 => Wish::EnsureTenant { name },
        _ => Wish::RemoveFunction { tenant, name },
    }
}

/// One of a few names, so that they meet again, or any text.
fn name(input: &mut Input<'_>) -> String {
    let choice = input.byte();
    match choice {
        0..=127 => ["a", "b", "_c", "d-9"][usize::from(choice % 4)].to_owned(),
        _ => String::from_utf8_lossy(input.take(usize::from(choice - 128))).into_owned(),
    }
}
