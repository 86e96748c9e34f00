//! Reads the orders, and obeys them.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use rustix::process::{Signal, getpid, kill_process};

/// The environment variable that names the folder.
const VARIABLE: &str = "ECMPVPN_FAULT";

/// What the folder's order is, and how much of it has happened.
#[derive(Default)]
struct Progress {
    order: String,
    points: u64,
    writes: u64,
}

/// What a point must do.
#[derive(Debug, PartialEq, Eq)]
enum Act {
    GoOn,
    Die,
    Fail(i32),
}

impl Progress {
    /// Counts a point under `order`, and says what it must do.
    fn pass(&mut self, order: &str, is_write: bool) -> Act {
        if self.order != order {
            *self = Self { order: order.to_owned(), ..Self::default() };
        }
        self.points += 1;
        self.writes += u64::from(is_write);
        let mut words = order.split_whitespace();
        let mut number = |kind: &str| (words.next() == Some(kind)).then(|| words.next()?.parse::<u64>().ok())?;
        if let Some(at) = number("kill") {
            return if self.points == at { Act::Die } else { Act::GoOn };
        }
        let mut words = order.split_whitespace();
        let full = (words.next() == Some("full")).then(|| Some((words.next()?.parse().ok()?, words.next()?)));
        match full.flatten() {
            Some((at, errno)) if is_write && self.writes >= at => Act::Fail(errno.parse().unwrap_or(libc::EIO)),
            _ => Act::GoOn,
        }
    }
}

static FOLDER: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os(VARIABLE).map(PathBuf::from));
static PROGRESS: LazyLock<Mutex<Progress>> = LazyLock::new(Mutex::default);

pub(super) fn folder() -> Option<&'static Path> {
    FOLDER.as_deref()
}

pub(super) fn point(what: &str) {
    // Only a write can fail.
    let _ = pass(what, false);
}

pub(super) fn write(what: &str) -> io::Result<()> {
    pass(what, true)
}

fn pass(what: &str, is_write: bool) -> io::Result<()> {
    let Some(folder) = folder() else { return Ok(()) };
    let Ok(order) = fs::read_to_string(folder.join("order")) else { return Ok(()) };
    let mut progress = PROGRESS.lock().unwrap_or_else(PoisonError::into_inner);
    let act = progress.pass(order.trim(), is_write);
    note(folder, what, is_write);
    match act {
        Act::GoOn => Ok(()),
        Act::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
        Act::Die => {
            // The other threads wait for the lock meanwhile, so nothing happens after this point.
            let _ = kill_process(getpid(), Signal::KILL);
            loop {
                std::thread::park();
            }
        }
    }
}

fn note(folder: &Path, what: &str, is_write: bool) {
    let list = fs::OpenOptions::new().append(true).create(true).open(folder.join("points"));
    let kind = if is_write { "write " } else { "" };
    if let Ok(mut list) = list {
        let _ = writeln!(list, "{kind}{what}");
    }
}

#[cfg(test)]
mod tests {
    use super::{Act, Progress};

    #[test]
    fn an_order_counts_from_the_moment_it_is_given() {
        let mut progress = Progress::default();
        let mut pass = |order: &str, is_write| progress.pass(order, is_write);
        assert_eq!([pass("count", false), pass("count", true)], [Act::GoOn, Act::GoOn]);
        assert_eq!([pass("kill 2", true), pass("kill 2", false)], [Act::GoOn, Act::Die]);
        assert_eq!([pass("full 2 28", true), pass("full 2 28", false)], [Act::GoOn, Act::GoOn]);
        assert_eq!([pass("full 2 28", true), pass("full 2 28", false)], [Act::Fail(28), Act::GoOn]);
        assert_eq!(pass("full 2 28", true), Act::Fail(28), "a full disk stays full");
        assert_eq!(pass("nonsense", true), Act::GoOn);
    }
}
