//! Every kept input again, without the engine that found it, so that what it once found stays found.
#![expect(
    clippy::unwrap_used,
    reason = "a helper of a test fails as the test does"
)]

use std::{fs, panic::catch_unwind, path::Path};

use pelton_fuzz::{TARGETS, target};

fn replay(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let run = target(name).unwrap().run;
    let mut inputs = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let input = fs::read(&path).unwrap();
        if catch_unwind(|| run(&input)).is_err() {
            panic!("{name} broke on {}", path.display());
        }
        inputs += 1;
    }
    assert!(inputs > 0, "{} holds no input", folder.display());
}

#[test]
fn every_target_takes_its_kept_inputs() {
    for target in &TARGETS {
        replay(target.name);
    }
}

#[test]
fn every_target_takes_an_empty_input_and_one_byte() {
    for target in &TARGETS {
        (target.run)(&[]);
        for byte in 0..=255 {
            (target.run)(&[byte]);
        }
    }
}

#[test]
fn every_kept_corpus_belongs_to_a_target() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in fs::read_dir(corpora).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(target(&name).is_some(), "no target is named {name}");
    }
}
