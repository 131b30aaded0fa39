"""An embedding model, measured by retrieval and loss on queries, or by scored pairs of sentences."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import nan

import torch
from torch import Tensor

from fishertool.calibration import CalibrationData, Example
from fishertool.errors import InputError
from fishertool.evaluation.correlation import spearman
from fishertool.evaluation.retrieval import ndcg, ranks_of_relevant, reciprocal_rank
from fishertool.fisher.labels import log_probabilities
from fishertool.models.loading import LoadedModel
from fishertool.models.vectors import Inputs, vectors_of

QUERIES = 256
"""Whose scores of the whole corpus are in memory at a time."""


class Texts:
    """Every text of the data once, by its tokens: what reads the same is the same document."""

    def __init__(self, examples: Sequence[Example]):
        self.inputs: list[Inputs] = []
        self._places: dict[tuple[tuple[int, ...], ...], int] = {}
        self.of = [[self._place(text) for text in example.texts] for example in examples]
        """The texts of each example: a query and its documents, or two sentences."""

    def _place(self, text: Inputs) -> int:
        key = tuple(tuple(ids) for _, ids in sorted(text.items()))
        if key not in self._places:
            self._places[key] = len(self.inputs)
            self.inputs.append(text)
        return self._places[key]


def measure_embedding(
    model: LoadedModel,
    data: CalibrationData,
    *,
    against: LoadedModel | None,
    batch_size: int,
    advance: Callable[[int], None],
    warn: Callable[[str], None],
) -> dict[str, float]:
    """ndcg_at_10, mrr and loss of queries, or sts_spearman of sentences with a score.

    The corpus is every document of the data, positive or negative. With `against`, also
    mean_cosine, between the two models' vectors of the same text, over all texts. With a vector
    that is not finite all are NaN. Raises InputError where the two have different dimensions.
    """
    texts = Texts(data.examples)
    vectors = vectors_of(model, texts.inputs, batch_size, warn=warn)
    if data.examples[0].score is not None:
        metrics = {"sts_spearman": _sts_spearman(vectors, texts, data.examples)}
    else:
        assert model.scale is not None
        metrics = {**_retrieval(vectors, texts), "loss": _loss(vectors, texts, model.scale)}
    if not vectors.isfinite().all():
        metrics = dict.fromkeys(metrics, nan)
    if against is not None:
        others = vectors_of(against, texts.inputs, batch_size, warn=warn)
        if others.shape != vectors.shape:
            raise InputError(
                f"the two models' vectors have {vectors.shape[1]} and {others.shape[1]} dimensions; "
                "they cannot be compared"
            )
        metrics["mean_cosine"] = float((vectors.double() * others.double()).sum(1).mean())
    advance(len(data.examples))
    return metrics


def _retrieval(vectors: Tensor, texts: Texts) -> dict[str, float]:
    """Means over different queries; a query that several rows have has the positives of all."""
    positives: dict[int, set[int]] = defaultdict(set)
    for query, positive, *_ in texts.of:
        positives[query].add(positive)
    corpus = sorted({document for _, *documents in texts.of for document in documents})
    place = {document: n for n, document in enumerate(corpus)}
    documents = vectors[corpus].T
    gains, reciprocals = 0.0, 0.0
    for some in torch.split(torch.tensor(list(positives)), QUERIES):
        for query, scores in zip(some.tolist(), vectors[some] @ documents, strict=True):
            relevant = torch.zeros(len(corpus), dtype=torch.bool)
            relevant[[place[document] for document in positives[query]]] = True
            ranks = ranks_of_relevant(scores, relevant)
            gains += ndcg(ranks)
            reciprocals += reciprocal_rank(ranks)
    return {"ndcg_at_10": gains / len(positives), "mrr": reciprocals / len(positives)}


def _loss(vectors: Tensor, texts: Texts, scale: float) -> float:
    """The mean InfoNCE loss, each query among its own candidates, as `estimate-fisher` has it."""
    total = 0.0
    for query, *documents in texts.of:
        logits = scale * (vectors[documents] @ vectors[query])
        total -= float(log_probabilities(logits)[0])
    return total / len(texts.of)


def _sts_spearman(vectors: Tensor, texts: Texts, examples: Sequence[Example]) -> float:
    """Of cosines and scores; NaN where all scores or all cosines are equal."""
    first, second = torch.tensor(texts.of).T
    cosines = (vectors[first].double() * vectors[second].double()).sum(1)
    found = spearman(cosines.tolist(), [one.score or 0.0 for one in examples])
    return nan if found is None else found
