"""Options as users write them, and how they become the engine's configuration. Mirrors vllm/engine/arg_utils.py.

The server's front end takes and checks `EngineArgs`; the core, a process of its own, resolves them. torch and
transformers take seconds to import, so only `resolve` does.
"""

import difflib
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec

from folovllm.config import (
    AttentionBackendName,
    CacheConfig,
    EngineConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SchedulingPolicy,
    fit_to_pool,
)
from folovllm.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

DEFAULT_KV_CACHE_GB = 1.0
_MUST_BE_POSITIVE = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "max_model_len",
    "kv_cache_memory_gb",
    "num_threads",
    "tensor_parallel_size",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Options as users write them: keyword arguments of `LLM`, flags of `kvstrata serve`."""

    model: str
    """Local directory, or a Hugging Face hub id."""
    served_model_name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    """Longest request, prompt and output, in tokens; None takes the model's context. Cut to what the KV cache holds."""
    max_num_seqs: int = 64
    """Most requests in one step; never more than `max_num_batched_tokens`."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step; without chunked prefill raised to `max_model_len`."""
    block_size: int = 16
    num_kv_blocks: int | None = None
    """Blocks of the device pool; else `kv_cache_memory_gb` decides."""
    kv_cache_memory_gb: float | None = None
    """Size of the device pool; None takes 1 GiB on a CPU, and on a GPU what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, steps and KV pool may take together."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    """Who goes first: by arrival, or by each request's `priority` (lower first)."""
    long_prefill_token_threshold: int = 0
    """Most tokens of one request in one step, so that a long prompt leaves room for others; 0 sets no such limit."""
    async_scheduling: bool = False
    """Schedule the next step while the model still runs the last one."""
    attention_backend: AttentionBackendName = "auto"
    seed: int = 0
    skip_tokenizer_init: bool = False
    num_threads: int | None = None
    """Threads of the model's arithmetic on a CPU, of each rank; None shares this process's CPUs out evenly."""
    cpu_threads_bind: Literal["none", "all"] = "none"
    """"all" keeps each of these threads on a CPU of its own: for an engine that has the machine to itself."""
    kernels: Literal["auto", "torch"] = "auto"
    """"torch" computes with torch's operations alone, also where there are native kernels: slower, to compare with."""
    batch_invariant: bool = False
    """Use only kernels in which a row's arithmetic is independent of the other rows, or refuse to start."""
    enforce_eager: bool = False
    """Call each kernel from Python, instead of replaying recorded steps (on a GPU, CUDA graphs): to debug."""
    tensor_parallel_size: int = 1
    """Ranks that share each layer; a process each."""
    kv_transfer_config: KVTransferConfig | dict[str, Any] | None = None
    kv_events_config: KVEventsConfig | dict[str, Any] | None = None

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "EngineArgs":
        """Build from keyword arguments.

        Raises:
            ConfigError: an unknown option; the message suggests the nearest known one.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
                raise ConfigError(f"unknown engine option {name!r}; {hint}")
        return cls(**options)

    def check(self) -> None:
        """Return when every value is allowed, as far as can be told without the checkpoint and the device.

        Raises:
            ConfigError: one is not.
        """
        for f in fields(self):
            allowed = get_args(f.type)
            value = getattr(self, f.name)
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise ConfigError(f"{f.name}={value!r} is not allowed; it must be one of {', '.join(allowed)}")
        for name in _MUST_BE_POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value!r} is not allowed; it must be positive")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed; it must be above 0 and at most 1"
            )
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                f"long_prefill_token_threshold={self.long_prefill_token_threshold} is not allowed; it must be 0 or more"
            )
        if self.num_kv_blocks is not None and self.num_kv_blocks < 2:
            raise ConfigError(f"num_kv_blocks={self.num_kv_blocks} is not allowed; it must be at least 2")
        if self.tensor_parallel_size > 1 and self.kv_transfer_config is not None:
            raise ConfigError("kv_transfer_config is not possible with tensor_parallel_size above 1; use one of them")
        _convert("kv_transfer_config", self.kv_transfer_config, KVTransferConfig)
        _convert("kv_events_config", self.kv_events_config, KVEventsConfig)

    def resolve(self, rank: int = 0) -> EngineConfig:
        """Read the checkpoint's config.json and decide every derived value, for one rank of a tensor parallel engine.

        Raises:
            ConfigError: an option is out of its range.
            ModelLoadError: the checkpoint has no readable config.json.
        """
        self.check()
        directory = resolve_checkpoint(self.model)
        hf_config = _load_hf_config(directory)
        _check_fields(directory, hf_config)
        context = int(hf_config.max_position_embeddings)
        if self.max_model_len is not None and self.max_model_len > context:
            raise ConfigError(f"max_model_len={self.max_model_len} exceeds the model's context of {context} tokens")
        device = _resolve_device(self.device, rank)
        has_native_kernels = device.type == "cpu" and self.kernels == "auto"
        if self.batch_invariant and not (has_native_kernels and self.attention_backend in ("auto", "paged")):
            raise ConfigError(
                "batch_invariant=True needs the native kernels: device cpu, attention_backend auto or paged"
            )
        model_config = ModelConfig(
            model=str(directory),
            served_model_name=self.served_model_name or self.model,
            hf_config=hf_config,
            dtype=_resolve_dtype(self.dtype, hf_config),
            context_len=self.max_model_len or context,
            max_model_len=self.max_model_len or context,
            seed=self.seed,
            skip_tokenizer_init=self.skip_tokenizer_init,
        )
        _check_heads(hf_config, self.tensor_parallel_size)
        parallel_config = ParallelConfig(tensor_parallel_size=self.tensor_parallel_size)
        config = EngineConfig(
            model_config=model_config,
            cache_config=CacheConfig(
                self.block_size, 0, self.enable_prefix_caching, gpu_memory_utilization=self.gpu_memory_utilization
            ),
            scheduler_config=SchedulerConfig(
                # Each running request needs a token of the budget, or those at the end would starve.
                max_num_seqs=min(self.max_num_seqs, self.max_num_batched_tokens),
                max_num_batched_tokens=self.max_num_batched_tokens,
                enable_chunked_prefill=self.enable_chunked_prefill,
                policy=self.scheduling_policy,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
                async_scheduling=self.async_scheduling,
            ),
            parallel_config=parallel_config,
            device=device,
            attention_backend=self.attention_backend,
            kv_transfer_config=_convert("kv_transfer_config", self.kv_transfer_config, KVTransferConfig),
            kv_events_config=_convert("kv_events_config", self.kv_events_config, KVEventsConfig),
            num_threads=self.num_threads,
            cpu_threads_bind=self.cpu_threads_bind,
            kernels=self.kernels,
            batch_invariant=self.batch_invariant,
            enforce_eager=self.enforce_eager,
            options=msgspec.to_builtins(self),
        )
        if device.type == "cuda" and self.num_kv_blocks is None and self.kv_cache_memory_gb is None:
            # The worker will tell; until then as if the longest request fitted.
            fitted = fit_to_pool(config, 1 - (-config.model_config.context_len // self.block_size))
            return replace(fitted, cache_config=config.cache_config)
        return fit_to_pool(config, self._num_kv_blocks(config.kv_block_bytes))

    def _num_kv_blocks(self, block_bytes: int) -> int:
        if self.num_kv_blocks is not None:
            return self.num_kv_blocks
        return max(2, int((self.kv_cache_memory_gb or DEFAULT_KV_CACHE_GB) * 2**30) // block_bytes)


def resolve_checkpoint(model: str) -> Path:
    """The local directory of a checkpoint, downloaded from the Hugging Face hub when `model` is not a path.

    Raises:
        ModelLoadError: neither a directory nor an obtainable hub id.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or path.exists()
    if looks_like_path:
        raise ModelLoadError(
            f"model {model!r} is not a directory; give a checkpoint directory or a hub id like org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"model {model!r} is neither a local directory nor obtainable from the hub: {error}"
        ) from error


def _load_hf_config(directory: Path) -> "PretrainedConfig":
    if not (directory / "config.json").is_file():
        raise ModelLoadError(f"{directory} holds no config.json; is it a Hugging Face checkpoint?")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(directory))
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise ModelLoadError(f"{directory / 'config.json'} cannot be read: {error}") from error


def _check_fields(directory: Path, hf_config: "PretrainedConfig") -> None:
    for name in ("max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not getattr(hf_config, name, None):
            architectures = ", ".join(getattr(hf_config, "architectures", None) or ["unknown"])
            raise ModelLoadError(
                f"{directory / 'config.json'} ({architectures}) has no {name}: not a decoder we can run"
            )


def _check_heads(hf_config: "PretrainedConfig", tensor_parallel_size: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(hf_config, name, None) or hf_config.num_attention_heads
        if heads % tensor_parallel_size:
            raise ConfigError(
                f"tensor_parallel_size={tensor_parallel_size} does not divide the model's {name}={heads}; "
                "choose one that divides it"
            )


def _resolve_device(device: str, rank: int) -> "torch.device":
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' is not available here; use 'cpu' or 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device, rank) if device == "cuda" else torch.device(device)


def _resolve_dtype(dtype: str, hf_config: "PretrainedConfig") -> "torch.dtype":
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto":
        return known[dtype]
    stored = getattr(hf_config, "dtype", None) or torch.float32
    stored = known[stored] if isinstance(stored, str) else stored
    assert isinstance(stored, torch.dtype)
    return stored


def _convert(name: str, value: Any, kind: type[Any]) -> Any:
    if value is None or isinstance(value, kind):
        return value
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        allowed = ", ".join(kind.__struct_fields__)
        raise ConfigError(f"{name} is not valid: {error}; known keys: {allowed}") from error
