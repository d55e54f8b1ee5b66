//! What a run prints: one JSON object, or the same as a table.

use std::{fs, io::Write, path::Path};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// What the figures were measured on.
pub(crate) fn environment(data: &Path, flush_p50_us: f64, placement: &str) -> Value {
    let text = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    json!({
        "cores": cores,
        "kernel": text("/proc/sys/kernel/osrelease"),
        "fs": file_system(data),
        "flush_p50_us": round(flush_p50_us),
        "placement": placement,
        "commit": commit(),
    })
}

/// The type of the file system that holds a path: the longest mount point that it begins with.
fn file_system(path: &Path) -> String {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .filter(|(point, _)| path.starts_with(point))
        .max_by_key(|(point, _)| point.len());
    mount.map_or_else(|| "unknown".to_owned(), |(_, kind)| kind.to_owned())
}

/// The commit of the working directory, where there is one.
fn commit() -> String {
    let asked = std::process::Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .stderr(std::process::Stdio::null())
        .output();
    match asked {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        Ok(_) | Err(_) => "unknown".to_owned(),
    }
}

pub(crate) fn round(value: f64) -> f64 {
    if value.abs() >= 100.0 {
        value.round()
    } else {
        (value * 1000.0).round() / 1000.0
    }
}

/// Prints a report on stdout.
pub(crate) fn print(report: &Value, as_json: bool) {
    let mut out = std::io::stdout().lock();
    if as_json {
        let _ = writeln!(out, "{report}");
        return;
    }
    let mut rows = Vec::new();
    flatten("", report, &mut rows);
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in rows {
        let _ = writeln!(out, "{name:width$}  {value}");
    }
}

fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                flatten(&name, value, rows);
            }
        }
        Value::Null => {}
        Value::Number(number) => rows.push((prefix.to_owned(), grouped(number))),
        Value::String(text) => rows.push((prefix.to_owned(), text.clone())),
        other => rows.push((prefix.to_owned(), other.to_string())),
    }
}

/// Thousands apart, so that a large number can be read.
fn grouped(number: &serde_json::Number) -> String {
    let text = number.to_string();
    let (whole, rest) = match text.split_once('.') {
        Some(("0", _)) | None if text.len() <= 3 => return text,
        Some((whole, "0")) => (whole.to_owned(), String::new()),
        Some((whole, rest)) => (whole.to_owned(), format!(".{rest}")),
        None => (text.clone(), String::new()),
    };
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && digit.is_ascii_digit() {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + &rest
}

/// Writes a distribution: value, share of all at or below it, count.
pub(crate) fn write_distribution(path: &Path, histogram: &Histogram<u64>) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    writeln!(file, "{:>12} {:>14} {:>12}", "us", "quantile", "count")?;
    for step in histogram.iter_quantiles(5) {
        writeln!(
            file,
            "{:>12} {:>14.6} {:>12}",
            step.value_iterated_to(),
            step.quantile_iterated_to(),
            histogram.count_between(0, step.value_iterated_to())
        )?;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_are_grouped_and_small_ones_left_alone() {
        let shown = |value: Value| match value {
            Value::Number(number) => grouped(&number),
            _ => String::new(),
        };
        assert_eq!(shown(json!(1_234_567)), "1,234,567");
        assert_eq!(shown(json!(999)), "999");
        assert_eq!(shown(json!(0.125)), "0.125");
        assert_eq!(shown(json!(1234.5)), "1,234.5");
        assert_eq!(shown(json!(1000.0)), "1,000");
    }
}
