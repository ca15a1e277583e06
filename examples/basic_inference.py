"""Complete a few prompts with a model in this process.

python examples/basic_inference.py [--model DIRECTORY_OR_HUB_ID]
"""

import argparse

from checkpoint import demo_checkpoint

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams

PROMPTS = ["The str.split method returns", "A dictionary maps", "To open a file,"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: a small one with random weights")
    arguments = parser.parse_args()
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=40)
    with LLM(arguments.model or demo_checkpoint()) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
