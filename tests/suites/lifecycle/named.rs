//! A remote endpoint that is a host name.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::kind::Kind;
use lab::sites::Lab;
use lab::traffic::TcpLoad;
use rustix::process::Signal;

use super::stage::{lab, rewrite};

const NAME: &str = "site-b.example";
/// An address that no host has.
const NOBODY: &str = "10.2.3.99";

/// The current endpoints of A's tunnels, without the port.
pub fn endpoints(lab: &Lab) -> Result<Vec<String>> {
    let stats = lab.stats(0)?;
    let tunnels = stats["tunnels"].as_array().context("no tunnels")?;
    let address = |text: &str| text.rsplit_once(':').map_or(text, |(address, _)| address).to_owned();
    Ok(tunnels.iter().map(|tunnel| address(tunnel["endpoint"].as_str().unwrap_or_default())).collect())
}

/// If nobody answers at the first address of a name, A tries the second one. B does not know A's address.
pub fn a_name_is_followed_to_where_the_site_is(kind: Kind) -> Result<()> {
    let lab = lab(kind, 3)?;
    let here = lab.sites[1].endpoint.to_string();
    let hosts = lab.sites[0].config.with_file_name("hosts");
    let localhost = "127.0.0.1 localhost";
    fs::write(&hosts, format!("{localhost}\n{NOBODY} {NAME}\n"))?;
    rewrite(&lab, 0, |text| {
        text.replacen(&format!("remote_endpoint = \"{here}\""), &format!("remote_endpoint = \"{NAME}\""), 1)
    })?;
    let a_is = lab.sites[0].endpoint.to_string();
    rewrite(&lab, 1, |text| {
        text.replacen(&format!("remote_endpoint = \"{a_is}\""), &format!("remote_endpoint = \"{NOBODY}\""), 1)
    })?;
    // Makes the resolver read both lines of the name. On most hosts, host.conf(5) does that, but the virtual machine
    // has no such file.
    let [mut a, mut b] = [lab.start_in(0, &[], &[("RESOLV_MULTI", "on")])?, lab.start(1)?];
    a.wait_until_said("is up:")?;
    b.wait_until_said("is up:")?;
    if kind == Kind::Kernel {
        ensure!(endpoints(&lab)?.iter().all(|at| at == NOBODY), "{:?}", endpoints(&lab)?);
    }
    fs::write(&hosts, format!("{localhost}\n{NOBODY} {NAME}\n{here} {NAME}\n"))?;
    a.wait_until_said(&format!("is {here} now"))?;
    let mut running = [a, b];
    lab.warm_up(&mut running)?;
    if kind == Kind::Kernel {
        ensure!(endpoints(&lab)?.iter().all(|at| *at == here), "{:?}", endpoints(&lab)?);
    }
    // The endpoint stays, although the name still has both addresses.
    std::thread::sleep(Duration::from_secs(8));
    ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000);
    let output = running[0].output();
    ensure!(output.matches(" now").count() == 1, "{output}");
    if kind == Kind::Kernel {
        // The name cannot be resolved any more, but the tunnels exist.
        fs::write(&hosts, format!("{localhost}\n"))?;
        let [a, _b] = running;
        a.stop(Signal::KILL)?;
        let mut again = lab.start(0)?;
        again.wait_until_said("is up:")?;
        ensure!(again.output().contains(&format!("keep using {here}")), "{}", again.output());
        ensure!(TcpLoad::bytes(8, 50_000).run(lab.path_v4())?.received() == 400_000);
    }
    Ok(())
}
