//! Starts a renewal of keys, at the leading or the following site, and gives it up: writes and removes the key files
//! beside the configuration, and the state that names them. Changes no tunnel.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::exchange::{Exchange, Head, NewKeys};
use super::record::{Part, Role, RotationStateError, Stage, State, is_ours, key_file};
use crate::config::{Config, KeyFileError, Peer, PresharedKey, PrivateKey, read_secret};
use crate::fault;
use crate::file::Draft;

/// Largest accepted file, bytes: enough for all tunnels that a peer can have, with comments.
const MAX_EXCHANGE: usize = 64 << 10;

/// Why a renewal cannot be started or given up.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error(transparent)]
    State(#[from] RotationStateError),
    #[error("keys of the tunnels to {peer} are being renewed already: continue with {}, or give it up with `ecmpvpn rotate --abort`", next(*role))]
    UnderWay { peer: String, role: Role },
    #[error("{operation} {}", path.display())]
    Io {
        /// For example `writing`.
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file of the other site cannot be read as a secret file.
    #[error("--apply {0}")]
    Unreadable(KeyFileError),
    /// The file of the other site is not what `rotate --prepare` writes.
    #[error("{} is not a file of `ecmpvpn rotate --prepare`: {why}", path.display())]
    Malformed { path: PathBuf, why: String },
    #[error("{} is not for this configuration: {why}", path.display())]
    NotForUs { path: PathBuf, why: String },
}

fn next(role: Role) -> &'static str {
    match role {
        Role::Leads => "`ecmpvpn rotate`",
        Role::Follows => "`ecmpvpn rotate` at the other site",
    }
}

/// Key files that were made. Dropping this removes them, unless `keep` is set.
#[derive(Default)]
struct NewKeyFiles {
    paths: Vec<PathBuf>,
    keep: bool,
}

impl NewKeyFiles {
    /// Writes a new file, in one step. From the start only its owner can read it.
    fn write(&mut self, path: PathBuf, content: &str) -> Result<(), FilesError> {
        let write = || -> io::Result<()> {
            // Mode 0600.
            let mut draft = Draft::beside(&path)?;
            draft.write(content.as_bytes())?;
            if !content.ends_with('\n') {
                draft.write(b"\n")?;
            }
            draft.sync()?;
            draft.create(&path)
        };
        match write() {
            Ok(()) => self.paths.push(path),
            Err(source) => return Err(FilesError::Io { operation: "writing", path, source }),
        }
        Ok(())
    }
}

impl Drop for NewKeyFiles {
    fn drop(&mut self) {
        if !self.keep {
            for path in &self.paths {
                // If this fails the file stays, but nothing names it.
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn begin(path: &Path) -> Result<(), FilesError> {
    match State::read(path)? {
        Some(state) if !state.is_done() => Err(FilesError::UnderWay { peer: state.peer, role: state.role }),
        _ => Ok(()),
    }
}

/// Makes new keys for the tunnels to `peer`, and writes the file for the other site to `output`.
pub fn prepare(file: &Path, config: &Config, peer: &Peer, output: &Path) -> Result<State, FilesError> {
    let path = State::path(file);
    begin(&path)?;
    remove_unnamed(file, config);
    let id = PresharedKey::generate().as_bytes()[..4].iter().fold(0, |id, byte| id << 8 | u32::from(*byte)).max(1);
    let folder = path.parent().unwrap_or(Path::new("."));
    let (mut made, mut parts, mut keys) = (NewKeyFiles::default(), Vec::new(), Vec::new());
    for tunnel in &peer.tunnels {
        let (private, preshared) = (PrivateKey::generate(), PresharedKey::generate());
        let name = tunnel.name.as_str();
        let (private_key_file, preshared_key_file) = (key_file(name, id, "key"), key_file(name, id, "psk"));
        made.write(folder.join(&private_key_file), &private.to_base64())?;
        made.write(folder.join(&preshared_key_file), &preshared.to_base64())?;
        parts.push(Part {
            tunnel: name.to_owned(),
            private_key_file: Some(private_key_file),
            public_key: None,
            preshared_key_file,
            stage: Stage::Waiting,
        });
        keys.push(NewKeys {
            listen_port: tunnel.listen_port,
            remote_port: tunnel.remote_port,
            public_key: private.public_key(),
            preshared_key: preshared,
        });
    }
    let rotation = Head { id, from: config.site.name.clone(), to: peer.name.clone() };
    let mut state = State::new(id, Role::Leads, &peer.name, parts);
    let folder = fs::canonicalize(crate::file::folder(output)).ok();
    state.carried = folder.and_then(|folder| Some(folder.join(output.file_name()?)));
    // It comes before the file for the other site, so that `--abort` finds that file if this process is killed.
    state.write(&path)?;
    made.paths.push(path);
    made.write(output.to_owned(), &Exchange { rotation, tunnel: keys }.text())?;
    made.keep = true;
    Ok(state)
}

/// Applies the other site's file. Applying it again changes nothing. Returns the state, and whether the file was new.
pub fn apply(file: &Path, config: &Config, from: &Path) -> Result<(State, bool), FilesError> {
    let path = State::path(file);
    let owner = fs::metadata(file).map_or(0, |metadata| metadata.uid());
    if let Err(source) = fs::metadata(from) {
        return Err(FilesError::Io { operation: "reading", path: from.to_owned(), source });
    }
    let text = read_secret(from, owner, MAX_EXCHANGE).map_err(FilesError::Unreadable)?;
    let exchange = Exchange::parse(&text).map_err(|why| FilesError::Malformed { path: from.to_owned(), why })?;
    let other = |why: String| FilesError::NotForUs { path: from.to_owned(), why };
    let Head { id, from: sender, to } = &exchange.rotation;
    if *to != config.site.name {
        return Err(other(format!("it is for {to}, and this is {}", config.site.name)));
    }
    let peer = config.peers.iter().find(|peer| peer.name == *sender);
    let peer = peer.ok_or_else(|| other(format!("it is from {sender}, which is no [[peer]] here")))?;
    if let Some(state) = State::read(&path)?.filter(|state| state.id == *id) {
        return Ok((state, false));
    }
    begin(&path)?;
    remove_unnamed(file, config);
    let folder = path.parent().unwrap_or(Path::new("."));
    let (mut made, mut parts) = (NewKeyFiles::default(), Vec::new());
    for keys in &exchange.tunnel {
        let fits = |port: u16, remote: u16| port == keys.remote_port && remote == keys.listen_port;
        let tunnel = peer.tunnels.iter().find(|tunnel| fits(tunnel.listen_port, tunnel.remote_port));
        let tunnel = tunnel.ok_or_else(|| {
            other(format!(
                "no tunnel to {sender} has listen_port {} and remote_port {}",
                keys.remote_port, keys.listen_port
            ))
        })?;
        let name = tunnel.name.as_str();
        let preshared_key_file = key_file(name, *id, "psk");
        made.write(folder.join(&preshared_key_file), &keys.preshared_key.to_base64())?;
        parts.push(Part {
            tunnel: name.to_owned(),
            private_key_file: None,
            public_key: Some(keys.public_key.to_string()),
            preshared_key_file,
            stage: Stage::Waiting,
        });
    }
    let state = State::new(*id, Role::Follows, sender, parts);
    state.write(&path)?;
    made.keep = true;
    Ok((state, true))
}

/// Gives a renewal up: removes its state, and returns it if it was there and could be read. [`remove_files`] removes
/// the key files, once nothing uses them any more.
pub fn abort(file: &Path) -> Result<Option<State>, FilesError> {
    let path = State::path(file);
    let state = match State::read(&path) {
        Err(error @ RotationStateError::Io { .. }) => return Err(error.into()),
        read => read.ok().flatten(),
    };
    fault::point("removing the state of a renewal");
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FilesError::Io { operation: "removing", path, source })
        }
        _ => Ok(state),
    }
}

/// Removes key files that a renewal made and that no configuration and no state in the folder names: a process that was
/// killed left them. If a file there cannot be read, nothing is removed. What cannot be removed stays, and is harmless.
pub fn remove_unnamed(file: &Path, config: &Config) {
    let path = State::path(file);
    let folder = crate::file::folder(&path);
    crate::file::sweep(folder);
    let Ok(naming) = naming(folder) else { return };
    let is_left = |name: &str| {
        let mut tunnels = config.peers.iter().flat_map(|peer| &peer.tunnels);
        tunnels.any(|tunnel| is_ours(tunnel.name.as_str(), name)) && !naming.contains(name)
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_left) {
            fault::point("removing a key file");
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The text of every file in `folder` that may name a key file: the configurations, also of other sites, and the states.
fn naming(folder: &Path) -> io::Result<String> {
    let mut text = String::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let may_name = path.extension().is_some_and(|end| end == "toml" || end == "json");
        if may_name && fs::metadata(&path)?.is_file() {
            text += &fs::read_to_string(&path)?;
        }
    }
    Ok(text)
}

/// Removes the key files of a renewal that was given up, except those that the configuration names, and the file that
/// was made for the other site, if it is still that of this renewal.
pub fn remove_files(file: &Path, state: &State) -> Result<(), FilesError> {
    let path = State::path(file);
    crate::file::sweep(crate::file::folder(&path));
    let read = fs::read_to_string(file);
    let text = read.map_err(|source| FilesError::Io { operation: "reading", path: file.to_owned(), source })?;
    for name in state.parts.iter().flat_map(Part::files).filter(|name| !text.contains(*name)) {
        let path = path.with_file_name(name);
        fault::point("removing a key file");
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(FilesError::Io { operation: "removing", path, source });
            }
            _ => {}
        }
    }
    if let Some(carried) = state.carried.as_ref().filter(|carried| is_of(carried, state.id)) {
        let path = carried.clone();
        fs::remove_file(carried).map_err(|source| FilesError::Io { operation: "removing", path, source })?;
    }
    Ok(())
}

/// Whether the file is that of a renewal.
fn is_of(path: &Path, id: u32) -> bool {
    let Ok(file) = fs::File::open(path) else { return false };
    let mut text = Zeroizing::new(String::with_capacity(MAX_EXCHANGE + 1));
    let read = file.take(MAX_EXCHANGE as u64).read_to_string(&mut text);
    read.is_ok() && Exchange::parse(&text).is_ok_and(|exchange| exchange.rotation.id == id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::plan::tests::config;

    /// Folders and configurations of two sites. The configuration files have only the text that the code looks at.
    struct Sites {
        folder: tempfile::TempDir,
        a: Config,
        b: Config,
    }

    impl Sites {
        fn new() -> Self {
            let (a, mut b) = (config(2), config(2));
            b.site.name = "site-b".into();
            b.peers[0].name = "site-a".into();
            for (a, b) in a.peers[0].tunnels.iter().zip(&mut b.peers[0].tunnels) {
                (b.listen_port, b.remote_port) = (a.remote_port, a.listen_port);
                b.name = crate::config::InterfaceName::new(&format!("b{}", b.name)).unwrap();
            }
            let folder = tempfile::tempdir().unwrap();
            for site in ["a", "b"] {
                fs::create_dir(folder.path().join(site)).unwrap();
                fs::write(folder.path().join(site).join("ecmpvpn.toml"), "").unwrap();
            }
            Self { folder, a, b }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn prepare(&self) -> Result<State, FilesError> {
            prepare(&self.path("a/ecmpvpn.toml"), &self.a, &self.a.peers[0], &self.path("for-b"))
        }

        fn apply(&self) -> Result<(State, bool), FilesError> {
            apply(&self.path("b/ecmpvpn.toml"), &self.b, &self.path("for-b"))
        }

        fn count(&self, folder: &str) -> usize {
            fs::read_dir(self.path(folder)).unwrap().count()
        }
    }

    #[test]
    fn both_ends_get_keys_that_fit_and_private_keys_stay() {
        let sites = Sites::new();
        let led = sites.prepare().unwrap();
        let (followed, new) = sites.apply().unwrap();
        assert!(new && led.id == followed.id && !led.going && followed.going);
        assert!(!sites.apply().unwrap().1, "applied twice");
        let key = |folder: &str, name: &str| {
            let path = sites.path(folder).join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            fs::read_to_string(path).unwrap()
        };
        let carried = key("", "for-b");
        for (a, b) in led.parts.iter().zip(&followed.parts) {
            assert_eq!(format!("b{}", a.tunnel), b.tunnel);
            assert_eq!(key("a", &a.preshared_key_file), key("b", &b.preshared_key_file));
            let private = key("a", a.private_key_file.as_ref().unwrap());
            let public = private.parse::<PrivateKey>().unwrap().public_key().to_string();
            assert_eq!(b.public_key.as_ref(), Some(&public));
            assert!(!carried.contains(private.trim()), "a private key is carried");
            let state = fs::read_to_string(State::path(&sites.path("a/ecmpvpn.toml"))).unwrap();
            assert!(!state.contains(private.trim()) && !state.contains(key("a", &a.preshared_key_file).trim()));
        }
    }

    #[test]
    fn a_second_one_waits_for_the_first_and_giving_up_leaves_nothing() {
        let sites = Sites::new();
        let state = sites.prepare().unwrap();
        let refused = sites.prepare().unwrap_err();
        assert!(matches!(refused, FilesError::UnderWay { .. }), "{refused}");
        // 2 x 2 keys, the state and the configuration.
        assert_eq!(sites.count("a"), 6);
        let file = sites.path("a/ecmpvpn.toml");
        // One new key file is in use already.
        fs::write(&file, format!("private_key_file = \"{}\"", state.parts[0].private_key_file.as_ref().unwrap()))
            .unwrap();
        assert_eq!(abort(&file).unwrap().as_ref(), Some(&state));
        remove_files(&file, &state).unwrap();
        assert_eq!(sites.count("a"), 2);
        assert!(!sites.path("for-b").exists(), "the secret file for the other site stays");
        assert_eq!(abort(&file).unwrap(), None);
    }

    #[test]
    fn only_keys_that_nothing_names_are_removed() {
        let sites = Sites::new();
        let tunnel = &sites.a.peers[0].tunnels[0].name;
        let key = |id: u32| key_file(tunnel.as_str(), id, "key");
        for id in 1..=5 {
            fs::write(sites.path("a").join(key(id)), "secret").unwrap();
        }
        fs::write(sites.path("a").join("mine.key"), "secret").unwrap();
        // Quotes of the other kind, a path, another site's configuration, and another site's renewal.
        let [file, other, state] =
            ["ecmpvpn.toml", "other.toml", "other.rotation.json"].map(|name| sites.path("a").join(name));
        fs::write(&file, format!("a = '{}'\nb = \"/etc/ecmpvpn/{}\"\n", key(1), key(2))).unwrap();
        fs::write(other, format!("private_key_file = \"{}\"", key(3))).unwrap();
        fs::write(state, format!("{{\"private_key_file\":\"{}\"}}", key(4))).unwrap();
        remove_unnamed(&file, &sites.a);
        let left: Vec<bool> = (1..=5).map(|id| sites.path("a").join(key(id)).exists()).collect();
        assert_eq!(left, [true, true, true, true, false]);
        assert!(sites.path("a/mine.key").exists());
    }

    #[test]
    fn what_cannot_be_written_or_is_for_others_leaves_nothing() {
        let mut sites = Sites::new();
        fs::write(sites.path("for-b"), "mine").unwrap();
        assert!(sites.prepare().unwrap_err().to_string().contains("for-b"));
        assert_eq!((sites.count("a"), fs::read_to_string(sites.path("for-b")).unwrap()), (1, "mine".to_owned()));
        let refusal = |sites: &Sites| sites.apply().unwrap_err().to_string();
        assert!(refusal(&sites).contains("chmod 600"), "{}", refusal(&sites));
        fs::set_permissions(sites.path("for-b"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(refusal(&sites).contains("is not a file of"), "{}", refusal(&sites));
        fs::remove_file(sites.path("for-b")).unwrap();
        assert!(refusal(&sites).contains("reading"), "{}", refusal(&sites));
        sites.prepare().unwrap();
        sites.b.peers[0].tunnels[1].listen_port = 9999;
        assert!(refusal(&sites).contains("no tunnel to site-a has listen_port 51921"), "{}", refusal(&sites));
        assert_eq!(sites.count("b"), 1);
        sites.b.site.name = "site-c".into();
        assert!(refusal(&sites).contains("it is for site-b"), "{}", refusal(&sites));
    }
}
