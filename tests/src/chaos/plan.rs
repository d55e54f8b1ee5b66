//! What every submission is. One seed decides all of it, so that a caller, an executor and a second run of the same seed
//! agree without a word between them; only the moments differ from run to run.

use std::{
    fmt,
    hash::{DefaultHasher, Hasher},
};

/// Who hands in tasks. Every caller process has one stream of submissions for each.
pub const TENANTS: [&str; 2] = ["acme", "globex"];

/// A function, the same for every tenant.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    pub name: &'static str,
    pub retries: u8,
    /// 0 means without a limit.
    pub concurrency: u32,
    /// Slots that each executor offers.
    pub slots: u32,
    /// Of a hundred submissions.
    share: u64,
}

/// `echo` answers at once, `flaky` fails as often as the plan says, `narrow` has a limit that both shards share, and
/// `slow` is at work when its callers stop it and when servers and executors die.
pub const FUNCTIONS: [Function; 4] = [
    function("echo", 8, 0, 32, 55),
    function("flaky", 3, 0, 32, 20),
    function("narrow", 8, 6, 8, 15),
    function("slow", 8, 0, 32, 10),
];

const fn function(
    name: &'static str,
    retries: u8,
    concurrency: u32,
    slots: u32,
    share: u64,
) -> Function {
    Function {
        name,
        retries,
        concurrency,
        slots,
        share,
    }
}

/// Ordering keys of one stream and one function.
const KEYS: u64 = 4;
/// Bytes of the largest payload.
pub const PAYLOAD_BYTES_MAX: u64 = 100 << 10;

/// The name of a submission: its stream and its number there. It travels as the content type, which executors see.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Id {
    pub stream: u16,
    pub number: u64,
}

impl Id {
    pub fn parse(text: &str) -> Option<Id> {
        let (stream, number) = text.strip_prefix('s')?.split_once('-')?;
        Some(Id {
            stream: stream.parse().ok()?,
            number: number.parse().ok()?,
        })
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}-{}", self.stream, self.number)
    }
}

/// One task as its caller hands it in.
#[derive(Clone, Debug)]
pub struct Submission {
    /// A place in `FUNCTIONS`.
    pub function: usize,
    pub named: bool,
    /// Never together with a delay: a key's order is that of acceptance among tasks that may start.
    pub key: Option<String>,
    pub delay_ms: u64,
    pub payload: Vec<u8>,
}

/// What this submission is under this seed.
pub fn submission(seed: u64, id: Id) -> Submission {
    let mut dice = Dice::of(&[seed, 1, u64::from(id.stream), id.number]);
    let mut drawn = dice.below(100);
    let mut function = 0;
    while drawn >= FUNCTIONS[function].share {
        drawn -= FUNCTIONS[function].share;
        function += 1;
    }
    let named = dice.chance(50);
    let key = dice
        .chance(12)
        .then(|| format!("k{}-{}", id.stream, dice.below(KEYS)));
    let delay_ms = match key.is_none() && dice.chance(8) {
        true => 1 + dice.below(300),
        false => 0,
    };
    let bytes = match dice.below(100) {
        0..10 => 0,
        10..70 => 1 + dice.below(256),
        70..92 => 257 + dice.below(1_792),
        92..99 => 2_049 + dice.below(6_144),
        _ => PAYLOAD_BYTES_MAX - dice.below(PAYLOAD_BYTES_MAX - 8_193),
    };
    let mut payload = Vec::with_capacity(bytes as usize + 8);
    while (payload.len() as u64) < bytes {
        payload.extend_from_slice(&dice.next().to_le_bytes());
    }
    payload.truncate(bytes as usize);
    Submission {
        function,
        named,
        key,
        delay_ms,
        payload,
    }
}

/// How many of a task's first attempts fail by themselves.
pub fn failing_attempts(seed: u64, id: Id, function: &str) -> u16 {
    if function != "flaky" {
        return 0;
    }
    let mut dice = Dice::of(&[seed, 2, u64::from(id.stream), id.number]);
    match dice.below(10) {
        0..5 => 0,
        5..8 => 1,
        8 => 2,
        _ => u16::MAX,
    }
}

/// What payloads are compared by.
pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Numbers that a seed decides: splitmix64.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn of(parts: &[u64]) -> Dice {
        let mut dice = Dice(0);
        for part in parts {
            dice.0 ^= part;
            dice.0 = dice.next();
        }
        dice
    }

    #[expect(
        clippy::should_implement_trait,
        reason = "it never ends, and nobody loops over it"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
