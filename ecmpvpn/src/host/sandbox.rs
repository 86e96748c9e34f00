//! Limits where this process may write, by Landlock (Linux 5.13): root owns nearly every file.

use std::io;
use std::path::Path;

use landlock::{
    ABI, AccessFs, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, path_beneath_rules,
};

use super::RunDir;
use super::bpffs::BPFFS;
use crate::fault;

/// The rights that [`restrict`] takes away: to write, truncate, make, remove, rename and link. Linux 6.2 knows all.
const HANDLED: ABI = ABI::V3;
/// The settings of network devices, of both address families.
const SETTINGS: &str = "/proc/sys/net";
/// The tunnels of the userspace backend, and what a child process has in place of a terminal.
const DEVICES: [&str; 2] = ["/dev/net/tun", "/dev/null"];

/// Takes from this thread, and from all threads and processes that it starts, the right to write anywhere but to the
/// files of sites below `run_root`, the pins, the settings of the network, and `folder`, which has the configuration.
/// Also makes `run_root`. A restricted process cannot mount, nor look at processes that are not restricted.
///
/// Returns whether the kernel restricts it: Landlock may be missing or turned off.
///
/// # Errors
/// `run_root` cannot be made, or the kernel refuses.
pub fn restrict(run_root: &Path, folder: &Path) -> io::Result<bool> {
    RunDir::make_root(run_root)?;
    let files = [run_root, folder, Path::new(BPFFS), Path::new(SETTINGS)];
    let files = files.into_iter().chain(DEVICES.map(Path::new)).chain(fault::folder());
    // The last site to go removes `run_root`, and the next one makes it again.
    let directories = AccessFs::MakeDir | AccessFs::RemoveDir;
    let limit = || -> Result<RulesetStatus, RulesetError> {
        let write = AccessFs::from_write(HANDLED);
        let ruleset = Ruleset::default().handle_access(write)?.create()?;
        let ruleset = ruleset.add_rules(path_beneath_rules(files, write))?;
        Ok(ruleset.add_rules(path_beneath_rules(run_root.parent(), directories))?.restrict_self()?.ruleset)
    };
    Ok(limit().map_err(io::Error::other)? != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::thread;

    use super::*;

    fn is_denied<T>(done: io::Result<T>) -> bool {
        done.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn only_the_sites_own_files_can_be_written() {
        let place = tempfile::tempdir().unwrap();
        let [root, folder, other] = ["run/ecmpvpn", "etc", "other"].map(|name| place.path().join(name));
        fs::create_dir(&folder).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("file"), "kept").unwrap();
        let restricted = thread::spawn({
            let (root, folder, other) = (root.clone(), folder.clone(), other.clone());
            move || {
                assert!(restrict(&root, &folder).unwrap(), "this kernel has no Landlock, or it is turned off");
                assert!(is_denied(fs::write(other.join("new"), "")));
                assert!(is_denied(fs::write(other.join("file"), "")));
                assert!(is_denied(File::options().append(true).open(other.join("file"))));
                assert!(is_denied(fs::remove_file(other.join("file"))));
                assert!(is_denied(fs::rename(other.join("file"), folder.join("file"))));
                assert!(is_denied(fs::create_dir(other.join("new"))));
                assert!(is_denied(OpenOptions::new().write(true).open("/proc/sys/kernel/core_pattern")));
                // Reading is not limited: names are resolved, and a configuration may name key files elsewhere.
                assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "kept");

                fs::create_dir(root.join("site")).unwrap();
                fs::write(root.join("site/lock"), "1").unwrap();
                fs::rename(root.join("site/lock"), root.join("site/journal")).unwrap();
                fs::remove_dir_all(&root).unwrap();
                fs::create_dir(&root).unwrap();
                fs::write(folder.join("new"), "1").unwrap();
                fs::rename(folder.join("new"), folder.join("ecmpvpn.toml")).unwrap();
                OpenOptions::new().write(true).open("/dev/null").unwrap();
            }
        });
        restricted.join().unwrap();
        // Other threads are not restricted.
        fs::write(other.join("file"), "").unwrap();
    }
}
