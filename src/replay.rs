//! The request body on its way to a backend. Pure: bytes come in as the client sends them, and come out as a backend gets
//! them.
//!
//! Every byte is looked at once, for its framing and for the routing key, and kept in the form in which it is sent. So a
//! second attempt sends what the first one sent, and a backend never gets the end of a body before all of it has been
//! looked at. What is kept is bounded, for one body and for all; past the bound the body still flows, but what has been
//! sent is let go, and with it the chance of another attempt.

use std::{
    collections::VecDeque,
    io::IoSlice,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::{
    http1::body::{BodyDecoder, Framing, push_chunk, push_last_chunk},
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
    /// Its framing is wrong.
    #[error("{0}")]
    Framing(#[from] crate::http1::body::FramingError),
}

/// Bounds for bodies; one for the whole proxy.
#[derive(Debug)]
pub struct BodyLimits {
    /// Most bytes in one body.
    pub max_body_bytes: u64,
    /// Most bytes of one body held at a time.
    pub hold_max_bytes: usize,
    held_bytes: AtomicUsize,
}

/// All bodies together hold at most this many times what one may.
const HOLD_BODIES: usize = 8;
/// What every body may hold without being counted: ordinary requests touch no shared counter.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// A stretch of a body is kept in pieces of at least this size, however small the segments are in which it comes.
const PIECE_BYTES_MIN: usize = 16 * 1024;
/// How much may wait for a backend that reads more slowly than the client sends, once the model is known.
pub const AHEAD_BYTES_MAX: usize = 64 * 1024;

impl BodyLimits {
    /// Bounds as configured.
    pub fn new(max_body_bytes: u64, hold_max_bytes: usize) -> Arc<BodyLimits> {
        Arc::new(BodyLimits { max_body_bytes, hold_max_bytes, held_bytes: AtomicUsize::new(0) })
    }

    /// Bytes held by all bodies that count.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes.load(Relaxed)
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
}

/// How far an attempt has come with sending a body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    sent_bytes: u64,
}

/// Pieces of a body, with what they count for; gives it back when dropped.
#[derive(Debug)]
struct Held {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes in `pieces`.
    bytes: usize,
    /// Bytes that were let go before the first piece.
    gone_bytes: u64,
    counted_bytes: usize,
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
            held: Held { pieces: VecDeque::new(), bytes: 0, gone_bytes: 0, counted_bytes: 0, limits: limits.clone() },
            seen_bytes: 0,
            limits: limits.clone(),
            keeps_sent: true,
        }
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
            && let Err(fault) = self.held.make_room(payload.len())
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
        Ok(())
    }

    /// Has `scanner` look for the routing key in the body, which may do without it if `key_is_optional`.
    pub fn look_for(&mut self, scanner: Option<ModelScanner>, key_is_optional: bool) {
        self.scanner = scanner;
        self.key_is_optional = key_is_optional;
    }

    /// Whether anything looks for the routing key in the body.
    pub fn is_scanned(&self) -> bool {
        self.scanner.is_some()
    }

    /// What is left of the body, for reading it to its end without sending it. What was held is let go.
    pub fn into_rest(self) -> BodyDecoder {
        self.decoder
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
        self.held.uncount();
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
        }
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
    /// Counts `more` bytes, if there is room for them.
    fn make_room(&mut self, more: usize) -> Result<(), BodyFault> {
        let bytes = self.bytes + more;
        if bytes > self.limits.hold_max_bytes {
            return Err(BodyFault::HoldTooLarge);
        }
        let count = bytes.saturating_sub(UNCOUNTED_BYTES + self.counted_bytes);
        if count > 0 {
            let all = self.limits.hold_max_bytes.saturating_mul(HOLD_BODIES);
            if self.limits.held_bytes.fetch_add(count, Relaxed).saturating_add(count) > all {
                self.limits.held_bytes.fetch_sub(count, Relaxed);
                return Err(BodyFault::HoldFull);
            }
            self.counted_bytes += count;
        }
        Ok(())
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

    fn uncount(&mut self) {
        let counted = std::mem::take(&mut self.counted_bytes);
        if counted > 0 {
            self.limits.held_bytes.fetch_sub(counted, Relaxed);
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
        self.uncount();
    }
}

#[cfg(test)]
mod tests;
