//! Finds requests that say their length in two ways, or obscurely, which hyper would accept by dropping one of them. Pure.
//!
//! A server in front that believes the other one sees other requests than we do: request smuggling (RFC 9112, 6.1 and
//! 11.2). hyper reads `Transfer-Encoding`, drops `Content-Length`, and tells nobody; so the bytes are watched on their way
//! to it. The watcher follows the framing of HTTP/1.1 with a few counters and no buffer; it never changes a byte, and what
//! it cannot follow it leaves to hyper, which refuses it.

use memchr::memchr;

/// Follows the bytes that a client sends on one connection.
#[derive(Debug)]
pub struct Framing {
    state: State,
    head: Head,
    /// Requests whose head has been read.
    heads: u64,
}

#[derive(Debug)]
enum State {
    /// Within a head.
    Head,
    /// Within a body of known length: bytes left.
    Body(u64),
    /// Within the line that says how long a chunk is.
    ChunkSize { bytes: u64, extension: bool },
    /// Within a chunk and the line end after it: bytes left.
    Chunk(u64),
    /// Within the trailers after the last chunk.
    Trailers { line_len: u32 },
    /// HTTP/2, or nothing that can be followed.
    Opaque,
}

/// Longest header line that is looked at; names and lengths come first in a line.
const LINE_BYTES: usize = 48;

#[derive(Debug)]
struct Head {
    line: [u8; LINE_BYTES],
    line_len: usize,
    /// The current line is longer than what is kept of it.
    cut: bool,
    lines: u32,
    length: Option<u64>,
    chunked: bool,
    /// Its length is written so that it cannot be told here.
    obscure: bool,
}

impl Default for Framing {
    fn default() -> Framing {
        Framing { state: State::Head, head: Head::default(), heads: 0 }
    }
}

impl Default for Head {
    fn default() -> Head {
        Head { line: [0; LINE_BYTES], line_len: 0, cut: false, lines: 0, length: None, chunked: false, obscure: false }
    }
}

impl Framing {
    /// Follows the next bytes. Returns the number of the first request, counted from 0, that says its length in two ways.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Option<u64> {
        let mut found = None;
        while !bytes.is_empty() {
            bytes = match &mut self.state {
                State::Opaque => return found,
                State::Head => {
                    let rest = self.head.feed(bytes);
                    if rest.is_some_and(|end| end.ended) {
                        if self.head.is_ambiguous() {
                            found = found.or(Some(self.heads));
                        }
                        self.heads += 1;
                        self.state = self.head.state_after();
                        self.head = Head::default();
                    }
                    rest.map_or(&[][..], |end| &bytes[end.consumed..])
                }
                State::Body(left) | State::Chunk(left) => {
                    let skip = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= skip as u64;
                    if *left == 0 {
                        self.state = match self.state {
                            State::Chunk(_) => State::ChunkSize { bytes: 0, extension: false },
                            _ => State::Head,
                        };
                    }
                    &bytes[skip..]
                }
                State::ChunkSize { bytes: size, extension } => {
                    match bytes[0] {
                        b'\n' if *size == 0 => self.state = State::Trailers { line_len: 0 },
                        // The chunk, and the line end after it.
                        b'\n' => self.state = State::Chunk(size.saturating_add(2)),
                        _ if *extension => {}
                        b';' | b'\r' | b' ' | b'\t' => *extension = true,
                        digit => match char::from(digit).to_digit(16).filter(|_| *size < 1 << 58) {
                            Some(digit) => *size = *size << 4 | u64::from(digit),
                            None => self.state = State::Opaque,
                        },
                    }
                    &bytes[1..]
                }
                State::Trailers { line_len } => {
                    match bytes[0] {
                        b'\n' if *line_len == 0 => self.state = State::Head,
                        b'\n' => *line_len = 0,
                        b'\r' => {}
                        _ => *line_len += 1,
                    }
                    &bytes[1..]
                }
            };
        }
        found
    }
}

#[derive(Clone, Copy)]
struct LineEnd {
    consumed: usize,
    ended: bool,
}

impl Head {
    /// Takes in bytes up to the end of the head; `None` if it does not end here.
    fn feed(&mut self, bytes: &[u8]) -> Option<LineEnd> {
        let mut consumed = 0;
        while let Some(length) = memchr(b'\n', &bytes[consumed..]) {
            self.extend_line(&bytes[consumed..consumed + length]);
            consumed += length + 1;
            let ended = self.end_line();
            if ended {
                return Some(LineEnd { consumed, ended });
            }
        }
        self.extend_line(&bytes[consumed..]);
        None
    }

    fn extend_line(&mut self, bytes: &[u8]) {
        let room = LINE_BYTES - self.line_len;
        let taken = bytes.len().min(room);
        self.line[self.line_len..self.line_len + taken].copy_from_slice(&bytes[..taken]);
        self.line_len += taken;
        self.cut |= taken < bytes.len();
    }

    /// Looks at a complete line; true if it was the empty one at the end.
    fn end_line(&mut self) -> bool {
        let line = &self.line[..self.line_len];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        self.line_len = 0;
        let cut = std::mem::take(&mut self.cut);
        if line.is_empty() {
            // Empty lines before a request line are allowed (RFC 9112, 2.2).
            return self.lines > 0;
        }
        self.lines += 1;
        if let Some(value) = value_of(line, b"content-length:") {
            // Nobody needs so many digits or blanks for a length.
            self.obscure |= cut;
            let digits = value.trim_ascii();
            let length = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok());
            // hyper refuses what is no number; until then, nothing of it can be followed.
            self.length = Some(length.unwrap_or(u64::MAX));
        } else if value_of(line, b"transfer-encoding:").is_some() {
            self.chunked = true;
        } else if self.lines == 1 && line.starts_with(b"PRI * HTTP/2") {
            self.length = Some(u64::MAX);
        }
        false
    }

    fn is_ambiguous(&self) -> bool {
        self.obscure || self.chunked && self.length.is_some()
    }

    fn state_after(&self) -> State {
        match (self.chunked, self.length) {
            (true, _) => State::ChunkSize { bytes: 0, extension: false },
            (false, None | Some(0)) => State::Head,
            (false, Some(u64::MAX)) => State::Opaque,
            (false, Some(length)) => State::Body(length),
        }
    }
}

/// What follows `name` (lower case, with its colon) on this line.
fn value_of<'l>(line: &'l [u8], name: &[u8]) -> Option<&'l [u8]> {
    let (head, value) = line.split_at_checked(name.len())?;
    head.eq_ignore_ascii_case(name).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The numbers of ambiguous requests, with the bytes fed in pieces of `step`.
    fn ambiguous(bytes: &[u8], step: usize) -> Vec<u64> {
        let mut framing = Framing::default();
        bytes.chunks(step).filter_map(|piece| framing.feed(piece)).collect()
    }

    const PLAIN: &str =
        "POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\nTransfer-Encoding: x\r\n\r\nContent";
    const CHUNKED: &str = "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nConte\r\n1A\r\nContent-Length: 5\r\n\r\n.....\r\n0\r\nT: 1\r\n\r\n";
    const GET: &str = "\r\nGET / HTTP/1.1\r\nX-Content-Length: 9\r\n\r\n";
    const BOTH: &str = "POST / HTTP/1.1\r\nContent-Length: 3\r\nTRANSFER-ENCODING:chunked\r\n\r\n0\r\n\r\n";
    const BOTH_REVERSED: &str = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\ncontent-length:3\r\n\r\n0\r\n\r\n";

    #[test]
    fn unambiguous_requests_pass_under_every_split() {
        let all = [PLAIN, CHUNKED, GET, PLAIN, GET, CHUNKED].concat();
        for step in 1..all.len() {
            assert_eq!(ambiguous(all.as_bytes(), step), [0; 0], "pieces of {step}");
        }
    }

    #[test]
    fn both_lengths_are_found_at_the_right_request_under_every_split() {
        for both in [BOTH, BOTH_REVERSED] {
            let all = [PLAIN, GET, CHUNKED, both].concat();
            for step in 1..all.len() {
                assert_eq!(ambiguous(all.as_bytes(), step), [3], "pieces of {step}");
            }
        }
    }

    #[test]
    fn a_length_hidden_in_a_long_line_is_refused() {
        for padding in [" ".repeat(60), "0".repeat(60)] {
            let hidden = format!("POST / HTTP/1.1\r\nContent-Length:{padding}13\r\n\r\n");
            for step in 1..hidden.len() {
                assert_eq!(ambiguous(hidden.as_bytes(), step), [0], "pieces of {step}");
            }
        }
    }

    #[test]
    fn http2_and_nonsense_are_left_alone() {
        let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        assert_eq!(ambiguous(&[preface, BOTH].concat().into_bytes(), 7), [0; 0]);
        let bad_chunk = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
        assert_eq!(ambiguous(&[bad_chunk, BOTH].concat().into_bytes(), 7), [0; 0]);
        let bad_length = "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n";
        assert_eq!(ambiguous(&[bad_length, BOTH].concat().into_bytes(), 7), [0; 0]);
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_give_one_answer(bytes in proptest::collection::vec(any::<u8>(), 0..300), step in 1..50usize) {
            let whole = ambiguous(&bytes, bytes.len().max(1));
            prop_assert_eq!(ambiguous(&bytes, step).first().copied(), whole.first().copied());
        }
    }
}
