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

    let mut text = String::new();
    let mut tasks = Table::new(["TASKS", ">ALL"].into_iter().chain(heads.iter().copied()));
    for (name, total) in stats["totals"].as_object().into_iter().flatten() {
        let all = [name.replace('_', " "), cell(total)].into_iter();
        tasks.row(all.chain(shards.iter().map(|shard| cell(&shard[name]))));
    }
    text.push_str(&tasks.render());

    let mut latencies = Table::new([
        "DISTRIBUTION",
        ">SHARD",
        ">COUNT",
        ">P50",
        ">P99",
        ">P99.9",
        ">MAX",
    ]);
    for shard in shards {
        for (name, figures) in shard["histograms"].as_object().into_iter().flatten() {
            let figure = |name: &str| cell(&figures[name]);
            latencies.row([
                name.replace('_', " "),
                cell(&shard["shard"]),
                figure("count"),
                figure("p50"),
                figure("p99"),
                figure("p999"),
                figure("max"),
            ]);
        }
    }
    text.push('\n');
    text.push_str(&latencies.render());

    let mut log = Table::new(["LOG"].into_iter().chain(heads.iter().copied()));
    let names = shards.first().and_then(|shard| shard["log"].as_object());
    for name in names.into_iter().flatten().map(|(name, _)| name) {
        let row = [name.replace('_', " ")].into_iter();
        log.row(row.chain(shards.iter().map(|shard| cell(&shard["log"][name]))));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_in_the_table() {
        let shard = |index: u16| {
            json!({
                "shard": index, "accepted": 4, "turns": 9, "parks": 1, "disk_full": false, "clock_held": 0,
                "histograms": { "turn_us": { "count": 5, "p50": 1, "p99": 2, "p999": 3, "max": 4 } },
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
        assert!(text.contains("turn us"), "{text}");
        assert!(text.contains("batches          77       77"), "{text}");
    }
}
