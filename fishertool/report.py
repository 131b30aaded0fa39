"""The report every command returns, prints with --json and leaves in its output. Strict JSON."""

import hashlib
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Self

from fishertool import __version__
from fishertool.errors import InputError
from fishertool.paths import expanded

SCHEMA = "fishertool.report/1"
NAMES_A_PLACE = (
    "model", "models", "adapter", "against", "base", "fisher", "general_fisher", "parts", "data", "out",
    "path",
)  # fmt: skip
DECIDES_NOTHING = (
    "track", "threads", "device", "device_map", "accumulate_on", "overwrite", "world_size",
    "checkpoint_every", "resume", "bars",
)  # fmt: skip
FILES = ("files", "companions")
"""Lists of files that an output has."""
LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "huggingface_hub")


@dataclass
class Files:
    """A checkpoint, sidecar or data file. `id` is a Hub id or a bare name, never a path."""

    id: str
    role: str
    files: list[dict[str, Any]]
    """Each with file, bytes and sha256."""

    @classmethod
    def of(cls, name: str, role: str, digests: Iterable[Any]) -> Self:
        """From the FileDigest of each."""
        return cls(name, role, list(map(asdict, digests)))


@dataclass
class Output:
    files: list[dict[str, Any]]
    bytes: int
    parameters: int
    dtype: str
    companions: list[dict[str, Any]] = field(default_factory=list)
    """What a loader needs besides the files with tensors, as these are told of."""
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        digests: Sequence[Any],
        parameters: int,
        dtype: str,
        companions: Iterable[Any] = (),
        left_out: Iterable[str] = (),
    ) -> Self:
        """From the FileDigest of each file."""
        nbytes = sum(one.bytes for one in digests)
        beside = list(map(asdict, companions))
        return cls(list(map(asdict, digests)), nbytes, parameters, dtype, beside, list(left_out))


@dataclass
class Report:
    """One run. Everything but `environment` and `phases` is a function of inputs, options and seed."""

    command: str
    options: dict[str, Any]
    status: str = "ok"
    inputs: list[Files] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    output: Output | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    phases: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        document = {"schema": SCHEMA, **_plain(self)}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"  # ASCII, as stdout may be

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run and note the peak memory by its end."""
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 3)
        self.phases.append({"name": name, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()})


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def public_name(source: str | Path) -> str:
    """A Hub id as it is, a path as its last part: reports name no folders of this machine.

    >>> public_name("org/model"), public_name("/data/models/a"), public_name("./a/")
    ('org/model', 'a', 'a')
    """
    path = Path(source)
    is_path = isinstance(source, Path) or path.exists() or path.is_absolute()
    return path.resolve().name if is_path or str(source).startswith(".") else str(source)


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A command's arguments (its `locals()` on entry) as the report records them.

    What does not decide the result is left out; paths and model ids are made public.
    """

    def public(name: str, value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {key: public(key, item) for key, item in asdict(value).items()}
        if isinstance(value, Path) or (name in NAMES_A_PLACE and isinstance(value, str)):
            return public_name(value)
        if isinstance(value, list | tuple):
            return [public(name, item) for item in value]
        return dict(value) if isinstance(value, Mapping) else value

    kept = {name: item for name, item in arguments.items() if name not in DECIDES_NOTHING}
    return {name: public(name, item) for name, item in kept.items()}


def data_files(source: str) -> list[Files]:
    """A local data file with its SHA-256; nothing for a Hub dataset."""
    path = expanded(source)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    found = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}
    return [Files(path.name, "data", [found])]


def _plain(value: Any) -> Any:
    """As JSON has it: records as objects, NaN and infinities as null."""
    if isinstance(value, Report | Files | Output):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_report(path: Path) -> bool:
    """Whether a file is the report of some run, which another may replace."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("schema") == SCHEMA


def load_report(path: Path) -> dict[str, Any]:
    """The report that lies in an output. Raises InputError for a file that is none."""
    document = json.loads(path.read_text(encoding="utf-8")) if is_report(path) else {}
    inputs, output = document.get("inputs"), document.get("output") or {}
    lists = [one.get("files") if isinstance(one, dict) else None for one in inputs or ()]
    tables = [
        document.get(name) or {} for name in ("options", "summary", "evaluation", "calibration")
    ]
    if (
        not isinstance(inputs, list)
        or not all(isinstance(one, dict) for one in (output, *tables))
        or not all(isinstance(one.get(name), str) for one in inputs for name in ("id", "role"))
        or not all(map(_are_files, [*lists, *(output.get(name, []) for name in FILES)]))
    ):
        raise InputError(f"{path}: is no report of fishertool; write the output again")
    return document


def _are_files(value: Any) -> bool:
    kinds = {"file": str, "bytes": int, "sha256": str}
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        for entry in value
    )


def schema() -> dict[str, Any]:
    """The JSON Schema of a report, as published in the package."""
    text = resources.files("fishertool").joinpath("report.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def environment(threads: int, device: str, world_size: int = 1) -> dict[str, Any]:
    """What a run ran on: the part of a report that may differ between runs of the same thing."""
    versions = {"fishertool": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        versions[library] = metadata.version(library)
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "device": device,
        "world_size": world_size,
    }
