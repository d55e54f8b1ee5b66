//! What the rules want to know of a `Cargo.toml`. Cargo itself says whether it is well formed.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    source::line_at,
    tree::{File, Tree},
};

const SECTIONS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

/// One member of the workspace, as its manifest and the root's describe it.
pub struct Manifest<'t> {
    pub path: &'t str,
    /// The package's name; empty if it has none.
    pub package: String,
    pub has_binary: bool,
    pub dependencies: Vec<Dependency>,
    /// Each cargo feature, its line and what it turns on.
    pub features: Vec<(String, usize, Vec<String>)>,
    /// Whether `version` and `lints` are taken from the workspace.
    pub inherits_version: bool,
    pub inherits_lints: bool,
}

/// One entry of any dependency table of a member, that of a target platform too.
pub struct Dependency {
    /// The package's real name, also where the workspace renames it.
    pub package: String,
    pub line: usize,
    pub from_workspace: bool,
    pub has_version: bool,
    pub optional: bool,
    /// What the member and the root turn on.
    pub features: Vec<String>,
}

/// The folders that the root manifest names as members.
pub fn member_folders(tree: &Tree) -> Vec<String> {
    let Some(root) = tree.file("Cargo.toml") else {
        return Vec::new();
    };
    let (root, _) = DeTable::parse_recoverable(&root.text);
    let members = table(root.get_ref(), "workspace").and_then(|w| w.get("members"));
    members.map_or(Vec::new(), |members| strings(members.get_ref()))
}

impl<'t> Manifest<'t> {
    pub fn of(tree: &'t Tree, file: &'t File) -> Manifest<'t> {
        let (parsed, _) = DeTable::parse_recoverable(&file.text);
        let top = parsed.get_ref();
        let package = table(top, "package");
        let (root, _) = DeTable::parse_recoverable(
            tree.file("Cargo.toml")
                .map_or("", |root| root.text.as_str()),
        );
        let shared = table(root.get_ref(), "workspace").and_then(|w| table(w, "dependencies"));

        let mut dependencies = Vec::new();
        let mut places = vec![top];
        if let Some(targets) = table(top, "target") {
            places.extend(targets.values().filter_map(|v| v.get_ref().as_table()));
        }
        for place in places {
            for (key, value) in SECTIONS.iter().filter_map(|s| table(place, s)).flatten() {
                let own = value.get_ref().as_table();
                let name = key.get_ref().as_ref();
                let shared = shared.and_then(|shared| table(shared, name));
                let described = [own, shared];
                let renamed = described
                    .iter()
                    .flatten()
                    .find_map(|d| d.get("package")?.get_ref().as_str());
                let features = described
                    .iter()
                    .flatten()
                    .filter_map(|d| d.get("features"))
                    .flat_map(|features| strings(features.get_ref()));
                dependencies.push(Dependency {
                    package: renamed.unwrap_or(name).to_owned(),
                    line: line_at(&file.text, key.span().start),
                    from_workspace: own.is_some_and(|own| is_true(own, "workspace")),
                    has_version: own.is_none_or(|own| own.contains_key("version")),
                    optional: own.is_some_and(|own| is_true(own, "optional")),
                    features: features.collect(),
                });
            }
        }

        let features = table(top, "features").into_iter().flatten();
        let folder = file.path.trim_end_matches("Cargo.toml");
        Manifest {
            path: &file.path,
            package: package
                .and_then(|p| p.get("name")?.get_ref().as_str())
                .unwrap_or_default()
                .to_owned(),
            has_binary: top.contains_key("bin")
                || tree.file(&format!("{folder}src/main.rs")).is_some(),
            dependencies,
            features: features
                .map(|(key, value)| {
                    let line = line_at(&file.text, key.span().start);
                    (key.get_ref().to_string(), line, strings(value.get_ref()))
                })
                .collect(),
            inherits_version: package
                .and_then(|p| table(p, "version"))
                .is_some_and(|version| is_true(version, "workspace")),
            inherits_lints: table(top, "lints").is_some_and(|lints| is_true(lints, "workspace")),
        }
    }
}

fn table<'a, 'i>(of: &'a DeTable<'i>, key: &str) -> Option<&'a DeTable<'i>> {
    of.get(key)?.get_ref().as_table()
}

fn is_true(of: &DeTable<'_>, key: &str) -> bool {
    of.get(key).and_then(|value| value.get_ref().as_bool()) == Some(true)
}

fn strings(of: &DeValue<'_>) -> Vec<String> {
    let text = |value: &Spanned<DeValue<'_>>| value.get_ref().as_str().map(str::to_owned);
    of.as_array()
        .map_or(Vec::new(), |array| array.iter().filter_map(text).collect())
}
