"""From a text file to token windows: some to quantise by, others, unseen by it, to measure with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from folovllm.quantization.errors import QuantizationError

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Token windows `[n, length]`, int64."""

    windows: torch.Tensor
    """Spread evenly over the first part of the text."""
    held_out: torch.Tensor
    """From the last tenth."""


def read_calibration(file: Path, tokenizer: Any, num_windows: int, length: int, num_held_out: int) -> CalibrationText:
    """Tokenise a UTF-8 text file and cut it into windows of `length` tokens, at most so many of each kind.

    Raises:
        QuantizationError: the file is not readable text, or too short for one window of each kind.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantizationError(f"calibration file {file} is not readable UTF-8 text: {error}") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    border = int(len(ids) * (1 - HELD_OUT_SHARE))
    if len(ids) - border < length:
        needed = int(length / HELD_OUT_SHARE)
        raise QuantizationError(
            f"calibration file {file} has {len(ids)} tokens; windows of {length} tokens need at least {needed}"
        )
    return CalibrationText(_spread(ids[:border], num_windows, length), _spread(ids[border:], num_held_out, length))


def _spread(ids: torch.Tensor, num_windows: int, length: int) -> torch.Tensor:
    """At most `num_windows` windows that do not overlap, at even distances."""
    available = len(ids) // length
    count = min(num_windows, available)
    starts = [i * available // count * length for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])
