//! Commands on a running site need only its name.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use ecmpvpn::exit::Exit;
use lab::kind::Kind;
use lab::sites::Lab;
use rustix::process::Signal;

use super::stage::{SETTLE, lab};

/// What is done to a site's files, and whether the site's name can still be read from its configuration.
type Break = (&'static str, fn(&Path) -> Result<()>, bool);

const BREAKS: [Break; 3] = [
    ("a junk line", junk, true),
    ("a removed key file", without_key, true),
    ("a removed configuration", without_configuration, false),
];

fn junk(config: &Path) -> Result<()> {
    let text = fs::read_to_string(config)?;
    Ok(fs::write(config, format!("this is junk\n{text}"))?)
}

fn without_key(config: &Path) -> Result<()> {
    let folder = config.parent().context("a file is in a folder")?;
    let keys = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    let key = keys.iter().map(fs::DirEntry::path).find(|path| path.extension().is_some_and(|end| end == "key"));
    Ok(fs::remove_file(key.context("there is a key file")?)?)
}

fn without_configuration(config: &Path) -> Result<()> {
    Ok(fs::remove_file(config)?)
}

/// Runs a command at the first site, which must succeed, and returns its output.
fn works(lab: &Lab, words: &[&str], what: &str) -> Result<String> {
    let (code, output, complaint) = lab.ecmpvpn(0, words)?;
    ensure!(code == 0, "with {what}, {words:?} ended with {code}: {complaint}");
    Ok(output)
}

pub fn a_broken_configuration_stops_no_command(kind: Kind) -> Result<()> {
    for (what, spoil, is_named) in BREAKS {
        let lab = lab(kind)?;
        let site = &lab.sites[0];
        let before = site.dump()?;
        let [a, b] = lab.run()?;
        spoil(&site.config)?;
        let option = ["--site", &site.name];
        let option: &[&str] = if is_named { &[] } else { &option };
        let with =
            |words: &[&'static str]| -> Vec<&str> { words.iter().copied().chain(option.iter().copied()).collect() };

        let stats: serde_json::Value = serde_json::from_str(&works(&lab, &with(&["stats", "--json"]), what)?)?;
        ensure!(stats["site"] == site.name.as_str() && stats["steering_device"] == "ecmp0", "{stats:#}");
        let peer = &lab.sites[1].name;
        ensure!(stats["tunnels"].as_array().is_some_and(|all| all.len() == 3), "{stats:#}");
        ensure!(stats["tunnels"][2]["peer"] == peer.as_str() && stats["tunnels"][2]["state"] == "up", "{stats:#}");
        works(&lab, &with(&["stats"]), what)?;
        works(&lab, &with(&["policy", "weight", "wg0", "7"]), what)?;
        let shown: serde_json::Value = serde_json::from_str(&works(&lab, &with(&["policy", "show", "--json"]), what)?)?;
        ensure!(shown["peers"][0]["tunnels"][0]["weight"] == 7 && shown["site"] == site.name.as_str(), "{shown:#}");
        let text = works(&lab, &with(&["policy", "show"]), what)?;
        ensure!(!text.contains('*'), "with {what} it is not known what is saved:\n{text}");
        let flow = ["explain", "10.10.0.10", "10.20.0.10", "--sport", "40000", "--dport", "443", "--json"];
        let explained: serde_json::Value = serde_json::from_str(&works(&lab, &with(&flow), what)?)?;
        ensure!(explained["peer"] == peer.as_str(), "{explained:#}");

        // Only `--save` needs the file.
        let (code, _, complaint) = lab.ecmpvpn(0, &with(&["policy", "weight", "wg0", "9", "--save"]))?;
        ensure!(code == Exit::Usage as i32, "with {what}, --save ended with {code}: {complaint}");
        let shown = works(&lab, &with(&["policy", "show", "--json"]), what)?;
        ensure!(serde_json::from_str::<serde_json::Value>(&shown)?["peers"][0]["tunnels"][0]["weight"] == 7, "{shown}");
        // The running process reads the file, and says what is wrong with it.
        let (code, _, complaint) = lab.ecmpvpn(0, &with(&["reload"]))?;
        ensure!(code == Exit::Usage as i32 && !complaint.is_empty(), "reload ended with {code}: {complaint}");
        let (code, _, complaint) = lab.ecmpvpn(0, &with(&["confirm"]))?;
        ensure!(code == 1 && complaint.contains("does not wait for a confirmation"), "{code}: {complaint}");

        a.stop(Signal::KILL)?;
        if !is_named {
            // The path may be mistyped: the file stands for no other site.
            let (code, _, complaint) = lab.ecmpvpn(0, &["down"])?;
            ensure!(code == Exit::Usage as i32 && complaint.contains("add `--site"), "{code}: {complaint}");
            ensure!(complaint.contains(&site.name), "{complaint}");
        }
        works(&lab, &with(&["down"]), what)?;
        let left = before.wait_for_same(SETTLE, || site.dump())?;
        ensure!(left.is_none(), "with {what}, `down` left:\n{}", left.unwrap_or_default());
        drop(b);
    }
    Ok(())
}
