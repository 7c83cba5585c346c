"""Every family by one path: the hub's layout is read, labels are learnt, saved folders open, limits are said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import load_vlm, save_vlm
from covr_lightning.vlm.prompts import Prompt, dmc_prompt
from covr_lightning.vlm.vlm import VLM, LoRA
from tests.vlm.tiny_models import FAMILIES, tiny_model

Folders = Callable[..., Path]
REACHER = DMControl("reacher-easy").spec
#: What the published configurations say: the smaller Qwen models tie lm_head to the embedding.
TIED = {"qwen2_vl": True, "qwen2_5_vl": True, "qwen3_vl": False, "llava": False}

OPEN_WITH_PLAIN_CLASSES = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "action:[a, b]"}]}]
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        assert "requires the Torchvision library" in str(error), error
        print("torchvision")
    else:
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[Image.new("RGB", (100, 90), (20, 40, 90))]], return_tensors="pt")
        assert model(**inputs).logits.isfinite().all()
        print(type(processor).__name__)
assert "covr_lightning" not in sys.modules
"""


def frames(count: int, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def inputs_of(folder: Path, prompt: Prompt | None = None) -> VLMInputs:
    return VLMInputs(load_vlm(folder)[1], prompt or dmc_prompt("reacher-easy"))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "vlm"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hub_s_layout_is_read(family: str, hub_folder: Folders) -> None:
    model, processor = load_vlm(hub_folder(family, TIED[family]))
    expected = tiny_model(family, TIED[family])[0].state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = processor.tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == model.config.get_text_config().max_position_embeddings

    # The hub's own generation settings sample and penalise repetition; ours are greedy and end where answers end.
    settings = model.generation_config
    assert not settings.do_sample
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.pad_token_id == tokenizer.pad_token_id is not None
    assert settings.bos_token_id is not None
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    assert ends[0] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_have_what_the_model_wants(family: str, hub_folder: Folders) -> None:
    model, processor = load_vlm(hub_folder(family, TIED[family]))
    inputs = VLMInputs(processor, dmc_prompt("reacher-easy"))
    batch, labels = inputs.training_batch(frames(2), ["action:[0.02, -0.98]", "action:[0.50, 0.50]"])
    # 40 × 40 pixels become 56 × 56 (Qwen2 and 2.5: 4 × 4 patches of 14 in groups of 4, and at least 56 × 56 pixels),
    # 64 × 64 (Qwen3: 4 × 4 patches of 16, at least 64 × 64) or the 56 × 56 that LLaVA's tower takes (16 patches).
    is_picture = batch["input_ids"] == processor.image_token_id
    assert is_picture.sum(1).tolist() == [16 if family == "llava" else 4] * 2
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[:2] == labels.shape
    if family != "llava":
        assert torch.equal(batch["mm_token_type_ids"].bool(), is_picture)  # positions are wrong without them


@pytest.mark.parametrize("family", FAMILIES)
def test_label_fine_tune_label(family: str, hub_folder: Folders) -> None:
    vlm = VLM(str(hub_folder(family, TIED[family])), LoRA(rank=32, alpha=64, dropout=0.0))
    vlm.load(REACHER)
    rows = TensorDict({"frame": frames(20), "action": torch.tensor([0.5, -0.5]).expand(20, 2)}, [20])
    settings = FineTuneSettings(epochs=30, batch_size=16, accumulate=1, lr=5e-3, held_out=0.2, label_smoothing=0.0)
    report = RoundReport(1, 1000, 20)
    cpu = {"accelerator": "cpu", "devices": 1}
    fine_tune_round(report, vlm, rows, torch.arange(20.0), 0.0, KeepAll(), UniformWeight(), settings, cpu)
    assert report.unparsable_before == 1.0  # random weights cannot answer
    assert (report.error_after, report.unparsable_after) == (0.0, 0.0)
    together = vlm.answer(frames(3))
    assert together == ["action:[0.50, -0.50]"] * 3
    assert vlm.answer(frames(1)) == together[:1]


def test_saved_folders_open_and_plainly_where_the_library_can(hub_folder: Folders, tmp_path: Path) -> None:
    saved = [tmp_path / family for family in FAMILIES]
    for folder in saved:
        model, processor = load_vlm(hub_folder(folder.name, TIED[folder.name]))
        save_vlm(model, processor, folder)
        save_vlm(model, processor, folder)  # what is there gives way
        again, its_processor = load_vlm(folder)
        prompt = dmc_prompt("reacher-easy")
        first, second = (VLMInputs(p, prompt).prompt_batch(frames(2)) for p in (processor, its_processor))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        with torch.no_grad():
            assert torch.equal(model(**first).logits, again(**second).logits)
    assert sorted(tmp_path.iterdir()) == sorted(saved)

    names = ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "LlavaProcessor"]
    settings = [json.loads((folder / "processor_config.json").read_text()) for folder in saved]
    assert [s["processor_class"] for s in settings] == names
    assert [("video_processor" in s) for s in settings] == [True, True, True, False]
    command = [sys.executable, "-I", "-c", OPEN_WITH_PLAIN_CLASSES, *map(str, saved)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    opens = names if find_spec("torchvision") else ["torchvision"] * 3 + names[3:]
    assert done.stdout.split() == opens


def test_pictures_are_prepared_alike_with_and_without_torchvision(hub_folder: Folders) -> None:
    for family in FAMILIES:
        assert type(inputs_of(hub_folder(family)).processor.image_processor).__name__.endswith("Pil")


def test_a_broken_torchvision_is_named(hub_folder: Folders, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from covr_lightning.vlm import load_vlm\n"
        "try: load_vlm('embedded')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "torchvision is installed but does not work with this torch (operator nms does not exist)" in done.stdout


# -- limits --------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(hub_folder: Folders) -> None:
    prompt = dmc_prompt("reacher-easy")
    short = inputs_of(hub_folder("qwen2_5_vl"))
    taken = short.prompt_batch(frames(1))["input_ids"].shape[1]
    # Each "1" is one token. The context has 512, the longest answer is "action:[-0.00, -0.00]": 16 tokens, its end
    # token and a margin of 2 make 19.
    room = 512 - 19 - taken
    at_limit = Prompt(prompt.system + "1" * room, prompt.user, prompt.action_names)
    assert inputs_of(hub_folder("qwen2_5_vl"), at_limit).prompt_batch(frames(1))["input_ids"].shape[1] == 512 - 19
    above = Prompt(prompt.system + "1" * (room + 1), prompt.user, prompt.action_names)
    inputs = inputs_of(hub_folder("qwen2_5_vl"), above)
    for ask in (lambda: inputs.prompt_batch(frames(1)), lambda: inputs.training_batch(frames(1), ["action:[0.00]"])):
        with pytest.raises(
            ConfigError, match=r"take 513 tokens, 4 of them the picture's of 40 x 40 .* at most 512: .*"
        ):
            ask()


def test_an_answer_that_does_not_fit_behind_the_prompt(hub_folder: Folders) -> None:
    inputs = inputs_of(hub_folder("qwen2_5_vl"))
    with pytest.raises(ConfigError, match=r"at most 512: shorten the prompt \(YAML key vlm.prompt\)"):
        inputs.training_batch(frames(1), ["action:[" + "0" * 600 + "]"])


def test_a_picture_of_more_tokens_than_the_context(hub_folder: Folders, tmp_path: Path) -> None:
    # 700 × 700 pixels: 50 × 50 patches in groups of 4 are 625 tokens.
    inputs = inputs_of(hub_folder("qwen2_5_vl"))
    with pytest.raises(ConfigError, match=r"625 of them the picture's of 700 x 700 pixels.* lower max_pixels"):
        inputs.prompt_batch(frames(1, 700))
    folder = copy(hub_folder("qwen2_5_vl"), tmp_path)
    edit(folder / "preprocessor_config.json", max_pixels=56 * 56)
    batch = inputs_of(folder).prompt_batch(frames(1, 700))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_a_picture_of_a_shape_that_the_processor_refuses(hub_folder: Folders) -> None:
    inputs = inputs_of(hub_folder("qwen3_vl"))
    line = torch.zeros(1, 3, 2, 402, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"cannot take frames of 2 x 402 pixels \(absolute aspect ratio"):
        inputs.prompt_batch(line)
    with pytest.raises(ValueError, match="must have pixels, got 0 x 8"):
        inputs.prompt_batch(torch.zeros(1, 3, 0, 8, dtype=torch.uint8))


# -- folders whose parts do not fit together -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "file", "changes", "message"),
    [
        ("qwen2_5_vl", "preprocessor_config.json", {"patch_size": 16}, r"patch_size is 16, its vision_config.* is 14"),
        ("qwen2_vl", "preprocessor_config.json", {"merge_size": 4}, r"merge_size is 4, .*spatial_merge_size is 2"),
        ("qwen2_vl", "preprocessor_config.json", {"min_pixels": 6272, "max_pixels": 3136}, r"least 6272 .*most 3136"),
        ("llava", "preprocessor_config.json", {"crop_size": {"height": 28, "width": 28}}, r"28 x 28 .* takes 56 x 56"),
        ("llava", "processor_config.json", {"patch_size": None}, r"patch_size is None, its vision_config.* is 14"),
        ("llava", "config.json", {"image_token_index": 5}, r"image token is 99, its image_token_id is 5"),
        ("qwen2_5_vl", "config.json", {"vocab_size": 300}, r"has 428 tokens, its text_config.vocab_size is 300"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(
    family: str, file: str, changes: dict, message: str, hub_folder: Folders, tmp_path: Path
) -> None:
    folder = copy(hub_folder(family, TIED[family]), tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(ConfigError, match=f"do not fit together: .*{message}"):
        load_vlm(folder)


def broken(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_vlm(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "vlm.path" in message
    assert "\n" not in message
    return message


def test_no_tokenizer(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("qwen2_5_vl"), tmp_path)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert "no tokenizer" in broken(folder)


def test_pickle_weights_only(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("llava"), tmp_path)
    for number in "12":
        (folder / f"model-0000{number}-of-00002.safetensors").rename(folder / f"pytorch_model-{number}.bin")
    assert "pickle weights only (pytorch_model-1.bin, pytorch_model-2.bin)" in broken(folder)


def test_truncated_safetensors(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("qwen3_vl"), tmp_path)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "its model-00002-of-00002.safetensors is damaged or cut off" in broken(folder)


def test_a_missing_shard(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("qwen3_vl"), tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in broken(folder)


def test_weights_of_another_architecture(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("qwen2_5_vl", tied=True), tmp_path)
    for file in hub_folder("qwen2_vl", tied=True).glob("model*"):
        shutil.copy(file, folder)
    assert "not those of its config.json" in broken(folder)


def test_weights_of_another_size(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("llava"), tmp_path)
    for file in folder.glob("*.safetensors"):
        halves = {name: tensor[: len(tensor) // 2].clone() for name, tensor in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    assert "cannot load the VLM" in broken(folder)


def test_code_in_a_folder_is_never_run(hub_folder: Folders, tmp_path: Path) -> None:
    folder = copy(hub_folder("qwen2_5_vl"), tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    remote = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model", "AutoProcessor": "evil.P"}
    edit(folder / "config.json", auto_map=remote)
    edit(folder / "preprocessor_config.json", auto_map={"AutoProcessor": "evil.P", "AutoImageProcessor": "evil.I"})
    load_vlm(folder)  # a known architecture opens by the library's own code
    edit(folder / "config.json", model_type="evil")
    assert "cannot read config.json" in broken(folder)
    assert not (tmp_path / "ran").exists()


def test_two_frames_of_which_the_processor_would_cut_the_halves_away_are_refused(hub_folder: Folders) -> None:
    # CLIP's processor, LLaVA's, takes the middle square: half of the one frame and half of the other.
    vlm = VLM(str(hub_folder("llava", tied=False)), frames=2)
    sentence = r"cuts the middle square out of pictures \(do_center_crop\), and here they are 100 high and 200 wide"
    with pytest.raises(ConfigError, match=sentence):
        vlm.load(REACHER)
    square = VLM(str(hub_folder("llava", tied=False)))
    square.load(REACHER)
    with pytest.raises(ConfigError, match="here they are 40 high and 50 wide"):
        square.ask(torch.zeros(1, 3, 40, 50, dtype=torch.uint8))
    square.inputs.processor.image_processor.do_pad = True  # to a square, before it cuts
    assert square.ask(torch.zeros(1, 3, 40, 50, dtype=torch.uint8)).answered.all()
    two = VLM(str(hub_folder("qwen2_5_vl", tied=True)), frames=2)
    two.load(REACHER)
    assert two.ask(torch.zeros(1, 3, 100, 200, dtype=torch.uint8)).answered.all()
