"""The engine core as a process: real sockets, real signals, real deaths."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from tests.folovllm.core_fakes import expected_tokens
from tests.folovllm.fake_core import POISON, make_args, make_message, write_model

from folovllm.engine.core_handle import CORE_MODULE, EngineCoreHandle, start_engine_core
from folovllm.engine.messages import (
    AbortRequests,
    CallResult,
    CoreDied,
    CoreReady,
    EngineCoreOutput,
    EngineCoreOutputs,
    FromCore,
    ResetPrefixCache,
    ShutdownCore,
    ToCore,
)

FAKE = "tests.folovllm.fake_core"
SLOW = "tests.folovllm.slow_core"
DEADLINE_S = 240  # a process imports torch, which takes minutes where many share the CPUs
DEADLINE_MS = DEADLINE_S * 1000


class FrontEnd:
    """The least a front end does: bind both sockets, send, receive."""

    def __init__(self, handle: EngineCoreHandle) -> None:
        self.handle = handle
        self.context = zmq.Context()
        self.input = self.context.socket(zmq.PUSH)
        self.output = self.context.socket(zmq.PULL)
        self.input.setsockopt(zmq.LINGER, 0)
        self.input.bind(handle.input_endpoint)
        self.output.bind(handle.output_endpoint)

    def send(self, *messages: ToCore) -> None:
        for message in messages:
            self.input.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromCore:
        assert self.output.poll(DEADLINE_MS), "the core says nothing"
        message: FromCore = msgspec.msgpack.decode(self.output.recv(), type=FromCore)
        return message

    def receive_until_end_of(self, request_id: str) -> list[EngineCoreOutput]:
        outputs: list[EngineCoreOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            message = self.receive()
            assert isinstance(message, EngineCoreOutputs), message
            outputs += [output for output in message.outputs if output.request_id == request_id]
        return outputs

    def receive_result(self) -> CallResult:
        while not isinstance(message := self.receive(), CallResult):
            assert isinstance(message, EngineCoreOutputs), message
        return message

    def close(self) -> None:
        self.handle.close()
        self.input.close()
        self.output.close()
        self.context.term()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model")


@pytest.fixture
def front(model: str, request: pytest.FixtureRequest) -> Iterator[FrontEnd]:
    """With a core that schedules asynchronously where the test asks for it."""
    args = make_args(model, async_scheduling=getattr(request, "param", False))
    front = FrontEnd(start_engine_core(args, FAKE))
    yield front
    front.close()
    assert not front.handle.runtime_dir.exists()


@pytest.mark.parametrize("front", [False, True], ids=["synchronous", "asynchronous"], indirect=True)
def test_life_of_a_core(front: FrontEnd) -> None:
    assert front.receive() == CoreReady(context_len=256, pool_tokens=128)
    assert front.handle.runtime_dir.stat().st_mode & 0o777 == 0o700

    front.send(make_message("a", [1, 2, 3]), make_message("b", list(range(20))))
    outputs = front.receive_until_end_of("b")
    assert [token for output in outputs for token in output.new_token_ids] == expected_tokens(list(range(20)), 4)

    front.send(ResetPrefixCache(1))
    assert front.receive_result() == CallResult(1, True)

    # It goes on after what it cannot read, after an id in use, and after aborts of who is gone.
    front.input.send(b"\xc1 not msgpack")
    front.send(make_message("c", [5], 100), make_message("c", [5], 100), AbortRequests(["c", "unknown"]))
    front.send(make_message("d", [6], 1))
    assert len(front.receive_until_end_of("d")) == 1

    os.kill(front.handle.process.pid, signal.SIGINT)  # what a Ctrl-C sends to all of the group
    front.send(make_message("e", [6], 1))
    front.receive_until_end_of("e")

    front.send(ShutdownCore())
    assert front.handle.process.join(DEADLINE_S)
    assert front.handle.process.exitcode == 0


def test_sigterm_ends_an_idle_core_cleanly(front: FrontEnd) -> None:
    front.receive()
    front.handle.process.terminate()
    assert front.handle.process.join(DEADLINE_S)
    assert front.handle.process.exitcode == 0


def test_killed_core_is_seen_through_its_sentinel(front: FrontEnd) -> None:
    front.receive()
    assert front.handle.process.is_alive()
    front.send(make_message("a", [1], 100))
    front.receive()
    front.handle.process.kill()
    ready, _, _ = select.select([front.handle.process.sentinel], [], [], DEADLINE_S)
    assert ready
    assert front.handle.process.join(DEADLINE_S)
    assert front.handle.process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("front", [False, True], ids=["synchronous", "asynchronous"], indirect=True)
def test_failing_step_leaves_last_words(front: FrontEnd) -> None:
    front.receive()
    front.send(make_message("a", [POISON]))
    message = front.receive()
    assert message == CoreDied("RuntimeError: the model met poison")
    assert front.handle.process.join(DEADLINE_S)
    assert front.handle.process.exitcode == 1


def test_core_that_cannot_start_says_why() -> None:
    front = FrontEnd(start_engine_core(make_args("/no/such/model")))  # the real main
    try:
        message = front.receive()
        assert isinstance(message, CoreDied)
        assert message.reason.startswith("ModelLoadError: model '/no/such/model' is not a directory")
    finally:
        front.close()


PARENT = """
import sys, threading
from tests.folovllm.fake_core import make_args
from folovllm.engine.core_handle import start_engine_core
from tests.folovllm.test_core_proc import FrontEnd
handles = []
# From a thread that ends: the core must outlive it, and die with the process.
thread = threading.Thread(target=lambda: handles.append(start_engine_core(make_args(sys.argv[1]), sys.argv[2])))
thread.start()
thread.join()
front = FrontEnd(handles[0])
front.receive()
print(front.handle.process.pid, front.handle.runtime_dir, flush=True)
sys.stdin.read()
"""


def test_core_dies_with_a_front_end_that_is_killed_and_leaves_nothing(model: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-c", PARENT, model, FAKE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid, runtime_dir = parent.stdout.readline().decode().split()
        core = psutil.Process(int(pid))
        parent.kill()
    _, alive = psutil.wait_procs([core], timeout=DEADLINE_S)
    assert not alive
    assert not Path(runtime_dir).exists()


PARENT_OF_SLOW_CORE = """
import sys
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core_handle import start_engine_core
handle = start_engine_core(EngineArgs(model="any"), sys.argv[1])
print(handle.process.pid, handle.runtime_dir, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a slow core writes to; reading it waits until the core imports."""
    fifo = tmp_path / "importing"
    os.mkfifo(fifo)
    monkeypatch.setenv("IMPORTING", str(fifo))
    return fifo


def test_core_that_still_imports_dies_with_its_front_end_and_leaves_nothing(importing: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-c", PARENT_OF_SLOW_CORE, SLOW]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid, runtime_dir = parent.stdout.readline().decode().split()
        assert importing.read_text() == "importing"
        assert Path(runtime_dir).is_dir()
        core = psutil.Process(int(pid))
        parent.kill()
    _, alive = psutil.wait_procs([core], timeout=DEADLINE_S)
    assert not alive
    assert not Path(runtime_dir).exists()


def test_core_whose_front_end_died_before_it_said_anything_leaves_nothing(tmp_path: Path) -> None:
    runtime_dir = tmp_path / "runtime"
    runtime_dir.mkdir()
    command = [sys.executable, "-m", CORE_MODULE, "--input", "ipc://i", "--output", "ipc://o"]
    core = subprocess.run(
        [*command, "--runtime-dir", str(runtime_dir)],
        input=b'{"model": "a mess',
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    assert core.returncode == 1
    assert b"Traceback" not in core.stderr
    assert not runtime_dir.exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_core_that_still_imports_ends_on_sigterm_and_ignores_sigint(importing: Path, sent: signal.Signals) -> None:
    with start_engine_core(make_args("any"), SLOW) as handle:
        assert importing.read_text() == "importing"
        os.kill(handle.process.pid, sent)
        if sent == signal.SIGTERM:
            assert handle.process.join(DEADLINE_S)
            assert handle.runtime_dir.exists(), "it is the front end's, which lives"
    assert handle.process.exitcode == 0
