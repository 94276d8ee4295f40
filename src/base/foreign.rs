//! Text and times that others chose: how much of a text is shown, what would have it read as something else, and how long
//! a time may be.
//!
//! The words of containers about themselves end in logs, on terminals and in labels of metrics. A part that accepts such text
//! bounds it and refuses or escapes what misleads; what it means is not known here.

use std::{ops::RangeInclusive, time::Duration};

/// The longest time that is accepted from outside: ten years. A longer one means "for ever" just as well, and a sum of
/// "now" and this one cannot overflow.
pub const FOREVER: Duration = Duration::from_secs(315_360_000);

/// A time in seconds as another program gives it: negative means for ever, and nothing is longer than [`FOREVER`].
pub fn seconds(seconds: i64) -> Duration {
    u64::try_from(seconds).map_or(FOREVER, |seconds| Duration::from_secs(seconds).min(FOREVER))
}

/// So many of many names are named.
const NAMED_MAX: usize = 5;

/// Characters of the general category Cf (Unicode 16), and the separators of lines and paragraphs (Zl, Zp): they show
/// nothing themselves, but turn around, join or hide what stands beside them. Unicode hardly ever adds to these.
const FORMAT: [RangeInclusive<char>; 22] = [
    '\u{ad}'..='\u{ad}',
    '\u{600}'..='\u{605}',
    '\u{61c}'..='\u{61c}',
    '\u{6dd}'..='\u{6dd}',
    '\u{70f}'..='\u{70f}',
    '\u{890}'..='\u{891}',
    '\u{8e2}'..='\u{8e2}',
    '\u{180e}'..='\u{180e}',
    '\u{200b}'..='\u{200f}',
    '\u{2028}'..='\u{2029}',
    '\u{202a}'..='\u{202e}',
    '\u{2060}'..='\u{2064}',
    '\u{2066}'..='\u{206f}',
    '\u{feff}'..='\u{feff}',
    '\u{fff9}'..='\u{fffb}',
    '\u{110bd}'..='\u{110bd}',
    '\u{110cd}'..='\u{110cd}',
    '\u{13430}'..='\u{1343f}',
    '\u{1bca0}'..='\u{1bca3}',
    '\u{1d173}'..='\u{1d17a}',
    '\u{e0001}'..='\u{e0001}',
    '\u{e0020}'..='\u{e007f}',
];

/// Whether a text with this character may look like another one: control and format characters, and line separators.
pub fn is_misleading(c: char) -> bool {
    c.is_control() || FORMAT.iter().any(|range| range.contains(&c))
}

/// The start of a text as a message may quote it: so many characters at most, and what cannot be seen escaped.
pub fn shown(text: &str, chars_max: usize) -> String {
    let mut chars = text.chars();
    let mut shown: String = chars.by_ref().take(chars_max).flat_map(char::escape_debug).collect();
    if chars.next().is_some() {
        shown.push('…');
    }
    shown
}

/// A name as it is, unless it is longer than this or holds what cannot be seen: then as a message may quote it.
pub fn name(name: &str, chars_max: usize) -> String {
    let is_plain = name.chars().nth(chars_max).is_none() && !name.contains(is_misleading);
    if is_plain { name.to_owned() } else { shown(name, chars_max) }
}

/// As much of a text as fits into so many bytes, with an ellipsis where something is missing.
pub fn cut(mut text: String, bytes_max: usize) -> String {
    const MORE: char = '…';
    if text.len() > bytes_max {
        let room = bytes_max.saturating_sub(MORE.len_utf8());
        let end = (0..=room).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push(MORE);
    }
    text
}

/// The first of these names, and how many more there are.
pub fn few(names: &[impl AsRef<str>]) -> String {
    let (named, others) = names.split_at(names.len().min(NAMED_MAX));
    let named: Vec<&str> = named.iter().map(AsRef::as_ref).collect();
    let named = named.join(", ");
    match others.len() {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_misleads_is_what_cannot_be_seen() {
        for c in
            ['\0', '\u{1b}', '\u{7f}', '\u{85}', '\u{ad}', '\u{200b}', '\u{2028}', '\u{202e}', '\u{2066}', '\u{feff}']
        {
            assert!(is_misleading(c), "{c:?}");
        }
        for c in [' ', '/', '"', '\\', 'é', '\u{301}', 'я', '模', '\u{3000}', '🦀', '\u{e000}'] {
            assert!(!is_misleading(c), "{c:?}");
        }
        // The standard library escapes all of these, and more that may well stand in a name.
        let wrong = ('\0'..=char::MAX).find(|c| is_misleading(*c) && !c.escape_debug().to_string().starts_with('\\'));
        assert_eq!(wrong, None);
        assert_eq!(shown("a\u{202e}b\n\"", 9), "a\\u{202e}b\\n\\\"");
    }

    #[test]
    fn names_are_left_alone_unless_they_mislead() {
        for plain in ["", "app-llm-1", "<b>'\"", "模型", "abcdefghijkl"] {
            assert_eq!(name(plain, 12), plain);
        }
        for (odd, expected) in [
            ("a\u{1b}[2Jb", "a\\u{1b}[2Jb"),
            ("a\nb", "a\\nb"),
            ("a\u{202e}b", "a\\u{202e}b"),
            ("abcdefghijklm", "abcdefghijkl…"),
        ] {
            assert_eq!(name(odd, 12), expected);
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        for (text, bytes_max, expected) in [
            ("", 0, ""),
            ("abcdef", 6, "abcdef"),
            ("abcdefg", 6, "abc…"),
            ("äöü", 6, "äöü"),
            ("äöüx", 6, "ä…"),
            ("🦀🦀", 7, "🦀…"),
            ("🦀🦀", 6, "…"),
        ] {
            assert_eq!(cut(text.to_owned(), bytes_max), expected, "{text} in {bytes_max}");
        }
        assert_eq!((shown("abc", 3), shown("abcd", 3)), ("abc".to_owned(), "abc…".to_owned()));
    }

    #[test]
    fn no_time_is_longer_than_for_ever() {
        for (given, taken_s) in [(0, 0), (10, 10), (315_360_000, 315_360_000), (315_360_001, 315_360_000)] {
            assert_eq!(seconds(given), Duration::from_secs(taken_s), "{given}");
        }
        for given in [-1, i64::MIN, i64::MAX] {
            assert_eq!(seconds(given), FOREVER, "{given}");
        }
        assert!(tokio::time::Instant::now().checked_add(FOREVER * 4).is_some());
    }

    #[test]
    fn a_few_of_many_are_named() {
        assert_eq!((few(&[""; 0]), few(&["a"]), few(&["a", "b"])), (String::new(), "a".to_owned(), "a, b".to_owned()));
        let many: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        assert_eq!(few(&many[..5]), "0, 1, 2, 3, 4");
        assert_eq!(few(&many), "0, 1, 2, 3, 4 and 995 more");
    }
}
