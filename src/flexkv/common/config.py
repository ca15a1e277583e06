"""What the store is told: the model whose blocks it keeps, and the tiers it may keep them in.

Every option is declared here once; `integration.config` fills these from files, the environment and engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
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
EVICTION_POLICIES: Final = ("lru", "lfu", "fifo", "mru", "slru")
SSD_BACKENDS: Final = ("auto", "io_uring", "threads")
REMOTE_WRITES: Final = ("all", "none")
SECTOR_BYTES: Final = 4096
"""Direct I/O moves multiples of this."""
_DURABLE_ALGORITHMS: Final = ("sha256", "sha256_cbor")
_LARGEST_POOL_BLOCKS: Final = 2**31 - 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} is not allowed; it must be {allowed}")


def _require_integer(name: str, value: object, smallest: int, largest: int) -> None:
    holds = isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
    _require(holds, name, value, f"an integer within {smallest}..{largest}")


def _require_seconds(name: str, value: object, *, above_zero: bool) -> None:
    holds = isinstance(value, (int, float)) and not isinstance(value, bool)
    if holds:
        assert isinstance(value, (int, float))
        holds = (value > 0 if above_zero else value >= 0) and value < float("inf")
    _require(holds, name, value, f"a number of seconds, {'above 0' if above_zero else '0 or more'}")


def _require_size(tier: str, size_gb: object, num_blocks: object) -> None:
    """Check the size of a tier, which is given in one of two ways."""
    if (size_gb is None) == (num_blocks is None):
        raise ConfigError(
            f"the {tier} tier takes either size_gb or num_blocks, not size_gb={size_gb!r} and num_blocks={num_blocks!r}"
        )
    if size_gb is not None:
        is_number = isinstance(size_gb, (int, float)) and not isinstance(size_gb, bool)
        _require(is_number and 0 < size_gb < float("inf"), "size_gb", size_gb, "a number above 0")  # type: ignore[operator]
    if num_blocks is not None:
        whole = isinstance(num_blocks, int) and 1 <= num_blocks <= _LARGEST_POOL_BLOCKS
        _require(whole, "num_blocks", num_blocks, "an integer of at least 1")


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
        _require_size("CPU", self.size_gb, self.num_blocks)


class Durability(Enum):
    """What a stored block survives.

    PROCESS: the death of the process, kill -9 included. After a loss of power the blocks written last may be missing,
    and checksums tell those whose data did not arrive. The default: a cache need not outlive more, and nothing waits
    for the disk's caches. POWER: a loss of power too; each commit waits for the disk, and the data must have been
    synced.
    """

    PROCESS = "process"
    POWER = "power"


@dataclass(frozen=True, slots=True)
class SsdTierConfig:
    """The tier on local disks: give exactly one of the two sizes, which is that of all directories together.

    Attributes:
        directories: one per disk, made if missing; blocks are striped over them. The first holds the index.
        size_gb: its size in GiB; whole blocks only, reserved at the start.
        num_blocks: its size in blocks.
        durability: what a stored block survives.
        backend: one of `SSD_BACKENDS`; "auto" is io_uring where the system has it, else threads.
        queue_depth: requests in flight at once, of each direction, 1..4096.
        io_bytes: most bytes of a request, a multiple of 4096.
        num_threads: threads of each direction, for the backend "threads", 1..256.
        register_memory: pin the CPU tier's pool as it comes into use, so that requests need not.
        direct: read and write past the page cache.
    """

    directories: tuple[Path, ...]
    size_gb: float | None = None
    num_blocks: int | None = None
    durability: Durability = Durability.PROCESS
    backend: str = "auto"
    queue_depth: int = 128
    io_bytes: int = 2**20
    num_threads: int = 8
    register_memory: bool = True
    direct: bool = True

    def __post_init__(self) -> None:
        is_paths = isinstance(self.directories, tuple) and all(isinstance(path, Path) for path in self.directories)
        _require(
            is_paths and len(self.directories) >= 1, "directories", self.directories, "a tuple of one path or more"
        )
        _require_size("SSD", self.size_gb, self.num_blocks)
        _require(isinstance(self.durability, Durability), "durability", self.durability, "a Durability")
        _require(self.backend in SSD_BACKENDS, "backend", self.backend, f"one of {', '.join(SSD_BACKENDS)}")
        _require_integer("queue_depth", self.queue_depth, 1, 4096)
        _require_integer("io_bytes", self.io_bytes, SECTOR_BYTES, 2**30)
        _require(self.io_bytes % SECTOR_BYTES == 0, "io_bytes", self.io_bytes, f"a multiple of {SECTOR_BYTES}")
        _require_integer("num_threads", self.num_threads, 1, 256)


@dataclass(frozen=True, slots=True)
class ResilienceConfig:
    """How often to ask a remote store, and when to stop asking.

    Attributes:
        max_retries: attempts after the first, for failures that may pass; never beyond the deadline.
        backoff_s: longest wait before the first retry; it doubles with each, and is jittered down to half.
        max_backoff_s: where the doubling ends.
        failure_limit: failed calls in a row after which the store is left alone.
        cooldown_s: for how long; then one call finds out.
    """

    max_retries: int = 2
    backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    failure_limit: int = 3
    cooldown_s: float = 5.0

    def __post_init__(self) -> None:
        for name, smallest in (("max_retries", 0), ("failure_limit", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
            _require(whole, name, value, f"an integer of at least {smallest}")
        for name in ("backoff_s", "max_backoff_s", "cooldown_s"):
            _require_seconds(name, getattr(self, name), above_zero=False)


@dataclass(frozen=True, slots=True)
class RemoteTierConfig:
    """The tier that several machines share.

    Attributes:
        url: the store: file:///dir, redis://host, s3://bucket/prefix or mooncake://host:port, each with its options.
        namespace: set before the namespace of every block's key; stores with different ones share nothing.
        write: "all" puts what the CPU tier gets, "none" only reads.
        get_deadline_s: a load that is not over so long after it was asked for is a miss, in seconds.
        put_deadline_s: a store that is not over so long after it was asked for is given up, in seconds.
        num_get_threads: loads at once, 1..64.
        num_put_threads: stores at once, 1..64.
        resilience: retries and circuit breaker.
    """

    url: str = field(repr=False)  # it may hold a password
    namespace: str | None = None
    write: str = "all"
    get_deadline_s: float = 5.0
    put_deadline_s: float = 15.0
    num_get_threads: int = 4
    num_put_threads: int = 2
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or "://" not in self.url:  # not shown: it may hold a password
            raise ConfigError("url is not allowed; it must look like scheme://place")
        is_name = self.namespace is None or (isinstance(self.namespace, str) and self.namespace != "")
        _require(is_name, "namespace", self.namespace, "None or a string that is not empty")
        _require(self.write in REMOTE_WRITES, "write", self.write, f"one of {', '.join(REMOTE_WRITES)}")
        _require_seconds("get_deadline_s", self.get_deadline_s, above_zero=True)
        _require_seconds("put_deadline_s", self.put_deadline_s, above_zero=True)
        _require_integer("num_get_threads", self.num_get_threads, 1, 64)
        _require_integer("num_put_threads", self.num_put_threads, 1, 64)


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
        ssd: the tier on local disks.
        remote: the tier that several machines share.
    """

    cpu: CpuTierConfig
    tokens_per_block: int = 16
    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    hash_algorithm: str = "sha256_cbor"
    hash_seed: str | None = None
    ssd: SsdTierConfig | None = None
    remote: RemoteTierConfig | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.tokens_per_block, int) and self.tokens_per_block >= 1
        _require(whole, "tokens_per_block", self.tokens_per_block, "an integer of at least 1")
        allowed = f"one of {', '.join(ALGORITHMS)}"
        _require(self.hash_algorithm in ALGORITHMS, "hash_algorithm", self.hash_algorithm, allowed)
        if self.ssd is not None or self.remote is not None:
            durable = f"one of {', '.join(_DURABLE_ALGORITHMS)} with an SSD or remote tier, where names must last"
            _require(self.hash_algorithm in _DURABLE_ALGORITHMS, "hash_algorithm", self.hash_algorithm, durable)

    def pool_block_stride(self, model: ModelConfig) -> int:
        """Bytes from one block of the CPU tier to the next: with an SSD tier such that direct I/O needs no copies."""
        block_bytes = model.block_bytes(self.tokens_per_block)
        return block_bytes if self.ssd is None else -(-block_bytes // SECTOR_BYTES) * SECTOR_BYTES

    def num_cpu_blocks(self, model: ModelConfig) -> int:
        """Blocks of `model` that the CPU tier holds.

        Raises:
            ConfigError: it is smaller than one block, or larger than the memory of the machine.
        """
        block_bytes = self.pool_block_stride(model)
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
