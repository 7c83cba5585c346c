"""Model inputs: shapes, labels and generation length, on the embedded processor and on a family with type ids."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from covr_lightning.vlm import ActionText, VLMInputs, dmc_prompt
from covr_lightning.vlm.embedded.model import build_processor, build_tokenizer
from covr_lightning.vlm.embedded.questions import training_corpus
from covr_lightning.vlm.embedded.scenes import embedded_scenes
from covr_lightning.vlm.loading import load_processor_of
from covr_lightning.vlm.prompts import dmc_tasks


@pytest.fixture(scope="module")
def inputs() -> VLMInputs:
    processor = build_processor(build_tokenizer(training_corpus(embedded_scenes())))
    return VLMInputs(processor, dmc_prompt("reacher-easy"))


def frames(count: int, size: int = 84) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_prompt_batch(inputs: VLMInputs) -> None:
    batch = inputs.prompt_batch(frames(3))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (3, 1, 3, 128, 128)
    assert (batch["input_ids"] == inputs.processor.image_token_id).sum(1).tolist() == [4, 4, 4]
    text = inputs.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("action:[shoulder_torque, wrist_torque]<end_of_utterance><assistant>")


def test_each_row_has_its_own_picture(inputs: VLMInputs) -> None:
    both = inputs.prompt_batch(frames(2))["pixel_values"]
    alone = inputs.prompt_batch(frames(2)[1:])["pixel_values"]
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=0)


def test_training_batch_labels_answer_and_end_only(inputs: VLMInputs) -> None:
    answers = ["action:[0.02, -0.98]", "action:[0.02]"]
    batch, labels = inputs.training_batch(frames(2), answers)
    prompt_length = inputs.prompt_batch(frames(2))["input_ids"].shape[1]
    # "action:[", "0.02", ", ", "-0.98", "]" and the end token: 6; the second row is 2 tokens shorter.
    assert labels.shape == batch["input_ids"].shape == (2, prompt_length + 6)
    assert (labels[:, :prompt_length] == -100).all()
    assert (labels != -100).sum(1).tolist() == [6, 4]
    assert labels[1, -2:].tolist() == [-100, -100]
    assert batch["attention_mask"][1, -3:].tolist() == [1, 0, 0]
    for row, answer in zip(labels, answers, strict=True):
        assert inputs.tokenizer.decode(row[row != -100]) == answer + inputs.tokenizer.eos_token
    known = labels != -100
    assert torch.equal(labels[known], batch["input_ids"][known])


@pytest.mark.parametrize("template_writes_it", [False, True])
def test_a_prompt_begins_once(template_writes_it: bool, hub_folder: Callable[..., Path]) -> None:
    processor = load_processor_of(hub_folder("llava"))
    if template_writes_it:  # as some families' do
        processor.chat_template = "<s>" + processor.chat_template
    llava = VLMInputs(processor, dmc_prompt("reacher-easy"))
    ids = llava.prompt_batch(frames(2, 56))["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
    assert ids[:, 0].tolist() == [processor.tokenizer.bos_token_id] * 2
    assert llava.gets_bos == (not template_writes_it)


def test_a_template_that_has_the_picture_first_anyhow_is_told(
    hub_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for family, says in (("qwen2_5_vl", 0), ("llava", 1)):
        caplog.clear()
        VLMInputs(load_processor_of(hub_folder(family)), dmc_prompt("reacher-easy"), "last")
        assert len(caplog.records) == says
    assert "puts the picture first all the same" in caplog.text


def test_type_ids_are_extended_with_zeros(inputs: VLMInputs) -> None:
    class WithTypeIds:
        """The processor with Qwen-style type ids."""

        tokenizer = inputs.tokenizer
        apply_chat_template = inputs.processor.apply_chat_template

        def __call__(self, **kwargs: object) -> dict[str, torch.Tensor]:
            batch = dict(inputs.processor(**kwargs))
            return batch | {"mm_token_type_ids": (batch["input_ids"] == inputs.processor.image_token_id).int()}

    typed = VLMInputs(WithTypeIds(), inputs.prompt)
    batch, _ = typed.training_batch(frames(1), ["action:[0.02, -0.98]"])
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert batch["mm_token_type_ids"].sum() == 4
    assert batch["mm_token_type_ids"][0, -6:].sum() == 0


def test_any_text_is_an_answer(inputs: VLMInputs) -> None:
    answer = "h\u00e9llo \U0001f600 action:[-0.005]"
    _, labels = inputs.training_batch(frames(1), [answer])
    assert inputs.tokenizer.decode(labels[0][labels[0] != -100]) == answer + inputs.tokenizer.eos_token


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_answer_length_fits_every_answer(inputs: VLMInputs, size: int) -> None:
    codec = ActionText([-1.0] * size, [1.0] * size)
    # size values, size - 1 separators, opening, closing and end token.
    assert inputs.answer_length(codec) >= 2 * size + 2


def test_bad_frames_and_counts(inputs: VLMInputs) -> None:
    with pytest.raises(ValueError, match="uint8"):
        inputs.prompt_batch(torch.zeros(1, 3, 84, 84))
    with pytest.raises(ValueError, match="uint8"):
        inputs.prompt_batch(torch.zeros(1, 9, 84, 84, dtype=torch.uint8))
    with pytest.raises(ValueError, match="1 answers for 2 frames"):
        inputs.training_batch(frames(2), ["action:[0.00]"])


def test_prompts_name_every_action_and_the_format() -> None:
    sizes = [dmc_prompt(task).action_size for task in dmc_tasks()]
    # cartpole, reacher, cheetah, walker, finger, ball_in_cup, hopper, walker run, pendulum
    assert sizes == [1, 2, 6, 6, 2, 2, 4, 6, 1]
    for task in dmc_tasks():
        prompt = dmc_prompt(task)
        assert prompt.user.endswith("action:[" + ", ".join(prompt.action_names) + "]")
        assert "[-1, 1]" in prompt.user


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest: cartpole-swingup"):
        dmc_prompt("cartpole-swing")
