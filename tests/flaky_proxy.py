"""A proxy before an HTTP server that cuts connections, delays, loses answers and answers 500 or 503 itself.

Each request has a connection of its own ("Connection: close" is put into its head, which no signature covers), so that
faults and counts are by request. Bytes are passed on as they come, bodies of any length and 100-continue included.
"""

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What happens to a request; by default nothing."""

    status: int = 0
    """Answer this status instead of asking the server."""
    cut_up: int | None = None
    """Cut the connection after so many bytes of the request's body."""
    cut_down: int | None = None
    """Cut the connection after so many bytes of the answer; 0 loses the answer to a request that was carried out."""
    delay_s: float = 0.0
    """Wait before passing the request on."""


Decide = Callable[[str, str], Fault | None]
"""What happens to a request of this method and path; called once a request, under a lock."""


@dataclass
class FlakyProxy:
    """`with FlakyProxy(url) as proxy:` listens at `proxy.url`; `decide` may be set at any time."""

    target: str
    decide: Decide = field(default=lambda method, path: None)
    bytes_per_s: float = float("inf")
    """The most that one request's body is passed on at."""
    up: int = 0
    down: int = 0
    """Bytes of requests and of answers that were passed on."""
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._lock, self._open = threading.Lock(), True
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._listener.close()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def fail(self, fault: Fault, times: int, method: str = "", path: str = "") -> None:
        """From now on the first `times` requests of a method, whose path and query match a pattern, have a fault."""
        left = [times]

        def decide(asked: str, at: str) -> Fault | None:
            if left[0] == 0 or method not in ("", asked) or not re.search(path, at):
                return None
            left[0] -= 1
            return fault

        self.decide = decide

    def count(self, method: str, path: str = "") -> int:
        """How many requests of a method there were whose path and query match a pattern."""
        return sum(asked == method and bool(re.search(path, at)) for asked, at in self.requests)

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            head, rest = _read_head(client)
            method, path = head.split(b" ", 2)[:2]
            with self._lock:
                self.requests.append((method.decode(), path.decode()))
                fault = self.decide(method.decode(), path.decode()) or Fault()
            time.sleep(fault.delay_s)
            if fault.status:
                _answer(client, head, len(rest), fault.status)
                return
            parts = urlsplit(self.target)
            with socket.create_connection((parts.hostname, parts.port)) as server:
                server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                self._pass_on(client, server, rest, fault)

    def _pass_on(self, client: socket.socket, server: socket.socket, rest: bytes, fault: Fault) -> None:
        """Both ways, until one side ends or the fault says so."""
        up = down = 0
        data, source = rest, client
        while True:
            if source is client:
                if fault.cut_up is not None and up + len(data) > fault.cut_up:
                    _reset(client)
                    return
                server.sendall(data)
                up += len(data)
                self._add(up=len(data))
                time.sleep(len(data) / self.bytes_per_s)
            else:
                if _is_continue(data) or fault.cut_down is None:
                    room = len(data)
                else:
                    room = min(len(data), fault.cut_down - down)
                    down += room
                client.sendall(data[:room])
                self._add(down=room)
                if room < len(data):
                    return  # in order: a reset would also take back what the client has not read yet
            source = select.select([client, server], [], [])[0][0]
            data = source.recv(CHUNK)
            if not data:
                return

    def _add(self, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.up += up
            self.down += down


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """The head of a request, its empty line included, and what of the body came with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(CHUNK)
        if not more:
            raise ValueError("the client is gone")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _answer(client: socket.socket, head: bytes, received: int, status: int) -> None:
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if not re.search(rb"(?i)\r\nexpect: *100-continue", head):  # a body that was not read would reset the connection
        while length is not None and received < int(length[1]):
            received += len(client.recv(CHUNK)) or int(length[1])
    code = {500: "InternalError", 503: "SlowDown"}.get(status, "Unknown")
    body = f"<Error><Code>{code}</Code><Message>of the proxy</Message></Error>".encode()
    lines = [f"HTTP/1.1 {status} Flaky", "Connection: close", f"Content-Length: {len(body)}", "", ""]
    client.sendall("\r\n".join(lines).encode() + body)


def _is_continue(data: bytes) -> bool:
    return data.startswith(b"HTTP/1.1 100")


def _reset(client: socket.socket) -> None:
    """Let the client see a broken connection, not an orderly end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
