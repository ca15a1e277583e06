"""Modules of a GPTQ checkpoint with settings of their own: honoured, excluded, or refused by name."""

import random
from dataclasses import replace

import pytest
from tests.folovllm.gptq_checkpoints import write_pair
from tests.folovllm.runner_driver import RunnerDriver, make_runner

from folovllm.errors import ModelLoadError
from folovllm.model_executor.layers.linear_weights import PackedWeights
from folovllm.model_executor.layers.quantization import GPTQConfig
from folovllm.quantization.gptq import GPTQOptions

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FOUR = GPTQConfig(4, 32, False, True)
LAYERS = GPTQOptions(bits=4, group_size=32)


def config_with(dynamic, **changes) -> GPTQConfig:
    return GPTQConfig.from_dict(BASE | changes | {"dynamic": dynamic})


@pytest.mark.parametrize("key", [r"model\.layers\.0\..*", r"+:model\.layers\.0\..*", r"+:.*\.0\."])
def test_a_rule_changes_what_it_names_of_the_modules_that_match(key):
    config = config_with({key: {"bits": 8, "group_size": -1, "mse": 2.4}})
    assert config.of_linear(["model.layers.0.mlp.down_proj"]) == GPTQConfig(8, -1, False, True)
    assert config.of_linear(["model.layers.1.mlp.down_proj"]) == FOUR


def test_every_setting_can_be_changed():
    config = config_with({".*": {"bits": 8, "group_size": 64, "desc_act": True, "sym": False}}, format="gptq_v2")
    assert config.of_linear(["model.layers.0.mlp.down_proj"]) == GPTQConfig(8, 64, True, False, "gptq_v2")


def test_the_first_rule_that_matches_holds_alone():
    config = config_with(
        {r".*down_proj": {"group_size": 64}, r"-:model\.layers\.0": {}, r"model\.layers\.[01]\.": {"bits": 8}}
    )
    assert config.of_linear(["model.layers.0.mlp.down_proj"]) == replace(FOUR, group_size=64)
    assert config.of_linear(["model.layers.0.self_attn.o_proj"]) is None
    assert config.of_linear(["model.layers.1.self_attn.o_proj"]) == replace(FOUR, bits=8)


def test_patterns_match_from_the_beginning_of_the_name():
    config = config_with({"o_proj": {"bits": 8}, "-:model.layers.1": None})
    assert config.of_linear(["model.layers.0.self_attn.o_proj"]) == FOUR
    assert config.of_linear(["model.layers.1.self_attn.o_proj"]) is None


def test_the_head_is_quantised_if_the_option_says_so_and_no_rule_excludes_it():
    rule = {"lm_head": {"bits": 8, "group_size": 32, "sym": True, "desc_act": False, "mse": 2.4}}
    assert config_with(rule, lm_head=True).of_head("lm_head") == replace(FOUR, bits=8)
    assert config_with(None, lm_head=True).of_head("lm_head") == FOUR
    assert config_with(rule).of_head("lm_head") is None
    assert config_with({"-:lm_head": {}}, lm_head=True).of_head("lm_head") is None


@pytest.mark.parametrize(
    "dynamic", [{r".*\.k_proj": {"bits": 8}}, {r"-:.*\.v_proj": {}}, {r".*\.q_proj": {"desc_act": True}}]
)
def test_parts_of_one_layer_with_different_settings_are_refused(dynamic):
    config = config_with(dynamic)
    with pytest.raises(ModelLoadError, match=r"dynamic gives a\.q_proj, a\.k_proj, a\.v_proj different settings"):
        config.of_linear(["a.q_proj", "a.k_proj", "a.v_proj"])
    assert config.of_linear(["a.qkv_proj"]) == FOUR


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({".*": {"bits": 3}}, r"dynamic\['\.\*'\]\.bits=3 is not supported; supported: 4, 8"),
        ({"+:.*": {"group_size": 16}}, r"group_size=16 .*-1, 32, 64, 128"),
        ({".*": {"sym": "maybe"}}, "sym='maybe'"),
        ({".*": {"adapter": {"rank": 8}}}, r"\.adapter is not supported; supported: bits, group_size, desc_act, sym"),
        ({"(": {"bits": 8}}, "'\\(', which is no regular expression"),
        ({".*": 8}, "'.*': 8; it must map a pattern to settings"),
        (["-:.*"], "dynamic must map patterns to settings"),
    ],
)
def test_rules_that_cannot_be_honoured_are_named(dynamic, message):
    with pytest.raises(ModelLoadError, match=message):
        config_with(dynamic)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ["qwen3-gqa8-bias", "phi3-gqa4-window"])
def test_greedy_tokens_are_those_of_the_dequantised_weights(name, kernels, checkpoint, tmp_path):
    def settings(module: str) -> GPTQOptions | None:
        if module == "lm_head" or "down_proj" in module:
            return None
        if "layers.1" in module:
            return replace(LAYERS, bits=8, group_size=64)
        return replace(LAYERS, group_size=-1) if "o_proj" in module else LAYERS

    dynamic = {
        r"-:.*down_proj": {},
        r"+:model\.layers\.1\.": {"bits": 8, "group_size": 64},
        r".*\.o_proj": {"group_size": -1},
    }
    reference, quantized = write_pair(checkpoint(name), tmp_path, BASE | {"dynamic": dynamic}, settings)
    prompts = [random.Random(length).choices(range(180), k=length) for length in (1, 7, 30)]
    expected = RunnerDriver(make_runner(reference, kernels=kernels)).generate(prompts, 12)
    runner = make_runner(quantized, kernels=kernels)
    assert RunnerDriver(runner).generate(prompts, 12) == expected
    if kernels == "auto":
        assert isinstance(runner.model.layers[0].mlp.down_proj.weights, PackedWeights)


def test_a_model_whose_merged_projections_differ_is_refused(checkpoint, tmp_path):
    dynamic = {r".*\.up_proj": {"bits": 8}}
    _, quantized = write_pair(checkpoint("qwen3-gqa8-bias"), tmp_path, BASE | {"dynamic": dynamic}, lambda _: None)
    with pytest.raises(ModelLoadError, match=r"model\.layers\.0\.mlp\.gate_proj, model\.layers\.0\.mlp\.up_proj"):
        make_runner(quantized)
