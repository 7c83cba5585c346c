"""Labelling by a server that fails, is busy, slow, talks nonsense, goes away and comes back."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from typing import Any

import pytest

from covr_lightning.vlm.engines.http_service import LONGEST_ANSWER, Failure, HTTPService
from tests.vlm.engines.vllm_stub import Clock, Handler, VLLMStub, answers, failing, first_pixel, frames, slowly, vlm_at

GARBAGE = b"<html>Bad gateway</html>"


@pytest.mark.parametrize(
    "trouble",
    [500, 502, 503, 429, 408, "drop", GARBAGE, b"{}", b'{"choices": []}', b'{"model": "m", "choices": [3]}', b"[]"],
    ids=str,
)
def test_what_may_pass_is_tried_again_at_growing_waits(stub: VLLMStub, trouble: Any) -> None:
    stub.trouble = failing(2, trouble)
    clock = Clock()
    assert vlm_at(stub, clock).answer(frames(3)) == answers(3)
    assert clock.slept == [1.0, 2.0]
    assert len(stub.requests) == 3 * 3


def test_only_frames_without_an_answer_are_asked_again(stub: VLLMStub) -> None:
    fail = failing(3, 500)
    stub.trouble = lambda request: fail(request) if first_pixel(request) == 11 else None
    clock = Clock()
    assert vlm_at(stub, clock, wait_s=0.5).answer(frames(3)) == answers(3)
    assert clock.slept == [0.5, 1.0, 2.0]
    assert Counter(map(first_pixel, stub.requests)) == {10: 1, 11: 4, 12: 1}


def test_a_frame_that_never_gets_an_answer_does_not_put_the_server_away(stub: VLLMStub) -> None:
    stub.trouble = lambda request: 500 if first_pixel(request) == 11 else None
    vlm = vlm_at(stub, Clock())
    first, _, third = answers(3)
    assert vlm.answer(frames(3)) == [first, None, third]
    assert vlm.answer(frames(3)) == [first, None, third]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_cannot_pass_is_not_tried_again(stub: VLLMStub, status: int) -> None:
    clock = Clock()
    vlm = vlm_at(stub, clock)
    stub.trouble = lambda request: status
    assert vlm.answer(frames(3)) == [None] * 3
    assert (clock.slept, len(stub.requests)) == ([], 3)


def test_a_busy_server_says_how_long_to_wait(stub: VLLMStub) -> None:
    stub.trouble = failing(1, (429, {"Retry-After": "7"}))
    clock = Clock()
    vlm = vlm_at(stub, clock)
    assert vlm.answer(frames(2)) == answers(2)
    assert clock.slept == [7.0]
    # Longer than a batch may take: it is left alone for as long as it says.
    stub.trouble = lambda request: (503, {"Retry-After": "300"})
    assert vlm.answer(frames(2)) == [None, None]
    assert clock.slept == [7.0]
    stub.trouble = lambda request: None
    clock.now += 299
    assert vlm.answer(frames(2)) == [None, None]
    clock.now += 1
    assert vlm.answer(frames(2)) == answers(2)
    stub.trouble = failing(1, (429, {"Retry-After": "soon"}))
    assert vlm.answer(frames(1)) == answers(1)
    assert clock.slept == [7.0, 1.0]


def test_a_slow_server_is_not_waited_for(stub: VLLMStub) -> None:
    clock = Clock()
    vlm = vlm_at(stub, clock, timeout_s=0.15, attempts=2)
    stub.trouble = slowly(0.5)
    start = time.monotonic()
    assert vlm.answer(frames(2)) == [None, None]
    assert time.monotonic() - start < 0.45
    assert (clock.slept, len(stub.requests)) == ([1.0], 4)


def test_a_batch_has_an_end(stub: VLLMStub) -> None:
    vlm = vlm_at(stub, attempts=50, patience_s=20.0)
    clock = vlm.engine.clock
    stub.trouble = lambda request: 500
    assert vlm.answer(frames(1)) == [None]
    assert clock.slept == [1.0, 2.0, 4.0, 8.0]  # 15 s; another 16 would pass 20


@pytest.mark.parametrize("length", ["chunked", "told"])
@pytest.mark.parametrize("flood", ["drops", "too long"])
def test_an_answer_without_end_is_not_read_to_it(flood: str, length: str) -> None:
    class Endless(Handler):
        def _serve(self, body: Any) -> None:
            self.send_response(200)
            if length == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", str(400 * (1 if flood == "drops" else 0x10000)))
            self.end_headers()
            block = b"x" if flood == "drops" else bytes(0x10000)
            block = b"%x\r\n%b\r\n" % (len(block), block) if length == "chunked" else block
            try:
                for _ in range(400):
                    self.wfile.write(block)
                    time.sleep(0.01 if flood == "drops" else 0)
            except OSError:
                return

    with VLLMStub() as stub:
        stub.server.RequestHandlerClass = type("Handler", (Endless,), {"stub": stub})
        service = HTTPService(stub.url, None, 1, "vlm.engine")
        start = time.monotonic()
        for _ in range(2):  # the one connection is free again
            answer = service.send("GET", "models", None, 0.2 if flood == "drops" else 5.0)
            assert isinstance(answer, Failure)
            assert answer.reason == (
                "no answer in time" if flood == "drops" else f"an answer of more than {LONGEST_ANSWER} bytes"
            )
        assert time.monotonic() - start < 3


def test_away_and_back_again(stub: VLLMStub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    vlm = vlm_at(stub, clock, rest_s=30.0)
    assert vlm.answer(frames(2)) == answers(2)
    stub.stop()

    actions, valid, answered = vlm.ask(frames(3))
    assert (actions.shape, valid.any(), answered.any()) == ((3, 1), False, False)
    assert clock.slept == [1.0, 2.0, 4.0]
    assert len(caplog.records) == 1
    assert "gives no answers (nothing takes connections there)" in caplog.text

    # It rests for 30, 60, 120, … 600 s; in between nothing is sent and nobody waits; then one frame is tried once.
    tried = []
    for second in range(0, 3000, 5):
        clock.now = 7.0 + second
        before = vlm.engine.breaker._failures
        assert vlm.answer(frames(3)) == [None] * 3
        if vlm.engine.breaker._failures > before:
            tried.append(second)
    assert [b - a for a, b in itertools.pairwise([0, *tried])] == [30, 60, 120, 240, 480, 600, 600, 600]
    assert clock.slept == [1.0, 2.0, 4.0]
    assert len(caplog.records) == 1  # said once

    stub.start()
    stub.requests.clear()
    clock.now += 600
    assert vlm.answer(frames(3)) == answers(3)
    assert Counter(map(first_pixel, stub.requests)) == {10: 1, 11: 1, 12: 1}
    assert "answers again" in caplog.records[-1].message
    assert vlm.answer(frames(3)) == answers(3)

    stub.stop()  # a new absence begins from the start
    assert vlm.answer(frames(1)) == [None]
    assert len(caplog.records) == 3
    assert clock.slept[3:] == [1.0, 2.0, 4.0]


def test_the_try_of_a_server_that_is_away_is_one_request(stub: VLLMStub) -> None:
    clock = Clock()
    vlm = vlm_at(stub, clock)
    stub.trouble = lambda request: 503
    vlm.answer(frames(4))
    stub.requests.clear()
    clock.now += 30
    assert vlm.answer(frames(4)) == [None] * 4
    assert len(stub.requests) == 1


def test_a_server_that_starts_later(caplog: pytest.LogCaptureFixture) -> None:
    with VLLMStub() as stub:
        stub.stop()
        clock = Clock()
        vlm = vlm_at(stub, clock)
        assert "gives no answers" in caplog.text
        assert vlm.answer(frames(2)) == [None, None]
        stub.start()
        clock.now += 30
        assert vlm.answer(frames(2)) == answers(2)
