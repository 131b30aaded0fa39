"""JSON files beside the weights, and links that lead out of a folder."""

import json
from pathlib import Path
from typing import Any

from fishertool.errors import InputError


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or InputError naming the file."""
    value = parse_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def parse_json(path: Path) -> Any:
    check_link(path)
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def check_link(path: Path) -> None:
    """Refuse a link out of its folder, unless it is the Hub cache's snapshot -> blob link."""
    folder, target = path.parent.resolve(), path.resolve()
    if target.is_relative_to(folder):
        return
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            if target.is_relative_to(snapshot.parent.parent / "blobs"):
                return
            break
    raise InputError(f"{path}: links out of its folder; copy the file into it")
