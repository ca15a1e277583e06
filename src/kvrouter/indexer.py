"""The orchestrator: a prompt -> token ids -> block keys -> what every pod's cache is worth for it.

```
prompt ── tokenization pool ──> token ids ── TokenProcessor ──> block keys ── Index.score ──> {pod: score}
```
A score is counted in blocks: the longest run of the prompt's blocks, from the first on, that the pod holds, each at
the weight of its tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from kvrouter.config import IndexerConfig
from kvrouter.errors import TokenizerLoadError
from kvrouter.kvblock.base import Index
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenIds, TokenProcessor
from kvrouter.preprocessing.chat_completions import ChatRequest, ModelTokenizer
from kvrouter.tokenization.pool import TokenizationPool
from kvrouter.tokenization.tokenizer import TokenArray

BlockKeys = npt.NDArray[np.uint64]
Prompt = str | ChatRequest | TokenIds
"""Text, a conversation, or token ids."""

_UNWEIGHTED: Final[Mapping[str, float]] = MappingProxyType({})  # tiers without a weight count 1.0


class Indexer:
    """Scores pods for prompts; every method may be called from any thread. A context manager."""

    def __init__(
        self,
        config: IndexerConfig | None = None,
        *,
        index: Index | None = None,
        tokenizers: Mapping[str, ModelTokenizer] | None = None,
    ) -> None:
        """Build the index and load the tokenizers that `config` names.

        Args:
            config: None for the defaults.
            index: an index to use instead of the one `config` describes.
            tokenizers: further tokenizers by model name.

        Raises:
            ConfigError: an option is not allowed.
            TokenizerLoadError: a tokenizer cannot be loaded.
        """
        self.config: Final = config or IndexerConfig()
        processor = self.config.token_processor_config
        pool = self.config.tokenizers_pool_config
        memory = self.config.kv_block_index_config.in_memory_config
        self.token_processor: Final = TokenProcessor(processor.block_size, processor.hash_seed)
        self.index: Final[Index] = index if index is not None else InMemoryIndex(memory.size, memory.pod_cache_size)
        self._weights = self.config.tier_weights()
        self._tokenizers = {name: ModelTokenizer.load(path) for name, path in pool.local.model_tokenizer_map.items()}
        self._tokenizers |= tokenizers or {}
        self._pool = TokenizationPool(pool.workers_count, pool.queue_size, pool.timeout)

    @property
    def block_size(self) -> int:
        """Tokens per block key."""
        return self.token_processor.block_size

    def get_pod_scores(
        self, prompt: Prompt, model: str, pods: Sequence[str] | None = None, cache_salt: str | None = None
    ) -> dict[str, float]:
        """Return the score of every pod that holds at least the first block of `prompt`.

        Args:
            prompt: text, a conversation, or token ids (a contiguous uint32 array is not copied).
            model: the model's name, as in the topic of its engines' events.
            pods: the pods asked about; None means all.
            cache_salt: the request's `cache_salt`.

        Raises:
            TokenizerLoadError: text, and no tokenizer for this model.
            PromptError: the prompt cannot become token ids.
            DeadlineExceededError, PoolOverloadError: tokenisation is too slow or too busy.
        """
        token_ids: TokenIds
        if isinstance(prompt, (str, ChatRequest)):
            tokenizer = self._require_tokenizer(model)
            token_ids = self._pool.run(lambda: _encode(tokenizer, prompt))
        else:
            token_ids = prompt
        return self.score_keys(self.block_keys(token_ids, model, cache_salt), pods)

    def has_tokenizer(self, model: str) -> bool:
        """Whether text can be scored for this model."""
        return model in self._tokenizers

    async def tokenize(
        self, prompt: str | ChatRequest, model: str, add_special_tokens: bool | None = None
    ) -> TokenArray:
        """Return the token ids of a prompt without blocking the event loop.

        Args:
            prompt: text or a conversation.
            model: whose tokenizer.
            add_special_tokens: None for what engines do: yes for text, no for a conversation.

        Raises:
            TokenizerLoadError, PromptError, DeadlineExceededError, PoolOverloadError: see `get_pod_scores`.
        """
        tokenizer = self._require_tokenizer(model)
        return await self._pool.run_async(lambda: _encode(tokenizer, prompt, add_special_tokens))

    def block_keys(self, token_ids: TokenIds, model: str, cache_salt: str | None = None) -> BlockKeys:
        """Return the keys of the full blocks of a prompt, uint64 `[num_blocks]`."""
        return self.token_processor.keys(token_ids, model, cache_salt)

    def score_keys(self, keys: BlockKeys, pods: Sequence[str] | None = None) -> dict[str, float]:
        """Return the tier-weighted score, in blocks, of every pod that holds key 0."""
        return self.index.score(keys, pods, self._weights)

    def count_cached_blocks(self, keys: BlockKeys, pods: Sequence[str] | None = None) -> dict[str, int]:
        """Return how many blocks, from key 0 on, every pod that holds key 0 has, in whatever tier."""
        return {pod: int(score) for pod, score in self.index.score(keys, pods, _UNWEIGHTED).items()}

    def close(self) -> None:
        """End the tokenisation threads. Idempotent."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_tokenizer(self, model: str) -> ModelTokenizer:
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            known = ", ".join(self._tokenizers) or "none"
            raise TokenizerLoadError(f"no tokenizer for model {model!r}; tokenizersPoolConfig.local names: {known}")
        return tokenizer


def _encode(tokenizer: ModelTokenizer, prompt: str | ChatRequest, add_special_tokens: bool | None = None) -> TokenArray:
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, add_special_tokens=add_special_tokens is not False)
    return tokenizer.encode_chat(prompt, add_special_tokens=add_special_tokens is True)
