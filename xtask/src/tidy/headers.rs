//! Every Rust file says first what it is for.

use super::{Violation, tree::Tree};

pub const RULE: &str = "headers";

pub fn check(tree: &Tree) -> Vec<Violation> {
    let what = "begin the file with `//!` and say what it is for";
    tree.rust()
        .filter(|(file, _)| !file.text.starts_with("//!"))
        .map(|(file, _)| Violation::new(RULE, &file.path, 1, what))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn a_file_without_a_purpose_is_named() {
        fires(
            check,
            &[
                ("a/src/lib.rs", "//! Says it.\n"),
                (
                    "a/src/b.rs",
                    "/// Says it of the next item only.\nfn b() {}\n",
                ),
                ("a/tests/rig/mod.rs", ""),
                ("a/fixtures/c.rs", "fn c() {}\n"),
            ],
            expect![[r#"
                a/src/b.rs:1: headers: begin the file with `//!` and say what it is for
                a/tests/rig/mod.rs:1: headers: begin the file with `//!` and say what it is for
            "#]],
        );
    }
}
