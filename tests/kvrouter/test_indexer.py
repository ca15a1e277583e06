"""From a prompt to the pods' scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvrouter.config import IndexerConfig, load_config
from kvrouter.errors import PromptError, TokenizerLoadError
from kvrouter.indexer import Indexer
from kvrouter.kvblock.base import PodEntry
from kvrouter.preprocessing.chat_completions import ChatRequest, ModelTokenizer

TOKENS = list(range(100, 180))  # five blocks
MODEL = "m"


@pytest.fixture
def indexer(model_tokenizer: ModelTokenizer) -> Iterator[Indexer]:
    with Indexer(tokenizers={MODEL: model_tokenizer}) as made:
        yield made


def hold(
    indexer: Indexer, token_ids: object, num_blocks: int, pod: str, tier: str = "gpu", salt: str | None = None
) -> None:
    keys = indexer.block_keys(token_ids, MODEL, salt)[:num_blocks]  # type: ignore[arg-type]
    indexer.index.add(None, keys, [PodEntry(pod, tier)])


def test_score_is_the_longest_prefix_weighted_by_tier(indexer: Indexer) -> None:
    hold(indexer, TOKENS, 5, "a")
    hold(indexer, TOKENS, 2, "b")
    hold(indexer, TOKENS, 3, "c", "cpu")
    hold(indexer, TOKENS[16:], 3, "d")
    assert indexer.get_pod_scores(TOKENS, MODEL) == pytest.approx({"a": 5.0, "b": 2.0, "c": 2.4})
    assert indexer.get_pod_scores(TOKENS, MODEL, pods=["b", "d", "x"]) == {"b": 2.0}
    assert indexer.get_pod_scores(TOKENS, MODEL, pods=[]) == {}
    assert indexer.count_cached_blocks(indexer.block_keys(TOKENS, MODEL)) == {"a": 5, "b": 2, "c": 3}


def test_token_ids_may_be_a_list_or_an_array(indexer: Indexer) -> None:
    hold(indexer, TOKENS, 5, "a")
    for token_ids in (tuple(TOKENS), np.array(TOKENS, np.uint32), np.array(TOKENS, np.int64)):
        assert indexer.get_pod_scores(token_ids, MODEL) == {"a": 5.0}


def test_prompt_shorter_than_a_block_scores_nobody(indexer: Indexer) -> None:
    hold(indexer, TOKENS, 5, "a")
    assert indexer.get_pod_scores(TOKENS[:15], MODEL) == {}
    assert indexer.get_pod_scores([], MODEL) == {}


def test_other_model_and_other_salt_share_nothing(indexer: Indexer) -> None:
    hold(indexer, TOKENS, 5, "a")
    hold(indexer, TOKENS, 5, "b", salt="s")
    assert indexer.get_pod_scores(TOKENS, "other") == {}
    assert indexer.get_pod_scores(TOKENS, MODEL) == {"a": 5.0}
    assert indexer.get_pod_scores(TOKENS, MODEL, cache_salt="s") == {"b": 5.0}


def test_text_and_conversation_score_like_their_token_ids(indexer: Indexer, model_tokenizer: ModelTokenizer) -> None:
    text = "the cache of a block is a block of the cache " * 10
    chat = ChatRequest([{"role": "user", "content": text}])
    for prompt, ids in ((text, model_tokenizer.encode_prompt(text)), (chat, model_tokenizer.encode_chat(chat))):
        num_blocks = len(ids) // 16
        assert num_blocks > 3
        hold(indexer, ids, num_blocks, "a")
        assert indexer.get_pod_scores(prompt, MODEL) == {"a": float(num_blocks)}
        indexer.index.clear("a")


def test_text_for_a_model_without_a_tokenizer_names_the_option(indexer: Indexer) -> None:
    with pytest.raises(TokenizerLoadError, match=r"'x'; tokenizersPoolConfig\.local names: m"):
        indexer.get_pod_scores("text", "x")


def test_conversation_that_cannot_be_rendered_is_a_prompt_error(indexer: Indexer) -> None:
    with pytest.raises(PromptError):
        indexer.get_pod_scores(ChatRequest([{"role": "user"}]), MODEL)


def test_config_decides_block_size_weights_and_tokenizers(checkpoint: Path) -> None:
    config: IndexerConfig = load_config(
        {
            "tokenProcessorConfig": {"blockSize": 8},
            "kvCacheBackendConfigs": [{"name": "gpu", "weight": 1}, {"name": "cpu", "weight": 0.5}],
            "tokenizersPoolConfig": {"local": {"modelTokenizerMap": {MODEL: str(checkpoint)}}},
        }
    )
    with Indexer(config) as indexer:
        assert indexer.has_tokenizer(MODEL)
        assert indexer.block_size == 8
        hold(indexer, TOKENS, 10, "a", "cpu")
        assert indexer.get_pod_scores(TOKENS, MODEL) == {"a": 5.0}
    indexer.close()


def test_tokenizer_that_cannot_be_loaded_is_refused_at_the_start(tmp_path: Path) -> None:
    document = {"tokenizersPoolConfig": {"local": {"modelTokenizerMap": {MODEL: str(tmp_path)}}}}
    with pytest.raises(TokenizerLoadError, match=r"tokenizer\.json"):
        Indexer(load_config(document))
