"""An engine that calls the connector's hooks in vLLM's order, without a model: its KV is a function of the tokens."""

import threading
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from tests.flexkv.device_memory import BLOCK, MODEL, make_kv_caches, read_block

from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

# At 2 ms each, longer than the store's own deadlines (20 s for an op, 10 s of silence), so that these decide.
MAX_STEPS = 15_000


class Role(Enum):
    SCHEDULER = 0
    WORKER = 1


def engine_config(engine_id: str, role: str = "kv_both", **extra: Any) -> Any:
    """What a connector reads of an engine's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=MODEL.model_id,
            dtype=torch.float32,
            get_num_layers=lambda parallel: MODEL.num_layers,
            get_num_kv_heads=lambda parallel: MODEL.num_kv_heads,
            get_head_size=lambda: MODEL.head_size,
        ),
        cache_config=SimpleNamespace(block_size=BLOCK),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_rank=0),
        kv_transfer_config=SimpleNamespace(
            kv_connector="FlexKVConnectorV1", kv_role=role, kv_connector_extra_config=extra, engine_id=engine_id
        ),
    )


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str | None = None
    block_ids: list[int] = field(default_factory=list)
    external: int = 0

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass
class Blocks:
    ids: list[int]

    def get_block_ids(self) -> tuple[list[int]]:
        return (self.ids,)


class FakeEngine:
    """Runs one request at a time; `run` returns how many of its tokens came from the store."""

    def __init__(self, config: Any, num_blocks: int = 16) -> None:
        self.kv_caches = make_kv_caches(MODEL, num_blocks, BLOCK)
        self.worker = FlexKVConnectorV1Impl(config, Role.WORKER)  # built before the scheduler's half
        self.worker.register_kv_caches(self.kv_caches)
        self.scheduler = FlexKVConnectorV1Impl(config, Role.SCHEDULER)
        self.free = list(range(1, num_blocks))
        self.held: dict[str, list[int]] = {}
        self.invalid: set[int] = set()
        self.received: set[str] = set()
        self._pause = threading.Event()  # never set: a step that computes nothing only polls

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()

    def step(self, compute: Request | None = None, finished: frozenset[str] = frozenset()) -> None:
        """One step: the hooks of both halves around an optional computation."""
        metadata = self.scheduler.build_connector_meta(None)
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_kv(None)
        if compute is not None:
            self.compute(compute)
        self.worker.wait_for_save()
        sending, recving = self.worker.get_finished(set(finished))
        invalid = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        output = SimpleNamespace(finished_sending=sending, finished_recving=recving, invalid_block_ids=invalid)
        self.scheduler.update_connector_output(output)
        self.invalid |= invalid
        self.received |= recving
        for request_id in sending:
            self.free.extend(self.held.pop(request_id))

    def compute(self, request: Request) -> None:
        for i in range(request.num_computed_tokens // BLOCK, request.num_tokens // BLOCK):
            self._write(request.block_ids[i], request.prompt_token_ids[: (i + 1) * BLOCK])
        request.num_computed_tokens = request.num_tokens

    def _write(self, block: int, tokens: list[int]) -> None:
        generator = torch.Generator().manual_seed(hash(tuple(tokens)) & 0xFFFF_FFFF)
        for tensor in self.kv_caches.values():
            tensor[block] = torch.rand(tensor[block].shape, generator=generator)

    def admit(self, request: Request) -> bool:
        """Match and allocate; True when the request waits for a load."""
        request.external, is_async = self.scheduler.get_num_new_matched_tokens(request, request.num_computed_tokens)
        count = -(-request.num_tokens // BLOCK)
        request.block_ids = [self.free.pop(0) for _ in range(count)]
        for tensor in self.kv_caches.values():  # engines may zero fresh blocks
            tensor[request.block_ids] = -1.0
        self.scheduler.update_state_after_alloc(request, Blocks(request.block_ids), request.external)
        return is_async

    def await_load(self, request: Request, limit: int = MAX_STEPS) -> None:
        for _ in range(limit):
            self.step()
            if request.request_id in self.received:
                self.received.discard(request.request_id)
                break
            self._pause.wait(0.002)
        else:
            raise AssertionError("the load never ended")
        bad = [i for i, block in enumerate(request.block_ids) if block in self.invalid]
        self.invalid.clear()
        request.num_computed_tokens = request.external if not bad else bad[0] * BLOCK
        self.scheduler.update_state_after_alloc(request, Blocks(request.block_ids), 0)

    def finish(self, request: Request) -> None:
        delayed, _ = self.scheduler.request_finished(request, request.block_ids)
        if not delayed:
            self.free.extend(request.block_ids)
            return
        self.held[request.request_id] = request.block_ids
        finished = frozenset({request.request_id})
        for _ in range(MAX_STEPS):
            self.step(finished=finished)
            if request.request_id not in self.held:
                return
            self._pause.wait(0.002)
            finished = frozenset()
        raise AssertionError("the save never ended")

    def run(self, request_id: str, tokens: list[int], cache_salt: str | None = None) -> int:
        request = Request(request_id, tokens, cache_salt=cache_salt)
        if self.admit(request):
            self.await_load(request)
        loaded = request.num_computed_tokens
        self.check(request, loaded // BLOCK)
        self.step(compute=request)
        self.check(request, request.num_tokens // BLOCK)
        self.finish(request)
        return loaded

    def check(self, request: Request, num_blocks: int) -> None:
        """Every block holds what computing its tokens would have given."""
        for i in range(num_blocks):
            actual = read_block(self.kv_caches, request.block_ids[i])
            scratch = {name: tensor.clone() for name, tensor in self.kv_caches.items()}
            self._write(request.block_ids[i], request.prompt_token_ids[: (i + 1) * BLOCK])
            expected = read_block(self.kv_caches, request.block_ids[i])
            for name, tensor in scratch.items():
                self.kv_caches[name].copy_(tensor)
            assert actual == expected, f"wrong bytes in block {i}"
