//! Names that say nothing of what is inside draw in everything that has no place.

use std::collections::BTreeSet;

use super::{
    Violation,
    source::{find_word, line_at},
    tree::Tree,
};

pub const RULE: &str = "names";

const BANNED: [&str; 9] = [
    "util", "utils", "helper", "helpers", "common", "misc", "impls", "types", "manager",
];

const WHAT: &str = "name it after what is inside";

pub fn check(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut folders = BTreeSet::new();
    for file in &tree.files {
        let ends = file.path.match_indices('/');
        folders.extend(ends.map(|(end, _)| &file.path[..end]));
        let name = file.path.rsplit('/').next().unwrap_or(&file.path);
        let stem = name.split('.').next().unwrap_or(name);
        let is_code = [".rs", ".py", ".sh"].iter().any(|e| name.ends_with(e));
        if is_code && is_banned(stem) {
            found.push(Violation::new(RULE, &file.path, 1, WHAT));
        }
    }
    for folder in folders {
        if folder.rsplit('/').next().is_some_and(is_banned) {
            found.push(Violation::new(RULE, folder, 1, WHAT));
        }
    }
    for (file, source) in tree.rust() {
        for at in find_word(&source.code, "mod") {
            let rest = source.code[at + "mod".len()..].trim_start();
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            let (name, behind) = rest.split_at(end.unwrap_or(rest.len()));
            // A module with a file of its own is told by that file.
            if is_banned(name) && behind.trim_start().starts_with('{') {
                let line = line_at(&source.code, at);
                found.push(Violation::new(RULE, &file.path, line, WHAT));
            }
        }
    }
    found
}

fn is_banned(name: &str) -> bool {
    BANNED.contains(&name) || name.starts_with("new_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn a_name_that_says_nothing_is_named() {
        fires(
            check,
            &[
                (
                    "a/src/lib.rs",
                    "mod utils;\nmod common { fn model() {} }\nmod task {}\n",
                ),
                ("a/src/utils.rs", ""),
                ("a/src/new_log.rs", ""),
                ("a/tests/helpers/mod.rs", ""),
                ("a/tests/helpers/rig.rs", ""),
                ("docs/types.md", ""),
            ],
            expect![[r#"
                a/src/new_log.rs:1: names: name it after what is inside
                a/src/utils.rs:1: names: name it after what is inside
                a/tests/helpers:1: names: name it after what is inside
                a/src/lib.rs:2: names: name it after what is inside
            "#]],
        );
    }
}
