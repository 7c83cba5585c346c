"""Answers by the decoding loop: the tokens of plain generation, kept to the format on demand, sampled on demand."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from tensordict import TensorDict

from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import KeepAll, UniformWeight
from covr_lightning.finetune.module import FineTuneSettings
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.decode_loop import PrefixCache, decode_loop
from covr_lightning.vlm.decoding import Decoder, Decoding, greedy_answers
from covr_lightning.vlm.grammar import AnswerGrammar
from covr_lightning.vlm.inputs import VLMInputs, prefix_length
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.picking import Picker, frame_uniforms, sample
from covr_lightning.vlm.prompts import Prompt, dmc_prompt, prompt_for
from covr_lightning.vlm.vlm import VLM, LoRA
from tests.vlm.tiny_models import FAMILIES

Folders = Callable[..., Path]
Loaded = tuple[Any, VLMInputs, ActionText]


def frames(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def unit_codec(size: int) -> ActionText:
    return ActionText([-1.0] * size, [1.0] * size)


def loaded(
    folder: str | Path, prompt: Prompt | None = None, image_position: Any = "first", louder: float = 1
) -> Loaded:
    """A model, its inputs and codec; `louder` weights make a random model's answers depend on its picture."""
    model, processor = load_vlm(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(louder)
    prompt = prompt or dmc_prompt("reacher-easy")
    return model, VLMInputs(processor, prompt, image_position), unit_codec(prompt.action_size)


@pytest.fixture(scope="module")
def tiny_folder(untrained_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded VLM with one narrow layer in each part."""
    from transformers import AutoConfig, Idefics3ForConditionalGeneration

    config = AutoConfig.from_pretrained(untrained_vlm)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = 32, 32, 1, 2
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 16
    config.text_config.layer_types = ["full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Idefics3ForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("tiny_vlm")
    load_vlm(untrained_vlm)[1].save_pretrained(folder)
    model.generation_config = load_vlm(untrained_vlm)[0].generation_config
    model.save_pretrained(folder)
    return folder


def first_part(text: str) -> str:
    """A text as far as the first closing bracket."""
    return "".join(text.partition("]")[:2])


def up_to_stop(tokens: torch.Tensor, stops: list[int]) -> list[list[int]]:
    """Rows of tokens as far as the first stop, that one included."""
    return [row[: 1 + next((i for i, t in enumerate(row) if t in stops), len(row))] for row in tokens.tolist()]


def loop_tokens(parts: Loaded, images: torch.Tensor, steps: int, prefix: PrefixCache | None) -> list[list[int]]:
    model, inputs, codec = parts
    stops = Decoder(inputs, codec, Decoding())._stop_ids(model)
    with torch.inference_mode():
        picker = Picker(images, steps, stops)
        return up_to_stop(decode_loop(model, inputs.prompt_batch(images), picker, prefix), stops)


def generated_tokens(parts: Loaded, images: torch.Tensor, steps: int) -> list[list[int]]:
    """Plain greedy generation, frame by frame."""
    model, inputs, codec = parts
    stops = Decoder(inputs, codec, Decoding())._stop_ids(model)
    rows = []
    for image in images:
        batch = inputs.prompt_batch(image[None])
        tokens = model.generate(**batch, max_new_tokens=steps, do_sample=False)
        rows += up_to_stop(tokens[:, batch["input_ids"].shape[1] :], stops)
    return rows


@pytest.mark.parametrize("image_position", ["first", "last"])
@pytest.mark.parametrize("weights", ["shipped", "random"])
def test_tokens_are_those_of_plain_generation(weights: str, image_position: str, untrained_vlm: Path) -> None:
    folder, louder = ("embedded", 1.0) if weights == "shipped" else (untrained_vlm, 4.0)
    parts = loaded(folder, prompt_for("walker-walk"), image_position, louder)
    images, prefix = frames(12), PrefixCache()
    expected = generated_tokens(parts, images, 16)
    assert loop_tokens(parts, images, 16, None) == expected
    assert loop_tokens(parts, images, 16, prefix) == expected
    assert loop_tokens(parts, images[:5], 16, prefix) == expected[:5]
    assert prefix.builds == 1
    if weights == "random":
        assert len({tuple(row) for row in expected}) > 6  # the pictures do matter


@pytest.mark.parametrize("image_position", ["first", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_too(family: str, image_position: str, hub_folder: Folders) -> None:
    parts = loaded(hub_folder(family), None, image_position, louder=4.0)
    images = frames(4, 84)
    expected = generated_tokens(parts, images, 12)
    assert loop_tokens(parts, images, 12, None) == expected
    assert loop_tokens(parts, images, 12, PrefixCache()) == expected
    # A batch of another size in between must leave nothing behind (Qwen's models remember an offset).
    assert loop_tokens(parts, images[:1], 12, PrefixCache()) == expected[:1]
    model, inputs, codec = parts
    decoder = Decoder(inputs, codec, Decoding())
    assert decoder.answers(model, images) == [first_part(text) for text in greedy_answers(model, inputs, codec, images)]
    assert decoder.way == "prefix cache"


def test_the_text_in_front_of_the_picture_is_cached(hub_folder: Folders) -> None:
    lengths = {}
    for position in ("first", "last"):
        model, inputs, _ = loaded(hub_folder("qwen2_5_vl"), None, position)
        lengths[position] = prefix_length(inputs.prompt_batch(frames(1))["input_ids"][0], model.config)
    words = len(inputs.tokenizer(dmc_prompt("reacher-easy").user)["input_ids"])
    assert lengths["last"] == lengths["first"] + words
    assert prefix_length(torch.tensor([1, 2, 3]), model.config) == 0


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_constrained_answers_can_always_be_parsed(size: int, tiny_folder: Path) -> None:
    names = tuple(f"joint_{i}" for i in range(size))
    parts = loaded(tiny_folder, Prompt("Control.", "Answer.", names), louder=6.0)
    model, inputs, codec = parts
    images = frames(1000, 32)
    free, greedy, sampled = (
        Decoder(inputs, codec, options)
        for options in (Decoding(), Decoding(constrained=True), Decoding(constrained=True, temperature=3.0))
    )
    answers = [text for part in images.split(250) for text in greedy.answers(model, part)]
    answers += sampled.answers(model, images[:250])
    assert all(codec.decode(text)[1] for text in answers)
    assert len(set(answers)) > (50 if size == 1 else 250)
    # Without the constraint random weights have no format at all.
    assert not any(codec.decode(text)[1] for text in free.answers(model, images[:50]))


@pytest.mark.parametrize("family", ["embedded", "qwen2_5_vl", "llava"])
def test_constrained_tokens_are_the_best_allowed_ones(family: str, tiny_folder: Path, hub_folder: Folders) -> None:
    # The naive way: the whole sequence anew for every token, and every token of the grammar tried in turn.
    parts = loaded(tiny_folder if family == "embedded" else hub_folder(family), louder=5.0)
    model, inputs, codec = parts
    images, grammar = frames(3), AnswerGrammar(inputs.tokenizer, codec)
    expected = []
    for image in images:
        ids, state = list(grammar.opening_ids), grammar.start
        while state != grammar.end:
            batch = inputs.with_tokens(inputs.prompt_batch(image[None]), ids)
            with torch.inference_mode():
                logits = model(**batch, use_cache=False).logits[0, -1]
            columns = (grammar.next_state[state] >= 0).nonzero().squeeze(-1).tolist()
            best = max(columns, key=lambda column: logits[grammar.tokens[column]].item())
            ids.append(int(grammar.tokens[best]))
            state = int(grammar.next_state[state, best])
        expected.append(inputs.tokenizer.decode(ids).strip())
    for prefix_cache in (True, False):
        decoder = Decoder(inputs, codec, Decoding(constrained=True, prefix_cache=prefix_cache))
        assert decoder.answers(model, images) == expected
        assert decoder.way == ("prefix cache" if prefix_cache else "loop")
        decoder.way = "generate"
        assert decoder.answers(model, images) == expected


@pytest.mark.parametrize("family", ["embedded", "qwen2_5_vl"])
def test_threads_change_no_answer(family: str, untrained_vlm: Path, hub_folder: Folders) -> None:
    model, inputs, codec = loaded(untrained_vlm if family == "embedded" else hub_folder(family), louder=4.0)
    images, threads = frames(13), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = Decoder(inputs, codec, Decoding()).answers(model, images)
        torch.set_num_threads(3)
        for _ in range(3):
            decoder = Decoder(inputs, codec, Decoding())
            assert decoder.answers(model, images) == expected
            assert decoder.prefix.builds == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"constrained": True, "temperature": 1.5}])
def test_all_ways_lead_to_the_same_answers(options: dict[str, Any], tiny_folder: Path) -> None:
    model, inputs, codec = loaded(tiny_folder, louder=3.0)
    images = frames(6)
    answers = []
    for way in ("prefix cache", "loop", "generate"):
        decoder = Decoder(inputs, codec, Decoding(**options))
        decoder.answers(model, images[:1])
        decoder.way = way
        answers.append(decoder.answers(model, images))
        assert answers[0] == [decoder.answers(model, image[None])[0] for image in images]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(("broken", "way"), [("later tokens", "loop"), ("all but generate", "generate")])
def test_a_family_that_does_not_allow_it_falls_back(
    broken: str, way: str, tiny_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, codec = loaded(tiny_folder, louder=3.0)
    images = frames(3)
    expected = Decoder(inputs, codec, Decoding()).answers(model, images)
    forward = type(model).forward

    @functools.wraps(forward)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        cache, pixels = kwargs.get("past_key_values"), kwargs.get("pixel_values")
        cut = pixels is not None and cache is not None and kwargs["input_ids"].shape[1] < cache.get_seq_length()
        if cut if broken == "later tokens" else "return_dict" not in kwargs:  # which generate asks for
            output.logits = output.logits.roll(1, -1)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    decoder = Decoder(inputs, codec, Decoding())
    with caplog.at_level(logging.WARNING):
        assert decoder.answers(model, images) == expected
    assert decoder.way == way
    assert "does not allow decoding by 'prefix cache' (its logits are off by" in caplog.text


def test_settings_that_change_greedy_tokens_leave_it_to_the_library(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs, codec = loaded(tiny_folder, louder=3.0)
    model.generation_config.repetition_penalty = 1.3
    decoder = Decoder(inputs, codec, Decoding())
    with caplog.at_level(logging.WARNING):
        answers = decoder.answers(model, frames(3))
    assert decoder.way == "generate"
    assert "generation_config sets repetition_penalty" in caplog.text
    assert answers == [first_part(text) for text in greedy_answers(model, inputs, codec, frames(3))]


def test_nothing_behind_the_bracket_is_asked_for() -> None:
    # 5 ends a row like the end token 9; rows that have ended get 9.
    picker = Picker(frames(2), 8, [9, 5])
    said = [[1, 2], [5, 2], [3, 9]]
    rows = [picker(torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()).tolist() for tokens in said]
    assert rows == [[1, 2], [5, 2], [9, 9]]
    assert picker.finished
    assert picker.forced() is None


# -- weights that change ----------------------------------------------------------------------------------------------


def reacher(folder: Path, **options: Any) -> VLM:
    vlm = VLM(str(folder), LoRA(rank=4, alpha=64, dropout=0.0), decoding=Decoding(**options))
    vlm.load(DMControl("reacher-easy").spec)
    return vlm


def test_the_prefix_is_computed_anew_when_the_weights_change(untrained_vlm: Path, tmp_path: Path) -> None:
    vlm, plain = reacher(untrained_vlm, constrained=True), reacher(untrained_vlm, constrained=True, prefix_cache=False)
    images, said = frames(4), []
    for change in range(3):
        if change:
            with torch.no_grad():
                vlm.add_adapter()
                for i, (name, parameter) in enumerate(vlm.model.named_parameters()):
                    if "lora_B" in name:
                        parameter.normal_(generator=torch.Generator().manual_seed(100 * change + i)).mul_(0.3)
            vlm.weights_changed()
            vlm.save_adapter(tmp_path / "adapter")
            plain.load_adapter(tmp_path / "adapter", change)
        said.append(vlm.answer(images))
        assert vlm.answer(images) == said[-1]
        assert said[-1] == plain.answer(images)
        assert vlm.decoder.prefix.builds == change + 1
    assert said[1] != said[2]
    assert (vlm.decoder.way, plain.decoder.way) == ("prefix cache", "loop")


def test_a_round_and_a_loaded_adapter_change_the_weights(untrained_vlm: Path, tmp_path: Path) -> None:
    vlm, plain = reacher(untrained_vlm), reacher(untrained_vlm, prefix_cache=False)
    vlm.answer(frames(2))
    actions = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    rows = TensorDict({"frame": frames(6), "action": actions}, batch_size=[6])
    settings = FineTuneSettings(max_steps=2, accumulate=1, lr=0.1, held_out=0.0, gradient_checkpointing=False)
    trainer = {"accelerator": "cpu", "devices": 1}
    report = RoundReport(1, 100, 6)
    fine_tune_round(report, vlm, rows, torch.ones(6), 0.1, KeepAll(), UniformWeight(), settings, trainer)
    builds = vlm.decoder.prefix.builds
    answers = vlm.answer(frames(2))
    assert vlm.decoder.prefix.builds == builds + 1
    vlm.save_adapter(tmp_path / "adapter")
    plain.answer(frames(2))
    plain.load_adapter(tmp_path / "adapter", 1)
    assert plain.answer(frames(2)) == answers
    vlm.load_adapter(tmp_path / "adapter", 2)
    vlm.answer(frames(2))
    assert vlm.decoder.prefix.builds == builds + 2


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_by_hand() -> None:
    # Probabilities 0.5, 0.3, 0.2 of tokens 2, 0, 1: laid end to end they change at 0.5 and 0.8.
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log()
    for uniform, token in ((0.0, 2), (0.49, 2), (0.51, 0), (0.79, 0), (0.81, 1), (0.999, 1)):
        assert sample(logits, 1.0, torch.tensor([uniform])).item() == token
    # The two likeliest reach 0.6; within 0.8, token 2 takes 5/8 = 0.625.
    for uniform, token in ((0.62, 2), (0.63, 0), (0.999, 0)):
        assert sample(logits, 0.6, torch.tensor([uniform])).item() == token
    assert sample(logits, 0.5, torch.tensor([0.999])).item() == 2
    masked = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert sample(masked, 1.0, torch.tensor([0.999999])).item() == 1


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = sample(logits.expand(20_000, -1), 1.0, uniforms).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=0.015)


def test_the_temperature_flattens() -> None:
    n = torch.arange(4000)
    images, logits = torch.stack([n // 256, n % 256], 1).to(torch.uint8), torch.tensor([[2.0, 0.0]])
    for temperature, share in ((2.0, 0.7311), (0.5, 0.9820)):  # e / (1 + e) and e⁴ / (1 + e⁴)
        pick = Picker(images, 1, [9], temperature=temperature)
        assert (pick(logits.expand(4000, -1)) == 0).float().mean().item() == pytest.approx(share, abs=0.025)


def test_a_frame_draws_the_same_numbers_in_any_batch() -> None:
    images = frames(3)
    numbers = frame_uniforms(images, 4, seed=7)
    assert torch.equal(frame_uniforms(images[1:2], 4, seed=7), numbers[1:2])
    assert not torch.equal(frame_uniforms(images, 4, seed=8), numbers)
    assert not torch.equal(numbers[0], numbers[1])


def test_sampling_depends_on_its_seed_alone(tiny_folder: Path) -> None:
    model, inputs, codec = loaded(tiny_folder)
    state = torch.random.get_rng_state()
    answers = [
        Decoder(inputs, codec, Decoding(constrained=True, temperature=1.0, seed=seed)).answers(model, frames(4))
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"vlm\.decoding\.{next(iter(options))}"):
        Decoding(**options)


def test_options_are_reached_from_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VLM, "vlm")
    arguments = ["--vlm.decoding.constrained", "true", "--vlm.decoding.top_p=0.9", "--vlm.image_position=last"]
    vlm = parser.instantiate_classes(parser.parse_args(arguments)).vlm
    vlm = vlm if isinstance(vlm, VLM) else VLM(**vlm)
    assert vlm.decoding == Decoding(constrained=True, top_p=0.9)
    assert vlm.image_position == "last"
    assert VLM().decoding == Decoding(constrained=False, prefix_cache=True, temperature=0.0)


def test_a_queue_of_frames_is_answered_like_single_ones() -> None:
    vlm = VLM(decoding=Decoding(constrained=True))
    vlm.load(DMControl("walker-walk").spec)
    images = DMControl("walker-walk", size=64, rendering="fast").make(0).rollout(6)["pixels"][:, -3:]
    actions, valid = vlm.propose(images)
    assert valid.all()
    for image, action in zip(images, actions, strict=True):
        assert torch.equal(vlm.propose(image[None])[0][0], action)
