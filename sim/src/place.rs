//! Another number of shards in the simulation: a restart writes what lives in the logs into new ones, as the engine does
//! (`engine/src/place.rs`), on new disks, which may fail meanwhile. The old ones are given up only when the new
//! ones have been read back.

use std::collections::BTreeSet;

use pelton_core::{
    clock::Now,
    id::{Lsn, RequestId},
    limits::BATCH_BYTES_MAX,
    moved::Tally,
    shard::{Options, Shard},
};
use pelton_storage::{
    device::DeviceOp,
    manifest::Manifest,
    memory::MemoryDevice,
    place::{Source, carry},
    recover::{RecoverError, inspect_records, inspect_with},
};

use crate::{
    coverage::Recovery,
    oracle::{Check, Violation, broken},
    world::World,
};

/// Shards at most.
const SHARDS_MAX: u64 = 4;

impl World {
    /// The next start has another number of shards.
    pub(crate) fn place(&mut self) -> Check {
        let old = self.manifest;
        let to = (u64::from(old.shards) + self.random.below(SHARDS_MAX - 1)) % SHARDS_MAX + 1;
        let mut disks = std::mem::take(&mut self.disks);
        let placed = self.place_on(&mut disks, to as u16);
        self.disks = disks;
        let Some((new, disks)) = placed? else {
            return Ok(());
        };
        self.trace.event(self.now_ns, &[12, to], || {
            format!("the tasks of {} shards are placed on {to}", old.shards)
        });
        self.counts.coverage.recovery(Recovery::Placed);
        self.manifest = new;
        self.plan.shards = new.shards;
        self.disks = disks;
        self.history.place(new.shards);
        self.oracle.place(new.shards);
        for worker in &mut self.workers {
            worker.place(new.shards);
        }
        Ok(())
    }

    /// The new disks; `None` if the old ones stay, which they do as they are.
    fn place_on(
        &mut self,
        disks: &mut [MemoryDevice],
        to: u16,
    ) -> Result<Option<(Manifest, Vec<MemoryDevice>)>, Violation> {
        let old = self.manifest;
        let mut shards = Vec::new();
        for (index, device) in disks.iter_mut().enumerate() {
            let options = self.shard_options(index);
            let mut shard = Shard::new(options);
            shard.keep_failures();
            let log = old.log(index as u16);
            self.oracle_reads(index, device)?;
            let read = inspect_records(&mut *device, log, &mut |position, schema, body| {
                shard.replay(position, schema, body).map_err(|_| ())
            });
            let report = read.map_err(|error| unreadable(index, &error))?;
            let mut known = Shard::new(options);
            inspect_with(&mut *device, log, &mut known)
                .map_err(|error| unreadable(index, &error))?;
            shards.push((shard, known, report.segments));
        }
        let last = shards.iter().map(|shard| shard.0.last_logged_ms()).max();
        let now = Now {
            mono_ns: 0,
            logged_ms: self.wall_ms().max(last.unwrap_or(0)),
        };
        let (mut before, mut held, mut pages) = (Tally::default(), 0, 0);
        for (index, (shard, known, _)) in shards.iter_mut().enumerate() {
            shard.start(now, self.history.through(index));
            before.add(shard.tally());
            pages = pages.max(shard.pages_end());
            if shard.may_hold_keys() {
                known.start(now, Lsn(0));
                held += known.tally().held_keys;
            }
        }
        if held > before.held_keys {
            self.counts.coverage.recovery(Recovery::NotPlaced);
            return Ok(None);
        }
        let lost = shards.iter().flat_map(|shard| shard.0.lost_failures());
        let lost: BTreeSet<RequestId> = lost.collect();
        let new = old.next(to, pages);
        let mut fresh: Vec<_> = (0..to)
            .map(|_| MemoryDevice::new(self.random.draw(), BATCH_BYTES_MAX))
            .collect();
        let fails = self.random.one_in(4);
        if fails {
            let device = &mut fresh[self.random.below(u64::from(to)) as usize];
            let kinds = DeviceOp::NAMES.len() as u64;
            match self.random.below(4) {
                0 => device.fail_next_write(),
                1 => device.fail_next_flush(),
                2 => device.limit_space(self.random.below(4 << 20) as usize),
                _ => {
                    let kind = DeviceOp::NAMES[self.random.below(kinds) as usize];
                    device.lose_power_at(kind, self.random.below(4) as u32);
                }
            }
        }
        let mut sources: Vec<_> = (0u16..)
            .zip(&mut *disks)
            .zip(&mut shards)
            .map(|((index, device), (shard, _, segments))| Source {
                device,
                options: old.log(index),
                shard,
                segments: *segments,
            })
            .collect();
        let logs = (0u16..).zip(&mut fresh);
        let logs = logs.map(|(index, device)| (device, new.log(index)));
        let carried = carry(&mut sources, logs.collect(), &mut |_, _| {});
        drop(sources);
        if let Err(error) = carried {
            if !fails {
                broken("placing_works_on_sound_disks", error.to_string())?;
            }
            self.counts.coverage.recovery(Recovery::PlacingFailed);
            return Ok(None);
        }
        // The power fails now: what was written is on them.
        let mut after = Tally::default();
        for (index, device) in fresh.iter_mut().enumerate() {
            device.crash();
            device.limit_space(usize::MAX);
            let mut shard = Shard::new(Options {
                shards: to,
                first_page: new.first_page,
                page_shift: new.page_shift,
                finished_max: u32::MAX,
                finished_bytes_max: u64::MAX,
                ..self.shard_options(index)
            });
            inspect_with(&mut *device, new.log(index as u16), &mut shard)
                .map_err(|error| unreadable(index, &error))?;
            shard.start(now, Lsn(0));
            shard.audit();
            after.add(shard.tally_without(&lost));
        }
        if after != before {
            broken(
                "placing_loses_nothing",
                format!("{before:?} became {after:?}"),
            )?;
        }
        Ok(Some((new, fresh)))
    }
}

impl World {
    /// What became durable as the power failed is known to nobody else yet.
    fn oracle_reads(&mut self, index: usize, device: &mut MemoryDevice) -> Check {
        let oracle = &mut self.oracle;
        oracle.recovery_begins(index);
        let mut seen = Ok(());
        let log = self.manifest.log(index as u16);
        let read = inspect_records(device, log, &mut |position, schema, body| {
            if seen.is_ok() {
                seen = oracle.record(index, position, schema, body);
            }
            Ok(())
        });
        seen?;
        read.map_err(|error| unreadable(index, &error))?;
        self.oracle.recovery_ends(index)
    }
}

fn unreadable(shard: usize, error: &RecoverError) -> Violation {
    Violation {
        invariant: "a_crash_is_no_corruption",
        sentence: format!("shard {shard}, to be placed or just placed: {error}"),
    }
}
