"""Structured outputs through llguidance: which tokens the grammar of a request allows next.

Mirrors vllm/v1/structured_output/backend_guidance.py. vLLM fills the masks in its scheduler's process and sends them to
the workers; here the runner, which samples, follows the grammar itself.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from folovllm.engine.messages import FinishReason
from folovllm.errors import ModelLoadError
from folovllm.sample.logits_processor.interface import TokenMatcher

if TYPE_CHECKING:
    import tokenizers
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_MAX_COMPILED = 64
_WORD_BITS = 32
_OWN_EOS = "<|folovllm-end-of-grammar|>"


class GrammarMatcher:
    """One request's place in its grammar; implements `TokenMatcher`.

    Where the grammar allows its text to end, the end-of-sequence tokens are allowed beside what may follow; where
    nothing may follow, they alone are. Without any (or when they are ignored) the request ends there by itself.
    """

    def __init__(self, compiled: "CompiledGrammar", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Begin at the start of the grammar; `eos_token_ids` are the tokens that may end the text."""
        self.end: FinishReason | None = None
        self._compiled = compiled
        self._matcher = compiled.start.deep_copy()
        self._vocab_size = vocab_size
        self._eos_token_ids = np.array([i for i in eos_token_ids if i < vocab_size], dtype=np.int64)
        self._followed: list[int] = []
        self._words = np.zeros(-(-compiled.num_bits // _WORD_BITS), dtype=np.uint32)

    def allowed_tokens(self) -> npt.NDArray[np.bool_] | None:
        """See `TokenMatcher`."""
        if self.end is not None:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        bits[self._compiled.own_eos_token_id] = 0
        allowed = bits[: self._vocab_size].view(np.bool_)
        if self._matcher.is_accepting():
            allowed[self._eos_token_ids] = True
        if self._matcher.is_error() or not allowed.any():
            self._fail()
            return None
        return allowed

    def append(self, token_id: int) -> None:
        """See `TokenMatcher`."""
        self._followed.append(token_id)
        if self.end is not None:
            return
        if token_id in self._eos_token_ids and self._matcher.is_accepting():
            self.end = "stop"
        elif not self._matcher.consume_token(token_id):
            self._fail()
        elif len(self._eos_token_ids) == 0 and self._matcher.is_stopped():
            self.end = "stop"

    def sync(self, output_token_ids: Sequence[int]) -> None:
        """See `TokenMatcher`."""
        if self._followed == list(output_token_ids):
            return
        self._matcher = self._compiled.start.deep_copy()
        self._followed, self.end = [], None
        for token_id in output_token_ids:
            self.append(token_id)

    def _fail(self) -> None:
        # The parser's own limits were hit, or it met a token it had not allowed; its state follows on further lines.
        reason = self._matcher.get_error().partition("\n")[0]
        logger.error("grammar cannot be followed num_tokens=%d: %s", len(self._followed), reason or "a dead end")
        self.end = "error"


class DeadMatcher:
    """For a grammar that cannot be used at all: the request ends with its first token. Implements `TokenMatcher`."""

    def __init__(self) -> None:
        self.end: FinishReason | None = "error"

    def allowed_tokens(self) -> None:
        """See `TokenMatcher`."""

    def append(self, token_id: int) -> None:
        """See `TokenMatcher`."""

    def sync(self, output_token_ids: Sequence[int]) -> None:
        """See `TokenMatcher`."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar over the tokens of a tokenizer."""

    start: "LLMatcher"
    """At its beginning; to be copied, never advanced."""
    num_bits: int
    """Length of its masks: the tokenizer's tokens, at least as many as the model's."""
    own_eos_token_id: int
    """The token that llguidance allows where the text may end. No model knows it: which real ones there are, is each
    request's own."""


class GrammarCompiler:
    """Makes matchers; loads the tokenizer when the first is asked for. Used by one thread."""

    def __init__(self, load_tokenizer: Callable[[], "tokenizers.Tokenizer"], vocab_size: int) -> None:
        """`load_tokenizer` returns a tokenizer that nobody else uses; `vocab_size` is that of the model's logits."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        # The n sequences of a prompt, and most requests of one application, share a grammar.
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def make_matcher(self, grammar: str, eos_token_ids: Sequence[int]) -> TokenMatcher:
        """A matcher at the start of `grammar`; a dead one when the tokenizer cannot be used for it."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            try:
                compiled = self._compile(grammar)
            except (ValueError, ModelLoadError) as error:  # one request's misfortune, not the engine's
                logger.error("structured outputs are not possible with this tokenizer: %s", error)
                return DeadMatcher()
            self._compiled[grammar] = compiled
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarMatcher(compiled, self._vocab_size, eos_token_ids)

    def _compile(self, grammar: str) -> CompiledGrammar:
        from llguidance import LLMatcher

        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        tokenizer = self._tokenizer
        start = LLMatcher(tokenizer, grammar, log_level=0)
        return CompiledGrammar(start, tokenizer.vocab_size, tokenizer.eos_token)

    def _make_tokenizer(self) -> "LLTokenizer":
        import tokenizers
        from llguidance import LLTokenizer

        backend = self._load_tokenizer()
        backend.add_special_tokens([tokenizers.AddedToken(_OWN_EOS, special=True)])
        own_eos = backend.token_to_id(_OWN_EOS)
        assert own_eos is not None, "it was just added"
        num_bits = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True), own_eos + 1)
        return LLTokenizer(backend.to_str(), n_vocab=num_bits, eos_token=own_eos)
