//! Trees that break a rule, written into a temporary directory and read back as the real one is.

use std::fs;

use expect_test::Expect;

use super::{Violation, tree::Tree};

/// Holds one rule against the given files and compares what it says.
pub fn fires(check: fn(&Tree) -> Vec<Violation>, files: &[(&str, &str)], expected: Expect) {
    let root = tempfile::tempdir().expect("a temporary directory");
    for (path, text) in files {
        let path = root.path().join(path);
        let folder = path.parent().expect("a file has a folder");
        fs::create_dir_all(folder).expect("the folder is made");
        fs::write(path, text).expect("the file is written");
    }
    let tree = Tree::read(root.path()).expect("the tree is read");
    let found: String = check(&tree)
        .iter()
        .map(|violation| format!("{violation}\n"))
        .collect();
    expected.assert_eq(&found);
}
