"""A request -> the pod it goes to, and what that pod is predicted to have cached.

```
body ── token ids ── block keys ── Index.score + RecentRoutes ── PromptView ── Policy.pick ── Choice
        (once per request: `prepare`)                       (once per attempt: `choose`)
```
What cannot be tokenised or scored is routed by load alone: routing never fails a request that a pod could answer.
Belongs to the event loop's thread; only tokenisation leaves it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvrouter.config import ProxyConfig
from kvrouter.errors import KVRouterError, RequestError
from kvrouter.indexer import BlockKeys, Indexer
from kvrouter.preprocessing.chat_completions import ChatRequest
from kvrouter.proxy.metrics import ProxyMetrics
from kvrouter.proxy.pods import InFlight, Pod, PodRegistry
from kvrouter.proxy.policies import Policy, PromptView
from kvrouter.proxy.protocol import Body, CompletionBody
from kvrouter.proxy.recent_routes import RecentRoutes, Route
from kvrouter.tokenization.tokenizer import TokenArray

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Rule of thumb for the length of prompts that are not tokenised."""

_NO_KEYS: BlockKeys = np.empty(0, np.uint64)


@dataclass(slots=True, eq=False)
class PreparedPrompt:
    """What routing knows of a request, whichever pod gets it."""

    model: str
    num_tokens: int
    token_ids: TokenArray | None = None
    cache_salt: str | None = None
    keys_by_model: dict[str, tuple[BlockKeys, list[int]]] = field(default_factory=dict)
    """Index model -> block keys, as an array and as a list; made when first needed."""


@dataclass(slots=True, eq=False)
class Choice:
    """One attempt: where to, and its share in that pod's load until `failed` or `done`."""

    pod: Pod
    cached_tokens: int
    """Prompt tokens the pod is predicted to have cached."""
    num_tokens: int
    in_flight: InFlight
    route: Route | None
    recent: RecentRoutes
    policy: Policy
    view: PromptView
    has_failed: bool = False

    def first_byte(self) -> None:
        """The pod has begun to answer. Idempotent."""
        self.in_flight.first_byte()
        if self.route is not None:
            self.recent.first_byte(self.route)

    def failed(self) -> None:
        """The pod did not take the request, or died on it. Idempotent."""
        if self.has_failed:
            return
        self.has_failed = True
        self.policy.not_computed(self.view, self.pod)
        if self.route is not None:
            self.recent.failed(self.route)
        self.in_flight.done()

    def done(self) -> None:
        """The answer is complete, or the client gone. Idempotent."""
        if self.in_flight.is_prefill:
            self.failed()  # whether the prompt was computed, nobody knows
        self.in_flight.done()


class Router:
    """Chooses pods by one policy."""

    def __init__(
        self, indexer: Indexer, registry: PodRegistry, policy: Policy, config: ProxyConfig, metrics: ProxyMetrics
    ) -> None:
        """Route to the pods of `registry`; nothing is owned."""
        self._indexer = indexer
        self._registry = registry
        self._policy = policy
        self._metrics = metrics
        self._recent = RecentRoutes(config.recent_route_blocks, config.recent_route_ttl)
        self._logged: set[tuple[str, str]] = set()

    def forget(self, pod: str) -> None:
        """The pod may have lost its cache: nothing sent to it before counts."""
        self._recent.forget(pod)

    def resolve_model(self, model: str | None) -> str:
        """Return the model a request is for; without a name, the only one there is.

        Raises:
            RequestError: no pod serves it (404), it is not named (400), or no pod has been reached yet (503).
        """
        known = self._registry.models()
        if model in known:
            return str(model)
        if not known:
            raise no_healthy_pod(model)
        if model is None:
            if len(known) == 1:
                return known[0]
            raise RequestError(400, f"model is required; served are {', '.join(known)}", param="model")
        message = f"the model {model!r} does not exist; served are {', '.join(known)}"
        raise RequestError(404, message, param="model", code="model_not_found")

    async def prepare(self, body: Body, model: str, num_bytes: int) -> PreparedPrompt:
        """Tokenise a request if the policy can use it; `num_bytes` is its length."""
        source = body.first_prompt() if isinstance(body, CompletionBody) else body.chat_request()
        token_ids = _token_array(source) if isinstance(source, list) else None
        if not isinstance(source, list) and self._policy.needs_scores:
            token_ids = await self._tokenize(source, model, body.add_special_tokens)
        if token_ids is None:
            return PreparedPrompt(model, max(1, num_bytes // BYTES_PER_TOKEN))
        if not self._policy.needs_scores:
            return PreparedPrompt(model, len(token_ids))
        return PreparedPrompt(model, len(token_ids), token_ids, body.cache_salt)

    async def _tokenize(
        self, source: str | ChatRequest, model: str, add_special_tokens: bool | None
    ) -> TokenArray | None:
        if not self._indexer.has_tokenizer(model):
            self._note_unscored("no_tokenizer", model, "no tokenizer is configured for it")
            return None
        try:
            return await self._indexer.tokenize(source, model, add_special_tokens)
        except KVRouterError as error:
            self._note_unscored(type(error).__name__, model, str(error))
            return None

    def choose(self, prompt: PreparedPrompt, exclude: Iterable[str] = ()) -> Choice:
        """Choose among the pods that may be asked now, and count the request as theirs.

        Raises:
            RequestError: there is none; status 503.
        """
        pods = self._registry.candidates(prompt.model, exclude)
        if not pods:
            raise no_healthy_pod(prompt.model)
        cached_tokens, credit_tokens = self._predict(prompt, pods)
        view = PromptView(prompt.num_tokens, credit_tokens)
        pod = self._policy.pick(view, pods)
        cached = cached_tokens.get(pod.name, 0)
        keys = self._keys(prompt, pod.models[0])[1]
        route = self._recent.add(keys, pod.name) if keys else None
        in_flight = InFlight(pod, prompt.num_tokens - cached)
        self._metrics.attempts.labels(pod.name).inc()
        return Choice(pod, cached, prompt.num_tokens, in_flight, route, self._recent, self._policy, view)

    def _predict(self, prompt: PreparedPrompt, pods: Sequence[Pod]) -> tuple[dict[str, int], dict[str, float]]:
        """Return pod -> cached tokens, and pod -> the same weighted by tier."""
        cached: dict[str, int] = {}
        credit: dict[str, float] = {}
        if prompt.token_ids is None:
            return cached, credit
        block_size = self._indexer.block_size
        for model in dict.fromkeys(pod.models[0] for pod in pods):
            names = [pod.name for pod in pods if pod.models[0] == model]
            keys, key_list = self._keys(prompt, model)
            # An engine always computes the last token, so the block that holds it never counts as cached.
            usable = (prompt.num_tokens - 1) // block_size
            scores = self._indexer.score_keys(keys[:usable], names)
            blocks = self._indexer.count_cached_blocks(keys[:usable], names) if scores else {}
            extra = self._recent.extend(key_list[:usable], blocks, names)
            for name in names:
                num_blocks = blocks.get(name, 0) + extra.get(name, 0)
                if num_blocks:
                    cached[name] = num_blocks * block_size
                    credit[name] = (scores.get(name, 0.0) + extra.get(name, 0)) * block_size
        return cached, credit

    def _keys(self, prompt: PreparedPrompt, model: str) -> tuple[BlockKeys, list[int]]:
        if prompt.token_ids is None:
            return _NO_KEYS, []
        made = prompt.keys_by_model.get(model)
        if made is None:
            keys = self._indexer.block_keys(prompt.token_ids, model, prompt.cache_salt)
            made = prompt.keys_by_model[model] = (keys, keys.tolist())
        return made

    def _note_unscored(self, reason: str, model: str, why: str) -> None:
        self._metrics.unscored.labels(reason).inc()
        if (reason, model) not in self._logged and len(self._logged) < 1000:
            self._logged.add((reason, model))
            logger.warning("model=%s event=routed_by_load_alone reason=%s: %s (logged once)", model, reason, why)


def _token_array(token_ids: list[int]) -> TokenArray:
    try:
        return np.array(token_ids, np.uint32)
    except OverflowError as error:
        raise RequestError(400, "prompt: token ids are integers in 0..4294967295", param="prompt") from error


def no_healthy_pod(model: str | None) -> RequestError:
    """The error for a model that is served, but by no pod that may be asked now."""
    what = f"for model {model!r} " if model else ""
    return RequestError(
        503, f"no healthy pod {what}at the moment", kind="service_unavailable_error", code="no_healthy_pod"
    )
