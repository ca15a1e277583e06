"""TTFT of a 2,000-token prompt: cold, from the CPU tier after the device's cache was reset, and from the device.

The engine is a real server process with the demo's checkpoint; times are a client's, medians over several prompts.
"""

import asyncio
import json
import statistics
import tempfile
from pathlib import Path

import aiohttp

from bench_environment import environment
from kvstrata.random_model import make_random_model
from kvstrata.stack import Stack, StackSpec
from kvstrata.workload import TurnResult, WorkloadSpec, ask, make_conversations

NUM_PROMPTS = 5
PROMPT_WORDS = 1060  # about 2,000 tokens
MAX_TOKENS = 4
ENGINE_OPTIONS = ("--num-kv-blocks", "512", "--max-model-len", "4096")


async def measure(stack: Stack) -> dict[str, list[TurnResult]]:
    """Each prompt three times: nothing cached, only the CPU tier, the device."""
    spec = WorkloadSpec(
        num_users=NUM_PROMPTS + 1, num_turns=1, num_system_prompts=NUM_PROMPTS + 1, system_words=PROMPT_WORDS
    )
    engine = stack.engines[0].url
    results: dict[str, list[TurnResult]] = {"cold": [], "cpu_tier": [], "device": []}
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        for conversation in make_conversations(spec):
            messages = [{"role": "system", "content": conversation.system_prompt}]
            for source in results:
                if source == "cpu_tier":
                    async with session.post(f"{engine}/reset_prefix_cache"):
                        pass
                results[source].append(await ask(session, engine, stack.spec.model, messages, MAX_TOKENS))
    # The first prompt also paid for warming up.
    return {source: turns[1:] for source, turns in results.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = str(make_random_model(Path(directory)))
        spec = StackSpec(model, num_engines=1, engine_options=ENGINE_OPTIONS, cpu_cache_gb=0.5)
        with Stack(spec) as stack:
            results = asyncio.run(measure(stack))
    assert all(turn.external_cached_tokens > 0 for turn in results["cpu_tier"])
    assert len({turn.text for turns in results.values() for turn in turns}) <= NUM_PROMPTS
    ttft_ms = {source: statistics.median(turn.ttft_s * 1e3 for turn in turns) for source, turns in results.items()}
    document = {
        "benchmark": "restore_ttft",
        "environment": environment(),
        "prompt_tokens": results["cold"][0].prompt_tokens,
        "ttft_ms": ttft_ms,
        "cold_over_cpu_tier": ttft_ms["cold"] / ttft_ms["cpu_tier"],
        "cold_over_device": ttft_ms["cold"] / ttft_ms["device"],
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
