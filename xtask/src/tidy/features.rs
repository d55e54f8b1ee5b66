//! `docs/FEATURES.md` tells the truth: every capability has its row, and every test that a row names is a test.

use super::{
    Violation,
    source::{Source, find_word},
    tree::Tree,
};

pub const RULE: &str = "features";

const DOCUMENT: &str = "docs/FEATURES.md";

/// Capabilities are numbered from S1 without a gap.
const CAPABILITIES: usize = 53;

pub fn check(tree: &Tree) -> Vec<Violation> {
    let text = tree.file(DOCUMENT).map_or("", |file| file.text.as_str());
    let mut found = Vec::new();
    let mut seen = [0; CAPABILITIES];
    for (index, line) in text.lines().enumerate() {
        let mut refuse = |what| found.push(Violation::new(RULE, DOCUMENT, index + 1, what));
        let Some((number, row)) = row(line) else {
            continue;
        };
        match number.checked_sub(1).and_then(|index| seen.get_mut(index)) {
            Some(count) => *count += 1,
            None => refuse(format!("S{number} is no capability")),
        }
        let mut tests = 0;
        for reference in row.split('`').skip(1).step_by(2) {
            let Some((path, name)) = reference.rsplit_once("::") else {
                continue;
            };
            tests += 1;
            if !is_test(tree, path, name) {
                refuse(format!("there is no test `{name}` in `{path}`"));
            }
        }
        if tests == 0 && !row.contains("not yet") {
            refuse(format!(
                "S{number} names no test: say `not yet`, or name one"
            ));
        }
    }
    for (rows, what) in [(0, "no row"), (2, "more than one row")] {
        let numbers = (1..).zip(seen).filter(|&(_, seen)| seen.min(2) == rows);
        let numbers: Vec<String> = numbers.map(|(n, _)| format!("S{n}")).collect();
        if !numbers.is_empty() {
            let what = format!(
                "give one row each to {}, which now have {what}",
                numbers.join(", ")
            );
            found.push(Violation::new(RULE, DOCUMENT, 1, what));
        }
    }
    found
}

/// The number and the rest of a table row that begins with an S-number.
fn row(line: &str) -> Option<(usize, &str)> {
    let (number, rest) = line.strip_prefix('|')?.split_once('|')?;
    let number = number.trim().strip_prefix('S')?.parse().ok()?;
    Some((number, rest))
}

fn is_test(tree: &Tree, path: &str, name: &str) -> bool {
    let Some(file) = tree.file(path) else {
        return false;
    };
    match &file.source {
        Some(source) => is_rust_test(source, name),
        None => file.text.lines().any(|line| {
            let line = line.trim_start();
            let line = line.strip_prefix("async ").unwrap_or(line);
            let rest = line
                .strip_prefix("def ")
                .and_then(|line| line.strip_prefix(name));
            rest.is_some_and(|rest| rest.starts_with('('))
        }),
    }
}

/// The function counts only with a test attribute between it and the item before: a rig's function proves nothing.
fn is_rust_test(source: &Source, name: &str) -> bool {
    find_word(&source.code, name).any(|at| {
        let Some(before) = source.code[..at].trim_end().strip_suffix("fn") else {
            return false;
        };
        let item = before.rsplit([';', '{', '}']).next().unwrap_or(before);
        find_word(item, "test").any(|at| item[..at].ends_with(['[', ':']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn a_row_that_does_not_tell_the_truth_is_named() {
        let rest: String = (6..=53)
            .map(|n| format!("| S{n} | x | not yet | |\n"))
            .collect();
        let table = format!(
            "| # | capability | state | tests |\n|---|---|---|---|\n\
             | S1 | x | done | `a/tests/b.rs::holds`, `a/c.py::test_holds` |\n\
             | S2 | x | done | `a/tests/b.rs::rig`, `a/tests/b.rs::gone`, `a/none.rs::holds` |\n\
             | S3 | x | done | |\n\
             | S5 | x | not yet | |\n\
             | S5 | x | not yet | |\n\
             | S54 | x | not yet | |\n{rest}"
        );
        fires(
            check,
            &[
                (DOCUMENT, &table),
                (
                    "a/tests/b.rs",
                    "fn rig() {}\n#[test]\n// Why.\n#[should_panic(expected = \"a;b\")]\nfn holds() { rig() }\n// #[test] fn gone() {}\n",
                ),
                ("a/c.py", "async def test_holds():\n    pass\n"),
            ],
            expect![[r#"
                docs/FEATURES.md:4: features: there is no test `rig` in `a/tests/b.rs`
                docs/FEATURES.md:4: features: there is no test `gone` in `a/tests/b.rs`
                docs/FEATURES.md:4: features: there is no test `holds` in `a/none.rs`
                docs/FEATURES.md:5: features: S3 names no test: say `not yet`, or name one
                docs/FEATURES.md:8: features: S54 is no capability
                docs/FEATURES.md:1: features: give one row each to S4, which now have no row
                docs/FEATURES.md:1: features: give one row each to S5, which now have more than one row
            "#]],
        );
    }
}
