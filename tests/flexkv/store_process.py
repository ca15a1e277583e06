"""A store in a process of its own; run as a script, it puts and gets device blocks as lines on stdin say.

ready | put BLOCK | get BLOCK | match      each answered by one line
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEY = "engine"


class StoreProcess:
    """Starts the script and talks to it."""

    def __init__(self, runtime_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(runtime_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def receive(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.send(line)
        return self.receive()

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
    from tests.flexkv.device_memory import BLOCK, MODEL, slots_of

    from flexkv.common.config import CacheConfig, CpuTierConfig
    from flexkv.kvmanager import KVManager

    tokens = list(range(BLOCK))
    cache = CacheConfig(CpuTierConfig(num_blocks=8), BLOCK)
    with KVManager(MODEL, cache, runtime_dir=Path(sys.argv[1]), store_key=KEY) as store:
        for line in sys.stdin:
            match line.split():
                case ["ready"]:
                    answer = str(store.wait_ready(20.0))
                case ["put", block]:
                    task = store.put_async(tokens, slots_of([int(block)]))
                    print(task, flush=True)
                    answer = store.wait([task])[task].status.value
                case ["get", block]:
                    task = store.get_async(tokens, slots_of([int(block)]))
                    print(task, flush=True)
                    answer = store.wait([task])[task].status.value
                case _:
                    answer = "unknown"
            print(answer, flush=True)


if __name__ == "__main__":
    main()
