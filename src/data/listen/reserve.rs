//! Connections from this machine for which there is no room: one of them may be its health check, which always gets in.
//!
//! Each has little time to say what it wants. The proxy's own pages are shown. Anything else waits a moment for a place
//! among the others, and is refused if none becomes free. When the reserve is full as well, one makes room for the next:
//! those go first that have said least.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU8,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::task::AtomicWaker;
use tokio::{
    net::TcpStream,
    task::yield_now,
    time::{Instant, sleep, timeout},
};

use super::{
    HTTP2_PREFACE, Stopper, first_bytes,
    places::{CONNECTION, LOOK, Place, Places},
};
use crate::{
    base::error::ProxyError,
    data::proxy::Site,
    observe::pages::Page,
    wire::http1::head::{HeadEnd, RequestHead},
};

/// Time for the whole head of a request.
const HEAD_TIME: Duration = Duration::from_secs(2);
/// A client sends its request right after connecting. One that had so much time for it is the first to go.
const SILENCE_MAX: Duration = Duration::from_millis(100);
/// None has to go earlier than this, with room expected and without.
const SILENCE_MIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(20));
/// Time for an answer, and for its client to take it.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long a request waits for a place where no idle connection is about to make room.
const WAIT_MIN: Duration = Duration::from_millis(250);
/// How long it waits at most.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// How far a connection in the reserve has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    /// Its client has yet to send a whole head.
    Says,
    /// Its request waits for a place.
    Waits,
    /// It is answered, or has been.
    Answered,
}

const SAYS: u8 = Stage::Says as u8;
const WAITS: u8 = Stage::Waits as u8;

/// A connection in the reserve, as it is seen by the part that lets clients in.
#[derive(Debug)]
pub(super) struct Guest {
    since: Instant,
    stage: AtomicU8,
    is_told: AtomicBool,
    task: AtomicWaker,
}

/// Serves a connection that has a place in the reserve. Returns it with what has been read of it, if it has got another
/// place.
pub(super) async fn serve(
    mut stream: TcpStream,
    client_ip: IpAddr,
    site: &Site,
    stopper: &Stopper,
    (places, place): (&Arc<Places>, &mut Place),
) -> Option<(TcpStream, Vec<u8>)> {
    let hosted = places.host();
    let guest = &*hosted.guest;
    let mut end = HeadEnd::default();
    let first = tokio::select! {
        biased;
        first = timeout(HEAD_TIME, first_bytes(&mut stream, |bytes| !matches!(end.find(bytes), Ok(None)))) => first.ok()??,
        () = guest.told_in_vain() => return None,
    };
    let is_http2 = first.starts_with(HTTP2_PREFACE);
    if is_http2 || !is_answered_here(&first) {
        hosted.moves_on(Stage::Waits);
        let found = tokio::select! {
            biased;
            found = places.wait(CONNECTION) => Some(found),
            () = guest.told() => None,
            () = in_vain(places) => None,
        };
        if let Some(found) = found {
            *place = found;
            return Some((stream, first));
        }
        if is_http2 {
            return None;
        }
        hosted.moves_on(Stage::Answered);
        let refused = site.refuse(stream, first, client_ip, stopper.closing(), &ProxyError::Full);
        until_told(guest, refused).await;
    } else {
        hosted.moves_on(Stage::Answered);
        until_told(guest, site.serve(stream, first, client_ip, stopper.closing().after_one())).await;
    }
    None
}

/// The request is for a page of the proxy's own, or none that could be served.
fn is_answered_here(first: &[u8]) -> bool {
    let mut head = RequestHead::default();
    match HeadEnd::default().find(first) {
        Ok(Some(length)) => head.read(&first[..length]).is_err() || Page::of(head.path()).is_some(),
        Ok(None) | Err(_) => true,
    }
}

async fn until_told(guest: &Guest, answering: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        _ = timeout(ANSWER_TIME, answering) => {}
        () = guest.told() => {}
    }
}

/// Waits until it is in vain to wait for room any longer.
async fn in_vain(places: &Places) {
    let since = Instant::now();
    sleep(WAIT_MIN).await;
    while since.elapsed() < WAIT_MAX && places.expects_room() {
        sleep(LOOK).await;
    }
}

// === impl Guest ===

impl Guest {
    /// One that has just come.
    pub(super) fn new(now: Instant) -> Guest {
        Guest { since: now, stage: AtomicU8::new(SAYS), is_told: AtomicBool::new(false), task: AtomicWaker::new() }
    }

    /// In which order it has to go, if it has to: those first that have said least.
    pub(super) fn rank(&self, now: Instant, expects_room: bool) -> Option<u8> {
        let age = now.saturating_duration_since(self.since);
        let silence_min = if expects_room { SILENCE_MIN.0 } else { SILENCE_MIN.1 };
        match self.stage.load(Relaxed) {
            _ if self.is_told() => None,
            SAYS if age >= SILENCE_MAX => Some(0),
            SAYS => (age >= silence_min).then_some(2),
            WAITS => (!expects_room).then_some(1),
            _ => Some(3),
        }
    }

    /// It has come further. Returns whether it had been told to go: that was too late, and another one should be told.
    pub(super) fn moves_on(&self, stage: Stage) -> bool {
        self.stage.store(stage as u8, Relaxed);
        self.is_told.swap(false, SeqCst)
    }

    /// Tells it to go.
    pub(super) fn send_away(&self) {
        self.is_told.store(true, SeqCst);
        self.task.wake();
    }

    pub(super) fn is_told(&self) -> bool {
        self.is_told.load(SeqCst)
    }

    /// Waits until it is told to go.
    async fn told(&self) {
        std::future::poll_fn(|cx| self.poll_told(cx)).await;
    }

    /// Waits until it is told to go and nothing has come even so.
    async fn told_in_vain(&self) {
        self.told().await;
        // What the kernel has already is known only once it has been asked, which it is before this goes on.
        yield_now().await;
    }

    fn poll_told(&self, cx: &Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        if self.is_told() { Poll::Ready(()) } else { Poll::Pending }
    }
}
