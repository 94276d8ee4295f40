//! Every kind of wiring, from every place where the proxy may stand.

mod elsewhere;
mod rules;

use super::{standpoint::contains, *};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn v4_of(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None })
}

fn v6_of(addresses: &[IpAddr]) -> Option<Ipv6Addr> {
    addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None })
}

/// `name [address]... [gw=address] [prio=number] [id=text]`, several with `;` between; the id is `id-<name>` unless
/// told.
fn nets(text: &str) -> Vec<Attachment> {
    let net = |text: &str| {
        let mut words = text.split_whitespace();
        let name = words.next().unwrap().to_owned();
        let (options, addresses): (Vec<&str>, Vec<&str>) = words.partition(|word| word.contains('='));
        let option = |key| options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
        let addresses: Vec<IpAddr> = addresses.into_iter().map(ip).collect();
        Attachment {
            id: option("id").map_or_else(|| format!("id-{name}"), str::to_owned),
            name,
            ipv4: v4_of(&addresses),
            ipv6: v6_of(&addresses),
            gateway: option("gw").map(ip),
            gw_priority: option("prio").map_or(0, |number| number.parse().unwrap()),
        }
    };
    text.split(';').filter(|text| !text.trim().is_empty()).map(net).collect()
}

/// A container of the compose project `llm` on these networks.
fn on(networks: &str) -> Wiring {
    Wiring {
        mode: NetworkMode::Networks,
        attachments: nets(networks),
        published: vec![],
        compose_project: Some("llm".to_owned()),
    }
}

fn with_mode(mode: NetworkMode) -> Wiring {
    Wiring { mode, ..on("") }
}

/// `container_port` is published on `host_ip` (empty: not told).
fn published(container_port: u16, host_ip: &str, host_port: u16) -> Published {
    let host_ip = (!host_ip.is_empty()).then(|| ip(host_ip));
    Published { container_port, host_ip, host_port }
}

fn publishing(networks: &str, ports: &[Published]) -> Wiring {
    Wiring { published: ports.to_vec(), ..on(networks) }
}

fn in_container(networks: &str) -> Vantage {
    Vantage::Container { attachments: nets(networks), host_network: false, host_gateway: None }
}

fn in_container_with_gateway(networks: &str, host_gateway: &str) -> Vantage {
    Vantage::Container { attachments: nets(networks), host_network: false, host_gateway: Some(ip(host_gateway)) }
}

fn in_host_network() -> Vantage {
    Vantage::Container { attachments: nets("host"), host_network: true, host_gateway: Some(ip("10.0.0.1")) }
}

fn on_host(on_link: &[(&str, u8)]) -> Vantage {
    Vantage::Host { on_link: on_link.iter().map(|(prefix, bits)| (ip(prefix), *bits)).collect() }
}

/// The first target and its network, as text; an error as its message.
fn reached(wiring: &Wiring, vantage: &Vantage, wanted: Option<&str>) -> String {
    match reach(wiring, vantage, wanted, &[8000]) {
        Ok(Reach { targets, network: Some(network), .. }) => format!("{} on {}", targets[0], network.name),
        Ok(Reach { targets, network: None, .. }) => format!("{}", targets[0]),
        Err(unreachable) => unreachable.to_string(),
    }
}

fn all_reached(wiring: &Wiring, vantage: &Vantage, wanted: Option<&str>, ports: &[u16]) -> String {
    match reach(wiring, vantage, wanted, ports) {
        Ok(reach) => reach.targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        Err(unreachable) => unreachable.to_string(),
    }
}

#[test]
fn advice_can_be_typed_as_it_stands() {
    let ours = in_container("bridge 172.17.0.9; z 10.9.0.9");
    for (container, vantage, wanted, expected) in [
        (on("a 10.0.0.2"), ours.clone(), None, "docker network connect z vllm"),
        (on("a 10.0.0.2"), in_container("bridge 172.17.0.9"), None, "docker network connect bridge vllm"),
        (on("a 10.0.0.2"), in_container(""), None, "docker network connect a PROXY"),
        (on("dead"), ours.clone(), None, "docker network connect z vllm"),
        (on("a 10.0.0.2"), ours.clone(), Some("b"), "docker network connect b vllm"),
        (on("a 10.0.0.2"), ours.clone(), Some("$(rm b)"), "docker network connect NETWORK vllm"),
        (on("a 10.0.0.2"), on_host(&[]), None, "-p 127.0.0.1:8000:8000"),
        (with_mode(NetworkMode::Host), in_container(""), None, "host.docker.internal:host-gateway"),
    ] {
        let advice = reach(&container, &vantage, wanted, &[8000]).unwrap_err().advice("vllm");
        assert!(advice.contains(expected), "{advice}");
    }
}

#[test]
fn ports_to_try() {
    for (label, exposed, expected) in [
        (Some(9000), &[8080][..], &[9000][..]),
        (Some(8000), &[], &[8000]),
        (None, &[], &[8000]),
        (None, &[8000], &[8000]),
        (None, &[30000], &[30000, 8000]),
        (None, &[30000, 30000], &[30000, 8000]),
        (None, &[8080, 9090], &[8000]),
        (None, &[8000, 9090], &[8000]),
    ] {
        assert_eq!(port_candidates(label, exposed), expected, "{label:?} {exposed:?}");
    }
}

#[test]
fn every_port_becomes_a_target_in_order() {
    let container = on("a 10.0.0.2");
    let reached = reach(&container, &in_container("a 10.0.0.9"), None, &[30000, 8000]).unwrap();
    assert_eq!(reached.targets, ["10.0.0.2:30000".parse().unwrap(), "10.0.0.2:8000".parse().unwrap()]);
    assert_eq!(reached.network, Some(NetworkRef { name: "a".to_owned(), id: "id-a".to_owned() }));
    assert_eq!(reach(&container, &in_container("a"), None, &[]), Err(Unreachable::NoPort));
}

#[test]
fn the_shared_network_is_used() {
    let proxy = in_container("front 10.9.0.9; mid 10.1.0.9; bridge 172.17.0.9; podman 10.88.0.9");
    for (networks, expected) in [
        ("aaa 10.0.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        ("bridge 172.17.0.2; zzz 10.7.0.2", "172.17.0.2:8000 on bridge"),
        // user-defined before default, whatever else
        ("bridge 172.17.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        ("bridge 172.17.0.2 prio=9; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        ("podman 10.88.0.2; zzz 10.7.0.2; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        // then by priority, then by name
        ("mid 10.1.0.2; front 10.9.0.2", "10.9.0.2:8000 on front"),
        ("front 10.9.0.2; mid 10.1.0.2 prio=1", "10.1.0.2:8000 on mid"),
        ("front 10.9.0.2 prio=-1; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        // IPv4 before IPv6, and only what is an address
        ("mid fd00::2", "[fd00::2]:8000 on mid"),
        ("mid fd00::2 10.1.0.2", "10.1.0.2:8000 on mid"),
        ("mid 0.0.0.0 fd00::2", "[fd00::2]:8000 on mid"),
        ("front; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
        ("front fe80::2 169.254.169.254; mid 10.1.0.2", "10.1.0.2:8000 on mid"),
    ] {
        assert_eq!(reached(&on(networks), &proxy, None), expected, "{networks}");
    }
}

#[test]
fn networks_are_compared_by_id_and_by_name_without_one() {
    let nothing_shared =
        |ours: &str| format!("it has no network in common with this proxy: it is on net, the proxy is on {ours}");
    let reached_on = |name: &str| format!("10.0.0.2:8000 on {name}");
    for (theirs, ours, expected) in [
        ("net 10.0.0.2 id=other", "net 10.0.0.9", nothing_shared("net")),
        ("alias 10.0.0.2 id=1", "net 10.0.0.9 id=1", reached_on("alias")),
        ("net 10.0.0.2 id=", "net 10.0.0.9", reached_on("net")),
        ("net 10.0.0.2", "net 10.0.0.9 id=", reached_on("net")),
        ("net 10.0.0.2 id=", "other 10.0.0.9 id=", nothing_shared("other")),
    ] {
        assert_eq!(reached(&on(theirs), &in_container(ours), None), expected, "{theirs} | {ours}");
    }
}

#[test]
fn swarm_ingress_is_no_way() {
    let container = on("ingress 10.0.0.2; llm_net 10.1.0.2");
    let proxy = in_container("ingress 10.0.0.9");
    let elsewhere = "it has no network in common with this proxy: it is on llm_net, the proxy is on none";
    assert_eq!(reached(&container, &proxy, None), elsewhere);
    assert_eq!(reached(&container, &on_host(&[("10.0.0.0", 24)]), None), not_published("llm_net"));
    assert_eq!(reached(&container, &proxy, Some("ingress")), not_on("ingress", "llm_net"));
}

fn not_on(wanted: &str, existing: &str) -> String {
    format!(
        "it is not on the network {wanted:?} that inference.network (or PROXY_NETWORK) asks for; it is on: {existing}"
    )
}

#[test]
fn the_wanted_network_decides() {
    let container = on("a 10.0.0.2; llm_b fd00::2; llm_a 10.2.0.2; dead");
    let no_address = "it has no address on the network \"dead\" that inference.network (or PROXY_NETWORK) asks for";
    for proxy in [in_container("a 10.0.0.9"), in_container(""), on_host(&[("10.0.0.0", 24)])] {
        assert_eq!(reached(&container, &proxy, Some("a")), "10.0.0.2:8000 on a");
        assert_eq!(reached(&container, &proxy, Some("llm_a")), "10.2.0.2:8000 on llm_a");
        assert_eq!(reached(&container, &proxy, Some("b")), "[fd00::2]:8000 on llm_b");
        assert_eq!(reached(&container, &proxy, Some("dead")), no_address);
        for wanted in ["c", "A", "", "llm", "other_a"] {
            let missing = not_on(wanted, "a, dead, llm_a, llm_b");
            assert_eq!(reached(&container, &proxy, Some(wanted)), missing);
        }
    }
    let no_project = Wiring { compose_project: None, ..container };
    let missing = not_on("b", "a, dead, llm_a, llm_b");
    assert_eq!(reached(&no_project, &in_container(""), Some("b")), missing);
}

#[test]
fn a_wanted_network_is_never_replaced_by_a_published_port() {
    let container = publishing("a 10.0.0.2", &[published(8000, "0.0.0.0", 18000)]);
    assert_eq!(reached(&container, &on_host(&[("10.0.0.0", 8)]), Some("b")), not_on("b", "a"));
}

#[test]
fn host_network_containers() {
    let docker = Wiring { attachments: nets("host"), ..with_mode(NetworkMode::Host) };
    let podman = with_mode(NetworkMode::Host);
    let no_way = "it uses the network of the host, to which this proxy has no way";
    let ours = "bridge 172.17.0.9 gw=172.17.0.1; a 10.0.0.9 gw=10.0.0.1; aa 10.2.0.9";
    for (proxy, expected) in [
        (on_host(&[]), "127.0.0.1:8000"),
        (in_host_network(), "127.0.0.1:8000"),
        (in_container_with_gateway(ours, "192.168.65.254"), "192.168.65.254:8000"),
        (in_container_with_gateway(ours, "fd00::1"), "[fd00::1]:8000"),
        (in_container_with_gateway(ours, "127.0.0.1"), "10.0.0.1:8000"),
        (in_container(ours), "10.0.0.1:8000"),
        (in_container("bridge 172.17.0.9 gw=172.17.0.1; a fd00::9 gw=fe80::1"), "172.17.0.1:8000"),
        (in_container("internal 10.0.0.9"), no_way),
        (in_container(""), no_way),
    ] {
        for container in [&docker, &podman] {
            assert_eq!(reached(container, &proxy, None), expected, "{proxy:?}");
            assert_eq!(reached(container, &proxy, Some("host")), expected, "{proxy:?}");
            assert_eq!(reached(container, &proxy, Some("a")), not_on("a", "host"));
        }
    }
}

#[test]
fn containers_without_a_network_of_their_own() {
    let proxy = in_container("a 10.0.0.9");
    let owner = NetworkMode::Container("0123456789ab".repeat(5) + "cdef");
    let gone = "it uses the network of container 0123456789ab, which is gone or was restarted";
    for wanted in [None, Some("a")] {
        let none = "it has network mode none";
        assert_eq!(reached(&with_mode(NetworkMode::None), &proxy, wanted), none);
        assert_eq!(reached(&with_mode(owner.clone()), &proxy, wanted), gone);
    }
}

#[test]
fn from_the_host_by_a_network_of_the_host() {
    let networks = "bridge 172.17.0.2; a 10.0.0.2 fd00::2; b 10.1.0.2";
    let container = publishing(networks, &[published(8000, "0.0.0.0", 18000)]);
    for (on_link, expected) in [
        (&[("172.17.0.0", 16)][..], "172.17.0.2:8000 on bridge"),
        (&[("172.17.0.0", 16), ("10.0.0.0", 24)], "10.0.0.2:8000 on a"),
        (&[("172.17.0.0", 16), ("10.1.0.0", 24)], "10.1.0.2:8000 on b"),
        (&[("fd00::", 64)], "[fd00::2]:8000 on a"),
        (&[("10.0.0.2", 32)], "10.0.0.2:8000 on a"),
        (&[("10.0.0.4", 30)], "127.0.0.1:18000"),
        (&[], "127.0.0.1:18000"),
    ] {
        assert_eq!(reached(&container, &on_host(on_link), None), expected, "{on_link:?}");
    }
    assert_eq!(reached(&container, &in_host_network(), None), "10.0.0.2:8000 on a");
}

const NOWHERE: &str = "it has no address on any network, and its port 8000 is not published";
const NO_ADDRESS: &str = "it has no address on any network";

fn not_published(theirs: &str) -> String {
    format!("none of its networks ({theirs}) can be reached from here, and its port 8000 is not published")
}

#[test]
fn published_ports() {
    let v4_gateway = in_container("z 10.0.0.9 gw=10.0.0.1");
    let v6_gateway = in_container("z fd00::9 gw=fd00::1");
    for (host_ip, from_host, from_v4, from_v6) in [
        ("", "127.0.0.1:18000", "10.0.0.1:18000", "[fd00::1]:18000"),
        ("0.0.0.0", "127.0.0.1:18000", "10.0.0.1:18000", NO_ADDRESS),
        ("::", "[::1]:18000", NO_ADDRESS, "[fd00::1]:18000"),
        ("127.0.0.1", "127.0.0.1:18000", NO_ADDRESS, NO_ADDRESS),
        ("127.1.2.3", "127.1.2.3:18000", NO_ADDRESS, NO_ADDRESS),
        ("::1", "[::1]:18000", NO_ADDRESS, NO_ADDRESS),
        ("::ffff:127.0.0.1", "127.0.0.1:18000", NO_ADDRESS, NO_ADDRESS),
        ("192.168.1.5", "192.168.1.5:18000", "192.168.1.5:18000", "192.168.1.5:18000"),
    ] {
        let container = publishing("", &[published(8000, host_ip, 18000)]);
        assert_eq!(reached(&container, &on_host(&[]), None), from_host, "{host_ip}");
        assert_eq!(reached(&container, &in_host_network(), None), from_host, "{host_ip}");
        assert_eq!(reached(&container, &v4_gateway, None), from_v4, "{host_ip}");
        assert_eq!(reached(&container, &v6_gateway, None), from_v6, "{host_ip}");

        let other_port = publishing("", &[published(9000, host_ip, 18000)]);
        assert_eq!(reached(&other_port, &on_host(&[]), None), NOWHERE, "{host_ip}");
        assert_eq!(reached(&other_port, &v4_gateway, None), NO_ADDRESS, "{host_ip}");
    }
    let everywhere = publishing("", &[published(8000, "", 18000)]);
    assert_eq!(reached(&everywhere, &in_container("z 10.0.0.9"), None), NO_ADDRESS);
}

#[test]
fn each_port_gets_its_best_binding() {
    let bindings = [("::", 18000), ("0.0.0.0", 18002), ("0.0.0.0", 18001)];
    let mut ports: Vec<Published> = bindings.map(|(host_ip, port)| published(8000, host_ip, port)).to_vec();
    ports.push(published(30000, "0.0.0.0", 13000));
    let container = publishing("", &ports);
    let targets = |ports| reach(&container, &on_host(&[]), None, ports).unwrap().targets;
    assert_eq!(targets(&[30000, 8000]), ["127.0.0.1:13000".parse().unwrap(), "127.0.0.1:18001".parse().unwrap()]);
    assert_eq!(targets(&[30001, 8000]), ["127.0.0.1:18001".parse().unwrap()]);
}

#[test]
fn what_cannot_be_reached_says_what_to_change() {
    let networks = "b 10.1.0.2; a 10.0.0.2; dead";
    let proxy = in_container("z 10.9.0.9; y 10.8.0.9");
    let connect = "it has no network in common with this proxy: it is on a, b, the proxy is on y, z";
    let only_loopback = format!("{connect}; and its port 8000 is published on the loopback of the host only");
    let (loopback, everywhere) = (published(8000, "127.0.0.1", 8000), published(8000, "0.0.0.0", 8000));
    for (ports, expected) in [
        (&[][..], connect),
        (std::slice::from_ref(&loopback), &*only_loopback),
        (std::slice::from_ref(&everywhere), connect),
        (&[loopback.clone(), everywhere.clone()], connect),
    ] {
        assert_eq!(reached(&publishing(networks, ports), &proxy, None), expected, "{ports:?}");
    }
    let publish = not_published("a, b");
    assert_eq!(reached(&on(networks), &on_host(&[("10.5.0.0", 16)]), None), publish);
    assert_eq!(reached(&on("dead"), &on_host(&[]), None), NOWHERE);
    assert_eq!(reached(&on("dead"), &proxy, None), NO_ADDRESS);
}

#[test]
fn messages_name_a_bounded_number_of_networks() {
    let many: String = (10..60).map(|i| format!("n{i} 10.0.0.{i};")).collect();
    let text = reached(&on(&many), &in_container(""), None);
    assert!(text.contains("n10, n11, n12, n13, n14, n15, n16, n17 and 42 more"), "{text}");
}

#[test]
fn prefixes() {
    for (prefix, bits, address, expected) in [
        ("172.17.0.0", 16, "172.17.255.1", true),
        ("172.17.0.0", 16, "172.18.0.1", false),
        ("10.0.0.0", 8, "10.200.0.1", true),
        ("10.0.0.7", 32, "10.0.0.7", true),
        ("10.0.0.7", 32, "10.0.0.6", false),
        ("10.0.0.7", 255, "10.0.0.6", false),
        ("0.0.0.0", 0, "203.0.113.9", true),
        ("::", 0, "2001:db8::1", true),
        ("fd00:1::", 32, "fd00:1:2::3", true),
        ("fd00:1::", 32, "fd00:2::3", false),
        ("::", 0, "10.0.0.1", false),
    ] {
        assert_eq!(contains((ip(prefix), bits), ip(address)), expected, "{prefix}/{bits} {address}");
    }
}

#[test]
fn a_container_that_the_engine_does_not_tell_of_goes_by_its_own_prefixes_and_never_by_the_hosts_loopback() {
    let inside = |host_gateway: Option<&str>| Vantage::Inside {
        on_link: vec![("172.18.0.0".parse().unwrap(), 16)],
        own: vec![ip("172.18.0.9")],
        host_gateway: host_gateway.map(ip),
    };
    let with_gateway = inside(Some("172.18.0.1"));
    assert_eq!(all_reached(&on("app 172.18.0.2; far 10.99.0.2"), &with_gateway, None, &[8000]), "172.18.0.2:8000");
    let far = "far 10.99.0.2";
    for (bindings, expected) in [
        (&[("0.0.0.0", 18000)][..], "172.18.0.1:18000"),
        (&[("", 18000)], "172.18.0.1:18000"),
        (&[("127.0.0.1", 18000), ("::1", 18000)], "loopback of the host only"),
        (&[], "it is on far, the proxy is on 172.18.0.0/16"),
    ] {
        let ports: Vec<Published> = bindings.iter().map(|(host_ip, port)| published(8000, host_ip, *port)).collect();
        let told = all_reached(&publishing(far, &ports), &with_gateway, None, &[8000]);
        assert!(told.contains(expected), "{bindings:?}: {told}");
        let told = all_reached(&publishing(far, &ports), &inside(None), None, &[8000]);
        assert!(!told.starts_with("127."), "{bindings:?}: {told}");
    }
    assert_eq!(all_reached(&with_mode(NetworkMode::Host), &with_gateway, None, &[8000]), "172.18.0.1:8000");
    let advice = reach(&on(far), &with_gateway, None, &[8000]).unwrap_err().advice("vllm");
    assert!(advice.contains("docker network connect NETWORK vllm"), "{advice}");
}

#[test]
fn what_cannot_be_reached_is_followed_by_the_next_network() {
    // On a host, the address on a macvlan network lies in the host's own network and cannot be reached all the same.
    let container = on("a-macvlan 192.168.1.77; app 172.18.0.2; far 10.99.0.2");
    let host = on_host(&[("192.168.1.0", 24), ("172.18.0.0", 16)]);
    assert_eq!(
        all_reached(&container, &host, None, &[30000, 8000]),
        "192.168.1.77:30000 192.168.1.77:8000 172.18.0.2:30000 172.18.0.2:8000"
    );
    assert_eq!(all_reached(&container, &host, Some("app"), &[8000]), "172.18.0.2:8000");
    let shared = in_container("a-macvlan 192.168.1.9; app 172.18.0.9");
    assert_eq!(all_reached(&container, &shared, None, &[8000]), "192.168.1.77:8000 172.18.0.2:8000");
    let reached = reach(&container, &host, None, &[8000]).unwrap();
    let name = |address: &str| reached.network_of(ip(address)).unwrap().name.clone();
    assert_eq!((name("192.168.1.77"), name("172.18.0.2")), ("a-macvlan".to_owned(), "app".to_owned()));
    let many: String = (1..20).map(|n| format!("n{n} 172.18.{n}.2;")).collect();
    assert_eq!(reach(&on(&many), &host, None, &[8000]).unwrap().targets.len(), WAYS_MAX);
}
