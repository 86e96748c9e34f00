//! Applies a changed configuration to a running site, and lets `ecmpvpn reload` know what became of it.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::site::{Paths, SessionError, Site};
use super::{reconcile, resolve};
use crate::config::{self, Config};
use crate::error::chain;
use crate::exit::Exit;
use crate::host::RunDir;
use crate::plan::Plan;
use crate::plan::reload::unreloadable;

/// How long `ecmpvpn reload` waits: each of many tunnels may have to wait for its far end.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// What became of a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Tells it from earlier ones.
    pub number: u64,
    /// An [`Exit`].
    pub exit: u8,
    /// In words.
    pub text: String,
}

impl Outcome {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Leaves it for whoever asked.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("json.new");
        fs::File::create(&temporary)?.write_all(serde_json::to_string(self)?.as_bytes())?;
        fs::rename(&temporary, path)
    }
}

/// Reads the configuration at `file` again and applies what has changed. What cannot be applied changes nothing.
pub async fn reload(site: &mut Site, file: &Path) -> Outcome {
    let (exit, text) = match apply(site, file).await {
        Ok(text) => {
            tracing::info!("{text}");
            (Exit::Done, text)
        }
        Err((exit, text)) => {
            for line in text.lines() {
                tracing::error!("not reloaded: {line}");
            }
            (exit, text)
        }
    };
    let number = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    Outcome { number: u64::try_from(number).unwrap_or(u64::MAX), exit: exit as u8, text }
}

async fn apply(site: &mut Site, file: &Path) -> Result<String, (Exit, String)> {
    let config = config::load(file).map_err(|error| (Exit::Usage, chain(&error)))?;
    let config = resolved(config, &site.config).await.map_err(|error| (Exit::Failed, error))?;
    let fixed = unreloadable(&site.config, &config, site.plan.backend);
    if !fixed.is_empty() {
        let text = format!(
            "{} cannot be changed while {} is up, and nothing was: stop `ecmpvpn run` and start it again",
            fixed.join(", "),
            site.config.site.name
        );
        return Err((Exit::Usage, text));
    }
    let former = site.plan.clone();
    let mut plan = Plan::new(&config, former.backend);
    match reconcile::reconcile(site, &config, &mut plan, &former).await {
        Ok(()) => {
            site.config = config;
            Ok(format!("{} follows {} again", site.config.site.name, file.display()))
        }
        Err(error) => {
            let exit = if error.is_lack() { Exit::Host } else { Exit::Failed };
            let mut text = format!("{}; nothing is changed", chain(&error));
            let (config, mut former) = (site.config.clone(), former);
            if let Err(error) = reconcile::reconcile(site, &config, &mut former, &plan).await {
                text = format!("{text}, as far as that was possible: {}", chain(&error));
            }
            site.plan = former;
            Err((exit, text))
        }
    }
}

/// `config` with the addresses of new names; those of `known` stay.
async fn resolved(mut config: Config, known: &Config) -> Result<Config, String> {
    let known = known.clone();
    let resolving = tokio::task::spawn_blocking(move || resolve::resolve(&mut config, Some(&known)).map(|()| config));
    let resolved = resolving.await.map_err(|error| error.to_string())?;
    resolved.map_err(|error| chain(&error))
}

/// Asks the process that runs `site` to reload, and waits for what becomes of it; `None`: no process runs it.
pub async fn ask(site: &str, paths: &Paths) -> Result<Option<Outcome>, SessionError> {
    let Some(holder) = RunDir::holder(&paths.run_root, site)? else { return Ok(None) };
    let path = RunDir::reload_path(&paths.run_root, site);
    let before = Outcome::read(&path).map(|outcome| outcome.number);
    let io = |operation| move |source| SessionError::Io { operation, source };
    holder.reload().map_err(io("signalling the running ecmpvpn"))?;
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(outcome) = Outcome::read(&path).filter(|outcome| Some(outcome.number) != before) {
            return Ok(Some(outcome));
        }
        if holder.has_ended() {
            return Ok(None);
        }
        if Instant::now() >= until {
            let source =
                io::Error::new(io::ErrorKind::TimedOut, format!("no answer from pid {}: see its log", holder.pid));
            return Err(io("waiting for the running ecmpvpn")(source));
        }
        sleep(POLL).await;
    }
}
