"""Both SDKs by the same names, for what both must do. What only one of them can do is called on its client directly.

No client retries unless a test is about that: what the proxy answers is what the test sees. Each has a timeout, so that
nothing waits for ever.
"""

import anthropic
import openai

from stack import PATIENCE_S

# Long enough for whatever demo backends say.
MAX_TOKENS = 1_000_000


def user(said: str) -> list[dict]:
    """A conversation that begins with these words."""
    return [{"role": "user", "content": said}]


class OpenAiSdk:
    """openai, by chat completions."""

    errors = openai

    def __init__(self, url: str, **options):
        self._options = {"base_url": url + "/v1", "api_key": "none", "max_retries": 0, "timeout": PATIENCE_S, **options}
        self.client = openai.OpenAI(**self._options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options)

    def ask(self, model: str, said: str = "hi", **how):
        return self.client.chat.completions.create(model=model, messages=user(said), **how)

    def stream(self, model: str, said: str = "hi", **how):
        return self.ask(model, said, stream=True, **how)

    def async_stream(self, client: openai.AsyncOpenAI, model: str, said: str = "hi"):
        return client.chat.completions.create(model=model, messages=user(said), stream=True)

    def post(self, **body):
        """A raw body: `body`, to be JSON, or `content`, to be sent as it is."""
        return self.client.post("/chat/completions", cast_to=object, **body)

    @staticmethod
    def piece(event) -> str:
        """The text of an event of a stream, empty where it has none."""
        return "".join(choice.delta.content or "" for choice in event.choices)

    @staticmethod
    def is_last(event) -> bool:
        """Whether it says that the answer is complete."""
        return any(choice.finish_reason for choice in event.choices)


class AnthropicSdk:
    """anthropic, by messages."""

    errors = anthropic

    def __init__(self, url: str, **options):
        self._options = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": PATIENCE_S, **options}
        self.client = anthropic.Anthropic(**self._options)

    def async_client(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(**self._options)

    def ask(self, model: str, said: str = "hi", **how):
        return self.client.messages.create(model=model, max_tokens=MAX_TOKENS, messages=user(said), **how)

    def stream(self, model: str, said: str = "hi", **how):
        return self.ask(model, said, stream=True, **how)

    def async_stream(self, client: anthropic.AsyncAnthropic, model: str, said: str = "hi"):
        return client.messages.create(model=model, max_tokens=MAX_TOKENS, messages=user(said), stream=True)

    def post(self, **body):
        """A raw body: `body`, to be JSON, or `content`, to be sent as it is."""
        return self.client.post("/v1/messages", cast_to=object, **body)

    @staticmethod
    def piece(event) -> str:
        """The text of an event of a stream, empty where it has none."""
        return event.delta.text if event.type == "content_block_delta" else ""

    @staticmethod
    def is_last(event) -> bool:
        """Whether it says that the answer is complete."""
        return event.type in ("message_delta", "message_stop")


Sdk = OpenAiSdk | AnthropicSdk
