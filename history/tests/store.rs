//! The store on a real disk: rows come back by identity, name, state, tag, prefix and time, in one order, over restarts,
//! until they are too old or too many.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, ops::ControlFlow};

use pelton_core::{
    error::Code,
    id::{CellId, FunctionId, Lsn, RequestId, SlotIndex, TenantId, Token},
    state::State,
};
use pelton_history::{Batch, Filter, Limits, Row, Store, StoreError, count_rows, store::FILE_NAME};

const EVER: Limits = Limits {
    retention_ms: u64::MAX,
    bytes_max: u64::MAX,
};
const START_MS: u64 = 1_790_000_000_000;

/// A row by its number; every third one has a name, every fifth a tag, every seventh has failed.
struct Made {
    n: u64,
    tenant: TenantId,
    accepted_ms: u64,
    ended_ms: u64,
    name: String,
    tags: Vec<u8>,
    payload: Vec<u8>,
}

fn made(n: u64) -> Made {
    // Accepted in bursts over a minute, and some of them long before.
    let accepted_ms = START_MS + n / 10 * 37 - if n.is_multiple_of(97) { 40_000_000 } else { 0 };
    Made {
        n,
        tenant: TenantId((n % 2) as u32),
        accepted_ms,
        ended_ms: START_MS + n * 5,
        name: if n.is_multiple_of(3) {
            format!("order-{}", n / 10)
        } else {
            String::new()
        },
        tags: if n.is_multiple_of(5) {
            b"\x03a=b\x01c".to_vec()
        } else {
            Vec::new()
        },
        payload: n
            .to_string()
            .repeat(if n.is_multiple_of(400) { 30_000 } else { 20 })
            .into_bytes(),
    }
}

impl Made {
    fn request(&self) -> RequestId {
        RequestId::new(
            CellId((self.n % 4096) as u16),
            self.accepted_ms,
            self.n,
            SlotIndex(3),
        )
    }

    fn row(&self) -> Row<'_> {
        Row {
            request: self.request(),
            tenant: self.tenant,
            state: if self.n.is_multiple_of(7) {
                State::Failed
            } else {
                State::Succeeded
            },
            function: FunctionId((self.n % 4) as u32),
            token: Token {
                generation: 0,
                attempt: 2,
            },
            retries: 1,
            ended_ms: self.ended_ms,
            code: if self.n.is_multiple_of(7) {
                Code::Internal
            } else {
                Code::Ok
            },
            damaged: false,
            task_id: &self.name,
            key: "",
            content_type: "text/plain",
            traceparent: "",
            tags: &self.tags,
            payload: &self.payload,
            error: "",
            output: b"",
            result: b"done",
        }
    }
}

fn write(store: &Store, numbers: impl IntoIterator<Item = u64>, may_be_there: bool) {
    let mut batch = Batch::default();
    for n in numbers {
        batch.push(&made(n).row(), may_be_there);
    }
    batch.saves(1, Lsn(batch.len() as u64));
    store.write(&mut batch).unwrap();
    assert!(batch.is_empty());
}

fn all<'a>() -> Filter<'a> {
    Filter {
        state: None,
        function: None,
        prefix: "",
        tag: "",
        before: u128::MAX,
        after: 0,
        limit: 100,
    }
}

/// Every page of a list.
fn listed(store: &Store, tenant: TenantId, filter: Filter<'_>) -> Vec<RequestId> {
    let mut found = Vec::new();
    let mut before = filter.before;
    loop {
        let part = Filter { before, ..filter };
        let mut rows = 0;
        let page = store
            .list(tenant, &part, |row| {
                found.push(row.request);
                rows += 1;
            })
            .unwrap();
        assert!(rows <= filter.limit && page.damaged == 0);
        if page.floor == 0 {
            return found;
        }
        before = page.floor;
    }
}

fn expected(
    tenant: TenantId,
    numbers: impl Iterator<Item = u64>,
    takes: impl Fn(&Row<'_>) -> bool,
) -> Vec<RequestId> {
    let made: Vec<Made> = numbers.map(made).collect();
    let rows = made.iter().map(Made::row);
    let mut found: Vec<RequestId> = rows
        .filter(|row| row.tenant == tenant && takes(row))
        .map(|row| row.request)
        .collect();
    found.sort_by_key(|request| std::cmp::Reverse(request.order()));
    found
}

#[test]
fn rows_are_found_by_everything_that_is_indexed_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), 7).unwrap();
    for part in 0..4 {
        write(&store, part * 500..part * 500 + 500, false);
    }
    // Some of them once more: the same rows are the same rows.
    write(&store, 1_900..2_000, true);
    for restart in [false, true] {
        if restart {
            drop(store);
            store = Store::open(folder.path(), 7).unwrap();
        }
        assert_eq!(store.saved(1).unwrap(), Lsn(100));
        assert_eq!(store.saved(2).unwrap(), Lsn(0));
        let stats = store.stats().unwrap();
        assert_eq!(
            (stats.rows, stats.oldest_ms),
            (2_000, made(499).ended_ms.min(stats.oldest_ms))
        );
        for n in [0, 1, 97, 400, 1_999] {
            let made = made(n);
            let check = |row: &Row<'_>| assert_eq!(*row, made.row());
            assert!(
                store
                    .get(made.tenant, made.request(), check)
                    .unwrap()
                    .is_some()
            );
            let other = TenantId(1 - made.tenant.0);
            assert!(store.get(other, made.request(), |_| ()).unwrap().is_none());
        }
        for tenant in [TenantId(0), TenantId(1)] {
            let all_of = |filter, takes: &dyn Fn(&Row<'_>) -> bool| {
                let wanted = expected(tenant, 0..2_000, takes);
                assert!(!wanted.is_empty());
                assert_eq!(listed(&store, tenant, filter), wanted);
            };
            all_of(all(), &|_| true);
            let state = Some(State::Failed);
            all_of(Filter { state, ..all() }, &|row| row.state == State::Failed);
            let function = FunctionId(tenant.0);
            all_of(
                Filter {
                    function: Some(function),
                    ..all()
                },
                &|row| row.function == function,
            );
            all_of(Filter { tag: "c", ..all() }, &|row| row.has_tag(b"c"));
            all_of(
                Filter {
                    tag: "a=b",
                    state,
                    ..all()
                },
                &|row| row.has_tag(b"a=b") && row.state == State::Failed,
            );
            all_of(
                Filter {
                    prefix: "order-1",
                    limit: 7,
                    ..all()
                },
                &|row| row.task_id.starts_with("order-1"),
            );
            let (after, before) = (
                RequestId::order_at(START_MS + 1_000) - 1,
                RequestId::order_at(START_MS + 3_000),
            );
            all_of(
                Filter {
                    after,
                    before,
                    limit: 13,
                    ..all()
                },
                &|row| row.request.order() > after && row.request.order() < before,
            );
            assert!(listed(&store, tenant, Filter { tag: "d", ..all() }).is_empty());
            assert!(listed(&store, TenantId(5), all()).is_empty());
        }
        // The last one of a name, within its function.
        let wanted = expected(TenantId(0), 0..2_000, |row| {
            row.task_id == "order-54" && row.function == FunctionId(2)
        });
        let found = store.find(TenantId(0), FunctionId(2), "", "order-54", |row| {
            row.request
        });
        assert_eq!(found.unwrap(), wanted.first().copied());
        let none = store.find(TenantId(0), FunctionId(2), "key", "order-54", |_| ());
        assert!(none.unwrap().is_none());
    }
}

#[test]
fn rows_go_when_they_are_too_old_or_too_many_and_nothing_of_them_stays() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), 7).unwrap();
    for part in 0..10 {
        write(&store, part * 100..part * 100 + 100, false);
    }
    assert!(!store.expire(START_MS, |_| EVER).unwrap());
    assert_eq!(store.stats().unwrap().rows, 1_000);
    let limits = Limits {
        retention_ms: 1_000,
        ..EVER
    };
    // What ended in the first half is more than a second old.
    let now_ms = START_MS + 500 * 5 + 1_000;
    let of_first = |tenant: TenantId| if tenant.0 == 0 { limits } else { EVER };
    while store.expire(now_ms, of_first).unwrap() {}
    let kept = listed(&store, TenantId(0), all());
    assert_eq!(kept, expected(TenantId(0), 500..1_000, |_| true));
    let named = listed(&store, TenantId(0), Filter { tag: "c", ..all() });
    assert_eq!(
        named,
        expected(TenantId(0), 500..1_000, |row| row.has_tag(b"c"))
    );
    assert_eq!(
        listed(&store, TenantId(1), all()).len(),
        500,
        "another tenant's stay"
    );
    let stats = store.stats().unwrap();
    assert_eq!(stats.rows, 750);

    let few = Limits {
        bytes_max: 100_000,
        ..EVER
    };
    while store.expire(now_ms, |_| few).unwrap() {}
    let stats = store.stats().unwrap();
    assert!(stats.bytes <= 200_000 && stats.rows > 100, "{stats:?}");
    // The newest of each are left.
    for tenant in [TenantId(0), TenantId(1)] {
        let kept = listed(&store, tenant, all());
        let newest = expected(tenant, 990..1_000, |_| true);
        assert!(newest.iter().all(|request| kept.contains(request)));
    }
    let none = Limits {
        bytes_max: 0,
        ..EVER
    };
    while store.expire(now_ms, |_| none).unwrap() {}
    assert_eq!(store.stats().unwrap(), Default::default());
    // Numbers begin again, and all works as before.
    write(&store, 0..10, false);
    assert_eq!(store.stats().unwrap().rows, 10);
}

#[test]
fn another_generation_of_shards_begins_with_no_position_and_all_rows() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), 7).unwrap();
    write(&store, 0..100, false);
    store.enter(1).unwrap();
    assert_eq!(store.saved(1).unwrap(), Lsn(100), "the first one");
    store.enter(2).unwrap();
    assert_eq!(store.saved(1).unwrap(), Lsn(0));
    assert_eq!(store.stats().unwrap().rows, 100);
    // Shards of the new generation hand over what they have, and a start in it forgets nothing.
    write(&store, 90..110, true);
    drop(store);
    let store = Store::open(folder.path(), 7).unwrap();
    store.enter(2).unwrap();
    assert_eq!(store.saved(1).unwrap(), Lsn(20));
    assert_eq!(store.stats().unwrap().rows, 110);
}

#[test]
fn a_store_of_another_directory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    drop(Store::open(folder.path(), 7).unwrap());
    let error = Store::open(folder.path(), 8).unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("move it away"));
}

#[test]
fn a_damaged_block_costs_its_rows_alone() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), 7).unwrap();
    for part in 0..20 {
        write(&store, part * 1_000..part * 1_000 + 1_000, false);
    }
    drop(store);
    let path = folder.path().join("rows.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    // One bit in the payload of a row in the middle.
    let needle = made(10_123).payload;
    let at = bytes
        .windows(needle.len())
        .position(|part| part == needle)
        .unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let store = Store::open(folder.path(), 7).unwrap();
    let made = made(10_123);
    assert!(
        store
            .get(made.tenant, made.request(), |_| ())
            .unwrap()
            .is_none()
    );
    let mut damaged = 0;
    let mut states: BTreeMap<u8, usize> = BTreeMap::new();
    let mut before = u128::MAX;
    loop {
        let filter = Filter {
            before,
            limit: 1_000,
            ..all()
        };
        let page = store
            .list(made.tenant, &filter, |row| {
                *states.entry(row.state as u8).or_default() += 1
            })
            .unwrap();
        damaged += page.damaged;
        before = page.floor;
        if before == 0 {
            break;
        }
    }
    let found: usize = states.values().sum();
    assert!(damaged >= 1, "it is said");
    assert!((9_000..10_000).contains(&found), "{found} rows are left");
}

#[test]
fn a_copy_has_what_there_was_when_it_was_settled_and_ends_when_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), 7).unwrap();
    write(&store, 0..2_000, false);
    let target = folder.path().join("copy");
    std::fs::create_dir(&target).unwrap();
    let go_on = ControlFlow::Continue(());
    let mut bytes = 0;
    let settled = || {
        // What is written from here on is not in the copy.
        write(&store, 2_000..3_000, false);
        go_on
    };
    let rows = store
        .copy(&target.join(FILE_NAME), settled, &mut |more| {
            bytes += more;
            go_on
        })
        .unwrap();
    assert_eq!(rows, Some(2_000));
    assert!(bytes > 500_000 && bytes <= 2 * store.file_bytes().unwrap());
    assert_eq!(count_rows(&target, 7).unwrap(), 2_000);
    assert!(matches!(
        count_rows(&target, 8),
        Err(StoreError::Foreign { .. })
    ));
    let copy = Store::open(&target, 7).unwrap();
    assert_eq!(copy.saved(1).unwrap(), Lsn(2_000));
    for tenant in [TenantId(0), TenantId(1)] {
        let wanted = expected(tenant, 0..2_000, |_| true);
        assert_eq!(listed(&copy, tenant, all()), wanted);
        let tag = Filter { tag: "c", ..all() };
        let wanted = expected(tenant, 0..2_000, |row| row.has_tag(b"c"));
        assert_eq!(listed(&copy, tenant, tag), wanted);
    }
    // Rows go from the copy as they do from the store.
    while copy
        .expire(u64::MAX, |_| Limits {
            retention_ms: 1,
            ..EVER
        })
        .unwrap()
    {}
    assert_eq!(copy.stats().unwrap().rows, 0);

    let ended = store.copy(
        &folder.path().join("no"),
        || ControlFlow::Break(()),
        &mut |_| go_on,
    );
    assert_eq!(ended.unwrap(), None);
    let ended = store.copy(&folder.path().join("part"), || go_on, &mut |_| {
        ControlFlow::Break(())
    });
    assert_eq!(ended.unwrap(), None);
    // Whoever closes the store does not wait for a copy.
    std::thread::scope(|scope| {
        let (copies, begun) = std::sync::mpsc::channel();
        let store = &store;
        let path = folder.path().join("closed");
        let copy = scope.spawn(move || {
            store.copy(&path, || go_on, &mut |_| {
                let _ = copies.send(());
                while !store.is_closing() {
                    std::thread::yield_now();
                }
                go_on
            })
        });
        begun.recv().unwrap();
        store.close();
        assert_eq!(copy.join().unwrap().unwrap(), None);
    });
}
