//! Users without privilege on the gateways.

use std::fs::File;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use lab::hostile::{Flood, as_nobody, lock, ping_socket, reachable};
use lab::sites::{Lab, Site};

/// What such users do at present, by site.
#[derive(Default)]
pub struct Hostile {
    locks: Vec<(String, Vec<File>)>,
    floods: Vec<(usize, Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Hostile {
    /// Holds a lock on all that the user may open.
    pub fn lock(&mut self, site: &Site) -> Result<()> {
        let paths = reachable(site)?;
        let files = as_nobody(&site.gateway, || Ok(paths.iter().flat_map(|path| lock(path)).collect::<Vec<File>>()))?;
        self.locks.push((site.name.clone(), files));
        Ok(())
    }

    pub fn unlock(&mut self, site: &Site) {
        self.locks.retain(|(name, _)| *name != site.name);
    }

    /// Sends through all tunnels of a site that are there.
    pub fn flood(&mut self, lab: &Lab, site: usize, flood: Flood, rate: u16) -> Result<()> {
        let sockets = as_nobody(&lab.sites[site].gateway, || {
            let pairs = lab.tunnels.iter().map(|tunnel| [tunnel.addresses[site], tunnel.addresses[1 - site]]);
            Ok(pairs.filter_map(|pair| ping_socket(pair, 0).ok()).collect::<Vec<UdpSocket>>())
        })?;
        if sockets.is_empty() {
            // The site is down.
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let sending = thread::spawn(move || {
            let _ = flood.send(&sockets, rate.into(), Duration::MAX, &stopped);
        });
        self.floods.push((site, stop, sending));
        Ok(())
    }

    pub fn end_flood(&mut self, site: usize) -> Result<()> {
        let Some(at) = self.floods.iter().position(|(of, ..)| *of == site) else { return Ok(()) };
        let (_, stop, sending) = self.floods.swap_remove(at);
        stop.store(true, Ordering::Relaxed);
        sending.join().map_err(|_| anyhow!("it panicked")).context("a flood")
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        for (_, stop, _) in &self.floods {
            stop.store(true, Ordering::Relaxed);
        }
    }
}
