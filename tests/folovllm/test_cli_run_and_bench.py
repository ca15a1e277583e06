"""`folovllm run` and `folovllm bench`, as processes' main functions, with a small model."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app

ENGINE = ("--num-kv-blocks", "260", "--max-model-len", "2048", "--num-threads", "1", "--dtype", "float32")


def call(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": "first", "prompt": "the cache is"},
        {"prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 1},
        {"messages": [{"role": "user", "content": "hi"}], "n": 2, "temperature": 0.8, "seed": 4},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return file


def test_prompts_of_a_file_are_completed_in_order(small_model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    call(
        "run", "--model", str(small_model), "--input-file", str(prompts), "--output-file", str(out),
        "--max-tokens", "5", "--temperature", "0", "--ignore-eos", *ENGINE,
    )  # fmt: skip
    first, second, third = map(json.loads, out.read_text().splitlines())
    assert (first["id"], first["prompt"]) == ("first", "the cache is")
    assert [len(choice["token_ids"]) for choice in first["outputs"]] == [5]
    assert first["outputs"][0]["finish_reason"] == "length"
    assert (second["id"], second["num_prompt_tokens"], len(second["outputs"][0]["token_ids"])) == (1, 3, 2)
    assert [len(position) for position in second["outputs"][0]["logprobs"]] == [1, 1]
    assert len(third["outputs"]) == 2
    assert third["messages"] == [{"role": "user", "content": "hi"}]


def test_one_prompt_is_printed_and_is_what_the_file_says(small_model: Path, tmp_path: Path) -> None:
    options = ("run", "--model", str(small_model), "--max-tokens", "6", "--temperature", "0", "--ignore-eos", *ENGINE)
    printed = call(*options, "--prompt", "the cache is")
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cache is\n\nanother\n")
    first, _ = map(json.loads, call(*options, "--input-file", str(lines)).splitlines())
    assert printed == first["outputs"][0]["text"] + "\n"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "prompts.jsonl:2 is not JSON"),
        ("[]", "prompts.jsonl:2 must be a JSON object"),
        ("{}", "prompts.jsonl:2 must have either prompt or messages"),
        ('{"prompt": 5}', "prompt must be a text or token ids"),
        ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'"),
        ('{"prompt": "a", "top_p": 7}', "top_p=7"),
    ],
)
def test_bad_line_is_named_before_the_model_is_loaded(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "ok"}}\n{line}\n')
    text = call("run", "--model", str(tmp_path / "nothing"), "--input-file", str(file), code=2)
    assert complaint in text
    assert text.startswith("error: ")


def test_run_needs_one_source(tmp_path: Path) -> None:
    assert "either a prompt or an input file" in call("run", "--model", "m", code=2)
    missing = str(tmp_path / "missing.txt")
    assert "missing.txt" in call("run", "--model", "m", "--input-file", missing, code=2)


def test_latency_and_throughput_report(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = ("--input-len", "8", "--output-len", "3", "--output-json", str(out))
    model = ("--model", str(small_model), *ENGINE)
    text = call("bench", "latency", *model, *shape, "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1")
    assert "latency (s)" in text
    figures = json.loads(out.read_text())
    assert figures["runs"] == 3
    assert 0 < figures["latency (s)"]["p50"] <= figures["latency (s)"]["p99"]
    call("bench", "throughput", *model, *shape, "--num-prompts", "5", "--range-ratio", "0.5")
    figures = json.loads(out.read_text())
    assert (figures["prompts"], figures["machine"]["cpus"] > 0) == (5, True)
    assert figures["total tokens/s"] > figures["output tokens/s"] > 0


def test_bad_bench_options_are_named(small_model: Path) -> None:
    text = call("bench", "latency", "--model", str(small_model), "--num-iters", "0", code=2)
    assert "num_iters=0 is not allowed" in text
    assert "one of completions, chat" in call("bench", "serve", "--endpoint", "embeddings", code=2)
    assert "range_ratio=1.0" in call("bench", "serve", "--range-ratio", "1", code=2)
