"""Compare checkpoints by their headers: what can be combined, and what is refused by name."""

from collections.abc import Collection, Sequence

from fishertool.checkpoint.dtypes import FLOATING
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some


def check_same_tensors(
    models: Sequence[Checkpoint], apart: Collection[str], names: Sequence[Collection[str]]
) -> None:
    """Refuse models whose tensors (`names`, one collection each) differ from the first's.

    Tensors in `apart` may be missing, extra or of another shape. Raises InputError with the
    file, the tensor and both shapes.
    """
    first = models[0]
    for model, own in zip(models[1:], names[1:], strict=True):
        if missing := [name for name in names[0] if name not in own and name not in apart]:
            raise InputError(
                f"{model.folder}: lacks {some(missing)}, which {first.folder} has; "
                f"{WAY_OUT_OF_A_MISMATCH}"
            )
        if extra := [name for name in own if name not in names[0] and name not in apart]:
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


def check_same_shape(first: Checkpoint, other: Checkpoint, name: str) -> None:
    """Refuse a tensor that has another shape, or is floating point in only one of the two."""
    mine, theirs = first.info(name), other.info(name)
    if mine.shape != theirs.shape or (mine.dtype in FLOATING) != (theirs.dtype in FLOATING):
        raise InputError(
            f"{other.where(name)} is {theirs}, but {mine} in {first.folder}; "
            f"{WAY_OUT_OF_A_MISMATCH}"
        )


def check_not_quantized(model: Checkpoint) -> None:
    """Refuse weights that are codes and scales: arithmetic on them is meaningless."""
    quantization = model.config().get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else ""
        )
        raise InputError(
            f"{model.folder}: quantized ({method}); dequantize it first and save it in bfloat16"
        )
