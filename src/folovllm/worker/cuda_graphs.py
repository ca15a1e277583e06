"""Decode steps on CUDA as one launch each. Mirrors vllm/v1/cudagraph_dispatcher.py and vllm/compilation/cuda_graph.py.

A step in which every request computes one token calls the same kernels whatever its tokens. They are captured once for
some batch sizes, and a step replays the next larger one:

    capture sizes    1  2  4  8 ...         a step of 3 requests replays the graph of 4
    input buffers    | r0 | r1 | r2 | -- |  row 3 is padding: slot -1, length 0, so that it writes and reads no block
    hidden states    | h0 | h1 | h2 | ?? |  a buffer of the graph, overwritten by the next step

All other steps run as they are. What the kernels are to be is decided at the capture, for requests of any length.
"""

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.recorded_forward import Forward

logger = logging.getLogger(__name__)

LARGEST_CAPTURE = 512


@dataclass(frozen=True, slots=True)
class Captured:
    """Work that can be done again with other contents of the same tensors."""

    replay: Callable[[], None]
    result: torch.Tensor
    """What the work returned; each replay writes it anew."""


class Recorder(Protocol):
    """Captures work."""

    def capture(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Capture what `work` launches; called once per size, the largest first."""
        ...


class CUDAGraphRecorder:
    """CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor]) -> Captured:
        """Run `work` once as it is, since compilers and libraries allocate at their first call, then capture it."""
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a connector's, may copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return Captured(graph.replay, result)


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, rising: close together where padding would weigh most, and `max_num_seqs` itself."""
    limit = min(max_num_seqs, LARGEST_CAPTURE)
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, LARGEST_CAPTURE + 1, 16)]
    return [*(size for size in sizes if size < limit), limit]


def padded_size(num_reqs: int, sizes: Sequence[int]) -> int | None:
    """The smallest of `sizes`, which rise, that holds the batch; None when none does."""
    index = bisect.bisect_left(sizes, num_reqs)
    return sizes[index] if index < len(sizes) else None


class DecodeBuffers:
    """The inputs of captured steps, at addresses that stay."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        """Fill them with padding only."""

        def rows(value: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((max_num_seqs,), value, dtype=dtype, device=device)

        self._max_model_len = max_model_len
        self.input_ids = rows(0, torch.int32)
        self.positions = rows(0, torch.int64)
        max_blocks = -(-max_model_len // block_size)
        self._metadata = AttentionMetadata(
            query_start_loc=torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device),
            seq_lens=rows(0, torch.int32),
            block_tables=torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device),
            slot_mapping=rows(-1, torch.int64),
            slot_blocks=rows(-1, torch.int64),
            slot_offsets=rows(0, torch.int64),
            query_start_loc_cpu=np.arange(max_num_seqs + 1, dtype=np.int32),
            # Backends plan by these: for the longest requests.
            seq_lens_cpu=np.full(max_num_seqs, max_model_len, dtype=np.int32),
        )

    def metadata(self, size: int, backend: AttentionBackend) -> AttentionMetadata:
        """The first `size` rows, planned."""
        whole = self._metadata
        view = AttentionMetadata(
            query_start_loc=whole.query_start_loc[: size + 1],
            seq_lens=whole.seq_lens[:size],
            block_tables=whole.block_tables[:size],
            slot_mapping=whole.slot_mapping[:size],
            slot_blocks=whole.slot_blocks[:size],
            slot_offsets=whole.slot_offsets[:size],
            query_start_loc_cpu=whole.query_start_loc_cpu[: size + 1],
            seq_lens_cpu=whole.seq_lens_cpu[:size],
        )
        return replace(view, backend_plan=backend.plan(view))

    def fill(self, input_ids: torch.Tensor, positions: torch.Tensor, step: AttentionMetadata, size: int) -> None:
        """Take a step's rows, and pad them to `size`. Token ids and positions of padding may be any valid ones."""
        num_reqs = len(input_ids)
        self.input_ids[:num_reqs].copy_(input_ids)
        self.positions[:num_reqs].copy_(positions)
        own = self._metadata
        own.seq_lens[:num_reqs].copy_(step.seq_lens)
        own.slot_mapping[:num_reqs].copy_(step.slot_mapping)
        own.slot_blocks[:num_reqs].copy_(step.slot_blocks)
        own.slot_offsets[:num_reqs].copy_(step.slot_offsets)
        own.block_tables[:num_reqs, : step.block_tables.shape[1]].copy_(step.block_tables)
        if num_reqs < size:
            own.seq_lens[num_reqs:size].zero_()
            own.slot_mapping[num_reqs:size].fill_(-1)
            own.slot_blocks[num_reqs:size].fill_(-1)


class GraphedForward:
    """A `Forward` that replays decodes. Used by one thread."""

    def __init__(
        self,
        forward: Forward,
        backend: AttentionBackend,
        buffers: DecodeBuffers,
        sizes: Sequence[int],
        recorder: Recorder,
    ) -> None:
        """Nothing is captured yet. REQUIRES: `backend.supports_cuda_graphs`; `sizes` rise and fit the buffers."""
        assert backend.supports_cuda_graphs
        self._forward = forward
        self._backend = backend
        self._buffers = buffers
        self._sizes = list(sizes)
        self._recorder = recorder
        self._captured: dict[int, Captured] = {}
        self.replays_with_layer_hooks = False
        """Whether a step may be replayed although its context has layer hooks, which a graph does not call."""

    @torch.inference_mode()
    def capture(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Capture every size, the largest first, so that the others find room in its memory."""
        started = time.monotonic()
        buffers = self._buffers
        for size in reversed(self._sizes):
            context = ForwardContext(buffers.metadata(size, self._backend), kv_caches)
            ids, positions = buffers.input_ids[:size], buffers.positions[:size]

            def work(
                ids: torch.Tensor = ids, at: torch.Tensor = positions, by: ForwardContext = context
            ) -> torch.Tensor:
                return self._forward(ids, at, by)

            self._captured[size] = self._recorder.capture(work)
        logger.info("captured decode batches=%d seconds=%.2f", len(self._sizes), time.monotonic() - started)

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Replay a step of decodes that fits, run any other."""
        metadata = context.attn_metadata
        assert metadata is not None
        num_tokens = len(input_ids)
        is_decode = len(metadata.seq_lens) == num_tokens
        size = padded_size(num_tokens, self._sizes) if is_decode else None
        captured = self._captured.get(size) if size is not None else None
        if size is None or captured is None or not self._may_skip_hooks(context):
            return self._forward(input_ids, positions, context)
        self._buffers.fill(input_ids, positions, metadata, size)
        captured.replay()
        return captured.result[:num_tokens]

    def _may_skip_hooks(self, context: ForwardContext) -> bool:
        return context.layer_hooks is None or self.replays_with_layer_hooks
