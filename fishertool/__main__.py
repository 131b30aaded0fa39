"""`python -m fishertool` is the command `fishertool`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """The command's whole life, with the import of the command line, which takes a while."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from fishertool.cli import run

    run()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C before the command line, which has a handler of its own, is there."""
    print("fishertool: interrupted; nothing half-written is left", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    run()
