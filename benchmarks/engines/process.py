"""The handle of an engine process (engines/runner.py)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("runner.py")
DEADLINE_S = 900.0


class EngineProcess:
    """Starts an engine and measures it; a context manager.

    Attributes:
        start_s: from the start of the process until the engine is ready and has produced a first token.
    """

    def __init__(self, engine: str, python: Path, model: Path, options: dict[str, Any]) -> None:
        started = time.perf_counter()
        threads = str(options["num_threads"])
        self._process = subprocess.Popen(
            [str(python), str(RUNNER), engine, str(model), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        self._answer()
        self.generate([[7, 8, 9]], 1)
        self.start_s = time.perf_counter() - started

    def generate(self, prompts: list[list[int]], max_tokens: int | list[int]) -> dict[str, Any]:
        """Run the prompts greedily; returns {"seconds", "num_output_tokens", "first_answer"}."""
        return self._ask({"prompts": prompts, "max_tokens": max_tokens})

    def decode_tokens_per_s(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Of all requests together, without their prompts: what generating many tokens takes longer than one."""
        first = self.generate(prompts, 1)["seconds"]
        whole = self.generate(prompts, num_tokens)["seconds"]
        return len(prompts) * (num_tokens - 1) / (whole - first)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed."""
        self._ask({"reset": True})

    def resident_bytes(self) -> int:
        """Resident memory of the process and its children, with a full KV pool; what is shared counts once.

        What the pool held is lost.
        """
        self._ask({"touch": True})
        return sum(_resident(pid) for pid in _family(self._process.pid))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended early; set BENCH_VERBOSE=1 to see what it says")
        answer: dict[str, Any] = json.loads(line)
        return answer


def own_python() -> Path:
    """The interpreter with kvstrata: this one."""
    return Path(sys.executable)


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in _family(int(child)))]


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
