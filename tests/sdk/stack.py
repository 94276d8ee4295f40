"""What the tests talk to: the proxy and demo backends as processes, found by labels on a make-believe Docker Engine."""

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from docker_api import Container, DockerApi

# Two backends have this one, so that there is a choice; its slash must survive the way. One has the other.
CHAT = "acme/tiny-chat"
EMBED = "tiny-embed"

# `PROXY_MAX_BODY` of the proxy.
MAX_BODY_BYTES = 4 << 20

# Everything here takes milliseconds; what has not happened by then does not happen. Generous for busy machines.
PATIENCE_S = 15.0
# Between two looks at something that has to change.
POLL_S = 0.01
# Ports are free when they are looked for; somebody else may be quicker.
START_ATTEMPTS = 5

# Everything is on this machine: no proxy of the environment may stand in between.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def eventually(what: str, check: Callable[[], object]):
    """The first true value of `check`; fails when there is none in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        time.sleep(POLL_S)
    return value


class Process:
    """The binary at work on a free port of 127.0.0.1, until `kill`."""

    def __init__(
        self, binary: Path, log: Path, ready_path: str, start: Callable[[int], tuple[list[str], dict[str, str]]]
    ):
        self.log = log
        for _ in range(START_ATTEMPTS):
            self.port = _free_port()
            arguments, variables = start(self.port)
            with log.open("ab") as output:
                self._child = subprocess.Popen(
                    [binary, *arguments],
                    env=_clean_environment() | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            if self._becomes_ready(ready_path):
                return
        raise AssertionError(f"{binary} {arguments} does not start; its log:\n{log.read_text()}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        """The body of an answer; anything but 200 raises."""
        with _direct.open(self.url + path, timeout=PATIENCE_S) as answer:
            return answer.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of `/metrics` that have these labels, whatever others they have. One there must be."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        values = [float(value) for series, value in samples if all(label in series for label in wanted)]
        assert values, f"no {name} with {wanted} in /metrics"
        return sum(values)

    def kill(self) -> None:
        """At once and for good, as the out-of-memory killer does it."""
        self._child.kill()
        self._child.wait()

    def _becomes_ready(self, path: str) -> bool:
        """False if it has ended instead; it does when the port is taken."""

        def ready_or_ended() -> bool:
            if self._child.poll() is not None:
                return True
            try:
                self.get(path)
                return True
            except (urllib.error.URLError, ConnectionError):
                return False

        try:
            eventually(f"{path} answers 200", ready_or_ended)
        except BaseException:
            self.kill()
            raise
        return self._child.poll() is None


class Backend(Process):
    """A demo backend, and the container that the proxy takes it for."""

    def __init__(
        self,
        binary: Path,
        log: Path,
        docker: DockerApi,
        name: str,
        models: list[str],
        labels: dict[str, str],
        options: dict[str, int],
    ):
        self.name = name
        self.models = models
        self._docker = docker
        given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
        given += [f"--model={model}" for model in models]

        def start(port: int) -> tuple[list[str], dict[str, str]]:
            return ["demo-backend", "--bind=127.0.0.1", f"--port={port}", f"--name={name}", "--control", *given], {}

        super().__init__(binary, log, "/health", start)
        self.container: Container = docker.run(name, self.port, labels)

    @property
    def model(self) -> str:
        return self.models[0]

    def control(self, query: str) -> None:
        """Changes its behaviour; docs/demo-backend.md lists the keys."""
        self.get("/_ctl?" + query)

    def stats(self) -> dict:
        """What it has received: `requests`, `in_flight`, `last_request`."""
        return json.loads(self.get("/_stats"))

    def aborted(self) -> float:
        """Answers that its client gave up."""
        return self.metric("vllm:request_success_total", finished_reason="abort")

    def end(self) -> None:
        """The process dies, and Docker says so."""
        self.kill()
        self._docker.end(self.container)


class Stack:
    """One proxy, its make-believe engine, and the backends that have been run."""

    def __init__(self, binary: Path, folder: Path, **variables: str):
        self._binary = binary
        self._folder = folder
        self._run = 0
        self._backends: list[Backend] = []
        self.proxy_log = folder / "proxy.log"
        self._docker_folder = tempfile.TemporaryDirectory(prefix="sdk-")  # short: a socket's path holds 107 bytes
        docker_socket = os.path.join(self._docker_folder.name, "docker.sock")
        self._docker = DockerApi(docker_socket)
        self.proxy: Process | None = None
        self._variables = {"DOCKER_HOST": "unix://" + docker_socket, "PROXY_BIND": "127.0.0.1", **variables}

    def start(self) -> None:
        """The proxy, after whatever backends it shall find at its start."""

        def start(port: int) -> tuple[list[str], dict[str, str]]:
            return ["serve"], self._variables | {"PROXY_PORT": str(port)}

        self.proxy = Process(self._binary, self.proxy_log, "/readyz", start)

    def run(
        self, name: str, models: list[str] | None = None, labels: dict[str, str] | None = None, **options: int
    ) -> Backend:
        """One backend more, with these options of `demo-backend`; returns when the proxy lists its models.

        Unless they are given, it has one model, which no other has.
        """
        self._run += 1
        name = f"{name}-{self._run}"
        models = models or [f"test/{name}"]
        log = self._folder / f"{name}.log"
        backend = Backend(self._binary, log, self._docker, name, models, labels or {}, options)
        self._backends.append(backend)
        if self.proxy:
            eventually(f"the proxy lists {models}", lambda: set(models) <= self.listed())
        return backend

    def end(self, backend: Backend) -> None:
        """The end of a backend; returns when the proxy lists none of its models."""
        backend.end()
        eventually(f"the proxy drops {backend.models}", lambda: not set(backend.models) & self.listed())

    def listed(self) -> set[str]:
        """The models that the proxy serves now."""
        return {model["id"] for model in json.loads(self.proxy.get("/v1/models"))["data"]}

    def in_flight(self, backend: Backend) -> float:
        """Requests at this backend, by the proxy's account."""
        return self.proxy.metric("proxy_backend_inflight", backend=backend.name)

    def close(self) -> None:
        for process in [*self._backends, self.proxy]:
            if process:
                process.kill()
        self._docker.close()
        self._docker_folder.cleanup()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _clean_environment() -> dict[str, str]:
    """This process's, without what would configure the proxy."""
    ours = ("PROXY_", "DOCKER_", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
