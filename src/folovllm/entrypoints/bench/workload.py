"""Random prompts of known lengths."""

from dataclasses import dataclass

import numpy as np

_FIRST_ORDINARY_ID = 10  # lower ids are often special tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of a workload."""

    prompt_len: int
    output_len: int
    seed: int

    def token_ids(self, vocab_size: int) -> list[int]:
        """A prompt of random tokens; no two samples share a prefix worth caching."""
        low = min(_FIRST_ORDINARY_ID, vocab_size - 1)
        return [int(i) for i in np.random.default_rng(self.seed).integers(low, vocab_size, self.prompt_len)]

    def words(self) -> str:
        """A prompt of random words."""
        letters = np.random.default_rng(self.seed).integers(ord("a"), ord("z") + 1, (self.prompt_len, 5))
        return " ".join("".join(map(chr, word)) for word in letters)


def make_samples(count: int, prompt_len: int, output_len: int, range_ratio: float, seed: int) -> list[Sample]:
    """Samples whose lengths are drawn evenly from [1 - range_ratio, 1 + range_ratio] times the given ones."""
    random = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        low, high = max(1, round(mean * (1 - range_ratio))), max(1, round(mean * (1 + range_ratio)))
        return [int(n) for n in random.integers(low, high + 1, count)]

    seeds = random.integers(0, 2**62, count)
    return [
        Sample(prompt, output, int(own))
        for prompt, output, own in zip(lengths(prompt_len), lengths(output_len), seeds, strict=True)
    ]
