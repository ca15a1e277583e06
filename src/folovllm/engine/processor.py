"""From what a user sent to what the core takes: tokenise, check, fill in. Mirrors vllm/v1/engine/processor.py."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from folovllm.config import SchedulingPolicy
from folovllm.engine.grammar import check_tokenizer, compile_grammar
from folovllm.engine.messages import EngineCoreRequest
from folovllm.errors import InvalidRequestError
from folovllm.sampling_params import SamplingParams
from folovllm.transformers_utils.chat_template import Message
from folovllm.transformers_utils.model_files import ModelFacts
from folovllm.transformers_utils.tokenizer import Tokenizer

PromptType = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit into, in tokens."""

    context_len: int
    """Prompt and output of one request, by the options or else by the model."""
    pool_tokens: int
    """What the KV pool of the device holds when one request has it for itself."""

    @property
    def max_model_len(self) -> int:
        """The smaller of the two."""
        return min(self.context_len, self.pool_tokens)

    @property
    def reason(self) -> str:
        """The smaller of the two as half a sentence for error messages."""
        if self.pool_tokens < self.context_len:
            return f"the KV pool holds {self.pool_tokens} tokens"
        return f"the maximum context length is {self.context_len} tokens"


@dataclass(slots=True)
class Processor:
    """Makes engine core requests. Without state of its own: safe to use from several threads."""

    tokenizer: Tokenizer | None
    limits: Limits
    facts: ModelFacts
    scheduling_policy: SchedulingPolicy = "fcfs"
    eos_token_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        ids = ([] if own is None else [own]) + list(self.facts.eos_token_ids)
        self.eos_token_ids = tuple(dict.fromkeys(ids))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequestError: the engine runs without one.
        """
        if self.tokenizer is None:
            raise InvalidRequestError("this engine runs without a tokenizer; send token ids instead of text")
        return self.tokenizer

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt for a conversation, special tokens included; `variables` go to the chat template.

        Raises:
            InvalidRequestError: no tokenizer, no chat template, or messages the template refuses.
        """
        if not messages:
            raise InvalidRequestError("messages is empty; it must hold at least one message")
        return self.require_tokenizer().apply_chat_template(messages, **variables)

    def tokenize(self, prompt: PromptType, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, checked against the vocabulary and the context.

        Raises:
            InvalidRequestError: the prompt is empty, too long, or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            token_ids = self.require_tokenizer().encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = list(prompt)
        self.check_token_ids(token_ids)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; it must have at least one token")
        self._check_length(len(token_ids))
        return token_ids

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Return when all are in the vocabulary.

        Raises:
            InvalidRequestError: one is not.
        """
        if not set(map(type, token_ids)) <= {int}:
            bad = next(i for i in token_ids if type(i) is not int)
            raise InvalidRequestError(f"the prompt holds {bad!r}; token ids must be integers")
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.facts.vocab_size):
            outside = next(i for i in token_ids if not 0 <= i < self.facts.vocab_size)
            raise InvalidRequestError(
                f"the prompt holds token id {outside}; it must be from 0 to {self.facts.vocab_size - 1}"
            )

    def make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> EngineCoreRequest:
        """The request for a prompt that `tokenize` returned; `max_tokens` is cut to what the context leaves.

        One with `n` above 1 goes through `parallel_sampling.fan_out` next.

        Raises:
            InvalidRequestError: options that contradict each other or this engine.
        """
        if cache_salt is not None and not cache_salt:
            raise InvalidRequestError("cache_salt='' is not allowed; it must be a non-empty string")
        self._check_vocabulary(params)
        if priority and self.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority={priority} is not possible: this engine serves first come, first served; "
                "start it with scheduling_policy='priority', or leave priority at 0"
            )
        if params.stop:
            self.require_tokenizer()
        room = self.limits.max_model_len - len(token_ids)
        if params.max_tokens is None or params.max_tokens > room:
            params = msgspec.structs.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        grammar = None
        if params.structured_outputs is not None:
            check_tokenizer(self.tokenizer)
            grammar = compile_grammar(params.structured_outputs)
            params = msgspec.structs.replace(params, structured_outputs=None)
        return EngineCoreRequest(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            sampling_params=params,
            eos_token_ids=self.eos_token_ids,
            arrival_time=time.time(),
            cache_salt=cache_salt,
            priority=priority,
            bad_words_token_ids=tuple(self._tokenize_bad_words(params.bad_words)),
            grammar=grammar,
        )

    def _check_vocabulary(self, params: SamplingParams) -> None:
        vocab_size = self.facts.vocab_size
        for name in ("logit_bias", "allowed_token_ids"):
            outside = [token for token in getattr(params, name) or () if token >= vocab_size]
            if outside:
                raise InvalidRequestError(f"{name} has token id {outside[0]}; it must be from 0 to {vocab_size - 1}")
        if params.min_tokens and params.allowed_token_ids is not None:
            ends = {*self.eos_token_ids, *params.stop_token_ids}
            if ends.issuperset(params.allowed_token_ids):
                raise InvalidRequestError(
                    f"min_tokens={params.min_tokens} is not possible: all of allowed_token_ids end the generation"
                )

    def _tokenize_bad_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The token sequences of each word, at the beginning of a text and after a space."""
        found: list[tuple[int, ...]] = []
        for word in words:
            tokenizer, bare = self.require_tokenizer(), word.lstrip()
            first, spaced = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}"))
            found.append(first)
            # Where the space is a token of its own, the sequence without it is found after it.
            if spaced[0] != first[0] and len(spaced) == len(first):
                found.append(spaced)
        return found

    def _check_length(self, length: int) -> None:
        if length + 1 > self.limits.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {length} tokens; at most {self.limits.max_model_len - 1} fit, because "
                f"{self.limits.reason} and at least one must be generated"
            )


class PromptTooLongError(InvalidRequestError):
    """Prompt and output do not fit the model's context or the KV cache."""
