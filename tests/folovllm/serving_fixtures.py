"""A real byte-level tokenizer, and a core without a model that speaks the engine's messages."""

import json
import multiprocessing
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import msgspec
import tokenizers
import zmq
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.messages import (
    AbortRequests,
    CallResult,
    CoreDied,
    CoreReady,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
    LogprobsLists,
    ResetPrefixCache,
    SchedulerStats,
    ShutdownCore,
    ToCore,
)
from folovllm.entrypoints.openai.middleware import RequestGate
from folovllm.entrypoints.openai.routes import build_app
from folovllm.entrypoints.openai.serving import OpenAIServing
from folovllm.metrics.stats import EngineMetrics
from folovllm.transformers_utils.tokenizer import Tokenizer

PARAGRAPH = """A block holds the keys and values of a few tokens. When two prompts begin alike, their first blocks are
the same, and the second prompt need not compute them again: it finds them by the hash of its tokens. The cache is full
when no block is free; then the oldest one goes. Größe, naïve, façade. 東京は日本の首都です。 Москва. 🎉🎊"""
EOS = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
POOL_TOKENS = 1024
MAX_MODEL_LEN = 512
UNLUCKY = [13, 13, 13]


@cache
def make_backend(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, trained on a paragraph."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PARAGRAPH], trainer)
    return backend


def write_tokenizer(directory: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """tokenizer.json, tokenizer_config.json with a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    make_backend().save(str(directory / "tokenizer.json"))
    config = {"eos_token": EOS, "pad_token": {"content": SPECIAL_TOKENS[0]}, "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_front_end_files(directory: Path, chat_template: str = CHAT_TEMPLATE) -> Path:
    """What a front end reads of a checkpoint: everything but weights."""
    write_tokenizer(directory, chat_template)
    tokenizer = Tokenizer.from_checkpoint(directory)
    config = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@dataclass
class FakeCore:
    """An engine core whose model repeats the prompt for ever: token i of the output is token i of the prompt, cyclic.

    It takes at most `max_num_seqs` requests at once, one token each per step; a prompt seen before counts as cached.
    Every token has the log-probability -id / 1000, and rank 3 behind the tokens 20 and 21. The prompt UNLUCKY is given
    up.
    """

    max_num_seqs: int = 8
    running: dict[str, tuple[EngineCoreRequest, int]] = field(default_factory=dict)
    waiting: deque[EngineCoreRequest] = field(default_factory=deque)
    aborted: list[str] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    queries: int = 0
    hits: int = 0
    is_shut_down: bool = False

    def add_request(self, request: EngineCoreRequest) -> None:
        self.waiting.append(request)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            self.running.pop(request_id, None)
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def step(self) -> EngineCoreOutputs:
        cached = {}
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting.popleft()
            prompt = tuple(request.prompt_token_ids)
            cached[request.request_id] = len(prompt) - 1 if prompt in self.seen else 0
            self.queries += len(prompt)
            self.hits += cached[request.request_id]
            self.seen.add(prompt)
            self.running[request.request_id] = (request, 0)
        outputs = [self._advance(*entry, cached) for entry in list(self.running.values())]
        stats = SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            prefix_cache_queries=self.queries,
            prefix_cache_hits=self.hits,
            num_cached_blocks=len(self.seen),
        )
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)

    def _advance(self, request: EngineCoreRequest, done: int, cached: dict[str, int]) -> EngineCoreOutput:
        params, prompt = request.sampling_params, request.prompt_token_ids
        token = prompt[done % len(prompt)]
        reason: FinishReason | None = None
        if prompt == UNLUCKY:
            reason = "error"
        elif token in request.eos_token_ids and not params.ignore_eos:
            reason = "stop"
        elif done + 1 == params.max_tokens:
            reason = "length"
        self.running[request.request_id] = (request, done + 1)
        if reason is not None:
            del self.running[request.request_id]
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[token],
            finish_reason=reason,
            num_cached_tokens=cached.get(request.request_id, 0),
            new_logprobs=make_logprobs([token], params.logprobs),
            new_prompt_logprobs=make_logprobs(prompt[1:], params.prompt_logprobs) if done == 0 else None,
        )

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        if self.has_work:
            return False
        self.seen.clear()
        return True

    def shutdown(self) -> None:
        self.is_shut_down = True


def make_logprobs(tokens: list[int], num_top: int | None) -> LogprobsLists | None:
    """What a FakeCore says of tokens; nothing when it was not asked."""
    if num_top is None:
        return None
    top = [20, 21][:num_top]
    return LogprobsLists(
        [[token, *top] for token in tokens],
        [[-token / 1000, *[-i / 10000 for i in top]] for token in tokens],
        [3 for _ in tokens],
    )


@dataclass
class FakeHandle:
    """A started fake core process."""

    process: BaseProcess
    input_endpoint: str
    output_endpoint: str
    directory: tempfile.TemporaryDirectory[str]

    def close(self) -> None:
        self.process.join(60)
        self.directory.cleanup()


@asynccontextmanager
async def fake_server(directory: Path, model: str = "demo") -> AsyncIterator[httpx.AsyncClient]:
    """A client of the HTTP application over a FakeCore, whose front end reads `directory`."""
    engine = AsyncLLM(start_fake_core(), EngineMetrics(model))  # type: ignore[arg-type]
    try:
        await engine.start(directory, False, 60)
        app = RequestGate(build_app(OpenAIServing(engine, model), str(directory)), None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            yield client
    finally:
        await engine.shutdown()


def start_fake_core(death: str | None = None, step_ms: int = 1) -> FakeHandle:
    """A process that runs a FakeCore: dies of `death` instead of loading; a step takes `step_ms`."""
    directory = tempfile.TemporaryDirectory(prefix="fake-core-")
    endpoints = [f"ipc://{directory.name}/{name}" for name in ("input", "output")]
    process = multiprocessing.get_context("spawn").Process(target=run_fake_core, args=(*endpoints, death, step_ms))
    process.start()
    return FakeHandle(process, endpoints[0], endpoints[1], directory)


def run_fake_core(input_endpoint: str, output_endpoint: str, death: str | None, step_ms: int) -> None:
    """Entry point of the fake core's process."""
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(input_endpoint)
    outbox.connect(output_endpoint)
    encode, decoder = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(ToCore)
    if death is not None:
        outbox.send(encode(CoreDied(death)))
    else:
        outbox.send(encode(CoreReady(context_len=MAX_MODEL_LEN, pool_tokens=POOL_TOKENS)))
        core = FakeCore()
        while not core.is_shut_down:
            if inbox.poll(step_ms if core.has_work else None):
                _obey(core, decoder.decode(inbox.recv()), outbox)
            if core.has_work:
                outbox.send(encode(core.step()))
    for socket in (inbox, outbox):
        socket.close(linger=1000)
    context.term()


def _obey(core: FakeCore, message: ToCore, outbox: zmq.Socket[bytes]) -> None:
    match message:
        case EngineCoreRequest():
            core.add_request(message)
        case AbortRequests():
            core.abort_requests(message.request_ids)
        case ResetPrefixCache():
            ok = core.reset_prefix_cache(message.reset_connector)
            outbox.send(msgspec.msgpack.encode(CallResult(message.call_id, ok)))
        case ShutdownCore():
            core.shutdown()
