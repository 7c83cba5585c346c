"""The adapter: the paper's counts, saving, swapping between rounds, merging, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from benchmarks.qwen import QWEN_3B
from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import RALW, KeepAll
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.adapters import CARLA_LORA_TARGETS, LORA_TARGETS, LoRA, add_lora
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.vlm import VLM

Folders = Callable[..., Path]
REACHER = DMControl("reacher-easy").spec

BASE_PARAMETERS = 3_754_622_976

LOGITS_IN_A_FRESH_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from covr_lightning.envs import DMControl
from covr_lightning.vlm.vlm import VLM, LoRA
folder, adapter, frames, result = sys.argv[1:]
vlm = VLM(folder, LoRA(rank=4, alpha=8), adapter=adapter)
vlm.load(DMControl("reacher-easy").spec)
with torch.no_grad():
    logits = vlm.model(**vlm.inputs.prompt_batch(load_file(frames)["frames"])).logits
save_file({"logits": logits}, result)
"""


def frames(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)


def loaded(folder: Path, **lora: object) -> VLM:
    vlm = VLM(str(folder), LoRA(**{"rank": 4, "alpha": 8, **lora}))
    vlm.load(REACHER)
    return vlm


def trained(folder: Path, seed: int = 0, **lora: object) -> VLM:
    """A VLM whose adapter changes its answers: B is random and not 0."""
    vlm = loaded(folder, **lora)
    vlm.add_adapter()
    randomise(vlm, seed)
    return vlm


def randomise(vlm: VLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)


@torch.no_grad()
def logits(vlm: VLM) -> torch.Tensor:
    return vlm.model(**vlm.inputs.prompt_batch(frames(2))).logits


@pytest.mark.parametrize(
    ("targets", "expected", "percent"),
    [(LORA_TARGETS, 337_903_616, 8.2566), (CARLA_LORA_TARGETS, 286_605_312, 7.0920)],
    ids=["others", "carla"],
)
def test_qwen_3b_has_the_paper_s_share_of_trainable_parameters(
    targets: tuple[str, ...], expected: int, percent: float
) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN_3B))
        assert model.num_parameters() == BASE_PARAMETERS
        adapted = add_lora(model.requires_grad_(False), LoRA(rank=128, alpha=16, targets=targets))
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == expected
    assert total == BASE_PARAMETERS + expected
    assert round(100 * trainable / total, 4) == percent


def test_the_carla_config_trains_table_9_s_list() -> None:
    import yaml

    config = Path(__file__).parents[2] / "configs" / "carla_hw.yaml"
    lists = [value["targets"] for value in dictionaries(yaml.safe_load(config.read_text())) if "targets" in value]
    assert [tuple(targets) for targets in lists] == [CARLA_LORA_TARGETS]


def dictionaries(value: object) -> list[dict]:
    if isinstance(value, dict):
        return [value, *(found for part in value.values() for found in dictionaries(part))]
    return [found for part in value for found in dictionaries(part)] if isinstance(value, list) else []


def test_one_round_changes_labels_and_switched_off_the_base_is_back(hub_folder: Folders) -> None:
    vlm = loaded(hub_folder("qwen2_5_vl", tied=True), rank=32, alpha=64, dropout=0.05)
    base, answers = logits(vlm), vlm.answer(frames(2))
    rows = TensorDict({"frame": frames(12), "action": torch.tensor([0.5, -0.5]).expand(12, 2)}, [12])
    settings = FineTuneSettings(epochs=4, batch_size=4, accumulate=1, lr=5e-3, held_out=0.0)
    report = RoundReport(1, 1000, 12)
    cpu = {"accelerator": "cpu", "devices": 1}
    fine_tune_round(report, vlm, rows, torch.arange(12.0), 0.0, KeepAll(), RALW(), settings, cpu)
    assert not torch.equal(logits(vlm), base)
    after = vlm.answer(frames(2))
    assert after != answers
    with vlm.without_adapter():
        assert torch.equal(logits(vlm), base)
        assert vlm.answer(frames(2)) == answers
    assert vlm.answer(frames(2)) == after


def test_an_adapter_has_no_base_weights_and_gives_equal_logits_in_a_fresh_process(
    hub_folder: Folders, tmp_path: Path
) -> None:
    folder = hub_folder("qwen2_5_vl", tied=True)
    vlm = trained(folder)
    vlm.save_adapter(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert any("lm_head" in name for name in weights)  # tied and a target: PEFT alone would copy it
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)

    save_file({"frames": frames(2)}, tmp_path / "frames.safetensors")
    arguments = [folder, tmp_path / "adapter", tmp_path / "frames.safetensors", tmp_path / "logits.safetensors"]
    command = [sys.executable, "-c", LOGITS_IN_A_FRESH_PROCESS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(vlm))


@pytest.mark.parametrize(
    ("key", "value"), [("use_rslora", True), ("alpha_pattern", {"q_proj": 2}), ("rank_pattern", {"q_proj": 2})]
)
def test_an_adapter_that_acts_otherwise_is_refused(
    key: str, value: object, untrained_vlm: Path, tmp_path: Path
) -> None:
    vlm = loaded(untrained_vlm, rank=4, alpha=8)
    vlm.add_adapter()
    vlm.save_adapter(tmp_path / "adapter")
    vlm.load_adapter(tmp_path / "adapter", 1)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=rf"was trained with {key}, which this package's adapters do not have"):
        vlm.load_adapter(tmp_path / "adapter", 1)


def test_rounds_swap_in_place(hub_folder: Folders, tmp_path: Path) -> None:
    vlm = trained(hub_folder("qwen3_vl"))
    expected = {}
    for round_ in (1, 2):
        randomise(vlm, round_)
        vlm.save_adapter(tmp_path / f"{round_}")
        expected[round_] = logits(vlm)
    assert not torch.equal(expected[1], expected[2])
    parameters = {name: id(parameter) for name, parameter in vlm.model.named_parameters()}
    state = torch.random.get_rng_state()
    for round_ in (1, 2, 1):
        vlm.load_adapter(tmp_path / f"{round_}", round_)
        assert vlm.round == round_
        assert torch.equal(logits(vlm), expected[round_])
    assert {name: id(parameter) for name, parameter in vlm.model.named_parameters()} == parameters

    fresh = loaded(hub_folder("qwen3_vl"))
    fresh.load_adapter(tmp_path / "2", 2)
    assert torch.equal(logits(fresh), expected[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("family", "tied"), [("qwen2_5_vl", True), ("qwen2_vl", True), ("llava", False)])
def test_merged_weights_answer_as_the_adapter_did(family: str, tied: bool, hub_folder: Folders, tmp_path: Path) -> None:
    vlm = trained(hub_folder(family, tied))
    base = loaded(hub_folder(family, tied))
    expected = logits(vlm)
    with pytest.raises(ConfigError, match="call merge_adapter"):
        vlm.save(tmp_path / "merged")

    # W' = W + (α/r)·BA, written out for lm_head; the embedding stays as it was even where lm_head shared its weights.
    parts = {
        name.split("lm_head.")[1]: p.detach().clone() for name, p in vlm.model.named_parameters() if "lm_head" in name
    }
    by_hand = parts["base_layer.weight"] if not tied else base.model.get_input_embeddings().weight
    by_hand = by_hand + 8 / 4 * parts["lora_B.default.weight"] @ parts["lora_A.default.weight"]
    vlm.merge_adapter()
    assert not vlm.has_adapter
    torch.testing.assert_close(vlm.model.get_output_embeddings().weight, by_hand, rtol=0, atol=1e-6)
    assert torch.equal(vlm.model.get_input_embeddings().weight, base.model.get_input_embeddings().weight)
    assert (expected - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(vlm), expected, rtol=0, atol=1e-4)

    vlm.save(tmp_path / "merged")
    again = loaded(tmp_path / "merged")
    assert not again.model.config.tie_word_embeddings
    assert torch.equal(logits(again), logits(vlm))
    with pytest.raises(ConfigError, match="no adapter to merge"):
        vlm.merge_adapter()


def test_a_tied_head_without_an_adapter_stays_tied(hub_folder: Folders) -> None:
    vlm = trained(hub_folder("qwen2_5_vl", tied=True), targets=CARLA_LORA_TARGETS)
    expected = logits(vlm)
    vlm.merge_adapter()
    assert vlm.model.get_output_embeddings().weight is vlm.model.get_input_embeddings().weight
    torch.testing.assert_close(logits(vlm), expected, rtol=0, atol=1e-4)


def test_quantised_weights_are_not_merged(hub_folder: Folders) -> None:
    vlm = trained(hub_folder("llava"))
    vlm.base_model.is_quantized = True
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        vlm.merge_adapter()


def test_what_is_no_fitting_adapter(hub_folder: Folders, tmp_path: Path) -> None:
    trained(hub_folder("qwen2_5_vl")).save_adapter(tmp_path / "a")
    cases = [
        (loaded(hub_folder("qwen2_5_vl")), tmp_path, "where no adapter is"),
        (loaded(hub_folder("qwen2_5_vl"), alpha=16), tmp_path / "a", "has rank 4 and α 8, but vlm.lora has 4 and 16"),
        # Of 23 modules 4 have no counterpart in the list without v_proj, qkv and lm_head.
        (loaded(hub_folder("qwen2_5_vl"), targets=CARLA_LORA_TARGETS), tmp_path / "a", "10 of 46 weights differ"),
        (loaded(hub_folder("llava")), tmp_path / "a", "does not fit this VLM"),
    ]
    for vlm, folder, message in cases:
        with pytest.raises(ConfigError, match=message):
            vlm.load_adapter(folder, 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors .* is damaged or cut off"):
        loaded(hub_folder("qwen2_5_vl")).load_adapter(tmp_path / "a", 1)
    for text in ("{", "[]", "{}"):
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"adapter_config\.json .* is damaged or cut off"):
            loaded(hub_folder("qwen2_5_vl")).load_adapter(tmp_path / "a", 1)


def test_the_embedded_vlm_merges_and_opens(tmp_path: Path) -> None:
    vlm = VLM(lora=LoRA(rank=2, alpha=4))
    vlm.load(REACHER)
    vlm.add_adapter()
    randomise(vlm, 0)
    expected = logits(vlm)
    vlm.merge_adapter()
    vlm.save(tmp_path / "merged")
    model, processor = load_vlm(tmp_path / "merged")
    with torch.no_grad():
        found = model(**vlm.inputs.prompt_batch(frames(2))).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert processor.tokenizer.get_vocab() == vlm.inputs.tokenizer.get_vocab()


def test_the_same_adapter_is_the_same_file(hub_folder: Folders, tmp_path: Path) -> None:
    vlm = loaded(hub_folder("qwen2_vl"))
    vlm.add_adapter()
    vlm.save_adapter(tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 1
    assert targets == sorted(targets)  # a set's order is each process's own, and a round done again would keep both


def test_a_regular_expression_of_targets_is_saved_as_it_is(hub_folder: Folders, tmp_path: Path) -> None:
    expression = r".*language_model.*(q|v)_proj"
    vlm = loaded(hub_folder("qwen2_vl"), targets=expression)
    vlm.add_adapter()
    vlm.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == expression
