//! Who may import whom among the workspace's own crates. The direction of the edges is what keeps the core free of I/O
//! and an embedding program free of the network.

use super::{Violation, manifest::Dependency, tree::Tree};

pub const RULE: &str = "edges";

/// Each crate and what it may import. `pelton-tests` looks at the whole and may import every crate.
const EDGES: [(&str, &[&str]); 15] = [
    ("pelton-core", &[]),
    ("pelton-storage", &["pelton-core"]),
    ("pelton-history", &["pelton-core"]),
    (
        "pelton-engine",
        &["pelton-core", "pelton-storage", "pelton-history"],
    ),
    ("pelton-net", &["pelton-core"]),
    ("pelton-client", &["pelton-core", "pelton-net"]),
    ("pelton-gateway", &["pelton-core", "pelton-engine"]),
    ("pelton-connect", &["pelton-core", "pelton-engine"]),
    (
        "pelton-server",
        &[
            "pelton-core",
            "pelton-storage",
            "pelton-engine",
            "pelton-net",
            "pelton-client",
            "pelton-gateway",
            "pelton-connect",
            "pelton-bench",
        ],
    ),
    ("pelton-sim", &["pelton-core", "pelton-storage"]),
    (
        "pelton-bench",
        &["pelton-core", "pelton-net", "pelton-client"],
    ),
    ("pelton-ffi", &["pelton-engine", "pelton-client"]),
    (
        "pelton-fuzz",
        &["pelton-core", "pelton-net", "pelton-storage"],
    ),
    ("pelton-model", &["pelton-core"]),
    ("xtask", &[]),
];

/// Imports all.
const WHOLE: &str = "pelton-tests";

/// The feature of `pelton-storage` that brings the real device with it.
const DEVICE: &str = "device";

pub fn check(tree: &Tree) -> Vec<Violation> {
    let members = tree.members();
    let mut found = Vec::new();
    for member in &members {
        let name = member.package.as_str();
        if name == WHOLE {
            continue;
        }
        let Some((_, allowed)) = EDGES.iter().find(|(package, _)| *package == name) else {
            let what = format!("say what `{name}` may import in the table of the rule `{RULE}`");
            found.push(Violation::new(RULE, member.path, 1, what));
            continue;
        };
        let mut refuse = |line, what| found.push(Violation::new(RULE, member.path, line, what));
        for Dependency {
            package,
            line,
            features,
            optional,
            ..
        } in &member.dependencies
        {
            let inside = members.iter().any(|other| other.package == *package);
            if inside && !allowed.contains(&package.as_str()) {
                refuse(*line, format!("`{name}` must not import `{package}`"));
            }
            if name == "pelton-sim" && features.iter().any(|f| f == DEVICE) {
                refuse(
                    *line,
                    "the simulation takes `pelton-storage` without `device`".into(),
                );
            }
            if name == "pelton-ffi" && package == "pelton-client" && !optional {
                refuse(
                    *line,
                    "the C library takes `pelton-client` behind a feature only".into(),
                );
            }
        }
        for (feature, line, on) in &member.features {
            let device = match name {
                "pelton-sim" => on
                    .iter()
                    .any(|f| f == "pelton-storage/device" || f == "pelton-storage?/device"),
                "pelton-storage" => feature == "default" && on.iter().any(|f| f == DEVICE),
                _ => false,
            };
            if device {
                refuse(
                    *line,
                    format!("the feature `{feature}` must not turn `device` on"),
                );
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    const ROOT: &str = r#"
        [workspace]
        members = ["core", "storage", "net", "sim", "ffi", "new", "tests"]
        [workspace.dependencies]
        base = { path = "core", package = "pelton-core" }
    "#;

    #[test]
    fn an_edge_against_the_direction_is_named() {
        fires(
            check,
            &[
                ("Cargo.toml", ROOT),
                (
                    "core/Cargo.toml",
                    "[package]\nname = \"pelton-core\"\n[dev-dependencies]\npelton-net.workspace = true\nbytes = \"1\"\n",
                ),
                (
                    "storage/Cargo.toml",
                    "[package]\nname = \"pelton-storage\"\n[dependencies]\nbase.workspace = true\n[features]\ndefault = [\"device\"]\n[target.'cfg(unix)'.dependencies]\npelton-net.workspace = true\n",
                ),
                ("net/Cargo.toml", "[package]\nname = \"pelton-net\"\n"),
                (
                    "sim/Cargo.toml",
                    "[package]\nname = \"pelton-sim\"\n[dependencies.pelton-storage]\nworkspace = true\nfeatures = [\"device\"]\n[features]\nreal = [\"pelton-storage/device\"]\n",
                ),
                (
                    "ffi/Cargo.toml",
                    "[package]\nname = \"pelton-ffi\"\n[dependencies]\nbase.workspace = true\npelton-client.workspace = true\n",
                ),
                ("new/Cargo.toml", "[package]\nname = \"pelton-new\"\n"),
                (
                    "tests/Cargo.toml",
                    "[package]\nname = \"pelton-tests\"\n[dependencies]\npelton-sim.workspace = true\n",
                ),
            ],
            expect![[r#"
                core/Cargo.toml:4: edges: `pelton-core` must not import `pelton-net`
                storage/Cargo.toml:8: edges: `pelton-storage` must not import `pelton-net`
                storage/Cargo.toml:6: edges: the feature `default` must not turn `device` on
                sim/Cargo.toml:3: edges: the simulation takes `pelton-storage` without `device`
                sim/Cargo.toml:7: edges: the feature `real` must not turn `device` on
                ffi/Cargo.toml:4: edges: `pelton-ffi` must not import `pelton-core`
                ffi/Cargo.toml:5: edges: the C library takes `pelton-client` behind a feature only
                new/Cargo.toml:1: edges: say what `pelton-new` may import in the table of the rule `edges`
            "#]],
        );
    }
}
