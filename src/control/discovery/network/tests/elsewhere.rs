//! Containers of an engine on another machine.

use super::*;

fn on_other_machine(engine: &[&str]) -> Vantage {
    Vantage::Elsewhere { engine: engine.iter().map(|text| ip(text)).collect() }
}

#[test]
fn an_engine_on_another_machine_is_reached_by_what_that_machine_publishes() {
    // The same prefixes as here: docker's first bridge is the same on every machine.
    let networks = "bridge 172.17.0.2 gw=172.17.0.1; app 172.18.0.2 fd00::2 gw=172.18.0.1; lan 192.168.1.77";
    let one = on_other_machine(&["203.0.113.5"]);
    let both = on_other_machine(&["2001:db8::5", "203.0.113.5"]);
    let not_there = "the Docker Engine is on another machine (203.0.113.5), and its port 8000 is not published there";
    let only_loopback = "the Docker Engine is on another machine (203.0.113.5), and its port 8000 is published on the \
                         loopback of that machine only";
    for (bindings, expected, expected_of_both) in [
        (&[("0.0.0.0", 18000)][..], "203.0.113.5:18000", "203.0.113.5:18000"),
        (&[("", 18000)], "203.0.113.5:18000", "203.0.113.5:18000 [2001:db8::5]:18000"),
        (&[("0.0.0.0", 18000), ("::", 18000)], "203.0.113.5:18000", "203.0.113.5:18000 [2001:db8::5]:18000"),
        (&[("203.0.113.5", 18000)], "203.0.113.5:18000", "203.0.113.5:18000"),
        (&[("::ffff:203.0.113.5", 18000)], "203.0.113.5:18000", "203.0.113.5:18000"),
        (&[("198.51.100.7", 1), ("203.0.113.5", 2)], "203.0.113.5:2", "203.0.113.5:2"),
        (&[("198.51.100.7", 1), ("0.0.0.0", 2)], "203.0.113.5:2", "203.0.113.5:2"),
        (&[("198.51.100.7", 1), ("2001:db8::5", 2)], "", "[2001:db8::5]:2"),
        (&[("127.0.0.1", 18000), ("0.0.0.0", 18001)], "203.0.113.5:18001", "203.0.113.5:18001"),
        // Addresses that mean this machine here, or another one.
        (&[("127.0.0.1", 18000)], only_loopback, ""),
        (&[("127.0.0.1", 18000), ("::1", 18000)], only_loopback, ""),
        (&[("::ffff:127.0.0.1", 18000)], only_loopback, ""),
        (&[("::", 18000)], "", "[2001:db8::5]:18000"),
        (&[], not_there, ""),
    ] {
        let ports: Vec<Published> = bindings.iter().map(|(host_ip, port)| published(8000, host_ip, *port)).collect();
        let container = publishing(networks, &ports);
        for wanted in [None, Some("app"), Some("nowhere")] {
            if !expected.is_empty() {
                assert_eq!(all_reached(&container, &one, wanted, &[8000]), expected, "{bindings:?} {wanted:?}");
            }
            if !expected_of_both.is_empty() {
                assert_eq!(all_reached(&container, &both, wanted, &[8000]), expected_of_both, "{bindings:?}");
            }
        }
        let other_port = publishing(networks, &[published(9000, "0.0.0.0", 18000)]);
        assert_eq!(all_reached(&other_port, &one, None, &[8000]), not_there);
    }
    let host = with_mode(NetworkMode::Host);
    for wanted in [None, Some("app")] {
        assert_eq!(all_reached(&host, &one, wanted, &[30000, 8000]), "203.0.113.5:30000 203.0.113.5:8000");
        assert_eq!(all_reached(&host, &both, wanted, &[8000]), "203.0.113.5:8000 [2001:db8::5]:8000");
    }
    assert_eq!(all_reached(&with_mode(NetworkMode::None), &one, None, &[8000]), "it has network mode none");
    let advice = reach(&on(networks), &one, None, &[8000]).unwrap_err().advice("vllm");
    assert!(advice.contains("-p 8000:8000"), "{advice}");
}

/// An address of the engine's machine other than the engine's own may be this machine's too, or a neighbour's: an address
/// on `lo`, that of a bridge, one of a private network behind a router.
#[test]
fn a_port_published_on_another_address_of_the_engines_machine_is_reported() {
    let networks = "bridge 172.17.0.2 gw=172.17.0.1; lan 192.168.1.77";
    let engine = on_other_machine(&["203.0.113.5"]);
    for host_ip in [
        "198.51.100.7",
        "10.1.2.3",
        "172.17.0.1",
        "172.17.0.2",
        "172.18.0.1",
        "192.168.1.1",
        "192.168.1.77",
        "169.254.1.1",
        "203.0.113.6",
        "100.64.0.1",
        "fd00::7",
        "2001:db8::7",
        "::",
    ] {
        for bindings in [vec![host_ip], vec!["127.0.0.1", host_ip], vec![host_ip, host_ip]] {
            let ports: Vec<Published> = bindings.iter().map(|ip| published(8000, ip, 18000)).collect();
            let why = reach(&publishing(networks, &ports), &engine, None, &[8000]).unwrap_err();
            let told = why.to_string();
            let begin =
                "the Docker Engine is on another machine (203.0.113.5), and its port 8000 is published there on ";
            assert!(told.starts_with(begin) && told.contains(host_ip), "{told}");
            let advice = why.advice("vllm");
            assert!(advice.contains("-p 8000:8000") && advice.contains("203.0.113.5"), "{advice}");
        }
    }
    let many: Vec<Published> = (1..50).map(|n| published(8000, &format!("198.51.100.{n}"), 18000)).collect();
    let told = reach(&publishing(networks, &many), &engine, None, &[8000]).unwrap_err().to_string();
    assert!(told.len() < 400, "{told}");
    // A port that is reached keeps out what another port is published on.
    let both = [published(30000, "198.51.100.7", 1), published(8000, "0.0.0.0", 2)];
    assert_eq!(all_reached(&publishing(networks, &both), &engine, None, &[30000, 8000]), "203.0.113.5:2");
}

#[test]
fn an_engine_with_many_addresses_is_named_by_a_few() {
    let many: Vec<String> = (1..64).map(|n| format!("203.0.113.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for bindings in [vec![], vec!["127.0.0.1"], vec!["198.51.100.7"]] {
        let ports: Vec<Published> = bindings.iter().map(|ip| published(8000, ip, 18000)).collect();
        let why = reach(&publishing("app 172.18.0.2", &ports), &on_other_machine(&many), None, &[8000]).unwrap_err();
        let told = format!("{why} {}", why.advice("vllm"));
        assert!(told.contains("and 58 more") && told.len() < 600, "{told}");
    }
}
