"""llama.cpp, built from source, in a virtual environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

DIRECTORY = Path(__file__).parents[2] / ".venv-llama"
GGUF_WRITER = Path(__file__).with_name("gguf_writer.py")


def llama_python() -> Path:
    """The interpreter that has llama-cpp-python, built for this processor on first use (minutes; needs a compiler).

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    python = DIRECTORY / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(DIRECTORY)], check=True)
    if subprocess.run([str(python), "-c", "import llama_cpp, gguf"], capture_output=True, check=False).returncode != 0:
        build = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        packages = ["llama-cpp-python", "gguf"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, env=build)
    return python


def write_gguf(python: Path, checkpoint: Path) -> Path:
    """The same weights as a GGUF file beside the checkpoint.

    Raises:
        subprocess.CalledProcessError: the checkpoint cannot be converted.
    """
    target = checkpoint / "model.gguf"
    subprocess.run([str(python), str(GGUF_WRITER), str(checkpoint), str(target)], check=True)
    return target
