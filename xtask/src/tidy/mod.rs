//! `cargo xtask tidy`: the rules of the house that no compiler knows. A rule is a function from the tree to what breaks
//! it; its tests break it on purpose, and one test holds every rule against the real tree.

mod edges;
mod features;
mod headers;
mod marks;
mod names;
mod no_unsafe;
mod paths;
mod placement;
mod versions;

#[cfg(test)]
mod fixture;
mod manifest;
mod source;
mod tree;

use std::{fmt, io, path::Path, process::ExitCode};

use crate::cargo;
use tree::Tree;

/// One place that breaks a rule, and what to do about it.
pub struct Violation {
    rule: &'static str,
    /// From the root, with `/`.
    path: String,
    /// Counted from 1.
    line: usize,
    what: String,
}

/// What one look at a tree gave.
pub struct Report {
    files: usize,
    violations: Vec<Violation>,
}

/// A rule's name and its check.
type Rule = (&'static str, fn(&Tree) -> Vec<Violation>);

const RULES: [Rule; 9] = [
    (edges::RULE, edges::check),
    (placement::RULE, placement::check),
    (versions::RULE, versions::check),
    (headers::RULE, headers::check),
    (names::RULE, names::check),
    (marks::RULE, marks::check),
    (paths::RULE, paths::check),
    (features::RULE, features::check),
    (no_unsafe::RULE, no_unsafe::check),
];

pub fn run() -> io::Result<ExitCode> {
    let report = check(&cargo::root())?;
    println!("{report}");
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Holds every rule against the tree below `root`. It fails only where a file cannot be read.
pub fn check(root: &Path) -> io::Result<Report> {
    let tree = Tree::read(root)?;
    let mut violations: Vec<Violation> = RULES.iter().flat_map(|(_, check)| check(&tree)).collect();
    violations.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    Ok(Report {
        files: tree.files.len(),
        violations,
    })
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }
}

impl Violation {
    fn new(rule: &'static str, path: &str, line: usize, what: impl Into<String>) -> Violation {
        Violation {
            rule,
            path: path.to_owned(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation {
            rule,
            path,
            line,
            what,
        } = self;
        write!(f, "{path}:{line}: {rule}: {what}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        let (files, violations) = (self.files, self.violations.len());
        let rules = RULES.len();
        write!(
            f,
            "tidy: {rules} rules, {files} files, {violations} violations"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_keeps_every_rule() {
        let tree = Tree::read(&cargo::root()).unwrap();
        assert!(tree.file("core/src/lib.rs").is_some() && !tree.members().is_empty());
        for (rule, check) in RULES {
            let found: Vec<String> = check(&tree).iter().map(Violation::to_string).collect();
            assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
        }
    }

    #[test]
    fn a_report_counts_what_it_saw() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/src")).unwrap();
        std::fs::create_dir(root.path().join("target")).unwrap();
        std::fs::write(root.path().join("a/src/lib.rs"), "fn a() {}\n").unwrap();
        std::fs::write(root.path().join("target/b.rs"), "fn b() {}\n").unwrap();
        std::fs::create_dir(root.path().join("docs")).unwrap();
        let rows: String = (1..=53)
            .map(|n| format!("| S{n} | x | not yet | |\n"))
            .collect();
        std::fs::write(root.path().join("docs/FEATURES.md"), rows).unwrap();
        let report = check(root.path()).unwrap();
        assert_eq!(
            report.to_string(),
            "a/src/lib.rs:1: headers: begin the file with `//!` and say what it is for\n\
             tidy: 9 rules, 2 files, 1 violations"
        );
    }
}
