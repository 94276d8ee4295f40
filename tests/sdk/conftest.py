"""The fixtures: one proxy for the whole run, clients for it, and backends that a test may break."""

import os
import signal
from pathlib import Path

import anthropic
import openai
import pytest

from sdks import AnthropicSdk, OpenAiSdk, Sdk
from stack import CHAT, EMBED, MAX_BODY_BYTES, Backend, Stack

REPOSITORY = Path(__file__).parents[2]

# How much of the proxy's log a failure shows, where it is, and how long it was when the test began.
LOG_LINES = 200
PROXY_LOG = pytest.StashKey[Path]()
LOG_BEGIN = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # Whoever ends the run with SIGTERM wants the processes ended too: as with ^C, fixtures are torn down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The developer's own settings configure neither client.
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "ANTHROPIC_"))]:
        del os.environ[name]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    log = item.config.stash.get(PROXY_LOG, None)
    item.stash[LOG_BEGIN] = log.stat().st_size if log else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failure shows what the proxy has said during the test."""
    report = yield
    log = item.config.stash.get(PROXY_LOG, None)
    if report.failed and log and log.exists():
        said = log.read_bytes()[item.stash[LOG_BEGIN] :].decode(errors="replace").splitlines()
        report.sections.append((f"the proxy's log, its last {LOG_LINES} lines", "\n".join(said[-LOG_LINES:])))
    return report


@pytest.fixture(scope="session")
def stack(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """The proxy with `CHAT` on two backends and `EMBED` on one of them, ready."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    binary = Path(os.environ.get("INFERENCE_PROXY_BINARY", target / "debug" / "inference-proxy")).absolute()
    assert binary.is_file(), f"no {binary}: build it with `cargo build`, or name another in INFERENCE_PROXY_BINARY"
    stack = Stack(
        binary,
        tmp_path_factory.mktemp("stack"),
        PROXY_QUEUE_MAX="0",
        PROXY_MAX_BODY=str(MAX_BODY_BYTES),
        PROXY_LOG="debug",
        PROXY_LOG_FORMAT="text",
    )
    pytestconfig.stash[PROXY_LOG] = stack.proxy_log
    try:
        stack.run("alpha", [CHAT, EMBED], token_gap_ms=1)
        stack.run("beta", [CHAT], token_gap_ms=1)
        stack.start()
        yield stack
    finally:
        stack.close()


@pytest.fixture
def run_backend(stack: Stack):
    """Runs a backend with a model of its own, which ends with the test."""
    running: list[Backend] = []

    def run(name: str, labels: dict[str, str] | None = None, **options: int) -> Backend:
        running.append(stack.run(name, labels=labels, **options))
        return running[-1]

    yield run
    for backend in running:
        backend.end()


@pytest.fixture(scope="session")
def openai_sdk(stack: Stack) -> OpenAiSdk:
    return OpenAiSdk(stack.proxy.url)


@pytest.fixture(scope="session")
def anthropic_sdk(stack: Stack) -> AnthropicSdk:
    return AnthropicSdk(stack.proxy.url)


@pytest.fixture
def gpt(openai_sdk: OpenAiSdk) -> openai.OpenAI:
    """An OpenAI client."""
    return openai_sdk.client


@pytest.fixture
def claude(anthropic_sdk: AnthropicSdk) -> anthropic.Anthropic:
    """An Anthropic client."""
    return anthropic_sdk.client


@pytest.fixture(params=["openai", "anthropic"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """One SDK after the other, where both must do the same."""
    return request.getfixturevalue(f"{request.param}_sdk")
