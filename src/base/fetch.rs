//! One bounded GET on a connection of its own: for probes, and for the commands that ask a running proxy.
//!
//! Bounded in time and size, never following a redirect; the answer may come from anybody.

use std::{io, net::SocketAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// What to fetch, and how much patience and room there is for the answer.
#[derive(Debug, Clone, Copy)]
pub struct Fetch<'a> {
    /// Takes to ask.
    pub addr: SocketAddr,
    /// Path and query.
    pub path: &'a str,
    /// Time for connecting.
    pub connect_timeout: Duration,
    /// Time for everything, connecting included.
    pub timeout: Duration,
    /// Largest body taken.
    pub max_bytes: usize,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Nothing listens at this address.
    #[error("nobody listens on {0}")]
    Refused(SocketAddr),
    /// There is no way to that address.
    #[error("{0} cannot be reached: {1}")]
    Unreachable(SocketAddr, String),
    /// No connection, and no telling whose fault that is: the other side is too busy to accept, or this one is out of
    /// descriptors or ports.
    #[error("no connection to {0}: {1}")]
    NoConnection(SocketAddr, String),
    /// No complete answer in time.
    #[error("no complete answer within {0:?}")]
    TimedOut(Duration),
    /// The answer broke off or is not HTTP.
    #[error("the answer broke off: {0}")]
    Broke(String),
    /// The body is larger than there is room for.
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
}

impl Fetch<'_> {
    /// Fetches.
    ///
    /// # Errors
    /// There is no complete answer within the bounds. An answer with any status is no error.
    pub async fn get(&self) -> Result<(StatusCode, Bytes), FetchError> {
        timeout(self.timeout, self.exchange()).await.map_err(|_| FetchError::TimedOut(self.timeout))?
    }

    async fn exchange(&self) -> Result<(StatusCode, Bytes), FetchError> {
        let broke = |error: hyper::Error| FetchError::Broke(error.to_string());
        let addr = self.addr;
        let connecting = timeout(self.connect_timeout, TcpStream::connect(addr)).await;
        let stream =
            match connecting.map_err(|_| io::Error::from(io::ErrorKind::TimedOut)).and_then(|connected| connected) {
                Ok(stream) => stream,
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => return Err(FetchError::Refused(addr)),
                Err(e) if matches!(e.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
                    return Err(FetchError::Unreachable(addr, e.to_string()));
                }
                Err(e) => return Err(FetchError::NoConnection(addr, e.to_string())),
            };
        let request = Request::get(self.path)
            .header(header::HOST, self.addr.to_string())
            .header(header::ACCEPT, "application/json")
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close")
            .header(header::USER_AGENT, concat!("inference-proxy/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(|e| FetchError::Broke(format!("{:?} is no path: {e}", self.path)))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(broke)?;
            Ok((response.status(), read_bounded(response.into_body(), self.max_bytes).await?))
        };
        // The connection is driven here, not by a task: it ends with this call, whatever the other side does.
        tokio::pin!(connection, answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            ended = &mut connection => match ended {
                // What it had read is still to be taken.
                Ok(()) => answer.await,
                Err(error) => Err(broke(error)),
            },
        }
    }
}

async fn read_bounded(mut body: Incoming, max_bytes: usize) -> Result<Bytes, FetchError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| FetchError::Broke(e.to_string()))?;
        if let Some(chunk) = frame.data_ref() {
            if bytes.len() + chunk.len() > max_bytes {
                return Err(FetchError::TooLarge(max_bytes));
            }
            bytes.extend_from_slice(chunk);
        }
    }
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_refusal_says_that_nobody_serves() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        drop(listener);
        let limit = Duration::from_millis(200);
        let fetch = Fetch { addr, path: "/", connect_timeout: limit, timeout: limit * 10, max_bytes: 10 };
        assert_eq!(fetch.get().await, Err(FetchError::Refused(addr)));
        // One that has no room for another connection does not refuse it: it says nothing.
        let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        full.listen(1).unwrap();
        let addr = full.local_addr().unwrap().as_socket().unwrap();
        let fetch = Fetch { addr, ..fetch };
        let mut waiting = Vec::new();
        while let Ok(Ok(stream)) = timeout(limit, TcpStream::connect(addr)).await {
            waiting.push(stream);
        }
        assert!(matches!(fetch.get().await, Err(FetchError::NoConnection(..))));
    }
}
