//! A [`Discovery`] that is fed by hand, through a handle. It serves tests, and programs that embed the proxy where there
//! is no container engine.

use std::{net::SocketAddr, time::Duration};

use futures::{StreamExt as _, stream::BoxStream};
use tokio::sync::mpsc;

use super::{
    Change, Discovery, DiscoveryError, Endpoint, Health, HealthCheck, Incarnation, Looks, Phase, network::Reach,
};
use crate::{
    base::foreign::FOREVER,
    control::labels::{self, LabelSpec},
};

/// A discovery that reports the changes that are sent to its handle.
#[derive(Debug)]
pub struct Fixed {
    changes: mpsc::Receiver<Result<Change, DiscoveryError>>,
}

/// The handle that feeds a [`Fixed`] discovery.
#[derive(Debug, Clone)]
pub struct FixedHandle {
    changes: mpsc::Sender<Result<Change, DiscoveryError>>,
}

/// A discovery and its handle.
pub fn channel() -> (Fixed, FixedHandle) {
    let (sender, receiver) = mpsc::channel(64);
    (Fixed { changes: receiver }, FixedHandle { changes: sender })
}

/// An endpoint to be reported. It begins with the defaults of [`endpoint`], and methods change them.
#[derive(Debug, Clone)]
pub struct EndpointBuilder {
    endpoint: Endpoint,
    labels: Vec<(String, String)>,
}

/// A running endpoint at `addr` without a health check, named `name`.
pub fn endpoint(name: &str, addr: SocketAddr) -> EndpointBuilder {
    let endpoint = Endpoint {
        id: name.into(),
        name: name.to_owned(),
        role: name.into(),
        is_stopped_first: false,
        image: "fixed".to_owned(),
        incarnation: Incarnation(1),
        phase: Phase::Running,
        health: Health::None,
        // A report by hand stands until the next one.
        health_check: HealthCheck { overdue_after: FOREVER, mark: 0 },
        reach: Ok(Reach { targets: vec![addr], network: None, others: Vec::new() }),
        labels: LabelSpec::default(),
        problems: Vec::new(),
        excluded: None,
        stop_grace: Duration::from_secs(10),
    };
    EndpointBuilder { endpoint, labels: vec![("inference.enable".to_owned(), "true".to_owned())] }
}

impl EndpointBuilder {
    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the role.
    #[must_use]
    pub fn role(mut self, role: &str) -> Self {
        self.endpoint.role = role.into();
        self
    }

    /// Makes it one that is stopped before its replacement is started.
    #[must_use]
    pub fn stopped_first(mut self) -> Self {
        self.endpoint.is_stopped_first = true;
        self
    }

    /// Sets the image.
    #[must_use]
    pub fn image(mut self, image: &str) -> Self {
        image.clone_into(&mut self.endpoint.image);
        self
    }

    /// Sets the result of the health check.
    #[must_use]
    pub fn health(mut self, health: Health) -> Self {
        self.endpoint.health = health;
        self
    }

    /// Sets the progress of the health check.
    #[must_use]
    pub fn health_check(mut self, check: HealthCheck) -> Self {
        self.endpoint.health_check = check;
        self
    }

    /// Sets how long it may take to stop.
    #[must_use]
    pub fn stop_grace(mut self, grace: Duration) -> Self {
        self.endpoint.stop_grace = grace;
        self
    }

    /// Sets the phase.
    #[must_use]
    pub fn phase(mut self, phase: Phase) -> Self {
        self.endpoint.phase = phase;
        self
    }

    /// Sets the time of its start, which distinguishes this start from others.
    #[must_use]
    pub fn incarnation(mut self, started: i64) -> Self {
        self.endpoint.incarnation = Incarnation(started);
        self
    }
}

impl From<EndpointBuilder> for Endpoint {
    fn from(builder: EndpointBuilder) -> Endpoint {
        let mut endpoint = builder.endpoint;
        let pairs = builder.labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        if let Some(parsed) = labels::parse(pairs) {
            endpoint.problems = parsed.problems.iter().map(ToString::to_string).collect();
            endpoint.labels = parsed.spec;
        }
        endpoint
    }
}

impl FixedHandle {
    /// Reports a change, or an error of the source.
    pub async fn send(&self, change: Result<Change, DiscoveryError>) {
        // This fails only if no proxy listens any more.
        let _ = self.changes.send(change).await;
    }

    /// Reports [`Change::Upsert`].
    pub async fn upsert(&self, endpoint: impl Into<Endpoint>) {
        self.send(Ok(Change::Upsert(Box::new(endpoint.into())))).await;
    }

    /// Reports [`Change::Reset`].
    pub async fn reset(&self, endpoints: Vec<impl Into<Endpoint>>) {
        self.send(Ok(Change::Reset(endpoints.into_iter().map(Into::into).collect()))).await;
    }

    /// Reports [`Change::Stopping`].
    pub async fn stopping(&self, id: &str) {
        self.send(Ok(Change::Stopping(id.into()))).await;
    }

    /// Reports [`Change::Ended`].
    pub async fn ended(&self, id: &str) {
        self.send(Ok(Change::Ended(id.into()))).await;
    }
}

impl Discovery for Fixed {
    fn name(&self) -> &'static str {
        "fixed"
    }

    fn changes(self: Box<Self>, _looks: Looks) -> BoxStream<'static, Result<Change, DiscoveryError>> {
        let first = futures::stream::iter([Ok(Change::Reset(Vec::new()))]);
        let rest = futures::stream::unfold(self.changes, |mut changes| async move {
            changes.recv().await.map(|change| (change, changes))
        });
        first.chain(rest).chain(futures::stream::pending()).boxed()
    }
}
