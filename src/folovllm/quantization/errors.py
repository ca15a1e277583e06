"""What can go wrong when a checkpoint is quantised."""

from folovllm.errors import FoloVLLMError


class QuantizationError(FoloVLLMError):
    """The model, the options, the calibration text or the target do not allow it; the message says which and why."""
