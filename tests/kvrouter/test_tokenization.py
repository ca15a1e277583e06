"""Text to token ids as transformers computes them, and the threads that do it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvrouter.errors import DeadlineExceededError, PoolClosedError, PoolOverloadError, PromptError, TokenizerLoadError
from kvrouter.tokenization.pool import TokenizationPool
from kvrouter.tokenization.tokenizer import LocalTokenizer, resolve_checkpoint

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> LocalTokenizer:
    return LocalTokenizer(checkpoint)


@given(
    text=st.text(max_size=80) | st.lists(st.sampled_from(["<|im_start|>", "<s>", "the", " cache", "😀"])).map("".join),
    add_special_tokens=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_equal_transformers(
    text: str, add_special_tokens: bool, reference: PreTrainedTokenizerBase, tokenizer: LocalTokenizer
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    assert ids.dtype == np.uint32
    assert ids.tolist() == reference(text, add_special_tokens=add_special_tokens)["input_ids"]


def test_truncation_and_padding_of_the_file_are_ignored(checkpoint: Path, tmp_path: Path) -> None:
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    text = "the cache of a block"
    assert LocalTokenizer(tmp_path).encode(text).tolist() == LocalTokenizer(checkpoint).encode(text).tolist()


def test_lone_surrogate_is_a_prompt_error(tokenizer: LocalTokenizer) -> None:
    with pytest.raises(PromptError, match="not Unicode"):
        tokenizer.encode("\ud800")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerLoadError, match=r"has no tokenizer\.json"):
        LocalTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerLoadError, match="is not a tokenizer"):
        LocalTokenizer(tmp_path)


def test_checkpoint_is_a_directory_or_in_the_local_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_checkpoint(str(checkpoint)) == checkpoint
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_checkpoint("org/name") == snapshot


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c", "not a valid id!"])
def test_checkpoint_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(TokenizerLoadError):
        resolve_checkpoint(path)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What jobs of these tests wait for; opened at the end."""
    event = threading.Event()
    yield event
    event.set()


def test_pool_returns_results_and_errors_of_jobs() -> None:
    def fail() -> None:
        raise PromptError("no")

    def late() -> None:
        raise TimeoutError("mine")

    with TokenizationPool(2) as pool:
        assert pool.run(lambda: 7) == 7
        assert asyncio.run(pool.run_async(lambda: 7)) == 7
        with pytest.raises(PromptError, match="no"):
            pool.run(fail)
        with pytest.raises(PromptError, match="no"):
            asyncio.run(pool.run_async(fail))
        with pytest.raises(TimeoutError, match="mine"):
            pool.run(late)


def test_pool_gives_up_at_the_deadline_and_drops_what_has_not_begun(gate: threading.Event) -> None:
    begun = threading.Event()
    ran: list[int] = []
    with TokenizationPool(1, timeout_s=0.05) as pool:
        with pytest.raises(DeadlineExceededError, match=r"0\.05 s"):
            pool.run(lambda: (begun.set(), gate.wait(TIMEOUT_S)))
        assert begun.is_set()
        with pytest.raises(DeadlineExceededError):
            pool.run(lambda: ran.append(1))
        with pytest.raises(DeadlineExceededError):
            asyncio.run(pool.run_async(lambda: ran.append(2)))
        gate.set()
        assert _eventually(pool, lambda: 3) == 3
    assert ran == []


def test_full_pool_refuses_at_once(gate: threading.Event) -> None:
    begun = threading.Event()
    with TokenizationPool(1, queue_size=1, timeout_s=TIMEOUT_S) as pool:
        results: list[object] = []
        first = threading.Thread(target=lambda: results.append(pool.run(lambda: (begun.set(), gate.wait(TIMEOUT_S)))))
        first.start()
        assert begun.wait(TIMEOUT_S)
        second = pool._submit(lambda: 2)
        with pytest.raises(PoolOverloadError, match="1 prompts"):
            pool.run(lambda: 3)
        gate.set()
        assert second.result(TIMEOUT_S) == 2
        first.join(TIMEOUT_S)


def test_closed_pool_refuses_and_cancels_what_waits(gate: threading.Event) -> None:
    begun = threading.Event()
    pool = TokenizationPool(1, timeout_s=TIMEOUT_S)
    running = pool._submit(lambda: (begun.set(), gate.wait(TIMEOUT_S)))
    assert begun.wait(TIMEOUT_S)
    waiting = pool._submit(lambda: 2)
    closer = threading.Thread(target=pool.close)
    closer.start()
    while not waiting.cancelled():
        assert closer.is_alive()
    gate.set()
    closer.join(TIMEOUT_S)
    assert running.done()
    with pytest.raises(PoolClosedError):
        pool.run(lambda: 3)
    pool.close()


def _eventually(pool: TokenizationPool, job: object) -> object:
    """The worker is free again at some point soon."""
    while True:
        try:
            return pool.run(job)  # type: ignore[arg-type]
        except DeadlineExceededError:
            continue
