//! What `--save` changes. Everything else in the file stays as it is.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::config::{Edit, EditError};

const COMMENTED: &str = r#"# our site
[site]
name = "site-a"            # do not rename
private_key_file = "site-a.key"

[steering]
policy = "adaptive"   # tried spray, no

[[peer]]
name = "site-b" # Paris
public_key = "6Z2XTSd8hhpAyPLYQwmdiL2gHb7ItOyAlNPlbLRmUX0="
local_endpoint = "10.2.3.4"
remote_endpoint = "10.5.6.7"
prefixes = ["10.20.0.0/16"]
[[peer.tunnel]]
name = "wg0"
listen_port = 51820
remote_port = 51822
address = "169.254.77.0/31"
weight = 1 # the slow port
[[peer.tunnel]]
name = "wg1"
listen_port = 51821
remote_port = 51823
address = "169.254.77.2/31"

# backups
[[rule]]
proto = "tcp"
dst_ports = [873]
policy = "spray"

# voice
[[rule]]
dscp = 46
policy = "hash"

[health]
interval_ms = 200 # slower than usual
"#;

/// A file, and the text that `change` makes of it.
fn edited(text: &str, change: impl Fn(&mut Edit)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ecmpvpn.toml");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let mut edit = Edit::new(&path, text, &parse(text, "f", &keys).unwrap()).unwrap();
    change(&mut edit);
    edit.save().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let saved = fs::read_to_string(&path).unwrap();
    parse(&saved, "f", &keys).unwrap_or_else(|problems| panic!("{problems}\n{saved}"));
    saved
}

fn same_rule(a: &Rule, b: &Rule) -> bool {
    a == b
}

fn rule(mark: u32) -> Rule {
    Rule { fwmark: Some(mark), policy: Some(Policy::Hash), ..Rule::default() }
}

#[test]
fn only_what_is_set_changes() {
    let saved = edited(COMMENTED, |edit| {
        edit.set_policy(Policy::Hash, None).unwrap();
        edit.set_weight("wg0", Some(7)).unwrap();
        edit.set_weight("wg1", None).unwrap();
        edit.set_policy(Policy::Spray, Some("site-b")).unwrap();
    });
    let expected = COMMENTED
        .replace(r#"policy = "adaptive"   #"#, r#"policy = "hash"   #"#)
        .replace("weight = 1 #", "weight = 7 #")
        .replace("169.254.77.2/31\"\n", "169.254.77.2/31\"\nweight = \"auto\"\n")
        .replace("prefixes = [\"10.20.0.0/16\"]\n", "prefixes = [\"10.20.0.0/16\"]\npolicy = \"spray\"\n");
    assert_eq!(saved, expected);
    // A policy for all peers replaces the peer's own.
    let all = edited(&saved, |edit| edit.set_policy(Policy::Hash, None).unwrap());
    assert!(!all.contains("spray\"\n[[peer.tunnel]]"), "{all}");
}

#[test]
fn rules_come_and_go_where_they_stand() {
    let config = parse(COMMENTED, "f", &keys).unwrap();
    let first = edited(COMMENTED, |edit| edit.add_rule(&rule(1), &config.rules, same_rule).unwrap());
    assert!(first.contains("[[rule]]\nfwmark = 0x1\npolicy = \"hash\"\n\n# backups\n[[rule]]"), "{first}");
    assert_eq!(parse(&first, "f", &keys).unwrap().rules[0], rule(1));
    // The rule that it should come before is not in the file, so it is added at the end.
    let last = edited(COMMENTED, |edit| edit.add_rule(&rule(2), &[rule(9)], same_rule).unwrap());
    assert_eq!(parse(&last, "f", &keys).unwrap().rules[2], rule(2));
    assert!(last.find("fwmark").unwrap() < last.find("[health]").unwrap(), "{last}");
    // A rule that is in the file already is not added again.
    assert_eq!(edited(COMMENTED, |edit| edit.add_rule(&config.rules[1], &[], same_rule).unwrap()), COMMENTED);
    let without = edited(COMMENTED, |edit| edit.remove_rule(&config.rules[0], same_rule).unwrap());
    let expected =
        COMMENTED.replace("# backups\n[[rule]]\nproto = \"tcp\"\ndst_ports = [873]\npolicy = \"spray\"\n\n", "");
    assert_eq!(without, expected);
    assert_eq!(edited(COMMENTED, |edit| edit.remove_rule(&rule(9), same_rule).unwrap()), COMMENTED);
    // The first rule of a file without rules.
    let none = COMMENTED.split("\n# backups").next().unwrap();
    let one = edited(none, |edit| edit.add_rule(&rule(3), &[], same_rule).unwrap());
    assert_eq!(one, format!("{none}\n[[rule]]\nfwmark = 0x3\npolicy = \"hash\"\n"));
}

#[test]
fn a_file_that_somebody_else_wrote_to_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ecmpvpn.toml");
    fs::write(&path, COMMENTED).unwrap();
    let mut edit = Edit::new(&path, COMMENTED, &parse(COMMENTED, "f", &keys).unwrap()).unwrap();
    edit.set_weight("wg0", Some(2)).unwrap();
    fs::write(&path, "# mine\n").unwrap();
    let refused = edit.save().unwrap_err();
    assert!(matches!(refused, EditError::Changed { .. }), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "# mine\n");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_link_stays_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let (real, link) = (folder.path().join("real.toml"), folder.path().join("ecmpvpn.toml"));
    fs::write(&real, COMMENTED).unwrap();
    std::os::unix::fs::symlink("real.toml", &link).unwrap();
    let mut edit = Edit::new(&link, COMMENTED, &parse(COMMENTED, "f", &keys).unwrap()).unwrap();
    edit.set_weight("wg0", Some(2)).unwrap();
    edit.save().unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(fs::read_to_string(&real).unwrap().contains("weight = 2 # the slow port"));
}
