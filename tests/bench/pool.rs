//! A pool of members at an address where nobody is, for what only chooses among them.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use inference_proxy::pool::backend::{Backend, BackendSpec, Member, Model};
use tokio::time::Instant;

/// So many members with one model, new at `now`; `limits` gives the weight of each and how many requests it takes.
pub(crate) fn pool(
    size: u32,
    now: Instant,
    limits: impl Fn(u32) -> (NonZeroU32, Option<NonZeroU32>),
) -> Vec<Arc<Member>> {
    let model = Model::new("m");
    let member = |i: u32| {
        let (weight, max_inflight) = limits(i);
        let spec = BackendSpec {
            id: i.to_string().into(),
            name: i.to_string(),
            image: String::new(),
            addr: ([127, 0, 0, 1], 9).into(),
            base_path: String::new(),
            weight,
            max_inflight,
        };
        Member::new(Backend::new(spec, Duration::from_secs(1), 1, now), model.clone())
    };
    (0..size).map(member).collect()
}
