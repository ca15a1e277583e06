"""The options of the store as users write them: a file, the environment, or the engine's connector options.

    default  <  FLEXKV_CONFIG_PATH (YAML or JSON)  <  FLEXKV_<OPTION>  <  kv_connector_extra_config of the engine

This is the one module of the package that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec
import yaml

from flexkv.common.config import (
    CacheConfig,
    CpuTierConfig,
    EvictionConfig,
    ModelConfig,
    TransferConfig,
)
from flexkv.errors import ConfigError

ENV_PREFIX: Final = "FLEXKV_"
PATH_VARIABLE: Final = "FLEXKV_CONFIG_PATH"
SWITCH_VARIABLE: Final = "ENABLE_FLEXKV"


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
        eviction_policy: who leaves a full tier: lru.
        evict_ratio: share of a tier evicted at once, 0..1.
        num_copy_threads: threads of one worker's copies between device and CPU tier.
        transfer_timeout_s: a load or store that has not begun by then is given up, in seconds.
        runtime_dir: private directory (0700) for sockets; default below XDG_RUNTIME_DIR, else the temporary directory.
    """

    enabled: bool = True
    cpu_cache_gb: float = 4.0
    eviction_policy: str = "lru"
    evict_ratio: float = 0.05
    num_copy_threads: int = 2
    transfer_timeout_s: float = 20.0
    runtime_dir: str = ""

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
        )

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
        return ResolvedConfig(
            model=_model_config(vllm_config),
            cache=self.cache_config(vllm_config.cache_config.block_size),
            store_key=_store_key(transfer),
            runtime_dir=Path(self.runtime_dir) if self.runtime_dir else default_runtime_dir(),
            rank=getattr(parallel, "rank", 0) % parallel.tensor_parallel_size,
            dp_rank=getattr(parallel, "data_parallel_rank", 0),
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
