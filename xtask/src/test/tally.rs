//! Reads what `cargo test` writes: counts tests over all test binaries and keeps what a failing one had to say.

use std::mem;

/// Lines in, counts out. A binary that ends without a result has crashed and counts as one failure.
#[derive(Default)]
pub struct Tally {
    passed: u64,
    failed: u64,
    /// The binary that runs, until its result is read; empty before the first one.
    binary: String,
    lines: Vec<String>,
    /// What failing binaries and cargo had to say.
    shown: String,
}

impl Tally {
    /// Takes one line, and answers with a line to show when a binary has run tests.
    pub fn on_line(&mut self, line: &str) -> Option<String> {
        if let Some(binary) = begins_binary(line) {
            self.end_binary();
            self.binary = binary;
            return None;
        }
        if let Some((passed, failed)) = result(line)
            && !self.binary.is_empty()
        {
            let binary = mem::take(&mut self.binary);
            self.passed += passed;
            self.failed += failed;
            if failed > 0 {
                let from = self.lines.iter().position(|line| line == "failures:");
                let from = from.unwrap_or(0);
                self.show(&binary, from);
            }
            self.lines.clear();
            return (passed + failed > 0)
                .then(|| format!("{binary}: {passed} passed, {failed} failed"));
        }
        if !is_noise(line) {
            self.lines.push(line.to_owned());
        }
        line.ends_with("has been running for over 60 seconds")
            .then(|| line.to_owned())
    }

    /// Passed, failed and what to show, once cargo has ended. Cargo's own failure counts where no test tells it.
    pub fn finish(mut self, succeeded: bool) -> (u64, u64, String) {
        self.end_binary();
        if !succeeded {
            self.failed = self.failed.max(1);
            self.lines.retain(|line| !line.is_empty());
            if !self.lines.is_empty() {
                self.show("cargo test", 0);
            }
        }
        (self.passed, self.failed, self.shown)
    }

    fn end_binary(&mut self) {
        let binary = mem::take(&mut self.binary);
        if !binary.is_empty() {
            self.failed += 1;
            self.show(&format!("{binary} ended without a result"), 0);
        }
    }

    fn show(&mut self, title: &str, from: usize) {
        self.shown += &format!("---- {title}\n");
        for line in self.lines.drain(..).skip(from) {
            self.shown += &line;
            self.shown.push('\n');
        }
    }
}

/// What cargo and a passing test write in any run.
pub fn is_noise(line: &str) -> bool {
    const CARGO: [&str; 11] = [
        "Compiling",
        "Checking",
        "Downloading",
        "Downloaded",
        "Finished",
        "Fresh",
        "Blocking",
        "Locking",
        "Updating",
        "Running",
        "Building",
    ];
    let cargo = line.starts_with(' ')
        && line
            .split_whitespace()
            .next()
            .is_some_and(|word| CARGO.contains(&word));
    cargo || line.starts_with("test ") && line.ends_with(" ... ok")
}

/// `     Running tests/a.rs (target/release/deps/a-0123)` or `   Doc-tests a`, as cargo indents them.
fn begins_binary(line: &str) -> Option<String> {
    if let Some(package) = line.strip_prefix("   Doc-tests ") {
        return Some(format!("documentation of {package}"));
    }
    let (target, program) = line.strip_prefix("     Running ")?.split_once(" (")?;
    let program = program.strip_suffix(')')?.rsplit('/').next()?;
    let (name, _) = program.rsplit_once('-')?;
    Some(match target.strip_prefix("unittests ") {
        Some(file) => format!("{name}, {file}"),
        None => target.to_owned(),
    })
}

/// Passed and failed of `test result: ok. 3 passed; 0 failed; ...`.
fn result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = counts.split("; ");
    let passed = counts.next()?.strip_suffix(" passed")?.parse().ok()?;
    let failed = counts.next()?.strip_suffix(" failed")?.parse().ok()?;
    Some((passed, failed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(output: &str, succeeded: bool, expected: Expect) {
        let mut tally = Tally::default();
        let mut seen = String::new();
        for line in output.lines() {
            if let Some(step) = tally.on_line(line) {
                seen += &format!("> {step}\n");
            }
        }
        let (passed, failed, shown) = tally.finish(succeeded);
        expected.assert_eq(&format!("{seen}{passed} passed, {failed} failed\n{shown}"));
    }

    const GOOD: &str = "   Compiling a v0.1.0 (/a)
    Finished `release` profile [optimized] target(s) in 0.02s
     Running unittests src/lib.rs (target/release/deps/pelton_a-0f)

running 2 tests
test x ... ok
test y ... ok

test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

     Running tests/b.rs (target/release/deps/b-0f)

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn passing_tests_are_counted_and_not_shown() {
        check(
            GOOD,
            true,
            expect![[r#"
            > pelton_a, src/lib.rs: 2 passed, 0 failed
            2 passed, 0 failed
        "#]],
        );
    }

    #[test]
    fn a_failing_test_is_shown_without_its_passing_neighbours() {
        let bad = "     Running tests/c.rs (target/release/deps/c-0f)

running 2 tests
test fine ... ok
test broken ... FAILED

failures:

---- broken stdout ----
left is not right

failures:
    broken

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: 1 target failed:
    `-p a --test c`
";
        check(
            &format!("{GOOD}{bad}"),
            false,
            expect![[r#"
                > pelton_a, src/lib.rs: 2 passed, 0 failed
                > tests/c.rs: 1 passed, 1 failed
                3 passed, 1 failed
                ---- tests/c.rs
                failures:

                ---- broken stdout ----
                left is not right

                failures:
                    broken

                ---- cargo test
                error: 1 target failed:
                    `-p a --test c`
            "#]],
        );
    }

    #[test]
    fn a_binary_that_ends_without_a_result_has_failed() {
        let crash = "     Running tests/c.rs (target/release/deps/c-0f)

running 1 test
thread 'main' panicked at a.rs:1
error: test failed, to rerun pass `-p a --test c`
   Doc-tests pelton_a

running 1 test
test a.rs - (line 1) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        check(
            crash,
            false,
            expect![[r#"
                > documentation of pelton_a: 1 passed, 0 failed
                1 passed, 1 failed
                ---- tests/c.rs ended without a result

                running 1 test
                thread 'main' panicked at a.rs:1
                error: test failed, to rerun pass `-p a --test c`
            "#]],
        );
    }

    #[test]
    fn code_that_does_not_compile_is_one_failure() {
        let output = "   Compiling a v0.1.0 (/a)\nerror[E0425]: cannot find `x`\n --> a.rs:1:1\n";
        check(
            output,
            false,
            expect![[r#"
            0 passed, 1 failed
            ---- cargo test
            error[E0425]: cannot find `x`
             --> a.rs:1:1
        "#]],
        );
    }
}
