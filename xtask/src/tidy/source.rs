//! Rust text taken apart into code and comments, so that a word in a string or in a sentence is not taken for code.

/// Both parts are as long as the file and hold blanks where the other part or a literal stands: an offset, and
/// therefore a line, means the same place in all three.
pub struct Source {
    pub code: String,
    pub comments: String,
}

impl Source {
    pub fn of(text: &str) -> Source {
        let bytes = text.as_bytes();
        let mut code = blanks(bytes);
        let mut comments = blanks(bytes);
        let mut at = 0;
        while at < bytes.len() {
            let (end, kind) = piece(bytes, at);
            match kind {
                Kind::Code => code[at..end].copy_from_slice(&bytes[at..end]),
                Kind::Comment => comments[at..end].copy_from_slice(&bytes[at..end]),
                Kind::Literal => {
                    code[at] = bytes[at];
                    code[end - 1] = bytes[end - 1];
                }
            }
            at = end;
        }
        let whole = "pieces are cut at ASCII bytes only";
        Source {
            code: String::from_utf8(code).expect(whole),
            comments: String::from_utf8(comments).expect(whole),
        }
    }
}

/// Where `word` stands as a whole word.
pub fn find_word(text: &str, word: &str) -> impl Iterator<Item = usize> {
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            !text[..at].ends_with(continues_word)
                && !text[at + word.len()..].starts_with(continues_word)
        })
}

/// The line, counted from 1, of a place in a text.
pub fn line_at(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

fn continues_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

enum Kind {
    Code,
    Comment,
    Literal,
}

fn blanks(bytes: &[u8]) -> Vec<u8> {
    let blank = |&byte: &u8| if byte == b'\n' { b'\n' } else { b' ' };
    bytes.iter().map(blank).collect()
}

/// The end and the kind of the piece that begins at `at`. An unclosed piece ends with the file.
fn piece(bytes: &[u8], at: usize) -> (usize, Kind) {
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        let length = rest.iter().position(|&b| b == b'\n');
        return (at + length.unwrap_or(rest.len()), Kind::Comment);
    }
    if rest.starts_with(b"/*") {
        return (at + block_comment(rest), Kind::Comment);
    }
    match rest[0] {
        b'"' => (at + quoted(rest, b'"'), Kind::Literal),
        b'r' if !in_word(bytes, at) => match raw_string(rest) {
            Some(length) => (at + length, Kind::Literal),
            None => (at + 1, Kind::Code),
        },
        b'\'' if is_char(rest) => (at + quoted(rest, b'\''), Kind::Literal),
        _ => (at + 1, Kind::Code),
    }
}

/// Whether an `r` here belongs to a longer word; `br` and `cr` begin raw strings too.
fn in_word(bytes: &[u8], at: usize) -> bool {
    let before = |back: usize| at.checked_sub(back).map(|i| bytes[i]);
    let word = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    match before(1) {
        Some(b'b' | b'c') => word(before(2)),
        other => word(other),
    }
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|&&b| b == b'#').count();
    let open = 1 + hashes;
    if rest.get(open) != Some(&b'"') {
        return None;
    }
    let mut close = vec![b'#'; hashes + 1];
    close[0] = b'"';
    let body = &rest[open + 1..];
    let length = body.windows(close.len()).position(|w| w == close);
    Some(length.map_or(rest.len(), |length| open + 1 + length + close.len()))
}

/// A lifetime has no closing quote behind its first letter.
fn is_char(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(&first) => {
            let width = match first {
                0..0x80 => 1,
                0x80..0xe0 => 2,
                0xe0..0xf0 => 3,
                _ => 4,
            };
            rest.get(1 + width) == Some(&b'\'')
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(text: &str, expected: Expect) {
        let source = Source::of(text);
        assert_eq!(source.code.len(), text.len());
        assert_eq!(source.comments.len(), text.len());
        expected.assert_eq(&format!(
            "{}\n{}",
            source.code.trim(),
            source.comments.trim()
        ));
    }

    #[test]
    fn code_comments_and_literals_are_told_apart() {
        check("let a = 1; // why ü", expect![["let a = 1;\n// why ü"]]);
        check(
            "a /* b /* c */ d */ e",
            expect![["a                   e\n/* b /* c */ d */"]],
        );
        check(
            r#"f("// no \" x") // yes"#,
            expect![["f(\"          \")\n// yes"]],
        );
        check(
            "br#\"// \" no\"# + r#fn",
            expect![[r#"
                br          # + r#fn
            "#]],
        );
        check(
            "'\"' '\\'' 'ü' &'a str",
            expect![["' ' '  ' '  ' &'a str\n"]],
        );
        check("for r in var\"x\" {}", expect![["for r in var\" \" {}\n"]]);
    }

    #[test]
    fn what_is_not_closed_ends_with_the_file() {
        for text in ["/* a", "\"a", "\"a\\", "r#\"a", "'\\", "'", "r", "//"] {
            assert_eq!(Source::of(text).code.len(), text.len());
        }
    }

    #[test]
    fn words_are_whole() {
        let found: Vec<usize> = find_word("unsafe unsafe_code (unsafe)", "unsafe").collect();
        assert_eq!(found, [0, 20]);
        assert_eq!(line_at("a\nb\nc", 4), 3);
    }
}
