"""Checkpoints load whole or are refused with the name of what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.folovllm.checkpoints import SHAPES
from tests.folovllm.runner_driver import make_runner

from folovllm.engine.arg_utils import EngineArgs
from folovllm.errors import ModelLoadError
from folovllm.model_executor.loader import INDEX_FILE, SINGLE_FILE, checkpoint_files
from folovllm.worker.model_runner import ModelRunner

TIED, UNTIED, FUSED = "qwen3-wide-heads-gqa2", "qwen3-gqa8-bias", "phi3-gqa4-window"


@pytest.fixture
def copy_of(checkpoint, tmp_path):
    """copy_of(shape, **) -> a copy that may be damaged."""

    def copy(name: str, **options: object) -> Path:
        return Path(shutil.copytree(checkpoint(name, **options), tmp_path / name))

    return copy


def edit_weights(directory: Path, change) -> None:
    weights = load_file(directory / SINGLE_FILE)
    change(weights)
    save_file(weights, directory / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def parameters_of(runner: ModelRunner) -> dict[str, torch.Tensor]:
    """The weights as they are computed with, in the shape of the checkpoint, merged layers in one."""
    model = runner.model
    linears = {"lm_head": model.lm_head}
    norms = {"model.norm": model.norm}
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        linears[f"{prefix}.self_attn.qkv_proj"] = layer.self_attn.qkv_proj
        linears[f"{prefix}.self_attn.o_proj"] = layer.self_attn.o_proj
        linears[f"{prefix}.mlp.gate_up_proj"] = layer.mlp.gate_up_proj
        linears[f"{prefix}.mlp.down_proj"] = layer.mlp.down_proj
        norms[f"{prefix}.input_layernorm"] = layer.input_layernorm
        norms[f"{prefix}.post_attention_layernorm"] = layer.post_attention_layernorm
    weights = {f"{name}.weight": linear.weights.row_major() for name, linear in linears.items()}
    every_id = torch.arange(len(weights["lm_head.weight"]), dtype=torch.int32)
    biases = {f"{name}.bias": linear.weights.bias for name, linear in linears.items()}
    return {
        "model.embed_tokens.weight": model.embed_tokens(every_id).clone(),
        **weights,
        **{name: bias for name, bias in biases.items() if bias is not None},
        **{f"{name}.weight": norm.weight for name, norm in norms.items()},
    }


@pytest.mark.parametrize("name", [TIED, UNTIED, FUSED, "qwen2-gqa7"])
def test_sharded_and_single_checkpoints_load_the_same(name, checkpoint):
    sharded = checkpoint(name, shards=True)
    assert len(checkpoint_files(sharded)) > 1
    expected = parameters_of(make_runner(checkpoint(name)))
    for key, value in parameters_of(make_runner(sharded)).items():
        assert torch.equal(value, expected[key]), key


def test_merged_rows_keep_the_order_of_their_parts(checkpoint):
    weights = load_file(checkpoint(UNTIED) / SINGLE_FILE)
    parameters = parameters_of(make_runner(checkpoint(UNTIED)))
    prefix = "model.layers.1.self_attn."
    for suffix in ("weight", "bias"):
        parts = [weights[f"{prefix}{part}_proj.{suffix}"] for part in "qkv"]
        assert torch.equal(parameters[f"{prefix}qkv_proj.{suffix}"], torch.cat(parts))


def test_fused_projections_are_held_as_they_come(checkpoint):
    weights = load_file(checkpoint(FUSED) / SINGLE_FILE)
    parameters = parameters_of(make_runner(checkpoint(FUSED)))
    assert set(parameters) == set(weights)
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert torch.equal(parameters[f"model.layers.1.{name}.weight"], weights[f"model.layers.1.{name}.weight"])


def test_parts_of_a_projection_that_must_be_fused_are_refused(copy_of):
    directory, prefix = copy_of(FUSED), "model.layers.0.self_attn"
    edit_weights(directory, lambda w: w.update({f"{prefix}.q_proj.weight": w.pop(f"{prefix}.qkv_proj.weight")[:64]}))
    with pytest.raises(ModelLoadError, match=r"missing: .*qkv_proj\.weight; not part of the model: .*q_proj\.weight"):
        make_runner(directory)


def test_a_fused_projection_of_another_size_is_named_with_both_shapes(copy_of):
    directory, name = copy_of(FUSED), "model.layers.0.self_attn.qkv_proj.weight"
    edit_weights(directory, lambda w: w.update({name: w[name][:-8].clone()}))
    with pytest.raises(ModelLoadError, match=r"qkv_proj\.weight .*\[88, 64\].*\[96, 64\]"):
        make_runner(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_to_the_engines_dtype(dtype, checkpoint):
    runner = make_runner(checkpoint(TIED, dtype=torch.bfloat16), dtype=dtype)
    weights = parameters_of(runner)
    assert {str(p.dtype) for p in weights.values()} == {f"torch.{dtype}"}
    assert {str(cache.dtype) for cache in runner.kv_caches.values()} == {f"torch.{dtype}"}


def test_auto_dtype_is_the_checkpoints(checkpoint):
    runner = make_runner(checkpoint(TIED, dtype=torch.bfloat16), dtype="auto")
    assert runner.config.model_config.dtype == torch.bfloat16


def test_loading_leaves_the_default_dtype_alone(checkpoint):
    make_runner(checkpoint(TIED), dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32


def test_tied_head_shares_the_embedding_and_may_be_repeated_in_the_file(copy_of):
    directory = copy_of(TIED)
    edit_weights(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    weights = parameters_of(make_runner(directory))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_missing_tensors_are_named(copy_of):
    directory = copy_of(UNTIED)
    edit_weights(directory, lambda w: [w.pop("lm_head.weight"), w.pop("model.layers.2.self_attn.k_proj.bias")])
    with pytest.raises(ModelLoadError, match=r"missing: (?=.*lm_head\.weight)(?=.*layers\.2\.self_attn\.k_proj\.bias)"):
        make_runner(directory)


def test_unknown_tensors_are_named(copy_of):
    directory = copy_of(TIED)
    edit_weights(directory, lambda w: w.update({"model.layers.0.extra.weight": torch.ones(2)}))
    with pytest.raises(ModelLoadError, match=r"not part of the model: model\.layers\.0\.extra\.weight"):
        make_runner(directory)


def test_long_lists_of_names_are_cut(copy_of):
    directory = copy_of(TIED)
    edit_weights(directory, lambda w: w.update({f"x{i:02}": torch.ones(1) for i in range(20)}))
    with pytest.raises(ModelLoadError, match=r"x07 and 12 more"):
        make_runner(directory)


def test_wrong_shape_is_named_with_both_shapes(copy_of):
    directory = copy_of(TIED)
    edit_weights(directory, lambda w: w.update({"model.norm.weight": torch.ones(49)}))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight .*\[49\].*\[48\]"):
        make_runner(directory)


def test_integer_weights_are_refused(copy_of):
    directory = copy_of(TIED)
    edit_weights(directory, lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight .*int32"):
        make_runner(directory)


def test_directory_without_weights_is_refused(copy_of):
    directory = copy_of(TIED)
    (directory / SINGLE_FILE).unlink()
    with pytest.raises(ModelLoadError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        make_runner(directory)


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None], ids=["empty", "garbage", "truncated"])
def test_corrupt_file_is_named(damage, copy_of):
    file = copy_of(TIED) / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ModelLoadError, match=rf"{SINGLE_FILE} is not a readable safetensors file"):
        make_runner(file.parent)


def test_missing_shard_is_named(copy_of):
    directory = copy_of(TIED, shards=True)
    victim = checkpoint_files(directory)[1]
    victim.unlink()
    with pytest.raises(ModelLoadError, match=f"missing: {victim.name}"):
        make_runner(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_malformed_index_is_named(text, copy_of):
    directory = copy_of(TIED, shards=True)
    (directory / INDEX_FILE).write_text(text)
    with pytest.raises(ModelLoadError, match=f"{INDEX_FILE} is not a safetensors index"):
        make_runner(directory)


def test_tensor_in_two_shards_is_refused(copy_of):
    directory = copy_of(TIED, shards=True)
    files = checkpoint_files(directory)
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file({**second, name: first[name]}, files[1], metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"repeats tensor {name}"):
        make_runner(directory)


def test_unsupported_architecture_lists_the_supported_ones(copy_of):
    directory = copy_of(TIED)
    edit_config(directory, architectures=["MambaForCausalLM"])
    with pytest.raises(
        ModelLoadError, match=r"MambaForCausalLM is not supported; supported: Llama.*, Qwen3ForCausalLM"
    ):
        make_runner(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None}, "sliding"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'.*yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_computed_wrongly_is_refused(changes, message, copy_of):
    directory = copy_of(TIED)
    edit_config(directory, **changes)
    with pytest.raises(ModelLoadError, match=message):
        make_runner(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 100}, "sliding_window=100, and requests can be 256 tokens long"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
                "original_max_position_embeddings": 64,
            },
            "rope_type 'longrope'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_some_phi3_checkpoints_ask_for_is_refused(changes, message, copy_of):
    directory = copy_of(FUSED)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps({"rope_theta": 1e4, **config, **changes}))
    with pytest.raises(ModelLoadError, match=message):
        make_runner(directory)


def test_sliding_window_that_holds_every_request_is_accepted(copy_of):
    directory = copy_of(FUSED)
    edit_config(directory, sliding_window=100)
    make_runner(directory, max_model_len=100)
    with pytest.raises(ModelLoadError, match="sliding_window=100, and requests can be 101 tokens long"):
        make_runner(directory, max_model_len=101)


def test_sliding_window_that_no_layer_uses_is_accepted(copy_of, checkpoint):
    directory = copy_of(TIED)
    layers = SHAPES[TIED].layers
    edit_config(directory, use_sliding_window=True, sliding_window=16, max_window_layers=layers, layer_types=None)
    make_runner(directory)


@pytest.mark.parametrize(
    ("name", "old_style"),
    [
        ("qwen3-theta1e6-6layers", {"rope_theta": 1e6}),
        (
            "qwen2-yarn-gqa3",
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
        ),
    ],
)
def test_rope_options_in_the_older_config_format_mean_the_same(name, old_style, copy_of, checkpoint):
    directory = copy_of(name)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps({**config, **old_style}))
    tables = [make_runner(path).model.cos_sin for path in (directory, checkpoint(name))]
    assert torch.equal(*tables)


def test_missing_model_directory_is_refused():
    with pytest.raises(ModelLoadError, match="is not a directory"):
        EngineArgs(model="./no-such-model").resolve()
