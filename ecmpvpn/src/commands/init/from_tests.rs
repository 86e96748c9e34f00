//! The wg-quick files of two sites become configurations that fit each other.

use clap::Parser as _;
use ipnet::IpNet;

use crate::cli::{Cli, Command};
use crate::config::{InterfaceName, PrivateKey, wg_quick};
use crate::plan::far_address;
use crate::plan::init::Request;
use crate::plan::init::from_wg_quick::{File, Taken, take_over};
use crate::report::init as report;

const KEYS: [&str; 2] =
    ["QNXm5mfRz2SVnDAFGh8eTZ8hAgGIAxsIGkIi0QhCiHI=", "mAbrUe8BvNoXRVoIuSCFQxGHP2OYGg7eQnzzuDQ25UM="];
const ENDPOINTS: [&str; 2] = ["10.2.3.4", "10.2.3.5"];

fn args(more: &str) -> Request {
    let words = ["ecmpvpn", "init", "--from", "wg0.conf"].into_iter().chain(more.split_whitespace());
    let Command::Init(args) = Cli::try_parse_from(words).expect("sound arguments").command else { panic!("{more}") };
    args.request()
}

/// The usual files of site 0 or 1: equal ports, all nets allowed on every tunnel.
fn texts(site: usize) -> Vec<String> {
    let public = KEYS[1 - site].parse::<PrivateKey>().unwrap().public_key();
    let (key, far) = (KEYS[site], ENDPOINTS[1 - site]);
    let text = |at: usize| {
        let port = 5000 + at;
        format!(
            "[Interface]\nPrivateKey = {key}\nListenPort = {port}\nAddress = 10.99.{at}.{}/24\nTable = off\nMTU = 1400\n\
             PostUp = true\n[Peer]\nPublicKey = {public}\nEndpoint = {far}:{port}\nAllowedIPs = 10.{}.0.0/16, \
             fd00:{site}::/32, 224.0.0.0/4\nPersistentKeepalive = 25\n",
            site + 1,
            20 - 10 * site,
        )
    };
    (0..3).map(text).collect()
}

fn files(texts: &[String]) -> Vec<File> {
    let file = |(at, text): (usize, &String)| File {
        path: format!("wg{at}.conf"),
        name: InterfaceName::new(&format!("wg{at}")).unwrap(),
        content: wg_quick::parse(text, "x").unwrap(),
    };
    texts.iter().enumerate().map(file).collect()
}

fn taken(site: usize, more: &str) -> Taken {
    let args = args(&format!("--a-endpoint {} {more}", ENDPOINTS[site]));
    take_over(&args, &files(&texts(site))).unwrap_or_else(|failure| panic!("{failure}"))
}

/// The error for site 0's files with `from` replaced by `to` in the second file.
fn refusal(from: &str, to: &str, more: &str) -> String {
    let mut texts = texts(0);
    assert!(texts[1].contains(from), "{from}");
    texts[1] = texts[1].replace(from, to);
    let args = args(&format!("--a-endpoint 10.2.3.4 {more}"));
    format!("{:#}", take_over(&args, &files(&texts)).expect_err(to))
}

#[test]
fn both_sites_come_to_the_same_answer_by_themselves() {
    let a = taken(0, "--a-members 3 --b-members 2");
    let b = taken(1, "--a-members 2 --b-members 3 --a-name site-b --b-name site-a");
    assert_eq!(a.ports.misses(), 0);
    assert_eq!(a.config.steering, b.config.steering);
    assert_eq!((a.config.steering.mtu, a.base_port), (1400, 5000));
    let (to_b, to_a) = (&a.config.peers[0], &b.config.peers[0]);
    assert_eq!(to_b.public_key, b.config.site.private_key.public_key());
    assert_eq!((to_b.local_endpoint, to_b.remote_endpoint), (to_a.remote_endpoint, to_a.local_endpoint));
    for (near, far) in to_b.tunnels.iter().zip(&to_a.tunnels) {
        assert_eq!((near.listen_port, near.remote_port), (far.remote_port, far.listen_port));
        assert_eq!(far_address(near.address), Some(far.address.addr()));
    }
    let shown = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(shown(&to_b.prefixes), ["10.20.0.0/16", "fd00::/32"]);
    assert_eq!(shown(&a.config.site.addresses), ["10.99.0.1/32", "10.99.1.1/32", "10.99.2.1/32"]);
    assert!(a.notes.iter().any(|note| note.starts_with("224.0.0.0/4 of wg0.conf's AllowedIPs is left out")));
    for start in [
        "PostUp (line 7) of wg0.conf left out: `run` carries out no commands: put NAT",
        "Table of wg0.conf left out: `run` makes links and routes by itself",
        "PersistentKeepalive of wg0.conf left out: the probes of every tunnel keep",
    ] {
        assert!(a.notes.iter().any(|note| note.starts_with(start)), "{start}: {:#?}", a.notes);
    }
}

#[test]
fn ports_that_spread_stay_and_the_others_are_reported() {
    let planned = taken(0, "--a-members 3 --b-members 3");
    let message = report::changes(&planned);
    let first = &planned.config.peers[0].tunnels[2];
    let (here, there) = (first.listen_port, first.remote_port);
    let expected = [(5002, here), (5002, there)]
        .map(|(old, new)| if old == new { format!("{new} stays") } else { format!("{old} -> {new}") });
    assert_eq!(message[2], format!("wg2: port here {}, at site-b {}", expected[0], expected[1]));
    assert!(message.iter().any(|line| line.contains("must change its ports as well")), "{message:#?}");
    let mut texts = texts(0);
    for (at, (text, pair)) in texts.iter_mut().zip(&planned.ports.pairs).enumerate() {
        let old = 5000 + at;
        *text = text.replace(&format!("ListenPort = {old}"), &format!("ListenPort = {}", pair.a));
        *text = text.replace(&format!(":{old}"), &format!(":{}", pair.b));
    }
    let again = take_over(&args("--a-endpoint 10.2.3.4 --a-members 3 --b-members 3"), &files(&texts)).expect("sound");
    assert_eq!(again.ports, planned.ports);
    let message = report::changes(&again);
    assert!(message[..3].iter().all(|line| line.matches("stays").count() == 2), "{message:#?}");
    assert!(!message.iter().any(|line| line.contains("must change")), "{message:#?}");
}

#[test]
fn the_text_for_the_other_site_fits_and_holds_no_secret() {
    let args = args("--a-endpoint 10.2.3.4 --a-members 3 --b-members 2");
    let taken = take_over(&args, &files(&texts(0))).expect("sound");
    let text = report::other_site(&args, &taken);
    let tunnel = &taken.config.peers[0].tunnels[1];
    for expected in [
        "--a-name site-b --b-name site-a --a-endpoint 10.2.3.5 --a-members 2 --b-members 3 --base-port 5000 --mtu 1400",
        &format!("wg1: listen_port = {}  remote_port = {}", tunnel.remote_port, tunnel.listen_port),
        &format!("wg1: ListenPort = {}  Endpoint = 10.2.3.4:{}", tunnel.remote_port, tunnel.listen_port),
        &taken.config.site.private_key.public_key().to_string(),
        &format!(
            "Endpoint = 10.2.3.4:{}  Address = {}/31  AllowedIPs = {}/32 and those that it has",
            tunnel.listen_port,
            crate::plan::far_address(tunnel.address).expect("a net of two"),
            tunnel.address.addr()
        ),
    ] {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    assert!(!text.contains(KEYS[0]));
}

#[test]
fn own_nets_of_two_are_kept() {
    let texts: Vec<String> = texts(0)
        .iter()
        .enumerate()
        .map(|(at, text)| text.replace("/24", &format!("/24,192.0.2.{}/31", 2 * at)))
        .collect();
    let args = args("--a-endpoint 10.2.3.4 --b-prefix 10.20.0.0/16");
    let taken = take_over(&args, &files(&texts)).expect("sound");
    let nets: Vec<String> = taken.config.peers[0].tunnels.iter().map(|tunnel| tunnel.address.to_string()).collect();
    assert_eq!(nets, ["192.0.2.0/31", "192.0.2.2/31", "192.0.2.4/31"]);
    assert_eq!(taken.config.site.addresses.len(), 3);
    assert_eq!(taken.config.peers[0].prefixes.len(), 1);
}

#[test]
fn files_that_disagree_are_refused() {
    let other = PrivateKey::generate();
    let public = KEYS[1].parse::<PrivateKey>().unwrap().public_key().to_string();
    for (from, to, more, expected) in [
        (KEYS[0], other.to_base64().as_str(), "", "wg1.conf has another PrivateKey than wg0.conf: a site has one key"),
        (public.as_str(), &other.public_key().to_string(), "", "wg1.conf has another PublicKey than wg0.conf"),
        (
            "[Peer]",
            &format!("[Peer]\nPresharedKey = {}", KEYS[0]),
            "",
            "wg1.conf has another PresharedKey than wg0.conf",
        ),
        ("PrivateKey", "# ", "", "wg1.conf has no PrivateKey"),
        ("[Peer]", &format!("[Peer]\nPublicKey = {public}\n[Peer]"), "", "wg1.conf has 2 [Peer] sections"),
        ("Endpoint", "# ", "", "wg1.conf has no Endpoint"),
        ("10.2.3.5:", "10.2.3.6:", "", "wg1.conf has the Endpoint 10.2.3.6, wg0.conf has 10.2.3.5"),
        ("10.2.3.5:", "vpn.example.net:", "", "wg1.conf has the Endpoint vpn.example.net, a name"),
        (
            "10.2.3.5",
            "10.2.3.5",
            "--b-endpoint 10.2.3.6",
            "wg0.conf has the Endpoint 10.2.3.5, --b-endpoint has 10.2.3.6",
        ),
        ("224.0.0.0/4", "0.0.0.0/0", "", "wg1.conf has the AllowedIPs 0.0.0.0/0, which contain the endpoint 10.2.3.4"),
        ("1400", "1200", "", "wg1.conf has the MTU 1200"),
        ("1400", "1400", "--a-members eno1,eno2", "--a-members names interfaces to bond"),
    ] {
        let message = refusal(from, to, more);
        assert!(message.starts_with(expected), "{message}");
        assert!(!message.contains(&KEYS[0][..12]) && !message.contains(&other.to_base64()[..12]), "{message}");
    }
}

#[test]
fn a_name_is_no_matter_where_the_address_is_given() {
    let texts: Vec<String> = texts(0).iter().map(|text| text.replace("10.2.3.5:", "vpn.example.net:")).collect();
    let args = args("--a-endpoint 10.2.3.4 --b-endpoint 10.2.3.5");
    let taken = take_over(&args, &files(&texts)).expect("sound");
    assert_eq!(taken.config.peers[0].remote_endpoint.to_string(), "10.2.3.5");
}
