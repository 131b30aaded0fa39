"""Compare checkpoints by their headers: what can be combined, and what is refused by name."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, some


def check_same_tensors(
    models: Sequence[TensorSource], apart: Collection[str], names: Sequence[Collection[str]]
) -> None:
    """Refuse models whose tensors (`names`, one collection each) differ from the first's.

    Tensors in `apart` may be missing, extra or of another shape. Raises InputError with the
    file, the tensor and both shapes.
    """
    first = models[0]
    known = set(names[0])
    for model, other in zip(models[1:], names[1:], strict=True):
        own = set(other)
        if missing := [name for name in names[0] if name not in own and name not in apart]:
            raise InputError(
                f"{model.folder}: lacks {some(missing)}, which {first.folder} has; "
                f"{WAY_OUT_OF_A_MISMATCH}"
            )
        if extra := [name for name in other if name not in known and name not in apart]:
            raise InputError(
                f"{first.folder}: lacks {some(extra)}, which {model.folder} has; "
                f"{WAY_OUT_OF_A_MISMATCH}"
            )
        for name in names[0]:
            if name not in apart:
                check_same_shape(first, model, name)


WAY_OUT_OF_A_MISMATCH = (
    "merge models of one architecture, or with --head keep-first if only their heads differ"
)


def check_same_shape(
    first: TensorSource, other: TensorSource, name: str, theirs_name: str | None = None
) -> None:
    """Refuse a tensor that has another shape, or is floating point in only one of the two."""
    other_name = theirs_name or name
    mine, theirs = first.info(name), other.info(other_name)
    if mine.shape != theirs.shape or (mine.dtype in FLOATING) != (theirs.dtype in FLOATING):
        raise InputError(
            f"{other.where(other_name)} is {theirs}, but {mine} in {first.folder}; "
            f"{WAY_OUT_OF_A_MISMATCH}"
        )


OF_THE_PASS = re.compile(
    "heads?$|head_dim|rope|rotary|theta|alibi|_eps|epsilon|hidden_act|activation|window|scal(e|ing)"
    "|multiplier|softcap|experts_per_tok|topk|position_embedding_type|parallel_residual|layer_types"
)
"""Keys of config.json that say what a forward pass does with weights, and that no shape shows."""


def settings_that_differ(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Of two models' configs, what both say of the forward pass and not alike.

    >>> settings_that_differ({"rope_theta": 1e4, "dtype": "a"}, {"rope_theta": 1e6, "dtype": "b"})
    ['rope_theta 1000000.0 for 10000.0']
    """
    mine, theirs = _of_the_pass(first), _of_the_pass(other)
    return [
        f"{key} {theirs[key]} for {value}"
        for key, value in mine.items()
        if key in theirs and theirs[key] != value
    ]


def _of_the_pass(config: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """By paths; rotary settings by those that transformers has for them since version 5."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = inside + key
        if key in ("rope_scaling", "rope_parameters"):
            rotary = {"rope_type": "default", **(value if isinstance(value, Mapping) else {})}
            rotary["rope_type"] = rotary.pop("type", rotary["rope_type"])
            found |= {f"{inside}{name}": one for name, one in rotary.items()}
        elif isinstance(value, Mapping):
            found |= _of_the_pass(value, f"{path}.")
        elif OF_THE_PASS.search(key):
            found[path] = value
    if config.get("use_sliding_window") is False:
        return {path: value for path, value in found.items() if "window" not in path}
    return found


def check_not_quantized(model: TensorSource) -> None:
    """Refuse weights that are codes and scales, or of a dtype that there is no arithmetic for."""
    quantization = model.config().get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else ""
        )
        if method == "low_rank":
            raise InputError(
                f"{model.folder}: its layers are low-rank pairs; make them dense first with "
                "fishertool densify"
            )
        raise InputError(
            f"{model.folder}: quantized ({method}); dequantize it first and save it in bfloat16"
        )
    for name in model:
        if (stored := model.info(name).dtype) not in TORCH:
            raise InputError(
                f"{model.where(name)}: {stored} cannot be computed with; dequantize the model first "
                "and save it in bfloat16"
            )
