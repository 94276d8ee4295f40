//! W3C Trace Context: which span of a caller a request belongs to (<https://www.w3.org/TR/trace-context/>). Pure.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// Length of a `traceparent` of version 00.
pub const TRACEPARENT_BYTES: usize = 55;
/// Longest `tracestate` that is looked at. Callers may count on 512 bytes being passed on; it is passed on whole, or not
/// at all.
const TRACESTATE_BYTES_MAX: usize = 4096;

/// Reads the caller's context. `None` if there is none that could be continued: a trace begins here.
///
/// `traceparent` and `tracestate` are the values of all lines with these names.
pub fn parse<'l>(
    mut traceparent: impl Iterator<Item = &'l [u8]>,
    tracestate: impl Iterator<Item = &'l [u8]>,
) -> Option<SpanContext> {
    let (line, None) = (traceparent.next()?, traceparent.next()) else { return None };
    let (trace_id, span_id, flags) = parse_traceparent(line.trim_ascii())?;
    let mut state = Vec::new();
    for line in tracestate {
        if !state.is_empty() {
            state.push(b',');
        }
        state.extend_from_slice(line);
        if state.len() > TRACESTATE_BYTES_MAX {
            state.clear();
            break;
        }
    }
    let state = std::str::from_utf8(&state).ok().and_then(parse_tracestate).unwrap_or_default();
    Some(SpanContext::new(trace_id, span_id, flags, true, state))
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, in lower case. Versions to come are read as far as this one goes.
fn parse_traceparent(text: &[u8]) -> Option<(TraceId, SpanId, TraceFlags)> {
    let (head, rest) = text.split_at_checked(TRACEPARENT_BYTES)?;
    let version = hex(&head[..2])?;
    let is_known_form = match version {
        0 => rest.is_empty(),
        0xff => false,
        _ => rest.is_empty() || rest[0] == b'-',
    };
    if !is_known_form || [head[2], head[35], head[52]] != [b'-'; 3] {
        return None;
    }
    let trace_id = TraceId::from(hex(&head[3..35])?);
    let span_id = SpanId::from(u64::try_from(hex(&head[36..52])?).ok()?);
    let flags = TraceFlags::new(u8::try_from(hex(&head[53..55])?).ok()?) & TraceFlags::SAMPLED;
    (trace_id != TraceId::INVALID && span_id != SpanId::INVALID).then_some((trace_id, span_id, flags))
}

fn parse_tracestate(text: &str) -> Option<TraceState> {
    let members = text.split(',').map(str::trim).filter(|member| !member.is_empty());
    let pairs: Option<Vec<(&str, &str)>> =
        members.map(|member| member.split_once('=').filter(|(key, _)| !key.is_empty())).collect();
    pairs.filter(|pairs| pairs.len() <= 32).and_then(|pairs| TraceState::from_key_value(pairs).ok())
}

fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

/// The `traceparent` that makes the receiver's span a child of this span.
pub fn traceparent(context: &SpanContext) -> [u8; TRACEPARENT_BYTES] {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    write_hex(&mut text[3..35], &context.trace_id().to_bytes());
    write_hex(&mut text[36..52], &context.span_id().to_bytes());
    write_hex(&mut text[53..55], &[context.trace_flags().to_u8()]);
    text
}

fn write_hex(out: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (pair, byte) in out.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn parsed(traceparent: &[&str], tracestate: &[&str]) -> Option<SpanContext> {
        parse(traceparent.iter().map(|v| v.as_bytes()), tracestate.iter().map(|v| v.as_bytes()))
    }

    #[test]
    fn what_was_read_is_written_the_same() {
        let context = parsed(&[PARENT], &["a=1 , b=2", "c@d=3"]).unwrap();
        assert!(context.is_remote() && context.is_sampled());
        assert_eq!(traceparent(&context), PARENT.as_bytes());
        assert_eq!(context.trace_state().header(), "a=1,b=2,c@d=3");
        let unsampled = parsed(&[&PARENT.replace("-01", "-00")], &[]).unwrap();
        assert!(!unsampled.is_sampled());
    }

    #[test]
    fn versions_to_come_are_read_as_far_as_this_one_goes() {
        let later = PARENT.replacen("00", "cc", 1);
        assert!(parsed(&[&later], &[]).is_some());
        assert!(parsed(&[&format!("{later}-what-comes")], &[]).is_some());
        assert!(parsed(&[&format!("{later}.what-comes")], &[]).is_none());
        assert!(parsed(&[&format!("{PARENT}-x")], &[]).is_none());
    }

    #[test]
    fn what_is_wrong_begins_a_new_trace() {
        for wrong in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-010",
        ] {
            assert!(parsed(&[wrong], &[]).is_none(), "{wrong}");
        }
        assert!(parsed(&[PARENT, PARENT], &[]).is_none());
        assert!(parsed(&[], &["a=1"]).is_none());
    }

    #[test]
    fn a_state_that_cannot_be_kept_costs_nothing_but_itself() {
        let long = "a=1,".repeat(2000);
        for state in ["no pairs", "=", "a=1,b", long.as_str()] {
            let context = parsed(&[PARENT], &[state]).unwrap();
            assert_eq!(context.trace_state().header(), "", "{state}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_trouble(parent in "[-0-9a-f]{0,70}", state in "[ -~]{0,80}") {
            if let Some(context) = parsed(&[&parent], &[&state]) {
                assert_eq!(&traceparent(&context)[3..52], &parent.as_bytes()[3..52]);
            }
        }
    }
}
