"""A headless Chromium, driven over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

The protocol goes over two pipes, so it needs neither a port nor a library: JSON, with a zero byte behind each message.
"""

import base64
import fcntl
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

# What has not happened by then does not happen. Generous: the machine may be busy, and the browser starts cold.
PATIENCE_S = 20.0
POLL_S = 0.05

# Kept by Page.addScriptToEvaluateOnNewDocument: a violation is reported whether or not it is logged.
WATCH_POLICY = "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"


def chromium() -> str:
    """The browser's executable."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    raise AssertionError("no chromium: .ci/prepare chromium installs it, or set CHROMIUM")


class Browser:
    """One browser with one tab."""

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True)
        # The browser reads from descriptor 3 and writes to 4. A shell moves them there from numbers that are in nobody's way.
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        away = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        os.close(theirs_in)
        os.close(theirs_out)
        move = f'exec 3<&{away[0]} 4>&{away[1]} {away[0]}<&- {away[1]}>&-; exec "$0" "$@"'
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync",
            "--disable-component-update", "--no-proxy-server", "--mute-audio",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip
        self._child = subprocess.Popen(
            ["bash", "-c", move, chromium(), *flags],
            pass_fds=away,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in away:
            os.close(end)
        self._out = os.fdopen(ours_out, "wb", buffering=0)
        self._in = os.fdopen(ours_in, "rb")
        self._answers: dict[int, queue.SimpleQueue] = {}
        self._asked = 0
        self._session = None
        # What the tab has said of itself, in order.
        self.errors: list[str] = []
        self.requests: list[str] = []
        threading.Thread(target=self._listen, name="devtools", daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH_POLICY)

    def call(self, method: str, **params):
        """One command, and its result."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        answer = self._answers.setdefault(self._asked, queue.SimpleQueue())
        self._out.write(json.dumps(message).encode() + b"\0")
        got = answer.get(timeout=PATIENCE_S)
        assert "error" not in got, f"{method}: {got['error']}"
        return got["result"]

    def open(self, url: str) -> None:
        """Goes to a page."""
        assert "errorText" not in self.call("Page.navigate", url=url), url

    def eval(self, expression: str):
        """The value of an expression on the page; what it throws is raised."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"]["exception"].get("description", "?"))
        return got["result"].get("value")

    def until(self, what: str, expression: str):
        """The first true value of an expression on the page, which may still be on its way."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.eval(f"(() => {{ try {{ return {expression} }} catch {{ return false }} }})()")):
            shown = self.eval("document.body?.innerText")
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}; the page shows:\n{shown}"
            time.sleep(POLL_S)
        return value

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        """How large the window is, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def colours(self, scheme: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, file: Path) -> None:
        """What is shown, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends the browser, and waits for that."""
        self._session = None
        try:
            self.call("Browser.close")
            self._child.wait(timeout=PATIENCE_S)
        except (OSError, queue.Empty, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()
        self._out.close()
        self._profile.cleanup()

    def _listen(self) -> None:
        rest = b""
        while piece := self._in.read1(1 << 16):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.setdefault(message["id"], queue.SimpleQueue()).put(message)
                else:
                    self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(value.get("value", value)) for value in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
