"""The files that a report names, held against those that are there."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fishertool.checkpoint.against_report import difference
from fishertool.checkpoint.companions import loaded_beside
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.header import read_header
from fishertool.checkpoint.json_files import check_link
from fishertool.errors import InputError
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


def extra_files(place: Place, known: Collection[Path], written: Written | None) -> list[str]:
    """Files of tensors, and others that a loader reads, that are neither open nor named in the
    report; without one, of tensors alone."""
    named = set(known)
    there = {path for folder in _folders(place) for path in folder.glob(f"*{TENSORS}")}
    if written is not None:
        there |= {place.top / name for name in loaded_beside(place.top)}
        named |= {path for one in written.files for path in _paths(place, one.file)}
        named |= {place.top / one.file for one in written.companions}
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
