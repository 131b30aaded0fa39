"""The sums of one part of an estimate, held against what its job says that they must be."""

from collections.abc import Mapping

from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.estimation.partial import Partial
from fishertool.fisher.kinds import MOMENTS
from fishertool.fisher.sums import SEPARATOR


def check_sums(tensors: Checkpoint, partial: Partial, empty: Mapping[str, Tensor]) -> None:
    """Raises InputError for a sum that is absent, of another shape, or none of the job's.

    empty   what a worker of the job begins with, by `group:name`; moments and the tokens of experts
            come to these as layers are seen
    """
    expected = {name: tuple(value.shape) for name, value in empty.items()} | _moments(partial)
    seen = {name: info.shape for name, info in tensors.infos().items()}
    wrong = {name for name, shape in expected.items() if seen.get(name) != shape}
    wrong |= {name for name in seen.keys() - expected.keys() if not _may_be(name, partial, seen)}
    if wrong:
        raise InputError(
            f"{tensors.folder}: lacks sums of its estimate, or has others: {some(sorted(wrong))}; "
            "estimate it again"
        )


def _moments(partial: Partial) -> dict[str, tuple[int, ...]]:
    """Those of inputs, of which a part says whose it has."""
    found: dict[str, tuple[int, ...]] = {}
    if not set(MOMENTS) & set(partial.job.kinds):
        return found
    for leader in set(partial.progress.leaders.values()):
        stack, (_, width) = _sides(partial, leader)
        found |= {_key("inputs", leader): (*stack, width, width), _key("tokens", leader): stack}
    return found


def _may_be(name: str, partial: Partial, seen: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it is a moment of outputs, or the tokens of an expert, as a part may have one."""
    group, _, weight = name.partition(SEPARATOR)
    if group == "expert-tokens":
        return weight in partial.job.shapes and not seen[name]
    if group != "outputs" or weight not in partial.progress.leaders:
        return False
    stack, (out, _) = _sides(partial, weight)
    return not stack and seen[name] == (out, out) and "kronecker" in partial.job.kinds


def _sides(partial: Partial, weight: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Experts in a stack, and outputs and inputs, of a linear layer's weight."""
    *stack, out, width = partial.job.shapes[weight]
    if weight in partial.progress.transposed:
        out, width = width, out
    return tuple(stack), (out, width)


def _key(group: str, name: str) -> str:
    return f"{group}{SEPARATOR}{name}"
