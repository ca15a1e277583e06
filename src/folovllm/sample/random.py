"""Counter-based random numbers: the draw for an output token is a function of (request seed, output position).

Nothing is carried from step to step, so a request's draws cannot depend on who shares its batch, on how its prompt was
chunked, or on whether it was preempted and recomputed.
Source: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

import numpy as np
import numpy.typing as npt

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), with 53 random bits."""
    # The seed is mixed first: otherwise position 1 of seed s would be position 0 of seed s + gamma.
    stream = _mix(seeds + GOLDEN_GAMMA)
    bits = _mix(stream + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
