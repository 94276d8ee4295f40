//! What `/status` and `inference-proxy status` show: every labelled container, its state and why, as plain data.

use std::fmt;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// A question to whoever keeps the picture.
#[derive(Debug)]
pub enum Ask {
    /// The whole picture.
    Status(oneshot::Sender<Status>),
}

/// The whole picture. The shape is versioned: fields are added, never changed, within one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of this shape.
    pub version: u32,
    /// Version of the proxy.
    pub proxy_version: String,
    /// The first scan and its probes are done, and the proxy is not shutting down.
    pub ready: bool,
    /// State of discovery.
    pub discovery: DiscoveryStatus,
    /// Every container that carries `inference.enable`, sorted by name.
    pub containers: Vec<ContainerStatus>,
}

/// Whether discovery sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoveryStatus {
    /// What is watched.
    pub source: String,
    /// It sees now.
    pub connected: bool,
    /// When everything was compared last, RFC 3339.
    pub last_sync: Option<String>,
    /// The last trouble and what to do about it; gone once discovery has seen for a while.
    pub error: Option<String>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// `discovered`, `probing`, `ready`, `unhealthy` or `draining`.
    pub state: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Why it is not routed, and what to change; `None` while it is.
    pub reason: Option<String>,
    /// Models it announced.
    pub models: Vec<String>,
    /// Where it is reached.
    pub address: Option<String>,
    /// Over which network.
    pub network: Option<String>,
    /// Requests it is serving.
    pub in_flight: u64,
    /// Labels that were not understood.
    pub problems: Vec<String>,
}

impl fmt::Display for Status {
    /// A table for people: one line per container, then what needs saying about it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sight = match (&self.discovery.error, self.discovery.connected) {
            (Some(error), false) => format!("cannot see: {error}"),
            (Some(error), true) => format!("connected, but not long ago: {error}"),
            (None, true) => format!("connected, compared {}", self.discovery.last_sync.as_deref().unwrap_or("never")),
            (None, false) => "not scanned yet".to_owned(),
        };
        writeln!(f, "inference-proxy {}, {}", self.proxy_version, if self.ready { "ready" } else { "not ready" })?;
        writeln!(f, "{}: {sight}\n", self.discovery.source)?;
        if self.containers.is_empty() {
            return writeln!(f, "no container carries the label inference.enable=true");
        }
        let header = ["CONTAINER", "STATE", "SINCE", "MODELS", "ADDRESS", "IN FLIGHT"].map(str::to_owned);
        let rows: Vec<[String; 6]> =
            std::iter::once(header).chain(self.containers.iter().map(ContainerStatus::row)).collect();
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for (index, row) in rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
            let Some(container) = index.checked_sub(1).and_then(|i| self.containers.get(i)) else {
                continue;
            };
            for line in container.reason.iter().chain(&container.problems) {
                writeln!(f, "    {line}")?;
            }
        }
        Ok(())
    }
}

impl ContainerStatus {
    fn row(&self) -> [String; 6] {
        let or_dash = |text: &str| {
            if text.is_empty() { "-".to_owned() } else { text.to_owned() }
        };
        [
            self.name.clone(),
            self.state.clone(),
            self.since.clone(),
            or_dash(&self.models.join(",")),
            or_dash(self.address.as_deref().unwrap_or_default()),
            self.in_flight.to_string(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_is_wrong_below_the_line_it_is_about() {
        let container = |name: &str, state: &str, reason: Option<&str>| ContainerStatus {
            id: "0".repeat(64),
            name: name.to_owned(),
            image: "i".to_owned(),
            state: state.to_owned(),
            since: "2026-01-01T00:00:00Z".to_owned(),
            reason: reason.map(str::to_owned),
            models: vec!["a".to_owned(), "b".to_owned()],
            address: None,
            network: None,
            in_flight: 3,
            problems: Vec::new(),
        };
        let status = Status {
            version: 1,
            proxy_version: "0".to_owned(),
            ready: true,
            discovery: DiscoveryStatus { source: "docker".to_owned(), connected: true, last_sync: None, error: None },
            containers: vec![
                container("one", "ready", None),
                container("longer-name", "discovered", Some("no network")),
            ],
        };
        let text = status.to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[3].starts_with("CONTAINER    STATE       SINCE"), "{text}");
        assert!(lines[4].starts_with("one          ready       2026-01-01T00:00:00Z  a,b     -        3"), "{text}");
        assert_eq!(lines[6], "    no network");
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
    }
}
