"""What the command line calls a model -> its tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fishertool import hub
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.shards import MODEL, has_stem
from fishertool.checkpoint.source import TensorSource
from fishertool.errors import InputError
from fishertool.models.adapted import AdaptedCheckpoint
from fishertool.models.adapter_options import CONFIG
from fishertool.models.adapters import open_adapter
from fishertool.report import public_name


@contextmanager
def open_source(reference: str) -> Iterator[TensorSource]:
    """Open `BASE` or `BASE+ADAPTER`, each a folder or a Hub id `org/name[@revision]`.

    Raises InputError for what `open_checkpoint` and `open_adapter` refuse, and for an adapter that
    does not fit the base; HubError for what cannot be had.
    """
    base, adapter = split_reference(reference)
    with ExitStack() as opened:
        folder = hub.resolve(base)
        _check_is_whole(folder, base)
        checkpoint = opened.enter_context(open_checkpoint(folder))
        if adapter is None:
            yield checkpoint
        else:
            found = opened.enter_context(open_adapter(hub.resolve(adapter)))
            yield AdaptedCheckpoint(checkpoint, found)


def split_reference(reference: str) -> tuple[str, str | None]:
    """The base, and the adapter if there is one.

    A folder whose own name has a '+' is that folder; else the first '+' counts between two parts
    that may be models.

    >>> split_reference("org/base@v1+org/tuned"), split_reference("org/base")
    (('org/base@v1', 'org/tuned'), ('org/base', None))
    """
    if "+" not in reference or hub.may_be(reference):
        return reference, None
    places = [place for place, letter in enumerate(reference) if letter == "+"]
    splits = [(reference[:place], reference[place + 1 :]) for place in places]
    return next((split for split in splits if all(map(hub.may_be, split))), splits[0])


def folders_of(reference: str) -> list[Path]:
    """Where a model lies, and its adapter."""
    return [hub.resolve(part) for part in split_reference(reference) if part is not None]


def public_reference(reference: str) -> str:
    """A model's name without the folders of this machine, its adapter's too."""
    return "+".join(public_name(part) for part in split_reference(reference) if part is not None)


def _check_is_whole(folder: Path, name: str) -> None:
    if (folder / CONFIG).is_file() and not has_stem(folder, MODEL):
        base = load_json(folder / CONFIG).get("base_model_name_or_path")
        raise InputError(
            f"{folder}: is an adapter{f' of {base}' if base else ''}; write BASE+{name}"
        )
