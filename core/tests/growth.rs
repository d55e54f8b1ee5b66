//! How a shard grows: twenty million waiting tasks on a log that makes every batch durable at once, and what the longest
//! step and one task cost.
//!
//! Growth is the same to the last byte in every run, so what it allocates is asserted exactly as it is: a table that
//! grows by copying needs memory for the copy in that very step. Time is not the same in every run. It is measured as
//! CPU time of the thread, which leaves out that others ran meanwhile, yet not what a virtual machine takes away, nor
//! the first touch of fresh memory. Such noise strikes other steps in each run; a stall of ours strikes the same step
//! each time. A step therefore counts as long only if it was long in each of several runs.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use pelton_core::{
    clock::Now,
    config::{FunctionConfig, Wish},
    event::{
        Control, Durability, Durable, Effects, Inbox, Span, Start, SubmitBatch, SubmitTask,
        Urgency, stow,
    },
    id::{CellId, ConnectionId, FunctionId, Lsn, TenantId},
    record::BatchSpace,
    shard::{Options, Shard},
};
use rustix::time::{ClockId, clock_gettime};

/// Without optimization only a sample is grown, and time says nothing.
const TASKS: u64 = if cfg!(debug_assertions) {
    400_000
} else {
    20_000_000
};
/// The longest step in nanoseconds of CPU time.
const STEP_NS_MAX: u64 = if cfg!(debug_assertions) {
    1_000_000_000
} else {
    1_000_000
};
/// Runs in which one and the same step must be long before it counts as long.
const RUNS_MAX: u32 = 5;
/// The largest piece of memory that growth asks for at once. It is the list of the task table's pages, at its last
/// doubling.
const PIECE_BYTES_MAX: usize = 512 << 10;
/// Memory that one step asks for, and so the most that it can have copied for growth.
const STEP_BYTES_MAX: usize = 768 << 10;

const BATCH_TASKS: u64 = 256;
const SEGMENT_BYTES: u64 = 64 << 20;
const BUFFER_BYTES: usize = 2 << 20;
const HEADER_BYTES: usize = 128;
const CALLER: ConnectionId = ConnectionId(1);

/// What the tasks of one batch have that plain ones lack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Plain,
    Named,
    Delayed,
    /// By up to a month.
    LongDelayed,
    Tagged,
    Keyed,
    Aged,
    Awaited,
}

impl Kind {
    /// Six batches of sixteen are special, each all of one kind: the worst that a step can meet of it.
    fn of_batch(batch: u64) -> Kind {
        match batch % 16 {
            0 => Kind::Named,
            3 => Kind::Delayed,
            6 => Kind::Tagged,
            8 => Kind::Keyed,
            11 => Kind::Aged,
            14 => Kind::Awaited,
            _ => Kind::Plain,
        }
    }
}

#[test]
fn no_step_takes_a_millisecond_while_growing_to_twenty_million_tasks() {
    let mut suspects = Vec::new();
    for run in 1..=RUNS_MAX {
        let mut long = Vec::new();
        let mut growth = Growth::new();
        let batches = suspects
            .last()
            .map_or(TASKS.div_ceil(BATCH_TASKS), |&last| last + 1);
        for batch in 0..batches {
            let cost = growth.batch(Kind::of_batch(batch));
            assert!(
                cost.piece <= PIECE_BYTES_MAX && cost.bytes <= STEP_BYTES_MAX,
                "batch {batch} allocates {} bytes, {} of them at once",
                cost.bytes,
                cost.piece
            );
            if cost.ns > STEP_NS_MAX && (run == 1 || suspects.binary_search(&batch).is_ok()) {
                long.push(batch);
            }
        }
        if run == 1 {
            assert!(growth.shard.counters().waiting > TASKS * 9 / 10);
        }
        suspects = long;
        if suspects.is_empty() {
            return;
        }
    }
    panic!("the steps of these batches are long in every run: {suspects:?}");
}

#[test]
fn a_waiting_task_takes_64_bytes_and_what_it_has_beyond_a_plain_one_adds_so_much() {
    for (kind, bytes_max) in [
        // The entry, and its share of the list of pages.
        (Kind::Plain, 64.2),
        (Kind::Tagged, 64.2),
        // A place in a tree of times where it is due soon, else a number in a bucket.
        (Kind::Delayed, 80.0),
        (Kind::LongDelayed, 72.0),
        // A place in a tree of times.
        (Kind::Aged, 92.0),
        (Kind::Awaited, 97.0),
        // Two tasks share a key here; the one behind the other has a place in a tree of times too.
        (Kind::Keyed, 140.0),
        // The name's entry, half of whose places are empty, and its place in the order of forgetting.
        (Kind::Named, 200.0),
    ] {
        let bytes = Growth::new().bytes_per_task(kind);
        assert!(bytes <= bytes_max, "{kind:?}: {bytes} bytes a task");
    }
}

#[test]
fn beyond_the_open_pages_a_waiting_task_takes_a_byte_and_a_delayed_one_less_than_24() {
    for (kind, bytes_max) in [
        (Kind::Plain, 1.0),
        // A number in a bucket, the time, and a word or two that are guessed wrong.
        (Kind::LongDelayed, 24.0),
    ] {
        let mut growth = Growth::with(Options {
            task_pages_max: 2,
            ..Options::default()
        });
        let bytes = growth.bytes_per_task(kind);
        assert!(bytes <= bytes_max, "{kind:?}: {bytes} bytes a task");
        growth.shard.audit();
    }
}

/// What one step took.
struct Cost {
    ns: u64,
    /// Bytes allocated, and the largest piece of them.
    bytes: usize,
    piece: usize,
}

/// A shard that is only ever given new tasks, and the two buffers of its log.
struct Growth {
    shard: Shard,
    now: Now,
    inbox: Inbox,
    effects: Effects,
    open: Vec<u8>,
    len: usize,
    records: u32,
    base: u64,
    sealed: Vec<u8>,
    sealed_base: Option<u64>,
    tenant: TenantId,
    function: FunctionId,
    tasks: u64,
}

impl Growth {
    fn new() -> Growth {
        Growth::with(Options::default())
    }

    fn with(options: Options) -> Growth {
        let mut shard = Shard::new(Options {
            segment_bytes: SEGMENT_BYTES,
            ..options
        });
        let now = Now {
            mono_ns: 1,
            logged_ms: 1_000_000,
        };
        shard.start(now, Lsn(0));
        let mut growth = Growth {
            shard,
            now,
            inbox: Inbox {
                disk_has_room: true,
                ..Inbox::default()
            },
            effects: Effects::default(),
            open: vec![0; BUFFER_BYTES],
            len: HEADER_BYTES,
            records: 0,
            base: SEGMENT_BYTES,
            sealed: vec![0; BUFFER_BYTES],
            sealed_base: None,
            tenant: TenantId(0),
            function: FunctionId(0),
            tasks: 0,
        };
        growth.inbox.control.push_back(Control::Configure {
            connection: CALLER,
            ticket: 0,
            wish: Wish::SetFunction {
                tenant: "acme".into(),
                name: "digest".into(),
                config: FunctionConfig::default(),
            },
        });
        while growth.shard.directory().tenant_id("acme").is_none() || growth.sealed_base.is_some() {
            growth.step();
        }
        let directory = growth.shard.directory();
        growth.tenant = directory.tenant_id("acme").expect("waited for above");
        growth.function = directory
            .function_id(growth.tenant, "digest")
            .expect("it came with its tenant");
        growth
    }

    /// What many tasks of a kind add to what the shard holds in memory.
    fn bytes_per_task(&mut self, kind: Kind) -> f64 {
        self.batch(kind);
        let before = LIVE.get();
        let batches = 4_096;
        for _ in 0..batches {
            self.batch(kind);
        }
        (LIVE.get() - before) as f64 / (batches * BATCH_TASKS) as f64
    }

    /// One step that accepts a batch and commits the one before.
    fn batch(&mut self, kind: Kind) -> Cost {
        let batch = Box::new(self.tasks(kind));
        self.inbox.submits.push_back(batch);
        self.now.mono_ns += 2_000_000;
        self.now.logged_ms += 2;
        let cost = self.step();
        assert!(self.inbox.submits.is_empty(), "all of it found room");
        cost
    }

    fn tasks(&mut self, kind: Kind) -> SubmitBatch {
        let mut bytes = Vec::new();
        let tasks = (0..BATCH_TASKS).map(|index| {
            let number = self.tasks + index;
            // Any number, spread over the whole range.
            let spread = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) % 600_000;
            let mut task = SubmitTask {
                function: self.function,
                cell: CellId(0),
                index: index as u32,
                start: Start::Now,
                max_age_s: 0,
                cost: 0,
                priority: 0,
                durability: Durability::Disk,
                task_id: Span::default(),
                key: Span::default(),
                content_type: Span::default(),
                traceparent: Span::default(),
                tags: Span::default(),
                payload: stow(&mut bytes, &[7; 32]),
            };
            match kind {
                Kind::Plain | Kind::Awaited => {}
                Kind::Named => {
                    task.task_id = stow(&mut bytes, format!("order-{number}").as_bytes())
                }
                // A part of them is due while the shard grows.
                Kind::Delayed => task.start = Start::DelayMs(1 + spread),
                Kind::LongDelayed => task.start = Start::DelayMs(spread * 5_000),
                Kind::Tagged => task.tags = stow(&mut bytes, b"\x03a=b"),
                // Two of a key: one may start, and one waits behind it.
                Kind::Keyed => task.key = stow(&mut bytes, format!("{}", number / 2).as_bytes()),
                Kind::Aged => task.max_age_s = 1_000 + spread as u32,
            }
            task
        });
        let tasks = tasks.collect();
        self.tasks += BATCH_TASKS;
        SubmitBatch {
            connection: CALLER,
            ticket: 0,
            tenant: self.tenant,
            notify: kind == Kind::Awaited,
            with_result: true,
            tasks,
            bytes,
            done: 0,
        }
    }

    fn step(&mut self) -> Cost {
        let mut space = BatchSpace {
            bytes: &mut self.open,
            len: self.len,
            base: Lsn(self.base),
            records: self.records,
        };
        let durable = self.sealed_base.take().map(|base| Durable {
            bytes: &self.sealed,
            offset: base % SEGMENT_BYTES,
        });
        TAKEN.set(0);
        PIECE.set(0);
        let began = cpu_ns();
        self.shard.step(
            self.now,
            durable,
            &mut self.inbox,
            &mut space,
            &mut self.effects,
        );
        let cost = Cost {
            ns: cpu_ns() - began,
            bytes: TAKEN.get(),
            piece: PIECE.get(),
        };
        (self.len, self.records) = (space.len, space.records);
        for edge in &mut self.effects.edges {
            edge.runs.clear();
            edge.answers.clear();
            edge.replies.clear();
        }
        if self.effects.urgency != Urgency::Nothing {
            std::mem::swap(&mut self.open, &mut self.sealed);
            self.sealed_base = Some(self.base);
            self.base += self.len.next_multiple_of(4096) as u64;
            if SEGMENT_BYTES - self.base % SEGMENT_BYTES < BUFFER_BYTES as u64 {
                self.base = self.base.next_multiple_of(SEGMENT_BYTES);
            }
            (self.len, self.records) = (HEADER_BYTES, 0);
            self.shard.on_sealed();
        }
        cost
    }
}

fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

thread_local! {
    /// Bytes that this thread holds, bytes that it has asked for, and the largest piece.
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static TAKEN: Cell<usize> = const { Cell::new(0) };
    static PIECE: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn took(bytes: usize) {
    LIVE.set(LIVE.get().wrapping_add(bytes));
    TAKEN.set(TAKEN.get() + bytes);
    PIECE.set(PIECE.get().max(bytes));
}

fn gave(bytes: usize) {
    LIVE.set(LIVE.get().wrapping_sub(bytes));
}

// SAFETY: every call goes to the system's allocator as it came, and the counters, which need no memory and have no
// destructor, touch none of it. All tests of this file run on it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller keeps the contract, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: the caller keeps the contract, and `at` came from the system.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // The system may move it, so that all of it counts.
        gave(layout.size());
        took(bytes);
        // SAFETY: the caller keeps the contract, and `at` came from the system.
        unsafe { System.realloc(at, layout, bytes) }
    }
}
