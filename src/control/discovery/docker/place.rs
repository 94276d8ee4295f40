//! Where the proxy itself stands, read from the files in which the kernel and the engine say so.
//!
//! A file that could not be read says nothing: it is an error here, never an empty answer.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    path::Path,
};

use crate::control::discovery::vantage::{
    default_gateway, interface_towards, parse_proc_net_ipv6_route, parse_proc_net_route, self_id_from_cgroup,
    self_id_from_mountinfo,
};

const ROUTES: &str = "/proc/net/route";
const ROUTES_IPV6: &str = "/proc/net/ipv6_route";
/// Files by which an engine marks its containers.
const MARKS: [&str; 2] = ["/.dockerenv", "/run/.containerenv"];
/// How engines name the bridges that they make.
const BRIDGES: [&str; 4] = ["docker", "br-", "podman", "cni-"];

/// What this machine tells of where this process stands.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    /// Ids that may be the container this process runs in, the surest first. The engine must confirm them.
    pub(super) candidates: Vec<String>,
    /// It is in some engine's container, and not in the network of the host.
    pub(super) is_inside: bool,
}

/// What this machine tells of where this process stands now.
pub(super) fn standing() -> io::Result<Standing> {
    let host_name = read_if_any("/proc/sys/kernel/hostname")?.trim().to_owned();
    let short_id = host_name.len() == 12 && host_name.bytes().all(|b| b.is_ascii_hexdigit());
    let mounted = self_id_from_mountinfo(&read_if_any("/proc/self/mountinfo")?);
    let is_inside = (is_marked() || mounted.is_some()) && !has_bridges();
    let mut candidates: Vec<String> = mounted
        .into_iter()
        .chain(self_id_from_cgroup(&read_if_any("/proc/self/cgroup")?))
        .chain(short_id.then_some(host_name))
        .collect();
    candidates.dedup();
    Ok(Standing { candidates, is_inside })
}

fn is_marked() -> bool {
    MARKS.iter().any(|mark| Path::new(mark).exists())
}

/// Networks that are directly connected to this host.
pub(super) fn on_link_prefixes() -> io::Result<Vec<(IpAddr, u8)>> {
    let mut prefixes = parse_proc_net_route(&read(ROUTES)?);
    // The file is not there where the kernel has no IPv6.
    prefixes.extend(parse_proc_net_ipv6_route(&read_if_any(ROUTES_IPV6)?));
    Ok(prefixes)
}

/// How the host is reached from within a container: the name that desktop engines and `extra_hosts` give it, else the
/// default gateway, which is the host's end of the bridge.
pub(super) fn host_gateway() -> io::Result<Option<IpAddr>> {
    let hosts = read_if_any("/etc/hosts")?;
    let mut named = hosts.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let ip = words.next()?.parse().ok()?;
        words.any(|name| matches!(name, "host.docker.internal" | "host.containers.internal")).then_some(ip)
    });
    match named.next() {
        Some(ip) => Ok(Some(ip)),
        None => Ok(default_gateway(&read_if_any(ROUTES)?)),
    }
}

/// Whether an address is this machine's: its loopback, one of its own, or that of a container on a bridge of its engine.
/// `is_nameless`: this process may be in a container of that engine, which does not know it by its id.
pub(super) fn is_here(ip: IpAddr, is_nameless: bool) -> io::Result<bool> {
    Ok(ip.is_loopback() || ip.is_unspecified() || is_own(ip)? || is_neighbour(ip, is_nameless)?)
}

/// The addresses from which this process reaches networks on link. Those that cannot be told are left out.
pub(super) fn own_addresses(on_link: &[(IpAddr, u8)]) -> Vec<IpAddr> {
    // The first address of a prefix is its network's own, to which some kernels send nothing.
    let next = |prefix: IpAddr| match prefix {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() | 1).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() | 1).into()),
    };
    let towards = |(prefix, _): &(IpAddr, u8)| source_towards(next(*prefix)).or_else(|_| source_towards(*prefix)).ok();
    let mut own: Vec<IpAddr> = on_link.iter().filter_map(towards).collect();
    own.sort();
    own.dedup();
    own
}

/// Whether an address is one of this machine's own: the kernel answers from the address itself. Nothing is sent.
fn is_own(ip: IpAddr) -> io::Result<bool> {
    match source_towards(ip) {
        Ok(source) => Ok(source == ip),
        // No room for a socket. All else means that there is no way to it, and there always is one to an own address.
        Err(error) if is_shortage(&error) => Err(error),
        Err(_) => Ok(false),
    }
}

/// The address from which packets to `ip` would be sent. Nothing is sent.
fn source_towards(ip: IpAddr) -> io::Result<IpAddr> {
    const ANY_PORT: u16 = 9;
    let from: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(from, 0))?;
    socket.connect(SocketAddr::new(ip, ANY_PORT))?;
    Ok(socket.local_addr()?.ip())
}

/// Whether an address is that of a container beside this process: on a bridge that an engine made here, or in the network
/// of the container that this process is in.
fn is_neighbour(ip: IpAddr, is_nameless: bool) -> io::Result<bool> {
    let routes = if ip.is_ipv4() { read_if_any(ROUTES)? } else { read_if_any(ROUTES_IPV6)? };
    let Some(interface) = interface_towards(&routes, ip) else { return Ok(false) };
    let is_bridge = Path::new("/sys/class/net").join(interface).join("bridge").is_dir();
    let is_engines = is_bridge && BRIDGES.iter().any(|name| interface.starts_with(name));
    // A container that knows its id is found by it, if the engine is its own; one that does not is only known to be one.
    let is_containers = interface.starts_with("eth") && is_marked();
    Ok(is_engines || is_nameless && is_containers && !has_bridges())
}

/// Whether an engine has made bridges here: then this process stands beside it, even if it is in a container itself.
fn has_bridges() -> bool {
    let Ok(interfaces) = fs::read_dir("/sys/class/net") else { return false };
    interfaces.flatten().any(|interface| {
        let name = interface.file_name();
        let is_named = name.to_str().is_some_and(|name| BRIDGES.iter().any(|begin| name.starts_with(begin)));
        is_named && interface.path().join("bridge").is_dir()
    })
}

fn is_shortage(error: &io::Error) -> bool {
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = 105;
    matches!(error.raw_os_error(), Some(ENOMEM | ENFILE | EMFILE | ENOBUFS))
}

fn read(path: &str) -> io::Result<String> {
    // Mount points may have any name.
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// As [`read`], for a file that need not be there; one that this process may never read is none.
fn read_if_any(path: &str) -> io::Result<String> {
    match read(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            Ok(String::new())
        }
        read => read,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_told_from_all_others() {
        for here in ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"] {
            assert!(is_here(here.parse().unwrap(), false).unwrap(), "{here}");
        }
        for elsewhere in ["203.0.113.5", "198.51.100.1", "2001:db8::5"] {
            assert!(!is_here(elsewhere.parse().unwrap(), false).unwrap(), "{elsewhere}");
        }
        // Whatever this machine calls its own, seen from outside.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("203.0.113.5:9").is_ok() {
            let own = socket.local_addr().unwrap().ip();
            assert!(is_own(own).unwrap() && is_here(own, false).unwrap(), "{own}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_empty_answer() {
        assert!(read("/proc/self/no such file").is_err());
        assert!(read_if_any("/proc/self/no such file").is_ok_and(|text| text.is_empty()));
        // A folder is there, and cannot be read as a file.
        assert!(read_if_any("/proc/self").is_err());
    }
}
