"""Second step of the recipe: the language side learns to answer from the frozen tower's tokens.

With plain token targets the routing from a name through the picture to a value does not form in the time given. Three
things make it form: soft targets (a Gaussian over neighbouring values); an auxiliary regression head at the position
in front of each value; and one at each *name* in the prompt, read half-way up the layers. The last one splits the
task in two: the lower layers read the picture where the name stands, the upper ones copy from there into the answer.
Both heads are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.embedded.frames import Frames
from covr_lightning.vlm.embedded.model import IMAGE_TOKENS, TEXT_WIDTH, VALUE_COUNT, value_texts
from covr_lightning.vlm.embedded.questions import Question, Style, random_question, vocabulary_words
from covr_lightning.vlm.embedded.scenes import Scene
from covr_lightning.vlm.embedded.shards import SHARDS, sharded
from covr_lightning.vlm.embedded.vision import cosine_rate, image_tokens
from covr_lightning.vlm.inputs import chat_messages

AUXILIARY_WEIGHT = 5.0
AUXILIARY_BETA = 0.1
TARGET_SPREAD_BINS = 3.0
NAME_LAYER = 2


@dataclass(frozen=True)
class LanguageBatch:
    """Token rows of questions with their answers, padded on the right.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 1 at tokens.
        is_answer: (B, T) bool, True at the answer's tokens and its end token.
        is_name: (B, T) bool, True at the names of known readings in the prompt.
        values: (V,) the true reading at each value token in row-major order; NaN for made-up names.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_answer: Tensor
    is_name: Tensor
    values: Tensor


class LanguageTask(nn.Module):
    """The language side's training loss with its two auxiliary regression heads.

    Args:
        model: the embedded VLM.
        processor: its processor.
        scenes: what may be asked.
        seed: seeds the auxiliary heads.
        auxiliary_weight: weight of the two heads' losses beside the token loss.

    Raises:
        ValueError: if a value or a reading's name is not one token.
    """

    def __init__(
        self, model: Any, processor: Any, scenes: Sequence[Scene], seed: int, auxiliary_weight: float = AUXILIARY_WEIGHT
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.scenes = tuple(scenes)
        self.auxiliary_weight = auxiliary_weight
        tokenizer = processor.tokenizer
        ids = tokenizer.convert_tokens_to_ids(value_texts())
        if ids != list(range(ids[0], ids[0] + VALUE_COUNT)):
            raise ValueError("value tokens must have consecutive ids")
        self.first_value_id = ids[0]
        names = sorted({name for scene in scenes for name in scene.readings})
        rows = tokenizer([f"action:[{name}]" for name in names])["input_ids"]
        self.name_ids = torch.tensor([row[1] for row in rows])
        if [tokenizer.decode(name_id) for name_id in self.name_ids] != names:
            raise ValueError("every reading's name must be one token")
        self.assistant_id = tokenizer.convert_tokens_to_ids("<assistant>")
        self.image_id = tokenizer.convert_tokens_to_ids("<image>")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.auxiliary = nn.Linear(TEXT_WIDTH, 1)
            self.name_auxiliary = nn.Sequential(nn.LayerNorm(TEXT_WIDTH), nn.Linear(TEXT_WIDTH, 1))
        bins = torch.arange(float(VALUE_COUNT))
        distances = (bins[:, None] - bins[None]) ** 2
        soft_targets = torch.softmax(-distances / (2 * TARGET_SPREAD_BINS**2), dim=-1)
        self.soft_targets = soft_targets

    def batch(
        self, questions: Sequence[Question], readings: Sequence[np.ndarray], rng: np.random.Generator
    ) -> LanguageBatch:
        """Writes questions and true answers as token rows.

        Args:
            questions: B questions.
            readings: B arrays (R,) of the frame's readings.
            rng: draws the placeholder numbers that stand in answers to made-up names (they carry no loss).
        """
        texts, values = [], []
        for question, row in zip(questions, readings, strict=True):
            size = question.prompt.action_size
            known = bool(question.columns)
            answer = row[list(question.columns)] if known else rng.uniform(-1.0, 1.0, size)
            text = self.processor.apply_chat_template(chat_messages(question.prompt), add_generation_prompt=True)
            texts.append(text + ActionText([-1.0] * size, [1.0] * size).encode(answer))
            values.append(answer if known else np.full(size, np.nan))
        tokenizer = self.processor.tokenizer
        image = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
        rows = [
            torch.tensor(ids)
            for ids in tokenizer([t.replace("<image>", image) + tokenizer.eos_token for t in texts])["input_ids"]
        ]
        input_ids = nn.utils.rnn.pad_sequence(rows, True, padding_value=tokenizer.pad_token_id)
        attention_mask = (input_ids != tokenizer.pad_token_id).long()
        after_assistant = (input_ids == self.assistant_id).long().cumsum(1) - (input_ids == self.assistant_id).long()
        is_answer = after_assistant.bool() & attention_mask.bool()
        known_rows = torch.tensor([bool(question.columns) for question in questions])
        is_name = torch.isin(input_ids, self.name_ids) & known_rows[:, None]
        true_values = torch.from_numpy(np.concatenate(values).astype(np.float32))
        return LanguageBatch(input_ids, attention_mask, is_answer, is_name, true_values)

    def loss(self, batch: LanguageBatch, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token loss with soft value targets plus the weighted auxiliary regressions.

        Args:
            batch: B token rows.
            tokens: (B, 4, 192) image tokens.

        Returns:
            The scalar loss and the two heads' mean absolute errors, (2,): at names and at answers, detached.
        """
        embeddings = self.model.get_input_embeddings()(batch.input_ids)
        is_image = (batch.input_ids == self.image_id)[..., None]
        embeddings = embeddings.masked_scatter(is_image, tokens.to(embeddings.dtype))
        outputs = self.model.model.text_model(
            inputs_embeds=embeddings,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=True,
        )
        at_names = outputs.hidden_states[NAME_LAYER][batch.is_name]
        hidden = outputs.last_hidden_state[:, :-1][batch.is_answer[:, 1:]]
        targets = batch.input_ids[:, 1:][batch.is_answer[:, 1:]]
        log_probs = self.model.lm_head(hidden).log_softmax(-1)

        steps = targets - self.first_value_id
        is_value = (steps >= 0) & (steps < VALUE_COUNT)
        value_log_probs = log_probs[:, self.first_value_id : self.first_value_id + VALUE_COUNT]
        known = torch.zeros_like(is_value)
        known[is_value] = ~batch.values.isnan()
        made_up = is_value & ~known
        form = F.nll_loss(log_probs[~is_value], targets[~is_value], reduction="sum")
        any_value = -value_log_probs[made_up].logsumexp(-1).sum()
        soft = -(self.soft_targets[steps[known]] * value_log_probs[known]).sum()
        token_loss = (form + any_value + soft) / len(targets)

        truth = batch.values[~batch.values.isnan()]
        predicted = self.auxiliary(hidden[known])[:, 0]
        if len(truth) == 0:
            return token_loss, token_loss.new_zeros(2)
        read = self.name_auxiliary(at_names)[:, 0]
        regression = F.smooth_l1_loss(predicted, truth, beta=AUXILIARY_BETA)
        name_regression = F.smooth_l1_loss(read, truth, beta=AUXILIARY_BETA)
        errors = torch.stack([(read - truth).abs().mean(), (predicted - truth).abs().mean()]).detach()
        return token_loss + self.auxiliary_weight * (regression + name_regression), errors


def train_language(
    task: LanguageTask,
    frames: Sequence[Frames],
    tokens: Sequence[Tensor] | None,
    steps: int,
    batch_size: int,
    peak_rate: float,
    seed: int,
    log: Callable[[str], None],
    style: Style,
) -> None:
    """Trains on random questions about random frames.

    Args:
        task: model and loss.
        frames: training frames per scene, in the order of the task's scenes.
        tokens: cached image tokens per scene, which leaves the tower frozen; None trains the whole model on pixels.
        steps: optimizer steps.
        batch_size: questions per step.
        peak_rate: AdamW's learning rate after the warm-up.
        seed: seeds the choice of frames and questions.
        log: receives a progress line now and then.
        style: how to ask, see `random_question`.
    """
    rng = np.random.default_rng(seed)
    scenes = task.scenes
    words = vocabulary_words(task.processor.tokenizer, scenes)
    model = task.model.train()
    tower = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    for parameter in tower:
        parameter.requires_grad_(tokens is None)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    mean_loss, mean_error = 0.0, torch.zeros(2)
    with sharded(task) as shards:
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = cosine_rate(step, steps, peak_rate, warmup=50)
            kinds = rng.integers(len(scenes), size=batch_size)
            rows = [int(rng.integers(len(frames[kind].readings))) for kind in kinds]
            questions = [random_question(scenes[kind], words, rng, style) for kind in kinds]
            # Long prompts in one half, short ones in the other: fewer padding tokens.
            order = sorted(range(batch_size), key=lambda i: len(questions[i].prompt.system + questions[i].prompt.user))
            halves = []
            for part in np.array_split(order, SHARDS):
                answers = [frames[kinds[i]].readings[rows[i]] for i in part]
                batch = task.batch([questions[i] for i in part], answers, rng)
                source = [scene.pixels for scene in frames] if tokens is None else tokens
                pictures = torch.stack([torch.as_tensor(source[kinds[i]][rows[i]]) for i in part])
                halves.append(partial(_half_loss, batch=batch, pictures=pictures, see=tokens is None))
            for loss, error in shards.backward(halves):
                mean_loss, mean_error = mean_loss + loss, mean_error + error / SHARDS
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step % 100 == 0 or step == steps:
                count = step % 100 or 100
                at_names, at_answers = (mean_error / count).tolist()
                log(
                    f"language {step}/{steps}: loss {mean_loss / count:.3f}, "
                    f"heads' MAE {at_names:.3f} at names, {at_answers:.3f} at answers"
                )
                mean_loss, mean_error = 0.0, torch.zeros(2)
    for parameter in tower:
        parameter.requires_grad_(True)


def _half_loss(
    task: LanguageTask, batch: LanguageBatch, pictures: Tensor, see: bool
) -> tuple[Tensor, tuple[float, Tensor]]:
    """Half of a batch's loss, of pictures (B, 3, 128, 128) to be seen or of image tokens (B, 4, 192)."""
    tokens = image_tokens(task.model, pictures) if see else pictures
    loss, errors = task.loss(batch, tokens)
    return loss / SHARDS, (float(loss.detach()) / SHARDS, errors)
