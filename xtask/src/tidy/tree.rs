//! What the rules look at: the files below a root, read once, sorted by path.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    manifest::{Manifest, member_folders},
    source::Source,
};

/// Folders that hold nothing of the project's own text. Fixtures break rules on purpose.
const SKIPPED: [&str; 6] = [
    "target",
    "fixtures",
    "pelton-data",
    "node_modules",
    "__pycache__",
    ".git",
];

/// A snapshot of the repository, owned by one run of `tidy` and never changed.
pub struct Tree {
    pub root: PathBuf,
    pub files: Vec<File>,
}

/// One file. `text` is empty where no rule reads it; `source` is there for Rust only.
pub struct File {
    /// From the root, with `/`.
    pub path: String,
    pub text: String,
    pub source: Option<Source>,
}

impl Tree {
    pub fn read(root: &Path) -> io::Result<Tree> {
        let mut files = Vec::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(root.join(&folder))? {
                let entry = entry?;
                let path = folder.join(entry.file_name());
                let kind = entry.file_type()?;
                if kind.is_dir() && !SKIPPED.contains(&&*entry.file_name().to_string_lossy()) {
                    folders.push(path);
                } else if kind.is_file() {
                    files.push(File::read(root, &path)?);
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let root = root.to_path_buf();
        Ok(Tree { root, files })
    }

    /// Every Rust file with its text taken apart.
    pub fn rust(&self) -> impl Iterator<Item = (&File, &Source)> {
        self.files
            .iter()
            .filter_map(|file| Some((file, file.source.as_ref()?)))
    }

    /// Every document for readers: the README and all below `docs/`.
    pub fn documents(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| {
            file.path == "README.md" || file.path.starts_with("docs/") && file.path.ends_with(".md")
        })
    }

    pub fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// The manifests of the workspace's members; the root's own is not among them.
    pub fn members(&self) -> Vec<Manifest<'_>> {
        member_folders(self)
            .iter()
            .filter_map(|folder| self.file(&format!("{folder}/Cargo.toml")))
            .map(|file| Manifest::of(self, file))
            .collect()
    }
}

impl File {
    fn read(root: &Path, path: &Path) -> io::Result<File> {
        let name = path.to_string_lossy().replace('\\', "/");
        let read = [".rs", ".py", ".md", ".toml"]
            .iter()
            .any(|ending| name.ends_with(ending));
        let text = if read {
            fs::read_to_string(root.join(path))
                .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?
        } else {
            String::new()
        };
        let source = name.ends_with(".rs").then(|| Source::of(&text));
        Ok(File {
            path: name,
            text,
            source,
        })
    }
}
