//! Applies a changed configuration to a running site, and reports the result to `ecmpvpn reload`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::health::Health;
use super::reconcile::{self, Silence};
use super::site::{Paths, SessionError, Site};
use super::trial::Trial;
use super::{notify, resolve};
use crate::config::{self, Config};
use crate::error::chain;
use crate::exit::Exit;
use crate::file;
use crate::host::RunDir;
use crate::live::policy::PolicyError;
use crate::live::policy::lock::LockError;
use crate::live::ports;
use crate::plan::Plan;
use crate::plan::changed::changed;
use crate::plan::reload::{steering_changes, unreloadable};

/// How long `ecmpvpn reload` waits until its reload begins: an earlier one may be under way.
const BEGIN: Duration = Duration::from_secs(60);
/// How long it waits for the result then. Long, because every changed tunnel may wait for its far end.
const PATIENCE: Duration = Duration::from_secs(600);
/// How many earlier results are kept, for whoever has not read theirs yet.
const KEPT: usize = 8;
/// How long name servers may take before systemd may take the process for hung.
const RESOLVING: Duration = Duration::from_secs(120);
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
    /// The requests that this reload answers. `None`: it was written by a version that does not know requests.
    #[serde(default)]
    pub requests: Option<Vec<u64>>,
    /// The results before this one, the latest first.
    #[serde(default)]
    pub earlier: Vec<Outcome>,
    /// What the new ports could be better at, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl Outcome {
    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// The result that answers `request`, if this or an earlier one does. `before`: the number of the last result before
    /// the request was made.
    fn answering(self, request: u64, before: Option<u64>) -> Option<Self> {
        let Self { earlier, .. } = &self;
        let answers = |outcome: &Self| match &outcome.requests {
            Some(requests) => requests.contains(&request),
            None => Some(outcome.number) != before,
        };
        if answers(&self) { Some(self) } else { earlier.iter().find(|outcome| answers(outcome)).cloned() }
    }

    /// Saves the result for the processes that requested the reload, with the latest ones before it.
    pub fn write(mut self, path: &Path) -> io::Result<()> {
        if let Some(mut last) = Self::read(path) {
            self.earlier = std::mem::take(&mut last.earlier);
            self.earlier.insert(0, last);
            self.earlier.truncate(KEPT);
        }
        file::replace(path, &serde_json::to_vec(&self)?)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// Apply the configuration.
    Apply,
    /// Say what that would change.
    Show,
    /// Apply it, and return to the former one unless it is confirmed.
    Try { seconds: u32 },
}

/// Carries out what is requested, and waits for a confirmation.
#[derive(Default)]
pub struct Reloads {
    trial: Option<Trial>,
}

impl Reloads {
    /// Answers all requests; without any, reads the configuration at `file` again and applies the differences. On a
    /// failure the running site stays as it was, or is changed back as far as possible. The tunnels that do not change
    /// are probed without a break. Returns whether the site may have been changed.
    pub async fn act(&mut self, site: &mut Site, file: &Path, health: &mut Health) -> bool {
        // Before the file is read: whoever requests a reload after that gets another one.
        let requests = take_requests(&site.paths.run_root, &site.config.site.name);
        let (shows, others): (Vec<_>, Vec<_>) = requests.into_iter().partition(|(_, wish)| *wish == Wish::Show);
        if !shows.is_empty() {
            let result = show(site, file).await;
            finish(site, result, Vec::new(), shows.into_iter().map(|(number, _)| number).collect());
            if others.is_empty() {
                return false;
            }
        }
        notify::reloading();
        let seconds = others
            .iter()
            .filter_map(|(_, wish)| if let Wish::Try { seconds } = wish { Some(*seconds) } else { None })
            .min();
        let result = self.apply(site, file, health, seconds).await;
        match &result {
            Ok(text) => tracing::info!("{text}"),
            Err((_, text)) => text.lines().for_each(|line| tracing::error!("not reloaded: {line}")),
        }
        // `run` logs them as well, when it continues.
        let warnings = if result.is_ok() { ports::warnings(&site.config).await } else { Vec::new() };
        let numbers = others.into_iter().map(|(number, _)| number).collect();
        notify::ready(&finish(site, result, warnings, numbers));
        true
    }

    async fn apply(
        &mut self,
        site: &mut Site,
        file: &Path,
        health: &mut Health,
        seconds: Option<u32>,
    ) -> Result<String, (Exit, String)> {
        let (root, name) = (&site.paths.run_root, &site.config.site.name);
        let unconfirmed = RunDir::unconfirmed_reload_path(root, name);
        if self.trial.as_ref().is_some_and(Trial::is_pending) || RunDir::unconfirmed_path(root, name).exists() {
            let text =
                "what was changed last still waits for `ecmpvpn confirm`, so nothing is changed: confirm it, or wait";
            return Err((Exit::Failed, text.to_owned()));
        }
        let (config, plan, former) = (site.config.clone(), site.plan.clone(), site.text.clone());
        let text = apply(site, file, health).await?;
        let Some(seconds) = seconds else { return Ok(text) };
        match Trial::begin(unconfirmed, seconds, config, plan.clone(), former) {
            Ok(trial) => {
                self.trial = Some(trial);
                Ok(format!(
                    "{text}; the former configuration returns in {seconds} s, unless `ecmpvpn confirm` is run before"
                ))
            }
            Err(error) => {
                let error = SessionError::Io { operation: "asking for a confirmation", source: error };
                let restored = restore(site, plan, health, &error).await;
                Err((Exit::Failed, format!("{}; {restored}", chain(&error))))
            }
        }
    }

    /// Returns when a confirmation has not come in time. Otherwise never returns.
    pub async fn is_unconfirmed(&mut self) {
        if let Some(trial) = &self.trial {
            if !trial.is_confirmed().await {
                return;
            }
            tracing::info!("confirmed: the new configuration stays in force");
            self.trial = None;
        }
        std::future::pending::<()>().await;
    }

    /// Returns to what was in force before the configuration that nobody confirmed.
    pub async fn take_back(&mut self, site: &mut Site, health: &mut Health) {
        let Some(trial) = self.trial.take() else { return };
        let (seconds, config, mut plan) = (trial.seconds, trial.config.clone(), trial.plan.clone());
        match reconcile::reconcile(site, &config, &mut plan, health, Silence::Allowed).await {
            Ok(()) => {
                (site.config, site.text) = (config, trial.text.clone());
                tracing::warn!(
                    "nobody confirmed the new configuration within {seconds} s: the former one is in force again; the file \
                     still has the new one"
                );
            }
            Err(error) => {
                health.follow(&site.config, &site.plan).await;
                tracing::error!(
                    "nobody confirmed the new configuration within {seconds} s, and the former one cannot be restored: {}",
                    chain(&error)
                );
            }
        }
    }
}

/// Saves a result for those who requested it. Returns its text.
fn finish(site: &Site, result: Result<String, (Exit, String)>, warnings: Vec<String>, requests: Vec<u64>) -> String {
    let (exit, text) = result.map_or_else(|failed| failed, |text| (Exit::Done, text));
    let outcome = Outcome {
        number: now_ns(),
        exit: exit as u8,
        text: text.clone(),
        requests: Some(requests),
        earlier: Vec::new(),
        warnings,
    };
    if let Err(error) = outcome.write(&RunDir::reload_path(&site.paths.run_root, &site.config.site.name)) {
        tracing::warn!("the outcome of the reload cannot be written: {}", chain(&error));
    }
    text
}

/// Nanoseconds since 1970.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    u64::try_from(now).unwrap_or(u64::MAX)
}

/// Removes the files that request a reload, and returns their numbers and what they ask for.
fn take_requests(root: &Path, site: &str) -> Vec<(u64, Wish)> {
    let take = |number: u64| {
        let path = RunDir::request_path(root, site, number);
        let wish = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        fs::remove_file(&path).ok()?;
        Some((number, wish?))
    };
    RunDir::requests(root, site).into_iter().filter_map(take).collect()
}

/// Reads the configuration at `file`, and checks that the running site can take it.
async fn read(site: &Site, file: &Path) -> Result<(Config, String), (Exit, String)> {
    let (config, text) = config::load_with_text(file).map_err(|error| (Exit::Usage, chain(&error)))?;
    let config = resolved(config, &site.config).await.map_err(|error| (Exit::Failed, error))?;
    let fixed = unreloadable(&site.config, &config, site.plan.backend);
    if fixed.is_empty() {
        return Ok((config, text));
    }
    let text = format!(
        "{} cannot be changed while {} is up, so nothing is changed: stop `ecmpvpn run` and start it again",
        fixed.join(", "),
        site.config.site.name
    );
    Err((Exit::Usage, text))
}

/// Says what a reload would change.
async fn show(site: &Site, file: &Path) -> Result<String, (Exit, String)> {
    let (config, _) = read(site, file).await?;
    let failed = |error: SessionError| (if error.is_lack() { Exit::Host } else { Exit::Failed }, chain(&error));
    let changes = reconcile::preview(site, Plan::new(&config, site.plan.backend)).await.map_err(failed)?;
    let mut lines: Vec<String> = changes.iter().map(ToString::to_string).collect();
    lines.extend(steering_changes(&site.config, &config));
    let name = &site.config.site.name;
    Ok(match &lines[..] {
        [] => format!("`reload` of {name} would change nothing"),
        lines => format!("`reload` of {name} would:\n  {}", lines.join("\n  ")),
    })
}

async fn apply(site: &mut Site, file: &Path, health: &mut Health) -> Result<String, (Exit, String)> {
    let (config, text) = read(site, file).await?;
    let former = site.plan.clone();
    let mut plan = Plan::new(&config, former.backend);
    match reconcile::reconcile(site, &config, &mut plan, health, Silence::Refused).await {
        Ok(()) => {
            let changes = changed(&site.config, &config);
            (site.config, site.text) = (config, text);
            let (name, file) = (&site.config.site.name, file.display());
            Ok(if changes.is_empty() {
                format!("{name} matches {file} already: nothing changed")
            } else {
                format!("{name} now matches {file}: {}", changes.join("; "))
            })
        }
        Err(error @ SessionError::Policy(PolicyError::Lock(LockError::Held { .. }))) => {
            Err((Exit::Failed, format!("{}; nothing is changed", chain(&error))))
        }
        Err(error) => {
            let exit = if error.is_lack() { Exit::Host } else { Exit::Failed };
            let restored = restore(site, former, health, &error).await;
            Err((exit, format!("{}; {restored}", chain(&error))))
        }
    }
}

/// Changes the site back to `former`, its plan before the failure `why`. Says what is in force then.
async fn restore(site: &mut Site, mut former: Plan, health: &mut Health, why: &SessionError) -> String {
    let config = site.config.clone();
    let changed_back = reconcile::reconcile(site, &config, &mut former, health, Silence::Allowed).await;
    if let Err(error) = changed_back {
        health.follow(&config, &site.plan).await;
        return format!(
            "the former configuration is in force again, except for what could not be changed back: {}",
            chain(&error)
        );
    }
    let SessionError::Unanswered { tunnel, .. } = why else { return "nothing is changed".to_owned() };
    match reconcile::is_in_use_again(site, tunnel, health).await {
        Ok(true) => format!(
            "the former configuration is in force again, and {tunnel} answers: correct the new one, or reload the other \
             site with its counterpart at the same time"
        ),
        _ => format!("the former configuration is set again, but {tunnel} does not answer yet"),
    }
}

/// Resolves the host names in `config`. Names that `known` has keep their addresses.
async fn resolved(mut config: Config, known: &Config) -> Result<Config, String> {
    let known = known.clone();
    let resolving = tokio::task::spawn_blocking(move || resolve::resolve(&mut config, Some(&known)).map(|()| config));
    let resolved = notify::progress_during(resolving, RESOLVING).await.map_err(|error| error.to_string())?;
    resolved.map_err(|error| chain(&error))
}

/// A file that requests a reload. Removed when dropped, so that a request that was given up leaves nothing.
struct Request {
    number: u64,
    file: PathBuf,
}

impl Request {
    fn make(root: &Path, site: &str, wish: Wish) -> io::Result<Self> {
        let number = now_ns();
        let file = RunDir::request_path(root, site, number);
        // Complete before it has its name: the running process may read it at once.
        file::create(&file, &serde_json::to_vec(&wish)?)?;
        Ok(Self { number, file })
    }

    /// Whether the running process has begun this reload.
    fn is_taken(&self) -> bool {
        !self.file.exists()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Whether a process is stopped, by SIGSTOP or a debugger. Source: `proc_pid_stat(5)`.
fn is_stopped(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_stopped_state(&stat))
}

fn is_stopped_state(stat: &str) -> bool {
    // The name in parentheses may contain anything.
    stat.rsplit_once(')').is_some_and(|(_, rest)| matches!(rest.trim_start().chars().next(), Some('T' | 't')))
}

/// Asks the process that runs `site` to reload, and waits for the result. `None`: no process runs it, or it ended
/// meanwhile.
///
/// # Errors
/// The process cannot be found or signalled, is stopped, or did not answer in time.
pub async fn ask(site: &str, paths: &Paths, wish: Wish) -> Result<Option<Outcome>, SessionError> {
    let Some(holder) = RunDir::holder(&paths.run_root, site)? else { return Ok(None) };
    let pid = holder.pid;
    if is_stopped(pid) {
        return Err(SessionError::Stopped { pid });
    }
    let path = RunDir::reload_path(&paths.run_root, site);
    let before = Outcome::read(&path).map(|outcome| outcome.number);
    let io = |operation| move |source| SessionError::Io { operation, source };
    let request = Request::make(&paths.run_root, site, wish).map_err(io("requesting a reload"))?;
    holder.reload().map_err(io("signalling the running ecmpvpn"))?;
    let mut since = Instant::now();
    let mut has_begun = false;
    loop {
        if !has_begun && request.is_taken() {
            (has_begun, since) = (true, Instant::now());
        }
        if let Some(outcome) = Outcome::read(&path).and_then(|outcome| outcome.answering(request.number, before)) {
            return Ok(Some(outcome));
        }
        if holder.has_ended() {
            return Ok(None);
        }
        if is_stopped(pid) {
            return Err(SessionError::Stopped { pid });
        }
        let patience = if has_begun { PATIENCE } else { BEGIN };
        if since.elapsed() >= patience {
            return Err(SessionError::NoAnswer { pid, seconds: patience.as_secs(), has_begun });
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(number: u64, requests: Option<&[u64]>) -> Outcome {
        let requests = requests.map(<[u64]>::to_vec);
        Outcome { number, exit: 0, text: String::new(), requests, earlier: Vec::new(), warnings: Vec::new() }
    }

    #[test]
    fn each_request_gets_its_own_result_even_if_another_one_follows_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reload.json");
        for (number, requests) in [(1, &[7][..]), (2, &[]), (3, &[8, 9])] {
            outcome(number, Some(requests)).write(&path).unwrap();
        }
        let answer = |request| Outcome::read(&path).unwrap().answering(request, None).map(|outcome| outcome.number);
        assert_eq!([7, 8, 9, 10].map(answer), [Some(1), Some(3), Some(3), None]);
        for number in 4..100 {
            outcome(number, Some(&[])).write(&path).unwrap();
        }
        assert_eq!(Outcome::read(&path).unwrap().earlier.len(), KEPT);
    }

    #[test]
    fn a_version_that_knows_no_requests_is_understood() {
        let old: Outcome = serde_json::from_str(r#"{"number":5,"exit":1,"text":"why"}"#).unwrap();
        assert_eq!(old.clone().answering(7, Some(5)), None);
        assert_eq!(old.answering(7, Some(4)).map(|outcome| outcome.exit), Some(1));
    }

    #[test]
    fn requests_are_taken_once_and_leave_nothing() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("site-a")).unwrap();
        let request = Request::make(root.path(), "site-a", Wish::Try { seconds: 9 }).unwrap();
        assert!(!request.is_taken());
        assert_eq!(take_requests(root.path(), "site-a"), [(request.number, Wish::Try { seconds: 9 })]);
        assert!(request.is_taken() && take_requests(root.path(), "site-a").is_empty());
        drop(Request::make(root.path(), "site-a", Wish::Apply).unwrap());
        assert!(take_requests(root.path(), "site-a").is_empty());
    }

    #[test]
    fn a_stopped_process_is_known_whatever_its_name() {
        assert!(is_stopped_state("12 (a) b) T 1 2") && is_stopped_state("12 (x) t 1"));
        assert!(!is_stopped_state("12 (a) T) S 1 2") && !is_stopped_state("") && !is_stopped(1));
    }
}
