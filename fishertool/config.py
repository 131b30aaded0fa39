"""YAML files that give a command its flags: flag names as keys, unknown keys refused."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fishertool.errors import UsageError
from fishertool.registry import suggest


def parse_config(
    content: Any, path: Path, flags: Mapping[str, bool], switches: Collection[str]
) -> dict[str, Any]:
    """The values of a file's content by flag name, as the command line would have given them.

    flags     the flags there are, and whether each may be given several times
    switches  those that are on or off

    Raises UsageError naming the file and the key.
    """
    content = content or {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must map flag names to values")
    values: dict[str, Any] = {}
    for key, value in content.items():
        flag = str(key).replace("_", "-")
        if flag not in flags:
            raise UsageError(f"{path}: no key {suggest(flag, flags)}")
        if flag in values:
            raise UsageError(f"{path}: {flag}: is there twice, as {key} too")
        inside = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in inside) and flag not in switches:
            raise UsageError(
                f"{path}: {flag}: takes a value, not yes or no; quote a word that is meant"
            )
        if value is not None:
            values[flag] = _as_flag(f"{path}: {flag}", value, flags[flag])
    return values


def _as_flag(where: str, value: Any, several: bool) -> Any:
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, list):
        if any(isinstance(item, dict | list) for item in value):
            raise UsageError(f"{where}: is nested too deep")
        if None in value:
            raise UsageError(f"{where}: has a place with nothing in it; quote a word that is meant")
        items = [str(item) for item in value]
        return items if several else ",".join(items)
    if isinstance(value, bool):
        return value
    return [str(value)] if several else str(value)
