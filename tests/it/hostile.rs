//! H1: requests that are made to be read in two ways, and such as make no sense at all, by the thousand, beside ordinary
//! traffic.
//!
//! `oracle` reads what a case sends as the strictest of servers would (RFC 9112). Whatever reaches the backend must be a
//! request that it read there, with the same method, target and body; it may refuse more than that, never less.
//!
//! A run is made of one seed. It is the same in every run; `IT_SEED=1234` makes another one, `IT_CASE=567` sends one case
//! of it alone. Seed and case are in every failure.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use self::oracle::{Ending, Reading};
use crate::support::*;

const CASES: usize = 10_000;

/// Hostile connections at a time.
const ATTACKERS: usize = 16;

/// Ordinary clients beside them.
const ORDINARY: usize = 4;

const ORDINARY_BODY: &str = r#"{"model":"m","messages":[],"who":"ordinary"}"#;

/// The longest that a connection may be held once its client has said that nothing more will come.
const HELD_MAX: Duration = Duration::from_secs(10);

// === one by one ===

/// Ways to say `Transfer-Encoding: chunked` that one of two servers might not see.
const DISGUISES: [&str; 34] = [
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunkedx",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, gzip",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: x\r\ntransfer-encoding: chunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding: \x0cchunked",
    "Transfer-Encoding: chunked\x0b",
    "Transfer-Encoding: \0chunked",
    "Transfer-Encoding: chunked\0",
    "Transfer-Encoding: \"chunked\"",
    "Transfer-Encoding: 'chunked'",
    "Transfer-Encoding: chunked;q=1",
    "Transfer-Encoding: ",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding\t: chunked",
    "Transfer-Encoding\x0b: chunked",
    "Transfer-Encoding\0: chunked",
    " Transfer-Encoding: chunked",
    "\tTransfer-Encoding: chunked",
    "X: y\r\n Transfer-Encoding: chunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer-Encoding: chunked\r\n\t, identity",
    "X: y\rTransfer-Encoding: chunked",
    "X: y\nTransfer-Encoding: chunked",
    "X: y\0\r\nTransfer-Encoding: chunked",
    "Transfer\r\n-Encoding: chunked",
];

/// The same for lengths; the body has 13 bytes.
const LENGTHS: [&str; 22] = [
    "Content-Length: +13",
    "Content-Length: -13",
    "Content-Length: 0x0d",
    "Content-Length: 13.0",
    "Content-Length: 1 3",
    "Content-Length: 13 0",
    "Content-Length: 13;",
    "Content-Length: \"13\"",
    "Content-Length: \x0b13",
    "Content-Length: 13\0",
    "Content-Length: ",
    "Content-Length: ,13",
    "Content-Length: 13,14",
    "Content-Length: 18446744073709551629",
    "Content-Length: 13\r\nContent-Length: 14",
    "Content-Length: 0\r\nContent-Length: 13",
    "Content-Length : 13",
    " Content-Length: 13",
    "X: y\r\n Content-Length: 13",
    "Content-Length:\r\n 13",
    "Content-Length: 13\nContent-Length: 0",
    "X: y\rContent-Length: 13",
];

/// Sizes of a chunk of 13 bytes that are none, or none for everybody.
const CHUNK_SIZES: [&str; 22] = [
    "0xd",
    "+d",
    "-d",
    " d",
    "\td",
    "d;\n",
    "d\n",
    "d\r",
    "d\r\r\n",
    "d\0",
    "d\x0b",
    "d d",
    "dg",
    "",
    ";x=y",
    "13,",
    "1000000000000000d",
    "fffffffffffffffffffd",
    "\"d\"",
    "d\r\n ",
    "d;a\rb",
    "d;a\0b",
];

async fn one() -> (Upstream, TestApp) {
    let upstream = Upstream::start("a", &["m"]).await;
    let app = TestApp::with(&[&upstream]).await;
    (upstream, app)
}

const BODY: &str = r#"{"model":"m"}"#;

/// A request that nobody has sent, if the one before it is read as it should be.
fn behind() -> Vec<u8> {
    Request::chat("m").header("x-smuggled", "1").bytes()
}

/// Sends what stands behind each name, and checks that all of it is refused: by an answer, if there is one, and by the end
/// of the connection, with nothing whole at the backend.
async fn assert_refused(cases: impl IntoIterator<Item = (String, Vec<u8>)>) {
    let (mut upstream, mut app) = one().await;
    let mut taken = Vec::new();
    for (what, wire) in cases {
        if let Err(how) = refusal(&app, &upstream, &wire).await {
            taken.push(format!("{what}: {how}"));
            // What stands behind it may still be on its way.
            (upstream, app) = one().await;
        }
    }
    assert!(taken.is_empty(), "{} were not refused:\n{}", taken.len(), taken.join("\n"));
    assert_eq!(app.ask(&Request::chat("m")).await.status, 200);
    app.inflight_is("a", "m", 0.0).await;
}

async fn refusal(app: &TestApp, upstream: &Upstream, wire: &[u8]) -> Result<(), String> {
    /// Nobody who has read all of it has a reason to wait.
    const PROMPT: Duration = Duration::from_secs(2);
    let before = upstream.count();
    let mut client = app.client().await;
    let _sending = client.send_aside(wire.to_vec());
    match tokio::time::timeout(PROMPT, client.next_answer(false)).await {
        Err(_) => return Err(format!("no answer within {PROMPT:?}")),
        Ok(Ok(answer)) if (400..500).contains(&answer.status) || answer.status == 501 || answer.status == 505 => {}
        Ok(Ok(answer)) => return Err(format!("answered {} {}", answer.status, answer.text())),
        // Cut without a word is as good.
        Ok(Err(_)) => {}
    }
    // What might come after it, no two would read alike.
    match tokio::time::timeout(PROMPT, client.raw_to_end()).await {
        Err(_) => return Err("refused, but the connection goes on".to_owned()),
        Ok((more, _)) if more.is_empty() => {}
        Ok((more, _)) => {
            return Err(format!("what stands behind it was answered: {:?}", String::from_utf8_lossy(&more)));
        }
    }
    for index in before..upstream.count() {
        let received = upstream.peek(index, Clone::clone).unwrap();
        if received.body.is_done() {
            return Err(format!("reached the backend: {:?}", received.head));
        }
    }
    Ok(())
}

/// A POST with these lines and this behind its head, and another request behind that.
fn post(lines: &str, rest: impl AsRef<[u8]>) -> Vec<u8> {
    let request = Request::new("POST", "/v1/completions").only_headers(&format!("host: p\r\n{lines}"));
    [request.raw_body(rest).bytes(), behind()].concat()
}

/// `BODY` in a chunk.
fn in_chunks() -> Vec<u8> {
    [&chunk(BODY)[..], LAST_CHUNK.as_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_transfer_encoding_in_disguise_is_refused() {
    let mut cases = Vec::new();
    for disguise in DISGUISES {
        for length in ["Content-Length: 13\r\n", "Content-Length: 23\r\n"] {
            cases.push(format!("{length}{disguise}\r\n"));
            cases.push(format!("{disguise}\r\n{length}"));
        }
        cases.push(format!("{disguise}\r\n"));
    }
    assert_refused(cases.into_iter().map(|lines| (format!("{lines:?}"), post(&lines, in_chunks())))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_every_spelling_of_chunked_beside_a_length_is_refused() {
    let mut cases = Vec::new();
    for spelling in ["Transfer-Encoding: chunked", "TRANSFER-ENCODING:CHUNKED", "transfer-encoding:\tchunked \t"] {
        for length in ["13", "0", "23", "013"] {
            cases.push(format!("content-length: {length}\r\n{spelling}\r\n"));
            cases.push(format!("{spelling}\r\nContent-Length:{length}\r\n"));
        }
        // Alone it is what it says.
        let (upstream, app) = one().await;
        let request = Request::new("POST", "/v1/completions").only_headers(&format!("host: p\r\n{spelling}\r\n"));
        assert_eq!(app.ask(&request.raw_body(in_chunks())).await.status, 200, "{spelling:?}");
        assert_eq!(upstream.whole(0).await.body.bytes, BODY.as_bytes());
    }
    // HTTP/1.0 knows no chunks (RFC 9112, 6.1).
    let old = Request::new("POST", "/v1/completions").chunks([BODY.as_bytes()]).http10().bytes();
    let cases = cases.into_iter().map(|lines| (format!("{lines:?}"), post(&lines, in_chunks())));
    assert_refused(cases.chain([("HTTP/1.0".to_owned(), old)])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_lengths_that_are_none_are_refused() {
    assert_refused(LENGTHS.iter().map(|lines| (format!("{lines:?}"), post(&format!("{lines}\r\n"), BODY)))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_chunks_that_are_none_are_refused() {
    let sizes = CHUNK_SIZES.iter().map(|size| (format!("the size {size:?}"), format!("{size}\r\n{BODY}\r\n0\r\n\r\n")));
    let ends = [
        ("no line end after the bytes", "0\r\n\r\n"),
        ("another byte after the bytes", "x\r\n0\r\n\r\n"),
        ("only LF after the bytes", "\n0\r\n\r\n"),
        ("only CR after the bytes", "\r0\r\n\r\n"),
        ("only LF at the end", "\r\n0\r\n\n"),
        ("a trailer without a colon", "\r\n0\r\nnonsense\r\n\r\n"),
        ("a trailer with a blank", "\r\n0\r\nx : y\r\n\r\n"),
        ("a folded trailer", "\r\n0\r\nx: y\r\n z\r\n\r\n"),
        ("a trailer with a NUL", "\r\n0\r\nx: y\0\r\n\r\n"),
    ];
    let ends = ends.map(|(what, end)| (what.to_owned(), format!("d\r\n{BODY}{end}")));
    assert_refused(sizes.chain(ends).map(|(what, rest)| (what, post("transfer-encoding: chunked\r\n", rest)))).await;
}

/// RFC 9112, 3.2: the host decides nothing here, but it may in front of the proxy and behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_two_hosts_are_refused() {
    let (upstream, app) = one().await;
    let request = Request::chat("m").header("Host", "other.test");
    assert_eq!(app.ask(&request).await.status, 400);
    assert_eq!(upstream.count(), 0);
}

/// Line ends of LF alone are for a server to take or to leave (RFC 9112, 2.2); the engines behind this one leave them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_lines_that_end_in_lf_alone_are_refused() {
    let wire = String::from_utf8(Request::chat("m").bytes()).unwrap();
    let ends = wire.match_indices("\r\n").map(|(at, _)| at);
    let cases =
        ends.enumerate().map(|(line, at)| (format!("line {line}"), format!("{}{}", &wire[..at], &wire[at + 1..])));
    assert_refused(cases.map(|(what, wire)| (what, wire.into_bytes()))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_start_lines_that_are_none_are_refused() {
    let lines = [
        "POST  /v1/completions HTTP/1.1",
        "POST /v1/completions  HTTP/1.1",
        "POST\t/v1/completions\tHTTP/1.1",
        " POST /v1/completions HTTP/1.1",
        "POST /v1/completions HTTP/1.1 ",
        "POST /v1/completions HTTP/1.1 x",
        "POST /v1/comple tions HTTP/1.1",
        "POST /v1/completions",
        "POST /v1/completions http/1.1",
        "POST /v1/completions HTTP/1,1",
        "POST /v1/completions HTTP/01.1",
        "POST /v1/completions HTTP/1.1\r",
        "POST /v1/completions HTTP/2.0",
        "POST /v1/completions HTTP/3",
        "POST /v1/completions HTTPS/1.1",
        "POST /v1/completions\0 HTTP/1.1",
        "POST /v1/comple\x0btions HTTP/1.1",
        "PO\0ST /v1/completions HTTP/1.1",
        "PO:ST /v1/completions HTTP/1.1",
        "P\u{d6}ST /v1/completions HTTP/1.1",
        "/v1/completions HTTP/1.1",
        "POST HTTP/1.1",
        "CONNECT p.test:443 HTTP/1.1",
        "HTTP/1.1 200 OK",
    ];
    let wire = |line: &str| format!("{line}\r\nhost: p\r\ncontent-length: 13\r\n\r\n{BODY}");
    assert_refused(lines.iter().map(|line| (format!("{line:?}"), [wire(line).into_bytes(), behind()].concat()))).await;
}

// === by the thousand ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_ten_thousand_hostile_requests() {
    let seed = number_in("IT_SEED").unwrap_or(1);
    let cases = number_in("IT_CASE").map_or(0..CASES, |case| case as usize..case as usize + 1);
    let upstream = Upstream::start("a", &["m"]).await;
    let mut proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let addr = proxy.addr;
    let book = Arc::new(Book::default());

    // Threads, connections and the allocator's own needs are not what is measured: have them all once before.
    attack(addr, seed, CASES..CASES + 500, &book).await;
    let (before, sockets) = (proxy.resident(), proxy.open_sockets());

    let over = Arc::new(AtomicBool::new(false));
    let ordinary: Vec<_> = (0..ORDINARY).map(|_| tokio::spawn(ask_on(addr, Arc::clone(&over)))).collect();
    let since = Instant::now();
    attack(addr, seed, cases, &book).await;
    let took = since.elapsed();
    over.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for asked in ordinary {
        times.extend(asked.await.unwrap());
    }
    times.sort_unstable();
    let at = |percent: usize| times[times.len() * percent / 100];

    assert!(proxy.is_alive(), "seed {seed}: the proxy has died");
    eventually(format!("seed {seed}: nothing is in flight"), async || {
        proxy.metric("proxy_backend_inflight", &[]).await == Some(0.0)
    })
    .await;
    eventually(format!("seed {seed}: the connections are closed"), async || {
        // The connections to the backend may be kept.
        proxy.open_sockets() <= sockets + 2 * (ATTACKERS + ORDINARY)
    })
    .await;
    let growth = proxy.resident().saturating_sub(before);
    println!("h01: seed {seed}: {CASES} cases in {took:?}; answers by status: {:?}", book.statuses());
    println!(
        "h01: {} of {} requests that make sense were answered, {} requests reached the backend, {} of them whole",
        book.answered.load(Ordering::Relaxed),
        book.sent.load(Ordering::Relaxed),
        upstream.count(),
        (0..upstream.count()).filter(|n| upstream.peek(*n, |request| request.body.is_done()) == Some(true)).count(),
    );
    println!(
        "h01: {} ordinary requests meanwhile: p50 {:?}, p99 {:?}, longest {:?}; {growth} bytes of memory more",
        times.len(),
        at(50),
        at(99),
        times.last().unwrap()
    );
    book.check(&upstream, seed);
    assert!(at(99) < Duration::from_millis(250), "seed {seed}: p99 of the others {:?}", at(99));
    assert!(growth < 32 * 1024 * 1024, "seed {seed}: {growth} bytes of memory more");
    assert_eq!(Client::connect(addr).await.ask(&Request::chat("m")).await.status, 200);
}

#[expect(clippy::disallowed_methods, reason = "the only way to say what is to be repeated")]
fn number_in(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// What was sent, and what was said to it.
#[derive(Default)]
struct Book {
    /// All that a strict server would have read: by method and target, the bodies, and for each whether it is whole.
    readings: Mutex<HashMap<(String, String), Vec<(usize, Vec<u8>, bool)>>>,
    statuses: Mutex<HashMap<u16, usize>>,
    sent: AtomicUsize,
    answered: AtomicUsize,
}

// === impl Book ===

impl Book {
    fn enter(&self, case: usize, reading: &Reading) {
        let mut readings = self.readings.lock().unwrap();
        let mut enter = |request: &oracle::Request, whole: bool| {
            let key = (request.method.clone(), request.target.clone());
            readings.entry(key).or_default().push((case, request.body.clone(), whole));
        };
        reading.requests.iter().for_each(|request| enter(request, true));
        reading.begun.iter().for_each(|request| enter(request, false));
        self.sent.fetch_add(reading.requests.len(), Ordering::Relaxed);
    }

    fn note(&self, status: u16) {
        *self.statuses.lock().unwrap().entry(status).or_default() += 1;
    }

    fn statuses(&self) -> Vec<(u16, usize)> {
        let mut statuses: Vec<_> = self.statuses.lock().unwrap().iter().map(|(k, v)| (*k, *v)).collect();
        statuses.sort_unstable();
        statuses
    }

    /// Checks that all that reached the backend is what a strict server would have read.
    fn check(&self, upstream: &Upstream, seed: u64) {
        let readings = self.readings.lock().unwrap();
        let mut wrong = Vec::new();
        for index in 0..upstream.count() {
            let found = upstream.peek(index, |received| {
                let shown =
                    || format!("{:?} with body {:?}", received.head, String::from_utf8_lossy(&received.body.bytes));
                if let Some(what) = &received.malformed {
                    return Err(format!("{what} in {}", shown()));
                }
                let reading = oracle::read(&received.head.raw);
                if matches!(reading.ending, Ending::Broken(_)) || received.head.all("host").len() != 1 {
                    return Err(format!("{:?}: {}", reading.ending, shown()));
                }
                let body = &received.body.bytes;
                let key = (received.head.word(0).to_owned(), received.head.word(1).to_owned());
                if key.1 == "/v1/chat/completions" && ORDINARY_BODY.as_bytes().starts_with(body) {
                    return Ok(());
                }
                let known = readings.get(&key).into_iter().flatten().any(|(_, sent, whole)| {
                    if received.body.is_done() { *whole && sent == body } else { sent.starts_with(body) }
                });
                if known { Ok(()) } else { Err(format!("not sent like this: {}", shown())) }
            });
            if let Some(Err(what)) = found {
                wrong.push(what);
            }
        }
        let mut kinds: HashMap<String, (usize, String)> = HashMap::new();
        for shown in &wrong {
            // Every case has its number in what it sends.
            let tag = format!("c{seed}-");
            let digits = shown.split_once(&tag).map_or("", |(_, rest)| rest);
            let digits: String = digits.chars().take_while(char::is_ascii_digit).collect();
            let kind = digits.parse().map_or_else(
                |_| "of unknown origin".to_owned(),
                |number| {
                    let case = case::Case::of(seed, number);
                    format!("{}: {:?}", case.what, oracle::read(&case.wire).ending)
                },
            );
            let entry = kinds.entry(kind).or_insert_with(|| (0, format!("case {digits}: {shown}")));
            entry.0 += 1;
        }
        assert!(wrong.is_empty(), "seed {seed}: {} requests at the backend that nobody sent: {kinds:#?}", wrong.len());
    }
}

/// An ordinary client: one request after the other, and how long each took.
async fn ask_on(addr: std::net::SocketAddr, over: Arc<AtomicBool>) -> Vec<Duration> {
    let request = Request::post("/v1/chat/completions", ORDINARY_BODY);
    let mut client = Client::connect(addr).await;
    let mut times = Vec::new();
    loop {
        let since = Instant::now();
        let answer = client.ask(&request).await;
        times.push(since.elapsed());
        assert_eq!((answer.status, answer.end), (200, End::Whole), "{}", answer.text());
        if over.load(Ordering::Relaxed) {
            return times;
        }
        // A rhythm: they are here to measure, not to be the load.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Sends these cases, some at a time.
async fn attack(addr: std::net::SocketAddr, seed: u64, cases: std::ops::Range<usize>, book: &Arc<Book>) {
    let next = Arc::new(AtomicUsize::new(cases.start));
    let mut attackers = Vec::new();
    for _ in 0..ATTACKERS {
        let (next, book, end) = (Arc::clone(&next), Arc::clone(book), cases.end);
        attackers.push(tokio::spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= end {
                    return;
                }
                let case = case::Case::of(seed, number);
                let what = format!("seed {seed}, case {number} ({})", case.what);
                let sent = tokio::time::timeout(PATIENCE, send(addr, number, case, &book, &what)).await;
                assert!(sent.is_ok(), "{what}: not over within {PATIENCE:?}");
            }
        }));
    }
    for attacker in attackers {
        attacker.await.unwrap();
    }
}

/// Sends one case, and checks all that is answered.
async fn send(addr: std::net::SocketAddr, number: usize, case: case::Case, book: &Book, what: &str) {
    let reading = oracle::read(&case.wire);
    book.enter(number, &reading);
    let check = |answer: &Answer| {
        let status = answer.status;
        book.note(status);
        assert!(answer.head.start.starts_with("HTTP/1.1 ") || answer.head.start.starts_with("HTTP/1.0 "), "{what}");
        assert_eq!(answer.end, End::Whole, "{what}: {:?}", answer.head);
        // Nothing here fails but requests: no answer of the proxy's own may blame anything else.
        let known = [200, 204, 501, 505].contains(&status) || (400..500).contains(&status);
        assert!(known, "{what}: {status} {} to {:?}", answer.text(), String::from_utf8_lossy(&case.wire));
    };
    let mut client = Client::connect(addr).await;
    let sending = client.send_pieces_aside(case.pieces(), case.gap);
    if case.leaves {
        sending.done().await.ok();
        if number % 2 == 0 {
            client.vanish();
        }
        return;
    }
    for (answered, request) in reading.requests.iter().enumerate() {
        match client.next_answer(request.method == "HEAD").await {
            Ok(answer) => {
                check(&answer);
                if case.sound {
                    let unheard = request.body.windows(7).any(|word| word == b"unheard");
                    let expected: &[u16] = if unheard { &[404] } else { &[200, 204] };
                    assert!(expected.contains(&answer.status), "{what}: {} {}", answer.status, answer.text());
                }
                // Who answers before it has read all may well close, if it says so.
                if answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                    break;
                }
            }
            Err(end) if case.sound => panic!("{what}: {end:?} after {answered} answers to {:?}", case.pieces()),
            Err(_) => break,
        }
        book.answered.fetch_add(1, Ordering::Relaxed);
    }
    sending.done().await.ok();
    client.half_close();
    let held = async {
        if case.other_protocol {
            client.raw_to_end().await;
            return;
        }
        while let Ok(answer) = client.next_answer(reading.rest_is_head).await {
            check(&answer);
        }
    };
    let over = tokio::time::timeout(HELD_MAX, held).await;
    assert!(over.is_ok(), "{what}: held, though nothing more will come: {:?}", String::from_utf8_lossy(&case.wire));
}

/// The cases: a sound request, or several, and what is done to them.
mod case {
    use std::time::Duration;

    use bytes::Bytes;

    use super::{CHUNK_SIZES, DISGUISES, LENGTHS, Request, chunk};

    pub(super) struct Case {
        pub(super) what: &'static str,
        pub(super) wire: Vec<u8>,
        /// Nothing has been done to it.
        pub(super) sound: bool,
        /// The client leaves without a look at what is said.
        pub(super) leaves: bool,
        /// What comes back is not HTTP/1.
        pub(super) other_protocol: bool,
        /// Where it is cut into segments.
        cuts: Vec<usize>,
        /// The time between two of them.
        pub(super) gap: Duration,
    }

    type Rng = fastrand::Rng;

    impl Case {
        pub(super) fn of(seed: u64, number: usize) -> Self {
            let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64);
            let tag = format!("c{seed}-{number}");
            let (what, wire) = hostile(&mut rng, &tag);
            let mut cuts: Vec<usize> = match rng.u8(..10) {
                0 => (0..wire.len()).take(64).collect(),
                1..=3 => (0..rng.usize(1..6)).map(|_| rng.usize(..=wire.len())).collect(),
                _ => Vec::new(),
            };
            cuts.sort_unstable();
            Self {
                what,
                sound: what == "sound",
                leaves: what != "sound" && rng.u8(..12) == 0,
                other_protocol: what == "HTTP/2",
                gap: Duration::from_micros(if rng.bool() { 0 } else { rng.u64(..2_000) }),
                wire,
                cuts,
            }
        }

        /// What is sent, segment by segment.
        pub(super) fn pieces(&self) -> Vec<Bytes> {
            let mut pieces = Vec::new();
            let mut start = 0;
            for cut in self.cuts.iter().copied().chain([self.wire.len()]) {
                if cut > start {
                    pieces.push(Bytes::copy_from_slice(&self.wire[start..cut]));
                    start = cut;
                }
            }
            pieces
        }
    }

    /// One of `of`.
    fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
        of[rng.usize(..of.len())]
    }

    fn junk(rng: &mut Rng, most: usize) -> Vec<u8> {
        let n = rng.usize(1..=most);
        std::iter::repeat_with(|| rng.u8(..)).take(n).collect()
    }

    fn body(tag: &str) -> String {
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hello"}}],"who":"{tag}"}}"#)
    }

    /// A request that nothing is wrong with.
    fn sound(rng: &mut Rng, tag: &str) -> Vec<u8> {
        let body = body(tag);
        let request = match rng.u8(..14) {
            0 => Request::get("/v1/models"),
            1 => Request::get(&format!("/v1/realtime?model=m&who={tag}")),
            2 => Request::new("HEAD", &format!("/v1/realtime?model=m&who={tag}")),
            3 => Request::new("OPTIONS", "/v1/chat/completions"),
            4 => Request::new("DELETE", &format!("/v1/responses/{tag}")).body(&body),
            5 => Request::post(&format!("http://proxy.test/v1/completions?who={tag}"), &body),
            6 => Request::get("/healthz").http10().header("connection", "keep-alive"),
            7 => {
                let part = "Content-Disposition: form-data; name=\"model\"";
                let form = format!(
                    "--x\r\n{part}\r\n\r\nm\r\n--x\r\nContent-Disposition: form-data; name=\"who\"\r\n\r\n{tag}\r\n--x--\r\n"
                );
                Request::new("POST", "/v1/audio/transcriptions")
                    .header("content-type", "multipart/form-data; boundary=x")
                    .body(form)
            }
            8 => Request::chat("unheard"),
            9..=11 => {
                let size = rng.usize(1..40);
                Request::new("POST", "/v1/chat/completions").chunks(body.as_bytes().chunks(size))
            }
            _ => Request::post("/v1/chat/completions", &body),
        };
        request.header("x-who", tag).bytes()
    }

    fn post(tag: &str, lines: &str, rest: impl AsRef<[u8]>) -> Vec<u8> {
        let request = Request::new("POST", "/v1/completions");
        request.only_headers(&format!("host: p.test\r\nx-who: {tag}\r\n{lines}")).raw_body(rest).bytes()
    }

    fn chunked(tag: &str) -> Vec<u8> {
        [&chunk(body(tag))[..], b"0\r\n\r\n"].concat()
    }

    /// A request in place of the first `CRLF CRLF` of the other, and so on: bytes moved about.
    fn bent(rng: &mut Rng, mut wire: Vec<u8>) -> Vec<u8> {
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(..wire.len());
            match rng.u8(..9) {
                0..=2 => wire[at] ^= 1 << rng.u8(..8),
                3 => wire[at] = pick(rng, b"\0\t\n\x0b\x0c\r :,;\x7f\x80\xff0aA/%"),
                4 => wire.insert(at, pick(rng, b"\0\t\n\x0b\r :,;0")),
                5 => drop(wire.remove(at)),
                6 => {
                    let end = wire.len().min(at + rng.usize(1..40));
                    let again = wire[at..end].to_vec();
                    wire.splice(at..at, again);
                }
                7 => {
                    let end = wire.len().min(at + rng.usize(1..40));
                    wire.drain(at..end);
                }
                _ => {
                    let noise = junk(rng, 8);
                    wire.splice(at..at, noise);
                }
            }
            if wire.is_empty() {
                wire.push(b'G');
            }
        }
        wire
    }

    fn hostile(rng: &mut Rng, tag: &str) -> (&'static str, Vec<u8>) {
        let smuggled = format!("smuggled-{tag}");
        match rng.u8(..100) {
            0..=7 => ("sound", sound(rng, tag)),
            8..=11 => {
                let parts: Vec<Vec<u8>> = (0..rng.usize(2..6)).map(|n| sound(rng, &format!("{tag}-{n}"))).collect();
                ("sound", parts.concat())
            }
            12..=37 => {
                let wire = sound(rng, tag);
                ("bent", bent(rng, wire))
            }
            38..=43 => {
                let wire = sound(rng, tag);
                let cut = rng.usize(..wire.len());
                ("cut short", wire[..cut].to_vec())
            }
            44..=51 => {
                let (first, last) = (sound(rng, tag), sound(rng, &smuggled));
                let between = match rng.u8(..4) {
                    0 => junk(rng, 60),
                    1 => bent(rng, last.clone()),
                    2 => b"\r\n".repeat(rng.usize(1..6)),
                    _ => pick(
                        rng,
                        &["\n", "\r", " ", "\0", "0\r\n\r\n", "x: y\r\n\r\n", "GET", "HTTP/1.1 200 OK\r\n\r\n"],
                    )
                    .into(),
                };
                ("something between two", [first, between, last].concat())
            }
            52..=63 => {
                let disguise = pick(rng, &DISGUISES);
                let length = body(tag).len() + rng.usize(..30) - 5;
                let lines = match rng.u8(..4) {
                    0 => format!("{disguise}\r\n"),
                    1 => format!("content-length: {length}\r\n{disguise}\r\n"),
                    2 => format!("{disguise}\r\ncontent-length: {length}\r\n"),
                    _ => format!("transfer-encoding: chunked\r\n{disguise}\r\n"),
                };
                let wire = [post(tag, &lines, chunked(tag)), sound(rng, &smuggled)].concat();
                ("a transfer encoding in disguise", wire)
            }
            64..=70 => {
                let spelling = pick(
                    rng,
                    &["Transfer-Encoding: chunked", "TRANSFER-ENCODING:\tCHUNKED\t", "transfer-encoding:chunked"],
                );
                let inner = sound(rng, &smuggled);
                let rest = match rng.u8(..3) {
                    0 => [&chunk(&inner)[..], b"0\r\n\r\n"].concat(),
                    1 => [b"0\r\n\r\n", &inner[..]].concat(),
                    _ => [&chunked(tag)[..], &inner].concat(),
                };
                let length = rng.usize(..=rest.len());
                let lines = match rng.u8(..3) {
                    0 => format!("content-length: {length}\r\n{spelling}\r\n"),
                    1 => format!("{spelling}\r\ncontent-length: {length}\r\n"),
                    _ => format!("{spelling}\r\n"),
                };
                ("two framings", post(tag, &lines, rest))
            }
            71..=76 => {
                let lines = format!("{}\r\n", pick(rng, &LENGTHS).replace("13", &body(tag).len().to_string()));
                let more = if rng.bool() { "content-length: 3\r\n" } else { "" };
                let wire = [post(tag, &format!("{lines}{more}"), body(tag)), sound(rng, &smuggled)].concat();
                ("a length that is none", wire)
            }
            77..=84 => {
                let (text, trick) = (body(tag), pick(rng, &CHUNK_SIZES));
                let size = trick.replace('d', &format!("{:x}", text.len()));
                let extension = match rng.u8(..6) {
                    0 => format!(";x={}", "y".repeat(rng.usize(1..100_000))),
                    1 => ";a=\"b\r\nc\"".to_owned(),
                    2 => ";".repeat(rng.usize(1..300)),
                    _ => String::new(),
                };
                let end = pick(
                    rng,
                    &[
                        "\r\n0\r\n\r\n",
                        "0\r\n\r\n",
                        "\n0\r\n\r\n",
                        "\r\n0\n\n",
                        "\r\n00000000000\r\n\r\n",
                        "\r\n0\r\nx: y\r\n z\r\n\r\n",
                        "\r\n0\r\nContent-Length: 5\r\n\r\n",
                        "\r\n-0\r\n\r\n",
                    ],
                );
                let rest = format!("{size}{extension}\r\n{text}{end}");
                (
                    "a chunk that is none",
                    [post(tag, "transfer-encoding: chunked\r\n", rest), sound(rng, &smuggled)].concat(),
                )
            }
            85..=90 => {
                let target = pick(
                    rng,
                    &[
                        "*",
                        "/",
                        "",
                        "p.test:443",
                        "http://",
                        "http:///v1/completions",
                        "//v1/completions",
                        "/v1/completions HTTP/1.1\r\nx: y",
                        "ftp://p/v1/completions",
                        "/v1/../v1/completions",
                        "/v1/completions?model=m#x",
                        "\u{e9}",
                        "/v1/%",
                        "/v1/completions?\0",
                        "/v1/comp\x7f",
                    ],
                );
                let method = pick(
                    rng,
                    &[
                        "POST",
                        "CONNECT",
                        "TRACE",
                        "PRI",
                        "post",
                        "P\u{d6}ST",
                        "",
                        "GET ",
                        "OPTIONS",
                        "HEAD",
                        "M-SEARCH",
                    ],
                );
                let version = pick(
                    rng,
                    &[
                        "HTTP/1.1",
                        "HTTP/1.0",
                        "HTTP/0.9",
                        "HTTP/1.2",
                        "HTTP/2.0",
                        "HTTP/9.9",
                        "http/1.1",
                        "HTTP/1.1 ",
                        "HTTP/1.",
                        "HTTP/11",
                        "HTTP/1.10",
                        "",
                        "ICY",
                    ],
                );
                let text = body(tag);
                let wire =
                    format!("{method} {target} {version}\r\nhost: p\r\ncontent-length: {}\r\n\r\n{text}", text.len());
                ("a start line", [wire.into_bytes(), sound(rng, &smuggled)].concat())
            }
            91..=93 => {
                let lines = match rng.u8(..5) {
                    0 => "x: y\r\n".repeat(rng.usize(100..5_000)),
                    1 => format!("x: {}\r\n", "y".repeat(rng.usize(10_000..300_000))),
                    2 => format!("{}: y\r\n", "x".repeat(rng.usize(1_000..100_000))),
                    3 => format!("x: y\r\n{}", " z\r\n".repeat(rng.usize(1..5_000))),
                    _ => format!("host: {}\r\n", "h".repeat(rng.usize(1..70_000))),
                };
                let text = body(tag);
                ("a large head", post(tag, &format!("{lines}content-length: {}\r\n", text.len()), text))
            }
            94..=95 => {
                let lines = pick(
                    rng,
                    &[
                        "x\r\n",
                        ": y\r\n",
                        "x : y\r\n",
                        "x\0: y\r\n",
                        "x: \0\r\n",
                        "x: a\rb\r\n",
                        "x: a\nb: c\r\n",
                        "\r\n",
                        "x(y): z\r\n",
                        "host: other\r\n",
                        "expect: 100-continue\r\n",
                        "expect: 200-ok\r\n",
                        "connection: close\r\n",
                        "connection: content-length\r\n",
                        "connection: transfer-encoding, host\r\n",
                        "upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
                        "x: \u{80}\u{ff}\r\n",
                        "content-length: 0\r\n",
                    ],
                );
                let text = body(tag);
                let wire = post(tag, &format!("{lines}content-length: {}\r\n", text.len()), text);
                ("an odd line", [wire, sound(rng, &smuggled)].concat())
            }
            96..=97 => {
                let begin: &[u8] = pick(
                    rng,
                    &[
                        &b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"[..],
                        b"SSH-2.0-x\r\n",
                        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
                        b"\r\n\r\n\x00\r\nQUIT\n",
                        b"\0\0\0\0",
                        b"",
                        b"{\"model\":\"m\"}\r\n\r\n",
                        b"EHLO p\r\n",
                    ],
                );
                ("another protocol", [begin, &junk(rng, 300)].concat())
            }
            _ => {
                let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
                let cut = rng.usize(1..=preface.len());
                ("HTTP/2", [&preface[..cut], &junk(rng, 300)].concat())
            }
        }
    }
}

/// HTTP/1.1 as the strictest of servers reads it (RFC 9112). What it accepts beyond that says why.
mod oracle {
    #[derive(Clone, Debug, Default)]
    pub(super) struct Request {
        pub(super) method: String,
        /// As a backend gets it: without scheme, host and fragment.
        pub(super) target: String,
        pub(super) body: Vec<u8>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) enum Ending {
        /// Nothing is left over.
        Clean,
        /// What is left over is the begin of something.
        Incomplete,
        /// What is left over is nothing, for this reason.
        Broken(&'static str),
    }

    #[derive(Debug)]
    pub(super) struct Reading {
        pub(super) requests: Vec<Request>,
        /// One whose head is in order, and whose body is not, or not yet: as far as it goes.
        pub(super) begun: Option<Request>,
        pub(super) ending: Ending,
        /// What is left over asks, or seems to ask, for a head only.
        pub(super) rest_is_head: bool,
    }

    enum Framing {
        Length(u64),
        Chunked,
    }

    /// Why reading stops: nothing more is there, or something wrong is.
    enum Stop {
        Short,
        Wrong(&'static str),
    }

    struct Reader<'b> {
        bytes: &'b [u8],
        at: usize,
    }

    pub(super) fn read(bytes: &[u8]) -> Reading {
        let mut reader = Reader { bytes, at: 0 };
        let mut reading = Reading { requests: Vec::new(), begun: None, ending: Ending::Clean, rest_is_head: false };
        loop {
            // Empty lines before a request are passed over (RFC 9112, 2.2).
            while reader.bytes[reader.at..].starts_with(b"\r\n") {
                reader.at += 2;
            }
            if reader.at == bytes.len() {
                return reading;
            }
            reading.rest_is_head = bytes[reader.at..].starts_with(b"HEAD ");
            let stop = match reader.head() {
                Ok((mut request, framing, closes)) => match reader.body(framing, &mut request.body) {
                    Ok(()) => {
                        reading.requests.push(request);
                        if closes {
                            return reading;
                        }
                        continue;
                    }
                    Err(stop) => {
                        reading.begun = Some(request);
                        stop
                    }
                },
                Err(stop) => stop,
            };
            reading.ending = match stop {
                Stop::Short => Ending::Incomplete,
                Stop::Wrong(why) => Ending::Broken(why),
            };
            return reading;
        }
    }

    fn is_token(bytes: &[u8]) -> bool {
        !bytes.is_empty() && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
    }

    fn trimmed(mut bytes: &[u8]) -> &[u8] {
        while let [b' ' | b'\t', rest @ ..] = bytes {
            bytes = rest;
        }
        while let [rest @ .., b' ' | b'\t'] = bytes {
            bytes = rest;
        }
        bytes
    }

    // === impl Reader ===

    impl<'b> Reader<'b> {
        /// A line, without its end.
        fn line(&mut self) -> Result<&'b [u8], Stop> {
            let rest = &self.bytes[self.at..];
            let end = rest.iter().position(|b| *b == b'\n').ok_or(Stop::Short)?;
            let line = rest[..end].strip_suffix(b"\r").ok_or(Stop::Wrong("LF alone"))?;
            if line.iter().any(|b| matches!(b, b'\r' | b'\0')) {
                return Err(Stop::Wrong("CR or NUL in a line"));
            }
            self.at += end + 1;
            Ok(line)
        }

        fn head(&mut self) -> Result<(Request, Framing, bool), Stop> {
            // All of it must be there before any of it counts, as for those who wait for the empty line.
            let line = self.line()?;
            let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
            let [method, target, version] = words[..] else { return Err(Stop::Wrong("start line")) };
            let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'0'..=b'9'] = version else {
                return Err(Stop::Wrong("version"));
            };
            let old = *minor == b'0';
            if !is_token(method) || target.is_empty() || target.iter().any(|b| *b <= b' ' || *b == 0x7f) {
                return Err(Stop::Wrong("method or target"));
            }
            if method == b"CONNECT" {
                return Err(Stop::Wrong("CONNECT"));
            }
            let (mut length, mut chunked, mut closes) = (None, false, old);
            while let Some((name, value)) = self.field()? {
                match name.to_ascii_lowercase().as_slice() {
                    b"content-length" => {
                        // A list of one number again and again may be taken for that number (RFC 9110, 8.6).
                        for number in value.split(|b| *b == b',') {
                            let number = trimmed(number);
                            if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
                                return Err(Stop::Wrong("length"));
                            }
                            let text = std::str::from_utf8(number).unwrap_or_default();
                            let number: u64 = text.parse().map_err(|_| Stop::Wrong("length"))?;
                            if length.is_some_and(|other| other != number) {
                                return Err(Stop::Wrong("two lengths"));
                            }
                            length = Some(number);
                        }
                    }
                    b"transfer-encoding" if chunked => return Err(Stop::Wrong("two transfer encodings")),
                    b"transfer-encoding" if !value.eq_ignore_ascii_case(b"chunked") => {
                        return Err(Stop::Wrong("transfer encoding"));
                    }
                    b"transfer-encoding" => chunked = true,
                    b"connection" => {
                        for option in value.split(|b| *b == b',') {
                            closes |= trimmed(option).eq_ignore_ascii_case(b"close");
                            closes &= !(old && trimmed(option).eq_ignore_ascii_case(b"keep-alive"));
                        }
                    }
                    _ => {}
                }
            }
            let framing = match (length, chunked) {
                (Some(_), true) => return Err(Stop::Wrong("length and transfer encoding")),
                (None, true) if old => return Err(Stop::Wrong("chunks in HTTP/1.0")),
                (None, true) => Framing::Chunked,
                (length, false) => Framing::Length(length.unwrap_or(0)),
            };
            let text = String::from_utf8_lossy(target).into_owned();
            let target = match text.split_once("://") {
                Some((_, rest)) if !text.starts_with('/') => {
                    rest.find(['/', '?']).map_or_else(|| "/".to_owned(), |at| rest[at..].to_owned())
                }
                _ => text,
            };
            let target = target.split('#').next().unwrap_or_default().to_owned();
            let method = String::from_utf8_lossy(method).into_owned();
            Ok((Request { method, target, body: Vec::new() }, framing, closes))
        }

        /// A field of a head or of trailers; none at the empty line.
        fn field(&mut self) -> Result<Option<(&'b [u8], &'b [u8])>, Stop> {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(None);
            }
            let colon = line.iter().position(|b| *b == b':').ok_or(Stop::Wrong("no colon"))?;
            if !is_token(&line[..colon]) {
                return Err(Stop::Wrong("name"));
            }
            Ok(Some((&line[..colon], trimmed(&line[colon + 1..]))))
        }

        fn body(&mut self, framing: Framing, body: &mut Vec<u8>) -> Result<(), Stop> {
            match framing {
                Framing::Length(length) => self.take(length, body),
                Framing::Chunked => loop {
                    let line = self.line()?;
                    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
                    // Blanks before an extension, or in place of one, are bad and change nothing (RFC 9112, 7.1.1).
                    let rest = trimmed(&line[digits..]);
                    if !rest.is_empty() && !rest.starts_with(b";") {
                        return Err(Stop::Wrong("chunk size"));
                    }
                    let text = std::str::from_utf8(&line[..digits]).unwrap_or_default();
                    let size = u64::from_str_radix(text, 16).map_err(|_| Stop::Wrong("chunk size"))?;
                    if size == 0 {
                        while self.field()?.is_some() {}
                        return Ok(());
                    }
                    self.take(size, body)?;
                    match self.bytes.get(self.at..self.at + 2) {
                        Some(b"\r\n") => self.at += 2,
                        None if b"\r\n".starts_with(&self.bytes[self.at..]) => return Err(Stop::Short),
                        _ => return Err(Stop::Wrong("chunk end")),
                    }
                },
            }
        }

        fn take(&mut self, length: u64, body: &mut Vec<u8>) -> Result<(), Stop> {
            let rest = &self.bytes[self.at..];
            let n = rest.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            body.extend_from_slice(&rest[..n]);
            self.at += n;
            if n as u64 == length { Ok(()) } else { Err(Stop::Short) }
        }
    }

    #[test]
    fn it_reads_what_is_sound_and_nothing_else() {
        let check = |wire: &str, bodies: &[&str], ending: Ending| {
            let reading = read(wire.as_bytes());
            let found: Vec<String> =
                reading.requests.iter().map(|request| String::from_utf8_lossy(&request.body).into_owned()).collect();
            assert_eq!((found, reading.ending), (bodies.iter().map(|s| (*s).to_owned()).collect(), ending), "{wire:?}");
        };
        let get = "GET /a HTTP/1.1\r\nhost: h\r\n\r\n";
        let two = "POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\nab";
        let chunks = "POST /a HTTP/1.1\r\ntransfer-encoding:\tChunked\r\n\r\n1 ;x\r\na\r\n01\r\nb\r\n0\r\nt: 1\r\n\r\n";
        check(&[get, two, chunks, "\r\n", get].concat(), &["", "ab", "ab", ""], Ending::Clean);
        for wire in [two, chunks] {
            for cut in 1..wire.len() {
                check(&wire[..cut], &[], Ending::Incomplete);
            }
        }
        check("GET / HTTP/1.1\r\nconnection: x, Close\r\n\r\nGET", &[""], Ending::Clean);
        check("GET / HTTP/1.0\r\n\r\nGET", &[""], Ending::Clean);
        check("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\nGET", &[""], Ending::Incomplete);
        check("GET / HTTP/1.1\n\n", &[], Ending::Broken("LF alone"));
        check("GET / HTTP/1.1\r\n a: b\r\n\r\n", &[], Ending::Broken("name"));
        check("GET / HTTP/1.1\r\na : b\r\n\r\n", &[], Ending::Broken("name"));
        check(&two.replace("2\r\n", "2\r\ncontent-length: 3\r\n"), &[], Ending::Broken("two lengths"));
        check(&two.replace("2\r\n", "2\r\ncontent-length: 2, 02\r\n"), &["ab"], Ending::Clean);
        check(
            &chunks.replace("\r\n\r\n1", "\r\ncontent-length: 2\r\n\r\n1"),
            &[],
            Ending::Broken("length and transfer encoding"),
        );
        check(&chunks.replace("HTTP/1.1", "HTTP/1.0"), &[], Ending::Broken("chunks in HTTP/1.0"));
        check(&chunks.replace("1 ;x", "+1"), &[], Ending::Broken("chunk size"));
        check(&chunks.replace("a\r\n01", "ab\r\n01"), &[], Ending::Broken("chunk end"));
        let absolute = read(b"GET http://h:1/a?b#c HTTP/1.1\r\n\r\n");
        assert_eq!(absolute.requests[0].target, "/a?b");
    }
}
