"""Token embeddings. Mirrors vllm/model_executor/layers/vocab_parallel_embedding.py; here every rank can look up all."""

from collections.abc import Callable

import torch

from folovllm.model_executor.build import BuildContext
from folovllm.model_executor.layers.linear_weights import require_floating_point


class Embedding:
    """Token id -> row of a `[vocab_size, hidden_size]` table.

    On a CPU the table is the checkpoint's own memory map, in the checkpoint's dtype: only the rows that are looked up
    ever come into memory.
    """

    table: torch.Tensor

    def __init__(
        self,
        context: BuildContext,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tied: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Announce the table; `tied` takes it too, while its pages are there: an output head without its own."""
        self.context = context
        self._tied = tied
        context.weights.expect(f"{name}.weight", (vocab_size, hidden_size), self._load)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` int32 -> `[num_tokens, hidden_size]`."""
        return self.context.ops.embed(self.table, input_ids)

    def _load(self, table: torch.Tensor) -> None:
        require_floating_point(table)
        is_mapped = self.context.uses_native_kernels and table.dtype in (torch.float32, torch.bfloat16, torch.float16)
        self.table = table if is_mapped else table.to(self.context.device, self.context.dtype, copy=True)
        if self._tied is not None:
            self._tied(self.table)
