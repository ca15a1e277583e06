"""Conversations made from facts: how the demo model learns to answer, to end its turn, and to call a tool."""

import builtins
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from demo_corpus import Corpus, Fact

Message = dict[str, Any]
QUESTIONS = (
    "What does {} do?",
    "What is {}?",
    "Explain {}.",
    "Tell me about {}.",
    "How do I use {}?",
    "Describe {} briefly.",
    "What is {} for?",
    "Please explain {} to me.",
    "help({})",
    "{}",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "Answer briefly.",
    "You are strata-tiny, a small model that knows the documentation of Python.",
    "You are a helpful assistant. Be brief.",
)
PROJECT_FACTS = tuple(
    Fact(name, "", text)
    for name, text in {
        "kvstrata": "kvstrata is an LLM serving stack built around the KV cache: an engine, a tiered KV store and a "
        "KV-aware router.",
        "flexkv": "flexkv keeps the KV cache of an inference engine beyond its device memory and returns it faster "
        "than the engine could recompute it.",
        "kvrouter": "kvrouter knows, from the engines' KV events, which blocks every engine of a fleet holds, and "
        "sends each request to where its prefix is cached.",
        "folovllm": "folovllm is a compact inference engine, aligned module by module with vLLM v1: continuous "
        "batching, paged KV cache, chunked prefill, prefix reuse and an OpenAI server.",
        "kvblocks": "kvblocks names KV blocks by a chained hash of their tokens and carries the events that say which "
        "engine holds which block.",
        "the KV cache": "The KV cache holds the keys and values that attention computed for the tokens so far, so "
        "that each new token needs only its own.",
        "a prefix cache": "A prefix cache keeps the KV blocks of earlier prompts, so that a prompt that begins the "
        "same way does not compute them again.",
        "prefill": "Prefill is the first step of a request: the keys and values of all prompt tokens are computed at "
        "once.",
        "decode": "Decode produces the answer one token at a time, each step reading the whole KV cache of the "
        "request.",
        "TTFT": "TTFT is the time to first token: how long a user waits from sending a request to reading the first "
        "word.",
    }.items()
)
SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi there!", "Good morning."), "Hello! Ask me about a function or a module of Python."),
    (("Are you there?", "Can you hear me?", "Is anybody there?"), "Yes, I am here. What would you like to know?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am strata-tiny, a very small language model trained on the documentation of Python. I come with kvstrata.",
    ),
    (("Thanks", "Thank you.", "Thank you very much!", "Great, thanks!"), "You are welcome."),
    (("Goodbye", "Bye!", "See you."), "Goodbye!"),
    (
        ("What can you do?", "Help me.", "What do you know?"),
        "I can say what functions, classes and statements of Python do. Try: What does str.split do?",
    ),
    (
        ("What is the capital of France?", "Write a poem.", "How is the weather?", "What is the meaning of life?"),
        "I know only the documentation of Python. Ask me about one of its functions or modules.",
    ),
)
CITIES = "Paris Berlin Tokyo London Madrid Rome Oslo Vienna Lisbon Prague Dublin Athens Cairo Lima Seoul Delhi".split()  # noqa: SIM905
WORDS = "list dict generator iterator decorator module package thread socket closure tuple slice coroutine".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call, and how people ask for it."""

    name: str
    description: str
    argument: str
    values: tuple[str | int, ...]
    questions: tuple[str, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """As the OpenAI API has it."""
        kind = "integer" if isinstance(self.values[0], int) else "string"
        parameters = {"type": "object", "properties": {self.argument: {"type": kind}}, "required": [self.argument]}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        "get_weather", "The weather in a city.", "city", tuple(CITIES), ("What is the weather in {}?", "Weather in {}")
    ),
    Tool(
        "get_time", "The local time of a city.", "city", tuple(CITIES), ("What time is it in {}?", "Time in {}, please")
    ),
    Tool("search_docs", "Search the documentation.", "query", tuple(WORDS), ("Search for {}.", "Find pages about {}.")),
    Tool("set_timer", "Set a timer.", "seconds", tuple(range(5, 95, 5)), ("Set a timer for {} seconds.",)),
    Tool("square_root", "The square root of a number.", "x", tuple(range(1, 100)), ("What is the root of {}?",)),
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with the assistant's turn."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def dialogues(corpus: Corpus, rng: random.Random, max_chars: int) -> Iterator[Dialogue]:
    """One epoch: every fact, in conversations of one to several turns of at most about `max_chars` characters.

    What people ask most, Python's built-in names and this project, comes several times.
    """
    built_in = [fact for fact in corpus.facts if hasattr(builtins, fact.name.partition(".")[0])]
    facts = [*corpus.facts, *built_in * 2, *PROJECT_FACTS * 8]
    rng.shuffle(facts)
    while facts:
        if rng.random() < 0.06:
            yield _tool_dialogue(rng)
        messages = _system(corpus.training, rng, max_chars // 3)
        budget = rng.choice((0, 0, max_chars // 4, max_chars // 2, max_chars)) - _size(messages)
        while True:
            messages += (
                _small_talk(rng) if rng.random() < 0.08 else _exchange(facts.pop(), corpus.training, rng, budget)
            )
            if not facts or _size(messages) >= budget:
                break
        yield Dialogue(messages)


def _exchange(fact: Fact, documents: Sequence[str], rng: random.Random, budget: int) -> list[Message]:
    name = fact.name
    if name.startswith("The "):
        name = name[0].lower() + name[1:]
    if rng.random() < 0.3:
        name = name.replace("`", "") if "`" in name else f"`{name}`"
    question = rng.choice(QUESTIONS).format(name)
    if rng.random() < 0.2 and budget > 600:
        question = f"{passage(documents, rng, rng.randint(100, budget // 3))}\n\n{question}"
    is_code = " " not in fact.name and fact.name.isascii() and fact not in PROJECT_FACTS
    answer = f"`{fact.name}{fact.signature}`: {fact.text}" if is_code else fact.text
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _small_talk(rng: random.Random) -> list[Message]:
    questions, answer = rng.choice(SMALL_TALK)
    return [{"role": "user", "content": rng.choice(questions)}, {"role": "assistant", "content": answer}]


def _system(documents: Sequence[str], rng: random.Random, max_chars: int) -> list[Message]:
    kind = rng.random()
    if kind < 0.6:
        return []
    text = rng.choice(SYSTEM_PROMPTS) if kind < 0.85 else passage(documents, rng, rng.randint(100, max_chars))
    return [{"role": "system", "content": text}]


def passage(documents: Sequence[str], rng: random.Random, num_chars: int) -> str:
    """A piece of one of the documents, from a word on."""
    document = rng.choice(documents)
    start = rng.randrange(max(1, len(document) - num_chars))
    return document[start : start + num_chars].partition(" ")[2].strip()


def _tool_dialogue(rng: random.Random) -> Dialogue:
    offered = rng.sample(TOOLS, rng.randint(1, 2))
    tool = rng.choice(offered)
    value = rng.choice(tool.values)
    call = {"name": tool.name, "arguments": {tool.argument: value}}
    messages: list[Message] = [
        {"role": "user", "content": rng.choice(tool.questions).format(value)},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    if rng.random() < 0.5:
        result = f"{rng.randint(1, 30)}"
        messages.append({"role": "tool", "content": json.dumps({"result": result})})
        messages.append({"role": "assistant", "content": f"The result is {result}."})
    return Dialogue(messages, [tool.schema for tool in offered])


def _size(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)
