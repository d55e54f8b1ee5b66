//! Configure: shard 0 orders changes and numbers them, every shard logs each, and a change counts when all have.

use alloc::{boxed::Box, vec::Vec};

use crate::{
    config::{Change, OnFailure},
    event::{Control, Effects, Reply, Urgency},
    id::{FunctionId, ShardId},
    limits::NAME_BYTES_MAX,
    record::{BatchSpace, ConfigRecordV1, Schema, record_bytes},
    shard::{Carried, Fact, Shard},
};

impl Shard {
    /// Appends a change; it comes back if there is no room.
    pub(crate) fn append_change(
        &mut self,
        version: u64,
        change: Change,
        space: &mut BatchSpace<'_>,
    ) -> Option<Control> {
        if space.room() < record_bytes(NAME_BYTES_MAX) {
            return Some(Control::Apply { version, change });
        }
        space.append(Schema::Config, &ConfigRecordV1::new(version, &change));
        self.open.facts.push(Fact::Config {
            version,
            change: Box::new(change),
        });
        self.note(Urgency::Now);
        let shard = self.options.shard;
        if shard != ShardId(0) {
            self.open
                .edges
                .shards
                .push((ShardId(0), Control::Applied { shard, version }));
        }
        None
    }

    /// A change takes effect on this shard.
    pub(crate) fn apply_change(&mut self, version: u64, change: Change) {
        self.directory.apply(version, &change);
        match change {
            Change::Tenant { id, config, .. } => {
                self.queue_mut(id).waiting_max = config.waiting_max;
                self.robin.set_weight(id.0, config.weight);
            }
            Change::Function {
                id, tenant, config, ..
            } => {
                let lane = self.lane_mut(id, tenant);
                lane.tenant = tenant;
                let limit = lane.config.concurrency;
                lane.config = config;
                lane.live = true;
                self.limit_changed(id, limit, config.concurrency);
                if config.on_failure == OnFailure::Continue {
                    self.let_go_held_keys(id);
                }
                self.wake_lane(id);
            }
            Change::FunctionRemoved { id } => {
                if let Some(lane) = self.lanes.get_mut(id.0 as usize) {
                    lane.live = false;
                    let limit = lane.config.concurrency;
                    self.limit_changed(id, limit, 0);
                    self.let_go_held_keys(id);
                    if !self.replaying {
                        self.doom(id);
                    }
                }
            }
        }
    }

    fn let_go_held_keys(&mut self, function: FunctionId) {
        for index in 0..self.keys.used() {
            let key = &mut self.keys[index];
            if key.held && key.function == function {
                key.held = false;
                if self.replaying {
                    continue;
                }
                if key.members == 0 {
                    self.keys_by_hash.remove(key.hash);
                    self.keys.remove(index);
                } else {
                    self.advance_key(index);
                }
            }
        }
    }

    /// Shard 0: a wish whose changes are in every log is answered, whichever log was the last.
    pub(crate) fn carry_wishes(&mut self, effects: &mut Effects) {
        if let Some(carried) = &self.carried
            && carried.awaited == 0
            && carried
                .changes
                .iter()
                .all(|&(version, _)| version <= self.directory.version())
        {
            let carried = self.carried.take().expect("looked at above");
            effects.published.extend(carried.changes);
            let reply = (
                carried.connection,
                carried.ticket,
                Reply::Done { state: None },
            );
            effects.edge(carried.connection.edge()).replies.push(reply);
        }
    }

    /// Shard 0: begins the next wish if none is being carried out; and moves configuration out of dying segments.
    pub(crate) fn carry_config(&mut self, space: &mut BatchSpace<'_>) {
        while self.carried.is_none() {
            let Some((connection, ticket, wish)) = self.wishes.front() else {
                break;
            };
            let (connection, ticket) = (*connection, *ticket);
            if space.room() < 2 * record_bytes(NAME_BYTES_MAX) {
                return;
            }
            let planned = self.directory.plan(wish);
            self.wishes.pop_front();
            let refusal = match planned {
                Ok(changes) if !changes.is_empty() => {
                    let first = self.directory.version() + 1;
                    let changes: Vec<(u64, Change)> = (first..).zip(changes).collect();
                    for (version, change) in &changes {
                        for shard in 1..self.options.shards {
                            let control = Control::Apply {
                                version: *version,
                                change: change.clone(),
                            };
                            self.open.edges.shards.push((ShardId(shard), control));
                        }
                        let full = self.append_change(*version, change.clone(), space);
                        assert!(full.is_none(), "the room was looked at above");
                    }
                    let awaited = changes.len() * (usize::from(self.options.shards) - 1);
                    self.carried = Some(Carried {
                        connection,
                        ticket,
                        changes,
                        awaited,
                    });
                    continue;
                }
                Ok(_) => Reply::Done { state: None },
                Err(refusal) => Reply::Refused {
                    code: refusal.code,
                    what: refusal.what,
                },
            };
            self.after_flush(connection)
                .replies
                .push((connection, ticket, refusal));
            self.note(Urgency::Soon);
        }
        self.carry_config_forward(space);
    }

    /// Another shard has logged a change. One that is not of the wish being carried out was sent to a shard that was
    /// behind at the start, and nobody waits for it.
    pub(crate) fn change_reported(&mut self, version: u64) {
        if let Some(carried) = &mut self.carried
            && carried.changes.iter().any(|&(known, _)| known == version)
        {
            carried.awaited -= 1;
        }
    }

    /// Once the oldest segment holds nothing alive but configuration, all configuration is written anew, a stretch a
    /// step; when that is done, segments before the first of those records may go.
    fn carry_config_forward(&mut self, space: &mut BatchSpace<'_>) {
        const STRETCH: usize = 256;
        let here = self.segment_of(space.base);
        let (from, at) = match self.dump {
            Some(dump) => dump,
            None => {
                let waits = self.segments.len() > 2
                    && self.segments[0] == 0
                    && self.first_segment >= self.config_segment;
                if !waits {
                    return;
                }
                (here, 0)
            }
        };
        // A change on its way to the disk is not in the directory: what stands there would undo it.
        let settling = self
            .sealed
            .iter()
            .chain([&self.open])
            .flat_map(|pending| &pending.facts)
            .any(|fact| matches!(fact, Fact::Config { .. }));
        if settling {
            return;
        }
        let version = self.directory.version();
        let changes: Vec<Change> = self.directory.dump().skip(at).take(STRETCH).collect();
        for (done, change) in changes.iter().enumerate() {
            if space.room() < record_bytes(NAME_BYTES_MAX) {
                self.dump = Some((from, at + done));
                return;
            }
            space.append(Schema::Config, &ConfigRecordV1::new(version, change));
            self.open.facts.push(Fact::Config {
                version,
                change: Box::new(change.clone()),
            });
            self.note(Urgency::Soon);
        }
        if changes.len() == STRETCH {
            self.dump = Some((from, at + STRETCH));
        } else {
            self.dump = None;
            self.open.facts.push(Fact::ConfigComplete { segment: from });
            self.note(Urgency::Soon);
        }
    }
}
