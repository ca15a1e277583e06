"""What the README tells people to type works as it stands, with a small model in place of the hub's."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kvstrata.cli import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
PYTHON_SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^\.venv/bin/kvstrata ((?:.*\\\n)*.*)$", README, re.MULTILINE)
MAKE_TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+)", README)))


@pytest.mark.parametrize("snippet", PYTHON_SNIPPETS, ids=range(len(PYTHON_SNIPPETS)))
def test_python_snippets_run(snippet, small_model):
    exec(compile(snippet.replace("Qwen/Qwen3-0.6B", str(small_model)), "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_known_flags_and_valid_json(command):
    words = shlex.split(command.replace("\\\n", " "))
    known = {flag for param in _command(words[0]).params for flag in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
    for word in words:
        if word.startswith("{"):
            assert json.loads(word)


def _command(name):
    import typer.main

    return typer.main.get_command(app).commands[name]


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_make_targets_exist(target):
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_there_is_something_to_test():
    assert len(PYTHON_SNIPPETS) >= 3
    assert len(COMMANDS) >= 2
    assert {"demo", "test", "serve"} <= set(MAKE_TARGETS)
