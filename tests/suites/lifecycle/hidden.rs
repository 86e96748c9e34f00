//! `ip netns exec` mounts `/sys` anew, without the BPF file system.

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::sites::binary;
use std::process::Command;

use super::stage::lab;

pub fn a_site_whose_maps_are_hidden_is_not_called_unsteered(kind: Kind) -> Result<()> {
    let lab = lab(kind, 2)?;
    let _running = lab.run()?;
    let site = &lab.sites[0];
    let within = |words: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", site.gateway.name()]).arg(binary()?).args(words).arg("-c").arg(&site.config);
        let output = command.output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    for words in [&["stats"][..], &["policy", "show"]] {
        let (code, said) = within(words)?;
        let way = format!("use `nsenter --net=/run/netns/{} ecmpvpn", site.gateway.name());
        ensure!(code == Some(1), "{words:?} ended with {code:?}: {said}");
        ensure!(said.contains("no BPF file system is mounted") && said.contains(&way), "{words:?}: {said}");
        ensure!(!said.contains("not steered"), "{words:?}: {said}");
    }
    // As advised.
    let net = format!("--net=/run/netns/{}", site.gateway.name());
    let mut command = Command::new("nsenter");
    command.arg(net).arg(binary()?).args(["stats", "--json", "-c"]).arg(&site.config);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
