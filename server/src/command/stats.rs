//! `pelton stats`: what the shards count.

use clap::Args;
use pelton_client::Operation;
use serde_json::{Value, json};

use crate::{
    command::{
        connect::ConnectArgs,
        exit::{Exit, Failure, put, put_json},
        table::{Table, cell},
    },
    config::Config,
};

/// What the server counts: tasks, latencies, log
#[derive(Args, Clone, Debug)]
pub struct StatsArgs {
    #[command(flatten)]
    connect: ConnectArgs,
}

impl StatsArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.connect.json
    }
}

/// Asks and prints.
pub async fn run(args: &StatsArgs, config: &Config) -> Result<Exit, Failure> {
    let connect = &args.connect;
    let stats = connect.ask(config, Operation::Stats, &json!({})).await?;
    if connect.json {
        put_json(&stats)?;
    } else {
        put(render(&stats))?;
    }
    Ok(Exit::Ok)
}

fn render(stats: &Value) -> String {
    let none = Vec::new();
    let shards = stats["shards"].as_array().unwrap_or(&none);
    let heads: Vec<String> = shards
        .iter()
        .map(|shard| format!(">SHARD {}", cell(&shard["shard"])))
        .collect();
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();

    let mut text = troubles(shards);
    let mut tasks = Table::new(["TASKS", ">ALL"].into_iter().chain(heads.iter().copied()));
    for (name, total) in stats["totals"].as_object().into_iter().flatten() {
        let all = [name.replace('_', " "), cell(total)].into_iter();
        tasks.row(all.chain(shards.iter().map(|shard| cell(&shard[name]))));
    }
    text.push_str(&tasks.render());

    text.push('\n');
    text.push_str(&stages(shards));

    let mut log = Table::new(["LOG"].into_iter().chain(heads.iter().copied()));
    let names = shards.first().and_then(|shard| shard["log"].as_object());
    for name in names.into_iter().flatten().map(|(name, _)| name) {
        let row = [name.replace('_', " ")].into_iter();
        let failed = |shard: &Value| match &shard["log"][name] {
            // Why it has failed stands above.
            Value::String(_) if name == "poisoned" => "true".to_owned(),
            value => cell(value),
        };
        log.row(row.chain(shards.iter().map(failed)));
    }
    for name in ["turns", "parks", "disk_full", "clock_held"] {
        let row = [name.replace('_', " ")].into_iter();
        log.row(row.chain(shards.iter().map(|shard| cell(&shard[name]))));
    }
    text.push('\n');
    text.push_str(&log.render());

    let edge = &stats["edge"];
    text.push_str(&format!(
        "\nedge {}: {} sessions, {} executors\n",
        cell(&edge["index"]),
        cell(&edge["sessions"]),
        cell(&edge["executors"])
    ));
    text
}

/// A line for each shard that does not serve, and for each that takes no submits; then an empty one.
fn troubles(shards: &[Value]) -> String {
    let mut lines = String::new();
    for shard in shards {
        let number = cell(&shard["shard"]);
        if let Some(why) = shard["quarantined"]["error"].as_str() {
            lines += &format!("shard {number} is QUARANTINED, the others serve: {why}\n");
        }
        if let Some(why) = shard["log"]["poisoned"].as_str() {
            lines += &format!(
                "the log of shard {number} has FAILED, the others serve: {why}; what the disk has says the kernel log \
                 (dmesg); restart the server when it is mended\n"
            );
        }
        if shard["disk_full"] == true {
            lines += &format!(
                "shard {number} refuses submits: the disk is FULL, or fuller than limits.space_bytes_min allows\n"
            );
        }
    }
    if !lines.is_empty() {
        lines.push('\n');
    }
    lines
}

/// The histograms, one stage after the other in the order of a task's way.
fn stages(shards: &[Value]) -> String {
    let mut table = Table::new([
        "STAGE", "", ">SHARD", ">COUNT", ">MEAN", ">P50", ">P99", ">P99.9", ">MAX",
    ]);
    let first = shards
        .first()
        .and_then(|shard| shard["histograms"].as_object());
    for name in first.into_iter().flatten().map(|(name, _)| name) {
        let (stage, unit) = match name.rsplit_once('_') {
            Some((stage, unit @ ("us" | "ms"))) => (stage, unit),
            Some(_) | None => (name.as_str(), ""),
        };
        for shard in shards {
            let figures = &shard["histograms"][name];
            let figure = |name: &str| match figures[name].as_f64() {
                // Nothing has come this far.
                _ if figures["count"] == 0 => cell(&Value::Null),
                Some(value) if unit == "us" => duration(value),
                Some(value) if unit == "ms" => duration(value * 1_000.0),
                Some(_) | None => cell(&figures[name]),
            };
            table.row([
                stage.replace('_', " "),
                meaning(stage).to_owned(),
                cell(&shard["shard"]),
                cell(&figures["count"]),
                figure("mean"),
                figure("p50"),
                figure("p99"),
                figure("p999"),
                figure("max"),
            ]);
        }
    }
    table.render()
}

/// From where to where a stage goes; nothing for one of another version.
fn meaning(stage: &str) -> &'static str {
    match stage {
        "durable" => "accepted to durable",
        "queued" => "enqueued to dequeued",
        "fetched" => "dequeued to leased",
        "dispatched" => "leased to dispatched",
        "carried" => "dispatched to started, and finished to heard",
        "run" => "started to finished",
        "delivered" => "heard to durable and told",
        "total" => "accepted to ended",
        "turn" => "one turn of the shard's loop",
        "commit" => "one flush of the log",
        "batch_records" => "records of one flush",
        "batch_bytes" => "bytes of one flush",
        _ => "",
    }
}

/// Microseconds, with three digits at least.
fn duration(us: f64) -> String {
    match us {
        0.0..1_000.0 => format!("{us:.0} us"),
        1_000.0..10_000.0 => format!("{:.2} ms", us / 1e3),
        10_000.0..1_000_000.0 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_does_not_serve_comes_first() {
        let sound = json!({ "shard": 0, "log": { "poisoned": null }, "disk_full": false, "quarantined": null });
        let shards = [
            sound.clone(),
            json!({ "shard": 1, "log": { "poisoned": null }, "disk_full": false, "quarantined": {
                "error": "the log is damaged at segment-000001.plt, segment 1, byte offset 12288",
                "file": "segment-000001.plt", "segment": 1, "offset": 12288,
            } }),
            json!({ "shard": 2, "log": { "poisoned": "flush /data: EIO" }, "disk_full": true, "quarantined": null }),
        ];
        let text = render(&json!({ "totals": {}, "shards": shards, "edge": {} }));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("shard 1 is QUARANTINED, the others serve: "));
        assert!(lines[0].ends_with("segment-000001.plt, segment 1, byte offset 12288"));
        assert!(
            lines[1]
                .starts_with("the log of shard 2 has FAILED, the others serve: flush /data: EIO;")
        );
        assert!(lines[2].starts_with("shard 2 refuses submits: the disk is FULL"));
        assert_eq!(lines[3], "");
        assert_eq!(troubles(&[sound]), "");
    }

    #[test]
    fn every_figure_is_in_the_table() {
        let shard = |index: u16| {
            json!({
                "shard": index, "accepted": 4, "turns": 9, "parks": 1, "disk_full": false, "clock_held": 0,
                "histograms": {
                    "queued_us": { "count": 5, "mean": 2.6, "p50": 1, "p99": 2500, "p999": 31_000, "max": 4_000_000 },
                    "total_ms": { "count": 5, "mean": 2, "p50": 1, "p99": 2, "p999": 3, "max": 4 },
                    "run_us": { "count": 0, "mean": 0, "p50": 0, "p99": 0, "p999": 0, "max": 0 },
                    "batch_records": { "count": 7, "mean": 1, "p50": 1, "p99": 2, "p999": 3, "max": 4 },
                },
                "log": { "batches": 77 },
            })
        };
        let text = render(&json!({
            "totals": { "accepted": 8 },
            "shards": [shard(0), shard(1)],
            "edge": { "index": 0, "sessions": 1, "executors": 0 },
        }));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "TASKS     ALL  SHARD 0  SHARD 1");
        assert_eq!(lines[1], "accepted    8        4        4");
        let cells: Vec<Vec<&str>> = lines
            .iter()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        let queued = [
            "queued",
            "enqueued to dequeued",
            "0",
            "5",
            "3 us",
            "1 us",
            "2.50 ms",
            "31 ms",
            "4.0 s",
        ];
        let total = [
            "total",
            "accepted to ended",
            "1",
            "5",
            "2.00 ms",
            "1.00 ms",
            "2.00 ms",
            "3.00 ms",
            "4.00 ms",
        ];
        let none = [
            "run",
            "started to finished",
            "1",
            "0",
            "-",
            "-",
            "-",
            "-",
            "-",
        ];
        let records = [
            "batch records",
            "records of one flush",
            "0",
            "7",
            "1",
            "1",
            "2",
            "3",
            "4",
        ];
        let place = |row: &[&str]| cells.iter().position(|cells| cells == row);
        let places = [place(&queued), place(&total), place(&none), place(&records)];
        assert!(places.is_sorted() && places[0].is_some(), "{text}");
        assert!(text.contains("batches          77       77"), "{text}");
    }
}
