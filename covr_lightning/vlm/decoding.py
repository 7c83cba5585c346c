"""From frames to the VLM's words: plain generation, and a loop of our own that gives the same tokens sooner."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from covr_lightning.errors import ConfigError, check_not_negative
from covr_lightning.random_state import check_seed
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.decode_loop import PrefixCache, base_model, decode_loop
from covr_lightning.vlm.grammar import CLOSING, AnswerGrammar
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.picking import Picker, Replay

log = logging.getLogger(__name__)

#: Fewest frames that are worth a thread.
FRAMES_PER_THREAD = 4
#: Settings of `generation_config` that do not change greedy tokens, or that the loop reads.
_PLAIN_SETTINGS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "max_length", "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "transformers_version", "_from_model_config",
}  # fmt: skip
#: Least relative error between two ways to the same logits that counts as a difference; more where eps is coarse.
_TOLERANCE, _TOLERANCE_IN_EPS = 1e-4, 16
#: What a model may raise that does not take the loop's inputs or cache.
_UNSUPPORTED = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass
class Decoding:
    """How answers are decoded.

    Constrained decoding is off by default. It makes every answer parsable, so it would hide what the share of
    unparsable answers measures, whether the VLM has the format; and what it forces out of a VLM that has not is close
    to a random action, which must never reach the agent. Of a VLM that has the format it gives the same actions, in
    about half the steps.

    Attributes:
        constrained: Allow only `action:[`, as many numbers as the action has, and `]`.
        prefix_cache: Compute keys and values of the prompt's part before the picture once per state of the weights.
        temperature: 0 takes the likeliest token; above, tokens are sampled from the softmax of logits / temperature.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        seed: Seed of sampling. The numbers drawn depend on it and on the frame alone, so that a frame's answer
            depends neither on what it is batched with nor on how often a run was resumed.
    """

    constrained: bool = False
    prefix_cache: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_not_negative("vlm.decoding.temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"vlm.decoding.top_p is {self.top_p}; it must be above 0 and at most 1.")
        check_seed("vlm.decoding.seed", self.seed)


@torch.inference_mode()
def greedy_answers(
    model: Any, inputs: VLMInputs, codec: ActionText, frames: Tensor, device: torch.device | None = None
) -> list[str]:
    """The VLM's answers by the library's own greedy generation; what :class:`Decoder` is held against.

    Args:
        model: the VLM.
        inputs: its processor with the prompt.
        codec: the answer's format, which bounds its length.
        frames: (B, 3, H, W) uint8.
        device: where the model is; the CPU by default.
    """
    batch = {name: value.to(device or "cpu") for name, value in inputs.prompt_batch(frames).items()}
    tokens = model.generate(**batch, max_new_tokens=inputs.answer_length(codec), do_sample=False, num_beams=1)
    return inputs.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


class Decoder:
    """Answers batches of frames.

    Prefill starts behind the cached keys and values of the prompt's static prefix, then all rows go on one token at a
    time until each has its `]` (what a VLM may say behind it is not asked for). Greedy tokens are those of
    `model.generate` up to there.

    Whether a model family allows this is measured, not assumed: before the first answer two fixed pictures are
    decoded by `model.generate` and by the loop, with and without the prefix cache, and the fastest way whose logits
    agree is taken. A family in which earlier tokens attend to later ones, or one that counts positions in its own way,
    falls back, with a warning.

    Args:
        inputs: the processor with the prompt.
        codec: the answer's format.
        options: how to decode.
    """

    def __init__(self, inputs: VLMInputs, codec: ActionText, options: Decoding) -> None:
        self.inputs = inputs
        self.codec = codec
        self.options = options
        self.prefix = PrefixCache()
        #: How this model is decoded: "prefix cache", "loop" or "generate"; None before the first answer.
        self.way: str | None = None
        self._stops: list[int] = []
        self._grammar: AnswerGrammar | None = None
        self._answer_length = inputs.answer_length(codec)
        if options.constrained:
            self._grammar = AnswerGrammar(inputs.tokenizer, codec)
            self._answer_length = self._grammar.longest

    def answers(
        self, model: Any, frames: Tensor, device: torch.device | None = None, weights: Hashable = None
    ) -> list[str]:
        """The VLM's words.

        On the CPU parts of the batch go on side by side, each in a thread of its own: most operations on a batch are
        too short for PyTorch to share one out among cores.

        Args:
            model: the VLM, with or without an adapter.
            frames: (B, 3, H, W) uint8.
            device: where the model is; the CPU by default.
            weights: names the state of the weights; another name rebuilds the prefix cache.
        """
        device = device or torch.device("cpu")
        if self.way is None:
            self.way = self._fastest_way(model, frames, device)
            self._stops = self._stop_ids(model)
        cores = torch.get_num_threads() if device.type == "cpu" and self.way != "generate" else 1
        threads = max(1, min(cores, len(frames) // FRAMES_PER_THREAD))
        if threads == 1:
            return self._answers(model, frames, device, weights)
        parts = frames.tensor_split(threads)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            answers = pool.map(lambda part: self._answers(model, part, device, weights), parts)
            return [answer for part in answers for answer in part]

    @torch.inference_mode()
    def _answers(self, model: Any, frames: Tensor, device: torch.device, weights: Hashable) -> list[str]:
        batch = {name: value.to(device) for name, value in self.inputs.prompt_batch(frames).items()}
        if self._grammar is not None:
            batch = self.inputs.with_tokens(batch, self._grammar.opening_ids)
        temperature, top_p, seed = self.options.temperature, self.options.top_p, self.options.seed
        pick = Picker(frames, self._answer_length, self._stops, self._grammar, temperature, top_p, seed, device)
        if self.way == "generate":
            tokens = self._generate(model, batch, pick)
        else:
            prefix = self.prefix if self.way == "prefix cache" else None
            tokens = decode_loop(model, batch, pick, prefix, weights)
        return self._texts(tokens)

    def _generate(self, model: Any, batch: dict[str, Tensor], pick: Picker) -> Tensor:
        def only_picked(_: Tensor, scores: Tensor) -> Tensor:
            # `generate` then takes the pick, whatever way it was found.
            return torch.full_like(scores, -torch.inf).scatter_(1, pick(scores)[:, None], 0.0)

        limit = {"max_new_tokens": pick.steps, "do_sample": False, "num_beams": 1}
        tokens = model.generate(**batch, logits_processor=[only_picked], **limit)
        return tokens[:, batch["input_ids"].shape[1] :]

    def _texts(self, tokens: Tensor) -> list[str]:
        if self._grammar is not None:
            texts = self._grammar.texts  # decoded one by one, as the grammar saw them; "" for the end token
            answers = [self._grammar.opening_text + "".join(texts[token] for token in row) for row in tokens.tolist()]
        else:
            answers = self.inputs.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return ["".join(answer.partition(CLOSING)[:2]) for answer in answers]

    def _stop_ids(self, model: Any) -> list[int]:
        """Ids of the tokens that end an answer, the tokenizer's end token first."""
        tokenizer, named = self.inputs.tokenizer, base_model(model).generation_config.eos_token_id
        special = set(tokenizer.all_special_ids)
        closing = [i for piece, i in tokenizer.get_vocab().items() if CLOSING in piece and i not in special]
        ends = named if isinstance(named, list) else [named]
        return [tokenizer.eos_token_id, *(i for i in ends if i is not None), *closing]

    @torch.inference_mode()
    def _fastest_way(self, model: Any, frames: Tensor, device: torch.device) -> str:
        extra = set(base_model(model).generation_config.to_diff_dict()) - _PLAIN_SETTINGS
        if extra:
            log.warning(
                "Answers are decoded by the library's generate, without prefix cache: generation_config sets %s",
                ", ".join(sorted(extra)),
            )
            return "generate"
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(0, 256, (2, *frames.shape[1:]), dtype=torch.uint8, generator=generator)
        batch = {name: value.to(device) for name, value in self.inputs.prompt_batch(probe).items()}
        limit = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
        output = model.generate(**batch, **limit, output_logits=True, return_dict_in_generate=True)
        expected, said = torch.stack(output.logits, 1).float(), output.sequences[:, batch["input_ids"].shape[1] :]
        tolerance = max(_TOLERANCE, _TOLERANCE_IN_EPS * torch.finfo(base_model(model).dtype).eps)
        ways: dict[str, PrefixCache | None] = {"prefix cache": PrefixCache(), "loop": None}
        if not self.options.prefix_cache:
            del ways["prefix cache"]
        for way, prefix in ways.items():
            replay = Replay(said)
            try:
                decode_loop(model, batch, replay, prefix)
            except torch.OutOfMemoryError:
                raise
            except _UNSUPPORTED as unsupported:
                reason = f"{type(unsupported).__name__}: {unsupported}"
            else:
                error = (torch.stack(replay.logits, 1) - expected).norm() / (expected - expected.mean()).norm()
                if error <= tolerance:
                    return way
                reason = f"its logits are off by {error:.1e} of their spread"
            log.warning("%s does not allow decoding by %r (%s)", type(base_model(model)).__name__, way, reason)
        return "generate"
