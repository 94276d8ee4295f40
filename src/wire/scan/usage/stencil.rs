//! Recognises an event that is like the one before but for its text.
//!
//! The events of a stream are the same bytes over and over, except for a text and perhaps a running number or a time. So
//! an event that told nothing but a text is kept, with the places of those of its strings and numbers that mean nothing.
//! An event that equals it everywhere else would be read in just the same way, byte for byte, so that comparing is as
//! good as reading, and several times as fast. Which of the places differ from event to event shows as they come: one
//! that does is a hole in the stencil from then on, and all else is compared as it is.

use std::fmt;

use memchr::memchr2;

use super::object::{TextEnd, end_of_bare, end_of_text};

/// The longest event that is kept.
const EVENT_LIMIT_BYTES: usize = 1024;

/// How many values of an event may become holes.
const PLACES: usize = 16;

/// After how many misses in a row the events of this stream are taken to be too different from each other.
const MISSES: u8 = 8;

/// An event, with holes for what may differ.
#[derive(Default)]
pub(super) struct Stencil {
    event: Vec<u8>,
    /// The values that are or may become holes, in their order.
    places: Vec<Place>,
    /// The event does not fit any more: another is to be kept in its stead.
    stale: bool,
    misses: u8,
    /// The values of the event that is being read.
    marks: Vec<Mark>,
    /// How many bytes of the chunk are behind the line that is being read.
    beyond: usize,
}

/// What may be in a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    /// The inside of a string that is content, and not empty.
    Text,
    /// The inside of a string that means nothing.
    Other,
    /// A number or literal that means nothing.
    Bare,
}

struct Place {
    start: u16,
    end: u16,
    value: Value,
    is_hole: bool,
}

struct Mark {
    /// How many bytes of the chunk there are from its start.
    left: usize,
    value: Value,
}

// === impl Stencil ===

impl Stencil {
    /// What is behind the event that `rest` begins with, and the last byte of that; `None` if it does not fit, or is not
    /// complete.
    pub(super) fn strip<'a>(&mut self, rest: &'a [u8]) -> Option<(&'a [u8], u8)> {
        self.marks.clear();
        let last = *self.event.last()?;
        if self.has_given_up() {
            return None;
        }
        let (mut at, mut left) = (0, rest);
        for place in self.places.iter().filter(|place| place.is_hole) {
            let Some(value) = left.strip_prefix(&self.event[at..usize::from(place.start)]) else {
                self.adapt(at, left);
                return None;
            };
            let Some(len) = place.value.len(value) else {
                self.outdate();
                return None;
            };
            (at, left) = (usize::from(place.end), &value[len..]);
        }
        let Some(after) = left.strip_prefix(&self.event[at..]) else {
            self.adapt(at, left);
            return None;
        };
        (self.stale, self.misses) = (false, 0);
        Some((after, last))
    }

    /// A line is about to be read, behind which the chunk has this many bytes.
    pub(super) fn line(&mut self, beyond: usize) {
        self.beyond = beyond;
    }

    /// A value is about to be read, from the start of which its line has this many bytes.
    pub(super) fn mark(&mut self, value: Value, left: usize) {
        if self.wants_event() && self.marks.len() < PLACES {
            self.marks.push(Mark { left: self.beyond + left, value });
        }
    }

    /// An event has been read and told nothing but a text. The chunk has `beyond` bytes behind it.
    pub(super) fn keep(&mut self, event: &[u8], beyond: usize) {
        if !self.wants_event() || event.len() > EVENT_LIMIT_BYTES {
            return;
        }
        let place = |mark: Mark| {
            let start = (event.len() + beyond).checked_sub(mark.left)?;
            let end = start + mark.value.len(event.get(start..)?)?;
            let (start, end) = (u16::try_from(start).ok()?, u16::try_from(end).ok()?);
            Some(Place { start, end, value: mark.value, is_hole: mark.value == Value::Text })
        };
        self.places = std::mem::take(&mut self.marks).into_iter().filter_map(place).collect();
        self.event.clear();
        self.event.extend_from_slice(event);
        self.stale = false;
    }

    fn wants_event(&self) -> bool {
        (self.stale || self.event.is_empty()) && !self.has_given_up()
    }

    fn has_given_up(&self) -> bool {
        self.misses >= MISSES
    }

    /// What comes, `left`, is not `event[at..]`: the value that differs becomes a hole.
    fn adapt(&mut self, at: usize, left: &[u8]) {
        let same = self.event[at..].iter().zip(left).take_while(|(expected, found)| expected == found).count();
        if same == left.len() {
            // The rest of the event is in the next chunk.
            return;
        }
        let differs = |place: &&mut Place| {
            !place.is_hole && (usize::from(place.start)..=usize::from(place.end)).contains(&(at + same))
        };
        match self.places.iter_mut().find(differs) {
            Some(place) => {
                place.is_hole = true;
                self.miss();
            }
            None => self.outdate(),
        }
    }

    fn outdate(&mut self) {
        self.stale = true;
        self.miss();
    }

    fn miss(&mut self) {
        self.misses += 1;
        if self.has_given_up() {
            (self.event, self.places) = (Vec::new(), Vec::new());
        }
    }
}

impl fmt::Debug for Stencil {
    /// Without the event, because the words of an answer must not be in any log.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Stencil").field("len_bytes", &self.event.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Stencil {
    pub(super) fn held_bytes(&self) -> usize {
        self.event.capacity() + size_of::<Place>() * self.places.capacity() + size_of::<Mark>() * self.marks.capacity()
    }
}

// === impl Value ===

impl Value {
    /// The length of such a value at the start of `rest`.
    fn len(self, rest: &[u8]) -> Option<usize> {
        if self == Value::Bare {
            return end_of_bare(rest).filter(|&len| len > 0 && !matches!(rest[0], b'"' | b'{' | b'['));
        }
        let TextEnd::Quote(len) = end_of_text(rest) else { return None };
        // The end of a line is the end of the event's data, in whatever it lies.
        let is_one_line = memchr2(b'\n', b'\r', &rest[..len]).is_none();
        (is_one_line && (len > 0 || self == Value::Other)).then_some(len)
    }
}
