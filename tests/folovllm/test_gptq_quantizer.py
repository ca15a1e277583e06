"""The quantiser: better than rounding, and a checkpoint that is written whole or not at all."""

import itertools
import json
import shutil
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from folovllm.quantization import layers
from folovllm.quantization.calibration import read_calibration
from folovllm.quantization.checkpoint import whole_directory
from folovllm.quantization.errors import QuantizationError
from folovllm.quantization.gptq import GPTQOptions, Hessian, quantize_layer, round_to_nearest
from folovllm.quantization.packing import PackedTensors, dequantize
from folovllm.quantization.perplexity import perplexity
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "head_bits", "desc_act"), [(4, 8, False), (8, 4, True), (8, 8, False)])
def test_a_quantised_head_has_weights_of_its_own(small_model, text_file, tmp_path, tied, bits, head_bits, desc_act):
    source = _tied(small_model, tmp_path / "tied") if tied else small_model
    steps: list[str] = []
    report = quantize_checkpoint(
        source,
        tmp_path / "out",
        bits=bits,
        head_bits=head_bits,
        group_size=32,
        calibration=text_file,
        desc_act=desc_act,
        num_windows=8,
        window_tokens=64,
        progress=lambda what, done, total: steps.append(f"{what} {done}/{total}"),
    )
    assert {"layers 1/3", "layers 3/3"} <= set(steps)
    config = json.loads((report.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["lm_head"] is True
    expected = {"lm_head": {"bits": head_bits}} if head_bits != bits else None
    assert config["quantization_config"].get("dynamic") == expected

    weights, tensors = load_file(source / "model.safetensors"), load_file(report.out / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert "lm_head.weight" not in tensors
    packed = PackedTensors(*[tensors[f"lm_head.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")])
    head = embedding if tied else weights["lm_head.weight"]
    assert (dequantize(packed, head_bits, 1) - head).norm() < (0.2 if head_bits == 4 else 0.01) * head.norm()
    assert report.num_layers == 14
    assert report.head_bytes_before == (0 if tied else head.nbytes)
    assert report.head_bytes_after == sum(t.nbytes for t in packed.named().values())
    sizes = report.quantized_bytes_after, report.head_bytes_after, report.kept_bytes
    assert sum(sizes) == sum(t.nbytes for t in tensors.values())

    reference = AutoModelForCausalLM.from_pretrained(source)
    for name in weights:
        if "_proj" in name:
            suffixes = ("qweight", "qzeros", "scales", "g_idx")
            part = PackedTensors(*[tensors[f"{name.removesuffix('.weight')}.{suffix}"] for suffix in suffixes])
            reference.get_parameter(name).data.copy_(dequantize(part, bits, 1))
    reference.lm_head.weight = torch.nn.Parameter(dequantize(packed, head_bits, 1))
    text = read_calibration(text_file, _tokenizer(source), 8, 64, 2)
    assert perplexity(reference, text.held_out) == pytest.approx(report.perplexity_after, rel=1e-3)


def _tied(source: Path, directory: Path) -> Path:
    """The same model, its head the embedding."""
    state, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    directory.mkdir()
    del state["lm_head.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def test_a_head_is_quantised_in_pieces_as_in_one(small_model, text_file, tmp_path, monkeypatch):
    def head(name: str) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        quantize_checkpoint(
            small_model, out, head_bits=4, group_size=32, calibration=text_file, desc_act=True, num_windows=4,
            window_tokens=64,
        )  # fmt: skip
        return {k: v for k, v in load_file(out / "model.safetensors").items() if k.startswith("lm_head.")}

    whole = head("whole")
    monkeypatch.setattr(layers, "_HEAD_ROWS", 600)
    pieces = head("pieces")
    assert torch.equal(pieces["lm_head.g_idx"], whole["lm_head.g_idx"])
    weights = [
        dequantize(PackedTensors(*[t[f"lm_head.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx")]), 4, 1)
        for t in (whole, pieces)
    ]
    # Products of other shapes round otherwise, and now and then an integer with them.
    assert (weights[0] != weights[1]).float().mean() < 0.01


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
        ({"head_bits": 6}, "head_bits=6 .*4, 8, 16"),
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
