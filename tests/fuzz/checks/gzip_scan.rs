//! The scanner for compressed bodies against the same library's reader, which is another piece of code.

use std::io::Read as _;

use flate2::read::MultiGzDecoder;
use inference_proxy::wire::scan::{ModelScanner, ScanError};

use super::{arrivals, scan};

/// Checks a compressed JSON body.
pub fn check(body: &[u8]) {
    let scanner = || ModelScanner::for_body(None, Some(b"gzip")).expect("gzip must be understood");
    let found = scan(scanner(), &[body]);
    for pieces in arrivals(body) {
        // Broken text in a broken wrapping: which of them is noticed first is a matter of cuts.
        assert_eq!(scan(scanner(), &pieces).ok(), found.clone().ok(), "it depends on how it is cut");
    }
    let plain = match decoded(body) {
        // Its sender is told what is missing.
        _ if body.is_empty() => Err(ScanError::ModelMissing),
        Ok(text) => scan(ModelScanner::json(), &[&text]),
        Err(_) => Err(ScanError::InvalidGzip),
    };
    match (&plain, &found) {
        (Ok(_), _) | (_, Ok(_)) => assert_eq!(found, plain),
        (Err(_), Err(_)) => {}
    }
}

/// What the body decodes to, if that is not too much for a body of its size.
fn decoded(body: &[u8]) -> std::io::Result<Vec<u8>> {
    let most = 64 * 1024 * 1024 + 200 * body.len() as u64;
    let mut text = Vec::new();
    MultiGzDecoder::new(body).take(most + 1).read_to_end(&mut text)?;
    if text.len() as u64 > most { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
}
