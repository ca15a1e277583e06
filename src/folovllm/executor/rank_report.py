"""What a rank tells rank 0."""

import msgspec


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """A rank has loaded its share of the model, or says why it cannot."""

    rank: int
    error: str | None = None
