"""The openai SDK: every call that an inference server of its kind serves, as its users write it."""

import asyncio
import json

import openai
import pytest

from concurrency import all_at_once
from sdks import OpenAiSdk, user
from stack import CHAT, EMBED

TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
    }
]


def test_lists_models(gpt: openai.OpenAI):
    ids = [model.id for model in gpt.models.list()]
    assert {CHAT, EMBED} <= set(ids)
    assert ids == sorted(set(ids)), "one entry per id, sorted, though two backends have one of them"


def test_retrieves_a_model_whose_id_has_a_slash(gpt: openai.OpenAI):
    model = gpt.models.retrieve(CHAT)
    assert (model.id, model.object, model.owned_by) == (CHAT, "model", "vllm")
    assert model.max_model_len == 131_072, "what the backend adds to OpenAI's fields is kept"
    assert gpt.get(f"/models/{CHAT}", cast_to=openai.types.Model) == model, "the slash as it is, not as %2F"


def test_completes_a_chat(gpt: openai.OpenAI):
    answer = gpt.chat.completions.create(model=CHAT, messages=user("knock knock"))
    (choice,) = answer.choices
    assert answer.model == CHAT
    assert 'you said "knock knock"' in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    short = gpt.chat.completions.create(model=CHAT, messages=user("knock knock"), max_tokens=2)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("Hello from", "length")


def test_streams_a_chat_with_usage(gpt: openai.OpenAI):
    stream = gpt.chat.completions.create(
        model=CHAT, messages=user("knock knock"), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert 'you said "knock knock"' in "".join(words)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens == len(words) == 16, "one chunk per token, none lost"


def test_streams_a_chat_by_the_helper(gpt: openai.OpenAI):
    with gpt.chat.completions.stream(model=CHAT, messages=user("knock knock")) as stream:
        words = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "".join(words)
    assert answer.choices[0].finish_reason == "stop"


def test_completes_a_text(gpt: openai.OpenAI):
    answer = gpt.completions.create(model=CHAT, prompt="once upon")
    assert 'you said "once upon"' in answer.choices[0].text

    stream = gpt.completions.create(model=CHAT, prompt="once upon", stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert 'you said "once upon"' in "".join(chunk.choices[0].text for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens == len(chunks) == 16


def test_embeds(gpt: openai.OpenAI):
    # Asks for base64 and decodes it, unless told otherwise.
    answer = gpt.embeddings.create(model=EMBED, input=["one", "two"])
    assert [item.index for item in answer.data] == [0, 1]
    one, two = (item.embedding for item in answer.data)
    assert len(one) == len(two) == 16
    assert one != two

    as_numbers = gpt.embeddings.create(model=EMBED, input="one", encoding_format="float", dimensions=16)
    assert as_numbers.data[0].embedding == pytest.approx(one, rel=1e-6)


def test_creates_a_response(gpt: openai.OpenAI):
    response = gpt.responses.create(model=CHAT, input="knock knock")
    assert 'you said "knock knock"' in response.output_text
    assert (response.status, response.model) == ("completed", CHAT)
    assert response.usage.output_tokens == 16


def test_streams_a_response(gpt: openai.OpenAI):
    events = list(gpt.responses.create(model=CHAT, input="knock knock", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    words = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert events[-1].response.output_text == "".join(words)
    assert len(words) == 16


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_retrieves_a_response_from_the_backend_that_made_it(gpt: openai.OpenAI, streamed: bool):
    # Each backend knows its own responses only. Two could have made each: by luck this passes once in 256 times.
    for _ in range(8):
        if streamed:
            made = list(gpt.responses.create(model=CHAT, input="keep this", stream=True))[-1].response
        else:
            made = gpt.responses.create(model=CHAT, input="keep this")
        found = gpt.responses.retrieve(made.id)
        assert (found.id, found.output_text, found.status) == (made.id, made.output_text, "completed")


def test_calls_a_tool_and_hears_its_result(gpt: openai.OpenAI):
    messages = user("look it up")
    answer = gpt.chat.completions.create(model=CHAT, messages=messages, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "look_up", {})

    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    answer = gpt.chat.completions.create(model=CHAT, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.tool_calls is None
    assert 'you said "look it up"' in answer.choices[0].message.content


def test_streams_a_tool_call(gpt: openai.OpenAI):
    with gpt.chat.completions.stream(model=CHAT, messages=user("look it up"), tools=TOOLS) as stream:
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {})


@pytest.mark.parametrize(
    "call",
    [
        lambda gpt: gpt.models.with_raw_response.list(),
        lambda gpt: gpt.models.with_raw_response.retrieve(CHAT),
        lambda gpt: gpt.chat.completions.with_raw_response.create(model=CHAT, messages=user("hi")),
        lambda gpt: gpt.chat.completions.with_raw_response.create(model=CHAT, messages=user("hi"), stream=True),
        lambda gpt: gpt.completions.with_raw_response.create(model=CHAT, prompt="hi"),
        lambda gpt: gpt.embeddings.with_raw_response.create(model=EMBED, input="hi"),
        lambda gpt: gpt.responses.with_raw_response.create(model=CHAT, input="hi"),
    ],
    ids=["models", "model", "chat", "chat-stream", "completion", "embedding", "response"],
)
def test_every_answer_has_a_request_id(gpt: openai.OpenAI, call):
    first, second = (call(gpt) for _ in range(2))
    ids = [answer.headers["x-request-id"] for answer in (first, second)]
    assert all(ids)
    assert ids[0] != ids[1]
    assert first.request_id == ids[0]
    for answer in (first, second):
        answer.http_response.close()

    mine = call(gpt.with_options(default_headers={"x-request-id": "mine-1"}))
    assert mine.headers["x-request-id"] == "mine-1"
    mine.http_response.close()


def test_fifty_streams_at_once(openai_sdk: OpenAiSdk):
    asyncio.run(all_at_once(openai_sdk, CHAT, 50))
