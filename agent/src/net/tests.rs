//! The network for real: this process is the machine, in a network namespace of its own whose "cards" are ends of virtual
//! cables; at their other ends, in a second namespace, are dnsmasq's DHCP, DHCPv6 and router advertisements.

use super::*;
use crate::api::Api;
use crate::testing::director::Director;
use crate::testing::namespace::enter;
use crate::testing::oracle::skipped;
use crate::testing::{TestSite, flow, listen};
use crate::uplink::{connect_later, hold, servers, stay};
use kiln_protocol::Via;
use kiln_release::network::NetworkConfig;
use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Two cables: a0 and a1 here, b0 and b1 there.
const CABLES: &str = "mount -t tmpfs tmpfs /run; ip netns add net; ip link set lo up
    for n in 0 1; do ip link add a$n type veth peer name b$n; ip link set b$n netns net; done
    ip -n net link set lo up; ip -n net link set b0 up; ip -n net link set b1 up
    ip -n net addr add 10.9.0.1/24 dev b0; ip -n net addr add 10.9.1.1/24 dev b1
    ip -n net addr add 2001:db8:0::1/64 dev b0 nodad; ip -n net addr add 2001:db8:1::1/64 dev b1 nodad";

fn sh(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success(), "{script}");
}

/// dnsmasq in the other namespace; it ends with the value.
struct Dnsmasq(Child);

impl Dnsmasq {
    fn start(arguments: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", "net", "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0"]);
        command.args(["--leasefile-ro", "--log-facility=-", "--bind-dynamic", "--pid-file="]);
        Self(command.args(arguments.split_whitespace()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs in the machine's namespace; false where that cannot be, or where what is needed is not installed.
fn machine(test: &str) -> bool {
    if !Path::new("/usr/sbin/dnsmasq").exists() {
        skipped("dnsmasq is not installed");
        return false;
    }
    if !enter(&format!("net::tests::{test}"), "-rnm") {
        return false;
    }
    sh(CABLES);
    true
}

fn id() -> MachineId {
    "4c4c4544-0042-3510-8052-b4c04f4b3332".parse().unwrap()
}

fn section(toml_like: serde_json::Value) -> Section {
    let config = NetworkConfig { version: 1, section: vec![serde_json::from_value(toml_like).unwrap()] };
    config.check().unwrap();
    config.section.into_iter().next().unwrap()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

async fn up(section: &Section, avoid: &mut HashSet<String>) -> Result<Uplink> {
    bring_up(Ground::Initramfs, &id(), false, section, avoid).await
}

/// Whether a packet comes back from there: nobody listens, and that is said at once.
fn reaches(address: &str) -> bool {
    let address: SocketAddr = address.parse().unwrap();
    match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
    }
}

fn has(uplink: &Uplink, start: &str) -> bool {
    uplink.addresses.iter().any(|ip| ip.to_string().starts_with(start))
}

#[test]
fn any_card_that_has_a_lease_will_do_and_the_next_is_tried() {
    if !machine("any_card_that_has_a_lease_will_do_and_the_next_is_tried") {
        return;
    }
    let automatic = Section::default();
    run(async {
        // The first card has a carrier, and nobody there; the second has a server.
        let second = Dnsmasq::start("--interface=b1 --dhcp-range=10.9.1.50,10.9.1.90,1h --dhcp-option=6,10.9.1.53");
        let mut avoid = HashSet::new();
        let uplink = up(&automatic, &mut avoid).await.unwrap();
        assert_eq!(uplink.interface, "a1");
        assert!(has(&uplink, "10.9.1.") && reaches("10.9.1.1:9"), "{uplink:?}");
        assert_eq!(std::fs::read_to_string(RESOLVER).unwrap(), "nameserver 10.9.1.53\n");

        // Both have one. Whichever did not reach the boot server comes last; when both did not, all are new again.
        let first = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.90,1h");
        avoid.insert("a1".into());
        let uplink = up(&automatic, &mut avoid).await.unwrap();
        assert_eq!(uplink.interface, "a0");
        assert!(!uplink.addresses.is_empty() && !reaches_by_a1(), "what was there before is taken away");
        avoid.insert("a0".into());
        up(&automatic, &mut avoid).await.unwrap();
        assert!(avoid.is_empty());
        // The card that is to be avoided is the only one that is given an address: better than none.
        drop(first);
        sh("ip -n net link set b0 down");
        avoid.insert("a1".into());
        assert_eq!(up(&automatic, &mut avoid).await.unwrap().interface, "a1");
        drop(second);
    });
}

fn reaches_by_a1() -> bool {
    Netlink::open().unwrap().addresses().unwrap().iter().any(|a| a.ip.to_string().starts_with("10.9.1."))
}

#[test]
fn cards_are_up_before_they_are_configured_and_listen_to_nobody() {
    if !machine("cards_are_up_before_they_are_configured_and_listen_to_nobody") {
        return;
    }
    let is_deaf = |card: &str| {
        let setting = std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{card}/disable_ipv6"));
        setting.unwrap().trim() == "1"
    };
    let up_ones = || {
        let links = Netlink::open().unwrap().links().unwrap();
        links.into_iter().filter(|link| link.is_card() && link.up).map(|link| link.name).collect::<HashSet<_>>()
    };
    assert!(up_ones().is_empty());
    raise();
    assert_eq!(up_ones(), HashSet::from(["a0".to_owned(), "a1".to_owned()]));
    assert!(is_deaf("a0") && is_deaf("a1"));
    let _server = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.90,1h");
    assert_eq!(run(up(&Section::default(), &mut HashSet::new())).unwrap().interface, "a0");
    assert!(!is_deaf("a0"), "without a section a router is listened to");
}

/// A question that nobody could hear would be asked again after two seconds, and then after four.
#[test]
fn a_link_that_comes_late_is_asked_when_it_comes() {
    if !machine("a_link_that_comes_late_is_asked_when_it_comes") {
        return;
    }
    let [first, second, _] = dhcp::PAUSES.map(Duration::from_secs);
    run(async {
        let _server = Dnsmasq::start("--interface=b0 --no-ping --dhcp-range=10.9.0.50,10.9.0.90,1h");
        sh("ip -n net link set b0 down; ip -n net link set b1 down");
        let begun = Instant::now();
        let cable = async {
            // Behind the second question, well ahead of the third.
            tokio::time::sleep_until(begun + first + Duration::from_millis(200)).await;
            sh("ip -n net link set b0 up");
        };
        let (automatic, mut avoid) = (Section::default(), HashSet::new());
        let connect = timeout_at(begun + first + second, up(&automatic, &mut avoid));
        let (uplink, ()) = tokio::join!(connect, cable);
        assert_eq!(uplink.expect("the third question was not waited for").unwrap().interface, "a0");
    });
}

#[test]
fn without_any_word_the_reason_names_the_cards() {
    if !machine("without_any_word_the_reason_names_the_cards") {
        return;
    }
    run(async {
        let error = up(&Section::default(), &mut HashSet::new()).await.unwrap_err();
        assert_eq!(error.kind(), "network-no-offer");
        assert!(error.to_string().contains("a0, a1"), "{error}");
        let none = section(serde_json::json!({ "link": [
            { "name": "up", "kind": "card", "card": ["02:00:00:00:00:77"], "dhcp4": true } ] }));
        let error = up(&none, &mut HashSet::new()).await.unwrap_err();
        assert_eq!(error.kind(), "network-no-card");
    });
}

#[test]
fn static_addresses_come_and_go_with_their_section() {
    if !machine("static_addresses_come_and_go_with_their_section") {
        return;
    }
    let mac = std::fs::read_to_string("/sys/class/net/a1/address");
    let mac = mac.unwrap_or_else(|_| {
        let link = Netlink::open().unwrap().link("a1").unwrap();
        link.mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
    });
    let one = section(serde_json::json!({ "link": [ {
        "name": "up", "kind": "card", "card": [mac.trim()], "mtu": 1400, "dns": ["10.9.1.53"], "domain": "rack.example",
        "address": ["10.9.1.7/24", "2001:db8:1::7/64"], "gateway": ["10.9.1.1", "2001:db8:1::1"] } ] }));
    let other = section(serde_json::json!({ "link": [
        { "name": "x", "kind": "card", "card": ["any"], "address": ["10.9.0.8/24"], "gateway": ["10.9.0.1"] } ] }));
    run(async {
        for _ in 0..2 {
            let uplink = up(&one, &mut HashSet::new()).await.unwrap();
            assert_eq!((uplink.interface.as_str(), uplink.addresses.len()), ("a1", 2), "{uplink:?}");
            // Beyond the link, by the routers of both families.
            assert!(reaches("10.9.0.1:9") && reaches("[2001:db8:0::1]:9"));
            assert_eq!(std::fs::read_to_string(RESOLVER).unwrap(), "search rack.example\nnameserver 10.9.1.53\n");
            let uplink = up(&other, &mut HashSet::new()).await.unwrap();
            assert_eq!(uplink.addresses, ["10.9.0.8".parse::<IpAddr>().unwrap()]);
            assert!(reaches("10.9.0.1:9") && !reaches_by_a1());
            let left = Netlink::open().unwrap().addresses().unwrap();
            assert!(left.iter().all(|a| !a.ip.to_string().starts_with("2001:db8:1::7")), "{left:?}");
        }
        // A section that says only: ask.
        let leased = section(serde_json::json!({ "link": [
            { "name": "x", "kind": "card", "card": ["any"], "dhcp4": true } ] }));
        let _server = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.90,1h");
        let uplink = up(&leased, &mut HashSet::new()).await.unwrap();
        let [IpAddr::V4(leased)] = uplink.addresses[..] else { panic!("{uplink:?}") };
        assert!((50..=90).contains(&leased.octets()[3]) && reaches("10.9.0.1:9"), "{uplink:?}");
    });
}

#[test]
fn ipv6_by_routers_and_by_dhcp() {
    if !machine("ipv6_by_routers_and_by_dhcp") {
        return;
    }
    let link = |more: serde_json::Value| {
        let mut link = serde_json::json!({ "name": "up", "kind": "card", "card": ["any"] });
        link.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        section(serde_json::json!({ "link": [link] }))
    };
    run(async {
        let names = "--dhcp-option=option6:dns-server,[2001:db8::53] --dhcp-option=option6:domain-search,rack.example";
        let routers =
            Dnsmasq::start(&format!("--enable-ra --interface=b0 --dhcp-range=2001:db8::,ra-stateless {names}"));
        let uplink = up(&link(serde_json::json!({ "slaac": true })), &mut HashSet::new()).await.unwrap();
        assert!(uplink.interface == "a0" && has(&uplink, "2001:db8:"), "{uplink:?}");
        assert!(reaches("[2001:db8::1]:9") && reaches("[2001:db8:1::1]:9"), "the router is the default route");
        // Without a configuration: no DHCPv4 at all, a router that speaks IPv6, and name servers on request.
        let uplink = up(&Section::default(), &mut HashSet::new()).await.unwrap();
        assert!(uplink.interface == "a0" && has(&uplink, "2001:db8:"), "{uplink:?}");
        assert_eq!(uplink.domain.as_deref(), Some("rack.example"));
        assert_eq!(std::fs::read_to_string(RESOLVER).unwrap(), "search rack.example\nnameserver 2001:db8::53\n");
        drop(routers);

        let range = "--dhcp-range=2001:db8::100,2001:db8::1ff,64,600";
        let stateful = Dnsmasq::start(&format!("--enable-ra --interface=b0 {range} {names}"));
        let uplink = up(&link(serde_json::json!({ "dhcp6": true })), &mut HashSet::new()).await.unwrap();
        assert!(has(&uplink, "2001:db8::1") && uplink.addresses.len() == 1, "leased, and none of its own: {uplink:?}");
        assert!(reaches("[2001:db8::1]:9"));
        let lease = &uplink.leases6[0];
        let renewed = dhcp6::renew(lease, true, &id()).await.unwrap();
        assert_eq!((renewed.address, &renewed.server), (lease.address, &lease.server));
        // Renumbered: the old address is kept until its lease is over.
        drop(stateful);
        let range = "--dhcp-range=2001:db8::200,2001:db8::200,64,600";
        let _renumbered = Dnsmasq::start(&format!("--enable-ra --interface=b0 {range}"));
        assert_eq!(dhcp6::renew(lease, false, &id()).await.unwrap_err().kind(), "network-no-offer", "it is not over");
        let other = dhcp6::renew(lease, true, &id()).await.unwrap().address;
        assert_eq!(other, Some("2001:db8::200".parse().unwrap()));
    });
}

/// A running system whose boot reached nobody. Each card has a lease, the server is behind the second only. It is found, and what
/// the image's programs have made for themselves since the boot is as it was: a container's cable, addresses on a card.
#[test]
fn a_running_system_finds_its_server_and_leaves_alone_what_others_made() {
    if !machine("a_running_system_finds_its_server_and_leaves_alone_what_others_made") {
        return;
    }
    let site = TestSite::new(1);
    let dir = tempfile::tempdir().unwrap();
    let verifier = site.verifier(1, &[], &[], dir.path());
    // This machine itself, once its second card has the address that is leased there.
    let (listener, address) = listen();
    let (closed, nobody) = listen();
    drop(closed);
    let director = Director::start_on((listener, address), &site, (1, 1, Via::Cold, false));
    let api = |server: SocketAddr| {
        let url = format!("https://10.9.1.50:{}", server.port());
        Api::new(&[url], &site.tls[0], &verifier.key, &verifier.clock).unwrap()
    };
    let there = || Netlink::open().unwrap().addresses().unwrap().iter().map(|a| a.ip.to_string()).collect::<Vec<_>>();
    run(async {
        // Without a router: whom a card does not reach it does not reach at once.
        let first = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.50,1h --dhcp-option=3");
        assert_eq!(up(&Section::default(), &mut HashSet::new()).await.unwrap().interface, "a0");
        sh("ip link add c0 type veth peer name c1; ip link set c0 up; ip link set c1 up; ip addr add 10.9.7.1/24 dev c0
            ip addr add 10.9.8.1/32 dev a0; ip addr add 2001:db8:8::1/64 dev a0 nodad");
        std::fs::remove_file(RESOLVER).unwrap();
        let behind = async {
            let mut watch = Watch::open().unwrap();
            // The first card has its lease again, and that was not the way.
            while !Path::new(RESOLVER).exists() {
                watch.changed().await;
            }
            Dnsmasq::start("--interface=b1 --dhcp-range=10.9.1.50,10.9.1.50,1h --dhcp-option=3")
        };
        let (machine, mut to) = (id(), api(address));
        let found = connect_later(trial::Known::default(), &verifier.boot, &machine, &mut to);
        let ((link, renewals), second) = tokio::join!(found, behind);
        assert_eq!((link.as_str(), renewals.len()), ("a1", 1), "its lease is renewed");
        let left_alone = ["10.9.7.1", "10.9.8.1", "2001:db8:8::1"];
        let all = there();
        assert!(left_alone.iter().chain(&["10.9.1.50"]).all(|ip| all.iter().any(|there| there == ip)), "{all:?}");
        assert!(!all.iter().any(|ip| ip == "10.9.0.50"), "its own lease of the first card is given up: {all:?}");
        drop((renewals, first));

        // No server anywhere: the address stays all the same. And once there is one it is seen.
        let (way, look) = (trial::Choice::default(), Duration::from_millis(100));
        let none = hold(&way, &id(), &mut api(nobody), (look, Duration::from_secs(1))).await;
        let all = there();
        assert!(none.is_none() && all.iter().any(|ip| ip == "10.9.1.50"), "{all:?}");
        assert!(hold(&way, &id(), &mut api(address), (look, Duration::from_secs(60))).await.is_some());
        let all = there();
        assert!(left_alone.iter().all(|ip| all.iter().any(|there| there == ip)), "{all:?}");
        drop(second);
    });
    assert!(director.heard().is_empty(), "looking for it says nothing");
}

/// A healthy machine whose first card dies. Its server is at the address that its second card is leased.
#[test]
fn a_running_system_whose_card_lost_its_link_goes_by_another() {
    if !machine("a_running_system_whose_card_lost_its_link_goes_by_another") {
        return;
    }
    let site = TestSite::new(1);
    let dir = tempfile::tempdir().unwrap();
    let verifier = site.verifier(1, &[], &[], dir.path());
    let (listener, address) = listen();
    let _director = Director::start_on((listener, address), &site, (1, 1, Via::Cold, false));
    let url = format!("https://10.9.1.50:{}", address.port());
    let api = Api::new(&[url], &site.tls[0], &verifier.key, &verifier.clock).unwrap();
    let has = |ip: &str| Netlink::open().unwrap().addresses().unwrap().iter().any(|a| a.ip.to_string() == ip);
    run(async {
        let _first = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.50,1h --dhcp-option=3");
        let _second = Dnsmasq::start("--interface=b1 --dhcp-range=10.9.1.50,10.9.1.50,1h --dhcp-option=3");
        sh("ip -n net link set b1 down");
        let uplink = up(&Section::default(), &mut HashSet::new()).await.unwrap();
        assert_eq!(uplink.interface, "a0");
        sh("ip addr add 10.9.8.1/32 dev a0; ip -n net link set b1 up");
        let look = Duration::from_millis(50);
        let stays = stay(Some(uplink), trial::Known::default, verifier.boot.clone(), id(), api, look);
        let mut stays = std::pin::pin!(stays);
        // A server that is gone is no reason, nor is one more link.
        assert!(timeout(30 * look, &mut stays).await.is_err() && has("10.9.0.50") && !has("10.9.1.50"));
        // Nor is a switch that restarts, where there is no other.
        sh("ip -n net link set b1 down; ip -n net link set b0 down");
        assert!(timeout(30 * look, &mut stays).await.is_err() && has("10.9.0.50"));
        sh("ip -n net link set b1 up");
        let moved = async {
            let mut watch = Watch::open().unwrap();
            while !has("10.9.1.50") {
                watch.changed().await;
            }
        };
        let moved = timeout(Duration::from_secs(60), moved);
        tokio::select! {
            _ = &mut stays => panic!("it ended"),
            done = moved => done.expect("it goes by the other card"),
        }
        assert!(!has("10.9.0.50") && has("10.9.8.1"), "its own address of the dead card is taken away, nothing else");
    });
}

/// The old address is kept until another is given: that ends the lease.
#[test]
fn a_lease_that_is_over_is_asked_for_anew_where_the_network_was_renumbered() {
    if !machine("a_lease_that_is_over_is_asked_for_anew_where_the_network_was_renumbered") {
        return;
    }
    run(async {
        let server = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.50,1h");
        let uplink = up(&Section::default(), &mut HashSet::new()).await.unwrap();
        let [lease] = &uplink.leases[..] else { panic!("{uplink:?}") };
        let now = Instant::now();
        assert_eq!(renew(lease, now, &id()).await.unwrap().address, lease.address);
        drop(server);
        let _renumbered = Dnsmasq::start("--interface=b0 --dhcp-range=10.9.0.60,10.9.0.60,1h");
        let later = now + Duration::from_secs(3600);
        assert_eq!(renew(lease, later, &id()).await.unwrap_err().kind(), "network-no-offer", "it is not over");
        assert_eq!(renew(lease, now, &id()).await.unwrap().address.to_string(), "10.9.0.60");
    });
}

/// A boot server of this site at an address that no DHCP server of an honest site names.
fn stands_at(address: &str, site: &TestSite) -> Director {
    let address: SocketAddr = address.parse().unwrap();
    Director::start_on((TcpListener::bind(address).unwrap(), address), site, (1, 1, Via::Cold, false))
}

/// Each way in which a DHCP server says where the boot server is, in an attacker's hands: the agent goes there, sees a
/// certificate of another CA, and says nothing. Where the same word names the site's own server, it is heard.
#[test]
fn a_lying_dhcp_server_names_an_attacker_who_hears_nothing() {
    if !machine("a_lying_dhcp_server_names_an_attacker_who_hears_nothing") {
        return;
    }
    // What DHCP names is reached: both stand at addresses of this namespace that are no card's.
    sh("ip addr add 10.9.9.66/32 dev lo; ip addr add 10.9.9.67/32 dev lo");
    let (home, other) = (TestSite::new(1), TestSite::new(1));
    let (attacker, honest) = (stands_at("10.9.9.66:8443", &other), stands_at("10.9.9.67:8443", &home));
    let dir = tempfile::tempdir().unwrap();
    let verifier = home.verifier(1, &[], &[], dir.path());
    let mut flow = flow(verifier, None, Duration::from_secs(9));
    run(async {
        let own = |host: &str| {
            let option = "--dhcp-option=vendor:KilnAgent";
            format!("{option},1,http://{host}:8080 {option},2,https://{host}:8443")
        };
        for (way, says, host) in [
            ("option 66", "--dhcp-option=66,10.9.9.66".to_owned(), "10.9.9.66"),
            ("siaddr", "--dhcp-boot=kiln.efi,attacker,10.9.9.66".to_owned(), "10.9.9.66"),
            ("Kiln's own answer", own("10.9.9.66"), "10.9.9.66"),
            ("option 66, honest", "--dhcp-option=66,10.9.9.67".to_owned(), "10.9.9.67"),
        ] {
            let _dhcp = Dnsmasq::start(&format!("--interface=b0 --dhcp-range=10.9.0.50,10.9.0.90,1h {says}"));
            let nowhere = Section::default();
            let uplink = bring_up(Ground::Initramfs, &id(), true, &nowhere, &mut HashSet::new()).await.unwrap();
            let said = servers(&flow.verifier.boot, &nowhere, &uplink);
            let expected = (vec![format!("http://{host}:8080")], vec![format!("https://{host}:8443")]);
            assert_eq!((&said.http, &said.agent), (&expected.0, &expected.1), "{way}: {uplink:?}");
            flow.verifier.servers = said;
            match flow.try_servers().await {
                Err(error) => {
                    assert_eq!((host, error.kind()), ("10.9.9.66", "server-unreachable"), "{way}: {error}");
                    assert!(error.to_string().contains("certificate"), "{way}: it came so far: {error}");
                    assert!(flow.api.is_none(), "{way}");
                }
                Ok(()) => assert_eq!(host, "10.9.9.67", "{way}"),
            }
        }
    });
    assert!(attacker.heard().is_empty(), "not a word beyond the handshake");
    assert_eq!(honest.heard().len(), 1);
}

fn lease(interface: &str) -> Lease {
    Lease {
        interface: interface.into(),
        hardware: vec![2, 0, 0, 0, 0, 1],
        address: Ipv4Addr::LOCALHOST,
        prefix: 24,
        router: None,
        dns: Vec::new(),
        domain: None,
        hostname: None,
        server: Ipv4Addr::LOCALHOST,
        duration_s: 60,
        http_url: None,
        agent_url: None,
        next_server: None,
    }
}

#[test]
fn the_card_that_booted_is_favoured_and_not_waited_for_in_vain() {
    let start = Instant::now();
    let nothing = HashSet::new();
    let choice = |favourite| Choice { favourite, avoid: &nothing, other: None, avoided: None, until: start + ROUND };
    assert_eq!(choice(None).offer(lease("eth0"), start), Some(lease("eth0")), "nobody knows: the first");
    assert_eq!(choice(Some("eth1")).offer(lease("eth1"), start), Some(lease("eth1")));

    let mut waits = choice(Some("eth1"));
    assert_eq!(waits.offer(lease("eth0"), start), None);
    assert_eq!(waits.offer(lease("eth2"), start + Duration::from_secs(1)), None);
    assert_eq!((waits.other.clone(), waits.until), (Some(lease("eth0")), start + FAVOUR), "the first of the others");
    assert_eq!(waits.offer(lease("eth1"), start + FAVOUR), Some(lease("eth1")));

    let mut late = choice(Some("eth1"));
    assert_eq!(late.offer(lease("eth0"), start + ROUND), None);
    assert_eq!(late.until, start + ROUND, "never beyond the round");

    let avoid = HashSet::from(["eth0".to_owned()]);
    let mut avoids = Choice { avoid: &avoid, ..choice(None) };
    assert_eq!(avoids.offer(lease("eth0"), start), None);
    assert_eq!((avoids.until, avoids.avoided.is_some()), (start + ROUND, true), "only if nobody else comes");
    assert_eq!(avoids.offer(lease("eth1"), start), Some(lease("eth1")));
}
