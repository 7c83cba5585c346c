"""Opens a VLM: the embedded one, a local folder or a model hub's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from covr_lightning.errors import ConfigError
from covr_lightning.imports import check_torchvision
from covr_lightning.vlm.families import disagreement, load_processor, set_token_ids
from covr_lightning.vlm.quantization import (
    Quantization,
    check_quantization,
    keep_weights_as_stored,
    move,
    quantization_config,
)

EMBEDDED = "embedded"
_CHOICES = f"valid choices for vlm.path are {EMBEDDED!r}, a Hugging Face folder or a model name on the hub"


def embedded_folder() -> Path:
    """The folder of the shipped embedded VLM."""
    return Path(__file__).parent / "embedded" / "weights"


def load_vlm(
    path: str | Path = EMBEDDED,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
) -> tuple[Any, Any]:
    """Loads a VLM and its processor, from safetensors only and without remote code.

    Args:
        path: "embedded", a folder, or a hub name such as "Qwen/Qwen2.5-VL-3B-Instruct". A folder never touches the
            network.
        dtype: dtype of the weights; None means float32.
        device: where to put the model; None leaves it on the CPU. Quantising takes seconds on a GPU, minutes on a CPU.
        quantization: bits of the language model's linear layers (see
            :func:`~covr_lightning.vlm.quantization.quantization_config`); None for `dtype` throughout.

    Returns:
        The model in evaluation mode, which generates greedily, and its processor, whose tokenizer pads on the left and
        whose `model_max_length` is what the model takes at most.

    Raises:
        ConfigError: if the folder is missing, has no processor, tokenizer or chat template, carries pickle weights
            only or damaged ones, lacks weights, has parts that do not fit together, or is no image-text-to-text model;
            if an installed torchvision is broken; or if it cannot be quantised.
    """
    check_torchvision()
    check_quantization(quantization)
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    name, is_folder = _place(path)
    if is_folder:
        _check_folder(Path(name))
    config = _load_config(name, is_folder)
    processor = _load_processor(name, config, is_folder)
    dtype, device = torch.float32 if dtype is None else dtype, torch.device("cpu" if device is None else device)
    options: dict[str, Any] = {}
    if quantization is not None:
        _check_not_quantised(name, config, quantization)
        options["quantization_config"] = quantization_config(quantization, config, dtype)
        options["device_map"] = {"": device}  # weight by weight, so that the full ones never lie there together
    try:
        model, report = auto.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            local_files_only=is_folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the VLM at vlm.path {name!r} ({_first_line(error)}): {_CHOICES}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # the library would go on with random weights in their place
        raise ConfigError(
            f"the weights of the VLM at vlm.path {name!r} are not those of its config.json: {len(missing)} are "
            f"missing, the first is {missing[0]!r}: {_CHOICES}"
        )
    set_token_ids(model, processor.tokenizer)
    keep_weights_as_stored(model)
    move(model, device)
    return model.eval(), processor


def save_vlm(model: Any, processor: Any, folder: Path) -> None:
    """Writes a VLM as a Hugging Face folder with safetensors weights, complete or not at all.

    It opens with :func:`load_vlm` and with plain `AutoModelForImageTextToText` and `AutoProcessor`; a processor that
    also takes videos can be opened by the latter only where torchvision is installed.

    Args:
        model: the model, without an adapter.
        processor: its processor.
        folder: where to write; what is there gives way.
    """
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    processor.save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the folder at vlm.path {str(folder)!r} has no config.json: {_CHOICES}")
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise ConfigError(f"the VLM at vlm.path {str(folder)!r} has no processor (processor_config.json): {_CHOICES}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"the VLM at vlm.path {str(folder)!r} has no tokenizer (tokenizer.json): {_CHOICES}")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"pickle weights only ({', '.join(pickles)})" if pickles else "no weights"
        raise ConfigError(f"the VLM at vlm.path {str(folder)!r} has {found}, needs *.safetensors: {_CHOICES}")
    for file in sorted(folder.glob("*.safetensors")):
        _check_weights(file)


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # reads the header and compares the lengths
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"cannot load the VLM at vlm.path {str(file.parent)!r}: its {file.name} is damaged or cut off "
            f"({_first_line(error)}): {_CHOICES}"
        ) from error


def skeleton(path: str | Path = EMBEDDED) -> Any:
    """A VLM's modules without weights, from its configuration alone.

    Args:
        path: See :func:`load_vlm`.

    Raises:
        ConfigError: There is no such VLM, or it is no image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    check_torchvision()
    auto: Any = AutoModelForImageTextToText
    config = _load_config(*_place(path))
    with torch.device("meta"):
        return auto.from_config(config)


def _place(path: str | Path) -> tuple[str, bool]:
    """A folder's or a hub name, and whether it is a folder."""
    source = embedded_folder() if str(path) == EMBEDDED else Path(path)
    if not source.is_dir() and not _is_hub_name(str(path)):
        raise ConfigError(f"no VLM folder at vlm.path {str(path)!r}: {_CHOICES}")
    return (str(source), True) if source.is_dir() else (str(path), False)


def load_processor_of(path: str | Path) -> Any:
    """A VLM's processor alone.

    Raises:
        ConfigError: As :func:`load_vlm`, of config and processor.
    """
    check_torchvision()
    name, is_folder = _place(path)
    return _load_processor(name, _load_config(name, is_folder), is_folder)


def _load_config(name: str, is_folder: bool) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=is_folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        message = f"cannot read config.json of the VLM at vlm.path {name!r} ({_first_line(error)}): {_CHOICES}"
        raise ConfigError(message) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(
            f"the model at vlm.path {name!r} is of type {config.model_type!r}, which does not turn images and "
            f"text into text: {_CHOICES}"
        )
    return config


def _check_not_quantised(name: str, config: Any, quantization: Quantization) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"vlm.quantization is {quantization!r}, but the weights at vlm.path {name!r} are quantised already: leave "
            "vlm.quantization out, or give the path of the full weights."
        )


def _load_processor(name: str, config: Any, is_folder: bool) -> Any:
    try:
        processor = load_processor(name, config, is_folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        message = f"cannot load the processor of the VLM at vlm.path {name!r} ({_first_line(error)}): {_CHOICES}"
        raise ConfigError(message) from error
    # AutoProcessor silently returns a bare tokenizer or image processor when it cannot build the whole.
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise ConfigError(
            f"the VLM at vlm.path {name!r} has no complete processor, only a {type(processor).__name__}: {_CHOICES}"
        )
    if not processor.chat_template:
        processor.chat_template = processor.tokenizer.chat_template
    if not processor.chat_template:
        raise ConfigError(f"the processor of the VLM at vlm.path {name!r} has no chat template: {_CHOICES}")
    reason = disagreement(config, processor)
    if reason is not None:
        raise ConfigError(f"the parts of the VLM at vlm.path {name!r} do not fit together: {reason}: {_CHOICES}")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    # The model's limit is what counts; VLMInputs compares prompts with it.
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.get_text_config().max_position_embeddings)
    return processor


def _is_hub_name(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
