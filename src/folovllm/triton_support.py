"""Whether Triton's kernels can be imported. They are optional: torch's builds for CUDA bring Triton along."""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
