"""The answer format over characters and over the tokens of three kinds of tokenizers."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.embedded.model import build_tokenizer
from covr_lightning.vlm.embedded.questions import training_corpus
from covr_lightning.vlm.embedded.scenes import embedded_scenes
from covr_lightning.vlm.grammar import (
    AnswerGrammar,
    answer_regex,
    answer_transitions,
    longest_answer,
    most_integer_digits,
    token_texts,
)
from tests.vlm.tiny_models import llava_tokenizer, qwen_tokenizer

SIZES = (1, 2, 6, 12)
NUMBER = r"-?[0-9](\.[0-9]{1,2})?"
KINDS = ("embedded", "byte level", "characters")


@cache
def tokenizer(kind: str) -> Any:
    if kind == "embedded":
        return build_tokenizer(training_corpus(embedded_scenes()))
    return qwen_tokenizer() if kind == "byte level" else llava_tokenizer()


def unit_codec(size: int) -> ActionText:
    return ActionText([-1.0] * size, [1.0] * size)


def answer_pattern(size: int, number: str = NUMBER) -> re.Pattern[str]:
    return re.compile(r"action:\[" + ", ".join([number] * size) + r"\]")


def is_beginning(text: str, size: int) -> bool:
    """Whether an answer begins so, found by completing it."""
    pattern = answer_pattern(size)
    if "action:[".startswith(text) or pattern.fullmatch(text):
        return True
    rest = ", 0" * (size - text.count(",") - 1) + "]"
    return any(pattern.fullmatch(text + tail + rest) for tail in ("", "0", " 0"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("integer_digits", [1, 3])
def test_the_regular_expression_accepts_what_the_automaton_does(size: int, integer_digits: int) -> None:
    transitions, pattern = answer_transitions(size, integer_digits), re.compile(answer_regex(size, integer_digits))
    rng = np.random.default_rng(size)
    lengths = set()
    for _ in range(300):
        state, text = 0, ""
        while transitions[state]:
            text += rng.choice(sorted(transitions[state]))
            state = transitions[state][text[-1]]
        assert pattern.fullmatch(text)
        lengths.add(len(text))
        spot = rng.integers(len(text))
        broken = text[:spot] + rng.choice(list("-.0, ]x")) + text[spot + rng.integers(2) :]
        state = 0
        for character in broken:
            state = transitions[state].get(character, -1) if state >= 0 else -1
        assert bool(pattern.fullmatch(broken)) == (state == len(transitions) - 1)
    assert max(lengths) <= longest_answer(size, integer_digits)
    longest = ", ".join(["-" + "8" * integer_digits + ".88"] * size)
    assert len(f"action:[{longest}]") == longest_answer(size, integer_digits)
    assert pattern.fullmatch(f"action:[{longest}]")


def test_digits_before_the_dot_follow_the_bounds() -> None:
    assert [most_integer_digits(ActionText(-x, x)) for x in (0.5, 1.0, 9.99, 10.0, 123.4)] == [1, 1, 1, 2, 3]
    assert most_integer_digits(ActionText([-1.0, -25.0], [1.0, 3.0])) == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("integer_digits", [1, 3])
def test_characters_lead_to_answers_and_nowhere_else(size: int, integer_digits: int) -> None:
    transitions = answer_transitions(size, integer_digits)
    pattern = answer_pattern(size, rf"-?[0-9]{{1,{integer_digits}}}(\.[0-9]{{1,2}})?")
    codec = unit_codec(size)
    rng = np.random.default_rng(size)
    for _ in range(200):
        state, text = 0, ""
        while transitions[state]:
            text += rng.choice(sorted(transitions[state]))
            state = transitions[state][text[-1]]
        assert state == len(transitions) - 1
        assert pattern.fullmatch(text)
        assert codec.decode(text)[1]
        # One character exchanged, dropped or doubled: accepted exactly if the pattern takes it.
        place = int(rng.integers(len(text)))
        for wrong in ("-", "0", "", text[place] * 2, ","):
            changed = text[:place] + wrong + text[place + 1 :]
            state = 0
            for character in changed:
                state = transitions[state].get(character, -1) if state >= 0 else -1
            assert (state == len(transitions) - 1) == bool(pattern.fullmatch(changed)), changed


@pytest.mark.parametrize("kind", KINDS)
def test_token_texts_add_up_to_the_text(kind: str) -> None:
    texts = token_texts(tokenizer(kind))
    for text in ("action:[0.02, -0.98]", "Reach it , now.", "- - --0"):
        assert "".join(texts[i] for i in tokenizer(kind)(text, add_special_tokens=False)["input_ids"]).strip() == text
    assert all(texts[i] == "" for i in tokenizer(kind).all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_those_found_by_completing_the_text(kind: str, size: int) -> None:
    grammar = AnswerGrammar(tokenizer(kind), unit_codec(size))
    rng = np.random.default_rng(size)
    for _ in range(3):
        state, text = grammar.start, grammar.opening_text
        while state != grammar.end:
            allowed = {int(grammar.tokens[c]) for c in (grammar.next_state[state] >= 0).nonzero()}
            possible = {i for i, piece in enumerate(grammar.texts) if piece and is_beginning(text + piece, size)}
            assert allowed <= possible
            for left_out in possible - allowed:
                # Another token has the same text, begins it, or holds it and what must follow.
                piece = grammar.texts[left_out]
                others = [grammar.texts[i] for i in allowed]
                assert any(other.startswith(piece) or piece.startswith(other) for other in others), (text, piece)
            forced = int(grammar.forced[state])
            assert (forced >= 0) == (len(allowed) == 1)
            column = int(rng.choice((grammar.next_state[state] >= 0).nonzero().squeeze(-1).numpy()))
            text += grammar.texts[int(grammar.tokens[column])]
            state = int(grammar.next_state[state, column])
        assert answer_pattern(size).fullmatch(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_what_the_tokenizer_writes_is_allowed(kind: str, size: int) -> None:
    grammar, codec = AnswerGrammar(tokenizer(kind), unit_codec(size)), unit_codec(size)
    actions = torch.rand(50, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for action in (*actions, torch.ones(size), -torch.ones(size), torch.zeros(size)):
        ids = tokenizer(kind)(codec.encode(action), add_special_tokens=False)["input_ids"]
        assert ids[: len(grammar.opening_ids)] == grammar.opening_ids
        state, rest = grammar.start, ids[len(grammar.opening_ids) :]
        for token in rest:
            state = int(grammar.next_state[state, grammar.tokens.tolist().index(token)])
            assert state >= 0
        assert state == grammar.end
        assert len(rest) <= grammar.longest


def test_the_embedded_vlm_chooses_nothing_but_values() -> None:
    grammar = AnswerGrammar(tokenizer("embedded"), unit_codec(2))
    assert grammar.opening_text == "action:["
    columns = {grammar.texts[int(token)]: i for i, token in enumerate(grammar.tokens)}
    after_first = int(grammar.next_state[grammar.start, columns["-0.98"]])
    assert int(grammar.forced[after_first]) == columns[", "]
    second = int(grammar.next_state[after_first, columns[", "]])
    assert int(grammar.forced[second]) == -1
    after_second = int(grammar.next_state[second, columns["0.02"]])
    assert int(grammar.forced[after_second]) == columns["]"]


def test_bounds_decide_on_digits_and_opening() -> None:
    # All answers begin with "action:[0."; only the part before the number is forced from the start.
    small = AnswerGrammar(tokenizer("characters"), ActionText([0.1], [0.4]))
    assert small.opening_text == "action:["
    wide = AnswerGrammar(tokenizer("characters"), ActionText([-150.0], [20.0]))
    columns = {wide.texts[int(token)]: i for i, token in enumerate(wide.tokens)}
    state = wide.start
    for character in "-150.25]":
        state = int(wide.next_state[state, columns[character]])
    assert state == wide.end


def test_a_minus_sign_that_joins_the_bracket_stays_possible() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("action:[]-.,0123456789") | {"\u0120"})
    vocab = {text: i for i, text in enumerate([*characters, ":[", "[-", ":[-"])}
    bpe = Tokenizer(models.BPE(vocab, [(":", "["), (":[", "-")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    joined = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    grammar = AnswerGrammar(joined, unit_codec(1))
    assert grammar.opening_text == "action"
    allowed = {grammar.texts[int(grammar.tokens[c])] for c in (grammar.next_state[grammar.start] >= 0).nonzero()}
    assert allowed == {":[", ":[-"}


def test_a_tokenizer_without_digits_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "action:[": 2, "]": 3}, unk_token="<unk>"))
    with pytest.raises(ConfigError, match=r"vlm\.decoding\.constrained is true.*cannot write"):
        AnswerGrammar(
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>"), unit_codec(1)
        )
