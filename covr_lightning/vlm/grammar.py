"""The answer format as an automaton over a tokenizer's tokens, so that decoding can keep to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import DECIMALS, ActionText

OPENING = "action:["
SEPARATOR = ", "
CLOSING = "]"
_DIGITS = "0123456789"


def answer_transitions(size: int, integer_digits: int = 1) -> list[dict[str, int]]:
    """The format as a deterministic automaton over characters.

    It accepts `action:[` number (`, ` number)* `]` with exactly `size` numbers, a number being an optional sign, 1 to
    `integer_digits` digits and, if it goes on, a dot and 1 to 2 decimals. Every path ends: there is no loop.

    Args:
        size: number of values A, at least 1.
        integer_digits: most digits before the dot.

    Returns:
        Per state the next state of each character that may follow. State 0 is the start and the last state, which
        has no followers, the end.
    """
    states: list[dict[str, int]] = [{}]

    def follow(sources: Sequence[int], characters: str) -> int:
        states.append({})
        for source in sources:
            states[source].update(dict.fromkeys(characters, len(states) - 1))
        return len(states) - 1

    ends = [0]
    for index in range(size):
        for character in SEPARATOR if index else OPENING:
            ends = [follow(ends, character)]
        integer = [follow([*ends, follow(ends, "-")], _DIGITS)]
        for _ in range(integer_digits - 1):
            integer.append(follow(integer[-1:], _DIGITS))
        decimals = [follow([follow(integer, ".")], _DIGITS)]
        for _ in range(DECIMALS - 1):
            decimals.append(follow(decimals[-1:], _DIGITS))
        ends = [*integer, *decimals]
    follow(ends, CLOSING)
    return states


def answer_regex(size: int, integer_digits: int = 1) -> str:
    r"""The format of :func:`answer_transitions` as a regular expression.

    It is of plain characters, groups, `?` and `{m,n}` only, which every engine of structured outputs reads alike.

    Args:
        size: number of values A, at least 1.
        integer_digits: most digits before the dot.

    Returns:
        E.g. `action:\[-?[0-9]{1,1}(\.[0-9]{1,2})?\]` for one value.
    """
    number = rf"-?[0-9]{{1,{integer_digits}}}(\.[0-9]{{1,{DECIMALS}}})?"
    return re.escape(OPENING) + SEPARATOR.join([number] * size) + re.escape(CLOSING)


def longest_answer(size: int, integer_digits: int = 1) -> int:
    """Characters of the format's longest answer, and so the most tokens that one can take."""
    return len(OPENING) + size * (integer_digits + DECIMALS + 2) + len(SEPARATOR) * (size - 1) + len(CLOSING)


def most_integer_digits(codec: ActionText) -> int:
    """Digits before the dot that values within the bounds need."""
    return len(str(int(torch.maximum(codec.low.abs(), codec.high.abs()).max().item())))


def token_texts(tokenizer: Any) -> list[str]:
    """What each token id adds to a text.

    Each token is decoded behind a letter, because some tokenizers (SentencePiece) drop the space that a text begins
    with. Special tokens and tokens that are no whole characters come out as texts that no grammar of plain characters
    accepts: an empty one, or one with the replacement character.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode([anchor], **options)
    texts = tokenizer.batch_decode([[anchor, token] for token in range(len(tokenizer))], **options)
    special = set(tokenizer.all_special_ids)
    return [
        text[len(head) :] if token not in special and text.startswith(head) else "" for token, text in enumerate(texts)
    ]


class AnswerGrammar:
    """The answer format lifted from characters to tokens.

    A token may follow in a state if its characters lead through the automaton, and the rest of the answer can still
    be written from where they lead. Where a text can be cut into tokens in several ways, those that the tokenizer does
    not take are left out if they begin like one that it takes (`,` and a space, or `, 1`, where it writes `, `), so
    that more of an answer is forced.

    Forced at once is what all answers' tokens begin with: `action:[`, or less of it for a tokenizer that joins its end
    with a minus sign (`:[-`). The rest of the opening is up to the mask, so negative numbers keep the tokens that they
    have in training.

    Args:
        tokenizer: a Hugging Face tokenizer.
        codec: the format, with the number of values and their bounds.

    Raises:
        ConfigError: the tokenizer has no tokens for the format.

    Attributes:
        opening_ids: tokens that every answer begins with.
        opening_text: their text.
        start: the state behind them.
        end: the state of a complete answer.
        tokens: (N,) ids of all tokens that may follow anywhere, in ascending order.
        next_state: (S, N) where each leads; -1 where it may not follow.
        forced: (S,) the only token that may follow, as an index into `tokens`; -1 where there are several or none.
        longest: most tokens that an answer can take behind the opening.
    """

    def __init__(self, tokenizer: Any, codec: ActionText) -> None:
        integer_digits = most_integer_digits(codec)
        transitions = answer_transitions(codec.size, integer_digits)
        self.texts = token_texts(tokenizer)
        self.end = len(transitions) - 1
        written = _written_answers(tokenizer, codec)
        self._open(written, transitions)
        ids, paths = _walk(transitions, self.texts)
        next_state = _only_live(paths, self.end)
        if not (next_state[self.start] >= 0).any():
            raise ConfigError(
                f"vlm.decoding.constrained is true, but the VLM's tokenizer cannot write {OPENING}0.02{CLOSING!r}: it "
                "lacks tokens for some of these characters. Valid choices are false or another vlm.path."
            )
        taken = _taken(next_state, self.start, [answer[len(self.opening_ids) :] for answer in written], ids)
        next_state = _only_taken(next_state, [self.texts[i] for i in ids], taken, transitions)
        self.tokens = torch.from_numpy(ids)
        self.next_state = torch.from_numpy(next_state)
        counts = (next_state >= 0).sum(1)
        self.forced = torch.from_numpy(np.where(counts == 1, (next_state >= 0).argmax(1), -1))
        self.longest = longest_answer(codec.size, integer_digits)

    def to(self, device: torch.device) -> AnswerGrammar:
        """Move the tables."""
        if self.tokens.device != device:
            self.tokens, self.next_state = self.tokens.to(device), self.next_state.to(device)
            self.forced = self.forced.to(device)
        return self

    def _open(self, written: list[list[int]], transitions: list[dict[str, int]]) -> None:
        self.opening_ids: list[int] = []
        self.opening_text = ""
        for column in zip(*written, strict=False):
            text = (self.opening_text + self.texts[column[0]]).lstrip()
            if len(set(column)) > 1 or not OPENING.startswith(text):
                break
            self.opening_ids.append(column[0])
            self.opening_text = text
        self.start = 0
        for character in self.opening_text:
            self.start = transitions[self.start][character]


def _written_answers(tokenizer: Any, codec: ActionText) -> list[list[int]]:
    """How the tokenizer itself writes answers all over the bounds, with equal and with opposite signs in a row."""
    count = min(2001, 1 + round((codec.high - codec.low).max().item() * 10**DECIMALS))
    steps = torch.linspace(0.0, 1.0, count)[:, None].expand(-1, codec.size)
    turned = torch.where(torch.arange(codec.size) % 2 == 0, steps, 1 - steps)
    actions = codec.low + torch.cat([steps, turned]) * (codec.high - codec.low)
    return [tokenizer(codec.encode(action), add_special_tokens=False)["input_ids"] for action in actions]


def _walk(transitions: list[dict[str, int]], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) of tokens of the grammar's characters, and where each leads from each state (S, N), -1 for nowhere."""
    alphabet = sorted({character for followers in transitions for character in followers})
    # Of tokens with one text the last is the tokenizer's own: SentencePiece's byte tokens come first.
    ids = sorted({text: i for i, text in enumerate(texts) if text and set(text) <= set(alphabet)}.values())
    stay, nowhere = len(alphabet), len(transitions)  # the last column pads short tokens, the last row absorbs
    table = np.full((nowhere + 1, stay + 1), nowhere)
    table[:, stay] = np.arange(nowhere + 1)
    for state, followers in enumerate(transitions):
        for character, target in followers.items():
            table[state, alphabet.index(character)] = target
    characters = np.full((len(ids), max((len(texts[i]) for i in ids), default=0)), stay)
    for row, i in enumerate(ids):
        characters[row, : len(texts[i])] = [alphabet.index(character) for character in texts[i]]
    paths = np.broadcast_to(np.arange(nowhere)[:, None], (nowhere, len(ids)))
    for column in characters.T:
        paths = table[paths, column]
    return np.asarray(ids, dtype=np.int64), np.where(paths == nowhere, -1, paths)


def _only_live(next_state: np.ndarray, end: int) -> np.ndarray:
    """Without tokens that lead where the answer cannot be finished. States are in the order of the text."""
    live = np.zeros(end + 2, dtype=bool)  # the last entry stands for index -1
    live[end] = True
    for state in reversed(range(end)):
        live[state] = live[next_state[state]].any()
    return np.where(live[next_state], next_state, -1)


def _taken(next_state: np.ndarray, start: int, answers: list[list[int]], ids: np.ndarray) -> np.ndarray:
    """Which tokens (S, N) follow in each state when the tokenizer writes answers, given behind the opening."""
    taken = np.zeros(next_state.shape, dtype=bool)
    columns = {int(token): column for column, token in enumerate(ids)}
    for answer in answers:
        state = start
        for token in answer:
            column = columns.get(token)
            if column is None or next_state[state, column] < 0:
                break
            taken[state, column] = True
            state = next_state[state, column]
    return taken


def _only_taken(
    next_state: np.ndarray, texts: list[str], taken: np.ndarray, transitions: list[dict[str, int]]
) -> np.ndarray:
    """Without tokens not taken by the tokenizer that begin with one it takes, or that a longer one completes.

    Longer ones count if all the text that they have more is forced.
    """
    kept = next_state.copy()
    by_text = {text: column for column, text in enumerate(texts)}
    for state, row in enumerate(next_state):
        own = {texts[column] for column in taken[state].nonzero()[0]}
        for column in ((row >= 0) & ~taken[state]).nonzero()[0]:
            text, reached = texts[column], int(row[column])
            drop = any(text[:length] in own for length in range(1, len(text)))
            while not drop and len(transitions[reached]) == 1:
                ((character, reached),) = transitions[reached].items()
                text += character
                drop = text in by_text and row[by_text[text]] >= 0
            if drop:
                kept[state, column] = -1
    return kept
