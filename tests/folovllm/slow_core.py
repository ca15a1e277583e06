"""The main of a core process that never gets past its imports; it says so in the FIFO that IMPORTING names."""

import os
import sys
import threading

from folovllm.engine import core_proc


def load() -> core_proc.BuildCore:
    with open(os.environ["IMPORTING"], "w") as fifo:
        fifo.write("importing")
    threading.Event().wait()
    raise AssertionError("nobody sets it")


if __name__ == "__main__":
    sys.exit(core_proc.main(load=load))
