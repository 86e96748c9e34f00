//! How each defect is introduced and taken back.

use anyhow::Result;
use rustix::process::Signal;

use crate::defect::Defect;
use crate::stage::{BOND, Stage};

/// Number of the routing table that leads past the steering device, and preference of its rule.
const PAST: u32 = 4_000;

/// Introduces a defect.
pub fn begin(defect: Defect, stage: &Stage, site: usize) -> Result<()> {
    let gateway = &stage.lab.sites[site].gateway;
    let far = &stage.lab.sites[1 - site];
    match defect {
        Defect::Clear => gateway.apply(
            "ip",
            &[
                format!("route add default via {} dev {BOND} table {PAST}", far.endpoint),
                format!("rule add pref {PAST} to 10.{}.0.0/16 lookup {PAST}", far.number),
            ],
        ),
        // Longer than the time between two datagrams of a flow.
        Defect::Reorder => gateway.apply("tc", &["qdisc add dev wg0 root netem delay 200ms reorder 50%".to_owned()]),
        Defect::Recovery => stage.running(site)?.signal(Signal::STOP),
        Defect::Restore => gateway.apply("ip", &["route add 198.51.100.0/24 dev lan0".to_owned()]),
    }
}

/// Takes a defect back.
pub fn end(defect: Defect, stage: &Stage, site: usize) -> Result<()> {
    let gateway = &stage.lab.sites[site].gateway;
    match defect {
        Defect::Clear => gateway.apply("ip", &[format!("rule del pref {PAST}"), format!("route flush table {PAST}")]),
        Defect::Reorder => gateway.apply("tc", &["qdisc del dev wg0 root".to_owned()]),
        Defect::Recovery => stage.running(site)?.signal(Signal::CONT),
        Defect::Restore => Ok(()),
    }
}
