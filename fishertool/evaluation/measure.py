"""Run a model over data and measure it, alone or against another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan

import torch
from torch import Tensor

from fishertool import calibration
from fishertool.calibration import CalibrationData, DataOptions, Example, Form
from fishertool.calibration.forms import FORMS
from fishertool.errors import InputError, UsageError
from fishertool.evaluation.agreement import divergence, same_top
from fishertool.evaluation.classification import classification_metrics
from fishertool.evaluation.comparison import Labels, class_order
from fishertool.evaluation.embedding import measure_embedding
from fishertool.evaluation.perplexity import blocks, perplexity_metrics
from fishertool.fisher.batches import Batch, logits_of
from fishertool.fisher.labels import log_probabilities
from fishertool.models.loading import LoadedModel
from fishertool.models.padding import ALONE, padding_matters
from fishertool.models.tasks import Task, collate

HIGHER_IS_BETTER = {
    "accuracy": True,
    "macro_f1": True,
    "top1_agreement": True,
    "ndcg_at_10": True,
    "mrr": True,
    "sts_spearman": True,
    "mean_cosine": True,
    "loss": False,
    "perplexity": False,
    "bits_per_byte": False,
    "kl": False,
}
OF_TWO = ("kl", "top1_agreement", "mean_cosine")
"""Measured between two models."""
MEASURED = ("sequence-classification", "token-classification", "causal-lm", "embedding")


def metrics_of(task: Task, options: DataOptions) -> tuple[str, ...]:
    """The metrics of one model that `measure` gives, its loss or main one first."""
    if task.name == "embedding":
        return (
            ("sts_spearman",) if options.score_column is not None else ("loss", "ndcg_at_10", "mrr")
        )
    if task.has_labels:
        return ("loss", "accuracy", "macro_f1")
    return ("loss", "perplexity", "bits_per_byte")


def metrics_of_two(task: Task) -> tuple[str, ...]:
    """The metrics that a second model adds."""
    return ("mean_cosine",) if task.name == "embedding" else ("kl", "top1_agreement")


def form_of(task: Task, options: DataOptions) -> Form:
    """What the data look like by which the task is measured."""
    pairs = task.name == "embedding" and options.score_column is not None
    return FORMS["scored pairs"] if pairs else task.form


def check_measured(task: Task, options: DataOptions) -> DataOptions:
    """The options as the form resolves them.

    Raises UsageError for a task that is not measured, and for flags it has no use for.
    """
    if task.name not in MEASURED:
        raise UsageError(f"{task.name} is not measured yet; measured are {', '.join(MEASURED)}")
    if options.mask_prompt:
        raise UsageError("--mask-prompt is not for measuring, which scores whole texts")
    form = form_of(task, options)
    if form is not task.form and options.text_pair_column is None:
        raise UsageError(
            "--score-column: give the two sentences in --text-column and --text-pair-column"
        )
    return form.resolve(options, task.name)


def load(task: Task, options: DataOptions, model: LoadedModel) -> CalibrationData:
    """Read the data by resolved options; the texts of a language model whole."""
    return calibration.load(
        options,
        model.tokenizer,
        model.max_length,
        model.labels,
        form_of(task, options),
        need_labels=task.has_labels,
        long_texts="keep" if task.name == "causal-lm" else "cut",
    )


def prepare(task: Task, data: CalibrationData) -> CalibrationData:
    """Data as `measure` takes it: texts of a language model cut into blocks."""
    if task.name != "causal-lm":
        return data
    examples = [block for text in data.examples for block in blocks(text, data.max_length)]
    if not examples:
        raise InputError(f"{data.name}: no text has two tokens, so nothing can be predicted")
    return replace(data, examples=examples)


@torch.no_grad()
def measure(
    model: LoadedModel,
    task: Task,
    data: CalibrationData,
    *,
    against: LoadedModel | None = None,
    labels: Labels = None,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda examples: None,
    warn: Callable[[str], None] = lambda told: None,
) -> dict[str, float]:
    """Metrics of the task (see HIGHER_IS_BETTER), over data from `prepare`.

    With `against`, also kl, the mean KL(against || model) over predictions, and top1_agreement.
    Every mean is over predictions: texts of a classifier, words of one that labels words, tokens
    of a language model. An embedding model has no predictions: see `measure_embedding`. `labels`
    are those by which the data were read, if not the model's own: classes go by their names. A
    prediction that is NaN makes every metric of its model NaN. Where padding matters to a model,
    examples go one at a time, and `warn` is told. Raises InputError for models of other classes or
    vocabularies.
    """
    if task.name == "embedding":
        return measure_embedding(
            model, data, against=against, batch_size=batch_size, advance=advance, warn=warn
        )
    models = [model] if against is None else [model, against]
    if batch_size > 1 and any(_sees_padding(one, task, data.examples) for one in models):
        batch_size = 1
        warn(ALONE)
    order = sorted(range(len(data.examples)), key=lambda index: -data.examples[index].length)
    log_ps: list[Tensor] = []
    targets: list[Tensor] = []
    nll, scored, kl, agreed = 0.0, 0, 0.0, 0.0
    labels = model.labels if labels is None else labels
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = _collated(model, task, data.examples, some)
        log_p = _predictions(model, batch, labels)
        target = batch.targets[batch.scored]
        scored += len(target)
        if task.has_labels:
            log_ps.append(log_p)
            targets.append(target)
        nll -= float(log_p.gather(-1, target.unsqueeze(-1)).double().sum())
        if against is not None:
            batch = _collated(against, task, data.examples, some)
            original = _predictions(against, batch, labels)
            if original.shape != log_p.shape:
                raise InputError(
                    f"the two models predict {log_p.shape[-1]} and {original.shape[-1]} classes "
                    "or tokens; they cannot be compared"
                )
            kl += float(divergence(original, log_p).double().sum())
            agreed += float(same_top(original, log_p).sum())
        advance(len(some))
    if task.has_labels:
        metrics = classification_metrics(torch.cat(log_ps), torch.cat(targets))
    else:
        text_bytes = sum(example.text_bytes for example in data.examples)
        metrics = perplexity_metrics(nll, scored, text_bytes)
    if against is not None:
        kl = max(kl, 0.0)  # rounding alone takes that of equal models below
        metrics |= {"kl": kl / scored, "top1_agreement": agreed / scored}
    return metrics


def _sees_padding(model: LoadedModel, task: Task, examples: Sequence[Example]) -> bool:
    def run(some: Sequence[Example]) -> Tensor:
        return logits_of(model.module, _collated(model, task, some, range(len(some))))

    return padding_matters(run, examples)


def _collated(
    model: LoadedModel, task: Task, examples: Sequence[Example], some: Sequence[int]
) -> Batch:
    return collate(task, examples, some, model.pad_id, str(model.device))


def _predictions(model: LoadedModel, batch: Batch, labels: Labels) -> Tensor:
    """Log-probabilities where something is predicted, [prediction, class], of classes in the order
    of `labels`; all NaN where one is. A logit of -inf is a class that the model rules out."""
    log_p = log_probabilities(logits_of(model.module, batch)[batch.scored])
    log_p[log_p.isnan().any(-1)] = nan
    order = class_order(labels, model.labels)
    return log_p if order is None else log_p[:, order]
