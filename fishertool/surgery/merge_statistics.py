"""The sidecars of a merge: opened, checked against their models, and read piece by piece."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from fishertool import hub
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.header import FisherHeader
from fishertool.merging.method import Fisher
from fishertool.registry import Method
from fishertool.sidecar import check_fits, has_diagonal, open_diagonal, read_diagonal
from fishertool.surgery.merge_inputs import Inputs


@dataclass
class Sidecar:
    """One kind of one model's sidecar."""

    tensors: Checkpoint
    header: FisherHeader
    scale: tuple[float, float] = field(default=(1.0, 1.0))
    """Mean and L2 norm of the diagonal over the merged weights."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those weights that it should tell about and does not."""
        known = {*self.header.statistics, *self.header.without}
        return [name for name in names if name not in known]

    def knows(self, name: str) -> bool:
        return name in self.header.statistics

    def measure(self, merged: Iterable[str]) -> None:
        """Find the scale over these weights. Raises InputError for a Fisher of nothing but zeros."""
        counted = [self.header.statistics[name] for name in merged if self.knows(name)]
        elements = sum(statistic.elements for statistic in counted)
        total = sum(statistic.total for statistic in counted)
        squares = sum(statistic.squares for statistic in counted)
        if not total > 0 or not squares < float("inf"):
            raise InputError(f"{self.tensors.folder}: its Fisher is zero everywhere, or not finite")
        self.scale = (total / elements, squares**0.5)

    def fisher(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Fisher:
        """Rows of a weight's diagonal."""
        values = read_diagonal(self.tensors, name, start, stop).to(dtype)
        if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
            raise InputError(
                f"{self.tensors.where(name)}: a Fisher must be finite and not negative"
            )
        statistic = self.header.statistics[name]
        return Fisher(values, statistic.total / statistic.elements, *self.scale)


def open_fishers(opened: ExitStack, inputs: Inputs, method: Method) -> dict[int, Sidecar]:
    """Each model's diagonal, by its number; those that have none, unless the method needs it."""
    needed = "fishers" in method.inputs
    if needed and (lost := set(inputs.models) - inputs.sidecars.keys()):
        raise UsageError(
            f"method {method.name} needs one --fisher for each of {len(inputs.models)} models, in "
            f"their order; {len(inputs.models) - len(lost)} given"
        )
    found = {}
    for number, place in inputs.sidecars.items():
        folder = hub.resolve(place)
        if not needed and not has_diagonal(folder):
            continue
        tensors, header = open_diagonal(folder)
        opened.enter_context(tensors)
        check_fits(tensors, header, inputs.sources[number])
        found[number] = Sidecar(tensors, header)
    return found


def check_complete(sidecar: Sidecar, merged: Iterable[str]) -> None:
    """Raises InputError where it tells nothing of a weight that is to be merged by it."""
    if lost := sidecar.missing(merged):
        raise InputError(
            f"{sidecar.tensors.folder}: has no Fisher of {some(lost)}; estimate it of all tensors, "
            "or leave these out with --exclude"
        )
