//! The bond and its members: makes or reuses the bond, enslaves and releases members.

use std::io;
use std::time::Duration;

use netlink_packet_route::link::{
    BondAdInfo, BondLacpRate, BondMode as KernelMode, BondXmitHashPolicy, InfoBond, InfoKind, LinkMessage,
};
use rtnetlink::{LinkBond, LinkMessageBuilder, LinkUnspec};
use tokio::time::{Instant, sleep};

use super::error::{Conflict, During as _, HostError};
use super::journal::Journal;
use super::links::Link;
use super::netlink::Netlink;
use super::record::MemberState;
use super::record::{LinkId, Undo};
use crate::config::{Bond, BondMode, LacpRate, XmitHashPolicy};

const POLL: Duration = Duration::from_millis(50);

fn kernel_policy(policy: XmitHashPolicy) -> BondXmitHashPolicy {
    match policy {
        XmitHashPolicy::Layer2 => BondXmitHashPolicy::Layer2,
        XmitHashPolicy::Layer34 => BondXmitHashPolicy::Layer34,
        XmitHashPolicy::Layer23 => BondXmitHashPolicy::Layer23,
        XmitHashPolicy::Encap23 => BondXmitHashPolicy::Encap23,
        XmitHashPolicy::Encap34 => BondXmitHashPolicy::Encap34,
        XmitHashPolicy::VlanSrcmac => BondXmitHashPolicy::VlanSrcMac,
    }
}

fn kernel_mode(mode: BondMode) -> KernelMode {
    match mode {
        BondMode::Lacp => KernelMode::Ieee8023Ad,
        BondMode::BalanceXor => KernelMode::BalanceXor,
    }
}

fn kernel_rate(rate: LacpRate) -> BondLacpRate {
    match rate {
        LacpRate::Slow => BondLacpRate::Slow,
        LacpRate::Fast => BondLacpRate::Fast,
    }
}

/// The netlink message that makes the bond.
pub fn message(bond: &Bond, mtu: u32) -> LinkMessage {
    let message = LinkBond::new(bond.name.as_str())
        .mode(kernel_mode(bond.mode))
        .miimon(bond.miimon_ms)
        .xmit_hash_policy(kernel_policy(bond.xmit_hash_policy));
    let message = match bond.mode {
        BondMode::Lacp => message.ad_lacp_rate(kernel_rate(bond.lacp_rate)),
        // The kernel refuses `lacp_rate` in other modes.
        BondMode::BalanceXor => message,
    };
    message.mtu(mtu).build()
}

/// Checks that an existing bond has the configured settings.
///
/// # Errors
/// The first setting that differs.
pub fn check_settings(desired: &Bond, link: &Link) -> Result<(), Conflict> {
    let differs = |setting, is: String, desired_value: String| {
        Err(Conflict::BondDiffers { bond: desired.name.clone(), setting, is, desired: desired_value })
    };
    for info in link.bond.iter().flat_map(|bond| &bond.settings) {
        match info {
            InfoBond::Mode(mode) if *mode != kernel_mode(desired.mode) => {
                return differs("mode", mode.to_string(), kernel_mode(desired.mode).to_string());
            }
            InfoBond::MiiMon(ms) if *ms != desired.miimon_ms => {
                return differs("miimon_ms", ms.to_string(), desired.miimon_ms.to_string());
            }
            InfoBond::XmitHashPolicy(policy) if *policy != kernel_policy(desired.xmit_hash_policy) => {
                return differs("xmit_hash_policy", policy.to_string(), desired.xmit_hash_policy.as_str().to_owned());
            }
            InfoBond::AdLacpRate(rate) if desired.mode == BondMode::Lacp && *rate != kernel_rate(desired.lacp_rate) => {
                return differs("lacp_rate", rate.to_string(), kernel_rate(desired.lacp_rate).to_string());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Saves what the member has, removes its addresses, and enslaves it.
pub async fn enslave(netlink: &Netlink, journal: &mut Journal, member: &str, bond: &LinkId) -> Result<(), HostError> {
    let operation = || format!("enslaving {member} to {bond}");
    let link = netlink.link(member).await.during(operation)?;
    let link = link.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV)).during(operation)?;
    let saved = MemberState::read(netlink, &link).await.during(|| format!("reading the addresses of {member}"))?;
    journal.record(Undo::ReleaseMember { member: LinkId::foreign(&link), bond: bond.clone(), saved })?;
    MemberState::strip(netlink, link.ifindex).await.during(|| format!("removing the addresses of {member}"))?;
    netlink.set_down(link.ifindex).await.during(|| format!("setting {member} down"))?;
    let master = bond.ifindex.unwrap_or(0);
    let message = LinkMessageBuilder::<LinkUnspec>::new().index(link.ifindex).controller(master).build();
    netlink.set_link(message).await.during(operation)?;
    netlink.set_up(link.ifindex).await.during(|| format!("setting {member} up"))
}

/// Releases a member and restores what it had.
pub async fn release(netlink: &Netlink, member: &LinkId, bond: &LinkId, saved: &MemberState) -> io::Result<()> {
    match release_from(netlink, member, bond).await? {
        Some(link) => saved.restore(netlink, &link).await,
        None => Ok(()),
    }
}

/// The part of [`release`] that does not wait until the member is usable.
pub async fn begin_release(netlink: &Netlink, member: &LinkId, bond: &LinkId, saved: &MemberState) -> io::Result<()> {
    match release_from(netlink, member, bond).await? {
        Some(link) => saved.restore_device(netlink, &link).await,
        None => Ok(()),
    }
}

/// Takes a member out of its bond. Returns the device. `None`: it is gone, or belongs to another master now.
async fn release_from(netlink: &Netlink, member: &LinkId, bond: &LinkId) -> io::Result<Option<Link>> {
    let Some(link) = netlink.find(member).await? else { return Ok(None) };
    match link.master {
        Some(master) if bond.ifindex == Some(master) => {
            let message = LinkMessageBuilder::<LinkUnspec>::new().index(link.ifindex).nocontroller().build();
            netlink.set_link(message).await?;
        }
        // Somebody else has enslaved it to another device meanwhile: leave it there.
        Some(_) => return Ok(None),
        None => {}
    }
    Ok(Some(link))
}

/// Waits until every member carries traffic, at most `patience`. Returns a warning text if something is still missing.
pub async fn wait_until_ready(netlink: &Netlink, bond: &Bond, patience: Duration) -> io::Result<Option<String>> {
    let deadline = Instant::now() + patience;
    loop {
        let Some(link) = netlink.link(bond.name.as_str()).await? else {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        };
        let lacks = why_not_ready(bond, &link);
        if lacks.is_none() || Instant::now() >= deadline {
            return Ok(lacks);
        }
        sleep(POLL).await;
    }
}

fn why_not_ready(bond: &Bond, link: &Link) -> Option<String> {
    let name = &bond.name;
    if !link.carrier {
        return Some(format!("{name} has no carrier: check the cables of its members"));
    }
    if bond.mode != BondMode::Lacp {
        return None;
    }
    let info = link.bond.iter().flat_map(|bond| &bond.settings).find_map(|info| match info {
        InfoBond::AdInfo(info) => Some(info.as_slice()),
        _ => None,
    });
    let info = info.unwrap_or_default();
    let has_partner = info.iter().any(|i| matches!(i, BondAdInfo::PartnerMac(mac) if *mac != [0; 6]));
    if !has_partner {
        return Some(format!(
            "no LACP partner answers on {name}: only one member carries traffic until the switch ports form a LAG"
        ));
    }
    let ports = info.iter().find_map(|i| match i {
        BondAdInfo::NumPorts(ports) => Some(usize::from(*ports)),
        _ => None,
    });
    let (ports, members) = (ports.unwrap_or(0), bond.members.len());
    (ports < members).then(|| format!("only {ports} of {members} members of {name} are in its active aggregator"))
}

pub const KIND: InfoKind = InfoKind::Bond;
