"""The demo's model in 4 bits: hardly worse on text it has not learnt, and its linear layers a quarter of the size."""

import pytest

from folovllm.quantization.quantize import quantize_checkpoint
from kvstrata.demo_model import DEMO_MODEL


@pytest.mark.slow
def test_perplexity_stays_and_the_linear_layers_shrink_to_a_quarter(tmp_path):
    report = quantize_checkpoint(
        DEMO_MODEL, tmp_path / "out", group_size=64, calibration=DEMO_MODEL / "heldout.txt", window_tokens=256
    )
    assert abs(report.perplexity_increase) < 0.01
    # 4 bits, and a 16-bit scale and a 4-bit zero point per 64 weights, of 16 bits.
    assert report.quantized_bytes_after < 0.28 * report.quantized_bytes_before


@pytest.mark.slow
def test_perplexity_stays_with_a_head_of_8_bits(tmp_path):
    report = quantize_checkpoint(
        DEMO_MODEL,
        tmp_path / "out",
        head_bits=8,
        group_size=64,
        calibration=DEMO_MODEL / "heldout.txt",
        window_tokens=256,
    )
    assert abs(report.perplexity_increase) < 0.01
    # 8 bits, and a 16-bit scale and an 8-bit zero point per 64 weights, of 16 bits; and the order of the inputs.
    embedding_bytes = 2048 * 256 * 2
    assert report.head_bytes_after < 0.53 * embedding_bytes
