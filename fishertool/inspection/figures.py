"""What headers and config files tell of a folder, as the summary of a report."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fishertool.checkpoint.companions import Folders
from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError
from fishertool.inspection.files import extra_files
from fishertool.inspection.place import Place
from fishertool.inspection.written import Written
from fishertool.models.adapter_options import CONFIG
from fishertool.models.architectures import task_name
from fishertool.models.low_rank import factors_of
from fishertool.plugin import is_low_rank
from fishertool.report import public_name
from fishertool.surgery.output import row_of


def figures_of(
    place: Place, opened: Mapping[str, Contents], written: Written | None
) -> dict[str, Any]:
    """What the folder is, what its tensors take, what lies beside them, and who wrote it.

    Raises InputError for a low-rank checkpoint whose factors are not those that its config.json
    names, for a config.json that is missing or no JSON, and for a Fisher that is none.
    """
    contents = list(opened.values())
    if place.what == "checkpoint":
        own = _of_checkpoint(contents[0])
    elif place.what == "adapter":
        own = _of_adapter(load_json(place.top / CONFIG))
    else:
        from fishertool.inspection.fishers import figures_of_fisher  # by which torch is loaded

        own = figures_of_fisher(place, opened)
    return {
        "what": place.what,
        **own,
        **_sizes(place.top, contents),
        **_beside(place, contents),
        "report": None if written is None else of_report(written),
    }


def of_report(written: Written) -> dict[str, Any]:
    return {"command": written.command, "method": written.method, "summary": written.figures}


def rows_of(place: Place, contents: Iterable[Contents]) -> list[dict[str, Any]]:
    """A row a tensor, in file order."""
    return [
        row_of(info, "inspect", bytes=info.nbytes, file=_relative(path, place.top))
        for one in contents
        for path, header in one.headers.items()
        for info in sorted(header.tensors.values(), key=lambda info: info.start)
    ]


def _sizes(top: Path, contents: Sequence[Contents]) -> dict[str, Any]:
    files = {_relative(path, top): path.stat().st_size for one in contents for path in one.headers}
    infos = [info for one in contents for info in one.infos().values()]
    dtypes: dict[str, dict[str, int]] = {}
    for dtype in Counter(info.dtype for info in infos):
        own = [info for info in infos if info.dtype == dtype]
        dtypes[dtype] = {
            "tensors": len(own),
            "parameters": sum(info.elements for info in own),
            "bytes": sum(info.nbytes for info in own),
        }
    return {
        "tensors": len(infos),
        "parameters": sum(info.elements for info in infos),
        "bytes": sum(files.values()),
        "dtypes": dtypes,
        "files": files,
    }


def _beside(place: Place, contents: Sequence[Contents]) -> dict[str, Any]:
    """What a loader needs, and what it does not, besides the files of tensors and the report."""
    shards = [path for one in contents for path in one.headers]
    own = {REPORT_FILE, "config.json", *(_relative(path, place.top) for path in shards)}
    copied: dict[str, None] = {}
    left_out = dict.fromkeys(extra_files(place, shards, None))
    for folder, found in Folders.of(place.top, place.weights).companions.items():
        copied |= {_relative(folder / name, place.top): None for name in found.copied}
        left_out |= {_relative(folder / name, place.top): None for name in found.left_out}
    return {
        "companions": [name for name in copied if name not in own],
        "others": [name for name in left_out if name not in copied and name not in own],
    }


def _of_checkpoint(checkpoint: Contents) -> dict[str, Any]:
    config = checkpoint.config()
    quantization = config.get("quantization_config")
    return {
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "model_type": config.get("model_type"),
        "task": _task(config, checkpoint.folder),
        "config_dtype": config.get("dtype", config.get("torch_dtype")),
        "tied_embeddings": config.get("tie_word_embeddings"),
        "quantization": quantization.get("quant_method")
        if isinstance(quantization, dict)
        else None,
        "low_rank": _low_rank(checkpoint, config) if is_low_rank(config) else None,
    }


def _task(config: dict[str, Any], folder: Path) -> str | None:
    try:
        return task_name(config, folder)
    except InputError:  # of another task than the tool's
        return None


def _low_rank(checkpoint: Contents, config: Mapping[str, Any]) -> dict[str, Any]:
    factors = factors_of(checkpoint, config["quantization_config"])
    return {
        "modules": len(factors),
        "smallest_rank": min(one.rank for one in factors),
        "largest_rank": max(one.rank for one in factors),
        "embedding": next((one.module for one in factors if one.embedding), None),
        "parameters": sum(one.rank * (one.inputs + one.outputs) for one in factors),
        "parameters_dense": sum(one.inputs * one.outputs for one in factors),
    }


def _of_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    base, targets = config.get("base_model_name_or_path"), config.get("target_modules")
    return {
        "type": config.get("peft_type"),
        "task": config.get("task_type"),
        "base": public_name(base) if isinstance(base, str) else None,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": targets,
        "modules_to_save": config.get("modules_to_save"),
    }


def _relative(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()
