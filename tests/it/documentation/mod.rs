//! The README and `docs/` say what the code does: their tables are compared with those in the code, in both directions, and
//! every link leads somewhere.

mod failures;
mod links;
mod reference;

use std::path::Path;

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The text below a heading of any level, up to the next heading of the same level or a higher one.
fn section(name: &str, heading: &str) -> String {
    let level = |line: &str| Some(line.len() - line.trim_start_matches('#').len()).filter(|level| *level > 0);
    let title = |line: &str| line.trim_start_matches('#').trim() == heading;
    let page = page(name);
    let mut lines = page.lines().skip_while(|line| level(line).is_none() || !title(line));
    let own = lines.next().and_then(level).unwrap_or_else(|| panic!("{name} has no heading {heading:?}"));
    let below: Vec<&str> = lines.take_while(|line| level(line).is_none_or(|level| level > own)).collect();
    below.join("\n")
}

/// The cells of every row of every table below a heading, without the heads of the tables.
fn rows(name: &str, heading: &str) -> Vec<Vec<String>> {
    let section = section(name, heading);
    let lines: Vec<&str> = section.lines().collect();
    let is_rule = |at: usize| lines.get(at).is_some_and(|line| line.starts_with("|---"));
    let body = (0..lines.len()).filter(|at| lines[*at].starts_with("| ") && !is_rule(at + 1));
    let cells = |row: &str| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
    let rows: Vec<Vec<String>> = body.map(|at| cells(lines[at])).collect();
    assert!(!rows.is_empty(), "{name} has no table below {heading:?}");
    rows
}

/// Every word in code marks, in the order in which they stand there.
fn code_words(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The code words of two collections, one of the page and one of the code, are the same.
#[track_caller]
fn assert_same(what: &str, documented: impl IntoIterator<Item = String>, known: &[&str]) {
    let mut documented: Vec<String> = documented.into_iter().collect();
    let mut known: Vec<&str> = known.to_vec();
    documented.sort_unstable();
    known.sort_unstable();
    assert_eq!(documented, known, "{what}: the page is on the left, the code on the right");
}
