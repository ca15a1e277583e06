"""Token embeddings. Mirrors vllm/model_executor/layers/vocab_parallel_embedding.py; here every rank can look up all."""

from collections.abc import Callable

import torch

from folovllm.model_executor.build import BuildContext
from folovllm.model_executor.layers.linear import OutputHead
from folovllm.model_executor.layers.linear_weights import require_floating_point


class Embedding:
    """Token id -> row of a `[vocab_size, hidden_size]` table.

    On a CPU the table is the checkpoint's own memory map, in the checkpoint's dtype: only the rows that are looked up
    ever come into memory, as file pages that the system may take back. Where the output head has the same weights,
    packed, they are looked up there; a quantised head has others.
    """

    def __init__(
        self,
        context: BuildContext,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tied: OutputHead | None = None,
    ) -> None:
        """Announce the table; `tied` is an output head that has no weights of its own, and takes these."""
        self.context = context
        self._tied = tied
        self._rows: Callable[[torch.Tensor], torch.Tensor] | None = None if tied is None else tied.row_source()
        self._table: torch.Tensor | None = None
        context.weights.expect(f"{name}.weight", (vocab_size, hidden_size), self._load)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` int32 -> `[num_tokens, hidden_size]`."""
        if self._table is None:
            assert self._rows is not None
            return self._rows(input_ids)
        return self.context.ops.embed(self._table, input_ids)

    def _load(self, table: torch.Tensor) -> None:
        require_floating_point(table)
        is_mapped = self.context.uses_native_kernels and table.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not is_mapped:
            table = table.to(self.context.device, self.context.dtype, copy=True)
        if self._tied is not None:
            self._tied.load(table)
        if self._rows is None:
            self._table = table
