"""Structured outputs through llguidance: which tokens the grammar of a request allows next.

Mirrors vllm/v1/structured_output/backend_guidance.py. vLLM fills the masks in its scheduler's process and sends them to
the workers; here the runner, which samples, follows the grammar itself.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from folovllm.engine.messages import FinishReason
from folovllm.errors import ModelLoadError
from folovllm.sample.logits_processor.interface import TokenMatcher

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_MAX_COMPILED = 64
_WORD_BITS = 32


class GrammarMatcher:
    """One request's place in its grammar; implements `TokenMatcher`.

    Where the grammar allows its text to end, the end-of-sequence tokens are allowed beside what may follow; where
    nothing may follow, they alone are. Without any (or when they are ignored) the request ends there by itself.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Take over `matcher`, which is at its start; `eos_token_ids` are the tokens that may end the text."""
        self.end: FinishReason | None = None
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = np.array([i for i in eos_token_ids if i < vocab_size], dtype=np.int64)
        self._followed: list[int] = []
        # One bit more than the vocabulary: see GrammarCompiler.
        self._words = np.zeros(vocab_size // _WORD_BITS + 1, dtype=np.uint32)

    def allowed_tokens(self) -> npt.NDArray[np.bool_] | None:
        """See `TokenMatcher`."""
        if self.end is not None:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
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
        self._matcher.reset()
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


class GrammarCompiler:
    """Makes matchers; loads the tokenizer when the first is asked for. Used by one thread."""

    def __init__(self, load_tokenizer_json: Callable[[], str], vocab_size: int) -> None:
        """`load_tokenizer_json` returns the text of the model's tokenizer.json; `vocab_size` is that of its logits."""
        self._load_tokenizer_json = load_tokenizer_json
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        # The n sequences of a prompt, and most requests of one application, share a grammar.
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

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
        return GrammarMatcher(compiled.deep_copy(), self._vocab_size, eos_token_ids)

    def _compile(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            # The end-of-sequence token it knows is one past the vocabulary: which real ones there are is each
            # request's own, and the matcher's business.
            size = self._vocab_size
            self._tokenizer = LLTokenizer(self._load_tokenizer_json(), n_vocab=size + 1, eos_token=size)
        return LLMatcher(self._tokenizer, grammar, log_level=0)
