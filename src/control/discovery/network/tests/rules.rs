//! Rules that hold for any wiring and any place of the proxy.

use proptest::prelude::*;

use super::*;

fn any_ip() -> impl Strategy<Value = IpAddr> {
    let known = ["0.0.0.0", "::", "127.0.0.1", "::1", "10.0.0.1", "10.1.0.2", "fd00::1", "fe80::1", "169.254.0.1"];
    prop::sample::select(known.map(ip).to_vec())
}

fn any_attachment() -> impl Strategy<Value = Attachment> {
    let name = prop::sample::select(vec!["a", "b", "llm_a", "bridge", "ingress", "host"]);
    let id = prop::sample::select(vec!["", "1", "2", "3"]);
    let addresses = prop::collection::vec(any_ip(), 0..4);
    (name, id, addresses, prop::option::of(any_ip()), -1i64..2).prop_map(|(name, id, addresses, gateway, priority)| {
        Attachment {
            name: name.to_owned(),
            id: id.to_owned(),
            ipv4: v4_of(&addresses),
            ipv6: v6_of(&addresses),
            gateway,
            gw_priority: priority,
        }
    })
}

fn any_wiring() -> impl Strategy<Value = Wiring> {
    let mode = prop_oneof![
        6 => Just(NetworkMode::Networks),
        1 => Just(NetworkMode::Host),
        1 => Just(NetworkMode::None),
        1 => Just(NetworkMode::Container("0123".to_owned())),
    ];
    let published = (8000u16..8002, prop::option::of(any_ip()), 1u16..4)
        .prop_map(|(container_port, host_ip, host_port)| Published { container_port, host_ip, host_port });
    let attachments = prop::collection::vec(any_attachment(), 0..5);
    (mode, attachments, prop::collection::vec(published, 0..4)).prop_map(|(mode, attachments, published)| Wiring {
        mode,
        attachments,
        published,
        ..on("")
    })
}

fn any_vantage() -> impl Strategy<Value = Vantage> {
    let attachments = prop::collection::vec(any_attachment(), 0..4);
    let container =
        (attachments, any::<bool>(), prop::option::of(any_ip())).prop_map(|(attachments, host, gateway)| {
            Vantage::Container { attachments, host_network: host, host_gateway: gateway }
        });
    let on_link = || prop::collection::vec((any_ip(), 0u8..=128), 0..4);
    let elsewhere = prop::collection::vec(any_ip(), 1..4).prop_map(|engine| Vantage::Elsewhere { engine });
    let inside = (on_link(), prop::option::of(any_ip()));
    let inside = inside.prop_map(|(on_link, host_gateway)| Vantage::Inside { on_link, own: Vec::new(), host_gateway });
    let host = on_link().prop_map(|on_link| Vantage::Host { on_link });
    prop_oneof![2 => container, 1 => host, 1 => elsewhere, 1 => inside]
}

fn any_wanted() -> impl Strategy<Value = Option<&'static str>> {
    prop::option::of(prop::sample::select(vec!["a", "b", "host", "ingress"]))
}

/// Another order of the same list.
fn turn<T>(list: &mut [T], by: usize) {
    let by = by % list.len().max(1);
    list.reverse();
    list.rotate_left(by);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn the_order_of_lists_changes_nothing(
        wiring in any_wiring(),
        vantage in any_vantage(),
        wanted in any_wanted(),
        by in 0usize..8,
    ) {
        let (mut other_wiring, mut other_vantage) = (wiring.clone(), vantage.clone());
        turn(&mut other_wiring.attachments, by);
        turn(&mut other_wiring.published, by);
        match &mut other_vantage {
            Vantage::Container { attachments, .. } => turn(attachments, by),
            Vantage::Host { on_link } | Vantage::Inside { on_link, .. } => turn(on_link, by),
            Vantage::Elsewhere { engine } => turn(engine, by),
        }
        let other = reach(&other_wiring, &other_vantage, wanted, &[8000, 8001]);
        prop_assert_eq!(reach(&wiring, &vantage, wanted, &[8000, 8001]), other);
    }

    #[test]
    fn what_is_reached_belongs_to_the_container(
        wiring in any_wiring(),
        vantage in any_vantage(),
        wanted in any_wanted(),
    ) {
        let Ok(reached) = reach(&wiring, &vantage, wanted, &[8000, 8001]) else { return Ok(()) };
        let Reach { targets, network, others } = reached.clone();
        prop_assert!((1..=2 * WAYS_MAX).contains(&targets.len()));
        for target in &targets[1..] {
            // The same address with another port, or an address of its own on the network that is told for it.
            let told = reached.network_of(target.ip());
            let is_its_own = |a: &Attachment| told.is_some_and(|n| (&n.name, &n.id) == (&a.name, &a.id))
                && a.addresses().any(|ip| ip == target.ip());
            prop_assert!(network.is_none() || wiring.attachments.iter().any(is_its_own), "{target}");
        }
        prop_assert!(others.len() < WAYS_MAX);
        prop_assert!(targets.iter().all(|target| !target.ip().is_unspecified() && target.port() != 0));
        if let Vantage::Elsewhere { engine } = &vantage {
            prop_assert!(targets.iter().all(|target| engine.contains(&target.ip())), "{targets:?}");
        }
        let Some(network) = network else {
            // through the host: only a container of the host, or one for which no network was named
            let is_elsewhere = matches!(vantage, Vantage::Elsewhere { .. });
            prop_assert!(wanted.is_none() || wiring.mode == NetworkMode::Host || is_elsewhere);
            return Ok(());
        };
        let mut own = wiring.attachments.iter().filter(|a| (&a.name, &a.id) == (&network.name, &network.id));
        prop_assert!(own.any(|a| a.addresses().any(|ip| ip == targets[0].ip())));
        prop_assert_ne!(&network.name, INGRESS);
        let in_project = |wanted| network.name.strip_prefix("llm_") == Some(wanted);
        prop_assert!(wanted.is_none_or(|wanted| network.name == wanted || in_project(wanted)));
    }

    #[test]
    fn a_network_in_common_is_always_used(
        mut wiring in any_wiring(),
        shared in any_attachment(),
        own in prop::collection::vec(any_attachment(), 0..3),
    ) {
        let shared = Attachment { name: "a".to_owned(), ipv4: Some(Ipv4Addr::new(10, 0, 0, 2)), ..shared };
        wiring.mode = NetworkMode::Networks;
        wiring.attachments.push(shared.clone());
        let attachments = [own, vec![shared]].concat();
        let vantage = Vantage::Container { attachments, host_network: false, host_gateway: None };
        prop_assert!(reach(&wiring, &vantage, None, &[8000]).is_ok_and(|reached| reached.network.is_some()));
    }

    #[test]
    fn messages_are_short_and_in_the_house_style(
        wiring in any_wiring(),
        vantage in any_vantage(),
        wanted in any_wanted(),
    ) {
        let Err(unreachable) = reach(&wiring, &vantage, wanted, &[8000]) else { return Ok(()) };
        for text in [unreachable.to_string(), unreachable.advice("c")] {
            prop_assert!(text.len() < 400 && !text.ends_with('.') && !text.is_empty(), "{}", text);
            prop_assert!(text.starts_with(|c: char| c.is_ascii_lowercase()), "{}", text);
        }
    }
}
