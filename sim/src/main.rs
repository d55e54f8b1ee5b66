//! `pelton-sim`: runs seeds of the simulation and says what they did. Progress goes to stderr, the table to stdout.
//! Exit codes: 0 all held (or, with `--expect-violation`, one did not), 1 otherwise.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use pelton_core::state::State;
use pelton_sim::{
    run::{Verdict, catch_panics, run_seed},
    swarm::Fault,
};

/// One seed in this many is run twice, to see that it does the same again.
const SAMPLE: u64 = 20;
/// Names of the events of the table of states, in its order.
const EVENTS: [&str; 14] = [
    "Due", "Dequeue", "Lease", "Release", "Succeed", "Retry", "Fail", "Stop", "StopDone", "Expire",
    "Pause", "Resume", "Remove", "Redrive",
];

/// Simulates the engine: shards, logs, disks, edges, callers and executors, from one seed.
#[derive(Parser, Debug)]
#[command(name = "pelton-sim")]
struct Arguments {
    /// Run this many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// Start with this seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Run this seed alone.
    #[arg(long)]
    seed: Option<u64>,
    /// Print every event of it.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Run every seed twice and compare the hashes of their traces.
    #[arg(long)]
    twice: bool,
    /// Succeed as soon as a seed breaks an invariant: for builds with a planted bug.
    #[arg(long)]
    expect_violation: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Threads; each runs one seed at a time.
    #[arg(long, default_value_t = 2)]
    threads: u64,
}

/// What all seeds did together.
#[derive(Default)]
struct Total {
    seeds: u64,
    tasks: u64,
    executed: u64,
    ended: u64,
    duplicates: u64,
    refused: u64,
    stale: u64,
    limited: u64,
    crashes: u64,
    torn: u64,
    poisoned: u64,
    recycled: u64,
    retired: u64,
    relocated: u64,
    read_failures: u64,
    turns: u64,
    events: u64,
    virtual_ns: u64,
    faults: BTreeMap<Fault, u64>,
    met: [u32; 13],
    again: u64,
    differing: Vec<u64>,
    broken: Vec<Verdict>,
}

impl Total {
    fn add(&mut self, verdict: Verdict, again: Option<u64>) {
        self.seeds += 1;
        let (tally, counts) = (&verdict.tally, &verdict.counts);
        self.tasks += tally.accepted;
        self.executed += tally.executed;
        self.ended += tally.ended;
        self.duplicates += tally.duplicates;
        self.relocated += tally.relocated;
        self.refused += tally.refused;
        self.stale += tally.stale;
        self.limited += tally.limited;
        self.crashes += counts.crashes;
        self.torn += counts.torn;
        self.poisoned += counts.poisoned;
        self.recycled += counts.recycled;
        self.retired += counts.retired;
        self.read_failures += counts.read_failures;
        self.turns += counts.turns;
        self.events += verdict.events;
        self.virtual_ns += verdict.virtual_ns;
        for (&fault, &count) in &counts.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        for (met, more) in self.met.iter_mut().zip(tally.met) {
            *met |= more;
        }
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

    fn met_pairs(&self) -> u32 {
        self.met.iter().map(|met| met.count_ones()).sum()
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    catch_panics();
    if let Some(seed) = arguments.seed {
        return one(seed, &arguments);
    }
    let started = Instant::now();
    let (next, stop) = (AtomicU64::new(arguments.first), AtomicBool::new(false));
    let end = arguments.first + arguments.seeds;
    let total = Mutex::new(Total::default());
    thread::scope(|scope| {
        for _ in 0..arguments.threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let verdict = run_seed(seed, false);
                    let again = (arguments.twice || seed % SAMPLE == 0)
                        .then(|| run_seed(seed, false).hash);
                    if let Some(violation) = &verdict.violation {
                        eprintln!(
                            "seed {seed} breaks `{}`: {}\n    cargo xtask sim --seed {seed} --trace",
                            violation.invariant, violation.sentence
                        );
                        if arguments.expect_violation {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    let mut total = total.lock().expect("no thread panics with the lock held");
                    total.add(verdict, again);
                    if total.seeds.is_multiple_of(50) {
                        eprintln!(
                            "{} of {} seeds, {} tasks, {:.1} s",
                            total.seeds,
                            arguments.seeds,
                            total.tasks,
                            started.elapsed().as_secs_f64()
                        );
                    }
                }
            });
        }
    });
    let total = total
        .into_inner()
        .expect("no thread panics with the lock held");
    if arguments.json {
        print_json(&total, started.elapsed());
    } else {
        print_table(&total, started.elapsed());
    }
    if arguments.expect_violation {
        return match total.broken.first() {
            Some(verdict) => {
                if let (Some(violation), false) = (&verdict.violation, arguments.json) {
                    println!(
                        "caught: {} -> {} seeds -> {}",
                        planted(),
                        total.seeds,
                        violation.invariant
                    );
                }
                ExitCode::SUCCESS
            }
            None => ExitCode::FAILURE,
        };
    }
    if total.broken.is_empty() && total.differing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let verdict = run_seed(seed, arguments.trace);
    let same = !arguments.twice || run_seed(seed, false).hash == verdict.hash;
    println!(
        "seed {seed}: hash {:016x}, {} events, {} tasks accepted, {} executed, {} crashes, {:.3} s of virtual time",
        verdict.hash,
        verdict.events,
        verdict.tally.accepted,
        verdict.tally.executed,
        verdict.counts.crashes,
        verdict.virtual_ns as f64 / 1e9
    );
    if !same {
        println!("a second run did something else");
    }
    match &verdict.violation {
        Some(violation) => {
            println!(
                "seed {seed} breaks `{}`: {}",
                violation.invariant, violation.sentence
            );
            println!("    cargo xtask sim --seed {seed} --trace");
        }
        None => println!("every invariant held"),
    }
    let held = verdict.violation.is_none() != arguments.expect_violation;
    if held && same {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The bug that this build was given, if any.
fn planted() -> &'static str {
    if cfg!(pelton_planted = "ack_before_flush") {
        "ack_before_flush"
    } else if cfg!(pelton_planted = "stale_token_accepted") {
        "stale_token_accepted"
    } else if cfg!(pelton_planted = "credit_leak") {
        "credit_leak"
    } else if cfg!(pelton_planted = "rot_accepted") {
        "rot_accepted"
    } else if cfg!(pelton_planted = "lends_before_reports") {
        "lends_before_reports"
    } else {
        "no planted bug"
    }
}

fn print_table(total: &Total, took: Duration) {
    let seeds = total.seeds.max(1) as f64;
    let rows: Vec<(&str, u64)> = vec![
        ("seeds", total.seeds),
        ("  run twice", total.again),
        ("  that differed", total.differing.len() as u64),
        ("  that broke an invariant", total.broken.len() as u64),
        ("tasks accepted", total.tasks),
        ("attempts executed", total.executed),
        ("tasks ended", total.ended),
        ("duplicates answered", total.duplicates),
        ("submits refused", total.refused),
        ("stale outcomes refused", total.stale),
        ("leases held against a limit", total.limited),
        ("crashes", total.crashes),
        ("torn tails", total.torn),
        ("poisoned logs", total.poisoned),
        ("segments recycled", total.recycled),
        ("segments retired", total.retired),
        ("records moved forward", total.relocated),
        ("records given up", total.read_failures),
        ("turns of shards, each audited", total.turns),
        ("events", total.events),
    ];
    for (name, value) in rows {
        println!("{name:<34}{value:>14}{:>14.1} a seed", value as f64 / seeds);
    }
    for fault in Fault::ALL {
        let count = total.faults.get(&fault).copied().unwrap_or(0);
        println!(
            "fault {:<28}{count:>14}{:>14.1} a seed",
            format!("{fault:?}"),
            count as f64 / seeds
        );
    }
    println!("{:<34}{:>14}", "state x event pairs met", total.met_pairs());
    for state in State::ALL {
        let met = total.met[state as usize];
        let names: Vec<&str> = (0..EVENTS.len())
            .filter(|event| met >> event & 1 == 1)
            .map(|event| EVENTS[event])
            .collect();
        if !names.is_empty() {
            println!("  {:<12}{}", state.name(), names.join(" "));
        }
    }
    println!(
        "{:<34}{:>14.1} s, {:.0} s of virtual time",
        "time",
        took.as_secs_f64(),
        total.virtual_ns as f64 / 1e9
    );
}

fn print_json(total: &Total, took: Duration) {
    let faults: Vec<String> = Fault::ALL
        .iter()
        .map(|fault| {
            let count = total.faults.get(fault).copied().unwrap_or(0);
            format!("\"{fault:?}\":{count}")
        })
        .collect();
    let broken: Vec<String> = total
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
    println!(
        "{{\"planted\":\"{}\",\"seeds\":{},\"run_twice\":{},\"differing\":{:?},\"violations\":[{}],\"tasks\":{},\
         \"executed\":{},\"ended\":{},\"duplicates\":{},\"refused\":{},\"stale\":{},\"limited\":{},\"crashes\":{},\"torn_tails\":{},\
         \"poisoned\":{},\"recycled\":{},\"retired\":{},\"read_failures\":{},\"turns\":{},\"events\":{},\"faults\":{{{}}},\"pairs_met\":{},\
         \"seconds\":{:.3}}}",
        planted(),
        total.seeds,
        total.again,
        total.differing,
        broken.join(","),
        total.tasks,
        total.executed,
        total.ended,
        total.duplicates,
        total.refused,
        total.stale,
        total.limited,
        total.crashes,
        total.torn,
        total.poisoned,
        total.recycled,
        total.retired,
        total.read_failures,
        total.turns,
        total.events,
        faults.join(","),
        total.met_pairs(),
        took.as_secs_f64()
    );
}
