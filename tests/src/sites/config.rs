//! Ports and configurations of a lab's two sites.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use ecmpvpn::config::{PresharedKey, PrivateKey, PublicKey, XmitHashPolicy};
use ecmpvpn::plan::bond_hash::{self, OuterFlow};
use ecmpvpn::plan::ports::{self, End, Request};

use super::{Lab, LabTunnel, MTU, Options, Site, Underlay};

const POLICY: XmitHashPolicy = XmitHashPolicy::Layer34;

/// Plans the tunnels' ports for the bond's hash, as `init` does.
pub(super) fn plan(options: &Options, sites: &[Site; 2]) -> Result<Vec<LabTunnel>> {
    let [a, b] = sites.each_ref().map(|site| End::new(site.endpoint.into(), options.members, POLICY));
    let plan = ports::plan(&Request { a, b, tunnels: options.tunnels, base_port: 51820 })
        .context("planning the lab's ports")?;
    let mut tunnels = Vec::with_capacity(options.tunnels);
    for (slot, pair) in (0_u8..).zip(&plan.pairs) {
        let ports = [pair.a, pair.b];
        let mut members = [0; 2];
        for (end, member) in members.iter_mut().enumerate() {
            let flow = OuterFlow {
                src: sites[end].endpoint.into(),
                dst: sites[1 - end].endpoint.into(),
                sport: ports[end],
                dport: ports[1 - end],
                macs: None,
            };
            *member = bond_hash::member(POLICY, &flow, options.members).index().context("layer3+4 needs no more")?;
        }
        let address = |end| Ipv4Addr::new(169, 254, 77, 2 * slot + end);
        tunnels.push(LabTunnel { name: format!("wg{slot}"), ports, addresses: [address(0), address(1)], members });
    }
    Ok(tunnels)
}

/// Writes both sites' files.
pub(super) fn write(lab: &mut Lab) -> Result<()> {
    let keys = [PrivateKey::generate(), PrivateKey::generate()];
    let preshared = PresharedKey::generate();
    for (end, key) in keys.iter().enumerate() {
        let dir = lab.dir.path().join(&lab.sites[end].name);
        fs::create_dir(&dir)?;
        secret(&dir.join("site.key"), &key.to_base64())?;
        secret(&dir.join("site.psk"), &preshared.to_base64())?;
        let text = text(lab, end, keys[1 - end].public_key());
        let file = dir.join("ecmpvpn.toml");
        fs::write(&file, text)?;
        lab.sites[end].config = file;
    }
    Ok(())
}

fn secret(path: &Path, text: &str) -> Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(writeln!(file, "{text}")?)
}

fn text(lab: &Lab, end: usize, far_key: PublicKey) -> String {
    let (near, far, options) = (&lab.sites[end], &lab.sites[1 - end], &lab.options);
    let (n, f) = (near.number, far.number);
    let mut text = format!(
        "[site]\nname = \"{}\"\nprivate_key_file = \"site.key\"\naddresses = [\"10.100.0.{n}/32\", \"fd00:100::{n}/128\"]\n\n",
        near.name
    );
    if options.underlay == Underlay::Bonded {
        let members: Vec<String> = (0..options.members).map(|member| format!("\"u{member}\"")).collect();
        let _ = write!(
            text,
            "[bond]\nname = \"bond0\"\nmembers = [{}]\nmode = \"802.3ad\"\nxmit_hash_policy = \"layer3+4\"\n\
             lacp_rate = \"fast\"\nmiimon_ms = 100\naddresses = [\"{}/24\"]\n\n",
            members.join(", "),
            near.endpoint
        );
    }
    let _ = write!(
        text,
        "[steering]\ndevice = \"ecmp0\"\npolicy = \"{}\"\nbackend = \"{}\"\nmtu = {MTU}\nseed = 0x1f2e3d4c\n\n\
         [[peer]]\nname = \"{}\"\npublic_key = \"{far_key}\"\npreshared_key_file = \"site.psk\"\n\
         local_endpoint = \"{}\"\nremote_endpoint = \"{}\"\n\
         remote_bond = {{ members = {}, xmit_hash_policy = \"layer3+4\" }}\n\
         prefixes = [\"10.{f}.0.0/16\", \"fd00:{f}::/48\", \"10.100.0.{f}/32\", \"fd00:100::{f}/128\"]\n\n",
        options.policy, options.backend, far.name, near.endpoint, far.endpoint, options.members
    );
    for tunnel in &lab.tunnels {
        let _ = write!(
            text,
            "[[peer.tunnel]]\nname = \"{}\"\nlisten_port = {}\nremote_port = {}\naddress = \"{}/31\"\n\n",
            tunnel.name,
            tunnel.ports[end],
            tunnel.ports[1 - end],
            tunnel.addresses[end]
        );
    }
    text + &options.extra
}
