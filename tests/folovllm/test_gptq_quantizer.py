"""The quantiser: better than rounding, and a checkpoint that is written whole or not at all."""

import itertools
import json
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from folovllm.quantization.calibration import read_calibration
from folovllm.quantization.checkpoint import whole_directory
from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.gptq import GPTQOptions, Hessian, quantize_layer, round_to_nearest
from folovllm.quantization.packing import PackedTensors, dequantize
from folovllm.quantization.quantize import quantize_checkpoint


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics))[:60_000])
    return file


def correlated_problem(num_outputs: int = 48, num_inputs: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that few directions explain, as those of language models do."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(12, num_inputs, generator=generator)
    inputs = torch.randn(1000, 12, generator=generator) @ mixing
    inputs += 0.3 * torch.randn(1000, num_inputs, generator=generator)
    return torch.randn(num_outputs, num_inputs, generator=generator), inputs


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1])
    for part in inputs.split(300):
        hessian.add(part)
    return hessian.matrix


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act"), [*itertools.product((4, 8), (32, 128, -1), (True, False), (False, True))]
)
def test_outputs_are_closer_than_those_of_rounding_to_the_nearest(bits, group_size, sym, desc_act):
    weight, inputs = correlated_problem()
    options = GPTQOptions(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    nearest = round_to_nearest(weight, options, torch.float16).dequantized()
    quantized = quantize_layer(weight, hessian_of(inputs), options, torch.float16).dequantized()
    errors = [(inputs @ (weight - candidate).t()).square().mean() for candidate in (quantized, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_hessian_is_twice_the_mean_of_outer_products():
    _, inputs = correlated_problem()
    torch.testing.assert_close(hessian_of(inputs), 2 * inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("desc_act", [False, True])
def test_packed_tensors_stand_for_the_quantised_weight(desc_act):
    weight, inputs = correlated_problem()
    options = GPTQOptions(group_size=32, sym=False, desc_act=desc_act)
    layer = quantize_layer(weight, hessian_of(inputs), options, torch.float16)
    for zero_offset in (0, 1):
        packed = layer.packed(4, zero_offset, torch.float16)
        assert torch.equal(dequantize(packed, 4, zero_offset), layer.dequantized())
    assert torch.equal(torch.bincount(layer.g_idx), torch.full((5,), 32))


def test_inputs_that_are_always_zero_do_no_harm():
    weight, inputs = correlated_problem()
    inputs[:, 40:50] = 0
    layer = quantize_layer(weight, hessian_of(inputs), GPTQOptions(group_size=32), torch.float16)
    assert torch.isfinite(layer.dequantized()).all()


def test_rows_of_zeros_stay_zero():
    weight, inputs = correlated_problem()
    weight[3] = 0
    layer = quantize_layer(weight, hessian_of(inputs), GPTQOptions(), torch.float16)
    assert (layer.dequantized()[3] == 0).all()


def test_values_that_are_not_finite_are_refused():
    weight, inputs = correlated_problem()
    weight[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match="not finite"):
        quantize_layer(weight, hessian_of(inputs), GPTQOptions(), torch.float16)


@pytest.mark.parametrize("sym", [True, False])
def test_checkpoint_holds_what_the_report_says(small_model, text_file, tmp_path, sym):
    steps: list[str] = []
    report = quantize_checkpoint(
        small_model,
        tmp_path / "out",
        group_size=32,
        calibration=text_file,
        sym=sym,
        num_windows=8,
        window_tokens=64,
        progress=lambda what, done, total: steps.append(f"{what} {done}/{total}"),
    )
    config = json.loads((report.out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, sym)
    assert config["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    assert json.loads((report.out / "quantize_config.json").read_text()) == config
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= {p.name for p in report.out.iterdir()}
    assert {"layers 1/2", "layers 2/2", "writing 1/1"} <= set(steps)

    source, tensors = load_file(small_model / "model.safetensors"), load_file(report.out / "model.safetensors")
    assert report.num_layers == 14
    assert report.quantized_bytes_after + report.kept_bytes == sum(t.nbytes for t in tensors.values())
    reference = AutoModelForCausalLM.from_pretrained(small_model)
    for name, weight in source.items():
        if "_proj" not in name:
            assert torch.equal(tensors[name], weight)
            continue
        prefix = name.removesuffix(".weight")
        packed = PackedTensors(*[tensors[f"{prefix}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")])
        dequantized = dequantize(packed, 4, 1 if sym else 0)
        assert (dequantized - weight).norm() < 0.2 * weight.norm()
        reference.get_parameter(name).data.copy_(dequantized)
    text = read_calibration(text_file, _tokenizer(small_model), 8, 64, 2)
    with torch.no_grad():
        loss = sum(float(reference(w[None], labels=w[None]).loss) for w in text.held_out) / len(text.held_out)
    assert torch.tensor(loss).exp().item() == pytest.approx(report.perplexity_after, rel=1e-3)


def _tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_windows_do_not_overlap_and_held_out_text_comes_last(small_model, text_file):
    text = read_calibration(text_file, _tokenizer(small_model), 5, 64, 3)
    assert text.windows.shape == (5, 64)
    assert text.held_out.shape == (3, 64)
    ids = _tokenizer(small_model)(text_file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    places = [
        next(i for i in range(len(ids)) if ids[i : i + 64] == w.tolist()) for w in (*text.windows, *text.held_out)
    ]
    assert all(later - earlier >= 64 for earlier, later in itertools.pairwise(places))
    assert places[5] >= len(ids) * 0.9 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 .*4, 8"),
        ({"group_size": 48}, "group_size=48 .*32, 64, 128, -1"),
        ({"num_windows": 0}, "num_windows=0"),
        ({"window_tokens": 1}, "window_tokens=1"),
        ({"window_tokens": 5000}, "tokens; windows of 5000 tokens need at least 50000"),
        ({"calibration": Path("no-such-file.txt")}, "no-such-file.txt is not readable"),
        ({"model": Path("no-such-model")}, "no-such-model"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(options, message, small_model, text_file, tmp_path):
    arguments = {"model": small_model, "calibration": text_file, **options}
    with pytest.raises(QuantizationError, match=message):
        quantize_checkpoint(arguments.pop("model"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_something_in_it_is_refused(small_model, text_file, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(QuantizationError, match="not an empty directory"):
            quantize_checkpoint(small_model, target, calibration=text_file)


def test_a_quantised_checkpoint_is_not_quantised_again(small_model, text_file, tmp_path):
    config = json.loads((small_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    for file in small_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match="quantised already"):
        quantize_checkpoint(tmp_path, tmp_path / "out", calibration=text_file)


def test_the_target_appears_when_it_is_whole_and_not_before(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with whole_directory(out) as directory:
        (directory / "a").write_text("a")
        assert list(out.iterdir()) == []
        assert directory.name.startswith(".out.partial")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "a").read_text() == "a"


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def write_and_stop() -> None:
        with whole_directory(tmp_path / "out") as directory:
            (directory / "model.safetensors").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []
