"""One worker per rank: rank 0 in the engine core's process, the others in their own.

Mirrors vllm/v1/executor/multiproc_executor.py. Every rank runs every step; what rank 0 samples is the result, and the
others sample the same (engine/worker_proc.py). A rank that dies makes the operation fail that the others wait in.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec
import zmq

from folovllm.config import EngineConfig
from folovllm.core.sched.output import ModelRunnerOutput, SchedulerOutput
from folovllm.errors import EngineDeadError
from folovllm.executor.abstract import Executor
from folovllm.executor.process_group import join
from folovllm.executor.rank_report import RankReport
from folovllm.executor.step_thread import StepThread
from folovllm.executor.worker_factory import create_worker
from folovllm.worker.worker_base import WorkerBase

WORKER_MODULE = "folovllm.engine.worker_proc"
_LOAD_TIMEOUT_S = 600.0
_POLL_MS = 200
_EXIT_TIMEOUT_S = 10.0
_STEPS_HWM = 16
"""Steps that may be on their way to a rank; there are never more than two."""


class RankProcess:
    """A rank above 0: its process, and the socket its steps go to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path, rank: int, options: bytes) -> None:
        endpoint = f"ipc://{directory}/steps-{rank}"
        self.rank = rank
        self.steps = context.socket(zmq.PUSH)
        self.steps.setsockopt(zmq.LINGER, 0)
        self.steps.set_hwm(_STEPS_HWM)
        self.steps.bind(endpoint)
        command = [sys.executable, "-m", WORKER_MODULE, "--rank", str(rank), "--steps", endpoint]
        command += ["--rendezvous", str(directory / "rendezvous"), "--reports", f"ipc://{directory}/reports"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; `has_ended` tells
            self.process.stdin.write(options + b"\n")
            self.process.stdin.flush()

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def close(self) -> None:
        """Let it leave, by force if it does not."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        for insist in (self.process.terminate, self.process.kill):
            try:
                self.process.wait(_EXIT_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:
                insist()
        self.process.wait()
        self.steps.close()


class MultiprocExecutor(Executor):
    """Tensor parallel on one machine."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the other ranks, load rank 0's share meanwhile, and wait for all.

        Raises:
            ModelLoadError: the checkpoint is unusable.
            EngineDeadError: another rank could not start.
        """
        size = config.parallel_config.tensor_parallel_size
        with contextlib.ExitStack() as built:
            directory = Path(tempfile.mkdtemp(prefix="folovllm-ranks-"))
            built.callback(shutil.rmtree, directory, ignore_errors=True)
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            built.callback(self._context.term)
            reports = built.enter_context(self._context.socket(zmq.PULL))
            reports.bind(f"ipc://{directory}/reports")
            self._ranks: list[RankProcess] = []
            for rank in range(1, size):
                self._ranks.append(RankProcess(self._context, directory, rank, msgspec.json.encode(config.options)))
                built.callback(self._ranks[-1].close)
            self._thread = built.enter_context(StepThread(config.scheduler_config.async_scheduling))
            self.worker = self._thread.call(lambda: self._load(config, directory, built)).result()
            self._wait_for_ranks(reports)
            self.config = self.worker.config
            self._encoder = msgspec.msgpack.Encoder()
            self._resources = built.pop_all()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Future[ModelRunnerOutput]:
        """Send the step to the other ranks, and run it here.

        Raises:
            EngineDeadError: a rank has died.
        """
        payload = self._encoder.encode(scheduler_output)
        for rank in self._ranks:
            if rank.has_ended:
                raise EngineDeadError(f"rank {rank.rank} ended with exit code {rank.process.returncode}")
            rank.steps.send(payload)
        return self._thread.call(lambda: self.worker.execute_model(scheduler_output))

    def shutdown(self) -> None:
        """Let the steps that were given end, then release all ranks; idempotent."""
        self._resources.close()

    def _load(self, config: EngineConfig, directory: Path, built: contextlib.ExitStack) -> WorkerBase:
        size = config.parallel_config.tensor_parallel_size
        parallel, group = join(directory / "rendezvous", 0, size, config.device)
        built.callback(self._in_thread, group.close)
        worker = create_worker(config, parallel)
        built.callback(self._in_thread, worker.shutdown)
        return worker

    def _in_thread(self, function: Callable[[], None]) -> None:
        self._thread.call(function).result()

    def _wait_for_ranks(self, reports: zmq.Socket[bytes]) -> None:
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        waiting = {rank.rank: rank for rank in self._ranks}
        while waiting:
            if reports.poll(_POLL_MS):
                report = msgspec.msgpack.decode(reports.recv(), type=RankReport)
                if report.error is not None:
                    raise EngineDeadError(f"rank {report.rank} could not start: {report.error}")
                del waiting[report.rank]
                continue
            for rank in waiting.values():
                if rank.has_ended:
                    raise EngineDeadError(f"rank {rank.rank} ended at its start, exit code {rank.process.returncode}")
            if time.monotonic() > deadline:
                raise EngineDeadError(f"ranks {sorted(waiting)} are not ready after {_LOAD_TIMEOUT_S:.0f} s")
