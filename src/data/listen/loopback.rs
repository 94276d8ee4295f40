//! A way in for the container's own health check, whatever number of clients waits at the port.
//!
//! Connections that wait to be accepted stand in one line, and a health check behind a thousand others fails. A listener
//! on all addresses therefore gets companions at the loopback addresses: the kernel hands a connection to the listener
//! whose address fits best, so those from this machine have a line of their own.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// Listeners at the loopback addresses beside `listener`; none where it does not listen at all addresses, or where the
/// system does not let them share the port.
pub(super) fn beside(listener: &TcpListener, backlog: i32) -> Vec<TcpListener> {
    let Ok(addr) = listener.local_addr() else { return Vec::new() };
    if !addr.ip().is_unspecified() {
        return Vec::new();
    }
    let wanted: &[IpAddr] = match addr {
        SocketAddr::V4(_) => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
        SocketAddr::V6(_) => &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)],
    };
    // Only while they are bound, because no other program is to share the port by accident.
    let port = SockRef::from(listener);
    if let Err(error) = port.set_reuse_port(true) {
        tracing::debug!(%error, "health checks wait in line with all clients");
        return Vec::new();
    }
    let mut found = Vec::new();
    for ip in wanted {
        match bind(SocketAddr::new(*ip, addr.port()), backlog) {
            Ok(listener) => found.push(listener),
            Err(error) => tracing::debug!(%error, %ip, "health checks from this address wait in line with all clients"),
        }
    }
    for socket in found.iter().map(SockRef::from).chain([port]) {
        let _ = socket.set_reuse_port(false);
    }
    found
}

fn bind(addr: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn connections_from_this_machine_have_a_line_of_their_own() {
        let listener = super::super::bind(None, 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let local = beside(&listener, 16);
        assert!(!local.is_empty(), "this system lets them share the port");
        for local in &local {
            let addr = local.local_addr().unwrap();
            let client = TcpStream::connect(addr).unwrap();
            local.set_nonblocking(false).unwrap();
            assert_eq!(local.accept().unwrap().1, client.local_addr().unwrap());
        }
        let others = listener.accept().unwrap_err();
        assert_eq!(others.kind(), io::ErrorKind::WouldBlock, "nobody came there");
        assert!(super::super::bind(None, port).is_err(), "the port is in use as before");
        assert!(super::super::bind(Some(Ipv4Addr::LOCALHOST.into()), port).is_err());
    }

    #[test]
    fn a_listener_at_one_address_has_no_companions() {
        let listener = super::super::bind(Some(Ipv4Addr::LOCALHOST.into()), 0).unwrap();
        assert!(beside(&listener, 16).is_empty());
    }
}
