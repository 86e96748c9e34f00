//! The device that holds arriving packets until their time, so that sprayed flows leave in order: an `ifb` with `fq`.
//!
//! `fq` releases a packet at its delivery time, and keeps packets of a flow whose times are out of order in a tree
//! (`net/sched/sch_fq.c`). `ifb` then gives the packet back to the device that it arrived on, past the TC programs
//! (`drivers/net/ifb.c`): rules, reverse path filter and statistics see it arrive there.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::device::New;
use super::error::{During as _, HostError};
use super::journal::Journal;
use super::netlink::Netlink;
use super::preflight;
use super::record::Undo;
use super::sysctl;
use crate::plan::Plan;

/// Packets that the queue holds at most, of all flows and of one: 50 ms at 20 Gbit/s. `fq` has 10,000 and 100.
const LIMIT: u32 = 100_000;
/// Its Ethernet address, which nobody sees; the kernel would draw one. Locally administered, "ecmpo".
const ADDRESS: [u8; 6] = [0x02, b'e', b'c', b'm', b'p', b'o'];
/// Attributes of `fq`. Source: `include/uapi/linux/pkt_sched.h`.
const TCA_FQ_PLIMIT: u16 = 1;
const TCA_FQ_FLOW_PLIMIT: u16 = 2;

/// Loads the driver. If the kernel itself loaded it, it would also make ifb0 and ifb1.
pub fn load_driver() {
    preflight::load_driver("ifb", "numifbs=0");
}

/// Makes the device, or uses the one that an earlier run has left. Returns its interface index.
///
/// # Errors
/// The kernel has no `ifb` or no `fq`, or the name is taken.
pub async fn ensure(plan: &Plan, journal: &mut Journal) -> Result<u32, HostError> {
    let netlink = Netlink::open()?;
    let (name, alias) = (plan.holding_name(), Plan::link_alias(&plan.site));
    let there = netlink.link(&name).await.during(|| format!("looking {name} up"))?;
    let own = there.filter(|link| link.is(&InfoKind::Ifb) && link.alias.as_deref() == Some(&alias));
    let index = if let Some(link) = own {
        link.ifindex
    } else {
        let new = New { name: &name, kind: "ifb", alias: &alias };
        let mut message = LinkMessageBuilder::<LinkUnspec>::new().name(name.clone()).build();
        message.attributes.push(LinkAttribute::Address(ADDRESS.to_vec()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        new.create(&netlink, journal, message).await?
    };
    // It has no addresses, and sends nothing by itself.
    let quiet = sysctl::write_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
    quiet.during(|| format!("preparing IPv6 on {name}"))?;
    let prepared = async {
        netlink.request(RouteNetlinkMessage::NewQueueDiscipline(queue(index)), NLM_F_CREATE | NLM_F_REPLACE).await?;
        netlink.set_up(index).await
    };
    match prepared.await.during(|| format!("preparing {name}")) {
        Ok(()) => Ok(index),
        Err(error) => {
            // Useless without its queue.
            if netlink.delete_link(index).await.is_ok() {
                let is_it = |undo: &Undo| matches!(undo, Undo::DeleteLink { link, .. } if link.ifindex == Some(index));
                journal.forget(is_it)?;
            }
            Err(error)
        }
    }
}

/// Whether the device with this index is there and up. A packet that is redirected to another one is lost.
pub async fn works(index: u32) -> bool {
    let Ok(netlink) = Netlink::open() else { return true };
    netlink.link_at(index).await.is_ok_and(|link| link.is_some_and(|link| link.up && link.is(&InfoKind::Ifb)))
}

/// Removes the device, if there is one.
///
/// # Errors
/// It cannot be looked up or deleted, or the journal cannot be written.
pub async fn remove(plan: &Plan, journal: &mut Journal) -> Result<(), HostError> {
    let netlink = Netlink::open()?;
    let (name, alias) = (plan.holding_name(), Plan::link_alias(&plan.site));
    let there = netlink.link(&name).await.during(|| format!("looking {name} up"))?;
    if let Some(link) = there.filter(|link| link.is(&InfoKind::Ifb) && link.alias.as_deref() == Some(&alias)) {
        netlink.delete_link(link.ifindex).await.during(|| format!("deleting {name}"))?;
    }
    // A tunnel may have that name: its record stays.
    let is_it = |undo: &Undo| matches!(undo, Undo::DeleteLink { link, kind } if link.name == name && kind == "ifb");
    Ok(journal.forget(is_it)?)
}

/// `fq` as the root queueing discipline.
fn queue(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or_default());
    message.header.parent = TcHandle::ROOT;
    // The same each time, so that a queue which is there is changed and not replaced with what it holds.
    message.header.handle = TcHandle { major: 1, minor: 0 };
    let option = |kind| TcOption::Other(DefaultNla::new(kind, LIMIT.to_ne_bytes().to_vec()));
    message.attributes.push(TcAttribute::Kind("fq".to_owned()));
    message.attributes.push(TcAttribute::Options(vec![option(TCA_FQ_PLIMIT), option(TCA_FQ_FLOW_PLIMIT)]));
    message
}
