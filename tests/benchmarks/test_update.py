"""The operations of an update, as the benchmark's floor counts them."""

from __future__ import annotations

import sys

import pytest

from benchmarks import update
from benchmarks.rad_update import ours
from benchmarks.update import flops_of


def test_the_convolutions_operations_by_hand() -> None:
    # 84 → 41 → 39 → 37 → 35, 3×3, 32 filters, over 9 channels and then 32; two operations a product.
    first, *others = (2 * side**2 * 32 * 9 * channels for side, channels in ((41, 9), (39, 32), (37, 32), (35, 32)))
    # A pair of updates: o' by both encoders and o, twice; o once more for the actor. Backward twice; nothing flows into
    # the images.
    forward, backward = first + sum(others), first + 2 * sum(others)
    assert flops_of(ours(batch=2)[1])["convolution"] == 2 * (7 * forward + 2 * backward) / 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rad", "/nowhere"], "--rad is /nowhere, where no curl_sac.py is"),
        (["--device", "gpu"], "--device is 'gpu'; it can be 'cpu'"),
        (["--turns", "0"], "argument --turns: it is 0 and must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["update.py", *arguments])
    with pytest.raises(SystemExit) as left:
        update.main()
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.gpu
def test_a_row_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # The row sets it for its process, which here is that of other tests, too.
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", False)
    shared = {"batch": 4, "device": "cuda", "seconds": 0.2, "kernels": 3}
    row = update.on_gpu_alone(shared, update.Way("bf16", "cuda", cuda_graphs=True))
    assert row["updates"] > 1
    assert 0 < row["computing"] <= 1
    assert row["table"]
