"""Labelling by a server: what is asked, how, and by which settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm import VLLMServer
from covr_lightning.vlm.decoding import Decoding
from covr_lightning.vlm.prompts import prompt_for
from tests.vlm.engines.vllm_stub import BASE, CARTPOLE, Request, VLLMStub, answers, first_pixel, frames, vlm_at


@pytest.mark.parametrize("position", ["first", "last"])
def test_a_request_holds_the_frame_the_prompt_and_the_way_of_decoding(stub: VLLMStub, position: str) -> None:
    decoding = Decoding(constrained=True, temperature=0.7, top_p=0.9, seed=3)
    vlm = vlm_at(stub, vlm={"decoding": decoding, "image_position": position})
    pictures = frames(2)
    assert vlm.answer(pictures) == answers(2)
    assert vlm.model is None
    prompt = prompt_for(CARTPOLE.task)
    for request, picture in zip(sorted(stub.requests, key=first_pixel), pictures, strict=True):
        assert (request.method, request.path) == ("POST", "/v1/chat/completions")
        assert request.headers["Content-Type"] == "application/json"
        assert "Authorization" not in request.headers
        assert torch.equal(request.frame, picture)
        system, user = request.body.pop("messages")
        assert system == {"role": "system", "content": prompt.system}
        assert user["role"] == "user"
        image, text = user["content"] if position == "first" else user["content"][::-1]
        assert image["type"] == "image_url"
        assert text == {"type": "text", "text": prompt.user}
        assert isinstance(request.body.pop("seed"), int)
        assert request.body == {
            "model": BASE,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": len(" action:[-0.00]"),
            "stop": ["]"],
            "include_stop_str_in_output": True,
            "structured_outputs": {"regex": r" ?action:\[-?[0-9]{1,1}(\.[0-9]{1,2})?\]"},
        }


@pytest.mark.parametrize(("family", "asked_for"), [("llava", True), ("qwen2_5_vl", None)])
def test_what_a_prompt_begins_with_here_it_begins_with_there(
    family: str, asked_for: bool | None, stub: VLLMStub, hub_folder: Callable[..., Path]
) -> None:
    folder = hub_folder(family)
    vlm_at(stub, vlm={"path": str(folder)}).answer(frames(1))
    assert stub.requests[0].body.get("add_special_tokens") is asked_for


def test_without_the_constraint_there_is_no_regex(stub: VLLMStub) -> None:
    vlm_at(stub).answer(frames(1))
    assert "structured_outputs" not in stub.requests[0].body
    assert stub.requests[0].body["temperature"] == 0.0


def test_a_frame_s_seed_is_its_own(stub: VLLMStub) -> None:
    def seeds(pictures: torch.Tensor, seed: int) -> list[int]:
        vlm_at(stub, vlm={"decoding": Decoding(temperature=1.0, seed=seed)}).answer(pictures)
        return [request.body["seed"] for request in sorted(stub.requests, key=first_pixel)]

    pictures = frames(3)
    three = seeds(pictures, 0)
    assert len(set(three)) == 3
    assert seeds(pictures[1:2], 0) == three[1:2]
    assert not set(seeds(pictures, 1)) & set(three)


def test_answers_keep_the_order_and_questions_the_bound(stub: VLLMStub) -> None:
    stub.trouble = lambda request: time.sleep(0.02 * (first_pixel(request) % 3))
    assert vlm_at(stub, concurrency=3).answer(frames(12)) == answers(12)
    assert 2 <= stub.most_at_once <= 3
    assert len(stub.requests) == 12


def test_what_stands_behind_the_bracket_is_not_asked_for(stub: VLLMStub) -> None:
    said = {10: "action:[0.10].", 11: " action:[0.11]] and", 12: "I cannot tell", 13: None, 14: ""}
    stub.answer = lambda request: said[first_pixel(request)]
    vlm = vlm_at(stub)
    assert vlm.answer(frames(5)) == ["action:[0.10]", "action:[0.11]", "I cannot tell", "", ""]
    actions, valid, answered = vlm.ask(frames(5))
    assert actions[:2, 0].tolist() == pytest.approx([0.1, 0.11])
    assert valid.tolist() == [True, True, False, False, False]
    assert answered.all()  # unparsable answers are answers


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    stub: VLLMStub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stub.key = "s3cret"
    with pytest.raises(ConfigError, match=r"api_key_variable is 'LABEL_KEY', but the environment has no such"):
        vlm_at(stub, api_key_variable="LABEL_KEY")
    with pytest.raises(ConfigError, match=r"refuses to list its models \(status 401.*vlm\.engine\.api_key_variable"):
        vlm_at(stub)
    monkeypatch.setenv("LABEL_KEY", "wr0ng")
    with pytest.raises(ConfigError) as refused:  # the server's message repeats what it was sent
        vlm_at(stub, api_key_variable="LABEL_KEY")
    assert "Bearer …" in str(refused.value)
    monkeypatch.setenv("LABEL_KEY", "s3cret")
    vlm = vlm_at(stub, api_key_variable="LABEL_KEY")
    assert vlm.answer(frames(1)) == answers(1)
    assert stub.requests[-1].headers["Authorization"] == "Bearer s3cret"
    stub.key = "another"
    assert vlm.answer(frames(1)) == [None]
    assert "401" in caplog.text
    stub.key = "s3cret"
    monkeypatch.setenv("LABEL_KEY", "s3cret\n")  # as mounted files have it
    assert vlm_at(stub, api_key_variable="LABEL_KEY").answer(frames(1)) == answers(1)
    for wrong in ("s3cr\net", "s3crét"):
        monkeypatch.setenv("LABEL_KEY", wrong)
        with pytest.raises(ConfigError, match=r"api_key_variable is 'LABEL_KEY', whose value has .* no key has") as odd:
            vlm_at(stub, api_key_variable="LABEL_KEY")
        assert wrong not in str(odd.value)
    for secret in ("s3cret", "wr0ng"):
        assert secret not in caplog.text + str(refused.value) + repr(vars(vlm.engine))


def test_a_model_that_takes_no_pictures_is_found_out_at_once(stub: VLLMStub) -> None:
    asked: list[Request] = []

    def refuse(request: Request) -> Any:
        asked.append(request)
        return 400 if request.path.endswith("completions") else None

    stub.trouble = refuse
    with pytest.raises(ConfigError, match=r"has 'tiny-vlm', but refuses a question about a picture \(status 400"):
        vlm_at(stub, vlm={"frames": 2})
    height, width = CARTPOLE.frame_height, CARTPOLE.frame_width
    assert asked[-1].frame.shape == (3, height, 2 * width)
    stub.trouble = lambda request: 503 if request.path.endswith("completions") else None
    vlm = vlm_at(stub)  # it may still be starting
    stub.trouble = lambda request: None
    assert vlm.answer(frames(1)) == answers(1)


def test_proxies_of_the_environment_are_not_asked(stub: VLLMStub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert vlm_at(stub).answer(frames(2)) == answers(2)


def test_redirects_are_not_followed(stub: VLLMStub) -> None:
    vlm = vlm_at(stub)
    with VLLMStub() as other:
        stub.trouble = lambda request: (307, {"Location": f"{other.url}/chat/completions"})
        assert vlm.answer(frames(2)) == [None, None]
        assert not other.requests
    assert len(stub.requests) == 2  # not worth another try


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://127.0.0.1:80a/v1"}, r"vlm\.engine\.url is 'http://127\.0\.0\.1:80a/v1'; it must be like"),
        ({"url": "http://127.0.0.1:99999"}, r"vlm\.engine\.url is .*99999'; it must be like"),
        ({"url": "http://ho st:80"}, r"vlm\.engine\.url is 'http://ho st:80'; it must be like"),
        ({"url": "http://[::1/v1"}, r"vlm\.engine\.url is .*; it must be like"),
        ({"url": "127.0.0.1:8000"}, r"vlm\.engine\.url is '127\.0\.0\.1:8000'; it must be like"),
        ({"url": "ftp://127.0.0.1/v1"}, r"must be like"),
        ({"url": "http://u:p4ss@127.0.0.1:8000/v1"}, r"has a name or password in it"),
        ({"concurrency": 0}, r"vlm\.engine\.concurrency is 0"),
        ({"attempts": 0}, r"vlm\.engine\.attempts is 0"),
        ({"timeout_s": 0.0}, r"vlm\.engine\.timeout_s is 0"),
        ({"rest_s": float("inf")}, r"vlm\.engine\.rest_s is inf"),
    ],
)
def test_wrong_settings_are_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        VLLMServer(**settings)
    assert "p4ss" not in str(error.value)


def test_a_wrong_model_or_address_stops_the_run_at_its_start(stub: VLLMStub) -> None:
    with pytest.raises(ConfigError, match=rf"has no model 'qwen'; it has {BASE} \(YAML key vlm\.engine\.model\)"):
        vlm_at(stub, model="qwen")
    with pytest.raises(ConfigError, match=rf"has no model '{BASE}-3'"):
        vlm_at(stub, model=None, vlm={"path": f"{BASE}-3"})  # vlm.path is the default
    with pytest.raises(ConfigError, match=r"refuses to list its models \(status 404"):
        vlm_at(stub, url=stub.url.removesuffix("/v1"))
