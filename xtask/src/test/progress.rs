//! What one stage shows while it runs: a line of its own with its title and time. A terminal sees it change; a file
//! gets a line for each step that is worth keeping.

use std::{
    io::{self, IsTerminal, Write},
    time::Instant,
};

/// Columns that a changing line may fill; a longer one would wrap and stay.
const COLUMNS: usize = 79;

/// One running stage. It owns the current line of the output until it is finished.
pub struct Progress {
    name: &'static str,
    title: &'static str,
    began: Instant,
    changing: bool,
    /// Whether the title's line still waits for its time.
    open: bool,
}

impl Progress {
    pub fn start(name: &'static str, title: &'static str) -> Progress {
        print!("{name:<8} {title:<38}");
        flush();
        Progress {
            name,
            title,
            began: Instant::now(),
            changing: io::stdout().is_terminal(),
            open: true,
        }
    }

    /// Shows what goes on right now, if somebody watches.
    pub fn working(&mut self, line: &str) {
        if !self.changing || line.trim().is_empty() {
            return;
        }
        let text = format!("{:<8} {}", self.name, line.trim());
        let text: String = text
            .chars()
            .filter(|c| !c.is_control())
            .take(COLUMNS)
            .collect();
        print!("\r\x1b[K{text}");
        flush();
    }

    /// Shows a step that is done.
    pub fn step(&mut self, line: &str) {
        if self.changing {
            self.working(line);
        } else {
            self.remark(line);
        }
    }

    /// Shows a line that stays, whoever watches.
    pub fn remark(&mut self, line: &str) {
        if self.changing {
            println!("\r\x1b[K{:<8} {line}", self.name);
            return;
        }
        if self.open {
            println!();
            self.open = false;
        }
        println!("{:<8} {line}", "");
    }

    pub fn finish(self, passed: bool) {
        let verdict = if passed { "ok" } else { "FAILED" };
        let seconds = self.began.elapsed().as_secs_f64();
        if self.changing {
            print!("\r\x1b[K");
        }
        if self.changing || !self.open {
            print!("{:<8} {:<38}", self.name, self.title);
        }
        println!(" {seconds:>7.1} s  {verdict}");
    }
}

/// A reader who is gone is no reason to stop.
fn flush() {
    let _ = io::stdout().flush();
}
