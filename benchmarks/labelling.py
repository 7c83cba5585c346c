"""Frames labelled per second: plain generation frame by frame beside the decoder's ways, in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.labelling

Asks the embedded VLM about 32 random pictures, with a task's prompt, its words repeated until both turns together are
as long as the paper's prompt (Fig. 10: some 220 tokens). The ways take turns, and each call's best turn counts. `first`
and `last` say where the picture stands in the user's turn; the embedded VLM was trained with `first`, so the answers
with `last` mean nothing, and only their number of tokens matters here.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.surroundings import as_covr_runs, at_least
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText, answer_format
from covr_lightning.vlm.decoding import Decoder, Decoding
from covr_lightning.vlm.inputs import ImagePosition, VLMInputs, prefix_length
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.prompts import Prompt, prompt_for

Call = Callable[[], list[str]]
WAYS = {
    "batches": Decoding(prefix_cache=False),
    "+ prefix cache": Decoding(),
    "+ constrained": Decoding(constrained=True),
}


def long_prompt(tokenizer: Any, task: str, tokens: int) -> Prompt:
    """A task's prompt with each turn's words repeated until it has half of the tokens."""
    prompt = prompt_for(task)

    def repeated(text: str, length: int) -> str:
        words: list[str] = []
        for word in itertools.cycle(text.split()):
            if len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) >= length:
                return " ".join(words)
            words.append(word)
        raise AssertionError("the words repeat for ever")

    ending = answer_format(prompt.action_names)
    room = tokens // 2 - len(tokenizer(ending, add_special_tokens=False)["input_ids"])
    user = f"{repeated(prompt.user.removesuffix(ending), room)} {ending}"
    return Prompt(repeated(prompt.system, tokens // 2), user, prompt.action_names)


def plain(model: Any, inputs: VLMInputs, length: int, frame: Tensor) -> list[str]:
    """One frame's answer through the library's greedy generation."""
    batch = inputs.prompt_batch(frame[None])
    tokens = model.generate(**batch, max_new_tokens=length, do_sample=False, num_beams=1)
    return inputs.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def best_seconds(ways: dict[str, list[Call]], turns: int) -> tuple[dict[str, float], dict[str, list[str]]]:
    """The sum of each way's calls at their shortest, and its answers.

    On a machine with other work the many short calls of plain generation find a quiet moment more easily than a long
    one, so the ratio is rather too small than too large.
    """
    answers = {name: [text for call in calls for text in call()] for name, calls in ways.items()}
    best = {name: [float("inf")] * len(calls) for name, calls in ways.items()}
    for _ in range(turns):
        for name, calls in ways.items():
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    return {name: sum(seconds) for name, seconds in best.items()}, answers


def measure(model: Any, processor: Any, position: ImagePosition, arguments: argparse.Namespace) -> None:
    """Print one table."""
    prompt = long_prompt(processor.tokenizer, arguments.task, arguments.prompt_tokens)
    inputs = VLMInputs(processor, prompt, position)
    codec = ActionText([-1.0] * prompt.action_size, [1.0] * prompt.action_size)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (arguments.frames, 3, 128, 128), dtype=torch.uint8, generator=generator)
    ids, length = inputs.prompt_batch(frames[:1])["input_ids"][0], inputs.answer_length(codec)
    ways: dict[str, list[Call]] = {"plain generate": [partial(plain, model, inputs, length, frame) for frame in frames]}
    for name, options in WAYS.items():
        ways[name] = [partial(Decoder(inputs, codec, options).answers, model, frames)]
    best, answers = best_seconds(ways, arguments.turns)
    print(f"\npicture {position}: {len(ids)} tokens, {prefix_length(ids, model.config)} of them before the picture")
    for name, seconds in best.items():
        ratio = best["plain generate"] / seconds
        same = sum(a == b for a, b in zip(answers[name], answers["plain generate"], strict=True))
        parsed = sum(codec.decode(text)[1] for text in answers[name])
        print(
            f"  {name:16s} {arguments.frames / seconds:6.1f} frames/s {ratio:5.2f}x   {same} answers as plain's, "
            f"{parsed} parsable, e.g. {answers[name][0]}"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="embedded", help="vlm.path")
    parser.add_argument("--task", default="highway", help="whose prompt is asked, and with it the number of values")
    parser.add_argument("--frames", type=at_least(1), default=32)
    parser.add_argument("--prompt-tokens", type=at_least(1), default=220)
    parser.add_argument("--turns", type=at_least(1), default=4, help="turns of each way")
    parser.add_argument("--threads", type=at_least(1), default=2)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    try:
        model, processor = load_vlm(arguments.vlm)
        for position in ("first", "last"):
            measure(model, processor, position, arguments)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    as_covr_runs()
    main()
