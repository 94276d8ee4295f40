//! The JSON and the events of every answer, key by key in the order in which vLLM 0.32 writes them.
//!
//! Pure: text out of values. Templates rather than types: they can be laid beside a recorded answer and compared.

use bytes::Bytes;

use super::{
    body::{Event, Events},
    call::{Refusal, Reply},
    load::Finished,
};

/// What `max_model_len` says; nothing enforces it.
pub(super) const MAX_MODEL_LEN: u32 = 131_072;

const FINGERPRINT: &str = concat!("demo-", env!("CARGO_PKG_VERSION"));

const DONE: &str = "data: [DONE]\n\n";

/// What every answer of a model carries.
pub(super) struct Envelope {
    /// Unique part of its id.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) prompt_tokens: u64,
}

/// A text as JSON, quotes included.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// vLLM's error, or on `/v1/messages*` Anthropic's.
pub(super) fn error(refusal: &Refusal, anthropic: bool) -> String {
    let Refusal { status, kind, message, param } = refusal;
    let (message, status) = (quoted(message), status.as_u16());
    if anthropic {
        return format!(r#"{{"type":"error","error":{{"type":"{kind}","message":{message}}}}}"#);
    }
    let param = param.as_ref().map_or("null".into(), |param| quoted(param));
    format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":{param},"code":{status}}}}}"#)
}

/// The list of models; like vLLM's it says "created now" and has fresh permission ids every time.
pub(super) fn models(ids: &[String], now: u64, mut new_id: impl FnMut() -> String) -> String {
    let model = |id: &String| {
        let (id, permission) = (quoted(id), new_id());
        format!(
            r#"{{"id":{id},"object":"model","created":{now},"owned_by":"vllm","root":{id},"parent":null,"max_model_len":{MAX_MODEL_LEN},"permission":[{{"id":"modelperm-{permission}","object":"model_permission","created":{now},"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"*","group":null,"is_blocking":false}}]}}"#
        )
    };
    format!(r#"{{"object":"list","data":[{}]}}"#, ids.iter().map(model).collect::<Vec<_>>().join(","))
}

/// The answer to `/tokenize`.
pub(super) fn tokens(tokens: &[u32]) -> String {
    let count = tokens.len();
    format!(r#"{{"count":{count},"max_model_len":{MAX_MODEL_LEN},"tokens":{tokens:?},"token_strs":null}}"#)
}

// === chat completions ===

pub(super) fn chat(envelope: &Envelope, reply: &Reply) -> String {
    let Envelope { id, created, .. } = envelope;
    let (model, usage, finish) = (quoted(&envelope.model), usage(envelope, reply), openai_finish(reply));
    let (content, calls) = match &reply.tool {
        Some(tool) => ("null".into(), format!(r#","tool_calls":[{}]"#, tool_call(envelope, tool))),
        None => (quoted(&reply.text()), String::new()),
    };
    let id = quoted(&format!("chatcmpl-{id}"));
    format!(
        r#"{{"id":{id},"object":"chat.completion","created":{created},"model":{model},"choices":[{{"index":0,"message":{{"role":"assistant","content":{content},"refusal":null,"annotations":null,"audio":null,"function_call":null{calls},"reasoning":null}},"logprobs":null,"finish_reason":"{finish}","stop_reason":null,"token_ids":null}}],"service_tier":null,"system_fingerprint":"{FINGERPRINT}","usage":{usage},"prompt_logprobs":null,"prompt_token_ids":null,"kv_transfer_params":null}}"#
    )
}

pub(super) fn chat_events(envelope: &Envelope, reply: Reply, usage_chunk: bool) -> Events {
    let head = chunk_head("chatcmpl", "chat.completion.chunk", envelope);
    let first = [
        head.as_str(),
        r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}"#,
        "\n\n",
    ];
    let first = Event::Mark(first.concat().into());
    let tail = openai_tail(&head, envelope, &reply, usage_chunk);
    if let Some(tool) = &reply.tool {
        let call = tool_call(envelope, tool).replacen('{', r#"{"index":0,"#, 1);
        let call = format!(
            "{head}{{\"index\":0,\"delta\":{{\"tool_calls\":[{call}]}},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}}]}}\n\n"
        );
        let end = format!(
            "{head}{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\"finish_reason\":\"tool_calls\",\"stop_reason\":null,\"token_ids\":null}}],\"system_fingerprint\":\"{FINGERPRINT}\"}}\n\n"
        );
        return Box::new([first, Event::Token(call.into()), Event::Mark(end.into())].into_iter().chain(tail));
    }
    let tokens = openai_tokens(head, reply, r#"{"index":0,"delta":{"content":"#, r#"},"logprobs":null"#);
    Box::new([first].into_iter().chain(tokens).chain(tail))
}

// === text completions ===

pub(super) fn completion(envelope: &Envelope, reply: &Reply) -> String {
    let (id, created) = (quoted(&format!("cmpl-{}", envelope.id)), envelope.created);
    let (model, text, usage) = (quoted(&envelope.model), quoted(&reply.text()), usage(envelope, reply));
    let finish = openai_finish(reply);
    format!(
        r#"{{"id":{id},"object":"text_completion","created":{created},"model":{model},"choices":[{{"index":0,"text":{text},"logprobs":null,"finish_reason":"{finish}","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null}}],"service_tier":null,"system_fingerprint":"{FINGERPRINT}","usage":{usage},"kv_transfer_params":null}}"#
    )
}

pub(super) fn completion_events(envelope: &Envelope, reply: Reply, usage_chunk: bool) -> Events {
    let head = chunk_head("cmpl", "text_completion", envelope);
    let tail = openai_tail(&head, envelope, &reply, usage_chunk);
    Box::new(openai_tokens(head, reply, r#"{"index":0,"text":"#, r#","logprobs":null"#).chain(tail))
}

/// The tokens of both kinds of completion: `before` the quoted token and `after` it; the last one says why it is the last.
fn openai_tokens(
    head: String,
    reply: Reply,
    before: &'static str,
    after: &'static str,
) -> impl Iterator<Item = Event> + Send {
    let finish = openai_finish(&reply);
    (0..reply.tokens).map(move |at| {
        let token = quoted(&reply.token(at));
        let head = head.as_str();
        let event = if at + 1 < reply.tokens {
            [head, before, &token, after, r#","finish_reason":null,"token_ids":null}]}"#, "\n\n"].concat()
        } else {
            let end = r#"","stop_reason":null,"token_ids":null}],"system_fingerprint":""#;
            [head, before, &token, after, r#","finish_reason":""#, finish, end, FINGERPRINT, "\"}\n\n"].concat()
        };
        Event::Token(event.into())
    })
}

fn openai_tail(
    head: &str,
    envelope: &Envelope,
    reply: &Reply,
    usage_chunk: bool,
) -> impl Iterator<Item = Event> + use<> {
    let chunk = usage_chunk.then(|| {
        let usage = usage(envelope, reply);
        Event::Mark(format!("{head}],\"usage\":{usage},\"system_fingerprint\":\"{FINGERPRINT}\"}}\n\n").into())
    });
    chunk.into_iter().chain([Event::Mark(Bytes::from_static(DONE.as_bytes()))])
}

/// Everything of a chunk up to its first choice.
fn chunk_head(prefix: &str, object: &str, envelope: &Envelope) -> String {
    let (id, model) = (quoted(&format!("{prefix}-{}", envelope.id)), quoted(&envelope.model));
    let created = envelope.created;
    format!(r#"data: {{"id":{id},"object":"{object}","created":{created},"model":{model},"choices":["#)
}

fn tool_call(envelope: &Envelope, tool: &str) -> String {
    let (id, name) = (quoted(&format!("chatcmpl-tool-{}", envelope.id)), quoted(tool));
    format!(r#"{{"id":{id},"type":"function","function":{{"name":{name},"arguments":"{{}}"}}}}"#)
}

fn usage(envelope: &Envelope, reply: &Reply) -> String {
    let (prompt, completion) = (envelope.prompt_tokens, u64::from(reply.tokens));
    let total = prompt + completion;
    format!(r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion}}}"#)
}

fn openai_finish(reply: &Reply) -> &'static str {
    match (&reply.tool, reply.finished) {
        (Some(_), _) => "tool_calls",
        (None, Finished::Length) => "length",
        (None, _) => "stop",
    }
}

// === Anthropic messages ===

pub(super) fn message(envelope: &Envelope, reply: &Reply) -> String {
    let (model, stop) = (quoted(&envelope.model), anthropic_stop(reply));
    let (input, output) = (envelope.prompt_tokens, reply.tokens);
    let content = match &reply.tool {
        Some(tool) => tool_use(envelope, tool),
        None => format!(r#"{{"type":"text","text":{}}}"#, quoted(&reply.text())),
    };
    let id = quoted(&format!("chatcmpl-{}", envelope.id));
    format!(
        r#"{{"id":{id},"type":"message","role":"assistant","content":[{content}],"model":{model},"stop_reason":"{stop}","stop_sequence":null,"usage":{{"input_tokens":{input},"output_tokens":{output}}}}}"#
    )
}

pub(super) fn message_events(envelope: &Envelope, reply: Reply) -> Events {
    let (id, model) = (quoted(&format!("chatcmpl-{}", envelope.id)), quoted(&envelope.model));
    let (input, output, stop) = (envelope.prompt_tokens, reply.tokens, anthropic_stop(&reply));
    let (block, delta, key) = match &reply.tool {
        Some(tool) => (tool_use(envelope, tool), "input_json_delta", "partial_json"),
        None => (r#"{"type":"text","text":""}"#.into(), "text_delta", "text"),
    };
    let head = [
        named(
            "message_start",
            &format!(
                r#""message":{{"id":{id},"type":"message","role":"assistant","content":[],"model":{model},"stop_reason":null,"stop_sequence":null,"usage":{{"input_tokens":{input},"output_tokens":0}}}}"#
            ),
        ),
        named("content_block_start", &format!(r#""content_block":{block},"index":0"#)),
    ];
    let tail = [
        named("content_block_stop", r#""index":0"#),
        named(
            "message_delta",
            &format!(
                r#""delta":{{"stop_reason":"{stop}","stop_sequence":null}},"usage":{{"input_tokens":{input},"output_tokens":{output}}}"#
            ),
        ),
        "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n".into(),
    ];
    let tokens = (0..reply.tokens).map(move |at| {
        let token = if reply.tool.is_some() { "{}".into() } else { reply.token(at) };
        let delta = format!(r#""delta":{{"type":"{delta}","{key}":{}}},"index":0"#, quoted(&token));
        Event::Token(named("content_block_delta", &delta).into())
    });
    Box::new(head.into_iter().map(mark).chain(tokens).chain(tail.into_iter().map(mark)))
}

/// An event whose data repeats its name as `type`, as Anthropic's do.
fn named(name: &str, rest: &str) -> String {
    format!("event: {name}\ndata: {{\"type\":\"{name}\",{rest}}}\n\n")
}

fn mark(text: String) -> Event {
    Event::Mark(text.into())
}

fn tool_use(envelope: &Envelope, tool: &str) -> String {
    let (id, name) = (quoted(&format!("toolu_{}", envelope.id)), quoted(tool));
    format!(r#"{{"type":"tool_use","id":{id},"name":{name},"input":{{}}}}"#)
}

fn anthropic_stop(reply: &Reply) -> &'static str {
    match (&reply.tool, reply.finished) {
        (Some(_), _) => "tool_use",
        (None, Finished::Length) => "max_tokens",
        (None, _) => "end_turn",
    }
}

// === responses ===

/// The id of a response, as its answer and its events carry it.
pub(super) fn response_id(envelope: &Envelope) -> String {
    format!("resp_{}", envelope.id)
}

pub(super) fn response(envelope: &Envelope, reply: &Reply) -> String {
    let item = output_item(envelope, &reply.text());
    response_object(envelope, Some((reply, &item)))
}

pub(super) fn response_events(envelope: &Envelope, reply: Reply) -> Events {
    let text = reply.text();
    let item = output_item(envelope, &text);
    let item_id = quoted(&format!("msg_{}", envelope.id));
    let (started, ended) = (response_object(envelope, None), response_object(envelope, Some((&reply, &item))));
    let place = format!(r#""content_index":0,"item_id":{item_id},"output_index":0"#);
    let added = format!(
        r#""item":{{"id":{item_id},"content":[],"role":"assistant","status":"in_progress","type":"message","phase":null}},"output_index":0"#
    );
    let part = r#""part":{"annotations":[],"text":"","type":"output_text","logprobs":[]}"#;
    let head = [
        ("response.created", format!(r#""response":{started}"#)),
        ("response.in_progress", format!(r#""response":{started}"#)),
        ("response.output_item.added", added),
        ("response.content_part.added", format!("{place},{part}")),
    ];
    let text = quoted(&text);
    let tail = [
        ("response.output_text.done", format!(r#"{place},"logprobs":[],"text":{text}"#)),
        ("response.content_part.done", format!(r#"{place},"part":{}"#, output_text(&text))),
        ("response.output_item.done", format!(r#""item":{item},"output_index":0"#)),
        ("response.completed", format!(r#""response":{ended}"#)),
    ];
    let (first_token, first_of_tail) = (4, 4 + reply.tokens);
    let tokens = (0..reply.tokens).map(move |at| {
        let delta = format!(r#""delta":{},{place},"logprobs":[]"#, quoted(&reply.token(at)));
        Event::Token(numbered("response.output_text.delta", &delta, first_token + at).into())
    });
    let mark = |((name, rest), number): ((_, String), u32)| mark(numbered(name, &rest, number));
    Box::new(head.into_iter().zip(0..).map(mark).chain(tokens).chain(tail.into_iter().zip(first_of_tail..).map(mark)))
}

fn numbered(name: &str, rest: &str, number: u32) -> String {
    named(name, &format!(r#"{rest},"sequence_number":{number}"#))
}

/// A response, before its output or with it.
fn response_object(envelope: &Envelope, output: Option<(&Reply, &str)>) -> String {
    let (id, model) = (quoted(&response_id(envelope)), quoted(&envelope.model));
    let created = envelope.created;
    let incomplete = r#"{"reason":"max_output_tokens"}"#;
    let (status, incomplete, item, usage) = match output {
        None => ("in_progress", "null", "", "null".into()),
        Some((reply, item)) if reply.finished == Finished::Length => {
            ("incomplete", incomplete, item, response_usage(envelope, reply))
        }
        Some((reply, item)) => ("completed", "null", item, response_usage(envelope, reply)),
    };
    format!(
        r#"{{"id":{id},"created_at":{created},"incomplete_details":{incomplete},"instructions":null,"metadata":null,"model":{model},"object":"response","output":[{item}],"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":null,"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"{status}","text":null,"top_logprobs":null,"truncation":"disabled","usage":{usage},"user":null}}"#
    )
}

fn output_item(envelope: &Envelope, text: &str) -> String {
    let (id, part) = (quoted(&format!("msg_{}", envelope.id)), output_text(&quoted(text)));
    format!(r#"{{"id":{id},"content":[{part}],"role":"assistant","status":"completed","type":"message","phase":null}}"#)
}

fn output_text(quoted: &str) -> String {
    format!(r#"{{"annotations":[],"text":{quoted},"type":"output_text","logprobs":null}}"#)
}

fn response_usage(envelope: &Envelope, reply: &Reply) -> String {
    let (input, output) = (envelope.prompt_tokens, u64::from(reply.tokens));
    let total = input + output;
    format!(
        r#"{{"input_tokens":{input},"input_tokens_details":{{"cached_tokens":0}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0}},"total_tokens":{total}}}"#
    )
}
