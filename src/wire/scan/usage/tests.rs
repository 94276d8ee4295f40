//! Answers of every dialect, whole and cut everywhere, and hostile ones.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Map, Value as Json};

use super::*;

use super::super::tests::cut;

/// All that a tap tells.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    usage: Usage,
    id: Option<String>,
    has_content: bool,
}

fn read<'a>(kind: AnswerKind, chunks: impl IntoIterator<Item = &'a [u8]>) -> Told {
    let mut tap = UsageTap::new(kind);
    for chunk in chunks {
        tap.feed(chunk);
    }
    Told { usage: tap.usage(), id: tap.answer_id().map(str::to_owned), has_content: tap.has_content() }
}

/// Reads an answer in one piece, in two that are cut everywhere, and as [`read_in_pieces`] does, which must all come to
/// the same.
fn read_cut_everywhere(kind: AnswerKind, answer: &[u8]) -> Told {
    let whole = read_in_pieces(kind, answer);
    for at in 0..=answer.len() {
        let (head, tail) = answer.split_at(at);
        assert_eq!(read(kind, [head, tail]), whole, "{} cut at {at}", answer.escape_ascii());
    }
    whole
}

/// Reads an answer in one piece, in pieces of some sizes, byte by byte and by lines, which must all come to the same.
fn read_in_pieces(kind: AnswerKind, answer: &[u8]) -> Told {
    let whole = read(kind, [answer]);
    for size in [1, 2, 3, 7, 64] {
        assert_eq!(read(kind, answer.chunks(size)), whole, "{} in pieces of {size}", answer.escape_ascii());
    }
    let lines = answer.split_inclusive(|&byte| byte == b'\n');
    assert_eq!(read(kind, lines), whole, "{} by lines", answer.escape_ascii());
    whole
}

fn check(kind: AnswerKind, answer: impl AsRef<[u8]>, usage: Usage) {
    check_told(kind, answer.as_ref(), read_cut_everywhere(kind, answer.as_ref()), usage);
}

fn check_told(kind: AnswerKind, answer: &[u8], told: Told, usage: Usage) {
    assert_eq!(told.usage, usage, "{}", answer.escape_ascii());
    let has_content = if kind == AnswerKind::Json { !answer.is_empty() } else { usage.output_events > 0 };
    assert_eq!(told.has_content, has_content, "{}", answer.escape_ascii());
}

fn check_json(answer: impl AsRef<[u8]>, usage: Usage) {
    check(AnswerKind::Json, answer, usage);
}

/// Checks a stream of events, and others that mean the same: with other ends of lines, without the space behind the
/// colon, with a byte order mark, with comments and other fields, without its last line end.
fn check_events(stream: &str, usage: Usage) {
    check(AnswerKind::Events, stream, usage);
    let noise = "\n\n: keep-alive\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\nid: 5\nretry: 1000\ndata\ndatab: {\n";
    for stream in [
        stream.replace('\n', "\r\n"),
        stream.replace('\n', "\r"),
        stream.replace("data: ", "data:"),
        format!("\u{feff}{stream}"),
        stream.replace("\n\n", noise),
        stream.trim_end().to_owned(),
        // Without the blank lines that there should be.
        stream.replace("\n\n", "\n"),
        // Over several lines, between which there is white space to JSON.
        stream.replace(",\"", ",\ndata: \""),
        stream.replace("\":", "\"\ndata:\ndata: :\ndata: "),
    ] {
        let stream = stream.as_bytes();
        check_told(AnswerKind::Events, stream, read_in_pieces(AnswerKind::Events, stream), usage);
    }
}

fn usage(input: u64, output: u64) -> Usage {
    Usage { input_tokens: Some(input), output_tokens: Some(output), ..Usage::default() }
}

impl Usage {
    fn cached(self, tokens: u64) -> Usage {
        Usage { cached_input_tokens: Some(tokens), ..self }
    }

    fn reasoning(self, tokens: u64) -> Usage {
        Usage { reasoning_tokens: Some(tokens), ..self }
    }

    fn finish(self, finish: Finish) -> Usage {
        Usage { finish: Some(finish), ..self }
    }

    fn events(self, output_events: u64) -> Usage {
        Usage { output_events, ..self }
    }
}

// === The dialects ===

#[test]
fn chat_and_completions() {
    // vLLM.
    check_json(
        r#"{"id":"chatcmpl-86","object":"chat.completion","created":1795244758,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"a b","refusal":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"service_tier":null,"usage":{"prompt_tokens":5,"total_tokens":13,"completion_tokens":8,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null}"#,
        usage(5, 8).finish(Finish::Length),
    );
    // vLLM names the stop sequence or token in `stop_reason`.
    check_json(
        r#"{"choices":[{"index":0,"text":"a","finish_reason":"stop","stop_reason":"length"}],"usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1}}"#,
        usage(5, 1).finish(Finish::Stop),
    );
    // llama.cpp.
    check_json(
        r#"{"choices":[{"finish_reason":"tool_calls","index":0,"message":{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"f","arguments":"{\"usage\": {\"prompt_tokens\": 999}}"}}]}}],"created":1795244895,"model":"m","object":"chat.completion","usage":{"completion_tokens":8,"prompt_tokens":5,"total_tokens":13,"prompt_tokens_details":{"cached_tokens":4}},"id":"chatcmpl-PO","timings":{"cache_n":4,"prompt_n":1,"prompt_ms":0.694,"predicted_n":9,"predicted_ms":0.446}}"#,
        usage(5, 8).cached(4).finish(Finish::ToolCalls),
    );
    // OpenAI, with the whitespace of an indenting server; SGLang has the reasoning next to the other counts.
    check_json(
        "{\n  \"choices\": [ { \"finish_reason\" : \"content_filter\" } ],\n  \"usage\": {\n    \"prompt_tokens\": 19,\n    \"completion_tokens\": 210 ,\n    \"prompt_tokens_details\": { \"cached_tokens\": 0, \"audio_tokens\": 3 },\n    \"completion_tokens_details\": { \"reasoning_tokens\": 192 }\n  }\n}\n",
        usage(19, 210).cached(0).reasoning(192).finish(Finish::ContentFilter),
    );
    check_json(
        r#"{"choices":[],"usage":{"prompt_tokens":4,"total_tokens":9,"completion_tokens":5,"prompt_tokens_details":null,"reasoning_tokens":3}}"#,
        usage(4, 5).reasoning(3),
    );
}

#[test]
fn chat_streams() {
    // vLLM, with and without usage at the end, and with it in every event.
    let role = r#"{"id":"chatcmpl-ab","object":"chat.completion.chunk","created":1795244762,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}"#;
    let delta = |text: &str, finish: &str, more: &str| {
        format!(
            r#"{{"id":"chatcmpl-ab","object":"chat.completion.chunk","created":1795244762,"model":"m","choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":{finish},"stop_reason":null,"token_ids":null}}]{more}}}"#
        )
    };
    let stream = |more: [&str; 6], last: &str| {
        let [first, second, third, fourth, fifth, sixth] = more;
        format!(
            "data: {role}\n\ndata: {}\n\ndata: {}\n\ndata: {}\n\ndata: {}\n\ndata: {}\n\ndata: {}\n\n{last}data: [DONE]\n\n",
            delta("a", "null", first),
            delta("{\\\"usage\\\":", "null", second),
            delta("caf\\u00e9 \u{e9}\\n\\\\", "null", third),
            delta(r#"\",\"finish_reason\":\"stop\""#, "null", fourth),
            delta("e", "null", fifth),
            delta("f", "\"length\"", sixth),
        )
    };
    let none = Usage::default().events(6).finish(Finish::Length);
    check_events(&stream([""; 6], ""), none);
    let last = r#"{"id":"chatcmpl-ab","choices":[],"usage":{"prompt_tokens":5,"total_tokens":11,"completion_tokens":6},"system_fingerprint":"f"}"#;
    let both = usage(5, 6).events(6).finish(Finish::Length);
    check_events(&stream([",\"usage\":null"; 6], &format!("data: {last}\n\n")), both);
    let running = [1, 2, 3, 4, 5, 6].map(|n| format!(r#","usage":{{"prompt_tokens":5,"completion_tokens":{n}}}"#));
    check_events(&stream(running.each_ref().map(String::as_str), ""), both);
    // The last event has counts of zero.
    let zeroes = format!("data: {last}\n\ndata: {{\"usage\":{{\"prompt_tokens\":0,\"completion_tokens\":null}}}}\n\n");
    check_events(&stream([""; 6], &zeroes), both);

    // llama.cpp without usage still tells its timings.
    check_events(
        concat!(
            r#"data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"id":"c"}"#,
            "\n\n",
            r#"data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":">"}}],"id":"c"}"#,
            "\n\n",
            r#"data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"id":"c","timings":{"cache_n":4,"prompt_n":1,"prompt_ms":0.199,"predicted_n":6,"predicted_ms":0.673}}"#,
            "\n\ndata: [DONE]\n\n"
        ),
        usage(5, 6).cached(4).events(1).finish(Finish::Stop),
    );

    // Completions; two choices.
    check_events(
        concat!(
            r#"data: {"id":"c","choices":[{"index":0,"text":"gs","logprobs":null,"finish_reason":null,"stop_reason":null}]}"#,
            "\n\n",
            r#"data: {"id":"c","choices":[{"index":1,"text":"ve","logprobs":null,"finish_reason":null,"stop_reason":null}]}"#,
            "\n\n",
            r#"data: {"id":"c","choices":[{"index":1,"text":"","finish_reason":"length"},{"index":0,"text":"x"}],"usage":{"prompt_tokens":1,"completion_tokens":4}}"#,
            "\n\ndata: [DONE]\n\n"
        ),
        usage(1, 4).events(3).finish(Finish::Length),
    );

    // Reasoning, refusal and tool calls are content; what is null or empty is not.
    check_events(
        concat!(
            r#"data: {"choices":[{"delta":{"role":"assistant","content":null,"reasoning_content":null,"tool_calls":null,"function_call":null}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"role":"assistant","content":"","tool_calls":[]}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"reasoning":"hm","content":"both"}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"refusal":"no"}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"t","type":"function","function":{"name":"f","arguments":""}}]}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\"usage\":{\"prompt_tokens\":9}}"}}]}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{"function_call":{"name":"f"}}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#,
            "\n\n"
        ),
        Usage::default().events(6).finish(Finish::ToolCalls),
    );
}

#[test]
fn embeddings_and_rerank() {
    let embedding = vec!["-0.0123456,1.5e-05"; 100].join(",");
    let data = format!(r#"{{"object":"embedding","index":0,"embedding":[{embedding}]}}"#);
    let prompt = Usage { input_tokens: Some(9), ..Usage::default() };
    check_json(
        format!(
            r#"{{"object":"list","data":[{data}],"model":"m","usage":{{"prompt_tokens":9,"total_tokens":9,"completion_tokens":0}}}}"#
        ),
        Usage { output_tokens: Some(0), ..prompt },
    );
    let base64 = r#"{"usage":{"total_tokens":9,"prompt_tokens":9},"data":[{"embedding":"AACAPwAA/+=="}]}"#;
    check_json(base64, prompt);
    let rerank = r#"{"id":"score-1","model":"m","usage":{"total_tokens":9},"results":[{"index":0,"document":{"text":"{\"usage\":"},"relevance_score":0.99}]}"#;
    check_json(rerank, prompt);
    // Nothing to read.
    check_json(format!("[[{embedding}],[{embedding}]]"), Usage::default());
    check_json(r#"[{"usage":{"prompt_tokens":1}}]"#, Usage::default());
    check_json("", Usage::default());
    check_json("\"usage\"", Usage::default());
}

#[test]
fn messages() {
    // llama.cpp; the prompt is what was fresh and what was cached.
    check_json(
        r#"{"id":"msg_1","type":"message","role":"assistant","content":[{"type":"text","text":"a"},{"type":"tool_use","input":{"usage":{"input_tokens":99},"stop_reason":"x"}}],"model":"m","stop_reason":"max_tokens","stop_sequence":null,"usage":{"cache_read_input_tokens":4,"input_tokens":1,"output_tokens":4}}"#,
        usage(5, 4).cached(4).finish(Finish::Length),
    );
    // Anthropic.
    check_json(
        r#"{"content":[],"stop_reason":"tool_use","usage":{"input_tokens":10,"cache_creation_input_tokens":200,"cache_read_input_tokens":3000,"cache_creation":{"ephemeral_5m_input_tokens":200,"input_tokens":7},"output_tokens":20,"service_tier":"standard"}}"#,
        usage(3210, 20).cached(3000).finish(Finish::ToolCalls),
    );

    let stream = |start: &str, end: &str| {
        format!(
            concat!(
                "event: message_start\n",
                r#"data: {{"type":"message_start","message":{{"id":"msg_1","type":"message","role":"assistant","content":[],"model":"m","stop_reason":null,"stop_sequence":null,"usage":{{{start}}}}}}}"#,
                "\n\nevent: content_block_start\n",
                r#"data: {{"type":"content_block_start","index":0,"content_block":{{"type":"text","text":""}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"thinking_delta","thinking":"h"}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"signature_delta","signature":"h"}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"a"}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":"\"stop_reason\":"}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":" b"}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"text_delta","text":""}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":10,"delta":{{"type":"text_delta","text":"c"}}}}"#,
                "\n\nevent: content_block_start\n",
                r#"data: {{"type":"content_block_start","index":11,"content_block":{{"type":"tool_use","name":"f","input":{{}}}}}}"#,
                "\n\nevent: content_block_delta\n",
                r#"data: {{"type":"content_block_delta","index":11,"delta":{{"type":"input_json_delta","partial_json":"{{\"usage\""}}}}"#,
                "\n\nevent: content_block_stop\n",
                r#"data: {{"type":"content_block_stop","index":11}}"#,
                "\n\nevent: message_delta\n",
                r#"data: {{"type":"message_delta","delta":{{"stop_reason":"end_turn","stop_sequence":null}},"usage":{{{end}}}}}"#,
                "\n\nevent: message_stop\n",
                r#"data: {{"type":"message_stop"}}"#,
                "\n\n"
            ),
            start = start,
            end = end
        )
    };
    let expected = |input, output| usage(input, output).events(7).finish(Finish::Stop);
    // vLLM, llama.cpp, Anthropic, and servers that know the prompt only at the end, or no longer at the end.
    for (start, end, expected) in [
        (r#""input_tokens":5,"output_tokens":0"#, r#""input_tokens":5,"output_tokens":4"#, expected(5, 4)),
        (
            r#""cache_read_input_tokens":4,"input_tokens":1,"output_tokens":0"#,
            r#""output_tokens":4"#,
            expected(5, 4).cached(4),
        ),
        (
            r#""input_tokens":2,"cache_creation_input_tokens":30,"cache_read_input_tokens":400,"output_tokens":3"#,
            r#""input_tokens":2,"cache_creation_input_tokens":30,"cache_read_input_tokens":400,"output_tokens":15"#,
            expected(432, 15).cached(400),
        ),
        (r#""input_tokens":0,"output_tokens":0"#, r#""input_tokens":7,"output_tokens":4"#, expected(7, 4)),
        (
            r#""input_tokens":7,"cache_read_input_tokens":null,"output_tokens":1"#,
            r#""input_tokens":0,"output_tokens":4"#,
            expected(7, 4),
        ),
        // The estimate of the start is put right at the end.
        (r#""input_tokens":12"#, r#""input_tokens":1,"cache_read_input_tokens":11"#, {
            Usage { output_tokens: None, ..expected(12, 0) }.cached(11)
        }),
    ] {
        check_events(&stream(start, end), expected);
    }
}

#[test]
fn responses() {
    // vLLM, of which a status is `incomplete` in an event called `response.completed`.
    let object = |id: &str, status: &str, more: &str| {
        format!(
            r#"{{"id":"{id}","created_at":1795244867,{more}"model":"m","object":"response","output":[{{"id":"msg_9","status":"failed","content":[{{"text":"a","usage":{{"input_tokens":9}}}}]}}],"status":"{status}","text":null}}"#
        )
    };
    let counts = r#""usage":{"input_tokens":4,"input_tokens_details":{"cached_tokens":3,"cache_write_tokens":0,"input_tokens_per_turn":[]},"output_tokens":30,"output_tokens_details":{"reasoning_tokens":20},"total_tokens":34},"#;
    let all = usage(4, 30).cached(3).reasoning(20);
    for (status, more, finish) in [
        ("completed", r#""incomplete_details":null,"error":null,"#, Finish::Stop),
        ("incomplete", r#""incomplete_details":{"reason":"max_output_tokens"},"#, Finish::Length),
        ("incomplete", r#""incomplete_details":{"reason":"content_filter"},"#, Finish::ContentFilter),
        ("failed", r#""incomplete_details":null,"#, Finish::Error),
        ("cancelled", "", Finish::Abort),
    ] {
        let more = format!("{more}{counts}");
        let stream = [
            &format!(
                r#"{{"response":{},"sequence_number":0,"type":"response.created"}}"#,
                object("resp_b", "in_progress", r#""usage":null,"#)
            ),
            r#"{"item":{"id":"msg_9","content":[],"status":"in_progress"},"sequence_number":1,"type":"response.output_item.added"}"#,
            r#"{"content_index":0,"delta":">","item_id":"msg_9","logprobs":[],"sequence_number":8,"type":"response.output_text.delta"}"#,
            r#"{"content_index":0,"delta":"b","item_id":"msg_9","logprobs":[],"sequence_number":9,"type":"response.output_text.delta"}"#,
            r#"{"content_index":0,"delta":"c","item_id":"msg_9","logprobs":[],"sequence_number":10,"type":"response.output_text.delta"}"#,
            r#"{"content_index":0,"delta":"","item_id":"msg_9","logprobs":[],"sequence_number":11,"type":"response.output_text.delta"}"#,
            r#"{"content_index":0,"delta":"\\","item_id":"msg_9","logprobs":[],"sequence_number":12,"type":"response.output_text.delta"}"#,
            r#"{"content_index":0,"delta":"e","item_id":"msg_9","logprobs":[],"sequence_number":13,"type":"response.output_text.delta"}"#,
            r#"{"type":"response.function_call_arguments.delta","delta":"{\"id\":","sequence_number":14}"#,
            r#"{"item_id":"msg_9","text":"a","sequence_number":15,"type":"response.output_text.done"}"#,
            &format!(
                r#"{{"response":{},"sequence_number":16,"type":"response.completed"}}"#,
                object("resp_b", status, &more)
            ),
        ];
        let stream = stream.map(|event| format!("event: response\ndata: {event}\n\n")).concat();
        check_events(&stream, all.events(6).finish(finish));
        assert_eq!(read(AnswerKind::Events, [stream.as_bytes()]).id.as_deref(), Some("resp_b"));

        let json = object("resp_b", status, &more);
        check_json(&json, all.finish(finish));
        assert_eq!(read(AnswerKind::Json, [json.as_bytes()]).id.as_deref(), Some("resp_b"));
    }
    // Not there yet; something else.
    check_json(object("resp_b", "queued", ""), Usage::default());
    check_json(r#"{"id":"video_1","object":"video","status":"completed"}"#, Usage::default());
}

#[test]
fn llama_cpp() {
    check_json(
        r#"{"index":0,"content":"a","tokens":[],"id_slot":0,"stop":true,"model":"m","tokens_predicted":8,"tokens_evaluated":5,"generation_settings":{"tokens_evaluated":99},"prompt":"\"tokens_evaluated\":99","has_new_line":false,"truncated":false,"stop_type":"limit","stopping_word":"","tokens_cached":12,"timings":{"cache_n":2,"prompt_n":3,"predicted_n":8}}"#,
        usage(5, 8).cached(2).finish(Finish::Length),
    );
    let event = |text: &str, n: u64, more: &str| {
        format!(
            r#"data: {{"index":0,"content":"{text}","tokens":[5],"stop":false,"tokens_predicted":{n},"tokens_evaluated":5{more}}}"#
        ) + "\n\n"
    };
    let last = event("", 3, r#","stop_type":"eos","timings":{"cache_n":-1,"prompt_n":5,"predicted_n":3.0}"#);
    let stream = [event("a", 1, ""), event("b", 2, ""), event("c", 3, r#","stop_type":"none""#), last].concat();
    check_events(&stream, usage(5, 3).events(3).finish(Finish::Stop));
}

#[test]
fn ollama() {
    let line = |time: u32, text: &str| {
        format!(
            r#"{{"model":"m","created_at":"2026-08-04T08:52:19.{time}Z","message":{{"role":"assistant","content":"{text}"}},"done":false}}"#
        ) + "\n"
    };
    let end = r#"{"model":"m","created_at":"2026-08-04T08:52:20Z","message":{"role":"assistant","content":""},"done_reason":"stop","done":true,"total_duration":4883583458,"prompt_eval_count":26,"prompt_eval_cached_count":20,"eval_count":28,"eval_duration":4799921000}"#;
    let texts = ["", "a", "b", "\\\"", "d", "e", "\\n", "g"];
    let stream: String = texts.iter().zip(98..).map(|(text, time)| line(time, text)).collect();
    let expected = usage(26, 28).cached(20).finish(Finish::Stop).events(7);
    for stream in [format!("{stream}{end}\n"), format!("\u{feff}{stream}\n{end}"), format!("{stream}{end}\r\n\r\n")] {
        check(AnswerKind::Ndjson, &stream, expected);
    }
    check_json(end, expected.events(0));

    let generate = concat!(
        r#"{"model":"m","response":"","thinking":"hm","done":false}"#,
        "\n",
        r#"{"model":"m","response":"a","done":false}"#,
        "\n",
        r#"{"model":"m","message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"eval_count":9}}}]}}"#,
        "\nnot JSON {\n",
        r#"{"model":"m","response":"","done":true,"done_reason":"length","context":[1,2],"prompt_eval_count":2,"eval_count":3}"#,
        "\n"
    );
    check(AnswerKind::Ndjson, generate, usage(2, 3).events(3).finish(Finish::Length));
    check(AnswerKind::Ndjson, "{\"error\":\"out of memory\"}\n", Usage::default().finish(Finish::Error));
}

#[test]
fn errors() {
    let failed = Usage::default().finish(Finish::Error);
    for json in [
        r#"{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}"#,
        r#"{"error":"Unauthorized"}"#,
        r#"{"object":"error","message":"too long","code":400}"#,
        r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#,
    ] {
        check_json(json, failed);
        check_events(&format!("data: {json}\n\n"), if json.contains("object") { Usage::default() } else { failed });
    }
    // An error ends what had begun well, and what was told before stays.
    check_events(
        concat!(
            r#"data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":5,"completion_tokens":1}}"#,
            "\n\n",
            r#"data: {"error":{"message":"{\"usage\":{\"prompt_tokens\":6}}","usage":{"prompt_tokens":6}}}"#,
            "\n\n"
        ),
        usage(5, 1).events(1).finish(Finish::Error),
    );
    check_events("event: error\ndata: {\"type\":\"error\",\"code\":\"x\",\"message\":\"y\"}\n\n", failed);
    check_json(r#"{"error":null,"choices":[{"finish_reason":"stop"}]}"#, Usage::default().finish(Finish::Stop));
}

// === Ids, first content, kinds ===

#[test]
fn ids_are_those_of_the_responses_api() {
    let id = |kind, answer: &str| read_cut_everywhere(kind, answer.as_bytes()).id;
    let longest = "r".repeat(ID_LIMIT_BYTES);
    for (json, expected) in [
        (r#"{"id":"resp_1","object":"response"}"#, Some("resp_1")),
        (r#"{"object": "response", "id": "resp_1"}"#, Some("resp_1")),
        (r#"{"object":"response","output":[{"id":"msg_1"}]}"#, None),
        (r#"{"id":"chatcmpl-1","object":"chat.completion"}"#, None),
        (r#"{"id":"resp_1"}"#, None),
        (r#"{"id":5,"object":"response"}"#, None),
        (r#"{"id":"","object":"response"}"#, None),
        (r#"{"id":"resp\u005f1","object":"response"}"#, None),
        (r#"{"id":"resp_1","metadata":{"object":"response"}}"#, None),
        (&format!(r#"{{"id":"{longest}","object":"response"}}"#), Some(&*longest)),
        (&format!(r#"{{"id":"{longest}r","object":"response"}}"#), None),
    ] {
        assert_eq!(id(AnswerKind::Json, json).as_deref(), expected, "{json}");
    }
    // With an id that is too long it is no such object, wherever the id is cut.
    check_json(format!(r#"{{"response":{{"id":"{longest}r","status":"completed"}}}}"#), Usage::default());
    assert_eq!(read(AnswerKind::Json, [&b"{\"object\":\"response\",\"id\":\"\xFF\"}"[..]]).id, None);
    for (event, expected) in [
        (r#"{"type":"response.created","response":{"object":"response","id":"resp_1"}}"#, Some("resp_1")),
        (r#"{"type":"response.created","response":{"output":[{"id":"msg_1"}]}}"#, None),
        (r#"{"id":"resp_1","object":"response"}"#, None),
        (r#"{"response":"{\"id\":\"resp_1\"}"}"#, None),
        (r#"{"item":{"response":{"id":"resp_1"}}}"#, None),
    ] {
        assert_eq!(id(AnswerKind::Events, &format!("data: {event}\n\n")).as_deref(), expected, "{event}");
    }
}

#[test]
fn first_content_is_seen_with_its_first_byte() {
    for (kind, before, content) in [
        (
            AnswerKind::Events,
            ": ping\n\ndata: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\nevent: ping\ndata: {\"type\":\"ping\"}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"",
            "a",
        ),
        (AnswerKind::Events, "data: {\"type\":\"response.output_text.delta\",\"delta\":\"", "\\n"),
        (AnswerKind::Events, "data: {\"choices\":[{\"delta\":{\"tool_calls\":[", "{"),
        (AnswerKind::Ndjson, "{\"message\":{\"content\":\"\"}}\n{\"message\":{\"content\":\"", "\u{e9}"),
        (AnswerKind::Json, "", " "),
    ] {
        let mut tap = UsageTap::new(kind);
        for byte in before.bytes() {
            tap.feed(&[byte]);
            assert!(!tap.has_content(), "{before}");
        }
        tap.feed(&[]);
        assert!(!tap.has_content(), "{before}");
        tap.feed(&content.as_bytes()[..1]);
        assert!(tap.has_content(), "{before}{content}");
    }
}

#[test]
fn counts_are_there_as_soon_as_they_are_told() {
    let mut tap = UsageTap::new(AnswerKind::Events);
    tap.feed(b"data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":12");
    assert_eq!(tap.usage().input_tokens, None, "more digits may come");
    tap.feed(b",\"output_tokens\":1");
    assert_eq!(tap.usage().input_tokens, Some(12));
    assert_eq!(tap.usage().output_tokens, None);
    tap.feed(b"}");
    assert_eq!(tap.usage().output_tokens, Some(1));
}

#[test]
fn the_content_type_tells_the_kind() {
    for (content_type, kind) in [
        ("text/event-stream", Some(AnswerKind::Events)),
        ("text/event-stream; charset=utf-8", Some(AnswerKind::Events)),
        ("Text/Event-Stream ;charset=utf-8", Some(AnswerKind::Events)),
        ("application/json", Some(AnswerKind::Json)),
        (" application/json; charset=utf-8", Some(AnswerKind::Json)),
        ("application/problem+JSON", Some(AnswerKind::Json)),
        ("application/x-ndjson", Some(AnswerKind::Ndjson)),
        ("application/ndjson", Some(AnswerKind::Ndjson)),
        ("application/jsonl", Some(AnswerKind::Ndjson)),
        ("", None),
        ("json", None),
        ("text/html", None),
        ("application/octet-stream", None),
        ("text/plain; application/json", None),
        ("application/json, text/event-stream", None),
    ] {
        assert_eq!(AnswerKind::of(content_type.as_bytes(), false), kind, "{content_type}");
        assert_eq!(AnswerKind::of(content_type.as_bytes(), true), None, "{content_type}");
    }
    assert_eq!(AnswerKind::of(b"\xFF", false), None);
}

#[test]
fn finishes_are_a_closed_set() {
    for (words, finish, label) in [
        ("stop end_turn stop_sequence completed eos word", Finish::Stop, "stop"),
        ("length max_tokens incomplete limit model_context_window_exceeded", Finish::Length, "length"),
        ("tool_calls tool_use function_call", Finish::ToolCalls, "tool_calls"),
        ("content_filter refusal", Finish::ContentFilter, "content_filter"),
        ("abort cancelled", Finish::Abort, "abort"),
        ("error failed", Finish::Error, "error"),
        ("pause_turn load Stop repetition", Finish::Other, "other"),
    ] {
        assert_eq!(finish.as_str(), label);
        for word in words.split(' ') {
            check_json(
                format!(r#"{{"choices":[{{"finish_reason":"{word}"}}]}}"#),
                Usage { finish: Some(finish), ..Usage::default() },
            );
        }
    }
    for word in ["\"\"", "null", "5", "[\"stop\"]", "{\"finish_reason\":\"stop\"}", "\"sto\\u0070\""] {
        check_json(format!(r#"{{"choices":[{{"finish_reason":{word}}}]}}"#), Usage::default());
    }
    // However long a word is.
    for len in [TOKEN, TOKEN + 1] {
        let finish = (len == TOKEN).then_some(Finish::Other);
        let json = format!(r#"{{"choices":[{{"finish_reason":"{}"}}]}}"#, "x".repeat(len));
        check_json(json, Usage { finish, ..Usage::default() });
    }
}

const TOKEN: usize = ID_LIMIT_BYTES;

// === Hostile answers ===

#[test]
fn only_the_right_places_count() {
    let inner = r#"{"prompt_tokens":999,"completion_tokens":999}"#;
    for json in [
        format!(r#"{{"usage_":{inner},"Usage":{inner},"xusage":{inner},"":{inner},"usag":{inner}}}"#),
        format!(r#"{{"us\u0061ge":{inner},"\"usage":{inner},"usage\"":{inner},"usage\\":{inner}}}"#),
        format!(r#"{{"choices":[{{"usage":{inner},"message":{{"usage":{inner},"content":"{{\"usage\":{{"}}}}]}}"#),
        format!(r#"{{"data":{{"usage":{inner}}},"x":[{inner},{{"usage":{inner}}}],"y":[[{{"usage":{inner}}}]]}}"#),
        format!(r#"{{"usage":[{inner}]}}"#),
        format!(r#"{{"usage":{{"usage":{inner},"x":{inner},"prompt_tokens_details":{inner}}}}}"#),
        format!(r#"{{"choices":{{"usage":{inner},"delta":{inner}}},"timings":{inner},"response":[{inner}]}}"#),
        r#"{"choices":[{"delta":{"prompt_tokens":9}}],"x":"\"usage\": {\"prompt_tokens\": 999}"}"#.to_owned(),
        r#"{"x":"\\\",\"usage\":{\"prompt_tokens\":999},\"y\":\"","prompt_tokens":999,"cached_tokens":9}"#.to_owned(),
        r#"{"x":{"y":"}","usage":{"prompt_tokens":9}},"z":["]",{"usage":{"prompt_tokens":9}}]}"#.to_owned(),
        // Behind the object.
        format!(r#"{{}},"usage":{inner}}}"#),
        format!(r#"{{}}{{"usage":{inner}}}"#),
        format!(r#"x{{"usage":{inner}}}"#),
        format!(r#"{{x"usage":{inner}}}"#),
        format!(r#"{{"x" "usage":{inner}}}"#),
    ] {
        check_json(&json, Usage::default());
    }
}

#[test]
fn what_is_broken_is_passed_over() {
    let good = "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":8}}\n\n";
    for broken in [
        "data: {\"us",
        "data: {\"choices\":[{\"finish_reason\":\"st",
        "data: {\"choices\":[{\"delta\":{\"content\":\"\\",
        "data: {\"x\":[[[\"",
        "data: {\"usage\":{\"prompt_tokens\":9",
        "data: }",
        "data: [DONE]",
        "data: \u{0}",
        "data",
        "\u{feff}data: {\"error\":{}}",
    ] {
        let finish = if broken.contains("error") { Some(Finish::Error) } else { None };
        let expected = Usage { finish, ..usage(7, 8) };
        let expected = if broken.contains("content") { expected.events(1) } else { expected };
        check(AnswerKind::Events, format!("{broken}\n\n{good}"), expected);
        // A byte order mark may stand in front of the first line only.
        check(AnswerKind::Events, format!("\n{broken}\n\n{good}"), Usage { finish: None, ..expected });
    }
    for mark in [&b"\xEF"[..], b"\xEF\xBB", b"\xEF\xBB\xBF\xEF\xBB\xBF", b"\xBB"] {
        check(AnswerKind::Events, [mark, good.as_bytes()].concat(), Usage::default());
    }
}

#[test]
fn only_counts_count() {
    let good = usage(7, 8);
    for value in [
        "-5",
        "5.0",
        "5.5",
        "5e3",
        "5E+3",
        "\"5\"",
        "true",
        "null",
        "NaN",
        "[5]",
        "{\"prompt_tokens\":5}",
        "4294967296",
        "99999999999999999999999999999999999999",
        "0",
        "00",
        "",
    ] {
        let json = format!(r#"{{"usage":{{"prompt_tokens":7,"completion_tokens":8,"prompt_tokens":{value}}}}}"#);
        check_json(json, good);
    }
    check_json(
        r#"{"usage":{"prompt_tokens":4294967295,"completion_tokens":0}}"#,
        Usage { input_tokens: Some(u64::from(u32::MAX)), output_tokens: Some(0), ..Usage::default() },
    );
    // Sums of the largest do not overflow, and differences do not go below zero.
    let most = u32::MAX;
    check_json(
        format!(
            r#"{{"usage":{{"input_tokens":{most},"cache_read_input_tokens":{most},"cache_creation_input_tokens":{most}}}}}"#
        ),
        Usage { input_tokens: Some(3 * u64::from(most)), ..Usage::default() }.cached(most.into()),
    );
    check_json(r#"{"usage":{"total_tokens":3,"completion_tokens":5}}"#, usage(0, 5));
}

#[test]
fn nothing_grows() {
    assert!(size_of::<UsageTap>() <= 200, "{}", size_of::<UsageTap>());
    let endless: [(AnswerKind, &[u8], &[u8]); 12] = [
        (AnswerKind::Events, b"", b"x"),
        (AnswerKind::Events, b"", b":"),
        (AnswerKind::Events, b"data: {\"", b"k"),
        (AnswerKind::Events, b"data: {\"response\":{\"id\":\"", b"resp_"),
        (AnswerKind::Events, b"data: {\"choices\":[{\"delta\":{\"content\":\"", b"text "),
        (AnswerKind::Events, b"", b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"x\":\"12345678\"}\n\n"),
        (AnswerKind::Json, b"{\"x\":", b"["),
        (AnswerKind::Json, b"", b"{\"choices\":[{\"delta\":{\"tool_calls\":["),
        (AnswerKind::Json, b"", b"{\"response\":{\"usage\":{\"input_tokens_details\":"),
        (AnswerKind::Json, b"{\"usage\":{\"prompt_tokens\":", b"9"),
        (AnswerKind::Json, b"{\"usage\":", b"{\"x\":[\"\\"),
        (AnswerKind::Ndjson, b"", b"\xFF\"\\"),
    ];
    for (kind, start, repeated) in endless {
        let mut tap = UsageTap::new(kind);
        tap.feed(start);
        for size in [1, 1000, 7] {
            for chunk in repeated.repeat(50_000).chunks(size) {
                tap.feed(chunk);
            }
        }
        let held = tap.object.held_bytes() + tap.findings.stencil.as_ref().map_or(0, |stencil| stencil.held_bytes());
        assert!(held < 4096, "{held} bytes for {}", repeated.escape_ascii());
        assert!(tap.answer_id().is_none());
        assert_eq!(tap.usage().input_tokens, None);
    }
}

#[test]
fn what_is_nested_deeply_is_passed_over() {
    for (open, close) in [("[", "]"), ("{\"usage\":", "}"), ("[{\"x\":", "}]")] {
        let nested = format!("{}5{}", open.repeat(10_000), close.repeat(10_000));
        for json in [
            format!(r#"{{"x":{nested},"usage":{{"x":{nested},"prompt_tokens":7,"completion_tokens":8}}}}"#),
            format!(r#"{{"usage":{{"completion_tokens":8,"prompt_tokens":7}},"choices":[{{"delta":{nested}}}]}}"#),
        ] {
            let whole = read(AnswerKind::Json, [json.as_bytes()]);
            assert_eq!((whole.usage.input_tokens, whole.usage.output_tokens), (Some(7), Some(8)));
            assert_eq!(read(AnswerKind::Json, json.as_bytes().chunks(1)), whole);
        }
    }
}

// === The stencil ===

/// Events as they come in the streams of several servers.
const USUAL: &[(AnswerKind, &str)] = &[
    (
        AnswerKind::Events,
        "data: {\"id\":\"c\",\"created\":1795244762,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"TEXT\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
    ),
    (
        AnswerKind::Events,
        "data: {\"choices\":[{\"delta\":{\"reasoning\":\"TEXT\",\"content\":null},\"finish_reason\":null}],\"obfuscation\":\"TEXT\"}\r\n\r\n",
    ),
    (
        AnswerKind::Events,
        "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"function\":{\"arguments\":\"TEXT\"},\"index\":0}]},\"finish_reason\":null}]}\n\n",
    ),
    (
        AnswerKind::Events,
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"TEXT\"}}\n\n",
    ),
    (
        AnswerKind::Events,
        "event: x\rdata:{\"delta\":\"TEXT\",\"item_id\":\"m\",\"sequence_number\":NUMBER,\"type\":\"response.output_text.delta\"}\r\r",
    ),
    (
        AnswerKind::Events,
        "data: {\"sequence_number\" : NUMBER , \"type\": \"response.output_text.delta\",\ndata: \"delta\": \"TEXT\"}\n\n",
    ),
    (
        AnswerKind::Ndjson,
        "{\"model\":\"m\",\"created_at\":\"2026-NUMBER\",\"message\":{\"role\":\"assistant\",\"content\":\"TEXT\"},\"done\":false}\n",
    ),
];

fn usual(event: &str, text: &str, number: u32) -> String {
    event.replace("TEXT", text).replace("NUMBER", &number.to_string())
}

#[test]
fn usual_events_are_recognised() {
    for &(kind, event) in USUAL {
        let mut tap = UsageTap::new(kind);
        let texts = ["a", "b", " the", "\\n\\\"", "caf\u{e9}", "x"];
        for (text, number) in texts.into_iter().zip(7..) {
            tap.feed(usual(event, text, number).as_bytes());
        }
        let next = usual(event, "next", 123);
        let found = tap.findings.usual_event(next.as_bytes());
        // The LF behind the CR of the blank line is that of the next line.
        assert!(matches!(found, Some(([] | [b'\n'], _))), "{event} is read anew each time");
        // Nothing else is taken for one.
        for text in ["", "a\n", "a\r", "a\\", "a\"", "a\" ,"] {
            if text.is_empty() && event.contains("tool_calls") {
                continue;
            }
            let other = usual(event, text, 123);
            assert_eq!(tap.findings.usual_event(other.as_bytes()), None, "{other:?}");
        }
        let has_number = event.contains("NUMBER,") || event.contains("NUMBER ");
        for number in ["\"1", "{1", "[1", " 1", ""].into_iter().filter(|_| has_number) {
            let other = event.replace("TEXT", "a").replace("NUMBER", number);
            assert_eq!(tap.findings.usual_event(other.as_bytes()), None, "{other:?}");
        }
        for at in 0..next.len() {
            assert_eq!(tap.findings.usual_event(&next.as_bytes()[..at]), None, "{next:?} cut at {at}");
        }
    }
}

#[test]
fn what_an_answer_says_is_not_shown() {
    let mut tap = UsageTap::new(AnswerKind::Ndjson);
    tap.feed("{\"response\":\"secret\"}\n".repeat(3).as_bytes());
    let shown = format!("{tap:?}");
    assert!(shown.contains("len_bytes: 22"), "there must be a text that could be shown: {shown}");
    assert!(
        !shown.contains("secret") && !shown.contains(&format!("{:?}", b"secret").replace(['[', ']'], "")),
        "{shown}"
    );
}

#[test]
fn what_tells_more_is_no_usual_event() {
    let event = |text: &str, count: &str| format!("{{\"response\":\"{text}\",\"eval_count\":{count}}}\n");
    for counts in [["5", "5", "5", "5", "7", "5"], ["null", "null", "null", "1", "2", "5"]] {
        let stream = counts.map(|count| event("a", count)).concat();
        let told = Usage { output_tokens: Some(5), output_events: 6, ..Usage::default() };
        check(AnswerKind::Ndjson, stream, told);
    }
    // Two objects in one event count twice.
    let two = "data: {\"delta\":\"a\"}\ndata: {\"delta\":\"a\"}\n\n";
    check(AnswerKind::Events, two.repeat(5), Usage::default().events(10));
}

#[test]
fn streams_without_a_usual_event_are_not_compared_for_ever() {
    let mut tap = UsageTap::new(AnswerKind::Events);
    for name in 0..1000 {
        tap.feed(format!("data: {{\"delta\":\"a\",\"key{name}\":0}}\n\n").as_bytes());
    }
    assert_eq!(tap.usage().output_events, 1000);
    assert_eq!(tap.findings.stencil.expect("it must have been tried").held_bytes(), 0);
}

/// A usual event in which a few things may be different from what is usual.
fn nearly_usual(event: &'static str) -> impl Strategy<Value = String> {
    let text =
        select(vec!["a", "a", "b", "the ", "", "\\", "\\\"", "\"", "\n", "\r\n", "\\u00e9", "\",\"usage\":{\"", "{}"]);
    let change = select(vec![
        ("null", "null"),
        ("null", "null"),
        ("null", "null"),
        ("null", "\"stop\""),
        ("null", "{\"prompt_tokens\":5,\"completion_tokens\":NUMBER}"),
        ("null", "{\"content\":\"x\"}"),
        ("false", "true,\"eval_count\":NUMBER"),
        ("\"usage\":null", "\"usage\":{\"completion_tokens\":NUMBER}"),
        ("NUMBER", "-1.5e3"),
        ("NUMBER", "\"x\""),
        ("NUMBER", "[NUMBER]"),
        ("NUMBER", ""),
        ("NUMBER", "NUMBER,\"error\":{}"),
        ("text_delta", "input_json_delta"),
        ("\"text\"", "\"stop_reason\""),
        ("\"content\"", "\"usage\":{\"prompt_tokens\":NUMBER},\"content\""),
        ("index", "content"),
        ("{", " {"),
        ("}", "}\n"),
        ("data", ": ping\ndata"),
        ("\n\n", "\n"),
        ("\n\n", "\r\n\r\n"),
        ("\r\r", "\r\n\r\n"),
    ]);
    (text, 0..12_u32, change).prop_map(move |(text, number, (from, to))| {
        let event = event.replacen(from, to, 1);
        usual(&event, text, number)
    })
}

fn nearly_usual_stream() -> impl Strategy<Value = (AnswerKind, Vec<String>)> {
    select(USUAL).prop_flat_map(|(kind, event)| (Just(kind), prop::collection::vec(nearly_usual(event), 0..30)))
}

// === Properties ===

fn key() -> impl Strategy<Value = &'static str> {
    select(vec![
        "usage",
        "usage",
        "message",
        "response",
        "choices",
        "delta",
        "timings",
        "prompt_tokens",
        "completion_tokens",
        "input_tokens",
        "output_tokens",
        "total_tokens",
        "cache_read_input_tokens",
        "prompt_tokens_details",
        "completion_tokens_details",
        "cached_tokens",
        "reasoning_tokens",
        "eval_count",
        "tokens_evaluated",
        "predicted_n",
        "finish_reason",
        "stop_reason",
        "done_reason",
        "status",
        "object",
        "id",
        "x",
        "usage\"",
    ])
}

fn json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        3 => (0..50_u32).prop_map(Json::from),
        1 => Just(Json::Null),
        1 => select(vec!["stop", "length", "response", "{\"usage\":{\"prompt_tokens\":9}}", "\\", "\"", "\u{e9}", ""])
            .prop_map(Json::from),
        1 => select(vec![-1.5, 2.0, 1e30]).prop_map(Json::from),
    ];
    leaf.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            4 => prop::collection::btree_map(key(), inner.clone(), 0..8)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>().into()),
            1 => prop::collection::vec(inner, 0..4).prop_map(Json::from),
        ]
    })
}

/// The value at a path, of which every part is a key; `[]` is every element.
fn at<'a>(json: &'a Json, path: &str) -> Vec<&'a Json> {
    path.split('.').fold(vec![json], |found, part| {
        let next = |value: &'a Json| -> Vec<&'a Json> {
            match part {
                "[]" => value.as_array().into_iter().flatten().collect(),
                key => value.as_object().and_then(|map| map.get(key)).into_iter().collect(),
            }
        };
        found.into_iter().flat_map(next).collect()
    })
}

/// The last count that is told at one of these paths. Paths are in the order in which `serde_json` writes its maps, by
/// key.
fn last_count(json: &Json, paths: &[String]) -> Option<u64> {
    let found: Vec<u64> = paths.iter().flat_map(|path| at(json, path)).filter_map(Json::as_u64).collect();
    found.iter().rfind(|&&count| count > 0).or(found.first()).copied()
}

/// What an object tells, looked up in what `serde_json` made of it.
fn looked_up(json: &Json) -> Usage {
    let inner = |names: &[&str]| -> Vec<String> {
        let scopes = ["message.usage", "response.usage", "usage"];
        scopes.iter().flat_map(|scope| names.iter().map(move |name| format!("{scope}.{name}"))).collect()
    };
    let count = |names: &[&str]| last_count(json, &inner(names));
    let mut prompt = inner(&["prompt_tokens"]);
    prompt.insert(2, "tokens_evaluated".to_owned());
    let mut output = inner(&["completion_tokens", "output_tokens"]);
    output.insert(0, "eval_count".to_owned());

    let read = count(&["cache_read_input_tokens"]);
    let output_tokens = last_count(json, &output).or(last_count(json, &["timings.predicted_n".to_owned()]));
    let fresh = count(&["input_tokens"]).map(|fresh| fresh + read.unwrap_or_default());
    let left = count(&["total_tokens"]).map(|all| all.saturating_sub(output_tokens.unwrap_or_default()));
    let cached = ["completion_tokens_details.cached_tokens", "prompt_tokens_details.cached_tokens"];
    let reasoning =
        ["completion_tokens_details.reasoning_tokens", "prompt_tokens_details.reasoning_tokens", "reasoning_tokens"];
    Usage {
        input_tokens: last_count(json, &prompt).or(fresh).or(left),
        output_tokens,
        cached_input_tokens: count(&cached).or(read),
        reasoning_tokens: count(&reasoning),
        finish: None,
        output_events: 0,
    }
}

fn check_any(kind: AnswerKind, answer: &[u8], cuts: &[Index]) -> Result<(), TestCaseError> {
    let whole = read(kind, [answer]);
    prop_assert_eq!(read(kind, cut(answer, cuts)), whole.clone(), "{}", answer.escape_ascii());
    prop_assert_eq!(read(kind, answer.chunks(1)), whole, "{}", answer.escape_ascii());
    Ok(())
}

proptest! {
    #[test]
    fn agrees_with_serde_on_objects(json in json(), pretty: bool, cuts in prop::collection::vec(any::<Index>(), 0..6)) {
        let text = if pretty { serde_json::to_string_pretty(&json) } else { serde_json::to_string(&json) }.unwrap();
        let told = read(AnswerKind::Json, [text.as_bytes()]);
        prop_assert_eq!(Usage { finish: None, ..told.usage }, looked_up(&json), "{}", text);
        check_any(AnswerKind::Json, text.as_bytes(), &cuts)?;
        let events = read(AnswerKind::Events, [format!("data: {}\n\n", text.replace('\n', "\ndata: ")).as_bytes()]);
        prop_assert_eq!(Usage { finish: None, output_events: 0, ..events.usage }, looked_up(&json), "{}", text);
    }

    #[test]
    fn cuts_change_nothing_in_nearly_usual_streams(
        (kind, events) in nearly_usual_stream(),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let answer = events.concat();
        check_any(kind, answer.as_bytes(), &cuts)?;
        let by_event = read(kind, events.iter().map(String::as_bytes));
        prop_assert_eq!(by_event, read(kind, answer.as_bytes().chunks(1)), "{:?}", events);
    }

    #[test]
    fn cuts_change_nothing_in_damaged_streams(
        (kind, events) in nearly_usual_stream(),
        damages in prop::collection::vec((any::<Index>(), select(b"\"\\{}[],: \n\rd0-\xEF".to_vec())), 0..6),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let mut answer = events.concat().into_bytes();
        for (at, byte) in damages {
            if !answer.is_empty() {
                let at = at.index(answer.len());
                answer[at] = byte;
            }
        }
        check_any(kind, &answer, &cuts)?;
    }

    #[test]
    fn cuts_change_nothing_in_anything(
        pieces in prop::collection::vec(select(vec![
            &b"data:"[..], b"data", b" ", b"\n", b"\r", b"\n\n", b"{", b"}", b"[", b"]", b"\"", b"\\", b",", b":",
            b"\"usage\":{", b"\"prompt_tokens\":", b"\"delta\":", b"\"choices\":[{", b"\"a\"", b"\"error\":", b"12", b"\xEF\xBB\xBF",
            b"\"response\":{\"id\":\"resp_1\"", b"\xFF", b"null",
        ]), 0..60),
        kind in select(vec![AnswerKind::Events, AnswerKind::Json, AnswerKind::Ndjson]),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        check_any(kind, &pieces.concat(), &cuts)?;
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        kind in select(vec![AnswerKind::Events, AnswerKind::Json, AnswerKind::Ndjson]),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        check_any(kind, &bytes, &cuts)?;
    }
}
