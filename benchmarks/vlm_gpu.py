"""Everything that needs a GPU, in one run: labelling and fine-tuning at Qwen2.5-VL-3B's shape.

    python -m benchmarks.vlm_gpu --out vlm_gpu.csv
    python -m benchmarks.vlm_gpu --tiny        # the same code at a tiny shape, on the CPU, in under a minute
    python -m benchmarks.vlm_gpu --parts fine_tuning_here fine_tuning_trl      # only these

Weights are random and nothing is downloaded (see benchmarks/qwen.py).

Labelling: seconds an image of the highway prompt, by the library's generate one by one, as the paper measured (its
Table 17: 4.44 s), and as this package labels, in batches of 32: by the base model with and without the constraint, and
with it by the model with its adapter, as after a round (LoRA's products beside the weights', not merged). A random
model never ends an answer by itself, so without the constraint each goes on to the longest that is allowed: an upper
bound.

Fine-tuning: LoRA by the paper's Table 9 for CARLA (rank 128, batches of 4, 4 of them a step, gradient checkpointing) on
the same rows by this package's LightningModule, by the same with a step's rows in one batch, and by TRL's SFTTrainer,
which is left out if trl is not installed (`pip install trl datasets`). All train in bf16 autocast with float32
adapters, and without label smoothing, for which TRL takes a second forward pass. Tokens are those of prompt, picture
and answer that went through the model.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.qwen import (
    QWEN_3B,
    QWEN_TOKENS,
    driving_spec,
    make_model,
    make_processor,
    make_vlm,
    shrunk,
    training_rows,
)
from benchmarks.surroundings import as_covr_runs, at_least
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.training import quiet_lightning
from covr_lightning.measuring import measure, synchronize, weights_megabytes, working_megabytes
from covr_lightning.vlm.adapters import CARLA_LORA_TARGETS, LoRA
from covr_lightning.vlm.decoding import Decoder, Decoding, greedy_answers


@dataclass(frozen=True)
class Size:
    """What the full run and the tiny one differ in.

    Attributes:
        shape: The model's configuration.
        tokens: Size of the tokenizer.
        batch_size: Frames per labelling call.
        calls: Labelling calls measured.
        lora: The adapter.
        settings: Of fine-tuning.
        steps: Optimizer steps, the first of which is not counted.
    """

    shape: dict[str, Any]
    tokens: int
    batch_size: int
    calls: int
    lora: LoRA
    settings: FineTuneSettings
    steps: int


FULL = Size(
    QWEN_3B, QWEN_TOKENS, 32, 10, LoRA(128, 256, 0.05, CARLA_LORA_TARGETS),
    FineTuneSettings(epochs=1, batch_size=4, accumulate=4, label_smoothing=0.0), 11,
)  # fmt: skip
TINY = Size(
    shrunk(64, 2, 64, 1, vocabulary=1024), 1000, 4, 2, LoRA(4, 8, 0.05, CARLA_LORA_TARGETS),
    FineTuneSettings(epochs=1, batch_size=2, accumulate=2, label_smoothing=0.0), 3,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        what: What was measured.
        value: The figure.
        unit: Its unit.
        spread: Standard deviation over calls or steps.
        weights_mb: The model's weights, 10⁶ bytes.
        working_mb: Peak memory above what was taken before, 10⁶ bytes.
        note: What else there is to say.
    """

    what: str
    value: float
    unit: str
    spread: float
    weights_mb: float
    working_mb: float
    note: str = ""


def labelling(size: Size, device: torch.device) -> list[Result]:
    """Seconds an image."""
    spec, processor = driving_spec(), make_processor("highway", size.tokens)
    model = make_model(size.shape, processor, torch.bfloat16, device)
    vlm = make_vlm(model, processor, spec, size.lora)
    frames = training_rows(spec, size.batch_size)[0]
    results = []

    prompt, longest = vlm.inputs.prompt_batch(frames[:1])["input_ids"].shape[1], vlm.inputs.answer_length(vlm.codec)

    def add(what: str, ask: Callable[[Tensor], list[str]], batch: Tensor, answer: str) -> None:
        measured = measure(lambda _: ask(batch), size.calls, device)
        seconds, spread = measured.median / len(batch), measured.deviation / len(batch)
        note = f"batch {len(batch)}, prompts of {prompt} tokens, answers of {answer}"
        weights = weights_megabytes(vlm.model)
        results.append(Result(what, seconds, "s an image", spread, weights, measured.working_mb, note))

    plain = partial(greedy_answers, model, vlm.inputs, vlm.codec, device=device)
    add("generate", plain, frames[:1], f"at most {longest}")
    for constrained, adapted in ((False, False), (True, False), (True, True)):
        if adapted:
            vlm.add_adapter()
        decoder = Decoder(vlm.inputs, vlm.codec, Decoding(constrained=constrained))
        answers = decoder.answers(vlm.model, frames, device)
        mean = statistics.mean(len(vlm.inputs.answer_ids(text)) for text in answers)
        kind = f"{decoder.way}{', constrained' if constrained else ''}{', with its adapter' if adapted else ''}"
        name = f"labelling ({kind})"
        ask = partial(decoder.answers, vlm.model, device=device)
        add(name, ask, frames, f"{mean:.1f} on average" if constrained else f"at most {longest}")
    return results


class StepClock(L.Callback):
    """When each optimizer step of a Lightning run was done."""

    def __init__(self, device: torch.device, accumulate: int) -> None:
        self._device, self._accumulate = device, accumulate
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        if (batch_idx + 1) % self._accumulate == 0:
            synchronize(self._device)
            self.times.append(time.perf_counter())


def _tuner(size: Size, device: torch.device) -> VLMFineTuner:
    spec, processor = driving_spec(), make_processor("highway", size.tokens)
    model = make_model(size.shape, processor, torch.bfloat16, device)
    return VLMFineTuner(make_vlm(model, processor, spec, size.lora), size.settings)


def fine_tuning_here(size: Size, device: torch.device) -> list[Result]:
    """Tokens a second of this package."""
    tuner = _tuner(size, device)
    frames, actions, weights = training_rows(driving_spec(), _rows(size))
    inputs, _ = tuner.vlm.inputs.training_batch(frames, [tuner.vlm.codec.encode(action) for action in actions])
    tokens = int(inputs["attention_mask"].sum()) // size.steps
    clock = StepClock(device, size.settings.accumulate)

    def fit() -> None:
        with quiet_lightning():
            trainer = L.Trainer(
                max_epochs=1, accumulate_grad_batches=size.settings.accumulate, logger=False, callbacks=[clock],
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, devices=1,
                accelerator="gpu" if device.type == "cuda" else "cpu", precision="bf16-mixed",
            )  # fmt: skip
            trainer.fit(tuner, tuner.train_loader(frames, actions, weights))

    working = working_megabytes(fit, device)
    return [_result("fine-tuning, this package", clock.times, tokens, tuner, working)]


def fine_tuning_in_one_batch(size: Size, device: torch.device) -> list[Result]:
    """Tokens a second of this package where the rows of a step are one batch, for a GPU that has the memory."""
    s = size.settings
    settings = replace(s, batch_size=s.batch_size * s.accumulate, accumulate=1)
    (result,) = fine_tuning_here(replace(size, settings=settings), device)
    return [replace(result, what=f"{result.what}, a step in one batch")]


def fine_tuning_trl(size: Size, device: torch.device) -> list[Result]:
    """Tokens a second of TRL's SFTTrainer."""
    from datasets import Dataset
    from PIL import Image
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tuner = _tuner(size, device)
    vlm, settings = tuner.vlm, size.settings
    frames, actions, _ = training_rows(driving_spec(), _rows(size))
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": vlm.inputs.prompt.system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": vlm.inputs.prompt.user}]},
    ]
    rows = [
        {
            "images": [Image.fromarray(frame.permute(1, 2, 0).numpy())],
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": vlm.codec.encode(action)}]}],
        }
        for frame, action in zip(frames, actions, strict=True)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize(device)
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, num_train_epochs=1, per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate, learning_rate=settings.lr, lr_scheduler_type="cosine",
            gradient_checkpointing=settings.gradient_checkpointing, bf16=True, max_grad_norm=0.0, max_length=None,
            use_cpu=device.type == "cpu", logging_steps=size.steps, report_to="none", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            tuner.model, config, train_dataset=Dataset.from_list(rows), processing_class=vlm.inputs.processor,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        working = working_megabytes(trainer.train, device)
    seen = max(log.get("num_tokens", 0) for log in trainer.state.log_history)
    return [_result("fine-tuning, TRL's SFTTrainer", times, int(seen) // size.steps, tuner, working)]


def _rows(size: Size) -> int:
    return size.settings.batch_size * size.settings.accumulate * size.steps


def _result(what: str, times: list[float], tokens: int, tuner: VLMFineTuner, working: float) -> Result:
    """Tokens a second between the ends of steps, so that the first step, which warms up, does not count."""
    speeds = [tokens / (after - before) for before, after in itertools.pairwise(times)]
    settings = tuner.settings
    note = f"{settings.accumulate} × {settings.batch_size} rows and {tokens} tokens a step, {len(speeds)} steps"
    spread = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
    weights = weights_megabytes(tuner.model)
    return Result(what, statistics.median(speeds), "tokens/s", spread, weights, working, note)


def missing_for_trl() -> str:
    """Which package the comparison with TRL lacks, or nothing."""
    return next((name for name in ("trl", "datasets") if find_spec(name) is None), "")


#: What can be measured, by its name.
PARTS: dict[str, Callable[[Size, torch.device], list[Result]]] = {
    part.__name__: part for part in (labelling, fine_tuning_here, fine_tuning_in_one_batch, fine_tuning_trl)
}


def run(size: Size, device: torch.device, parts: Sequence[str] = tuple(PARTS), out: Path | None = None) -> list[Result]:
    """Measure, and print the table as it grows; `out` is written anew after each part."""
    print("| what | figure | spread | weights MB | working MB | |\n|---|---|---|---|---|---|")
    results: list[Result] = []
    for name in parts:
        missing = missing_for_trl() if name == "fine_tuning_trl" else ""
        if missing:
            print(
                f"| fine-tuning, TRL's SFTTrainer | left out: {missing} is not installed (pip install trl datasets) |"
            )
            continue
        for result in PARTS[name](size, device):
            figures = f"{result.value:.4g} {result.unit} | {result.spread:.2g} | {result.weights_mb:.0f}"
            print(f"| {result.what} | {figures} | {result.working_mb:.0f} | {result.note} |", flush=True)
            results.append(result)
        if out is not None:
            write(out, results)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def write(out: Path, results: list[Result]) -> None:
    """Write the table as CSV."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def main(arguments_given: list[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure; all by default")
    parser.add_argument(
        "--steps",
        type=at_least(2),
        help=f"optimizer steps, the first not counted ({FULL.steps}; with --tiny {TINY.steps})",
    )
    arguments = parser.parse_args(arguments_given)
    missing = missing_for_trl()
    if missing and "fine_tuning_trl" in (arguments.parts or ()):
        parser.error(f"--parts names fine_tuning_trl, but {missing} is not installed (pip install trl datasets).")
    warnings.simplefilter("ignore", FutureWarning)  # what the libraries say to one another
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --tiny runs on the CPU.")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    if not arguments.tiny:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    size = TINY if arguments.tiny else FULL
    run(replace(size, steps=arguments.steps or size.steps), device, arguments.parts or tuple(PARTS), arguments.out)


if __name__ == "__main__":
    as_covr_runs()
    main()
