//! Where a site's maps, programs and links are pinned.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use aya::programs::SchedClassifier;
use ecmpvpn_common::layout::{LAYOUT_VERSION, TunnelId, maps, programs};
use rustix::fs::statfs;

use super::DataplaneError;
use crate::config::is_site_name;
use crate::fault;

/// Every site's pins are below this directory of bpffs.
const ROOT: &str = "/sys/fs/bpf/ecmpvpn";

/// The standard mount point of the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// Source: include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Where `ip netns` keeps the network namespaces that have names.
const NAMESPACES: &str = "/run/netns";

/// Whether a BPF file system is mounted at `path`.
fn is_bpffs(path: &Path) -> bool {
    // The type of `f_type` differs between architectures; the magic fits all of them.
    statfs(path).is_ok_and(|fs| u64::try_from(fs.f_type).is_ok_and(|magic| magic & 0xffff_ffff == BPF_FS_MAGIC))
}

/// The file below `folder` that names this thread's network namespace.
fn namespace_below(folder: &Path) -> PathBuf {
    let id = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let own = id(Path::new("/proc/thread-self/ns/net"));
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let found = own.and_then(|own| names.into_iter().find(|path| id(path) == Some(own)));
    found.unwrap_or_else(|| folder.join("NAME"))
}

/// One site's directory of pins: `<root>/<site>/v<LAYOUT>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
    dir: PathBuf,
}

impl Pins {
    /// The pins of `site` below `/sys/fs/bpf/ecmpvpn`.
    pub fn of(site: &str) -> Self {
        Self::below(Path::new(ROOT), site)
    }

    /// The pins of `site` below `root`. `root` is removed with the last site's pins.
    pub fn below(root: &Path, site: &str) -> Self {
        // bpffs reserves names with dots. The name of a site cannot contain a plus sign.
        let dir = root.join(site.replace('.', "+")).join(format!("v{LAYOUT_VERSION}"));
        Self { root: root.to_owned(), dir }
    }

    /// The sites that have pins below `/sys/fs/bpf/ecmpvpn`. Empty if this process may not look.
    pub fn sites() -> Vec<String> {
        Self::sites_below(Path::new(ROOT))
    }

    fn sites_below(root: &Path) -> Vec<String> {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok()).map(|name| name.replace('+', "."));
        names.filter(|name| is_site_name(name)).collect()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the site has pins. Returns true if this process may not look: opening the pins then reports the error.
    pub fn exist(&self) -> bool {
        !matches!(fs::metadata(&self.dir), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Directories of pins that another version of the program made for this site. This version cannot use their maps.
    pub fn of_other_versions(&self) -> Vec<PathBuf> {
        let entries = self.dir.parent().map(fs::read_dir).and_then(Result::ok);
        let others = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        let mut others: Vec<PathBuf> = others.filter(|path| *path != self.dir && path.is_dir()).collect();
        others.sort();
        others
    }

    /// Checks that the site has pins.
    ///
    /// # Errors
    /// [`DataplaneError::NotRunning`] if there are none; [`DataplaneError::Hidden`] if that cannot be seen here.
    pub(super) fn require(&self) -> Result<(), DataplaneError> {
        let dir = self.dir.clone();
        if self.exist() {
            Ok(())
        } else if self.root == Path::new(ROOT) && !is_bpffs(Path::new(BPFFS)) {
            Err(DataplaneError::Hidden { dir, namespace: namespace_below(Path::new(NAMESPACES)) })
        } else {
            Err(DataplaneError::NotRunning { dir })
        }
    }

    /// Opens a pinned map.
    pub(super) fn map(&self, name: &str) -> Result<MapData, DataplaneError> {
        let path = self.path(name);
        MapData::from_pin(&path).map_err(|error| DataplaneError::new(format!("opening {}", path.display()), error))
    }

    /// Opens a pinned program.
    pub(super) fn program(&self, name: &str) -> Result<SchedClassifier, DataplaneError> {
        let path = self.path(name);
        SchedClassifier::from_pin(&path)
            .map_err(|error| DataplaneError::new(format!("opening {}", path.display()), error))
    }

    /// Whether everything is pinned that a start pins before it attaches.
    pub(super) fn are_complete(&self) -> bool {
        let all = maps::ALL.into_iter().chain(programs::ALL);
        all.into_iter().all(|name| self.path(name).exists())
    }

    /// Removes one pin, if it exists.
    pub(super) fn forget(path: &Path) -> Result<(), DataplaneError> {
        fault::point("removing a pin");
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(DataplaneError::new(format!("removing {}", path.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// The pin of a map or program.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The pin of the link between the egress program and the steering device.
    pub(super) fn steering_link(&self) -> PathBuf {
        self.dir.join("link_steering")
    }

    /// The pin of the link between the ingress program and a tunnel.
    pub(super) fn tunnel_link(&self, id: TunnelId) -> PathBuf {
        self.dir.join(format!("link_tunnel_{}", id.number()))
    }

    /// The pin of the link between the arrival program and a bond member.
    pub(super) fn member_link(&self, ifindex: u32) -> PathBuf {
        self.dir.join(format!("link_member_{ifindex}"))
    }

    /// Moves away what another user has put in the place of the root. In a BPF file system of mode 1777, which is the
    /// kernel's default, anybody can make a directory there, and could then rename and remove the pins. Nobody else can
    /// touch a directory of root there.
    ///
    /// # Errors
    /// It cannot be moved.
    pub fn claim(&self) -> Result<(), DataplaneError> {
        let failed = |error| {
            let operation = format!("moving {} away, which another user has made: remove it", self.root.display());
            DataplaneError::new(operation, error)
        };
        let found = match fs::symlink_metadata(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found.map_err(failed)?,
        };
        if found.is_dir() && [0, rustix::process::geteuid().as_raw()].contains(&found.uid()) {
            return Ok(());
        }
        if !found.is_dir() {
            return fs::remove_file(&self.root).map_err(failed);
        }
        // A name that nobody can guess, and has taken before.
        let parent = self.root.parent().unwrap_or(&self.root);
        let away = tempfile::Builder::new().prefix("not-of-ecmpvpn-").tempdir_in(parent).map_err(failed)?.keep();
        fs::rename(&self.root, &away).map_err(failed)?;
        tracing::warn!("another user had made {}: it is {} now", self.root.display(), away.display());
        Ok(())
    }

    /// Makes the directories. Only their owner may enter them: whoever can open a directory can hold a lock on it, and the
    /// lock of the maps is on that of the pins.
    pub(super) fn create(&self) -> Result<(), DataplaneError> {
        let failed = |error| DataplaneError::new(format!("making the directory {}", self.dir.display()), error);
        let parent = self.dir.parent().unwrap_or(&self.root);
        fault::point("making the pins' parent");
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
        // Before it was made, somebody else may have made the root again.
        self.claim()?;
        fault::point("making the pins' directory");
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(DataplaneError::AlreadyThere { dir: self.dir.clone() })
            }
            made => made.map_err(failed),
        }
    }

    /// Removes the pins, including those of other versions, and the directories that become empty.
    pub(super) fn remove(&self) -> Result<(), DataplaneError> {
        for dir in self.of_other_versions().iter().chain(self.exist().then_some(&self.dir)) {
            for entry in fs::read_dir(dir).map_err(|error| failed(dir, error))? {
                let path = entry.map_err(|error| failed(dir, error))?.path();
                fault::point("removing a pin");
                fs::remove_file(&path).map_err(|error| failed(&path, error))?;
            }
            fault::point("removing the pins' directory");
            fs::remove_dir(dir).map_err(|error| failed(dir, error))?;
        }
        self.remove_parents()
    }

    /// Removes the directories that the directory of pins is in, if they are empty.
    pub(super) fn remove_parents(&self) -> Result<(), DataplaneError> {
        for parent in self.dir.ancestors().skip(1).take_while(|parent| parent.starts_with(&self.root)) {
            fault::point("removing the pins' parent");
            match fs::remove_dir(parent) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(|error| failed(parent, error))?,
            }
        }
        Ok(())
    }
}

fn failed(path: &Path, error: io::Error) -> DataplaneError {
    DataplaneError::new(format!("removing {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_version_is_in_the_path() {
        assert_eq!(Pins::of("site-a").dir(), Path::new("/sys/fs/bpf/ecmpvpn/site-a/v5"));
        assert_eq!(Pins::of("a.b").dir(), Path::new("/sys/fs/bpf/ecmpvpn/a+b/v5"));
    }

    #[test]
    fn what_is_in_the_roots_place_goes_and_the_own_root_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let pins = Pins::below(&temporary.path().join("ecmpvpn"), "one");
        std::os::unix::fs::symlink(temporary.path(), &pins.root).unwrap();
        pins.claim().unwrap();
        assert!(fs::symlink_metadata(&pins.root).is_err() && temporary.path().is_dir());
        pins.create().unwrap();
        pins.claim().unwrap();
        assert!(pins.exist());
    }

    #[test]
    fn directories_come_and_go() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("ecmpvpn");
        let (one, other) = (Pins::below(&root, "one"), Pins::below(&root, "o.ther"));
        one.create().unwrap();
        other.create().unwrap();
        let mut sites = Pins::sites_below(&root);
        sites.sort();
        assert_eq!(sites, ["o.ther", "one"]);
        assert!(matches!(one.create(), Err(DataplaneError::AlreadyThere { .. })));
        fs::write(one.path("MAP"), "").unwrap();
        one.remove().unwrap();
        assert!(!one.exist() && other.exist());
        other.remove().unwrap();
        other.remove_parents().unwrap();
        assert!(!root.exists() && temporary.path().exists());
    }
}
