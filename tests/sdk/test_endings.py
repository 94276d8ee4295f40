"""Answers that end otherwise than planned: the client leaves, or the backend does.

A client that leaves must be missed at the backend at once, and a backend that dies must never look like one that has
finished.
"""

import asyncio

import anthropic
import openai
import pytest

from sdks import MAX_TOKENS, AnthropicSdk, OpenAiSdk, Sdk, user
from stack import PATIENCE_S, Backend, Stack, eventually

# From the end of the request: long enough for it to reach the backend on a busy machine, short enough to wait for.
READ_TIMEOUT_S = 1.0


def check_abandoned(stack: Stack, backend: Backend) -> None:
    """The backend has noticed that its one client is gone, and so has the proxy. Nothing was tried again."""
    eventually("the backend notices", lambda: backend.aborted() == 1 and backend.stats()["in_flight"] == 0)
    eventually("the proxy notices", lambda: stack.in_flight(backend) == 0)
    assert backend.stats()["requests"] == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_timeout_of_the_client_reaches_the_backend(sdk: Sdk, stack: Stack, run_backend, streamed: bool):
    backend: Backend = run_backend("slow", latency_ms=600_000)
    timeout = sdk.errors.Timeout(PATIENCE_S, read=READ_TIMEOUT_S)
    with pytest.raises(sdk.errors.APITimeoutError):
        (sdk.stream if streamed else sdk.ask)(backend.model, timeout=timeout)
    check_abandoned(stack, backend)


def test_a_stream_that_is_closed_midway_is_closed_at_the_backend(sdk: Sdk, stack: Stack, run_backend):
    backend: Backend = run_backend("endless", tokens=1_000_000)
    stream = sdk.stream(backend.model)
    words = (word for word in map(sdk.piece, stream) if word)
    assert [next(words), next(words)] == ["Hello", " from"]
    assert (backend.stats()["in_flight"], stack.in_flight(backend)) == (1, 1)
    assert backend.aborted() == 0
    stream.close()
    check_abandoned(stack, backend)


def test_a_task_that_is_cancelled_midway_is_closed_at_the_backend(sdk: Sdk, stack: Stack, run_backend):
    backend: Backend = run_backend("endless", tokens=1_000_000)

    async def cancel() -> None:
        heard = asyncio.Event()

        async def listen(client) -> None:
            async with await sdk.async_stream(client, backend.model) as stream:
                async for event in stream:
                    if sdk.piece(event):
                        heard.set()

        # The client outlives the check: it is the request that has ended.
        async with sdk.async_client() as client:
            listening = asyncio.create_task(listen(client))
            await asyncio.wait_for(heard.wait(), PATIENCE_S)
            assert stack.in_flight(backend) == 1
            listening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await listening
            await asyncio.to_thread(check_abandoned, stack, backend)

    asyncio.run(cancel())


# Every kind of stream: how it is opened, which of its events hold a word, and which say that all is said.
STREAMS = {
    "chat": (
        lambda gpt, claude, model: gpt.chat.completions.create(model=model, messages=user("hi"), stream=True),
        OpenAiSdk.piece,
        OpenAiSdk.is_last,
    ),
    "completion": (
        lambda gpt, claude, model: gpt.completions.create(model=model, prompt="hi", stream=True),
        lambda event: event.choices[0].text,
        lambda event: event.choices[0].finish_reason is not None,
    ),
    "response": (
        lambda gpt, claude, model: gpt.responses.create(model=model, input="hi", stream=True),
        lambda event: event.delta if event.type == "response.output_text.delta" else "",
        lambda event: event.type in ("response.completed", "response.incomplete", "response.output_text.done"),
    ),
    "message": (
        lambda gpt, claude, model: claude.messages.create(
            model=model, max_tokens=MAX_TOKENS, messages=user("hi"), stream=True
        ),
        AnthropicSdk.piece,
        AnthropicSdk.is_last,
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_backend_that_dies_midway_raises(
    gpt: openai.OpenAI, claude: anthropic.Anthropic, stack: Stack, run_backend, kind: str
):
    open_stream, piece, is_last = STREAMS[kind]
    errors = anthropic if kind == "message" else openai
    backend: Backend = run_backend("mortal", tokens=1_000_000)
    stream = open_stream(gpt, claude, backend.model)
    seen, words = [], []
    with pytest.raises(errors.APIError) as raised:
        for event in stream:
            seen.append(event)
            if word := piece(event):
                words.append(word)
            if len(words) == 3:
                backend.kill()
    assert len(words) >= 3
    assert not any(is_last(event) for event in seen), "an answer that broke off looks complete"
    assert not isinstance(raised.value, errors.APITimeoutError), "nothing came any more, not even the end"
    if isinstance(raised.value, errors.APIConnectionError):
        # By the cut alone, which explains nothing. Only for the Responses API does the SDK hand the error event on
        # instead of raising it.
        assert kind == "response"
        assert seen[-1].type == "error"
        assert seen[-1].message
    else:
        assert raised.value.body["message"] if errors is openai else raised.value.api_message
    eventually("the proxy gives the place back", lambda: stack.in_flight(backend) == 0)


def test_a_backend_that_dies_midway_raises_in_async_clients_too(sdk: Sdk, run_backend):
    backend: Backend = run_backend("mortal", tokens=1_000_000)

    async def listen() -> None:
        async with sdk.async_client() as client, await sdk.async_stream(client, backend.model) as stream:
            async for event in stream:
                assert not sdk.is_last(event)
                if sdk.piece(event):
                    backend.kill()

    with pytest.raises(sdk.errors.APIError) as raised:
        asyncio.run(listen())
    assert not isinstance(raised.value, sdk.errors.APIConnectionError)


def test_a_stream_that_broke_off_is_not_gathered_into_an_answer(sdk: Sdk, run_backend):
    backend: Backend = run_backend("mortal", tokens=1_000_000)
    if sdk.errors is openai:
        opening = sdk.client.chat.completions.stream(model=backend.model, messages=user("hi"))
    else:
        opening = sdk.client.messages.stream(model=backend.model, max_tokens=MAX_TOKENS, messages=user("hi"))
    with opening as stream:
        next(iter(stream))
        backend.kill()
        gather = stream.get_final_completion if sdk.errors is openai else stream.get_final_message
        with pytest.raises(sdk.errors.APIError):
            gather()
