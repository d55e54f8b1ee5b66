//! The executor's ledger as the demonstration reads it, while it grows and when it is complete.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use pelton_client::RequestId;

use super::work::TENANTS;

/// What the executor did for one task.
#[derive(Clone, Debug, Default)]
pub struct Executed {
    /// Executions.
    pub starts: u32,
    /// It is a task of `flaky`.
    pub flaky: bool,
    /// End of the first execution that succeeded.
    pub done_ms: Option<u64>,
}

/// What is known of one tenant's executions.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Executions.
    pub executions: u64,
    /// Tasks with a result.
    pub done: u64,
    /// Tasks with an execution.
    pub begun: u64,
    /// From acceptance to the first start, a number for each task, in ms.
    pub wait_ms: Vec<u64>,
    /// Duration of each execution, in ms.
    pub run_ms: Vec<u64>,
}

impl Tally {
    /// Executions beyond the first of their task.
    pub fn retried(&self) -> u64 {
        self.executions - self.begun
    }
}

/// A ledger that is read as it grows.
pub struct Ledger {
    file: File,
    rest: Vec<u8>,
    /// Every task that was started.
    pub tasks: HashMap<RequestId, Executed>,
    /// In the order of `TENANTS`.
    pub tallies: [Tally; 3],
}

impl Ledger {
    pub fn open(path: &Path) -> io::Result<Ledger> {
        Ok(Ledger {
            file: File::open(path)?,
            rest: Vec::new(),
            tasks: HashMap::new(),
            tallies: Default::default(),
        })
    }

    /// Reads what was added since.
    pub fn read_on(&mut self) -> io::Result<()> {
        self.file.read_to_end(&mut self.rest)?;
        let whole = match self.rest.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None => return Ok(()),
        };
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        for line in String::from_utf8_lossy(&lines).lines() {
            if self.add(line).is_none() {
                let what = format!("a line of the ledger is unreadable: {line}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
        Ok(())
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let mut fields = line.split(' ');
        let request = RequestId::parse(fields.next()?)?;
        let _attempt: u16 = fields.next()?.parse().ok()?;
        let start_ms: u64 = fields.next()?.parse().ok()?;
        let end_ms: u64 = fields.next()?.parse().ok()?;
        let function = fields.next()?;
        let ok = fields.next()? == "ok";
        let tenant = TENANTS.iter().position(|(_, name)| *name == function)?;
        let tally = &mut self.tallies[tenant];
        let task = self.tasks.entry(request).or_default();
        tally.executions += 1;
        tally.run_ms.push(end_ms.saturating_sub(start_ms));
        task.starts += 1;
        if task.starts == 1 {
            tally.begun += 1;
            tally
                .wait_ms
                .push(start_ms.saturating_sub(request.accepted_ms()));
            task.flaky = function == "flaky";
        }
        if ok && task.done_ms.is_none() {
            task.done_ms = Some(end_ms);
            tally.done += 1;
        }
        Some(())
    }
}

/// The smallest value that so many of a hundred do not exceed; 0 of none.
pub fn percentile(values: &[u64], percent: usize) -> u64 {
    if values.is_empty() {
        return 0;
    }
    let rank = (values.len() * percent).div_ceil(100).max(1);
    let mut values = values.to_vec();
    *values.select_nth_unstable(rank - 1).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn half_a_line_waits_for_its_other_half() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut ledger = Ledger::open(file.path()).unwrap();
        let request = RequestId(100 << 72);
        write!(file, "{request} 1 103 110 flaky failed\n{request} 2 2").unwrap();
        ledger.read_on().unwrap();
        assert_eq!(ledger.tallies[2].executions, 1);
        assert_eq!(ledger.tallies[2].done, 0);
        writeln!(file, "00 208 flaky ok").unwrap();
        ledger.read_on().unwrap();
        let tally = &ledger.tallies[2];
        assert_eq!((tally.executions, tally.done, tally.retried()), (2, 1, 1));
        assert_eq!(
            (&tally.wait_ms[..], &tally.run_ms[..]),
            (&[3][..], &[7, 8][..])
        );
        assert_eq!(ledger.tasks[&request].done_ms, Some(208));
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentile(&values, 50), 50);
        assert_eq!(percentile(&values, 99), 99);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile(&[], 99), 0);
    }
}
