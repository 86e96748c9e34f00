//! Reads the `.conf` file of a `wg-quick` tunnel. Text in, [`WgQuick`] out; nothing here looks at files or the host.
//!
//! Sections and keys are those of wg(8) and wg-quick(8), in upper or lower case; `#` starts a comment. All problems are
//! reported at once, and no key is ever shown.

use std::net::IpAddr;

use ipnet::IpNet;

use super::problems::{Problem, Problems};
use super::section::nearest;
use super::{PresharedKey, PrivateKey, PublicKey, may_hold_key};

/// The content of one `.conf` file.
#[derive(Clone, Debug, Default)]
pub struct WgQuick {
    /// `[Interface]`
    pub interface: Interface,
    /// Every `[Peer]`, in order.
    pub peers: Vec<Peer>,
}

/// `[Interface]`
#[derive(Clone, Debug, Default)]
pub struct Interface {
    /// `PrivateKey`. `None`: the file may set it in a `PostUp` command.
    pub private_key: Option<PrivateKey>,
    /// `ListenPort`. `None`: the kernel picks a port.
    pub listen_port: Option<u16>,
    /// `FwMark`. `None`: off.
    pub fwmark: Option<u32>,
    /// `Address`, each with its prefix length.
    pub addresses: Vec<IpNet>,
    /// `MTU`, bytes.
    pub mtu: Option<u32>,
    /// `Table`
    pub table: Table,
    /// Keys that only wg-quick uses, such as `DNS` and `PostUp`, once for each line, with the line number.
    pub unused: Vec<(&'static str, usize)>,
}

/// Where wg-quick puts the routes to the peers' allowed IPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Table {
    /// The main table, with policy routing for a default route.
    #[default]
    Auto,
    /// No routes: something else sets them, such as an ECMP route.
    Off,
    /// A table, given by number or name.
    Named(String),
}

/// `[Peer]`
#[derive(Clone, Debug)]
pub struct Peer {
    /// `PublicKey`
    pub public_key: PublicKey,
    /// `PresharedKey`
    pub preshared_key: Option<PresharedKey>,
    /// `AllowedIPs`. Host bits are cleared, as the kernel does.
    pub allowed_ips: Vec<IpNet>,
    /// `Endpoint`. `None`: learned from the peer's packets.
    pub endpoint: Option<Endpoint>,
    /// `PersistentKeepalive`, seconds. `None`: off.
    pub persistent_keepalive: Option<u16>,
}

/// `Endpoint`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: Host,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    Address(IpAddr),
    Name(String),
}

const INTERFACE_KEYS: [&str; 12] = [
    "PrivateKey",
    "ListenPort",
    "FwMark",
    "Address",
    "MTU",
    "Table",
    "DNS",
    "PreUp",
    "PostUp",
    "PreDown",
    "PostDown",
    "SaveConfig",
];
const PEER_KEYS: [&str; 5] = ["PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive"];

/// A `[Peer]` section that is being read.
#[derive(Default)]
struct Draft {
    line: usize,
    public_key: Option<PublicKey>,
    /// There was a `PublicKey`, even if it was invalid and is reported already.
    bad_key: bool,
    preshared_key: Option<PresharedKey>,
    allowed_ips: Vec<IpNet>,
    endpoint: Option<Endpoint>,
    persistent_keepalive: Option<u16>,
}

enum Section {
    None,
    Unknown,
    Interface,
    Peer,
}

/// Parses a file. Messages call it `file`.
///
/// # Errors
/// All problems of the text.
pub fn parse(text: &str, file: &str) -> Result<WgQuick, Problems> {
    let mut interface = Interface::default();
    let mut drafts: Vec<Draft> = Vec::new();
    let mut problems = Vec::new();
    let mut section = Section::None;
    let mut has_interface = false;
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let mut report = |message: String| problems.push(Problem { line: Some(number), message });
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        if line.starts_with('[') {
            section = if line.eq_ignore_ascii_case("[interface]") {
                has_interface = true;
                Section::Interface
            } else if line.eq_ignore_ascii_case("[peer]") {
                drafts.push(Draft { line: number, ..Draft::default() });
                Section::Peer
            } else {
                let given = if may_hold_key(line) { "this line" } else { line };
                report(format!("{given} is no section of a wg-quick file: write [Interface] or [Peer]"));
                Section::Unknown
            };
            continue;
        }
        // The value of a line that cannot be parsed is not shown: it may be a key.
        let Some((key, value)) = line.split_once('=').map(|(key, value)| (key.trim(), value.trim())) else {
            report("there is no KEY = VALUE here: name a wg-quick file".to_owned());
            continue;
        };
        let known: &[&'static str] = match section {
            Section::None => {
                report("a key stands before the first section: begin with [Interface]".to_owned());
                continue;
            }
            Section::Unknown => continue,
            Section::Interface => &INTERFACE_KEYS,
            Section::Peer => &PEER_KEYS,
        };
        let Some(key) = known.iter().copied().find(|known| known.eq_ignore_ascii_case(key)) else {
            report(unknown(key, known));
            continue;
        };
        let result = match drafts.last_mut() {
            Some(draft) if matches!(section, Section::Peer) => draft.set(key, value),
            _ => interface.set(key, value, number),
        };
        if let Err(phrase) = result {
            report(format!("{key} {phrase}"));
        }
    }
    if !has_interface && problems.is_empty() {
        let message = "has no [Interface] section: name a wg-quick file such as /etc/wireguard/wg0.conf".to_owned();
        problems.push(Problem { line: None, message });
    }
    let peers = drafts.into_iter().filter_map(|draft| draft.finish(&mut problems)).collect();
    problems.sort_by_key(|problem| problem.line);
    if problems.is_empty() {
        Ok(WgQuick { interface, peers })
    } else {
        Err(Problems { file: file.to_owned(), list: problems })
    }
}

/// A value, or a phrase that continues its key and ends with the fix.
type Parsed<T> = Result<T, String>;

impl Interface {
    fn set(&mut self, key: &'static str, value: &str, line: usize) -> Parsed<()> {
        match key {
            "PrivateKey" => self.private_key = Some(key_of(value)?),
            "ListenPort" => self.listen_port = Some(number(value, "a port from 0 to 65535")?).filter(|port| *port > 0),
            "FwMark" => self.fwmark = Some(fwmark(value)?).filter(|mark| *mark > 0),
            "Address" => self.addresses.extend(nets(value)?),
            "MTU" => self.mtu = Some(number(value, "a number of bytes")?),
            "Table" => {
                self.table = match value {
                    "auto" => Table::Auto,
                    "off" => Table::Off,
                    name => Table::Named(name.to_owned()),
                }
            }
            unused => self.unused.push((unused, line)),
        }
        Ok(())
    }
}

impl Draft {
    fn set(&mut self, key: &'static str, value: &str) -> Parsed<()> {
        match key {
            "PublicKey" => {
                self.bad_key = true;
                self.public_key = Some(key_of(value)?);
            }
            "PresharedKey" => {
                let key: PresharedKey = key_of(value)?;
                // In WireGuard an all-zero key means that there is none.
                self.preshared_key = Some(key).filter(|key| key.as_bytes() != &[0; 32]);
            }
            "AllowedIPs" => self.allowed_ips.extend(nets(value)?.iter().map(IpNet::trunc)),
            "Endpoint" => self.endpoint = Some(endpoint(value)?),
            _ => self.persistent_keepalive = keepalive(value)?,
        }
        Ok(())
    }

    fn finish(self, problems: &mut Vec<Problem>) -> Option<Peer> {
        if self.public_key.is_none() && !self.bad_key {
            let message = "[Peer] has no PublicKey: give the far end's".to_owned();
            problems.push(Problem { line: Some(self.line), message });
        }
        Some(Peer {
            public_key: self.public_key?,
            preshared_key: self.preshared_key,
            allowed_ips: self.allowed_ips,
            endpoint: self.endpoint,
            persistent_keepalive: self.persistent_keepalive,
        })
    }
}

fn unknown(key: &str, known: &[&'static str]) -> String {
    let belongs_elsewhere = |keys: &[&str]| keys.iter().any(|other| other.eq_ignore_ascii_case(key));
    // The text before `=` may be part of a key if the line is not a setting.
    if key.len() > 24 || !key.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        "there is no known key before the equals sign: name a wg-quick file".to_owned()
    } else if belongs_elsewhere(&INTERFACE_KEYS) {
        format!("{key} does not belong in [Peer]: move it to [Interface]")
    } else if belongs_elsewhere(&PEER_KEYS) {
        format!("{key} does not belong in [Interface]: move it to [Peer]")
    } else {
        match nearest(key, known) {
            Some(near) => format!("{key} is no key of wg-quick's: write {near}"),
            None => format!("{key} is no key of wg-quick's: take it out"),
        }
    }
}

fn key_of<T: std::str::FromStr<Err = super::KeyError>>(value: &str) -> Parsed<T> {
    value.parse().map_err(|error: super::KeyError| error.to_string())
}

fn number<T: std::str::FromStr>(value: &str, desired: &str) -> Parsed<T> {
    value.parse().map_err(|_| format!("is {}: give {desired}", excerpt(value)))
}

/// A value as messages show it. A value that may be a key is not shown.
fn excerpt(value: &str) -> String {
    if may_hold_key(value) { "a key".to_owned() } else { format!("{value:?}") }
}

fn fwmark(value: &str) -> Parsed<u32> {
    let parsed = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        _ if value == "off" => Some(0),
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => value.parse().ok(),
    };
    parsed.ok_or_else(|| format!("is {}: give a number such as 51820 or 0xca6c, or off", excerpt(value)))
}

fn keepalive(value: &str) -> Parsed<Option<u16>> {
    if value == "off" {
        return Ok(None);
    }
    Ok(Some(number(value, "seconds from 0 to 65535, or off")?).filter(|seconds| *seconds > 0))
}

/// Nets or addresses, separated by commas. An address without a prefix length is a net of one host.
fn nets(value: &str) -> Parsed<Vec<IpNet>> {
    let net = |text: &str| {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map_err(|_| format!("has {}: give addresses such as 10.0.0.1/24 or fd00::1/64, by commas", excerpt(text)))
    };
    value.split(',').map(str::trim).filter(|text| !text.is_empty()).map(net).collect()
}

fn endpoint(value: &str) -> Parsed<Endpoint> {
    let desired = || {
        let given = excerpt(value);
        format!("is {given}: give an address or name and a port, such as 203.0.113.5:51820 or [2001:db8::5]:51820")
    };
    let (host, port) = value.rsplit_once(':').ok_or_else(desired)?;
    let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(desired)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inner) => Host::Address(IpAddr::V6(inner.parse().map_err(|_| desired())?)),
        None if host.is_empty() || host.contains(':') => return Err(desired()),
        None => host.parse().map_or_else(|_| Host::Name(host.to_owned()), Host::Address),
    };
    Ok(Endpoint { host, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "QNXm5mfRz2SVnDAFGh8eTZ8hAgGIAxsIGkIi0QhCiHI=";
    const PUBLIC: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

    fn problems(text: &str) -> Vec<String> {
        let problems = parse(text, "wg0.conf").expect_err(text);
        problems.to_string().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_whole_file() {
        let text = format!(
            "# the first tunnel\n[interface]\nprivatekey = {SECRET}\nListenPort=5000 # equal at both ends\nFwMark = 0xca6c\n\
             Address = 169.254.77.0/31, fd00::1/64\nAddress = 10.0.0.1\nMTU = 1420\nTable = off\nDNS = 10.0.0.53\n\
             PostUp = ip rule add from 10.0.0.1 = weird\nSaveConfig = true\n\n\
             [PEER]\nPublicKey = {PUBLIC}\nPresharedKey = {SECRET}\nAllowedIPs = 10.20.0.5/16\nallowedips = fd00:20::/48,\n\
             Endpoint = 203.0.113.5:5001\nPersistentKeepalive = 25\n\n\
             [Peer]\nPublicKey={PUBLIC}\nEndpoint = [2001:db8::5]:51820\nPersistentKeepalive = off\n"
        );
        let WgQuick { interface, peers } = parse(&text, "wg0.conf").unwrap();
        assert_eq!(interface.private_key, Some(SECRET.parse().unwrap()));
        assert_eq!((interface.listen_port, interface.fwmark, interface.mtu), (Some(5000), Some(0xca6c), Some(1420)));
        let addresses: Vec<_> = interface.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["169.254.77.0/31", "fd00::1/64", "10.0.0.1/32"]);
        assert_eq!(interface.table, Table::Off);
        assert_eq!(interface.unused, [("DNS", 10), ("PostUp", 11), ("SaveConfig", 12)]);
        assert_eq!(peers.len(), 2);
        assert_eq!(peers[0].public_key, PUBLIC.parse().unwrap());
        assert_eq!(peers[0].preshared_key, Some(SECRET.parse().unwrap()));
        let allowed: Vec<_> = peers[0].allowed_ips.iter().map(ToString::to_string).collect();
        assert_eq!(allowed, ["10.20.0.0/16", "fd00:20::/48"]);
        let host = |text: &str| Host::Address(text.parse().unwrap());
        assert_eq!(peers[0].endpoint, Some(Endpoint { host: host("203.0.113.5"), port: 5001 }));
        assert_eq!(peers[1].endpoint, Some(Endpoint { host: host("2001:db8::5"), port: 51820 }));
        assert_eq!((peers[0].persistent_keepalive, peers[1].persistent_keepalive), (Some(25), None));
    }

    #[test]
    fn what_is_off_or_left_out_is_none() {
        let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let text = format!(
            "[Interface]\nListenPort = 0\nFwMark = off\n[Peer]\nPublicKey = {PUBLIC}\nPresharedKey = {zero}\n\
             Endpoint = vpn.example.net:51820\nAllowedIPs =\nPersistentKeepalive = 0\n"
        );
        let WgQuick { interface, peers } = parse(&text, "wg0.conf").unwrap();
        assert!(interface.private_key.is_none() && interface.listen_port.is_none() && interface.fwmark.is_none());
        assert_eq!(interface.table, Table::Auto);
        assert_eq!(peers[0].preshared_key, None);
        assert_eq!(peers[0].endpoint, Some(Endpoint { host: Host::Name("vpn.example.net".into()), port: 51820 }));
        assert!(peers[0].allowed_ips.is_empty() && peers[0].persistent_keepalive.is_none());
    }

    #[test]
    fn all_problems_are_reported_by_line() {
        let text = "[Interface]\nListenPort = 70000\nListenport2 = 5\nAdress = 10.0.0.1/24\nAddress = 10.0.0.1/33\n\
                    PublicKey = x\nMTU = big\nFwMark = 0xzz\n[Peer]\nEndpoint = 2001:db8::5\nEndpoint = [10.0.0.1]:5\n\
                    ListenPort = 5\nAllowedIPs = here\nPersistentKeepalive = never\nnonsense\n[Pear]\nWhat = ever\n";
        let expected = [
            ":2: ListenPort is \"70000\": give a port from 0 to 65535",
            ":3: Listenport2 is no key of wg-quick's: write ListenPort",
            ":4: Adress is no key of wg-quick's: write Address",
            ":5: Address has \"10.0.0.1/33\": give",
            ":6: PublicKey does not belong in [Interface]: move it to [Peer]",
            ":7: MTU is \"big\": give a number of bytes",
            ":8: FwMark is \"0xzz\": give",
            ":9: [Peer] has no PublicKey: give the far end's",
            ":10: Endpoint is \"2001:db8::5\": give",
            ":11: Endpoint is \"[10.0.0.1]:5\": give",
            ":12: ListenPort does not belong in [Peer]: move it to [Interface]",
            ":13: AllowedIPs has \"here\": give",
            ":14: PersistentKeepalive is \"never\": give",
            ":15: there is no KEY = VALUE here",
            ":16: [Pear] is no section of a wg-quick file: write [Interface] or [Peer]",
        ];
        let message = problems(text);
        assert_eq!(message.len(), expected.len(), "{message:#?}");
        for (message, expected) in message.iter().zip(expected) {
            assert!(message.starts_with(&format!("wg0.conf{expected}")), "{message}");
        }
        assert_eq!(problems("ListenPort = 5\n").len(), 1);
        assert!(problems("").iter().all(|message| message.starts_with("wg0.conf: has no [Interface] section")));
    }

    #[test]
    fn keys_are_never_shown() {
        let broken = &SECRET[..40];
        for line in [
            format!("PrivateKey = {broken}"),
            format!("PrivateKey {SECRET}"),
            SECRET.to_owned(),
            format!("{broken}= 5"),
            format!("Address = {SECRET}"),
            format!("ListenPort = {SECRET}"),
            format!("Address = {SECRET}/24"),
            format!("[{SECRET}"),
            format!("[Peer {SECRET}]"),
            format!("[Peer]\nPublicKey = {broken}\n"),
            format!("[Peer]\nPublicKey = {PUBLIC}\nPresharedKey = {broken}"),
        ] {
            let message = problems(&format!("[Interface]\n{line}\n"));
            assert_eq!(message.len(), 1, "{message:#?}");
            assert!(!message[0].contains(&SECRET[..12]), "{message:?}");
        }
        let sound = parse(&format!("[Interface]\nPrivateKey = {SECRET}\n"), "wg0.conf").unwrap();
        assert!(!format!("{sound:?}").contains(&SECRET[..12]));
    }
}
