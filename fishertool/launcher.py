"""What `torchrun`, `accelerate launch` or Slurm tell of the processes that they started together."""

import os

from fishertool.errors import UsageError

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What else a launcher tells each of several processes."""


def world_size() -> int:
    """How many processes there are, all of which can meet."""
    told = _told()
    missing = [name for name in MEETING if not os.environ.get(name)]
    if told > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE={told} in the environment, but no {', '.join(missing)}: start the "
            "processes with torchrun, or unset WORLD_SIZE"
        )
    return told


def check_alone(verb: str) -> None:
    """Refuse several processes, of which each would do the whole work of a verb."""
    if (of := _told()) > 1:
        raise UsageError(
            f"{verb} is done by one process, and WORLD_SIZE={of} in the environment: start it "
            "without torchrun, or unset WORLD_SIZE"
        )


def _told() -> int:
    """A variable that is empty is not set."""
    told = os.environ.get("WORLD_SIZE") or "1"
    if not told.isdecimal() or not int(told):
        raise UsageError(f"WORLD_SIZE={told!r} in the environment: is a number of processes")
    return int(told)
