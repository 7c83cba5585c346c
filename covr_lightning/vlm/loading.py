"""Opens a VLM: the embedded one, a local folder or a model hub's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from covr_lightning.errors import ConfigError

EMBEDDED = "embedded"
_CHOICES = f"valid choices for vlm.path are {EMBEDDED!r}, a Hugging Face folder or a model name on the hub"


def embedded_folder() -> Path:
    """The folder of the shipped embedded VLM."""
    return Path(__file__).parent / "embedded" / "weights"


def load_vlm(
    path: str | Path = EMBEDDED, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """Loads a VLM and its processor, from safetensors only and without remote code.

    Args:
        path: "embedded", a folder, or a hub name such as "Qwen/Qwen2.5-VL-3B-Instruct". A folder never touches the
            network.
        dtype: dtype of the weights; None means float32.
        device: where to put the model; None leaves it on the CPU.

    Returns:
        The model in evaluation mode and its processor, whose tokenizer pads on the left.

    Raises:
        ConfigError: if the folder is missing, has no processor, tokenizer or chat template, carries pickle weights
            only, or is no image-text-to-text model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    source = embedded_folder() if str(path) == EMBEDDED else Path(path)
    is_folder = source.is_dir()
    if is_folder:
        _check_folder(source)
    elif not _is_hub_name(str(path)):
        raise ConfigError(f"no VLM folder at vlm.path {str(path)!r}: {_CHOICES}")
    name = str(source) if is_folder else str(path)
    processor = _load_processor(name, is_folder)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=torch.float32 if dtype is None else dtype,
            local_files_only=is_folder,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the VLM at vlm.path {name!r} ({_first_line(error)}): {_CHOICES}") from error
    if device is not None:
        model = model.to(device)
    return model.eval(), processor


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
    _check_architecture(folder)


def _check_architecture(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        message = f"cannot read config.json of the VLM at vlm.path {str(folder)!r} ({_first_line(error)}): {_CHOICES}"
        raise ConfigError(message) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(
            f"the model at vlm.path {str(folder)!r} is of type {config.model_type!r}, which does not turn images and "
            f"text into text: {_CHOICES}"
        )


def _load_processor(name: str, is_folder: bool) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name, local_files_only=is_folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        message = f"cannot load the processor of the VLM at vlm.path {name!r} ({_first_line(error)}): {_CHOICES}"
        raise ConfigError(message) from error
    # AutoProcessor silently returns a bare tokenizer or image processor when it cannot build the whole.
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise ConfigError(
            f"the VLM at vlm.path {name!r} has no complete processor, only a {type(processor).__name__}: {_CHOICES}"
        )
    if not processor.chat_template and not processor.tokenizer.chat_template:
        raise ConfigError(f"the processor of the VLM at vlm.path {name!r} has no chat template: {_CHOICES}")
    processor.tokenizer.padding_side = "left"
    return processor


def _is_hub_name(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
