//! `docs/PROTOCOL.md` against the code: its tables of numbers, and its layouts, with which every golden frame is decoded.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests stand outside the test functions"
)]

use std::collections::HashMap;

use pelton_net::Code;
use pelton_net::frame::{FrameType, HEADER_BYTES};
use pelton_net::query::Operation;
use pelton_net::submit::TaskStatus;
use serde_json::Value;

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/PROTOCOL.md");
    std::fs::read_to_string(path).unwrap()
}

/// The cells of a table's row, or `None` for a line that is none.
fn cells(line: &str) -> Option<Vec<String>> {
    let row = line.strip_prefix('|')?.strip_suffix('|')?;
    Some(row.split('|').map(|cell| cell.trim().to_owned()).collect())
}

/// The rows of the table whose heading row begins with these cells.
fn rows(document: &str, heading: &[&str]) -> Vec<Vec<String>> {
    let mut lines = document.lines().skip_while(|line| {
        cells(line).is_none_or(|cells| !cells.iter().zip(heading).all(|(a, b)| a == b))
    });
    lines.next().expect("the table is there");
    lines.next().expect("a line of dashes follows the heading");
    lines.map_while(cells).collect()
}

#[test]
fn tables_of_numbers_match_the_code() {
    let document = document();
    let mut expected: Vec<Vec<String>> = Vec::new();
    for &kind in FrameType::ALL {
        expected.push(vec![
            (kind as u8).to_string(),
            format!("{kind:?}"),
            kind.body_bytes_max().to_string(),
            kind.count_max().to_string(),
        ]);
    }
    let told: Vec<Vec<String>> = rows(&document, &["number", "type"])
        .into_iter()
        .map(|row| {
            vec![
                row[0].clone(),
                row[1].clone(),
                row[3].clone(),
                row[4].clone(),
            ]
        })
        .collect();
    assert_eq!(told, expected);

    let told: Vec<Vec<String>> = rows(&document, &["operation", "name"])
        .into_iter()
        .map(|row| row[..2].to_vec())
        .collect();
    let expected: Vec<Vec<String>> = Operation::ALL
        .iter()
        .map(|operation| vec![(*operation as u16).to_string(), format!("{operation:?}")])
        .collect();
    assert_eq!(told, expected);

    let expected: Vec<Vec<String>> = TaskStatus::ALL
        .iter()
        .map(|status| vec![(*status as u8).to_string(), status.name().to_owned()])
        .collect();
    assert_eq!(rows(&document, &["number", "status"]), expected);

    let expected: Vec<Vec<String>> = Code::ALL
        .iter()
        .map(|code| {
            let retryable = if code.retryable() { "yes" } else { "no" };
            let number = (*code as u16).to_string();
            vec![number, code.name().to_owned(), retryable.to_owned()]
        })
        .collect();
    assert_eq!(rows(&document, &["number", "code"]), expected);
}

#[test]
fn numbers_in_the_text_are_the_codes() {
    use pelton_net::limits::*;
    use pelton_net::{frame, quic, session, submit};
    let document = document();
    let transport = [
        (
            quic::transport::STREAM_RECEIVE_WINDOW_BYTES >> 20,
            "MiB in flight on a stream",
        ),
        (
            quic::transport::RECEIVE_WINDOW_BYTES >> 20,
            "MiB on a connection",
        ),
        (
            quic::transport::IDLE_MS / 1000,
            "s. A client sends a packet",
        ),
        (
            quic::transport::KEEP_ALIVE.as_secs() as u32,
            "s (a QUIC PING",
        ),
        (quic::transport::HANDSHAKE_TIMEOUT.as_secs() as u32, "s.\n"),
    ];
    for (number, text) in transport {
        assert!(
            document.contains(&format!("{number} {text}")),
            "{number} {text}"
        );
    }
    for text in [
        format!("at most {NAME_BYTES_MAX} bytes"),
        format!("bodies of at most {CONTROL_FRAME_BYTES_MAX} bytes"),
        format!("1 to {} bytes, as", session::KEY_BYTES_MAX),
        format!("names up to {} functions", submit::SUBMIT_FUNCTIONS_MAX),
        format!("| tag_count | at most {TAG_COUNT_MAX} |"),
        format!("1 to {TAG_BYTES_MAX} bytes of UTF-8"),
        format!("| content_type_len | at most {CONTENT_TYPE_BYTES_MAX} |"),
        format!("bytes[{TRACEPARENT_BYTES}]"),
        format!("at most {COST_MAX}; 0: 1"),
        format!("| max_age_s | at most {MAX_AGE_S_MAX};"),
        format!("at most {} days", DELAY_MS_MAX / 86_400_000),
        format!("| error_len | at most {ERROR_BYTES_MAX} |"),
        format!("| output_len | at most {OUTPUT_BYTES_MAX} |"),
        format!("A frame of {} leases", frame::LEASES_PER_FRAME_MAX),
    ] {
        let found = document
            .replace('\n', " ")
            .contains(&text.replace('\n', " "));
        assert!(found, "{text}");
    }
}

/// A layout: tables in their order, each with how often it is read.
type Layout = Vec<(Times, Vec<Field>)>;

#[derive(Clone, Debug)]
enum Times {
    Once,
    Count(String),
    IfBytesAreLeft,
}

#[derive(Clone, Debug)]
struct Field {
    kind: String,
    condition: Option<String>,
    name: String,
}

/// The layouts of all frames by the name of their type, as the document tells them.
fn layouts(document: &str) -> HashMap<String, Layout> {
    let mut layouts: HashMap<String, Layout> = HashMap::new();
    let mut names: Vec<String> = Vec::new();
    let mut lines = document.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with('#') {
            let title = line.trim_start_matches('#').trim();
            // A pair of types with one layout, unless the second has a section of its own.
            names = title
                .split(" and ")
                .map(|name| name.split(' ').next().unwrap().to_owned())
                .collect();
            for name in &names {
                layouts.remove(name);
            }
            continue;
        }
        let times = if line == "Body:" {
            Times::Once
        } else if line == "If bytes are left:" {
            Times::IfBytesAreLeft
        } else if let Some(rest) = line.strip_prefix("Then `") {
            Times::Count(rest.split('`').next().unwrap().to_owned())
        } else {
            continue;
        };
        assert_eq!(lines.next(), Some(""));
        assert!(lines.next().unwrap().starts_with("| at | type | field |"));
        lines.next();
        let mut fields = Vec::new();
        let mut fixed = Some(0);
        while let Some(row) = lines.peek().and_then(|line| cells(line)) {
            lines.next();
            let (kind, condition) = match row[1].split_once(" if ") {
                Some((kind, condition)) => (kind.to_owned(), Some(condition.to_owned())),
                None => (row[1].clone(), None),
            };
            match fixed {
                Some(at) => assert_eq!(row[0], at.to_string(), "{names:?} {row:?}"),
                None => assert_eq!(row[0], "-", "{names:?} {row:?}"),
            }
            fixed = match (fixed, &condition, size(&kind)) {
                (Some(at), None, Some(size)) => Some(at + size),
                _ => None,
            };
            fields.push(Field {
                kind,
                condition,
                name: row[2].clone(),
            });
        }
        for name in &names {
            let layout = layouts.entry(name.clone()).or_default();
            layout.push((times.clone(), fields.clone()));
        }
    }
    layouts
}

/// Bytes of a kind whose size does not depend on another field.
fn size(kind: &str) -> Option<usize> {
    if let Some(bits) = kind.strip_prefix('u') {
        return Some(bits.parse::<usize>().unwrap() / 8);
    }
    let length = kind.split_once('[').unwrap().1.strip_suffix(']').unwrap();
    length.parse().ok()
}

type Values = HashMap<String, u128>;

/// Reads a body with nothing but the document; answers what each table said, in the order read.
fn decode(layout: &Layout, count: u16, body: &[u8]) -> Vec<Values> {
    let mut rest = body;
    let mut all = Vec::new();
    let mut known: Values = HashMap::from([("count".to_owned(), u128::from(count))]);
    for (times, fields) in layout {
        let times = match times {
            Times::Once => 1,
            Times::Count(name) => known.get(name).copied().unwrap_or(0),
            Times::IfBytesAreLeft => u128::from(!rest.is_empty()),
        };
        for _ in 0..times {
            let mut values = Values::new();
            for field in fields {
                if let Some(condition) = &field.condition
                    && !holds(condition, &values)
                {
                    continue;
                }
                let len = size(&field.kind).unwrap_or_else(|| {
                    let length = field.kind.split_once('[').unwrap().1;
                    match length.strip_suffix(']').unwrap() {
                        "rest" => rest.len(),
                        name => values[name] as usize,
                    }
                });
                let (taken, behind) = rest.split_at(len);
                rest = behind;
                if field.kind.starts_with('u') {
                    let mut bytes = [0; 16];
                    bytes[..len].copy_from_slice(taken);
                    values.insert(field.name.clone(), u128::from_le_bytes(bytes));
                } else if field.kind.starts_with("zero") {
                    assert!(taken.iter().all(|byte| *byte == 0));
                } else if field.kind.starts_with("text") {
                    std::str::from_utf8(taken).unwrap();
                }
            }
            known.extend(values.clone());
            all.push(values);
        }
    }
    assert!(rest.is_empty(), "{} bytes are left", rest.len());
    all
}

/// `field & bits` or `field = number`.
fn holds(condition: &str, values: &Values) -> bool {
    let parts: Vec<_> = condition.split(' ').collect();
    let number: u128 = parts[2].parse().unwrap();
    match parts[1] {
        "&" => values[parts[0]] & number != 0,
        "=" => values[parts[0]] == number,
        other => panic!("{other}"),
    }
}

/// Compares what the document read with what the vectors say, where both name a field alike.
fn compare(name: &str, read: &Values, told: &Value) -> usize {
    let Some(told) = told.as_object() else {
        return 0;
    };
    let mut compared = 0;
    for (field, value) in read {
        let expected = match told.get(field) {
            Some(Value::Number(number)) => u128::from(number.as_u64().unwrap()),
            Some(Value::Bool(flag)) => u128::from(*flag),
            Some(Value::String(text)) => match field.as_str() {
                "request_id" => u128::from_str_radix(&text[1..], 16).unwrap(),
                "code" => {
                    let mut codes = Code::ALL.iter();
                    *codes.find(|code| code.name() == text).unwrap() as u128
                }
                "status" => {
                    let mut statuses = TaskStatus::ALL.iter();
                    *statuses.find(|status| status.name() == text).unwrap() as u128
                }
                _ => continue,
            },
            _ => continue,
        };
        assert_eq!(*value, expected, "{name}: {field}");
        compared += 1;
    }
    compared
}

#[test]
fn every_golden_frame_is_decoded_by_the_documents_layouts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol-vectors.json");
    let vectors: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let layouts = layouts(&document());
    let mut compared = 0;
    for frame in vectors["frames"].as_array().unwrap() {
        let name = frame["name"].as_str().unwrap();
        let hex = frame["hex"].as_str().unwrap();
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        let kind = FrameType::from_number(bytes[4]);
        let (header, body) = bytes.split_at(HEADER_BYTES);
        assert_eq!(
            u32::from_le_bytes(header[..4].try_into().unwrap()) as usize,
            body.len()
        );
        let count = u16::from_le_bytes(header[6..8].try_into().unwrap());
        let empty = Layout::new();
        let layout = layouts.get(&format!("{kind:?}")).unwrap_or(&empty);
        assert!(
            !layout.is_empty() || body.is_empty(),
            "{name} has no layout"
        );
        let read = decode(layout, count, body);
        let fields = &frame["fields"];
        let items = fields
            .as_array()
            .or_else(|| fields.get("tasks").and_then(Value::as_array))
            .or_else(|| fields.get("functions").and_then(Value::as_array));
        match items {
            // One run may speak for several tasks.
            _ if kind == FrameType::SubmitAnswer => {}
            Some(items) => {
                let behind = read.len() - items.len();
                for (values, item) in read[behind..].iter().zip(items) {
                    compared += compare(name, values, item);
                }
            }
            None => {
                for values in &read {
                    compared += compare(name, values, fields);
                }
            }
        }
    }
    assert!(compared > 80, "only {compared} fields have been compared");
}
