"""The LoRA adapter that fine-tuning trains: made, saved, swapped between rounds, merged (Hu et al., 2022; Table 9)."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from covr_lightning.errors import ConfigError
from covr_lightning.saving.files import in_place_of

#: Table 9's target modules outside CARLA, by the ends of their names.
LORA_TARGETS = (
    "down_proj", "o_proj", "q_proj", "up_proj", "v_proj", "k_proj", "gate_proj", "qkv", "lm_head",
)  # fmt: skip
#: Table 9's target modules on CARLA.
CARLA_LORA_TARGETS = ("down_proj", "o_proj", "q_proj", "up_proj", "k_proj", "gate_proj")

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass
class LoRA:
    """Adapter settings (Table 9).

    Attributes:
        rank: Rank r of the update BA.
        alpha: Scale: the update counts α/r. The paper takes 256 on CARLA and 16 elsewhere.
        dropout: Dropout before A, while training.
        targets: Modules that get an adapter, by the ends of their names, or one regular expression for whole names.

    Raises:
        ConfigError: Rank, alpha or dropout is out of range, or `targets` is no regular expression.
    """

    rank: int = 128
    alpha: int = 16
    dropout: float = 0.05
    targets: str | Sequence[str] = LORA_TARGETS

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise ConfigError(f"vlm.lora.{name} is {value}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"vlm.lora.dropout is {self.dropout}; it must be at least 0 and below 1.")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ConfigError(
                    f"vlm.lora.targets is {self.targets!r}, which is no regular expression ({error}); it can be one "
                    "for whole names, or a list of ends of names."
                ) from error


#: Kinds of modules that PEFT adapts; bitsandbytes' are linear layers.
_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)


def add_lora(model: Any, lora: LoRA) -> Any:
    """Give a model an adapter that changes nothing yet: A is random, B is 0.

    Args:
        model: The Hugging Face model; its modules are wrapped in place.
        lora: Rank, scale and targets. Every module of that name gets an adapter, in the language model, the vision
            tower and lm_head alike; so counted, Table 9's list for dm_control gives Qwen2.5-VL-3B the paper's 8.2566 %,
            that for CARLA 7.0920 %.

    Returns:
        PEFT's model, in evaluation mode.

    Raises:
        ConfigError: No module's name ends in any of the targets.
    """
    from peft import get_peft_model

    config = _config(lora)
    try:
        with warnings.catch_warnings():
            # PEFT warns of merging into tied weights, which merge_lora sees to.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            return get_peft_model(model, config).eval()
    except ValueError as error:
        if lora_modules(model, lora):
            said = " ".join(str(error).split())
            raise ConfigError(f"vlm.lora.targets is {_targets(lora)!r}, which PEFT refuses: {said}") from error
        raise _no_targets(lora) from error


def freeze_unread(model: Any) -> None:
    """Leave out of training the adapters of vision layers that nothing is read from.

    LLaVA takes the output of the last layer but one (``vision_feature_layer``), so the last one's adapter never gets a
    gradient, for which data-parallel training would wait.

    Args:
        model: What :func:`add_lora` returned.
    """
    config = model.get_base_model().config
    read = getattr(config, "vision_feature_layer", None)
    if read is None:
        return
    layers = config.vision_config.num_hidden_layers
    used = max(layers + 1 + i if i < 0 else i for i in ([read] if isinstance(read, int) else read))
    for name, parameter in model.named_parameters():
        layer = re.search(r"\bvision_tower\b.*\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= used:
            parameter.requires_grad_(False)


def renew_lora(model: Any) -> None:
    """Draw the adapter anew, as :func:`add_lora` made it: A is random, B is 0, so it changes nothing.

    Args:
        model: What :func:`add_lora` returned.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.reset_lora_parameters(name, init_lora_weights=True)


def lora_modules(model: Any, lora: LoRA) -> list[str]:
    """Names of the modules that :func:`add_lora` would give an adapter to."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = _config(lora)
    return [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]


def check_targets(model: Any, lora: LoRA) -> None:
    """Check that :func:`add_lora` would find modules, and could adapt them, before the first round needs it.

    Raises:
        ConfigError: No module's name ends in any of the targets, or one that does is of a kind that PEFT leaves alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = lora_modules(model, lora)
    if not named:
        raise _no_targets(lora)
    for name in named:
        module = model.get_submodule(name)
        # Of weights that came quantised PEFT adapts further kinds, each by a package of its own.
        if not isinstance(module, (*_ADAPTED, BaseTunerLayer)) and not getattr(model, "is_quantized", False):
            raise ConfigError(
                f"vlm.lora.targets is {_targets(lora)!r}, which names {name}, a {type(module).__name__}; it can name "
                f"linear layers, convolutions and embeddings, such as {', '.join(LORA_TARGETS[:4])}."
            )


def _targets(lora: LoRA) -> str | list[str]:
    return lora.targets if isinstance(lora.targets, str) else list(lora.targets)


def _no_targets(lora: LoRA) -> ConfigError:
    return ConfigError(
        f"vlm.lora.targets is {_targets(lora)!r}, which names no module of the VLM; it can be ends of its modules' "
        f"names, such as {', '.join(LORA_TARGETS[:4])}, or one regular expression for whole names."
    )


def _config(lora: LoRA) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_targets(lora))


def save_lora(model: Any, folder: Path) -> None:
    """Write the adapter in PEFT's format, complete or not at all; an older one at this place gives way.

    Weights of lm_head or the embedding are not copied into it, although PEFT would do so when lm_head is a target.

    Args:
        model: What :func:`add_lora` returned.
        folder: Where to write adapter_config.json and adapter_model.safetensors.
    """
    with in_place_of(folder) as part:  # there is one where a run resumed from before this round does it again
        model.save_pretrained(part, save_embedding_layers=False)
        path = part / SETTINGS_FILE
        settings = json.loads(path.read_text())
        if isinstance(settings["target_modules"], list):  # in a set's order, another one in each process
            settings["target_modules"].sort()
            path.write_text(json.dumps(settings, indent=2, sort_keys=True))


def load_lora(model: Any, folder: Path, lora: LoRA) -> None:
    """Put a saved adapter's weights in the place of the present ones; the base weights are not touched.

    Args:
        model: What :func:`add_lora` returned.
        folder: What :func:`save_lora` wrote.
        lora: The model's own adapter settings; the saved one must have the same rank, scale and targets.

    Raises:
        ConfigError: There is no adapter, its file is damaged, or it is one of other settings or of another VLM.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_adapter(folder)
    try:
        trained = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        rank, alpha = trained["r"], trained["lora_alpha"]
        others = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if trained.get(key)]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{SETTINGS_FILE} of the adapter {str(folder)!r} (YAML key vlm.adapter) is damaged or cut off ({error})."
        ) from error
    if others:
        raise ConfigError(
            f"The adapter {str(folder)!r} (YAML key vlm.adapter) was trained with {others[0]}, which this package's "
            "adapters do not have; it would act at another strength."
        )
    if (rank, alpha) != (lora.rank, lora.alpha):
        raise ConfigError(
            f"The adapter {str(folder)!r} (YAML key vlm.adapter) has rank {rank} and α {alpha}, but vlm.lora has "
            f"{lora.rank} and {lora.alpha}."
        )
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise damaged(folder, error) from error
    # PEFT loads what fits and leaves the rest as it was, which would mix two adapters.
    present = get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = [name for name in sorted({*present, *weights}) if _shape(present, name) != _shape(weights, name)]
    if differing:
        raise ConfigError(
            f"The adapter {str(folder)!r} (YAML key vlm.adapter) does not fit this VLM with vlm.lora.targets: "
            f"{len(differing)} of {len({*present, *weights})} weights differ in name or shape, the first is "
            f"{differing[0]!r}."
        )
    set_peft_model_state_dict(model, weights)


def check_adapter(folder: Path) -> None:
    """Check that a folder has an adapter.

    Raises:
        ConfigError: It has not.
    """
    if not (folder / SETTINGS_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ConfigError(f"vlm.adapter is {str(folder)!r}, where no adapter is ({SETTINGS_FILE}, {WEIGHTS_FILE}).")


def damaged(folder: Path, error: Exception) -> ConfigError:
    """What to say of an adapter whose weights cannot be read."""
    return ConfigError(
        f"{WEIGHTS_FILE} of the adapter {str(folder)!r} (YAML key vlm.adapter) is damaged or cut off ({error})."
    )


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's files, in hexadecimal digits.

    Raises:
        ConfigError: There is no adapter.
    """
    check_adapter(folder)
    digest = hashlib.sha256()
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _shape(weights: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def merge_lora(model: Any) -> Any:
    """Add the adapter to the base weights, W' = W + (α/r)·BA, for good.

    Where lm_head shares its weights with the input embedding and has an adapter (Qwen2.5-VL-3B under Table 9's list),
    it gets weights of its own first: the adapter changed what lm_head computes and not the embedding. The merged model
    then has `tie_word_embeddings` false and one more matrix of vocabulary × width.

    Args:
        model: What :func:`add_lora` returned; used up.

    Returns:
        The plain Hugging Face model.

    Raises:
        ConfigError: The base weights are quantised, so the sum would have to be rounded to a few bits.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ConfigError(
            "An adapter cannot be merged into quantised weights without changing its answers: load the VLM without "
            "quantisation (YAML keys vlm.path, vlm.dtype) and vlm.adapter, then merge."
        )
    _untie_adapted_head(base)
    return _plain(model.merge_and_unload())


def remove_lora(model: Any) -> Any:
    """Take off the adapter that :func:`add_lora` gave.

    Args:
        model: What it returned; used up.

    Returns:
        The plain Hugging Face model.
    """
    return _plain(model.unload())


def _plain(base: Any) -> Any:
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def _untie_adapted_head(base: Any) -> None:
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    inner, outer = (getattr(end, "base_layer", end) for end in ends)
    is_adapted = any(hasattr(end, "base_layer") for end in ends)
    if not is_adapted or inner.weight is not outer.weight:
        return
    outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    base.config.get_text_config().tie_word_embeddings = False
