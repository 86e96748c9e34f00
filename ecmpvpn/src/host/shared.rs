//! Kernel settings that several sites of one host need: the last site restores them.
//!
//! A site that needs a setting which another site changed takes a copy of that record into its own journal. While
//! another journal has a record of the same setting, undoing leaves the setting as it is. So the order of the sites does
//! not matter, and a site that was killed counts until `down` undoes it.

use std::io;

use super::error::HostError;
use super::journal::Journal;
use super::record::Undo;

/// Records the former values of `key` and of what changes with it, unless the journal has them already: those that
/// another site recorded, or else those that `read` returns.
pub fn record(
    journal: &mut Journal,
    key: &str,
    read: impl FnOnce() -> Result<Vec<(String, String)>, HostError>,
) -> Result<(), HostError> {
    adopt(journal, |other| other == key)?;
    if !journal.has_sysctl(key) {
        journal.record(Undo::WriteSysctls { values: read()? })?;
    }
    Ok(())
}

/// Copies other sites' records of the settings that are `needed`.
pub fn adopt(journal: &mut Journal, needed: impl Fn(&str) -> bool) -> Result<(), HostError> {
    let _lock = journal.lock_others();
    for other in journal.others() {
        for record in other.records().rev() {
            let Undo::WriteSysctls { values } = record else { continue };
            let Some((first, _)) = values.iter().find(|(key, _)| needed(key)) else { continue };
            if !journal.has_sysctl(first) {
                journal.record(record.clone())?;
            }
        }
    }
    Ok(())
}

/// Lets `write` write the values of a record back, unless another site needs the settings, and calls `done` before
/// another site can look at the journal.
pub fn write_back(
    journal: &mut Journal,
    values: &[(String, String)],
    write: impl FnOnce(&[(String, String)]) -> io::Result<()>,
    done: impl FnOnce(&mut Journal),
) -> io::Result<()> {
    let _lock = journal.lock_others();
    match needed_by(values, &journal.others()) {
        Some(site) => tracing::info!("the site {site} needs this setting: it stays until `ecmpvpn down` of that site"),
        None => write(values)?,
    }
    done(journal);
    Ok(())
}

/// The name of a site with a record of one of these settings.
fn needed_by<'a>(values: &[(String, String)], others: &'a [Journal]) -> Option<&'a str> {
    let needs = |other: &&Journal| values.iter().any(|(key, _)| other.has_sysctl(key));
    others.iter().find(needs).map(Journal::site)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn journal(root: &Path, site: &str) -> Journal {
        fs::create_dir_all(root.join(site)).unwrap();
        Journal::open(&root.join(site).join("journal.json"), site).unwrap()
    }

    fn values(value: &str) -> Vec<(String, String)> {
        ["none/switch", "none/device"].map(|key| (key.to_owned(), value.to_owned())).to_vec()
    }

    #[test]
    fn the_second_site_takes_the_values_of_the_first_and_the_last_one_writes_them() {
        let root = tempfile::tempdir().unwrap();
        let (mut first, mut second) = (journal(root.path(), "site-a"), journal(root.path(), "site-b"));
        record(&mut first, "none/switch", || Ok(values("0"))).unwrap();
        record(&mut second, "none/switch", || panic!("the first site has the values")).unwrap();
        adopt(&mut second, |key| key == "none/switch").unwrap();
        assert!(second.records().eq([&Undo::WriteSysctls { values: values("0") }]));
        assert_eq!(needed_by(&values("0"), &first.others()), Some("site-b"));
        let write = |_: &[(String, String)]| -> io::Result<()> { panic!("the second site needs it") };
        write_back(&mut first, &values("0"), write, |journal| journal.remove_record(0).unwrap()).unwrap();
        assert!(first.is_empty());
        assert_eq!(needed_by(&values("0"), &second.others()), None);
        assert_eq!(needed_by(&[("none/other".into(), "0".into())], &first.others()), None);
    }

    #[test]
    fn journals_of_another_boot_or_namespace_and_broken_ones_do_not_count() {
        let root = tempfile::tempdir().unwrap();
        let (mut first, second) = (journal(root.path(), "site-a"), journal(root.path(), "site-b"));
        record(&mut first, "none/switch", || Ok(values("0"))).unwrap();
        assert_eq!(second.others().len(), 1);
        let path = root.path().join("site-a/journal.json");
        let text = fs::read_to_string(&path).unwrap();
        for broken in [text.replace("net:[", "net:[1"), text.replace("boot_id\": \"", "boot_id\": \"x"), "{".into()] {
            assert_ne!(broken, text);
            fs::write(&path, broken).unwrap();
            assert!(second.others().is_empty());
        }
    }
}
