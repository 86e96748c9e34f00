//! The system's log, for a process that has no terminal and no log of its own.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Where the system's log listens.
const SOCKET: &str = "/dev/log";

/// How grave a message is. Source: RFC 3164, section 4.1.1: facility 3 (system daemons) times 8, and the severity.
#[derive(Clone, Copy, Debug)]
pub enum Severity {
    /// Something failed.
    Error = 3 * 8 + 3,
    /// Something that somebody should know.
    Warning = 3 * 8 + 4,
}

/// Says one line. A host without such a log does not hear it.
pub fn log(severity: Severity, text: &str) {
    tell_at(Path::new(SOCKET), severity, text);
}

fn tell_at(socket: &Path, severity: Severity, text: &str) {
    let message = format!("<{}>ecmpvpn[{}]: {}", severity as u8, std::process::id(), text.replace('\n', " "));
    // Whoever listens may be slow, or gone: nobody may wait for it.
    let _ = UnixDatagram::unbound().and_then(|from| {
        from.set_nonblocking(true)?;
        from.send_to(message.as_bytes(), socket)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_its_severity_arrives() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        tell_at(&path, Severity::Error, "nobody listens");
        let log = UnixDatagram::bind(&path).unwrap();
        tell_at(&path, Severity::Warning, "two\nlines");
        let mut heard = [0; 100];
        let length = log.recv(&mut heard).unwrap();
        let expected = format!("<28>ecmpvpn[{}]: two lines", std::process::id());
        assert_eq!(std::str::from_utf8(&heard[..length]).unwrap(), expected);
    }
}
