//! Reads the id of an answer while its bytes go by: the `id` of its object, or of the first object of a stream that has
//! one. Compressed answers are decoded for it, and what was decoded is thrown away.
//!
//! It reads until it has found one, and gives up where none is likely to come any more.

use std::io::{self, Write};

use flate2::write::{MultiGzDecoder, ZlibDecoder};

use super::usage::{AnswerKind, UsageTap};

/// How far a stream is read. The first of its events tells the id, if any does.
const STREAM_BYTES_MAX: usize = 64 * 1024;
/// How far a compressed answer is read, in decoded bytes. The id stands in front, or behind a picture.
const DECODED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Reads an answer for its id.
#[derive(Debug)]
pub struct IdReader(Coding);

#[derive(Debug)]
enum Coding {
    Identity(Plain),
    Gzip(MultiGzDecoder<Plain>),
    Deflate(ZlibDecoder<Plain>),
    /// There is nothing more to be read.
    Over,
}

#[derive(Debug)]
struct Plain {
    tap: UsageTap,
    left_bytes: usize,
}

/// What came of reading on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The id.
    Id(String),
    /// It may come yet.
    NotYet,
    /// It will not be found.
    Never,
}

// === impl IdReader ===

impl IdReader {
    /// A reader for an answer with this `Content-Type` and `Content-Encoding`; `None` if nothing can be read in it.
    pub fn for_answer(content_type: &[u8], content_encoding: &[u8]) -> Option<IdReader> {
        let kind = AnswerKind::of(content_type, false)?;
        let coding = content_encoding.trim_ascii();
        let is = |name: &str| coding.eq_ignore_ascii_case(name.as_bytes());
        let limit = if kind == AnswerKind::Json { usize::MAX } else { STREAM_BYTES_MAX };
        let plain = |limit: usize| Plain { tap: UsageTap::for_id(kind), left_bytes: limit };
        let decoded = || plain(limit.min(DECODED_BYTES_MAX));
        Some(IdReader(match () {
            () if coding.is_empty() || is("identity") => Coding::Identity(plain(limit)),
            () if is("gzip") || is("x-gzip") => Coding::Gzip(MultiGzDecoder::new(decoded())),
            () if is("deflate") => Coding::Deflate(ZlibDecoder::new(decoded())),
            () => return None,
        }))
    }

    /// Reads the next bytes. They may be cut anywhere.
    pub fn feed(&mut self, payload: &[u8]) -> Found {
        let fed = match &mut self.0 {
            Coding::Identity(plain) => plain.write_all(payload),
            // The decoder hands out what is complete when it is asked to.
            Coding::Gzip(decoder) => decoder.write_all(payload).and_then(|()| decoder.flush()),
            Coding::Deflate(decoder) => decoder.write_all(payload).and_then(|()| decoder.flush()),
            Coding::Over => return Found::Never,
        };
        let plain = match &self.0 {
            Coding::Identity(plain) => plain,
            Coding::Gzip(decoder) => decoder.get_ref(),
            Coding::Deflate(decoder) => decoder.get_ref(),
            Coding::Over => return Found::Never,
        };
        match plain.tap.id() {
            Some(id) => Found::Id(id.to_owned()),
            None if fed.is_err() => {
                self.0 = Coding::Over;
                Found::Never
            }
            None => Found::NotYet,
        }
    }
}

impl Write for Plain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nothing more is decoded than has to be.
        if self.tap.id().is_some() {
            return Err(io::ErrorKind::Other.into());
        }
        self.left_bytes = self.left_bytes.checked_sub(bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.tap.feed(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    /// What is found in these bytes, whole and byte by byte.
    fn found(kind: &str, coding: &str, bytes: &[u8]) -> Option<String> {
        let read = |step: usize| {
            let mut reader = IdReader::for_answer(kind.as_bytes(), coding.as_bytes()).unwrap();
            bytes.chunks(step).find_map(|piece| match reader.feed(piece) {
                Found::Id(id) => Some(id),
                Found::NotYet | Found::Never => None,
            })
        };
        let (whole, cut) = (read(usize::MAX), read(1));
        assert_eq!(whole, cut);
        whole
    }

    #[test]
    fn an_id_is_read_from_every_form() {
        let long = format!(r#"{{"data":[{{"id":"no","b64_json":"{}"}}],"id":"vid_1"}}"#, "x".repeat(100_000));
        for (kind, text, id) in [
            ("application/json", r#"{"id":"vid_1","object":"video"}"#, Some("vid_1")),
            ("application/json; charset=utf-8", &long, Some("vid_1")),
            ("application/vnd.x+json", r#" {"object":"video", "id" : "vid_1"}"#, Some("vid_1")),
            ("application/json", r#"{"video":{"id":"no"},"status":"queued"}"#, None),
            ("application/json", r#"{"id":null}"#, None),
            ("application/json", r#"{"id":""}"#, None),
            ("application/json", r#"[{"id":"no"}]"#, None),
            ("text/event-stream", "data: {\"id\":\"chatcmpl-1\",\"choices\":[]}\n\n", Some("chatcmpl-1")),
            ("text/event-stream", ": ping\n\ndata: {\"x\":1}\n\ndata: {\"id\":\"later\"}\n\n", Some("later")),
            (
                "text/event-stream",
                "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"resp_1\"}}\n\n",
                Some("resp_1"),
            ),
            ("text/event-stream", "data: [DONE]\n\n", None),
            ("text/event-stream", "data: {\"id\":\"first\"}\n\ndata: {\"id\":\"next\"}\n\n", Some("first")),
            ("application/x-ndjson", "{\"id\":\"first\"}\n{\"id\":\"next\"}\n", Some("first")),
            ("application/x-ndjson", "{\"status\":\"queued\"}\n{\"id\":\"job_1\"}\n", Some("job_1")),
        ] {
            assert_eq!(found(kind, "", text.as_bytes()).as_deref(), id, "{kind} {text:.80}");
            assert_eq!(found(kind, "gzip", &gzip(text)).as_deref(), id, "gzip {kind} {text:.80}");
            assert_eq!(found(kind, " X-GZip", &gzip(text)).as_deref(), id, "x-gzip {kind} {text:.80}");
            assert_eq!(found(kind, "deflate", &deflate(text)).as_deref(), id, "deflate {kind} {text:.80}");
        }
        assert!(IdReader::for_answer(b"text/html", b"").is_none());
        assert!(IdReader::for_answer(b"application/json", b"br").is_none());
        assert_eq!(found("application/json", "gzip", b"{\"id\":\"not compressed\"}"), None);
    }

    #[test]
    fn no_stream_and_no_bomb_is_read_for_ever() {
        let mut reader = IdReader::for_answer(b"text/event-stream", b"").unwrap();
        let event = b"data: {\"x\":\"0123456789\"}\n\n";
        let fed = (0..STREAM_BYTES_MAX).take_while(|_| reader.feed(event) == Found::NotYet).count();
        assert_eq!(fed, STREAM_BYTES_MAX / event.len());
        assert_eq!(reader.feed(b"data: {\"id\":\"too late\"}\n\n"), Found::Never);

        let bomb = gzip(&format!("{{\"x\":\"{}\",\"id\":\"too late\"}}", " ".repeat(DECODED_BYTES_MAX)));
        let mut reader = IdReader::for_answer(b"application/json", b"gzip").unwrap();
        assert_eq!(reader.feed(&bomb), Found::Never);
    }
}
