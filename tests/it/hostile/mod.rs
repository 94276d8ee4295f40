//! H1: requests that are made to be read in two ways, and such as make no sense at all, by the thousand, beside ordinary
//! traffic.
//!
//! `oracle` reads what a case sends as the strictest of servers would (RFC 9112). Whatever reaches the backend must be a
//! request that it read there, with the same method, target and body; it may refuse more than that, never less.
//!
//! A run is made of one seed. It is the same in every run; `IT_SEED=1234` makes another one, `IT_CASE=567` sends one case
//! of it alone. Seed and case are in every failure.

mod case;
mod oracle;

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
async fn h01_nothing_is_read_behind_a_body_whose_framing_is_broken() {
    let (upstream, app) = one().await;
    // The extension of the second chunk is longer than any may be. Who took up reading at the beginning of the segment, in
    // the middle of that extension, would find a chunk of 512 bytes, the end of the body and another request.
    let broken = format!("\r\n200;{}\r\n0\r\n\r\n", "x".repeat(508));
    let first = Request::new("POST", "/v1/chat/completions").header("transfer-encoding", "chunked").raw_body("1\r\n{");
    let mut client = app.client().await;
    client.send_pieces([&first.bytes()[..]], std::time::Duration::from_millis(100)).await;
    client.try_send([broken.as_bytes(), &Request::chat("m").header("connection", "close").bytes()].concat()).await.ok();
    let refusal = client.answer().await;
    assert_openai_error(&refusal, 400, "invalid_request");
    let (behind, _) = client.raw_to_end().await;
    assert_eq!(String::from_utf8_lossy(&behind), "");
    assert_eq!(upstream.count(), 0);
    assert_eq!(refusal.header("connection"), Some("close"));
}

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
    // Far above what it is on any machine that is not choking, and far below what a stall would make of it.
    assert!(at(99) < Duration::from_secs(1), "seed {seed}: p99 of the others {:?}", at(99));
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
    /// All that a strict server would have read, by method and target.
    readings: Mutex<HashMap<(String, String), Vec<Sent>>>,
    statuses: Mutex<HashMap<u16, usize>>,
    sent: AtomicUsize,
    answered: AtomicUsize,
}

/// A body, as far as it is in order.
struct Sent {
    body: Vec<u8>,
    whole: bool,
}

// === impl Book ===

impl Book {
    fn enter(&self, reading: &Reading) {
        let mut readings = self.readings.lock().unwrap();
        let mut enter = |request: &oracle::Request, whole: bool| {
            let key = (request.method.clone(), request.target.clone());
            readings.entry(key).or_default().push(Sent { body: request.body.clone(), whole });
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
                let known = readings.get(&key).into_iter().flatten().any(|sent| {
                    if received.body.is_done() { sent.whole && sent.body == *body } else { sent.body.starts_with(body) }
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
    book.enter(&reading);
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
        if number.is_multiple_of(2) {
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
