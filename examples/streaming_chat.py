"""Chat with a model in this process; the answer appears as it is generated.

    python examples/streaming_chat.py [--model DIRECTORY_OR_HUB_ID]

Each turn sends the whole conversation again, and the prefix cache makes the part the model knows free. End with an
empty line.
"""

import argparse
import asyncio
import sys

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.sampling_params import SamplingParams
from kvstrata.demo_model import DEMO_MODEL

PARAMS = SamplingParams(temperature=0.3, seed=1, max_tokens=80)


async def answer(engine: AsyncLLM, messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes; returns all of it."""
    prompt = engine.processor.tokenize(engine.processor.render_chat(messages), add_special_tokens=False)
    shown = ""
    async for state in engine.generate(prompt, PARAMS):
        text = state.outputs[0].text
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(f"   [{state.num_cached_tokens} of {len(prompt)} prompt tokens cached]")
    return shown


async def chat(model: str) -> None:
    engine = await AsyncLLM.from_engine_args(EngineArgs(model=model))
    messages: list[dict[str, str]] = []
    try:
        while True:
            print("you: ", end="", flush=True)
            line = (await asyncio.to_thread(sys.stdin.readline)).strip()
            if not line:
                return
            messages.append({"role": "user", "content": line})
            print("model: ", end="", flush=True)
            messages.append({"role": "assistant", "content": await answer(engine, messages)})
    finally:
        await engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="default: the small one of this package")
    asyncio.run(chat(parser.parse_args().model))


if __name__ == "__main__":
    main()
