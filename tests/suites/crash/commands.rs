//! Commands that only write files: killed at each point, and with a full disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use lab::sites::binary;
use tempfile::TempDir;

use crate::rig::FAULT;

const INIT: [&str; 7] = [
    "init",
    "--a-endpoint=10.2.3.4",
    "--b-endpoint=10.5.6.7",
    "--a-prefix=10.10.0.0/16",
    "--b-prefix=10.20.0.0/16",
    "--tunnels=2",
    "--output=sites",
];
const PREPARE: [&str; 6] = ["-c", "sites/site-a/ecmpvpn.toml", "rotate", "--prepare", "--output", "for-b"];
const APPLY: [&str; 5] = ["-c", "sites/site-b/ecmpvpn.toml", "rotate", "--apply", "for-b"];

/// Number of files that `init` writes for a site.
const OF_INIT: usize = 3;

/// A folder in which commands run, and the folder of their orders.
struct Place {
    folder: TempDir,
    faults: TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, faults: tempfile::tempdir()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a command under an order.
    fn run(&self, words: &[&str], order: &str) -> Result<Output> {
        let _ = fs::remove_file(self.faults.path().join("points"));
        fs::write(self.faults.path().join("order"), order)?;
        let mut command = Command::new(binary()?);
        command.args(words).current_dir(self.folder.path()).env(FAULT, self.faults.path()).stdin(Stdio::null());
        Ok(command.output()?)
    }

    /// Runs a command that must succeed.
    fn done(&self, words: &[&str]) -> Result<String> {
        let ended = self.run(words, "count")?;
        let complaint = String::from_utf8_lossy(&ended.stderr).into_owned();
        ensure!(ended.status.success(), "{words:?} ended with {}: {complaint}", ended.status);
        Ok(complaint)
    }

    /// The points that the last command passed.
    fn points(&self) -> Result<Vec<String>> {
        let points = fs::read_to_string(self.faults.path().join("points")).unwrap_or_default();
        ensure!(!points.is_empty(), "this build of ecmpvpn has no fault points: build it with debug assertions");
        Ok(points.lines().map(str::to_owned).collect())
    }

    /// All files and their contents.
    fn content(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut found = BTreeMap::new();
        read_below(self.folder.path(), &mut found)?;
        Ok(found)
    }

    /// Checks that nothing differs from `before`.
    fn assert_same(&self, before: &BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
        let now = self.content()?;
        let names = |of: &BTreeMap<PathBuf, Vec<u8>>, other: &BTreeMap<PathBuf, Vec<u8>>| -> Vec<String> {
            let differ = of.iter().filter(|(name, content)| other.get(*name) != Some(content));
            differ.map(|(name, _)| name.display().to_string()).collect()
        };
        ensure!(now == *before, "before {:?}, now {:?}", names(before, &now), names(&now, before));
        Ok(())
    }
}

fn read_below(folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.insert(path.clone(), Vec::new());
            read_below(&path, found)?;
        } else {
            found.insert(path.clone(), fs::read(&path)?);
        }
    }
    Ok(())
}

fn each_kill(before: &[&[&str]], words: &[&str], check: impl Fn(&Place) -> Result<()>) -> Result<()> {
    let begin = || -> Result<Place> {
        let place = Place::new()?;
        before.iter().try_for_each(|words| place.done(words).map(drop))?;
        Ok(place)
    };
    let place = begin()?;
    place.done(words)?;
    let points = place.points()?;
    for (number, point) in (1..).zip(&points) {
        let place = begin()?;
        let ended = place.run(words, &format!("kill {number}"))?;
        ensure!(ended.status.code().is_none(), "{words:?} was not killed at point {number}: {}", ended.status);
        check(&place).with_context(|| format!("{words:?} killed at point {number} ({point})"))?;
    }
    eprintln!("  {}: {} kills", words.join(" "), points.len());
    Ok(())
}

pub fn killed_commands_leave_no_half_files() -> Result<()> {
    each_kill(&[], &INIT, |place| {
        // A whole folder of the first site may be there.
        let _ = fs::remove_dir_all(place.path("sites/site-a"));
        place.done(&INIT)?;
        let left: Vec<_> = fs::read_dir(place.path("sites"))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.len() == 2, "{left:?}");
        Ok(())
    })?;
    each_kill(&[&INIT], &PREPARE, |place| {
        place.done(&["-c", "sites/site-a/ecmpvpn.toml", "rotate", "--abort"])?;
        let now: Vec<_> = fs::read_dir(place.path("sites/site-a"))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(now.len() == OF_INIT && !place.path("for-b").exists(), "{now:?} after --abort");
        place.done(&PREPARE).map(drop)
    })?;
    each_kill(&[&INIT, &PREPARE], &APPLY, |place| {
        // It can be repeated, and given up after that.
        place.done(&APPLY)?;
        let text = fs::read_to_string(place.path("sites/site-b/ecmpvpn.rotation.json"))?;
        for name in ["wg0-", "wg1-"] {
            let files: Vec<_> = fs::read_dir(place.path("sites/site-b"))?.flatten().map(|e| e.file_name()).collect();
            let keys: Vec<_> = files.iter().filter(|file| file.to_string_lossy().starts_with(name)).collect();
            ensure!(keys.len() == 1 && text.contains(&*keys[0].to_string_lossy()), "{files:?}");
        }
        place.done(&["-c", "sites/site-b/ecmpvpn.toml", "rotate", "--abort"])?;
        let now: Vec<_> = fs::read_dir(place.path("sites/site-b"))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(now.len() == OF_INIT, "{now:?} after --abort");
        Ok(())
    })
}

pub fn a_full_disk_leaves_no_half_files() -> Result<()> {
    let commands: [(&[&[&str]], &[&str]); 3] = [(&[], &INIT), (&[&INIT], &PREPARE), (&[&INIT, &PREPARE], &APPLY)];
    for (before, words) in commands {
        for (errno, what, advice) in
            [(28, "No space left on device", "free some space"), (30, "Read-only file system", "mount it writable")]
        {
            let mut number = 1;
            loop {
                let place = Place::new()?;
                before.iter().try_for_each(|words| place.done(words).map(drop))?;
                let content = place.content()?;
                let ended = place.run(words, &format!("full {number} {errno}"))?;
                let complaint = String::from_utf8_lossy(&ended.stderr).into_owned();
                if ended.status.success() {
                    break;
                }
                let occasion = || format!("{words:?}, write {number} fails with {errno}");
                ensure!(ended.status.code() == Some(1), "{}: {}: {complaint}", occasion(), ended.status);
                let is_one = complaint.lines().count() == 1;
                ensure!(
                    is_one && complaint.contains(what) && complaint.contains(advice),
                    "{}: {complaint}",
                    occasion()
                );
                place.assert_same(&content).with_context(occasion)?;
                place.done(words).with_context(occasion)?;
                number += 1;
            }
            ensure!(number > 3, "{words:?} writes {number} times: there must be more");
            eprintln!("  {}: {} writes failed with {errno}", words.join(" "), number - 1);
        }
    }
    Ok(())
}
