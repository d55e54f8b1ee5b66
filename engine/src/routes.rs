//! Where a task goes: the tenants and functions, and the shard of each cell. Edges read it without a lock behind an
//! epoch pointer; shard 0 replaces it when a change of configuration is logged everywhere.
//!
//! It is advice: a version that is a moment old costs balance or one more try, never correctness.

use std::sync::atomic::Ordering::*;

use crossbeam::epoch::{self, Atomic, Owned};
use pelton_core::{
    config::{Change, Directory, Function},
    id::{CellId, FunctionId, ShardId, TenantId, place, shard_of},
    limits::CELL_COUNT,
};

/// One immutable version of the routing table.
#[derive(Clone, Debug)]
pub struct Routes {
    /// Raised with every replacement.
    pub version: u64,
    /// Tenants and functions.
    pub directory: Directory,
    shards: u16,
    /// Cells that live elsewhere than the rule says, sorted. None yet: no cell has been moved.
    exceptions: Vec<(CellId, ShardId)>,
    /// Shards that are not served, sorted.
    unserved: Vec<ShardId>,
}

impl Routes {
    pub(crate) fn new(shards: u16, directory: Directory) -> Routes {
        Routes {
            version: 1,
            directory,
            shards,
            exceptions: Vec::new(),
            unserved: Vec::new(),
        }
    }

    /// The shard of a cell.
    pub fn shard_of(&self, cell: CellId) -> ShardId {
        match self.exceptions.binary_search_by_key(&cell, |entry| entry.0) {
            Ok(index) => self.exceptions[index].1,
            Err(_) => shard_of(cell, self.shards),
        }
    }

    /// The tenant with this name.
    pub fn tenant(&self, name: &str) -> Option<TenantId> {
        self.directory.tenant_id(name)
    }

    /// A function that takes tasks, by name.
    pub fn function(&self, tenant: TenantId, name: &str) -> Option<(FunctionId, &Function)> {
        let id = self.directory.function_id(tenant, name)?;
        let function = self.directory.function(id)?;
        function.live.then_some((id, function))
    }

    /// The cell of a function's tasks without key and name: its home, or where that is not served a cell of the next
    /// shard that is.
    pub fn home_of(&self, function: &Function) -> CellId {
        let home = function.home;
        let own = self.shard_of(home);
        if !self.unserved.contains(&own) {
            return home;
        }
        let turns = (1..self.shards).map(|turn| ShardId((own.0 + turn) % self.shards));
        let served = turns
            .into_iter()
            .find(|shard| !self.unserved.contains(shard));
        served.map_or(home, |shard| {
            let (cells, shards) = (u32::from(CELL_COUNT), u32::from(self.shards));
            let first = (u32::from(shard.0) * cells).div_ceil(shards);
            CellId((first + u32::from(home.0) % (cells / shards)) as u16)
        })
    }

    /// The cell of a task: that of its key, else of its name, else its function's home.
    pub fn cell_of(&self, function: &Function, key: &str, task_id: &str) -> CellId {
        let discriminator = if key.is_empty() { task_id } else { key };
        if discriminator.is_empty() {
            return self.home_of(function);
        }
        let tenant = self.directory.tenant(function.tenant);
        let tenant = tenant.map_or("", |tenant| tenant.name.as_str());
        place(tenant, &function.name, discriminator)
    }
}

/// The pointer to the current version.
#[derive(Debug)]
pub(crate) struct RoutePointer {
    current: Atomic<Routes>,
}

impl RoutePointer {
    pub(crate) fn new(routes: Routes) -> RoutePointer {
        RoutePointer {
            current: Atomic::new(routes),
        }
    }

    /// Runs `read` on the current version.
    pub(crate) fn with<R>(&self, read: impl FnOnce(&Routes) -> R) -> R {
        let guard = epoch::pin();
        let current = self.current.load(Acquire, &guard);
        // SAFETY: the pointer is never null, and a replaced version is freed only after every guard of its time is
        // gone. Covered by the test below and by valgrind.
        read(unsafe { current.deref() })
    }

    /// Applies changes of configuration. Only shard 0 calls this.
    pub(crate) fn publish(&self, changes: &[(u64, Change)]) {
        let mut next = self.with(Routes::clone);
        for (version, change) in changes {
            next.directory.apply(*version, change);
        }
        self.replace(next);
    }

    /// Replaces the directory, after a recovery that could not serve some shards.
    pub(crate) fn adopt(&self, directory: Directory, unserved: Vec<ShardId>) {
        let mut next = self.with(Routes::clone);
        next.directory = directory;
        next.unserved = unserved;
        self.replace(next);
    }

    fn replace(&self, mut next: Routes) {
        next.version += 1;
        let guard = epoch::pin();
        let old = self.current.swap(Owned::new(next), AcqRel, &guard);
        // SAFETY: no new reader can reach the old version any more.
        unsafe { guard.defer_destroy(old) };
    }
}

impl Drop for RoutePointer {
    fn drop(&mut self) {
        let current = std::mem::replace(&mut self.current, Atomic::null());
        // SAFETY: nobody else holds the pointer any more, and it is never null before this.
        drop(unsafe { current.into_owned() });
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use pelton_core::config::{FunctionConfig, TenantConfig};

    use super::*;

    #[test]
    fn every_cell_has_a_shard_and_shards_get_even_shares() {
        for shards in [1, 2, 3, 7, 64, 256] {
            let mut cells = vec![0; usize::from(shards)];
            for cell in 0..CELL_COUNT {
                cells[usize::from(shard_of(CellId(cell), shards).0)] += 1;
            }
            let (least, most) = (cells.iter().min().unwrap(), cells.iter().max().unwrap());
            assert!(
                most - least <= 1,
                "{shards} shards: {least} to {most} cells"
            );
        }
    }

    #[test]
    fn a_home_that_is_not_served_is_stood_in_for_by_a_served_one() {
        for shards in [1, 2, 3, 7, 64, 256] {
            let mut routes = Routes::new(shards, Directory::default());
            for home in (0..CELL_COUNT).map(CellId) {
                let function = Function {
                    tenant: TenantId(0),
                    name: "f".into(),
                    config: FunctionConfig::default(),
                    home,
                    live: true,
                };
                routes.unserved = Vec::new();
                assert_eq!(routes.home_of(&function), home);
                let own = routes.shard_of(home);
                let spared = ShardId((own.0 + shards / 2) % shards);
                for unserved in [
                    vec![own],
                    (0..shards).map(ShardId).filter(|s| *s != spared).collect(),
                ] {
                    routes.unserved = unserved;
                    let shard = routes.shard_of(routes.home_of(&function));
                    assert!(shards == 1 || !routes.unserved.contains(&shard));
                }
            }
        }
    }

    #[test]
    fn readers_see_whole_versions_while_they_are_replaced() {
        let pointer = Arc::new(RoutePointer::new(Routes::new(1, Directory::default())));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let pointer = Arc::clone(&pointer);
                thread::spawn(move || {
                    let mut last = 0;
                    while last < 500 {
                        let (version, tenants) =
                            pointer.with(|routes| (routes.version, routes.directory.version()));
                        assert!(version >= last && version == tenants + 1);
                        last = version;
                    }
                })
            })
            .collect();
        for version in 1..500 {
            let change = Change::Tenant {
                id: TenantId(0),
                name: "acme".into(),
                config: TenantConfig::default(),
            };
            pointer.publish(&[(version, change)]);
        }
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
