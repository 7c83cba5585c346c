"""Chooses each row's next token: the likeliest or a sampled one, of all tokens or of those that a grammar allows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from covr_lightning.vlm.grammar import AnswerGrammar


class Pick(Protocol):
    """What a decoding loop asks for tokens."""

    @property
    def finished(self) -> bool:
        """Whether no row needs another token."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Each row's next token (B,), of logits (B, V) float32."""

    def forced(self) -> Tensor | None:
        """Each row's next token (B,) if no row has a choice, which counts as picked; None otherwise."""


class Picker:
    """One batch's choices.

    Args:
        temperature: 0 takes the likeliest token; above, tokens are sampled from the softmax of logits / temperature.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        seed: of the numbers to sample with, with the frames.
        frames: (B, ...) uint8.
        steps: most tokens per row.
        stops: ids that end a row; rows that have ended get the first.
        grammar: which tokens may follow; by default all. Its end ends a row, and no other token does.
    """

    def __init__(
        self,
        frames: Tensor,
        steps: int,
        stops: Sequence[int],
        grammar: AnswerGrammar | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.steps = steps
        self.temperature = temperature
        self.top_p = top_p
        self.grammar = None if grammar is None else grammar.to(torch.device(device))
        self._stops = torch.tensor(stops, device=device)
        self._step = 0
        self._done = torch.zeros(len(frames), dtype=torch.bool, device=device)
        if grammar is not None:
            self._states = torch.full((len(frames),), grammar.start, device=device)
        if temperature:
            self._uniforms = frame_uniforms(frames, steps, seed).to(device)

    @property
    def finished(self) -> bool:
        """Whether every row has ended or is as long as it may be."""
        return self._step >= self.steps or bool(self._done.all())

    def __call__(self, logits: Tensor) -> Tensor:
        """Each row's next token (B,), of logits (B, V)."""
        if self.grammar is None:
            return self._advance(self._choose(logits))
        allowed = self.grammar.next_state[self._states] >= 0
        scores = logits[:, self.grammar.tokens].masked_fill(~(allowed | self._done[:, None]), -torch.inf)
        return self._advance_along(self._choose(scores))

    def forced(self) -> Tensor | None:
        """Each row's next token (B,) if the grammar leaves no row a choice; None otherwise."""
        if self.grammar is None:
            return None
        columns = self.grammar.forced[self._states]
        if bool(((columns < 0) & ~self._done).any()):
            return None
        return self._advance_along(columns)

    def _choose(self, scores: Tensor) -> Tensor:
        if not self.temperature:
            return scores.argmax(-1)
        return sample(scores / self.temperature, self.top_p, self._uniforms[:, self._step])

    def _advance_along(self, columns: Tensor) -> Tensor:
        assert self.grammar is not None, "only a grammar has columns"
        tokens = self.grammar.tokens[columns]
        states = self.grammar.next_state[self._states, columns]
        tokens = torch.where(self._done, self._stops[0], tokens)
        self._states = torch.where(self._done, self._states, states)
        self._done = self._states == self.grammar.end
        self._step += 1
        return tokens

    def _advance(self, tokens: Tensor) -> Tensor:
        tokens = torch.where(self._done, self._stops[0], tokens)
        self._done = self._done | torch.isin(tokens, self._stops)
        self._step += 1
        return tokens


class Replay:
    """Picks given tokens and keeps the logits it was shown.

    Args:
        tokens: (B, T).
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    @property
    def finished(self) -> bool:
        """Whether all tokens were given."""
        return len(self.logits) >= self.tokens.shape[1]

    def __call__(self, logits: Tensor) -> Tensor:
        """The given token (B,)."""
        self.logits.append(logits)
        return self.tokens[:, len(self.logits) - 1]

    def forced(self) -> Tensor | None:
        """Nothing: each token's logits are wanted."""
        return None


def sample(logits: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Tokens (B,) from the softmax of logits, by inversion.

    The tokens are laid out from the likeliest on, each as wide as its probability, and cut behind the one that reaches
    `top_p`; the token at uniform × width is taken.

    Args:
        logits: (B, N).
        top_p: in (0, 1].
        uniforms: (B,) in [0, 1).
    """
    probabilities, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    ends = probabilities.cumsum(-1)
    last = (ends < top_p).sum(-1, keepdim=True)
    possible = (probabilities > 0).sum(-1, keepdim=True) - 1
    last = torch.minimum(last, possible)
    width = ends.gather(-1, last)
    place = torch.searchsorted(ends, uniforms[:, None].to(ends) * width, right=True)
    return order.gather(-1, torch.minimum(place, last)).squeeze(-1)


def frame_uniforms(frames: Tensor, steps: int, seed: int) -> Tensor:
    """Numbers in [0, 1) to sample with, (B, steps): the same for the same frame and seed in any batch.

    Args:
        frames: (B, ...) uint8.
        steps: numbers per frame.
        seed: another one gives other numbers.
    """
    rows = []
    for frame in frames.cpu():
        generator = torch.Generator().manual_seed(frame_seed(frame, seed))
        rows.append(torch.rand(steps, generator=generator))
    return torch.stack(rows)


def frame_seed(frame: Tensor, seed: int) -> int:
    """A seed of 32 bits for one frame (...) uint8 on the CPU: the same for the same frame and seed."""
    return zlib.crc32(frame.numpy().tobytes(), seed & 0xFFFFFFFF)
