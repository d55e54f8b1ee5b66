//! Which outside package belongs where. A runtime or a ring that shows up in a second place brings its threads, its
//! memory and its bugs with it.

use super::{Violation, tree::Tree};

pub const RULE: &str = "placement";

/// A package that has a home, and the crates that are it. A crate in `optional` may have it behind a feature only.
struct Home {
    package: &'static str,
    crates: &'static [&'static str],
    optional: &'static [&'static str],
}

const HOMES: [Home; 12] = [
    home("glommio", &["pelton-engine"], &["pelton-storage"]),
    home("redb", &["pelton-history"], &[]),
    home("io-uring", &[], &["pelton-storage"]),
    home("crossbeam", &["pelton-engine"], &[]),
    home("quinn", &["pelton-net", "pelton-client"], &[]),
    home("quinn-proto", &["pelton-net", "pelton-client"], &[]),
    home("rkyv", &["pelton-core", "pelton-storage"], &[]),
    home("libfuzzer-sys", &[], &["pelton-fuzz"]),
    home("loom", &["pelton-model"], &[]),
    home("fuser", &["pelton-tests"], &[]),
    home("axum", &["pelton-gateway"], &[]),
    home(
        "hdrhistogram",
        &["pelton-engine", "pelton-bench", "pelton-server"],
        &[],
    ),
];

/// What must build and run without tokio, in its tests too.
const NO_TOKIO: [&str; 6] = [
    "pelton-core",
    "pelton-storage",
    "pelton-history",
    "pelton-engine",
    "pelton-sim",
    "pelton-ffi",
];

pub fn check(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for member in tree.members() {
        let name = member.package.as_str();
        for dependency in &member.dependencies {
            let package = dependency.package.as_str();
            let mut refuse =
                |what| found.push(Violation::new(RULE, member.path, dependency.line, what));
            if let Some(home) = HOMES.iter().find(|home| home.holds(package)) {
                let optional = home.optional.contains(&name);
                if optional && !dependency.optional {
                    refuse(format!(
                        "`{name}` has `{package}` as an optional dependency only"
                    ));
                } else if !optional && !home.crates.contains(&name) {
                    let homes = [home.crates, home.optional].concat().join("`, `");
                    refuse(format!("`{package}` belongs in `{homes}`, not in `{name}`"));
                }
            }
            if package == "tokio" && NO_TOKIO.contains(&name) {
                refuse(format!("`{name}` must do without tokio"));
            }
            if package == "mimalloc" && !member.has_binary {
                refuse("only a binary chooses the allocator".into());
            }
        }
    }
    found
}

const fn home(
    package: &'static str,
    crates: &'static [&'static str],
    optional: &'static [&'static str],
) -> Home {
    Home {
        package,
        crates,
        optional,
    }
}

impl Home {
    /// The parts of crossbeam are packages of their own.
    fn holds(&self, package: &str) -> bool {
        package == self.package || self.package == "crossbeam" && package.starts_with("crossbeam-")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn a_package_out_of_its_place_is_named() {
        fires(
            check,
            &[
                (
                    "Cargo.toml",
                    "[workspace]\nmembers = [\"core\", \"storage\", \"server\", \"engine\"]\n",
                ),
                (
                    "core/Cargo.toml",
                    "[package]\nname = \"pelton-core\"\n[dependencies]\nrkyv.workspace = true\nquinn.workspace = true\ncrossbeam-queue.workspace = true\n[dev-dependencies]\ntokio.workspace = true\nmimalloc.workspace = true\n",
                ),
                (
                    "storage/Cargo.toml",
                    "[package]\nname = \"pelton-storage\"\n[dependencies]\nglommio = { workspace = true, optional = true }\nio-uring.workspace = true\n",
                ),
                (
                    "server/Cargo.toml",
                    "[package]\nname = \"pelton-server\"\n[dependencies]\nmimalloc.workspace = true\ntokio.workspace = true\n[[bin]]\nname = \"pelton\"\n",
                ),
                (
                    "engine/Cargo.toml",
                    "[package]\nname = \"pelton-engine\"\n[dependencies]\nglommio.workspace = true\ncrossbeam.workspace = true\n",
                ),
            ],
            expect![[r#"
                core/Cargo.toml:6: placement: `crossbeam-queue` belongs in `pelton-engine`, not in `pelton-core`
                core/Cargo.toml:5: placement: `quinn` belongs in `pelton-net`, `pelton-client`, not in `pelton-core`
                core/Cargo.toml:9: placement: only a binary chooses the allocator
                core/Cargo.toml:8: placement: `pelton-core` must do without tokio
                storage/Cargo.toml:5: placement: `pelton-storage` has `io-uring` as an optional dependency only
            "#]],
        );
    }
}
