"""The fine-tuning step with logits at label positions only, beside logits at every position, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.fine_tuning

A shrunk Qwen2.5-VL with random weights and the true vocabulary of 151,936 tokens is fine-tuned (LoRA on Table 9's
CARLA targets, gradient checkpointing, AdamW) on batches of 4 random pictures with the highway prompt. The ways take
turns, in two sizes of the model:

- `labels`: this package's loss, which multiplies lm_head with the label positions' hidden states alone;
- `everywhere`: the same loss of the logits at every position;
- `library`: the model's own loss, as it is computed when labels are passed (neither weights nor label smoothing).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.qwen import driving_spec, make_model, make_processor, make_vlm, shrunk, training_rows
from covr_lightning.finetune.loss import ralw_loss
from covr_lightning.finetune.module import FineTuneBatch, FineTuneSettings, VLMFineTuner
from covr_lightning.measuring import seconds, working_megabytes
from covr_lightning.vlm.adapters import CARLA_LORA_TARGETS, LoRA

#: Hidden size and layers of the language model, then of the vision tower.
SIZES = {"small": (192, 3, 128, 2), "larger": (512, 8, 256, 4)}
CPU = torch.device("cpu")

Loss = Callable[[VLMFineTuner, FineTuneBatch], Tensor]


def at_labels(tuner: VLMFineTuner, batch: FineTuneBatch) -> Tensor:
    """This package's loss."""
    return tuner.loss(*batch)


def everywhere(tuner: VLMFineTuner, batch: FineTuneBatch) -> Tensor:
    """The same loss of logits (B, T, V)."""
    inputs, labels = _inputs(tuner, batch)
    logits = tuner.vlm.base_model(**inputs, use_cache=False).logits
    return ralw_loss(logits, labels, batch[2], tuner.settings.label_smoothing)


def library(tuner: VLMFineTuner, batch: FineTuneBatch) -> Tensor:
    """The model's own loss of logits (B, T, V)."""
    inputs, labels = _inputs(tuner, batch)
    return tuner.vlm.base_model(**inputs, labels=labels, use_cache=False).loss


WAYS: dict[str, Loss] = {"labels": at_labels, "everywhere": everywhere, "library": library}


def _inputs(tuner: VLMFineTuner, batch: FineTuneBatch) -> tuple[dict[str, Tensor], Tensor]:
    frames, actions, _ = batch
    return tuner.vlm.inputs.training_batch(frames, [tuner.vlm.codec.encode(action) for action in actions])


def make_tuner(size: tuple[int, int, int, int], rank: int, processor: Any) -> VLMFineTuner:
    """A shrunk model with an adapter, ready to train."""
    model = make_model(shrunk(*size), processor, torch.float32, CPU)
    lora = LoRA(rank, 2 * rank, targets=CARLA_LORA_TARGETS)
    tuner = VLMFineTuner(make_vlm(model, processor, driving_spec(), lora), FineTuneSettings())
    tuner.prepare()
    return tuner


def measure_size(name: str, tuner: VLMFineTuner, batch_size: int, turns: int) -> dict[str, float]:
    """Print one size's table.

    Returns:
        Median seconds of a step by way.
    """
    batch = training_rows(driving_spec(), batch_size)
    trained = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=tuner.settings.lr, weight_decay=0.0)

    def step(loss: Loss) -> None:
        optimizer.zero_grad()
        loss(tuner, batch).backward()
        optimizer.step()

    inputs, labels = _inputs(tuner, batch)
    config = tuner.vlm.base_model.config
    text, vision = config.text_config, config.vision_config
    millions = sum(parameter.numel() for parameter in tuner.parameters()) / 1e6
    print(
        f"\n{name}: language {text.num_hidden_layers} × {text.hidden_size}, vision {vision.depth} × "
        f"{vision.hidden_size}, {millions:.1f} M parameters of which {sum(p.numel() for p in trained) / 1e6:.1f} M are "
        f"trained; batch {batch_size}, {inputs['input_ids'].shape[1]} positions, "
        f"{int((labels >= 0).sum())} labels, vocabulary {text.vocab_size}"
    )
    working: dict[str, float] = {}
    for way, loss in WAYS.items():
        step(loss)  # makes the optimizer's state and the gradients, which stay
        working[way] = working_megabytes(lambda loss=loss: step(loss), CPU)  # type: ignore[misc]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, loss in WAYS.items():
            times[way].append(seconds(lambda loss=loss: step(loss), CPU))  # type: ignore[misc]
    medians = {way: statistics.median(values) for way, values in times.items()}
    print("| way | seconds a step: median (min to max) | times the labels' | working memory, MB |")
    print("|---|---|---|---|")
    for way, values in times.items():
        spread = f"{medians[way]:.2f} ({min(values):.2f} to {max(values):.2f})"
        print(f"| {way} | {spread} | {medians[way] / medians['labels']:.2f} | {working[way]:.0f} |")
    return medians


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; Table 9's 128 is as wide as the models")
    parser.add_argument("--turns", type=int, default=7, help="steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    processor = make_processor("highway")
    for name in arguments.sizes:
        tuner = make_tuner(SIZES[name], arguments.rank, processor)
        measure_size(name, tuner, arguments.batch_size, arguments.turns)


if __name__ == "__main__":
    main()
