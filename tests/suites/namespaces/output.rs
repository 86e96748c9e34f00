//! What `run` logs, and what the other commands answer.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Result, ensure};
use lab::kind::Kind;
use lab::sites::binary;
use rustix::process::Signal;

use super::stage::lab;

/// Starts the program as systemd does: the journal is its standard error.
const IN_JOURNAL: &str = "#!/bin/sh\nexport JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)\nexec ";

pub fn logs_and_answers_are_plain_text(kind: Kind) -> Result<()> {
    let lab = lab(kind)?;
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("in-journal");
    fs::write(&program, format!("{IN_JOURNAL}{} \"$@\"\n", binary()?.display()))?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    let mut running = [lab.start_program(0, &program, &[])?, lab.start(1)?];
    for site in &mut running {
        site.wait_until_up()?;
    }
    lab.warm_up(&mut running)?;

    let (code, answer, log) = lab.ecmpvpn(0, &["policy", "weight", "wg0", "2"])?;
    ensure!(code == 0 && log.is_empty() && answer.starts_with("wg0 has weight 2 now; "), "{answer:?} {log:?}");
    let (code, answer, log) = lab.ecmpvpn(0, &["reload"])?;
    ensure!(code == 0 && log.is_empty() && answer.ends_with(" already: nothing changed\n"), "{answer:?} {log:?}");

    for (site, mut one) in running.into_iter().enumerate() {
        one.signal(Signal::TERM)?;
        let status = one.wait()?;
        let output = one.output();
        ensure!(status.success() && !output.is_empty(), "site {site} ended with {status}:\n{output}");
        ensure!(!output.contains('\u{1b}'), "colours in the log of site {site}:\n{output}");
        ensure!(!output.contains("ERROR"), "errors in the log of a normal stop:\n{output}");
        let stamped = output.lines().filter(|line| line.starts_with(|first: char| first.is_ascii_digit())).count();
        let expected = if site == 0 { 0 } else { output.lines().count() };
        ensure!(stamped == expected, "{stamped} lines of site {site} have a time:\n{output}");
    }
    let (code, answer, log) = lab.ecmpvpn(0, &["down"])?;
    let expected = format!("nothing of {} is up\n", lab.sites[0].name);
    ensure!(code == 0 && log.is_empty() && answer == expected, "{answer:?} {log:?}");
    Ok(())
}
