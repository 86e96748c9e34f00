//! Syslog, for a process that has no terminal and no log of its own.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// The socket of the local syslog daemon.
const SOCKET: &str = "/dev/log";

/// The priority of a message: facility 3 (system daemons) times 8, plus the severity. Source: RFC 3164, section 4.1.1.
#[derive(Clone, Copy, Debug)]
pub enum Severity {
    Error = 3 * 8 + 3,
    Warning = 3 * 8 + 4,
}

/// Logs one line. On a host without syslog it is lost.
pub fn log(severity: Severity, text: &str) {
    report_at(Path::new(SOCKET), severity, text);
}

fn report_at(socket: &Path, severity: Severity, text: &str) {
    let message = format!("<{}>ecmpvpn[{}]: {}", severity as u8, std::process::id(), text.replace('\n', " "));
    // Never wait for the syslog daemon: it may be slow, or not run at all.
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
        report_at(&path, Severity::Error, "nobody listens");
        let log = UnixDatagram::bind(&path).unwrap();
        report_at(&path, Severity::Warning, "two\nlines");
        let mut heard = [0; 100];
        let length = log.recv(&mut heard).unwrap();
        let expected = format!("<28>ecmpvpn[{}]: two lines", std::process::id());
        assert_eq!(std::str::from_utf8(&heard[..length]).unwrap(), expected);
    }
}
