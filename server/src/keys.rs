//! Bearer keys: 256 random bits each, kept as their hash, with the tenants and the scopes that they cover.
//!
//! `DATA/keys.json` is replaced as a whole (written beside, flushed, renamed, the directory flushed) with mode 0600.
//! Edges read a shared copy; a change is seen by the next hello.

use std::{
    collections::BTreeSet,
    fmt, fs,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use pelton_core::id::name_is_valid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

const FILE: &str = "keys.json";
const SECRET_PREFIX: &str = "pelton_";

/// The tenants that a key covers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TenantSet {
    /// Every one.
    All,
    /// These.
    Named(BTreeSet<String>),
}

impl TenantSet {
    /// The set of these names; none means every tenant.
    pub fn parse(names: &[&str]) -> Result<TenantSet, String> {
        if names.is_empty() {
            return Ok(TenantSet::All);
        }
        if let Some(bad) = names.iter().find(|name| !name_is_valid(name)) {
            return Err(format!(
                "`{bad}` is no tenant name: a letter or '_', then letters, digits, '_' and '-', at most 128"
            ));
        }
        Ok(TenantSet::Named(
            names.iter().map(|&name| name.to_owned()).collect(),
        ))
    }
}

/// What a key may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Scopes(u8);

const NAMES: [(&str, u8); 4] = [("submit", 1), ("manage", 2), ("execute", 4), ("admin", 8)];

impl Scopes {
    /// Everything.
    pub fn all() -> Scopes {
        Scopes(15)
    }

    /// The scopes of these names; none means everything but `admin`.
    pub fn parse(names: &[&str]) -> Result<Scopes, String> {
        if names.is_empty() {
            return Ok(Scopes(7));
        }
        let mut bits = 0;
        for name in names {
            match NAMES.iter().find(|(known, _)| known == name) {
                Some((_, bit)) => bits |= bit,
                None => {
                    return Err(format!(
                        "`{name}` is no scope: submit, manage, execute or admin"
                    ));
                }
            }
        }
        Ok(Scopes(bits))
    }

    /// Submit tasks and ask about them.
    pub fn submit(self) -> bool {
        self.0 & 1 != 0
    }

    /// Stop tasks, make and change functions.
    pub fn manage(self) -> bool {
        self.0 & 2 != 0
    }

    /// Register functions and execute tasks.
    pub fn execute(self) -> bool {
        self.0 & 4 != 0
    }

    /// Tenants and keys.
    pub fn admin(self) -> bool {
        self.0 & 8 != 0
    }

    /// The names.
    pub fn names(self) -> Vec<&'static str> {
        let set = NAMES.iter().filter(|(_, bit)| self.0 & bit != 0);
        set.map(|(name, _)| *name).collect()
    }
}

/// Whom a key speaks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The tenants.
    pub tenants: TenantSet,
    /// The rights.
    pub scopes: Scopes,
}

/// A key as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Names the key; no secret.
    pub id: String,
    /// What its owner calls it.
    pub name: Option<String>,
    /// The tenants.
    pub tenants: TenantSet,
    /// The rights.
    pub scopes: Scopes,
    /// When it was made.
    pub created_ms: u64,
    /// SHA-256 of the secret, in hex.
    hash: String,
}

impl KeyInfo {
    /// As it is shown: without the hash.
    pub fn to_json(&self) -> Value {
        let tenants = match &self.tenants {
            TenantSet::All => Value::Null,
            TenantSet::Named(names) => json!(names),
        };
        json!({
            "key": self.id,
            "name": self.name,
            "tenants": tenants,
            "scopes": self.scopes.names(),
            "created_ms": self.created_ms,
        })
    }
}

/// A key that was just made. The secret is not kept: this is the only time to see it.
#[derive(Debug)]
pub struct NewKey {
    /// Names the key.
    pub id: String,
    /// What its owner says in the hello.
    pub secret: String,
}

/// Why the keys cannot be read or written.
#[derive(Debug)]
pub struct KeyError {
    path: PathBuf,
    what: String,
    /// The caller asked for what no key may have; nothing is wrong with the file.
    pub invalid: bool,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.invalid {
            return f.write_str(&self.what);
        }
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

impl std::error::Error for KeyError {}

/// The keys of a server.
#[derive(Debug)]
pub struct Keys {
    directory: PathBuf,
    keys: RwLock<Arc<Vec<KeyInfo>>>,
    /// Held while a change is written.
    writing: Mutex<()>,
}

impl Keys {
    /// Reads the keys of a data directory; there are none in a new one.
    pub fn open(directory: &Path) -> Result<Keys, KeyError> {
        let path = directory.join(FILE);
        let failed = |what: String| KeyError {
            path: path.clone(),
            what,
            invalid: false,
        };
        let keys = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| failed(format!("it is damaged: {error}")))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error.to_string())),
        };
        Ok(Keys {
            directory: directory.to_owned(),
            keys: RwLock::new(Arc::new(keys)),
            writing: Mutex::new(()),
        })
    }

    fn current(&self) -> Arc<Vec<KeyInfo>> {
        Arc::clone(&self.keys.read().unwrap_or_else(|held| held.into_inner()))
    }

    /// True while no key was made: then only clients on this machine are served, and need none.
    pub fn is_empty(&self) -> bool {
        self.current().is_empty()
    }

    /// Whom a secret speaks for. Takes as long for a wrong one as for a right one.
    pub fn authenticate(&self, secret: &str) -> Option<Identity> {
        let hash = hash_of(secret);
        let mut found = None;
        for key in self.current().iter() {
            if bool::from(key.hash.as_bytes().ct_eq(hash.as_bytes())) {
                found = Some(Identity {
                    tenants: key.tenants.clone(),
                    scopes: key.scopes,
                });
            }
        }
        found
    }

    /// Makes a key.
    pub fn create(
        &self,
        tenants: TenantSet,
        scopes: Scopes,
        name: Option<String>,
    ) -> Result<NewKey, KeyError> {
        if scopes.admin() && tenants != TenantSet::All {
            return Err(KeyError {
                path: self.directory.join(FILE),
                what: "a key that may administer makes keys for every tenant: leave its tenants out, or `admin`"
                    .to_owned(),
                invalid: true,
            });
        }
        let mut random = [0; 40];
        getrandom::fill(&mut random).expect("the kernel gives random numbers");
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        let id = format!("k{}", hex(&random[32..]));
        let secret = format!("{SECRET_PREFIX}{}", hex(&random[..32]));
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let key = KeyInfo {
            id: id.clone(),
            name,
            tenants,
            scopes,
            created_ms: since.map_or(0, |since| since.as_millis() as u64),
            hash: hash_of(&secret),
        };
        self.change(|keys| {
            keys.push(key);
            true
        })?;
        Ok(NewKey { id, secret })
    }

    /// The keys, oldest first.
    pub fn list(&self) -> Vec<KeyInfo> {
        self.current().to_vec()
    }

    /// Ends a key; false if there is none of that id. Sessions that began with it go on until they end.
    pub fn revoke(&self, id: &str) -> Result<bool, KeyError> {
        self.change(|keys| {
            let before = keys.len();
            keys.retain(|key| key.id != id);
            keys.len() < before
        })
    }

    fn change(&self, change: impl FnOnce(&mut Vec<KeyInfo>) -> bool) -> Result<bool, KeyError> {
        let _one = self.writing.lock().unwrap_or_else(|held| held.into_inner());
        let mut keys = self.list();
        if !change(&mut keys) {
            return Ok(false);
        }
        let text = serde_json::to_vec_pretty(&keys).expect("keys are plain data");
        replace(&self.directory, FILE, &text).map_err(|error| KeyError {
            path: self.directory.join(FILE),
            what: error.to_string(),
            invalid: false,
        })?;
        *self.keys.write().unwrap_or_else(|held| held.into_inner()) = Arc::new(keys);
        Ok(true)
    }
}

fn hash_of(secret: &str) -> String {
    let digest = Sha256::digest(secret.as_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Replaces a file of a directory as a whole, durably, readable by its owner only.
pub(crate) fn replace(directory: &Path, name: &str, text: &[u8]) -> io::Result<()> {
    let next = directory.join(format!("{name}.next"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&next)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&next, directory.join(name))?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_known_over_a_restart_until_it_is_revoked_and_its_secret_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        assert!(keys.is_empty());
        let tenants = TenantSet::parse(&["acme"]).unwrap();
        let scopes = Scopes::parse(&["submit", "execute"]).unwrap();
        let key = keys.create(tenants.clone(), scopes, None).unwrap();
        let file = folder.path().join(FILE);
        assert!(!fs::read_to_string(&file).unwrap().contains(&key.secret));
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );

        let keys = Keys::open(folder.path()).unwrap();
        let identity = keys.authenticate(&key.secret).unwrap();
        assert_eq!(identity, Identity { tenants, scopes });
        assert!(!identity.scopes.manage() && !identity.scopes.admin());
        assert_eq!(keys.authenticate(&key.secret[..key.secret.len() - 1]), None);
        assert!(!keys.revoke("k0").unwrap());
        assert!(keys.revoke(&key.id).unwrap());
        assert_eq!(keys.authenticate(&key.secret), None);
        assert!(Keys::open(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn wrong_names_are_refused_with_what_is_right() {
        assert!(
            TenantSet::parse(&["no spaces"])
                .unwrap_err()
                .contains("no spaces")
        );
        assert!(Scopes::parse(&["root"]).unwrap_err().contains("submit"));
    }
}
