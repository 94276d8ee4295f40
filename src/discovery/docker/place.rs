//! Where the proxy itself stands, read from the files in which the kernel and the engine say so.

use std::{fs, net::IpAddr};

use crate::discovery::vantage::{
    default_gateway, parse_proc_net_ipv6_route, parse_proc_net_route, self_id_from_cgroup, self_id_from_mountinfo,
};

/// Ids that may be the container this process runs in, the surest first. The engine must confirm them.
pub(super) fn self_id_candidates() -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let host_name = read("/proc/sys/kernel/hostname").trim().to_owned();
    let short_id = host_name.len() == 12 && host_name.bytes().all(|b| b.is_ascii_hexdigit());
    let mut candidates: Vec<String> = self_id_from_mountinfo(&read("/proc/self/mountinfo"))
        .into_iter()
        .chain(self_id_from_cgroup(&read("/proc/self/cgroup")))
        .chain(short_id.then_some(host_name))
        .collect();
    candidates.dedup();
    candidates
}

/// Networks that are directly connected to this host.
pub(super) fn on_link_prefixes() -> Vec<(IpAddr, u8)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut prefixes = parse_proc_net_route(&read("/proc/net/route"));
    prefixes.extend(parse_proc_net_ipv6_route(&read("/proc/net/ipv6_route")));
    prefixes
}

/// How the host is reached from within a container: the name that desktop engines and `extra_hosts` give it, else the
/// default gateway, which is the host's end of the bridge.
pub(super) fn host_gateway() -> Option<IpAddr> {
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let mut named = hosts.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let ip = words.next()?.parse().ok()?;
        words.any(|name| matches!(name, "host.docker.internal" | "host.containers.internal")).then_some(ip)
    });
    named.next().or_else(|| default_gateway(&fs::read_to_string("/proc/net/route").unwrap_or_default()))
}
