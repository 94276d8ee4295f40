//! Reads what an answer says about itself while its bytes go by: how many tokens went in and came out, why it ended,
//! when its first token came, and the id under which it may be asked for again.
//!
//! The tap is an onlooker. It is shown the payload of an answer, cut anywhere, and keeps none of it but the start of a
//! key or a word that a cut went through, so it can neither delay nor change nor hold an answer. It never fails: what it
//! cannot read it passes over. Backends tell the same things in many dialects, and the tap is not told which one it is
//! reading: every place where one of them puts a number is known (`places`), and no two dialects use one place for
//! different things.
//!
//! A number may be told more than once, as a running count or at the start and again at the end. They are never added
//! up: the last one counts. A null takes nothing back, and neither does a zero, as some servers repeat the counts of the
//! start as zeroes at the end.

mod findings;
mod object;
mod places;
mod stencil;
#[cfg(test)]
mod tests;

use findings::Findings;
use memchr::{memchr, memchr2};
use object::ObjectReader;

/// The longest id that is kept, in bytes. Those in use have some 40 to 60.
const ID_LIMIT_BYTES: usize = 128;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The start of a line of data. A space may follow, which is none of the data, but white space to the object.
const DATA: &[u8] = b"data:";

/// Reads an answer for its [`Usage`] while it goes by.
#[derive(Debug)]
pub struct UsageTap {
    framing: Framing,
    object: ObjectReader,
    findings: Findings,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerKind {
    /// As server-sent events, each with a JSON object.
    Events,
    /// As one JSON object.
    Json,
    /// As JSON objects, each on a line of its own.
    Ndjson,
}

/// What an answer has told so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many tokens the prompt had, those that were found in a cache included.
    pub input_tokens: Option<u64>,
    /// How many tokens were generated, those of the reasoning included. A stream that was cut may have told an early
    /// count only: [`output_events`](Self::output_events) may then be nearer to the truth.
    pub output_tokens: Option<u64>,
    /// How many tokens of the prompt were found in a cache.
    pub cached_input_tokens: Option<u64>,
    /// How many of the generated tokens were reasoning.
    pub reasoning_tokens: Option<u64>,
    /// Why it ended; the last of them if it has more than one choice.
    pub finish: Option<Finish>,
    /// How many events of a stream carried generated content. 0 for an answer that is no stream.
    pub output_events: u64,
}

/// Why an answer ended: a closed set, whatever backends say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// It came to its natural end, or to a stop sequence.
    Stop,
    /// It ran into a limit on tokens.
    Length,
    /// It asks its client to call a tool.
    ToolCalls,
    /// A filter cut it, or the model refused.
    ContentFilter,
    /// It was cancelled, or its server shut down.
    Abort,
    /// It failed.
    Error,
    /// It said something else.
    Other,
}

/// Where in the framing of its objects an answer is.
#[derive(Debug)]
enum Framing {
    Events(Line),
    Whole { begun: bool },
    Lines,
}

/// What comes next in a stream of events. Lines end with LF, CR or both.
#[derive(Debug, Clone, Copy)]
enum Line {
    /// The very first line, in front of which there may be a byte order mark, of which this many bytes have been read.
    Mark(u8),
    /// A line.
    Start,
    /// A line, or the LF of the CR that ended the line before.
    AfterCr,
    /// The rest of a line that equals `data:` in this many bytes so far.
    Name(u8),
    /// The rest of a line of data.
    Data,
    /// The rest of a line of something else: a comment or another field.
    Other,
}

// === impl UsageTap ===

impl UsageTap {
    /// A tap for an answer of this kind.
    pub fn new(kind: AnswerKind) -> UsageTap {
        let framing = match kind {
            AnswerKind::Events => Framing::Events(Line::Mark(0)),
            AnswerKind::Json => Framing::Whole { begun: false },
            AnswerKind::Ndjson => Framing::Lines,
        };
        UsageTap { framing, object: ObjectReader::new(kind == AnswerKind::Json), findings: Findings::default() }
    }

    /// A tap that reads the ids of a stream's objects as well, which costs the short cuts for events that are alike: for
    /// the beginning of a stream.
    pub(super) fn for_id(kind: AnswerKind) -> UsageTap {
        UsageTap { object: ObjectReader::new(true), findings: Findings::of_first_id(), ..UsageTap::new(kind) }
    }

    /// Looks at the next bytes. They may be cut anywhere; how they are cut changes no result.
    pub fn feed(&mut self, payload: &[u8]) {
        match &mut self.framing {
            Framing::Events(line) => {
                *line = feed_events(*line, payload, &mut self.object, &mut self.findings);
            }
            Framing::Lines => feed_lines(payload, &mut self.object, &mut self.findings),
            Framing::Whole { begun } => {
                *begun |= !payload.is_empty();
                self.object.feed(payload, 0, &mut self.findings);
            }
        }
    }

    /// Whether generated content has been seen: in a stream the first event that carries some, not the one that opens
    /// the stream, a comment or a ping; else the first byte.
    pub fn has_content(&self) -> bool {
        match self.framing {
            Framing::Whole { begun } => begun,
            Framing::Events(_) | Framing::Lines => self.findings.output_events > 0,
        }
    }

    /// Events with generated content so far: about as many as tokens.
    pub fn output_events(&self) -> u64 {
        self.findings.output_events
    }

    /// What has been told so far.
    pub fn usage(&self) -> Usage {
        let output_events = match self.framing {
            Framing::Whole { .. } => 0,
            Framing::Events(_) | Framing::Lines => self.findings.output_events,
        };
        Usage { output_events, ..self.findings.usage() }
    }

    /// The id of the answer if it is an object of the Responses API, which clients can ask for by it.
    pub fn answer_id(&self) -> Option<&str> {
        self.findings.answer_id()
    }

    /// The id of the answer, whatever it is.
    pub fn id(&self) -> Option<&str> {
        self.findings.any_id()
    }
}

/// Reads server-sent events.
fn feed_events(mut line: Line, payload: &[u8], object: &mut ObjectReader, findings: &mut Findings) -> Line {
    // The current event and all that follows, if it begins in this chunk.
    let mut event = None;
    let mut rest = payload;
    while let [byte, after @ ..] = rest {
        if let (Line::Start, None) = (line, event)
            && object.is_fresh()
        {
            if let Some((after, last)) = findings.usual_event(rest) {
                (line, rest) = (Line::after(last), after);
                continue;
            }
            event = Some(rest);
        }
        (line, rest) = match line {
            Line::Mark(read) => match BYTE_ORDER_MARK.get(usize::from(read)) {
                Some(mark) if mark == byte => (Line::Mark(read + 1), after),
                // A part of a mark is the start of some field's name.
                Some(_) if read > 0 => (Line::Other, rest),
                _ => (Line::Start, rest),
            },
            Line::AfterCr if *byte == b'\n' => (Line::Start, after),
            Line::AfterCr => (Line::Start, rest),
            Line::Start => match byte {
                b'\n' | b'\r' => {
                    findings.end_event(event.take(), after.len());
                    object.restart();
                    (Line::after(*byte), after)
                }
                _ => match rest.strip_prefix(DATA) {
                    Some(data) => (Line::data(&mut event, object, findings), data),
                    None => (Line::Name(0), rest),
                },
            },
            Line::Name(read) => match DATA.get(usize::from(read)) {
                None => (Line::data(&mut event, object, findings), rest),
                Some(name) if name == byte => (Line::Name(read + 1), after),
                Some(_) => (Line::Other, rest),
            },
            Line::Data | Line::Other => {
                let (text, stop) = rest.split_at(memchr2(b'\n', b'\r', rest).unwrap_or(rest.len()));
                if let Line::Data = line {
                    object.feed(text, stop.len(), findings);
                }
                match stop {
                    [] => (line, stop),
                    [end, after @ ..] => {
                        if let Line::Data = line {
                            // To the object, the end of a line is white space.
                            object.feed(b"\n", after.len(), findings);
                        }
                        (Line::after(*end), after)
                    }
                }
            }
        };
    }
    line
}

/// Reads one object per line.
fn feed_lines(payload: &[u8], object: &mut ObjectReader, findings: &mut Findings) {
    let mut rest = payload;
    while !rest.is_empty() {
        let event = object.is_fresh().then_some(rest);
        if let Some((after, _)) = event.and_then(|event| findings.usual_event(event)) {
            rest = after;
            continue;
        }
        let Some(end) = memchr(b'\n', rest) else {
            object.feed(rest, 0, findings);
            return;
        };
        let (text, after) = rest.split_at(end + 1);
        object.feed(text, after.len(), findings);
        findings.end_event(event, after.len());
        object.restart();
        rest = after;
    }
}

// === impl AnswerKind ===

impl AnswerKind {
    /// How an answer with this Content-Type is written; `None` if there is nothing to read in it, as it is neither
    /// events nor JSON, or compressed.
    pub fn of(content_type: &[u8], has_content_encoding: bool) -> Option<AnswerKind> {
        if has_content_encoding {
            return None;
        }
        let media_type = content_type.split(|&byte| byte == b';').next()?.trim_ascii();
        let is = |name: &str| media_type.eq_ignore_ascii_case(name.as_bytes());
        let ends = |suffix: &str| {
            media_type.len().checked_sub(suffix.len()).is_some_and(|at| {
                let (_, end) = media_type.split_at(at);
                end.eq_ignore_ascii_case(suffix.as_bytes())
            })
        };
        if is("text/event-stream") {
            Some(AnswerKind::Events)
        } else if is("application/json") || ends("+json") {
            Some(AnswerKind::Json)
        } else if is("application/x-ndjson") || is("application/ndjson") || is("application/jsonl") {
            Some(AnswerKind::Ndjson)
        } else {
            None
        }
    }
}

// === impl Finish ===

impl Finish {
    /// Every one of them.
    pub const ALL: [Finish; 7] = [
        Finish::Stop,
        Finish::Length,
        Finish::ToolCalls,
        Finish::ContentFilter,
        Finish::Abort,
        Finish::Error,
        Finish::Other,
    ];

    /// Its name as the label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
            Finish::ContentFilter => "content_filter",
            Finish::Abort => "abort",
            Finish::Error => "error",
            Finish::Other => "other",
        }
    }

    /// What a backend's word means; `None` for those that say that it goes on.
    fn of(word: &[u8]) -> Option<Finish> {
        Some(match word {
            b"stop" | b"end_turn" | b"stop_sequence" | b"completed" | b"eos" | b"word" => Finish::Stop,
            b"length" | b"max_tokens" | b"incomplete" | b"limit" | b"model_context_window_exceeded" => Finish::Length,
            b"tool_calls" | b"tool_use" | b"function_call" => Finish::ToolCalls,
            b"content_filter" | b"refusal" => Finish::ContentFilter,
            b"abort" | b"cancelled" => Finish::Abort,
            b"error" | b"failed" => Finish::Error,
            b"" | b"none" | b"queued" | b"in_progress" => return None,
            _ => Finish::Other,
        })
    }
}

// === impl Line ===

impl Line {
    /// The next line, behind this end of one.
    fn after(end: u8) -> Line {
        if end == b'\r' { Line::AfterCr } else { Line::Start }
    }

    /// A line of data. It goes on with the object of the line before, unless that is complete: some servers leave out
    /// the blank line between events.
    fn data(event: &mut Option<&[u8]>, object: &mut ObjectReader, findings: &mut Findings) -> Line {
        if object.is_complete() {
            // What has been read of this event is two.
            *event = None;
            findings.end_event(None, 0);
            object.restart();
        }
        Line::Data
    }
}
