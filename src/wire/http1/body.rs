//! Where a body ends, and what of the bytes on the connection is its payload (RFC 9112, 6 and 7).

use memchr::memchr;

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    Empty,
    /// After so many bytes.
    Length(u64),
    /// By a chunk of size zero.
    Chunked,
    /// By the end of the connection. Answers only.
    Close,
}

/// The framing of a body breaks the grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FramingError(&'static str);

impl FramingError {
    /// What is wrong, without a word of the body.
    pub fn why(self) -> &'static str {
        self.0
    }
}

/// Follows a body through the bytes of a connection, cut anywhere.
#[derive(Debug, Clone)]
pub struct BodyDecoder {
    state: State,
    /// Trailer lines as they came, each with its line end.
    trailers: Vec<u8>,
}

/// What [`BodyDecoder::decode`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded<'b> {
    /// Bytes of the body's payload; may be empty.
    pub payload: &'b [u8],
    /// How many bytes of the input are done with, the payload's included. Zero only if the input was empty or the body is
    /// over.
    pub consumed: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    /// Nothing that follows can be made sense of.
    Broken(FramingError),
    Length(u64),
    Close,
    /// Before or within the digits of a chunk's size.
    Size {
        value: u64,
        digits: u8,
    },
    /// Behind them: white space, which means nothing.
    SizeSpace {
        size: u64,
        length: u16,
    },
    /// A chunk extension, which no reader heeds.
    Extension {
        size: u64,
        length: u16,
    },
    /// At the line feed after the size.
    SizeEnd(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// Within the lines after the last chunk, at this place of the current one.
    Trailer {
        line_length: u16,
    },
    /// At the line feed of a trailer line, or of the empty one at the end.
    TrailerEnd {
        is_last: bool,
    },
}

/// Longest extension of one chunk: there is none in use, and a flood of them is an attack.
const EXTENSION_BYTES_MAX: u16 = 256;
/// Most bytes of trailers.
const TRAILERS_BYTES_MAX: usize = 8 * 1024;

// === impl BodyDecoder ===

impl BodyDecoder {
    /// A decoder for a body with this framing.
    pub fn new(framing: Framing) -> BodyDecoder {
        let state = match framing {
            Framing::Empty | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size { value: 0, digits: 0 },
            Framing::Close => State::Close,
        };
        BodyDecoder { state, trailers: Vec::new() }
    }

    /// The body is over.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Its framing broke: where it ends will never be known.
    pub fn is_broken(&self) -> bool {
        matches!(self.state, State::Broken(_))
    }

    /// The end of the connection is the end of the body.
    pub fn may_end_by_close(&self) -> bool {
        self.state == State::Close
    }

    /// Nothing of a chunk has been begun: what comes next may stand behind anything else that is whole.
    pub fn is_between_chunks(&self) -> bool {
        matches!(self.state, State::Size { digits: 0, .. } | State::Done)
    }

    /// How much payload is still to come, if that is known.
    pub fn left(&self) -> Option<u64> {
        match self.state {
            State::Done => Some(0),
            State::Length(left) => Some(left),
            _ => None,
        }
    }

    /// Trailer lines as they came, each with its line end; empty until the body is over.
    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    /// The next stretch of payload in `input`, with the framing before it.
    ///
    /// # Errors
    /// The framing is broken. Nothing that follows can be made sense of: every later call returns the same error.
    pub fn decode<'b>(&mut self, input: &'b [u8]) -> Result<Decoded<'b>, FramingError> {
        let decoded = self.follow(input);
        if let Err(error) = decoded {
            self.state = State::Broken(error);
        }
        decoded
    }

    fn follow<'b>(&mut self, input: &'b [u8]) -> Result<Decoded<'b>, FramingError> {
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            let byte = rest[0];
            self.state = match self.state {
                State::Done => break,
                State::Broken(error) => return Err(error),
                State::Close => return Ok(Decoded { payload: rest, consumed: input.len() }),
                State::Length(left) => {
                    let (payload, left) = take(rest, left);
                    self.state = if left == 0 { State::Done } else { State::Length(left) };
                    return Ok(Decoded { payload, consumed: at + payload.len() });
                }
                State::Data(left) => {
                    let (payload, left) = take(rest, left);
                    self.state = if left == 0 { State::DataCr } else { State::Data(left) };
                    let mut consumed = at + payload.len();
                    // The line end after the chunk belongs to it: most chunks are read in one piece.
                    if left == 0 && input[consumed..].starts_with(b"\r\n") {
                        self.state = State::Size { value: 0, digits: 0 };
                        consumed += 2;
                    }
                    return Ok(Decoded { payload, consumed });
                }
                State::Size { value, digits } => match (byte, char::from(byte).to_digit(16)) {
                    (_, Some(digit)) if digits < 16 => {
                        State::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }
                    }
                    (b'\r', _) if digits > 0 => State::SizeEnd(value),
                    (b';', _) if digits > 0 => State::Extension { size: value, length: 1 },
                    (b' ' | b'\t', _) if digits > 0 => State::SizeSpace { size: value, length: 1 },
                    _ => return Err(FramingError("the size of a chunk is not a number")),
                },
                State::SizeSpace { size, length } => match byte {
                    b'\r' => State::SizeEnd(size),
                    b';' => State::Extension { size, length },
                    b' ' | b'\t' if length < EXTENSION_BYTES_MAX => State::SizeSpace { size, length: length + 1 },
                    _ => return Err(FramingError("the size of a chunk is not a number")),
                },
                State::Extension { size, length } => match byte {
                    b'\r' => State::SizeEnd(size),
                    b'\n' | 0 => return Err(FramingError("the line of a chunk's size does not end properly")),
                    _ if length >= EXTENSION_BYTES_MAX => {
                        return Err(FramingError("the extension of a chunk is too long"));
                    }
                    _ => State::Extension { size, length: length + 1 },
                },
                State::SizeEnd(size) => match (byte, size) {
                    (b'\n', 0) => State::Trailer { line_length: 0 },
                    (b'\n', size) => State::Data(size),
                    _ => return Err(FramingError("the line of a chunk's size does not end properly")),
                },
                State::DataCr if byte == b'\r' => State::DataLf,
                State::DataLf if byte == b'\n' => State::Size { value: 0, digits: 0 },
                State::DataCr | State::DataLf => return Err(FramingError("a chunk is longer than it says")),
                State::Trailer { line_length } => match byte {
                    b'\r' => State::TrailerEnd { is_last: line_length == 0 },
                    b'\n' | 0 => return Err(FramingError("a trailer line does not end properly")),
                    _ => {
                        self.keep_trailer(byte)?;
                        State::Trailer { line_length: line_length.saturating_add(1) }
                    }
                },
                State::TrailerEnd { is_last } => match (byte, is_last) {
                    (b'\n', true) => {
                        self.check_trailers()?;
                        State::Done
                    }
                    (b'\n', false) => {
                        self.keep_trailer(b'\r')?;
                        self.keep_trailer(b'\n')?;
                        State::Trailer { line_length: 0 }
                    }
                    _ => return Err(FramingError("a trailer line does not end properly")),
                },
            };
            at += 1;
        }
        Ok(Decoded { payload: &[], consumed: at })
    }

    fn keep_trailer(&mut self, byte: u8) -> Result<(), FramingError> {
        if self.trailers.len() >= TRAILERS_BYTES_MAX {
            return Err(FramingError("the trailers are too long"));
        }
        self.trailers.push(byte);
        Ok(())
    }

    /// Trailers are header lines, and none that says where a message ends or where it goes.
    fn check_trailers(&mut self) -> Result<(), FramingError> {
        const FORBIDDEN: [&[u8]; 4] = [b"content-length", b"transfer-encoding", b"host", b"connection"];
        let mut rest = &self.trailers[..];
        while let Some(end) = memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end + 1);
            rest = after;
            let Some(colon) = memchr(b':', line) else {
                return Err(FramingError("a trailer line has no colon"));
            };
            let name = &line[..colon];
            let is_token =
                !name.is_empty() && name.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b));
            if !is_token || FORBIDDEN.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden)) {
                return Err(FramingError("a trailer line has a name that it must not"));
            }
        }
        Ok(())
    }
}

/// At most `left` bytes of `bytes`, and how many are left then.
fn take(bytes: &[u8], left: u64) -> (&[u8], u64) {
    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    (&bytes[..taken], left - taken as u64)
}

// === writing chunks ===

/// What stands after the last chunk if there are no trailers.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Appends one chunk; nothing for an empty payload, which would end the body.
pub fn push_chunk(out: &mut Vec<u8>, payload: &[u8]) {
    if payload.is_empty() {
        return;
    }
    push_chunk_size(out, payload.len());
    out.extend_from_slice(payload);
    out.extend_from_slice(b"\r\n");
}

/// Appends the end of a chunked body.
pub fn push_last_chunk(out: &mut Vec<u8>, trailers: &[u8]) {
    out.extend_from_slice(b"0\r\n");
    out.extend_from_slice(trailers);
    out.extend_from_slice(b"\r\n");
}

fn push_chunk_size(out: &mut Vec<u8>, size: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut line = [0; 18];
    let mut at = 16;
    let mut rest = size;
    while {
        at -= 1;
        line[at] = DIGITS[rest & 15];
        rest >>= 4;
        rest > 0
    } {}
    line[16..].copy_from_slice(b"\r\n");
    out.extend_from_slice(&line[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes a body that arrives in these pieces: its payload, its trailers, and how many bytes belong to it.
    fn decode(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, Vec<u8>, usize, bool), FramingError> {
        let mut decoder = BodyDecoder::new(framing);
        let (mut payload, mut consumed) = (Vec::new(), 0);
        for piece in pieces {
            let mut rest = *piece;
            while !rest.is_empty() && !decoder.is_done() {
                let decoded = decoder.decode(rest)?;
                assert!(decoded.consumed > 0, "a decoder that does not move would hang its caller");
                payload.extend_from_slice(decoded.payload);
                rest = &rest[decoded.consumed..];
                consumed += decoded.consumed;
            }
        }
        Ok((payload, decoder.trailers().to_vec(), consumed, decoder.is_done()))
    }

    fn cut_everywhere(framing: Framing, bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>, usize, bool), FramingError> {
        let whole = decode(framing, &[bytes]);
        for at in 0..=bytes.len() {
            assert_eq!(decode(framing, &[&bytes[..at], &bytes[at..]]), whole, "{} cut at {at}", bytes.escape_ascii());
        }
        assert_eq!(decode(framing, &bytes.chunks(1).collect::<Vec<_>>()), whole, "{}", bytes.escape_ascii());
        whole
    }

    #[test]
    fn bodies_end_where_their_framing_says() {
        for (framing, bytes, payload, consumed, is_done) in [
            (Framing::Empty, &b"next"[..], &b""[..], 0, true),
            (Framing::Length(0), b"next", b"", 0, true),
            (Framing::Length(3), b"abcnext", b"abc", 3, true),
            (Framing::Length(9), b"abc", b"abc", 3, false),
            (Framing::Close, b"abc", b"abc", 3, false),
            (Framing::Chunked, b"3\r\nabc\r\n0\r\n\r\nnext", b"abc", 13, true),
            (
                Framing::Chunked,
                b"1\r\na\r\n0002;x=\"y\"\r\nbc\r\nA \r\n0123456789\r\n0;z\r\n\r\n",
                b"abc0123456789",
                45,
                true,
            ),
            (Framing::Chunked, b"0\r\n\r\n", b"", 5, true),
            (Framing::Chunked, b"3\r\nab", b"ab", 5, false),
        ] {
            let decoded = cut_everywhere(framing, bytes);
            assert_eq!(decoded, Ok((payload.to_vec(), Vec::new(), consumed, is_done)), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn trailers_are_kept() {
        let bytes = b"1\r\na\r\n0\r\nx-sum: 1\r\nY:\r\n\r\n";
        let (payload, trailers, consumed, is_done) = cut_everywhere(Framing::Chunked, bytes).unwrap();
        assert_eq!(
            (&payload[..], &trailers[..], consumed, is_done),
            (&b"a"[..], &b"x-sum: 1\r\nY:\r\n"[..], bytes.len(), true)
        );
    }

    #[test]
    fn broken_chunks_are_refused() {
        let long_extension = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(300));
        let long_trailers = format!("0\r\nx: {}\r\n\r\n", "y".repeat(9_000));
        for bytes in [
            "x\r\n",
            "\r\n",
            ";x\r\n",
            " 1\r\na\r\n",
            "+1\r\na",
            "0x1\r\na",
            "1 1\r\na\r\n",
            "1 x;y\r\na\r\n",
            "1\na\r\n",
            "1\r\na\n",
            "1\r\nab\r\n",
            "1\rX",
            "1;a\nb\r\n",
            "1;a\0b\r\n",
            "00000000000000001\r\na\r\n",
            "fffffffffffffffff\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\n: x\r\n\r\n",
            "0\r\n folded: x\r\n\r\n",
            "0\r\nContent-Length: 5\r\n\r\n",
            "0\r\ntransfer-encoding: chunked\r\n\r\n",
            "0\r\nx: 1\n\r\n",
            "0\r\n\rx",
            &long_extension,
            &long_trailers,
        ] {
            assert!(decode(Framing::Chunked, &[bytes.as_bytes()]).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_broken_stays_broken() {
        // The extension is too long; taken up again from the beginning of the piece, the rest would pass for a chunk.
        let piece = format!("\r\n200;{}\r\n0\r\n\r\n", "x".repeat(508));
        let mut decoder = BodyDecoder::new(Framing::Chunked);
        assert_eq!(decoder.decode(b"1\r\na").unwrap().payload, b"a");
        let broken = decoder.decode(piece.as_bytes()).unwrap_err();
        for again in [piece.as_bytes(), b"0\r\n\r\n", b"\r\n"] {
            assert_eq!(decoder.decode(again), Err(broken));
        }
        assert!(decoder.is_broken() && !decoder.is_done());
    }

    #[test]
    fn a_huge_chunk_is_only_counted() {
        let mut decoder = BodyDecoder::new(Framing::Chunked);
        let decoded = decoder.decode(b"ffffffffffffffff\r\nab").unwrap();
        assert_eq!((decoded.payload, decoded.consumed), (&b"ab"[..], 20));
        assert!(!decoder.is_between_chunks());
    }

    #[test]
    fn boundaries_are_known() {
        let mut decoder = BodyDecoder::new(Framing::Chunked);
        assert!(decoder.is_between_chunks());
        for (bytes, between) in [(&b"3\r\nab"[..], false), (b"c", false), (b"\r", false), (b"\n", true), (b"0", false)]
        {
            let mut rest = bytes;
            while !rest.is_empty() {
                rest = &rest[decoder.decode(rest).unwrap().consumed..];
            }
            assert_eq!(decoder.is_between_chunks(), between, "after {}", bytes.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..600), 0..5), step in 1..50usize) {
            let mut wire = Vec::new();
            for payload in &payloads {
                push_chunk(&mut wire, payload);
            }
            push_last_chunk(&mut wire, b"x: 1\r\n");
            let decoded = decode(Framing::Chunked, &wire.chunks(step).collect::<Vec<_>>());
            prop_assert_eq!(decoded, Ok((payloads.concat(), b"x: 1\r\n".to_vec(), wire.len(), true)));
        }

        #[test]
        fn any_bytes_under_any_split_come_to_the_same(bytes in proptest::collection::vec(prop_oneof![Just(b'0'), Just(b'1'), Just(b'\r'), Just(b'\n'), Just(b';'), Just(b':'), any::<u8>()], 0..60), step in 1..20usize) {
            let whole = decode(Framing::Chunked, &[&bytes]);
            prop_assert_eq!(decode(Framing::Chunked, &bytes.chunks(step).collect::<Vec<_>>()), whole);
        }
    }
}
