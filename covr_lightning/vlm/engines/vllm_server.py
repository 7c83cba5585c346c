"""A vLLM server, asked by its OpenAI-compatible HTTP interface: one GPU box labels for many trainers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError, check_positive
from covr_lightning.vlm.engines.engine import Engine
from covr_lightning.vlm.engines.http_service import Breaker, Failure, HTTPService, check_url
from covr_lightning.vlm.engines.vllm_requests import (
    Questions,
    adapter_name,
    check_modules,
    check_weights,
    up_to_closing,
)

if TYPE_CHECKING:
    from covr_lightning.vlm.vlm import VLM

_SETTING = "vlm.engine"


class VLLMServer(Engine):
    """Labels by a server that `vllm serve` started (vLLM 0.12 or later; docs/labelling_at_scale.md).

    Frames that get no answer are masked; the run is never stopped for it. What failed is tried again at growing
    waits (`wait_s`, twice that, …), only the frames that lack an answer, and never past `patience_s`. If then no frame
    of the batch has an answer, the server counts as away: it is left alone for `rest_s`, then one frame is tried once,
    and so on at rests that double up to 10 minutes.

    After a round the server is told to load its adapter, by the path that this process wrote it to, so both must see
    that folder under the same path. Until it has, frames are masked: no other weights' answers are taken instead.

    Args:
        url: The server's address, ``/v1`` included.
        model: What it calls the base model (`--served-model-name`); by default `vlm.path`.
        api_key_variable: Environment variable that holds the server's key (`--api-key`), if it wants one.
        concurrency: Frames asked about at the same time.
        timeout_s: Longest time for one request.
        attempts: Times that a frame is asked about before it is given up.
        wait_s: Seconds before the second attempt; before each further one twice as many.
        patience_s: Most seconds that a batch may take in all.
        rest_s: Seconds for which a server that is away is left alone at first.

    Raises:
        ConfigError: A setting cannot work.

    Attributes:
        clock: Gives the time in seconds.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        api_key_variable: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 30.0,
        attempts: int = 4,
        wait_s: float = 1.0,
        patience_s: float = 120.0,
        rest_s: float = 30.0,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise ConfigError(f"{_SETTING}.{name} is {value}; it must be at least 1.")
        times = {"timeout_s": timeout_s, "wait_s": wait_s, "patience_s": patience_s, "rest_s": rest_s}
        for name, seconds in times.items():
            check_positive(f"{_SETTING}.{name}", seconds)
        self.url = check_url(url, _SETTING)
        self.model = model
        self.api_key_variable = api_key_variable
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.wait_s = wait_s
        self.patience_s = patience_s
        self.breaker = Breaker(f"The VLM server at {self.url}", rest_s)
        self.clock = time.monotonic
        self.sleep = time.sleep
        self._adapter: tuple[str, Path] | None = None  # by name
        self._ready = ""  # the adapter that the server is known to have
        self._sent: set[str] = set()

    def open(self, vlm: VLM) -> None:
        """Look whether the server has the base model and answers about a picture; one that is away may do so later.

        Raises:
            ConfigError: It refuses, or serves other models, or the key's environment variable is missing.
        """
        self._service = HTTPService(self.url, self.api_key_variable, self.concurrency, _SETTING)
        self._questions = Questions(vlm)
        self.model = self.model or vlm.path
        end = self.clock() + self.timeout_s
        served = self._served(end)
        if not isinstance(served, Failure):
            if self.model not in served:
                raise ConfigError(
                    f"The VLM server at {self.url} has no model {self.model!r}; it has {', '.join(sorted(served))} "
                    f"(YAML key {_SETTING}.model)."
                )
            black = torch.zeros(3, vlm.spec.frame_height, vlm.frames * vlm.spec.frame_width, dtype=torch.uint8)
            answer = self._ask(black, end)
            if isinstance(answer, Failure) and not answer.again:
                raise ConfigError(
                    f"The VLM server at {self.url} has {self.model!r}, but refuses a question about a picture "
                    f"({answer.reason}); it must serve a model that takes pictures, with vLLM 0.12 or later."
                )
        elif served.again:
            self.breaker.failed(served)
        else:
            raise ConfigError(
                f"The VLM server at {self.url} refuses to list its models ({served.reason}): look at {_SETTING}.url "
                f"and {_SETTING}.api_key_variable, the environment variable that holds its key."
            )

    def use(self, adapter: Path | None) -> None:
        """Answer by this adapter; the server is told before the next frame."""
        if adapter is None:
            self._adapter = None
            return
        check_weights(adapter)
        self._adapter = adapter_name(adapter), adapter.resolve()

    def check_lora(self, vlm: VLM, model: Any) -> None:
        """Refuse targets outside the language model."""
        check_modules(vlm.lora, model)

    def answers(self, frames: Tensor) -> list[str | None]:
        """Answers, None where there is none in the end."""
        found: list[str | None] = [None] * len(frames)
        if self.breaker.rests:
            return found
        end = self.clock() + self.patience_s
        if self.breaker.is_open:
            (first,) = self._attempt(frames[:1], end)
            if isinstance(first, Failure):
                self._away(first)
                return found
            self.breaker.answered()
            found[0] = first
        pending = [i for i, text in enumerate(found) if text is None]
        failures = list[Failure]()
        for attempt in range(self.attempts):
            if not pending or not self._wait(attempt, failures, end):
                break
            answers = list(zip(pending, self._attempt(frames[pending], end), strict=True))
            failures = [answer for _, answer in answers if isinstance(answer, Failure)]
            for i, answer in answers:
                found[i] = answer if isinstance(answer, str) else None
            pending = [i for i, answer in answers if isinstance(answer, Failure) and answer.again]
        if failures and all(text is None for text in found):
            self._away(failures[0])
        return found

    def _wait(self, attempt: int, failures: list[Failure], end: float) -> bool:
        """Wait before an attempt; False if there is no time for it."""
        if not attempt:
            return True
        seconds = max(self.wait_s * 2 ** (attempt - 1), *(failure.wait_s for failure in failures))
        if self.clock() + seconds >= end:
            return False
        self.sleep(seconds)
        return True

    def _away(self, failure: Failure) -> None:
        self._ready = ""  # it may come back without its adapters
        self.breaker.failed(failure)

    def _attempt(self, frames: Tensor, end: float) -> list[str | Failure]:
        """Ask about each frame once, by the adapter in use."""
        failure = self._load_adapter(end)
        if failure is not None:
            return [failure] * len(frames)
        with ThreadPoolExecutor(min(self.concurrency, len(frames))) as pool:
            return list(pool.map(lambda frame: self._ask(frame, end), frames))

    def _ask(self, frame: Tensor, end: float) -> str | Failure:
        name = self._adapter[0] if self._adapter else self.model
        question = {"model": name, "messages": self._questions.messages(frame), **self._questions.sampling(frame)}
        if self._questions.special_tokens:
            question["add_special_tokens"] = True
        if self._questions.regex is not None:
            question["structured_outputs"] = {"regex": self._questions.regex}
        answer = self._send("POST", "chat/completions", question, end)
        if isinstance(answer, Failure):
            if answer.status == 404 and self._adapter:  # it was restarted, or another trainer's took its place
                self._ready = ""
                return replace(answer, again=True)
            return answer
        try:
            reply = json.loads(answer)
            model, text = reply["model"], reply["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return Failure("an answer that is no chat completion", again=True)
        if self._adapter and model != name:
            return Failure(f"an answer by {model!r} where {name!r} was asked", again=False)
        return up_to_closing(text) if isinstance(text, str) else ""

    def _load_adapter(self, end: float) -> Failure | None:
        """Make sure that the server has the adapter in use."""
        if self._adapter is None or self._adapter[0] == self._ready:
            return None
        name, folder = self._adapter
        answer = self._send("POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, end)
        if isinstance(answer, Failure):
            served = self._served(end)  # it may have it already, of a request whose answer was lost
            if isinstance(served, Failure) or name not in served:
                return replace(
                    answer,
                    reason=f"it did not load the adapter {folder}: {answer.reason}; it must see that folder and be "
                    "started with --enable-lora, --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                )
        self._ready = name
        for older in self._sent - {name}:  # best effort: one that stays costs the server memory only
            self._send("POST", "unload_lora_adapter", {"lora_name": older}, end)
        self._sent = {name}
        return None

    def _served(self, end: float) -> set[str] | Failure:
        """Names of the models and adapters that the server has."""
        answer = self._send("GET", "models", None, end)
        if isinstance(answer, Failure):
            return answer
        try:
            return {str(model["id"]) for model in json.loads(answer)["data"]}
        except (ValueError, LookupError, TypeError):
            return Failure("a list of models that is none", again=True)

    def _send(self, method: str, path: str, content: dict[str, Any] | None, end: float) -> bytes | Failure:
        seconds = min(self.timeout_s, end - self.clock())
        if seconds <= 0:
            return Failure("no answer in time", again=True)
        return self._service.send(method, path, content, seconds)
