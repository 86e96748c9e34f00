//! Applies a changed configuration to a running site, and reports the result to `ecmpvpn reload`.

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

/// How long `ecmpvpn reload` waits for the result. Long, because every changed tunnel may wait for its far end.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// The result of a reload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Distinguishes this result from earlier ones: the time, nanoseconds since 1970.
    pub number: u64,
    /// An [`Exit`] code.
    pub exit: u8,
    /// The result in words: what was applied, or why not.
    pub text: String,
}

impl Outcome {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Saves the result for the process that requested the reload.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("json.new");
        fs::File::create(&temporary)?.write_all(serde_json::to_string(self)?.as_bytes())?;
        fs::rename(&temporary, path)
    }
}

/// Reads the configuration at `file` again and applies the differences. On a failure the running site stays as it was,
/// or is changed back as far as possible.
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
            "{} cannot be changed while {} is up, so nothing is changed: stop `ecmpvpn run` and start it again",
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
            Ok(format!("{} now matches {}", site.config.site.name, file.display()))
        }
        Err(error) => {
            let exit = if error.is_lack() { Exit::Host } else { Exit::Failed };
            let mut text = format!("{}; nothing is changed", chain(&error));
            let (config, mut former) = (site.config.clone(), former);
            if let Err(error) = reconcile::reconcile(site, &config, &mut former, &plan).await {
                text = format!("{text}, except for what could not be changed back: {}", chain(&error));
            }
            site.plan = former;
            Err((exit, text))
        }
    }
}

/// Resolves the host names in `config`. Names that `known` has keep their addresses.
async fn resolved(mut config: Config, known: &Config) -> Result<Config, String> {
    let known = known.clone();
    let resolving = tokio::task::spawn_blocking(move || resolve::resolve(&mut config, Some(&known)).map(|()| config));
    let resolved = resolving.await.map_err(|error| error.to_string())?;
    resolved.map_err(|error| chain(&error))
}

/// Asks the process that runs `site` to reload, and waits for the result. `None`: no process runs it, or it ended
/// meanwhile.
///
/// # Errors
/// The process cannot be found or signalled, or did not answer in time.
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
