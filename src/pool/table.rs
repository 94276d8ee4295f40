//! The routing table: the one place where the two planes meet.
//!
//! Discovery publishes immutable snapshots; requests read the current one without a lock and hold it for one decision,
//! never across an `.await`. There is one writer: [`TablePublisher`] cannot be cloned.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use arc_swap::{ArcSwap, Guard};
use bytes::Bytes;
use serde_json::{Value, json, value::RawValue};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::sync::Notify;

use crate::pool::backend::{Backend, Member, Model};

/// Most colons in a name that are looked at.
const COLONS_MAX: usize = 8;

/// A model as its backend describes it in `/v1/models`.
#[derive(Debug, Clone)]
pub struct ModelObject {
    /// Its `id`.
    pub id: Box<str>,
    /// The whole object, as the backend wrote it.
    pub json: Box<RawValue>,
    /// `created`, seconds since 1970.
    pub created: Option<i64>,
    /// `root`: the model that this one is built on.
    pub root: Option<String>,
    /// `max_model_len`: context length in tokens.
    pub max_model_len: Option<u64>,
}

/// All that is known of one model.
#[derive(Debug)]
pub struct Route {
    /// The model.
    pub model: Arc<Model>,
    /// Backends that may take a request for it; empty while none is ready.
    pub members: Box<[Arc<Member>]>,
    /// How it is listed; there is one if there are members.
    pub object: Option<Arc<ModelObject>>,
    /// Why there are no members.
    pub why_not_ready: &'static str,
    /// There are no members, but a container is starting that may become one.
    pub is_coming: bool,
}

/// What a model name leads to.
#[derive(Debug)]
pub enum Lookup<'t> {
    /// No backend has announced it: 404.
    Unknown,
    /// Known, but no backend can take a request now: 503.
    NoneReady(&'t Route),
    /// Go ahead.
    Ready(&'t Route),
}

/// One immutable view of what is live.
#[derive(Debug, Default)]
pub struct RoutingTable {
    /// Grows with every publication.
    pub generation: u64,
    routes: HashMap<Box<str>, Route>,
    only: Option<Arc<Member>>,
    backends: Vec<Arc<Backend>>,
    members: Vec<Arc<Member>>,
    openai_list: OnceLock<Bytes>,
    anthropic_list: OnceLock<Bytes>,
}

// === impl RoutingTable ===

impl RoutingTable {
    /// A table of these routes. `backends` are all that have requests or may get some, and `members` their places in the
    /// pools, for observation.
    pub fn new(routes: Vec<Route>, backends: Vec<Arc<Backend>>, members: Vec<Arc<Member>>) -> RoutingTable {
        let mut ready = routes.iter().flat_map(|route| &route.members);
        let only = ready.next().cloned();
        let only = only.filter(|only| ready.all(|other| Arc::ptr_eq(&only.backend, &other.backend)));
        let routes = routes.into_iter().map(|route| (route.model.id.clone(), route)).collect();
        RoutingTable { routes, only, backends, members, ..RoutingTable::default() }
    }

    /// What `model` leads to, by its exact name if there is one, else by a name that its engine would take for it.
    pub fn lookup(&self, model: &str) -> Lookup<'_> {
        Lookup::of(self.routes.get(model).or_else(|| self.latest(model)).or_else(|| self.base(model)))
    }

    /// The model that requests with this name are for, if there is one.
    pub fn known_as(&self, name: &str) -> Option<&Arc<Model>> {
        match self.lookup(name) {
            Lookup::Unknown => None,
            Lookup::NoneReady(route) | Lookup::Ready(route) => Some(&route.model),
        }
    }

    /// What a name without a tag means to Ollama: the model with the tag `latest`, and never with another one.
    fn latest(&self, name: &str) -> Option<&Route> {
        let has_tag = name.rsplit('/').next().is_some_and(|last| last.contains(':'));
        if has_tag || name.is_empty() { None } else { self.routes.get(format!("{name}:latest").as_str()) }
    }

    /// What `BASE:ADAPTER` means to SGLang: an adapter of the model `BASE`, which is known to its engine alone. If several
    /// colons leave a choice, the longest base counts.
    fn base(&self, name: &str) -> Option<&Route> {
        let bases = name.rmatch_indices(':').take(COLONS_MAX).filter(|(at, _)| is_adapter(&name[at + 1..]));
        bases.map(|(at, _)| &name[..at]).find_map(|base| self.routes.get(base))
    }

    /// A member of the one backend that is ready, if there is just one: it must be meant by who names no model.
    pub fn only_backend(&self) -> Option<&Arc<Member>> {
        self.only.as_ref()
    }

    /// Every known model, sorted by id.
    pub fn routes(&self) -> Vec<&Route> {
        let mut routes: Vec<&Route> = self.routes.values().collect();
        routes.sort_unstable_by(|a, b| a.model.id.cmp(&b.model.id));
        routes
    }

    /// Every backend that has requests or may get some.
    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// The places of those backends in the pools of their models.
    pub fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    fn listed(&self) -> impl Iterator<Item = &Arc<ModelObject>> {
        self.routes().into_iter().filter(|route| !route.members.is_empty()).filter_map(|route| route.object.as_ref())
    }

    /// `GET /v1/models` in OpenAI's shape: backends' own objects, one per id, sorted; rendered once per table.
    pub fn openai_list(&self) -> Bytes {
        let render = || {
            let objects: Vec<&str> = self.listed().map(|object| object.json.get()).collect();
            Bytes::from(format!(r#"{{"object":"list","data":[{}]}}"#, objects.join(",")))
        };
        self.openai_list.get_or_init(render).clone()
    }

    /// `GET /v1/models` in Anthropic's shape (<https://docs.anthropic.com/en/api/models-list>); rendered once per table.
    pub fn anthropic_list(&self) -> Bytes {
        let render = || {
            let data: Vec<Value> = self.listed().map(|object| object.to_anthropic()).collect();
            let id_of = |model: Option<&Value>| model.map_or(Value::Null, |m| m["id"].clone());
            let list = json!({
                "first_id": id_of(data.first()), "last_id": id_of(data.last()), "has_more": false, "data": data,
            });
            Bytes::from(list.to_string())
        };
        self.anthropic_list.get_or_init(render).clone()
    }

    /// The object of one listed model. A name without a tag will do, as it does for Ollama; an adapter has an object only
    /// if it is listed, as with SGLang.
    pub fn object(&self, model: &str) -> Option<&Arc<ModelObject>> {
        match Lookup::of(self.routes.get(model).or_else(|| self.latest(model))) {
            Lookup::Ready(route) => route.object.as_ref(),
            Lookup::Unknown | Lookup::NoneReady(_) => None,
        }
    }
}

impl<'t> Lookup<'t> {
    fn of(route: Option<&'t Route>) -> Lookup<'t> {
        match route {
            None => Lookup::Unknown,
            Some(route) if route.members.is_empty() => Lookup::NoneReady(route),
            Some(route) => Lookup::Ready(route),
        }
    }
}

/// Whether an adapter may be called so: adapters are files and repositories. What holds white space or the like is a
/// mistake that its client should be told of.
fn is_adapter(name: &str) -> bool {
    name.chars().all(|char| char.is_alphanumeric() || "-_./:@+=~".contains(char))
}

impl ModelObject {
    /// Whether this and `other` describe the same model. Not whether they are the same bytes: vLLM makes up `created` and
    /// a permission id anew for every answer.
    pub fn is_same_model(&self, other: &ModelObject) -> bool {
        self.id == other.id && self.root == other.root && self.max_model_len == other.max_model_len
    }

    /// The model in Anthropic's shape.
    pub fn to_anthropic(&self) -> Value {
        let created =
            OffsetDateTime::from_unix_timestamp(self.created.unwrap_or(0)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        // RFC 3339 has no years before 0: clients would fail on an empty date, and with it on the whole list.
        let created_at = created.format(&Rfc3339).unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned());
        json!({ "type": "model", "id": self.id, "display_name": self.id, "created_at": created_at })
    }
}

/// Reads the current table. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TableReader {
    current: Arc<ArcSwap<RoutingTable>>,
    misses: Arc<Notify>,
    suspects: Arc<Notify>,
}

/// Publishes tables. Not `Clone`: there is one writer, so generations grow without a compare-and-swap.
#[derive(Debug)]
pub struct TablePublisher {
    current: Arc<ArcSwap<RoutingTable>>,
    misses: Arc<Notify>,
    suspects: Arc<Notify>,
    generation: u64,
}

/// A table, empty to begin with, as its two ends.
pub fn table() -> (TablePublisher, TableReader) {
    let current = Arc::new(ArcSwap::from_pointee(RoutingTable::default()));
    let (misses, suspects) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let reader = TableReader { current: current.clone(), misses: misses.clone(), suspects: suspects.clone() };
    (TablePublisher { current, misses, suspects, generation: 0 }, reader)
}

impl TableReader {
    /// The table as it is now. Not to be held across an `.await`.
    pub fn snapshot(&self) -> Guard<Arc<RoutingTable>> {
        self.current.load()
    }

    /// Tells control that somebody asked for a model that no backend has announced: one may have learnt it since it was
    /// last asked.
    pub fn report_miss(&self) {
        self.misses.notify_one();
    }

    /// Tells control that this backend could not be connected to: its container may have gone, or moved.
    pub fn report_suspect(&self, backend: &Backend) {
        if backend.suspect() {
            self.suspects.notify_one();
        }
    }
}

impl TablePublisher {
    /// Makes `next` the table that every later [`TableReader::snapshot`] sees.
    pub fn publish(&mut self, mut next: RoutingTable) {
        self.generation += 1;
        next.generation = self.generation;
        self.current.store(Arc::new(next));
    }

    /// The table as it was last published.
    pub fn current(&self) -> Guard<Arc<RoutingTable>> {
        self.current.load()
    }

    /// Resolves when a backend has been reported as a suspect since the last call; [`Backend::take_suspicion`] tells which.
    pub async fn suspected(&self) {
        self.suspects.notified().await;
    }

    /// Resolves when a model has been missed since the last call.
    pub async fn missed(&self) {
        self.misses.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::backend::tests::member;

    fn object(id: &str, json: &str) -> Arc<ModelObject> {
        let json = RawValue::from_string(json.to_owned()).unwrap();
        Arc::new(ModelObject { id: id.into(), json, created: Some(1_700_000_000), root: None, max_model_len: None })
    }

    fn route(id: &str, ready: bool) -> Route {
        let members = if ready { vec![member(id, 1, None)] } else { Vec::new() };
        let object = ready.then(|| object(id, &format!(r#"{{"id":{id:?},  "max_model_len":7}}"#)));
        Route {
            model: Model::new(id),
            members: members.into(),
            object,
            why_not_ready: "it is starting",
            is_coming: true,
        }
    }

    #[test]
    fn lookup_tells_unknown_from_not_ready() {
        let table = RoutingTable::new(vec![route("a", true), route("b", false)], Vec::new(), Vec::new());
        assert!(matches!(table.lookup("a"), Lookup::Ready(_)));
        assert!(matches!(table.lookup("b"), Lookup::NoneReady(_)));
        assert!(matches!(table.lookup("c"), Lookup::Unknown));
        assert!(table.object("a").is_some() && table.object("b").is_none());
    }

    #[test]
    fn names_that_an_engine_would_take_are_found() {
        let names = ["llama3.2:latest", "llama3.2:1b", "org/m:latest", "org/base", "plain", "plain:latest", "a:b"];
        let down = ["down:latest", "gone"];
        let routes = names.iter().map(|id| route(id, true)).chain(down.iter().map(|id| route(id, false)));
        let table = RoutingTable::new(routes.collect(), Vec::new(), Vec::new());
        for (name, known, listed) in [
            ("llama3.2", Some("llama3.2:latest"), true),
            ("llama3.2:latest", Some("llama3.2:latest"), true),
            ("llama3.2:1b", Some("llama3.2:1b"), true),
            ("llama3.2:70b", None, false),
            ("llama3.2:", None, false),
            ("Llama3.2", None, false),
            ("llama3", None, false),
            ("org/m", Some("org/m:latest"), true),
            ("m", None, false),
            ("org/base:adapter", Some("org/base"), false),
            ("org/base:me/adapter-1", Some("org/base"), false),
            ("org/base:", Some("org/base"), false),
            ("org/base:x:y", Some("org/base"), false),
            ("org/base:latest", Some("org/base"), false),
            ("org/base: x", None, false),
            ("org/base:x?", None, false),
            ("org/base:x\n", None, false),
            ("org/m:adapter", None, false),
            ("plain", Some("plain"), true),
            ("plain:latest", Some("plain:latest"), true),
            ("plain:x", Some("plain"), false),
            ("plain:latest:x", Some("plain:latest"), false),
            ("a:b:c", Some("a:b"), false),
            ("a:c", None, false),
            ("down", Some("down:latest"), false),
            ("gone:x", Some("gone"), false),
            (":latest", None, false),
            (":", None, false),
            ("", None, false),
            ("/", None, false),
        ] {
            let found = table.known_as(name).map(|model| &*model.id);
            assert_eq!((found, table.object(name).is_some()), (known, listed), "{name}");
        }
        // Exact names win, also while no backend is ready for them.
        let table = RoutingTable::new(vec![route("a", false), route("a:latest", true)], Vec::new(), Vec::new());
        assert!(matches!(table.lookup("a"), Lookup::NoneReady(_)));
        // No name is too odd.
        let _ = table.lookup(&":".repeat(100_000));
    }

    #[test]
    fn one_backend_is_known_as_the_only_one() {
        let (a, b) = (route("a", true), route("b", true));
        let other_model = Member::new(a.members[0].backend.clone(), Model::new("c"));
        let same = Route { model: other_model.model.clone(), members: [other_model].into(), ..route("c", true) };
        let only = |routes| RoutingTable::new(routes, Vec::new(), Vec::new()).only_backend().is_some();
        assert!(!only(Vec::new()) && !only(vec![route("a", false)]));
        assert!(only(vec![a, same, route("d", false)]));
        assert!(!only(vec![route("a", true), b]));
    }

    #[test]
    fn lists_hold_what_is_ready_sorted_by_id_and_verbatim() {
        let table =
            RoutingTable::new(vec![route("z/m", true), route("b", false), route("a", true)], Vec::new(), Vec::new());
        let expect = r#"{"object":"list","data":[{"id":"a",  "max_model_len":7},{"id":"z/m",  "max_model_len":7}]}"#;
        assert_eq!(table.openai_list(), expect);
        let anthropic: Value = serde_json::from_slice(&table.anthropic_list()).unwrap();
        assert_eq!(anthropic["first_id"], "a");
        assert_eq!(anthropic["last_id"], "z/m");
        assert_eq!(anthropic["has_more"], false);
        assert_eq!(anthropic["data"][1]["created_at"], "2023-11-14T22:13:20Z");
        assert_eq!(RoutingTable::default().openai_list(), r#"{"object":"list","data":[]}"#);
    }

    #[test]
    fn every_time_of_creation_becomes_a_date() {
        for (created, expected) in [
            (Some(1_700_000_000), "2023-11-14T22:13:20Z"),
            (Some(0), "1970-01-01T00:00:00Z"),
            (None, "1970-01-01T00:00:00Z"),
            (Some(-100_000_000_000), "1970-01-01T00:00:00Z"),
            (Some(1_700_000_000_000), "1970-01-01T00:00:00Z"),
            (Some(i64::MAX), "1970-01-01T00:00:00Z"),
            (Some(i64::MIN), "1970-01-01T00:00:00Z"),
        ] {
            let object = ModelObject { created, ..(*object("m", r#"{"id":"m"}"#)).clone() };
            assert_eq!(object.to_anthropic()["created_at"], expected, "{created:?}");
        }
    }

    #[test]
    fn readers_see_the_newest_publication() {
        let (mut publisher, reader) = table();
        assert_eq!(reader.snapshot().generation, 0);
        publisher.publish(RoutingTable::new(vec![route("a", true)], Vec::new(), Vec::new()));
        assert_eq!(reader.snapshot().generation, 1);
        assert!(matches!(reader.snapshot().lookup("a"), Lookup::Ready(_)));
    }
}
