"""The process's edge: signals, and one line and an exit code for whatever went wrong."""

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from fishertool.cli import (  # noqa: F401 (they put their verbs on the app)
    combine,
    densify,
    estimate,
    evaluate,
    factorize,
    inspect,
    merge,
    prune,
    push,
    search,
    verify,
)
from fishertool.cli.app import app
from fishertool.cli.printing import leave_stdout, tell
from fishertool.errors import FishertoolError, UsageError
from fishertool.memory import keep_freed_memory, look_for_cycles_seldom

INTERRUPTED, BUG, IO_FAILURE = 130, 1, 5
STOPS = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", 143)}


class Terminated(BaseException):
    """SIGTERM, raised so that what is half-written is removed on the way out."""


def run() -> NoReturn:
    """The process's whole life. It ends without taking the interpreter down, which is 0.3 s of
    freeing what torch holds; everything written is on disk by then."""
    _open_streams()
    code = main(sys.argv[1:])
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _open_streams() -> None:
    """Let stdout and stderr take whatever is written to them: they may be closed, or ASCII."""
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code; see fishertool.errors for the codes."""
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    keep_freed_memory()
    look_for_cycles_seldom()
    previous = {number: signal.getsignal(number) for number in STOPS}
    previous = {n: old for n, old in previous.items() if old not in (None, signal.SIG_IGN)}
    for number in previous:
        signal.signal(number, stop)
    try:
        code = app(arguments, prog_name="fishertool", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except SystemExit:  # what typer makes of a closed pipe, as of a help's reader
        leave_stdout()
        return IO_FAILURE
    except (Exception, KeyboardInterrupt, Terminated) as error:
        # A signal may come back as another error: of an import that was broken off, say.
        came_of_it = bool(stopped) and not isinstance(error, FishertoolError)
        if not came_of_it and not isinstance(error, KeyboardInterrupt):
            return _failed(error)
        how, code = STOPS[signal.Signals(stopped[0] if stopped else signal.SIGINT)]
        left = "nothing half-written is left"
        if len(stopped) > 1:  # the second may have stopped the removing
            left = "what is half-written may be left; the next run for that output removes it"
        return _fail(f"{how}; {left}", code)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _failed(error: BaseException) -> int:
    """Tell of an error in one line."""
    match error:
        case FishertoolError():
            return _fail(str(error), error.exit_code)
        case MemoryError():
            return _fail("out of memory; lower --batch-size or --threads", IO_FAILURE)
        case OSError(errno=errno.EPIPE):  # whoever read stdout has left; say no more into it
            leave_stdout()
            return IO_FAILURE
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            full = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            return _fail(f"{where}{error.strerror or error}{full}", IO_FAILURE)
    if hasattr(error, "format_message"):  # a usage error of the command-line parser
        message = error.format_message()
        if not message:  # without arguments it shows the help
            return UsageError.exit_code
        return _fail(f"{message} (see --help)", UsageError.exit_code)
    return _fail(
        f"a bug in fishertool, please report it: {type(error).__name__}: {error} "
        "(FISHERTOOL_DEBUG=1 shows where)",
        BUG,
    )


def _fail(message: str, code: int) -> int:
    if os.environ.get("FISHERTOOL_DEBUG") == "1":
        traceback.print_exc()
    tell(message)
    return code
