//! Lines that wait to be written, end to end in one buffer, so that one more is a copy and no allocation. Pure.

/// Most lines that may wait. Those of the access log are some 400 bytes: both bounds are near each other.
pub(super) const LINES_MAX: usize = 16 << 10;
/// Most bytes that may wait: a reader may stand for a second while ten thousand requests end. As much again may be with the
/// writer.
pub(super) const BYTES_MAX: usize = 4 << 20;
/// What the program says at its end, or in a panic, may go beyond both by this.
pub(super) const RESERVE_BYTES: usize = 64 << 10;
/// So much of a buffer is kept for the next lines.
const BYTES_KEPT: usize = 64 << 10;
/// Most bytes in one write. A pipe takes these whole or not at all (pipe(7), `PIPE_BUF`): lines do not mix with those of
/// another program in the same pipe, and none is cut in two when this program ends while the pipe is not read.
const WRITE_MAX: usize = 4096;

/// Lines in their order, each with what ends it.
#[derive(Debug, Default)]
pub(super) struct Lines {
    text: Vec<u8>,
    /// Where in the text each of them ends.
    ends: Vec<usize>,
}

/// Lines that are written at once.
#[derive(Debug, PartialEq)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a [u8],
    pub(super) lines: usize,
}

impl Lines {
    pub(super) const fn new() -> Lines {
        Lines { text: Vec::new(), ends: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Takes a line if there is room for it.
    pub(super) fn push(&mut self, line: &[u8]) -> bool {
        self.ends.len() < LINES_MAX && self.push_within(BYTES_MAX, line)
    }

    /// Takes a line that must not be lost to others.
    pub(super) fn push_urgent(&mut self, line: &[u8]) -> bool {
        self.push_within(BYTES_MAX + RESERVE_BYTES, line)
    }

    fn push_within(&mut self, limit_bytes: usize, line: &[u8]) -> bool {
        let fits = self.text.len() + line.len() <= limit_bytes;
        if fits {
            self.text.extend_from_slice(line);
            self.ends.push(self.text.len());
        }
        fits
    }

    /// All of them, as they are to be written: whole lines, and only one if it is longer than a write should be.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let (mut start, mut ends) = (0, &self.ends[..]);
        std::iter::from_fn(move || {
            let lines = ends.partition_point(|end| *end - start <= WRITE_MAX).max(1).min(ends.len());
            let (these, later) = ends.split_at(lines);
            let text = &self.text[start..*these.last()?];
            (start, ends) = (start + text.len(), later);
            Some(Piece { text, lines })
        })
    }

    /// Forgets them. What memory many of them took is given back.
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(BYTES_KEPT);
        self.ends.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lengths: &[usize]) -> Lines {
        let mut lines = Lines::new();
        for length in lengths {
            assert!(lines.push(&vec![b'x'; *length]));
        }
        lines
    }

    #[test]
    fn bytes_and_lines_are_bounded_and_what_is_urgent_still_gets_in() {
        let mut full = lines(&[BYTES_MAX - 1]);
        assert!(!full.push(b"ab") && full.push(b"a") && !full.push(b"b"));
        assert!(full.push_urgent(b"panicked") && !full.push_urgent(&[b'x'; RESERVE_BYTES]));
        assert_eq!(full.len(), 3);
        let mut many = lines(&[1; LINES_MAX]);
        assert!(!many.push(b"a") && many.push_urgent(b"panicked"));
        many.clear();
        assert!(many.is_empty() && many.pieces().next().is_none() && many.push(b"a"));
    }

    #[test]
    fn pieces_are_whole_lines_that_a_pipe_takes_at_once() {
        for (lengths, expected) in [
            (&[][..], &[][..]),
            (&[1, 2, 3], &[3]),
            (&[WRITE_MAX - 1, 1, 1], &[2, 1]),
            (&[1, WRITE_MAX, 1], &[1, 1, 1]),
            (&[3 * WRITE_MAX, 1, 1], &[1, 2]),
            (&[1, 3 * WRITE_MAX, 3 * WRITE_MAX], &[1, 1, 1]),
        ] {
            let lines = lines(lengths);
            let pieces: Vec<Piece<'_>> = lines.pieces().collect();
            assert_eq!(pieces.iter().map(|piece| piece.lines).collect::<Vec<_>>(), expected, "{lengths:?}");
            assert_eq!(pieces.iter().map(|piece| piece.text).collect::<Vec<_>>().concat(), lines.text);
        }
    }

    #[test]
    fn memory_is_given_back() {
        let mut lines = lines(&[BYTES_MAX]);
        lines.clear();
        assert!(lines.text.capacity() <= BYTES_KEPT, "{} bytes", lines.text.capacity());
    }
}
