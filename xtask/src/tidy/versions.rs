//! Versions and lints stand once, in the root manifest. A second version of a package is a second build of it, and a
//! crate with lints of its own is a crate with none.

use super::{Violation, tree::Tree};

pub const RULE: &str = "versions";

pub fn check(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for member in tree.members() {
        let mut refuse = |line, what| found.push(Violation::new(RULE, member.path, line, what));
        if !member.inherits_version {
            refuse(
                1,
                "write `version.workspace = true` in `[package]`".to_owned(),
            );
        }
        if !member.inherits_lints {
            refuse(
                1,
                "write `[lints]` with `workspace = true` and nothing else".to_owned(),
            );
        }
        for dependency in &member.dependencies {
            if !dependency.from_workspace || dependency.has_version {
                let package = &dependency.package;
                let what = format!(
                    "take `{package}` with `workspace = true`; its version stands in the root manifest"
                );
                refuse(dependency.line, what);
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

    #[test]
    fn a_version_or_a_lint_outside_the_root_is_named() {
        fires(
            check,
            &[
                ("Cargo.toml", "[workspace]\nmembers = [\"a\", \"b\"]\n"),
                (
                    "a/Cargo.toml",
                    "[package]\nversion.workspace = true\n[lints]\nworkspace = true\n[dependencies]\ngood.workspace = true\nshort = \"1\"\n[target.'cfg(unix)'.dev-dependencies]\nlong = { version = \"1\" }\n[build-dependencies]\nlocal = { path = \"../b\" }\n",
                ),
                (
                    "b/Cargo.toml",
                    "[package]\nversion = \"1.0.0\"\n[lints.clippy]\nall = \"warn\"\n",
                ),
            ],
            expect![[r#"
                a/Cargo.toml:7: versions: take `short` with `workspace = true`; its version stands in the root manifest
                a/Cargo.toml:11: versions: take `local` with `workspace = true`; its version stands in the root manifest
                a/Cargo.toml:9: versions: take `long` with `workspace = true`; its version stands in the root manifest
                b/Cargo.toml:1: versions: write `version.workspace = true` in `[package]`
                b/Cargo.toml:1: versions: write `[lints]` with `workspace = true` and nothing else
            "#]],
        );
    }
}
