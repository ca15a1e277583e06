"""A rank above 0 as a process of its own. The counterpart of vLLM's WorkerProc.

    rank 0 (multiproc_executor)                     this process
    PUSH steps    -- SchedulerOutput, msgpack ----> PULL   runs the step; rank 0 alone reports what it sampled
    PULL reports  <- RankReport, msgpack ---------- PUSH   once, when the model is loaded or cannot be
    stdin pipe    -- end of file ------------------>       rank 0 is gone or done: leave

All ranks get the same steps and seeds and see the same logits, so they sample the same tokens.
"""

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import zmq

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.arg_utils import EngineArgs
from folovllm.executor.rank_report import RankReport
from folovllm.executor.worker_factory import create_worker

logger = logging.getLogger(__name__)

_LINGER_MS = 2000


def serve(context: zmq.Context[zmq.Socket[bytes]], options: argparse.Namespace) -> int:
    """Load, report, and run steps until rank 0 leaves; returns the exit code."""
    # Imported late: it takes seconds, and an error in it is to be reported too.
    from folovllm.executor.process_group import join

    with context.socket(zmq.PUSH) as reports, context.socket(zmq.PULL) as steps, contextlib.ExitStack() as opened:
        reports.setsockopt(zmq.LINGER, _LINGER_MS)
        reports.connect(options.reports)
        steps.connect(options.steps)
        try:
            config = EngineArgs.from_options(msgspec.json.decode(_read_line())).resolve(options.rank)
            parallel, group = join(
                Path(options.rendezvous), options.rank, config.parallel_config.tensor_parallel_size, config.device
            )
            opened.callback(group.close)
            worker = create_worker(config, parallel)
            opened.callback(worker.shutdown)
        except Exception as error:  # the process's boundary: rank 0 reports it
            logger.exception("rank %d cannot start", options.rank)
            reports.send(msgspec.msgpack.encode(RankReport(options.rank, f"{type(error).__name__}: {error}")))
            return 1
        gc.freeze()  # the model and all imports stay: a collection in the middle of a step need not look at them
        reports.send(msgspec.msgpack.encode(RankReport(options.rank)))
        decoder = msgspec.msgpack.Decoder(SchedulerOutput)
        poller = zmq.Poller()
        poller.register(steps, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while sys.stdin.fileno() not in (ready := dict(poller.poll())):
            assert steps in ready
            worker.execute_model(decoder.decode(steps.recv()))
        return 0


def _read_line() -> bytes:
    """The first line of stdin, unbuffered, so that the end of the file after it can be polled for."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise EOFError("rank 0 is gone")
        line += byte
    return bytes(line)


def main() -> int:
    """Command line of the process: the first line of stdin is the EngineArgs as JSON, then stdin stays open."""
    parser = argparse.ArgumentParser(description="A rank of a tensor parallel engine; started by rank 0.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--steps", required=True)
    parser.add_argument("--reports", required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; rank 0 decides
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        return serve(context, parser.parse_args())
    finally:
        context.term()


if __name__ == "__main__":
    sys.exit(main())
