"""Asks every pod how it is: GET /health at an interval, and at once when a request met trouble with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import aiohttp
import msgspec

from kvrouter.config import ProxyConfig
from kvrouter.proxy.pods import Pod, PodRegistry, PodState

logger = logging.getLogger(__name__)


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model] = []


_MODEL_LIST = msgspec.json.Decoder(_ModelList)


class HealthMonitor:
    """One task per pod, on the event loop's thread."""

    def __init__(self, registry: PodRegistry, session: aiohttp.ClientSession, config: ProxyConfig) -> None:
        """Watch the pods of `registry`; `session` stays the caller's."""
        self._registry = registry
        self._session = session
        self._interval_s = config.health_interval
        self._timeout = aiohttp.ClientTimeout(total=config.health_timeout)
        self._wake = {pod.name: asyncio.Event() for pod in registry.pods}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every pod once, then go on in the background."""
        if self._tasks:
            return
        await asyncio.gather(*(self._check(pod) for pod in self._registry.pods))
        self._tasks = [asyncio.create_task(self._watch(pod), name=f"health {pod.name}") for pod in self._registry.pods]

    async def close(self) -> None:
        """End the background checks. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def suspect(self, pod: Pod) -> None:
        """A request met trouble with `pod`: check it now."""
        self._wake[pod.name].set()

    async def _watch(self, pod: Pod) -> None:
        wake = self._wake[pod.name]
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await wake.wait()
            wake.clear()
            try:
                await self._check(pod)
            except Exception:  # the task's boundary: without it nobody would ask this pod again
                logger.exception("pod=%s event=health_check_failed", pod.name)
                self._registry.health_late(pod)

    async def _check(self, pod: Pod) -> None:
        registry = self._registry
        try:
            async with self._session.get(f"{pod.url}/health", timeout=self._timeout) as response:
                is_ok = response.status == 200
            if not is_ok:
                registry.health_late(pod)
                return
            models = None
            if pod.config.model is None and (pod.state is not PodState.UP or not pod.models):
                models = await self._ask_models(pod)
                if not models:
                    registry.health_late(pod)
                    return
        except TimeoutError:
            registry.health_late(pod)
        except (aiohttp.ClientError, OSError):
            registry.unreachable(pod)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("pod=%s event=bad_model_list error=%s", pod.name, error)
            registry.health_late(pod)
        else:
            registry.health_ok(pod, models)

    async def _ask_models(self, pod: Pod) -> Sequence[str]:
        async with self._session.get(f"{pod.url}/v1/models", timeout=self._timeout) as response:
            if response.status != 200:
                return ()
            return [model.id for model in _MODEL_LIST.decode(await response.read()).data]
