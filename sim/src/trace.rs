//! The trace of a run: a hash over every event, by which two runs of one seed are compared, and the readable lines
//! of it where somebody asked for them.

/// Owned by one run. The hash covers numbers only, so that printing changes nothing.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    print: bool,
    events: u64,
}

impl Trace {
    /// An empty trace; with `print`, each event becomes a line on stdout.
    pub fn new(print: bool) -> Trace {
        Trace {
            hash: 0xcbf2_9ce4_8422_2325,
            print,
            events: 0,
        }
    }

    /// Notes an event: the numbers that tell it from another, and how it reads.
    pub fn event(&mut self, now_ns: u64, numbers: &[u64], text: impl FnOnce() -> String) {
        self.events += 1;
        self.mix(now_ns);
        for &number in numbers {
            self.mix(number);
        }
        if self.print {
            println!("{:>14.6} ms  {}", now_ns as f64 / 1e6, text());
        }
    }

    /// FNV-1a over 64-bit words, with a shift so that high bits reach low ones.
    fn mix(&mut self, number: u64) {
        self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3);
        self.hash ^= self.hash >> 29;
    }

    /// The hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// Events so far.
    pub fn events(&self) -> u64 {
        self.events
    }
}
