//! The routing rules: which containers serve which model, what a model without a ready replica is told to wait for, and how
//! long a model stays known after its containers have gone. Pure.
//!
//! * A model is served by every ready container that announces it, in the order in which they became ready; with
//!   `PROXY_SAME_MODEL=newest` by the last of them alone.
//! * A model without a ready replica *is coming* while a container starts that announces it, or one that may: a starting
//!   container has announced nothing yet, so it is assumed to serve the models of the container that it replaces, which is
//!   one with the same role.
//! * A model whose containers have gone stays known for the grace, so that requests for it get 503 and not 404.
//! * Each container may leave as many models behind as it may have at a time. A container that announces others with every
//!   answer is remembered for no more than that, and costs other containers nothing.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::entry::{Entry, Offer};
use crate::{
    base::config::SameModel,
    control::{
        discovery::EndpointId,
        lifecycle::{GONE, State},
        probe::MODELS_MAX,
    },
    pool::{
        backend::{Member, Model},
        table::{ModelObject, Route},
    },
};

/// How long a role is expected to get another container after one was stopped first: Compose renames, creates, connects
/// and starts meanwhile, for all replicas at a time.
pub(super) const REPLACED_WITHIN: Duration = Duration::from_secs(10);
/// Models of each container that are known after they have gone.
pub(super) const GONE_MAX: usize = MODELS_MAX;

/// The user's choices that decide about routes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    pub(super) same_model: SameModel,
    /// How long a model stays known after its containers have gone.
    pub(super) grace: Duration,
}

/// A container, as far as routes depend on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replica<'e> {
    pub(super) id: &'e EndpointId,
    pub(super) name: &'e str,
    pub(super) image: &'e str,
    pub(super) role: &'e Arc<str>,
    pub(super) offers: &'e [Offer],
    /// Orders ready containers by when they became ready; `None` while the container is not ready.
    pub(super) ready_serial: Option<u64>,
    /// Why the container takes no requests, if it does not.
    pub(super) why_not_ready: &'static str,
    /// The container is starting, and will be ready if all goes well.
    pub(super) is_coming: bool,
    /// The container has been told to stop, and its orchestrator may start another one in its place afterwards.
    pub(super) is_stopped_first: bool,
}

/// The memory that outlives containers: the models that they announced, and the roles whose next container is expected.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) models: HashMap<Box<str>, KnownModel>,
    /// Until when each role is expected to get another container.
    pub(super) expected: HashMap<Arc<str>, Instant>,
}

/// A model that some container announces, or whose grace lasts.
#[derive(Debug)]
pub(super) struct KnownModel {
    model: Arc<Model>,
    /// When its last container went; `None` while there is one.
    gone_at: Option<Instant>,
    /// One of the containers that announce it, or that did last.
    announcer: EndpointId,
    /// Roles of the containers that announce it, or that did last.
    roles: Vec<Arc<str>>,
    /// Containers between which a difference has been reported.
    reported: Vec<EndpointId>,
}

/// The routes of one table, and what making them has shown.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// One route for each model that is known.
    pub(super) routes: Vec<Route>,
    /// Models that are not known any more.
    pub(super) forgotten: Vec<Arc<Model>>,
    /// Differences between replicas that have not been reported before.
    pub(super) differences: Vec<Difference>,
}

/// Two containers that announce the same model and should be replicas, but differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) model: Box<str>,
    /// Name of the container that became ready first.
    pub(super) first: String,
    /// Name of the container that differs from it.
    pub(super) other: String,
    /// The properties in which they differ.
    pub(super) properties: Vec<&'static str>,
}

/// The containers that announce one model, while its route is made.
#[derive(Debug, Default)]
struct Pool<'e> {
    ready: Vec<ReadyReplica<'e>>,
    why_not_ready: Option<&'static str>,
    is_coming: bool,
    announcer: Option<&'e EndpointId>,
    roles: Vec<&'e Arc<str>>,
}

#[derive(Debug)]
struct ReadyReplica<'e> {
    serial: u64,
    replica: &'e Replica<'e>,
    object: &'e Arc<ModelObject>,
    member: &'e Arc<Member>,
}

/// The routes to these containers at this moment. Brings `known` up to date.
pub(super) fn routes(replicas: &[Replica<'_>], known: &mut Known, policy: Policy, now: Instant) -> Routes {
    let mut pools = pools(replicas, known.models.len());
    let mut forgotten = known.follow(&pools, policy.grace, now);
    forgotten.extend(known.remove_surplus());
    let starting = known.starting_roles(replicas);
    let mut made = Routes { routes: Vec::with_capacity(known.models.len()), forgotten, differences: Vec::new() };
    for (id, known) in &mut known.models {
        let mut pool = pools.remove(&**id).unwrap_or_default();
        if !pool.roles.is_empty() && !known.roles.iter().eq(pool.roles.iter().copied()) {
            known.roles = pool.roles.iter().copied().cloned().collect();
        }
        let is_replaced = known.roles.iter().any(|role| starting.contains(role));
        pool.ready.sort_by_key(|ready| ready.serial);
        made.differences.extend(known.new_differences(&pool.ready));
        if policy.same_model == SameModel::Newest && pool.ready.len() > 1 {
            pool.ready.drain(..pool.ready.len() - 1);
        }
        made.routes.push(Route {
            model: known.model.clone(),
            object: pool.ready.first().map(|ready| ready.object.clone()),
            members: pool.ready.iter().map(|ready| ready.member.clone()).collect(),
            why_not_ready: pool.why_not_ready.unwrap_or(GONE),
            is_coming: pool.is_coming || is_replaced,
        });
    }
    made
}

/// The containers that announce each model.
fn pools<'e>(replicas: &'e [Replica<'e>], models: usize) -> HashMap<&'e str, Pool<'e>> {
    let mut pools: HashMap<&str, Pool<'e>> = HashMap::with_capacity(models);
    for replica in replicas {
        for Offer { object, member } in replica.offers {
            let pool = pools.entry(&object.id).or_default();
            match (member, replica.ready_serial) {
                (Some(member), Some(serial)) => pool.ready.push(ReadyReplica { serial, replica, object, member }),
                _ => {
                    pool.why_not_ready = Some(replica.why_not_ready);
                    pool.is_coming |= replica.is_coming;
                }
            }
            pool.announcer = Some(replica.id);
            pool.roles.push(replica.role);
        }
    }
    pools
}

// === impl Replica ===

impl<'e> From<&'e Entry> for Replica<'e> {
    fn from(entry: &'e Entry) -> Replica<'e> {
        let state = entry.life.state();
        Replica {
            id: &entry.endpoint.id,
            name: &entry.endpoint.name,
            image: &entry.endpoint.image,
            role: &entry.endpoint.role,
            offers: &entry.offers,
            ready_serial: (*state == State::Ready).then_some(entry.ready_serial),
            why_not_ready: state.why_not_ready(),
            is_coming: entry.life.is_coming(),
            is_stopped_first: entry.is_stopped_first(),
        }
    }
}

// === impl Known ===

impl Known {
    /// The model with the id of this object, which `announcer` announces.
    pub(super) fn model(&mut self, object: &ModelObject, announcer: &EndpointId) -> Arc<Model> {
        let known = self.models.entry(object.id.clone()).or_insert_with(|| KnownModel {
            model: Model::new(&object.id),
            gone_at: None,
            announcer: announcer.clone(),
            roles: Vec::new(),
            reported: Vec::new(),
        });
        known.model.clone()
    }

    /// All models that are known.
    pub(super) fn models(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.values().map(|known| &known.model)
    }

    /// How many models some container announces.
    pub(super) fn announced(&self) -> usize {
        self.models.values().filter(|known| known.gone_at.is_none()).count()
    }

    /// Expects another container of this role for a while.
    pub(super) fn expect(&mut self, role: Arc<str>, now: Instant) {
        self.expected.insert(role, now + REPLACED_WITHIN);
    }

    /// Forgets roles that have been expected for long enough, and says whether the table must be made anew: for that, or
    /// because the grace of a model is over.
    pub(super) fn expire(&mut self, grace: Duration, now: Instant) -> bool {
        let before = self.expected.len();
        self.expected.retain(|_, until| *until > now);
        let is_over = |known: &KnownModel| known.gone_at.is_some_and(|gone| gone + grace <= now);
        self.expected.len() < before || self.models.values().any(is_over)
    }

    /// When [`Known::expire`] has something to do.
    pub(super) fn deadlines(&self, grace: Duration) -> impl Iterator<Item = Instant> {
        let graces = self.models.values().filter_map(move |known| Some(known.gone_at? + grace));
        graces.chain(self.expected.values().copied())
    }

    /// Notes which models have come and gone, and forgets those whose grace is over.
    fn follow(&mut self, pools: &HashMap<&str, Pool<'_>>, grace: Duration, now: Instant) -> Vec<Arc<Model>> {
        let mut forgotten = Vec::new();
        self.models.retain(|id, known| {
            if let Some(announcer) = pools.get(&**id).and_then(|pool| pool.announcer) {
                known.gone_at = None;
                known.announcer.clone_from(announcer);
                return true;
            }
            let stays = *known.gone_at.get_or_insert(now) + grace > now;
            if !stays {
                forgotten.push(known.model.clone());
            }
            stays
        });
        forgotten
    }

    /// Removes the models that went first where one container has left more than [`GONE_MAX`] of them.
    fn remove_surplus(&mut self) -> Vec<Arc<Model>> {
        let mut gone: HashMap<&EndpointId, Vec<(Instant, &str)>> = HashMap::new();
        for (id, known) in &self.models {
            if let Some(at) = known.gone_at {
                gone.entry(&known.announcer).or_default().push((at, id));
            }
        }
        let mut ids: Vec<Box<str>> = Vec::new();
        for mut of_one in gone.into_values().filter(|of_one| of_one.len() > GONE_MAX) {
            of_one.sort_unstable_by(|a, b| b.cmp(a));
            ids.extend(of_one.drain(GONE_MAX..).map(|(_, id)| id.into()));
        }
        ids.iter().filter_map(|id| self.models.remove(id)).map(|known| known.model).collect()
    }

    /// Roles of which a container is starting that has announced no model yet, or is expected to start.
    fn starting_roles(&self, replicas: &[Replica<'_>]) -> HashSet<Arc<str>> {
        let is_starting = |replica: &&Replica<'_>| replica.offers.is_empty() && replica.is_coming;
        let starting = replicas.iter().filter(|replica| is_starting(replica) || replica.is_stopped_first);
        starting.map(|replica| replica.role).chain(self.expected.keys()).cloned().collect()
    }
}

// === impl KnownModel ===

impl KnownModel {
    /// Differences between containers that should be replicas, unless they have been reported for this group before.
    fn new_differences(&mut self, ready: &[ReadyReplica<'_>]) -> Vec<Difference> {
        let Some((first, others)) = ready.split_first() else { return Vec::new() };
        if others.is_empty() || ready.iter().all(|one| self.reported.contains(one.replica.id)) {
            return Vec::new();
        }
        let differences = others.iter().filter_map(|other| {
            let differs = [
                (first.replica.image != other.replica.image, "image"),
                (first.object.root != other.object.root, "root"),
                (first.object.max_model_len != other.object.max_model_len, "context length (max_model_len)"),
            ];
            let properties: Vec<_> =
                differs.into_iter().filter(|(differs, _)| *differs).map(|(_, name)| name).collect();
            (!properties.is_empty()).then(|| Difference {
                model: self.model.id.clone(),
                first: first.replica.name.to_owned(),
                other: other.replica.name.to_owned(),
                properties,
            })
        });
        let differences: Vec<Difference> = differences.collect();
        if !differences.is_empty() {
            self.reported = ready.iter().map(|one| one.replica.id.clone()).collect();
        }
        differences
    }
}

#[cfg(test)]
mod tests;
