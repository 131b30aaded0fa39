"""What headers and config files tell of a folder, as the summary of a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fishertool.checkpoint.companions import find_in_folders
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError
from fishertool.estimation.partial import Partial
from fishertool.fisher.header import FisherHeader, relative_errors
from fishertool.inspection.files import extra_files
from fishertool.inspection.place import About, Place
from fishertool.inspection.written import Written
from fishertool.models.adapters import CONFIG
from fishertool.models.low_rank import factors_of
from fishertool.models.tasks import loading_task
from fishertool.plugin import is_low_rank
from fishertool.report import public_name
from fishertool.surgery.output import row_of

WORST = 3
"""Tensors whose standard errors are told."""


def figures_of(
    place: Place, opened: Mapping[str, tuple[Checkpoint, About]], written: Written | None
) -> dict[str, Any]:
    """What the folder is, what its tensors take, what lies beside them, and who wrote it.

    Raises InputError for a low-rank checkpoint whose factors are not those that its config.json
    names, and for a config.json that is missing or no JSON.
    """
    checkpoints = [checkpoint for checkpoint, _ in opened.values()]
    about = next(iter(opened.values()))[1]
    own: dict[str, Any]
    if isinstance(about, Partial):
        own = _of_part(about)
    elif isinstance(about, FisherHeader):
        own = _of_sidecar(opened)
    elif place.what == "adapter":
        own = _of_adapter(load_json(place.top / CONFIG))
    else:
        own = _of_checkpoint(checkpoints[0])
    return {
        "what": place.what,
        **own,
        **_sizes(place.top, checkpoints),
        **_beside(place, checkpoints),
        "report": None if written is None else of_report(written),
    }


def of_report(written: Written) -> dict[str, Any]:
    return {"command": written.command, "method": written.method, "summary": written.figures}


def rows_of(place: Place, checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """A row a tensor, in file order."""
    return [
        row_of(info, "inspect", bytes=info.nbytes, file=_relative(shard.path, place.top))
        for checkpoint in checkpoints
        for shard in checkpoint.shards
        for info in sorted(shard.header.tensors.values(), key=lambda info: info.start)
    ]


def _sizes(top: Path, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    files = {
        _relative(shard.path, top): shard.path.stat().st_size
        for checkpoint in checkpoints
        for shard in checkpoint.shards
    }
    infos = [info for checkpoint in checkpoints for info in checkpoint.infos().values()]
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


def _beside(place: Place, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What a loader needs, and what it does not, besides the files of tensors and the report."""
    shards = [shard.path for checkpoint in checkpoints for shard in checkpoint.shards]
    own = {REPORT_FILE, "config.json", *(_relative(path, place.top) for path in shards)}
    copied: dict[str, None] = {}
    left_out = dict.fromkeys(extra_files(place, shards, None))
    for folder, found in find_in_folders(place.top, place.weights).items():
        copied |= {_relative(folder / name, place.top): None for name in found.copied}
        left_out |= {_relative(folder / name, place.top): None for name in found.left_out}
    return {
        "companions": [name for name in copied if name not in own],
        "others": [name for name in left_out if name not in copied and name not in own],
    }


def _of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
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
        return loading_task(config, folder, "auto").name
    except InputError:  # of another task than the tool's
        return None


def _low_rank(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _of_sidecar(opened: Mapping[str, tuple[Checkpoint, About]]) -> dict[str, Any]:
    headers = [one for _, one in opened.values() if isinstance(one, FisherHeader)]
    return {
        **_of_header(headers[0]),
        "kinds": {header.kind: _of_kind(header) for header in headers},
        "largest_relative_errors": next(filter(None, map(_errors, headers)), {}),
    }


def _of_header(header: FisherHeader) -> dict[str, Any]:
    return {
        "model": header.model,
        "fingerprint": header.fingerprint,
        "task": header.task,
        "labels": header.labels,
        "estimator": header.estimator,
        "examples": header.examples,
        "tokens": header.tokens,
        "seed": header.seed,
    }


def _of_kind(header: FisherHeader) -> dict[str, Any]:
    """Weights that the kind tells of, their elements, and the model's tensors that it leaves out."""
    return {
        "weights": len(header.statistics),
        "parameters": sum(one.elements for one in header.statistics.values()),
        "without": len(header.without),
        "group": header.group if header.kind == "rank-one" else None,
    }


def _errors(header: FisherHeader) -> dict[str, float]:
    """Relative standard errors of the totals that are known worst, by weight."""
    errors = relative_errors(header.statistics)
    worst = sorted(errors, key=lambda name: -errors[name])
    return {name: errors[name] for name in worst[:WORST]}


def _of_part(partial: Partial) -> dict[str, Any]:
    job, progress = partial.job, partial.progress
    return {
        **_of_header(job.header),
        "part": f"{progress.number + 1}/{job.workers}",
        "units": progress.units,
        "units_of_all_parts": job.units,
        "kinds": list(job.kinds),
    }


def _relative(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()
