//! All that is printed goes through here: a reader that went away is an end like Ctrl-C and not a panic, so that
//! everything is taken down.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Signal, getpid, kill_process};

static CLOSED: AtomicBool = AtomicBool::new(false);

/// Whether a reader of standard output or standard error has gone away.
pub fn closed() -> bool {
    CLOSED.load(Ordering::Acquire)
}

/// Something that takes a while begins.
pub fn step(text: &str) {
    progress(&format!("==> {text}\n"));
}

/// What comes of it.
pub fn note(text: &str) {
    progress(&format!("    {text}\n"));
}

/// Why it ends early.
pub fn error(text: &str) {
    progress(&format!("error: {text}\n"));
}

fn progress(text: &str) {
    // Progress that cannot be written for another reason, such as a full disk, is no reason to stop.
    let _ = written(write(io::stderr().lock(), text));
}

/// The result. An error is that it cannot be written; that nobody reads it is none.
pub fn result(text: &str) -> Result<()> {
    written(write(io::stdout().lock(), text)).context("writing the result to standard output")
}

fn write(mut stream: impl Write, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    stream.flush()
}

fn written(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {
            close();
            Ok(())
        }
        outcome => outcome,
    }
}

/// From now on a reader that goes away is noticed at once, and not when the next line is written.
pub fn watch() {
    thread::spawn(|| {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        let mut streams = [PollFd::new(&stdout, PollFlags::empty()), PollFd::new(&stderr, PollFlags::empty())];
        loop {
            match poll(&mut streams, None) {
                Ok(_) => {}
                Err(e) if e == rustix::io::Errno::INTR => continue,
                Err(_) => return,
            }
            // A pipe without a reader is an error of its writing end, poll(2).
            let gone = |stream: &PollFd<'_>| stream.revents().intersects(PollFlags::ERR | PollFlags::HUP);
            for (fd, _) in [stdout.as_fd(), stderr.as_fd()].iter().zip(&streams).filter(|(_, stream)| gone(stream)) {
                silence(*fd);
            }
            return close();
        }
    });
}

/// Ends the demonstration as a signal would.
fn close() {
    if !CLOSED.swap(true, Ordering::AcqRel) {
        let _ = kill_process(getpid(), Signal::TERM);
    }
}

/// What anybody else writes there goes nowhere, instead of making them fail while they clean up.
fn silence(fd: BorrowedFd<'_>) {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        // SAFETY: both are open, and the second goes on to be a descriptor of the same number that can be written to.
        unsafe { libc::dup2(null.as_raw_fd(), fd.as_raw_fd()) };
    }
}
