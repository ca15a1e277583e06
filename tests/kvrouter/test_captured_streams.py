"""Real vLLM streams: the index predicts what vLLM found in its cache, for every request."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.kvrouter.event_engine import Engine

from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.kvevents.adapters import parse_message
from kvrouter.kvevents.subscriber_manager import PodEndpoint, SubscriberManager

CAPTURES = sorted((Path(__file__).parents[1] / "vectors" / "vllm_kv_events").glob("*.json"))
MODEL, POD, ENGINE_BLOCK = "tiny", "pod-a", 32
TIMEOUT = 20.0

pytestmark = pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)


def load(path: Path) -> tuple[list[dict[str, Any]], list[list[bytes]]]:
    capture = json.loads(path.read_text())
    frames = [
        [base64.b64decode(part) for part in (frame.values() if isinstance(frame, dict) else frame)]
        for frame in capture["frames"]
    ]
    return capture["requests"], frames


def predict(index: InMemoryIndex, processor: TokenProcessor, request: dict[str, Any]) -> int:
    keys = processor.keys(np.array(request["prompt"], np.uint32), MODEL, request["salt"])
    num_tokens = int(index.score(keys).get(POD, 0.0)) * processor.block_size
    # vLLM computes at least one token of every prompt.
    return min(num_tokens, len(request["prompt"]) - 1) // ENGINE_BLOCK * ENGINE_BLOCK


@pytest.mark.parametrize("algorithm", ["sha256_cbor", "xxhash_cbor"])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_every_prediction_equals_what_vllm_found(path: Path, block_size: int, algorithm: str) -> None:
    requests, frames = load(path)
    index, processor = InMemoryIndex(), TokenProcessor(block_size, hash_seed="anything", algorithm=algorithm)
    applier = index.event_applier(processor)
    num_applied = num_checked = 0
    for request in requests:
        if "prompt" not in request:
            break  # the reset
        assert predict(index, processor, request) == request["num_cached"]
        num_checked += 1
        for frame in frames[num_applied : request["frames_after"]]:
            message = parse_message(frame)
            assert message is not None
            assert not applier.apply(POD, MODEL, message.payload).rejected
        num_applied = request["frames_after"]
    assert num_checked == 20


def test_index_blocks_twice_as_long_as_the_engines_find_whole_blocks_only(path: Path) -> None:
    requests, frames = load(path)
    index, processor = InMemoryIndex(), TokenProcessor(2 * ENGINE_BLOCK)
    applier = index.event_applier(processor)
    num_applied = 0
    for request in requests:
        if "prompt" not in request:
            break
        keys = processor.keys(np.array(request["prompt"], np.uint32), MODEL, request["salt"])
        found = int(index.score(keys).get(POD, 0.0)) * processor.block_size
        held = request["num_cached"] // processor.block_size * processor.block_size
        # One more where vLLM held the whole prompt, of which it never counts the last block.
        assert held <= found <= held + processor.block_size
        assert found <= request["num_cached"] + ENGINE_BLOCK
        for frame in frames[num_applied : request["frames_after"]]:
            assert not applier.apply(POD, MODEL, frame[2]).rejected
        num_applied = request["frames_after"]


def test_stream_over_a_socket_predicts_the_same_and_ends_empty(path: Path) -> None:
    requests, frames = load(path)
    index, processor = InMemoryIndex(), TokenProcessor()
    with Engine(replay=False) as engine, SubscriberManager(index, processor) as manager:
        manager.add(PodEndpoint(POD, None, engine.endpoint))
        engine.wait_for_subscriber()
        num_sent = 0
        for request in requests:
            if "prompt" not in request:
                break
            assert predict(index, processor, request) == request["num_cached"]
            for frame in frames[num_sent : request["frames_after"]]:
                engine.send_raw(*frame)
            num_sent = request["frames_after"]
            manager.wait_applied(POD, num_sent - 1, TIMEOUT)
        assert index.stats().num_blocks > 0
        # The last frame clears all, then stores what was computed after the reset.
        for frame in frames[num_sent:]:
            engine.send_raw(*frame)
        manager.wait_applied(POD, len(frames) - 1, TIMEOUT)
        last = requests[-1]
        keys = processor.keys(np.array(last["prompt"], np.uint32), MODEL)
        assert index.score(keys) == {POD: len(last["prompt"]) // ENGINE_BLOCK * ENGINE_BLOCK / 16}
        assert index.stats().num_blocks == index.stats().num_records == 6, "only the three blocks stored since"
        assert manager.counters["malformed_batch"] == 0
        assert manager.state(POD) == "live"
