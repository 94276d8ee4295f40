//! What a `DOCKER_HOST` names, and how it is shown. Pure.

use std::net::IpAddr;

/// The port of a host that names none, as Docker's own client has it.
const DEFAULT_PORT: u16 = 2375;

/// A `DOCKER_HOST` as messages show it: what may be a password is left out.
pub(super) fn shown(host: &str) -> String {
    let (scheme, rest) = host.split_once("://").map_or(("", host), |(scheme, rest)| (scheme, rest));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rsplit_once('@') {
        Some((_, authority)) if scheme != "unix" => format!("{scheme}://{authority}{}", &rest[end..]),
        _ => host.to_owned(),
    }
}

/// Name or address and port of the machine in a `DOCKER_HOST`; `None` for a socket. One without a name is this machine.
pub(super) fn machine(host: &str) -> Option<(&str, u16)> {
    let (scheme, rest) = host.split_once("://").unwrap_or(("tcp", host));
    if !matches!(scheme, "tcp" | "http" | "https") {
        return None;
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    let (name, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').unwrap_or((rest, "")),
        // An IPv6 address without brackets has no port.
        None if authority.parse::<IpAddr>().is_ok() => (authority, ""),
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    let port = port.trim_start_matches(':').parse().unwrap_or(DEFAULT_PORT);
    Some((if name.is_empty() { "localhost" } else { name }, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_engines() {
        for (host, expected) in [
            ("unix:///var/run/docker.sock", None),
            ("unix:///a folder/docker@2.sock", None),
            ("tcp://203.0.113.5:2376", Some(("203.0.113.5", 2376))),
            ("tcp://203.0.113.5", Some(("203.0.113.5", 2375))),
            ("203.0.113.5:2376", Some(("203.0.113.5", 2376))),
            ("http://docker.example:80/", Some(("docker.example", 80))),
            ("https://docker.example", Some(("docker.example", 2375))),
            ("tcp://[2001:db8::5]:2376", Some(("2001:db8::5", 2376))),
            ("tcp://[2001:db8::5]", Some(("2001:db8::5", 2375))),
            ("tcp://[::1]:2375", Some(("::1", 2375))),
            ("tcp://2001:db8::5", Some(("2001:db8::5", 2375))),
            ("tcp://::1", Some(("::1", 2375))),
            ("tcp://:2376", Some(("localhost", 2376))),
            ("tcp://docker:", Some(("docker", 2375))),
            ("tcp://docker:99999", Some(("docker", 2375))),
            ("tcp://", Some(("localhost", 2375))),
            ("tcp://me:secret@docker:1?x", Some(("docker", 1))),
        ] {
            assert_eq!(machine(host), expected, "{host}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        for (host, expected) in [
            ("tcp://me:secret@docker:1", "tcp://docker:1"),
            ("https://me:s@cret@docker:1/path@x", "https://docker:1/path@x"),
            ("tcp://docker:1", "tcp://docker:1"),
            ("unix:///run/me@home/docker.sock", "unix:///run/me@home/docker.sock"),
        ] {
            assert_eq!(shown(host), expected);
        }
    }
}
