use proptest::prelude::*;

use super::*;
use crate::wire::http1::body::LAST_CHUNK;

const KIB: usize = 1024;

fn limits() -> Arc<BodyLimits> {
    BodyLimits::new(1024 * KIB as u64, 64 * KIB)
}

fn replay(framing: Framing, limits: &Arc<BodyLimits>) -> Replay {
    Replay::new(framing, Some(ModelScanner::json()), limits)
}

/// A body whose model has so many bytes before and behind it.
fn body(before: usize, behind: usize) -> Vec<u8> {
    format!(r#"{{"a":"{}","model":"m","b":"{}"}}"#, "x".repeat(before), "y".repeat(behind)).into_bytes()
}

fn chunked(payload: &[u8], size: usize) -> Vec<u8> {
    let mut wire = Vec::new();
    payload.chunks(size).for_each(|piece| push_chunk(&mut wire, piece));
    wire.extend_from_slice(LAST_CHUNK);
    wire
}

/// What an attempt sends from its beginning, in writes of at most `step` bytes.
fn send(replay: &mut Replay, cursor: &mut Cursor, step: usize) -> Vec<u8> {
    let mut sent = Vec::new();
    loop {
        let mut slices = [IoSlice::new(&[]); 3];
        let filled = replay.unsent(*cursor, &mut slices);
        let bytes: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.iter().copied()).take(step).collect();
        if bytes.is_empty() {
            return sent;
        }
        replay.advance(cursor, bytes.len());
        sent.extend_from_slice(&bytes);
    }
}

/// The payload of what was sent.
fn payload(framing: Framing, wire: &[u8]) -> (Vec<u8>, bool) {
    let mut decoder = BodyDecoder::new(framing);
    let (mut payload, mut at) = (Vec::new(), 0);
    while at < wire.len() {
        let decoded = decoder.decode(&wire[at..]).unwrap();
        payload.extend_from_slice(decoded.payload);
        at += decoded.consumed;
    }
    (payload, decoder.is_done())
}

proptest! {
    #[test]
    fn every_attempt_sends_exactly_what_came_in_however_it_was_cut(
        before in 0..40_000usize, behind in 0..40_000usize, chunk in 1..9_000usize, read in 1..9_000usize,
        step in 1..70_000usize, is_chunked: bool,
    ) {
        let limits = BodyLimits::new(u64::MAX, usize::MAX);
        let body = body(before, behind);
        let framing = if is_chunked { Framing::Chunked } else { Framing::Length(body.len() as u64) };
        let wire = if is_chunked { chunked(&body, chunk) } else { body.clone() };
        let mut replay = replay(framing, &limits);
        let (mut first, mut cursor) = (Vec::new(), Cursor::default());
        for piece in wire.chunks(read) {
            prop_assert_eq!(replay.take_in(piece, false), (piece.len(), Ok(())));
            first.extend(send(&mut replay, &mut cursor, step));
        }
        prop_assert!(replay.is_over() && replay.is_sent(cursor) && replay.can_replay());
        prop_assert_eq!(replay.model(), Some("m"));
        prop_assert_eq!(payload(framing, &first), (body, true));
        let again = send(&mut replay, &mut Cursor::default(), step);
        prop_assert_eq!(again, first);
    }
}

#[test]
fn what_stands_behind_the_body_is_left_alone() {
    let body = body(1, 1);
    for (framing, wire) in [(Framing::Length(body.len() as u64), body.clone()), (Framing::Chunked, chunked(&body, 7))] {
        let mut replay = replay(framing, &limits());
        let bytes = [&wire[..], b"POST /next"].concat();
        assert_eq!(replay.take_in(&bytes, false), (wire.len(), Ok(())));
        assert!(replay.is_over());
    }
}

#[test]
fn more_than_is_held_flows_on_but_has_one_attempt() {
    let limits = limits();
    let body = body(10, 300 * KIB);
    let mut replay = replay(Framing::Length(body.len() as u64), &limits);
    let (mut sent, mut cursor) = (Vec::new(), Cursor::default());
    for (n, piece) in body.chunks(10 * KIB).enumerate() {
        assert_eq!(replay.take_in(piece, false), (piece.len(), Ok(())));
        sent.extend(send(&mut replay, &mut cursor, usize::MAX));
        assert_eq!(replay.can_replay(), n < 6, "after {} KiB", (n + 1) * 10);
        assert!(replay.held.bytes <= 74 * KIB, "what was sent is let go");
    }
    assert_eq!(sent, body);
}

#[test]
fn what_must_be_held_is_bounded() {
    let limits = limits();
    for behind in [0, 100] {
        let late = body(64 * KIB, behind);
        let mut replay = replay(Framing::Length(late.len() as u64), &limits);
        assert_eq!(replay.take_in(&late, false).1, Err(BodyFault::HoldTooLarge), "in one piece");
        let mut replay = self::replay(Framing::Length(late.len() as u64), &limits);
        let fault = late.chunks(1000).map(|piece| replay.take_in(piece, false).1).find(Result::is_err);
        assert_eq!(fault, Some(Err(BodyFault::HoldTooLarge)), "in many");
    }
    let early = body(60 * KIB, 60 * KIB);
    let mut replay = replay(Framing::Length(early.len() as u64), &limits);
    assert_eq!(replay.take_in(&early, false), (early.len(), Ok(())), "its model comes in time");
}

#[test]
fn a_backend_never_gets_the_end_of_a_body_that_went_wrong() {
    type IsRight = fn(&BodyFault) -> bool;
    let cases: [(&[u8], IsRight); 4] = [
        (br#"{"model":"m","x":1,"model":"n"}"#, |f| matches!(f, BodyFault::Scan(ScanError::ModelsDiffer { .. }))),
        (br#"{"model":"m","x":1"#, |f| matches!(f, BodyFault::Scan(ScanError::InvalidJson { .. }))),
        (br#"{"model":"m"}{"#, |f| matches!(f, BodyFault::Scan(ScanError::InvalidJson { .. }))),
        (br#"{"x":1}"#, |f| matches!(f, BodyFault::Scan(ScanError::ModelMissing))),
    ];
    for (body, is_right) in cases {
        for (framing, wire) in
            [(Framing::Length(body.len() as u64), body.to_vec()), (Framing::Chunked, chunked(body, 3))]
        {
            for step in 1..=wire.len() {
                let mut replay = replay(framing, &limits());
                let mut fault = None;
                for piece in wire.chunks(step) {
                    let (_, kept) = replay.take_in(piece, false);
                    if let Err(error) = kept {
                        fault = Some(error);
                        break;
                    }
                }
                assert!(fault.as_ref().is_some_and(is_right), "{fault:?} of {}", body.escape_ascii());
                let sent = send(&mut replay, &mut Cursor::default(), usize::MAX);
                assert!(!payload(framing, &sent).1, "{} in pieces of {step}", body.escape_ascii());
            }
        }
    }
}

#[test]
fn a_body_that_is_too_large_is_stopped_where_it_is() {
    let limits = BodyLimits::new(10, 64 * KIB);
    let mut replay = Replay::new(Framing::Chunked, None, &limits);
    assert_eq!(replay.take_in(b"a\r\n0123456789\r\n", true).1, Ok(()));
    assert_eq!(replay.take_in(b"1\r\nx", true).1, Err(BodyFault::TooLarge));
}

#[test]
fn broken_framing_is_a_fault() {
    let mut replay = replay(Framing::Chunked, &limits());
    let (taken, kept) = replay.take_in(b"2\r\n{}oops", false);
    assert!(matches!(kept, Err(BodyFault::Framing(_))), "{kept:?}");
    assert_eq!(taken, 5, "what was read can be passed over");
}

#[test]
fn trailers_are_sent_with_every_attempt() {
    let mut replay = replay(Framing::Chunked, &limits());
    assert_eq!(replay.take_in(b"D\r\n{\"model\":\"m\"}\r\n0\r\nx-sum: 1\r\n\r\n", false).1, Ok(()));
    for _ in 0..2 {
        let sent = send(&mut replay, &mut Cursor::default(), usize::MAX);
        assert_eq!(sent, b"d\r\n{\"model\":\"m\"}\r\n0\r\nx-sum: 1\r\n\r\n");
    }
}

#[test]
fn once_the_answer_has_begun_what_was_sent_is_let_go() {
    let limits = limits();
    let body = body(200, 60 * KIB);
    let mut replay = replay(Framing::Length(body.len() as u64), &limits);
    assert_eq!(replay.take_in(&body, false).1, Ok(()));
    let mut cursor = Cursor::default();
    send(&mut replay, &mut cursor, usize::MAX);
    replay.forget_sent(cursor);
    assert_eq!((replay.held.bytes, replay.can_replay(), limits.held_bytes()), (0, false, 0));
    assert!(replay.is_sent(cursor));
}

#[test]
fn what_is_held_is_counted_and_given_back() {
    let limits = BodyLimits::new(u64::MAX, 256 * KIB);
    let body = body(200 * KIB, 1);
    let mut replay = replay(Framing::Length(body.len() as u64), &limits);
    for piece in body.chunks(KIB) {
        assert_eq!(replay.take_in(piece, false).1, Ok(()));
    }
    let counted = limits.held_bytes();
    assert!((200 * KIB..=208 * KIB).contains(&counted), "{counted}: all of it");
    let rest = replay.let_go();
    assert_eq!((limits.held_bytes(), rest.is_done()), (0, true));
}

#[test]
fn all_bodies_together_hold_no_more_than_they_may() {
    let limits = limits();
    let body = body(63 * KIB, 0);
    let mut held: Vec<Replay> = Vec::new();
    let limits = BodyLimits::new(limits.max_body_bytes, 128 * KIB);
    let large = self::body(126 * KIB, 0);
    let fault = loop {
        let mut replay = replay(Framing::Length(large.len() as u64), &limits);
        match large.chunks(16 * KIB).map(|piece| replay.take_in(piece, false).1).find(Result::is_err) {
            None => held.push(replay),
            Some(kept) => break kept.unwrap_err(),
        }
        assert!(held.len() < 100, "they are without end");
    };
    assert_eq!(fault, BodyFault::HoldFull);
    assert_eq!(held.len(), 8, "128 KiB each");
    // A body that comes with its model needs no room, and is served all the same.
    let mut small = replay(Framing::Length(body.len() as u64), &limits);
    assert_eq!(small.take_in(&body, false).1, Ok(()));
    drop((held, small));
    assert_eq!(limits.held_bytes(), 0);
}

#[test]
fn a_body_in_tiny_pieces_costs_little_more_than_its_bytes() {
    let body = body(30 * KIB, 0);
    let mut replay = replay(Framing::Length(body.len() as u64), &limits());
    for byte in body.chunks(1) {
        assert_eq!(replay.take_in(byte, false).1, Ok(()));
    }
    let room: usize = replay.held.pieces.iter().map(Vec::capacity).sum();
    assert!(room <= 2 * body.len() + PIECE_BYTES_MIN, "{room} bytes for {}", body.len());
}
