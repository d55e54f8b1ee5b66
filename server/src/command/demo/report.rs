//! What a run says at its end: a table, a verdict, and what to try next; or one JSON object.

use std::path::Path;

use crate::command::table::grouped;
use pelton_client::RequestId;
use serde_json::{Value, json};

use super::{
    ledger::{Tally, percentile},
    screen::milliseconds,
    work::TENANTS,
};

/// Names that a message lists before it only counts.
const NAMED_MAX: usize = 20;

/// One tenant's end.
#[derive(Default)]
pub struct TenantEnd {
    pub accepted: u64,
    pub succeeded: u64,
    pub failed: u64,
    pub tally: Tally,
}

/// What became of the crash.
pub struct CrashEnd {
    pub outstanding_at_kill: u64,
    pub recovered: u64,
    pub executed_more_than_once: u64,
    pub replay_ms: u64,
}

/// A run that is over.
pub struct Report {
    pub tenants: [TenantEnd; 3],
    /// Acknowledged, and not terminal or not there at the end; with what the server said.
    pub lost: Vec<(RequestId, String)>,
    /// Digests that were compared and that were right.
    pub digests: (u64, u64),
    /// The same for word counts.
    pub counts: (u64, u64),
    /// Results that are not what the file says.
    pub wrong: Vec<(RequestId, String)>,
    /// Planned, and never acknowledged.
    pub unaccepted: usize,
    pub skipped: usize,
    pub crash: Option<CrashEnd>,
    /// Fewer than this outstanding at the kill prove nothing.
    pub outstanding_min: u64,
    pub seconds: f64,
}

impl Report {
    fn sum(&self, of: impl Fn(&TenantEnd) -> u64) -> u64 {
        self.tenants.iter().map(of).sum()
    }

    /// What is not as it should be, a line each; none if all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut name = |what: &str, ids: &[(RequestId, String)]| {
            if !ids.is_empty() {
                faults.push(format!("{} {what}", ids.len()));
                for (id, why) in ids.iter().take(NAMED_MAX) {
                    faults.push(format!("  {id}  {why}"));
                }
                if ids.len() > NAMED_MAX {
                    faults.push(format!("  and {} more", ids.len() - NAMED_MAX));
                }
            }
        };
        name(
            "accepted tasks are lost (not there, or not terminal):",
            &self.lost,
        );
        name("results are wrong:", &self.wrong);
        if self.unaccepted > 0 {
            faults.push(format!("{} tasks were never accepted", self.unaccepted));
        }
        let failed = self.sum(|tenant| tenant.failed);
        if failed > 0 {
            faults.push(format!("{failed} tasks failed, and none should have"));
        }
        if let Some(crash) = &self.crash
            && crash.outstanding_at_kill < self.outstanding_min
        {
            faults.push(format!(
                "only {} tasks were outstanding at the kill, {} are needed for this to prove anything",
                crash.outstanding_at_kill, self.outstanding_min
            ));
        }
        faults
    }

    pub fn to_json(&self, data: &Path) -> Value {
        let mut object = json!({
            "accepted": self.sum(|tenant| tenant.accepted),
            "succeeded": self.sum(|tenant| tenant.succeeded),
            "failed": self.sum(|tenant| tenant.failed),
            "retried": self.sum(|tenant| tenant.tally.retried()),
            "lost": self.lost.len(),
            "verified": self.digests.1,
            "digests": self.digests.0,
            "wordcounts_verified": self.counts.1,
            "wrong": self.wrong.len(),
            "skipped": self.skipped,
            "seconds": self.seconds,
            "data": data,
        });
        if let Some(crash) = &self.crash {
            object["crash"] = true.into();
            object["outstanding_at_kill"] = crash.outstanding_at_kill.into();
            object["recovered"] = crash.recovered.into();
            object["executed_more_than_once"] = crash.executed_more_than_once.into();
            object["replay_ms"] = crash.replay_ms.into();
        }
        let tenants = TENANTS.iter().zip(&self.tenants);
        let tenants = tenants.map(|((tenant, function), end)| {
            json!({
                "tenant": tenant,
                "function": function,
                "accepted": end.accepted,
                "succeeded": end.succeeded,
                "failed": end.failed,
                "retried": end.tally.retried(),
                "wait_ms": { "p50": percentile(&end.tally.wait_ms, 50), "p99": percentile(&end.tally.wait_ms, 99) },
                "run_ms": { "p50": percentile(&end.tally.run_ms, 50), "p99": percentile(&end.tally.run_ms, 99) },
            })
        });
        object["tenants"] = tenants.collect();
        object["faults"] = self.faults().into();
        object
    }

    pub fn print(&self) {
        let mut rows = vec![
            [
                "tenant",
                "function",
                "accepted",
                "succeeded",
                "failed",
                "retried",
                "wait p50",
                "wait p99",
                "run p50",
                "run p99",
            ]
            .map(str::to_owned),
        ];
        for ((tenant, function), end) in TENANTS.iter().zip(&self.tenants) {
            let at = |values: &[u64], percent| milliseconds(percentile(values, percent));
            rows.push([
                (*tenant).to_owned(),
                (*function).to_owned(),
                grouped(end.accepted),
                grouped(end.succeeded),
                grouped(end.failed),
                grouped(end.tally.retried()),
                at(&end.tally.wait_ms, 50),
                at(&end.tally.wait_ms, 99),
                at(&end.tally.run_ms, 50),
                at(&end.tally.run_ms, 99),
            ]);
        }
        println!();
        print!("{}", table(&rows));
        println!();
        println!(
            "{} accepted, {} succeeded, {} failed, {} lost (each accepted task was asked after at the end)",
            grouped(self.sum(|tenant| tenant.accepted)),
            grouped(self.sum(|tenant| tenant.succeeded)),
            grouped(self.sum(|tenant| tenant.failed)),
            self.lost.len()
        );
        println!(
            "verified {} of {} digests and {} of {} word counts against the files",
            grouped(self.digests.1),
            grouped(self.digests.0),
            grouped(self.counts.1),
            grouped(self.counts.0)
        );
        if let Some(crash) = &self.crash {
            println!(
                "SIGKILL with {} tasks outstanding; {} recovered from the log, listening again after {} ms",
                grouped(crash.outstanding_at_kill),
                grouped(crash.recovered),
                crash.replay_ms
            );
            println!(
                "{} executed more often than its own failures asked for",
                counted(crash.executed_more_than_once, "task")
            );
        }
        for line in self.faults() {
            println!("{line}");
        }
    }
}

/// Commands to go on with, as they work when pasted.
pub fn next_steps(program: &Path, data: &Path) -> String {
    let (program, folder) = (quoted(program), quoted(data));
    format!(
        "\nEverything is kept in {folder}. To look at it, serve it again:\n\n  \
         {program} serve --data {folder}\n\n\
         and in another terminal:\n\n  \
         {program} stats --data {folder}\n  \
         {program} task list --tenant noisy --data {folder}\n\n\
         With the server stopped again, check every byte of the log:\n\n  \
         {program} log verify --data {folder}"
    )
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:=@".contains(c);
    if text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Rows in columns: the first two to the left, numbers to the right.
fn table(rows: &[[String; 10]]) -> String {
    let mut widths = [0; 10];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            text += &match column {
                0 => format!("{cell:width$}"),
                1 => format!("  {cell:width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

/// `1 file`, `12,345 files`.
pub fn counted(value: u64, what: &str) -> String {
    let plural = if value == 1 { "" } else { "s" };
    format!("{} {what}{plural}", grouped(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_or_wrong_is_named_and_a_crash_that_proves_nothing_is_told() {
        let mut report = Report {
            tenants: Default::default(),
            lost: Vec::new(),
            digests: (3, 3),
            counts: (3, 3),
            wrong: Vec::new(),
            unaccepted: 0,
            skipped: 0,
            crash: None,
            outstanding_min: 1_000,
            seconds: 10.0,
        };
        assert!(report.faults().is_empty());
        let id = RequestId(7);
        report.lost = vec![(id, "NOT_FOUND".to_owned()); 25];
        let faults = report.faults();
        assert_eq!(
            faults[0],
            "25 accepted tasks are lost (not there, or not terminal):"
        );
        assert_eq!(faults[1], format!("  {id}  NOT_FOUND"));
        assert_eq!(faults.last().map(String::as_str), Some("  and 5 more"));
        assert_eq!(report.to_json(Path::new("d"))["lost"], 25);
        report.lost.clear();
        report.crash = Some(CrashEnd {
            outstanding_at_kill: 999,
            recovered: 999,
            executed_more_than_once: 0,
            replay_ms: 1,
        });
        assert_eq!(report.faults().len(), 1);
    }

    #[test]
    fn numbers_and_paths_are_written_for_people_and_shells() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(quoted(Path::new("/a/b-1")), "/a/b-1");
        assert_eq!(quoted(Path::new("/a b/c'd")), r"'/a b/c'\''d'");
    }
}
