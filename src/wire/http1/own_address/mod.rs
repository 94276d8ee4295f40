//! A backend's own address in the headers of its answers, in whatever spelling: it means nothing to a client, and is not
//! for it to know.
//!
//! A URL that leads to the backend itself becomes the path of the same place here. Spellings are compared by what they
//! mean to browsers (WHATWG URL): any case, `http`, `https`, `ws`, `wss` or no scheme, slashes of both kinds, a user in
//! front, no port or the default one, numbers of any base, every form of an IPv6 address, escapes within escapes. Where an
//! address with its port stands alone, a dash takes its place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use memchr::{memchr3, memmem};

/// What a backend may call itself.
#[derive(Debug)]
pub struct OwnAddress {
    ip: IpAddr,
    port: u16,
    /// In lower case. They count only where a URL has its host.
    names: Vec<String>,
    /// Prefix of its API, which is `/v1` here.
    base_path: String,
    /// Looks for its address as it is usually written.
    plain: memmem::Finder<'static>,
    /// Looks for its port behind any name.
    with_port: memmem::Finder<'static>,
    slashes: memmem::Finder<'static>,
}

/// What becomes of a header.
#[derive(Debug, PartialEq, Eq)]
pub enum Concealed {
    /// It says nothing of the backend's address.
    AsIs,
    /// It says this.
    Changed(Vec<u8>),
    /// It is about nothing but the address.
    Dropped,
}

/// A value with its escapes undone, and where each byte of it came from.
#[derive(Debug)]
struct Decoded<'v> {
    raw: &'v [u8],
    bytes: Vec<u8>,
    /// Where each of the bytes begins in `raw`, and the end.
    starts: Vec<usize>,
}

/// A scheme of a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Plain,
    Secure,
    Unsaid,
}

impl OwnAddress {
    /// The address of a backend at `addr` whose container has these names, with its API below `base_path`.
    pub fn new<'n>(addr: SocketAddr, names: impl IntoIterator<Item = &'n str>, base_path: &str) -> OwnAddress {
        let ip = addr.ip().to_canonical();
        let names = names.into_iter().filter(|name| !name.is_empty()).map(str::to_ascii_lowercase).collect();
        OwnAddress {
            ip,
            port: addr.port(),
            names,
            base_path: base_path.to_owned(),
            plain: memmem::Finder::new(ip.to_string().as_bytes()).into_owned(),
            with_port: memmem::Finder::new(format!(":{}", addr.port()).as_bytes()).into_owned(),
            slashes: memmem::Finder::new(b"//").into_owned(),
        }
    }

    /// What the header `name` may say to a client.
    pub fn conceal(&self, name: &[u8], value: &[u8]) -> Concealed {
        let names_hosts_alone = matches!(name.len(), 7 | 10) && (is_alt_svc(name) || is_cookie(name));
        // Most values are done with after this.
        if !names_hosts_alone && !may_hold_authority(value) {
            return Concealed::AsIs;
        }
        let cookie = if is_cookie(name) { self.without_domain(value) } else { None };
        if cookie.is_none() && !self.may_stand_in(value) {
            return Concealed::AsIs;
        }
        if is_alt_svc(name) {
            // `h2="host:port"`: another way to the same server, which is the backend's affair.
            let is_own = |alternative: &[u8]| match alternative {
                // The same host is the one that the client knows, and its ports are not the backend's.
                [b':', port @ ..] => port_of(port) == Some(self.port) && !matches!(self.port, 80 | 443),
                alternative => self.is_own_authority(alternative, Scheme::Unsaid),
            };
            let mut quoted = value.split(|byte| *byte == b'"').skip(1).step_by(2);
            return if quoted.any(is_own) { Concealed::Dropped } else { Concealed::AsIs };
        }
        let replaced = self.replaced(cookie.as_deref().unwrap_or(value));
        replaced.or(cookie).map_or(Concealed::AsIs, Concealed::Changed)
    }

    /// Whether the address may stand in these bytes, in any spelling.
    fn may_stand_in(&self, bytes: &[u8]) -> bool {
        self.slashes.find(bytes).is_some()
            || memchr3(b'\\', b'%', b'[', bytes).is_some()
            || self.plain.find(bytes).is_some()
            || self.with_port.find(bytes).is_some()
    }

    /// A cookie for the backend's host alone becomes one for the host that the client knows.
    fn without_domain(&self, cookie: &[u8]) -> Option<Vec<u8>> {
        let is_own_domain = |attribute: &[u8]| {
            let Some(equals) = attribute.iter().position(|byte| *byte == b'=') else { return false };
            let (name, value) = (attribute[..equals].trim_ascii(), attribute[equals + 1..].trim_ascii());
            let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
            let host = value.strip_prefix(b".").unwrap_or(value);
            name.eq_ignore_ascii_case(b"domain")
                && (is_localhost(host) || self.is_own_name(host) || self.is_own_authority(host, Scheme::Unsaid))
        };
        let attributes = || cookie.split(|byte| *byte == b';');
        if !attributes().skip(1).any(is_own_domain) {
            return None;
        }
        let kept = attributes().enumerate().filter(|(index, attribute)| *index == 0 || !is_own_domain(attribute));
        Some(kept.map(|(_, attribute)| attribute).collect::<Vec<_>>().join(&b';'))
    }

    /// The value with every spelling of the address replaced, if there is one.
    fn replaced(&self, value: &[u8]) -> Option<Vec<u8>> {
        let decoded = Decoded::of(value);
        let bytes = &decoded.bytes;
        let (mut out, mut copied, mut at) = (Vec::new(), 0, 0);
        let mut any = false;
        while at < bytes.len() {
            let (from, to) = if let Some((scheme, authority)) = decoded.url_at(at) {
                let end = decoded.end_of_authority(authority);
                if !self.is_own_authority(&bytes[authority..end], scheme) {
                    at = authority.max(at + 1);
                    continue;
                }
                out.extend_from_slice(&value[copied..decoded.starts[at]]);
                (at, self.push_place(&decoded, end, &mut out))
            } else if let Some(end) = self.bare_at(bytes, at) {
                out.extend_from_slice(&value[copied..decoded.starts[at]]);
                out.push(b'-');
                (at, end)
            } else {
                at += 1;
                continue;
            };
            any = true;
            copied = decoded.starts[to];
            at = to.max(from + 1);
        }
        out.extend_from_slice(&value[copied..]);
        any.then_some(out)
    }

    /// Writes the place here that stands for the one on the backend whose path begins at `at`; returns what it stands for.
    fn push_place(&self, decoded: &Decoded<'_>, at: usize, out: &mut Vec<u8>) -> usize {
        let bytes = &decoded.bytes;
        let is_slash = |index: usize| bytes.get(index).is_some_and(|byte| matches!(byte, b'/' | b'\\'));
        let is_escaped = is_slash(at) && decoded.is_escaped(at);
        out.extend_from_slice(if is_escaped { b"%2F" } else { b"/" });
        let base_path = self.base_path.as_bytes();
        let below = at + base_path.len();
        let is_below = bytes[at..].starts_with(base_path)
            && (is_slash(below)
                || !base_path.is_empty() && bytes.get(below).is_none_or(|byte| b"?#>\"', ;)&".contains(byte)));
        if is_below {
            out.extend_from_slice(b"v1");
            return below;
        }
        // One slash: behind two, a browser expects a host, and takes a backslash for one.
        (at..bytes.len())
            .find(|index| !is_slash(*index) || decoded.is_escaped(*index) != is_escaped)
            .unwrap_or(bytes.len())
    }

    /// The end of the address with its port, if that stands at `at` by itself.
    fn bare_at(&self, bytes: &[u8], at: usize) -> Option<usize> {
        let before = at.checked_sub(1).map(|before| bytes[before]);
        let is_begin = before.is_none_or(|before| before == b':' || !is_word(before));
        if !is_begin || !(bytes[at] == b'[' || bytes[at].is_ascii_alphanumeric()) {
            return None;
        }
        let host_end = match bytes[at] {
            b'[' => at + bytes[at..].iter().position(|byte| *byte == b']')? + 1,
            _ => at + bytes[at..].iter().position(|byte| *byte == b':' || !is_word(*byte))?,
        };
        let digits = bytes.get(host_end..)?.strip_prefix(b":")?;
        let digits = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let end = host_end + 1 + digits;
        // With its own port alone: without one it may be anything, such as a client's.
        if port_of(&bytes[host_end + 1..end])? != self.port {
            return None;
        }
        let host = &bytes[at..host_end];
        // A name in a path or behind a colon is something else's.
        let may_be_name = match before {
            Some(b'/') => bytes[..at].ends_with(b"//"),
            before => !matches!(before, Some(b'\\' | b':')),
        };
        let is_own = self.is_own_ip(host) || may_be_name && (is_local(host) || self.is_own_name(host));
        (is_own && bytes.get(end).is_none_or(|byte| !is_word(*byte))).then_some(end)
    }

    /// Whether this is the backend, as the authority of a URL: with a user or without, with a port or without.
    fn is_own_authority(&self, authority: &[u8], scheme: Scheme) -> bool {
        let host_at = authority.iter().rposition(|byte| *byte == b'@').map_or(0, |at| at + 1);
        let (host, port) = split_port(&authority[host_at..]);
        let port = match port {
            [] | [b':'] => None,
            [b':', digits @ ..] => match port_of(digits) {
                Some(80) if scheme != Scheme::Secure => None,
                Some(443) if scheme != Scheme::Plain => None,
                None => return false,
                port => port,
            },
            _ => return false,
        };
        let is_port = port.is_none_or(|port| port == self.port);
        if self.is_own_ip(host) {
            return is_port;
        }
        // What it calls itself from within.
        if is_local(host) {
            let is_default =
                matches!((self.port, scheme), (80, Scheme::Plain | Scheme::Unsaid) | (443, Scheme::Secure));
            return port == Some(self.port) || port.is_none() && is_default;
        }
        is_port && self.is_own_name(host)
    }

    fn is_own_name(&self, host: &[u8]) -> bool {
        let host = host.strip_suffix(b".").unwrap_or(host);
        self.names.iter().any(|name| name.as_bytes().eq_ignore_ascii_case(host))
    }

    fn is_own_ip(&self, host: &[u8]) -> bool {
        ip_of(host.strip_suffix(b".").unwrap_or(host)) == Some(self.ip)
    }
}

// === impl Decoded ===

impl<'v> Decoded<'v> {
    fn of(raw: &'v [u8]) -> Decoded<'v> {
        let (mut bytes, mut starts) = (Vec::with_capacity(raw.len()), Vec::with_capacity(raw.len() + 1));
        let escaped = |at: usize| Some(hex(*raw.get(at)?)? << 4 | hex(*raw.get(at + 1)?)?);
        let mut at = 0;
        while at < raw.len() {
            let start = at;
            let mut byte = raw[at];
            at += 1;
            // Escapes may be escaped themselves: `%252F`.
            while byte == b'%'
                && let Some(decoded) = escaped(at)
            {
                byte = decoded;
                at += 2;
            }
            // Browsers leave tabs out.
            if byte != b'\t' || at > start + 1 {
                bytes.push(byte);
                starts.push(start);
            }
        }
        starts.push(raw.len());
        Decoded { raw, bytes, starts }
    }

    fn is_escaped(&self, index: usize) -> bool {
        self.raw[self.starts[index]] == b'%'
    }

    /// If a URL with a host may begin at `at`: its scheme, and where its authority begins.
    fn url_at(&self, at: usize) -> Option<(Scheme, usize)> {
        let rest = &self.bytes[at..];
        let before = at.checked_sub(1).map(|before| self.bytes[before]);
        let slashes = |rest: &[u8]| rest.iter().take_while(|byte| matches!(byte, b'/' | b'\\')).count();
        let begins = |scheme: &str| {
            let is_it = rest.get(..scheme.len()).is_some_and(|head| head.eq_ignore_ascii_case(scheme.as_bytes()));
            is_it.then_some(scheme.len())
        };
        let scheme = match rest[0] {
            b'h' | b'H' | b'w' | b'W' if before.is_none_or(|before| !before.is_ascii_alphanumeric()) => None
                .or_else(|| begins("https:").or_else(|| begins("wss:")).map(|length| (Scheme::Secure, length)))
                .or_else(|| begins("http:").or_else(|| begins("ws:")).map(|length| (Scheme::Plain, length))),
            _ => None,
        };
        if let Some((scheme, length)) = scheme {
            return Some((scheme, at + length + slashes(&rest[length..])));
        }
        let is_begin = before.is_none_or(|before| b" <>\"'=,;(|".contains(&before));
        match slashes(rest) {
            2.. if is_begin => Some((Scheme::Unsaid, at + slashes(rest))),
            _ => None,
        }
    }

    fn end_of_authority(&self, begin: usize) -> usize {
        let ends = |byte: &u8| byte.is_ascii_whitespace() || b"/\\?#\"'<>,;)&|".contains(byte);
        self.bytes[begin..].iter().position(ends).map_or(self.bytes.len(), |length| begin + length)
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// Whether a URL with a host, or an address with its port, may stand in these bytes: each of them has a colon or two
/// slashes, written as such, as backslashes, as escapes, or with a tab that browsers leave out. Values are short, so that a plain loop is faster than a search
/// made for long texts.
fn may_hold_authority(value: &[u8]) -> bool {
    let mut before = 0;
    value.iter().any(|&byte| {
        let before = std::mem::replace(&mut before, byte);
        matches!(byte, b':' | b'%' | b'\\' | b'\t') || byte == b'/' && before == b'/'
    })
}

/// Whether a header of this name sets a cookie, whose domain may be a name without a port.
fn is_cookie(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"set-cookie")
}

/// Whether a header of this name tells other ways to the same server, as hosts with a port or without.
fn is_alt_svc(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"alt-svc")
}

/// Whether a host is the machine itself, whichever that is.
fn is_local(host: &[u8]) -> bool {
    let host = host.strip_suffix(b".").unwrap_or(host);
    is_localhost(host) || ip_of(host).is_some_and(|ip| ip.is_loopback() || ip.is_unspecified())
}

/// Names below `localhost` are the same machine (RFC 6761, 6.3).
fn is_localhost(host: &[u8]) -> bool {
    const NAME: &[u8] = b"localhost";
    let Some(at) = host.len().checked_sub(NAME.len()) else { return false };
    host[at..].eq_ignore_ascii_case(NAME) && (at == 0 || host[at - 1] == b'.')
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':')
}

/// A host, and its port with the colon.
fn split_port(authority: &[u8]) -> (&[u8], &[u8]) {
    let from = authority.iter().position(|byte| *byte == b']').unwrap_or(0);
    let at = authority[from..].iter().position(|byte| *byte == b':').map_or(authority.len(), |at| from + at);
    authority.split_at(at)
}

fn port_of(digits: &[u8]) -> Option<u16> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

/// The address that a host of a URL is, if it is one.
fn ip_of(host: &[u8]) -> Option<IpAddr> {
    match host {
        [b'[', inner @ .., b']'] => {
            let address = inner.split(|byte| *byte == b'%').next()?;
            let address: Ipv6Addr = std::str::from_utf8(address).ok()?.parse().ok()?;
            Some(IpAddr::V6(address).to_canonical())
        }
        _ => ipv4_of(host).map(IpAddr::V4),
    }
}

/// An IPv4 address as browsers read it: up to four numbers, of base 8, 10 or 16, of which the last fills what is left.
fn ipv4_of(host: &[u8]) -> Option<Ipv4Addr> {
    const PARTS_MAX: usize = 4;
    if host.is_empty() || host.len() > 64 {
        return None;
    }
    let mut parts = [0u64; PARTS_MAX];
    let mut count = 0;
    for part in host.split(|byte| *byte == b'.') {
        let text = std::str::from_utf8(part).ok().filter(|text| !text.starts_with(['+', '-']))?;
        *parts.get_mut(count)? = match part {
            [] => return None,
            [b'0', b'x' | b'X'] => 0,
            [b'0', b'x' | b'X', ..] => u64::from_str_radix(&text[2..], 16).ok()?,
            [b'0', _, ..] => u64::from_str_radix(&text[1..], 8).ok()?,
            _ => text.parse().ok()?,
        };
        count += 1;
    }
    let (last, first) = parts[..count].split_last()?;
    let room = 8 * (PARTS_MAX + 1 - count) as u32;
    if first.iter().any(|part| *part > 255) || *last >> room != 0 {
        return None;
    }
    let high = first.iter().zip([24, 16, 8]).map(|(part, shift)| part << shift).sum::<u64>();
    u32::try_from(high | *last).ok().map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests;
