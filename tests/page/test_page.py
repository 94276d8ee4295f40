"""The status page in a real browser: what it shows, that it is live, that it keeps to itself, and how it looks."""

import http.client
import json
import os
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "sdk")]

from browser import Browser  # noqa: E402
from stack import CHAT, EMBED, Stack, eventually  # noqa: E402

BINARY = Path(os.environ["INFERENCE_PROXY_BINARY"])
# Where pictures go, if anywhere.
PICTURES = os.environ.get("PAGE_PICTURES")

# Names that would do something if they were taken for markup. The engine that is watched may be somebody else's.
HOSTILE = "<img src=x onerror=document.title='taken'>"
HOSTILE_MODEL = "<b>bold</b>&amp;"

TEXT = "document.querySelector('main').innerText"


def has(text: str, where: str = TEXT) -> str:
    return f"{where}.includes({json.dumps(text)})"


class Load:
    """Chats without end, until it is stopped."""

    def __init__(self, url: str, threads: int):
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._chat, args=(url,), daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _chat(self, url: str) -> None:
        body = json.dumps({"model": CHAT, "messages": [{"role": "user", "content": "hello"}], "stream": True}).encode()
        while not self._stop.is_set():
            request = urllib.request.Request(url + "/v1/chat/completions", body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request) as answer:
                    answer.read()
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls._folder = tempfile.TemporaryDirectory(prefix="page-")
        cls.addClassCleanup(cls._folder.cleanup)
        cls.stack = Stack(BINARY, Path(cls._folder.name))
        cls.addClassCleanup(cls.stack.close)
        paces = {"latency_ms": 120, "tokens": 60, "token_gap_ms": 15}
        cls.stack.run("llama-a", [CHAT], {"inference.max_inflight": "8"}, **paces)
        cls.stack.run("llama-b", [CHAT], {"inference.max_inflight": "8"}, **paces | {"latency_ms": 300})
        cls.stack.run("embed", [EMBED])
        cls.stack.start()
        docker = cls.stack._docker
        docker.run("vllm-qwen", 9, {"inference.network": "inference-net"})
        docker.run("sglang-mixtral", 1, {})
        cls.hostile = docker.run(HOSTILE, 1, {"inference.enable": "maybe", "inference.prot": "1"})
        cls.stack.run("odd", [HOSTILE_MODEL])
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        self.browser.errors.clear()
        self.browser.requests.clear()
        self.browser.size(1100, 1000)
        self.browser.open(self.stack.proxy.url + "/")
        self.browser.until("it has heard", "document.querySelector('#fact-live dd')?.innerText.includes('of')")

    def tearDown(self):
        self.assertEqual(self.browser.errors, [])
        elsewhere = [url for url in self.browser.requests if not url.startswith((self.stack.proxy.url, "data:"))]
        self.assertEqual(elsewhere, [])

    def test_1_shows_what_is_not_live_and_why(self):
        page = self.browser
        page.until("the probe has failed", has("nobody listens on"))
        cards = page.eval("[...document.querySelectorAll('#attention-list > li')].map(card => card.innerText)")
        self.assertEqual(len(cards), 3, cards)
        by_name = {name: next((card for card in cards if name in card), "") for name in ("vllm-qwen", "sglang", HOSTILE)}
        self.assertIn("inference-net", by_name["vllm-qwen"])
        self.assertIn("inference.port", by_name["sglang"])
        self.assertIn("neither true nor false", by_name[HOSTILE])
        self.assertIn("did you mean inference.port?", by_name[HOSTILE])
        self.assertEqual(page.eval("document.querySelector('#fact-live dd').innerText"), "4 of 7")
        self.assertEqual(page.eval("document.querySelector('#blind').hidden"), True)

    def test_2_takes_no_text_for_markup(self):
        page = self.browser
        page.until("the hostile names are shown", has(HOSTILE) + " && " + has(HOSTILE_MODEL))
        self.assertEqual(page.eval("document.querySelectorAll('main img, main h3 b').length"), 0)
        self.assertNotEqual(page.eval("document.title"), "taken")

    def test_3_is_live(self):
        page = self.browser
        eventually("the page has replicas", lambda: page.eval("document.querySelectorAll('tbody tr').length") == 4)
        comer = self.stack.run("comer", ["acme/late"])
        page.until("it has come", has("acme/late"))
        page.until("that is told", has(comer.name + " is live", "document.querySelector('#events').innerText"))
        started = time.monotonic()
        self.stack.end(comer)
        page.until("it has gone", f"!{has(comer.name, 'document.querySelector(`#groups`).innerText')}")
        print(f"gone from the page {time.monotonic() - started:.1f} s after its end")
        page.until("that is told", has("has ended", "document.querySelector('#events').innerText"))
        self.assertIn("Nobody can serve it now", page.eval("document.querySelector('#attention').innerText"))

    def test_4_draws_what_goes_on_and_fits_a_phone(self):
        page = self.browser
        load = Load(self.stack.proxy.url, 6)
        self.addCleanup(load.stop)
        page.until("requests are in flight", "+document.querySelector('#fact-flight dd').innerText > 0")
        page.until("tokens are counted", "parseFloat(document.querySelector('#fact-tokens dd').innerText) > 0")
        page.until("the time to the first token is told", "[...document.querySelectorAll('tbody .trend')].some(e => / ms/.test(e.innerText))")
        lines = "[...document.querySelectorAll('svg.spark path:last-child')].map(p => (p.getAttribute('d') || '').split('L').length)"
        page.until("lines are drawn", f"Math.max(...{lines}) > {16 if PICTURES else 3}")
        for name, width, height, scheme in [
            ("light", 1100, 1180, "light"),
            ("dark", 1100, 1180, "dark"),
            ("phone", 390, 844, "light"),
            ("phone-dark", 390, 844, "dark"),
        ]:
            page.size(width, height, width < 500)
            page.colours(scheme)
            wide = page.eval(
                f"[...document.querySelectorAll('body *')].filter(e => !e.closest('thead, .unseen') &&"
                f" e.getBoundingClientRect().right > {width} + .5).map(e => e.tagName + ' ' + e.className)"
            )
            self.assertEqual(wide, [], f"{name}: these are cut off")
            self.assertLessEqual(page.eval("document.documentElement.scrollWidth"), width, name)
            self.assertEqual(faint(page), [], f"{name}: too little contrast")
            if PICTURES:
                page.picture(Path(PICTURES) / f"{name}.png")
        page.colours("light")

    def test_5_asks_now_and_then_where_no_stream_is_to_be_had(self):
        page = self.browser
        host = self.stack.proxy.url.removeprefix("http://")
        watchers = []
        for _ in range(20):
            watcher = http.client.HTTPConnection(host)
            self.addCleanup(watcher.close)
            watcher.request("GET", "/status", headers={"accept": "text/event-stream"})
            # Kept: an answer that is forgotten is closed, and its place is free.
            watchers.append(watcher.getresponse())
        answers = [watcher.status for watcher in watchers]
        self.assertIn(503, answers)
        self.assertLessEqual(answers.count(200), 16)
        page.open(self.stack.proxy.url + "/")
        page.until("it shows what is", has("llama-a"))
        comer = self.stack.run("polled", ["acme/polled"])
        page.until("and what comes", has("acme/polled"))
        self.stack.end(comer)
        # The browser itself tells of the stream that it did not get.
        self.assertTrue(all("503" in error for error in page.errors), page.errors)
        page.errors.clear()

    def test_6_lets_nothing_else_in(self):
        page = self.browser
        with self.assertRaisesRegex(RuntimeError, "TrustedHTML"):
            page.eval("document.body.innerHTML = '<b>x</b>'")
        page.eval("document.body.append(Object.assign(document.createElement('style'), {textContent: 'body{color:red}'}))")
        page.eval("document.body.append(Object.assign(document.createElement('img'), {src: '/healthz'}))")
        eventually("all three are refused", lambda: len([e for e in page.errors if e.startswith("policy:")]) >= 3)
        page.errors.clear()

    def test_7_tells_what_is_limited_and_takes_no_name_in_it_for_markup(self):
        page = self.browser
        self.assertEqual(page.eval("document.querySelector('#notes').hidden"), True)
        self.stack._docker.refuse(self.hostile)
        page.until("the note is shown", has("inspect fails for " + HOSTILE, "document.querySelector('#notes').innerText"))
        self.assertEqual(page.eval("document.querySelector('#notes').hidden"), False)
        self.assertEqual(page.eval("document.querySelectorAll('#notes img').length"), 0)
        self.assertNotEqual(page.eval("document.title"), "taken")

    def test_8_says_when_the_proxy_is_gone(self):
        page = self.browser
        self.stack.proxy.kill()
        page.until("that is said", "!document.querySelector('#lost').hidden")
        self.assertIn("lost the proxy", page.eval("document.querySelector('#lost').innerText"))
        # The browser tells of connections that failed.
        page.errors.clear()


def faint(page: Browser) -> list:
    """Texts whose contrast with what is behind them is less than WCAG 2.2 AA asks for (1.4.3: 4.5 to 1)."""
    return page.eval(
        """(() => {
            const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
            const light = ([r, g, b]) => {
                const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
                return .2126 * x + .7152 * y + .0722 * z;
            };
            const ground = (e) => {
                for (; e; e = e.parentElement) {
                    const colour = parse(getComputedStyle(e).backgroundColor);
                    if (colour.length === 3 || colour[3] > 0) return colour;
                }
                return [255, 255, 255];
            };
            const found = [];
            for (const e of document.querySelectorAll('body *')) {
                if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
                const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
                const ratio = (a + .05) / (b + .05);
                if (ratio < 4.5) found.push(e.tagName + '.' + e.className + ' ' + ratio.toFixed(2));
            }
            return found;
        })()"""
    )


if __name__ == "__main__":
    unittest.main(verbosity=2)
