"""Linear layers. Mirrors vllm/model_executor/layers/linear.py.

What a layer computes is here; how its weights are held is in `linear_weights`. `split` says what ranks share out:

    NONE      every rank holds all
    OUTPUTS   column parallel: each rank has some output columns of every part
    INPUTS    row parallel: each rank has some input columns, and the sum over the ranks is the result
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from folovllm.errors import ModelLoadError
from folovllm.model_executor.build import BuildContext
from folovllm.model_executor.layers.linear_weights import (
    LinearShape,
    LinearWeights,
    PackedWeights,
    QuantizationConfig,
    TorchWeights,
)


class Split(enum.Enum):
    """What the ranks of a tensor parallel group share out."""

    NONE = enum.auto()
    OUTPUTS = enum.auto()
    INPUTS = enum.auto()


class Linear:
    """y = x W^T + b, for one projection or several of the same input."""

    def __init__(
        self,
        context: BuildContext,
        name: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        split: Split = Split.NONE,
        fused: str | None = None,
    ) -> None:
        """Announce the weights.

        Args:
            context: of the model.
            name: the checkpoint's prefix of all parts, for example "model.layers.0.self_attn".
            in_features: of the checkpoint.
            parts: the checkpoint's name of each projection -> its out_features, in the order of the output columns.
            bias: whether every part has one.
            split: what the ranks share out.
            fused: the checkpoint's name of the one projection that holds all parts, in their order; None: each its own.
        """
        self.ops = context.ops
        self.parallel = context.parallel
        self.reduces = split is Split.INPUTS and context.parallel.size > 1
        modules = [f"{name}.{part}" for part in ([fused] if fused else parts)]
        quantization = None if context.quantization is None else context.quantization.of_linear(modules)
        shape = _shape(context, in_features, parts, bias, split)
        self.weights = _make_weights(context, modules, shape, quantization)
        if fused is None:
            for index, part in enumerate(parts):
                for suffix, size in self.weights.tensors(index).items():
                    context.weights.expect(f"{name}.{part}.{suffix}", size, partial(self.weights.load, index, suffix))
        else:
            for suffix, size in self.weights.fused_tensors().items():
                context.weights.expect(f"{name}.{fused}.{suffix}", size, partial(self.weights.load_fused, suffix))
        context.weights.when_filled(self.weights.finish)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`, of this rank."""
        out = self.weights.forward(x)
        return self.parallel.all_reduce(out) if self.reduces else out

    def silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` -> silu(gate) * up `[num_tokens, out_features / 2]`: two parts of one size."""
        return self.weights.forward_silu_mul(x, self.ops)


class OutputHead:
    """Hidden states -> logits; its weights are its own or the embedding's.

    A quantised head always has weights of its own: where the model ties them to the embedding's, it does so no longer.
    """

    def __init__(self, context: BuildContext, name: str, hidden_size: int, vocab_size: int) -> None:
        self.parallel = context.parallel
        quantization = None if context.quantization is None else context.quantization.of_head(name)
        unit = 1 if quantization is None else quantization.output_unit
        # A vocabulary that cannot be shared out evenly is held whole by every rank.
        self.is_split = vocab_size % (context.parallel.size * unit) == 0 and context.parallel.size > 1
        split = Split.OUTPUTS if self.is_split else Split.NONE
        shape = _shape(context, hidden_size, {name: vocab_size}, False, split)
        self.weights = _make_weights(context, [name], shape, quantization)
        self.is_tied = bool(context.hf_config.tie_word_embeddings) and quantization is None
        """Whether the embedding's weights are to be loaded here."""
        if self.is_tied:
            context.weights.optional.add(f"{name}.weight")  # some checkpoints repeat it
        else:
            for suffix, size in self.weights.tensors(0).items():
                context.weights.expect(f"{name}.{suffix}", size, partial(self.weights.load, 0, suffix))
        context.weights.when_filled(self.weights.finish)

    def load(self, weight: torch.Tensor) -> None:
        """Take the embedding's `[vocab_size, hidden_size]`. REQUIRES: is_tied."""
        self.weights.load(0, "weight", weight)

    def row_source(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What looks up rows `[n]` int32 of the weights as `[n, hidden_size]`, where all are at hand, packed."""
        return self.weights.gather if isinstance(self.weights, PackedWeights) and not self.is_split else None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, hidden_size]` -> fp32 `[num_rows, vocab_size]`."""
        logits = self.weights.forward(hidden, torch.float32)
        return self.parallel.all_gather(logits) if self.is_split else logits


def _shape(context: BuildContext, in_features: int, parts: Mapping[str, int], bias: bool, split: Split) -> LinearShape:
    share = context.parallel.share
    is_first = context.parallel.rank == 0
    return LinearShape(
        in_features=in_features,
        parts=tuple(parts.values()),
        has_bias=bias,
        inputs=share("its input size", in_features) if split is Split.INPUTS else slice(0, in_features),
        outputs=tuple(
            share(f"the size of {part}", size) if split is Split.OUTPUTS else slice(0, size)
            for part, size in parts.items()
        ),
        # A sum over the ranks must add the bias once.
        applies_bias=bias and (is_first or split is not Split.INPUTS),
    )


def _make_weights(
    context: BuildContext, modules: Sequence[str], shape: LinearShape, quantization: QuantizationConfig | None
) -> LinearWeights:
    if quantization is not None:
        try:
            return quantization.make_weights(
                shape, context.dtype, context.device, context.workspace, batch_invariant=context.batch_invariant
            )
        except ModelLoadError as error:
            raise ModelLoadError(f"{', '.join(modules)}: {error}") from error
    if context.workspace is None:
        return TorchWeights(shape, context.dtype, context.device)
    return PackedWeights(shape, context.dtype, context.workspace, batch_invariant=context.batch_invariant)
