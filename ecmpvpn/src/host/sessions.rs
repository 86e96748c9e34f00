//! Finds the SSH sessions of this network namespace in `/proc`, on whatever port they are.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::OnceLock;

const SSH_PORT: u16 = 22;
/// Set by `sshd` for its sessions: remote address and port, local address and port. `sudo` removes it.
const SSH_CONNECTION: &str = "SSH_CONNECTION";
/// `TCP_ESTABLISHED`, `include/net/tcp_states.h`.
const ESTABLISHED: &str = "01";

/// Both ends of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// An established connection, from a table such as `/proc/net/tcp`.
#[derive(Debug, PartialEq, Eq)]
struct Connection {
    ends: Session,
    /// Inode of its socket. Unique among all network namespaces.
    inode: u64,
}

/// What [`remember`] has found.
static REMEMBERED: OnceLock<Vec<Session>> = OnceLock::new();

/// Looks for sessions once, for [`ssh_sessions`]. Call it before this process gives up the capabilities that it takes to
/// look at the sockets of other processes.
pub fn remember() {
    REMEMBERED.get_or_init(find);
}

/// The session of this process, if its environment names it, and all established TCP connections to port 22 or of a
/// socket that an SSH server has open; also those that were found before. Sockets of processes that this one may not
/// look at are not found: that needs root with the capabilities of a login.
pub fn ssh_sessions() -> Vec<Session> {
    let mut sessions = REMEMBERED.get().cloned().unwrap_or_default();
    sessions.extend(find());
    sessions
}

fn find() -> Vec<Session> {
    let own = std::env::var(SSH_CONNECTION).ok().as_deref().and_then(parse_ssh_connection);
    // Of the thread's network namespace: the same as for netlink.
    let tables = ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")));
    let served = sockets_of_servers();
    let is_session =
        |connection: &Connection| connection.ends.local.port() == SSH_PORT || served.contains(&connection.inode);
    let found = tables.iter().flatten().flat_map(|table| connections(table)).filter(is_session);
    own.into_iter().chain(found.map(|connection| connection.ends)).collect()
}

fn parse_ssh_connection(text: &str) -> Option<Session> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [remote, remote_port, local, local_port] = words.as_slice() else { return None };
    let end = |address: &str, port: &str| Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?));
    Some(Session { local: end(local, local_port)?, remote: end(remote, remote_port)? })
}

/// Inodes of the sockets that SSH servers have open.
fn sockets_of_servers() -> BTreeSet<u64> {
    let mut inodes = BTreeSet::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        // Processes may end meanwhile; other entries have no `status`.
        let Ok(status) = fs::read(process.path().join("status")) else { continue };
        if is_server(&String::from_utf8_lossy(&status)) {
            let files = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
            let targets = files.filter_map(|file| fs::read_link(file.path()).ok());
            inodes.extend(targets.filter_map(|target| socket_inode(target.to_str()?)));
        }
    }
    inodes
}

/// Whether `/proc/PID/status` is that of an SSH server with root's rights. Anybody may call a process `sshd`, but each
/// connection also belongs to a process of root: `sshd`, or `sshd-session` since OpenSSH 9.8.
fn is_server(status: &str) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let name = field("Name").map_or("", str::trim);
    // Real, effective, saved and file system user id.
    let effective = field("Uid").and_then(|ids| ids.split_whitespace().nth(1));
    (matches!(name, "sshd" | "dropbear") || name.starts_with("sshd-")) && effective == Some("0")
}

/// The inode in a link of `/proc/PID/fd` to a socket, such as `socket:[4711]`.
fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The established connections of a table such as `/proc/net/tcp`. Source: `get_tcp4_sock()`, `net/ipv4/tcp_ipv4.c`.
fn connections(table: &str) -> impl Iterator<Item = Connection> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, state, _, _, _, _, _, inode, ..] = fields.as_slice() else { return None };
        let ends = Session { local: end_of(local)?, remote: end_of(remote)? };
        (*state == ESTABLISHED).then_some(Connection { ends, inode: inode.parse().ok()? })
    })
}

/// Parses an address as the kernel prints it, 32-bit words in hexadecimal in the host's byte order, and after a colon
/// the port. An IPv4 address that is mapped into IPv6 is an IPv4 address.
fn end_of(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for (at, quarter) in octets.chunks_exact_mut(4).enumerate() {
                quarter.copy_from_slice(&word(8 * at)?);
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(local: &str, remote: &str) -> Session {
        Session { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn established_connections_are_found_in_both_families() {
        let rest = "00000000:00000000 00:00000000 00000000     0        0";
        let v4 = format!(
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 0403020A:08AE 0503020A:C350 01 {rest} 4711 1 0 20 4 30 10 -1\n   \
             1: 00000000:0016 00000000:0000 0A {rest} 12 1 0\n   2: 0403020A:0016 0503020A:C351 06 {rest} 0 3 0\n"
        );
        let v6 = format!(
            "  sl  local_address rem_address   st\n   \
             0: 000000FD000000000000000004000000:0016 000000FD000000000000000005000000:C350 01 {rest} 7 1\n   \
             1: 0000000000000000FFFF00000403020A:0016 0000000000000000FFFF00000503020A:C350 01 {rest} 8 1\n"
        );
        let connection = |local, remote, inode| Connection { ends: session(local, remote), inode };
        assert_eq!(connections(&v4).collect::<Vec<_>>(), [connection("10.2.3.4:2222", "10.2.3.5:50000", 4711)]);
        let found: Vec<Connection> = connections(&v6).collect();
        let mapped = connection("10.2.3.4:22", "10.2.3.5:50000", 8);
        assert_eq!(found, [connection("[fd00::4]:22", "[fd00::5]:50000", 7), mapped]);
        assert_eq!(connections("").count(), 0);
        assert_eq!(end_of("0403020A0403020A:0016"), None);
    }

    #[test]
    fn servers_are_processes_of_root() {
        let status = |name: &str, uid: &str| is_server(&format!("Name:\t{name}\nPid:\t7\nUid:\t0\t{uid}\t0\t0\n"));
        assert!(status("sshd", "0") && status("sshd-session", "0") && status("dropbear", "0"));
        assert!(!status("sshd", "1000") && !status("bash", "0") && !status("sshdx", "0") && !is_server(""));
        assert_eq!([socket_inode("socket:[4711]"), socket_inode("/dev/null")], [Some(4711), None]);
    }

    #[test]
    fn the_environment_names_both_ends() {
        let found = parse_ssh_connection("fd00::5 50000 fd00::4 2222");
        assert_eq!(found, Some(session("[fd00::4]:2222", "[fd00::5]:50000")));
        assert_eq!([parse_ssh_connection(""), parse_ssh_connection("a b c d")], [None, None]);
    }
}
