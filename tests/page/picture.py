"""Makes docs/status.png: the page after two minutes of an ordinary day. Run by .ci/page --picture."""

import http.client
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "sdk")]

from browser import Browser  # noqa: E402
from stack import Stack  # noqa: E402

LLAMA, QWEN, EMBED = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B", "BAAI/bge-m3"
SECONDS = 122


def chat(url: str, model: str, stop: threading.Event) -> None:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "hello"}}], "stream": true}}'.encode()
    while not stop.is_set():
        time.sleep(random.expovariate(1.2))
        try:
            request = urllib.request.Request(url + "/v1/chat/completions", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                answer.read()
        except (OSError, http.client.HTTPException):
            pass


def main(file: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        stack = Stack(Path(os.environ["INFERENCE_PROXY_BINARY"]), Path(folder))
        browser = None
        stop = threading.Event()
        try:
            limit = {"inference.max_inflight": "8"}
            stack.run("vllm-llama", [LLAMA], limit, latency_ms=90, tokens=90, token_gap_ms=18)
            slow = stack.run("vllm-llama", [LLAMA], limit, latency_ms=140, tokens=90, token_gap_ms=22)
            stack.run("sglang-qwen", [QWEN], latency_ms=260, tokens=140, token_gap_ms=30)
            stack.run("tei-embed", [EMBED])
            stack.start()
            stack._docker.run("vllm-mistral", 9, {"inference.network": "llm"})
            browser = Browser()
            browser.size(1100, 1130)
            browser.open(stack.proxy.url + "/")
            for model in (LLAMA, LLAMA, LLAMA, LLAMA, LLAMA, LLAMA, QWEN, QWEN, QWEN):
                threading.Thread(target=chat, args=(stack.proxy.url, model, stop), daemon=True).start()
            began = time.monotonic()
            while (passed := time.monotonic() - began) < SECONDS:
                # Load comes and goes, and one replica is now and then slower.
                slow.control(f"latency_ms={140 + 160 * (40 < passed < 60) + random.randrange(40)}")
                time.sleep(1)
            browser.picture(file)
        finally:
            stop.set()
            if browser:
                browser.close()
            stack.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
