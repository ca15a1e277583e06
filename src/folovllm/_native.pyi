"""Kernels of the engine on a CPU (csrc/folovllm).

Tensors are passed as addresses (`Tensor.data_ptr()`); shapes are in elements and rows are contiguous unless a stride is
given. Callers check what they pass: a wrong size is memory corruption, so only the faces in `folovllm` call these.
All release the GIL, and run on the pool of `set_num_threads`. `dtype` is "float32", "bfloat16" or "float16".
"""

def set_num_threads(num_threads: int, cpus: list[int] = ...) -> None:
    """Run kernels on this many threads, the caller's included; thread i is pinned to cpus[i] unless `cpus` is empty.

    Raises:
        ValueError: not 1 to 256, or fewer cpus than threads.
        RuntimeError: a cpu that this process may not use.
    """

def num_threads() -> int:
    """Threads that kernels run on; at first one per cpu this process may use."""

def detected_isa() -> str:
    """The best of "portable", "avx2", "avx512", "avx512_bf16", "amx" that this machine has."""

def current_isa() -> str:
    """What kernels use: the best there is, unless limited."""

def limit_isa(name: str) -> None:
    """Use at most this instruction set; not while a kernel runs.

    Raises:
        ValueError: no such instruction set.
    """

# -- linear layers ------------------------------------------------------------------------------------------------------

# -- attention ----------------------------------------------------------------------------------------------------------

# -- elementwise and sampling -------------------------------------------------------------------------------------------

# -- quantised linear layers --------------------------------------------------------------------------------------------
