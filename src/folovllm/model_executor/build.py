"""What the layers of a model are built from, and what they expect of the checkpoint.

model class --builds--> layers --expect()--> WeightRegistry <--fill-- loader <--map-- checkpoint
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear_weights import QuantizationConfig
from folovllm.model_executor.parallel import TensorParallel
from folovllm.ops.abstract import Ops
from folovllm.ops.workspace import Workspace

Fill = Callable[[torch.Tensor], None]
"""Takes a memory-mapped tensor of the checkpoint; copies what it keeps."""


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor of the checkpoint that some layer waits for."""

    shape: tuple[int, ...]
    fill: Fill


class WeightRegistry:
    """All that the layers expect, by its name in the checkpoint; filled by the loader."""

    def __init__(self) -> None:
        self._expected: dict[str, ExpectedTensor] = {}
        self._on_filled: list[Callable[[], None]] = []
        self.optional: set[str] = set()
        """Names that follow from other tensors: they may be in the checkpoint, and are not read."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def get(self, name: str) -> ExpectedTensor | None:
        """What waits for the tensor of this name."""
        return self._expected.get(name)

    def expect(self, name: str, shape: tuple[int, ...], fill: Fill) -> None:
        """Announce a tensor."""
        assert name not in self._expected, f"two layers expect {name}"
        self._expected[name] = ExpectedTensor(shape, fill)

    def expect_vector(self, name: str, target: torch.Tensor) -> None:
        """Announce a tensor that is copied to `target`, converted to its dtype."""

        def fill(tensor: torch.Tensor) -> None:
            if not tensor.is_floating_point():
                raise ModelLoadError(f"it is {tensor.dtype}; only floating point weights are supported")
            target.copy_(tensor)

        self.expect(name, tuple(target.shape), fill)

    def when_filled(self, finish: Callable[[], None]) -> None:
        """Run `finish` once everything expected has come."""
        self._on_filled.append(finish)

    def finish(self) -> None:
        """Everything has come."""
        for finish in self._on_filled:
            finish()
        self._on_filled.clear()


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What every layer is told. One per model."""

    hf_config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device
    max_positions: int
    """Positions a request can have; the rotary table is this long."""
    backend: AttentionBackend
    ops: Ops
    workspace: Workspace | None
    """Where native kernels put their results; None for torch's kernels."""
    parallel: TensorParallel = field(default_factory=TensorParallel)
    quantization: QuantizationConfig | None = None
    batch_invariant: bool = False
    """A row's arithmetic is the same whatever other rows there are, also in bf16 and fp16."""
    weights: WeightRegistry = field(default_factory=WeightRegistry)

    @property
    def uses_native_kernels(self) -> bool:
        """Whether linear layers pack their weights for the native kernels."""
        return self.workspace is not None

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A new `[size]` tensor that the checkpoint's `name` will fill."""
        target = torch.empty(size, dtype=self.dtype, device=self.device)
        self.weights.expect_vector(name, target)
        return target
