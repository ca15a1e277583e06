"""How the tokens of one request are chosen: every field is honoured. Mirrors vllm/sampling_params.py."""

import difflib
from typing import Any

import msgspec

from folovllm.errors import InvalidRequestError

GREEDY_EPSILON = 1e-5


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling options of one request, validated on construction.

    Raises:
        InvalidRequestError: a value is out of its range; the message names the option and the range.
    """

    temperature: float = 1.0
    """0 means greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    seed: int | None = None
    """Makes the request reproducible by itself, whoever shares its batch."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means up to the model's context length."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked until this many tokens are generated."""
    stop: tuple[str, ...] = ()
    """Generation ends when the text contains one of these; the text is cut before it."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with one of these tokens; the token is kept in `token_ids`, not in the text."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "a number from 0 to 100")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (all tokens), or a positive integer")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1, or None")
        _require(
            0 <= self.min_tokens <= (self.max_tokens or self.min_tokens),
            "min_tokens",
            self.min_tokens,
            "from 0 to max_tokens",
        )
        _require(all(self.stop), "stop", self.stop, "non-empty strings")
        _require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids >= 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_EPSILON

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> "SamplingParams":
        """Build from loosely typed options (a JSON body), naming an unknown or mistyped one.

        Raises:
            InvalidRequestError: an unknown option (with the nearest known name), a wrong type or a bad value.
        """
        for name in options:
            if name not in cls.__struct_fields__:
                near = difflib.get_close_matches(name, cls.__struct_fields__, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(cls.__struct_fields__)}"
                raise InvalidRequestError(f"unknown sampling option {name!r}{hint}")
        if isinstance(options.get("stop"), str):
            options = {**options, "stop": (options["stop"],)}
        try:
            return msgspec.convert(options, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"bad sampling option: {error}") from error


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{name}={value!r} is not allowed; it must be {allowed}")
