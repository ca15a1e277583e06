"""What the engine can do beyond completing text: prefix cache, structured output, priorities, log-probabilities.

    python examples/advanced_usage.py [--model DIRECTORY_OR_HUB_ID]

A quantised checkpoint is used like any other: make one with `kvstrata quantize`, and give it as --model.
"""

import argparse
import json

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams, StructuredOutputsParams
from kvstrata.demo_model import DEMO_MODEL

DOCUMENT = "A list is a mutable sequence. A tuple is an immutable sequence. A set holds each element once. " * 8
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def prefix_cache(llm: LLM) -> None:
    """The second question about a document does not compute the document again."""
    params = SamplingParams(temperature=0.0, max_tokens=8)
    for question in ("What is a list?", "What is a set?"):
        (output,) = llm.generate(f"{DOCUMENT}\n{question}", params)
        print(f"{question} {output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached")
    stats = llm.get_cache_stats()
    print(f"hit rate {stats.hit_rate:.0%}, {stats.cached_blocks} blocks cached")


def structured_output(llm: LLM) -> None:
    """Whatever the model would like to say, the text is valid for the schema."""
    person = StructuredOutputsParams(json=PERSON, disable_any_whitespace=True)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=120, structured_outputs=person)
    (output,) = llm.generate("Somebody as JSON:", params)
    print("structured:", json.loads(output.outputs[0].text))
    choice = SamplingParams(temperature=0.0, structured_outputs=StructuredOutputsParams(choice=("yes", "no")))
    (output,) = llm.generate("Is a tuple mutable?", choice)
    print("choice:", output.outputs[0].text)


def priorities(llm: LLM) -> None:
    """Lower numbers go first, whatever the order of arrival."""
    prompts = [f"Request {i}:" for i in range(4)]
    order = []
    for state in llm.generate_stream(prompts, SamplingParams(max_tokens=4, seed=0), priority=[3, 2, 1, 0]):
        if state.finished:
            order.append(prompts.index(state.prompt or ""))
    print("finished in the order", order)


def log_probabilities(llm: LLM) -> None:
    """How likely each token was, and what else might have come."""
    (output,) = llm.generate("A tuple is", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))
    for position in output.outputs[0].logprobs or []:
        print("  ".join(f"{entry.decoded_token!r} {entry.logprob:.2f}" for entry in position.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="default: the small one of this package")
    arguments = parser.parse_args()
    with LLM(arguments.model, scheduling_policy="priority", max_num_seqs=1) as llm:
        for show in (prefix_cache, structured_output, priorities, log_probabilities):
            print(f"-- {(show.__doc__ or '').strip()}")
            show(llm)


if __name__ == "__main__":
    main()
