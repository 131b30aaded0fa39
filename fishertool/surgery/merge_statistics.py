"""The sidecars of a merge: opened, checked against their models, and read piece by piece."""

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from fishertool import hub
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.shards import has_stem
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.header import FisherHeader
from fishertool.merging.method import Fisher, Kronecker
from fishertool.models.token_rows import gather
from fishertool.registry import Method
from fishertool.sidecar import (
    check_fits,
    has_diagonal,
    open_diagonal,
    open_sidecar,
    oriented,
    read_activation,
    read_diagonal,
    read_kronecker,
)
from fishertool.surgery.merge_inputs import Inputs

MATRICES = {"activations", "kroneckers"}
"""Inputs of methods that are given a linear layer's weight whole."""


@dataclass
class Sidecar:
    """One kind of one model's sidecar."""

    tensors: Checkpoint
    header: FisherHeader
    scale: tuple[float, float] = field(default=(1.0, 1.0))
    """Mean and L2 norm of the diagonal over the merged weights."""

    rows: Tensor | None = None
    """For each row of a token tensor of the output its row here, or -1; None where all are alike."""
    by_token: Collection[str] = ()
    """The tensors whose rows are tokens."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those weights that it should tell about and does not."""
        known = {*self.header.statistics, *self.header.without}
        return [name for name in names if name not in known]

    def knows(self, name: str) -> bool:
        return name in self.header.statistics

    def without(self, method: Method) -> set[str]:
        """Weights that the method averages, having no statistic of theirs that it could use."""
        reordered = self.by_token if "kroneckers" in method.inputs else ()
        return {*self.header.without, *reordered}

    def measure(self, merged: Iterable[str]) -> None:
        """Find the scale over these weights; second moments of inputs alone have none.

        Raises InputError where it tells of none of them, or has nothing but zeros.
        """
        counted = [self.header.statistics[name] for name in merged if self.knows(name)]
        if not counted:
            raise InputError(
                f"{self.tensors.folder}: tells of none of the tensors that are merged; include "
                "some that it has, or merge without it by another method"
            )
        if self.header.kind == "activation":
            return
        elements = sum(statistic.elements for statistic in counted)
        total = sum(statistic.total for statistic in counted)
        squares = sum(statistic.squares for statistic in counted)
        if not total > 0 or not squares < float("inf"):
            raise InputError(f"{self.tensors.folder}: its Fisher is zero everywhere, or not finite")
        self.scale = (total / elements, squares**0.5)

    def fisher(self, name: str, start: int, stop: int) -> Fisher:
        """Rows of a weight's diagonal; zero for tokens that the model does not have."""
        read = partial(read_diagonal, self.tensors, name)
        if self.rows is None or name not in self.by_token:
            values = read(start, stop)
        else:
            own = self.rows[start:stop]
            known = gather(read, own[own >= 0])
            values = known.new_zeros(len(own), *known.shape[1:])
            values[own >= 0] = known
        statistic = self.header.statistics[name]
        return Fisher(values, statistic.total / statistic.elements, *self.scale)

    def activation(self, name: str, expert: int | None = None) -> Tensor:
        """Second moment of a linear layer's input, or of one expert's in a stack."""
        return self._finite(name, read_activation(self.tensors, self.header, name, expert))

    def kronecker(self, name: str) -> Kronecker:
        """Both factors of a linear layer's Fisher."""
        activation, gradient = read_kronecker(self.tensors, self.header, name)
        return Kronecker(self._finite(name, activation), self._finite(name, gradient), *self.scale)

    def _finite(self, name: str, moment: Tensor) -> Tensor:
        if not bool(moment.isfinite().all()):
            raise InputError(
                f"{self.tensors.folder}: tensor {name}: its second moments have NaN or Inf; "
                "estimate them again"
            )
        return moment

    def oriented(self, name: str, weight: Tensor) -> Tensor:
        """A weight as [out, in]; applied twice, as it was."""
        return oriented(self.header, name, weight)


def open_fishers(opened: ExitStack, inputs: Inputs, method: Method) -> dict[int, Sidecar]:
    """Each model's diagonal, by its number; those that have one, unless the method needs it."""
    needed = "fishers" in method.inputs
    if needed:
        _check_all_given(inputs, method)
    found = {}
    for number, place in inputs.sidecars.items():
        folder = hub.resolve(place)
        if needed or has_diagonal(folder):
            tensors, header = open_diagonal(folder)
            found[number] = _checked(opened, tensors, header, inputs, number)
    return found


def open_factors(opened: ExitStack, inputs: Inputs, method: Method) -> dict[int, Sidecar]:
    """Each model's second moments of linear layers, by its number, if the method needs them."""
    if not MATRICES & method.inputs.keys():
        return {}
    _check_all_given(inputs, method)
    found = {}
    for number, place in inputs.sidecars.items():
        folder = hub.resolve(place)
        halves = "activations" in method.inputs and has_stem(folder, "activation")
        tensors, header = open_sidecar(folder, "activation" if halves else "kronecker")
        found[number] = _checked(opened, tensors, header, inputs, number)
    return found


def _check_all_given(inputs: Inputs, method: Method) -> None:
    if lost := set(inputs.models) - inputs.sidecars.keys():
        raise UsageError(
            f"method {method.name} needs one --fisher for each of {len(inputs.models)} models, in "
            f"their order; {len(inputs.models) - len(lost)} given"
        )


def _checked(
    opened: ExitStack, tensors: Checkpoint, header: FisherHeader, inputs: Inputs, number: int
) -> Sidecar:
    opened.enter_context(tensors)
    several = ["give --fisher in the order of the models"] if len(inputs.sidecars) > 1 else []
    check_fits(tensors, header, inputs.sources[number], *several)
    return Sidecar(tensors, header)


def check_complete(sidecar: Sidecar, merged: Iterable[str]) -> None:
    """Raises InputError where it tells nothing of a weight that is to be merged by it."""
    if lost := sidecar.missing(merged):
        raise InputError(
            f"{sidecar.tensors.folder}: has no Fisher of {some(lost)}; estimate it of all tensors, "
            "or leave these out with --exclude"
        )
