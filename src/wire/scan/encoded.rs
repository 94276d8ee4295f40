//! Bodies that are sent compressed: decoded for the key only, piece by piece, and thrown away.
//!
//! What is decoded is bounded by what was sent, so that a few kilobytes cannot keep a thread busy with gigabytes.

use std::io::{self, Write};

use flate2::write::MultiGzDecoder;

use super::{Format, ScanError};

/// What may be decoded whatever was sent, in bytes. It costs some milliseconds.
const DECODED_BYTES_FREE: u64 = 1024 * 1024;
/// How many times its size a larger body may decode to. Text comes to some twenty, all zeros to a thousand.
const RATIO_MAX: u64 = 200;
/// How much of a body is best decoded at a time. A byte comes to 1032 at most, so the smaller bite comes to 64 KiB; the
/// larger one is for text, which would else be decoded in very small pieces, and comes to 256 KiB if it was not text.
const BITE_BYTES_MIN: usize = 64;
const BITE_BYTES_MAX: usize = 256;
/// What comes to more than this many times its size is not taken for text.
const TEXT_RATIO_MAX: u64 = 32;

/// Looks for the key in a body with `Content-Encoding: gzip`.
#[derive(Debug)]
pub(super) struct GzipScanner {
    decoder: MultiGzDecoder<Decoded>,
    bite_bytes: usize,
}

/// Takes in what comes out of the decoder.
#[derive(Debug)]
struct Decoded {
    format: Format,
    /// Nothing is taken in any more: the decoder tries again with what was refused, for the last time when it is dropped.
    failure: Option<ScanError>,
    sent_bytes: u64,
    decoded_bytes: u64,
}

// === impl GzipScanner ===

impl GzipScanner {
    /// A scanner for a body that is of this format when decoded.
    pub(super) fn new(format: Format) -> GzipScanner {
        let decoded = Decoded { format, failure: None, sent_bytes: 0, decoded_bytes: 0 };
        GzipScanner { decoder: MultiGzDecoder::new(decoded), bite_bytes: BITE_BYTES_MIN }
    }

    /// How much is best fed next.
    pub(super) fn bite_bytes(&self) -> usize {
        self.bite_bytes
    }

    pub(super) fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        self.decoder.get_mut().sent_bytes += chunk.len() as u64;
        let before = self.decoded_bytes();
        // The decoder hands out what is complete when it is asked to.
        self.decoder.write_all(chunk).and_then(|()| self.decoder.flush()).map_err(|_| self.fault())?;
        let is_text = self.decoded_bytes() - before <= TEXT_RATIO_MAX * chunk.len() as u64;
        self.bite_bytes = if is_text { BITE_BYTES_MAX } else { BITE_BYTES_MIN };
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), ScanError> {
        // An empty body is none that was compressed: its sender should be told what is missing.
        if self.decoder.get_ref().sent_bytes > 0 {
            self.decoder.try_finish().map_err(|_| self.fault())?;
        }
        self.decoder.get_mut().format.finish()
    }

    pub(super) fn decoded_bytes(&self) -> u64 {
        self.decoder.get_ref().decoded_bytes
    }

    pub(super) fn format(&self) -> &Format {
        &self.decoder.get_ref().format
    }

    pub(super) fn format_mut(&mut self) -> &mut Format {
        &mut self.decoder.get_mut().format
    }

    /// Why decoding failed: because of what came out, or because of what went in.
    fn fault(&self) -> ScanError {
        self.decoder.get_ref().failure.clone().unwrap_or(ScanError::InvalidGzip)
    }
}

impl Write for Decoded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failure.is_some() {
            return Err(io::ErrorKind::Other.into());
        }
        self.decoded_bytes += bytes.len() as u64;
        let fed = if self.decoded_bytes > DECODED_BYTES_FREE + RATIO_MAX * self.sent_bytes {
            Err(ScanError::DecodesTooLarge { ratio: RATIO_MAX })
        } else {
            self.format.feed(bytes)
        };
        fed.map(|()| bytes.len()).map_err(|error| {
            self.failure = Some(error);
            io::ErrorKind::Other.into()
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder};

    use super::super::{ModelScanner, ScanError, tests::scan};
    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn scanner() -> ModelScanner {
        ModelScanner::for_body(Some(b"application/json"), Some(b"gzip")).unwrap()
    }

    #[test]
    fn the_key_is_found_under_every_split() {
        let body = format!(r#"{{"messages":["{}"],"model":"m"}}"#, "some text, ".repeat(50));
        let sent = gzip(body.as_bytes());
        for step in 1..=sent.len() {
            assert_eq!(scan(scanner(), sent.chunks(step)), Ok("m".to_owned()), "in pieces of {step}");
        }
        let (first, second) = body.as_bytes().split_at(100);
        let members = [gzip(first), gzip(second)].concat();
        assert_eq!(scan(scanner(), [&members[..]]), Ok("m".to_owned()), "in two members");
    }

    #[test]
    fn the_key_is_known_before_the_end() {
        let body = format!(r#"{{"model":"m","messages":["{}"]}}"#, "0123456789abcdef".repeat(10_000));
        let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
        encoder.write_all(body.as_bytes()).unwrap();
        let sent = encoder.finish().unwrap();
        let mut scanner = scanner();
        scanner.feed(&sent[..sent.len() / 2]).unwrap();
        assert_eq!(scanner.model(), Some("m"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let whole = gzip(br#"{"model":"m"}"#);
        let (last, cut) = whole.split_last().unwrap();
        assert_eq!(scan(scanner(), [cut]), Err(ScanError::InvalidGzip));
        let corrupt = [cut, &[last ^ 1]].concat();
        assert_eq!(scan(scanner(), [&corrupt[..]]), Err(ScanError::InvalidGzip));
        assert_eq!(scan(scanner(), [&b"{\"model\":\"m\"}"[..]]), Err(ScanError::InvalidGzip));
        assert_eq!(scan(scanner(), [&b""[..]]), Err(ScanError::ModelMissing));
        assert_eq!(scan(scanner(), [&gzip(b"{}")[..]]), Err(ScanError::ModelMissing));
        let differ = scan(scanner(), [&gzip(br#"{"model":"m","model":"n"}"#)[..]]);
        assert!(matches!(differ, Err(ScanError::ModelsDiffer { .. })), "{differ:?}");
    }

    #[test]
    fn what_was_refused_is_not_read_again() {
        // The quote would be the end of the text, and the bracket that of one that was never opened.
        assert_eq!(scan(scanner(), [&gzip(b"\"]")[..]]), Err(ScanError::NotAnObject));
    }

    #[test]
    fn a_bomb_is_put_out() {
        let body = format!(r#"{{"model":"m","x":"{}"}}"#, " ".repeat(100 * 1024 * 1024));
        let bomb = gzip(body.as_bytes());
        assert_eq!(scan(scanner(), bomb.chunks(4096)), Err(ScanError::DecodesTooLarge { ratio: RATIO_MAX }));
    }

    #[test]
    fn other_codings_are_named() {
        for coding in ["zstd", "br", "gzip, gzip", "deflate"] {
            let refused = ModelScanner::for_body(None, Some(coding.as_bytes()));
            assert!(matches!(refused, Err(ScanError::UnsupportedCoding { .. })), "{coding}: {refused:?}");
        }
        for coding in [None, Some(&b"identity"[..]), Some(b""), Some(b" Identity ")] {
            let scanner = ModelScanner::for_body(None, coding).unwrap();
            assert_eq!(scan(scanner, [&br#"{"model":"m"}"#[..]]), Ok("m".to_owned()));
        }
        assert!(ModelScanner::for_body(None, Some(b"X-GZip")).is_ok());
    }
}
