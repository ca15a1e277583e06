"""What the router's tests share: a small checkpoint's tokenizer, and a running proxy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvrouter.config import PodConfig, ProxyConfig, RouterConfig
from kvrouter.indexer import Indexer
from kvrouter.preprocessing.chat_completions import ModelTokenizer
from kvrouter.proxy.serve import ProxyServer, open_listener

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer that puts a BOS before every text, and a chat template."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cache of a block is a block of the cache, and its prefix"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def model_tokenizer(checkpoint: Path) -> ModelTokenizer:
    return ModelTokenizer.load(str(checkpoint))


@dataclass
class RunningProxy:
    """A proxy in this process, and a client of it."""

    server: ProxyServer
    client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"


StartProxy = Callable[..., AbstractAsyncContextManager[RunningProxy]]


@pytest.fixture
def start_proxy() -> StartProxy:
    """Return a function: pods, options of `ProxyConfig`, tokenizers -> a running proxy."""

    @contextlib.asynccontextmanager
    async def start(
        *pods: PodConfig, tokenizers: Mapping[str, ModelTokenizer] | None = None, **options: object
    ) -> AsyncIterator[RunningProxy]:
        # Health checks far apart: tests decide when a pod's state changes.
        defaults = {"health_interval": 600.0, "connect_timeout": 5.0}
        proxy = replace(ProxyConfig(), **(defaults | options))  # type: ignore[arg-type]
        config = RouterConfig(proxy_config=proxy, pods=pods)
        with open_listener("127.0.0.1", 0) as listener, Indexer(config, tokenizers=tokenizers) as indexer:
            async with ProxyServer(config, listener, indexer) as server, aiohttp.ClientSession() as client:
                yield RunningProxy(server, client)

    return start
