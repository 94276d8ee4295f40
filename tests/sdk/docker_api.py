"""A Docker Engine as the proxy sees it: a unix socket on which containers are listed, inspected and reported.

Nothing runs in it. A container is a name, labels and a port on this host, in host network mode and with a health check
that is content; the process behind it is somebody else's business (see stack.py). It knows the three GETs by which the
proxy discovers, with any API version before them, and refuses everything else.
"""

import json
import queue
import re
import socketserver
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

IMAGE = "demo-backend"
IMAGE_ID = "sha256:" + "0" * 64


@dataclass
class Container:
    """One container: there from its start to its end, and never paused, moved or restarted."""

    id: str
    name: str
    labels: dict[str, str]
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    def summary(self) -> dict:
        """What the list says of it."""
        return {
            "Id": self.id,
            "Names": ["/" + self.name],
            "Image": IMAGE,
            "ImageID": IMAGE_ID,
            "Labels": self.labels,
            "State": "running",
            "Status": "Up 1 second (healthy)",
            "HostConfig": {"NetworkMode": "host"},
            "NetworkSettings": {"Networks": self._networks()},
        }

    def inspected(self) -> dict:
        """What a look at it says."""
        started = self.started.isoformat().replace("+00:00", "Z")
        return {
            "Id": self.id,
            "Name": "/" + self.name,
            "Created": started,
            "Image": IMAGE_ID,
            "State": {
                "Status": "running",
                "Running": True,
                "StartedAt": started,
                "FinishedAt": "0001-01-01T00:00:00Z",
                "Health": {"Status": "healthy", "FailingStreak": 0, "Log": []},
            },
            "Config": {"Image": IMAGE, "Labels": self.labels, "Env": [], "ExposedPorts": {}},
            "HostConfig": {"NetworkMode": "host", "PortBindings": {}},
            "NetworkSettings": {"Ports": {}, "Networks": self._networks()},
        }

    def event(self, action: str) -> dict:
        """An event about it, now."""
        now = time.time_ns()
        return {
            "Type": "container",
            "Action": action,
            "Actor": {"ID": self.id, "Attributes": {**self.labels, "image": IMAGE, "name": self.name}},
            "scope": "local",
            "time": now // 1_000_000_000,
            "timeNano": now,
        }

    @staticmethod
    def _networks() -> dict:
        return {"host": {"NetworkID": "f" * 64, "EndpointID": "e" * 64, "IPAddress": "", "Gateway": ""}}


class DockerApi:
    """Serves on `socket` from its making to `close`."""

    def __init__(self, socket: str):
        self._lock = threading.Lock()
        self._containers: dict[str, Container] = {}
        self._made = 0
        self._refused: set[str] = set()
        self._listeners: list[queue.SimpleQueue] = []
        self._server = _Server(socket, _Handler)
        self._server.api = self
        threading.Thread(target=self._server.serve_forever, name="docker-api", daemon=True).start()

    def run(self, name: str, port: int, labels: dict[str, str]) -> Container:
        """A container starts; `port` is where its process listens on this host."""
        labels = {"inference.enable": "true", "inference.port": str(port), **labels}
        with self._lock:
            self._made += 1
            container = Container(f"{self._made:064x}", name, labels)
            self._containers[container.id] = container
            self._tell(container.event("start"))
        return container

    def end(self, container: Container) -> None:
        """A container dies and is removed, as with `docker run --rm`. Twice is once."""
        with self._lock:
            if self._containers.pop(container.id, None):
                for action in ("die", "destroy"):
                    self._tell(container.event(action))

    def refuse(self, container: Container) -> None:
        """From now on nobody may inspect it, and something about it has changed."""
        with self._lock:
            self._refused.add(container.id)
            self._tell(container.event("update"))

    def is_refused(self, container: Container) -> bool:
        """Whether nobody may inspect it."""
        with self._lock:
            return container.id in self._refused

    def close(self) -> None:
        """Ends the event streams and the server."""
        with self._lock:
            self._tell(None)
        self._server.shutdown()
        self._server.server_close()

    def running(self) -> list[Container]:
        """Those that have not ended."""
        with self._lock:
            return list(self._containers.values())

    def listen(self) -> queue.SimpleQueue:
        """Every event from now on; None is the last."""
        events: queue.SimpleQueue = queue.SimpleQueue()
        with self._lock:
            self._listeners.append(events)
        return events

    def _tell(self, event: "dict | None") -> None:
        for listener in self._listeners:
            listener.put(event)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    # The proxy may hold a connection open for good, and nobody waits for it.
    block_on_close = False
    api: DockerApi


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        path = re.sub(r"^/v\d+\.\d+(?=/)", "", urlsplit(self.path).path)
        api = self.server.api
        if path == "/events":
            self._stream(api.listen())
        elif path == "/containers/json":
            self._answer(200, [container.summary() for container in api.running()])
        elif asked := re.fullmatch(r"/containers/([^/]+)/json", path):
            found = [c for c in api.running() if asked[1] in (c.id, c.name)]
            if found and api.is_refused(found[0]):
                self._answer(403, {"message": "not allowed"})
            elif found:
                self._answer(200, found[0].inspected())
            else:
                self._answer(404, {"message": f"No such container: {asked[1]}"})
        else:
            self._answer(403, {"message": "not in this engine"})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events: queue.SimpleQueue) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while event := events.get():
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the proxy has gone, or subscribes anew
        self.close_connection = True

    def address_string(self) -> str:
        return "unix"  # which has no address, and that is what the base class would look for

    def log_message(self, format: str, *args: object) -> None:
        pass
