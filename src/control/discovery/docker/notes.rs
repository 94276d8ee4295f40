//! What is limited or unusual about the sight of the engine, in words.

use super::{CONTAINERS_MAX, Watcher, track::Track};
use crate::{
    base::foreign::few,
    control::discovery::{Change, DiscoveryError, Note},
};

impl Watcher {
    /// Tells what is limited about the sight, when that has changed.
    pub(super) fn take_notes(&mut self) {
        let mut notes = Vec::new();
        let mut note = |what: String, advice: &str| notes.push(Note { what, advice: Some(advice.to_owned()) });
        let host = self.engine.as_ref().map_or("the engine", |engine| &*engine.host);
        if let Some(untold) = &self.context.untold {
            note(
                format!(
                    "{host} does not tell about the container of this proxy ({untold}): what can be reached is judged by \
                     this process's own addresses"
                ),
                "let a Docker API proxy allow GET /containers/{id}/json for the container of this proxy, too; it is \
                 asked for again",
            );
        }
        if self.left_out > 0 {
            let all = self.left_out + CONTAINERS_MAX;
            note(
                format!(
                    "{all} containers carry the label inference.enable, {CONTAINERS_MAX} of them are followed and {} \
                     are left out",
                    self.left_out
                ),
                "take the label from some of them, or divide them among more engines",
            );
        }
        if self.is_silent {
            note(
                format!("the event stream of {host} stays silent: changes are found by listing every 5 s or so"),
                "see whether a proxy before the engine holds GET /events back or buffers it",
            );
        }
        if let Some(DiscoveryError { what, advice }) = &self.stream_trouble {
            note(format!("{what}: changes are found by listing every 5 s or so"), advice);
        }
        let unseen = |track: &&Track| track.trouble.is_some() && track.endpoint.is_some() && !track.is_unreadable;
        let mut names: Vec<&str> =
            self.tracks.iter().filter(|(_, track)| unseen(track)).map(|(id, track)| track.name(id)).collect();
        if !names.is_empty() {
            names.sort_unstable();
            note(
                format!("inspect fails for {}; what was known of them stays", few(&names)),
                "see the log of the Docker Engine, and let a Docker API proxy allow GET /containers/{id}/json",
            );
        }
        if let Some(told) = self.paths.told() {
            notes.push(Note { what: format!("{host} {told}"), advice: None });
        }
        if notes != self.notes {
            self.notes.clone_from(&notes);
            self.out.push_back(Ok(Change::Notes(notes)));
        }
    }
}
