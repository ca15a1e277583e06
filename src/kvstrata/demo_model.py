"""The demo's model, strata-tiny: a small trained Qwen3 that lies in this package, with text that it has not learnt.

Its card, models/strata-tiny/README.md, says what it was trained on and by which command.
"""

from functools import cache
from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "models" / "strata-tiny"
"""A complete checkpoint: weights in bfloat16, tokenizer, chat template, generation config."""


@cache
def held_out_text() -> str:
    """Documentation of Python that was kept from the model's training."""
    return (DEMO_MODEL / "heldout.txt").read_text(encoding="utf-8")
