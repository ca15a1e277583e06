"""The packed tensors of a GPTQ layer on their way from the checkpoint to the layer's weights."""

import torch

from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear_weights import LinearShape
from folovllm.quantization.packing import PackedTensors


class GPTQParts:
    """Collects the packed tensors of a layer's parts, cut to this rank's share."""

    def __init__(self, bits: int, group_size: int, shape: LinearShape) -> None:
        """`group_size` -1: all inputs."""
        self.bits = bits
        self.group_size = group_size
        self.shape = shape
        self._parts: list[dict[str, torch.Tensor]] = [{} for _ in shape.parts]

    def tensors(self, part: int) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of a part in the checkpoint."""
        inputs, outputs = self.shape.in_features, self.shape.parts[part]
        pack = 32 // self.bits
        groups = 1 if self.group_size == -1 else -(-inputs // self.group_size)
        tensors: dict[str, tuple[int, ...]] = {
            "qweight": (inputs // pack, outputs),
            "qzeros": (groups, outputs // pack),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }
        if self.shape.has_bias:
            tensors["bias"] = (outputs,)
        return tensors

    @staticmethod
    def output_axis(suffix: str) -> int | None:
        """Outputs are the columns of the packed tensors; which group an input belongs to is the same for all."""
        return {"g_idx": None, "bias": 0}.get(suffix, 1)

    def add(self, part: int, suffix: str, tensor: torch.Tensor) -> bool:
        """Keep a tensor, without copying it.

        Returns:
            Whether all of the layer have come.

        Raises:
            ModelLoadError: a dtype it cannot have.
        """
        allowed = (torch.float16, torch.bfloat16, torch.float32) if suffix == "scales" else (torch.int32,)
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ModelLoadError(f"it is {tensor.dtype}; {suffix} must be {names}")
        self._parts[part][suffix] = tensor
        return all(len(tensors) == 4 for tensors in self._parts)

    def take(self) -> list[PackedTensors]:
        """This rank's share of every part, which is forgotten here."""
        parts = [self._share(i, PackedTensors(**tensors)) for i, tensors in enumerate(self._parts)]
        self._parts.clear()
        return parts

    def _share(self, part: int, whole: PackedTensors) -> PackedTensors:
        inputs, outputs = self.shape.inputs, self.shape.outputs[part]
        pack = 32 // self.bits
        words = slice(inputs.start // pack, inputs.stop // pack)
        g_idx, first, last = whole.g_idx[inputs], 0, len(whole.scales)
        if self.group_size != -1 and inputs != slice(0, self.shape.in_features):
            # Checked before: without act order, and on a group's border.
            first, last = inputs.start // self.group_size, -(-inputs.stop // self.group_size)
            g_idx = g_idx - first
        return PackedTensors(
            qweight=whole.qweight[words, outputs],
            qzeros=whole.qzeros[first:last, outputs.start // pack : outputs.stop // pack],
            scales=whole.scales[first:last, outputs],
            g_idx=g_idx,
        )
