"""Questions that the embedded VLM is trained on, in the same skeleton as the task prompts.

Two kinds: questions about named readings of a scene, with the simulator's values as the answer; and questions about
made-up names, which teach only the form of the answer (how many numbers, where it ends) and never a value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from covr_lightning.vlm.action_text import answer_format
from covr_lightning.vlm.driving_prompts import DRIVING_PROMPTS
from covr_lightning.vlm.embedded.scenes import Scene
from covr_lightning.vlm.prompts import Prompt, dmc_tasks, prompt_for, user_text

MAX_READINGS = 8
MAX_MADE_UP_NAMES = 12
COMMON_MADE_UP_NAMES = 6
FORM_MADE_UP_NAMES = 6
MADE_UP_SHARE = 0.15
ALL_READINGS_SHARE = 0.5
FORM_MADE_UP_SHARE = 0.5
FORM_SINGLE_SHARE = 0.2
FORM_COMMA_SHARE = 0.15
FILLER_SHARE = 0.4
LONG_SYSTEM = 100
READING_SYSTEM = "You read values off one picture."
INSTRUCTIONS = ("Read these values.", "Read off the picture.", "Give the values by name.", "What are the values?")


Style = Literal["short", "full", "form"]


@dataclass(frozen=True)
class Question:
    """One prompt and the columns of the scene's readings that it asks for.

    Attributes:
        prompt: system and user turn; its names are those asked for.
        columns: indices into the scene's readings, in the order asked; empty for made-up names.
    """

    prompt: Prompt
    columns: tuple[int, ...]


def training_corpus(scenes: dict[str, Scene]) -> list[str]:
    """All texts whose words the tokenizer shall hold as single tokens."""
    prompts = [prompt_for(task) for task in (*dmc_tasks(), *DRIVING_PROMPTS)]
    texts = [text for prompt in prompts for text in (prompt.system, prompt.user)]
    for scene in scenes.values():
        texts.append(user_text(scene.caption, " ".join(INSTRUCTIONS), tuple(scene.readings)))
    return [*texts, READING_SYSTEM]


@dataclass(frozen=True)
class Words:
    """Building blocks of filler text and made-up names; no reading's name is among them.

    Attributes:
        in_sentence: words that are one token behind a space.
        in_name: words and word parts that are one token at the start of a name.
    """

    in_sentence: tuple[str, ...]
    in_name: tuple[str, ...]


def vocabulary_words(tokenizer: Any, scenes: Sequence[Scene]) -> Words:
    """Collects the lower-case words of the tokenizer, sorted."""
    names = {name for scene in scenes for name in scene.readings}
    texts = {tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()}
    in_sentence = {text[1:] for text in texts if re.fullmatch(r" [a-z_]{3,}", text)} - names
    in_name = {text for text in texts if re.fullmatch(r"[a-z_]{3,}", text)} - names
    return Words(tuple(sorted(in_sentence)), tuple(sorted(in_name)))


def reading_question(scene: Scene, columns: Sequence[int], instruction: str = INSTRUCTIONS[0]) -> Question:
    """Asks for some of a scene's readings by name."""
    names = list(scene.readings)
    asked = tuple(names[column] for column in columns)
    return Question(Prompt(READING_SYSTEM, user_text(scene.caption, instruction, asked), asked), tuple(columns))


def random_question(scene: Scene, words: Words, rng: Generator, style: Style) -> Question:
    """Draws a question: mostly a random subset and order of the readings, at times made-up names.

    Args:
        scene: whose caption and readings are used.
        words: from `vocabulary_words`, for filler sentences and made-up names.
        rng: the only source of chance.
        style: "short" shows nothing but the answer format, for cheap first lessons; "full" shows the skeleton of
            the task prompts, at times with filler in place of an instruction; "form" does so with commas in the
            filler, more made-up names and more questions for a single value.
    """
    form = style == "form"
    made_up = rng.random() < (FORM_MADE_UP_SHARE if form else MADE_UP_SHARE)
    if made_up:
        columns: tuple[int, ...] = ()
        names = tuple(_made_up_name(words, rng) for _ in range(_made_up_count(rng, form)))
    else:
        total = min(MAX_READINGS, len(scene.readings))
        count = total if rng.random() < ALL_READINGS_SHARE else int(rng.integers(1, total + 1))
        if form and rng.random() < FORM_SINGLE_SHARE:
            count = 1
        columns = tuple(int(i) for i in rng.permutation(len(scene.readings))[:count])
        names = tuple(np.array(list(scene.readings))[list(columns)])
    if style == "short":
        return Question(Prompt("", answer_format(names), names), columns)
    if made_up or rng.random() < FILLER_SHARE:
        filler = _draw(words.in_sentence, int(rng.integers(4, 22)), " ", rng)
        if form:
            filler = "".join(", " if sign == " " and rng.random() < FORM_COMMA_SHARE else sign for sign in filler)
        instruction = filler.capitalize() + "."
    else:
        instruction = INSTRUCTIONS[int(rng.integers(len(INSTRUCTIONS)))]
    # A long system text costs as much as several questions: it is met in the last lesson only.
    system = (scene.system, READING_SYSTEM)[int(rng.integers(2))]
    if len(system) > LONG_SYSTEM and not form:
        system = READING_SYSTEM
    return Question(Prompt(system, user_text(scene.caption, instruction, names), names), columns)


def _made_up_count(rng: Generator, form: bool) -> int:
    if form and rng.random() < FORM_SINGLE_SHARE:
        return 1
    if form:
        return int(rng.integers(1, FORM_MADE_UP_NAMES + 1))
    return int(rng.integers(1, (MAX_MADE_UP_NAMES if rng.random() < 0.2 else COMMON_MADE_UP_NAMES) + 1))


def _made_up_name(words: Words, rng: Generator) -> str:
    return _draw(words.in_name, 1 if rng.random() < 0.85 else 2, "_", rng)


def _draw(words: Sequence[str], count: int, separator: str, rng: Generator) -> str:
    return separator.join(words[i] for i in rng.integers(len(words), size=count))
