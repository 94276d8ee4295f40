//! The `Date` of an answer (RFC 9110, 6.6.1), written once a second on each thread.

use std::{cell::RefCell, io::Write as _, time::SystemTime};

/// How long a date is: `Sun, 06 Nov 1994 08:49:37 GMT`.
const DATE_BYTES: usize = 29;

thread_local! {
    static LAST: RefCell<Written> = const { RefCell::new(Written { second: None, text: [0; DATE_BYTES] }) };
}

/// A date as it was written last.
#[derive(Debug)]
struct Written {
    /// Seconds since 1970.
    second: Option<u64>,
    text: [u8; DATE_BYTES],
}

/// Appends `now` as HTTP writes it.
pub fn push_date(out: &mut Vec<u8>, now: SystemTime) {
    LAST.with_borrow_mut(|last| out.extend_from_slice(last.at(now)));
}

impl Written {
    fn at(&mut self, now: SystemTime) -> &[u8] {
        let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if self.second != Some(second) {
            // A clock before 1970 or past 9999 has no date in this form; the next second may have one.
            let date = httpdate::HttpDate::from(
                SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(second.min(LAST_SECOND)),
            );
            // The text is as long as the room for it.
            let _ = write!(&mut self.text[..], "{date}");
            self.second = Some(second);
        }
        &self.text
    }
}

/// 31 December 9999, 23:59:59.
const LAST_SECOND: u64 = 253_402_300_799;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_date_is_written_anew_when_the_second_is_another() {
        let mut written = Written { second: None, text: [0; DATE_BYTES] };
        let at = |millis: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        for (millis, expected) in [
            (784_111_777_000, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (784_111_777_999, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (784_111_778_000, "Sun, 06 Nov 1994 08:49:38 GMT"),
            // A clock that was put back.
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (1_709_164_800_000, "Thu, 29 Feb 2024 00:00:00 GMT"),
            (u64::MAX / 1_000, "Fri, 31 Dec 9999 23:59:59 GMT"),
        ] {
            assert_eq!(std::str::from_utf8(written.at(at(millis))), Ok(expected), "{millis}");
        }
        assert_eq!(written.at(SystemTime::UNIX_EPOCH - Duration::from_secs(1)), b"Thu, 01 Jan 1970 00:00:00 GMT");
        let mut out = b"date: ".to_vec();
        push_date(&mut out, at(784_111_777_000));
        assert_eq!(out, b"date: Sun, 06 Nov 1994 08:49:37 GMT");
    }
}
