//! What `Host` may hold (RFC 3986, 3.2.2 and 3.2.3; RFC 9112, 3.2).

use memchr::memchr;

/// Whether this is a host with or without a port, as `Host` holds it (RFC 3986, 3.2.2 and 3.2.3). An empty one is: the
/// client does not know which host it asks.
pub(super) fn is_host(value: &[u8]) -> bool {
    let (host, port) = match value {
        [b'[', rest @ ..] => {
            let Some(end) = memchr(b']', rest) else { return false };
            if !is_ip_literal(&rest[..end]) {
                return false;
            }
            (&[][..], &rest[end + 1..])
        }
        // Names are short, so that a plain loop is faster than a search made for long texts.
        _ => {
            let plain = value.iter().position(|&byte| !NAME_BYTES[usize::from(byte)]).unwrap_or(value.len());
            let (name, rest) = value.split_at(plain);
            match rest {
                [] | [b':', ..] => (&[][..], rest),
                // An escape, or what is wrong.
                _ => {
                    let end = rest.iter().position(|&byte| byte == b':').unwrap_or(rest.len());
                    (&value[name.len()..name.len() + end], &rest[end..])
                }
            }
        }
    };
    let is_port = match port {
        [] => true,
        [b':', digits @ ..] => {
            digits.iter().all(u8::is_ascii_digit)
                && digits.iter().fold(0u32, |port, digit| (port * 10 + u32::from(digit - b'0')).min(1 << 16)) < 1 << 16
        }
        _ => false,
    };
    is_port && is_registered_name(host)
}

/// Bytes that stand for themselves in a registered name (RFC 3986, 3.2.2).
const NAME_BYTES: [bool; 256] = {
    let mut names = [false; 256];
    let mut byte = 0;
    while byte < names.len() {
        let plain = b"-._~!$&'()*+,;=";
        let mut at = 0;
        while at < plain.len() {
            names[plain[at] as usize] = true;
            at += 1;
        }
        names[byte] |= (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    names
};

fn is_registered_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let Some(at) = rest.iter().position(|&byte| !NAME_BYTES[usize::from(byte)]) {
        rest = match &rest[at..] {
            [b'%', high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => after,
            _ => return false,
        };
    }
    true
}

/// What stands between the brackets of a host: an IPv6 address, perhaps with its zone (RFC 6874), or one of the future.
fn is_ip_literal(inner: &[u8]) -> bool {
    if let [b'v' | b'V', version @ ..] = inner {
        let Some(dot) = memchr(b'.', version) else { return false };
        let address = &version[dot + 1..];
        return dot > 0
            && version[..dot].iter().all(u8::is_ascii_hexdigit)
            && !address.is_empty()
            && address.split(|byte| *byte == b':').all(|part| !part.contains(&b'%') && is_registered_name(part));
    }
    let (address, zone) = inner.split_at(memchr(b'%', inner).unwrap_or(inner.len()));
    let is_zone = zone.is_empty() || zone.len() > 1 && zone[1..].iter().all(u8::is_ascii_graphic);
    is_zone && std::str::from_utf8(address).is_ok_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok())
}
