//! Renews private keys and pre-shared keys one tunnel at a time, while the other tunnels carry the traffic.
//!
//! The site with the new private keys leads. In its probes it asks that both ends stop using a tunnel, and changes the
//! keys when both have. It keeps the new keys if probes are answered, and restores the former ones if not. The other
//! site has the new public keys, and follows: when the tunnel falls silent it tries the new keys and the former ones in
//! turn, until probes are answered. docs/operation.md says why it works like this.

pub mod exchange;
pub mod files;
mod follow;
mod lead;
pub mod record;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use follow::Follow;
use lead::Lead;
use record::{Part, Role, Stage, State, is_ours};

use super::health::Handover;
use super::site::Site;
use crate::config::{self, Edit, InterfaceName, PresharedKey, PrivateKey, PublicKey, TunnelKeys};
use crate::dataplane::View;
use crate::error::chain;
use crate::fault;
use crate::host;
use crate::plan::{Plan, Tunnel};

/// How often the tunnels are checked.
const LOOK: Duration = Duration::from_millis(50);
/// How long to wait after a failure that may be temporary.
const PAUSE: Duration = Duration::from_secs(30);

/// The new keys of a tunnel. A key that is `None` does not change.
struct NewKeys {
    private: Option<PrivateKey>,
    public: Option<PublicKey>,
    preshared: PresharedKey,
}

impl NewKeys {
    /// Whether the tunnel has these keys already.
    fn are_those_of(&self, site: &Site, name: &InterfaceName) -> bool {
        planned(site, name).is_some_and(|tunnel| {
            tunnel.preshared_key.as_ref() == Some(&self.preshared)
                && self.private.as_ref().is_none_or(|key| *key == tunnel.private_key)
                && self.public.is_none_or(|key| key == tunnel.public_key)
        })
    }
}

/// What to do with a tunnel.
#[derive(Debug)]
pub enum Step {
    /// Give it its new keys.
    New(InterfaceName),
    /// Give it its former keys. With a reason: stop the renewal as well.
    Former(InterfaceName, Option<&'static str>),
    /// It works with the new keys: write them to the configuration.
    Keep(InterfaceName),
}

/// This site's part in a renewal of keys, if one is under way.
pub struct Rotation {
    file: PathBuf,
    path: PathBuf,
    began: Instant,
    state: Option<State>,
    keys: BTreeMap<InterfaceName, NewKeys>,
    handover: Handover,
    lead: Option<(InterfaceName, Lead)>,
    follows: BTreeMap<InterfaceName, Follow>,
    paused_until: Option<Instant>,
}

impl Rotation {
    /// Reads which renewal is under way for the configuration at `file`, if any.
    pub fn load(file: &Path, site: &Site, handover: &Handover) -> Self {
        let path = State::path(file);
        // Half files that a killed process left.
        crate::file::sweep(crate::file::folder(&path));
        handover.forget();
        let mut rotation = Self {
            file: file.to_owned(),
            path,
            began: Instant::now(),
            state: None,
            keys: BTreeMap::new(),
            handover: handover.clone(),
            lead: None,
            follows: BTreeMap::new(),
            paused_until: None,
        };
        match rotation.read(site) {
            Ok(state) => rotation.state = state,
            Err(error) => tracing::error!("the renewal of keys cannot continue: {error:#}"),
        }
        rotation
    }

    fn read(&mut self, site: &Site) -> anyhow::Result<Option<State>> {
        let Some(state) = State::read(&self.path)?.filter(|state| !state.is_done()) else { return Ok(None) };
        files::remove_unnamed(&self.file, &site.config);
        let owner = fs::metadata(&self.file).map_or(0, |metadata| std::os::unix::fs::MetadataExt::uid(&metadata));
        let read = |name: &str| {
            config::read_secret(&self.path.with_file_name(name), owner, 4096)
                .map_err(|error| anyhow::anyhow!("its state {error}"))
        };
        for part in state.parts.iter().filter(|part| part.stage != Stage::Done) {
            let name = InterfaceName::new(&part.tunnel).map_err(|why| anyhow::anyhow!("{} {why}", part.tunnel))?;
            let private = part.private_key_file.as_deref().map(read).transpose()?;
            let keys = NewKeys {
                private: private.map(|text| text.parse()).transpose()?,
                public: part.public_key.as_ref().map(|text| text.parse()).transpose()?,
                preshared: read(&part.preshared_key_file)?.parse()?,
            };
            self.handover.set_rotation(&name, state.id);
            if state.role == Role::Follows {
                self.follows.insert(name.clone(), Follow::new(keys.are_those_of(site, &name)));
            }
            self.keys.insert(name, keys);
        }
        Ok(Some(state))
    }

    /// Waits until there is something to do. Never returns if nothing is under way.
    pub async fn next_step(&mut self, site: &Site) -> Step {
        if let Some(until) = self.paused_until {
            tokio::time::sleep_until(until.into()).await;
            self.paused_until = None;
        }
        let view = match View::open(&site.paths.pins) {
            Ok(view) if self.state.is_some() => view,
            _ => return std::future::pending().await,
        };
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let step = match self.state.as_ref().map(|state| (state.role, state.going)) {
                Some((Role::Leads, true)) => self.lead(site, &view),
                Some((Role::Follows, _)) => self.follow(site, &view),
                _ => return std::future::pending().await,
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn lead(&mut self, site: &Site, view: &View) -> Option<Step> {
        let now = self.began.elapsed();
        if self.lead.is_none() {
            let state = self.state.as_ref()?;
            let next = state.parts.iter().find(|part| part.stage != Stage::Done)?;
            let name = InterfaceName::new(&next.tunnel).ok()?;
            let has_new = self.keys.get(&name).is_some_and(|keys| keys.are_those_of(site, &name));
            self.lead = Some((name, Lead::new(now, has_new, next.stage == Stage::Changing)));
        }
        let id = self.state.as_ref()?.id;
        let (name, lead) = self.lead.as_mut()?;
        let Some(planned) = planned(site, name) else {
            let why = "it is not in the configuration any more";
            let name = name.clone();
            self.stop(&name, why);
            return None;
        };
        let live = view.peers().get(planned.peer).map_or(0, |peer| peer.live);
        let far = self.handover.peer_message(name);
        let seen = lead::Observation {
            live: live >> planned.slot & 1 == 1,
            others: live & !(1 << planned.slot) != 0,
            far_ready: far.rotation == id,
            far_left: far.has_left,
        };
        let todo = lead.poll(now, seen);
        let name = name.clone();
        match todo {
            lead::Action::Wait => None,
            lead::Action::Leave => {
                // Check first, before anything is changed, that the configuration can be edited: it must name the new
                // keys once they are in use.
                match self.edit(&name) {
                    Ok(_) => {
                        tracing::info!("{name}: both sites stop using it while its keys are renewed");
                        self.record_stage(&name, Stage::Changing);
                        self.handover.ask(&name, true);
                    }
                    Err(error) => self.stop(&name, &format!("{error:#}")),
                }
                None
            }
            lead::Action::Change => Some(Step::New(name)),
            lead::Action::Keep => Some(Step::Keep(name)),
            lead::Action::GoBack(why) => Some(Step::Former(name, Some(why))),
            lead::Action::Stop(why) => {
                self.record_stage(&name, Stage::Waiting);
                self.stop(&name, why);
                None
            }
        }
    }

    fn follow(&mut self, site: &Site, view: &View) -> Option<Step> {
        let now = self.began.elapsed();
        let interval = Duration::from_millis(site.config.health.interval_ms.into());
        for (name, follow) in &mut self.follows {
            let Some(planned) = planned(site, name) else { continue };
            let live = view.is_live(planned.id());
            let asked = self.handover.peer_message(name).asks;
            let heard = self.handover.last_heard(name).map_or(self.began, |at| at.max(self.began));
            match follow.poll(now, interval, follow::Observation { live, silent: heard.elapsed(), asked }) {
                follow::Action::Wait => {}
                follow::Action::TryNew => return Some(Step::New(name.clone())),
                follow::Action::TryFormer => return Some(Step::Former(name.clone(), None)),
                follow::Action::Keep => return Some(Step::Keep(name.clone())),
            }
        }
        None
    }

    /// Does what [`Rotation::next_step`] found.
    pub async fn act(&mut self, step: Step, site: &mut Site) {
        match step {
            Step::New(name) => {
                if let Err(error) = self.edit(&name) {
                    tracing::error!("{name}: keeps its former keys: {error:#}");
                    self.fail(&name, "the configuration cannot be changed");
                    return;
                }
                let Some(keys) = self.keys.get(&name) else { return };
                let changed = change(site, &self.handover, &name, |tunnel| {
                    tunnel.private_key = keys.private.as_ref().unwrap_or(&tunnel.private_key).clone();
                    tunnel.public_key = keys.public.unwrap_or(tunnel.public_key);
                    tunnel.preshared_key = Some(keys.preshared.clone());
                });
                match changed.await {
                    Ok(()) => tracing::info!("{name}: has its new keys, and will be used when it answers"),
                    Err(error) => {
                        tracing::error!("{name}: {}", chain(&error));
                        self.restore(&name, site).await;
                        self.fail(&name, "its keys cannot be changed");
                    }
                }
                self.handover.ask(&name, false);
            }
            Step::Former(name, why) => {
                self.restore(&name, site).await;
                self.handover.ask(&name, false);
                if let Some(why) = why {
                    self.record_stage(&name, Stage::Waiting);
                    self.stop(&name, why);
                } else {
                    tracing::info!("{name}: did not answer with its new keys, and has its former ones again");
                }
            }
            Step::Keep(name) => match self.keep(&name, site) {
                Ok(()) => {
                    self.lead = None;
                    self.follows.remove(&name);
                    self.keys.remove(&name);
                    self.handover.set_rotation(&name, 0);
                    tracing::info!("{name}: its new keys are in use");
                    if self.state.as_ref().is_some_and(State::is_done) {
                        tracing::info!("every tunnel has new keys");
                        self.state = None;
                    }
                }
                Err(error) => {
                    tracing::error!("{name}: the configuration cannot be changed to name its new keys: {error:#}");
                    self.restore(&name, site).await;
                    self.fail(&name, "the configuration cannot be changed to name its new keys");
                }
            },
        }
    }

    /// After a failure the leading end stops; the following end tries again later.
    fn fail(&mut self, name: &InterfaceName, why: &str) {
        if self.state.as_ref().is_some_and(|state| state.role == Role::Leads) {
            self.record_stage(name, Stage::Waiting);
            self.stop(name, why);
        } else {
            // The tunnel has its former keys.
            self.follows.insert(name.clone(), Follow::new(false));
            self.paused_until = Some(Instant::now() + PAUSE);
        }
    }

    fn stop(&mut self, name: &InterfaceName, why: &str) {
        let why = format!("{name}: {why}");
        tracing::warn!("the renewal of keys stops: {why}");
        self.handover.ask(name, false);
        self.lead = None;
        let update = |state: &mut State| (state.going, state.stopped) = (false, Some(why));
        self.update(update);
    }

    fn record_stage(&mut self, name: &InterfaceName, stage: Stage) {
        self.update(|state| {
            if let Some(part) = state.part_mut(name.as_str()) {
                part.stage = stage;
            }
        });
    }

    fn update(&mut self, change: impl FnOnce(&mut State)) {
        match State::update(&self.path, change) {
            // The renewal was given up meanwhile, or replaced by another one. A reload follows, and reads the new
            // state.
            Ok(state) => self.state = state.filter(|state| Some(state.id) == self.state.as_ref().map(|state| state.id)),
            Err(error) => {
                tracing::error!("the renewal of keys cannot continue: {}", chain(&error));
                self.state = None;
            }
        }
    }

    fn part(&self, name: &InterfaceName) -> Option<&Part> {
        self.state.as_ref()?.parts.iter().find(|part| part.tunnel == name.as_str())
    }

    /// Prepares an edit of the configuration to name the new keys. Also returns the key files that it no longer names
    /// then.
    fn edit(&self, name: &InterfaceName) -> anyhow::Result<(Edit, Vec<String>)> {
        let part = self.part(name).ok_or_else(|| anyhow::anyhow!("the renewal was given up"))?;
        let (config, text) = config::load_with_text(&self.file)?;
        let mut edit = Edit::new(&self.file, &text, &config)?;
        let keys = TunnelKeys {
            private_key_file: part.private_key_file.as_deref(),
            public_key: part.public_key.as_ref().map(|text| text.parse()).transpose()?,
            preshared_key_file: Some(&part.preshared_key_file),
        };
        let former = edit.set_keys(name.as_str(), &keys)?;
        Ok((edit, former))
    }

    fn keep(&mut self, name: &InterfaceName, site: &mut Site) -> anyhow::Result<()> {
        let (edit, former) = self.edit(name)?;
        edit.save()?;
        // The former text names keys that are not in use any more.
        site.text.clear();
        if let Some(keys) = self.keys.get(name) {
            let mut tunnels = site.config.peers.iter_mut().flat_map(|peer| &mut peer.tunnels);
            if let Some(tunnel) = tunnels.find(|tunnel| tunnel.name == *name) {
                tunnel.private_key = keys.private.clone().or(tunnel.private_key.take());
                tunnel.public_key = keys.public.or(tunnel.public_key);
                tunnel.preshared_key = Some(keys.preshared.clone());
            }
        }
        // The stage comes last: until then the next `run` finds what a killed one has not removed.
        for file in former.iter().filter(|file| is_ours(name.as_str(), file)) {
            let path = self.path.with_file_name(file);
            fault::point("removing a former key");
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!("removing the former key {}: {error}", path.display());
            }
        }
        self.record_stage(name, Stage::Done);
        Ok(())
    }

    /// Gives a tunnel the keys that the configuration names, and logs a failure.
    async fn restore(&self, name: &InterfaceName, site: &mut Site) {
        let former = Plan::new(&site.config, site.plan.backend).tunnels.into_iter().find(|tunnel| tunnel.name == *name);
        let Some(former) = former else { return };
        let restored = change(site, &self.handover, name, |tunnel| {
            tunnel.private_key = former.private_key;
            tunnel.public_key = former.public_key;
            tunnel.preshared_key = former.preshared_key;
        });
        if let Err(error) = restored.await {
            tracing::error!("{name}: its former keys cannot be restored: {}", chain(&error));
        }
    }
}

fn planned<'a>(site: &'a Site, name: &InterfaceName) -> Option<&'a Tunnel> {
    site.plan.tunnel(name)
}

async fn change(
    site: &mut Site,
    handover: &Handover,
    name: &InterfaceName,
    change: impl FnOnce(&mut Tunnel),
) -> Result<(), host::HostError> {
    let Some(tunnel) = site.plan.tunnels.iter_mut().find(|tunnel| tunnel.name == *name) else { return Ok(()) };
    change(tunnel);
    handover.set_keys(tunnel);
    host::rekey_tunnel(site.links.userspace.as_mut(), tunnel).await
}
