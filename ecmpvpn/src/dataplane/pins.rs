//! Where a site's maps, programs and links are pinned.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use aya::programs::SchedClassifier;
use ecmpvpn_common::layout::{LAYOUT_VERSION, TunnelId, maps, programs};

use super::DataplaneError;

/// Every site's pins are below this directory of bpffs.
const ROOT: &str = "/sys/fs/bpf/ecmpvpn";

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
    /// [`DataplaneError::NotRunning`] if there are none.
    pub(super) fn require(&self) -> Result<(), DataplaneError> {
        if self.exist() { Ok(()) } else { Err(DataplaneError::NotRunning { dir: self.dir.clone() }) }
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

    pub(super) fn create(&self) -> Result<(), DataplaneError> {
        let failed = |error| DataplaneError::new(format!("making the directory {}", self.dir.display()), error);
        fs::create_dir_all(self.dir.parent().unwrap_or(&self.root)).map_err(failed)?;
        match fs::create_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(DataplaneError::AlreadyThere { dir: self.dir.clone() })
            }
            made => made.map_err(failed),
        }
    }

    /// Removes the pins, including those of other versions, and the directories that become empty.
    pub(super) fn remove(&self) -> Result<(), DataplaneError> {
        let failed = |path: &Path, error| DataplaneError::new(format!("removing {}", path.display()), error);
        for dir in self.of_other_versions().iter().chain(self.exist().then_some(&self.dir)) {
            for entry in fs::read_dir(dir).map_err(|error| failed(dir, error))? {
                let path = entry.map_err(|error| failed(dir, error))?.path();
                fs::remove_file(&path).map_err(|error| failed(&path, error))?;
            }
            fs::remove_dir(dir).map_err(|error| failed(dir, error))?;
        }
        for parent in self.dir.ancestors().skip(1).take_while(|parent| parent.starts_with(&self.root)) {
            match fs::remove_dir(parent) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => break,
                removed => removed.map_err(|error| failed(parent, error))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_version_is_in_the_path() {
        assert_eq!(Pins::of("site-a").dir(), Path::new("/sys/fs/bpf/ecmpvpn/site-a/v4"));
        assert_eq!(Pins::of("a.b").dir(), Path::new("/sys/fs/bpf/ecmpvpn/a+b/v4"));
    }

    #[test]
    fn directories_come_and_go() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("ecmpvpn");
        let (one, other) = (Pins::below(&root, "one"), Pins::below(&root, "other"));
        one.create().unwrap();
        other.create().unwrap();
        assert!(matches!(one.create(), Err(DataplaneError::AlreadyThere { .. })));
        fs::write(one.path("MAP"), "").unwrap();
        one.remove().unwrap();
        assert!(!one.exist() && other.exist());
        other.remove().unwrap();
        assert!(!root.exists() && temporary.path().exists());
    }
}
