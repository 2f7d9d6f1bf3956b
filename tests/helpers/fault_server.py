"""A local OpenAI-compatible server that fails in twelve ways, one request at a time, as told.

    with FaultServer(fault=lambda text, attempt: "reset" if attempt == 0 else None) as server:
        CriticConfig(url=server.url, model="critic", ...)

`fault` gets the conversation's last message and how often that was asked before; it names a fault
or None for a good reply, which is `answer(text)`. What it saw is kept for the test to look at.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RETRY_AFTER_S = 0.5
MODEL = "critic"
WRONG_STEPS = "<step_1> another </step_1>\n<step_2> derivation </step_2>\n<answer> 7 </answer>"

# Fault -> the class under which the server critic must count it (None: a reply, delivered as sent).
FAULTS = {
    "5xx": "server_error",
    "429": "rate_limited",
    "timeout": "timeout",
    "reset": "connection",
    "half_body": "bad_reply",
    "wrong_type": "bad_reply",
    "10_mb": "bad_reply",
    "invalid_utf8": "bad_reply",
    "empty": None,
    "non_json": "bad_reply",
    "wrong_steps": None,
    "drip": "timeout",
}


def completion(text, finish_reason="stop") -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


BOMB = gzip.compress(completion("x" * 10_000_000))


class FaultServer:
    """Serves on a free port of 127.0.0.1 until `close` (or the end of a `with` block)."""

    def __init__(
        self,
        fault: Callable[[str, int], str | None] = lambda text, attempt: None,
        answer: Callable[[str], str | bytes] = lambda text: f"reply to {text}",
        models: tuple[str, ...] | int = (MODEL,),
        delay_s: float = 0.0,
    ):
        self.fault, self.answer, self.models, self.delay_s = fault, answer, models, delay_s
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.faults = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()

    def begin(self, body: dict, headers) -> tuple[str, int]:
        text = body["messages"][-1]["content"]
        with self.lock:
            attempt = self.asked[text]
            self.asked[text] += 1
            self.times.setdefault(text, []).append(time.monotonic())
            self.requests.append(body)
            self.headers.append(dict(headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return text, attempt

    def end(self) -> None:
        with self.lock:
            self._at_once -= 1

    def close(self) -> None:
        """Dies: the port and all connections are closed, requests under way stay unanswered."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reset(connection: socket.socket) -> None:
    """Ends a connection with RST instead of FIN, once the last file on it is closed."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    faults: FaultServer

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.faults.lock:
            self.server.faults._open.add(self.connection)

    def finish(self) -> None:
        with self.server.faults.lock:
            self.server.faults._open.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.server.faults.models
        if isinstance(models, int):
            return self.send(models, b'{"error": {"message": "no list"}}')
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
        return self.send(200, json.dumps(listed).encode())

    def do_POST(self) -> None:
        faults = self.server.faults
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, attempt = faults.begin(body, self.headers)
        try:
            faults.closing.wait(faults.delay_s)
            fault = faults.fault(text, attempt)
            if faults.closing.is_set() or fault == "reset":
                self.fault_reset()
            elif fault is None:
                answer = faults.answer(text)
                self.send(200, answer if isinstance(answer, bytes) else completion(answer))
            else:
                getattr(self, f"fault_{fault.replace('-', '_')}")()
        finally:
            faults.end()

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def fault_5xx(self) -> None:
        self.send(503, b'{"error": {"message": "overloaded"}}')

    def fault_429(self) -> None:
        self.send(429, b'{"error": {"message": "slow down"}}', Retry_After=str(RETRY_AFTER_S))

    def fault_429_for_an_hour(self) -> None:
        self.send(429, b'{"error": {"message": "quota"}}', Retry_After="3600")

    def fault_401(self) -> None:
        key = self.headers["Authorization"]
        self.send(401, json.dumps({"error": {"message": f"Bad key {key}\x1b[31m!"}}).encode())

    def fault_404(self) -> None:
        self.send(404, b'{"detail": "Not Found"}')

    def fault_400(self) -> None:
        self.send(400, b'{"error": {"message": "prompt too long"}}')

    def fault_redirect(self) -> None:
        self.send(307, b"", Location="http://127.0.0.1:9/v1/chat/completions")

    def fault_timeout(self) -> None:
        self.server.faults.closing.wait(30)
        self.close_connection = True

    def fault_reset(self) -> None:
        self.close_connection = True
        reset(self.connection)

    def fault_half_body(self) -> None:
        body = completion("half of this reply is missing")
        self.send(200, body[: len(body) // 2], length=len(body))
        self.close_connection = True

    def fault_wrong_type(self) -> None:
        self.send(200, b'{"choices": [{"message": {"content": ["no", "text"]}}]}')

    def fault_10_mb(self, status: int = 200) -> None:
        begin, end = completion("?").split(b"?")
        self.send(status, begin, length=len(begin) + 10_000_000 + len(end))
        for _ in range(1000):
            self.wfile.write(b"x" * 10_000)
        self.wfile.write(end)

    def fault_10_mb_error(self) -> None:
        self.fault_10_mb(500)

    def fault_gzip(self) -> None:
        self.send(200, BOMB, Content_Encoding="gzip")

    def fault_invalid_utf8(self) -> None:
        self.send(200, completion("caf?").replace(b"?", b"\xff\xfe"))

    def fault_empty(self) -> None:
        self.send(200, completion(""))

    def fault_non_json(self) -> None:
        self.send(200, b"<html>It works!</html>")

    def fault_wrong_steps(self) -> None:
        self.send(200, completion(WRONG_STEPS))

    def fault_drip(self) -> None:
        self.send(200, b'{"choices": [', length=1_000_000)
        while not self.server.faults.closing.wait(0.05):
            self.wfile.write(b" ")
