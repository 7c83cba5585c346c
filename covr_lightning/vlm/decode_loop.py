"""One decoding loop for every family whose prompt can be cut behind its static prefix."""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from covr_lightning.vlm.inputs import prefix_length, sequence_keys
from covr_lightning.vlm.picking import Pick

#: Threads that share a cache take turns to look whether it has to be computed.
_BUILDING = threading.Lock()


def decode_loop(
    model: Any, batch: dict[str, Tensor], pick: Pick, prefix: PrefixCache | None = None, weights: Hashable = None
) -> Tensor:
    """Prefill, then tokens until every row has finished.

    Tokens that are forced in every row go through the model together with the one before them.

    Args:
        model: the VLM.
        batch: inputs of prompts of one length, without padding.
        pick: what chooses each row's token and knows when all have finished.
        prefix: cache of the prompt's static part; none computes all of it.
        weights: names the state of the weights for the cache.

    Returns:
        The new tokens (B, T).
    """
    positions, offset = _positions(model, batch)
    cache, cached = (None, 0) if prefix is None else prefix.rows(model, batch, positions, weights)
    inputs = _part(batch, slice(cached, None), positions)
    if cached:
        inputs["past_key_values"] = cache
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    tokens: list[Tensor] = []
    length = batch["input_ids"].shape[1]
    while True:
        new = [pick(output.logits[:, -1].float())]
        while not pick.finished and (forced := pick.forced()) is not None:
            new.append(forced)
        tokens += new
        if pick.finished:
            return torch.stack(tokens, 1)
        inputs = {"input_ids": torch.stack(new, 1), "past_key_values": output.past_key_values}
        if offset is not None:
            steps = torch.arange(length, length + len(new), device=offset.device)
            inputs["position_ids"] = (steps + offset).expand(3, -1, -1)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        length += len(new)


def base_model(model: Any) -> Any:
    """The Hugging Face model, with an adapter's layers inside if there is one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class PrefixCache:
    """Keys and values of the prompt's tokens before the picture, computed once per state of the weights."""

    def __init__(self) -> None:
        self._model: Any = None
        self._key: Hashable = None
        self._cache: Any = None
        #: How often the prefix was computed.
        self.builds = 0

    def rows(
        self, model: Any, batch: dict[str, Tensor], positions: Tensor | None, weights: Hashable
    ) -> tuple[Any, int]:
        """A cache for as many rows as the batch has, and the number of tokens it holds (0: there is no prefix).

        Args:
            model: the VLM.
            batch: its inputs.
            positions: position ids of the whole prompt where the family needs them.
            weights: names the state of the weights.
        """
        ids = batch["input_ids"]
        length = prefix_length(ids[0], base_model(model).config)
        if not length:
            return None, 0
        key = (tuple(ids[0, :length].tolist()), ids.device, weights, _adapter_state(model))
        with _BUILDING:
            cache = self._current(model, batch, positions, length, key)
        cache = copy.deepcopy(cache)
        if len(ids) > 1:
            cache.batch_repeat_interleave(len(ids))
        return cache, length

    def _current(
        self, model: Any, batch: dict[str, Tensor], positions: Tensor | None, length: int, key: Hashable
    ) -> Any:
        if self._model is not model or self._key != key:
            first = {name: batch[name][:1] for name in sequence_keys(batch)}
            inputs = _part(first, slice(length), None if positions is None else positions[..., :1, :])
            self._cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
            self._model, self._key = model, key
            self.builds += 1
        return self._cache


def _adapter_state(model: Any) -> Hashable:
    """What of an adapter can change without notice: whether it is in force, and how often its weights were written."""
    if not hasattr(model, "peft_config"):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    in_force = {(layer.disable_adapters, *layer.active_adapters) for layer in layers}
    return frozenset(in_force), sum(p._version for p in model.parameters() if not p.is_inference())


def _part(batch: dict[str, Tensor], tokens: slice, positions: Tensor | None) -> dict[str, Any]:
    """Inputs of a part of the prompts. Without padding no attention mask is needed."""
    along = sequence_keys(batch)
    part: dict[str, Any] = {key: value[:, tokens] if key in along else value for key, value in batch.items()}
    del part["attention_mask"]
    if positions is not None:
        part["position_ids"] = positions[..., tokens]
    return part


def _positions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Position ids (3, B, P) of the prompts and the offset (B, 1) of what follows; none for models that just count.

    Models with rotary positions in three dimensions (Qwen-VL) count a picture by its sides, and remember the last
    batch's offset for the next call. Given the ids, they ask neither their memory nor the cache's length.
    """
    index = getattr(base_model(model).model, "get_rope_index", None)
    if index is None:
        return None, None
    needed = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    positions, offset = index(**needed)
    return positions, offset
