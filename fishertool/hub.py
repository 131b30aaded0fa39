"""A model id or a folder -> a folder; what the cache knows of a model id."""

import re
import sys
from pathlib import Path

from fishertool.errors import HubError, InputError
from fishertool.paths import expanded

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
MODEL_FILES = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.codes", "*.tokenizer", "*.jinja",
    "*.tiktoken", "LICENSE*", "NOTICE*",
)  # fmt: skip


def may_be(source: str) -> bool:
    """Whether it is a folder, or looks like a Hub id."""
    return expanded(source).is_dir() or HUB_ID.fullmatch(source) is not None


def resolve(source: str) -> Path:
    """The folder itself, or the local snapshot of the Hub id `org/name[@revision]`.

    Raises InputError if it is neither, HubError if it cannot be had.
    """
    if not source:  # which would be the folder that one is in
        raise InputError("a model or an adapter has no name; write BASE, or BASE+ADAPTER")
    folder = expanded(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder that holds it")
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise InputError(f"{source}: no such folder, and not a Hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():  # a log is no place for bars
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(match[1], revision=match[2], allow_patterns=list(MODEL_FILES))
        )
    except HFValidationError as error:
        raise InputError(f"{source}: no such folder, and not a Hub id: {error}") from error
    except Exception as error:  # of the Hub, a proxy, the HTTP client, JSON, the disk
        reason = " ".join(str(error).split())
        raise HubError(
            f"{source}: no such folder here, and not fetched from the Hub: {reason}"
        ) from error


def cached_license(source: str) -> str | None:
    """The licence that the card of a Hub id says, where that card is in the cache; nothing is fetched."""
    match = HUB_ID.fullmatch(source)
    if match is None:
        return None
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from yaml import YAMLError

    card = try_to_load_from_cache(match[1], "README.md", revision=match[2])
    if not isinstance(card, str):
        return None
    try:
        told = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, YAMLError):  # somebody's card, which may be anything
        return None
    return told if isinstance(told, str) else None
