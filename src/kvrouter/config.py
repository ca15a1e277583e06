"""Every option of the router, declared once: one JSON or YAML document with llm-d's names.

```
RouterConfig = IndexerConfig + kvEventsConfig, proxyConfig, pods
IndexerConfig = tokenProcessorConfig, kvBlockIndexConfig, tokenizersPoolConfig, kvCacheBackendConfigs
```
Source: llm-d's kv-cache manager, whose documents keep their field names and defaults here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml

from kvrouter.config_parser import Allow, PositiveSeconds, Seconds, check_options, parse_config
from kvrouter.errors import ConfigError

POLICY_NAMES = ("kv_aware", "round_robin")
"""Names of the routing policies."""


@dataclass(frozen=True, slots=True)
class TokenProcessorConfig:
    """How token ids become block keys."""

    block_size: Annotated[int, Allow(at_least=1, at_most=65536)] = 16
    """Tokens per block key; best the engines' own block size."""
    hash_seed: str = ""
    """Seed of the keys; replicas that share an index agree on it."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class InMemoryIndexConfig:
    """The index in this process's memory."""

    size: Annotated[int, Allow(at_least=1)] = 100_000_000
    """Block keys held at most; the least recently used go first."""
    pod_cache_size: Annotated[int, Allow(at_least=1)] = 10
    """Holders remembered per key at most."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class KVBlockIndexConfig:
    """Which index backend, and its options."""

    in_memory_config: InMemoryIndexConfig = InMemoryIndexConfig()


@dataclass(frozen=True, slots=True)
class LocalTokenizerConfig:
    """Tokenizers on disk."""

    model_tokenizer_map: dict[str, str] = field(default_factory=dict)
    """Model name -> checkpoint directory with a tokenizer.json, or Hugging Face id."""


@dataclass(frozen=True, slots=True)
class TokenizersPoolConfig:
    """The threads that tokenise."""

    workers_count: Annotated[int, Allow(at_least=1, at_most=256)] = 5
    queue_size: Annotated[int, Allow(at_least=1)] = 1024
    """Prompts that may wait for a worker; further ones are routed by load alone."""
    timeout: PositiveSeconds = 2.0
    """How long routing waits for token ids before it goes by load alone."""
    local: LocalTokenizerConfig = LocalTokenizerConfig()

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class KVCacheBackendConfig:
    """What one cached block is worth in a tier."""

    name: str
    weight: Annotated[float, Allow(at_least=0.0)] = 1.0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """All that `Indexer` needs."""

    token_processor_config: TokenProcessorConfig = TokenProcessorConfig()
    kv_block_index_config: KVBlockIndexConfig = KVBlockIndexConfig()
    tokenizers_pool_config: TokenizersPoolConfig = TokenizersPoolConfig()
    kv_cache_backend_configs: tuple[KVCacheBackendConfig, ...] = (
        KVCacheBackendConfig("gpu", 1.0),
        KVCacheBackendConfig("cpu", 0.8),
        KVCacheBackendConfig("storage", 0.5),
    )
    """Tiers that are not named here weigh 1.0."""

    def tier_weights(self) -> dict[str, float]:
        """The weights by tier name, in lower case as the index has them."""
        return {backend.name.lower(): backend.weight for backend in self.kv_cache_backend_configs}


@dataclass(frozen=True, slots=True)
class KVEventsConfig:
    """How KV events are taken in."""

    concurrency: Annotated[int, Allow(at_least=1, at_most=256)] = 4
    """Event workers; the events of one pod stay in order."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """How requests are chosen for pods, passed on and given up."""

    policy: Annotated[str, Allow(choices=POLICY_NAMES)] = "kv_aware"
    max_body_bytes: Annotated[int, Allow(at_least=1024)] = 32 * 1024 * 1024
    max_in_flight: Annotated[int, Allow(at_least=1)] = 4096
    """Requests in hand at once, their bodies in memory; further ones get 503 before their body is read."""
    max_attempts: Annotated[int, Allow(at_least=1)] = 3
    """Pods tried for one request while nothing of an answer has reached the client."""
    connect_timeout: PositiveSeconds = 2.0
    idle_timeout: PositiveSeconds = 300.0
    """Longest silence of a pod, before its first byte or between two."""
    client_timeout: PositiveSeconds = 60.0
    """Longest a client may take to send its body, or to make room for the next part of its answer."""
    keepalive_timeout: PositiveSeconds = 4.0
    """How long an idle connection to a pod is kept; shorter than pods keep theirs (uvicorn: 5 s)."""
    health_interval: PositiveSeconds = 2.0
    health_timeout: PositiveSeconds = 5.0
    health_failures: Annotated[int, Allow(at_least=1)] = 3
    """Health checks in a row that may time out before a pod counts as down; a refused connection counts at once."""
    breaker_failures: Annotated[int, Allow(at_least=1)] = 5
    """Answers in a row with status 500 or above that open a pod's circuit breaker."""
    breaker_cooldown: PositiveSeconds = 5.0
    """How long an open breaker keeps requests away before one is let through as a trial."""
    decode_token_cost: Annotated[float, Allow(at_least=0.0)] = 16.0
    """What one running decode costs, in prefill tokens."""
    uncached_token_cost: Annotated[float, Allow(at_least=0.0)] = 2.0
    """What an uncached token of this prompt costs, in tokens queued by others: it is computed, and it evicts."""
    recent_route_ttl: Seconds = 5.0
    """How long a prompt counts as cached where it was sent, after its first byte, until the pod's events say so."""
    recent_route_blocks: Annotated[int, Allow(at_least=1)] = 1_000_000
    """Block keys of such prompts remembered at most."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class PodConfig:
    """One engine."""

    name: str
    """Name in its event topic, in metrics and in the answers' `x-kvstrata-pod`."""
    url: str
    """Base address of its OpenAI server, such as http://10.0.0.7:8000."""
    model: str | None = None
    """Model it serves; None asks its /v1/models."""
    events_endpoint: str | None = None
    """ZMQ address it publishes KV events on; None: nothing is known about its cache but what was sent to it."""
    replay_endpoint: str | None = None
    """ZMQ address that replays past events."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or "@" in self.name:
            raise ConfigError(f"a pod's name is printable text without '@', not {self.name!r}")
        try:
            parts = urlsplit(self.url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(f"pod {self.name}: url is like http://host:port, not {self.url!r}")
        for key, endpoint in (("eventsEndpoint", self.events_endpoint), ("replayEndpoint", self.replay_endpoint)):
            if endpoint is not None and not endpoint.startswith(("tcp://", "ipc://")):
                raise ConfigError(f"pod {self.name}: {key} starts with tcp:// or ipc://, not {endpoint!r}")
        if self.replay_endpoint and not self.events_endpoint:
            raise ConfigError(f"pod {self.name}: replayEndpoint needs an eventsEndpoint beside it")


@dataclass(frozen=True, slots=True)
class RouterConfig(IndexerConfig):
    """All that the proxy needs."""

    kv_events_config: KVEventsConfig = KVEventsConfig()
    proxy_config: ProxyConfig = ProxyConfig()
    pods: tuple[PodConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [pod.name for pod in self.pods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"pods: names are unique, these are not: {', '.join(twice)}")


def load_config(document: Path | str | bytes | dict[str, object]) -> RouterConfig:
    """Read a configuration from a file, from JSON or YAML text, or from a dict.

    Raises:
        ConfigError: the file cannot be read, is neither JSON nor YAML, or holds what is not allowed.
    """
    if isinstance(document, dict):
        return parse_config(RouterConfig, document)
    origin = "the configuration"
    if isinstance(document, Path):
        origin = str(document)
        try:
            document = document.read_bytes()
        except OSError as error:
            raise ConfigError(f"{origin} cannot be read: {error.strerror}") from error
    try:
        return parse_config(RouterConfig, _parse_text(document))
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{origin} is neither JSON nor YAML: {error}") from error


def parse_pod(text: str) -> PodConfig:
    """Read a `--pod` argument: a JSON object with the fields of `PodConfig`, or `name=http://host:port`.

    Raises:
        ConfigError: it is neither, or a field is not allowed.
    """
    if text.lstrip().startswith("{"):
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--pod: not valid JSON ({error}): {text}") from error
        return parse_config(PodConfig, document, "--pod")
    name, separator, url = text.partition("=")
    if not separator:
        raise ConfigError(f'--pod is name=http://host:port or a JSON object {{"name": ..., "url": ...}}, not {text!r}')
    return PodConfig(name=name.strip(), url=url.strip())


def _parse_text(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)
