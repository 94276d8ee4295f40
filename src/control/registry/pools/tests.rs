//! The routing rules without a registry: containers are plain values, and time is a number of seconds.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde_json::value::RawValue;

use super::*;
use crate::pool::backend::{Backend, tests::member};

const GRACE: Duration = Duration::from_secs(60);
const BALANCE: Policy = Policy { same_model: SameModel::Balance, grace: GRACE };
const NEWEST: Policy = Policy { same_model: SameModel::Newest, grace: GRACE };

fn object(id: &str) -> Arc<ModelObject> {
    let json = RawValue::from_string(format!(r#"{{"id":"{id}"}}"#)).unwrap();
    Arc::new(ModelObject { id: id.into(), json, created: None, root: None, max_model_len: None })
}

/// A container by hand. It starts as one that is not ready and has announced nothing.
struct Container {
    id: EndpointId,
    role: Arc<str>,
    image: String,
    backend: Arc<Backend>,
    offers: Vec<Offer>,
    ready_serial: Option<u64>,
    is_coming: bool,
    is_stopped_first: bool,
}

impl Container {
    fn new(name: &str, role: &str) -> Container {
        Container {
            id: name.into(),
            role: role.into(),
            image: "image".to_owned(),
            backend: member(name, 1, None).backend.clone(),
            offers: Vec::new(),
            ready_serial: None,
            is_coming: false,
            is_stopped_first: false,
        }
    }

    /// Starts to load.
    fn starts(&mut self) {
        (self.ready_serial, self.is_coming, self.is_stopped_first) = (None, true, false);
    }

    /// Becomes ready with these models.
    fn serves(&mut self, serial: u64, models: &[&str], known: &mut Known) {
        (self.ready_serial, self.is_coming, self.is_stopped_first) = (Some(serial), false, false);
        let offer = |id: &&str| {
            let object = object(id);
            let member = Some(Member::new(self.backend.clone(), known.model(&object, &self.id)));
            Offer { object, member }
        };
        self.offers = models.iter().map(offer).collect();
    }

    /// Gets no more requests, because its health check fails or it was told to stop.
    fn leaves(&mut self, is_stopped_first: bool) {
        (self.ready_serial, self.is_coming, self.is_stopped_first) = (None, false, is_stopped_first);
    }

    fn replica(&self) -> Replica<'_> {
        Replica {
            id: &self.id,
            name: &self.id,
            image: &self.image,
            role: &self.role,
            offers: &self.offers,
            ready_serial: self.ready_serial,
            why_not_ready: if self.is_coming { "it is starting" } else { "it is stopping" },
            is_coming: self.is_coming,
            is_stopped_first: self.is_stopped_first,
        }
    }
}

/// A route as text: the model, then the containers that serve it, or why none does.
fn shown(route: &Route) -> String {
    let names: Vec<&str> = route.members.iter().map(|member| member.backend.spec.name.as_str()).collect();
    match (&names[..], route.is_coming) {
        ([], true) => format!("{}: coming ({})", route.model.id, route.why_not_ready),
        ([], false) => format!("{}: none ({})", route.model.id, route.why_not_ready),
        (names, _) => format!("{}: {}", route.model.id, names.join(" ")),
    }
}

/// All routes as text, sorted by model.
fn table(containers: &[&Container], known: &mut Known, policy: Policy, now: Instant) -> Vec<String> {
    let replicas: Vec<Replica<'_>> = containers.iter().map(|one| one.replica()).collect();
    let mut lines: Vec<String> = routes(&replicas, known, policy, now).routes.iter().map(shown).collect();
    lines.sort();
    lines
}

#[test]
fn replicas_are_listed_in_the_order_in_which_they_became_ready_or_the_last_one_is_alone() {
    let (mut known, now) = (Known::default(), Instant::now());
    let (mut a, mut b) = (Container::new("a", "x"), Container::new("b", "y"));
    a.serves(2, &["m"], &mut known);
    b.serves(1, &["m", "n"], &mut known);
    assert_eq!(table(&[&a, &b], &mut known, BALANCE, now), ["m: b a", "n: b"]);
    assert_eq!(table(&[&a, &b], &mut known, NEWEST, now), ["m: a", "n: b"]);
    a.leaves(false);
    assert_eq!(table(&[&a, &b], &mut known, NEWEST, now), ["m: b", "n: b"]);
    b.leaves(false);
    assert_eq!(table(&[&a, &b], &mut known, BALANCE, now), ["m: none (it is stopping)", "n: none (it is stopping)"]);
}

#[test]
fn a_model_is_known_for_its_grace_and_no_longer() {
    let (mut known, start) = (Known::default(), Instant::now());
    let mut a = Container::new("a", "x");
    a.serves(1, &["m"], &mut known);
    assert_eq!(table(&[&a], &mut known, BALANCE, start), ["m: a"]);
    assert_eq!(known.deadlines(GRACE).next(), None);
    assert_eq!(table(&[], &mut known, BALANCE, start), ["m: none (its container has gone)"]);
    assert_eq!(known.deadlines(GRACE).collect::<Vec<_>>(), [start + GRACE]);
    let before = start + GRACE - Duration::from_nanos(1);
    assert!(!known.expire(GRACE, before));
    assert_eq!(table(&[], &mut known, BALANCE, before), ["m: none (its container has gone)"]);
    assert!(known.expire(GRACE, start + GRACE));
    let made = routes(&[], &mut known, BALANCE, start + GRACE);
    assert_eq!((made.routes.len(), &*made.forgotten[0].id, known.announced()), (0, "m", 0));
}

#[test]
fn a_container_that_starts_is_waited_for_by_the_models_of_its_role() {
    let (mut known, now) = (Known::default(), Instant::now());
    let mut a = Container::new("a", "x");
    a.serves(1, &["m"], &mut known);
    table(&[&a], &mut known, BALANCE, now);
    let (mut same, mut other) = (Container::new("new", "x"), Container::new("other", "y"));
    same.starts();
    other.starts();
    let gone = "its container has gone";
    assert_eq!(table(&[&other], &mut known, BALANCE, now), [format!("m: none ({gone})")]);
    assert_eq!(table(&[&same], &mut known, BALANCE, now), [format!("m: coming ({gone})")]);
    same.serves(2, &["n"], &mut known);
    assert_eq!(table(&[&same], &mut known, BALANCE, now), [format!("m: none ({gone})"), "n: new".to_owned()]);
    // A container that has announced its models before waits for no other one of its role.
    same.starts();
    let expected = [format!("m: none ({gone})"), "n: coming (it is starting)".to_owned()];
    assert_eq!(table(&[&same], &mut known, BALANCE, now), expected);
}

#[test]
fn a_role_whose_container_was_stopped_first_is_expected_for_a_while() {
    let (mut known, start) = (Known::default(), Instant::now());
    let mut a = Container::new("a", "x");
    a.serves(1, &["m"], &mut known);
    table(&[&a], &mut known, BALANCE, start);
    a.leaves(true);
    assert_eq!(table(&[&a], &mut known, BALANCE, start), ["m: coming (it is stopping)"]);
    known.expect("x".into(), start);
    assert_eq!(table(&[], &mut known, BALANCE, start), ["m: coming (its container has gone)"]);
    assert!(!known.expire(GRACE, start + REPLACED_WITHIN - Duration::from_nanos(1)));
    assert!(known.expire(GRACE, start + REPLACED_WITHIN), "the table must be made anew");
    assert_eq!(table(&[], &mut known, BALANCE, start + REPLACED_WITHIN), ["m: none (its container has gone)"]);
}

#[test]
fn replicas_that_differ_are_reported_once_for_each_group() {
    let (mut known, now) = (Known::default(), Instant::now());
    let mut all = ["a", "b", "c"].map(|name| Container::new(name, "x"));
    all[1].image = "another".to_owned();
    for (serial, one) in all.iter_mut().enumerate() {
        one.serves(serial as u64, &["m"], &mut known);
    }
    let mut differences = |group: &[usize]| {
        let replicas: Vec<Replica<'_>> = group.iter().map(|index| all[*index].replica()).collect();
        routes(&replicas, &mut known, BALANCE, now).differences
    };
    assert_eq!(differences(&[0, 2]), [], "these two are the same");
    let expected = Difference { model: "m".into(), first: "a".into(), other: "b".into(), properties: vec!["image"] };
    assert_eq!(differences(&[0, 1]), std::slice::from_ref(&expected));
    assert_eq!(differences(&[0, 1]), [], "it has been reported");
    assert_eq!(differences(&[0]), []);
    assert_eq!(differences(&[0, 1, 2]), [expected], "a replica that has come makes it another group");
    assert_eq!(differences(&[0, 1]), [], "a part of a group is no new group");
}

#[test]
fn a_container_leaves_no_more_models_behind_than_it_may_have() {
    let (mut known, start) = (Known::default(), Instant::now());
    let (mut a, mut b) = (Container::new("a", "x"), Container::new("b", "y"));
    b.serves(1, &["of-b"], &mut known);
    table(&[&b], &mut known, BALANCE, start);
    for n in 0..3_u64 {
        let ids: Vec<String> = (0..MODELS_MAX).map(|i| format!("{n}-{i:04}")).collect();
        a.serves(2, &ids.iter().map(String::as_str).collect::<Vec<_>>(), &mut known);
        table(&[&a], &mut known, BALANCE, start + Duration::from_secs(n));
    }
    let left = |prefix: &str| known.models.keys().filter(|id| id.starts_with(prefix)).count();
    assert_eq!((left("0-"), left("1-"), left("2-")), (0, GONE_MAX, MODELS_MAX), "those that went first are forgotten");
    assert_eq!(left("of-b"), 1, "models of other containers stay");
}

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const MODELS: [&str; 3] = ["m", "n", "o"];

/// A step in the life of one of four containers.
#[derive(Debug, Clone)]
enum Step {
    Starts,
    Serves(BTreeSet<usize>),
    Leaves(bool),
    Ends,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Starts),
        5 => prop::collection::btree_set(0..MODELS.len(), 1..=MODELS.len()).prop_map(Step::Serves),
        2 => any::<bool>().prop_map(Step::Leaves),
        3 => Just(Step::Ends),
    ]
}

/// The memory of one model, kept in the plainest way.
#[derive(Debug, Default)]
struct Plain {
    gone_at: Option<Instant>,
    roles: BTreeSet<Arc<str>>,
}

/// The routes as the rules at the top of the module say it, model by model.
fn expected(
    containers: &BTreeMap<usize, Container>,
    memory: &mut BTreeMap<&'static str, Plain>,
    expected_roles: &BTreeSet<Arc<str>>,
    policy: Policy,
    now: Instant,
) -> Vec<String> {
    let mut lines = Vec::new();
    for model in MODELS {
        let announces = |one: &&Container| one.offers.iter().any(|offer| &*offer.object.id == model);
        let announcers: Vec<&Container> = containers.values().filter(announces).collect();
        if !announcers.is_empty() {
            memory.insert(model, Plain { gone_at: None, roles: announcers.iter().map(|a| a.role.clone()).collect() });
        }
        let Some(plain) = memory.get_mut(model) else { continue };
        if announcers.is_empty() && *plain.gone_at.get_or_insert(now) + policy.grace <= now {
            memory.remove(model);
            continue;
        }
        let may_serve = |one: &Container| (one.offers.is_empty() && one.is_coming) || one.is_stopped_first;
        let is_expected = |role: &Arc<str>| {
            expected_roles.contains(role) || containers.values().any(|one| one.role == *role && may_serve(one))
        };
        let mut ready: Vec<&&Container> = announcers.iter().filter(|one| one.ready_serial.is_some()).collect();
        ready.sort_by_key(|one| one.ready_serial);
        if policy.same_model == SameModel::Newest {
            ready = ready.split_off(ready.len().saturating_sub(1));
        }
        let is_coming = announcers.iter().any(|one| one.is_coming) || plain.roles.iter().any(is_expected);
        lines.push(match (&ready[..], is_coming) {
            ([], true) => format!("{model}: coming"),
            ([], false) => format!("{model}: none"),
            (ready, _) => {
                let names: Vec<&str> = ready.iter().map(|one| &*one.id).collect();
                format!("{model}: {}", names.join(" "))
            }
        });
    }
    lines
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn every_history_gives_the_routes_that_the_rules_give(
        history in prop::collection::vec((0..NAMES.len(), step(), 0..40_u64), 1..60),
        is_newest in any::<bool>(),
    ) {
        let policy = if is_newest { NEWEST } else { BALANCE };
        let (mut known, mut memory, mut expected_until) = (Known::default(), BTreeMap::new(), BTreeMap::new());
        let mut containers: BTreeMap<usize, Container> = BTreeMap::new();
        let mut now = Instant::now();
        let mut before: BTreeSet<String> = BTreeSet::new();
        for (serial, (index, step, pause_s)) in history.into_iter().enumerate() {
            now += Duration::from_secs(pause_s);
            let role = if index < 2 { "x" } else { "y" };
            let container = containers.entry(index).or_insert_with(|| Container::new(NAMES[index], role));
            match step {
                Step::Starts => container.starts(),
                Step::Serves(models) => {
                    let models: Vec<&str> = models.into_iter().map(|model| MODELS[model]).collect();
                    container.serves(serial as u64, &models, &mut known);
                }
                Step::Leaves(is_stopped_first) => container.leaves(is_stopped_first),
                Step::Ends => {
                    if container.is_stopped_first {
                        known.expect(container.role.clone(), now);
                        expected_until.insert(container.role.clone(), now + REPLACED_WITHIN);
                    }
                    containers.remove(&index);
                }
            }
            known.expire(policy.grace, now);
            expected_until.retain(|_, until| *until > now);
            let roles = expected_until.keys().cloned().collect();
            let rules = expected(&containers, &mut memory, &roles, policy, now);

            let mut replicas: Vec<Replica<'_>> = containers.values().map(Container::replica).collect();
            if serial % 2 == 1 {
                replicas.reverse();
            }
            let made = routes(&replicas, &mut known, policy, now);
            let mut lines: Vec<String> = made.routes.iter().map(shown).collect();
            lines.sort();
            let plain = |line: &String| line.split(" (").next().unwrap_or_default().to_owned();
            prop_assert_eq!(lines.iter().map(plain).collect::<Vec<_>>(), rules);

            // A model leaves the table only by being forgotten, because requests that wait for it must be called.
            let after: BTreeSet<String> = made.routes.iter().map(|route| route.model.id.to_string()).collect();
            let forgotten: BTreeSet<String> = made.forgotten.iter().map(|model| model.id.to_string()).collect();
            prop_assert!(before.difference(&after).all(|id| forgotten.contains(id)));
            prop_assert!(forgotten.is_disjoint(&after));
            // There is an object to list exactly where there are members, and nothing is due in the past.
            prop_assert!(made.routes.iter().all(|route| route.object.is_some() != route.members.is_empty()));
            prop_assert!(known.deadlines(policy.grace).all(|at| at > now));
            before = after;
        }
    }
}
