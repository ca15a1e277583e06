"""Complete a few prompts with a model in this process.

python examples/basic_inference.py [--model DIRECTORY_OR_HUB_ID]
"""

import argparse

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams
from kvstrata.demo_model import DEMO_MODEL

PROMPTS = ["The str.split method returns", "A dictionary maps", "To open a file,"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="default: the small one of this package")
    arguments = parser.parse_args()
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=40)
    with LLM(arguments.model) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
