"""Where a matrix's factors come from: decomposed when asked for, or once, and kept on disk."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fishertool.checkpoint.dtypes import NAMES, compute_dtype
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import ONE_FILE, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.stream import Piece, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.factorization.method import Decomposition, Factors
from fishertool.factorization.rank import largest_saving
from fishertool.progress import Advance
from fishertool.registry import Method
from fishertool.surgery.factorize_plan import FactorizePlan
from fishertool.surgery.matrix import Matrix

STEM = "terms"


class Cut(NamedTuple):
    """A matrix's factors of one rank."""

    factors: Factors
    energy: float
    """Share of the matrix's squared norm, in the method's terms, that they keep."""


Cutter = Callable[[Matrix, int], Cut]


def read_weight(plan: FactorizePlan, matrix: Matrix) -> Tensor:
    """[out, in], as stored. Raises InputError for NaN and Inf, which nothing can be made of."""
    rows = plan.checkpoint.read(matrix.name, matrix.start, matrix.stop)
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"{plan.checkpoint.where(matrix.name)}: has NaN or Inf; repair it, or leave it out "
            "with --exclude"
        )
    return matrix.upright(rows)


@contextmanager
def decomposed(
    plan: FactorizePlan, matrix: Matrix, device: str
) -> Iterator[tuple[Tensor, Decomposition]]:
    """The weight and its decomposition by the plan's method, whose terms are computed inside.

    Raises InputError, which names the matrix, for a statistic that is zero everywhere and for
    eigenvalues that do not converge.
    """
    weight = read_weight(plan, matrix).to(device)
    chosen = plan.chosen
    given = {name: plan.statistics.read(name, matrix).to(device) for name in chosen.inputs}
    for name, values in given.items():
        plan.statistics.judge(name, matrix, values)

    def run(method: Method, **more: object) -> Decomposition:
        wanted = {name: value for name, value in given.items() if name in method.inputs}
        found: Decomposition = method.function(weight, **wanted, **more)
        return found

    try:
        if chosen.start is None:
            yield weight, run(chosen.method, **chosen.settings)
        else:
            start = run(chosen.start, **chosen.start.settings)
            yield weight, run(chosen.method, start=start, **chosen.settings)
    except ValueError as error:
        raise InputError(
            f"{plan.checkpoint.where(matrix.key)}: {error}; leave it out with --exclude, or "
            "estimate on other data"
        ) from error
    except LinAlgError as error:
        raise InputError(
            f"{plan.checkpoint.where(matrix.key)}: the eigenvalues of method {chosen.method.name} "
            "do not converge; take other settings with --set, or leave it out with --exclude"
        ) from error


def decomposing(plan: FactorizePlan, device: str) -> Cutter:
    """Every matrix when it is asked for."""

    def cut(matrix: Matrix, rank: int) -> Cut:
        with decomposed(plan, matrix, device) as (weight, found):
            factors = found.truncate(rank)
        if found.refine is None:
            energy = kept_share(found.singular_values(rank), found.whole)
        else:
            error = weight.double() - factors.left @ factors.right
            whole = float(found.square_norm(weight.double()))
            energy = 1 - float(found.square_norm(error)) / whole if whole else 1.0
        return Cut(Factors(factors.left.cpu(), factors.right.cpu()), energy)

    return cut


def decompose_all(
    plan: FactorizePlan, folder: Path, device: str, threads: int, advance: Advance
) -> dict[str, Tensor]:
    """Write the terms of every matrix that may be needed into `folder`; the spectra by matrix. None
    are, of a method that refines: what it starts from is another for every rank."""
    infos = [
        TensorInfo(f"{matrix.key}#{side}", NAMES[compute_dtype(matrix.dtype)], (terms, length))
        for matrix in plan.matrices
        for side, length in zip(("left", "right"), matrix.shape, strict=True)
        if (terms := largest_saving(matrix.shape)) and not plan.chosen.refines
    ]
    spectra: dict[str, Tensor] = {}
    matrices = {matrix.key: matrix for matrix in plan.matrices}
    with ExitStack() as opened:
        writer = None
        if infos:
            layout = lay_out(infos, ONE_FILE, stem=STEM)
            writer = opened.enter_context(CheckpointWriter(folder, layout))

        def one(piece: Piece) -> None:
            matrix = matrices[piece.name]
            with decomposed(plan, matrix, device) as (_, found):
                spectra[matrix.key] = found.singular_values(found.length).cpu()
            terms, dtype = largest_saving(matrix.shape), compute_dtype(matrix.dtype)
            if terms and writer is not None:
                left, right = found.terms(terms)
                writer.write(f"{matrix.key}#left", left.T.to("cpu", dtype))
                writer.write(f"{matrix.key}#right", right.to("cpu", dtype))

        stream(map(whole_piece, plan.matrices), one, threads, advance)
        if writer is not None:
            writer.finish()
    return {matrix.key: spectra[matrix.key] for matrix in plan.matrices}


class KeptTerms:
    """Cuts of what `decompose_all` wrote; of a method that refines, refined when asked for."""

    def __init__(self, plan: FactorizePlan, folder: Path, spectra: dict[str, Tensor], device: str):
        self._folder, self._spectra = folder, spectra
        self._terms: Checkpoint | None = None
        if plan.chosen.refines:
            self._cut = decomposing(plan, device)
        else:
            self._terms = open_checkpoint(folder, stem=STEM)
            self._cut = self._kept

    def __call__(self, matrix: Matrix, rank: int) -> Cut:
        return self._cut(matrix, rank)

    def _kept(self, matrix: Matrix, rank: int) -> Cut:
        assert self._terms is not None
        left = self._terms.read(f"{matrix.key}#left", 0, rank).T
        right = self._terms.read(f"{matrix.key}#right", 0, rank)
        spectrum = self._spectra[matrix.key]
        energy = kept_share(spectrum[:rank], float(spectrum.square().sum()))
        return Cut(Factors(left, right), energy)

    def discard(self) -> None:
        if self._terms is not None:
            self._terms.close()
        shutil.rmtree(self._folder)


def whole_piece(matrix: Matrix) -> Piece:
    return Piece(matrix.key, matrix.start, matrix.stop, matrix.elements)


def kept_share(singular_values: Tensor, whole: float) -> float:
    """Of a sum of squares, by these.

    >>> import torch
    >>> kept_share(torch.tensor([3.0]), 25.0)
    0.36
    """
    if not whole:
        return 1.0
    return round(min(1.0, float(singular_values.double().square().sum()) / whole), 12)
