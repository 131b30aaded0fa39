"""The estimation loop: batches through a model, squared per-example gradients into a diagonal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishertool.errors import InputError
from fishertool.fisher import labels as label_rules
from fishertool.fisher.diagonal import Diagonal
from fishertool.fisher.labels import Labels
from fishertool.fisher.per_example import PerExampleGradients

SEED_STRIDE = 1_000_003


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


@dataclass(frozen=True)
class Estimate:
    diagonal: dict[str, Tensor]
    """By parameter name, float32: the mean over examples of squared gradients of log p."""
    examples: int
    scored: int
    """Predictions scored: examples, or tokens."""
    loss: float
    """Mean of -log p(target) over what was scored."""
    one_by_one: bool
    by_autograd: list[str]
    """Parameters no layer rule serves; exact all the same."""


def estimate_diagonal(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    collate: Callable[[Sequence[int]], Batch],
    order: Sequence[int],
    batch_size: int,
    *,
    labels: Labels = "empirical",
    draws: int = 1,
    seed: int = 0,
    advance: Callable[[int], None] = lambda examples: None,
) -> Estimate:
    """The diagonal of the Fisher, exact: each example's gradient is squared before any sum.

        F_j = 1/N sum_n sum_y q_n(y) (d log p(y | x_n) / d w_j)^2

    q is one at the data's label (`empirical`), 1/draws at each of `draws` labels drawn from the
    model (`sampled`; independently at every position of a sequence), or p itself (`expected`,
    classes only). A sequence is one example: log p is summed over its positions, then the
    gradient squared. The model is put in eval mode; the result does not depend on `batch_size`.

    Raises InputError naming the example whose loss is not finite. Source: Matena and Raffel 2022,
    arXiv 2111.09832, section 3; Kunstner et al. 2019, arXiv 1905.12558 on the label choices.
    """
    model.eval()
    scored, loss, done = 0, 0.0, 0
    with PerExampleGradients(model, parameters) as gradients:
        gradients.check(lambda copies: logits_of(model, collate([order[-1]] * copies)))
        size = 1 if gradients.one_by_one else batch_size
        total = Diagonal({name: parameter.detach() for name, parameter in parameters.items()})
        for start in range(0, len(order), size):
            batch = collate(order[start : start + size])
            gradients.begin(len(batch.examples))
            logits = logits_of(model, batch)
            log_p = label_rules.log_probabilities(logits)
            loss += _loss(log_p, batch)
            scored += int(batch.scored.sum())
            cotangents: Iterable[Tensor]
            if labels == "empirical":
                cotangents = [label_rules.empirical(log_p, batch.targets, batch.scored)]
            elif labels == "sampled":
                seeds = [seed * SEED_STRIDE + example for example in batch.examples]
                cotangents = label_rules.sampled(log_p, batch.scored, seeds, draws)
            else:
                cotangents = label_rules.expected(log_p)
            del log_p
            for cotangent, last in _mark_last(cotangents):
                gradients.backward(logits, cotangent, total.add, retain_graph=not last)
            del logits, cotangent, cotangents  # or this graph would outlive the next forward pass
            done += len(batch.examples)
            advance(len(batch.examples))
    if not scored:
        raise InputError("nothing is predicted in the data: no text has two tokens")
    return Estimate(
        total.mean(done),
        done,
        scored,
        loss / scored,
        gradients.one_by_one,
        sorted(gradients.by_autograd),
    )


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
