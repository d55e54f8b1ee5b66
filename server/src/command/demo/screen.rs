//! What is seen while it runs: a bar per tenant on a terminal, else a plain line now and then.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{
    ledger::{Tally, percentile},
    work::TENANTS,
};
use crate::command::table::grouped;

const LINE_EVERY: Duration = Duration::from_secs(3);

/// Progress on stderr.
pub struct Screen {
    start: Instant,
    bars: Option<(MultiProgress, Vec<ProgressBar>)>,
    line_at: Instant,
}

impl Screen {
    /// `totals` are the tasks of each tenant.
    pub fn new(totals: [usize; 3], plain: bool) -> Screen {
        let start = Instant::now();
        let bars = (!plain && std::io::stderr().is_terminal()).then(|| {
            let multi = MultiProgress::new();
            let style = ProgressStyle::with_template("{prefix:17} {bar:24} {pos:>6}/{len:6} {msg}")
                .expect("the template is right")
                .progress_chars("=> ");
            let bars = TENANTS
                .iter()
                .zip(totals)
                .map(|((tenant, function), total)| {
                    let bar = multi.add(ProgressBar::new(total as u64));
                    bar.set_style(style.clone());
                    bar.set_prefix(format!("{tenant} {function}"));
                    bar
                })
                .collect();
            (multi, bars)
        });
        Screen {
            start,
            bars,
            line_at: start + LINE_EVERY,
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bars {
            Some((multi, _)) => {
                let _ = multi.println(line);
            }
            None => eprintln!("{line}"),
        }
    }

    /// Shows where it stands.
    pub fn update(&mut self, tallies: &[Tally; 3], accepted: usize) {
        let seconds = self.start.elapsed().as_secs_f64();
        let Some((_, bars)) = &self.bars else {
            if Instant::now() >= self.line_at {
                self.line_at += LINE_EVERY;
                let done: u64 = tallies.iter().map(|tally| tally.done).sum();
                let accepted = grouped(accepted as u64);
                eprintln!(
                    "{seconds:3.0} s  {accepted} accepted, {} done",
                    grouped(done)
                );
            }
            return;
        };
        for (bar, tally) in bars.iter().zip(tallies) {
            bar.update(|state| state.set_pos(tally.done));
            bar.set_message(format!(
                "{:5.0}/s  {:4} retrying  wait p50 {:>6}  p99 {:>6}",
                tally.done as f64 / seconds.max(0.1),
                tally.begun - tally.done,
                milliseconds(percentile(&tally.wait_ms, 50)),
                milliseconds(percentile(&tally.wait_ms, 99)),
            ));
        }
    }

    /// Takes the bars away.
    pub fn end(self) {
        if let Some((multi, bars)) = self.bars {
            for bar in bars {
                bar.finish_and_clear();
            }
            let _ = multi.clear();
        }
    }
}

/// `7 ms`, `1.2 s`.
pub fn milliseconds(value: u64) -> String {
    if value < 1_000 {
        format!("{value} ms")
    } else {
        format!("{:.1} s", value as f64 / 1_000.0)
    }
}
