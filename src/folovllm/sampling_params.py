"""How the tokens of one request are chosen: every field is honoured. Mirrors vllm/sampling_params.py."""

import difflib
import math
from typing import Any

import msgspec

from folovllm.errors import InvalidRequestError

GREEDY_EPSILON = 1e-5
MAX_N = 1024
MAX_LOGPROBS = 20


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What the generated text must look like: exactly one of the first five fields.

    Raises:
        InvalidRequestError: none or several of them are given, or one is empty.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as an object or as its text."""
    regex: str | None = None
    """A regular expression that the whole text matches."""
    choice: tuple[str, ...] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """A context-free grammar, in Lark or GBNF notation."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    """For `json` and `json_object`: no whitespace between the parts."""
    whitespace_pattern: str | None = None
    """For `json` and `json_object`: a regular expression of the whitespace allowed between the parts."""
    disable_additional_properties: bool = False
    """For `json`: objects of the schema that do not say otherwise have the properties they name and no others."""

    def __post_init__(self) -> None:
        _make_tuple(self, "choice")
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs has {' and '.join(given) or 'none of its kinds'}; "
                f"it must have exactly one of {', '.join(kinds)}"
            )
        for name in ("json", "regex", "grammar"):
            if (value := getattr(self, name)) is not None:
                _require(value != "", f"structured_outputs.{name}", value, "not empty")
        if self.choice is not None:
            _require(len(self.choice) > 0, "structured_outputs.choice", self.choice, "a list of at least one text")
        is_json = given[0] in ("json", "json_object")
        for name in ("disable_any_whitespace", "whitespace_pattern", "disable_additional_properties"):
            _require(is_json or not getattr(self, name), f"structured_outputs.{name}", getattr(self, name), "with json")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling options of one request, validated on construction.

    Raises:
        InvalidRequestError: a value is out of its range; the message names the option and the range.
    """

    n: int = 1
    """Sequences to generate for the prompt; the i-th is drawn with `seed + i`."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that was generated before; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token as often as it was generated; from -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the positive, multiplies the negative logits of tokens of the prompt and of those generated; above 0."""
    temperature: float = 1.0
    """0 means greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens whose probability is at least this share of the most likely one's; from 0 to 1."""
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
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated: the last token of their token sequences is masked where it would complete one."""
    logit_bias: dict[int, float] | None = None
    """Token id -> number from -100 to 100 that is added to its logit."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these are generated."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the log-probabilities of this many most likely tokens at each position, and always the chosen one's."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_probabilities()
        self._check_ends()
        self._check_token_lists()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"from 0 to {MAX_LOGPROBS}, or None")
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            raise InvalidRequestError("structured_outputs and allowed_token_ids cannot be used together")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes a logit."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

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
        for name in ("stop", "bad_words"):
            if isinstance(options.get(name), str):
                options = {**options, name: (options[name],)}
        try:
            return msgspec.convert(options, cls, str_keys=True)  # JSON has no integer keys
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"bad sampling option: {error}") from error

    def _normalise(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            _make_tuple(self, name)

    def _check_probabilities(self) -> None:
        _require(1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "a number from -2 to 2")
        penalty = self.repetition_penalty
        _require(0.0 < penalty < math.inf, "repetition_penalty", penalty, "a number above 0")
        _require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "a number from 0 to 100")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (all tokens), or a positive integer")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number from 0 to 1")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")

    def _check_ends(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1, or None")
        most = self.max_tokens or self.min_tokens
        _require(0 <= self.min_tokens <= most, "min_tokens", self.min_tokens, "from 0 to max_tokens")
        _require(all(self.stop), "stop", self.stop, "non-empty strings")
        _require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "token ids >= 0")

    def _check_token_lists(self) -> None:
        _require(all(word.strip() for word in self.bad_words), "bad_words", self.bad_words, "non-blank strings")
        bias = self.logit_bias or {}
        _require(all(_is_token_id(token) for token in bias), "logit_bias", self.logit_bias, "token id -> bias")
        in_range = all(-100.0 <= value <= 100.0 for value in bias.values())
        _require(in_range, "logit_bias", self.logit_bias, "biases from -100 to 100")
        allowed = self.allowed_token_ids
        _require(
            allowed is None or (len(allowed) > 0 and all(map(_is_token_id, allowed))),
            "allowed_token_ids",
            allowed,
            "a list of at least one token id",
        )


def _make_tuple(params: msgspec.Struct, name: str) -> None:
    """What was built by hand may hold a list, or a single text, which must not be read as a list of characters."""
    value = getattr(params, name)
    if isinstance(value, str):
        msgspec.structs.force_setattr(params, name, (value,))
    elif value is not None and not isinstance(value, tuple):
        msgspec.structs.force_setattr(params, name, tuple(value))


def _is_token_id(token: object) -> bool:
    return type(token) is int and token >= 0


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{name}={value!r} is not allowed; it must be {allowed}")
