"""The router's index follows an engine with a store through every tier, from the events alone."""

import tempfile
from collections.abc import Iterator

import pytest

from folovllm.entrypoints.llm import LLM
from folovllm.sampling_params import SamplingParams
from kvblocks.replay import ReplayClient
from kvrouter.kvblock.in_memory import InMemoryIndex
from kvrouter.kvblock.token_processor import TokenProcessor
from kvrouter.kvevents.subscriber_manager import PodEndpoint, SubscriberManager

BLOCK = 16
PROMPT = list(range(300, 300 + 10 * BLOCK))
TIMEOUT_S = 20
WEIGHTS = {"gpu": 1.0, "cpu": 0.8}


class Fleet:
    """One engine with a CPU tier, and an index that listens to it."""

    def __init__(self, model: str, directory: str) -> None:
        self.model = model
        self.replay = f"ipc://{directory}/replay"
        events = {"endpoint": f"ipc://{directory}/events", "replay_endpoint": self.replay, "topic": "kv@pod-a@m"}
        store = {"kv_connector": "FlexKVConnectorV1", "kv_connector_extra_config": {"cpu_cache_gb": 0.02}}
        self.llm = LLM(
            model, device="cpu", num_kv_blocks=64, max_model_len=512, num_threads=1,
            kv_events_config=events, kv_transfer_config=store,
        )  # fmt: skip
        self.index = InMemoryIndex()
        self.tokens = TokenProcessor(block_size=BLOCK)
        self.subscribers = SubscriberManager(self.index, self.tokens)
        self.subscribers.start()
        self.subscribers.add(PodEndpoint("pod-a", "m", events["endpoint"], self.replay))

    def close(self) -> None:
        self.subscribers.close()
        self.llm.shutdown()

    def generate(self, prompt: list[int], cache_salt: str | None = None) -> int:
        """Serve a prompt, and have everything announced by then applied; the tokens the engine had cached."""
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        (output,) = self.llm.generate([prompt], params, cache_salt=cache_salt)
        return output.num_cached_tokens

    def score(self, prompt: list[int], cache_salt: str | None = None) -> float:
        last = ReplayClient(self.replay).replay(0).frames[-1].seq
        self.subscribers.wait_applied("pod-a", last, TIMEOUT_S)
        return self.index.score(self.tokens.keys(prompt, "m", cache_salt), weights=WEIGHTS).get("pod-a", 0.0)


@pytest.fixture
def fleet(small_model) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        running = Fleet(str(small_model), directory)
        yield running
        running.close()


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_a_prefix_is_worth_its_best_tier(fleet, salt):
    assert fleet.generate(PROMPT, salt) == 0
    fleet.generate([7] * 8)  # the save has ended and is announced with a later step
    assert fleet.score(PROMPT, salt) == pytest.approx(10 * WEIGHTS["gpu"])

    assert fleet.llm.reset_prefix_cache()
    fleet.generate([8] * 8)
    assert fleet.score(PROMPT, salt) == pytest.approx(10 * WEIGHTS["cpu"]), "only the CPU tier holds it now"
    assert fleet.score(PROMPT, "another tenant") == 0

    assert fleet.generate(PROMPT, salt) == 9 * BLOCK, "the last block is computed, the rest comes from the store"
    assert fleet.score(PROMPT, salt) == pytest.approx(10 * WEIGHTS["gpu"])


def test_a_reset_of_everything_leaves_nothing(fleet):
    fleet.generate(PROMPT)
    assert fleet.llm.reset_prefix_cache(reset_connector=True)
    fleet.generate([8] * 8)
    assert fleet.score(PROMPT) == 0
