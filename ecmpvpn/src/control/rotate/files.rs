//! Starts a renewal of keys, at the leading or the following site, and gives it up: writes and removes the key files
//! beside the configuration, and the state that names them. Changes no tunnel.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::exchange::{Exchange, Head, NewKeys};
use super::record::{Part, Role, RotationStateError, Stage, State, folder, key_file};
use crate::config::{Config, KeyFileError, Peer, PresharedKey, PrivateKey, read_secret};

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
    Unreadable(#[from] KeyFileError),
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
            let mut file = NamedTempFile::new_in(folder(&path))?;
            file.write_all(content.as_bytes())?;
            if !content.ends_with('\n') {
                file.write_all(b"\n")?;
            }
            file.as_file().sync_all()?;
            file.persist_noclobber(&path).map_err(|error| error.error)?;
            Ok(())
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
    made.write(output.to_owned(), &Exchange { rotation, tunnel: keys }.text())?;
    let state = State::new(id, Role::Leads, &peer.name, parts);
    state.write(&path)?;
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
    let text = read_secret(from, owner, MAX_EXCHANGE)?;
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
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(FilesError::Io { operation: "removing", path, source })
        }
        _ => Ok(state),
    }
}

/// Removes the key files of a renewal that was given up, except those that the configuration names.
pub fn remove_files(file: &Path, state: &State) -> Result<(), FilesError> {
    let path = State::path(file);
    let read = fs::read_to_string(file);
    let text = read.map_err(|source| FilesError::Io { operation: "reading", path: file.to_owned(), source })?;
    for name in state.parts.iter().flat_map(Part::files).filter(|name| !text.contains(&format!("\"{name}\""))) {
        let path = path.with_file_name(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(FilesError::Io { operation: "removing", path, source });
            }
            _ => {}
        }
    }
    Ok(())
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
        assert_eq!(abort(&file).unwrap(), None);
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
