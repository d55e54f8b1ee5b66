//! What many seeds did together, as a table and as JSON.

use std::time::Duration;

use crate::{coverage::Coverage, oracle::Tally, run::Verdict, world::Counts};

/// Sums over seeds.
#[derive(Default)]
pub struct Total {
    /// Seeds that have run.
    pub seeds: u64,
    again: u64,
    tally: Tally,
    counts: Counts,
    kinds: u64,
    events: u64,
    virtual_ns: u64,
    /// Seeds whose second run left another trace.
    pub differing: Vec<u64>,
    /// Seeds that broke an invariant.
    pub broken: Vec<Verdict>,
}

impl Total {
    /// Adds a seed, and the hash of its second run if it had one.
    pub fn add(&mut self, verdict: Verdict, again: Option<u64>) {
        self.seeds += 1;
        self.tally.add(&verdict.tally);
        self.counts.add(&verdict.counts);
        self.kinds += verdict.counts.coverage.kinds();
        self.events += verdict.events;
        self.virtual_ns += verdict.virtual_ns;
        if let Some(hash) = again {
            self.again += 1;
            if hash != verdict.hash {
                self.differing.push(verdict.seed);
            }
        }
        if verdict.violation.is_some() {
            self.broken.push(verdict);
        }
    }

    /// Tasks accepted so far.
    pub fn tasks(&self) -> u64 {
        self.tally.accepted
    }

    /// What was reached.
    pub fn coverage(&self) -> &Coverage {
        &self.counts.coverage
    }

    fn rows(&self) -> Vec<(&'static str, u64)> {
        let (tally, counts) = (&self.tally, &self.counts);
        vec![
            ("seeds", self.seeds),
            ("run_twice", self.again),
            ("differing", self.differing.len() as u64),
            ("broken", self.broken.len() as u64),
            ("tasks_accepted", tally.accepted),
            ("attempts_executed", tally.executed),
            ("tasks_ended", tally.ended),
            ("duplicates_answered", tally.duplicates),
            ("submits_refused", tally.refused),
            ("stale_outcomes_refused", tally.stale),
            ("records_relocated", tally.relocated),
            ("leases_against_a_limit", tally.limited),
            ("crashes", counts.crashes),
            ("kinds_of_faults", self.kinds),
            ("torn_tails", counts.torn),
            ("poisoned_logs", counts.poisoned),
            ("unvouched_damage", counts.unvouched),
            ("segments_recycled", counts.recycled),
            ("segments_retired", counts.retired),
            ("records_given_up", counts.read_failures),
            ("snapshots_written", counts.snapshots),
            ("turns", counts.turns),
            ("events", self.events),
        ]
    }

    /// The table.
    pub fn table(&self, took: Duration) -> String {
        let seeds = self.seeds.max(1) as f64;
        let mut text = String::new();
        for (name, value) in self.rows() {
            let name = name.replace('_', " ");
            text += &format!(
                "{name:<28}{value:>14}{:>14.1} a seed\n",
                value as f64 / seeds
            );
        }
        text += &self.coverage().table();
        text += &format!(
            "{:<28}{:>14.1} s, {:.0} s of virtual time\n",
            "time",
            took.as_secs_f64(),
            self.virtual_ns as f64 / 1e9
        );
        text
    }

    /// The same as one JSON object, with what broke.
    pub fn json(&self, planted: &str, took: Duration) -> String {
        let rows: Vec<String> = self
            .rows()
            .into_iter()
            .map(|(name, value)| format!("\"{name}\":{value}"))
            .collect();
        let violations: Vec<String> = self
            .broken
            .iter()
            .filter_map(|verdict| {
                let violation = verdict.violation.as_ref()?;
                Some(format!(
                    "{{\"seed\":{},\"invariant\":\"{}\",\"sentence\":{:?}}}",
                    verdict.seed, violation.invariant, violation.sentence
                ))
            })
            .collect();
        format!(
            "{{\"planted\":\"{planted}\",{},\"violations\":[{}],\"not_reached\":{:?},\"seconds\":{:.3}}}",
            rows.join(","),
            violations.join(","),
            self.coverage().missing(),
            took.as_secs_f64()
        )
    }
}
