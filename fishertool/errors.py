"""What can go wrong, and the exit code each failure has.

FishertoolError
  UsageError         2  a flag, a config file or a combination of them
  InputError         3  an input refused: corrupt, unsafe, mismatched, non-finite
  GateError          4  a quality gate is not met
  StorageError       5  disk full, permission denied
  HubError           6  the Hub or the network
  OutputExistsError  7  the output is already there

The message of each is one line: what is wrong, where, and the way out.
"""


class FishertoolError(Exception):
    """An expected failure, told to the user in one line."""

    exit_code = 1


class UsageError(FishertoolError):
    exit_code = 2


class InputError(FishertoolError):
    exit_code = 3


class GateError(FishertoolError):
    exit_code = 4


class StorageError(FishertoolError):
    exit_code = 5


class HubError(FishertoolError):
    exit_code = 6


class OutputExistsError(FishertoolError):
    exit_code = 7


def some(names: list[str], limit: int = 3) -> str:
    """Name a few and count the rest, for a one-line message.

    >>> some(["a", "b"]), some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
