"""The plain scorer: what `Index.score` computes in one native step, written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvrouter.kvblock.base import DEFAULT_TIER_WEIGHTS, UNKNOWN_TIER_WEIGHT, Keys, PodEntry


class LongestPrefixScorer:
    """Scores pods by their longest run of consecutive keys from key 0 on, each key at the weight of its best tier."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """Take the weights by tier; None means `DEFAULT_TIER_WEIGHTS`. Tiers without one weigh 1.0."""
        self._weights = dict(DEFAULT_TIER_WEIGHTS if weights is None else weights)

    def score(self, keys: Keys, entries: Mapping[int, Sequence[PodEntry]]) -> dict[str, float]:
        """Return the score of each pod that holds the first key.

        Args:
            keys: the blocks of a prompt, in order.
            entries: holders by key, as `Index.lookup` returns them.
        """
        scores: dict[str, float] = {}
        running: set[str] | None = None
        for key in keys:
            best = self._best_weights(entries.get(int(key), ()))
            running = set(best) if running is None else running & best.keys()
            if not running:
                break
            for pod in running:
                scores[pod] = scores.get(pod, 0.0) + best[pod]
        return scores

    def _best_weights(self, entries: Sequence[PodEntry]) -> dict[str, float]:
        best: dict[str, float] = {}
        for entry in entries:
            weight = self._weights.get(entry.tier, UNKNOWN_TIER_WEIGHT)
            best[entry.pod] = max(best.get(entry.pod, weight), weight)
        return best
