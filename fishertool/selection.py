"""Include and exclude globs over tensor names."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fishertool.errors import UsageError


def select(
    names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Names that match any `include` glob (all, if there is none) and no `exclude` glob, in order.

    A glob that matches nothing is an error: it is a typo more often than a wish.

    >>> select(["a.weight", "a.bias", "b.weight"], ["a.*"], ["*.bias"])
    ['a.weight']
    """
    names = list(names)
    for flag, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                example = names[0] if names else "none"
                raise UsageError(
                    f"{flag} {glob!r} matches none of {len(names)} tensors ({example}, ...)"
                )
    selected = [
        name
        for name in names
        if (not include or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude)
    ]
    if not selected:
        raise UsageError("--include and --exclude leave no tensor")
    return selected
