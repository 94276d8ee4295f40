//! The request body on its way to a backend. Pure: bytes come in as the client sends them, and come out as a backend gets
//! them.
//!
//! Every byte is looked at once, for its framing and for the routing key, and kept in the form in which it is sent. So a
//! second attempt sends what the first one sent, and a backend never gets the end of a body before all of it has been
//! looked at. What is kept is bounded, for one body and for all; past the bound the body still flows, but what has been
//! sent is let go, and with it the chance of another attempt.

mod budget;

use std::{
    collections::VecDeque,
    io::IoSlice,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::time::Instant;

use self::budget::{Budget, Waiter};
use crate::wire::{
    http1::body::{BodyDecoder, Framing, FramingError, push_chunk, push_last_chunk},
    scan::{ModelScanner, Prompt, ScanError},
};

/// Why a body could not be passed on to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyFault {
    /// It does not name one model.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// It is larger than a body may be.
    #[error("request body too large")]
    TooLarge,
    /// More would have to be held than one body may.
    #[error("request body too large to hold")]
    HoldTooLarge,
    /// All bodies together hold as much as they may.
    #[error("too many request bodies held")]
    HoldFull,
    /// It was held for long without its model, and others needed the room.
    #[error("held for too long without a model while there was no room for others")]
    GaveWay,
    /// Its framing is wrong.
    #[error("{0}")]
    Framing(#[from] FramingError),
}

/// Bounds for bodies; one for the whole proxy.
#[derive(Debug)]
pub struct BodyLimits {
    /// Most bytes in one body.
    pub max_body_bytes: u64,
    /// Most bytes of one body held at a time.
    pub hold_max_bytes: usize,
    budget: Budget,
}

/// All bodies together hold at most this many times what one may.
const HOLD_BODIES: usize = 8;
/// Bodies are counted in units of this size, so that one that comes in small pieces touches the shared count seldom.
const COUNTED_BYTES: usize = 4 * 1024;
/// What decoding a compressed body takes: a window of 32 KiB, and tables.
const DECODER_BYTES: usize = 48 * 1024;
/// Most bytes that are read at a time for a body that has to go on although no room is left.
const SHORT_READ_BYTES: usize = 4 * 1024;
/// A stretch of a body is kept in pieces of at least this size, however small the segments are in which it comes.
const PIECE_BYTES_MIN: usize = 16 * 1024;
/// How much may wait for a backend that reads more slowly than the client sends, once the model is known.
pub const AHEAD_BYTES_MAX: usize = 64 * 1024;

impl BodyLimits {
    /// Bounds as configured.
    pub fn new(max_body_bytes: u64, hold_max_bytes: usize) -> Arc<BodyLimits> {
        let budget = Budget::new(hold_max_bytes.saturating_mul(HOLD_BODIES));
        Arc::new(BodyLimits { max_body_bytes, hold_max_bytes, budget })
    }

    /// Bytes held by all bodies.
    pub fn held_bytes(&self) -> usize {
        self.budget.held_bytes()
    }
}

/// A request body, as far as it has come.
#[derive(Debug)]
pub struct Replay {
    decoder: BodyDecoder,
    is_chunked: bool,
    scanner: Option<ModelScanner>,
    /// A body without the routing key is none the worse.
    key_is_optional: bool,
    /// The prompt in the body, as far as it had come when a backend was to be chosen.
    prompt: Option<Prompt>,
    /// What a backend gets of it, in the form in which it is sent.
    held: Held,
    /// Payload so far.
    seen_bytes: u64,
    limits: Arc<BodyLimits>,
    /// What has been sent is kept for another attempt.
    keeps_sent: bool,
    /// The time, as far as it was told.
    now: Option<Instant>,
}

/// How far an attempt has come with sending a body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    sent_bytes: u64,
}

impl Cursor {
    /// So many bytes of the body have been sent.
    pub fn sent_bytes(self) -> u64 {
        self.sent_bytes
    }
}

/// Pieces of a body, with what they count for; gives it back when dropped.
#[derive(Debug)]
struct Held {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes in `pieces`.
    bytes: usize,
    /// Bytes that were let go before the first piece.
    gone_bytes: u64,
    /// Beside the pieces: what the scanner needs.
    extra_bytes: usize,
    counted_bytes: usize,
    /// Set while the model has not come; then it keeps the count.
    waiter: Option<Arc<Waiter>>,
    limits: Arc<BodyLimits>,
}

// === impl Replay ===

impl Replay {
    /// A body with this framing. `scanner` looks for the routing key, where the body is to be looked at.
    pub fn new(framing: Framing, scanner: Option<ModelScanner>, limits: &Arc<BodyLimits>) -> Replay {
        Replay {
            decoder: BodyDecoder::new(framing),
            is_chunked: framing == Framing::Chunked,
            scanner,
            key_is_optional: false,
            prompt: None,
            held: Held::new(limits.clone()),
            seen_bytes: 0,
            limits: limits.clone(),
            keeps_sent: true,
            now: None,
        }
    }

    /// The time from which on more is taken in. Others may have to give way to a body that has been told it.
    pub fn at(&mut self, now: Instant) {
        self.now = Some(now);
    }

    /// Takes in what the client has sent; returns how much of it belonged to the body, of which the framing has been
    /// followed even on failure. Once the model is known, what does not fit is let go after it has been sent; until then
    /// it is a fault.
    ///
    /// A fault means that the body cannot be passed on. What had been taken in before may have been sent; the end never
    /// was.
    pub fn take_in(&mut self, input: &[u8], model_is_known: bool) -> (usize, Result<(), BodyFault>) {
        let mut at = 0;
        while at < input.len() && !self.decoder.is_done() {
            let decoded = match self.decoder.decode(&input[at..]) {
                Ok(decoded) => decoded,
                Err(error) => return (at, Err(error.into())),
            };
            at += decoded.consumed;
            if let Err(fault) = self.keep(decoded.payload, model_is_known) {
                return (at, Err(fault));
            }
        }
        (at, Ok(()))
    }

    /// Follows the framing of bytes that are not sent on; returns how much of it belonged to the body.
    ///
    /// # Errors
    /// The framing is broken.
    pub fn pass_over(&mut self, input: &[u8]) -> Result<usize, FramingError> {
        let mut at = 0;
        while at < input.len() && !self.decoder.is_done() {
            let decoded = self.decoder.decode(&input[at..])?;
            at += decoded.consumed;
            self.seen_bytes += decoded.payload.len() as u64;
        }
        Ok(at)
    }

    /// How much is best taken in at a time, so that a thread that has others to serve is not kept from them.
    pub fn bite_bytes(&self) -> usize {
        self.scanner.as_ref().map_or(usize::MAX, ModelScanner::bite_bytes)
    }

    /// How much has come out of the decoder of a compressed body, in bytes: that, and not what was sent, takes the time.
    pub fn decoded_bytes(&self) -> u64 {
        self.scanner.as_ref().map_or(0, ModelScanner::decoded_bytes)
    }

    /// Looks at a stretch of payload and keeps it; and the end of the body, once it has come.
    fn keep(&mut self, payload: &[u8], model_is_known: bool) -> Result<(), BodyFault> {
        let is_over = self.decoder.is_done();
        self.seen_bytes += payload.len() as u64;
        if self.seen_bytes > self.limits.max_body_bytes {
            return Err(BodyFault::TooLarge);
        }
        if let Some(scanner) = &mut self.scanner {
            // What would not fit may be held only if the model is known by then.
            let room = self.limits.hold_max_bytes.saturating_sub(self.held.bytes).min(payload.len());
            let (fits, rest) = payload.split_at(if model_is_known { payload.len() } else { room });
            scanner.feed(fits)?;
            if !rest.is_empty() && scanner.model().is_none() {
                return Err(BodyFault::HoldTooLarge);
            }
            scanner.feed(rest)?;
            match if is_over { scanner.finish() } else { Ok(()) } {
                // The caller knows it from elsewhere.
                Err(ScanError::ModelMissing) if model_is_known || self.key_is_optional => {}
                finished => finished?,
            }
        }
        if self.keeps_sent
            && let Err(fault) = self.held.make_room(payload.len(), self.seen_bytes, self.now)
        {
            if !model_is_known && self.model().is_none() {
                return Err(fault);
            }
            self.keeps_sent = false;
        }
        self.held.push(|out| encode(out, payload, self.is_chunked));
        if is_over && self.is_chunked {
            self.held.push(|out| push_last_chunk(out, self.decoder.trailers()));
        }
        if !self.keeps_sent {
            self.held.recount();
        }
        Ok(())
    }

    /// Has `scanner` look for the routing key in the body, which may do without it if `key_is_optional`.
    pub fn look_for(&mut self, scanner: Option<ModelScanner>, key_is_optional: bool) {
        self.held.extra_bytes = if scanner.as_ref().is_some_and(ModelScanner::decodes) { DECODER_BYTES } else { 0 };
        self.scanner = scanner;
        self.key_is_optional = key_is_optional;
    }

    /// The body has to be held until its model comes. From now on it may be told to give way.
    pub fn awaits_model(&mut self, now: Instant) {
        let held = &mut self.held;
        if held.waiter.is_none() {
            let counted_bytes = std::mem::take(&mut held.counted_bytes);
            let seen_bytes = usize::try_from(self.seen_bytes).unwrap_or(usize::MAX);
            held.waiter = Some(held.limits.budget.wait(counted_bytes, seen_bytes, now));
        }
    }

    /// The body has been told to give way.
    pub fn has_given_way(&self) -> bool {
        self.held.waiter.as_ref().is_some_and(|waiter| waiter.has_given_way())
    }

    /// Ready once the body has to give way: others need the room that it takes while its model does not come.
    pub fn poll_gave_way(&self, cx: &Context<'_>) -> Poll<()> {
        self.held.waiter.as_ref().map_or(Poll::Pending, |waiter| waiter.poll_gave_way(cx))
    }

    /// The model has come, or is known from elsewhere.
    pub fn has_model(&mut self) {
        if self.held.waiter.is_some() {
            self.held.waits_no_more();
            self.held.recount();
        }
    }

    /// Whether anything looks for the routing key in the body.
    pub fn is_scanned(&self) -> bool {
        self.scanner.is_some()
    }

    /// Lets go of all that is held, because nothing of it is sent any more. Returns what reads the rest of the body to its
    /// end.
    pub fn let_go(&mut self) -> BodyDecoder {
        self.scanner = None;
        self.prompt = None;
        self.held = Held::new(self.limits.clone());
        std::mem::replace(&mut self.decoder, BodyDecoder::new(Framing::Empty))
    }

    /// The routing key, once it has been read.
    pub fn model(&self) -> Option<&str> {
        self.scanner.as_ref().and_then(ModelScanner::model)
    }

    /// No more of the prompt needs to be waited for: it is not wanted, or all of it or `enough_bytes` of the body have
    /// come, or no more can be held.
    pub fn is_prompt_here(&self, enough_bytes: u64) -> bool {
        let is_marked = self.scanner.as_ref().is_some_and(ModelScanner::marks_prompt);
        !is_marked || self.is_over() || !self.keeps_sent || self.seen_bytes >= enough_bytes
    }

    /// What has come of the prompt is the prompt from now on, if it was to be marked. `model` is what the request is for.
    pub fn end_prompt(&mut self, model: &str) -> Option<&mut Prompt> {
        self.prompt = self.scanner.as_mut().and_then(|scanner| scanner.take_prompt(model));
        self.prompt.as_mut()
    }

    /// The prompt, between [`end_prompt`](Self::end_prompt) and the beginning of the answer.
    pub fn prompt(&self) -> Option<&Prompt> {
        self.prompt.as_ref()
    }

    /// The id of the answer that the request continues, if it has said so by now.
    pub fn continues(&self) -> Option<&str> {
        self.scanner.as_ref().and_then(ModelScanner::continues)
    }

    /// The whole body has come.
    pub fn is_over(&self) -> bool {
        self.decoder.is_done()
    }

    /// Payload so far, in bytes.
    pub fn seen_bytes(&self) -> u64 {
        self.seen_bytes
    }

    /// Another attempt can begin: nothing that was sent has been let go.
    pub fn can_replay(&self) -> bool {
        self.held.gone_bytes == 0
    }

    /// The answer has begun: there will be no other attempt, and what has been sent is let go.
    pub fn forget_sent(&mut self, cursor: Cursor) {
        self.keeps_sent = false;
        self.prompt = None;
        self.held.let_go(cursor.sent_bytes);
        self.held.extra_bytes = 0;
        self.held.recount();
    }

    /// What is to be sent next, into `slices`; returns how many of them are filled.
    pub fn unsent<'r>(&'r self, cursor: Cursor, slices: &mut [IoSlice<'r>]) -> usize {
        let mut skip = usize::try_from(cursor.sent_bytes.saturating_sub(self.held.gone_bytes)).unwrap_or(usize::MAX);
        let mut filled = 0;
        for piece in &self.held.pieces {
            if filled == slices.len() {
                break;
            }
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            slices[filled] = IoSlice::new(&piece[skip..]);
            skip = 0;
            filled += 1;
        }
        filled
    }

    /// How many bytes wait to be sent.
    pub fn unsent_bytes(&self, cursor: Cursor) -> usize {
        let all = self.held.gone_bytes + self.held.bytes as u64;
        usize::try_from(all.saturating_sub(cursor.sent_bytes)).unwrap_or(usize::MAX)
    }

    /// `n` more bytes have been sent.
    pub fn advance(&mut self, cursor: &mut Cursor, n: usize) {
        cursor.sent_bytes += n as u64;
        if !self.keeps_sent {
            self.held.let_go(cursor.sent_bytes);
            self.held.recount();
        }
    }

    /// Whether more of the body is wanted: the backend keeps up, or there is room for what it does not take yet.
    pub fn takes_more(&self, cursor: Cursor) -> bool {
        let unsent_bytes = self.unsent_bytes(cursor);
        unsent_bytes < AHEAD_BYTES_MAX && (unsent_bytes == 0 || !self.limits.budget.is_used_up())
    }

    /// How much of it is best read at a time, at most `most`.
    pub fn read_bytes(&self, most: usize) -> usize {
        if self.limits.budget.is_used_up() { most.min(SHORT_READ_BYTES) } else { most }
    }

    /// All of the body has come and been sent.
    pub fn is_sent(&self, cursor: Cursor) -> bool {
        self.is_over() && self.unsent_bytes(cursor) == 0
    }
}

/// Appends a stretch of payload in the form in which it is sent. A chunk as the client cut it may be told by tricks that
/// servers differ over; what goes on is written anew.
fn encode(out: &mut Vec<u8>, payload: &[u8], is_chunked: bool) {
    if is_chunked { push_chunk(out, payload) } else { out.extend_from_slice(payload) }
}

// === impl Held ===

impl Held {
    fn new(limits: Arc<BodyLimits>) -> Held {
        let pieces = VecDeque::new();
        Held { pieces, bytes: 0, gone_bytes: 0, extra_bytes: 0, counted_bytes: 0, waiter: None, limits }
    }

    /// What so many bytes of the body count for.
    fn count_of(&self, bytes: usize) -> usize {
        if bytes == 0 { 0 } else { bytes.saturating_add(self.extra_bytes).next_multiple_of(COUNTED_BYTES) }
    }

    /// Counts `more` bytes, if there is room for them, or others have to make some at this time. `seen_bytes` have come in
    /// all.
    fn make_room(&mut self, more: usize, seen_bytes: u64, now: Option<Instant>) -> Result<(), BodyFault> {
        let bytes = self.bytes + more;
        if bytes > self.limits.hold_max_bytes {
            return Err(BodyFault::HoldTooLarge);
        }
        let before = self.waiter.as_ref().map_or(self.counted_bytes, |waiter| waiter.counted_bytes());
        let count = self.count_of(bytes).saturating_sub(before);
        if count > 0 && !self.limits.budget.take(count, now) {
            return Err(BodyFault::HoldFull);
        }
        match &self.waiter {
            None => self.counted_bytes += count,
            Some(waiter) => waiter.counts_for(count, usize::try_from(seen_bytes).unwrap_or(usize::MAX)),
        }
        if self.waiter.as_ref().is_some_and(|waiter| waiter.has_given_way()) {
            return Err(BodyFault::GaveWay);
        }
        Ok(())
    }

    /// Counts what is held now, whether there is room for it or not: it is on its way, and goes soon.
    fn recount(&mut self) {
        if self.waiter.is_some() {
            return;
        }
        let count = self.count_of(self.bytes);
        if count > self.counted_bytes {
            self.limits.budget.add(count - self.counted_bytes);
        } else if count < self.counted_bytes {
            self.limits.budget.give(self.counted_bytes - count);
        }
        self.counted_bytes = count;
    }

    fn waits_no_more(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            self.counted_bytes = self.limits.budget.waits_no_more(&waiter);
        }
    }

    /// Appends to what is held.
    fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        match self.pieces.back_mut().filter(|last| last.len() < PIECE_BYTES_MIN) {
            Some(last) => {
                let before = last.len();
                write(last);
                self.bytes += last.len() - before;
            }
            None => {
                let mut piece = Vec::new();
                write(&mut piece);
                self.bytes += piece.len();
                self.pieces.push_back(piece);
            }
        }
    }

    /// Drops pieces that lie wholly before this place in the body.
    fn let_go(&mut self, sent_bytes: u64) {
        while let Some(first) = self.pieces.front() {
            let end = self.gone_bytes + first.len() as u64;
            if end > sent_bytes {
                break;
            }
            self.gone_bytes = end;
            self.bytes -= first.len();
            self.pieces.pop_front();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.waits_no_more();
        if self.counted_bytes > 0 {
            self.limits.budget.give(self.counted_bytes);
        }
    }
}

#[cfg(test)]
mod tests;
