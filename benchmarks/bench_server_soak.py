"""Many streaming clients at once, some of which hang up: errors, leaks and gaps between tokens.

    python benchmarks/bench_server_soak.py [--short] [--clients 500] [--seconds 60] [--disconnects 100]

Each client asks, reads the stream to its end and asks again, until the time is over. At moments spread over the run a
client hangs up in the middle of an answer. It fails (status 1) if any request failed, if blocks or file descriptors
are still held once all clients have left, or if memory grew between the second quarter of the run and the last.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import psutil

from bench_environment import environment
from kvstrata.demo_model import DEMO_MODEL
from kvstrata.stack import Stack, StackSpec

NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN = 4096, 16, 512
ENGINE_OPTIONS = (
    *("--max-num-seqs", "256", "--num-kv-blocks", str(NUM_BLOCKS)),
    *("--max-model-len", str(MAX_MODEL_LEN), "--block-size", str(BLOCK_SIZE)),
)
PROMPT_TOKENS, OUTPUT_TOKENS = (16, 128), (16, 96)
SETTLE_S = 60.0
MAX_GROWTH = 0.05
# Of event loops and log files; what leaks does so once per request or disconnect, of which there are many more.
MAX_DESCRIPTORS_LEFT = 16


@dataclass(slots=True)
class Usage:
    """What a server and its engine core hold."""

    rss_mb: float
    descriptors: int


@dataclass(slots=True)
class Soak:
    """The clients' side: what happened so far."""

    url: str
    model: str
    end: float
    disconnect_times: list[float]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    gaps: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    completed: int = 0
    disconnected: int = 0
    errors: list[str] = field(default_factory=list)

    def _hangs_up(self) -> bool:
        if self.disconnect_times and time.monotonic() >= self.disconnect_times[-1]:
            self.disconnect_times.pop()
            return True
        return False

    async def client(self, session: aiohttp.ClientSession) -> None:
        while time.monotonic() < self.end:
            prompt = [self.rng.randrange(3, 2000) for _ in range(self.rng.randint(*PROMPT_TOKENS))]
            body = {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": self.rng.randint(*OUTPUT_TOKENS),
                "temperature": 1.0,
                "ignore_eos": True,
                "stream": True,
            }
            try:
                await self._ask(session, body)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, object]) -> None:
        sent = last = time.monotonic()
        num_pieces = 0
        async with session.post(f"{self.url}/v1/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    self.completed += 1
                    return
                if "error" in json.loads(line[6:]):
                    raise ValueError(line.decode())
                now = time.monotonic()
                (self.gaps if num_pieces else self.first_token_s).append(now - last if num_pieces else now - sent)
                last = now
                num_pieces += 1
                if num_pieces == 3 and self._hangs_up():
                    self.disconnected += 1
                    response.close()
                    return
        raise ValueError("the stream ended without [DONE]")


async def touch_all_blocks(session: aiohttp.ClientSession, url: str, model: str) -> None:
    """Memory of the pool is given out at its first use, which is no leak."""
    rng = random.Random(2)
    length = MAX_MODEL_LEN - BLOCK_SIZE
    prompts = [[rng.randrange(3, 2000) for _ in range(length)] for _ in range(NUM_BLOCKS * BLOCK_SIZE // length + 1)]
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            await response.read()


def usage(pid: int) -> Usage:
    server = psutil.Process(pid)
    processes = [server, *server.children(recursive=True)]
    return Usage(sum(p.memory_info().rss for p in processes) / 1e6, sum(p.num_fds() for p in processes))


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {
        line.partition("{")[0].partition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(("vllm:num_requests", "vllm:kv_cache_usage"))
    }


async def settle(url: str) -> dict[str, float]:
    """The server's gauges once it has nothing to do, or after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        while True:
            gauges = await metrics(session, url)
            if not any(gauges.values()) or time.monotonic() > deadline:
                return gauges
            await asyncio.sleep(0.5)


async def soak(stack: Stack, clients: int, seconds: float, disconnects: int) -> tuple[Soak, list[Usage], Usage]:
    engine = stack.engines[0]
    samples = []
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SETTLE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(raise_for_status=True, timeout=timeout, connector=connector) as session:
        await touch_all_blocks(session, engine.url, stack.spec.model)
        before = usage(engine.process.pid)
        start = time.monotonic()
        rng = random.Random(1)
        times = sorted((start + rng.uniform(0.05, 0.9) * seconds for _ in range(disconnects)), reverse=True)
        run = Soak(engine.url, stack.spec.model, start + seconds, times)
        tasks = [asyncio.create_task(run.client(session)) for _ in range(clients)]
        while time.monotonic() < run.end:
            await asyncio.sleep(1.0)
            samples.append(usage(engine.process.pid))
        await asyncio.gather(*tasks)
    return run, samples, before


def problems(run: Soak, disconnects: int, growth: float, left: int, gauges: dict[str, float]) -> list[str]:
    found = [f"{len(run.errors)} requests failed, the first: {run.errors[0]}"] if run.errors else []
    if run.disconnected < disconnects:
        found.append(f"only {run.disconnected} of {disconnects} clients hung up")
    if growth > MAX_GROWTH:
        found.append(f"memory grew by {growth:.1%} between the second quarter and the last")
    if left > MAX_DESCRIPTORS_LEFT:
        found.append(f"{left} file descriptors were not closed")
    return found + [f"{name} is {value} at the end" for name, value in gauges.items() if value]


def percentiles_ms(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)) * 1e3, 1) for q in (50, 90, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--disconnects", type=int, default=100)
    parser.add_argument("--short", action="store_true", help="100 clients, 15 seconds, 20 disconnects")
    args = parser.parse_args()
    if args.short:
        args.clients, args.seconds, args.disconnects = 100, 15.0, 20
    with Stack(StackSpec(str(DEMO_MODEL), num_engines=1, engine_options=ENGINE_OPTIONS)) as stack:
        run, samples, before = asyncio.run(soak(stack, args.clients, args.seconds, args.disconnects))
        gauges = asyncio.run(settle(stack.engines[0].url))
        after = usage(stack.engines[0].process.pid)
    rss = [sample.rss_mb for sample in samples]
    quarter = max(len(rss) // 4, 1)
    growth = statistics.median(rss[-quarter:]) / statistics.median(rss[quarter : 2 * quarter]) - 1
    left = after.descriptors - before.descriptors
    found = problems(run, args.disconnects, growth, left, gauges)
    document = {
        "benchmark": "server_soak",
        "environment": environment("kvstrata", "torch", "aiohttp"),
        "clients": args.clients,
        "seconds": args.seconds,
        "completed": run.completed,
        "disconnected": run.disconnected,
        "failed": len(run.errors),
        "tokens_per_s": round((len(run.gaps) + len(run.first_token_s)) / args.seconds),
        "ttft_ms": percentiles_ms(run.first_token_s),
        "inter_token_ms": percentiles_ms(run.gaps),
        "rss_mb": {"before": round(before.rss_mb), "most": round(max(rss)), "growth": round(growth, 4)},
        "descriptors": {
            "before": before.descriptors,
            "most": max(s.descriptors for s in samples),
            "after": after.descriptors,
        },
        "gauges_at_the_end": gauges,
        "problems": found,
    }
    print(json.dumps(document, indent=2))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
