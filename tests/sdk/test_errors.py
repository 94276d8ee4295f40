"""What goes wrong before an answer begins, and which exception of the SDKs it becomes.

Each check runs with both SDKs: the status chooses the class, and the body must have the shape in which that SDK looks
for its words.
"""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from sdks import Sdk, user
from stack import CHAT, MAX_BODY_BYTES, PATIENCE_S, Backend, Stack, eventually


def check_error(sdk: Sdk, error, status: int, openai_code: str, anthropic_type: str | None = None) -> None:
    """What every error of the proxy's own has, in the shape of this SDK."""
    assert error.status_code == status
    assert error.response.headers["x-request-id"]
    assert error.response.headers["content-type"].startswith("application/json")
    if sdk.errors is openai:
        # This SDK hands out what is below "error".
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.body["message"]
        assert error.code == openai_code
        assert error.request_id == error.response.headers["x-request-id"]
    else:
        assert error.body["type"] == "error"
        assert set(error.body["error"]) == {"type", "message"}
        assert error.api_message
        assert error.type == anthropic_type if anthropic_type else error.type


def test_an_unknown_model_is_not_found(sdk: Sdk):
    with pytest.raises(sdk.errors.NotFoundError, match="no/such-model") as raised:
        sdk.ask("no/such-model")
    check_error(sdk, raised.value, 404, "model_not_found", "not_found_error")
    with pytest.raises(sdk.errors.NotFoundError) as raised:
        sdk.stream("no/such-model")
    check_error(sdk, raised.value, 404, "model_not_found", "not_found_error")
    with pytest.raises(sdk.errors.NotFoundError) as raised:
        sdk.client.models.retrieve("no/such-model")
    check_error(sdk, raised.value, 404, "model_not_found", "not_found_error")


@pytest.mark.parametrize("model", ["", None, 5, ["a"]], ids=["empty", "null", "number", "list"])
def test_a_model_that_is_no_name_is_a_bad_request(sdk: Sdk, model):
    with pytest.raises(sdk.errors.BadRequestError, match="model") as raised:
        sdk.ask(CHAT, extra_body={"model": model})
    check_error(sdk, raised.value, 400, "model_required", "invalid_request_error")


def test_no_model_is_a_bad_request(sdk: Sdk):
    with pytest.raises(sdk.errors.BadRequestError, match="model") as raised:
        sdk.post(body={"messages": user("hi"), "max_tokens": 1})
    check_error(sdk, raised.value, 400, "model_required", "invalid_request_error")


@pytest.mark.parametrize(
    "body",
    [b'{"model": "%s", "messages": [' % CHAT.encode(), b"model=x", b'["%s"]' % CHAT.encode()],
    ids=["cut", "form", "list"],
)
def test_a_body_that_is_no_json_object_is_a_bad_request(sdk: Sdk, body: bytes):
    headers = {"content-type": "application/json"}
    with pytest.raises(sdk.errors.BadRequestError) as raised:
        sdk.post(content=body, options={"headers": headers})
    check_error(sdk, raised.value, 400, "invalid_json", "invalid_request_error")


def test_a_body_over_the_limit_is_told_so(sdk: Sdk):
    with pytest.raises(sdk.errors.APIStatusError) as raised:
        sdk.ask(CHAT, "x" * (MAX_BODY_BYTES + 1))
    check_error(sdk, raised.value, 413, "request_too_large", "request_too_large")


def test_a_full_backend_is_a_rate_limit(sdk: Sdk, stack: Stack, run_backend):
    backend: Backend = run_backend("full", labels={"inference.max_inflight": "1"}, tokens=1_000_000)
    occupying = sdk.stream(backend.model)
    next(iter(occupying))
    with pytest.raises(sdk.errors.RateLimitError) as raised:
        sdk.ask(backend.model)
    check_error(sdk, raised.value, 429, "overloaded", "rate_limit_error")
    assert int(raised.value.response.headers["retry-after"]) > 0
    assert backend.stats()["requests"] == 1, "the refused one did not reach the backend"

    occupying.close()
    eventually("the place is free again", lambda: stack.in_flight(backend) == 0)
    backend.control("tokens=4")
    sdk.ask(backend.model)


def test_a_client_that_retries_gets_through(sdk: Sdk, stack: Stack, run_backend):
    backend: Backend = run_backend("briefly-full", labels={"inference.max_inflight": "1"}, tokens=1_000_000)
    occupying = sdk.stream(backend.model)
    next(iter(occupying))
    statuses = []

    def hear(response) -> None:
        statuses.append(response.status_code)
        if len(statuses) == 1:
            occupying.close()
            eventually("the place is free again", lambda: stack.in_flight(backend) == 0)
            backend.control("tokens=4")

    with sdk.errors.DefaultHttpxClient(event_hooks={"response": [hear]}) as http_client:
        type(sdk)(stack.proxy.url, max_retries=1, http_client=http_client).ask(backend.model)
    assert statuses == [429, 200]


def test_a_model_without_a_ready_backend_is_unavailable(sdk: Sdk, stack: Stack, run_backend):
    backend: Backend = run_backend("gone")
    sdk.ask(backend.model)
    stack.end(backend)
    with pytest.raises(sdk.errors.InternalServerError, match=backend.model) as raised:
        sdk.ask(backend.model)
    check_error(sdk, raised.value, 503, "model_unavailable")
    assert int(raised.value.response.headers["retry-after"]) > 0


def test_a_backend_that_dies_before_it_answers_is_a_bad_gateway(sdk: Sdk, run_backend):
    backend: Backend = run_backend("dying", latency_ms=600_000)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(sdk.ask, backend.model)
        eventually("the backend has the request", lambda: backend.stats()["in_flight"] == 1)
        backend.kill()
        with pytest.raises(sdk.errors.InternalServerError) as raised:
            asked.result(PATIENCE_S)
    check_error(sdk, raised.value, 502, "backend_error", "api_error")


@pytest.mark.parametrize(
    ("status", "name"),
    [(400, "BadRequestError"), (404, "NotFoundError"), (429, "RateLimitError"), (500, "InternalServerError")],
)
def test_a_backends_own_error_comes_through(sdk: Sdk, run_backend, status: int, name: str):
    backend: Backend = run_backend("failing")
    backend.control(f"error_status={status}")
    with pytest.raises(getattr(sdk.errors, name)) as raised:
        sdk.ask(backend.model)
    assert raised.value.status_code == status
    assert raised.value.response.headers["x-demo-backend"] == backend.name
    assert raised.value.response.headers["x-request-id"]
