//! What has been fuzzed stays right: every input under `testdata/fuzz`, seeds and what was found, passes the check of its
//! target. The checks are those that `make fuzz` runs.

use std::{fs, panic::catch_unwind, path::Path};

use crate::checks::TARGETS;

#[test]
fn every_input_that_was_kept_passes_its_check() {
    let mut failed = Vec::new();
    for (target, check) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/fuzz").join(target);
        let mut inputs: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        inputs.sort();
        assert!(inputs.len() >= 10, "{target} has only {} seeds to begin with", inputs.len());
        for path in inputs {
            let input = fs::read(&path).unwrap();
            assert!(input.len() <= 8192, "{} is longer than what is fuzzed", path.display());
            // The panic's own words are in the output.
            if catch_unwind(|| check(&input)).is_err() {
                failed.push(format!("{target}/{}", path.file_name().unwrap().display()));
            }
        }
    }
    assert!(failed.is_empty(), "these inputs in testdata/fuzz fail: {failed:#?}");
}

#[test]
fn every_check_is_a_target() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let manifest = fs::read_to_string(package.join("Cargo.toml")).unwrap();
    let mut names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    for name in &names {
        assert!(
            manifest.contains(&format!("\nname = \"{name}\"\npath = \"targets/{name}.rs\"\n")),
            "{name}: Cargo.toml"
        );
        let target = fs::read_to_string(package.join(format!("targets/{name}.rs"))).unwrap();
        assert!(target.contains(&format!("checks::{name}::check(input)")), "{name}: {target}");
    }
    let mut files: Vec<String> = fs::read_dir(package.join("targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    files.sort();
    names.sort();
    assert_eq!(files, names);
}
