//! Prints all output. If the reader of the output goes away, the program ends as with Ctrl-C and does not panic, so
//! that everything is taken down.

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

/// Prints that a longer step begins.
pub fn step(text: &str) {
    progress(&format!("==> {text}\n"));
}

/// Prints the result of a step.
pub fn note(text: &str) {
    progress(&format!("    {text}\n"));
}

/// Prints why the program ends early.
pub fn error(text: &str) {
    progress(&format!("error: {text}\n"));
}

fn progress(text: &str) {
    // If progress cannot be written for another reason, such as a full disk, the program continues.
    let _ = written(write(io::stderr().lock(), text));
}

/// Prints the result. It is no error if nobody reads it.
///
/// # Errors
/// The result cannot be written for another reason.
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

/// Starts a thread that notices at once when a reader goes away, and not only when the next line is written.
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
            // For the writing end of a pipe without a reader, poll(2) reports an error.
            let gone = |stream: &PollFd<'_>| stream.revents().intersects(PollFlags::ERR | PollFlags::HUP);
            for (fd, _) in [stdout.as_fd(), stderr.as_fd()].iter().zip(&streams).filter(|(_, stream)| gone(stream)) {
                silence(*fd);
            }
            return close();
        }
    });
}

/// Ends the demonstration by a signal to this process.
fn close() {
    if !CLOSED.swap(true, Ordering::AcqRel) {
        let _ = kill_process(getpid(), Signal::TERM);
    }
}

/// Redirects `fd` to `/dev/null`, so that other code that writes to it does not fail while it cleans up.
fn silence(fd: BorrowedFd<'_>) {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        // SAFETY: both descriptors are open. The second keeps its number and stays open for writing.
        unsafe { libc::dup2(null.as_raw_fd(), fd.as_raw_fd()) };
    }
}
