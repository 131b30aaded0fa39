"""From the texts of flags such as `--set key=value` to values."""

from typing import Any

from fishertool.errors import UsageError


def pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    """key=value flags as a dict. Raises UsageError for a key that is given twice."""
    pairs: dict[str, str] = {}
    for item in given or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UsageError(f"{flag} {item!r}: write key=value")
        if key.strip() in pairs:
            raise UsageError(f"{flag} {key.strip()}: is given twice")
        pairs[key.strip()] = value.strip()
    return pairs


def method_settings(given: list[str] | None, **named: Any) -> dict[str, Any]:
    """What `--set` gives, and what flags give that are `named` as settings; once each."""
    chosen: dict[str, Any] = dict(pairs("--set", given))
    for name, value in named.items():
        if value is not None and name in chosen:
            raise UsageError(f"--{name.replace('_', '-')} and --set {name} say it twice")
        if value is not None:
            chosen[name] = value
    return chosen


def limits(flag: str, given: list[str] | None) -> dict[str, float]:
    return {name: number(f"{flag} {name}", value) for name, value in pairs(flag, given).items()}


def number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a number") from None
