"""The options of the store as users write them: a file, the environment, or the engine's connector options.

    default  <  FLEXKV_CONFIG_PATH (YAML or JSON)  <  FLEXKV_<OPTION>  <  kv_connector_extra_config of the engine

This is the one module of the package that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec
import yaml

from flexkv.common.config import (
    CacheConfig,
    CpuTierConfig,
    Durability,
    EvictionConfig,
    ModelConfig,
    RemoteTierConfig,
    ResilienceConfig,
    SsdTierConfig,
    TransferConfig,
)
from flexkv.errors import ConfigError

ENV_PREFIX: Final = "FLEXKV_"
PATH_VARIABLE: Final = "FLEXKV_CONFIG_PATH"
SWITCH_VARIABLE: Final = "ENABLE_FLEXKV"


def _defaults(tier: Any) -> dict[str, Any]:
    return {option.name: option.default for option in fields(tier) if option.default is not MISSING}


# The defaults of the tiers are declared with the tiers.
_SSD: Final = _defaults(SsdTierConfig)
_REMOTE: Final = _defaults(RemoteTierConfig)
_RESILIENCE: Final = _defaults(ResilienceConfig)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What one engine's connector works with; both its halves resolve to the same.

    Attributes:
        store_key: names this engine's store, so that its halves find each other.
        runtime_dir: private directory that holds the sockets of all stores.
        rank: this worker's tensor-parallel rank.
        dp_rank: data-parallel rank of the engine.
        can_load: the engine's role lets it take KV from the store.
        can_save: the engine's role lets it give KV to the store.
    """

    model: ModelConfig
    cache: CacheConfig
    store_key: str
    runtime_dir: Path
    rank: int
    dp_rank: int
    can_load: bool
    can_save: bool


@dataclass(frozen=True, slots=True)
class FlexKVConfig:
    """Options, as written. Each is also `FLEXKV_<NAME>` in the environment.

    Attributes:
        enabled: False turns the store off: every lookup is a miss (also ENABLE_FLEXKV=0).
        cpu_cache_gb: size of the CPU tier in GiB; memory is taken as it fills.
        eviction_policy: who leaves a full tier: lru, lfu, fifo, mru or slru.
        evict_ratio: share of a tier evicted at once, 0..1.
        num_copy_threads: threads of one worker's copies between device and CPU tier.
        transfer_timeout_s: a load or store that has not begun by then is given up, in seconds.
        runtime_dir: private directory (0700) for sockets; default below XDG_RUNTIME_DIR, else the temporary directory.
        ssd_cache_gb: size of the SSD tier in GiB, reserved at the start; there is none without it and ssd_cache_dir.
        ssd_cache_dir: its directories, one per disk, as `a;b`; with data parallelism each rank takes one of its own
            below each.
        ssd_durability: what a stored block survives: process (the death of ours) or power (a loss of power too).
        ssd_backend: auto, io_uring or threads.
        ssd_queue_depth: requests in flight at once, in each direction.
        ssd_io_bytes: most bytes of a request, a multiple of 4096.
        ssd_num_threads: threads of each direction, for the backend threads.
        ssd_register_memory: pin the CPU tier as it comes into use, so that requests need not.
        ssd_direct: read and write past the page cache.
        remote_url: file:///dir, redis://host, s3://bucket/prefix or mooncake://host:port; no remote tier without it.
        remote_namespace: stores of different ones share nothing; empty for none.
        remote_write: all, or none to read only.
        remote_get_deadline_s: a load that takes longer is a miss, in seconds.
        remote_put_deadline_s: a store that takes longer is given up, in seconds.
        remote_num_get_threads: loads at once.
        remote_num_put_threads: stores at once.
        remote_max_retries: attempts after the first, within the deadline.
        remote_backoff_s: longest wait before the first retry, in seconds; it doubles with each.
        remote_max_backoff_s: where the doubling ends, in seconds.
        remote_failure_limit: failed calls in a row after which the remote store is left alone.
        remote_cooldown_s: for so many seconds.
    """

    enabled: bool = True
    cpu_cache_gb: float = 4.0
    eviction_policy: str = "lru"
    evict_ratio: float = 0.05
    num_copy_threads: int = 2
    transfer_timeout_s: float = 20.0
    runtime_dir: str = ""
    ssd_cache_gb: float | None = None
    ssd_cache_dir: str = ""
    ssd_durability: str = _SSD["durability"].value
    ssd_backend: str = _SSD["backend"]
    ssd_queue_depth: int = _SSD["queue_depth"]
    ssd_io_bytes: int = _SSD["io_bytes"]
    ssd_num_threads: int = _SSD["num_threads"]
    ssd_register_memory: bool = _SSD["register_memory"]
    ssd_direct: bool = _SSD["direct"]
    remote_url: str = field(default="", repr=False)  # it may hold a password
    remote_namespace: str = ""
    remote_write: str = _REMOTE["write"]
    remote_get_deadline_s: float = _REMOTE["get_deadline_s"]
    remote_put_deadline_s: float = _REMOTE["put_deadline_s"]
    remote_num_get_threads: int = _REMOTE["num_get_threads"]
    remote_num_put_threads: int = _REMOTE["num_put_threads"]
    remote_max_retries: int = _RESILIENCE["max_retries"]
    remote_backoff_s: float = _RESILIENCE["backoff_s"]
    remote_max_backoff_s: float = _RESILIENCE["max_backoff_s"]
    remote_failure_limit: int = _RESILIENCE["failure_limit"]
    remote_cooldown_s: float = _RESILIENCE["cooldown_s"]

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> FlexKVConfig:
        """Read the file that FLEXKV_CONFIG_PATH names, then the environment.

        Raises:
            ConfigError: an unknown option, a value it cannot have, or a file that cannot be read.
        """
        env = os.environ if environ is None else environ
        config = cls()
        if path := env.get(PATH_VARIABLE):
            config = cls.from_file(Path(path))
        names = [name for name in env if name.startswith(ENV_PREFIX) and name != PATH_VARIABLE]
        options = {name.removeprefix(ENV_PREFIX).lower(): env[name] for name in names}
        config = config.override(options, source="environment", spell=lambda name: ENV_PREFIX + name.upper())
        if SWITCH_VARIABLE in env:
            config = config.override({"enabled": env[SWITCH_VARIABLE]}, source=SWITCH_VARIABLE)
        return config

    @classmethod
    def from_file(cls, path: Path) -> FlexKVConfig:
        """Read a YAML or JSON file with a mapping of options.

        Raises:
            ConfigError: it cannot be read, is no mapping, or has a bad option.
        """
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"the options in {path} cannot be read: {error}") from error
        if not isinstance(options, dict):
            raise ConfigError(f"{path} holds no mapping of options")
        return cls().override(options, source=str(path))

    def override(self, options: Mapping[str, Any], source: str, spell: Any = str) -> FlexKVConfig:
        """Return a copy with these options set.

        Args:
            options: by name, as text or typed.
            source: where they come from, for messages.
            spell: how the source spells the name of an option.

        Raises:
            ConfigError: an unknown option, or a value it cannot have.
        """
        kinds = get_type_hints(FlexKVConfig)
        known = {f.name: kinds[f.name] for f in fields(self)}
        values = {}
        for name, value in options.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {spell(near[0])}?" if near else f"known are {', '.join(map(spell, known))}"
                raise ConfigError(f"unknown flexkv option {spell(str(name))} in {source}; {hint}")
            try:
                values[name] = msgspec.convert(value, known[name], strict=False)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{spell(name)}={value!r} in {source} is not allowed: {error}") from error
        return replace(self, **values)

    def cache_config(self, tokens_per_block: int) -> CacheConfig:
        """Return the tiers these options describe.

        Raises:
            ConfigError: a value out of its range.
        """
        return CacheConfig(
            CpuTierConfig(size_gb=self.cpu_cache_gb),
            tokens_per_block,
            EvictionConfig(self.eviction_policy, self.evict_ratio),
            TransferConfig(self.num_copy_threads, self.transfer_timeout_s),
            ssd=self._ssd_tier(),
            remote=self._remote_tier(),
        )

    def _ssd_tier(self) -> SsdTierConfig | None:
        if self.ssd_cache_gb is None and not self.ssd_cache_dir:
            self._require_defaults("ssd_", "ssd_cache_gb and ssd_cache_dir")
            return None
        if self.ssd_cache_gb is None or not self.ssd_cache_dir:
            missing = "ssd_cache_gb" if self.ssd_cache_gb is None else "ssd_cache_dir"
            raise ConfigError(f"an SSD tier takes both ssd_cache_gb and ssd_cache_dir; {missing} is missing")
        if self.ssd_durability not in [level.value for level in Durability]:
            allowed = ", ".join(level.value for level in Durability)
            raise ConfigError(f"ssd_durability={self.ssd_durability!r} is not allowed; it must be one of {allowed}")
        parts = [part for part in self.ssd_cache_dir.split(";") if part]
        with _named("ssd_", {"size_gb": "cache_gb", "directories": "cache_dir"}):
            return SsdTierConfig(
                directories=tuple(Path(part) for part in parts),
                size_gb=self.ssd_cache_gb,
                durability=Durability(self.ssd_durability),
                backend=self.ssd_backend,
                queue_depth=self.ssd_queue_depth,
                io_bytes=self.ssd_io_bytes,
                num_threads=self.ssd_num_threads,
                register_memory=self.ssd_register_memory,
                direct=self.ssd_direct,
            )

    def _remote_tier(self) -> RemoteTierConfig | None:
        if not self.remote_url:
            self._require_defaults("remote_", "remote_url")
            return None
        with _named("remote_", {}):
            return RemoteTierConfig(
                url=self.remote_url,
                namespace=self.remote_namespace or None,
                write=self.remote_write,
                get_deadline_s=self.remote_get_deadline_s,
                put_deadline_s=self.remote_put_deadline_s,
                num_get_threads=self.remote_num_get_threads,
                num_put_threads=self.remote_num_put_threads,
                resilience=ResilienceConfig(
                    max_retries=self.remote_max_retries,
                    backoff_s=self.remote_backoff_s,
                    max_backoff_s=self.remote_max_backoff_s,
                    failure_limit=self.remote_failure_limit,
                    cooldown_s=self.remote_cooldown_s,
                ),
            )

    def _require_defaults(self, prefix: str, needed: str) -> None:
        """Refuse options of a tier that is not there: they would do nothing."""
        for option in fields(self):
            if option.name.startswith(prefix) and getattr(self, option.name) != option.default:
                raise ConfigError(f"{option.name} is given without {needed}: there is no such tier")

    def post_init_from_vllm_config(self, vllm_config: Any) -> ResolvedConfig:
        """Combine the options with what an engine (vLLM's VllmConfig, or one with its names) says of itself.

        Raises:
            ConfigError: a value out of its range, or a model we cannot keep.
        """
        parallel = vllm_config.parallel_config
        transfer = vllm_config.kv_transfer_config
        if getattr(parallel, "pipeline_parallel_size", 1) > 1:
            raise ConfigError("pipeline_parallel_size > 1 is not supported by flexkv; use tensor parallelism")
        role = getattr(transfer, "kv_role", None) or "kv_both"
        dp_rank = getattr(parallel, "data_parallel_rank", 0)
        cache = self.cache_config(vllm_config.cache_config.block_size)
        if cache.ssd is not None and getattr(parallel, "data_parallel_size", 1) > 1:
            own = tuple(directory / f"dp-{dp_rank}" for directory in cache.ssd.directories)
            cache = replace(cache, ssd=replace(cache.ssd, directories=own))
        return ResolvedConfig(
            model=_model_config(vllm_config),
            cache=cache,
            store_key=_store_key(transfer),
            runtime_dir=Path(self.runtime_dir) if self.runtime_dir else default_runtime_dir(),
            rank=getattr(parallel, "rank", 0) % parallel.tensor_parallel_size,
            dp_rank=dp_rank,
            can_load=role in ("kv_both", "kv_consumer"),
            can_save=role in ("kv_both", "kv_producer"),
        )


def config_for_engine(vllm_config: Any) -> FlexKVConfig:
    """Return the options for an engine: those of file and environment, overridden by its connector options.

    Raises:
        ConfigError: an unknown option, or a value it cannot have.
    """
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    return FlexKVConfig.from_env().override(extra, source="kv_connector_extra_config")


@contextmanager
def _named(prefix: str, renamed: Mapping[str, str]) -> Iterator[None]:
    """Let errors, which begin with the name of an option, name it as users write it."""
    try:
        yield
    except ConfigError as error:
        name, rest = re.split(r"(?!\w)", str(error), maxsplit=1)
        raise ConfigError(f"{prefix}{renamed.get(name, name)}{rest}") from error


def default_runtime_dir() -> Path:
    """Return this user's directory for the sockets of all stores."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK | os.X_OK):  # containers often name one that is not there
        return Path(base) / "kvstrata"
    return Path(tempfile.gettempdir()) / f"kvstrata-{os.geteuid()}"


def _store_key(transfer: Any) -> str:
    """The engine's id; an engine without one has both halves in this process and shares its configuration object."""
    return transfer.engine_id or f"process-{os.getpid()}-{id(transfer):x}"


def _model_config(vllm_config: Any) -> ModelConfig:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return ModelConfig(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=_kv_dtype(vllm_config),
        tp_size=parallel.tensor_parallel_size,
        use_mla=bool(getattr(model, "use_mla", False)),
        model_id=str(model.model),
    )


def _kv_dtype(vllm_config: Any) -> str:
    """Element type of the KV tensors: the model's, unless the engine keeps its KV cache in another."""
    cache_dtype = str(getattr(vllm_config.cache_config, "cache_dtype", "auto"))
    if cache_dtype == "auto":
        return str(vllm_config.model_config.dtype).removeprefix("torch.")
    return "uint8" if cache_dtype.startswith("fp8") else cache_dtype  # engines hold fp8 as raw bytes
