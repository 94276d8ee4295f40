use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*};

use super::*;

fn load(waiting: u32, running: u32) -> Option<EngineLoad> {
    Some(EngineLoad { waiting, running })
}

#[test]
fn pages_of_real_engines_are_understood() {
    for (page, expect) in [("vllm", load(3, 21)), ("sglang", load(7, 27)), ("llamacpp", load(6, 4)), ("tei", None)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/metrics").join(page).with_extension("txt");
        assert_eq!(EngineLoad::parse(&fs::read(path).unwrap()), expect, "{page}");
    }
}

#[test]
fn odd_pages() {
    const RUNNING: &str = "vllm:num_requests_running";
    for (page, expect) in [
        (String::new(), None),
        ("<html>vllm:num_requests_running 3</html>".to_owned(), None),
        (format!("# {RUNNING} 3"), None),
        (RUNNING.to_owned(), None),
        (format!("{RUNNING} "), None),
        (format!("{RUNNING}{{"), None),
        (format!("{RUNNING}{{model=\"x\""), None),
        (format!("{RUNNING}{{model=\"x}} 3"), None),
        (format!("{RUNNING}_total 3"), None),
        (format!("{RUNNING}2 3"), None),
        (format!("x{RUNNING} 3"), None),
        (format!("{RUNNING} three"), None),
        (format!("{RUNNING} 0x3"), None),
        (format!("{RUNNING} 3"), load(0, 3)),
        (format!("{RUNNING}\t3\r\n"), load(0, 3)),
        (format!("{RUNNING} {{}} 3"), load(0, 3)),
        (format!("{RUNNING}{{}} 3 1700000000000"), load(0, 3)),
        (format!("{RUNNING}{{}}3"), load(0, 3)),
        (format!("{RUNNING}{{model=\"a}} 9 \\\" }} 8\"}}   3.0"), load(0, 3)),
        (format!("{RUNNING}{{model=\"\\\\\"}} 3"), load(0, 3)),
        (format!("{RUNNING} 0"), load(0, 0)),
        (format!("{RUNNING} 2.6"), load(0, 3)),
        (format!("{RUNNING} 3e2"), load(0, 300)),
        // Nothing that can be a count.
        (format!("{RUNNING} NaN"), None),
        (format!("{RUNNING} +Inf\n{RUNNING} -Inf\n{RUNNING} -1"), None),
        (format!("{RUNNING}{{e=\"0\"}} NaN\n{RUNNING}{{e=\"1\"}} 4"), load(0, 4)),
        (format!("{RUNNING} 1e300"), load(0, u32::MAX)),
        (format!("{RUNNING}{{e=\"0\"}} 4294967295\n{RUNNING}{{e=\"1\"}} 7"), load(0, u32::MAX)),
        // Two engines on one page: the first.
        (format!("llamacpp:requests_deferred 2\n{RUNNING} 3\nllamacpp:requests_processing 1"), load(2, 1)),
    ] {
        assert_eq!(EngineLoad::parse(page.as_bytes()), expect, "{page}");
    }
    let mut page = vec![0xff, 0xfe, b'\n'];
    page.extend_from_slice(b"sglang:num_queue_reqs{model=\"\xff\"} 5\n\xc0");
    assert_eq!(EngineLoad::parse(&page), load(5, 0));
}

/// Bytes of which many are such that they mean something here.
fn tokens() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        prop::sample::select(ENGINES.concat()).prop_map(|(name, _)| name.to_vec()),
        prop::sample::select(vec!["{", "}", "\"", "\\", " ", "\n", "\n", "3", "-", "1e9", "NaN", "a=", "#", "\r"])
            .prop_map(|text| text.as_bytes().to_vec()),
        vec(any::<u8>(), 0..4),
    ];
    vec(token, 0..60).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(page in prop_oneof![vec(any::<u8>(), 0..400), tokens()]) {
        let _ = EngineLoad::parse(&page);
    }

    #[test]
    fn series_of_all_names_and_labels_are_added_up(
        engine in 0..ENGINES.len(),
        series in vec((any::<prop::sample::Index>(), 0_u32..100_000, "[a-z\"\\\\{} ]{0,8}"), 1..30),
        noise in vec("(# HELP vllm:[a-z_]{1,9} [a-z ]{0,9}|[a-z]{1,9}_total(\\{[a-z]=\"[a-z]\"\\})? [0-9]{1,3})", 0..30),
    ) {
        let (mut expect, mut lines) = (EngineLoad::default(), noise);
        for (which, value, label) in series {
            let (name, gauge) = which.get(ENGINES[engine]);
            match gauge {
                Gauge::Waiting => expect.waiting += value,
                Gauge::Running => expect.running += value,
            }
            let label = label.replace('\\', r"\\").replace('"', "\\\"");
            lines.push(format!("{}{{a=\"{label}\",b=\"\"}} {value}.0", std::str::from_utf8(name).unwrap()));
        }
        lines.sort_by_key(|line| line.len() % 7);
        prop_assert_eq!(EngineLoad::parse(lines.join("\n").as_bytes()), Some(expect));
    }
}

#[test]
fn estimates_follow_our_own_count_and_age() {
    let born = Instant::now();
    let at = |ms: u64| born + Duration::from_millis(ms);
    let reported = ReportedLoad::new(born);
    assert_eq!(reported.estimate(7, at(0)), None, "nothing reported is not no load");
    // Waiting, running, ours when it was asked, ours now: what is there.
    for (waiting, running, then, now, expect) in [
        (0, 0, 0, 0, 0),
        (0, 0, 0, 5, 5),
        (3, 7, 10, 10, 10),
        (3, 7, 10, 12, 12),
        (3, 7, 10, 2, 2),
        // Six that are not ours.
        (3, 7, 4, 4, 10),
        (3, 7, 4, 9, 15),
        (3, 7, 4, 0, 6),
        // It does not know yet of all that are under way to it.
        (0, 2, 10, 10, 10),
        (0, 2, 10, 0, 0),
        (u32::MAX, u32::MAX, 0, 1, OTHERS_MAX + 1),
        (u32::MAX, 0, 0, u64::MAX, u64::MAX),
    ] {
        reported.set(EngineLoad { waiting, running }, then, at(1_000));
        assert_eq!(reported.estimate(now, at(1_000)), Some(expect), "{waiting} + {running} with {then}, then {now}");
    }
    reported.set(EngineLoad { waiting: 1, running: 1 }, 0, at(2_000));
    for (ms, expect) in [
        // By another thread, which read the clock before.
        (1_990, Some(5)),
        (2_000, Some(5)),
        (7_000, Some(5)),
        (7_001, None),
        (70_000_000, None),
    ] {
        assert_eq!(reported.estimate(3, at(ms)), expect, "at {ms} ms");
    }
    // It speaks again, after a year and at the end of the clock.
    for ms in [365 * 86_400_000, 100 * 365 * 86_400_000] {
        reported.set(EngineLoad { waiting: 4, running: 0 }, 1, at(ms));
        assert_eq!(reported.estimate(1, at(ms + 10)), Some(4));
    }
}
