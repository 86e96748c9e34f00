//! Tests the real binary: what it prints, to which stream, and its exit code. Needs no privilege and changes nothing on
//! the host.
#![expect(unused_crate_dependencies, reason = "the dependencies are those of all targets of this package")]

mod host;
mod privilege;
mod stage;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use lab::skip::{self, Feature, Tier, requires};
use lab::tests;
use stage::{INIT, binary, command, folder, ran, run, sites};
use tempfile::TempDir;

/// The kernel makes no difference.
const TIERS: [Tier; 1] = [Tier::Here];

type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() {
    let tests: &[Test] = &tests![
        help_is_short_and_long_with_an_example,
        no_subcommand_is_wrong_usage,
        a_reader_that_goes_away_is_no_failure,
        init_writes_two_sites_that_pass_check,
        init_keeps_keys_from_others_whatever_the_umask,
        init_overwrites_nothing,
        init_refuses_in_one_sentence_and_writes_nothing,
        init_that_cannot_write_leaves_nothing,
        init_from_wg_quick_files_makes_a_site_that_passes_check,
        init_from_files_that_disagree_writes_nothing,
        init_from_reads_any_editors_text_but_not_without_bound,
        check_warns_of_tunnels_that_share_a_member,
        check_reports_each_problem_in_one_sentence,
        check_refuses_keys_that_are_no_secret,
        check_of_no_configuration_is_wrong_usage,
        a_wrong_log_filter_is_wrong_usage,
    ];
    // Only root can change the owner of a file, and become another user.
    let as_root: &[Test] = &tests![
        check_refuses_a_strangers_key_file,
        policy_refuses_in_one_sentence,
        privilege::what_lacks_privilege_says_so_before_anything_else,
        privilege::check_says_which_file_it_may_not_read,
        host::check_says_who_manages_a_member,
        host::check_warns_of_an_mtu_that_run_would_refuse,
        host::check_without_privilege_has_not_looked_at_the_firewall,
    ];
    let mut trials = Vec::new();
    for (features, tests) in [(&[][..], tests), (&[Feature::Root], as_root)] {
        trials.extend(tests.iter().map(|(name, test)| requires(&TIERS, features, name, *test)));
    }
    skip::run(trials);
}

fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<anyhow::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn mode(path: &Path) -> anyhow::Result<u32> {
    Ok(fs::metadata(path).with_context(|| path.display().to_string())?.permissions().mode() & 0o7777)
}

fn help_is_short_and_long_with_an_example() -> anyhow::Result<()> {
    let folder = folder()?;
    for subcommand in [None, Some("init"), Some("check"), Some("policy"), Some("explain")] {
        let help = |flag: &str| run(folder.path(), subcommand.into_iter().chain([flag]));
        let (short, long) = (help("-h")?, help("--help")?);
        for help in [&short, &long] {
            ensure!(help.status == 0 && help.stderr.is_empty(), "{subcommand:?}: {}", help.stderr);
            ensure!(help.stdout.contains("\nExample"), "{subcommand:?} has no example:\n{}", help.stdout);
        }
        ensure!(
            long.stdout.len() > short.stdout.len(),
            "{subcommand:?}: the long help is no longer than the short one"
        );
    }
    Ok(())
}

fn policy_refuses_in_one_sentence() -> anyhow::Result<()> {
    let folder = sites()?;
    for (args, status, sentence) in [
        ("policy set hashed", 2, "give one of hash, flowlet, adaptive, spray"),
        ("policy weight wg0 0", 2, "give 1 to 1000, or auto"),
        ("policy weight wg0 1001", 2, "give 1 to 1000, or auto"),
        ("policy weight wg9 2", 2, "wg9 is no tunnel of site-a: tunnels are wg0, wg1, wg2"),
        ("policy drain wg9", 2, "wg9 is no tunnel of site-a"),
        ("policy pin wg9 --dst 10.20.0.7", 2, "wg9 is no tunnel of site-a"),
        ("policy rule add --dst 10.20.0.7/16 --policy hash", 2, "with bits set behind the prefix"),
        ("policy rule add --dports 80 --policy hash", 2, "ports need a protocol that has them"),
        ("policy rule add --proto tcp", 2, "the rule would do nothing"),
        ("policy rule add --proto tcpp --policy hash", 2, "give a protocol number, or one of"),
        ("policy rule add --proto tcp --dports 90-80 --policy hash", 2, "give a port such as 873"),
        ("policy rule add --src 10.0.0.0/8 --dst fd00::/16 --policy hash", 2, "of different families"),
        ("policy rule del 0", 2, "give a number from 1 on"),
        ("explain 10.10.0.1 fd00::1", 2, "of different families"),
        ("explain 10.10.0.1 10.20.0.1 --proto icmp --sport 1", 2, "has no ports"),
        ("policy show", 1, "the site is not steered"),
        ("policy set hash", 1, "the site is not steered"),
        ("policy weight wg0 2 --save", 1, "the site is not steered"),
        (
            "policy pin wg1",
            2,
            "name the flows to pin, for example `ecmpvpn policy pin wg1 --dst 10.20.0.7`, or give --all",
        ),
        ("policy pin wg1 --all --dst 10.20.0.7", 2, "cannot be used with"),
        ("policy pin wg1 --all", 1, "the site is not steered"),
        ("policy pin wg1 --dst 0.0.0.0/0", 1, "the site is not steered"),
        ("policy rule add --proto udplite --dports 80 --policy hash", 1, "the site is not steered"),
        ("explain 10.10.0.1 10.20.0.1", 2, "a flow of tcp has ports, and they decide its tunnel: give both"),
        ("explain 10.10.0.1 10.20.0.1 --proto udplite --dport 5", 2, "a flow of udplite has ports"),
        ("explain 10.10.0.1 10.20.0.1 --proto icmp", 1, "the site is not steered"),
        ("explain 10.10.0.1 10.20.0.1 --sport 1 --dport 0", 1, "the site is not steered"),
    ] {
        let before = fs::read(folder.path().join("site-a/ecmpvpn.toml"))?;
        let ran = run(folder.path(), args.split(' ').chain(["-c", "site-a/ecmpvpn.toml"]))?;
        ensure!(ran.status == status && ran.stdout.is_empty(), "{args} ended with {}: {}", ran.status, ran.stderr);
        ensure!(ran.stderr.contains(sentence), "{args} said: {}", ran.stderr);
        ensure!(before == fs::read(folder.path().join("site-a/ecmpvpn.toml"))?, "{args} changed the configuration");
    }
    Ok(())
}

fn no_subcommand_is_wrong_usage() -> anyhow::Result<()> {
    let folder = folder()?;
    for args in [&[][..], &["-c", "x"], &["chek"], &["check", "--json"]] {
        let ran = run(folder.path(), args)?;
        ensure!(ran.status == 2 && ran.stdout.is_empty(), "{args:?} ended with {}", ran.status);
        ensure!(ran.stderr.contains("Usage: ecmpvpn"), "{args:?}: {}", ran.stderr);
    }
    Ok(())
}

fn a_reader_that_goes_away_is_no_failure() -> anyhow::Result<()> {
    let folder = sites()?;
    for args in [&["--help"][..], &["init", "--help"], &["check", "-c", "site-a/ecmpvpn.toml"]] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let ran = ran(command(folder.path())?.args(args).stdout(writer).output()?)?;
        ensure!(ran.status == 0 && !ran.stderr.contains("panic"), "{args:?}: {} {}", ran.status, ran.stderr);
    }
    Ok(())
}

fn init_writes_two_sites_that_pass_check() -> anyhow::Result<()> {
    let folder = sites()?;
    ensure!(names(folder.path())? == ["site-a", "site-b"], "{:?}", names(folder.path())?);
    for (site, peer) in [("site-a", "site-b"), ("site-b", "site-a")] {
        let site_folder = folder.path().join(site);
        let mut expected = ["ecmpvpn.toml".to_owned(), format!("{site}.key"), format!("{peer}.psk")];
        expected.sort();
        ensure!(names(&site_folder)? == expected, "{:?}", names(&site_folder)?);
        ensure!(mode(&site_folder)? == 0o700, "{site}: {:o}", mode(&site_folder)?);
        let checked = run(folder.path(), ["check", "-c", &format!("{site}/ecmpvpn.toml")])?;
        let ok = format!("ok: 3 tunnels to 1 peer, 4 prefixes steered by {site} through ecmp0\n");
        ensure!(checked.status == 0 && checked.stdout.starts_with(&ok), "{}{}", checked.stdout, checked.stderr);
        let rest = checked.stdout[ok.len()..].starts_with("a firewall must let pass: UDP from ");
        ensure!(rest && checked.stdout.lines().count() <= 3, "{}", checked.stdout);
    }
    let shared = |path: &str| fs::read(folder.path().join(path));
    ensure!(shared("site-a/site-b.psk")? == shared("site-b/site-a.psk")?, "the shared keys differ");
    ensure!(shared("site-a/site-a.key")? != shared("site-b/site-b.key")?, "the private keys are the same");
    Ok(())
}

fn init_keeps_keys_from_others_whatever_the_umask() -> anyhow::Result<()> {
    let folder = folder()?;
    let binary = binary()?;
    let script = format!("umask 000; exec {} \"$@\"", binary.display());
    let ran = ran(Command::new("sh").args(["-c", &script, "sh"]).args(INIT).current_dir(folder.path()).output()?)?;
    ensure!(ran.status == 0, "{}", ran.stderr);
    for key in ["site-a/site-a.key", "site-a/site-b.psk", "site-b/site-b.key", "site-b/site-a.psk"] {
        let path = folder.path().join(key);
        ensure!(mode(&path)? == 0o600, "{key}: {:o}", mode(&path)?);
        let key = fs::read_to_string(&path)?;
        ensure!(key.len() == 45 && key.ends_with("=\n"), "not as `wg genkey` writes it");
        ensure!(!ran.stdout.contains(key.trim()) && !ran.stderr.contains(key.trim()), "a key was printed");
    }
    Ok(())
}

fn init_overwrites_nothing() -> anyhow::Result<()> {
    for taken in ["site-a", "site-b"] {
        let folder = folder()?;
        fs::create_dir(folder.path().join(taken))?;
        fs::write(folder.path().join(taken).join("mine"), "mine")?;
        let ran = run(folder.path(), INIT)?;
        let expected = format!("ecmpvpn: ./{taken} exists already: remove it, or name another folder with --output\n");
        ensure!(ran.status == 2 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
        ensure!(names(folder.path())? == [taken], "{:?}", names(folder.path())?);
        ensure!(names(&folder.path().join(taken))? == ["mine"], "something was put into {taken}");
    }
    Ok(())
}

fn init_refuses_in_one_sentence_and_writes_nothing() -> anyhow::Result<()> {
    let folder = folder()?;
    let with = |more: &[&str]| run(folder.path(), INIT.iter().chain(["--output", "out"].iter()).chain(more));
    for (more, expected) in [
        (&["--b-name", "site-a"][..], "--a-name and --b-name are both site-a: give every site a name of its own"),
        (
            &["--a-prefix", "10.5.0.0/16"],
            "--a-prefix 10.5.0.0/16 contains --b-endpoint 10.5.6.7: the tunnels' own packets would be steered into the \
             tunnels, so leave that address out",
        ),
        (
            &["--a-prefix", "10.20.0.0/16"],
            "--a-prefix and --b-prefix are both 10.20.0.0/16: a net is behind one site only",
        ),
        (
            &["--a-members", "eno1,eno2"],
            "--a-members names interfaces to bond: add the bond's address, as --a-bond-address 10.2.3.4/24",
        ),
        (
            &["--a-members", "eno1,eno2", "--a-bond-address", "10.9.9.1/24"],
            "--a-bond-address is 10.9.9.1/24, but outer packets leave from --a-endpoint 10.2.3.4: give that address with \
             its prefix length, as 10.2.3.4/24",
        ),
        (
            &["--a-members", "2", "--a-bond-address", "10.2.3.4/24"],
            "--a-bond-address is for a bond that is made here: give --a-members as names, or leave it out",
        ),
    ] {
        let ran = with(more)?;
        ensure!(
            ran.status == 2 && ran.stderr == format!("ecmpvpn: {expected}\n"),
            "{more:?}: {} {}",
            ran.status,
            ran.stderr
        );
    }
    for (more, expected) in [
        (&["--a-prefix", "10.10.0.1/16"][..], "10.10.0.1/16, with bits set behind the prefix: write \"10.10.0.0/16\""),
        (&["--tunnels", "33"], "give 1 to 32"),
        (&["--base-port", "80"], "80 is not in 1024..=64511"),
        (&["--base-port", "65500"], "65500 is not in 1024..=64511"),
        (&["--a-members", "eno1,a-name-far-too-long"], "\"a-name-far-too-long\" is longer than 15 bytes"),
    ] {
        let ran = with(more)?;
        ensure!(ran.status == 2 && ran.stderr.contains(expected), "{more:?}: {} {}", ran.status, ran.stderr);
    }
    // `init` finds this problem only when it reads its configuration back.
    let ran = with(&["--a-members", "eno1,wg0", "--a-bond-address", "10.2.3.4/24"])?;
    let expected = "ecmpvpn: these options make no sound configuration for site-a: name in [[peer.tunnel]] is wg0, taken \
        already by members in [bond]: give every interface a name of its own\n";
    ensure!(ran.status == 2 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
    ensure!(names(folder.path())?.is_empty(), "{:?}", names(folder.path())?);
    Ok(())
}

fn init_that_cannot_write_leaves_nothing() -> anyhow::Result<()> {
    let folder = folder()?;
    fs::write(folder.path().join("file"), "")?;
    let ran = run(folder.path(), INIT.iter().chain(&["--output", "file/out"]))?;
    let expected = "ecmpvpn: making the folder file/out: Not a directory (os error 20)\n";
    ensure!(ran.status == 1 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
    ensure!(names(folder.path())? == ["file"], "{:?}", names(folder.path())?);
    Ok(())
}

/// A private key, and a public key of the far end.
const KEY: &str = "QNXm5mfRz2SVnDAFGh8eTZ8hAgGIAxsIGkIi0QhCiHI=";
const FAR_PUBLIC: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

/// Makes a folder with `wg0.conf` to `wg2.conf`. They have equal ports at both ends, as is usual.
fn wg_quick_files() -> anyhow::Result<TempDir> {
    let folder = folder()?;
    for at in 0..3 {
        let text = format!(
            "[Interface]\nPrivateKey = {KEY}\nListenPort = 500{at}\nAddress = 10.99.0.1/24\nTable = off\n\n[Peer]\n\
             PublicKey = {FAR_PUBLIC}\nAllowedIPs = 10.20.0.0/16\nEndpoint = 10.2.3.5:500{at}\n"
        );
        let file = folder.path().join(format!("wg{at}.conf"));
        fs::write(&file, text)?;
        fs::set_permissions(&file, Permissions::from_mode(0o600))?;
    }
    Ok(folder)
}

const FROM: [&str; 9] = [
    "init",
    "--from",
    "wg0.conf",
    "wg1.conf",
    "wg2.conf",
    "--a-endpoint",
    "10.2.3.4",
    "--b-members=3",
    "--a-members=eno1,eno2,eno3",
];

fn init_from_wg_quick_files_makes_a_site_that_passes_check() -> anyhow::Result<()> {
    let folder = wg_quick_files()?;
    let ran = run(folder.path(), FROM.iter().chain(&["--a-bond-address", "10.2.3.4/24", "--output", "out"]))?;
    ensure!(ran.status == 0, "{}", ran.stderr);
    ensure!(ran.stdout.contains("spread evenly over the bond members, both ways"), "{}", ran.stdout);
    for change in
        ["wg1: port here 5001 -> ", "taken over: private key, site-b's public key", "Table of wg0.conf left out"]
    {
        ensure!(ran.stderr.contains(change), "no {change:?} in {}", ran.stderr);
    }
    let site = folder.path().join("out/site-a");
    ensure!(names(&folder.path().join("out"))? == ["site-a"], "another site was written");
    ensure!(names(&site)? == ["ecmpvpn.toml", "other-site.txt", "site-a.key"], "{:?}", names(&site)?);
    ensure!(mode(&site.join("site-a.key"))? == 0o600, "{:o}", mode(&site.join("site-a.key"))?);
    ensure!(fs::read_to_string(site.join("site-a.key"))?.trim() == KEY, "the key is not the files'");
    let texts = [ran.stdout, ran.stderr, fs::read_to_string(site.join("other-site.txt"))?];
    ensure!(texts.iter().all(|text| !text.contains(KEY)), "the private key was shown");
    let checked = run(folder.path(), ["check", "-c", "out/site-a/ecmpvpn.toml"])?;
    ensure!(checked.status == 0 && !checked.stderr.contains("share"), "{}{}", checked.stdout, checked.stderr);
    Ok(())
}

fn init_from_files_that_disagree_writes_nothing() -> anyhow::Result<()> {
    let folder = wg_quick_files()?;
    let second = folder.path().join("wg1.conf");
    let text = fs::read_to_string(&second)?;
    for (from, to, expected) in [
        (FAR_PUBLIC, "CM4X0Qxjy4bzYkzEeHXgJ6yHgqpCkcxgMvRCUhaTqXQ=", "wg1.conf has another PublicKey than wg0.conf: "),
        ("10.2.3.5:5001", "vpn.example.net:5001", "wg1.conf has the Endpoint vpn.example.net, a name: "),
        ("Endpoint", "#", "wg1.conf has no Endpoint: "),
        (KEY, &KEY[1..], "wg1.conf:2: PrivateKey is not a WireGuard key: "),
    ] {
        fs::write(&second, text.replace(from, to))?;
        let ran = run(folder.path(), FROM.iter().chain(&["--a-bond-address", "10.2.3.4/24", "--output", "out"]))?;
        let description = ran.stderr.starts_with(&format!("ecmpvpn: {expected}")) && ran.stderr.lines().count() == 1;
        ensure!(ran.status == 2 && description, "{} {}", ran.status, ran.stderr);
        ensure!(!ran.stderr.contains(&KEY[1..]) && !folder.path().join("out").exists(), "{}", ran.stderr);
    }
    let ran = run(folder.path(), ["init", "--from", "wg9.conf", "--a-endpoint", "10.2.3.4"])?;
    let expected = "ecmpvpn: reading wg9.conf: No such file or directory (os error 2)\n";
    ensure!(ran.status == 2 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
    Ok(())
}

fn init_from_reads_any_editors_text_but_not_without_bound() -> anyhow::Result<()> {
    let folder = wg_quick_files()?;
    let first = folder.path().join("wg0.conf");
    let text = fs::read_to_string(&first)?;
    fs::write(&first, format!("\u{feff}{}", text.replace('\n', "\r\n")))?;
    fs::set_permissions(&first, Permissions::from_mode(0o644))?;
    let ran = run(folder.path(), FROM.iter().chain(&["--a-bond-address", "10.2.3.4/24"]))?;
    ensure!(ran.status == 0, "{}", ran.stderr);
    let warnings: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("warning")).collect();
    let expected = "ecmpvpn: warning: wg0.conf holds a private key, and others than its owner can use it (mode 0644): run \
        `chmod 600 wg0.conf`";
    ensure!(warnings == [expected], "{}", ran.stderr);
    for (file, expected) in [
        ("/dev/zero", "/dev/zero is too large for a wg-quick file: name one such as wg0.conf"),
        ("junk.conf", "junk.conf is not UTF-8 text: name a wg-quick file such as wg0.conf"),
    ] {
        fs::write(folder.path().join("junk.conf"), [0xff, 0xfe, 0])?;
        fs::set_permissions(folder.path().join("junk.conf"), Permissions::from_mode(0o600))?;
        let ran = run(folder.path(), ["init", "--from", file, "--a-endpoint", "10.2.3.4"])?;
        ensure!(ran.status == 2 && ran.stderr == format!("ecmpvpn: {expected}\n"), "{} {}", ran.status, ran.stderr);
    }
    Ok(())
}

fn check_warns_of_tunnels_that_share_a_member() -> anyhow::Result<()> {
    let folder = wg_quick_files()?;
    let ran = run(folder.path(), FROM.iter().chain(&["--a-bond-address", "10.2.3.4/24"]))?;
    ensure!(ran.status == 0, "{}", ran.stderr);
    let file = folder.path().join("site-a/ecmpvpn.toml");
    let mut ports = 0;
    let equal = |line: &str| {
        let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| key.ends_with("_port")) else {
            return line.to_owned();
        };
        ports += 1;
        format!("{key} = {}", 5000 + (ports - 1) / 2)
    };
    let text: Vec<String> = fs::read_to_string(&file)?.lines().map(equal).collect();
    fs::write(&file, text.join("\n"))?;
    let checked = run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"])?;
    let expected = "ecmpvpn: warning: the tunnels to site-b: all 3 tunnels share member 0: bonding gains nothing; use ";
    ensure!(
        checked.status == 0 && checked.stdout.starts_with("ok: 3 tunnels"),
        "{} {}",
        checked.status,
        checked.stdout
    );
    ensure!(checked.stderr.contains(expected), "{}", checked.stderr);
    Ok(())
}

/// The number of the first line of `text` that starts with `start`, counted from 1.
fn line(text: &str, start: &str) -> anyhow::Result<usize> {
    Ok(text.lines().position(|line| line.starts_with(start)).with_context(|| format!("no line {start}"))? + 1)
}

/// Replaces the first line that starts with `start`, and returns its number.
fn edit(file: &Path, start: &str, replacement: &str) -> anyhow::Result<usize> {
    let text = fs::read_to_string(file)?;
    let number = line(&text, start)?;
    let lines = text.lines().enumerate().map(|(at, line)| if at + 1 == number { replacement } else { line });
    fs::write(file, lines.collect::<Vec<_>>().join("\n"))?;
    Ok(number)
}

fn check_reports_each_problem_in_one_sentence() -> anyhow::Result<()> {
    for (start, replacement, expected) in [
        (
            "listen_port",
            "lisen_port = 51820",
            "unknown key \"lisen_port\" in [[peer.tunnel]]: did you mean \"listen_port\"?",
        ),
        ("mtu", "mtu = 900", "mtu in [steering] is 900, out of range: give 1280 to 9000"),
        (
            "listen_port",
            "listen_port = 443",
            "listen_port in [[peer.tunnel]] is 443, a port reserved for system services: give 1024 to 65535",
        ),
        (
            "public_key",
            "public_key = \"not a key\"",
            "public_key in [[peer]] is not a WireGuard key: a key is 44 characters of base64, as `wg genkey` prints",
        ),
        (
            "device",
            "device = \"sixteen-bytes-ab\"",
            "device in [steering] is \"sixteen-bytes-ab\", which is longer than 15 bytes: give 1 to 15 letters, digits or dashes",
        ),
        ("backend", "backend = kernel", "not TOML: string values must be quoted, expected literal string"),
    ] {
        let folder = sites()?;
        let number = edit(&folder.path().join("site-a/ecmpvpn.toml"), start, replacement)?;
        let ran = run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"])?;
        let expected = format!("ecmpvpn: site-a/ecmpvpn.toml:{number}: {expected}\n");
        ensure!(ran.status == 4 && ran.stdout.is_empty(), "{replacement}: {} {}", ran.status, ran.stdout);
        ensure!(ran.stderr == expected, "{replacement}: {}", ran.stderr);
    }

    let folder = sites()?;
    let file = folder.path().join("site-a/ecmpvpn.toml");
    let endpoint = line(&fs::read_to_string(&file)?, "remote_endpoint")?;
    let prefixes = edit(&file, "prefixes", "prefixes = [\"10.5.0.0/16\"]")?;
    let mtu = edit(&file, "mtu", "mtu = 1")?;
    let ran = run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"])?;
    let expected = format!(
        "ecmpvpn: site-a/ecmpvpn.toml:{mtu}: mtu in [steering] is 1, out of range: give 1280 to 9000\n\
         ecmpvpn: site-a/ecmpvpn.toml:{prefixes}: prefixes in [[peer]] has 10.5.0.0/16, which contains 10.5.6.7, \
         remote_endpoint in [[peer]] on line {endpoint}: the tunnels' own packets would be steered into the tunnels, \
         so leave that address out\n"
    );
    ensure!(ran.status == 4 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
    Ok(())
}

fn check_refuses_keys_that_are_no_secret() -> anyhow::Result<()> {
    let folder = sites()?;
    let key = folder.path().join("site-a/site-a.key");
    fs::set_permissions(&key, Permissions::from_mode(0o644))?;
    let check = || run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"]);
    let expect = |phrase: &str| -> anyhow::Result<()> {
        let ran = check()?;
        let expected = format!("ecmpvpn: site-a/ecmpvpn.toml:5: private_key_file in [site] names {phrase}\n");
        ensure!(ran.status == 4 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
        Ok(())
    };
    expect("site-a/site-a.key, which others than its owner can use (mode 0644): run `chmod 600 site-a/site-a.key`")?;
    fs::remove_file(&key)?;
    expect("site-a/site-a.key, which does not exist: write it with `ecmpvpn init` or `wg genkey`, mode 0600")?;
    fs::write(&key, "hunter2")?;
    fs::set_permissions(&key, Permissions::from_mode(0o600))?;
    expect(
        "site-a.key, whose content is not a WireGuard key: a key is 44 characters of base64, as `wg genkey` prints",
    )?;
    // The program must not block on a pipe that nobody writes to.
    fs::remove_file(&key)?;
    ensure!(Command::new("mkfifo").args(["-m", "600"]).arg(&key).status()?.success(), "mkfifo failed");
    expect("site-a/site-a.key, which is not a regular file: name a file that holds one key")
}

fn check_refuses_a_strangers_key_file() -> anyhow::Result<()> {
    let folder = sites()?;
    let chown = |file: &str| std::os::unix::fs::chown(folder.path().join(file), Some(12345), None);
    chown("site-a/site-a.key")?;
    let ran = run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"])?;
    let expected = "ecmpvpn: site-a/ecmpvpn.toml:5: private_key_file in [site] names site-a/site-a.key, which belongs to \
        another user (uid 12345): run `chown root site-a/site-a.key`\n";
    ensure!(ran.status == 4 && ran.stderr == expected, "{} {}", ran.status, ran.stderr);
    // The owner of the configuration may also own the key.
    chown("site-a/ecmpvpn.toml")?;
    let ran = run(folder.path(), ["check", "-c", "site-a/ecmpvpn.toml"])?;
    ensure!(ran.status == 0, "{} {}", ran.status, ran.stderr);
    Ok(())
}

fn check_of_no_configuration_is_wrong_usage() -> anyhow::Result<()> {
    let folder = folder()?;
    let expect = |file: &str, status: i32, expected: &str| -> anyhow::Result<()> {
        let ran = run(folder.path(), ["check", "-c", file])?;
        ensure!(
            ran.status == status && ran.stderr == format!("ecmpvpn: {expected}\n"),
            "{} {}",
            ran.status,
            ran.stderr
        );
        Ok(())
    };
    expect("gone", 2, "there is no configuration gone: write one with `ecmpvpn init`, or name yours with `-c FILE`")?;
    expect(".", 2, "reading the configuration .: Is a directory (os error 21)")?;
    fs::write(folder.path().join("empty"), "")?;
    expect("empty", 4, "empty: is empty: write a configuration with `ecmpvpn init`")?;
    fs::copy(binary()?, folder.path().join("junk"))?;
    let ran = run(folder.path(), ["check", "-c", "junk"])?;
    ensure!(ran.status == 4 || ran.status == 2, "{}", ran.status);
    ensure!(ran.stderr.lines().count() == 1 && ran.stderr.starts_with("ecmpvpn: junk:"), "{}", ran.stderr);
    Ok(())
}

fn a_wrong_log_filter_is_wrong_usage() -> anyhow::Result<()> {
    let folder = sites()?;
    let args = ["check", "-c", "site-a/ecmpvpn.toml"];
    let ran = ran(command(folder.path())?.args(args).env("ECMPVPN_LOG", "ecmpvpn=loud").output()?)?;
    let start = "ecmpvpn: ECMPVPN_LOG is \"ecmpvpn=loud\": give a list such as warn,ecmpvpn=debug: ";
    ensure!(ran.status == 2 && ran.stderr.starts_with(start), "{} {}", ran.status, ran.stderr);
    Ok(())
}
