//! The configuration and its key files on disk.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// A site's folder with its files, as `load` finds them.
fn folder(mode: u32, key: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, mode) in
        [("f.toml", FULL.as_bytes(), 0o644), ("site-a.key", key, mode), ("site-b.psk", PRESHARED.as_bytes(), 0o600)]
    {
        fs::write(folder.path().join(name), content).unwrap();
        fs::set_permissions(folder.path().join(name), Permissions::from_mode(mode)).unwrap();
    }
    folder
}

/// The error of `load` for a folder, without the folder's own path.
fn load_problem(folder: &tempfile::TempDir) -> String {
    let error = load(&folder.path().join("f.toml")).expect_err("unsound");
    error.to_string().replace(&format!("{}/", folder.path().display()), "")
}

#[test]
fn load_reads_keys_beside_the_configuration() {
    let folder = folder(0o600, PRIVATE.as_bytes());
    assert_eq!(load(&folder.path().join("f.toml")).unwrap(), parse(FULL, "f", &keys).unwrap());
}

#[test]
fn load_refuses_key_files_that_are_no_secret() {
    for mode in [0o640, 0o604, 0o620, 0o601] {
        assert_eq!(
            load_problem(&folder(mode, PRIVATE.as_bytes())),
            format!(
                "f.toml:3: private_key_file in [site] names site-a.key, which others than its owner can use (mode {mode:04o}): run `chmod 600 site-a.key`"
            )
        );
    }
    assert_eq!(
        load_problem(&folder(0o600, &[b'A'; 5000])),
        "f.toml:3: private_key_file in [site] names site-a.key, which is too large for a key file: name a file that holds one key"
    );
    assert_eq!(
        load_problem(&folder(0o600, &[0xff; 44])),
        "f.toml:3: private_key_file in [site] names site-a.key, which does not hold a key: a key is 44 characters of base64, as `wg genkey` prints"
    );
    let not_a_file = folder(0o600, PRIVATE.as_bytes());
    fs::remove_file(not_a_file.path().join("site-a.key")).unwrap();
    fs::create_dir(not_a_file.path().join("site-a.key")).unwrap();
    assert_eq!(
        load_problem(&not_a_file),
        "f.toml:3: private_key_file in [site] names site-a.key, which is not a regular file: name a file that holds one key"
    );
}

/// The message for root without `CAP_DAC_OVERRIDE`.
#[test]
fn a_key_file_of_another_user_names_the_cure() {
    let text = super::super::key_file::KeyFileError::OfAnotherUser("a.key".into()).to_string();
    assert!(text.contains("belongs to another user") && text.ends_with("run `chown root a.key`"), "{text}");
}

#[test]
fn load_says_what_is_wrong_with_the_file_itself() {
    let folder = folder(0o600, PRIVATE.as_bytes());
    let path = folder.path().join("f.toml");
    fs::write(&path, b"[site]\nname = \"\xff\"\n").unwrap();
    assert_eq!(load_problem(&folder), "f.toml:2: there is a byte here that is not UTF-8 text: name a TOML file");
    fs::remove_file(&path).unwrap();
    assert_eq!(
        load_problem(&folder),
        "there is no configuration f.toml: write one with `ecmpvpn init`, or name yours with `-c FILE`"
    );
    fs::create_dir(&path).unwrap();
    assert_eq!(load_problem(&folder), "reading the configuration f.toml");
}
