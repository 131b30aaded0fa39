"""Carry out a factorization: factors rounded and written matrix by matrix, all else copied."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.companions import write_config, write_json
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.layout import Layout
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.stream import Piece, pieces, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.factorization.method import Factors
from fishertool.factorization.rank import Ranks
from fishertool.fisher.factored import expand
from fishertool.models.low_rank import quantization_config
from fishertool.progress import Advance
from fishertool.surgery.factorize_plan import FactorizePlan
from fishertool.surgery.factorize_terms import Cutter, read_weight, whole_piece
from fishertool.surgery.matrix import Matrix


def write_factorized(
    plan: FactorizePlan,
    ranks: Ranks,
    cut: Cutter,
    folder: Path,
    threads: int,
    advance: Advance,
) -> tuple[Layout, list[FileDigest], dict[str, dict[str, Any]]]:
    """Stream every tensor into `folder`, with config and companions; figures by factorized matrix."""
    layout, factored = plan.layout(ranks), plan.low_rank(ranks)
    matrices = {matrix.key: matrix for matrix in plan.matrices}
    figures: dict[str, dict[str, Any]] = {}
    place = plan.folders.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(place, layout) as writer:

        def one(piece: Piece) -> None:
            matrix = matrices.get(piece.name)
            rank = None if matrix is None else ranks[matrix.key]
            if matrix is None or rank is None:
                name = piece.name if matrix is None else matrix.name
                new = plan.output_name(name, factored)
                writer.write(new, _copied(plan, name, piece), piece.start)
                return
            factors, energy = cut(matrix, rank)
            if plan.format == "low-rank":
                rounded = rounded_factors(plan, matrix, factors)
                down = rounded.right
                if matrix.layer.kind == "embedding":  # a table of rows
                    down = down.T
                writer.write(f"{matrix.module}.down.weight", down)
                writer.write(f"{matrix.module}.up.weight", rounded.left)
                product = rounded.left.double() @ rounded.right.double()
            else:
                rows = product_rows(plan, matrix, factors)
                writer.write(matrix.name, rows, matrix.start)
                product = matrix.upright(rows).double()
            figures[matrix.key] = {"energy": energy, **_errors(plan, matrix, product)}

        stream(_work(plan), one, threads, advance)
        digests = writer.finish()
    _write_config(plan, layout, place, list(factored.values()))
    plan.folders.copy(folder)
    return layout, digests, figures


def rounded_factors(plan: FactorizePlan, matrix: Matrix, factors: Factors) -> Factors:
    """As they are stored. Raises InputError for values that the dtype has no room for."""
    dtype = TORCH[matrix.dtype]
    rounded = Factors(factors.left.to(dtype), factors.right.to(dtype))
    for factor in rounded:
        _check_fits(plan, matrix, factor)
    return rounded


def product_rows(plan: FactorizePlan, matrix: Matrix, factors: Factors) -> Tensor:
    """The matrix that factors stand for, as the rows on disk that it takes the place of."""
    product = (factors.left @ factors.right).to(TORCH[matrix.dtype])
    _check_fits(plan, matrix, product)
    return matrix.upright(product)


def factorized_rows(
    plan: FactorizePlan, ranks: Ranks, cut: Cutter
) -> Iterator[tuple[Matrix, Tensor]]:
    """The rows on disk that every matrix would have: the product of its factors, or as it was."""
    for matrix in plan.matrices:
        rank = ranks[matrix.key]
        if rank is None:
            yield matrix, plan.checkpoint.read(matrix.name, matrix.start, matrix.stop)
            continue
        factors = cut(matrix, rank).factors
        if plan.format == "low-rank":
            wide = factors.left.dtype
            factors = Factors(*(one.to(wide) for one in rounded_factors(plan, matrix, factors)))
        yield matrix, product_rows(plan, matrix, factors)


def _work(plan: FactorizePlan) -> Iterator[Piece]:
    """Matrices whole, other tensors in pieces, in file order."""
    by_name: dict[str, list[Matrix]] = {}
    for matrix in plan.matrices:
        by_name.setdefault(matrix.name, []).append(matrix)
    for name in plan.checkpoint:
        if name in by_name:
            yield from map(whole_piece, by_name[name])
        elif name in plan.kept:
            yield from pieces([plan.checkpoint.info(name)])


def _copied(plan: FactorizePlan, name: str, piece: Piece) -> Tensor:
    values = plan.checkpoint.read(name, piece.start, piece.stop)
    if not plan.allow_nonfinite:
        check_finite(plan.checkpoint, name, values)
    return values


def _check_fits(plan: FactorizePlan, matrix: Matrix, values: Tensor) -> None:
    if not bool(values.float().isfinite().all()):
        raise InputError(
            f"{plan.checkpoint.where(matrix.key)}: its factors do not fit {matrix.dtype}; leave it "
            "out with --exclude"
        )


def _errors(plan: FactorizePlan, matrix: Matrix, product: Tensor) -> dict[str, float | None]:
    """Squared error of what was written, relative to the weight: as it is, and by the Fisher."""
    weight = read_weight(plan, matrix).double()
    lost = (weight - product).square_()
    whole = weight.square_()
    found: dict[str, float | None] = {"error": _share(lost.sum(), whole.sum())}
    found["weighted_error"] = None
    fisher = _fisher(plan, matrix)
    if fisher is not None:
        found["weighted_error"] = _share((fisher * lost).sum(), (fisher * whole).sum())
    return found


def _fisher(plan: FactorizePlan, matrix: Matrix) -> Tensor | None:
    """The diagonal, or the product of its sums; None where the sidecar does not tell."""
    statistics = plan.statistics
    if "diagonal" in statistics.kinds and matrix.name in statistics.kinds["diagonal"][1].statistics:
        return statistics.read("fisher", matrix).double()
    factored = statistics.kinds.get("factored")
    if factored is None or matrix.expert is not None or matrix.name not in factored[1].statistics:
        return None
    rows, columns = (statistics.read(one, matrix).double() for one in ("rows", "columns"))
    return expand(rows, columns)


def _share(part: Tensor, whole: Tensor) -> float:
    # Rounded: the last bits depend on how a library sums.
    ratio = float(part) / float(whole) if float(whole) else 0.0
    return float(torch.tensor(ratio).float())


def _write_config(
    plan: FactorizePlan, layout: Layout, folder: Path, factored: list[tuple[Matrix, int]]
) -> None:
    write_config(plan.checkpoint.folder, folder, layout.dtype)
    if factored:
        config = load_json(folder / "config.json")
        config["quantization_config"] = quantization_config(
            {matrix.module: rank for matrix, rank in factored},
            next((m.module for m, _ in factored if m.layer.kind == "embedding"), None),
        )
        write_json(folder / "config.json", config)
