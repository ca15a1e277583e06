"""The model's forward pass on a CPU as one native call. The counterpart of vLLM's CUDA graphs.

    first step    Python runs the model; the native kernels it calls are recorded with their addresses
    later steps   the recording runs: the same kernels, with the new step's number of tokens and requests

A pass calls the same kernels whatever the number of tokens, and all they read and write lies at fixed addresses:
weights, KV cache, the runner's input buffers, workspaces. When a workspace grows, a later step records anew. A pass in
which torch computes anything, or a layer calls out (a KV connector, other ranks), runs as Python each time.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from folovllm import _native
from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.model_executor.forward_context import ForwardContext
from folovllm.model_executor.models.dense import DenseForCausalLM
from folovllm.model_executor.parallel import TensorParallel
from folovllm.ops.workspace import Workspace, capacity

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor, torch.Tensor, ForwardContext], torch.Tensor]
"""Token ids and positions `[num_tokens]` -> hidden states `[num_tokens, hidden_size]`."""


class RecordedForward:
    """A `Forward` that records another one. Used by one thread.

    REQUIRES: `forward` calls the same kernels for any number of tokens, and writes its result into a buffer of one of
    the workspaces. A step whose inputs lie elsewhere than the last one's is recorded anew.
    """

    def __init__(self, forward: Forward, workspaces: Sequence[Workspace]) -> None:
        self._forward = forward
        self._workspaces = workspaces
        self._recording = _native.Recording()
        # The buffer of the recorded pass's result, with the rows that all its buffers have; none: nothing is recorded.
        self._hidden: torch.Tensor | None = None
        # Where it read its inputs, and the generation of the workspaces: elsewhere it does not hold.
        self._places: tuple[tuple[int, ...], int] | None = None
        # All buffers have rows for so many.
        self._most_tokens = 0
        self._can_record = True

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Run the recording where there is one, else the model."""
        num_tokens = len(input_ids)
        metadata = context.attn_metadata
        assert metadata is not None
        if context.layer_hooks is not None or not self._can_record:
            return self._forward(input_ids, positions, context)
        sizes = num_tokens, metadata.seq_lens.shape[0], metadata.block_tables.stride(0)
        places = _addresses(input_ids, positions, metadata), self._workspace_generation()
        if self._hidden is None or places != self._places or num_tokens > self._hidden.shape[0]:
            self._places = places
            return self._record(input_ids, positions, context, sizes)
        self._recording.run(*sizes)
        return self._hidden if num_tokens == self._hidden.shape[0] else self._hidden[:num_tokens]

    def _record(
        self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext, sizes: tuple[int, int, int]
    ) -> torch.Tensor:
        self._hidden = None
        self._most_tokens = max(self._most_tokens, sizes[0])
        generation = self._workspace_generation()
        self._recording.begin(*sizes)
        try:
            with _TorchWatch() as watch:
                hidden = self._forward(input_ids, positions, context)
        finally:
            is_whole = self._recording.end()
        if generation != self._workspace_generation():
            return hidden  # a buffer came or grew, perhaps behind the back of the recording: the next step will do
        buffers = [b for workspace in self._workspaces if (b := workspace.buffer_of(hidden)) is not None]
        if not is_whole or watch.computed is not None or not buffers:
            logger.info("forward pass cannot be recorded: %s", watch.computed or "its kernels' rows are not the tokens")
            self._can_record = False
        else:
            self._hidden = buffers[0][: capacity(self._most_tokens)]
            logger.debug("forward pass recorded num_tokens=%d num_calls=%d", len(hidden), self._recording.num_calls)
        return hidden

    def _workspace_generation(self) -> int:
        return sum(workspace.generation for workspace in self._workspaces)


def _addresses(input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> tuple[int, ...]:
    """Of all that native kernels read of a step."""
    return (
        input_ids.data_ptr(),
        positions.data_ptr(),
        metadata.slot_mapping.data_ptr(),
        metadata.query_start_loc.data_ptr(),
        metadata.seq_lens.data_ptr(),
        metadata.block_tables.data_ptr(),
    )


# Of torch's functions, these look at a tensor or show it in another shape; properties do no more either.
_LOOKS = {"__get__", "__len__", "data_ptr", "dim", "is_contiguous", "numel", "size", "stride", "view"}


class _TorchWatch(TorchFunctionMode):
    """Notes whether torch was asked to compute anything, which a recording of native kernels would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass."""
        name = getattr(func, "__name__", repr(func))
        is_slice = name == "__getitem__" and isinstance(args[1], slice)
        if name not in _LOOKS and not is_slice:
            self.computed = name
        return func(*args, **(kwargs or {}))


def record_forward(model: DenseForCausalLM, backend: AttentionBackend, parallel: TensorParallel) -> Forward:
    """The model, recorded if its kernels can be."""
    workspaces = [workspace for workspace in (model.ops.workspace, backend.workspace) if workspace is not None]
    return RecordedForward(model, workspaces) if len(workspaces) == 2 and parallel.size == 1 else model
