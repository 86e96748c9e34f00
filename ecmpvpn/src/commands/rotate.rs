//! `rotate`: starts, watches and gives up a renewal of keys. The running `run` changes the tunnels.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde_json::json;

use crate::cli::rotate::RotateArgs;
use crate::commands::{Failure, count_of, print, warn};
use crate::config::{self, Config, Peer};
use crate::control::reload;
use crate::control::rotate::files::{self, FilesError};
use crate::control::rotate::record::{Part, Role, RotationStateError, Stage, State};
use crate::control::site::Paths;
use crate::exit::Exit;
use crate::host::RunDir;

/// Time between two checks of the progress.
const LOOK: Duration = Duration::from_millis(200);
/// A renewal without any progress for so long is no ordinary one: a tunnel takes some seconds.
const STANDSTILL: Duration = Duration::from_secs(30);
/// How long `--abort` waits for the tunnel whose keys are being changed: longer than `run` tries.
const CURRENT: Duration = Duration::from_secs(40);

impl From<FilesError> for Failure {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::Io { .. } | FilesError::State(_) => anyhow::Error::new(error).into(),
            error => Self::usage(error),
        }
    }
}

impl From<RotationStateError> for Failure {
    fn from(error: RotationStateError) -> Self {
        anyhow::Error::new(error).into()
    }
}

/// Carries out `rotate` for the site of the configuration at `path`.
pub async fn run(path: &Path, args: &RotateArgs) -> Result<(), Failure> {
    let config = config::load(path)?;
    if args.prepare {
        prepare(path, &config, args)
    } else if let Some(file) = &args.apply {
        apply(path, &config, file).await
    } else if args.abort {
        abort(path, &config).await
    } else if args.status {
        status(path, args.json)
    } else {
        advance(path, &config).await
    }
}

fn prepare(path: &Path, config: &Config, args: &RotateArgs) -> Result<(), Failure> {
    let peer = choose(config, args.peer.as_deref())?;
    if peer.tunnels.len() < 2 {
        let text = "has one tunnel, and nothing would carry its traffic while the keys change: add another tunnel at \
            both sites, or put new keys into both configurations and `ecmpvpn reload` both, with an interruption";
        return Err(Failure::usage(anyhow!("{} {text}", peer.name)));
    }
    let name = format!("keys-for-{}", peer.name);
    let output: PathBuf = args.output.clone().unwrap_or_else(|| State::path(path).with_file_name(name));
    files::prepare(path, config, peer, &output)?;
    let (output, name) = (output.display(), &peer.name);
    print(format_args!("new keys for {} to {name} are made; none is in use yet", tunnels(peer.tunnels.len())))?;
    print(format_args!(
        "{output} is for {name}: it is secret, so copy it there over the VPN, for example with `scp -p {output} root@{name}:`"
    ))?;
    print(format_args!("then there: `ecmpvpn rotate --apply FILE`; then here: `ecmpvpn rotate`"))?;
    Ok(())
}

fn choose<'a>(config: &'a Config, name: Option<&str>) -> Result<&'a Peer, Failure> {
    let known = || config.peers.iter().map(|peer| peer.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, config.peers.as_slice()) {
        (None, [only]) => Ok(only),
        (None, _) => Err(Failure::usage(anyhow!("there are several sites: name one of {} with --peer", known()))),
        (Some(name), peers) => {
            let found = peers.iter().find(|peer| peer.name == name);
            found.ok_or_else(|| Failure::usage(anyhow!("{name} is no peer: peers are {}", known())))
        }
    }
}

async fn apply(path: &Path, config: &Config, file: &Path) -> Result<(), Failure> {
    let (state, new) = files::apply(path, config, file)?;
    let site = &config.site.name;
    if !new {
        print(format_args!("{} is applied already", file.display()))?;
    }
    if reload(site).await? {
        print(format_args!("{site} has the new keys for {} and follows {}", tunnels(state.parts.len()), state.peer))?;
        print(format_args!(
            "continue at {} with `ecmpvpn rotate`; {} is no longer needed",
            state.peer,
            file.display()
        ))?;
    } else {
        warn(format_args!("`ecmpvpn run` of {site} is not running: start it before you continue at {}", state.peer));
    }
    Ok(())
}

async fn abort(path: &Path, config: &Config) -> Result<(), Failure> {
    let begun = finish_current(path, &config.site.name).await?;
    let Some(mut state) = files::abort(path)? else {
        files::remove_unnamed(path, config);
        print(format_args!("no keys are being renewed"))?;
        return Ok(());
    };
    // The parts that must not begin any more.
    let dropped = begun.into_iter().flat_map(|begun| begun.parts);
    let dropped: Vec<_> = dropped.filter(|part| state.part_mut(&part.tunnel).is_none()).collect();
    state.parts.extend(dropped);
    // A tunnel that was being changed gets the keys of the configuration.
    reload(&config.site.name).await?;
    files::remove_files(path, &state)?;
    let (done, rest): (Vec<_>, Vec<_>) = state.parts.iter().partition(|part| part.stage == Stage::Done);
    if !done.is_empty() {
        print(format_args!("{} had new keys already, and keep them at both sites", tunnels(done.len())))?;
    }
    print(format_args!("the renewal was given up"))?;
    if !rest.is_empty() {
        print(format_args!("the former keys stay for {}: do the same at {}", tunnels(rest.len()), state.peer))?;
    }
    Ok(())
}

/// Lets the leading `run` finish the tunnel that it is changing, and begin no other one: between the confirmations of
/// the two ends, the far end has the new keys for good. Returns the state as it was before.
async fn finish_current(path: &Path, site: &str) -> Result<Option<State>, Failure> {
    let file = State::path(path);
    // A state that cannot be read is removed all the same.
    let Ok(Some(begun)) = State::read(&file) else { return Ok(None) };
    if begun.role == Role::Follows {
        return Ok(Some(begun));
    }
    let mut now = State::update(&file, State::begin_no_more)?;
    let (since, mut said) = (Instant::now(), false);
    let changing = |state: &State| state.parts.iter().find(|part| part.stage == Stage::Changing).cloned();
    while let Some(part) = now.as_ref().and_then(changing) {
        let runs = RunDir::holder(&Paths::of(site).run_root, site).map_err(anyhow::Error::new)?.is_some();
        if !runs || since.elapsed() > CURRENT {
            warn(format_args!(
                "{}: its keys were being changed: if it does not come back, `ecmpvpn rotate --status` at {} says which \
                 keys it has there",
                part.tunnel, begun.peer
            ));
            break;
        }
        if !std::mem::replace(&mut said, true) {
            print(format_args!("{}: its keys are being changed: waiting until both sites agree", part.tunnel))?;
        }
        tokio::time::sleep(LOOK).await;
        now = State::read(&file).ok().flatten();
    }
    Ok(Some(begun))
}

fn status(path: &Path, json: bool) -> Result<(), Failure> {
    let state = State::read(&State::path(path))?;
    if json {
        let tunnels = |state: &State| -> Vec<_> {
            state.parts.iter().map(|part| json!({"name": part.tunnel, "stage": part.stage})).collect()
        };
        return match &state {
            None => print(json!({"rotation": null})),
            Some(state) => print(json!({"rotation": {
                "peer": state.peer, "role": state.role, "going": state.going && !state.is_done(),
                "done": state.is_done(), "stopped": state.stopped, "tunnels": tunnels(state),
            }})),
        };
    }
    let Some(state) = state else { return print("no keys are being renewed") };
    let head = match (state.is_done(), state.role, state.going) {
        (true, ..) => "every tunnel has its new keys".to_owned(),
        (_, Role::Follows, _) => format!("follows {}: `ecmpvpn rotate` there continues", state.peer),
        (_, Role::Leads, true) => match &state.stopped {
            Some(why) => format!("in progress, but {why}: `ecmpvpn rotate --abort` ends it"),
            None => "in progress".to_owned(),
        },
        (_, Role::Leads, false) => match &state.stopped {
            Some(why) => format!("stopped: {why}; `ecmpvpn rotate` continues, `ecmpvpn rotate --abort` gives up"),
            None => format!("prepared; when {} has the file, `ecmpvpn rotate` continues", state.peer),
        },
    };
    let lines: Vec<String> =
        state.parts.iter().map(|part| format!("{:<16}{}", part.tunnel, describe(part.stage))).collect();
    print(format!("keys of the tunnels to {}: {head}\n{}", state.peer, lines.join("\n")))
}

fn describe(stage: Stage) -> &'static str {
    match stage {
        Stage::Waiting => "former keys",
        Stage::Changing => "being changed",
        Stage::Done => "new keys",
    }
}

/// Makes the running `run` change the tunnels, and reports the progress.
async fn advance(path: &Path, config: &Config) -> Result<(), Failure> {
    let file = State::path(path);
    let site = &config.site.name;
    let Some(mut seen) = State::read(&file)? else {
        return Err(Failure::usage(anyhow!("no keys are prepared: begin with `ecmpvpn rotate --prepare`")));
    };
    if seen.role == Role::Follows && !seen.is_done() {
        return Err(Failure::usage(anyhow!(
            "{} leads this renewal of keys: continue there with `ecmpvpn rotate`",
            seen.peer
        )));
    }
    let running = RunDir::holder(&Paths::of(site).run_root, site).map_err(anyhow::Error::new)?.is_some();
    if !seen.is_done() && !running {
        return Err(
            anyhow!("`ecmpvpn run` of {site} is not running, and only it can change the tunnels: start it").into()
        );
    }
    if !seen.is_done() && !seen.going {
        State::update(&file, |state| (state.going, state.stopped) = (true, None))?;
        reload(site).await?;
        print(format_args!(
            "the tunnels are changed one after the other; Ctrl-C ends only this report, `--abort` gives up"
        ))?;
    }
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    let (mut since, mut hinted) = (Instant::now(), false);
    loop {
        let Some(now) = State::read(&file)? else {
            return Err(anyhow!("the renewal of keys was given up with --abort").into());
        };
        let before = |part: &Part| seen.parts.iter().find(|before| before.tunnel == part.tunnel);
        let both = now.parts.iter().filter_map(|part| Some((part, before(part)?)));
        for (part, before) in both.filter(|(part, before)| part.stage != before.stage) {
            let words = match (before.stage, part.stage) {
                (_, Stage::Changing) => "both sites stop using it, and its keys are changed",
                (_, Stage::Done) => "works with its new keys",
                (_, Stage::Waiting) => "has its former keys again",
            };
            print(format_args!("{}: {words}", part.tunnel))?;
        }
        if now.is_done() {
            let count = tunnels(now.parts.len());
            print(format_args!(
                "{count} to {} have new keys; remove the file that was carried, at both sites",
                now.peer
            ))?;
            return Ok(());
        }
        if let (false, Some(why)) = (now.going, &now.stopped) {
            let advice =
                "the other tunnels were not touched; `ecmpvpn rotate` continues, `ecmpvpn rotate --abort` gives up";
            return Err(anyhow!("{why}; {advice}").into());
        }
        if now != seen {
            (since, hinted) = (Instant::now(), false);
        }
        seen = now;
        if since.elapsed() > STANDSTILL && !hinted {
            // Not before: `run` may be restarted meanwhile, as by an upgrade.
            if RunDir::holder(&Paths::of(site).run_root, site).map_err(anyhow::Error::new)?.is_none() {
                return Err(
                    anyhow!("`ecmpvpn run` of {site} has ended: start it, and continue with `ecmpvpn rotate`").into()
                );
            }
            hinted = true;
            print(format_args!(
                "nothing has changed for {} s: the log of `run` says why at either site",
                STANDSTILL.as_secs()
            ))?;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            interrupted = &mut interrupt => {
                interrupted.context("waiting for Ctrl-C")?;
                print(format_args!("the renewal continues; `ecmpvpn rotate --status` shows its progress"))?;
                return Ok(());
            }
        }
    }
}

/// Makes the running `run` read its files again. `false`: none is running.
async fn reload(site: &str) -> Result<bool, Failure> {
    match reload::ask(site, &Paths::of(site), reload::Wish::Apply).await? {
        None => Ok(false),
        Some(outcome) if outcome.exit == Exit::Done as u8 => Ok(true),
        Some(outcome) => Err(anyhow!("the running `ecmpvpn run` refuses it: {}", outcome.text).into()),
    }
}

fn tunnels(count: usize) -> String {
    count_of(count, "tunnel", "tunnels")
}
