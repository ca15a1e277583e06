"""What to measure with. The names are those of `vllm bench`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from folovllm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """One batch, again and again."""

    input_len: int = 32
    """Tokens of each prompt."""
    output_len: int = 128
    """Tokens generated for each prompt."""
    batch_size: int = 8
    """Prompts of the batch."""
    num_iters_warmup: int = 3
    """Runs before the measured ones."""
    num_iters: int = 10
    """Measured runs."""
    prompt_seed: int = 0
    """Seed of the random prompts."""
    output_json: Path | None = None
    """Write the figures to this file."""

    def check(self) -> None:
        """Return when every value is allowed.

        Raises:
            ConfigError: one is not.
        """
        _require_positive(self, "input_len", "output_len", "batch_size", "num_iters")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    """Many prompts at once."""

    num_prompts: int = 64
    """Prompts in all."""
    input_len: int = 256
    """Tokens of each prompt."""
    output_len: int = 64
    """Tokens generated for each prompt."""
    range_ratio: float = 0.0
    """Draw both lengths from [1 - r, 1 + r] times the given ones."""
    prompt_seed: int = 0
    """Seed of the random prompts and lengths."""
    output_json: Path | None = None
    """Write the figures to this file."""

    def check(self) -> None:
        """Return when every value is allowed.

        Raises:
            ConfigError: one is not.
        """
        _require_positive(self, "num_prompts", "input_len", "output_len")
        _require_share(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Requests to a running server."""

    base_url: str = "http://127.0.0.1:8000"
    """Where the server listens, without /v1."""
    endpoint: Literal["completions", "chat"] = "completions"
    """Completions of random token ids, or chats of random words."""
    model: str | None = None
    """Name of the model; the server's first one otherwise."""
    api_key: str | None = None
    """Bearer token."""
    num_prompts: int = 100
    """Requests in all."""
    input_len: int = 128
    """Tokens of each prompt; words in a chat."""
    output_len: int = 64
    """Tokens generated for each prompt."""
    range_ratio: float = 0.0
    """Draw both lengths from [1 - r, 1 + r] times the given ones."""
    request_rate: float = math.inf
    """Requests a second, at random times (a Poisson process); inf sends all at once."""
    max_concurrency: int | None = None
    """Most requests in flight."""
    temperature: float = 0.0
    """0 is greedy."""
    prompt_seed: int = 0
    """Seed of the prompts, lengths and times."""
    timeout: float = 600.0
    """Seconds that one request may take."""
    output_json: Path | None = None
    """Write the figures to this file."""

    def check(self) -> None:
        """Return when every value is allowed.

        Raises:
            ConfigError: one is not.
        """
        if self.endpoint not in ("completions", "chat"):
            raise ConfigError(f"endpoint={self.endpoint!r} is not allowed; it must be one of completions, chat")
        _require_positive(self, "num_prompts", "input_len", "output_len", "request_rate", "timeout")
        if self.max_concurrency is not None:
            _require_positive(self, "max_concurrency")
        _require_share(self)


def _require_positive(options: object, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name}={getattr(options, name)!r} is not allowed; it must be positive")


def _require_share(options: ThroughputOptions | ServeOptions) -> None:
    if not 0 <= options.range_ratio < 1:
        raise ConfigError(f"range_ratio={options.range_ratio} is not allowed; it must be from 0 to below 1")
