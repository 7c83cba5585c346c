"""vLLM in this process (optional extra `vllm`)."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from covr_lightning import processes
from covr_lightning.errors import ConfigError
from covr_lightning.vlm.engines.engine import Engine
from covr_lightning.vlm.engines.vllm_requests import (
    Questions,
    adapter_name,
    check_modules,
    check_weights,
    up_to_closing,
)
from covr_lightning.vlm.loading import EMBEDDED, embedded_folder

if TYPE_CHECKING:
    from covr_lightning.vlm.vlm import VLM

#: vLLM reserves buffers for adapters of these ranks (`max_lora_rank`).
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine(Engine):
    """Labels by vLLM's offline interface, in the process that trains.

    vLLM holds the base weights a second time if the run also fine-tunes, and takes a share of the GPU for itself when
    it starts: leave room for the agent (and the VLM that is trained). Without `vlm.dtype` it takes the type that the
    weights are stored in, as its adapters' kernels want 16 bits.

    Args:
        gpu_memory_utilization: vLLM's share of the GPU's memory.
        options: More of vLLM's `EngineArgs` by name, e.g. ``{max_model_len: 2048, tensor_parallel_size: 2}``.

    Raises:
        ConfigError: The share is not in 0 to 1, or remote code is asked for.
    """

    def __init__(self, gpu_memory_utilization: float = 0.4, options: dict[str, Any] | None = None) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigError(
                f"vlm.engine.gpu_memory_utilization is {gpu_memory_utilization}; it must be above 0 and at most 1."
            )
        self.options = {"gpu_memory_utilization": gpu_memory_utilization, **(options or {})}
        if self.options.get("trust_remote_code"):
            raise ConfigError("vlm.engine.options has trust_remote_code; code from a model's folder is never run here.")
        self._ids: dict[str, int] = {}
        self._adapter: Any = None

    def open(self, vlm: VLM) -> None:
        """Start vLLM with the VLM's base weights.

        Raises:
            ConfigError: vLLM is not installed or would start on another GPU, or `vlm.lora.rank` is above what it takes.
        """
        try:
            import vllm
            from vllm.lora.request import LoRARequest
            from vllm.sampling_params import StructuredOutputsParams
        except ImportError as error:
            raise ConfigError(
                "vlm.engine is VLLMEngine, but vLLM 0.12 or later is not installed: pip install "
                f"'covr_lightning[vllm]', or ask a server (VLLMServer) or this process (vlm.engine: null) ({error})."
            ) from error
        index, several = vlm.device.index or 0, processes.count() > 1
        if index or several:
            mend = "" if several else f"give the run that GPU as its first (CUDA_VISIBLE_DEVICES={index}), or "
            raise ConfigError(
                "vlm.engine is VLLMEngine, which starts vLLM on the first GPU, but "
                f"{'the run has several processes' if several else f'the run is on GPU {index}'}: {mend}ask a server "
                "(VLLMServer)."
            )
        ranks = [rank for rank in LORA_RANKS if rank >= vlm.lora.rank]
        if not ranks:
            raise ConfigError(f"vlm.lora.rank is {vlm.lora.rank}, but vLLM takes at most {LORA_RANKS[-1]}.")
        self._vllm, self._lora_request, self._structured = vllm, LoRARequest, StructuredOutputsParams
        self._questions = Questions(vlm)
        own = {
            "model": str(embedded_folder()) if vlm.path == EMBEDDED else vlm.path,
            "dtype": vlm.dtype or "auto",
            "enable_lora": True,
            "max_lora_rank": ranks[0],
            "limit_mm_per_prompt": {"image": 1},
        }
        self._llm = vllm.LLM(**(own | self.options))
        known = self._questions.special_tokens
        takes_it = "tokenization_kwargs" in signature(self._llm.chat).parameters
        # Where it does not, vLLM adds them to chats about pictures.
        self._tokenization: dict[str, Any] = (
            {"tokenization_kwargs": {"add_special_tokens": known}} if takes_it and known is not None else {}
        )

    def answers(self, frames: Tensor) -> list[str | None]:
        """Every frame gets an answer, by the adapter in use."""
        outputs = self._llm.chat(
            [self._questions.messages(frame) for frame in frames],
            sampling_params=[self._sampling(frame) for frame in frames],
            use_tqdm=False,
            lora_request=self._adapter,
            **self._tokenization,
        )
        return [up_to_closing(output.outputs[0].text) for output in outputs]

    def _sampling(self, frame: Tensor) -> Any:
        settings = self._questions.sampling(frame)
        if self._questions.regex is not None:
            settings["structured_outputs"] = self._structured(regex=self._questions.regex)
        return self._vllm.SamplingParams(**settings)

    def use(self, adapter: Path | None) -> None:
        """Answer by this adapter; other weights get another number, so that vLLM never takes those that it knows."""
        if adapter is None:
            self._adapter = None
            return
        check_weights(adapter)
        name = adapter_name(adapter)
        number = self._ids.setdefault(name, len(self._ids) + 1)
        self._adapter = self._lora_request(name, number, str(adapter.resolve()))

    def check_lora(self, vlm: VLM, model: Any) -> None:
        """Refuse targets outside the language model."""
        check_modules(vlm.lora, model)
