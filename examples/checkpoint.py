"""The model of the examples when none is named: the demo's, made on the spot."""

import tempfile
from pathlib import Path

from kvstrata.demo_model import make_demo_model


def demo_checkpoint() -> str:
    """The directory of a new checkpoint with random weights: what it says makes no sense, how it is said does."""
    return str(make_demo_model(Path(tempfile.mkdtemp(prefix="kvstrata-example-"))))
