"""SSD <-> CPU tier transfers of flexkv against fio on the same file system, in the same run; and the checksum.

    python benchmarks/bench_flexkv_ssd.py [--short] [--directory .] [--gib 2.0] [--repeat 7] [--block-bytes N]

Workload: every block of a pool to or from random slots of one preallocated file, all in one batch, checksums included,
direct I/O. The peer is the best of fio: io_uring (registered buffers and files) and libaio, sequential, direct, with 32
requests of 256 KB to 4 MB in flight. Runs take turns, in another order each time, and are compared by their medians,
since a disk is seldom ours alone: of fio's combinations, those that a first pass finds fastest run in every turn. Slots
have been written once before, as they have in any tier but a new one; that first pass is reported apart. Needs `fio` on
the PATH, else only our own figures are there. Takes twice --gib of disk for as long as it runs.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench_environment import environment
from flexkv import _native
from flexkv.common.memory_handle import SharedMemory
from flexkv.storage.ssd_files import SsdFiles

# (name, bytes of a block): 16 tokens of a model with 28 layers and 8 KV heads of 128 in bf16; and one layer of them.
SHAPES = [("1.75 MB blocks", 1835008), ("64 KB blocks", 65536)]
FIO_ENGINES = {"io_uring": ["--fixedbufs=1", "--registerfiles=1"], "libaio": []}
FIO_SIZES = ("256k", "1m", "4m")
FIO_KEPT = 2
TIMEOUT_S = 600.0


class Ours:
    """A pool, a file of as many slots, and one transfer."""

    def __init__(self, directory: Path, block_bytes: int, num_bytes: int, options: dict) -> None:
        self.num_blocks = num_bytes // block_bytes
        self.num_bytes = self.num_blocks * block_bytes
        self.files = SsdFiles([directory], self.num_blocks, block_bytes)
        self.memory = SharedMemory.create(self.num_bytes)
        self.memory.array()[:] = np.random.default_rng(0).integers(0, 256, self.num_bytes, np.uint8)
        self.transfer = _native.SsdTransfer(
            paths=[str(path) for path in self.files.paths],
            block_bytes=block_bytes,
            num_slots=self.num_blocks,
            pool=_native.PoolSide(
                base=self.memory.address, num_blocks=self.num_blocks, block_stride=block_bytes, offset=0
            ),
            options=_native.SsdOptions(**options),
        )
        rng = np.random.default_rng(1)
        self.slots, self.blocks = rng.permutation(self.num_blocks), rng.permutation(self.num_blocks)
        self.checksums = np.zeros(self.num_blocks, np.uint64)

    def write(self) -> float:
        """Return GB/s."""
        begin = time.perf_counter()
        status, self.checksums = self.transfer.write(self.slots, self.blocks, TIMEOUT_S)
        return self._speed(begin, status)

    def read(self) -> float:
        begin = time.perf_counter()
        status = self.transfer.read(self.slots, self.blocks, self.checksums, TIMEOUT_S)
        return self._speed(begin, status)

    def _speed(self, begin: float, status: np.ndarray) -> float:
        seconds = time.perf_counter() - begin
        assert not status.any(), status
        return self.num_bytes / seconds / 1e9

    def close(self) -> None:
        del self.transfer
        for path in self.files.paths:
            path.unlink()


def fio(path: Path, num_bytes: int, direction: str, engine: str, size: str) -> float:
    """Return GB/s of one pass over the file."""
    command = ["fio", "--name=peer", f"--filename={path}", f"--size={num_bytes}", f"--rw={direction}", "--direct=1"]
    command += [f"--ioengine={engine}", f"--bs={size}", "--iodepth=32", "--output-format=json", *FIO_ENGINES[engine]]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    return json.loads(answer[answer.index("{") :])["jobs"][0][direction]["bw_bytes"] / 1e9


def fastest_of_fio(path: Path, num_bytes: int) -> dict[str, Callable[[], float]]:
    """Try all combinations once, and return the fastest for each direction, by name."""
    kept = {}
    for direction in ("write", "read"):
        speeds = {
            (engine, size): fio(path, num_bytes, direction, engine, size)
            for engine, size in itertools.product(FIO_ENGINES, FIO_SIZES)
        }
        for engine, size in sorted(speeds, key=lambda key: -speeds[key])[:FIO_KEPT]:
            kept[f"fio {direction} {engine} {size}"] = lambda d=direction, e=engine, s=size: fio(
                path, num_bytes, d, e, s
            )
    return kept


def measure(shape: tuple[str, int], directory: Path, args: argparse.Namespace, options: dict) -> dict:
    name, block_bytes = shape
    ours = Ours(directory, block_bytes, int(args.gib * 2**30), options)
    first_write = ours.write()
    runs: dict[str, Callable[[], float]] = {"write": ours.write, "read": ours.read}
    if shutil.which("fio"):
        peer = directory / "fio.bin"
        # Its first pass lays the file out.
        fio(peer, ours.num_bytes // 2**22 * 2**22, "write", "libaio", "4m")
        runs |= fastest_of_fio(peer, ours.num_bytes // 2**22 * 2**22)
    speeds = defaultdict(list)
    order = random.Random(0)
    for _ in range(args.repeat):
        for run in order.sample(sorted(runs), len(runs)):
            speeds[run].append(runs[run]())
    medians = {run: statistics.median(values) for run, values in speeds.items()}
    result = {
        "shape": name,
        "block_bytes": block_bytes,
        "num_blocks": ours.num_blocks,
        "backend": ours.transfer.backend,
        "direct": ours.transfer.is_direct,
        "registered": ours.transfer.is_memory_registered,
        "fallbacks": ours.transfer.fallbacks,
        "first_write_gb_s": round(first_write, 2),
        "median_gb_s": {run: round(speed, 2) for run, speed in medians.items()},
        "best_gb_s": {run: round(max(values), 2) for run, values in speeds.items()},
    }
    for direction in ("write", "read"):
        peers = [speed for run, speed in medians.items() if run.startswith(f"fio {direction}")]
        if peers:
            result[f"{direction}_of_fio"] = round(medians[direction] / max(peers), 3)
    ours.close()
    return result


def measure_checksum(repeat: int) -> dict:
    """GB/s of one core, cold (memory) and warm (a 256 KB block in cache), beside memcpy of the same bytes."""
    data = np.random.default_rng(0).integers(0, 256, 2**28, np.uint8)
    target = np.zeros_like(data)
    warm = data[: 2**18]
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "checksum_cold": (data.size, lambda: [_native.checksum(part) for part in data.reshape(-1, 2**21)]),
        "memcpy": (data.size, lambda: ctypes.memmove(target.ctypes.data, data.ctypes.data, data.size)),
        "checksum_warm": (warm.size * 500, lambda: [_native.checksum(warm) for _ in range(500)]),
    }
    best = dict.fromkeys(runs, 0.0)
    for _ in range(repeat):
        for run, (size, function) in runs.items():
            begin = time.perf_counter()
            function()
            best[run] = max(best[run], size / (time.perf_counter() - begin) / 1e9)
    return {"isa": _native.checksum_isa(), **{f"{run}_gb_s": round(speed, 1) for run, speed in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="half a GiB, three turns")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=2.0, help="bytes moved per run")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--block-bytes", type=int, choices=[size for _, size in SHAPES], help="this shape only")
    parser.add_argument("--backend", default="auto", choices=["auto", "io_uring", "threads"])
    parser.add_argument("--queue-depth", type=int, default=128)
    parser.add_argument("--io-bytes", type=int, default=2**20)
    args = parser.parse_args()
    if args.short:
        args.gib, args.repeat = min(args.gib, 0.5), min(args.repeat, 3)
    options = {"backend": args.backend, "queue_depth": args.queue_depth, "io_bytes": args.io_bytes}
    results = []
    for shape in SHAPES:
        if args.block_bytes not in (None, shape[1]):
            continue
        with tempfile.TemporaryDirectory(dir=args.directory, prefix="bench-ssd-") as directory:
            results.append(measure(shape, Path(directory), args, options))
    document = {
        "benchmark": "flexkv_ssd",
        "environment": environment(),
        "kernel": os.uname().release,
        "options": options,
        "gib": args.gib,
        "repeat": args.repeat,
        "fio": "compared" if shutil.which("fio") else "not installed: no ratios (Debian: apt-get install fio)",
        "results": results,
        "checksum": measure_checksum(args.repeat),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
