//! What is seen of a start that takes a while: a bar on a terminal, else a plain line now and then, on stderr.

use std::{
    io::IsTerminal,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use pelton_engine::Progress;

use crate::command::table::grouped;

/// A start that is over by then shows nothing.
const SHOWN_AFTER: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows the progress of a start until this is dropped.
pub struct Starting {
    over: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Starting {
    /// Begins to show it.
    pub fn show(progress: Arc<Progress>) -> Starting {
        let (over, is_over) = channel();
        let thread = thread::Builder::new()
            .name("pelton-starting".to_owned())
            .spawn(move || {
                if is_over.recv_timeout(SHOWN_AFTER) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let mut screen = Screen::new();
                loop {
                    screen.show(&progress);
                    if is_over.recv_timeout(LOOK_EVERY) != Err(RecvTimeoutError::Timeout) {
                        screen.clear();
                        return;
                    }
                }
            });
        // Without a thread there is nothing to see, and that is all.
        Starting {
            over: Some(over),
            thread: thread.ok(),
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        drop(self.over.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Screen {
    bar: Option<ProgressBar>,
    line_at: Instant,
}

impl Screen {
    fn new() -> Screen {
        let style = ProgressStyle::with_template(
            "{prefix} {bar:32} {bytes:>10}/{total_bytes:10} {binary_bytes_per_sec} {msg}",
        )
        .expect("the template is right")
        .progress_chars("=> ");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            bar.set_style(style);
            bar
        });
        Screen {
            bar,
            line_at: Instant::now(),
        }
    }

    fn show(&mut self, progress: &Progress) {
        let (read, of) = progress.bytes();
        let records = grouped(progress.records());
        let placing = progress.placing();
        if let Some(bar) = &self.bar {
            bar.set_length(of);
            bar.set_position(read);
            bar.set_prefix(match placing {
                Some((from, to)) => placing_on(from, to),
                None => "reading the log".to_owned(),
            });
            bar.set_message(match (placing, read < of) {
                (Some(_), _) => String::new(),
                (None, true) => format!("{records} records"),
                (None, false) => format!("{records} records, putting tasks in place"),
            });
        } else if Instant::now() >= self.line_at {
            self.line_at += LINE_EVERY;
            let percent = (u128::from(read) * 100 / u128::from(of.max(1))) as u64;
            match placing {
                Some((from, to)) => eprintln!("{}: {percent} %", placing_on(from, to)),
                None => eprintln!(
                    "starting: {percent} % of {} MB read, {records} records",
                    of / 1_000_000
                ),
            }
        }
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What is being done to the tasks of a directory with another number of shards.
fn placing_on(from: u16, to: u16) -> String {
    match from {
        1 => format!("placing 1 shard's tasks on {to}"),
        _ => format!("placing {from} shards' tasks on {to}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_shards_are_told_while_tasks_are_placed() {
        assert_eq!(placing_on(3, 5), "placing 3 shards' tasks on 5");
        assert_eq!(placing_on(1, 2), "placing 1 shard's tasks on 2");
    }
}
