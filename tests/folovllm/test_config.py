"""Options as users write them, and what is derived from them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.config import KVEventsConfig, KVTransferConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.errors import ConfigError, ModelLoadError

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with the config.json of a tiny Qwen3, and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return str(tmp_path)


def args(model: str, **options: Any) -> EngineArgs:
    return EngineArgs.from_options({"model": model, "device": "cpu", **options})


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'max_model_length'; did you mean 'max_model_len'"):
        EngineArgs.from_options({"model": "m", "max_model_length": 1})
    with pytest.raises(ConfigError, match="allowed: model, served_model_name"):
        EngineArgs.from_options({"model": "m", "xyzzy": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0 is not allowed; it must be positive"),
        ({"max_num_seqs": -1}, "max_num_seqs=-1"),
        ({"kv_cache_memory_gb": 0}, "kv_cache_memory_gb=0"),
        ({"num_kv_blocks": 1}, "num_kv_blocks=1 is not allowed; it must be at least 2"),
        ({"dtype": "int8"}, "dtype='int8' is not allowed; it must be one of auto, float32"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"attention_backend": "magic"}, "attention_backend='magic'"),
        ({"max_model_len": 513}, "max_model_len=513 exceeds the model's context of 512"),
        ({"kv_transfer_config": {"kv_connector": "C", "kv_rol": "x"}}, "known keys: kv_connector, kv_role"),
        ({"kv_events_config": {"publisher": "smoke"}}, "kv_events_config is not valid"),
    ],
)
def test_bad_value_is_refused_by_name(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        args(model, **options).resolve()
    assert message in str(error.value)


def test_derived_values(model: str) -> None:
    config = args(model, num_kv_blocks=100, max_model_len=128).resolve()
    assert config.model_config.dtype is torch.bfloat16
    assert config.model_config.served_model_name == model
    assert (config.model_config.max_model_len, config.cache_config.num_kv_blocks) == (128, 100)
    assert config.kv_block_bytes == 2 * 3 * 2 * 16 * 32 * 2  # K and V, layers, heads, tokens, head size, bytes
    parallel = config.parallel_config
    assert config.model_config.get_num_layers(parallel) == 3
    assert config.model_config.get_num_kv_heads(parallel) == 2
    assert config.model_config.get_num_attention_heads(parallel) == 4
    assert config.model_config.get_head_size() == 32
    assert config.model_config.get_vocab_size() == 100


def test_memory_decides_the_blocks_when_their_number_is_not_given(model: str) -> None:
    block_bytes = 12288
    config = args(model, kv_cache_memory_gb=100 * block_bytes / 2**30).resolve()
    assert config.cache_config.num_kv_blocks == 100


def test_longest_request_is_cut_to_what_the_pool_holds(model: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = args(model, num_kv_blocks=5).resolve()
    assert config.model_config.max_model_len == 4 * 16, "block 0 holds nothing"
    assert config.model_config.context_len == 512
    assert "max_model_len=512 is more than the KV cache holds; using 64" in caplog.text


def test_every_running_request_has_a_token_in_the_budget(model: str) -> None:
    config = args(model, max_num_seqs=64, max_num_batched_tokens=16).resolve()
    assert config.scheduler_config.max_num_seqs == 16


def test_without_chunking_the_budget_holds_the_longest_prompt(model: str) -> None:
    config = args(model, max_num_batched_tokens=16, enable_chunked_prefill=False).resolve()
    assert config.scheduler_config.max_num_batched_tokens == 512
    assert config.scheduler_config.max_num_seqs == 16


def test_connector_and_events_come_as_json_objects(model: str) -> None:
    config = args(
        model,
        kv_transfer_config={"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"a": 1}},
        kv_events_config={"endpoint": "tcp://*:6000", "topic": "kv@pod@m"},
    ).resolve()
    assert isinstance(config.kv_transfer_config, KVTransferConfig)
    assert config.kv_transfer_config.kv_role == "kv_both"
    assert isinstance(config.kv_events_config, KVEventsConfig)
    assert config.kv_events_config.topic == "kv@pod@m"


@pytest.mark.parametrize("model", ["/no/such/directory", "./nowhere", "a/b/c"])
def test_missing_model_directory(model: str) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory"):
        args(model).resolve()


def test_directory_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        args(str(tmp_path)).resolve()
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        args(str(tmp_path)).resolve()


def test_config_that_transformers_refuses(tmp_path: Path) -> None:
    broken = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        args(str(tmp_path)).resolve()


def test_config_of_something_that_is_no_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNetModel"]}))
    with pytest.raises(ModelLoadError, match=r"ResNetModel.*has no max_position_embeddings"):
        args(str(tmp_path)).resolve()
