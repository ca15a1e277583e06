"""A device worker in a process of its own; run as a script, it obeys lines on stdin.

fill BLOCK SEED | read BLOCK | ready | quit      each answered by one line
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """Starts the script and talks to it."""

    def __init__(self, directory: Path, *, gated: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(directory), "gated" if gated else "open"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(20.0)


def main() -> None:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from tests.flexkv.device_memory import BLOCK, MODEL, fill_block, make_kv_caches, read_block

    from flexkv.server.client import KVTPClient

    kv_caches = make_kv_caches(MODEL, 16, BLOCK)
    with KVTPClient(Path(sys.argv[1]), 0, MODEL, BLOCK, gated=sys.argv[2] == "gated") as client:
        client.register(kv_caches)
        for line in sys.stdin:
            match line.split():
                case ["fill", block, seed]:
                    fill_block(kv_caches, int(block), int(seed))
                    answer = "filled"
                case ["read", block]:
                    answer = read_block(kv_caches, int(block)).hex()
                case ["ready"]:
                    answer = str(client.wait_ready(20.0))
                case _:
                    answer = "unknown"
            print(answer, flush=True)


if __name__ == "__main__":
    main()
