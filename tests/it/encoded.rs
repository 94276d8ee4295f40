//! R1 and H1 for bodies with a Content-Encoding: gzip is looked into and passed on as it came, everything else is refused
//! unless the model stands beside it and servers take raw bytes there, and what is made to swell costs neither time nor memory.
//!
//! The bytes are made by hand (RFC 1951, RFC 1952): a mistake of a library that the proxy is built on must not be able to
//! hide itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::support::*;

const MIB: usize = 1024 * 1024;

/// What an ordinary encoder made of `PLAIN`, with codes of its own and references to what was before.
const ENCODED: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03U\x8eA\x0a\x83@\x0cE\xaf2\xfc\xf5 \xddt3\xd7\
    \xe8\xaa\xd4.B\x8d\x8e0:\x92DD\xc4\xbbwZA\x10\x02\x09\x1f\xf2\xde\xdf0\xb0*u\xac\x08\xaf\x0d\x92\x13#@W5\
    \x1e\xe0\xf1\xc9\xa3\xf1h%z\xe6\xd9\x91\xb0#\x179M\xed\x9c\x1c\xa9\xf6j4Z\xe5j\x0c\xb9\xe1T#\xd4X$\x8f]\
    \x0d\xec\xfe\xc4\xcd\xcar\x81=h\xfdaR\xf6\x97\xe5\xacLd\xb7dI\x8d?\xceX\x10GPa\x7f\xfbR\xd7\xa8!#\x84\
    \xed\x90\x16\xdc_Y\x84(\xa5'\x16\xb2Y\x8a\xf6V\xdd=\xd4\x84i@h))\xfb\xf3C\xfa.\x1a\xf6/\xac\xa4X\x14\xfe\
    \x00\x00\x00";

const PLAIN: &str = r#"{"messages":[{"role":"system","content":"You are a helpful assistant. \"model\":\"wrong\""},{"role":"user","content":"Say hello, hello, hello to the world, the whole world."}],"metadata":{"model":"wrong"},"temperature":0.5,"stream":false,"model":"right"}"#;

/// The head of a member: gzip, deflate, nothing optional.
const HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

/// The begin of a block with its own codes: the letter `x`, then as many copies of it as references follow. Each reference
/// takes two bits, both 0, for 258 bytes.
const RUN: [u8; 13] = [0xec, 0xc0, 0x81, 0, 0, 0, 0, 0x80, 0x20, 0xed, 0xf1, 0x17, 0xa9];

/// The end of that block, and an empty one after it that ends with a whole byte.
const RUN_END: [u8; 5] = [6, 0, 0, 0xff, 0xff];

/// How much one byte of references stands for.
const RUN_FACTOR: usize = 4 * 258;

/// What is compressed, piece by piece.
enum Piece<'a> {
    /// These bytes, as they are.
    Stored(&'a [u8]),
    /// An `x`, and this many times 1032 more.
    Run(usize),
}

/// Two backends and a proxy in front of them: `right` has the model `right`, `wrong` has `wrong`.
struct Fork {
    right: Upstream,
    wrong: Upstream,
    app: TestApp,
}

// === impl Piece ===

impl Piece<'_> {
    fn deflated(&self, last: bool) -> Vec<u8> {
        match self {
            Piece::Stored(bytes) => {
                let mut blocks: Vec<&[u8]> = bytes.chunks(usize::from(u16::MAX)).collect();
                if blocks.is_empty() {
                    blocks.push(&[]);
                }
                let mut out = Vec::new();
                for (index, block) in blocks.iter().enumerate() {
                    let length = u16::try_from(block.len()).unwrap();
                    out.push(u8::from(last && index + 1 == blocks.len()));
                    out.extend(length.to_le_bytes());
                    out.extend((!length).to_le_bytes());
                    out.extend_from_slice(block);
                }
                out
            }
            Piece::Run(n) => {
                assert!(!last, "a run must be followed by something stored");
                [&RUN[..], &vec![0; *n], &RUN_END].concat()
            }
        }
    }

    fn plain(&self) -> Vec<u8> {
        match self {
            Piece::Stored(bytes) => bytes.to_vec(),
            Piece::Run(n) => vec![b'x'; 1 + n * RUN_FACTOR],
        }
    }
}

/// CRC-32 as gzip has it, of the polynomial 0xedb88320.
fn crc32(bytes: impl IntoIterator<Item = u8>) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|byte| (0..8).fold(byte, |c, _| if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 }))
        .collect();
    !bytes.into_iter().fold(!0, |c, byte| table[((c ^ u32::from(byte)) & 0xff) as usize] ^ (c >> 8))
}

fn member(head: &[u8], pieces: &[Piece<'_>], crc: u32, length: u32) -> Vec<u8> {
    let mut out = head.to_vec();
    for (index, piece) in pieces.iter().enumerate() {
        out.extend(piece.deflated(index + 1 == pieces.len()));
    }
    out.extend(crc.to_le_bytes());
    out.extend(length.to_le_bytes());
    out
}

fn gzip_pieces(pieces: &[Piece<'_>]) -> Vec<u8> {
    let plain = pieces.iter().flat_map(Piece::plain).collect::<Vec<u8>>();
    member(&HEAD, pieces, crc32(plain.iter().copied()), u32::try_from(plain.len()).unwrap())
}

fn gzip(plain: impl AsRef<[u8]>) -> Vec<u8> {
    gzip_pieces(&[Piece::Stored(plain.as_ref())])
}

/// A member with every optional field in its head.
fn gzip_with_names(plain: &[u8]) -> Vec<u8> {
    let mut head = HEAD.to_vec();
    head[3] = 0b11110;
    head.extend([4, 0, b'i', b't', 0, 0]);
    head.extend(b"a name {\"model\":\"wrong\"}\0");
    head.extend(b"a comment\0");
    let sum = crc32(head.iter().copied()) as u16;
    head.extend(sum.to_le_bytes());
    member(&head, &[Piece::Stored(plain)], crc32(plain.iter().copied()), u32::try_from(plain.len()).unwrap())
}

fn coded(coding: &str, body: impl AsRef<[u8]>) -> Request {
    Request::post("/v1/chat/completions", body).header("Content-Encoding", coding)
}

/// Runs of at least `len` bytes in all that come to some hundred times their size, as no text does and a bomb does ten times.
fn runs<'a>(len: usize) -> Vec<Piece<'a>> {
    (0..=len / (2 * RUN_FACTOR)).map(|_| Piece::Run(2)).collect()
}

/// The gzip of `begin`, runs of `len` bytes, and `end`.
fn around_runs(begin: &[u8], len: usize, end: &[u8]) -> Vec<u8> {
    let mut pieces = vec![Piece::Stored(begin)];
    pieces.extend(runs(len));
    pieces.push(Piece::Stored(end));
    gzip_pieces(&pieces)
}

/// `{"prompt":"…","model":"right"}` with a prompt of at least `len` bytes, as gzip.
fn model_last(len: usize) -> Vec<u8> {
    around_runs(br#"{"prompt":"\"model\":\"wrong\" "#, len, br#"","model":"right"}"#)
}

// === impl Fork ===

impl Fork {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(knobs: &[(&str, &str)]) -> Self {
        let right = Upstream::start("right", &["right"]).await;
        let wrong = Upstream::start("wrong", &["wrong"]).await;
        let app = TestApp::start_with_backends(knobs, &[&right, &wrong]).await;
        Self { right, wrong, app }
    }

    /// Checks that the request is served by the right backend, which gets the body and its coding as they were sent.
    async fn assert_served(&self, request: &Request, body: &[u8], coding: &str, what: &str) {
        let index = self.right.count();
        let answer = self.app.ask(request).await;
        assert_eq!(answer.status, 200, "{what}: {}", answer.text());
        assert_eq!((self.right.count(), self.wrong.count()), (index + 1, 0), "{what}: went the wrong way");
        let same = self.right.peek(index, |request| request.body.is_done() && request.body.bytes == body);
        assert_eq!(same, Some(true), "{what}: the bytes differ");
        let head = self.right.request(index).await.head;
        assert_eq!(head.all("content-encoding"), [coding], "{what}");
    }

    /// Checks that the request is refused as the client's fault, and that no backend got all of it.
    async fn assert_refused(&self, request: &Request, what: &str) -> Answer {
        let answer = self.app.ask(request).await;
        assert_eq!(answer.status, 400, "{what}: {}", answer.text());
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error", "{what}");
        self.assert_nothing_whole(what);
        answer
    }

    #[track_caller]
    fn assert_nothing_whole(&self, what: &str) {
        assert!(!self.right.has_whole_request() && !self.wrong.has_whole_request(), "{what}: a backend got it all");
    }
}

// === routed ===

#[test]
fn the_hand_made_bytes_are_what_they_claim() {
    assert_eq!(crc32(*b"123456789"), 0xcbf4_3926);
    let trailer = [crc32(PLAIN.bytes()).to_le_bytes(), u32::try_from(PLAIN.len()).unwrap().to_le_bytes()].concat();
    assert!(ENCODED.ends_with(&trailer));
    let long = gzip(vec![b'x'; 70_000]);
    assert_eq!(long.len(), 10 + 2 * 5 + 70_000 + 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_is_routed_by_the_model_inside() {
    let fork = Fork::start().await;
    let (begin, end) = PLAIN.split_at(100);
    let bodies: [(&str, Vec<u8>); 7] = [
        ("stored", gzip(PLAIN)),
        ("an encoder's", ENCODED.to_vec()),
        ("a head with names", gzip_with_names(PLAIN.as_bytes())),
        ("two members", [gzip(begin), gzip(end)].concat()),
        ("an empty member", [gzip(""), ENCODED.to_vec(), gzip("")].concat()),
        ("model first", gzip(r#"{"model":"right","messages":[]}"#)),
        ("escapes", gzip(r#"{"a":{"model":"wrong"},"mod\u0065l":"r\u0069ght"}"#)),
    ];
    for (what, body) in &bodies {
        for coding in ["gzip", "GZip", "x-gzip"] {
            fork.assert_served(&coded(coding, body), body, coding, what).await;
        }
        for size in [1, 7, 4096] {
            let request =
                Request::new("POST", "/v1/completions").header("content-encoding", "gzip").chunks(body.chunks(size));
            fork.assert_served(&request, body, "gzip", &format!("{what} in chunks of {size}")).await;
        }
    }
    fork.app.inflight_is("right", "right", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_under_every_split() {
    let fork = Fork::start().await;
    let mut client = fork.app.client().await;
    let wire = coded("gzip", ENCODED).bytes();
    let head_len = wire.len() - ENCODED.len();
    for cut in (0..ENCODED.len()).step_by(5) {
        client.send_pieces([&wire[..head_len + cut], &wire[head_len + cut..]], Duration::from_millis(1)).await;
        assert_eq!(client.answer().await.status, 200, "cut at {cut}");
    }
    client.send_pieces(wire.chunks(1), Duration::from_micros(500)).await;
    assert_eq!(client.answer().await.status, 200, "one byte per segment");
    assert_eq!(fork.wrong.count(), 0);
    for index in 0..fork.right.count() {
        assert_eq!(fork.right.peek(index, |request| request.body.bytes == ENCODED), Some(true));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_with_its_model_after_five_mebibytes() {
    let fork = Fork::start().await;
    let line = r#"a line with \"model\":\"wrong\" and a \\ in it, é, and some words to make it long. "#;
    let text = line.repeat(5 * MIB / line.len() + 1);
    let last = format!(r#"{{"messages":[{{"content":"{text}","model":"wrong"}}],"model":"right"}}"#);
    let first = format!(r#"{{"model":"right","messages":[{{"content":"{text}","model":"wrong"}}]}}"#);
    for (what, body) in
        [("stored, last", gzip(&last)), ("stored, first", gzip(&first)), ("a run, last", model_last(5 * MIB))]
    {
        fork.assert_served(&coded("gzip", &body), &body, "gzip", what).await;
        let request =
            Request::new("POST", "/v1/completions").header("content-encoding", "gzip").chunks(body.chunks(60_000));
        fork.assert_served(&request, &body, "gzip", what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_is_sent_again_as_it_was() {
    let (a, b) = (Upstream::start("a", &["right"]).await, Upstream::start("b", &["right"]).await);
    let app = TestApp::with(&[&a, &b]).await;
    a.always(vec![Step::ReadBody, Step::Reset]);
    let deadline = Instant::now() + PATIENCE;
    while a.count() == 0 {
        assert!(Instant::now() < deadline, "no request reaches a");
        assert_eq!(app.ask(&coded("gzip", ENCODED)).await.status, 200);
    }
    for index in 0..b.count() {
        assert_eq!(b.peek(index, |request| request.body.bytes == ENCODED), Some(true));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_identity_is_no_coding() {
    let fork = Fork::start().await;
    fork.assert_served(&coded("identity", PLAIN), PLAIN.as_bytes(), "identity", "identity").await;
    // Nor is what a body looks like: only its header says that it is coded.
    let answer = fork.app.ask(&Request::post("/v1/chat/completions", ENCODED)).await;
    assert_openai_error(&answer, 400, "invalid_json");
    assert_eq!((fork.right.count(), fork.wrong.count()), (1, 0));
}

// === refused ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_that_names_no_model_or_two_is_refused() {
    let fork = Fork::start().await;
    let two_members = [gzip(r#"{"model":"right"}"#), gzip(r#"{"model":"wrong"}"#)].concat();
    let across = [gzip(r#"{"model":"right","#), gzip(r#""model":"wrong"}"#)].concat();
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("nothing", gzip(""), ""),
        ("no model", gzip(r#"{"messages":[]}"#), "model_required"),
        ("an empty model", gzip(r#"{"model":""}"#), "model_required"),
        ("no JSON", gzip("hello"), "invalid_json"),
        ("half of it", gzip(&PLAIN[..PLAIN.len() - 1]), "invalid_json"),
        ("two models", gzip(r#"{"model":"right","messages":[],"model":"wrong"}"#), ""),
        ("two bodies in two members", two_members, ""),
        ("two models in two members", across, ""),
        ("gzip in gzip", gzip(ENCODED), "invalid_json"),
    ];
    for (what, body, code) in cases {
        for request in [
            coded("gzip", &body),
            Request::new("POST", "/v1/completions").header("content-encoding", "gzip").chunks(body.chunks(3)),
        ] {
            let answer = fork.assert_refused(&request, what).await;
            if !code.is_empty() {
                assert_openai_error(&answer, 400, code);
            }
        }
        let anthropic = Request::post("/v1/messages", &body).header("content-encoding", "gzip");
        assert_eq!(assert_anthropic_error(&fork.app.ask(&anthropic).await, 400), "invalid_request_error", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_two_models_far_apart_in_a_gzip_body_are_refused() {
    let fork = Fork::start().await;
    let begin = br#"{"model":"right","prompt":""#;
    let end = br#"","model":"wrong"}"#;
    // Text that does not compress, so that the first half has long been passed on when the second name comes.
    let text = "text ".repeat(MIB);
    let bodies = [
        gzip_pieces(&[Piece::Stored(begin), Piece::Stored(text.as_bytes()), Piece::Stored(end)]),
        around_runs(begin, 5 * MIB, end),
        [gzip(begin), gzip(&text), gzip(end)].concat(),
    ];
    for body in &bodies {
        fork.assert_refused(&coded("gzip", body), "far apart").await;
        let chunked = Request::new("POST", "/v1/completions").header("content-encoding", "gzip");
        fork.assert_refused(&chunked.chunks(body.chunks(100_000)), "far apart, in chunks").await;
    }
    for index in 0..fork.right.count() {
        fork.right.hung_up(index).await;
    }
    assert_eq!(fork.wrong.count(), 0);
    fork.app.inflight_is("right", "right", 0.0).await;
    assert_eq!(fork.app.ask(&Request::chat("right")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_that_is_cut_short_is_refused() {
    let fork = Fork::start().await;
    let mut client = fork.app.client().await;
    for body in [ENCODED.to_vec(), gzip_with_names(PLAIN.as_bytes()), [gzip(""), ENCODED.to_vec()].concat()] {
        for cut in 0..body.len() {
            let answer = client.ask(&coded("gzip", &body[..cut])).await;
            assert_eq!(answer.status, 400, "cut at {cut} of {}: {}", body.len(), answer.text());
            fork.assert_nothing_whole(&format!("cut at {cut}"));
        }
    }
    // Late, when most of it has been passed on.
    for body in [gzip(format!(r#"{{"model":"right","p":"{}"}}"#, "text ".repeat(MIB))), model_last(5 * MIB)] {
        for missing in [1, 4, 8, 9] {
            fork.assert_refused(&coded("gzip", &body[..body.len() - missing]), "cut late").await;
        }
    }
    fork.app.inflight_is("right", "right", 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_gzip_body_that_is_damaged_is_refused() {
    let fork = Fork::start().await;
    let mut client = fork.app.client().await;
    for bit in 0..ENCODED.len() * 8 {
        let mut body = ENCODED.to_vec();
        body[bit / 8] ^= 1 << (bit % 8);
        // Time, level and system say nothing, FTEXT is only a hint, and two bits fill the last byte before the sum.
        let harmless = (32..80).contains(&bit) || [24, 1382, 1383].contains(&bit);
        let answer = client.ask(&coded("gzip", &body)).await;
        if harmless {
            assert_eq!(answer.status, 200, "bit {bit}: {}", answer.text());
        } else {
            assert_eq!(answer.status, 400, "bit {bit}: {}", answer.text());
        }
    }
    assert_eq!(fork.wrong.count(), 0);
    for index in 0..fork.right.count() {
        // But for the byte that is filled up.
        let same = |bytes: &[u8]| bytes[10..172] == ENCODED[10..172] && bytes[173..] == ENCODED[173..];
        let sound = |request: &upstream::Received| !request.body.is_done() || same(&request.body.bytes);
        assert_eq!(fork.right.peek(index, sound), Some(true), "a damaged body reached a backend");
    }
    let fork = Fork::start().await;
    for (what, tail) in [("zeros", &b"\0\0\0\0\0\0\0\0"[..]), ("a word", b"model"), ("half a member", &ENCODED[..50])] {
        fork.assert_refused(&coded("gzip", [ENCODED, tail].concat()), &format!("{what} behind the end")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_damage_that_shows_late_ends_the_backends_request() {
    let fork = Fork::start().await;
    let plain = format!(r#"{{"model":"right","p":"{}"}}"#, "text ".repeat(MIB));
    let mut body = gzip(&plain);
    let at = body.len() - 6;
    body[at] ^= 1;
    for request in [
        coded("gzip", &body),
        Request::new("POST", "/v1/completions").header("content-encoding", "gzip").chunks(body.chunks(100_000)),
    ] {
        fork.assert_refused(&request, "a wrong sum").await;
    }
    for index in 0..fork.right.count() {
        fork.right.hung_up(index).await;
    }
    // It was the client's fault: the backend's record is clean.
    assert_eq!(fork.app.ask(&Request::chat("right")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_codings_that_cannot_be_read_are_refused_with_what_can() {
    let fork = Fork::start().await;
    let zstd = [&b"\x28\xb5\x2f\xfd\x20\x11\x89\0\0"[..], br#"{"model":"right"}"#].concat();
    for coding in ["deflate", "br", "zstd", "compress", "x-unheard", "gzip, br", "zstd, gzip", "gzip, gzip"] {
        let answer = fork.app.ask(&coded(coding, &zstd)).await;
        assert!([400, 415].contains(&answer.status), "{coding}: {} {}", answer.status, answer.text());
        let code = answer.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
        assert_openai_error(&answer, answer.status, &code);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error", "{coding}");
        assert!(answer.text().contains("gzip"), "{coding}: does not say what is accepted: {}", answer.text());
        let anthropic = Request::post("/v1/messages", &zstd).header("content-encoding", coding);
        assert_anthropic_error(&fork.app.ask(&anthropic).await, answer.status);
    }
    // Two lines are one list.
    let answer = fork.app.ask(&coded("gzip", ENCODED).header("content-encoding", "br")).await;
    assert!([400, 415].contains(&answer.status), "{} {}", answer.status, answer.text());
    // Even JSON that says it is something else: a server would read something else.
    let answer = fork.app.ask(&coded("br", PLAIN)).await;
    assert!([400, 415].contains(&answer.status), "{} {}", answer.status, answer.text());
    assert_eq!(fork.right.count() + fork.wrong.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_what_cannot_be_read_passes_where_raw_bytes_do_and_the_query_names_the_model() {
    let fork = Fork::start().await;
    let mut rng = fastrand::Rng::with_seed(8);
    let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(300_000).collect();
    for coding in ["br", "zstd", "deflate", "zstd, gzip"] {
        for request in [
            Request::new("POST", "/v1/images/generations?model=right")
                .header("content-type", "image/png")
                .header("content-encoding", coding)
                .body(&bytes),
            Request::new("POST", "/v1/audio/transcriptions?x=1&model=right")
                .header("content-type", "audio/wav")
                .header("content-encoding", coding)
                .chunks(bytes.chunks(9_999)),
        ] {
            fork.assert_served(&request, &bytes, coding, coding).await;
        }
    }
    // Elsewhere, and in what says that it is JSON, a server could read another model.
    for path in ["/v1/chat/completions", "/v1/images/generations", "/invocations"] {
        let refused = Request::post(&format!("{path}?model=right"), &bytes).header("content-encoding", "br");
        assert_openai_error(&fork.app.ask(&refused).await, 415, "unsupported_encoding");
    }
    let unheard = Request::new("POST", "/invocations?model=unheard").header("content-type", "audio/wav");
    let answer = fork.app.ask(&unheard.header("content-encoding", "br").body(&bytes)).await;
    assert_openai_error(&answer, 404, "model_not_found");
    // What can be read agrees with what stands beside it.
    let both = Request::post("/v1/completions?model=right", ENCODED).header("content-encoding", "gzip");
    fork.assert_served(&both, ENCODED, "gzip", "both").await;
}

// === bounds ===

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_gzip_body_that_swells_costs_neither_time_nor_memory() {
    const SWOLLEN: usize = 2 * 1024 * MIB;
    // Long before the test's own patience ends, on a machine that is busy with other things.
    const TIME: Duration = Duration::from_secs(20);
    let upstream = Upstream::start("a", &["right"]).await;
    let run = || Piece::Run(SWOLLEN / RUN_FACTOR);
    // Nobody reads as far as their sums, which would take longer than the test.
    let bombs = [
        (
            "in the prompt, model last",
            vec![Piece::Stored(br#"{"p":""#), run(), Piece::Stored(br#"","model":"right"}"#)],
        ),
        (
            "in the prompt, model first",
            vec![Piece::Stored(br#"{"model":"right","p":""#), run(), Piece::Stored(br#""}"#)],
        ),
        ("in the model", vec![Piece::Stored(br#"{"model":""#), run(), Piece::Stored(br#""}"#)]),
        ("in a key", vec![Piece::Stored(br#"{""#), run(), Piece::Stored(br#"":1,"model":"right"}"#)]),
    ];
    for (what, pieces) in bombs {
        let bomb = member(&HEAD, &pieces, 0, 0);
        assert!(bomb.len() < SWOLLEN / 1000);
        let proxy = ProxyProcess::start(&[("PROXY_MAX_BODY", "64MiB")], &[&upstream]).await;
        assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("right")).await.status, 200);
        let before = proxy.resident();
        let since = Instant::now();
        let mut client = Client::connect(proxy.addr).await;
        let asking = tokio::spawn(async move { client.ask(&coded("gzip", &bomb)).await });
        // Everybody else goes on meanwhile, whichever thread they are on.
        let mut others = Vec::new();
        for _ in 0..8 {
            others.push(Client::connect(proxy.addr).await);
        }
        let mut slowest = Duration::ZERO;
        while !asking.is_finished() {
            assert!(since.elapsed() < TIME, "{what}: no answer after {:?}", since.elapsed());
            for client in &mut others {
                let sent = Instant::now();
                assert_eq!(client.ask(&Request::chat("right")).await.status, 200);
                slowest = slowest.max(sent.elapsed());
            }
        }
        let answer = asking.await.unwrap();
        let growth = proxy.peak_resident().saturating_sub(before);
        println!(
            "h01: a bomb {what}: {} after {:?}, {:.1} MiB more at the peak, others waited at most {slowest:?}",
            answer.status,
            since.elapsed(),
            growth as f64 / MIB as f64
        );
        // No model has a name of that length, so there it is not found.
        let expected: &[u16] = if what == "in the model" { &[404] } else { &[400, 413, 415] };
        assert!(expected.contains(&answer.status), "{what}: {} {}", answer.status, answer.text());
        assert!(growth < 32 * MIB as u64, "{what}: {growth} bytes");
        assert!(slowest < Duration::from_secs(1), "{what}: others waited {slowest:?}");
    }
    let whole = (0..upstream.count()).filter(|index| {
        upstream.peek(*index, |request| request.head.header("content-encoding").is_some() && request.body.is_done())
            == Some(true)
    });
    assert_eq!(whole.count(), 0, "a bomb was passed on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_what_is_held_of_a_gzip_body_is_what_was_sent() {
    let upstream = Upstream::start("a", &["right"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let body = model_last(40 * MIB);
    let request = coded("gzip", &body);
    assert_eq!(Client::connect(proxy.addr).await.ask(&Request::chat("right")).await.status, 200);
    let before = proxy.resident();
    for _ in 0..3 {
        let answer = Client::connect(proxy.addr).await.ask(&request).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let growth = proxy.peak_resident().saturating_sub(before);
    println!("h01: 40 MiB in {} bytes: {growth} bytes of memory", body.len());
    assert!(growth < 16 * MIB as u64, "{growth} bytes of memory for {} bytes", body.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_small_body_that_swells_is_put_out_after_a_mebibyte() {
    let fork = Fork::start().await;
    // A mebibyte is free, however little was sent.
    for (mib, refused) in [(0.9, false), (2.0, true), (20.0, true)] {
        let run = Piece::Run((mib * MIB as f64) as usize / RUN_FACTOR);
        let last = gzip_pieces(&[Piece::Stored(br#"{"p":""#), run, Piece::Stored(br#"","model":"right"}"#)]);
        let run = Piece::Run((mib * MIB as f64) as usize / RUN_FACTOR);
        let first = gzip_pieces(&[Piece::Stored(br#"{"model":"right","p":""#), run, Piece::Stored(br#""}"#)]);
        for (what, body) in [("model last", last), ("model first", first)] {
            let whole = coded("gzip", &body);
            let chunked = Request::new("POST", "/v1/completions").header("content-encoding", "gzip");
            for request in [whole, chunked.chunks(body.chunks(1000))] {
                if refused {
                    assert_openai_error(&fork.app.ask(&request).await, 413, "request_too_large");
                } else {
                    fork.assert_served(&request, &body, "gzip", what).await;
                }
            }
        }
    }
    assert_eq!(fork.wrong.count(), 0);
}

/// How many clients send bombs at a time.
const BOMBERS: usize = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_many_bodies_that_swell_keep_nobody_waiting() {
    let upstream = Upstream::start("a", &["right"]).await;
    let proxy = ProxyProcess::start(&[], &[&upstream]).await;
    let bomb = gzip_pieces(&[Piece::Stored(br#"{"p":""#), Piece::Run(62_000), Piece::Stored(br#"","model":"right"}"#)]);
    let request = Arc::new(coded("gzip", bomb).bytes());
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut bombers = Vec::new();
    for _ in 0..BOMBERS {
        let (addr, request, stop, rounds) = (proxy.addr, request.clone(), stop.clone(), rounds.clone());
        bombers.push(tokio::spawn(async move {
            while !stop.load(Relaxed) {
                let mut client = Client::connect(addr).await;
                client.send(request.as_slice()).await;
                let status = client.answer().await.status;
                assert_eq!(status, 413);
                rounds.fetch_add(1, Relaxed);
            }
        }));
    }
    let mut client = Client::connect(proxy.addr).await;
    let mut times = Vec::new();
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(5) {
        let sent = Instant::now();
        assert_eq!(client.ask(&Request::chat("right")).await.status, 200);
        times.push(sent.elapsed());
    }
    stop.store(true, Relaxed);
    times.sort();
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("h01: {} bombs: p50 {p50:?}, p99 {p99:?} of {} requests", rounds.load(Relaxed), times.len());
    assert!(p50 < Duration::from_millis(250), "others waited {p50:?} (p50), {p99:?} (p99)");
    for bomber in bombers {
        bomber.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_the_limits_for_bodies_hold_for_coded_ones() {
    let fork = Fork::start_with(&[("PROXY_MAX_BODY", "16KiB")]).await;
    let large = gzip(format!(r#"{{"p":"{}","model":"right"}}"#, "x".repeat(20_000)));
    for request in [
        coded("gzip", &large),
        Request::new("POST", "/v1/completions").header("content-encoding", "gzip").chunks(large.chunks(1000)),
        Request::post("/v1/completions?model=right", &large).header("content-encoding", "br"),
    ] {
        assert_openai_error(&fork.app.ask(&request).await, 413, "request_too_large");
    }
    fork.assert_nothing_whole("too large");
    assert_eq!(fork.app.ask(&coded("gzip", ENCODED)).await.status, 200);
}
