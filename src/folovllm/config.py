"""The resolved configuration. Its parts are named as in vLLM (vllm/config), so that a KV connector written for it reads
ours too.

Importing it costs neither torch nor transformers, which server front ends never load. Who makes an `EngineConfig` is
`folovllm.engine.arg_utils`.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

AttentionBackendName = Literal["auto", "torch_naive", "paged", "triton_unified", "flash_attn"]

SchedulingPolicy = Literal["fcfs", "priority"]


class KVTransferConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which KV connector to load; the JSON vLLM takes as --kv-transfer-config."""

    kv_connector: str
    kv_role: Literal["kv_both", "kv_producer", "kv_consumer"] = "kv_both"
    kv_connector_module_path: str | None = None
    kv_connector_extra_config: dict[str, Any] = {}
    kv_load_failure_policy: Literal["recompute", "fail"] = "recompute"
    engine_id: str = ""


class KVEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether and where KV events are published; the JSON vLLM takes as --kv-events-config."""

    enable_kv_cache_events: bool = True
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many ranks share the model, and which data-parallel replica this is."""

    tensor_parallel_size: int = 1
    data_parallel_rank: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checkpoint and what follows from its config.json."""

    model: str
    """Directory of the checkpoint, local by the time this exists."""
    served_model_name: str
    hf_config: "PretrainedConfig"
    dtype: "torch.dtype"
    context_len: int
    """Longest request, prompt and output, in tokens, by the options or else by the model."""
    max_model_len: int
    """The same, cut to what the KV cache holds."""
    seed: int
    skip_tokenizer_init: bool

    def get_num_layers(self, parallel_config: ParallelConfig) -> int:
        """Decoder layers on one rank."""
        return int(self.hf_config.num_hidden_layers)

    def get_num_attention_heads(self, parallel_config: ParallelConfig) -> int:
        """Query heads on one rank."""
        return int(self.hf_config.num_attention_heads) // parallel_config.tensor_parallel_size

    def get_num_kv_heads(self, parallel_config: ParallelConfig) -> int:
        """Key/value heads on one rank."""
        num_heads = getattr(self.hf_config, "num_key_value_heads", None) or self.hf_config.num_attention_heads
        return int(num_heads) // parallel_config.tensor_parallel_size

    def get_head_size(self) -> int:
        """Elements of one head; not always hidden_size / num_attention_heads."""
        explicit = getattr(self.hf_config, "head_dim", None)
        return int(explicit or self.hf_config.hidden_size // self.hf_config.num_attention_heads)

    def get_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return int(self.hf_config.vocab_size)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache on the device."""

    block_size: int
    """Tokens of one block."""
    num_kv_blocks: int
    """Blocks of the pool, the null block included; 0 until a worker has found out how many the device holds."""
    enable_prefix_caching: bool
    prefix_caching_hash_algo: str = "sha256_cbor"
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that all together may take."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    policy: SchedulingPolicy = "fcfs"
    long_prefill_token_threshold: int = 0
    """Most tokens of one request in one step, so that a long prompt leaves room for others; 0 sets no such limit."""
    async_scheduling: bool = False
    """Whether the next step is scheduled while the model still runs the last one."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine was told, resolved and checked. The counterpart of vLLM's VllmConfig."""

    model_config: ModelConfig
    cache_config: CacheConfig
    scheduler_config: SchedulerConfig
    parallel_config: ParallelConfig
    device: "torch.device"
    attention_backend: AttentionBackendName
    kv_transfer_config: KVTransferConfig | None
    kv_events_config: KVEventsConfig | None
    num_threads: int | None
    cpu_threads_bind: Literal["none", "all"] = "none"
    kernels: Literal["auto", "torch"] = "auto"
    batch_invariant: bool = False
    enforce_eager: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """The options it was made from, as JSON knows them: other ranks make the same configuration from them."""

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block over all layers on one rank: 2 (K, V) x layers x heads x tokens x head size."""
        model, parallel = self.model_config, self.parallel_config
        elements = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
        return 2 * elements * self.cache_config.block_size * model.dtype.itemsize


def fit_to_pool(config: EngineConfig, num_kv_blocks: int) -> EngineConfig:
    """Set the pool's size and what depends on it."""
    model, scheduler = config.model_config, config.scheduler_config
    capacity = (num_kv_blocks - 1) * config.cache_config.block_size  # block 0 is the null block
    max_model_len = min(model.context_len, capacity)
    if max_model_len < model.context_len:
        logger.warning(
            "max_model_len=%d is more than the KV cache holds; using %d (num_kv_blocks=%d); "
            "raise num_kv_blocks or kv_cache_memory_gb for longer requests",
            model.context_len,
            max_model_len,
            num_kv_blocks,
        )
    if not scheduler.enable_chunked_prefill:
        # A prompt runs in one step, so the budget must hold the longest one.
        budget = max(scheduler.max_num_batched_tokens, max_model_len)
        scheduler = replace(scheduler, max_num_batched_tokens=budget)
    return replace(
        config,
        model_config=replace(model, max_model_len=max_model_len),
        cache_config=replace(config.cache_config, num_kv_blocks=num_kv_blocks),
        scheduler_config=scheduler,
    )
