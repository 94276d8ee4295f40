//! Reads from the text of files under `/proc` in which container the proxy runs, and on which networks.
//!
//! The caller reads the files, and asks the Engine whether it knows the container. An id found here is only a claim,
//! because the proxy may run in a container of another Engine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A host has a prefix or two per network; a router that carries the whole Internet has none of them on link.
const MAX_PREFIXES: usize = 1024;

/// Files that a container engine mounts over an image's own, from a folder that carries the container's id.
const MOUNTED_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Flags of a route (`route.h`, `ipv6_route.h` of Linux).
const RTF_UP: u32 = 0x0001;
const RTF_REJECT: u32 = 0x0200;
const RTF_ANYCAST: u32 = 0x0010_0000;
const RTF_LOCAL: u32 = 0x8000_0000;

/// The IPv4 prefixes that are reached without a gateway, from `/proc/net/route`: address and length in bits.
///
/// Loopback, link-local and default routes are left out: a default route without a gateway (a tunnel) tells nothing about
/// the neighbours. Lines that cannot be read are skipped.
pub(crate) fn parse_proc_net_route(text: &str) -> Vec<(IpAddr, u8)> {
    on_link(text.lines().filter_map(Route::parse_ipv4))
}

/// The IPv6 prefixes that are reached without a gateway, from `/proc/net/ipv6_route`; as [`parse_proc_net_route`], and
/// without the machine's own addresses.
pub(crate) fn parse_proc_net_ipv6_route(text: &str) -> Vec<(IpAddr, u8)> {
    on_link(text.lines().filter_map(Route::parse_ipv6))
}

/// The gateway of the default route, from `/proc/net/route`.
///
/// In a container on a bridge that is the host. Unlike the gateways that the Engine reports, it is never that of an
/// internal network, where the host answers but forwards nothing to published ports.
pub(crate) fn default_gateway(text: &str) -> Option<IpAddr> {
    let routes = text.lines().filter_map(Route::parse_ipv4);
    let defaults = routes.filter(|route| route.is_usable() && route.bits == 0 && !route.gateway.is_unspecified());
    defaults.min_by_key(|route| route.metric).map(|route| route.gateway)
}

/// The interface through which `ip` is reached without a gateway, from the one of the two files that has its family.
pub(crate) fn interface_towards(text: &str, ip: IpAddr) -> Option<&str> {
    let parse = if ip.is_ipv4() { Route::parse_ipv4 } else { Route::parse_ipv6 };
    let routes = text.lines().filter_map(parse).filter(|route| route.is_usable() && route.covers(ip));
    routes.max_by_key(|route| route.bits).filter(Route::is_on_link).map(|route| route.interface)
}

fn on_link<'a>(routes: impl Iterator<Item = Route<'a>>) -> Vec<(IpAddr, u8)> {
    let on_link = routes.filter(Route::is_on_link).map(|route| (route.destination, route.bits));
    on_link.take(MAX_PREFIXES).collect()
}

/// One line of the kernel's tables.
struct Route<'a> {
    interface: &'a str,
    destination: IpAddr,
    bits: u8,
    gateway: IpAddr,
    metric: u32,
    flags: u32,
}

impl Route<'_> {
    /// `interface destination gateway flags references use metric mask …`
    fn parse_ipv4(line: &str) -> Option<Route<'_>> {
        // The four bytes of an address are printed as one number, in the machine's own byte order.
        let address = |hex| Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()));
        let fields: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
        let &[interface, destination, gateway, flags, _, _, metric, mask] = fields.as_slice() else {
            return None;
        };
        let mask = address(mask)?.to_bits();
        let bits = mask.leading_ones();
        (mask.count_ones() == bits).then_some(Route {
            interface,
            destination: IpAddr::V4(address(destination)?),
            bits: u8::try_from(bits).ok()?,
            gateway: IpAddr::V4(address(gateway)?),
            metric: metric.parse().ok()?,
            flags: u32::from_str_radix(flags, 16).ok()?,
        })
    }

    /// `destination bits source bits gateway metric references use flags interface`
    fn parse_ipv6(line: &str) -> Option<Route<'_>> {
        let number = |hex| u32::from_str_radix(hex, 16).ok();
        let address = |hex: &str| {
            let bits = u128::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 32)?;
            Some(IpAddr::V6(Ipv6Addr::from_bits(bits)))
        };
        let fields: Vec<&str> = line.split_ascii_whitespace().take(10).collect();
        let &[destination, bits, _, _, gateway, metric, _, _, flags, interface] = fields.as_slice() else {
            return None;
        };
        Some(Route {
            interface,
            destination: address(destination)?,
            bits: u8::try_from(number(bits)?).ok().filter(|bits| *bits <= 128)?,
            gateway: address(gateway)?,
            metric: number(metric)?,
            flags: number(flags)?,
        })
    }

    /// Whether the route is up and leads to other machines.
    fn is_usable(&self) -> bool {
        self.interface != "lo"
            && self.flags & RTF_UP != 0
            && self.flags & (RTF_REJECT | RTF_ANYCAST | RTF_LOCAL) == 0
            && !self.destination.is_multicast()
    }

    /// Whether `ip` begins with the prefix of the route.
    fn covers(&self, ip: IpAddr) -> bool {
        match (self.destination, ip) {
            (IpAddr::V4(prefix), IpAddr::V4(ip)) => {
                let differing = prefix.to_bits() ^ ip.to_bits();
                differing.checked_shr(32_u32.saturating_sub(self.bits.into())).is_none_or(|bits| bits == 0)
            }
            (IpAddr::V6(prefix), IpAddr::V6(ip)) => {
                let differing = prefix.to_bits() ^ ip.to_bits();
                differing.checked_shr(128_u32.saturating_sub(self.bits.into())).is_none_or(|bits| bits == 0)
            }
            _ => false,
        }
    }

    fn is_on_link(&self) -> bool {
        let is_link_local = match self.destination {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        self.is_usable() && self.bits > 0 && self.gateway.is_unspecified() && !is_link_local
    }
}

/// The full id of the container this process is in, from `/proc/self/mountinfo`.
///
/// Engines mount `/etc/hostname` and its like from `…/containers/<id>/` (Docker) or `…/<id>/userdata/` (Podman), with
/// any host name, with the host's network and with either cgroup version. Only these mount points are read: ids of image
/// layers, and of other containers' mounted folders, stand in the same file. In a container that shares the network of
/// another (`container:X`) the id is X's, whose networks are the ones that count.
pub(crate) fn self_id_from_mountinfo(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        // Linux, filesystems/proc.rst: mount id, parent id, device, root within the file system, mount point, ...
        let mut fields = line.split_ascii_whitespace().skip(3);
        let (root, mount_point) = (fields.next()?, fields.next()?);
        let file = mount_point.strip_prefix("/etc/").filter(|file| MOUNTED_FILES.contains(file))?;
        let folder = root.strip_suffix(file)?.strip_suffix('/')?;
        let id = match folder.strip_suffix("/userdata") {
            Some(folder) => folder.rsplit('/').next()?,
            None => folder.rsplit_once('/').filter(|(parent, _)| parent.ends_with("/containers"))?.1,
        };
        is_container_id(id).then(|| id.to_owned())
    })
}

/// The full id of the container this process is in, from `/proc/self/cgroup`.
///
/// For cgroup version 1 and version 2 without a cgroup namespace: `…/docker/<id>`, `…/docker-<id>.scope`,
/// `…/libpod-<id>.scope`, or `…/<id>` below another parent. The last of several is the innermost.
pub(crate) fn self_id_from_cgroup(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        path.rsplit('/').find_map(|segment| {
            let name = segment.strip_suffix(".scope").unwrap_or(segment);
            let id = name.strip_prefix("docker-").or_else(|| name.strip_prefix("libpod-")).unwrap_or(name);
            is_container_id(id).then(|| id.to_owned())
        })
    })
}

fn is_container_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefixes(list: &[(&str, u8)]) -> Vec<(IpAddr, u8)> {
        list.iter().map(|(address, bits)| (address.parse().unwrap(), *bits)).collect()
    }

    #[test]
    #[cfg(target_endian = "little")] // the kernel's text is in the byte order of the machine
    fn ipv4_routes() {
        let text = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
br-1c2d3e4f\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t0000A8C0\t010200C0\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t0000FEA9\t00000000\t0001\t0\t0\t1000\t0000FFFF\t0\t0\t0
lo\t0000007F\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0
down0\t0000000A\t00000000\t0000\t0\t0\t0\t000000FF\t0\t0\t0
*\t0000000B\t00000000\t0201\t0\t0\t0\t000000FF\t0\t0\t0
odd0\t0000000C\t00000000\t0001\t0\t0\t0\tFF0000FF\t0\t0\t0
wg0\t0200640A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
short0\t0000000D\t00000000\t0001
";
        let expected = [("172.17.0.0", 16), ("172.18.0.0", 16), ("192.0.2.0", 24), ("10.100.0.2", 32)];
        assert_eq!(parse_proc_net_route(text), prefixes(&expected));
    }

    /// Lines of `/proc/net/ipv6_route`, whose many zeroes are left out here: every `*` stands for 32 of them.
    fn ipv6_lines(text: &str) -> String {
        text.replace('*', &"0".repeat(32))
    }

    #[test]
    fn ipv6_routes() {
        let text = "\
fd000000000000000000000000000000 40 * 00 * 00000100 00000001 00000000 00000001 eth0
fd000002000000000000000000000000 30 * 00 * 00000100 00000001 00000000 00000001 br-1c2d3e4f
fd000003000000000000000000000000 40 * 00 fd000000000000000000000000000001 00000100 00000001 00000000 00000003 eth0
fe800000000000000000000000000000 40 * 00 * 00000100 00000002 00000000 00000001 eth0
* 00 * 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003 eth0
* 00 * 00 * 00000400 00000002 00000000 00000001 tun0
00000000000000000000000000000001 80 * 00 * 00000000 00000002 00000000 80200001 lo
fd000000000000000000000000000002 80 * 00 * 00000000 00000003 00000000 80200001 eth0
fd000000000000000000000000000000 80 * 00 * 00000000 00000003 00000000 00100001 eth0
ff000000000000000000000000000000 08 * 00 * 00000100 00000003 00000000 00000001 eth0
fd000004000000000000000000000000 40 * 00 * 00000100 00000001 00000000 00000000 eth0
* 00 * 00 * ffffffff 00000001 00000000 00200200 lo
fd00 40 00 00 * 00000100 00000001 00000000 00000001 eth0
";
        assert_eq!(parse_proc_net_ipv6_route(&ipv6_lines(text)), prefixes(&[("fd00::", 64), ("fd00:2::", 48)]));
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_default_gateway() {
        let header = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        for (routes, expected) in [
            ("eth0 00000000 010011AC 0003 0 0 0 00000000", Some("172.17.0.1")),
            ("a 00000000 010011AC 0003 0 0 9 00000000\nb 00000000 010012AC 0003 0 0 1 00000000", Some("172.18.0.1")),
            ("eth0 000011AC 00000000 0001 0 0 0 0000FFFF", None),
            ("eth0 000012AC 010011AC 0003 0 0 0 0000FFFF", None),
            ("tun0 00000000 00000000 0001 0 0 0 00000000", None),
            ("eth0 00000000 010011AC 0002 0 0 0 00000000", None),
            ("", None),
        ] {
            let expected = expected.map(|ip| ip.parse::<IpAddr>().unwrap());
            assert_eq!(default_gateway(&format!("{header}{routes}\n")), expected, "{routes}");
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_interface_towards_an_address() {
        let text = "\
eth0 00000000 010200C0 0003 0 0 0 00000000
docker0 000011AC 00000000 0001 0 0 0 0000FFFF
veth1 020011AC 00000000 0001 0 0 0 FFFFFFFF
eth0 000200C0 00000000 0001 0 0 0 00FFFFFF
tun0 000200C0 00000000 0000 0 0 0 FFFFFFFF
eth1 0000000A 010200C0 0003 0 0 0 000000FF
";
        for (ip, expected) in [
            ("172.17.0.9", Some("docker0")),
            ("172.17.0.2", Some("veth1")),
            ("192.0.2.8", Some("eth0")),
            ("10.0.0.1", None),
            ("203.0.113.5", None),
            ("fd00::1", None),
        ] {
            assert_eq!(interface_towards(text, ip.parse().unwrap()), expected, "{ip}");
        }
        let text =
            ipv6_lines("fd000002000000000000000000000000 30 * 00 * 00000100 00000001 00000000 00000001 br-1c2d\n");
        assert_eq!(interface_towards(&text, "fd00:2::7".parse().unwrap()), Some("br-1c2d"));
        assert_eq!(interface_towards(&text, "fd00:3::7".parse().unwrap()), None);
    }

    #[test]
    fn the_number_of_prefixes_is_bounded() {
        let line = "eth0 00000A0A 00000000 0001 0 0 0 FFFFFFFF 0 0 0\n";
        assert_eq!(parse_proc_net_route(&line.repeat(2 * MAX_PREFIXES)).len(), MAX_PREFIXES);
    }

    const ID: &str = "f81d4fae7dec11d0a76500a0c91e6bf6f81d4fae7dec11d0a76500a0c91e6bf6";
    const OTHER: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    #[test]
    fn own_id_from_mountinfo() {
        let mount = |root: &str, mount_point: &str| {
            format!("733 721 254:1 {root} {mount_point} rw,relatime - ext4 /dev/vda rw\n")
        };
        let layers =
            format!("721 600 0:51 / / rw - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/{OTHER}/diff\n");
        let foreign = mount(&format!("/var/lib/docker/containers/{OTHER}/hostname"), "/data/hostname");
        let folder = mount(&format!("/var/lib/docker/containers/{OTHER}"), "/etc");
        for (root, mount_point) in [
            (format!("/var/lib/docker/containers/{ID}/hostname"), "/etc/hostname"),
            (format!("/var/lib/docker/containers/{ID}/hosts"), "/etc/hosts"),
            (format!("/docker/containers/{ID}/resolv.conf"), "/etc/resolv.conf"),
            (format!("/containers/{ID}/hostname"), "/etc/hostname"),
            (format!("/var/lib/containers/storage/overlay-containers/{ID}/userdata/hostname"), "/etc/hostname"),
            (format!("/containers/overlay-containers/{ID}/userdata/resolv.conf"), "/etc/resolv.conf"),
        ] {
            let text = format!("{layers}{foreign}{folder}{}", mount(&root, mount_point));
            assert_eq!(self_id_from_mountinfo(&text).as_deref(), Some(ID), "{text}");
        }
        for (root, mount_point) in [
            (format!("/var/lib/docker/containers/{ID}/hostname"), "/data/hostname"),
            (format!("/var/lib/docker/containers/{ID}/hostname"), "/etc/hosts"),
            (format!("/var/lib/docker/containers/{ID}/passwd"), "/etc/passwd"),
            (format!("/var/lib/docker/volumes/{ID}/hostname"), "/etc/hostname"),
            (format!("/var/lib/docker/containers/{}/hostname", &ID[..63]), "/etc/hostname"),
            (format!("/var/lib/docker/containers/{}/hostname", ID.to_uppercase()), "/etc/hostname"),
            ("/var/lib/kubelet/pods/9d3c/etc-hosts".to_owned(), "/etc/hosts"),
            ("/hostname".to_owned(), "/etc/hostname"),
        ] {
            assert_eq!(self_id_from_mountinfo(&mount(&root, mount_point)), None, "{root} {mount_point}");
        }
        assert_eq!(self_id_from_mountinfo(&format!("{layers}{foreign}{folder}")), None);
    }

    #[test]
    fn own_id_from_cgroup() {
        for (line, expected) in [
            (format!("12:memory:/docker/{ID}"), Some(ID)),
            (format!("12:memory:/docker/{OTHER}/docker/{ID}"), Some(ID)),
            (format!("1:name=systemd:/docker/{ID}/init.scope"), Some(ID)),
            (format!("0::/system.slice/docker-{ID}.scope"), Some(ID)),
            (format!("0::/machine.slice/libpod-{ID}.scope/container"), Some(ID)),
            (format!("3:cpuset:/libpod_parent/libpod-{ID}"), Some(ID)),
            (format!("3:cpuset:/my-parent/{ID}"), Some(ID)),
            ("0::/".to_owned(), None),
            ("9:name=systemd:/".to_owned(), None),
            ("0::/user.slice/user-1000.slice/session-3.scope".to_owned(), None),
            (format!("0::/docker/{}", &ID[..12]), None),
            (format!("0::/system.slice/other-{ID}.scope"), None),
            (format!("/docker/{ID}"), None),
        ] {
            let text = format!("13:rdma:/\n{line}\n");
            assert_eq!(self_id_from_cgroup(&text).as_deref(), expected, "{line}");
        }
        assert_eq!(self_id_from_cgroup(""), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

        #[test]
        fn any_text_is_read(text in prop_oneof![
            any::<String>(),
            "(([a-z0-9]{1,4}\t)([0-9A-F]{8}\t){2}000[0-9]\t0\t0\t0\t[0-9A-F]{6}00\n){0,4}",
            "([0-9a-f]{32} [0-9a-f]{2} 0 0 0{32} 0 0 0 0000000[0-9] eth0\n){0,4}",
            "([0-9]:[a-z]{0,3}:(/docker[-/][0-9a-f]{64}(.scope)?)?\n){0,3}",
            "(1 2 0:1 /containers/[0-9a-f]{64}/hosts /etc/hosts\n){0,3}",
        ]) {
            prop_assert!(default_gateway(&text).is_none_or(|ip| !ip.is_unspecified()));
            for (prefix, bits) in parse_proc_net_route(&text).into_iter().chain(parse_proc_net_ipv6_route(&text)) {
                let longest = if prefix.is_ipv4() { 32 } else { 128 };
                prop_assert!((1..=longest).contains(&bits));
            }
            for id in [self_id_from_mountinfo(&text), self_id_from_cgroup(&text)].into_iter().flatten() {
                prop_assert!(is_container_id(&id) && text.contains(&id));
            }
        }
    }
}
