//! The workspace's own lint: every dependency of a package is used by one of its targets.
//!
//! rustc's `unused_crate_dependencies` looks at one target at a time. It cannot judge the packages with many targets, whose
//! roots switch it off.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::suites::cargo;

/// The workspace's packages, as `cargo metadata` describes them.
fn packages() -> Result<Vec<Value>> {
    let text = cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).output()?;
    let metadata: Value = serde_json::from_str(&text).context("reading what `cargo metadata` prints")?;
    Ok(metadata["packages"].as_array().context("it names no packages")?.clone())
}

/// The dependencies of a package that none of its sources names.
fn unused(package: &Value) -> Result<Vec<String>> {
    let manifest = package["manifest_path"].as_str().context("a package without a manifest")?;
    let directory = Path::new(manifest).parent().context("a manifest without a directory")?;
    let mut sources = Vec::new();
    for folder in ["src", "suites", "tests"] {
        read(&directory.join(folder), &mut sources)?;
    }
    read_file(&directory.join("build.rs"), &mut sources)?;
    let names = package["dependencies"].as_array().into_iter().flatten();
    let names = names.filter_map(|dependency| dependency["rename"].as_str().or(dependency["name"].as_str()));
    Ok(names
        .filter(|name| !sources.iter().any(|text| has_word(text, &name.replace('-', "_"))))
        .map(str::to_owned)
        .collect())
}

/// Reads the sources below a folder, if it exists.
fn read(folder: &Path, sources: &mut Vec<String>) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            read(&path, sources)?;
        } else {
            read_file(&path, sources)?;
        }
    }
    Ok(())
}

fn read_file(path: &Path, sources: &mut Vec<String>) -> Result<()> {
    if path.is_file() && path.extension().is_some_and(|end| end == "rs") {
        sources.push(fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?);
    }
    Ok(())
}

fn has_word(text: &str, word: &str) -> bool {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_part) && !text[at + word.len()..].starts_with(is_part))
}

#[test]
fn every_dependency_is_used() {
    for package in packages().unwrap() {
        assert_eq!(unused(&package).unwrap(), Vec::<String>::new(), "unused dependencies of {}", package["name"]);
    }
}

#[test]
fn words_are_whole() {
    assert!(has_word("use bytes::Buf;", "bytes") && !has_word("let some_bytes = bytes_of();", "bytes"));
}
