"""What the sampler knows about the rows of one step. Mirrors vllm/v1/sample/metadata.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from folovllm.sample.logits_processor.interface import ProcessedRow


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """Host arrays with one entry per row of logits, so that deciding what to do waits for no device.

    What no row of the step asks for is None or empty, and costs nothing.
    """

    temperature: npt.NDArray[np.float32]
    """Below sampling_params.GREEDY_EPSILON the row is greedy."""
    top_k: npt.NDArray[np.int64]
    """0 keeps all tokens."""
    top_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]
    output_positions: npt.NDArray[np.int64]
    """Index of the token being drawn among the request's output tokens; of greedy rows it may be an older one."""
    masked_rows: npt.NDArray[np.int64]
    """With `masked_token_ids`: pairs of (row, token) that may not be drawn (`min_tokens`)."""
    masked_token_ids: npt.NDArray[np.int64]
    min_p: npt.NDArray[np.float32] | None = None
    """0 keeps all tokens."""
    processed: Sequence[ProcessedRow] = ()
    """The rows that logits processors work on, in their order."""
    num_logprobs: npt.NDArray[np.int64] | None = None
    """How many of the most likely tokens to report beside the chosen one; -1: nothing."""
