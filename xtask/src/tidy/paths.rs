//! A path that a document names exists. A document that points nowhere was right once, which is worse than silence.

use std::collections::BTreeSet;

use super::{Violation, tree::Tree};

pub const RULE: &str = "paths";

/// Folders of the root by name, so that a path into one that is gone is still taken for a path.
const FOLDERS: [&str; 18] = [
    "core", "storage", "engine", "net", "server", "gateway", "connect", "client", "ffi", "sim",
    "tests", "bench", "xtask", "docs", "fuzz", "model", "examples", ".ci",
];

pub fn check(tree: &Tree) -> Vec<Violation> {
    let present = tree
        .files
        .iter()
        .filter_map(|file| Some(file.path.split_once('/')?.0));
    let folders: BTreeSet<&str> = present.chain(FOLDERS).collect();
    let mut found = Vec::new();
    for document in tree.documents() {
        let mut fenced = false;
        for (index, line) in document.text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
            }
            if fenced {
                continue;
            }
            for token in line.split('`').skip(1).step_by(2) {
                let Some((folder, _)) = token.split_once('/') else {
                    continue;
                };
                if !folders.contains(folder) || token.contains(char::is_whitespace) {
                    continue;
                }
                let path = named_path(token);
                if !tree.root.join(path).exists() {
                    let what = format!("`{path}` does not exist; name the path as it is now");
                    found.push(Violation::new(RULE, &document.path, index + 1, what));
                }
            }
        }
    }
    found
}

/// The path without `::name` or `:line`, and only down to the first part that is a pattern.
fn named_path(token: &str) -> &str {
    let path = token.split(':').next().unwrap_or(token);
    match path.find(['*', '<', '{']) {
        Some(pattern) => path[..pattern]
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn a_path_that_leads_nowhere_is_named() {
        fires(
            check,
            &[
                (
                    "README.md",
                    "`core/` and `core/src/lib.rs:12`, `core/src/lib.rs::name`, `core/src/*.rs`\n`gateway/src/lib.rs`\n```\n`core/none`\n```\n`a/b` `n/a` `core/src/x y`\n",
                ),
                (
                    "docs/deep/a.md",
                    "text\n\nsee `core/src/old.rs` or `docs/<name>.md` or `core/old/*`\n",
                ),
                ("core/README.md", "`core/none.rs`"),
                ("core/src/lib.rs", ""),
            ],
            expect![[r#"
                README.md:2: paths: `gateway/src/lib.rs` does not exist; name the path as it is now
                docs/deep/a.md:3: paths: `core/src/old.rs` does not exist; name the path as it is now
                docs/deep/a.md:3: paths: `core/old` does not exist; name the path as it is now
            "#]],
        );
    }
}
