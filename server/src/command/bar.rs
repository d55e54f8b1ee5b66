//! A bar of bytes on stderr, where that is a terminal.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};
use pelton_engine::backup::Copied;

/// Shown until it is dropped.
#[derive(Debug)]
pub struct Bar(Option<ProgressBar>);

impl Bar {
    /// Nothing is shown where `plain` says so.
    pub fn new(what: &str, plain: bool) -> Bar {
        let shown = !plain && stderr().is_terminal();
        Bar(shown.then(|| {
            let style = ProgressStyle::with_template(
                "{prefix} {bar:32} {bytes:>11}/{total_bytes:11} {bytes_per_sec} {eta}",
            );
            let style = style.expect("the template is right");
            let bar = ProgressBar::new(0).with_style(style.progress_chars("=> "));
            bar.set_prefix(what.to_owned());
            bar
        }))
    }

    /// So far it is.
    pub fn show(&self, progress: Copied) {
        if let Some(bar) = &self.0 {
            bar.set_length(progress.bytes_total);
            bar.set_position(progress.bytes);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
