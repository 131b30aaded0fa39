"""What each kind of Fisher stores: its tensors, by weight and part, and their statistics."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fishertool.fisher.diagonal import Diagonal
from fishertool.fisher.estimate import Statistic
from fishertool.fisher.factored import Factored, marginals
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.header import TensorStatistics, statistics_of
from fishertool.fisher.kronecker import InputMoments, OutputMoments, mirrored
from fishertool.fisher.mean_gradient import MeanGradient
from fishertool.fisher.moments import TraceMoments
from fishertool.fisher.sums import Complete, Groups, Sums, all_here

KINDS = ("diagonal", "factored", "kronecker", "activation", "mean-gradient", "rank-one")
MOMENTS = ("kronecker", "activation")
"""They have second moments of layers, by weight and side."""
NO_FISHER = ("activation", "mean-gradient")
"""They have no trace."""


@dataclass(frozen=True)
class Stored:
    """One kind of Fisher as a sidecar holds it.

    A tensor is named as its weight; where a weight has several, `#` and the part follow: `rows`
    and `columns` (factored), `input` and `output` (Kronecker; `input` alone for activation).
    """

    tensors: Mapping[str, Tensor]
    statistics: Mapping[str, TensorStatistics]
    leaders: Mapping[str, str] = field(default_factory=dict)


class Gathering:
    """The statistics that some kinds need, gathered in one pass over the data.

    A factored Fisher costs nothing beside a diagonal, and is then taken from it. The sums of a
    diagonal or mean may be kept elsewhere than its weights, `accumulate_on` a device.
    """

    def __init__(
        self,
        kinds: Collection[str],
        parameters: Mapping[str, Tensor],
        bank: GradientBank | None = None,
        accumulate_on: str | None = None,
    ):
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        self.kinds = kinds
        self.inputs: InputMoments | None = None
        self._elements = {name: value.numel() for name, value in values.items()}
        self._diagonal: Diagonal | Factored | None = None
        self._outputs: OutputMoments | None = None
        self._mean: MeanGradient | None = None
        if "diagonal" in kinds:
            self._diagonal = Diagonal(values, accumulate_on)
        elif "factored" in kinds:
            self._diagonal = Factored(values)
        if "kronecker" in kinds or "activation" in kinds:
            self.inputs = InputMoments(parameters, stacks="activation" in kinds)
        if "kronecker" in kinds:
            self._outputs = OutputMoments()
        if "mean-gradient" in kinds:
            self._mean = MeanGradient(values, accumulate_on)
        self.statistics: list[Statistic] = [
            one for one in (self._diagonal, self._outputs, self._mean, bank) if one is not None
        ]
        self.groups: Groups = {
            group: sums
            for one in (self.inputs, *self.statistics)
            if one is not None
            for group, sums in one.groups.items()
        }

    @property
    def traces(self) -> TraceMoments:
        """Those of a diagonal or factored Fisher; one of them must be among the kinds."""
        assert self._diagonal is not None
        return self._diagonal.traces

    @property
    def rows(self) -> Sums:
        """Of these sums, a process has the rows of its shard where weights are sharded."""
        diagonal = self._diagonal
        assert diagonal is not None
        return diagonal.sums if isinstance(diagonal, Diagonal) else diagonal.rows

    def stored(self, examples: int, complete: Complete = all_here) -> dict[str, Stored]:
        """By kind; a bank has been handed on already."""
        found: dict[str, Stored] = {}
        if isinstance(self._diagonal, Diagonal):
            found["diagonal"] = stored_diagonal(self._diagonal, examples, complete)
        if self._diagonal is not None and "factored" in self.kinds:
            found["factored"] = stored_factored(self._diagonal, examples, complete)
        if self.inputs is not None and self._outputs is not None:
            found["kronecker"] = stored_kronecker(self.inputs, self._outputs, examples)
        if self.inputs is not None and "activation" in self.kinds:
            found["activation"] = stored_activation(self.inputs, self._elements)
        if self._mean is not None:
            found["mean-gradient"] = stored_mean(self._mean, examples)
        return found


def stored_diagonal(diagonal: Diagonal, examples: int, complete: Complete) -> Stored:
    tensors = diagonal.mean(examples, complete)
    errors = diagonal.traces.standard_errors(examples)
    return Stored(
        tensors,
        {name: statistics_of(value, errors[name]) for name, value in tensors.items()},
    )


def stored_factored(source: Factored | Diagonal, examples: int, complete: Complete) -> Stored:
    """From its own sums, or from a diagonal of the same pass."""
    if isinstance(source, Factored):
        sums = source.mean(examples, complete)
    else:
        means = source.mean(examples, complete)
        sums = {name: marginals(value) for name, value in means.items()}
    tensors: dict[str, Tensor] = {}
    statistics: dict[str, TensorStatistics] = {}
    errors = source.traces.standard_errors(examples)
    for name, (rows, columns) in sums.items():
        error = errors[name]
        if columns is None:
            tensors[name], statistics[name] = rows, statistics_of(rows, error)
            continue
        tensors |= {f"{name}#rows": rows, f"{name}#columns": columns}
        by_row, by_column = statistics_of(rows), statistics_of(columns)
        squares = by_row.squares * by_column.squares / (by_row.total**2 or 1.0)
        elements = len(rows) * len(columns)
        statistics[name] = TensorStatistics(elements, by_row.total, squares, error)
    return Stored(tensors, statistics)


def stored_kronecker(inputs: InputMoments, outputs: OutputMoments, examples: int) -> Stored:
    """A and B as means over tokens; F is about (tokens an example) A kron B."""
    tensors: dict[str, Tensor] = {}
    statistics: dict[str, TensorStatistics] = {}
    for name, total in outputs.sums.items():
        leader = inputs.leader[name]
        tokens = float(inputs.tokens[leader])
        if f"{leader}#input" not in tensors:
            tensors[f"{leader}#input"] = mirrored(inputs.sums[leader], tokens)
        a = tensors[f"{leader}#input"]
        b = tensors[f"{name}#output"] = mirrored(total, tokens)
        scale = tokens / examples
        on_a, on_b = statistics_of(a.diagonal()), statistics_of(b.diagonal())
        statistics[name] = TensorStatistics(
            len(a) * len(b),
            scale * on_a.total * on_b.total,
            scale**2 * on_a.squares * on_b.squares,
        )
    return Stored(tensors, statistics, {name: inputs.leader[name] for name in outputs.sums})


def stored_activation(inputs: InputMoments, elements: Mapping[str, int]) -> Stored:
    """A alone; it is no Fisher, and has no trace."""
    return Stored(
        {
            f"{name}#input": mirrored(total, inputs.tokens[name])
            for name, total in inputs.sums.items()
        },
        {name: TensorStatistics(elements[name]) for name in inputs.leader},
        dict(inputs.leader),
    )


def stored_mean(gradient: MeanGradient, examples: int) -> Stored:
    """Its squares are those of the mean; it is no Fisher, and has no trace."""
    tensors = gradient.mean(examples)
    return Stored(
        tensors,
        {name: replace(statistics_of(value), total=0.0) for name, value in tensors.items()},
    )
