"""What a factorization method asks of a sidecar: which kinds it needs, and one matrix's part of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.header import FisherHeader
from fishertool.registry import Method
from fishertool.sidecar import (
    check_fits,
    check_squares,
    kinds_of,
    open_sidecar,
    read_activation,
    read_kronecker,
)
from fishertool.surgery.matrix import Matrix

SUFFICES = {
    "fisher": ("diagonal",),
    "gradients": ("kronecker",),
    "rows": ("factored", "diagonal"),
    "columns": ("factored", "diagonal"),
    "inputs": ("activation", "kronecker"),
}
"""Input of a method -> the kinds that give it, the cheapest first; what only one gives comes first, as
a method that needs it is not served by others."""
SUMMED = ("fisher", "rows", "columns")
ROUNDING = 1e-5
"""Of a moment's norm: more than sums in float32 put an eigenvalue below zero by."""
UNTOLD = 1e-20
"""What is taken for the statistic of weights that no token reached."""


class Statistics:
    """The kinds of one sidecar that are needed, open.

    untold      experts that were asked for and that no token reached, by key
    indefinite  moments with an eigenvalue clearly below zero, by their names in the sidecar
    """

    def __init__(self, kinds: dict[str, tuple[Checkpoint, FisherHeader]]):
        self.kinds = kinds
        self.untold: dict[str, None] = {}
        self.indefinite: set[str] = set()
        self._judged: set[str] = set()

    def kind_of(self, wanted: str, matrix: Matrix) -> str:
        """Which of the open kinds gives an input; of an expert in a stack no sums over all do."""
        if matrix.expert is not None and wanted in SUMMED:
            return "diagonal"
        return next(kind for kind in SUFFICES[wanted] if kind in self.kinds)

    def apart(self, wanted: Sequence[str], stack: str) -> bool:
        """Whether these inputs are there of every expert in a stack, and not of all together."""
        kinds = {one: "diagonal" if one in SUMMED else "activation" for one in wanted}
        return "gradients" not in wanted and all(
            kind in self.kinds and stack not in self.kinds[kind][1].without
            for kind in kinds.values()
        )

    def read(self, wanted: str, matrix: Matrix) -> Tensor:
        """One input of a method for one matrix, as [out, in] says whatever is on disk; of an expert
        that no token reached, one that makes no difference.

        Raises InputError for values that are not finite or, of a Fisher, negative.
        """
        kind = self.kind_of(wanted, matrix)
        if self._is_absent(wanted, kind, matrix):
            return self._indifferent(wanted, matrix)
        tensors, header = self.kinds[kind]
        name = matrix.name
        if wanted == "inputs":
            values = read_activation(tensors, header, name, matrix.expert)
            name = f"{header.leaders[name]}#input"
        elif wanted == "gradients":  # times the tokens of an example, so that layers compare
            values = read_kronecker(tensors, header, name)[1]
            name = f"{name}#output"
        elif kind == "factored":
            part = "rows" if (wanted == "rows") != matrix.turned else "columns"
            name = f"{name}#{part}"
            values = tensors[name]
        else:
            values = matrix.upright(tensors.read(name, matrix.start, matrix.stop))
            values = {"rows": values.sum(1), "columns": values.sum(0)}.get(wanted, values)
        if wanted in SUMMED:
            check_squares(tensors.where(name), values)
        elif not bool(values.isfinite().all()):
            raise InputError(f"{tensors.where(name)}: has NaN or Inf; estimate it again")
        if matrix.expert is not None and not bool(values.any()):
            return self._indifferent(wanted, matrix)
        return values

    def judge(self, wanted: str, matrix: Matrix, values: Tensor) -> None:
        """Note a moment [side, side] that is none: not positive semi-definite, rounding apart."""
        if wanted not in ("inputs", "gradients"):
            return
        header = self.kinds[self.kind_of(wanted, matrix)][1]
        name = f"{matrix.name}#output"
        if wanted == "inputs":
            name = f"{header.leaders.get(matrix.name, matrix.name)}#input"
        if matrix.expert is not None:
            name = f"{name}, expert {matrix.expert}"
        if name in self._judged:
            return
        self._judged.add(name)
        raised = values.double()
        raised = raised + ROUNDING * raised.norm() * torch.eye(len(raised)).to(raised)
        if int(torch.linalg.cholesky_ex(raised).info):
            self.indefinite.add(name)

    def _is_absent(self, wanted: str, kind: str, matrix: Matrix) -> bool:
        """Whether the header tells that no token reached an expert; of one in a stack it does not."""
        header = self.kinds[kind][1]
        statistic = header.statistics.get(matrix.name)
        if matrix.layer.kind != "expert":
            return False
        if statistic is None:  # one that was left out of the estimate is refused
            return matrix.name in header.without
        return wanted != "inputs" and not statistic.total > 0

    def _indifferent(self, wanted: str, matrix: Matrix) -> Tensor:
        """All weights alike, and next to nothing beside those of other matrices."""
        self.untold[matrix.key] = None
        out, width = matrix.shape
        if wanted in ("inputs", "gradients"):
            return UNTOLD * torch.eye(width if wanted == "inputs" else out)
        shape = {"rows": (out,), "columns": (width,)}.get(wanted, matrix.shape)
        return torch.full(shape, UNTOLD)

    def check(self, wanted: Sequence[str], matrices: Sequence[Matrix]) -> None:
        """Refuse, from headers, matrices that these inputs are not there for, or all zero."""
        for one in wanted:
            by_kind: dict[str, list[Matrix]] = {}
            for matrix in matrices:
                kind = self.kind_of(one, matrix)
                if not self._is_absent(one, kind, matrix):
                    by_kind.setdefault(kind, []).append(matrix)
            for kind, told in by_kind.items():
                self._check_kind(one, kind, told)

    def _check_kind(self, wanted: str, kind: str, matrices: Sequence[Matrix]) -> None:
        tensors, header = self.kinds[kind]
        lost = [matrix.name for matrix in matrices if matrix.name not in header.statistics]
        if wanted in ("inputs", "gradients") and (
            tables := {one.name for one in matrices if one.layer.kind == "embedding"} & {*lost}
        ):
            raise UsageError(
                f"{some(sorted(tables))}: an embedding has no {kind} statistic; leave it out with "
                "--exclude, or take svd, fwsvd or tfwsvd"
            )
        if lost:
            raise InputError(
                f"{tensors.folder}: has no {kind} statistic of {some(sorted(set(lost)))}; "
                "leave these out with --exclude, or estimate it of them"
            )
        if wanted != "inputs" and (  # whose moment has no sum in the header
            zero := sorted({m.name for m in matrices if not header.statistics[m.name].total > 0})
        ):
            raise InputError(
                f"{tensors.folder}: the {kind} Fisher of {some(zero)} is zero everywhere: the "
                "data did not reach it; leave it out with --exclude, or estimate on other data"
            )
        for matrix in matrices:
            self._check_sides(wanted, tensors, header, matrix)

    def _check_sides(
        self, wanted: str, tensors: Checkpoint, header: FisherHeader, matrix: Matrix
    ) -> None:
        if wanted not in ("inputs", "gradients"):
            return
        side = matrix.shape[1] if wanted == "inputs" else matrix.shape[0]
        name = f"{header.leaders[matrix.name]}#input"
        if wanted == "gradients":
            name = f"{matrix.name}#output"
        if name not in tensors or tensors.info(name).shape[-2:] != (side, side):
            raise InputError(
                f"{tensors.folder}: tensor {name} should be [{side}, {side}] for {matrix.name} of "
                f"{list(matrix.shape)}; estimate it again"
            )


def open_statistics(
    opened: ExitStack, folder: Path | None, methods: Sequence[Method], model: Checkpoint
) -> Statistics:
    """What the methods need, and beside that a diagonal or factored Fisher if there is one.

    Raises UsageError for no sidecar where one is needed; InputError for one that lacks what is
    needed, or is of another checkpoint.
    """
    there = set() if folder is None else set(kinds_of(folder))
    wanted = [str(kind) for kind in ("diagonal", "factored") if kind in there][:1]
    for method in methods:
        for one, kinds in SUFFICES.items():
            if not method.inputs.get(one):
                continue
            need = f"method {method.name} needs a Fisher of kind {' or '.join(kinds)}"
            if folder is None:
                raise UsageError(f"{need}; give --fisher")
            usable = [kind for kind in kinds if kind in there]
            if not usable:
                raise InputError(
                    f"{folder}: {need}, which this has not; estimate it with --kind {kinds[0]}"
                )
            wanted.append(usable[0])
    if folder is not None and not wanted:
        names = " and ".join(method.name for method in methods)
        raise InputError(
            f"{folder}: has neither a diagonal nor a factored Fisher, and of others method {names} "
            "reads none; leave --fisher out"
        )
    kinds_open: dict[str, tuple[Checkpoint, FisherHeader]] = {}
    for kind in dict.fromkeys(wanted):
        assert folder is not None
        tensors, header = open_sidecar(folder, kind)
        opened.enter_context(tensors)
        check_fits(tensors, header, model)
        kinds_open[kind] = (tensors, header)
    return Statistics(kinds_open)
