"""The files that a report names, held against those that are there."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fishertool.checkpoint.against_report import difference
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.header import read_header
from fishertool.checkpoint.json_files import check_link
from fishertool.errors import InputError, some
from fishertool.inspection.place import Place
from fishertool.inspection.written import Written

TENSORS = ".safetensors"


def faults_of_files(
    place: Place, written: Written, hashed: Mapping[Path, FileDigest]
) -> Iterator[str]:
    """Files that are missing, or of other bytes; `hashed` are those that were hashed already."""
    for told in written.files:
        there = (path for path in _paths(place, told.file) if path.is_file())
        path = next(there, place.top / told.file)
        fault = difference(path.parent, told, hashed.get(path))
        if fault is None and path not in hashed:  # not of the checkpoint itself, as masks
            fault = _fault_of(path)
        if fault is not None:
            yield fault
    for told in written.companions:
        fault = difference(place.top, told) or _fault_of(place.top / told.file)
        if fault is not None:
            yield fault
    own = place.weights.relative_to(place.top)
    beside = [name for name in written.names if not (place.top / name).is_file()]
    # What lies with the checkpoint in a folder of its own is told of as files.
    lost = [name for name in beside if own == Path() or not Path(name).is_relative_to(own)]
    if lost:
        yield f"{some(lost)}: missing, and its report says that it went along"


def extra_files(place: Place, known: Collection[Path], written: Written | None) -> list[str]:
    """Files of tensors that are neither open nor named in the report."""
    named = set(known)
    if written is not None:
        named |= {path for one in written.files for path in _paths(place, one.file)}
        named |= {place.top / one.file for one in written.companions}
        named |= {place.top / name for name in written.names}
    there = {path for folder in _folders(place) for path in folder.glob(f"*{TENSORS}")}
    return sorted(path.relative_to(place.top).as_posix() for path in there - named)


def _fault_of(path: Path) -> str | None:
    try:
        check_link(path)
        if path.suffix == TENSORS:
            read_header(path)
    except InputError as error:
        return str(error)
    return None


def _folders(place: Place) -> list[Path]:
    return list(dict.fromkeys([place.weights, place.top]))


def _paths(place: Place, file: str) -> list[Path]:
    return [folder / file for folder in _folders(place)]
