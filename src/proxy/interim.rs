//! Interim (1xx) responses, which hyper's server cannot send: they are written beside it, into the gaps it leaves.
//!
//! hyper flushes a connection only when it has nothing of its own left to write, so a flush is the one moment at which
//! bytes can be put between two of its messages. An interim response that finds no such moment before the final head is
//! dropped: it was a hint, and its time is over.

use std::{
    fmt::Write as _,
    io,
    pin::Pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::task::AtomicWaker;
use http::{HeaderMap, StatusCode};
use tokio::io::AsyncWrite;

/// Most bytes of interim responses that wait: a backend may send any number of them.
const WAITING_BYTES_MAX: usize = 16 * 1024;

/// Interim responses on their way to one client.
#[derive(Debug, Default)]
pub struct Interim {
    any: AtomicBool,
    waiting: Mutex<Vec<u8>>,
    connection: AtomicWaker,
}

impl Interim {
    /// Passes on an interim response, if there is room for it.
    pub fn send(&self, status: StatusCode, headers: &HeaderMap) {
        // hyper's server sends 100 itself, when the body is asked for.
        if !status.is_informational() || status == StatusCode::CONTINUE || status == StatusCode::SWITCHING_PROTOCOLS {
            return;
        }
        let mut head = format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or_default());
        for (name, value) in headers {
            let Ok(value) = value.to_str() else { continue };
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() + head.len() <= WAITING_BYTES_MAX {
            waiting.extend_from_slice(head.as_bytes());
            self.any.store(true, Ordering::Release);
            drop(waiting);
            self.connection.wake();
        }
    }

    fn take(&self) -> Vec<u8> {
        if !self.any.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What is being written of them, at the connection's end.
#[derive(Debug, Default)]
pub struct Gap {
    bytes: Vec<u8>,
    written: usize,
}

impl Gap {
    /// hyper has nothing to write: writes what waits.
    pub fn poll_fill<W: AsyncWrite + Unpin>(
        &mut self,
        interim: &Interim,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        interim.connection.register(cx.waker());
        if self.is_empty() {
            *self = Gap { bytes: interim.take(), written: 0 };
        }
        self.poll_finish(stream, cx)
    }

    /// hyper has something to write: finishes what has been begun, and forgets what has not.
    pub fn poll_close<W: AsyncWrite + Unpin>(
        &mut self,
        interim: &Interim,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_finish(stream, cx))?;
        if interim.any.load(Ordering::Relaxed) {
            drop(interim.take());
        }
        Poll::Ready(Ok(()))
    }

    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn poll_finish<W: AsyncWrite + Unpin>(&mut self, stream: &mut W, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &self.bytes[self.written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use http::HeaderValue;

    fn filled(gap: &mut Gap, interim: &Interim) -> String {
        let mut out = Vec::new();
        std::future::poll_fn(|cx| gap.poll_fill(interim, &mut out, cx)).now_or_never().unwrap().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn hints_are_written_into_the_gap_once() {
        let (interim, mut gap) = (Interim::default(), Gap::default());
        let headers = HeaderMap::from_iter([(http::header::LINK, HeaderValue::from_static("</a>; rel=preload"))]);
        interim.send(StatusCode::EARLY_HINTS, &headers);
        interim.send(StatusCode::CONTINUE, &HeaderMap::new());
        interim.send(StatusCode::PROCESSING, &HeaderMap::new());
        let expect = "HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n";
        assert_eq!(filled(&mut gap, &interim), expect);
        assert_eq!(filled(&mut gap, &interim), "");
    }

    #[test]
    fn a_flood_is_bounded_and_what_comes_too_late_is_dropped() {
        let (interim, mut gap) = (Interim::default(), Gap::default());
        for _ in 0..10_000 {
            interim.send(StatusCode::PROCESSING, &HeaderMap::new());
        }
        assert!(interim.waiting.lock().unwrap().len() <= WAITING_BYTES_MAX);
        let mut out = Vec::new();
        std::future::poll_fn(|cx| gap.poll_close(&interim, &mut out, cx)).now_or_never().unwrap().unwrap();
        assert_eq!((out, filled(&mut gap, &interim)), (Vec::new(), String::new()));
    }
}
