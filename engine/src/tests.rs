//! Tests of `inbox` and `sleep`, which the model checker takes by path and would build again with them.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use pelton_core::{
    event::{Inbox, SubmitBatch},
    id::{ConnectionId, TenantId},
    limits::INBOX_SUBMIT_BATCHES_MAX,
};

use crate::{inbox::ShardInbox, linger::Linger, sleep::sleep, sync::RingDevice};

fn batch(bytes: usize) -> Box<SubmitBatch> {
    Box::new(SubmitBatch {
        connection: ConnectionId(0),
        ticket: 0,
        tenant: TenantId(0),
        notify: false,
        with_result: false,
        tasks: Vec::new(),
        bytes: vec![0; bytes],
        done: 0,
    })
}

#[test]
fn an_inbox_refuses_beyond_its_count_and_beyond_its_bytes() {
    let inbox = ShardInbox::new().unwrap();
    for _ in 0..INBOX_SUBMIT_BATCHES_MAX {
        inbox.push_submit(batch(1)).unwrap();
    }
    assert!(inbox.push_submit(batch(1)).is_err());
    empty(&inbox);
    let mut taken = 0;
    while inbox.push_submit(batch(8 << 20)).is_ok() {
        taken += 1;
    }
    assert_eq!(taken, 9, "the one that crosses the bound is the last");
    empty(&inbox);
    inbox.push_submit(batch(1)).unwrap();
}

fn empty(inbox: &ShardInbox) {
    while !inbox.is_empty() {
        inbox.gather(&mut Inbox::default());
    }
}

#[test]
fn a_shard_that_sleeps_in_its_ring_is_rung_for_every_batch_that_it_has_not_seen() {
    const BATCHES: usize = 50_000;
    const LONG: Duration = Duration::from_secs(5);
    let folder = tempfile::tempdir().unwrap();
    for most in [Duration::ZERO, Duration::from_micros(50)] {
        let inbox = Arc::new(ShardInbox::new().unwrap());
        let sender = Arc::clone(&inbox);
        let thread = thread::spawn(move || {
            for _ in 0..BATCHES {
                while sender.push_submit(batch(0)).is_err() {
                    thread::yield_now();
                }
                sender.wake();
            }
        });
        let mut ring = RingDevice::open(folder.path(), inbox.bell.fd()).unwrap();
        let mut linger = Linger::new(most);
        let mut turn = Inbox::default();
        let mut seen = 0;
        while seen < BATCHES {
            inbox.gather(&mut turn);
            seen += turn.submits.drain(..).count();
            let begun = Instant::now();
            if seen < BATCHES {
                sleep(&mut ring, &mut linger, &inbox, true, Some(begun + LONG));
            }
            assert!(
                begun.elapsed() < LONG,
                "a batch was left behind a sleeping shard"
            );
        }
        thread.join().unwrap();
    }
}
