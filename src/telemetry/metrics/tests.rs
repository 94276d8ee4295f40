use super::*;

#[test]
fn statuses_are_counted_apart_and_bounded() {
    let counts = StatusCounts::default();
    assert!(counts.is_empty());
    for status in 100..200 {
        counts.increment(status);
        counts.increment(status);
    }
    assert!(!counts.is_empty());
    let mut seen = Vec::new();
    counts.each(|status, count| seen.push((status.to_string(), count)));
    assert_eq!(seen.len(), STATUS_SLOTS + 1);
    assert_eq!(seen[0], ("100".to_owned(), 2));
    assert_eq!(seen[STATUS_SLOTS], ("other".to_owned(), 2 * (100 - STATUS_SLOTS as u64)));
}

#[test]
fn sums_are_exact_where_values_are_small() {
    let histogram = Histogram::new(&SHORT_SECONDS);
    assert!(histogram.is_empty());
    for _ in 0..3 {
        histogram.observe(Duration::from_nanos(12_345));
    }
    let Distribution { counts, sum, .. } = histogram.distribution();
    assert_eq!((counts[1], sum), (3, 0.000_037_035));
    assert!(!histogram.is_empty());
}

#[test]
fn the_first_token_is_no_step_between_tokens() {
    let metrics = OperationMetrics::default();
    for (tokens, ms) in [(0, 9), (1, 9), (11, 100)] {
        metrics.streamed(tokens, Duration::from_millis(ms));
    }
    let Distribution { counts, sum, .. } = metrics.time_per_output_token.distribution();
    assert_eq!((counts.iter().sum::<u64>(), sum), (1, 0.01));
}

#[test]
fn words_have_numbers() {
    let numbers = PerWord::new(&["a", "b"]);
    numbers.increment("b");
    numbers.increment("b");
    assert_eq!(numbers.each().collect::<Vec<_>>(), [("a", 0), ("b", 2)]);
}
