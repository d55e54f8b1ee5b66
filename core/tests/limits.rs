//! A function's concurrency limit over several shards: exact, and usable by whichever shard needs it. Each shard is on
//! a log of its own in memory; what shards tell each other arrives in order.

#[expect(dead_code, reason = "`core/tests/shard.rs` uses the rest of it")]
mod rig;

use pelton_core::{
    config::{FunctionConfig, Wish},
    event::{Control, CreditKind, Reply, Verdict},
    id::{FunctionId, RequestId, ShardId, Token, place, shard_of},
    shard::Options,
};
use rig::{CALLER, EXECUTOR, Rig, WORKER};

const LEASE_MS: u64 = 15_000;

struct Cluster {
    rigs: Vec<Rig>,
    /// A shard that hears and says nothing.
    deaf: Option<usize>,
    /// Messages about limits since the test looked last.
    words: usize,
}

impl Cluster {
    fn new(shards: u16) -> Cluster {
        let rig = |shard| {
            Rig::new(Options {
                shard: ShardId(shard),
                shards,
                segment_bytes: 8 << 20,
                lease_ms: LEASE_MS,
                ..Options::default()
            })
        };
        Cluster {
            rigs: (0..shards).map(rig).collect(),
            deaf: None,
            words: 0,
        }
    }

    /// Lets every shard step and hear until nothing is left to say.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            let mut moved = false;
            for index in 0..self.rigs.len() {
                if self.deaf == Some(index) {
                    continue;
                }
                self.rigs[index].settle();
                for (to, control) in std::mem::take(&mut self.rigs[index].sent) {
                    moved = true;
                    self.words += usize::from(matches!(control, Control::Credits { .. }));
                    self.rigs[usize::from(to.0)]
                        .inbox
                        .control
                        .push_back(control);
                }
            }
            if !moved {
                return;
            }
        }
        panic!("they never stop talking");
    }

    fn limit(&mut self, concurrency: u32) -> FunctionId {
        let config = FunctionConfig {
            concurrency,
            ..FunctionConfig::default()
        };
        self.rigs[0].inbox.control.push_back(Control::Configure {
            connection: CALLER,
            ticket: 1,
            wish: Wish::SetFunction {
                tenant: "acme".into(),
                name: "f".into(),
                config,
            },
        });
        self.settle();
        let (_, _, reply) = self.rigs[0].out.replies.pop().expect("it is answered");
        assert_eq!(reply, Reply::Done { state: None });
        FunctionId(0)
    }

    fn lend(&mut self, function: FunctionId, count: u32) {
        for rig in &mut self.rigs {
            rig.lend(function, count);
        }
        self.settle();
    }

    fn home(&self) -> usize {
        usize::from(shard_of(place("acme", "f", ""), self.rigs.len() as u16).0)
    }

    fn accept(&mut self, shard: usize, function: FunctionId) {
        self.rigs[shard].accept(function, b"x");
        self.settle();
    }

    /// What was sent to executors since the last call, by shard.
    fn executes(&mut self) -> Vec<(usize, RequestId, Token)> {
        let mut all = Vec::new();
        for (shard, rig) in self.rigs.iter_mut().enumerate() {
            all.extend(rig.executes().into_iter().map(|(r, t, _)| (shard, r, t)));
        }
        all
    }

    fn end(&mut self, (shard, request, token): (usize, RequestId, Token)) {
        let taken = self.rigs[shard].outcome(request, token, Verdict::Succeeded, "");
        assert_eq!(taken, Ok(()));
        self.settle();
    }

    fn advance(&mut self, ms: u64) {
        for rig in &mut self.rigs {
            rig.now.mono_ns += ms * 1_000_000;
            rig.now.logged_ms += ms;
        }
        self.settle();
    }

    fn restart(&mut self) {
        for rig in &mut self.rigs {
            rig.restart();
        }
    }

    fn present(&mut self, (shard, request, token): (usize, RequestId, Token)) {
        let rig = &mut self.rigs[shard];
        rig.inbox.control.push_back(Control::SessionOpened {
            executor: EXECUTOR,
            connection: WORKER,
        });
        rig.inbox.control.push_back(Control::LeasesPresented {
            executor: EXECUTOR,
            connection: WORKER,
            ticket: 5,
            leases: vec![(request, token)],
        });
        self.settle();
    }
}

#[test]
fn a_limit_of_one_goes_round_the_shards_that_have_tasks() {
    let mut cluster = Cluster::new(8);
    let function = cluster.limit(1);
    cluster.lend(function, 4);
    for _ in 0..5 {
        for shard in 0..8 {
            cluster.accept(shard, function);
        }
    }
    let mut served = [0usize; 8];
    let mut last = None;
    for _ in 0..40 {
        let running = cluster.executes();
        let [one] = running[..] else {
            panic!("one runs at a time, not {running:?}");
        };
        assert_ne!(last, Some(one.0), "the other seven wait");
        last = Some(one.0);
        served[one.0] += 1;
        let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
        assert!(most - least <= 2, "{served:?}");
        cluster.end(one);
    }
    assert_eq!(served, [5; 8]);
    cluster.advance(100);
    cluster.advance(100);
    for rig in &cluster.rigs {
        assert_eq!(rig.shard.credits_out(), 0, "idle shards hold none");
        rig.shard.audit_rest();
    }
}

#[test]
fn one_shard_may_use_the_whole_limit_and_says_little_for_it() {
    let mut cluster = Cluster::new(4);
    let function = cluster.limit(6);
    cluster.lend(function, 100);
    let far = (cluster.home() + 1) % 4;
    for _ in 0..50 {
        cluster.accept(far, function);
    }
    let mut running = cluster.executes();
    assert_eq!(running.len(), 6);
    cluster.words = 0;
    for _ in 0..40 {
        let one = running.remove(0);
        cluster.end(one);
        running.extend(cluster.executes());
        assert_eq!(running.len(), 6);
    }
    assert_eq!(cluster.words, 0, "a credit is used again without a word");
}

#[test]
fn a_waiting_task_starts_after_one_round_trip_and_without_a_timer() {
    let mut cluster = Cluster::new(2);
    let function = cluster.limit(1);
    cluster.lend(function, 1);
    let home = cluster.home();
    let far = 1 - home;
    cluster.words = 0;
    cluster.accept(far, function);
    assert_eq!(cluster.executes().len(), 1);
    assert_eq!(cluster.words, 2, "a question and an answer");
    cluster.words = 0;
    let mut alone = Cluster::new(1);
    let function = alone.limit(1);
    alone.lend(function, 1);
    alone.accept(0, function);
    assert_eq!((alone.executes().len(), alone.words), (1, 0));
}

#[test]
fn the_home_starts_a_task_in_the_batch_that_accepts_it() {
    let mut cluster = Cluster::new(2);
    let function = cluster.limit(1);
    cluster.lend(function, 1);
    let home = cluster.home();
    let before = cluster.rigs[home].log.len();
    cluster.words = 0;
    cluster.accept(home, function);
    assert_eq!(cluster.rigs[home].log.len() - before, 1);
    assert_eq!((cluster.executes().len(), cluster.words), (1, 0));
}

#[test]
fn a_running_lease_counts_over_a_restart() {
    let mut cluster = Cluster::new(3);
    let function = cluster.limit(1);
    cluster.lend(function, 1);
    let home = cluster.home();
    let (far, other) = ((home + 1) % 3, (home + 2) % 3);
    cluster.accept(far, function);
    let running = cluster.executes()[0];
    cluster.accept(home, function);
    cluster.accept(other, function);
    cluster.restart();
    cluster.present(running);
    cluster.lend(function, 1);
    assert_eq!(cluster.executes(), [], "the one found in the log counts");
    cluster.end(running);
    let next = cluster.executes();
    assert_eq!(next.len(), 1);
    cluster.end(next[0]);
    let last = cluster.executes();
    assert_eq!(last.len(), 1);
    assert_ne!(last[0].0, next[0].0);
}

#[test]
fn nothing_is_lent_until_a_silent_shard_has_had_one_lease_term() {
    let mut cluster = Cluster::new(3);
    let function = cluster.limit(2);
    cluster.lend(function, 1);
    let home = cluster.home();
    let (far, deaf) = ((home + 1) % 3, (home + 2) % 3);
    cluster.restart();
    cluster.deaf = Some(deaf);
    for rig in [home, far] {
        cluster.rigs[rig].lend(function, 1);
        cluster.accept(rig, function);
    }
    cluster.advance(LEASE_MS - 1);
    assert_eq!(cluster.executes(), []);
    cluster.advance(1);
    assert_eq!(cluster.executes().len(), 2);
}

#[test]
fn a_limit_is_lowered_raised_lifted_and_given_while_tasks_run() {
    let mut cluster = Cluster::new(3);
    let function = cluster.limit(6);
    cluster.lend(function, 10);
    for _ in 0..10 {
        for shard in 0..3 {
            cluster.accept(shard, function);
        }
    }
    let mut running = cluster.executes();
    assert_eq!(running.len(), 6);
    cluster.limit(2);
    assert_eq!(cluster.executes(), []);
    for left in (2..6).rev() {
        let one = running.remove(0);
        cluster.end(one);
        running.extend(cluster.executes());
        assert_eq!(running.len(), left, "none starts until it is below");
    }
    for _ in 0..4 {
        let one = running.remove(0);
        cluster.end(one);
        running.extend(cluster.executes());
        assert_eq!(running.len(), 2);
    }
    cluster.limit(5);
    running.extend(cluster.executes());
    assert_eq!(running.len(), 5);
    cluster.limit(0);
    running.extend(cluster.executes());
    assert_eq!(running.len(), 30 - 8, "every task runs");
    cluster.limit(3);
    cluster.accept(1, function);
    while running.len() > 3 {
        assert_eq!(cluster.executes(), []);
        let one = running.remove(0);
        cluster.end(one);
    }
    assert_eq!(cluster.executes(), []);
    let one = running.remove(0);
    cluster.end(one);
    assert_eq!(cluster.executes().len(), 1);
}

#[test]
fn a_credit_leaves_its_shard_only_after_what_freed_it_is_durable() {
    let mut cluster = Cluster::new(2);
    let function = cluster.limit(1);
    cluster.lend(function, 1);
    let far = 1 - cluster.home();
    cluster.accept(far, function);
    let running = cluster.executes()[0];
    let home = cluster.home();
    cluster.accept(home, function);
    let rig = &mut cluster.rigs[far];
    let outcome = rig.outcome_of(running.1, running.2, Verdict::Succeeded, "");
    rig.inbox.control.push_back(Control::Outcomes(outcome));
    rig.step(None);
    let back = |control: &Control| {
        let Control::Credits { words, .. } = control else {
            return false;
        };
        words.iter().any(|word| word.kind == CreditKind::Return)
    };
    assert!(!rig.sent.iter().any(|(_, control)| back(control)));
    rig.settle();
    assert!(rig.sent.iter().any(|(_, control)| back(control)));
    cluster.settle();
    assert_eq!(cluster.executes().len(), 1);
}

#[test]
fn a_credit_that_comes_home_in_the_step_that_looked_for_it_is_used() {
    let mut cluster = Cluster::new(2);
    let function = cluster.limit(1);
    let home = cluster.home();
    let far = 1 - home;
    cluster.rigs[far].lend(function, 1);
    cluster.settle();
    cluster.accept(far, function);
    let running = cluster.executes()[0];
    // Nobody lends the home a slot yet, so that it asks for nothing.
    cluster.accept(home, function);
    cluster.end(running);
    cluster.deaf = Some(home);
    cluster.advance(100);
    cluster.advance(100);
    let back = cluster.rigs[home].inbox.control.drain(..);
    let back: Vec<Control> = back.collect();
    assert!(
        matches!(&back[..], [Control::Credits { words, .. }] if words[0].kind == CreditKind::Return)
    );
    let control = &mut cluster.rigs[home].inbox.control;
    control.push_back(Control::SessionOpened {
        executor: EXECUTOR,
        connection: WORKER,
    });
    control.push_back(Control::SlotsLent {
        executor: EXECUTOR,
        function,
        index: 0,
        count: 1,
    });
    control.extend(back);
    cluster.deaf = None;
    cluster.settle();
    let [(shard, ..)] = cluster.executes()[..] else {
        panic!("the home's task starts");
    };
    assert_eq!(shard, home);
}
