"""The estimation loop: batches through a model, per-example gradients into statistics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fishertool.errors import InputError
from fishertool.fisher import labels as label_rules
from fishertool.fisher.diagonal import Diagonal
from fishertool.fisher.function_calls import FunctionCalls
from fishertool.fisher.gradients import Gradient
from fishertool.fisher.kronecker import InputMoments
from fishertool.fisher.labels import Labels
from fishertool.fisher.per_example import PerExampleGradients

SEED_STRIDE = 1_000_003
MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Batch:
    """Some examples, padded to one length."""

    inputs: Mapping[str, Tensor]
    """The model's keyword arguments, each with examples in front."""
    targets: Tensor
    """[example] classes, or [example, time] next tokens."""
    scored: Tensor
    """As `targets`: False where nothing is predicted (padding, the last position)."""
    examples: Sequence[int]
    """Which examples of the data these are."""
    rows_each: int = 1
    """Texts an example has. Where there are several, the model runs them as adjacent rows."""


class Statistic(Protocol):
    """What is gathered from per-example gradients."""

    def begin(self, examples: Sequence[int]) -> None:
        """Before each micro-batch: which examples it has. Once more, with none, after the last."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        """A parameter's gradients, [example] of this micro-batch; several times for several labels."""


@dataclass
class Pass:
    """What one pass over the data told besides the statistics."""

    examples: int = 0
    scored: int = 0
    """Predictions scored: examples, or tokens."""
    nll: float = 0.0
    """Sum of -log p(target) over what was scored."""
    one_by_one: bool = False
    by_autograd: list[str] = field(default_factory=list)
    """Parameters no layer rule serves; exact all the same."""
    tokens: dict[str, int] = field(default_factory=dict)
    """How many tokens each expert's weight saw, padding not counted."""
    untouched: list[str] = field(default_factory=list)
    """Parameters that take no part in what is scored: their gradient is zero."""

    @property
    def loss(self) -> float:
        return self.nll / self.scored


def estimate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    collate: Callable[[Sequence[int]], Batch],
    batches: Sequence[Sequence[int]],
    statistics: Sequence[Statistic],
    *,
    inputs: InputMoments | None = None,
    labels: Labels = "empirical",
    draws: int = 1,
    seed: int = 0,
    advance: Callable[[int], None] = lambda examples: None,
) -> Pass:
    """Run every batch forward and backward, and give `statistics` the per-example gradients of log p.

    A statistic that is quadratic in the gradients, summed over labels, becomes

        1/N sum_n sum_y q_n(y) (d log p(y | x_n) / d w)^2

    q is one at the data's label (`empirical`), 1/draws at each of `draws` labels drawn from the
    model (`sampled`; independently at every position of a sequence), or p itself (`expected`,
    classes only). A sequence is one example: log p is summed over its positions before anything
    is squared. The model is put in eval mode; nothing depends on how examples are batched.
    `inputs` sees the forward passes; with no other statistic, only those are run. `parameters` are
    the model's, or views of parts of them, by name.

    Raises InputError naming the example whose loss is not finite. Source: Matena and Raffel 2022,
    arXiv 2111.09832, section 3; Kunstner et al. 2019, arXiv 1905.12558 on the label choices.
    """
    model.eval()
    done = Pass()
    untouched = set(parameters) if statistics else set()
    with ExitStack() as hooks:
        gradients = None
        calls = hooks.enter_context(FunctionCalls(model, parameters))
        if inputs is not None:
            inputs.watch(calls)
            hooks.enter_context(inputs)
        if statistics:
            gradients = hooks.enter_context(PerExampleGradients(model, parameters, calls))
        else:
            hooks.enter_context(torch.no_grad())

        def consume(name: str, parts: Sequence[Gradient]) -> None:
            untouched.discard(name)
            for statistic in statistics:
                statistic.add(name, parts)

        if gradients is not None:
            telling = _telling(batches, collate)
            gradients.check(
                lambda copies: logits_of(model, collate([telling] * copies)),
                collate([telling]).rows_each,
            )
        for indices in batches:
            for batch in map(collate, _split(indices, gradients)):
                for statistic in statistics:
                    statistic.begin(batch.examples)
                masks = [batch.inputs[name] for name in MASKS if name in batch.inputs]
                watching = calls if gradients is None else gradients
                watching.begin(len(batch.examples), batch.rows_each, masks)
                if inputs is not None:
                    inputs.begin(masks)
                logits = logits_of(model, batch)
                if inputs is not None:
                    inputs.end()
                log_p = label_rules.log_probabilities(logits)
                done.nll += _loss(log_p, batch)
                done.scored += int(batch.scored.sum())
                if gradients is not None:
                    cotangents = _cotangents(log_p, batch, labels, draws, seed)
                    del log_p
                    for cotangent, last in _mark_last(cotangents):
                        gradients.backward(logits, cotangent, consume, retain_graph=not last)
                    del cotangents, cotangent
                del logits  # or this graph would outlive the next forward pass
                done.examples += len(batch.examples)
                advance(len(batch.examples))
    for statistic in statistics:
        statistic.begin([])
    done.untouched = sorted(untouched)
    if not done.scored:
        raise InputError("nothing is predicted in the data: no text has two tokens")
    done.tokens = calls.tokens_by_name(parameters)
    if gradients is not None:
        done.one_by_one, done.by_autograd = gradients.one_by_one, sorted(gradients.by_autograd)
    return done


@dataclass
class Estimate(Pass):
    diagonal: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, float32: the mean over examples of squared gradients of log p."""


def estimate_diagonal(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    collate: Callable[[Sequence[int]], Batch],
    order: Sequence[int],
    batch_size: int,
    **options: Any,
) -> Estimate:
    """The diagonal alone, of the examples in this order; `options` are those of `estimate`."""
    diagonal = Diagonal({name: parameter.detach() for name, parameter in parameters.items()})
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = estimate(model, parameters, collate, batches, [diagonal], **options)
    return Estimate(**vars(done), diagonal=diagonal.mean(done.examples))


def _telling(batches: Sequence[Sequence[int]], collate: Callable[[Sequence[int]], Batch]) -> int:
    """The last example with more than one position, by which layouts of a batch can be told apart."""
    latest_first = (index for indices in reversed(batches) for index in reversed(indices))
    for index in latest_first:
        if any(value.numel() > 1 for value in collate([index]).inputs.values()):
            return index
    return batches[-1][-1]


def _split(
    indices: Sequence[int], gradients: PerExampleGradients | None
) -> Iterable[Sequence[int]]:
    return [[i] for i in indices] if gradients is not None and gradients.one_by_one else [indices]


def _cotangents(
    log_p: Tensor, batch: Batch, labels: Labels, draws: int, seed: int
) -> Iterable[Tensor]:
    if labels == "empirical":
        return [label_rules.empirical(log_p, batch.targets, batch.scored)]
    if labels == "sampled":
        seeds = [seed * SEED_STRIDE + example for example in batch.examples]
        return label_rules.sampled(log_p, batch.scored, seeds, draws)
    return label_rules.expected(log_p)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.inputs).logits
    return logits


def _loss(log_p: Tensor, batch: Batch) -> float:
    values = -log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    values = torch.where(batch.scored, values, 0.0)
    for example, value in zip(batch.examples, values, strict=True):
        if not value.isfinite().all():
            raise InputError(f"example {example}: the model's loss on it is not finite")
    return float(values.double().sum())


def _mark_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each item, and whether it is the last: the graph is freed with the last backward pass."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True
