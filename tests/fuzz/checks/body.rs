//! Framing of bodies, and what is kept of a request's body for sending it, against a decoder that has the whole body
//! before it.
//!
//! An input is a body in chunks; behind it may stand what is no part of it.

use std::io::IoSlice;

use inference_proxy::{
    data::replay::{BodyFault, BodyLimits, Cursor, Replay},
    wire::{
        http1::body::{BodyDecoder, Framing, FramingError, LAST_CHUNK},
        scan::{ModelScanner, ScanError},
    },
};

use super::{Dice, arrivals, scan};

/// Checks a chunked body.
pub fn check(input: &[u8]) {
    let plain = decode_plainly(input);
    assert_eq!(decode(Framing::Chunked, &[input]), plain);
    for pieces in arrivals(input) {
        assert_eq!(decode(Framing::Chunked, &pieces), plain);
        check_replay(Framing::Chunked, &pieces, &plain);
    }
    check_boundaries(input);

    // As bytes of a length, too: what is behind that length is not the body's.
    let length = Dice::of(input).below(input.len() + 2);
    let framing = Framing::Length(length as u64);
    let payload = input[..length.min(input.len())].to_vec();
    let end = if length <= input.len() { End::Over { consumed: length } } else { End::Open };
    let counted = Decoded { payload, trailers: Vec::new(), end };
    let close = Decoded { payload: input.to_vec(), trailers: Vec::new(), end: End::Open };
    for pieces in arrivals(input) {
        assert_eq!(decode(framing, &pieces), counted);
        assert_eq!(decode(Framing::Close, &pieces), close);
        check_replay(framing, &pieces, &counted);
    }
}

/// A body as far as it could be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decoded {
    payload: Vec<u8>,
    /// Of a body that is over.
    trailers: Vec<u8>,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// So many bytes were the body.
    Over { consumed: usize },
    /// There should be more.
    Open,
    /// It breaks the grammar.
    Broken,
}

/// Longest extension of a chunk, with the blanks in front of it or else its semicolon.
const EXTENSION_BYTES_MAX: usize = 256;
/// Most bytes of trailers.
const TRAILERS_BYTES_MAX: usize = 8 * 1024;

/// Decodes chunks (RFC 9112, 7.1) with the whole of them in sight.
fn decode_plainly(input: &[u8]) -> Decoded {
    let mut payload = Vec::new();
    let mut at = 0;
    let ended = |payload, trailers: &[u8], end| Decoded { payload, trailers: trailers.to_vec(), end };
    // What comes next must be these bytes, as far as there are any.
    let follows = |at: usize, text: &[u8]| {
        let there = &input[at..input.len().min(at + text.len())];
        if there == text { Ok(()) } else { Err(if text.starts_with(there) { End::Open } else { End::Broken }) }
    };
    loop {
        let digits = input[at..].iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let blanks = input[at + digits..].iter().take_while(|byte| b" \t".contains(byte)).count();
        let mut behind = at + digits + blanks;
        if digits > 16 || blanks > EXTENSION_BYTES_MAX || digits == 0 && at < input.len() {
            return ended(payload, b"", End::Broken);
        }
        if input.get(behind) == Some(&b';') {
            let extension = input[behind + 1..].iter().take_while(|byte| !b"\r\n\0".contains(byte)).count();
            if blanks.max(1) + extension > EXTENSION_BYTES_MAX {
                return ended(payload, b"", End::Broken);
            }
            behind += 1 + extension;
        }
        if let Err(end) = follows(behind, b"\r\n") {
            return ended(payload, b"", end);
        }
        let size = std::str::from_utf8(&input[at..at + digits]).expect("digits must be text");
        let size = u64::from_str_radix(size, 16).expect("16 digits must fit");
        at = behind + 2;
        if size == 0 {
            break;
        }
        let there = usize::try_from(size).unwrap_or(usize::MAX).min(input.len() - at);
        payload.extend_from_slice(&input[at..at + there]);
        at += there;
        if (there as u64) < size {
            return ended(payload, b"", End::Open);
        }
        if let Err(end) = follows(at, b"\r\n") {
            return ended(payload, b"", end);
        }
        at += 2;
    }
    let start = at;
    loop {
        let line = input[at..].iter().take_while(|byte| !b"\r\n\0".contains(byte)).count();
        if at + line - start > TRAILERS_BYTES_MAX {
            return ended(payload, b"", End::Broken);
        }
        if let Err(end) = follows(at + line, b"\r\n") {
            return ended(payload, b"", end);
        }
        if line == 0 {
            break;
        }
        at += line + 2;
        if at - start > TRAILERS_BYTES_MAX {
            return ended(payload, b"", End::Broken);
        }
    }
    let trailers = &input[start..at];
    let lines = trailers.split_inclusive(|byte| *byte == b'\n');
    let are_good = lines.map(|line| line.split(|byte| *byte == b':').collect::<Vec<_>>()).all(|parts| {
        let name = parts[0];
        let is_token = name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte));
        let frames = ["connection", "content-length", "host", "transfer-encoding"];
        parts.len() > 1
            && !name.is_empty()
            && is_token
            && !frames.iter().any(|n| name.eq_ignore_ascii_case(n.as_bytes()))
    });
    match are_good {
        true => ended(payload, trailers, End::Over { consumed: at + 2 }),
        false => ended(payload, b"", End::Broken),
    }
}

/// Decodes a body that arrives in pieces.
fn decode(framing: Framing, pieces: &[&[u8]]) -> Decoded {
    let mut decoder = BodyDecoder::new(framing);
    let (mut payload, mut consumed) = (Vec::new(), 0);
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() && !decoder.is_done() {
            match decoder.decode(rest) {
                Err(FramingError { .. }) => return Decoded { payload, trailers: Vec::new(), end: End::Broken },
                Ok(decoded) => {
                    assert!(decoded.consumed > 0, "a decoder that does not move would hang its caller");
                    assert!(decoded.payload.len() <= decoded.consumed);
                    payload.extend_from_slice(decoded.payload);
                    rest = &rest[decoded.consumed..];
                    consumed += decoded.consumed;
                }
            }
        }
    }
    match decoder.is_done() {
        true => Decoded { payload, trailers: decoder.trailers().to_vec(), end: End::Over { consumed } },
        false => Decoded { payload, trailers: Vec::new(), end: End::Open },
    }
}

/// Wherever nothing of a chunk has been begun, something may be put in, for one the end.
fn check_boundaries(input: &[u8]) {
    let mut decoder = BodyDecoder::new(Framing::Chunked);
    for byte in input.chunks(1) {
        if decoder.is_done() || decoder.decode(byte).is_err() {
            return;
        }
        if decoder.is_between_chunks() && !decoder.is_done() {
            let mut ended = decoder.clone();
            assert!(ended.decode(LAST_CHUNK).is_ok() && ended.is_done(), "it is not between chunks");
        }
    }
}

// === the body on its way to a backend ===

fn check_replay(framing: Framing, pieces: &[&[u8]], plain: &Decoded) {
    let mut dice = Dice::of(&plain.payload);
    let is_over = plain.end != End::Open && plain.end != End::Broken;

    // Without bounds, and nobody looking: all of it is sent, by every attempt.
    let unbounded = BodyLimits::new(u64::MAX, usize::MAX);
    let (mut replay, sent, fault) = pass(Replay::new(framing, None, &unbounded), pieces, true, &mut dice);
    assert_eq!(fault.is_some(), plain.end == End::Broken, "{fault:?}");
    check_sent(framing, &sent, plain);
    assert!(replay.can_replay());
    assert_eq!(
        send(&mut replay, &mut Cursor::default(), &mut dice, usize::MAX),
        sent,
        "another attempt sends the same"
    );

    // With bounds: a body that is larger is never complete; one that is not is, whatever is held of it.
    let most = dice.below(plain.payload.len() + 2);
    let bounded = BodyLimits::new(most as u64, dice.below(plain.payload.len() + 2));
    let (replay, sent, fault) = pass(Replay::new(framing, None, &bounded), pieces, true, &mut dice);
    if plain.payload.len() > most {
        assert_eq!(fault, Some(BodyFault::TooLarge));
        assert!(matches!(sent_decoded(framing, &sent).end, End::Open), "the end was sent");
    } else {
        check_sent(framing, &sent, plain);
    }
    drop(replay);
    assert_eq!(bounded.held_bytes(), 0, "what was counted is given back");

    // With somebody looking for the model: the end is sent if there is one.
    let found = scan(ModelScanner::json(), &[&plain.payload]);
    for key_is_optional in [false, true] {
        let mut replay = Replay::new(framing, None, &unbounded);
        replay.look_for(Some(ModelScanner::json()), key_is_optional);
        let (replay, sent, fault) = pass(replay, pieces, false, &mut dice);
        let is_good = match &found {
            Ok(_) => true,
            Err(ScanError::ModelMissing) => key_is_optional,
            Err(_) => false,
        };
        // A body of no bytes is never looked at.
        let was_looked_at = !(framing == Framing::Length(0));
        let sent = sent_decoded(framing, &sent);
        if was_looked_at && is_over {
            assert_eq!(fault.is_none(), is_good, "{fault:?}, {found:?}");
            assert_eq!(matches!(sent.end, End::Over { .. }), is_good);
        }
        if let (None, true, Ok((model, _))) = (fault, is_over, &found) {
            assert_eq!(replay.model(), was_looked_at.then_some(&**model));
        }
        assert!(plain.payload.starts_with(&sent.payload));
    }
}

/// Takes a body in and sends it as it comes.
fn pass(
    mut replay: Replay,
    pieces: &[&[u8]],
    model_is_known: bool,
    dice: &mut Dice,
) -> (Replay, Vec<u8>, Option<BodyFault>) {
    let (mut sent, mut cursor) = (Vec::new(), Cursor::default());
    let mut fault = None;
    for piece in pieces {
        if replay.is_over() {
            break;
        }
        let (taken, kept) = replay.take_in(piece, model_is_known);
        assert!(taken <= piece.len());
        if let Err(error) = kept {
            fault = Some(error);
            break;
        }
        assert!(taken == piece.len() || replay.is_over());
        if dice.below(3) > 0 {
            let writes = dice.below(4);
            sent.extend(send(&mut replay, &mut cursor, dice, writes));
        }
    }
    sent.extend(send(&mut replay, &mut cursor, dice, usize::MAX));
    assert!(fault.is_some() || replay.is_sent(cursor) == replay.is_over());
    (replay, sent, fault)
}

/// What goes out in at most so many writes, each of which takes as much as it likes.
fn send(replay: &mut Replay, cursor: &mut Cursor, dice: &mut Dice, writes: usize) -> Vec<u8> {
    let mut sent = Vec::new();
    for _ in 0..writes {
        let mut slices = [IoSlice::new(&[]); 3];
        let filled = replay.unsent(*cursor, &mut slices[..1 + dice.below(3)]);
        let offered: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).collect();
        assert!(offered.len() <= replay.unsent_bytes(*cursor));
        if offered.is_empty() {
            assert_eq!(replay.unsent_bytes(*cursor), 0);
            break;
        }
        let taken = 1 + dice.below(offered.len());
        replay.advance(cursor, taken);
        sent.extend_from_slice(&offered[..taken]);
    }
    sent
}

/// What was sent, as a backend reads it. Panics if it is written in any but the one plain way.
fn sent_decoded(framing: Framing, sent: &[u8]) -> Decoded {
    if framing == Framing::Chunked {
        let decoded = decode_plainly(sent);
        let mut written = Vec::new();
        let mut rest = sent;
        while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).expect("a size must be text"), 16);
            let size = size.expect("a size must be digits only");
            written.extend_from_slice(format!("{size:x}\r\n").as_bytes());
            if size == 0 {
                written.extend_from_slice(&decoded.trailers);
                written.extend_from_slice(b"\r\n");
                break;
            }
            written.extend_from_slice(&rest[end + 2..][..size]);
            written.extend_from_slice(b"\r\n");
            rest = &rest[end + 2 + size + 2..];
        }
        assert_eq!(written, sent, "it is not written plainly");
        decoded
    } else {
        decode(framing, &[sent])
    }
}

fn check_sent(framing: Framing, sent: &[u8], plain: &Decoded) {
    let decoded = sent_decoded(framing, sent);
    assert_eq!(decoded.payload, plain.payload);
    match plain.end {
        End::Over { .. } => {
            assert_eq!((decoded.trailers, decoded.end), (plain.trailers.clone(), End::Over { consumed: sent.len() }));
        }
        End::Open | End::Broken => assert_eq!(decoded.end, End::Open, "an end was sent that did not come"),
    }
}
