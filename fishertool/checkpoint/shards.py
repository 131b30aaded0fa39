"""Which files are a checkpoint's, and their headers: all that is checked before a tensor is read."""

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

from fishertool.checkpoint.header import Header, has_control_characters, read_header
from fishertool.checkpoint.json_files import check_link, load_json
from fishertool.errors import InputError, some

MODEL = "model"
"""Stem of a model's files."""
PARTIAL = "partial"
"""Of the file with the sums of one part of an estimate."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def has_stem(folder: Path, stem: str) -> bool:
    """Whether there are files that may be a checkpoint of this stem."""
    return any(folder.glob(f"{stem}*.safetensors*"))


def read_headers(folder: Path, stem: str = MODEL) -> dict[Path, Header]:
    """Those of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` names.

    Raises InputError for what read_header refuses, and for an index that names files outside the
    folder, names tensors its shards lack (or the reverse), or lies beside a file it would be
    ambiguous with.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise InputError(
            f"{folder}: both {single.name} and {index.name}; remove the one that is stale"
        )
    if not single.exists() and not index.exists():
        raise _nothing_to_open(folder, stem)
    weight_map = _weight_map(index) if index.exists() else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [single.name]
    headers: dict[Path, Header] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise InputError(f"{index}: names {name}, which is missing; fetch it again")
        check_link(path)
        headers[path] = read_header(path)
    _check_tensors(index, weight_map, headers)
    return headers


def check_whole(folder: Path) -> None:
    """Refuse a folder with one part of an estimate, whose bank has some of the members."""
    if (folder / f"{PARTIAL}.safetensors").exists():
        raise InputError(
            f"{folder}: is one part of an estimate; put all of them together with fishertool "
            "combine-fisher"
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for name, file in weight_map.items():
        if has_control_characters(name):
            raise InputError(f"{index}: tensor name {name!r} has control characters")
        plain = isinstance(file, str) and (
            PurePosixPath(file).name == PureWindowsPath(file).name == file
            and not has_control_characters(file)
        )
        if not plain or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: tensor {name} is said to be in {file!r}; "
                "only plain .safetensors file names in the same folder are read"
            )
    return weight_map


def _check_tensors(
    index: Path, weight_map: dict[str, str] | None, headers: dict[Path, Header]
) -> None:
    found: dict[str, str] = {}
    for path, header in headers.items():
        for name in header.tensors:
            if name in found:
                raise InputError(f"{path}: tensor {name} is also in {found[name]}")
            found[name] = path.name
    if not found:
        raise InputError(f"{next(iter(headers))}: holds no tensors")
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if found.get(name) != file:
            raise InputError(f"{index}: tensor {name} is not in {file}")
    if unnamed := sorted(found.keys() - weight_map.keys()):
        raise InputError(f"{index}: does not name {some(unnamed)} in {found[unnamed[0]]}")


def _nothing_to_open(folder: Path, stem: str) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f", but {some(others)}" if others else ""
        if stem == MODEL:
            hint += "; give the folder of a model"
        if stem == MODEL and "adapter_model.safetensors" in others:
            hint += ": an adapter is merged into its own by fishertool merge BASE+ADAPTER"
        return InputError(f"{folder}: no {stem}.safetensors in it{hint}")
    # A pattern, not a name: what is printed to be pasted holds nothing that the folder says.
    weights = [name for name in pickles if fnmatchcase(name, "pytorch_model*.bin")]
    pattern = "pytorch_model*.bin" if weights else f"*{Path(pickles[0]).suffix}"
    return InputError(
        f"{folder / (weights or pickles)[0]}: pickled weights can run code and are not read; "
        'convert them: python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone().contiguous() for f in sorted(glob.glob('{pattern}')) "
        "for k, v in torch.load(f, weights_only=True).items()}, "
        f"'{stem}.safetensors', {{'format': 'pt'}})\""
    )
