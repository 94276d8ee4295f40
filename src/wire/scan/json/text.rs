//! The inside of JSON strings: where one ends, what is escaped in it, and what must not stand there.

use memchr::memchr2;

/// Splits a string in front of its closing quote, its next escape sequence or its first raw control character.
pub(super) fn split_text(rest: &[u8]) -> (&[u8], &[u8]) {
    rest.split_at(plain_len(rest))
}

/// The length of the text at the start of `rest` that needs no closer look: up to the closing quote, a raw control
/// character, or an escape sequence that is wrong or cut off.
pub(super) fn skip_text(rest: &[u8]) -> usize {
    let mut at = 0;
    loop {
        at += plain_len(&rest[at..]);
        if rest.get(at) != Some(&b'\\') {
            return at;
        }
        // Escapes come in rows (`\r\n`, `\u4f60\u597d`), where a search for the next costs more than a look.
        while rest.get(at) == Some(&b'\\') {
            match unescape(&rest[at..]) {
                Ok(Some((_, len))) => at += len,
                Ok(None) | Err(_) => return at,
            }
        }
    }
}

/// The length of the text at the start of `text` that holds no quote, backslash or raw control character.
pub(super) fn plain_len(text: &[u8]) -> usize {
    // Most strings are short.
    let (words, tail) = text.as_chunks();
    for (index, word) in words.iter().take(SHORT_WORDS).enumerate() {
        let stops = stops_in(*word);
        if stops != 0 {
            return index * 8 + stops.trailing_zeros() as usize / 8;
        }
    }
    if words.len() <= SHORT_WORDS {
        let before = text.len() - tail.len();
        return before + tail.iter().position(|&byte| is_stop(byte)).unwrap_or(tail.len());
    }
    let (short, rest) = text.split_at(SHORT_WORDS * 8);
    let len = memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
    let run = &rest[..len];
    let control = if holds_control(run) { run.iter().position(|&byte| byte < b' ') } else { None };
    short.len() + control.unwrap_or(len)
}

/// How many words of a string are looked at one by one before it is taken for a long one.
const SHORT_WORDS: usize = 6;

/// A quote, a backslash or a raw control character.
pub(super) fn is_stop(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | 0..b' ')
}

/// One in every byte of a word.
const ONES: u64 = u64::MAX / 0xFF;
/// The highest bit of every byte of a word.
const HIGH_BITS: u64 = ONES * 0x80;

/// The highest bit of a byte is set where the byte is below `limit` (at most 0x80). Bytes behind such a byte may be marked
/// wrongly, because it borrows from them; bytes before it are not. The other bits mean nothing.
fn mark_below(word: u64, limit: u8) -> u64 {
    word.wrapping_sub(ONES * u64::from(limit)) & !word
}

/// A number whose lowest set bit lies in the byte that is the first stop of the word; 0 if there is none.
fn stops_in(word: [u8; 8]) -> u64 {
    let word = u64::from_le_bytes(word);
    let mark_equal = |byte: u8| mark_below(word ^ (ONES * u64::from(byte)), 1);
    (mark_equal(b'"') | mark_equal(b'\\') | mark_below(word, b' ')) & HIGH_BITS
}

/// Whether there is a raw control character in the text. In large blocks where it can be, because the compiler has vector
/// instructions for the least of many bytes; else in words, of which the last may overlap the one before it.
fn holds_control(text: &[u8]) -> bool {
    let (blocks, text) = text.as_chunks::<256>();
    if blocks.iter().any(|block| block.iter().fold(u8::MAX, |least, &byte| least.min(byte)) < b' ') {
        return true;
    }
    let Some(last) = text.last_chunk() else { return text.iter().any(|&byte| byte < b' ') };
    let (words, _) = text.as_chunks();
    let mark = |word: &[u8; 8]| mark_below(u64::from_le_bytes(*word), b' ');
    words.iter().fold(mark(last), |marks, word| marks | mark(word)) & HIGH_BITS != 0
}

/// The UTF-16 code unit and the length of the escape sequence that `text` begins with; `None` if it is cut off.
pub(super) fn unescape(text: &[u8]) -> Result<Option<(u16, usize)>, &'static str> {
    let unit = match text.get(1) {
        Some(&byte @ (b'"' | b'\\' | b'/')) => u16::from(byte),
        Some(b'b') => 0x08,
        Some(b't') => 0x09,
        Some(b'n') => 0x0A,
        Some(b'f') => 0x0C,
        Some(b'r') => 0x0D,
        Some(b'u') => {
            let digits = &text[2..text.len().min(6)];
            let mut unit = 0;
            for &digit in digits {
                let digit = char::from(digit).to_digit(16).ok_or("expected four hex digits")?;
                unit = unit << 4 | digit as u16;
            }
            return Ok((digits.len() == 4).then_some((unit, 6)));
        }
        Some(_) => return Err("unknown escape sequence"),
        None => return Ok(None),
    };
    Ok(Some((unit, 2)))
}
