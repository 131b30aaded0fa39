"""The estimation loop: batches through a model, per-example gradients into statistics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fishertool.errors import InputError
from fishertool.fisher import labels as label_rules
from fishertool.fisher.agreement import equal_but_for_rounding
from fishertool.fisher.apart import picks, with_calls
from fishertool.fisher.batches import Batch, logits_of
from fishertool.fisher.function_calls import FunctionCalls
from fishertool.fisher.gradients import Gradient
from fishertool.fisher.kronecker import InputMoments
from fishertool.fisher.labels import Labels
from fishertool.fisher.per_example import PerExampleGradients
from fishertool.fisher.signed import SignedGradients
from fishertool.fisher.sums import Groups, Sums

Estimator = Literal["exact", "signed"]


class Statistic(Protocol):
    """What is gathered from per-example gradients."""

    @property
    def groups(self) -> Groups:
        """All it knows, in sums that add up over workers; complete after `begin([])`."""

    def begin(self, examples: Sequence[int]) -> None:
        """Before each micro-batch: which examples it has. Once more, with none, after the last."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        """A parameter's gradients, [example] of this micro-batch; several times for several labels."""


def _counters() -> Sums:
    names = ("examples", "tokens", "scored", "nll", "skipped")
    return {name: torch.zeros((), dtype=torch.float64) for name in names}


@dataclass
class Pass:
    """What passes over the data told besides the statistics."""

    sums: Sums = field(default_factory=_counters)
    one_by_one: bool = False
    by_autograd: set[str] = field(default_factory=set)
    """Parameters no layer rule serves; exact all the same."""
    touched: set[str] = field(default_factory=set)
    """Parameters that take part in what is scored; the others have no gradient."""
    tokens: Sums = field(default_factory=dict)
    """How many tokens each expert's weight saw, padding not counted."""

    @property
    def examples(self) -> int:
        return int(self.sums["examples"])

    @property
    def tokens_read(self) -> int:
        """Of the examples that took part."""
        return int(self.sums["tokens"])

    @property
    def scored(self) -> int:
        """Predictions scored: examples, or tokens."""
        return int(self.sums["scored"])

    @property
    def skipped(self) -> int:
        """Examples left out because the loss on them is not finite."""
        return int(self.sums["skipped"])

    @property
    def loss(self) -> float:
        """Mean of -log p(target) over what was scored, rounded to float32: the last bits depend on
        how the work was divided."""
        return float((self.sums["nll"] / self.sums["scored"]).float())


def estimate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    collate: Callable[[Sequence[int]], Batch],
    units: Iterable[Sequence[Sequence[int]]],
    statistics: Sequence[Statistic],
    *,
    probe: int,
    longer: int | None = None,
    inputs: InputMoments | None = None,
    labels: Labels = "empirical",
    draws: int = 1,
    seed: int = 0,
    estimator: Estimator = "exact",
    shards: int = 1,
    skip_nonfinite: bool = False,
    done: Pass | None = None,
    after: Callable[[Pass], bool] = lambda done: False,
    advance: Callable[[int], None] = lambda examples: None,
) -> Pass:
    """Run every batch forward and backward, and give `statistics` the per-example gradients of log p.

    A statistic that is quadratic in the gradients, summed over labels, becomes

        1/N sum_n sum_y q_n(y) (d log p(y | x_n) / d w)^2

    q is one at the data's label (`empirical`), 1/draws at each of `draws` labels drawn from the
    model (`sampled`; independently at every position of a sequence), or p itself (`expected`,
    classes only; `expected-signed`, in expectation over random signs, for any vocabulary). A
    sequence is one example: log p is summed over its positions before anything is squared; so is
    a query with its documents, whose texts are rows of one example. The model is put in eval
    mode; nothing depends on how examples are batched.

    parameters  the model's, or views of parts of them, by name
    units       runs of batches; after each one the statistics are complete, and `after` is
                called, which stops the pass by True
    probe       an example (a short one) by which the layer rules are held against autograd
    longer      one beside which the probe is padded, to see whether that changes what the model
                gives; None where no example is padded
    inputs      sees the forward passes; with no other statistic, only those are run
    estimator   `signed`: one signed gradient a batch in place of every example's; unbiased
    shards      processes over which the model is sharded. Each calls this with as many batches,
                of which some may be empty; those of one step make one signed gradient
    skip_nonfinite  leaves out examples whose loss is not finite, at the cost of a second forward
                pass each batch
    done        what earlier passes told, to be added to

    Raises InputError naming the example whose loss is not finite. Source: Matena and Raffel 2022,
    arXiv 2111.09832, section 3; Kunstner et al. 2019, arXiv 1905.12558 on the label choices.
    """
    model.eval()
    done = Pass() if done is None else done
    with ExitStack() as hooks:
        gradients: PerExampleGradients | SignedGradients | None = None
        watched = parameters if shards == 1 else {}  # layers in shards cannot be tried out
        calls = hooks.enter_context(FunctionCalls(model, watched))
        if inputs is not None:
            hooks.enter_context(inputs.watching(calls))
        if not statistics:
            hooks.enter_context(torch.no_grad())
        elif estimator == "signed":
            gradients = hooks.enter_context(SignedGradients(model, parameters, seed, shards))
        else:
            gradients = hooks.enter_context(PerExampleGradients(model, parameters, calls))
        one_by_one, rows = False, collate([probe]).rows_each
        if gradients is not None:
            gradients.check(
                lambda copies: logits_of(model, collate([probe] * copies)),
                rows,
                None if longer is None else lambda: logits_of(model, collate([probe, longer]))[:1],
            )
            one_by_one = gradients.one_by_one
            done.by_autograd |= gradients.by_autograd
        elif longer is not None and shards == 1:  # processes with shards run as many batches

            def run(indices: Sequence[int]) -> Tensor:
                batch = collate(indices)
                calls.begin(len(indices), batch.rows_each, batch.masks, counting=False)
                return logits_of(model, batch)

            alone, called = with_calls(lambda: run([probe]))
            one_by_one = not equal_but_for_rounding(alone, run([probe, longer])[:1])
            one_by_one |= calls.mixed or picks(model, calls.rules, called, rows)
        done.one_by_one |= one_by_one
        rule = label_rules.rule(labels, draws, seed)
        batches = _Batches(model, calls, gradients, inputs, statistics, rule, done)

        def batch_of(indices: Sequence[int]) -> Batch:
            return collate(indices) if indices else collate([probe]).emptied()

        for unit in units:
            for indices in unit:
                for part in _split(indices, one_by_one, shards):
                    kept = batches.finite(batch_of(part)) if skip_nonfinite else part
                    done.sums["skipped"] += len(part) - len(kept)
                    if kept or shards > 1:  # whoever shares a weight runs every step
                        batches.run(batch_of(kept))
                advance(len(indices))
            for statistic in statistics:
                statistic.begin([])
            calls.add_tokens(parameters, done.tokens)
            if after(done):
                break
    return done


@dataclass(frozen=True)
class _Batches:
    """What is done with every batch, while the hooks are in place."""

    model: nn.Module
    calls: FunctionCalls
    gradients: PerExampleGradients | SignedGradients | None
    inputs: InputMoments | None
    statistics: Sequence[Statistic]
    cotangents: label_rules.Rule
    done: Pass

    def run(self, batch: Batch) -> None:
        """Forward and backward; everything is gathered."""
        units = self._begin(batch)
        for statistic in self.statistics:
            statistic.begin(units)
        if self.inputs is not None:
            self.inputs.begin(batch.masks)
        logits = logits_of(self.model, batch)
        batch = batch.beside(logits)
        if self.inputs is not None:
            self.inputs.end()
        log_p = label_rules.log_probabilities(logits)
        losses = _losses(log_p, batch)
        _check_finite(losses, batch)
        self.done.sums["nll"] += losses.sum().cpu()
        self.done.sums["scored"] += batch.scored.sum().cpu()
        if self.gradients is not None:
            cotangents = self.cotangents(log_p, batch.targets, batch.scored, batch.examples)
            del log_p
            for cotangent, last in _mark_last(cotangents):
                self.gradients.backward(logits, cotangent, self._consume, retain_graph=not last)
        self.done.sums["examples"] += len(batch.examples)
        self.done.sums["tokens"] += batch.tokens

    def finite(self, batch: Batch) -> list[int]:
        """The examples whose loss is finite, by a forward pass alone."""
        self._begin(batch, counting=False)
        with torch.no_grad():
            logits = logits_of(self.model, batch)
        losses = _losses(label_rules.log_probabilities(logits), batch.beside(logits))
        finite = losses.isfinite().tolist()  # one more than examples, where there are none
        return [n for n, is_finite in zip(batch.examples, finite, strict=False) if is_finite]

    def _begin(self, batch: Batch, counting: bool = True) -> Sequence[int]:
        self.calls.begin(len(batch.examples), batch.rows_each, batch.masks, counting)
        if self.gradients is None:
            return batch.examples
        return self.gradients.begin(batch.examples, batch.rows_each)

    def _consume(self, name: str, parts: Sequence[Gradient]) -> None:
        self.done.touched.add(name)
        for statistic in self.statistics:
            statistic.add(name, parts)


def _split(indices: Sequence[int], one_by_one: bool, shards: int) -> Iterable[Sequence[int]]:
    if one_by_one:
        return [[index] for index in indices]
    return [indices] if indices or shards > 1 else []


def _losses(log_p: Tensor, batch: Batch) -> Tensor:
    """-log p of the targets, float64, [example]; only what is scored."""
    values = -log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    scored = torch.where(batch.scored, values, 0.0).double()
    return scored.reshape(len(scored), -1).sum(1)


def _check_finite(losses: Tensor, batch: Batch) -> None:
    if bool(losses.sum().isfinite()):
        return
    number = losses.isfinite().tolist().index(False)
    raise InputError(
        f"example {batch.examples[number]}: the model's loss on it is not finite; "
        "estimate-fisher --skip-nonfinite leaves such examples out and counts them"
    )


def _mark_last(items: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each item, and whether it is the last: the graph is freed with the last backward pass."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True
