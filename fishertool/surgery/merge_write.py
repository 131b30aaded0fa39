"""Carry out a merge plan: read, merge, round and write row pieces, in bounded memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.companions import copy_companions, write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import FLOATING, TORCH, compute_dtype, torch_name
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.stream import Piece, pieces, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.fisher.header import FisherHeader
from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher
from fishertool.progress import Advance
from fishertool.sidecar import read_diagonal
from fishertool.surgery.merge_plan import MergePlan


def write_merge(
    plan: MergePlan, weights: Sequence[float], folder: Path, threads: int, advance: Advance
) -> list[FileDigest]:
    """Stream every tensor of the plan into `folder`, and the companions beside them."""
    scales = _fisher_scales(plan)
    with CheckpointWriter(folder, plan.layout) as writer:

        def one(piece: Piece) -> None:
            writer.write(piece.name, _merge_piece(plan, weights, scales, piece), piece.start)

        stream(pieces(plan.outputs()), one, threads, advance)
        digests = writer.finish()
    write_config(plan.models[0].folder, folder, torch_name(plan.dtype))
    copy_companions(plan.models[0].folder, plan.companions, folder)
    return digests


def _merge_piece(
    plan: MergePlan, weights: Sequence[float], scales: Sequence[tuple[float, float]], piece: Piece
) -> Tensor:
    """One piece of the output, in its stored dtype."""
    name, first = piece.name, plan.models[0]
    action, stored = plan.actions[name], first.info(name).dtype
    if action == "keep-first":
        values = first.read(name, piece.start, piece.stop)
        if stored in FLOATING:
            _check_finite(plan, first, piece, values)
        return values
    if action == "equal":
        values = first.read(name, piece.start, piece.stop)
        for model in plan.models[1:]:
            if not torch.equal(values, model.read(name, piece.start, piece.stop)):
                raise InputError(
                    f"{model.where(name)}: its whole numbers differ from {first.folder}'s; "
                    "--exclude it to keep the first model's"
                )
        return values
    dtype = compute_dtype(stored)
    tensors = [_read(plan, model, piece, dtype) for model in plan.models]
    if action == "average":
        result = linear(tensors, weights)
    else:
        arguments: dict[str, Any] = {}
        if plan.sidecars:
            arguments["fishers"] = [
                _fisher_piece(sidecar, scale, piece, dtype)
                for sidecar, scale in zip(plan.sidecars, scales, strict=True)
            ]
        if plan.base is not None:
            arguments["base"] = _read(plan, plan.base, piece, dtype)
        result = plan.method.function(tensors, weights, **arguments, **plan.settings)
    rounded: Tensor = result.to(TORCH[stored])
    if not plan.allow_nonfinite and not _all_finite(rounded):
        raise InputError(
            f"{first.where(name)}: the merged values do not fit {stored}; "
            "lower the weights, or go on with --allow-nonfinite"
        )
    return rounded


def _read(plan: MergePlan, source: Checkpoint, piece: Piece, dtype: torch.dtype) -> Tensor:
    values = source.read(piece.name, piece.start, piece.stop)
    _check_finite(plan, source, piece, values)
    return values.to(dtype)


def _check_finite(plan: MergePlan, source: Checkpoint, piece: Piece, values: Tensor) -> None:
    if not plan.allow_nonfinite and not _all_finite(values):
        raise InputError(
            f"{source.where(piece.name)}: has NaN or Inf; repair it, or go on with --allow-nonfinite"
        )


def _all_finite(values: Tensor) -> bool:
    # A sum is one pass without a temporary; only where it is not finite is each value looked at.
    if values.dtype not in (torch.bfloat16, torch.float64):
        values = values.float()  # the others have no room for a sum, or no sum
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _fisher_scales(plan: MergePlan) -> list[tuple[float, float]]:
    """Mean and L2 norm of each sidecar over the merged weights."""
    scales = []
    for tensors, header in plan.sidecars:
        merged = [
            header.statistics[name] for name, action in plan.actions.items() if action == "merge"
        ]
        elements = sum(statistic.elements for statistic in merged)
        total = sum(statistic.total for statistic in merged)
        squares = sum(statistic.squares for statistic in merged)
        if not total > 0 or not squares < float("inf"):
            raise InputError(f"{tensors.folder}: its Fisher is zero everywhere, or not finite")
        scales.append((total / elements, squares**0.5))
    return scales


def _fisher_piece(
    sidecar: tuple[Checkpoint, FisherHeader],
    scale: tuple[float, float],
    piece: Piece,
    dtype: torch.dtype,
) -> Fisher:
    tensors, header = sidecar
    values = read_diagonal(tensors, piece.name, piece.start, piece.stop).to(dtype)
    if not bool((values >= 0).all()) or not _all_finite(values):
        raise InputError(f"{tensors.where(piece.name)}: a Fisher must be finite and not negative")
    statistic = header.statistics[piece.name]
    return Fisher(values, statistic.total / statistic.elements, *scale)
