"""What the store is told: the model whose blocks it keeps, and the tiers it may keep them in.

Every option is declared here once; `integration.config` fills these from files, the environment and engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexkv.errors import ConfigError
from kvblocks.hashing import ALGORITHMS

GIB: Final = 2**30
DTYPE_BYTES: Final = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
EVICTION_POLICIES: Final = ("lru",)
_LARGEST_POOL_BLOCKS: Final = 2**31 - 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be {allowed}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one model's KV blocks.

    Attributes:
        num_layers: layers that have a KV cache.
        num_kv_heads: key/value heads on one tensor-parallel rank.
        head_size: elements of one head.
        dtype: element type of the KV cache, one of `DTYPE_BYTES`.
        tp_size: tensor-parallel ranks; a block of the store holds the slices of all of them.
        use_mla: one latent vector per token instead of keys and values.
        model_id: names the weights; blocks of different ids are never shared.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    tp_size: int = 1
    use_mla: bool = False
    model_id: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size", "tp_size"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, value, "an integer of at least 1")
        _require(self.dtype in DTYPE_BYTES, "dtype", self.dtype, f"one of {', '.join(DTYPE_BYTES)}")

    @property
    def kv_dim(self) -> int:
        """Planes of a block: keys and values, or the one latent plane of MLA."""
        return 1 if self.use_mla else 2

    def rank_block_bytes(self, tokens_per_block: int) -> int:
        """Bytes of one rank's slice of a block, all layers."""
        elements = self.num_layers * self.kv_dim * self.num_kv_heads * self.head_size * tokens_per_block
        return elements * DTYPE_BYTES[self.dtype]

    def block_bytes(self, tokens_per_block: int) -> int:
        """Bytes of one block in the store: the slices of all ranks."""
        return self.tp_size * self.rank_block_bytes(tokens_per_block)


@dataclass(frozen=True, slots=True)
class CpuTierConfig:
    """The tier in host memory: give exactly one of the two.

    Attributes:
        size_gb: its size in GiB; whole blocks only, the rest stays unused.
        num_blocks: its size in blocks.
    """

    size_gb: float | None = None
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        if (self.size_gb is None) == (self.num_blocks is None):
            raise ConfigError(
                f"the CPU tier takes either size_gb or num_blocks, not "
                f"size_gb={self.size_gb!r} and num_blocks={self.num_blocks!r}"
            )
        if self.size_gb is not None:
            is_number = isinstance(self.size_gb, (int, float)) and not isinstance(self.size_gb, bool)
            _require(is_number and self.size_gb > 0, "size_gb", self.size_gb, "a number above 0")
        if self.num_blocks is not None:
            whole = isinstance(self.num_blocks, int) and 1 <= self.num_blocks <= _LARGEST_POOL_BLOCKS
            _require(whole, "num_blocks", self.num_blocks, "an integer of at least 1")


@dataclass(frozen=True, slots=True)
class EvictionConfig:
    """Who leaves a full tier, and when.

    Attributes:
        policy: one of `EVICTION_POLICIES`.
        evict_ratio: share of the tier's blocks evicted at once, at least what is needed.
        start_threshold: share of the tier in use above which eviction starts; 1.0 means only when it is full.
    """

    policy: str = "lru"
    evict_ratio: float = 0.05
    start_threshold: float = 1.0

    def __post_init__(self) -> None:
        _require(self.policy in EVICTION_POLICIES, "policy", self.policy, f"one of {', '.join(EVICTION_POLICIES)}")
        _require(0.0 <= self.evict_ratio <= 1.0, "evict_ratio", self.evict_ratio, "within 0..1")
        _require(0.0 < self.start_threshold <= 1.0, "start_threshold", self.start_threshold, "above 0, at most 1")


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How bytes move.

    Attributes:
        num_copy_threads: threads of one device worker's copies, the worker's own included.
        op_timeout_s: after this long an op that has not begun is given up, and its blocks are recomputed.
        max_tasks: tasks held at once; beyond them a get is a miss and a put stores nothing.
    """

    num_copy_threads: int = 2
    op_timeout_s: float = 20.0
    max_tasks: int = 4096

    def __post_init__(self) -> None:
        _require(1 <= self.num_copy_threads <= 64, "num_copy_threads", self.num_copy_threads, "within 1..64")
        _require(self.op_timeout_s > 0, "op_timeout_s", self.op_timeout_s, "a number of seconds above 0")
        _require(self.max_tasks >= 1, "max_tasks", self.max_tasks, "at least 1")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The tiers of one store; a tier that is not configured is absent.

    Attributes:
        cpu: the tier in host memory.
        tokens_per_block: the engine's block size.
        eviction: how full tiers make room.
        transfer: how bytes move.
        hash_algorithm: one of `kvblocks.hashing.ALGORITHMS`; names the store's blocks, whatever the engine uses.
        hash_seed: seed of the hash; None for the algorithm's fixed one.
    """

    cpu: CpuTierConfig
    tokens_per_block: int = 16
    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    hash_algorithm: str = "sha256_cbor"
    hash_seed: str | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.tokens_per_block, int) and self.tokens_per_block >= 1
        _require(whole, "tokens_per_block", self.tokens_per_block, "an integer of at least 1")
        allowed = f"one of {', '.join(ALGORITHMS)}"
        _require(self.hash_algorithm in ALGORITHMS, "hash_algorithm", self.hash_algorithm, allowed)

    def num_cpu_blocks(self, model: ModelConfig) -> int:
        """Blocks of `model` that the CPU tier holds.

        Raises:
            ConfigError: it is smaller than one block, or larger than the memory of the machine.
        """
        block_bytes = model.block_bytes(self.tokens_per_block)
        if self.cpu.num_blocks is not None:
            num_blocks = self.cpu.num_blocks
        else:
            assert self.cpu.size_gb is not None
            num_blocks = int(self.cpu.size_gb * GIB) // block_bytes
        if num_blocks < 1:
            raise ConfigError(
                f"a CPU tier of size_gb={self.cpu.size_gb!r} is smaller than one block of {block_bytes} bytes "
                f"({self.tokens_per_block} tokens); give at least {block_bytes / GIB:.6f}"
            )
        total = _memory_bytes()
        if total is not None and num_blocks * block_bytes > total:
            raise ConfigError(
                f"a CPU tier of {num_blocks} blocks of {block_bytes} bytes needs {num_blocks * block_bytes / GIB:.1f} "
                f"GiB, the machine has {total / GIB:.1f} GiB of memory"
            )
        return num_blocks


def _memory_bytes() -> int | None:
    """Memory of the machine, or None where the system does not say."""
    try:
        first_line = Path("/proc/meminfo").read_text(encoding="ascii").split("\n", 1)[0]
        return int(first_line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
