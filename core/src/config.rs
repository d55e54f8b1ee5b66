//! Tenants and functions: their configuration, its rules, and the directory that numbers them. Shard 0 orders the
//! changes; every shard logs each of them, so that its replay needs no other log.

use alloc::{
    collections::BTreeMap,
    string::{String, ToString},
    vec::Vec,
};

use crate::{
    error::Code,
    id::{CellId, FunctionId, TenantId, name_is_valid, place},
    limits::*,
};

/// What a tenant may do and how it shares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TenantConfig {
    /// Share in the round robin, 1..=1,000.
    pub weight: u16,
    /// Tasks that may wait on one shard; a submit beyond that is refused with `RESOURCE_EXHAUSTED`.
    pub waiting_max: u64,
}

impl Default for TenantConfig {
    fn default() -> TenantConfig {
        TenantConfig {
            weight: 1,
            waiting_max: u64::from(u32::MAX),
        }
    }
}

/// What happens to an ordering key when one of its tasks ends in failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum OnFailure {
    /// The next task of the key follows.
    #[default]
    Continue = 0,
    /// The key is held until the function is set to `Continue`.
    Hold = 1,
}

/// How a function's tasks are run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FunctionConfig {
    /// Tasks that may be beyond `Enqueued` at once, over all shards; 0 means no limit of its own.
    pub concurrency: u32,
    /// Retries after the first attempt, 0..=8.
    pub retries: u8,
    /// Wait before the first retry; doubles with each further one.
    pub backoff_ms_min: u32,
    /// The longest wait before a retry.
    pub backoff_ms_max: u32,
    /// Age at which a task that is not running expires, in seconds.
    pub max_age_s: u32,
    /// Time for one attempt.
    pub timeout_ms: u32,
    /// What a failure does to its ordering key.
    pub on_failure: OnFailure,
    /// A paused function accepts tasks and starts none.
    pub paused: bool,
}

impl Default for FunctionConfig {
    fn default() -> FunctionConfig {
        FunctionConfig {
            concurrency: 0,
            retries: RETRIES_DEFAULT,
            backoff_ms_min: 1_000,
            backoff_ms_max: 300_000,
            max_age_s: MAX_AGE_S_DEFAULT,
            timeout_ms: TIMEOUT_MS_DEFAULT as u32,
            on_failure: OnFailure::Continue,
            paused: false,
        }
    }
}

/// Why a change of configuration was refused: the code and a sentence that says what to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConfigRefusal {
    /// The numbered error.
    pub code: Code,
    /// What to do about it.
    pub what: &'static str,
}

fn require(holds: bool, what: &'static str) -> Result<(), ConfigRefusal> {
    if holds {
        Ok(())
    } else {
        Err(ConfigRefusal {
            code: Code::InvalidArgument,
            what,
        })
    }
}

impl TenantConfig {
    /// Checks every rule.
    pub fn check(&self) -> Result<(), ConfigRefusal> {
        require(
            (1..=WEIGHT_MAX).contains(&self.weight),
            "weight must be 1 to 1000",
        )?;
        require(self.waiting_max > 0, "waiting_max must be at least 1")
    }
}

impl FunctionConfig {
    /// Checks every rule.
    pub fn check(&self) -> Result<(), ConfigRefusal> {
        require(self.retries <= RETRIES_MAX, "retries must be 0 to 8")?;
        require(
            (1..=MAX_AGE_S_MAX).contains(&self.max_age_s),
            "max_age_s must be 1 to 604800",
        )?;
        let timeout = u64::from(self.timeout_ms);
        require(
            (TIMEOUT_MS_MIN..=TIMEOUT_MS_MAX).contains(&timeout),
            "timeout must be 1 s to 24 h",
        )?;
        require(self.backoff_ms_min > 0, "backoff_ms_min must be at least 1")?;
        require(
            self.backoff_ms_min <= self.backoff_ms_max,
            "backoff_ms_min must not exceed backoff_ms_max",
        )
    }
}

/// What a caller asks shard 0 to change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Make or change a tenant.
    SetTenant { name: String, config: TenantConfig },
    /// Make or change a function; its tenant is made where it is missing.
    SetFunction {
        tenant: String,
        name: String,
        config: FunctionConfig,
    },
    /// Make a function with the default configuration unless it is there: an executor registered it.
    EnsureFunction { tenant: String, name: String },
    /// Make a tenant with the default configuration unless it is there: it connected.
    EnsureTenant { name: String },
    /// Delete a function; its waiting tasks become `Invalid`.
    RemoveFunction { tenant: String, name: String },
}

/// One ordered change, as it stands in every shard's log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The tenant is now this.
    Tenant {
        id: TenantId,
        name: String,
        config: TenantConfig,
    },
    /// The function is now this.
    Function {
        id: FunctionId,
        tenant: TenantId,
        name: String,
        config: FunctionConfig,
    },
    /// The function is gone; its number is never used again.
    FunctionRemoved { id: FunctionId },
}

/// A tenant as the directory knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tenant {
    /// The name that callers use.
    pub name: String,
    /// Its configuration.
    pub config: TenantConfig,
}

/// A function as the directory knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Its tenant.
    pub tenant: TenantId,
    /// The name within the tenant.
    pub name: String,
    /// Its configuration.
    pub config: FunctionConfig,
    /// The cell of its unkeyed, unnamed tasks.
    pub home: CellId,
    /// False once it was removed.
    pub live: bool,
}

/// All tenants and functions by number and by name. A value: shards own one each and edges read a shared copy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Directory {
    version: u64,
    tenants: Vec<Tenant>,
    functions: Vec<Function>,
    tenants_by_name: BTreeMap<String, TenantId>,
    functions_by_name: BTreeMap<(TenantId, String), FunctionId>,
}

impl Directory {
    /// The number of changes applied.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Turns a wish into the changes that fulfil it, at most two (a tenant, then its function). No changes means that
    /// everything is so already.
    pub fn plan(&self, wish: &Wish) -> Result<Vec<Change>, ConfigRefusal> {
        let mut changes = Vec::new();
        match wish {
            Wish::SetTenant { name, config } => {
                require(
                    name_is_valid(name),
                    "a tenant's name must match [A-Za-z_][A-Za-z0-9_-]* and have at most 128 bytes",
                )?;
                config.check()?;
                let id = self
                    .tenant_id(name)
                    .unwrap_or(TenantId(self.tenants.len() as u32));
                if self
                    .tenant(id)
                    .is_none_or(|tenant| tenant.config != *config)
                {
                    changes.push(Change::Tenant {
                        id,
                        name: name.clone(),
                        config: *config,
                    });
                }
            }
            Wish::EnsureTenant { name } => {
                if self.tenant_id(name).is_none() {
                    return self.plan(&Wish::SetTenant {
                        name: name.clone(),
                        config: TenantConfig::default(),
                    });
                }
            }
            Wish::SetFunction {
                tenant,
                name,
                config,
            } => {
                changes = self.plan(&Wish::EnsureTenant {
                    name: tenant.clone(),
                })?;
                require(
                    name_is_valid(name),
                    "a function's name must match [A-Za-z_][A-Za-z0-9_-]* and have at most 128 bytes",
                )?;
                config.check()?;
                let tenant = self
                    .tenant_id(tenant)
                    .unwrap_or(TenantId(self.tenants.len() as u32));
                let known = self.function_id(tenant, name);
                let id = known.unwrap_or(FunctionId(self.functions.len() as u32));
                if known
                    .and_then(|id| self.function(id))
                    .is_none_or(|function| function.config != *config)
                {
                    changes.push(Change::Function {
                        id,
                        tenant,
                        name: name.clone(),
                        config: *config,
                    });
                }
            }
            Wish::EnsureFunction { tenant, name } => {
                let known = self
                    .tenant_id(tenant)
                    .and_then(|tenant| self.function_id(tenant, name));
                if known.is_none() {
                    let config = FunctionConfig::default();
                    return self.plan(&Wish::SetFunction {
                        tenant: tenant.clone(),
                        name: name.clone(),
                        config,
                    });
                }
            }
            Wish::RemoveFunction { tenant, name } => {
                let known = self
                    .tenant_id(tenant)
                    .and_then(|tenant| self.function_id(tenant, name));
                let Some(id) = known else {
                    return Err(ConfigRefusal {
                        code: Code::NotFound,
                        what: "there is no such function; `function ls` lists them",
                    });
                };
                changes.push(Change::FunctionRemoved { id });
            }
        }
        Ok(changes)
    }

    /// Applies a change. The same change applied twice leaves what it left the first time. A log whose beginning is
    /// gone may name numbers before the records that define them: those are empty until their record comes.
    pub fn apply(&mut self, version: u64, change: &Change) {
        match change {
            Change::Tenant { id, name, config } => {
                let tenant = self.tenant_entry(*id);
                tenant.name.clone_from(name);
                tenant.config = *config;
                self.tenants_by_name.insert(name.clone(), *id);
            }
            Change::Function {
                id,
                tenant,
                name,
                config,
            } => {
                let home = place(&self.tenant_entry(*tenant).name, name, "");
                *self.function_entry(*id) = Function {
                    tenant: *tenant,
                    name: name.to_string(),
                    config: *config,
                    home,
                    live: true,
                };
                self.functions_by_name.insert((*tenant, name.clone()), *id);
            }
            Change::FunctionRemoved { id } => {
                let function = self.function_entry(*id);
                function.live = false;
                let key = (function.tenant, function.name.clone());
                if self.functions_by_name.get(&key) == Some(id) {
                    self.functions_by_name.remove(&key);
                }
            }
        }
        self.version = self.version.max(version);
    }

    fn tenant_entry(&mut self, id: TenantId) -> &mut Tenant {
        let index = id.0 as usize;
        if self.tenants.len() <= index {
            self.tenants.resize_with(index + 1, || Tenant {
                name: String::new(),
                config: TenantConfig::default(),
            });
        }
        &mut self.tenants[index]
    }

    fn function_entry(&mut self, id: FunctionId) -> &mut Function {
        let index = id.0 as usize;
        if self.functions.len() <= index {
            self.functions.resize_with(index + 1, || Function {
                tenant: TenantId(0),
                name: String::new(),
                config: FunctionConfig::default(),
                home: CellId(0),
                live: false,
            });
        }
        &mut self.functions[index]
    }

    /// The changes that make an empty directory into this one, in an order in which they can be applied. Removed
    /// functions are part of it, because their numbers are.
    pub fn dump(&self) -> impl Iterator<Item = Change> + '_ {
        let tenants = self
            .tenants
            .iter()
            .enumerate()
            .map(|(index, tenant)| Change::Tenant {
                id: TenantId(index as u32),
                name: tenant.name.clone(),
                config: tenant.config,
            });
        let functions =
            self.functions
                .iter()
                .enumerate()
                .map(|(index, function)| Change::Function {
                    id: FunctionId(index as u32),
                    tenant: function.tenant,
                    name: function.name.clone(),
                    config: function.config,
                });
        let removed = self
            .functions
            .iter()
            .enumerate()
            .filter(|(_, function)| !function.live);
        tenants
            .chain(functions)
            .chain(removed.map(|(index, _)| Change::FunctionRemoved {
                id: FunctionId(index as u32),
            }))
    }

    /// The tenant's number.
    pub fn tenant_id(&self, name: &str) -> Option<TenantId> {
        self.tenants_by_name.get(name).copied()
    }

    /// The live function's number.
    pub fn function_id(&self, tenant: TenantId, name: &str) -> Option<FunctionId> {
        self.functions_by_name
            .get(&(tenant, name.to_string()))
            .copied()
    }

    /// The tenant with this number.
    pub fn tenant(&self, id: TenantId) -> Option<&Tenant> {
        self.tenants.get(id.0 as usize)
    }

    /// The function with this number, removed ones included.
    pub fn function(&self, id: FunctionId) -> Option<&Function> {
        self.functions.get(id.0 as usize)
    }

    /// All tenants by number.
    pub fn tenants(&self) -> &[Tenant] {
        &self.tenants
    }

    /// All functions by number, removed ones included.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fulfil(directory: &mut Directory, wish: Wish) -> usize {
        let changes = directory.plan(&wish).unwrap();
        for change in &changes {
            directory.apply(directory.version() + 1, change);
        }
        changes.len()
    }

    #[test]
    fn a_wish_makes_what_is_missing_and_nothing_twice() {
        let mut directory = Directory::default();
        let wish = Wish::EnsureFunction {
            tenant: "acme".into(),
            name: "digest".into(),
        };
        assert_eq!(fulfil(&mut directory, wish.clone()), 2);
        assert_eq!(fulfil(&mut directory, wish.clone()), 0);
        let gone = Wish::RemoveFunction {
            tenant: "acme".into(),
            name: "digest".into(),
        };
        assert_eq!(fulfil(&mut directory, gone.clone()), 1);
        assert_eq!(directory.plan(&gone).unwrap_err().code, Code::NotFound);
        assert_eq!(fulfil(&mut directory, wish), 1);
        assert_eq!(
            directory.function_id(TenantId(0), "digest"),
            Some(FunctionId(1)),
            "numbers are not used again"
        );
    }

    #[test]
    fn a_dump_rebuilds_the_directory() {
        let mut directory = Directory::default();
        for name in ["a", "b", "c"] {
            fulfil(
                &mut directory,
                Wish::EnsureFunction {
                    tenant: "t".into(),
                    name: name.into(),
                },
            );
        }
        fulfil(
            &mut directory,
            Wish::RemoveFunction {
                tenant: "t".into(),
                name: "b".into(),
            },
        );
        let mut again = Directory::default();
        for change in directory.dump() {
            again.apply(directory.version(), &change);
        }
        assert_eq!(again, directory);
    }

    #[test]
    fn rules_are_told() {
        let config = FunctionConfig {
            retries: 9,
            ..FunctionConfig::default()
        };
        let wish = Wish::SetFunction {
            tenant: "t".into(),
            name: "f".into(),
            config,
        };
        assert_eq!(
            Directory::default().plan(&wish).unwrap_err().what,
            "retries must be 0 to 8"
        );
    }
}
