//! The cases: a sound request, or several, and what is done to them.

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
                _ => pick(rng, &["\n", "\r", " ", "\0", "0\r\n\r\n", "x: y\r\n\r\n", "GET", "HTTP/1.1 200 OK\r\n\r\n"])
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
                &["POST", "CONNECT", "TRACE", "PRI", "post", "P\u{d6}ST", "", "GET ", "OPTIONS", "HEAD", "M-SEARCH"],
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
