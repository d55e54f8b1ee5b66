//! Wishes of the administrator, one at a time: tenants and functions are made, changed and deleted. What is confirmed is
//! in force on every shard, also after a restart.

use pelton_core::{
    config::{FunctionConfig, OnFailure, TenantConfig, Wish},
    error::Code,
    event::{Control, Reply},
    id::TenantId,
};
use pelton_storage::memory::Random;

use super::Question;
use crate::{
    oracle::{Check, Oracle, broken},
    swarm::Plan,
    world::{Happening, World, first_wishes, function_name, healed, tenant_name, unbounded},
};

/// A function's configuration, drawn.
pub(crate) fn draw_config(plan: &Plan, random: &mut Random) -> FunctionConfig {
    // Often fewer than there are shards.
    let concurrency = if random.one_in(2) {
        1 + random.below(u64::from(plan.shards) * 2) as u32
    } else {
        0
    };
    let backoff_ms_min = 1 + random.below(40) as u32;
    FunctionConfig {
        concurrency,
        retries: random.below(5) as u8,
        backoff_ms_min,
        backoff_ms_max: backoff_ms_min * (1 + random.below(8) as u32),
        max_age_s: if plan.short_ages && random.one_in(2) {
            1 + random.below(8) as u32
        } else {
            86_400
        },
        timeout_ms: if plan.long_timeouts {
            86_400_000
        } else {
            1_000 + random.below(2_000) as u32
        },
        on_failure: if random.one_in(4) {
            OnFailure::Hold
        } else {
            OnFailure::Continue
        },
        paused: random.one_in(12),
    }
}

impl World {
    /// The tenants and functions that everything else needs.
    pub(crate) fn set_up(&mut self) {
        self.administrator.wishes = first_wishes(&self.plan, &mut self.random);
        self.administer_in(1_000);
    }

    pub(crate) fn administer_in(&mut self, delay_ns: u64) {
        self.administrator.due_ns = Some(self.now_ns + delay_ns);
        self.after(delay_ns, Happening::Administers);
    }

    pub(crate) fn administers(&mut self) {
        if self.administrator.due_ns != Some(self.now_ns) {
            return;
        }
        self.administrator.due_ns = None;
        if !self.up || self.administrator.asking.is_some() {
            return;
        }
        if !self.serving() {
            self.administer_in(300_000);
            return;
        }
        let wish = match self.administrator.wishes.pop_front() {
            Some(wish) => wish,
            None if self.healing || self.handed_in == 0 => return,
            None => self.draw_wish(),
        };
        self.note_wish(&wish);
        let connection = match self.administrator.connection {
            Some(connection) => connection,
            None => {
                let connection = self.connect();
                self.administrator.connection = Some(connection);
                connection
            }
        };
        self.administrator.ticket += 1;
        let ticket = self.administrator.ticket;
        self.administrator.asking = Some(wish.clone());
        self.questions.insert(
            (connection, ticket),
            Question {
                tenant: TenantId(0),
                shard: 0,
                request: None,
                wish: true,
            },
        );
        self.trace.event(self.now_ns, &[25, ticket], || {
            format!("wish {ticket}: {wish:?}")
        });
        self.tell(
            0,
            Control::Configure {
                connection,
                ticket,
                wish,
            },
        );
    }

    pub(crate) fn draw_wish(&mut self) -> Wish {
        let tenant = tenant_name(self.random.below(self.plan.tenants as u64) as usize);
        let name = function_name(self.random.below(self.plan.functions as u64) as usize);
        match self.random.below(10) {
            0 if self.plan.deletions => Wish::RemoveFunction { tenant, name },
            1 | 2 => Wish::SetTenant {
                name: tenant,
                config: TenantConfig {
                    weight: 1 + self.random.below(5) as u16,
                    waiting_max: if self.plan.waiting_bounds && self.random.one_in(2) {
                        5 + self.random.below(100)
                    } else {
                        u64::from(u32::MAX)
                    },
                },
            },
            3 => Wish::EnsureFunction { tenant, name },
            _ => Wish::SetFunction {
                tenant,
                name,
                config: draw_config(&self.plan, &mut self.random),
            },
        }
    }

    pub(crate) fn note_wish(&mut self, wish: &Wish) {
        let (tenant, name, config) = match wish {
            Wish::SetFunction {
                tenant,
                name,
                config,
            } => (tenant, name, Some(*config)),
            Wish::EnsureFunction { tenant, name } => {
                (tenant, name, Some(FunctionConfig::default()))
            }
            Wish::RemoveFunction { tenant, name } => (tenant, name, None),
            Wish::SetTenant { .. } | Wish::EnsureTenant { .. } => return,
        };
        let key = (tenant.clone(), name.clone());
        let wished = self.oracle.wished.entry(key.clone()).or_default();
        match config {
            Some(config) => {
                wished.retries_max = wished.retries_max.max(config.retries);
                wished.max_age_s_min = wished.max_age_s_min.min(config.max_age_s);
            }
            None => wished.removed = true,
        }
        self.administrator.confirmed.remove(&key);
    }

    /// The confirmation of a wish leaves shard 0: every shard must have it by now, and what was confirmed before.
    pub(crate) fn wish_fulfilled(&mut self) -> Check {
        if let Some(Wish::SetFunction {
            tenant,
            name,
            config,
        }) = &self.administrator.asking
        {
            self.administrator
                .confirmed
                .insert((tenant.clone(), name.clone()), *config);
        }
        for (name, config) in &self.administrator.confirmed {
            for (index, host) in self
                .hosts
                .iter()
                .enumerate()
                .filter(|(_, host)| !host.poisoned)
            {
                let found = host.shard.directory();
                let id = found
                    .tenant_id(&name.0)
                    .and_then(|tenant| found.function_id(tenant, &name.1));
                let Some(id) = id else {
                    return broken(
                        "configuration_holds",
                        format!("shard {index}: {name:?} was confirmed and is not there"),
                    );
                };
                let found = found.function(id).map(|function| &function.config);
                Oracle::configuration(index, id, found, config)?;
            }
        }
        Ok(())
    }

    pub(crate) fn wish_answered(&mut self, reply: &Reply) {
        let Some(wish) = self.administrator.asking.take() else {
            return;
        };
        if let Reply::Refused {
            code: Code::Unavailable,
            ..
        } = reply
        {
            self.administrator.wishes.push_front(wish);
            self.administer_in(5_000_000);
            return;
        }
        let delay = if self.administrator.wishes.is_empty() && !self.healing {
            self.around(self.plan.pause_ns * 10)
        } else {
            self.around(100_000)
        };
        self.administer_in(delay);
    }

    pub(crate) fn administrator_lost(&mut self) {
        self.administrator.connection = None;
        if let Some(wish) = self.administrator.asking.take() {
            self.administrator.wishes.push_front(wish);
        }
    }

    pub(crate) fn heal_configuration(&mut self) {
        for tenant in 0..self.plan.tenants {
            self.administrator.wishes.push_back(Wish::SetTenant {
                name: tenant_name(tenant),
                config: unbounded(1),
            });
            for function in 0..self.plan.functions {
                let config = healed(&draw_config(&self.plan, &mut self.random));
                self.administrator.wishes.push_back(Wish::SetFunction {
                    tenant: tenant_name(tenant),
                    name: function_name(function),
                    config,
                });
            }
        }
        if self.administrator.asking.is_none() {
            self.administer_in(100_000);
        }
    }
}
