"""`kvstrata quantize` on the command line."""

import json
from pathlib import Path
from pydoc_data import topics

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams
from kvstrata.cli import app


@pytest.fixture
def text_file(tmp_path) -> Path:
    file = tmp_path / "calibration.txt"
    file.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics))[:30_000])
    return file


def quantize(*arguments: object):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_a_checkpoint_is_quantised_and_reported(small_model, text_file, tmp_path):
    out = tmp_path / "out"
    result = quantize(
        small_model, out, "--calibration", text_file, "--bits", 8, "--group-size", 32, "--num-windows", 4,
        "--window-tokens", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "14 linear layers" in result.output
    assert "perplexity" in result.output
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 8


def test_a_checkpoint_with_a_quantised_head_is_written_reported_and_served(small_model, text_file, tmp_path):
    out = tmp_path / "out"
    result = quantize(
        small_model, out, "--calibration", text_file, "--head-bits", 8, "--group-size", 32, "--num-windows", 4,
        "--window-tokens", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "output head, 8 bits" in result.output
    options = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (options["bits"], options["lm_head"], options["dynamic"]) == (4, True, {"lm_head": {"bits": 8}})
    with LLM(str(out), num_kv_blocks=64, num_threads=1) as llm:
        (output,) = llm.generate(["Values are"], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 6


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["MODEL", "OUT", "--calibration", "TEXT", "--bits", "5"], "bits=5"),
        (["MODEL", "OUT", "--calibration", "TEXT", "--head-bits", "2"], "head_bits=2"),
        (["MODEL", "OUT", "--calibration", "TEXT", "--group-size", "100"], "group_size=100"),
        (["MODEL", "OUT", "--calibration", "/no/such/text"], "/no/such/text"),
        (["MODEL", "PARENT", "--calibration", "TEXT"], "empty directory"),
        (["/no/such/model", "OUT", "--calibration", "TEXT"], "/no/such/model"),
        (["MODEL", "OUT"], "--calibration"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(arguments, word, small_model, text_file, tmp_path):
    places = {"MODEL": small_model, "OUT": tmp_path / "out", "TEXT": text_file, "PARENT": tmp_path}
    result = quantize(*[places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert word in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
