//! The input: regular files of a folder, in a stable order, within what ten seconds can carry.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;

/// Files and their bytes that a run takes at most.
const FILES_MAX: usize = 2_000;
const BYTES_MAX: u64 = 64 << 20;
/// Folders that hold no input: what tools make, and what former runs left.
const LEFT_OUT: [&str; 2] = [".git", "target"];
pub const DATA_PREFIX: &str = "pelton-demo-data";

/// A file that is worked on.
pub struct Input {
    /// Where it is.
    pub path: PathBuf,
    /// What it held when the run began.
    pub bytes: Bytes,
}

/// What was found in a folder.
#[derive(Default)]
pub struct Inputs {
    /// What is worked on.
    pub files: Vec<Input>,
    /// What is not, and why.
    pub skipped: Vec<(PathBuf, String)>,
    /// There are more files than a run takes.
    pub cut: bool,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Inputs {
    /// Reads the folder. `data` is never looked into.
    pub fn collect(folder: &Path, data: &Path, payload_max: usize) -> io::Result<Inputs> {
        let data = data.canonicalize().ok();
        let mut inputs = Inputs::default();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                // The folder that was asked for must be there; one below it may be closed to us.
                Err(error) if inputs.is_new() && folders.is_empty() => return Err(error),
                Err(error) => {
                    inputs.skipped.push((folder, error.to_string()));
                    continue;
                }
            };
            let mut entries: Vec<_> = entries.filter_map(Result::ok).collect();
            entries.sort_by_key(fs::DirEntry::file_name);
            let mut below = Vec::new();
            for entry in entries {
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let path = entry.path();
                if kind.is_dir() {
                    let mine = data.is_some() && path.canonicalize().ok() == data;
                    let left_out =
                        LEFT_OUT.contains(&&*name) || name.starts_with(DATA_PREFIX) || mine;
                    if !left_out {
                        below.push(path);
                    }
                } else if kind.is_file() && !inputs.take(path, payload_max) {
                    inputs.cut = true;
                    return Ok(inputs);
                }
            }
            folders.extend(below.into_iter().rev());
        }
        Ok(inputs)
    }

    fn is_new(&self) -> bool {
        self.files.is_empty() && self.skipped.is_empty()
    }

    /// False if the run has enough.
    fn take(&mut self, path: PathBuf, payload_max: usize) -> bool {
        let length = match fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) => {
                self.skipped.push((path, error.to_string()));
                return true;
            }
        };
        if length > payload_max as u64 {
            let why = format!("{length} bytes, a payload has at most {payload_max}");
            self.skipped.push((path, why));
            return true;
        }
        if self.files.len() >= FILES_MAX || self.bytes + length > BYTES_MAX {
            return false;
        }
        match fs::read(&path) {
            Ok(bytes) if bytes.len() <= payload_max => {
                self.bytes += bytes.len() as u64;
                let bytes = bytes.into();
                self.files.push(Input { path, bytes });
            }
            Ok(_) => self.skipped.push((path, "it grows".to_owned())),
            Err(error) => self.skipped.push((path, error.to_string())),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_files_are_taken_in_order_and_large_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for below in [".git", "target", "b", "pelton-demo-data-1", "mine"] {
            fs::create_dir(at(below)).unwrap();
            fs::write(at(below).join("one"), below).unwrap();
        }
        fs::write(at("a"), "first").unwrap();
        fs::write(at("large"), [0; 100]).unwrap();
        let inputs = Inputs::collect(folder.path(), &at("mine"), 99).unwrap();
        let names: Vec<&Path> = inputs
            .files
            .iter()
            .map(|input| input.path.strip_prefix(folder.path()).unwrap())
            .collect();
        assert_eq!(names, [Path::new("a"), Path::new("b/one")]);
        assert_eq!(inputs.skipped.len(), 1);
        assert_eq!(inputs.skipped[0].0, at("large"));
        assert!(Inputs::collect(&at("nowhere"), &at("mine"), 99).is_err());
    }
}
