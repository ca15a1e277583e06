"""Many requests at once, of different lengths and options: continuous batching keeps every step full.

python examples/batch_inference.py [--model DIRECTORY_OR_HUB_ID] [--num-requests 32]
"""

import argparse
import time

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams
from kvstrata.demo_model import DEMO_MODEL

TOPICS = ["lists", "dictionaries", "sets", "files", "threads", "sockets", "regular expressions", "decorators"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="default: the small one of this package")
    parser.add_argument("--num-requests", type=int, default=32)
    arguments = parser.parse_args()
    count = arguments.num_requests
    prompts = [f"In Python, {TOPICS[i % len(TOPICS)]} are" for i in range(count)]
    # Each request may have options of its own; a seeded one gives the same text alone or in any batch.
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=8 + 4 * (i % 8)) for i in range(count)]
    with LLM(arguments.model, max_num_seqs=16, max_num_batched_tokens=256) as llm:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        taken = time.perf_counter() - started
    for output in outputs[: len(TOPICS)]:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{count} requests, {num_tokens} tokens, {num_tokens / taken:.0f} tokens/s")


if __name__ == "__main__":
    main()
