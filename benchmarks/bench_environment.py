"""The machine and the versions a benchmark ran with, for the head of its JSON document."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def environment(*packages: str) -> dict[str, object]:
    """Processor, cores, Python and the versions of `packages` (by default those every figure depends on)."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages or ("kvstrata", "numpy", "torch")},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
