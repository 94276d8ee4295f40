//! Looking at containers: several at a time, none of which holds up the others, and what each look has brought.

use futures::FutureExt as _;
use tokio::time::{Instant, sleep};

use super::{
    ASIDE_MAX, Finished, LOOK_AGAIN, LOOK_PATIENCE, LOOKS_MAX, RECONNECT_MIN, RESYNC, Watcher,
    engine::Engine,
    inspect::{self, Inspected, Shared},
    place,
    track::{Look, Track},
};
use crate::control::discovery::{Change, Phase, network::Vantage};

impl Watcher {
    /// Containers that run in the network namespace of `owner` change with it.
    pub(super) fn look_at_dependents(&mut self, owner: &str) {
        let depends = |track: &Track| track.seen.as_ref().and_then(Inspected::network_owner) == Some(owner);
        let dependents: Vec<String> =
            self.tracks.iter().filter(|(_, track)| depends(track)).map(|(id, _)| id.clone()).collect();
        for id in dependents {
            if let Some(track) = self.tracks.get_mut(&id) {
                // A look that is under way may have seen the owner as it was.
                track.heard += 1;
            }
            self.look_at(&id);
        }
    }

    pub(super) fn look_at(&mut self, id: &str) {
        let Some(track) = self.tracks.get_mut(id) else { return };
        if track.look == Look::Idle {
            track.look = Look::Queued;
            self.to_look.push_back(id.to_owned());
        }
    }

    pub(super) fn start_looks(&mut self) {
        let Some(engine) = self.engine.as_ref().filter(|_| self.context.is_placed) else { return };
        while self.looking.len() < LOOKS_MAX
            && let Some(id) = self.to_look.pop_front()
        {
            let Some(track) = self.tracks.get_mut(&id) else {
                continue;
            };
            track.look = Look::UnderWay;
            self.looks_begun += 1;
            let serial = self.looks_begun;
            self.looking.insert(serial);
            let shared = track.seen.as_ref().and_then(|seen| seen.shared.clone());
            let now_nanos = (self.settings.clock)();
            self.work.push(look(engine.clone(), id.clone(), (track.heard, serial), shared, now_nanos).boxed());
            self.work.push(
                async move {
                    sleep(LOOK_PATIENCE).await;
                    Finished::Aside { id, serial }
                }
                .boxed(),
            );
        }
    }

    /// A look that takes long gives its place to others, and the whole truth does not wait for it.
    pub(super) fn on_aside(&mut self, id: &str, serial: u64) {
        if self.aside < ASIDE_MAX && self.looking.remove(&serial) {
            self.aside += 1;
            self.settle(id);
        }
    }

    pub(super) fn on_looked(
        &mut self,
        id: String,
        heard: u64,
        serial: u64,
        outcome: Result<Option<Inspected>, String>,
    ) {
        if !self.looking.remove(&serial) {
            self.aside -= 1;
        }
        let Some(track) = self.tracks.get_mut(&id) else {
            return self.settle(&id);
        };
        track.look = Look::Idle;
        if track.heard != heard {
            return self.look_at(&id); // overtaken by an event
        }
        match outcome {
            Err(error) => self.on_unseen(&id, error),
            Ok(None) => {
                if self.tracks.remove(&id).is_some_and(|track| track.endpoint.is_some()) {
                    self.out.push_back(Ok(Change::Ended(id.as_str().into())));
                }
            }
            Ok(Some(seen)) => self.on_seen(&id, seen),
        }
        self.settle(&id);
    }

    /// A look has brought nothing. That proves nothing: what is known stays, and what is not known is what the list says. The
    /// next list looks again. Only what the list lacks as well is gone.
    pub(super) fn on_unseen(&mut self, id: &str, error: String) {
        let Some(track) = self.tracks.get_mut(id) else { return };
        if track.is_unlisted {
            if self.tracks.remove(id).is_some_and(|track| track.endpoint.is_some()) {
                self.out.push_back(Ok(Change::Ended(id.into())));
            }
            return;
        }
        if track.trouble.as_ref() != Some(&error) {
            tracing::warn!(container = %track.name(id), %error, "cannot inspect the container");
        }
        if track.endpoint.is_none() || track.is_unreadable {
            match &track.summary {
                Some(summary) => {
                    if let Some(endpoint) = inspect::unreadable(summary, &error) {
                        track.is_unreadable = true;
                        track.endpoint = Some(endpoint.clone());
                        self.out.push_back(Ok(Change::Upsert(Box::new(endpoint))));
                    }
                }
                // An event has told of it, and the list tells its name.
                None => self.list_at = self.list_at.min(Instant::now() + RECONNECT_MIN),
            }
        }
        if let Some(track) = self.tracks.get_mut(id) {
            track.trouble = Some(error);
            let after = track.look_again.map_or(LOOK_AGAIN, |after| (after * 2).min(RESYNC));
            track.look_again = Some(after);
            // With each list it is looked at in any case.
            if after < RESYNC {
                let id = id.to_owned();
                self.work.push(
                    async move {
                        sleep(after).await;
                        Finished::Again { id }
                    }
                    .boxed(),
                );
            }
        }
    }

    pub(super) fn on_seen(&mut self, id: &str, mut seen: Inspected) {
        let Some(track) = self.tracks.get_mut(id) else { return };
        seen.complete(track.seen.as_ref(), track.summary.as_ref());
        (track.trouble, track.look_again) = (None, None);
        (track.is_unreadable, track.is_unlisted) = (false, false);
        let exists = seen.phase != Phase::Stopped;
        if let Vantage::Host { on_link } | Vantage::Inside { on_link, .. } = &mut self.context.vantage
            && let Ok(prefixes) = place::on_link_prefixes()
        {
            // A network that has just been made is a new interface of this host.
            *on_link = prefixes;
        }
        let endpoint = seen.endpoint(&self.context);
        track.seen = Some(seen);
        let Some(endpoint) = endpoint.filter(|_| exists) else {
            let was_there = track.endpoint.take().is_some();
            if !exists {
                // It comes back by an event or by the list; until then it takes no room.
                self.tracks.remove(id);
            }
            if was_there {
                self.out.push_back(Ok(Change::Ended(id.into())));
            }
            return;
        };
        track.endpoint = Some(endpoint.clone());
        self.out.push_back(Ok(Change::Upsert(Box::new(endpoint))));
        if track.seen.as_ref().is_some_and(|seen| seen.is_stopping) {
            track.signalled = None;
            self.out.push_back(Ok(Change::Stopping(id.into())));
        } else if let Some(stopping) = track.stop_notice((self.settings.clock)()) {
            self.out.push_back(Ok(Change::Stopping(stopping.as_str().into())));
        }
    }
}

async fn look(
    engine: Engine,
    id: String,
    (heard, serial): (u64, u64),
    shared: Option<Shared>,
    now_nanos: i64,
) -> Finished {
    let outcome = async {
        let Some(mut seen) = engine.inspect(&id).await? else {
            return Ok(None);
        };
        // Whatever it calls itself.
        seen.id.clone_from(&id);
        if let Some(owner) = seen.network_owner().map(str::to_owned) {
            let owner = engine.inspect(&owner).await?;
            seen.share_network_of(owner.as_ref(), shared.as_ref(), now_nanos);
        }
        Ok(Some(seen))
    };
    let outcome = outcome.await;
    Finished::Looked { id, heard, serial, outcome }
}
