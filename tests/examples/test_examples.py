"""Every example runs as its file says, and shows what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 180


def run(name: str, *arguments: str, stdin: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / name), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_has_a_test():
    tested = {"basic_inference.py", "batch_inference.py", "streaming_chat.py", "advanced_usage.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_basic_inference_completes_each_prompt():
    assert run("basic_inference.py").count(" -> ") == 3


def test_batch_inference_reports_its_rate():
    output = run("batch_inference.py", "--num-requests", "12")
    assert "12 requests" in output
    assert "tokens/s" in output


def test_streaming_chat_reuses_what_the_last_turn_computed():
    output = run(
        "streaming_chat.py", stdin="What is a list in Python, and how is it different from a tuple?\nAnd a set?\n"
    )
    cached = [int(count) for count in re.findall(r"\[(\d+) of \d+ prompt tokens cached\]", output)]
    assert len(cached) == 2
    assert cached[1] > cached[0]


@pytest.mark.parametrize(
    "shown", ["hit rate", "structured: {'name'", "choice:", "finished in the order [3, 2, 1, 0]", "' -"]
)
def test_advanced_usage_shows(shown, advanced_output):
    assert shown in advanced_output


@pytest.fixture(scope="module")
def advanced_output() -> str:
    return run("advanced_usage.py")
