"""A process that fills an SSD tier without end, to be killed at any moment; run as a script.

Each round: forget the rows of some slots, write blocks into them, insert their rows, answer "round N" on stdout.
A block's bytes follow from its hash, so that a reader can tell whether a row names the right data.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NUM_SLOTS = 48
BATCH = 16
BLOCK_BYTES = 20000
FINGERPRINT = {"model": "writer"}


def content_of(name: bytes) -> bytes:
    return hashlib.shake_256(name).digest(BLOCK_BYTES)


def rounds(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The slots and hashes of every round of a writer."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.permutation(NUM_SLOTS)[:BATCH], rng.integers(0, 256, (BATCH, 32), np.uint8)


def start_writer(directories: list[Path], seed: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, __file__, str(seed), *map(str, directories)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def main() -> None:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from tests.flexkv.ssd_memory import TIMEOUT_S, Pool

    from flexkv.storage.ssd_rows import StoredBlocks
    from flexkv.storage.ssd_store import SsdStore

    pool = Pool(BATCH, BLOCK_BYTES)
    with SsdStore([Path(path) for path in sys.argv[2:]], NUM_SLOTS, BLOCK_BYTES, FINGERPRINT) as store:
        transfer = pool.open(store.files.paths, NUM_SLOTS)
        for round_number, (slots, hashes) in enumerate(rounds(int(sys.argv[1]))):
            store.index.delete(slots)
            for block, name in enumerate(hashes):
                pool.blocks[block] = np.frombuffer(content_of(name.tobytes()), np.uint8)
            status, checksums = transfer.write(slots, np.arange(BATCH), TIMEOUT_S)
            assert not status.any()
            none = np.zeros_like(hashes)
            store.index.insert(StoredBlocks(slots, hashes, none, checksums, np.zeros(BATCH, np.int64)))
            print(f"round {round_number}", flush=True)


if __name__ == "__main__":
    main()
