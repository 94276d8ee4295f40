//! What compose.example.yml says, so that the tests run what users copy.

use std::{path::Path, time::Duration};

/// The text of one service.
#[derive(Debug, Clone)]
pub(crate) struct Service(String);

/// The service of this name in compose.example.yml.
///
/// # Panics
/// When there is none.
pub(crate) fn service(name: &str) -> Service {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("compose.example.yml");
    let example = std::fs::read_to_string(path).unwrap();
    Service(block(&example, &format!("  {name}:")))
}

impl Service {
    /// The pairs of a mapping, such as `labels`, without the quotes.
    pub(crate) fn pairs(&self, key: &str) -> Vec<(String, String)> {
        let pairs = lines(&block(&self.0, &format!("    {key}:")));
        let pairs = pairs.iter().filter_map(|line| line.split_once(": "));
        pairs.map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned())).collect()
    }

    /// The value of one pair.
    pub(crate) fn value(&self, key: &str, name: &str) -> String {
        let pairs = self.pairs(key);
        let found = pairs.iter().find(|(key, _)| key == name);
        found.unwrap_or_else(|| panic!("no {name} under {key}: {pairs:?}")).1.clone()
    }

    /// The items of a list that has a line for each, such as Traefik's `command`.
    pub(crate) fn items(&self, key: &str) -> Vec<String> {
        let items = lines(&block(&self.0, &format!("    {key}:")));
        items.iter().filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect()
    }

    /// The text behind `key:`.
    pub(crate) fn field(&self, key: &str) -> String {
        let begin = format!("    {key}: ");
        let found = self.0.lines().find_map(|line| line.strip_prefix(&begin));
        found.unwrap_or_else(|| panic!("no {key} in {}", self.0)).to_owned()
    }
}

/// A duration in whole seconds, such as `75s`.
pub(crate) fn seconds(text: &str) -> Duration {
    let seconds = text.strip_suffix('s').and_then(|number| number.parse().ok());
    Duration::from_secs(seconds.unwrap_or_else(|| panic!("{text:?} is no number of seconds")))
}

/// What is indented below the line `head`.
fn block(text: &str, head: &str) -> String {
    let depth = head.len() - head.trim_start().len();
    // What is switched off stands at the beginning of its line.
    let is_silent = |line: &str| line.trim().is_empty() || line.starts_with('#');
    let is_below = |line: &&str| is_silent(line) || line.len() - line.trim_start().len() > depth;
    let mut rest = text.lines().skip_while(|line| !line.starts_with(head));
    assert!(rest.next().is_some(), "no line {head:?}");
    rest.take_while(is_below).map(|line| format!("{line}\n")).collect()
}

/// The lines that say something, without indentation.
fn lines(block: &str) -> Vec<String> {
    block.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect()
}
