"""A stand-in for `vllm serve` on this machine: real HTTP, made-up answers, every request remembered.

Paths, statuses and bodies follow vLLM's (entrypoints/openai: chat completions, models, LoRA loading), whose adapters
are forgotten when it is restarted.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from covr_lightning.envs import DMControl
from covr_lightning.vlm import VLLMServer
from covr_lightning.vlm.vlm import VLM

BASE = "tiny-vlm"
CARTPOLE = DMControl("cartpole-swingup").spec


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def frame(self) -> torch.Tensor:
        """The picture of a chat request, (3, H, W) uint8."""
        (part,) = (part for part in self.body["messages"][1]["content"] if part["type"] == "image_url")
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def first_pixel(request: Request) -> int:
    """Of the picture of a chat request; 0 of other requests."""
    return int(request.frame[0, 0, 0]) if request.body and "messages" in request.body else 0


def says_first_pixel(request: Request) -> str:
    return f"action:[0.{first_pixel(request):02d}]"


@dataclass
class VLLMStub:
    """The server.

    Attributes:
        answer: What it says to a chat request.
        trouble: Called before each request is answered; a number is a status to fail with, `(status, headers)` the same
            with headers, "drop" cuts the connection, "drop late" does so after the work is done, bytes are an answer
            with status 200, None is none.
        key: The key it wants.
    """

    answer: Callable[[Request], str] = says_first_pixel
    trouble: Callable[[Request], Any] = lambda request: None
    key: str | None = None
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    at_once: int = 0
    most_at_once: int = 0

    def __enter__(self) -> VLLMStub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self.adapters = {}
        self.lock = threading.Lock()
        self.sockets: set[socket.socket] = set()
        handler = type("StubHandler", (Handler,), {"stub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Go away, open connections included."""
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it is gone already

    def chats(self) -> list[Request]:
        return [request for request in self.requests if request.path == "/v1/chat/completions"]

    def paths(self) -> list[str]:
        return [request.path.removeprefix("/v1/") for request in self.requests]


def refusal(message: str, kind: str, status: int) -> tuple[int, dict[str, str], bytes]:
    return status, {}, json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: VLLMStub

    def setup(self) -> None:
        super().setup()
        with self.stub.lock:
            self.stub.sockets.add(self.connection)

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: Any) -> None:
        stub = self.stub
        request = Request(self.command, self.path, dict(self.headers), body)
        with stub.lock:
            stub.requests.append(request)
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
        try:
            trouble = stub.trouble(request)
            if trouble == "drop":
                self.close_connection = True
                return
            status, headers, answer = self._answer(request, trouble)
        finally:
            with stub.lock:
                stub.at_once -= 1
        if trouble == "drop late":
            self.close_connection = True
            return
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(answer))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)
        except OSError:
            self.close_connection = True  # the other side did not wait

    def _answer(self, request: Request, trouble: Any) -> tuple[int, dict[str, str], bytes]:
        stub = self.stub
        if isinstance(trouble, bytes):
            return 200, {}, trouble
        if isinstance(trouble, int):
            return refusal("made to fail", "InternalServerError", trouble)
        if isinstance(trouble, tuple):
            return trouble[0], trouble[1], b"made to fail"
        if stub.key is not None and request.headers.get("Authorization") != f"Bearer {stub.key}":
            return refusal(f"Unauthorized: {request.headers.get('Authorization')}", "Unauthorized", 401)
        served = [BASE, *stub.adapters]
        if request.method == "GET" and request.path == "/v1/models":
            return 200, {}, json.dumps({"object": "list", "data": [{"id": name} for name in served]}).encode()
        if request.method == "POST" and request.path == "/v1/load_lora_adapter":
            name = request.body["lora_name"]
            if name in stub.adapters:
                return refusal(f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput", 400)
            stub.adapters[name] = request.body["lora_path"]
            return 200, {}, f"Success: LoRA adapter '{name}' added successfully.".encode()
        if request.method == "POST" and request.path == "/v1/unload_lora_adapter":
            if stub.adapters.pop(request.body["lora_name"], None) is None:
                return refusal("The lora adapter cannot be found.", "NotFoundError", 404)
            return 200, {}, b"Success: removed successfully."
        if request.method == "POST" and request.path == "/v1/chat/completions":
            model = request.body["model"]
            if model not in served:
                return refusal(f"The model `{model}` does not exist.", "NotFoundError", 404)
            message = {"role": "assistant", "content": stub.answer(request)}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "stop_reason": "]"}
            return 200, {}, json.dumps({"object": "chat.completion", "model": model, "choices": [choice]}).encode()
        return refusal("Not Found", "NotFoundError", 404)


def slowly(seconds: float) -> Callable[[Request], None]:
    return lambda request: time.sleep(seconds)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def vlm_at(stub: VLLMStub, clock: Clock | None = None, vlm: dict[str, Any] | None = None, **settings: Any) -> VLM:
    engine = VLLMServer(**({"url": stub.url, "model": BASE} | settings))
    clock = clock or Clock()
    engine.clock = engine.breaker.clock = clock
    engine.sleep = clock.sleep
    model = VLM(**({"path": "nowhere", "engine": engine} | (vlm or {})))
    model.load(CARTPOLE)
    stub.requests.clear()
    return model


def frames(n: int, first: int = 10) -> torch.Tensor:
    """Random pictures whose first pixel is their number."""
    pictures = torch.randint(0, 256, (n, 3, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures[:, 0, 0, 0] = torch.arange(first, first + n, dtype=torch.uint8)
    return pictures


def answers(n: int, first: int = 10) -> list[str]:
    return [f"action:[0.{i:02d}]" for i in range(first, first + n)]


def failing(times: int, trouble: Any) -> Callable[[Request], Any]:
    """The first `times` questions about each frame fail."""
    asked: Counter[int] = Counter()
    lock = threading.Lock()

    def fail(request: Request) -> Any:
        if not request.path.endswith("completions"):
            return None
        with lock:
            asked[first_pixel(request)] += 1
            return trouble if asked[first_pixel(request)] <= times else None

    return fail
