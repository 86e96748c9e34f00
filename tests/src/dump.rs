//! The state of a namespace as text. Two dumps, taken before and after, are compared byte for byte.
//!
//! iproute2 reads the state, not the code under test. These are left out on purpose, because they change by themselves:
//! - counters (`ip -s` is not used; `refcnt` of a queueing discipline counts its users);
//! - neighbour entries that are not permanent: traffic makes them and time removes them;
//! - anycast routes: the kernel makes them from the addresses while it forwards. One that is made while the kernel still
//!   brings the address up is counted twice, and then outlives forwarding (`net/ipv6/addrconf.c`,
//!   `addrconf_dad_completed` and `dev_forward_change`);
//! - remaining lifetimes: a route's is left out, an address's is replaced by `limited`;
//! - [`VOLATILE`] kernel settings.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use aya::programs::tc::TcAttachType;
use aya::programs::{ProgramInfo, SchedClassifier};
use serde_json::Value;

use crate::netns::Netns;

/// The BPF file system, where the pins are.
pub const PINS: &str = "/sys/fs/bpf";
/// Where `run` keeps its lock and its journal.
pub const RUN_DIR: &str = "/run/ecmpvpn";

/// Settings below `/proc/sys/net` that are not compared, and why.
const VOLATILE: [(&str, &str); 5] = [
    ("stable_secret", "cannot be read while it is unset"),
    ("/flush", "write only"),
    ("tcp_available_ulp", "grows with loaded modules: bonding brings tls"),
    ("tcp_available_congestion_control", "grows with loaded modules"),
    ("tcp_fastopen_key", "made at random when it is first needed"),
];

/// JSON fields that are not compared, and why.
const VOLATILE_FIELDS: [(&str, &str); 3] = [
    ("refcnt", "counts users of a queueing discipline"),
    ("expires", "remaining lifetime of a route, seconds"),
    ("used", "time since a route was last used"),
];

/// The state of a namespace, with the pins and run files that belong to it: titled sections of sorted lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump {
    sections: BTreeMap<String, Vec<String>>,
}

impl Dump {
    /// Dumps everything in `ns`, and the pins and run files below a directory of one of `sites`. Those of other
    /// sites are left out, because other labs may run at the same time.
    pub fn take(ns: &Netns, sites: &[&str]) -> Result<Self> {
        let mut dump = Self { sections: BTreeMap::new() };
        // One process answers many questions, because starting a process is slow in an emulated machine.
        for (family, titles, commands) in [
            (
                "",
                ["links", "addresses", "permanent neighbours"],
                ["link show", "address show", "neighbour show nud permanent"],
            ),
            (
                "-4",
                ["IPv4 routes", "IPv4 rules", "IPv4 next hops"],
                ["route show table all", "rule show", "nexthop show"],
            ),
            (
                "-6",
                ["IPv6 routes", "IPv6 rules", "IPv6 next hops"],
                ["route show table all", "rule show", "nexthop show"],
            ),
        ] {
            for (title, mut values) in titles.into_iter().zip(ip(ns, family, &commands)?) {
                values.retain(|value| value["type"] != "anycast");
                dump.add(title, rows(values));
            }
        }
        let qdiscs: Vec<Value> = serde_json::from_str(&ns.query("tc", "-j qdisc show")?)?;
        for qdisc in &qdiscs {
            let (Some(kind), Some(link)) = (qdisc["kind"].as_str(), qdisc["dev"].as_str()) else { continue };
            let hooks: &[&str] = match kind {
                "clsact" => &["ingress", "egress"],
                "ingress" => &["ingress"],
                "noqueue" | "pfifo_fast" | "fq_codel" | "tbf" => &[],
                _ => &["root"],
            };
            for side in hooks {
                let filters = ns.query("tc", &format!("filter show dev {link} {side}"))?;
                dump.add(&format!("{side} filters of {link}"), filters.lines().map(str::to_owned).collect());
            }
        }
        dump.add("qdiscs", rows(qdiscs));
        let names = ns.run(interfaces).context("listing the interfaces")?;
        dump.add("tcx programs", names.iter().flat_map(|name| tcx(ns, name)).collect());
        dump.add("sysctls", ns.run(|| sysctls(Path::new("/proc/sys/net"))));
        for dir in [PINS, RUN_DIR] {
            let mut paths = Vec::new();
            walk(Path::new(dir), &mut |path, is_dir| {
                // Whole names: `lab-a-1` is also the beginning of `lab-a-17`.
                let is_name = |part: Component<'_>| sites.iter().any(|site| part.as_os_str() == *site);
                if path.components().any(is_name) {
                    paths.push(path.display().to_string() + if is_dir { "/" } else { "" });
                }
            });
            dump.add(dir, paths);
        }
        Ok(dump)
    }

    /// Without what differs between two starts of the same site: indexes of interfaces and programs, what the bond
    /// negotiates with its partner, and the result of a reload.
    #[must_use]
    pub fn without_numbers(mut self) -> Self {
        const KEYS: [&str; 4] = ["ifindex", "link_index", "ad_info", "info_slave_data"];
        for (title, lines) in &mut self.sections {
            lines.retain(|line| !line.ends_with("/reload.json"));
            for line in lines.iter_mut() {
                let words: Vec<&str> = line.split(' ').collect();
                let number = if title == "tcx programs" {
                    Some(2)
                } else if title.contains(" filters of ") {
                    words.iter().position(|word| *word == "id").map(|at| at + 1)
                } else {
                    None
                };
                if let Some(number) = number {
                    let others = words.iter().enumerate().filter(|(at, _)| *at != number);
                    *line = others.map(|(_, word)| *word).collect::<Vec<_>>().join(" ");
                } else if let Ok(mut value) = serde_json::from_str(line) {
                    remove_keys(&mut value, &KEYS);
                    *line = value.to_string();
                }
            }
            lines.sort();
        }
        self
    }

    /// Waits until `take` gives the same dump as this one. Duplicate address detection and the kernel's link watch take
    /// a moment. Returns the last difference if the dumps still differ after `patience`.
    pub fn wait_for_same(&self, patience: Duration, take: impl Fn() -> Result<Self>) -> Result<Option<String>> {
        let start = Instant::now();
        loop {
            let difference = self.diff(&take()?);
            if difference.is_none() || start.elapsed() > patience {
                return Ok(difference);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn add(&mut self, title: &str, mut lines: Vec<String>) {
        lines.sort();
        self.sections.insert(title.to_owned(), lines);
    }

    /// The lines that `later` has more (`+`) and less (`-`). `None` if the two dumps are the same byte for byte.
    pub fn diff(&self, later: &Self) -> Option<String> {
        let none = Vec::new();
        let mut text = String::new();
        for title in self.sections.keys().chain(later.sections.keys().filter(|t| !self.sections.contains_key(*t))) {
            let before = self.sections.get(title).unwrap_or(&none);
            let after = later.sections.get(title).unwrap_or(&none);
            if before == after {
                continue;
            }
            let _ = writeln!(text, "{title}:");
            for line in before.iter().filter(|line| !after.contains(line)) {
                let _ = writeln!(text, "  - {line}");
            }
            for line in after.iter().filter(|line| !before.contains(line)) {
                let _ = writeln!(text, "  + {line}");
            }
            if before.len() != after.len() && before.iter().all(|line| after.contains(line)) {
                let _ = writeln!(text, "  ({} lines before, {} after)", before.len(), after.len());
            }
        }
        (!text.is_empty()).then_some(text)
    }
}

/// The answers of `ip` to three commands.
fn ip(ns: &Netns, family: &str, commands: &[&str; 3]) -> Result<[Vec<Value>; 3]> {
    let text = ns.query_batch("ip", &format!("{family} -d -j -batch -"), commands)?;
    let answers: Vec<Vec<Value>> = serde_json::Deserializer::from_str(&text)
        .into_iter()
        .collect::<Result<_, _>>()
        .with_context(|| format!("reading what ip answered to {commands:?}: {text}"))?;
    <[Vec<Value>; 3]>::try_from(answers)
        .map_err(|answers| anyhow!("ip gave {} answers to {commands:?}: {text}", answers.len()))
}

/// The names of all links of this thread's namespace.
fn interfaces() -> std::io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    Ok(text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect())
}

fn rows(values: Vec<Value>) -> Vec<String> {
    let normalised = values.into_iter().map(|mut value| {
        normalise(&mut value);
        value.to_string()
    });
    normalised.filter(|row| row != "{}").collect()
}

fn normalise(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| VOLATILE_FIELDS.iter().all(|(field, _)| field != key));
            for (key, value) in map.iter_mut() {
                if key.ends_with("life_time") && value.as_u64() != Some(u64::from(u32::MAX)) {
                    *value = "limited".into();
                }
                normalise(value);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(normalise),
        _ => {}
    }
}

fn remove_keys(value: &mut Value, keys: &[&str]) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !keys.contains(&key.as_str()));
            map.values_mut().for_each(|value| remove_keys(value, keys));
        }
        Value::Array(values) => values.iter_mut().for_each(|value| remove_keys(value, keys)),
        _ => {}
    }
}

fn tcx(ns: &Netns, link: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for (side, attach) in [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)] {
        // A kernel without tcx rejects the query. It has no such programs.
        if let Ok((_, programs)) = ns.run(|| SchedClassifier::query_tcx(link, attach)) {
            let describe = |p: &ProgramInfo| format!("{link} {side} {} {}", p.id(), p.name_as_str().unwrap_or("?"));
            lines.extend(programs.iter().map(describe));
        }
    }
    lines
}

fn sysctls(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for family in ["core", "ipv4", "ipv6"] {
        walk(&root.join(family), &mut |path, is_dir| {
            let name = path.display().to_string();
            if is_dir || VOLATILE.iter().any(|(suffix, _)| name.ends_with(suffix)) {
                return;
            }
            let value = fs::read_to_string(path).map_or_else(|e| format!("unreadable: {e}"), |v| v.trim().to_owned());
            lines.push(format!("{name} = {value}"));
        });
    }
    lines
}

/// Things that all sites of a host share and that no site uses any more. The last site should have removed them.
pub fn idle_shared_things() -> Result<Vec<String>> {
    let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    let mut idle = Vec::new();
    for dir in [Path::new(PINS).join("ecmpvpn"), PathBuf::from(RUN_DIR)] {
        if is_empty(&dir) {
            idle.push(format!("the empty directory {}", dir.display()));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let mounted = mounts.lines().any(|line| line.contains(&format!(" {PINS} ")) && line.contains(" - bpf "));
    if mounted && is_empty(Path::new(PINS)) {
        idle.push(format!("an empty BPF file system at {PINS}"));
    }
    Ok(idle)
}

/// Whether a path below `dir` has `word` in it.
pub fn any_path_contains(dir: &Path, word: &str) -> bool {
    let mut found = false;
    walk(dir, &mut |path, _| found |= path.to_string_lossy().contains(word));
    found
}

/// Calls `visit` with every path below `dir`, and with whether the path is a directory. Skips what disappears
/// meanwhile.
fn walk(dir: &Path, visit: &mut impl FnMut(&Path, bool)) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        visit(&entry.path(), kind.is_dir());
        if kind.is_dir() {
            walk(&entry.path(), visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(ns: &Netns) -> Dump {
        Dump::take(ns, &[]).unwrap()
    }

    #[test]
    fn every_kind_of_change_shows_and_undoing_it_restores_the_dump() {
        let ns = Netns::new("dump").expect("needs root");
        ns.ip("link add d0 type veth peer name d1").unwrap();
        for link in ["d0", "d1"] {
            ns.ip(&format!("link set {link} up addrgenmode none")).unwrap();
        }
        let before = dump(&ns);
        assert_eq!(before.diff(&dump(&ns)), None);
        let changes = [
            ("link set d0 mtu 1400", "link set d0 mtu 1500", "links"),
            ("address add 192.0.2.1/32 dev d0", "address del 192.0.2.1/32 dev d0", "addresses"),
            ("address add fd00::1/128 dev d0 nodad", "address del fd00::1/128 dev d0", "addresses"),
            ("route add 198.51.100.0/24 dev d0", "route del 198.51.100.0/24 dev d0", "IPv4 routes"),
            ("route add fd01::/64 dev d0 table 7", "route del fd01::/64 dev d0 table 7", "IPv6 routes"),
            ("rule add fwmark 9 table 7", "rule del fwmark 9 table 7", "IPv4 rules"),
            ("-6 rule add fwmark 9 table 7", "-6 rule del fwmark 9 table 7", "IPv6 rules"),
            ("link add d2 type veth peer name d3", "link del d2", "links"),
        ];
        for (make, undo, section) in changes {
            ns.ip(make).unwrap();
            let diff = before.diff(&dump(&ns)).unwrap_or_else(|| panic!("`{make}` does not show"));
            assert!(diff.contains(section), "`{make}` gives:\n{diff}");
            ns.ip(undo).unwrap();
            let diff = before.diff(&dump(&ns));
            assert_eq!(diff, None, "after `{undo}`:\n{}", diff.as_deref().unwrap_or_default());
        }
        let changes = [
            ("qdisc add dev d0 root tbf rate 20mbit burst 32k latency 50ms", "qdisc del dev d0 root", "qdiscs"),
            ("qdisc add dev d0 clsact", "qdisc del dev d0 clsact", "qdiscs"),
        ];
        for (make, undo, section) in changes {
            ns.tc(make).unwrap();
            assert!(before.diff(&dump(&ns)).unwrap().contains(section), "{make}");
            ns.tc(undo).unwrap();
            assert_eq!(before.diff(&dump(&ns)), None, "{undo}");
        }
        ns.tc("qdisc add dev d0 clsact").unwrap();
        let with_hook = dump(&ns);
        ns.tc("filter add dev d0 egress protocol ip u32 match ip dst 192.0.2.0/24 flowid 1:1").unwrap();
        assert!(with_hook.diff(&dump(&ns)).unwrap().contains("egress filters of d0"));
        ns.tc("qdisc del dev d0 clsact").unwrap();
        ns.sysctl("net/ipv4/conf/d0/rp_filter", "2").unwrap();
        assert!(before.diff(&dump(&ns)).unwrap().contains("d0/rp_filter = 2"));
    }

    #[test]
    fn run_files_are_seen_by_site() {
        let ns = Netns::new("dump").expect("needs root");
        let site = crate::netns::unique("site");
        let before = Dump::take(&ns, &[&site]).unwrap();
        let dir = Path::new(RUN_DIR).join(&site);
        fs::create_dir_all(&dir).unwrap();
        let diff = before.diff(&Dump::take(&ns, &[&site]).unwrap()).unwrap();
        let other = before.diff(&Dump::take(&ns, &["nobody"]).unwrap());
        fs::remove_dir(&dir).unwrap();
        // This fails, as it should, if another test has files there.
        let _ = fs::remove_dir(RUN_DIR);
        assert!(diff.contains(&format!("+ {}/", dir.display())), "{diff}");
        assert_eq!(other, None);
    }
}
