//! Signals: decides whether a `kill` event announces a stop.
//!
//! Docker shows nowhere else that a stop has begun, and sends the same event for a mere `docker kill -s HUP`. This file
//! refuses to know events and containers: it reads a stop signal as image authors write it, and judges numbers.

/// The signal that Docker sends if the container names no stop signal: `SIGTERM`.
pub(crate) const DEFAULT_STOP_SIGNAL: u8 = 15;

/// First and last real-time signal as the C library numbers them; it keeps the kernel's 32 and 33 for itself.
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

/// Signals after which any server is expected to end, also if its image names another one: `SIGINT`, `SIGQUIT`, `SIGKILL`, `SIGTERM`.
const ENDING: [u8; 4] = [2, 3, 9, 15];

/// Linux numbers (signal(7)), but for Alpha, MIPS, PA-RISC and SPARC, and the names that Docker knows.
const NAMED: &[(&str, u8)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("UNUSED", 31),
];

/// The number, 1 to 64, of a signal as a Dockerfile, an inspect answer or an event writes it: `SIGTERM`, `TERM`, `15`,
/// `SIGRTMIN+3`, `RTMAX-2`, in any case. `None` for an empty or unknown one; a container without a stop signal gets
/// [`DEFAULT_STOP_SIGNAL`].
pub(crate) fn parse_signal(text: &str) -> Option<u8> {
    let text = text.trim().to_ascii_uppercase();
    if let Ok(number) = text.parse() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    if let Some(&(_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Some(number);
    }
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(offset), _) => RTMIN.checked_add(parse_offset(offset, '+')?)?,
        (_, Some(offset)) => RTMAX.checked_sub(parse_offset(offset, '-')?)?,
        _ => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

/// `+3` with the sign `+`; nothing at all is 0.
fn parse_offset(text: &str, sign: char) -> Option<u8> {
    if text.is_empty() {
        return Some(0);
    }
    let digits = text.strip_prefix(sign)?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Whether a `kill` event says that the container is about to end, so that it must get no further request.
///
/// `kill` is the event's signal, `None` when it has none (Podman) or one that cannot be read. `stop_signal` is the
/// container's own, which always counts (Apache httpd stops on `SIGWINCH`). Other signals, such as a `SIGHUP`
/// that makes a server read its configuration again, end nothing.
///
/// Docker writes a container's labels over the event's own attributes. `labels_forge_signal` says that the container
/// carries a label named `signal`: the event then has the label instead of the signal, so every kill counts. A
/// needless drain heals once the container is seen to run on; a missed stop breaks requests.
pub(crate) fn is_stop_notice(kill: Option<u8>, stop_signal: u8, labels_forge_signal: bool) -> bool {
    labels_forge_signal || kill.is_none_or(|signal| signal == stop_signal || ENDING.contains(&signal))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn signals_as_people_write_them() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("TERM", 15),
            ("15", 15),
            (" 15 ", 15),
            ("sigterm", 15),
            ("Quit", 3),
            ("SIGINT", 2),
            ("SIGWINCH", 28),
            ("usr1", 10),
            ("SIGSYS", 31),
            ("1", 1),
            ("64", 64),
            ("SIGRTMIN", 34),
            ("RTMIN+0", 34),
            ("SIGRTMIN+3", 37),
            ("sigrtmin+15", 49),
            ("RTMIN+30", 64),
            ("RTMAX", 64),
            ("RTMAX-2", 62),
            ("SIGRTMAX-14", 50),
            ("RTMAX-30", 34),
        ] {
            assert_eq!(parse_signal(text), Some(number), "{text:?}");
        }
        for text in [
            "",
            " ",
            "0",
            "65",
            "256",
            "-1",
            "SIG",
            "SIGSIGTERM",
            "TERM1",
            "SIGNAL",
            "15.0",
            "0x0f",
            "RTMIN+31",
            "RTMIN-1",
            "RTMIN3",
            "RTMIN+",
            "RTMIN++3",
            "RTMIN+-3",
            "RTMIN+999",
            "RTMAX-31",
            "RTMAX+1",
            "RTMAX-",
            "RTMAX-255",
            "термин",
        ] {
            assert_eq!(parse_signal(text), None, "{text:?}");
        }
    }

    #[test]
    fn every_number_has_one_meaning() {
        assert!(NAMED.iter().all(|(name, _)| parse_signal(name) == parse_signal(&format!("SIG{name}"))));
        let mut numbers: Vec<u8> = NAMED.iter().filter_map(|(name, _)| parse_signal(name)).collect();
        numbers.dedup();
        assert_eq!(numbers, (1..=31).collect::<Vec<u8>>(), "1 to 31 must all be named, in order");
    }

    #[test]
    fn what_announces_a_stop() {
        const TERM: u8 = DEFAULT_STOP_SIGNAL;
        for (kill, stop_signal, forged, expected) in [
            // what a container's own stop signal is does not make the usual ones harmless
            (Some(15), TERM, false, true),
            (Some(9), TERM, false, true),
            (Some(2), TERM, false, true),
            (Some(3), TERM, false, true),
            (Some(15), 37, false, true),
            (Some(9), 3, false, true),
            // its own, whatever it is
            (Some(37), 37, false, true),
            (Some(28), 28, false, true),
            (Some(1), 1, false, true),
            // everything else: HUP, USR1, USR2, CONT, STOP, WINCH, another real-time signal
            (Some(1), TERM, false, false),
            (Some(10), TERM, false, false),
            (Some(12), TERM, false, false),
            (Some(18), TERM, false, false),
            (Some(19), TERM, false, false),
            (Some(28), TERM, false, false),
            (Some(38), 37, false, false),
            // Podman names no signal
            (None, TERM, false, true),
            (None, 37, false, true),
            // the label `signal=1` stands where the signal was
            (Some(1), TERM, true, true),
            (Some(10), 37, true, true),
            (None, TERM, true, true),
        ] {
            assert_eq!(is_stop_notice(kill, stop_signal, forged), expected, "{kill:?} {stop_signal} {forged}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

        #[test]
        fn any_text_is_a_signal_or_none(text in prop_oneof![
            any::<String>(),
            "(SIG|sig)?(RTMIN|RTMAX|TERM|[A-Z]{0,6})[+-]?[0-9]{0,4}",
            "[+-]?[0-9]{1,4}",
        ]) {
            let signal = parse_signal(&text);
            prop_assert!(signal.is_none_or(|n| (1..=64).contains(&n)));
            prop_assert_eq!(signal, parse_signal(&text.to_ascii_lowercase()));
            prop_assert!(signal.is_none_or(|n| parse_signal(&n.to_string()) == Some(n)));
        }

        #[test]
        fn the_own_stop_signal_always_counts(n in 1u8..=64, forged: bool) {
            prop_assert!(is_stop_notice(Some(n), n, forged));
        }
    }
}
