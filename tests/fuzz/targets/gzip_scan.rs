#![no_main]
//! A byte that is changed in a compressed body breaks its checksum, and nothing behind it is ever reached. So every other
//! change is made to what is inside, which is then packed again.

use std::io::{Read as _, Write as _};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

/// Longest text that is packed again.
const TEXT_BYTES_MAX: usize = 8 * 1024;

fuzz_target!(|input: &[u8]| inference_proxy_fuzz::checks::gzip_scan::check(input));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    match mutated_inside(&data[..size], seed).filter(|packed| seed % 2 == 0 && packed.len() <= max_size) {
        Some(packed) => {
            data[..packed.len()].copy_from_slice(&packed);
            packed.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});

fn mutated_inside(packed: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    MultiGzDecoder::new(packed).take(TEXT_BYTES_MAX as u64).read_to_end(&mut text).ok()?;
    let length = text.len();
    text.resize(TEXT_BYTES_MAX, 0);
    let length = fuzzer_mutate(&mut text, length, TEXT_BYTES_MAX);
    // In one member, or in two.
    let (first, second) = text[..length].split_at(if seed % 3 == 0 { length / 2 } else { length });
    let mut packed = Vec::new();
    for part in [first, second] {
        if part.is_empty() && !packed.is_empty() {
            continue;
        }
        let mut encoder = GzEncoder::new(packed, Compression::new(seed / 2 % 10));
        encoder.write_all(part).ok()?;
        packed = encoder.finish().ok()?;
    }
    Some(packed)
}
