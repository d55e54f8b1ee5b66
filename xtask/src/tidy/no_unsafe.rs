//! `unsafe` stands only where the device, the shared queues and the sockets need it, and the core forbids it.

use super::{
    Violation,
    source::{find_word, line_at},
    tree::Tree,
};

pub const RULE: &str = "unsafe";

/// Where code may be unsafe. A new entry is a decision: say in its commit what it is for and what covers it.
const ALLOWED: [&str; 6] = [
    "storage/src/",
    "engine/src/",
    "engine/tests/",
    "net/src/",
    "core/tests/growth.rs",
    "xtask/src/memcheck/wrong.rs",
];

/// The crate that forbids it itself, and how.
const CORE: (&str, &str) = ("core/src/lib.rs", "#![forbid(unsafe_code)]");

pub fn check(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for (file, source) in tree.rust() {
        let allowed = ALLOWED.iter().any(|folder| file.path.starts_with(folder));
        if let Some(at) = find_word(&source.code, "unsafe").next()
            && !allowed
        {
            let what = format!("do without `unsafe`, or move it to {}", ALLOWED.join(", "));
            found.push(Violation::new(
                RULE,
                &file.path,
                line_at(&source.code, at),
                what,
            ));
        }
        if file.path == CORE.0 && !source.code.contains(CORE.1) {
            let what = format!("write `{}`", CORE.1);
            found.push(Violation::new(RULE, &file.path, 1, what));
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
    fn unsafe_code_out_of_its_place_is_named() {
        fires(
            check,
            &[
                ("core/src/lib.rs", "//! Core.\n// #![forbid(unsafe_code)]\n"),
                (
                    "server/src/main.rs",
                    "//! unsafe\nconst A: &str = \"unsafe\";\nunsafe fn f() {}\nunsafe fn g() {}\n",
                ),
                ("engine/src/bell.rs", "unsafe fn f() {}\n"),
            ],
            expect![[r#"
                core/src/lib.rs:1: unsafe: write `#![forbid(unsafe_code)]`
                server/src/main.rs:3: unsafe: do without `unsafe`, or move it to storage/src/, engine/src/, engine/tests/, net/src/, core/tests/growth.rs, xtask/src/memcheck/wrong.rs
            "#]],
        );
    }
}
