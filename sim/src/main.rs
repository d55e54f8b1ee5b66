//! `pelton-sim`: runs seeds of the simulation and says what they did. Progress goes to stderr, the table to stdout.
//! Exit codes: 0 all held (or, with a planted bug, one did not), 1 otherwise.

use std::{
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use clap::Parser;
use pelton_core::planted::{self, Bug};
use pelton_sim::{
    report::Total,
    run::{catch_panics, run_plan, run_seed},
    shrink::{Cut, shrink},
    swarm::Fault,
};

/// One seed in this many is run twice, to see that it does the same again.
const SAMPLE: u64 = 20;
/// So many seeds reach everything; fewer need not.
const COVERED_BY: u64 = 2_000;
/// Failing seeds that are made smaller; more are only named.
const SHRUNK_MAX: usize = 3;

/// Simulates the engine: shards, logs, disks, edges, callers and executors, from one seed.
#[derive(Parser, Debug)]
#[command(name = "pelton-sim")]
struct Arguments {
    /// Run this many seeds; 2000 and more must reach every cell of the coverage.
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
    /// Leave this kind of fault out of it.
    #[arg(long, requires = "seed", value_parser = fault)]
    without: Vec<Fault>,
    /// Hand in so many tasks at most.
    #[arg(long, requires = "seed")]
    tasks: Option<usize>,
    /// Run every seed twice and compare the hashes of their traces.
    #[arg(long)]
    twice: bool,
    /// Wake this bug, in a build that has them, and succeed as soon as a seed finds it.
    #[arg(long, value_parser = bug)]
    planted: Option<Bug>,
    /// Name the bugs that can be woken.
    #[arg(long)]
    list_planted: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Threads, each of which runs one seed at a time; as many as there are cores where this is not said.
    #[arg(long)]
    threads: Option<usize>,
}

fn fault(name: &str) -> Result<Fault, String> {
    let names = || Fault::ALL.map(|fault| format!("{fault:?}")).join(", ");
    Fault::from_name(name).ok_or_else(|| format!("the kinds of faults are {}", names()))
}

fn bug(name: &str) -> Result<Bug, String> {
    if !planted::AVAILABLE {
        return Err("this build has no planted bugs; use `cargo xtask planted`".to_owned());
    }
    let names = || Bug::ALL.map(Bug::name).join(", ");
    Bug::from_name(name).ok_or_else(|| format!("the planted bugs are {}", names()))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list_planted {
        for bug in Bug::ALL {
            println!("{}", bug.name());
        }
        return ExitCode::SUCCESS;
    }
    catch_panics();
    if let Some(bug) = arguments.planted {
        wake(bug);
    }
    if let Some(seed) = arguments.seed {
        return one(seed, &arguments);
    }
    let started = Instant::now();
    let total = many(&arguments, started);
    let planted = arguments.planted.map_or("nothing", Bug::name);
    if arguments.json {
        println!("{}", total.json(planted, started.elapsed()));
    } else if arguments.planted.is_none() {
        print!("{}", total.table(started.elapsed()));
    }
    if let Some(bug) = arguments.planted {
        return caught(bug, &total, &arguments);
    }
    for verdict in total.broken.iter().take(SHRUNK_MAX) {
        let violation = verdict.violation.as_ref().expect("only what broke is here");
        let cut = shrink(verdict.seed, violation.invariant);
        println!(
            "seed {} breaks `{}`; to see how:\n    cargo xtask sim --seed {} --trace{}",
            verdict.seed,
            violation.invariant,
            verdict.seed,
            cut.arguments()
        );
    }
    let missing = total.coverage().missing();
    if !missing.is_empty() {
        println!("never reached: {}", missing.join(", "));
    }
    let covered = missing.is_empty() || arguments.seeds < COVERED_BY;
    if total.broken.is_empty() && total.differing.is_empty() && covered {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(pelton_planted)]
fn wake(bug: Bug) {
    planted::plant(bug);
}

#[cfg(not(pelton_planted))]
fn wake(_: Bug) {
    unreachable!("the arguments were refused");
}

/// Runs all seeds, on all cores.
fn many(arguments: &Arguments, started: Instant) -> Total {
    let (next, stop) = (AtomicU64::new(arguments.first), AtomicBool::new(false));
    let end = arguments.first + arguments.seeds;
    let total = Mutex::new(Total::default());
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..arguments.threads.unwrap_or_else(cores).max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let verdict = run_seed(seed, false);
                    let sampled = seed % SAMPLE == 0 && arguments.planted.is_none();
                    let again =
                        (arguments.twice || sampled).then(|| run_seed(seed, false).hash);
                    if let Some(violation) = &verdict.violation {
                        eprintln!(
                            "seed {seed} breaks `{}`: {}\n    cargo xtask sim --seed {seed} --trace",
                            violation.invariant, violation.sentence
                        );
                        if arguments.planted.is_some() {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    let mut total = total.lock().expect("no thread panics with the lock held");
                    total.add(verdict, again);
                    if total.seeds.is_multiple_of(50) && arguments.planted.is_none() {
                        eprintln!(
                            "{} of {} seeds, {} tasks, {:.1} s",
                            total.seeds,
                            arguments.seeds,
                            total.tasks(),
                            started.elapsed().as_secs_f64()
                        );
                    }
                }
            });
        }
    });
    total
        .into_inner()
        .expect("no thread panics with the lock held")
}

/// A build with a planted bug succeeds when a seed has found it.
fn caught(bug: Bug, total: &Total, arguments: &Arguments) -> ExitCode {
    let found = total.broken.iter().min_by_key(|verdict| verdict.seed);
    match found.and_then(|verdict| Some((verdict.seed, verdict.violation.as_ref()?))) {
        Some((seed, violation)) => {
            if !arguments.json {
                println!(
                    "{:<26}{:>6}  {}",
                    bug.name(),
                    seed - arguments.first + 1,
                    violation.invariant
                );
            }
            ExitCode::SUCCESS
        }
        None => {
            if !arguments.json {
                println!("{:<26}{:>6}  not caught", bug.name(), total.seeds);
            }
            ExitCode::FAILURE
        }
    }
}

fn one(seed: u64, arguments: &Arguments) -> ExitCode {
    let cut = Cut {
        without: arguments.without.clone(),
        tasks: arguments.tasks,
    };
    let verdict = run_plan(cut.plan(seed), arguments.trace);
    let same = !arguments.twice || run_plan(cut.plan(seed), false).hash == verdict.hash;
    println!(
        "seed {seed}: hash {:016x}, {} events, {} tasks accepted, {} executed, {} crashes, {} kinds of faults, {:.3} s of virtual time",
        verdict.hash,
        verdict.events,
        verdict.tally.accepted,
        verdict.tally.executed,
        verdict.counts.crashes,
        verdict.counts.coverage.kinds(),
        verdict.virtual_ns as f64 / 1e9
    );
    if !same {
        println!("a second run did something else");
    }
    match &verdict.violation {
        Some(violation) => println!(
            "seed {seed} breaks `{}`: {}",
            violation.invariant, violation.sentence
        ),
        None => println!("every invariant held"),
    }
    let held = verdict.violation.is_none() != arguments.planted.is_some();
    if held && same {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
