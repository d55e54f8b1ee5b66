//! Nothing is left for later in the code: no mark, no missing body, no test that is not run, and no test that takes
//! any panic for the right one.

use super::{
    Violation,
    source::{find_word, line_at},
    tree::Tree,
};

pub const RULE: &str = "marks";

/// Words in comments. Code may have them as names.
const WORDS: [&str; 4] = ["TODO", "FIXME", "XXX", "HACK"];

pub fn check(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for (file, source) in tree.rust() {
        let mut refuse = |at, what| {
            found.push(Violation::new(
                RULE,
                &file.path,
                line_at(&file.text, at),
                what,
            ));
        };
        for word in WORDS {
            for at in find_word(&source.comments, word) {
                refuse(
                    at,
                    format!("do what {word} says, or write why it is right as it is"),
                );
            }
        }
        for body in ["todo", "unimplemented"] {
            for at in find_word(&source.code, body) {
                if source.code[at + body.len()..].starts_with('!') {
                    refuse(at, format!("write what `{body}!` stands for"));
                }
            }
        }
        for at in find_word(&source.code, "ignore") {
            if is_attribute(&source.code[..at]) {
                refuse(at, "let the test run, or remove it".into());
            }
        }
        for at in find_word(&source.code, "should_panic") {
            let rest = source.code[at + "should_panic".len()..].trim_start();
            let attribute = rest.split(']').next().unwrap_or(rest);
            if is_attribute(&source.code[..at]) && !attribute.contains("expected") {
                refuse(
                    at,
                    "say which panic: `#[should_panic(expected = \"...\")]`".into(),
                );
            }
        }
    }
    found
}

/// Whether an attribute's name follows: behind `#[`, or behind the condition of a `cfg_attr`.
fn is_attribute(before: &str) -> bool {
    let before = before.trim_end();
    let open = before.rsplit(['\n', ']', ';']).next().unwrap_or(before);
    before.ends_with("#[") || open.contains("#[cfg_attr(") && open.ends_with(',')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::fixture::fires;
    use expect_test::expect;

    #[test]
    fn what_is_left_for_later_is_named() {
        fires(
            check,
            &[
                (
                    "a/src/lib.rs",
                    "// TODO: later\n/* HACK */ fn a() { todo!() }\nfn b() { unimplemented!(\"x\") }\n#[ignore = \"slow\"]\n#[cfg_attr(miri, ignore)]\n#[should_panic]\nfn c() {}\n",
                ),
                (
                    "a/src/good.rs",
                    "//! Not a TODOLIST.\n#[should_panic(expected = \"x\")]\nfn a() { let ignore = f(\"TODO\", '!'); g(1, ignore) }\nconst XXX: u8 = 1;\n",
                ),
            ],
            expect![[r#"
                a/src/lib.rs:1: marks: do what TODO says, or write why it is right as it is
                a/src/lib.rs:2: marks: do what HACK says, or write why it is right as it is
                a/src/lib.rs:2: marks: write what `todo!` stands for
                a/src/lib.rs:3: marks: write what `unimplemented!` stands for
                a/src/lib.rs:4: marks: let the test run, or remove it
                a/src/lib.rs:5: marks: let the test run, or remove it
                a/src/lib.rs:6: marks: say which panic: `#[should_panic(expected = "...")]`
            "#]],
        );
    }
}
