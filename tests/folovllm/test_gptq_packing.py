"""The packed format, against words written by hand."""

import pytest
import torch
from tests.folovllm.gptq_layers import random_layer

from folovllm.quantization.packing import PackedTensors, dequantize, pack_words, pack_zeros, unpack_words, unpack_zeros


def word(text: str) -> int:
    """A word from its hexadecimal digits, as the signed number that int32 holds."""
    value = int(text, 16)
    return value - 2**32 if value >= 2**31 else value


def test_first_value_lies_in_the_low_bits_along_k():
    column = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]])
    assert pack_words(column, 4, 0).tolist() == [[word("f7654321")]]
    assert pack_words(column[:4], 8, 0).tolist() == [[word("04030201")]]


def test_zero_points_are_packed_along_n_and_stored_less_one_in_the_older_format():
    zeros = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]])
    assert pack_zeros(zeros, 4, 0).tolist() == [[word("f7654321")]]
    assert pack_zeros(zeros, 4, 1).tolist() == [[word("e6543210")]]
    assert pack_zeros(torch.tensor([[128, 128, 128, 128]]), 8, 1).tolist() == [[word("7f7f7f7f")]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_zero_points_of_zero_survive_the_older_format(bits, zero_offset):
    zeros = torch.randint(0, 2**bits, (5, 32), generator=torch.Generator().manual_seed(bits))
    zeros[:, ::3] = 0
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, zero_offset), bits, zero_offset), zeros.int())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_unpack_to_what_was_packed(bits, dim):
    values = torch.randint(0, 2**bits, (24, 40), generator=torch.Generator().manual_seed(dim))
    packed = pack_words(values, bits, dim)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_words(packed, bits, dim), values.int())


def test_weight_is_scale_times_distance_from_the_zero_point_of_its_group():
    packed = PackedTensors(
        qweight=torch.tensor([[word("76543210")] * 8], dtype=torch.int32),
        qzeros=torch.tensor([[word("77777777")], [word("00000000")]], dtype=torch.int32),
        scales=torch.tensor([[0.5] * 8, [2.0] * 8]).half(),
        g_idx=torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.int32),
    )
    expected = [-4.0, 0.0, -3.0, 4.0, -2.0, 8.0, -1.0, 12.0]  # zero points 8 and 1
    assert dequantize(packed, 4, 1).tolist() == [expected] * 8


def test_dequantised_weight_is_row_major():
    packed = random_layer(24, 64)
    assert dequantize(packed, 4, 1).shape == (24, 64)
