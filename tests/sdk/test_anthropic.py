"""The anthropic SDK: every call that an inference server of its kind serves, as its users write it."""

import asyncio

import anthropic
import pytest

from concurrency import all_at_once
from sdks import AnthropicSdk, user
from stack import CHAT, EMBED

TOOLS = [{"name": "look_up", "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}}}]


def test_lists_models_in_anthropics_shape(claude: anthropic.Anthropic):
    models = list(claude.models.list())
    ids = [model.id for model in models]
    assert {CHAT, EMBED} <= set(ids)
    assert ids == sorted(set(ids)), "one entry per id, sorted, though two backends have one of them"
    for model in models:
        assert model.type == "model"
        assert model.display_name
        assert model.created_at.year >= 2024, "a time, not the text or the number of one"


def test_retrieves_a_model_whose_id_has_a_slash(claude: anthropic.Anthropic):
    model = claude.models.retrieve(CHAT)
    assert (model.id, model.type) == (CHAT, "model")
    assert model in list(claude.models.list())


def test_creates_a_message(claude: anthropic.Anthropic):
    message = claude.messages.create(model=CHAT, max_tokens=100, messages=user("knock knock"))
    (block,) = message.content
    assert (message.model, message.role, message.stop_reason) == (CHAT, "assistant", "end_turn")
    assert 'you said "knock knock"' in block.text
    assert message.usage.output_tokens == 16

    short = claude.messages.create(model=CHAT, max_tokens=2, messages=user("knock knock"))
    assert (short.content[0].text, short.stop_reason) == ("Hello from", "max_tokens")


def test_streams_a_message(claude: anthropic.Anthropic):
    events = list(claude.messages.create(model=CHAT, max_tokens=100, messages=user("knock knock"), stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[2:-3] == ["content_block_delta"] * 16, "one event per token, none lost"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert 'you said "knock knock"' in "".join(AnthropicSdk.piece(event) for event in events)
    assert events[-2].usage.output_tokens == 16


def test_streams_a_message_by_the_helper(claude: anthropic.Anthropic):
    with claude.messages.stream(model=CHAT, max_tokens=100, messages=user("knock knock")) as stream:
        words = list(stream.text_stream)
        message = stream.get_final_message()
    assert message.content[0].text == "".join(words)
    assert message.stop_reason == "end_turn"


def test_counts_tokens(claude: anthropic.Anthropic):
    few = claude.messages.count_tokens(model=CHAT, messages=user("knock"))
    many = claude.messages.count_tokens(model=CHAT, messages=user("knock " * 100))
    assert 0 < few.input_tokens < many.input_tokens
    message = claude.messages.create(model=CHAT, max_tokens=1, messages=user("knock"))
    assert message.usage.input_tokens == few.input_tokens


def test_calls_a_tool_and_hears_its_result(claude: anthropic.Anthropic):
    messages = user("look it up")
    message = claude.messages.create(model=CHAT, max_tokens=100, messages=messages, tools=TOOLS)
    (call,) = message.content
    assert message.stop_reason == "tool_use"
    assert (call.type, call.name, call.input) == ("tool_use", "look_up", {})

    result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    message = claude.messages.create(model=CHAT, max_tokens=100, messages=messages, tools=TOOLS)
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "end_turn"


def test_streams_a_tool_call(claude: anthropic.Anthropic):
    with claude.messages.stream(model=CHAT, max_tokens=100, messages=user("look it up"), tools=TOOLS) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert message.stop_reason == "tool_use"
    assert (call.type, call.name, call.input) == ("tool_use", "look_up", {})


@pytest.mark.parametrize(
    "call",
    [
        lambda claude: claude.models.with_raw_response.list(),
        lambda claude: claude.models.with_raw_response.retrieve(CHAT),
        lambda claude: claude.messages.with_raw_response.create(model=CHAT, max_tokens=1, messages=user("hi")),
        lambda claude: claude.messages.with_raw_response.create(
            model=CHAT, max_tokens=1, messages=user("hi"), stream=True
        ),
        lambda claude: claude.messages.with_raw_response.count_tokens(model=CHAT, messages=user("hi")),
    ],
    ids=["models", "model", "message", "message-stream", "count"],
)
def test_every_answer_has_a_request_id(claude: anthropic.Anthropic, call):
    first, second = (call(claude) for _ in range(2))
    ids = [answer.headers["x-request-id"] for answer in (first, second)]
    assert all(ids)
    assert ids[0] != ids[1]
    for answer in (first, second):
        answer.http_response.close()

    mine = call(claude.with_options(default_headers={"x-request-id": "mine-1"}))
    assert mine.headers["x-request-id"] == "mine-1"
    mine.http_response.close()


def test_fifty_streams_at_once(anthropic_sdk: AnthropicSdk):
    asyncio.run(all_at_once(anthropic_sdk, CHAT, 50))
