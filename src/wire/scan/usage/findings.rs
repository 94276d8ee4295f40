//! What the objects of an answer have told, and what that comes to.

use super::{
    Finish, Usage,
    stencil::{Stencil, Value},
};

/// What has been found in the objects of an answer.
#[derive(Debug, Default)]
pub(super) struct Findings {
    counts: [Option<u32>; Count::ALL],
    /// Said of a choice or a message.
    finish: Option<Finish>,
    /// Said of an object of the Responses API.
    status: Option<Finish>,
    /// The answer, or what its events are about, is an object of the Responses API.
    is_response: bool,
    /// Such an object is incomplete because of a filter.
    filtered: bool,
    /// The id of what is or may yet turn out to be such an object.
    id: Option<Box<str>>,
    /// The first id counts, and not the last.
    keeps_first_id: bool,
    /// The current event carries content.
    content: bool,
    /// The current event told anything else.
    told: bool,
    /// Events that carried content.
    pub(super) output_events: u64,
    /// The usual event, once one has been seen.
    pub(super) stencil: Option<Box<Stencil>>,
}

/// Something that is counted, as the place where it was found defines it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Count {
    /// All of the prompt.
    Prompt,
    /// All of the prompt, or (Anthropic) what of it was neither read from the cache nor written to it.
    Input,
    /// Anthropic: read from the cache.
    CacheRead,
    /// Anthropic: written to the cache.
    CacheCreation,
    /// What of the prompt was found in a cache.
    Cached,
    Output,
    /// What of the output was reasoning.
    Reasoning,
    /// Prompt and output.
    Total,
    /// llama.cpp's `timings`, which are there even when no usage was asked for: what of the prompt was found in a cache.
    TimedCached,
    /// What of the prompt was not.
    TimedPrompt,
    TimedOutput,
}

// === impl Findings ===

impl Findings {
    /// What all that has been told comes to.
    pub(super) fn usage(&self) -> Usage {
        let count = |count: Count| self.counts[count as usize].map(u64::from);
        let output_tokens = count(Count::Output).or(count(Count::TimedOutput));
        let input_with_cache = || {
            let cache = [Count::CacheRead, Count::CacheCreation].into_iter().filter_map(count);
            Some(count(Count::Input)? + cache.sum::<u64>())
        };
        let timed_input = || Some(count(Count::TimedPrompt)? + count(Count::TimedCached)?);
        // Some rerankers tell no more than this.
        let total_less_output = || Some(count(Count::Total)?.saturating_sub(output_tokens.unwrap_or_default()));
        Usage {
            input_tokens: count(Count::Prompt)
                .or_else(input_with_cache)
                .or_else(timed_input)
                .or_else(total_less_output),
            output_tokens,
            cached_input_tokens: count(Count::Cached).or(count(Count::CacheRead)).or(count(Count::TimedCached)),
            reasoning_tokens: count(Count::Reasoning),
            finish: self.finish.or(self.response_finish()),
            output_events: self.output_events,
        }
    }

    fn response_finish(&self) -> Option<Finish> {
        match self.status {
            _ if !self.is_response => None,
            Some(Finish::Length) if self.filtered => Some(Finish::ContentFilter),
            status => status,
        }
    }

    pub(super) fn answer_id(&self) -> Option<&str> {
        self.id.as_deref().filter(|_| self.is_response)
    }

    /// For an answer of which no more is wanted than its first id.
    pub(super) fn of_first_id() -> Findings {
        Findings { keeps_first_id: true, ..Findings::default() }
    }

    pub(super) fn any_id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// A count: the last one counts, unless it is a zero that follows a number.
    pub(super) fn count(&mut self, count: Count, value: u32) {
        let found = &mut self.counts[count as usize];
        if value > 0 || found.is_none() {
            *found = Some(value);
        }
        self.told = true;
    }

    pub(super) fn finish(&mut self, finish: Finish) {
        self.finish = Some(finish);
        self.told = true;
    }

    pub(super) fn status(&mut self, status: Finish) {
        self.status = Some(status);
        self.told = true;
    }

    pub(super) fn incomplete_reason(&mut self, reason: Option<Finish>) {
        self.filtered |= reason == Some(Finish::ContentFilter);
        self.told = true;
    }

    /// This is an object of the Responses API.
    pub(super) fn response(&mut self) {
        self.is_response = true;
        self.told = true;
    }

    pub(super) fn id(&mut self, id: &[u8]) {
        let is_settled = self.keeps_first_id && self.id.is_some();
        if !is_settled && self.id.as_deref().is_none_or(|known| known.as_bytes() != id) {
            self.id = std::str::from_utf8(id).ok().filter(|id| !id.is_empty()).map(Box::from);
        }
        self.told = true;
    }

    /// The current event carries content.
    pub(super) fn content(&mut self) {
        self.output_events += u64::from(!self.content);
        self.content = true;
    }

    /// A part of the current event is about to be read, behind which the chunk has this many bytes.
    pub(super) fn line(&mut self, beyond: usize) {
        if let Some(stencil) = &mut self.stencil {
            stencil.line(beyond);
        }
    }

    /// A value of the current event is about to be read, with which `rest` begins.
    pub(super) fn mark(&mut self, value: Value, rest: &[u8]) {
        if let Some(stencil) = &mut self.stencil {
            stencil.mark(value, rest.len());
        }
    }

    /// Counts the event with which `rest` begins if it is like the last ones; what is behind it, and its last byte.
    pub(super) fn usual_event<'a>(&mut self, rest: &'a [u8]) -> Option<(&'a [u8], u8)> {
        let (after, last) = self.stencil.as_mut()?.strip(rest)?;
        self.output_events += 1;
        Some((after, last))
    }

    /// Ends the current event, which is the start of `event`, if all of that is in this chunk.
    pub(super) fn end_event(&mut self, event: Option<&[u8]>, beyond: usize) {
        if let (true, false, Some(event)) = (self.content, self.told, event) {
            match &mut self.stencil {
                Some(stencil) => stencil.keep(&event[..event.len() - beyond], beyond),
                None => self.stencil = Some(Box::default()),
            }
        }
        (self.content, self.told) = (false, false);
    }
}

// === impl Count ===

impl Count {
    const ALL: usize = Count::TimedOutput as usize + 1;
}
